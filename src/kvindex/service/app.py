"""The service as an ASGI application: every route, with its schema and its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .. import arguments
from ..errors import InvalidValueError
from ..index import PrefixIndex
from ..routing import EndpointPicker
from . import requests
from .call import Endpoint, Gate, Limits, Refused, encode
from .figures import EVERY, Figures
from .fleet import Fleet
from .openapi import document
from .peers import Peers
from .replicated import ReplicatedPods
from .v1 import V1, binary_tokens

__all__ = ["Call", "Service"]

PAGE: Final = Path(__file__).with_name("page")
_MEDIA: Final = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
# The page connects only to this service and runs only its own files.
_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
_TOKENS: Final = {"tokens": "token_ids", "hashes": "seq_hashes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One route."""

    method: str
    path: str
    call: Callable[..., Any]
    about: str
    tag: str
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    binary: Callable[[bytes], Any] | None = None
    free: bool = False
    answers: dict[int, str] = field(default_factory=lambda: {200: "The answer."})
    errors: tuple[int, ...] = ()
    media_type: str = "application/json"
    names: dict[str, str] | None = None


class Service:
    """An ASGI application over an index, the manager that keeps it, and a picker.

    It belongs to one event loop. Handlers query the index in that loop, because a match takes microseconds. Encoding of
    texts, registrations and snapshots run in threads. The application neither starts nor closes its arguments.

    Args:
        index: The index.
        manager: The :class:`EventManager` that follows the pods; ``/register`` adds to it. Or the
            :class:`~kvindex.replication.ReplicatedIndex` that contains the index: ``/register`` is then refused, and
            ``/readyz`` waits for the log.
        picker: The picker; None creates an ``EndpointPicker(index, manager)``.
        encoder: A :class:`~kvindex.text.PromptEncoder` or :class:`~kvindex.text.RemoteEncoder` for requests with
            a text or messages; None refuses these.
        limits: Limits of requests.
        token: Bearer token that every call needs, except ``/healthz``, ``/readyz``, ``/health``, the page and the
            OpenAPI document. None accepts calls without a token.

    Raises:
        InvalidValueError: The token is empty or has characters that a header cannot have.
    """

    def __init__(
        self, index: PrefixIndex, manager: Any, *, picker: EndpointPicker | None = None, encoder: Any = None,
        limits: Limits | None = None, token: str | None = None,
    ) -> None:  # fmt: skip
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
            raise InvalidValueError(
                f"token has {len(token)} characters; it must have printable ASCII and no blanks around"
            )
        limits = limits or Limits()
        self.picker = EndpointPicker(index, manager) if picker is None else picker
        if hasattr(manager, "pod_status"):
            manager = ReplicatedPods(manager)
        self.index, self.manager = index, manager
        self.fleet = Fleet(index, manager)
        self.gate = Gate(limits, token)
        self.figures = Figures(index, manager, self.picker, lambda: peers.counts())
        self.v1 = v1 = V1(index, manager, self.fleet, self.picker, encoder, limits, self.figures)
        peers = Peers(index, manager, self.fleet, limits, self.figures)
        self.calls = (*_own(v1, self.figures), *_of_peers(peers))
        self._document = encode(document(self.calls, token is not None))
        self._endpoints = {(call.method, call.path): self._endpoint(call) for call in self.calls}
        self._app = Starlette(
            routes=[
                *(Route(path, endpoint, methods=[method]) for (method, path), endpoint in self._endpoints.items()),
                Route("/openapi.json", self._openapi, methods=["GET"]),
                Route("/", _page("page.html"), methods=["GET"]),
                *(Route(f"/{name}", _page(name), methods=["GET"]) for name in ("page.js", "page.css")),
            ],
            exception_handlers={HTTPException: _not_routed},  # type: ignore[dict-item]
            lifespan=self._lifespan,
        )
        self.background: list[Callable[[], Any]] = []
        """Coroutine functions that run as long as the service does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette's layers and routing take as long as a match of 2,048 blocks, so known paths skip them. They are
        # needed for other paths, below the path of a mount, and if an instrumentation has added its middleware.
        endpoint = self._endpoints.get((scope.get("method", ""), scope.get("path", "")))
        if endpoint is None or self._app.user_middleware or scope.get("root_path"):
            await self._app(scope, receive, send)
        else:
            await endpoint(scope, receive, send)

    def _endpoint(self, call: Call) -> Endpoint:
        return Endpoint(
            self.gate, self.figures, call.path, call.call, body=call.body, query=call.query, binary=call.binary,
            free=call.free, names=call.names,
        )  # fmt: skip

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(each()) for each in (self._tick, *self.background)]
        try:
            yield
        finally:
            self.v1.closing = True
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _tick(self) -> None:
        while True:
            self.figures.tick()
            await asyncio.sleep(EVERY)

    async def _openapi(self, _: Request) -> Response:
        return Response(self._document, media_type="application/json")


def _page(name: str) -> Callable[[Request], Any]:
    path = PAGE / name
    headers = {
        "content-security-policy": _POLICY,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(_: Request) -> Response:
        return Response(path.read_bytes(), media_type=_MEDIA[path.suffix], headers=headers)

    return page


async def _not_routed(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        refused = Refused(
            405, "method", f"{request.url.path} takes {(error.headers or {}).get('Allow', 'another method')}"
        )
    else:
        refused = Refused(
            error.status_code, "unknown", f"there is no {arguments.shown(request.url.path)}; see /openapi.json"
        )
    return Response(refused.body(), error.status_code, dict(error.headers or {}), "application/json")


# Statuses of the errors that every call behind the token may return, and every call with a body.
_ANY: Final = (401, 500)
_BODY: Final = (*_ANY, 400, 408, 413, 503)


def _own(v1: V1, figures: Figures) -> tuple[Call, ...]:
    async def metrics() -> Response:
        text = await asyncio.to_thread(figures.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    asked: dict[str, Any] = {"method": "POST", "tag": "index"}
    told: dict[str, Any] = {"method": "GET", "tag": "fleet", "errors": _ANY}
    return (
        Call(path="/v1/match", call=v1.match, body=requests.Match, binary=binary_tokens, errors=(*_BODY, 404),
             about="How much of a prompt each pod holds", **asked),
        Call(path="/v1/pick", call=v1.pick, body=requests.Pick, binary=binary_tokens, errors=(*_BODY, 404),
             about="The pod for a prompt, with its work reserved", **asked),
        Call(path="/v1/prefilled", call=v1.prefilled, body=requests.Prefilled, errors=(*_BODY, 404),
             about="A picked request has its first token", **asked),
        Call(path="/v1/finished", call=v1.finished, body=requests.Finished, errors=(*_BODY, 404),
             about="A picked request is over", **asked),
        Call(path="/v1/pods", call=v1.pods, about="Every pod with its streams", **told),
        Call(path="/v1/fleet", call=v1.fleet, about="The page's table", **told),
        Call(path="/v1/history", call=v1.history, query=requests.History, about="Counts over time, the last half hour",
             **{**told, "errors": (*_ANY, 400)}),
        Call(path="/v1/sources", call=v1.sources, about="The pods that were registered, as --pods reads them", **told),
        Call(path="/v1/snapshot", call=v1.snapshot, media_type="application/octet-stream",
             about="The whole index, for PrefixIndex.load and --from", **{**told, "errors": (*_ANY, 503)}),
        Call(path="/metrics", call=metrics, media_type="text/plain", about="Figures for Prometheus", **told),
        Call(path="/healthz", call=v1.healthz, free=True, about="The process answers", **{**told, "errors": (500,)}),
        Call(path="/readyz", call=v1.readyz, free=True, about="The history of the pods is applied",
             answers={200: "Ready.", 503: "Not yet, or no longer."}, **{**told, "errors": (500,)}),
    )  # fmt: skip


def _of_peers(peers: Peers) -> tuple[Call, ...]:
    asked: dict[str, Any] = {"method": "POST", "tag": "peers"}
    told: dict[str, Any] = {"method": "GET", "tag": "peers", "errors": _ANY}
    return (
        Call(path="/query", call=peers.query, body=requests.Query, names=_TOKENS, errors=(*_BODY, 404),
             about="Cached tokens of a prompt by instance", **asked),
        Call(path="/query_by_hash", call=peers.query_by_hash, body=requests.QueryByHash, names=_TOKENS,
             errors=(*_BODY, 404), about="The same by the prompt's hashes", **asked),
        Call(path="/register", call=peers.register, body=requests.Register, errors=(*_BODY, 409),
             answers={200: "Registered (Mooncake).", 201: "Registered (Dynamo)."}, about="Follow a publisher", **asked),
        Call(path="/unregister", call=peers.unregister, body=requests.Unregister, errors=(*_BODY, 404),
             about="Follow it no longer", **asked),
        Call(path="/workers", call=peers.workers, query=requests.WorkersQuery, about="Instances and their streams",
             **{**told, "errors": (*_ANY, 400)}),
        Call(path="/global_view", call=peers.global_view, about="Models, routing groups and instances", **told),
        Call(path="/services", call=peers.services, about="Publishers that are followed", **told),
        Call(path="/dump", call=peers.dump, answers={}, about="Not offered: GET /v1/snapshot instead",
             **{**told, "errors": (*_ANY, 501)}),
        Call(path="/register_peer", call=peers.register_peer, body=requests.Peer, answers={201: "Kept."},
             errors=(*_BODY, 409), about="Keep the address of another service", **asked),
        Call(path="/deregister_peer", call=peers.deregister_peer, body=requests.Peer, errors=(*_BODY, 404),
             about="Forget it", **asked),
        Call(path="/peers", call=peers.peers, about="Addresses of other services", **told),
        Call(path="/health", call=peers.ok, free=True, about="The process answers", **{**told, "errors": (500,)}),
        Call(path="/reopen_logs", call=peers.ok, errors=_ANY, about="There are no log files: nothing to do", **asked),
    )  # fmt: skip

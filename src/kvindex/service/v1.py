"""Our own routes: questions, picks, pods, snapshots."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import KVIndexError, SnapshotError
from ..routing import Choice, EndpointPicker
from ..sync.source import PodSource
from .call import Limits, Refused, encode
from .fleet import REGISTERED, Fleet
from .replicated import ReplicatedPods
from .requests import Finished, History, Match, Pick, Prefilled

if TYPE_CHECKING:
    from ..index import PrefixIndex
    from .figures import Figures

__all__ = ["V1", "binary_tokens", "spelled_source"]

# Seconds during which a pick can be finished; the picker's own reservation ends after 600.
_KEPT: Final = 1200.0
_MOST_PICKS: Final = 65536
_PIECE: Final = 1 << 20
# Seconds that sending a snapshot may take.
_SENDING: Final = 120.0


def binary_tokens(data: bytes) -> Any:
    """Read a body of little-endian u32 as token ids."""
    if len(data) % 4:
        raise Refused(
            400, "invalid_value", f"{len(data)} bytes are no whole number of tokens of 4 bytes", field="tokens"
        )
    return np.frombuffer(data, dtype="<u4")


def spelled_source(source: PodSource) -> dict[str, Any]:
    """A source in the form that a list of pods has (:func:`kvindex.discovery.read_pods`), without its keys."""
    item = {
        "name": source.name,
        "model": source.model,
        "ranks": {str(rank): list(pair) for rank, pair in source.workers().items()},
        "topic": source.topic,
        "block_size": source.block_size,
        "lora": source.lora,
        "engine": source.engine,
        "eagle": sorted(source.eagle) if isinstance(source.eagle, frozenset) else source.eagle,
        "hybrid": source.hybrid,
        "ignore_media": sorted(source.ignore_media),
        "address": source.address,
        "labels": dict(source.labels),
    }
    return {name: value for name, value in item.items() if value not in (None, False, [], {})}


class V1:
    """The handlers. Those that only query the index run in the event loop, because a match takes microseconds."""

    def __init__(
        self, index: PrefixIndex, manager: Any, fleet: Fleet, picker: EndpointPicker, encoder: Any, limits: Limits,
        figures: Figures,
    ) -> None:  # fmt: skip
        self._index, self._manager, self._fleet, self._picker = index, manager, fleet, picker
        self._encoder, self._limits, self._figures = encoder, limits, figures
        # Identifiers belong to this process: after a restart, a client cannot finish a pick of another client.
        self._prefix = secrets.token_hex(4)
        self._picks: OrderedDict[str, tuple[Choice, float]] = OrderedDict()
        self._waited: set[str] | None = None
        self._started = time.monotonic()
        self._sending = False
        self.closing = False
        self.ready_after = 30.0
        """Seconds after which the service is ready even if pods are stale."""
        self._shown: tuple[float, bytes] = (0.0, b"")
        self.example: list[int] = []
        """Token ids that the page asks about until the user has typed others."""

    # ---- questions

    def match(self, asked: Match) -> Any:
        return self._with_tokens(asked, self._match)

    def pick(self, asked: Pick) -> Any:
        return self._with_tokens(asked, self._pick)

    def _with_tokens(self, asked: Any, then: Callable[[Any, Any], Any]) -> Any:
        given = [name for name in ("tokens", "text", "messages") if getattr(asked, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing is asked about"
            raise Refused(
                400, "invalid_value" if given else "missing", f"{said}: give one of tokens, text and messages",
                field=given[-1] if given else "tokens",
            )  # fmt: skip
        if asked.tokens is None:
            return self._encoded(asked, given[0], then)
        self._bounded(len(asked.tokens), "tokens")
        return then(asked, asked.tokens)

    def _bounded(self, number: int, field: str) -> None:
        if number > self._limits.max_tokens:
            raise Refused(
                413,
                "too_large",
                f"{field} has {number:,} items; at most {self._limits.max_tokens:,} are taken",
                field=field,
            )

    async def _encoded(self, asked: Any, field: str, then: Callable[[Any, Any], Any]) -> Any:
        if self._encoder is None:
            raise Refused(
                400, "no_tokenizer", f"{field} needs a tokenizer: start the service with --tokenizer or --tokenize-url",
                field=field,
            )  # fmt: skip
        try:
            if field == "text":
                tokens = await asyncio.to_thread(self._encoder.encode, asked.text)
            else:
                tokens = await asyncio.to_thread(self._encoder.encode_chat, asked.messages, asked.tools)
        except KVIndexError as error:
            raise Refused(400, "not_encoded", str(error), field=field) from None
        self._bounded(len(tokens), field)
        return then(asked, tokens)

    def _match(self, asked: Match, tokens: Any) -> bytes:
        model = self._fleet.model(asked.model)
        pods = self._fleet.view().models[model] if asked.pods is None else self._index.pod_set(asked.pods)
        match = self._index.match_prefix(
            tokens, model=model, lora_name=asked.lora_name, cache_salt=asked.cache_salt, extra_keys=asked.extra_keys,
            ready_pods=pods, only_exact=asked.only_exact,
        )  # fmt: skip
        best = match.best()
        self._figures.asked(len(tokens), best[1] if best else 0)
        return encode(
            {
                "model": model,
                "tokens": len(tokens),
                "blocks": match.blocks,
                "block_size": self._index.block_size,
                "best": best and {"pod": best[0], "tokens": best[1]},
                "pods": {pod: match[pod]._asdict() for pod in match},
                "inexact": self._fleet.inexact(pods.pods),
            }
        )

    def _pick(self, asked: Pick, tokens: Any) -> bytes:
        model = self._fleet.model(asked.model)
        choice = self._picker.pick(
            tokens, pods=asked.pods, labels=asked.labels, model=model, lora_name=asked.lora_name,
            cache_salt=asked.cache_salt, extra_keys=asked.extra_keys,
        )  # fmt: skip
        if choice is None:
            pods = self._fleet.view().models[model].pods if asked.pods is None else asked.pods
            raise Refused(
                503, "no_pod_ready", "no pod is ready for this prompt: each is stale, or none is named", field="pods",
                headers={"retry-after": "1"}, more={"inexact": self._fleet.inexact(pods)},
            )  # fmt: skip
        self._figures.asked(len(tokens), choice.cached_tokens)
        now = time.monotonic()
        while self._picks and (next(iter(self._picks.values()))[1] < now or len(self._picks) >= _MOST_PICKS):
            self._picks.popitem(last=False)
        name = f"{self._prefix}-{choice.id}"
        self._picks[name] = choice, now + _KEPT
        return encode(
            {
                "id": name,
                "pod": choice.pod,
                "rank": choice.rank,
                "address": choice.address,
                "state": self._fleet.state(choice.pod),
                "cached_tokens": choice.cached_tokens,
                "prefill_tokens": choice.prefill_tokens,
                "candidates": choice.candidates,
                "cost": choice.cost,
            }
        )

    def prefilled(self, asked: Prefilled) -> bytes:
        self._picker.prefilled(self._picked(asked.id))
        return b'{"status":"ok"}'

    def finished(self, asked: Finished) -> bytes:
        self._picker.finished(self._picked(asked.id), asked.cached_tokens)
        del self._picks[asked.id]
        return b'{"status":"ok"}'

    def _picked(self, name: str) -> Choice:
        found = self._picks.get(name)
        if found is None:
            raise Refused(
                404,
                "unknown",
                f"no pick {name[:80]!r}: it is finished, or of another process, or too long ago",
                field="id",
            )
        return found[0]

    # ---- the fleet

    def pods(self) -> bytes:
        """Everything that is known about every pod."""
        sources = self._fleet.view().sources
        pods = {
            name: {**msgspec.to_builtins(status, str_keys=True), **_of_source(sources.get(name))}
            for name, status in self._manager.status().items()
        }
        told = {"block_size": self._index.block_size, "index": self._index.stats(), "pods": pods}
        return encode({**told, **self._log()})

    def _log(self) -> dict[str, Any]:
        manager = self._manager
        return {"log": manager.log()} if isinstance(manager, ReplicatedPods) else {}

    def sources(self) -> bytes:
        """The registered pods, as a list that ``--pods`` reads."""
        return encode([spelled_source(source) for source in self.registered()])

    def registered(self) -> list[PodSource]:
        return [source for source in self._manager.pods().values() if REGISTERED in source.labels]

    def fleet(self) -> bytes:
        """The page's table. It is built at most once in half a second, however many browsers request it."""
        now = time.monotonic()
        if now - self._shown[0] > 0.5:
            self._shown = now, self._rows()
        return self._shown[1]

    def _rows(self) -> bytes:
        sources = self._fleet.view().sources
        pods = self._manager.status()
        stats = self._picker.stats()
        requests: dict[str, int] = {}
        waiting: dict[str, int] = {}
        for (pod, _), load in stats["workers"].items():
            requests[pod] = requests.get(pod, 0) + load["requests"]
            waiting[pod] = waiting.get(pod, 0) + load["prefill_tokens"]
        rows = [
            {
                "pod": name,
                "model": status.model,
                "state": status.state,
                "reason": status.reason,
                "blocks": status.blocks,
                "lag": status.lag,
                "ranks": len(status.workers),
                "restarts": status.restarts,
                "lost": status.lost_batches,
                "errors": sum(status.errors.values()),
                "batches": status.batches,
                "requests": requests.get(name, 0),
                "waiting": waiting.get(name, 0),
                "address": sources[name].address if name in sources else None,
            }
            for name, status in pods.items()
        ]
        index = self._index.stats()
        return encode(
            {
                "rows": rows,
                "block_size": self._index.block_size,
                "blocks": index["blocks"],
                "bytes": index["bytes"],
                "text": self._encoder is not None,
                "now": self._figures.latest(pods),
                **({"example": self.example} if self.example else {}),
                **self._log(),
            }
        )

    def history(self, asked: History) -> bytes:
        return encode(self._figures.history(asked.since))

    def healthz(self) -> bytes:
        return b'{"status":"ok"}'

    def readyz(self) -> tuple[int, bytes]:
        """Ready as soon as each pod that was there at the start has been current once: its history is then applied."""
        if self.closing:
            return 503, encode({"ready": False, "reason": "closing"})
        late = time.monotonic() - self._started > self.ready_after
        log = self._log().get("log")
        if self._waited is None:
            # The pods are not known before the log is.
            if log is not None and not log["trusted"] and not late:
                return 503, encode({"ready": False, "reason": log["reason"]})
            self._waited = set(self._fleet.view().sources)
        followed = self._fleet.view().sources
        self._waited = {pod for pod in self._waited if pod in followed and self._fleet.state(pod) == "stale"}
        ready = late or not self._waited
        waiting = sorted(self._waited)[:20]
        return (200 if ready else 503), encode({"ready": ready, "waiting": waiting, "stale": len(self._waited)})

    # ---- snapshots

    async def snapshot(self) -> Response:
        if self._sending:
            raise Refused(503, "too_many_requests", "a snapshot is being sent already", headers={"retry-after": "5"})
        self._sending = True
        try:
            data = await asyncio.to_thread(self._index.dumps)
        except SnapshotError as error:
            self._sending = False
            raise Refused(409, "no_snapshot", str(error)) from None
        except BaseException:
            self._sending = False
            raise
        return _Snapshot(data, self._sent)

    def _sent(self) -> None:
        self._sending = False


class _Snapshot(Response):
    """A snapshot in pieces, so that other requests are served in between."""

    def __init__(self, data: bytes, sent: Callable[[], None]) -> None:
        super().__init__(media_type="application/octet-stream")
        self._data, self._sent = data, sent
        self.headers["content-length"] = str(len(data))
        self.headers["content-disposition"] = 'attachment; filename="kvindex.snapshot"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(_SENDING):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                view = memoryview(self._data)
                for at in range(0, len(view), _PIECE):
                    await send({"type": "http.response.body", "body": bytes(view[at : at + _PIECE]), "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._sent()


def _of_source(source: PodSource | None) -> dict[str, Any]:
    return {} if source is None else {"address": source.address, "labels": dict(source.labels)}

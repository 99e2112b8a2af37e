"""Envoy and the Gateway API Inference Extension: an endpoint picker behind Envoy's external processing (``ext_proc``).

:class:`EndpointPickerService` speaks the endpoint picker protocol 1.0: the destination in a header and in dynamic
metadata, subsets, and bodies in full-duplex streams. ``kvindex epp`` runs it. It needs the extra ``envoy`` (``pip
install 'kvindex[envoy]'``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

try:
    import grpc
    from envoy_data_plane.envoy.config.core.v3 import (
        HeaderValue,
        HeaderValueOption,
        HeaderValueOptionHeaderAppendAction,
    )
    from envoy_data_plane.envoy.service.ext_proc.v3 import (
        BodyMutation,
        BodyResponse,
        CommonResponse,
        HeaderMutation,
        HeadersResponse,
        ImmediateResponse,
        ProcessingRequest,
        ProcessingResponse,
        StreamedBodyResponse,
        TrailersResponse,
    )
    from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
    from envoy_data_plane.google.protobuf import Struct
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
except ImportError as error:
    raise ImportError(f"kvindex.integrations.envoy needs {error.name}: pip install 'kvindex[envoy]'") from None

from .. import EventManager, KVIndexError, PrefixIndex
from ..routing import Choice, EndpointPicker
from ._requests import Encoder, token_ids

__all__ = ["EndpointPickerService"]

log = logging.getLogger(__name__)

# Names of the endpoint picker protocol: kubernetes-sigs/gateway-api-inference-extension, docs/proposals/004.
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
NAMESPACE, HINT = "envoy.lb", "envoy.lb.subset_hint"
# Envoy refuses chunks of 64 KiB or more.
_CHUNK = 62_000
# The usage is at the end of an answer, streamed or not.
_TAIL = 4096
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d+)')


class _Refused(Exception):
    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class EndpointPickerService:
    """Answers Envoy's ``ext_proc`` streams with the endpoint at which a request costs least.

    Endpoints are the addresses of the manager's pods (:attr:`PodSource.address`). The first endpoint of an answer is
    the picker's choice, the others are fallbacks in the order of their caches. If no pod has a current stream, the
    endpoint is chosen at random: a gateway whose events have stopped still serves. A request gets 503 if no pod is in
    the gateway's subset, 429 if all pods have ``max_in_flight`` requests, 413 above ``max_body``, and 400 if its prompt
    cannot be encoded.

    Args:
        index: The index to match prompts in.
        manager: The manager that follows the pods.
        encoder: :class:`PromptEncoder` or :class:`RemoteEncoder`, for prompts that are texts or messages. Without one,
            such requests are balanced by load.
        fallbacks: Number of endpoints that are named after the choice.
        max_in_flight: Requests at a pod beyond which it gets no more; None for no limit.
        max_body: Bytes of a request's body.
        options: Further arguments of :class:`EndpointPicker`.
    """

    def __init__(
        self,
        index: PrefixIndex,
        manager: EventManager,
        *,
        encoder: Encoder | None = None,
        fallbacks: int = 2,
        max_in_flight: int | None = None,
        max_body: int = 16 << 20,
        **options: Any,
    ) -> None:
        self.picker = EndpointPicker(index, manager, **options)
        self._index, self._manager, self._encoder = index, manager, encoder
        self._fallbacks, self._most, self._max_body = fallbacks, max_in_flight, max_body
        self._running: Counter[str] = Counter()
        self._health = health.aio.HealthServicer()

    async def serve(self, address: str, credentials: Any = None) -> tuple[Any, int]:
        """Start a gRPC server at ``host:port`` with the picker and the health services. Returns the
        server and its port.

        Args:
            address: The address to listen on; port 0 takes any free one.
            credentials: Those of ``grpc.ssl_server_credentials``; None for plain text.

        Raises:
            RuntimeError: The address cannot be bound.
        """
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", self._max_body + (1 << 20))])
        method = grpc.stream_stream_rpc_method_handler(self.process, ProcessingRequest.parse, bytes)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": method}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self.ready(False)
        for name in ("", "liveness", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        await server.start()
        return server, port

    async def ready(self, is_ready: bool = True) -> None:
        """Set the status of the health service ``readiness``."""
        states = health_pb2.HealthCheckResponse
        await self._health.set("readiness", states.SERVING if is_ready else states.NOT_SERVING)

    async def process(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        """Handle one HTTP request, as Envoy describes it."""
        choice: Choice | None = None
        body, tail, subset, length, answered = bytearray(), b"", None, 0, False
        try:
            async for each in requests:
                headers, part, trailers = each.request_headers, each.request_body, each.request_trailers
                if headers is not None:
                    subset = _subset(each.metadata_context)
                if part is not None:
                    body += part.body
                    if len(body) > self._max_body:
                        raise _Refused(413, f"the body has more than {self._max_body} bytes")
                # In a full-duplex stream, nothing is answered before the whole prompt has arrived.
                ends = trailers is not None or any(one is not None and one.end_of_stream for one in (headers, part))
                if ends and not answered:
                    answered = True
                    choice, endpoints, length = await self._picked(bytes(body), subset)
                    yield _destination(endpoints)
                    for answer in _streamed(bytes(body), trailers is None) if body or part is not None else ():
                        yield answer
                if trailers is not None:
                    yield ProcessingResponse(request_trailers=TrailersResponse())
                if each.response_headers is not None:
                    served = _lb(each.metadata_context, NAMESPACE).get(SERVED)
                    if choice is not None and served and served != _endpoint(choice.address):
                        self._finish(choice)
                        choice = None
                    yield ProcessingResponse(response_headers=HeadersResponse())
                elif each.response_body is not None:
                    tail = (tail + each.response_body.body)[-_TAIL:]
                    if choice is not None:
                        self.picker.prefilled(choice)
                    last = each.response_body.end_of_stream
                    if last and choice is not None:
                        found = _CACHED.findall(tail)
                        self._finish(choice, min(int(found[-1]), length) if found else None)
                        choice = None
                    yield ProcessingResponse(response_body=_body(each.response_body.body, last))
                elif each.response_trailers is not None:
                    yield ProcessingResponse(response_trailers=TrailersResponse())
        except _Refused as refused:
            said = json.dumps({"error": {"message": str(refused), "code": refused.status}}).encode()
            yield ProcessingResponse(
                immediate_response=ImmediateResponse(status=HttpStatus(code=StatusCode(refused.status)), body=said)
            )
        finally:
            if choice is not None:
                self._finish(choice)

    async def _picked(self, data: bytes, subset: list[str] | None) -> tuple[Choice | None, list[str], int]:
        """Return the choice, the endpoints to name, and the number of tokens of the prompt."""
        sources = self._manager.pods()
        pods = {name: found for name, each in sources.items() if (found := _endpoint(each.address))}
        if subset is not None:
            pods = {name: found for name, found in pods.items() if found in subset}
        if not pods:
            raise _Refused(503, "no endpoint of the pool is known" if subset is None else "no endpoint of the subset")
        if self._most is not None:
            pods = {name: found for name, found in pods.items() if self._running[name] < self._most}
            if not pods:
                raise _Refused(429, f"every endpoint has {self._most} requests")
        body = _json(data)
        model, served = str(body.get("model") or ""), {sources[name].model for name in pods}
        base, adapter = (model, None) if model in served else (min(served), model or None)
        pods = {name: found for name, found in pods.items() if sources[name].model == base}
        try:
            tokens = await asyncio.to_thread(token_ids, body, self._encoder)
        except KVIndexError as error:
            raise _Refused(400, str(error)) from None
        tokens = () if tokens is None else tokens
        salt = body.get("cache_salt") or None
        choice = self.picker.pick(tokens, pods=pods, model=base, lora_name=adapter, cache_salt=salt)
        first = random.choice(list(pods)) if choice is None else choice.pod
        if choice is not None:
            self._running[first] += 1
        hits = self._index.match_prefix(tokens, model=base, lora_name=adapter, cache_salt=salt, ready_pods=pods).tokens
        others = sorted(pods.keys() - {first}, key=lambda name: -hits.get(name, 0))[: self._fallbacks]
        return choice, [pods[name] for name in (first, *others)], len(tokens)

    def _finish(self, choice: Choice, cached_tokens: int | None = None) -> None:
        self.picker.finished(choice, cached_tokens)
        self._running[choice.pod] -= 1
        if not self._running[choice.pod]:
            del self._running[choice.pod]


def _endpoint(address: str | None) -> str | None:
    """Return ``ip:port`` of a pod's address."""
    return (urlsplit(address if "//" in address else f"//{address}").netloc or None) if address else None


def _lb(metadata: Any, namespace: str) -> Mapping[str, Any]:
    found = metadata.filter_metadata.get(namespace) if metadata is not None else None
    fields: Mapping[str, Any] = found.to_dict() if found is not None else {}
    return fields


def _subset(metadata: Any) -> list[str] | None:
    found = _lb(metadata, HINT).get(SUBSET)
    if found is None:
        return None
    return [str(each).strip() for each in (found.split(",") if isinstance(found, str) else found)]


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _destination(endpoints: list[str]) -> Any:
    value = ",".join(endpoints)
    header = HeaderValueOption(
        header=HeaderValue(key=DESTINATION, raw_value=value.encode()),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    common = CommonResponse(header_mutation=HeaderMutation(set_headers=[header]))
    metadata = Struct.from_dict({NAMESPACE: {DESTINATION: value}})
    return ProcessingResponse(request_headers=HeadersResponse(response=common), dynamic_metadata=metadata)


def _streamed(body: bytes, last: bool) -> list[Any]:
    starts = range(0, max(len(body), 1), _CHUNK)
    return [
        ProcessingResponse(request_body=_body(body[at : at + _CHUNK], last and at + _CHUNK >= len(body)))
        for at in starts
    ]


def _body(data: bytes, last: bool) -> Any:
    streamed = StreamedBodyResponse(body=data, end_of_stream=last)
    return BodyResponse(response=CommonResponse(body_mutation=BodyMutation(streamed_response=streamed)))

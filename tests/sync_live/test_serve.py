"""The service over real sockets: its own routes, and those of peers in the format of their documentation."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest
import trustme
from starlette.applications import Starlette
from starlette.routing import Mount
from sync_support import until
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kvindex import EventManager, PodSource, PrefixIndex, SnapshotError, local_hashes, prefix_hashes
from kvindex.service import Limits, Service
from kvindex.service.server import Server, Snapshots, fetched, pods_file, restored
from kvindex.sim import SimProcess
from kvindex.sim.tokenizer import text_ids

NO_PUBLISHER = "tcp://127.0.0.1:9"


class Client:
    """One connection with JSON requests and answers."""

    def __init__(self, connection, token=None):
        self.connection = connection
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def raw(self, method, path, body=None, headers=None):
        self.connection.request(method, path, body, {**self.headers, **(headers or {})})
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer

    def __call__(self, method, path, body=None, **headers):
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        status, said, answer = self.raw(method, path, data, headers)
        assert answer.getheader("content-type") == "application/json"
        return status, json.loads(said)


class Running:
    def __init__(self, **options):
        self.block_size = options.pop("block_size", 16)
        self.index = options.pop("index", None) or PrefixIndex(block_size=self.block_size)
        self.manager = EventManager(self.index)
        token = options.get("token")
        where = {name: options.pop(name) for name in ("uds", "ssl", "host") if name in options}
        self.service = Service(self.index, self.manager, **options)
        self.server = Server(self.service, port=0, **where)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        self.port = int(self.server.url.rpartition(":")[2]) if self.server.url else None
        until(lambda: self.server._server.started)
        self.ask = Client(self.connect(), token) if self.port and "ssl" not in where else None

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def close(self):
        if self.ask is not None:
            self.ask.connection.close()
        self.server.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.manager.close()


@contextmanager
def running(**options):
    served = Running(**options)
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def pods():
    with SimProcess(name="a", blocks=2000, http=0) as a, SimProcess(name="b", blocks=2000) as b:
        yield {"a": a, "b": b}


@pytest.fixture
def served(pods):
    """Run a service that follows two pods. Pod a holds 4 blocks of PROMPT, and b holds 2."""
    with running() as made:
        for name, pod in pods.items():
            made.manager.add_pod(PodSource(name, ranks=pod.ranks, model="sim", engine="vllm", address=f"http://{name}"))
        made.manager.wait_until_current(20)
        pods["a"].serve(PROMPT[:64])
        pods["b"].serve(PROMPT[:32])
        until(lambda: held(made) == {"a": 64, "b": 32})
        yield made


PROMPT = list(range(1000, 1080))


def held(served):
    match = served.index.match_prefix(PROMPT, model="sim")
    return {pod: match[pod].held for pod in match}


# ---- kvindex's own paths


def test_a_match_by_tokens_and_by_bytes(served):
    status, answer = served.ask("POST", "/v1/match", {"tokens": PROMPT})
    assert status == 200
    assert answer == {
        "model": "sim",
        "tokens": 80,
        "blocks": 5,
        "block_size": 16,
        "best": {"pod": "a", "tokens": 64},
        "pods": {
            pod: json.loads(json.dumps(served.index.match_prefix(PROMPT, model="sim")[pod]._asdict())) for pod in "ab"
        },
        "inexact": {},
    }
    assert answer["pods"]["b"]["held"] == 32
    status, binary, _ = served.ask.raw(
        "POST",
        "/v1/match?model=sim",
        np.array(PROMPT, dtype="<u4").tobytes(),
        {"content-type": "application/octet-stream"},
    )
    assert (status, json.loads(binary)) == (200, answer)
    assert served.ask("POST", "/v1/match", {"tokens": PROMPT, "pods": ["b", "c"]})[1]["best"] == {
        "pod": "b",
        "tokens": 32,
    }
    assert list(served.ask("POST", "/v1/match", {"tokens": PROMPT, "cache_salt": "x"})[1]["pods"]) == []


def test_a_pick_is_reserved_prefilled_and_finished_once(served):
    status, choice = served.ask("POST", "/v1/pick", {"tokens": PROMPT, "model": "sim"})
    assert (status, choice["pod"], choice["address"], choice["state"]) == (200, "a", "http://a", "exact")
    assert choice["cached_tokens"] == 64
    (row,) = (row for row in served.ask("GET", "/v1/fleet")[1]["rows"] if row["pod"] == "a")
    assert row["requests"] == 1
    assert served.ask("POST", "/v1/prefilled", {"id": choice["id"]}) == (200, {"status": "ok"})
    assert served.ask("POST", "/v1/finished", {"id": choice["id"], "cached_tokens": 81})[1]["field"] == "cached_tokens"
    assert served.ask("POST", "/v1/finished", {"id": choice["id"], "cached_tokens": 64}) == (200, {"status": "ok"})
    assert served.service.picker.stats()["pods"]["a"]["reported_tokens"] == 64
    status, gone = served.ask("POST", "/v1/finished", {"id": choice["id"]})
    assert (status, gone["reason"], gone["field"]) == (404, "unknown", "id")
    assert served.ask("POST", "/v1/pick", {"tokens": PROMPT, "pods": ["nobody"]})[0] == 503


def test_pods_and_their_state_with_reason(served, pods):
    status, answer = served.ask("GET", "/v1/pods")
    assert status == 200
    assert answer["index"]["blocks"] == served.index.stats()["blocks"]
    assert answer["pods"]["a"]["workers"]["0"]["state"] == "exact"
    served.manager.add_pod(PodSource("gone", endpoint=NO_PUBLISHER, model="sim"))
    fleet = {row["pod"]: row for row in served.ask("GET", "/v1/pods")[1]["pods"].values()}
    assert fleet["gone"]["state"] == "stale"
    assert fleet["gone"]["reason"]
    assert served.ask("POST", "/v1/match", {"tokens": PROMPT})[1]["inexact"] == {"gone": "stale"}
    status, metrics, _ = served.ask.raw("GET", "/metrics")
    assert status == 200
    assert b'kvindex_worker_state{pod="a",rank="0",state="exact"} 1.0' in metrics
    for name in (b"kvindex_http_requests_total", b"dynamo_kvindexer_requests_total"):
        assert name + b'{endpoint="/v1/pods",method="GET"} 2.0' in metrics
    assert b'dynamo_kvindexer_listeners{status="active"} 2.0' in metrics
    assert b"llm_d_epp_kv_cache_index_admissions_total" in metrics
    assert served.ask("GET", "/v1/history")[1][0]["time"] > 0
    assert served.ask("GET", "/v1/history?since=99999999999")[1] == []


def test_ready_when_the_history_of_each_pod_is_applied(pods):
    with running() as served:
        served.manager.add_pod(PodSource("gone", endpoint=NO_PUBLISHER, model="sim"))
        assert served.ask("GET", "/healthz") == (200, {"status": "ok"})
        status, said = served.ask("GET", "/readyz")
        assert (status, said) == (503, {"ready": False, "waiting": ["gone"], "stale": 1})
        served.manager.add_pod(PodSource("later", endpoint="tcp://127.0.0.1:10", model="sim"))
        served.manager.remove_pod("gone")
        assert served.ask("GET", "/readyz")[0] == 200
        served.service.v1.closing = True
        assert served.ask("GET", "/readyz") == (503, {"ready": False, "reason": "closing"})


class Letters:
    """A stand-in for a tokenizer: ids of letters."""

    def encode(self, text):
        return np.array(text_ids(text), dtype=np.uint32)

    def encode_chat(self, messages, tools=None):
        return self.encode("".join(message["content"] for message in messages))


def test_texts_and_messages_need_a_tokenizer(served):
    for asked in ({"text": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}):
        status, said = served.ask("POST", "/v1/match", asked)
        assert (status, said["reason"], said["field"]) == (400, "no_tokenizer", next(iter(asked)))
    with running(encoder=Letters()) as other:
        other.manager.add_pod(PodSource("a", endpoint=NO_PUBLISHER, model="sim"))
        assert other.ask("POST", "/v1/match", {"text": "hello"})[1]["tokens"] == 5
        assert other.ask("POST", "/v1/match", {"messages": [{"role": "user", "content": "hell"}]})[1]["tokens"] == 4


# ---- Mooncake's conductor, by the samples of its documentation

MOONCAKE = {
    "endpoint": NO_PUBLISHER,
    "replay_endpoint": "tcp://127.0.0.1:11",
    "type": "vLLM",
    "modelname": "deepseek",
    "lora_name": "sql-adapter",
    "tenant_id": "default",
    "instance_id": "vllm-prefill-node1",
    "block_size": 128,
    "dp_rank": 0,
    "additionalsalt": "w8a8",
}
ASKED = {
    "model": "deepseek",
    "lora_name": "sql-adapter",
    "tenant_id": "default",
    "instance_id": "vllm-prefill-node1",
    "block_size": 64,
    "cache_salt": "w8a8",
}


def test_samples_of_mooncakes_conductor():
    with running() as served:
        assert served.ask("POST", "/register", MOONCAKE) == (
            200,
            {"status": "registered successfully", "instance_id": "vllm-prefill-node1"},
        )
        nothing = {"longest_matched": 0, "GPU": 0, "DP": {"0": 0}, "CPU": 0, "DISK": 0, "state": "stale"}
        lower = {
            "longest_matched": 0, "dp": {"0": 0}, "rank_matches": {"0": {"gpu": 0, "cpu": 0, "disk": 0}},
            "gpu": 0, "cpu": 0, "disk": 0, "state": "stale",
        }  # fmt: skip
        expected = {"default": {"vllm-prefill-node1": nothing}, "instances": {"vllm-prefill-node1": lower}}
        assert served.ask("POST", "/query", {**ASKED, "token_ids": [101, 15, 100, 55, 89]}) == (200, expected)
        for name in ("seq_hashes", "block_hash"):
            assert served.ask("POST", "/query_by_hash", {**ASKED, name: [1234567890, 9876543210]}) == (200, expected)
        status, view = served.ask("GET", "/global_view")
        assert (status, view["context_count"]) == (200, 1)
        assert view["contexts"][0]["instances"] == {"vllm-prefill-node1": [0]}
        assert view["contexts"][0]["states"] == {"vllm-prefill-node1": "stale"}
        assert served.ask("GET", "/services")[1] == {
            "count": 1,
            "services": [
                {
                    "Endpoint": NO_PUBLISHER,
                    "ReplayEndpoint": "tcp://127.0.0.1:11",
                    "Type": "vLLM",
                    "ModelName": "deepseek",
                    "LoraName": "sql-adapter",
                    "TenantID": "default",
                    "InstanceID": "vllm-prefill-node1",
                    "BlockSize": 128,
                    "DPRank": 0,
                    "CacheGroup": 0,
                    "HashProfile": None,
                    "State": "stale",
                }
            ],
        }
        gone = {name: MOONCAKE[name] for name in MOONCAKE if "endpoint" not in name and name != "additionalsalt"}
        assert served.ask("POST", "/unregister", gone) == (
            200,
            {"status": "unregistered successfully", "removed_instances": ["vllm-prefill-node1|default|0"]},
        )
        assert served.ask("POST", "/unregister", gone)[0] == 404


def test_mooncakes_answer_counts_tiers_and_ranks():
    index = PrefixIndex(block_size=16)
    with running(index=index) as served:
        for rank, port in ((0, 12), (1, 13)):
            asked = {**MOONCAKE, "endpoint": f"tcp://127.0.0.1:{port}", "replay_endpoint": None, "block_size": 16}
            assert served.ask("POST", "/register", {**asked, "dp_rank": rank})[0] == 200
        tokens = list(range(64))
        one, two = served.manager.pods()
        for pod, medium, blocks in ((one, "GPU", 2), (one, "CPU", 3), (two, "GPU", 4)):
            index.ingest(pod, stored(blocks, medium), model="deepseek", dp_rank=0 if pod == one else 1)
        said = served.ask("POST", "/query", {"model": "deepseek", "token_ids": tokens, "block_size": 16})[1]
        of = said["default"]["vllm-prefill-node1"]
        assert (of["longest_matched"], of["GPU"], of["CPU"], of["DISK"]) == (64, 64, 48, 0)
        assert of["DP"] == {"0": 48, "1": 64}
        assert said["instances"]["vllm-prefill-node1"]["rank_matches"] == {
            "0": {"gpu": 32, "cpu": 48, "disk": 48},
            "1": {"gpu": 64, "cpu": 64, "disk": 64},
        }


def stored(blocks, medium):
    import msgpack

    event = {
        "type": "BlockStored", "block_hashes": list(range(1, blocks + 1)), "parent_block_hash": None,
        "token_ids": list(range(16 * blocks)), "block_size": 16, "medium": medium,
    }  # fmt: skip
    return msgpack.packb([1.0, [event], None])


# ---- Dynamo's standalone indexer


def test_samples_of_dynamos_indexer(pods):
    (endpoint, replay) = pods["a"].ranks[0]
    pods["a"].serve(PROMPT[:64])
    worker = {
        "instance_id": 1, "endpoint": endpoint, "model_name": "llama-3-8b", "block_size": 16,
        "routing_group": "default", "dp_rank": 0, "replay_endpoint": replay, "additional_salt": None,
    }  # fmt: skip
    with running() as served:
        ask = served.ask
        assert ask("GET", "/workers") == (200, [])
        status, said = ask("POST", "/query", {"token_ids": PROMPT, "model_name": "llama-3-8b"})
        assert (status, said["error"]) == (404, "no indexer for model=llama-3-8b routing_group=default")
        assert ask("POST", "/register", worker) == (201, {"status": "ok"})
        status, said = ask("POST", "/register", worker)
        assert (status, said["reason"]) == (409, "invalid_registration")
        assert ask("POST", "/register", {**worker, "instance_id": 3, "block_size": 24})[0] == 409
        assert ask("POST", "/register", {**worker, "instance_id": 4, "endpoint": "nowhere"})[0] == 400
        two = {**worker, "instance_id": 2, "dp_rank": 1, "endpoint": NO_PUBLISHER, "replay_endpoint": None}
        assert ask("POST", "/register", two)[0] == 201
        assert served.manager.wait_until_current(20, pods=["1"])
        body = {"model_name": "llama-3-8b", "routing_group": "default", "lora_name": None, "cache_salt": None}
        expected = {
            "scores": {"1": {"0": 64}, "2": {"1": 0}},
            "frequencies": [1, 1, 1, 1],
            "instances": {
                "1": {"longest_matched": 64, "gpu": 64, "dp": {"0": 64}, "cpu": 64, "disk": 64, "state": "exact"},
                "2": {"longest_matched": 0, "gpu": 0, "dp": {"1": 0}, "cpu": 0, "disk": 0, "state": "stale"},
            },
        }
        assert ask("POST", "/query", {**body, "token_ids": PROMPT}) == (200, expected)
        hashes = local_hashes(PROMPT).view(np.int64).tolist()
        assert ask("POST", "/query_by_hash", {"block_hashes": hashes, "model_name": "llama-3-8b"}) == (200, expected)
        salted = {"block_hashes": hashes, "model_name": "llama-3-8b", "cache_salt": "x"}
        assert ask("POST", "/query_by_hash", salted)[1]["field"] == "cache_salt"
        rolled = {"seq_hashes": prefix_hashes(PROMPT).tolist(), "model": "llama-3-8b"}
        assert ask("POST", "/query_by_hash", rolled)[1]["default"]["1"]["longest_matched"] == 64
        (row,) = ask("GET", "/workers?model_name=llama-3-8b&routing_group=default")[1][:1]
        listener = {"endpoint": endpoint, "status": "active", "state": "exact"}
        assert row == {
            "instance_id": 1, "source": "zmq", "status": "active", "model_name": "llama-3-8b",
            "routing_group": "default", "block_size": 16, "endpoints": {"0": endpoint}, "listeners": {"0": listener},
            "state": "exact",
        }  # fmt: skip
        assert ask("GET", "/workers?model_name=other") == (200, [])
        assert ask("GET", "/dump")[0] == 501
        assert ask("POST", "/register_peer", {"url": "http://peer:8091"}) == (201, {"status": "ok"})
        assert ask("GET", "/peers") == (200, ["http://peer:8091"])
        assert ask("POST", "/deregister_peer", {"url": "http://peer:8091"}) == (200, {"status": "ok"})
        assert ask("POST", "/deregister_peer", {"url": "http://peer:8091"})[0] == 404
        assert ask("GET", "/health")[0] == 200
        assert ask("POST", "/reopen_logs") == (200, {"status": "ok"})
        gone = {"instance_id": 1, "model_name": "llama-3-8b", "routing_group": "default", "dp_rank": 0}
        assert ask("POST", "/unregister", gone) == (200, {"status": "ok"})
        assert ask("POST", "/unregister", gone)[0] == 404
        assert list(served.manager.pods()) == ["2|default|1"]


# ---- refused requests


def has(served, method, path, body, status, reason, field):
    found, said = served.ask(method, path, body)
    assert (found, said.get("reason"), said.get("field")) == (status, reason, field), said
    assert said["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "reason", "field"),
    [
        ("/v1/match", b"{", 400, "invalid_json", None),
        ("/v1/match", b"", 400, "invalid_json", None),
        ("/v1/match", b"\xff\xfe", 400, "invalid_json", None),
        ("/v1/match", b'{"messages":[{"a":' + b"[" * 6_000_000, 400, "invalid_json", None),
        ("/query", b'{"more":' + b"[" * 6_000_000, 400, "invalid_json", None),
        ("/v1/match", [1], 400, "invalid_type", None),
        ("/v1/match", {"tokens": [1], "tokenz": 2}, 400, "unknown_field", "tokenz"),
        ("/v1/match", {}, 400, "missing", "tokens"),
        ("/v1/match", {"tokens": [1], "text": "a"}, 400, "invalid_value", "text"),
        ("/v1/match", {"tokens": "abc"}, 400, "not_array", "tokens"),
        ("/v1/match", {"tokens": [1, "2"]}, 400, "invalid_type", "tokens"),
        ("/v1/match", {"tokens": [1, 2.5]}, 400, "invalid_type", "tokens"),
        ("/v1/match", {"tokens": [True]}, 400, "invalid_type", "tokens"),
        ("/v1/match", {"tokens": [1, -2]}, 400, "invalid_value", "tokens"),
        ("/v1/match", {"tokens": [1 << 32]}, 400, "invalid_value", "tokens"),
        ("/v1/match", {"tokens": [1], "model": "other"}, 404, "unknown", "model"),
        ("/v1/match", {"tokens": [1] * 16, "extra_keys": [[{}]]}, 400, "invalid_value", "extra_keys"),
        ("/v1/finished", {"id": "x", "cached_tokens": -1}, 400, "out_of_range", "cached_tokens"),
        ("/v1/pick", {"tokens": [1], "labels": {"a": 1}}, 400, "invalid_type", "labels[...]"),
        ("/query", {"token_ids": [1]}, 400, "missing", "model_name"),
        ("/query", {"model": "sim"}, 400, "missing", "token_ids"),
        ("/query", {"model": "sim", "token_ids": [-1]}, 400, "invalid_value", "token_ids"),
        ("/query", {"model": "sim", "token_ids": [1], "block_size": 24}, 400, "invalid_value", "block_size"),
        ("/query", {"model": "sim", "token_ids": [1], "instance_id": "x"}, 404, "unknown", "instance_id"),
        ("/query_by_hash", {"model": "sim"}, 400, "missing", "seq_hashes"),
        ("/query_by_hash", {"model": "sim", "seq_hashes": [1 << 70]}, 400, "out_of_range", "seq_hashes"),
        ("/register", {"instance_id": "x"}, 400, "missing", "endpoint"),
        ("/register", {**MOONCAKE, "type": "Mooncake"}, 400, "invalid_value", "type"),
        ("/register", {**MOONCAKE, "endpoint": "http://127.0.0.1:80"}, 400, "invalid_registration", "endpoint"),
        ("/register", {**MOONCAKE, "block_size": 24}, 400, "invalid_registration", "block_size"),
        ("/register", {**MOONCAKE, "block_size": 0}, 400, "out_of_range", "block_size"),
        ("/register", {**MOONCAKE, "modelname": None}, 400, "missing", "model_name"),
        ("/register_peer", {"url": ""}, 400, "invalid_value", "url"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_bad_input_is_refused_by_field_and_reason(served, path, body, status, reason, field):
    has(served, "POST", path, body, status, reason, field)
    assert served.ask("POST", "/v1/match", {"tokens": PROMPT})[0] == 200


def test_what_there_is_not(served):
    assert served.ask("GET", "/nothing")[0] == 404
    status, said = served.ask("GET", "/v1/match")
    assert (status, said["reason"]) == (405, "method")
    status, said = served.ask(
        "POST", "/v1/match?model=a&model=b", b"1234", **{"content-type": "application/octet-stream"}
    )
    assert (status, said["field"]) == (400, "model")
    status, said = served.ask("POST", "/v1/match", b"12345", **{"content-type": "application/octet-stream"})
    assert (status, said["field"]) == (400, "tokens")
    assert served.ask("GET", "/v1/history?since=x")[1]["field"] == "since"


def test_a_mounted_service_has_its_routes_below_the_path_of_the_mount(served):
    app = Starlette(routes=[Mount("/v1", served.service)])

    async def asked(method, path):
        said = []

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message):
            said.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}
        await app(scope, receive, send)
        return said[0]["status"]

    # The second path is a route of a service that is not mounted.
    statuses = [asyncio.run(asked(*each)) for each in (("GET", "/v1/healthz"), ("POST", "/v1/match"))]
    assert statuses == [200, 404]


def test_a_body_of_50_mb_is_refused_and_the_connection_goes_on(served):
    status, said = served.ask("POST", "/v1/match", b" " * 50_000_000)
    assert (status, said["reason"]) == (413, "too_large")
    assert served.ask("POST", "/v1/match", {"tokens": PROMPT})[0] == 200
    assert served.service.gate.receiving == 0


@pytest.mark.parametrize("opening", ['{"messages":[{"a":', '{"more":', '{"token_ids":', '{"tokens":', ""])
def test_10_mb_of_brackets_are_refused_where_they_are_found(opening):
    nested = opening.encode() + b"[" * 10_000_000
    with running(limits=Limits(max_body=16 << 20)) as served:
        for path in ("/v1/match", "/query", "/register"):
            status, said = served.ask("POST", path, nested)
            # The first defect wins: an unknown field, a token that is an array, or too deep a nesting.
            assert (status, said["reason"] in ("invalid_json", "unknown_field", "invalid_type")) == (400, True), said
        assert served.service.gate.receiving == 0
    with running() as served:  # the default limit is below it
        has(served, "POST", "/v1/match", nested, 413, "too_large", None)


def test_a_registration_of_what_is_no_publisher_harms_nobody(served, pods):
    """A port accepts connections but speaks another protocol. Then the same instance registers again."""
    with socket.create_server(("127.0.0.1", 0)) as http_server:
        endpoint = f"tcp://127.0.0.1:{http_server.getsockname()[1]}"
        asked = {"instance_id": 7, "endpoint": endpoint, "model_name": "sim", "block_size": 16}
        assert served.ask("POST", "/register", asked)[0] == 201
        taken = http_server.accept()[0]
        taken.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        has(served, "POST", "/register", asked, 409, "invalid_registration", "instance_id")
        mooncake = {**MOONCAKE, "instance_id": "7", "modelname": "sim", "block_size": 16, "endpoint": endpoint}
        has(served, "POST", "/register", mooncake, 400, "invalid_registration", "instance_id")
        another = list(range(7000, 7064))
        pods["a"].serve(another)
        until(lambda: served.index.match_prefix(another, model="sim")["a"].held == 64)
        (worker,) = (each for each in served.ask("GET", "/workers")[1] if each["instance_id"] == 7)
        assert (worker["state"], worker["listeners"]["0"]["endpoint"]) == ("stale", endpoint)
        assert worker["listeners"]["0"]["last_error"]
        answer = served.ask("POST", "/query", {"model_name": "sim", "token_ids": another})[1]
        assert {name: found["state"] for name, found in answer["instances"].items()} == {
            "a": "exact", "b": "exact", "7": "stale"
        }  # fmt: skip
        assert served.ask("POST", "/unregister", {"instance_id": 7, "model_name": "sim"})[0] == 200
        taken.close()


def test_tokens_beyond_the_limit():
    with running(limits=Limits(max_tokens=4, max_body=1000)) as served:
        served.manager.add_pod(PodSource("a", endpoint=NO_PUBLISHER, model="m"))
        has(served, "POST", "/v1/match", {"tokens": [1] * 5}, 413, "too_large", "tokens")
        has(served, "POST", "/query", {"token_ids": [1] * 5, "model": "m"}, 413, "too_large", "token_ids")
        has(served, "POST", "/query_by_hash", {"seq_hashes": [1] * 5, "model": "m"}, 413, "too_large", "seq_hashes")


def test_a_body_that_takes_too_long_and_one_whose_client_goes_away():
    with running(limits=Limits(body_seconds=0.2)) as served:
        for gone in (True, False):
            with socket.create_connection(("127.0.0.1", served.port), timeout=20) as slow:
                slow.sendall(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
                if not gone:
                    said = slow.recv(4096)
                    assert said.startswith(b"HTTP/1.1 408")
                    assert b'"reason":"too_slow"' in said
        assert served.ask("GET", "/healthz")[0] == 200
        assert served.service.gate.receiving == 0


def test_bodies_on_their_way_are_bounded_together():
    with running(limits=Limits(max_receiving=100_000)) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as one:
            one.sendall(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 90000\r\n\r\n" + b" " * 80_000)
            until(lambda: served.service.gate.receiving == 80_000)
            with socket.create_connection(("127.0.0.1", served.port), timeout=20) as two:
                two.sendall(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 90000\r\n\r\n" + b" " * 80_000)
                assert two.recv(4096).startswith(b"HTTP/1.1 503")
            has(served, "POST", "/query", {"token_ids": [1]}, 400, "missing", "model_name")
        until(lambda: served.service.gate.receiving == 0)


def test_requests_in_flight_are_bounded():
    free, wait = threading.Event(), threading.Event()

    class Slow(Letters):
        def encode(self, text):
            wait.set()
            free.wait(20)
            return super().encode(text)

    with running(encoder=Slow(), limits=Limits(max_in_flight=1)) as served:
        served.manager.add_pod(PodSource("a", endpoint=NO_PUBLISHER, model="m"))
        other = Client(served.connect())
        other.connection.request("POST", "/v1/match", b'{"text":"abc"}')
        assert wait.wait(20)
        has(served, "POST", "/v1/match", {"tokens": [1]}, 503, "too_many_requests", None)
        free.set()
        assert other.connection.getresponse().status == 200
        other.connection.close()
        assert served.ask("POST", "/v1/match", {"tokens": [1]})[0] == 200


def test_a_thousand_clients_that_do_not_read_keep_nobody_waiting(served, pods):
    request = b"GET /v1/pods HTTP/1.1\r\nhost: x\r\n\r\n"
    slow = []
    try:
        for _ in range(1000):
            sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
            slow.append(sock)
            sock.sendall(request)
        assert served.ask("POST", "/v1/match", {"tokens": PROMPT})[1]["best"]["tokens"] == 64
        # The streams still arrive.
        another = list(range(5000, 5064))
        pods["b"].serve(another)
        until(lambda: served.index.match_prefix(another, model="sim")["b"].held == 64)
    finally:
        for sock in slow:
            sock.close()
    until(lambda: len(served.server._server.server_state.connections) <= 1)


def test_a_bearer_token():
    with running(token="secret") as served:
        assert served.ask("GET", "/v1/pods")[0] == 200
        for token in (None, "other", "secrets"):
            client = Client(served.connect(), token)
            status, said = client("GET", "/v1/pods")
            assert (status, said["reason"], said["field"]) == (401, "unauthorized", "authorization")
            assert client("GET", "/healthz")[0] == 200
            assert client("POST", "/query", {"model": "x", "token_ids": []})[0] == 401
            client.connection.close()
    with pytest.raises(ValueError, match="printable ASCII"):
        Service(served.index, served.manager, token="a\nb")


def test_tls_with_clients_certificates(tmp_path):
    authority = trustme.CA()
    ours = authority.issue_cert("127.0.0.1")
    ours.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    theirs = authority.issue_cert("client")
    options = {
        "ssl_certfile": str(tmp_path / "server.pem"),
        "ssl_ca_certs": str(tmp_path / "ca.pem"),
        "ssl_cert_reqs": 2,
    }
    with running(ssl=options) as served:
        assert served.server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        anonymous = http.client.HTTPSConnection("127.0.0.1", served.port, context=context, timeout=20)
        with pytest.raises((ssl.SSLError, OSError)):
            Client(anonymous)("GET", "/healthz")
        anonymous.close()
        theirs.configure_cert(context)
        known = http.client.HTTPSConnection("127.0.0.1", served.port, context=context, timeout=20)
        assert Client(known)("GET", "/healthz")[0] == 200
        known.close()


def test_a_unix_socket_beside_tcp_and_alone(tmp_path):
    path = str(tmp_path / "s")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    for host in ("127.0.0.1", None):
        with running(uds=path, host=host) as served:
            with pytest.raises(FileExistsError, match="listens"):
                Server(served.service, host=None, uds=path)
            connection = http.client.HTTPConnection("x", timeout=20)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(path)
            assert Client(connection)("GET", "/healthz") == (200, {"status": "ok"})
            connection.close()
            assert (served.port is None) == (host is None)
        assert not (tmp_path / "s").exists()
    (tmp_path / "s").write_text("mine")
    with pytest.raises(FileExistsError, match="not a socket"):
        Server(served.service, host=None, uds=path)


# ---- snapshots


def test_a_new_replica_starts_from_a_living_one(pods):
    (endpoint, replay) = pods["a"].ranks[0]
    pods["a"].serve(PROMPT[:64])
    worker = {"instance_id": 1, "endpoint": endpoint, "replay_endpoint": replay, "model_name": "sim", "block_size": 16}
    with running(token="t") as served:
        assert served.ask("POST", "/register", worker)[0] == 201
        assert served.manager.wait_until_current(20)
        index, sources = fetched(served.server.url, "t", {}, 16)
        assert index.match_prefix(PROMPT, model="sim")["1"].held == 64
        assert [(source.name, source.ranks) for source in sources] == [("1", {0: (endpoint, replay)})]
        with running(index=index) as second:
            second.manager.add_pod(sources[0])
            assert second.manager.wait_until_exact(20) == {}
            expected = served.ask("POST", "/query", {"model": "sim", "token_ids": PROMPT})
            assert second.ask("POST", "/query", {"model": "sim", "token_ids": PROMPT}) == expected
        assert fetched(served.server.url, "wrong", {}, 16) == (None, [])
        assert fetched(served.server.url, "t", {}, 32)[0] is None
        assert served.ask("GET", "/v1/sources")[0] == 200
    assert fetched(served.server.url, "t", {}, 16) == (None, [])


class Large(PrefixIndex):
    """An index whose snapshot is larger than the buffers of a connection."""

    def dumps(self):
        return bytes(32_000_000)


def test_a_client_that_leaves_a_snapshot_half_read_keeps_it_from_nobody():
    with running(index=Large(block_size=16)) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as one:
            one.sendall(b"GET /v1/snapshot HTTP/1.1\r\nhost: x\r\n\r\n")
            assert one.recv(100).startswith(b"HTTP/1.1 200")
            has(served, "GET", "/v1/snapshot", None, 503, "too_many_requests", None)
        until(lambda: not served.service.v1._sending)
        status, data, _ = served.ask.raw("GET", "/v1/snapshot")
        assert (status, len(data)) == (200, 32_000_000)


def test_a_restart_continues_from_its_snapshot(tmp_path, caplog):
    path = str(tmp_path / "index")
    assert restored(path, {}, 16) == (None, [])
    with running() as served:
        assert served.ask("POST", "/register", {**MOONCAKE, "block_size": 16})[0] == 200
        served.index.ingest("vllm-prefill-node1", stored(3, "GPU"), model="deepseek", dp_rank=0)
        Snapshots(served.service, path, 60).save()
    index, sources = restored(path, {}, 16)
    assert index.match_prefix(list(range(48)), model="deepseek")["vllm-prefill-node1"].held == 48
    assert [source.labels["kvindex.io/additional-salt"] for source in sources] == ["w8a8"]
    # An unusable file is reported and does not prevent the start.
    damaged = bytearray((tmp_path / "index").read_bytes())
    damaged[8] = 99
    (tmp_path / "index").write_bytes(damaged)
    with pytest.raises(SnapshotError):
        PrefixIndex.load(path)
    (tmp_path / "index.pods.json").write_text("[{]")
    assert restored(path, {}, 16) == (None, [])
    assert "the snapshot is left out" in caplog.text
    assert "not JSON" in caplog.text
    assert pods_file(path) == str(tmp_path / "index.pods.json")


def test_the_openapi_document_names_every_route(served):
    status, document = served.ask("GET", "/openapi.json")
    assert status == 200
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(call.method, call.path) for call in served.service.calls}
    assert document["components"]["schemas"]["Match"]["properties"]["tokens"]


# ---- the command


class Command:
    """``kvindex serve`` as a process."""

    def __init__(self, *arguments, env=None):
        command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        found = re.search(r"http://127.0.0.1:(\d+)", line)
        assert found, (line, self.process.stderr.read())
        self.ask = Client(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20))
        until(lambda: self.up())

    def up(self):
        try:
            return self.ask("GET", "/healthz")[0] == 200
        except OSError:
            self.ask.connection.close()
            return False

    def end(self, number=signal.SIGTERM):
        self.ask.connection.close()
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode


def test_the_command_saves_when_it_is_ended_and_goes_on_from_there(pods, tmp_path):
    (endpoint, replay) = pods["a"].ranks[0]
    pods["a"].serve(PROMPT[:64])
    worker = {"instance_id": 1, "endpoint": endpoint, "replay_endpoint": replay, "model_name": "sim", "block_size": 16}
    first = Command("--snapshot", tmp_path / "index", "--snapshot-every", 3600)
    assert first.ask("POST", "/register", worker)[0] == 201
    asked = {"model_name": "sim", "token_ids": PROMPT}
    until(lambda: first.ask("POST", "/query", asked)[1]["instances"]["1"]["state"] == "exact")
    before = first.ask("POST", "/query", asked)
    assert before[1]["scores"] == {"1": {"0": 64}}
    assert first.end() == 0
    second = Command("--snapshot", tmp_path / "index")
    # The content is there at once, and exact as soon as the stream has confirmed its place.
    assert second.ask("POST", "/query", asked)[1]["scores"] == {"1": {"0": 64}}
    until(lambda: second.ask("POST", "/query", asked) == before)
    assert second.end(signal.SIGINT) == 0


def test_the_command_reads_a_token_and_refuses_bad_options(tmp_path, capsys):
    from kvindex.cli import main

    (tmp_path / "token").write_text("secret\n")
    without = Command()
    assert without.process.stdout.readline() == "no pods yet: POST /register adds one\n"
    assert without.end() == 0
    served = Command("--token-file", tmp_path / "token", "a=tcp://127.0.0.1:9")
    assert served.ask("GET", "/v1/pods")[0] == 401
    served.ask.headers["Authorization"] = "Bearer secret"
    assert list(served.ask("GET", "/v1/pods")[1]["pods"]) == ["a"]
    served.ask.connection.close()
    served.process.send_signal(signal.SIGTERM)
    assert "no pods yet" not in served.process.communicate(timeout=30)[0]
    assert served.process.returncode == 0
    (tmp_path / "empty").write_text("")
    for arguments in (
        ["--snapshot-every", "1"],
        ["--token-file", tmp_path / "empty"],
        ["--token-file", tmp_path / "none"],
        ["--tokenizer", tmp_path / "empty"],
        ["--tokenizer", tmp_path / "empty", "--tokenize-url", "http://127.0.0.1:9"],
    ):
        assert main(["serve", *map(str, arguments)]) == 2
        assert "kvindex serve: " in capsys.readouterr().err
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "latin-1").write_bytes(b"\xe9")
    for template in ("none", "latin-1"):
        given = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--chat-template", str(tmp_path / template)]
        assert main(["serve", *given]) == 2
        assert f"kvindex serve: --chat-template {tmp_path / template}: " in capsys.readouterr().err


def marked(name):
    """Return the processes with this name in their environment, which children inherit."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if name in process.environ():
                found.append(process.pid)
    return found


def test_the_demo_loses_a_pod_gets_it_back_and_leaves_no_process():
    mark = f"KVINDEX_TEST_{uuid.uuid4().hex}"
    demo = Command("--demo", "2", "--kill-every", "1", env={**os.environ, mark: "1"})
    try:

        def pods():
            return demo.ask("GET", "/v1/pods")[1]["pods"]

        exact, again = set(), set()

        def look():
            for name, pod in pods().items():
                if pod["state"] == "exact":
                    (again if pod["restarts"] else exact).add(name)

        # By name: while one pod becomes exact again, the next one may be gone.
        assert set(pods()) == {"pod-0", "pod-1"}
        until(lambda: look() or again)
        assert "pod-0" in exact
        until(lambda: look() or exact == {"pod-0", "pod-1"})
        until(lambda: (now := demo.ask("GET", "/v1/fleet")[1]["now"])["held"] > 0 and now["reported"] > 0)
        until(lambda: len(demo.ask("GET", "/v1/fleet")[1].get("example", [])) > 16)
        status, page, _ = demo.ask.raw("GET", "/")
        assert (status, page[:15]) == (200, b"<!doctype html>")
        assert demo.process.pid in marked(mark)
        until(lambda: len(marked(mark)) == 3)
    finally:
        assert demo.end() == 0
    assert marked(mark) == []


@pytest.mark.parametrize("beside", [["a=tcp://127.0.0.1:9"], ["--block-size", "32"], ["--kubernetes"]])
def test_the_demo_takes_no_other_pods(beside, capsys):
    from kvindex.cli import main

    assert main(["serve", *beside, "--demo"]) == 2
    assert "leave out" in capsys.readouterr().err


def test_top_shows_the_pods_of_a_service(served, capsys, monkeypatch):
    from kvindex.cli import main

    monkeypatch.setenv("COLUMNS", "120")
    url = served.server.url
    assert main(["top", "--url", url, "--once", "--interval", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "2 pods: 2 exact" in said
    assert re.search(r"^ *a +exact ", said, re.M)
    served.manager.add_pod(PodSource("gone", endpoint=NO_PUBLISHER, model="sim"))
    assert main(["top", "--url", url, "--once", "--wait", "0.01", "--interval", "0.01"]) == 1
    assert re.search(r"^ *gone +stale ", capsys.readouterr().out, re.M)
    for arguments in (["--url", "http://127.0.0.1:9"], ["--url", "nowhere"], ["--url", url, "a=tcp://127.0.0.1:9"]):
        assert main(["top", "--once", *arguments]) == 2
        assert "kvindex top: " in capsys.readouterr().err

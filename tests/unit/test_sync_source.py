"""The sources of a pod's events: a command line, a file, or the engine's own server."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindex import (
    EventManager,
    InvalidTypeError,
    InvalidValueError,
    KVIndexError,
    PodSource,
    PrefixIndex,
    StreamError,
)

# From text


@pytest.mark.parametrize(
    ("text", "name", "endpoint", "answers"),
    [
        ("tcp://10.0.0.1:5557", "10.0.0.1:5557", "tcp://10.0.0.1:5557", None),
        ("a=tcp://10.0.0.1:5557", "a", "tcp://10.0.0.1:5557", None),
        ("a=tcp://h:5557,tcp://other:5558", "a", "tcp://h:5557", "tcp://other:5558"),
        ("a=tcp://h:5557,5558", "a", "tcp://h:5557", "tcp://h:5558"),
        ("tcp://[::1]:5557,5558", "[::1]:5557", "tcp://[::1]:5557", "tcp://[::1]:5558"),
        ("x=y=ipc:///run/a=b", "x=y", "ipc:///run/a=b", None),
        (
            "http://10.0.0.1:8000=tcp://10.0.0.1:5557,5558",
            "http://10.0.0.1:8000",
            "tcp://10.0.0.1:5557",
            "tcp://10.0.0.1:5558",
        ),
        ("https://h/v1?key=a=tcp://h:5557", "https://h/v1?key=a", "tcp://h:5557", None),
        ("a=ipc:///run/live,ipc:///run/replay", "a", "ipc:///run/live", "ipc:///run/replay"),
    ],
)
def test_a_pod_in_one_word(text, name, endpoint, answers):
    expected = PodSource(name, endpoint=endpoint, replay_endpoint=answers, model="m")
    assert PodSource.from_string(text, model="m") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:5557",
        "a=",
        "a=tcp://",
        "=tcp://h:5557",
        "a=tcp://h:5557,",
        "a=tcp://h:5557,tcp://h:5558,5559",
        "a=tcp://h:5557,h:5558",
        "a=tcp://h:5557,99999",
        "a=tcp://h:5557,5557",
        "a=ipc:///run/live,5558",
        "a=tcp://*:5557",
        "a=http://h:8000",
        "tcp://h",
    ],
)
def test_a_word_that_is_no_pod_is_refused(text):
    with pytest.raises(InvalidValueError):
        PodSource.from_string(text)


def test_the_url_of_a_server_is_refused_with_the_remedy():
    for make in (PodSource.from_string, lambda url: PodSource("a", endpoint=url)):
        for url in ("http://127.0.0.1:5597", "https://h"):
            with pytest.raises(InvalidValueError, match=r"use PodSource\.from_vllm or PodSource\.from_sglang$"):
                make(url)


def test_a_word_says_the_engine_too():
    source = PodSource.from_string("a=tcp://h:5557,5558,engine=vllm,eagle=0+2,ignore_media=CPU+DISK")
    assert source == PodSource(
        "a", endpoint="tcp://h:5557", replay_endpoint="tcp://h:5558", engine="vllm", eagle={0, 2},
        ignore_media={"CPU", "DISK"},
    )  # fmt: skip
    source = PodSource.from_string("a,b=tcp://h:5557,engine=sglang,hybrid=true", engine="vllm")
    assert (source.name, source.engine, source.hybrid) == ("a,b", "sglang", True)


@pytest.mark.parametrize("model", ["sim", "meta-llama/Llama-3.1-8B", "/models/a:b", "a=b", ""])
def test_a_word_has_a_model_of_its_own(model):
    for text in (f"a=tcp://h:5557,5558,model={model},engine=vllm", f"a=tcp://h:5557,5558,engine=vllm,model={model}"):
        source = PodSource.from_string(text, model="default")
        assert source == PodSource(
            "a", endpoint="tcp://h:5557", replay_endpoint="tcp://h:5558", engine="vllm", model=model
        )  # fmt: skip
    assert PodSource.from_string("a,model=m=tcp://h:5557", model="default").name == "a,model=m"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vlm"}, "one of vllm, sglang, trtllm"),
        ({"engine": ["vllm"]}, "one of vllm, sglang, trtllm"),
        ({"eagle": True}, "engine='vllm'"),
        ({"eagle": True, "engine": "sglang"}, "engine='vllm'"),
        ({"eagle": "0", "engine": "vllm"}, "set of groups"),
        ({"eagle": [-1], "engine": "vllm"}, "numbers from 0 on"),
        ({"eagle": [True], "engine": "vllm"}, "numbers from 0 on"),
        ({"hybrid": 1}, "True or False"),
        ({"ignore_media": "CPU"}, "set of names"),
        ({"ignore_media": [1]}, "set of names"),
    ],
)
def test_an_engine_that_can_not_be_is_refused(options, message):
    with pytest.raises((InvalidValueError, InvalidTypeError), match=re.escape(message)):
        PodSource("a", endpoint="tcp://h:5557", **options)


@pytest.mark.parametrize("option", ["engine=vlm", "motor=x", "eagle=yes", "eagle=true", "hybrid=2", "eagle="])
def test_a_word_whose_option_is_none_is_refused(option):
    with pytest.raises(InvalidValueError):
        PodSource.from_string(f"a=tcp://h:5557,{option}")


@pytest.mark.parametrize("where", ["top", "state"])
def test_an_sglang_server_that_says_its_model_is_hybrid(server, where):
    fact = {"is_hybrid_swa": True}
    server.answers = {"/server_info": {**SGLANG, **(fact if where == "top" else {"internal_states": [fact]})}}
    assert PodSource.from_sglang(server.url).hybrid
    assert not PodSource.from_sglang(server.url, hybrid=False).hybrid


def test_a_pod_that_is_no_text_is_refused():
    with pytest.raises(InvalidTypeError):
        PodSource.from_string(b"tcp://h:5557")


AT = "tcp://10.0.0.1:5557"


@pytest.mark.parametrize(
    ("options", "builtin", "said"),
    [
        ({"name": 7}, TypeError, "int"),
        ({"name": ""}, ValueError, "name"),
        ({"endpoint": 5557}, TypeError, "endpoint"),
        ({"topic": b"kv"}, TypeError, "topic"),
        ({"model": None}, TypeError, "model"),
        ({"dp_size": 0}, ValueError, "dp_size"),
        ({"dp_size": True}, TypeError, "dp_size"),
        ({"block_size": 16.0}, TypeError, "block_size"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"presence": "counts"}, ValueError, "counts"),
        ({"clear_media": "GPU"}, TypeError, "clear_media"),
        ({"clear_media": 1}, TypeError, "clear_media"),
        ({"ranks": [AT]}, TypeError, "map"),
        ({"ranks": {}}, ValueError, "at least one rank"),
        ({"ranks": {-1: (AT, None)}}, ValueError, "-1"),
        ({"ranks": {0: AT}}, TypeError, "rank 0"),
        ({"ranks": {0: (AT, None), 1: (AT, None)}}, ValueError, "twice"),
        ({"endpoint": "tcp://h:65535", "dp_size": 2}, ValueError, "65536"),
        ({"endpoint": "ipc:///run/live", "dp_size": 2}, ValueError, "ipc:///run/live"),
        ({"endpoint": AT, "replay_endpoint": "tcp://10.0.0.1:5558", "dp_size": 2}, ValueError, "twice"),
    ],
)
def test_a_pod_that_can_not_be_is_refused_by_name(options, builtin, said):
    with pytest.raises(KVIndexError) as caught:
        PodSource(**{"name": "the pod", "endpoint": AT, **options})
    assert isinstance(caught.value, builtin)
    assert said in str(caught.value)
    assert "name" in options or "the pod" in str(caught.value)


HALF = "half a \ud83d"


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("name of", {"name": HALF}), ("model of", {"model": HALF}), ("topic of", {"topic": HALF}),
        ("lora of", {"lora": HALF}), ("address of", {"address": HALF}), ("label of", {"labels": {"role": HALF}}),
        ("label of", {"labels": {HALF: "role"}}), ("medium in clear_media", {"clear_media": {HALF}}),
        ("medium in ignore_media", {"ignore_media": {HALF}}), ("endpoint of", {"endpoint": f"tcp://{HALF[-1]}:5557"}),
        ("endpoint of", {"endpoint": f"ipc://{HALF}"}), ("endpoint of", {"replay_endpoint": f"ipc://{HALF}"}),
        ("endpoint of", {"ranks": {0: (AT, f"inproc://{HALF}")}}),
    ],
)  # fmt: skip
def test_half_a_character_is_refused_where_it_is_written(where, options):
    """JSON has an escape for it, but sockets and logs have no bytes for it."""
    with pytest.raises(InvalidValueError) as caught:
        PodSource.from_mapping({"name": "the pod", "endpoint": AT, **options})
    message = caught.value.args[0]
    assert repr(options.get("name", "the pod")) in message
    for part in (where, "\\ud83d", "at character", "write it without"):
        assert part in message
    message.encode()


@pytest.mark.parametrize("ask", [PodSource.from_vllm, PodSource.from_sglang])
def test_half_a_character_in_a_url_is_refused(ask):
    with pytest.raises(InvalidValueError, match="character 7"):
        ask("http://\ud83d:8000")


def test_half_a_character_is_no_endpoint_to_bind():
    with EventManager(PrefixIndex()) as manager, pytest.raises(InvalidValueError, match="character 6"):
        manager.bind("tcp://\ud83d:1")


def test_ranks_inside_one_process_are_told_apart_by_name():
    source = PodSource("a", endpoint="inproc://a", replay_endpoint="inproc://replay", dp_size=3)
    assert {rank: pair.endpoint for rank, pair in source.workers().items()} == {
        0: "inproc://a", 1: "inproc://a_dp1", 2: "inproc://a_dp2",
    }  # fmt: skip


# From the engine's own server


class Server:
    """A server that answers GET by path.

    Bytes are sent as they are, other values as JSON, numbers as a status, and functions handle the request themselves.
    """

    def __init__(self):
        self.answers = {}
        self.headers = []
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.headers.append((self.path, dict(self.headers)))
                answer = outer.answers.get(self.path, 404)
                if callable(answer):
                    with contextlib.suppress(OSError):
                        answer(self)
                    return
                status = answer if type(answer) is int else 200
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def running():
    made = Server()
    yield made
    made.close()


@pytest.fixture
def server(running):
    running.answers = {}
    running.headers.clear()
    return running


MODELS = {"object": "list", "data": [{"id": "llama", "object": "model"}, {"id": "adapter"}]}


def vllm(server, sources, models=MODELS):
    server.answers = {"/kv_event_sources": sources, "/v1/models": models}


def test_a_vllm_server_says_where_its_ranks_are(server):
    sources = [
        {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://0.0.0.0:5657", "topic": "kv", "data_parallel_rank": 0},
        {"endpoint": "tcp://10.0.0.9:5558", "replay_endpoint": None, "topic": "kv", "data_parallel_rank": 1},
    ]
    vllm(server, sources)
    host = server.url.removeprefix("http://")
    expected = {
        0: ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5657"),
        1: ("tcp://10.0.0.9:5558", None),
    }
    source = PodSource.from_vllm(server.url, headers={"Authorization": "Bearer x"}, presence="set")
    assert source == PodSource(
        host, model="llama", topic="kv", ranks=expected, presence="set", engine="vllm", address=server.url
    )
    assert {(path, sent["Authorization"]) for path, sent in server.headers} == {
        ("/kv_event_sources", "Bearer x"),
        ("/v1/models", "Bearer x"),
    }
    server.headers.clear()
    named = PodSource.from_vllm(server.url + "/", name="a", model="m")
    assert named == PodSource("a", model="m", topic="kv", ranks=expected, engine="vllm", address=server.url)
    assert [path for path, _ in server.headers] == ["/kv_event_sources"], "what is known is not asked for"


def test_what_a_vllm_server_leaves_out(server):
    vllm(server, [{"endpoint": "ipc:///run/kv"}])
    source = PodSource.from_vllm(server.url)
    assert source.workers() == {0: ("ipc:///run/kv", None)}
    assert source.topic is None
    vllm(server, [{"endpoint": "tcp://*:1", "topic": "a"}, {"endpoint": "tcp://*:2", "topic": "b",
                                                           "data_parallel_rank": 1}])  # fmt: skip
    assert PodSource.from_vllm(server.url).topic is None, "a topic of each rank's own is none of the pod's"


@pytest.mark.parametrize(
    ("sources", "models", "message"),
    [
        (404, MODELS, "404"),
        (500, MODELS, "500"),
        ([], MODELS, "--kv-events-config"),
        ({}, MODELS, "not a list of sources"),
        (None, MODELS, "not a list of sources"),
        ([1], MODELS, "not a source"),
        ([{}], MODELS, "not a source"),
        ([{"endpoint": 5557}], MODELS, "not a source"),
        ([{"endpoint": "tcp://*:1", "data_parallel_rank": "first"}], MODELS, "not a source"),
        ([{"endpoint": "tcp://*:1", "data_parallel_rank": -1}], MODELS, "-1"),
        ([{"endpoint": "tcp://*:1"}, {"endpoint": "tcp://*:2"}], MODELS, "twice"),
        ([{"endpoint": "nonsense"}], MODELS, "nonsense"),
        ([{"endpoint": "tcp://*:99999"}], MODELS, "99999"),
        ([{"endpoint": None}], MODELS, "not a source"),
        (b"<html>", MODELS, "no JSON"),
        (b"", MODELS, "no JSON"),
        (b"\xff\xfe", MODELS, "no JSON"),
        (b"[" * 100_000, MODELS, "no JSON"),
        (b" " * (5 << 20), MODELS, "more than"),
        ([{"endpoint": "tcp://*:1"}], 404, "404"),
        ([{"endpoint": "tcp://*:1"}], {"data": []}, "names no model"),
        ([{"endpoint": "tcp://*:1"}], [], "names no model"),
    ],
)
def test_a_vllm_server_that_says_nothing_useful(server, sources, models, message):
    vllm(server, sources, models)
    with pytest.raises(KVIndexError) as caught:
        PodSource.from_vllm(server.url)
    assert message in str(caught.value)


SGLANG = {
    "served_model_name": "llama",
    "model_path": "/models/llama",
    "page_size": 64,
    "dp_size": 2,
    "kv_events_config": '{"publisher": "zmq", "endpoint": "tcp://*:6557", "replay_endpoint": "tcp://*:6657",'
    ' "topic": "kv"}',
}


def test_an_older_sglang_server_says_it_in_its_arguments(server):
    server.answers = {"/server_info": SGLANG}
    host = server.url.removeprefix("http://")
    assert PodSource.from_sglang(server.url) == PodSource(
        host, endpoint="tcp://127.0.0.1:6557", replay_endpoint="tcp://127.0.0.1:6657", dp_size=2, model="llama",
        topic="kv", block_size=64, engine="sglang", address=server.url,
    )  # fmt: skip
    server.answers = {"/get_server_info": {**SGLANG, "served_model_name": None, "dp_size": None}}
    source = PodSource.from_sglang(server.url, name="a", block_size=16)
    assert (source.name, source.model, source.dp_size, source.block_size) == ("a", "/models/llama", 1, 16)
    server.answers = {"/server_info": {"kv_events_config": {"publisher": "zmq"}}}
    source = PodSource.from_sglang(server.url)
    assert source.workers() == {0: ("tcp://127.0.0.1:5557", None)}
    assert (source.model, source.block_size) == ("", None)


def test_a_newer_sglang_server_has_a_block_for_it(server):
    block = {"endpoint_host": "*", "endpoint_port_base": 7000, "dp_size": 2, "block_size": 32, "topic": "kv"}
    server.answers = {"/server_info": {**SGLANG, "kv_events": block}}
    source = PodSource.from_sglang(server.url)
    assert source.workers() == {
        0: ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:6657"),
        1: ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:6658"),
    }
    assert source.block_size == 32
    block["publishers"] = [
        {"dp_rank": 0, "endpoint": "tcp://10.0.0.1:7000", "replay_endpoint": "tcp://*:8000"},
        {"dp_rank": 1, "endpoint": "tcp://*:7001"},
    ]
    assert PodSource.from_sglang(server.url).workers() == {
        0: ("tcp://10.0.0.1:7000", "tcp://127.0.0.1:8000"),
        1: ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:6658"),
    }


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (404, "404"),
        (503, "503"),
        ([], "does not describe"),
        ({}, "--kv-events-config"),
        ({"kv_events_config": '{"publisher": "null"}'}, "--kv-events-config"),
        ({"kv_events_config": "{"}, "describes its events as"),
        ({**SGLANG, "kv_events": []}, None),
        ({**SGLANG, "kv_events": [1]}, "describes its events as"),
        ({**SGLANG, "dp_size": "many"}, "describes its events as"),
        ({**SGLANG, "dp_size": 200}, "ports that are apart"),
        ({**SGLANG, "dp_size": -1}, "dp_size"),
        ({**SGLANG, "page_size": "large"}, "describes its events as"),
        ({**SGLANG, "page_size": [1]}, "describes its events as"),
        ({**SGLANG, "kv_events": {"endpoint_port_base": "high"}}, "describes its events as"),
        ({**SGLANG, "kv_events": {"publishers": [{}]}}, "describes its events as"),
        ({**SGLANG, "kv_events": {"publishers": 3}}, "describes its events as"),
        ({**SGLANG, "served_model_name": 5}, "model"),
        (b"<html>", "no JSON"),
    ],
)
def test_an_sglang_server_that_says_nothing_useful(server, info, message):
    server.answers = {"/server_info": info}
    if message is None:
        PodSource.from_sglang(server.url)
        return
    with pytest.raises(KVIndexError) as caught:
        PodSource.from_sglang(server.url)
    assert message in str(caught.value)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_a_server_says_it_is_a_source_or_an_error_of_ours(running, data):
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-2, 70_000) | st.text(max_size=4) | st.just("tcp://*:5557"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    )
    fields = ["endpoint", "replay_endpoint", "topic", "data_parallel_rank", "dp_size", "publishers", "dp_rank",
              "kv_events", "kv_events_config", "page_size", "endpoint_port_base", "endpoint_host"]  # fmt: skip
    answer = data.draw(st.dictionaries(st.sampled_from(fields), junk, max_size=5))
    if data.draw(st.booleans()):
        answer["kv_events"] = data.draw(st.dictionaries(st.sampled_from(fields), junk, max_size=5))
    running.answers = {"/kv_event_sources": [answer], "/server_info": answer}
    for ask in (PodSource.from_vllm, PodSource.from_sglang):
        with contextlib.suppress(KVIndexError):
            assert isinstance(ask(running.url, model="m"), PodSource)


# From servers that are not engines


@pytest.mark.parametrize("ask", [PodSource.from_vllm, PodSource.from_sglang])
def test_servers_that_can_not_be_asked(server, ask):
    with socket.create_server(("127.0.0.1", 0)) as free:
        refuses = f"http://127.0.0.1:{free.getsockname()[1]}"
    for url in (refuses, "http://no-such-host.invalid:8000"):
        with pytest.raises(StreamError, match="cannot be asked"):
            ask(url)
    for url in ("127.0.0.1:8000", "tcp://h:5557", "http://", "", None, 7):
        with pytest.raises(InvalidValueError, match="not the URL"):
            ask(url)


@pytest.mark.parametrize("ask", [PodSource.from_vllm, PodSource.from_sglang])
def test_servers_that_are_slow(server, ask):
    def silent(request):
        server.closing.wait(0.6)

    def drips(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for _ in range(1000):
            # Until the client has hung up.
            if server.closing.wait(0.02):
                return
            request.wfile.write(b" ")

    for slow in (silent, drips):
        server.answers = {"/kv_event_sources": slow, "/server_info": slow}
        with pytest.raises(StreamError, match="cannot be asked"):
            ask(server.url, timeout=0.3)


@pytest.mark.parametrize("ask", [PodSource.from_vllm, PodSource.from_sglang])
@pytest.mark.parametrize(
    "greeting", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[]", b"\xff" * 5000 + b"\n"]
)
def test_servers_that_do_not_speak_http(ask, greeting):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(StreamError) as refused:
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    # A port of events sends token ids. They must not be in the message or in the traceback of its cause.
    assert len(str(refused.value)) < 200
    assert refused.value.__suppress_context__ or len(str(refused.value.__cause__)) < 200

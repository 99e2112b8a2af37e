"""``kvindex doctor``: it reports every cause that keeps prompts from being found, and nothing else."""

from __future__ import annotations

import dataclasses
import http.server
import io
import itertools
import json
import random
import re
import signal
import socket
import threading
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from types import SimpleNamespace

import msgpack
import pytest
import zmq
from support import payload, stored
from sync_support import BRISK, LivePublisher, listener, nothing_left_behind, until

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.cli import doctor, main
from kvindex.cli._facts import Facts, Group


@pytest.fixture
def ask(capsys, monkeypatch):
    """Run ``kvindex doctor ARGUMENTS`` as into a pipe. Returns the status and the findings as (level, text)."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(doctor, "PROBE", 0.5)
    monkeypatch.setattr(doctor, "PATIENCE", 20.0)
    monkeypatch.setattr(doctor, "EventManager", partial(EventManager, policy=BRISK))

    def run(*arguments, tidy=True):
        with nothing_left_behind() if tidy else nullcontext():
            status = main(["doctor", "--block-size", "4", "--seconds", "0.05", *map(str, arguments)])
        lines = capsys.readouterr().out.splitlines()
        findings = [re.match(r"(ok|note|WRONG|so) +(.*?) *$", line) for line in lines]
        return status, [found.groups() for found in findings if found]

    return run


def wrong(findings):
    return [text for level, text in findings if level == "WRONG"]


def consequences(findings, cause):
    """Return the findings below a cause that follow from it."""
    behind = findings[findings.index(("WRONG", cause)) + 1 :]
    return [text for _, text in itertools.takewhile(lambda found: found[0] == "so", behind)]


def port(endpoint):
    return int(endpoint.rpartition(":")[2])


def word(pod, replay=True, rank=0):
    endpoint, answers = pod.ranks[rank]
    return f"pod={endpoint},{answers}" if replay else f"pod={endpoint}"


@pytest.fixture
def pod():
    with LivePublisher() as made:
        yield made


@contextmanager
def bound(kind):
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        yield f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}"


@pytest.fixture
def refusing():
    with bound(zmq.PUB) as endpoint:
        pass
    return endpoint


# Healthy pods


def test_a_sound_pod_gets_a_clean_bill(ask, pod):
    pod.publish(9)
    status, findings = ask(word(pod), "--topic", "kv@pod@m")
    assert status == 0
    assert not wrong(findings)
    text = "\n".join(text for _, text in findings)
    for expected in ("a publisher is at", "replays are requested from", "9 batches", "9 blocks stored", "'kv@pod@m'",
                     "blocks have 4 tokens", "hashes are integers", "exact: 9 blocks"):  # fmt: skip
        assert expected in text


def test_larger_blocks_of_the_engine_are_no_fault(ask):
    with LivePublisher(block_size=8) as pod:
        pod.publish(3)
        status, findings = ask(word(pod))
    assert status == 0
    assert any("8 tokens, which the index splits into blocks of 4" in text for _, text in findings)


# Addresses


def test_addresses_that_are_none(ask, refusing):
    for endpoint, expected in (
        (refusing, "nothing listens at"),
        ("tcp://no-such-host.invalid:1", "'no-such-host.invalid' cannot be resolved"),
    ):
        status, findings = ask(f"pod={endpoint}")
        assert status == 1
        (text,) = wrong(findings)
        assert expected in text


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "speaks HTTP: it is the engine's API"),
        (b"", "sends nothing"),
        (b"SSH-2.0-OpenSSH\r\n", "is not a ZMQ socket"),
        (b"\xff" + bytes(8) + b"\x7f\x03\x00", "is not a ZMQ socket"),
    ],
)
def test_addresses_where_somebody_else_is(ask, greeting, expected):
    with listener(greeting, stays=True) as endpoint:
        status, findings = ask(f"pod={endpoint}", tidy=False)
    assert status == 1
    (text,) = wrong(findings)
    assert expected in text
    assert endpoint in text


def test_a_real_http_server_is_known_by_its_answer_to_a_question(ask):
    with http_server({}) as url:
        status, findings = ask(f"pod={url.replace('http', 'tcp')}")
    assert status == 1
    assert "speaks HTTP" in wrong(findings)[0]


@pytest.mark.parametrize(("kind", "expected"), [(zmq.ROUTER, "is a replay endpoint"), (zmq.PULL, "a ZMQ PULL socket")])
def test_sockets_of_another_kind(ask, kind, expected):
    with bound(kind) as endpoint:
        status, findings = ask(f"pod={endpoint}")
    assert status == 1
    assert expected in wrong(findings)[0]


def test_replay_endpoints_that_are_none(ask, pod, refusing):
    pod.publish(3)
    endpoint = pod.ranks[0][0]
    with bound(zmq.PUB) as publisher, listener(b"HTTP/1.1 400 Bad Request\r\n\r\n", stays=True) as speaks:
        for replay, expected in ((publisher, "is a publisher"), (speaks, "but HTTP"), (refusing, "does not answer")):
            status, findings = ask(f"pod={endpoint}", "--replay", replay, tidy=False)
            assert status == 1
            cause = wrong(findings)[0]
            assert expected in cause
            texts = consequences(findings, cause)
            assert any("did not answer" in text for text in texts)
            assert any("stream is degraded" in text for text in texts)


# Events


UNCHECKED = "while the engine is idle, its replays cannot be checked against live batches"


def test_an_idle_engine_is_no_fault_while_its_stream_is_exact(ask, pod):
    status, findings = ask(word(pod))
    assert (status, wrong(findings)) == (0, [])
    (text,) = [text for level, text in findings if level == "note"]
    assert text.startswith("no event in 0.05 s: the engine is idle, or does not publish")
    assert text.endswith(f"; {UNCHECKED}")
    pod.publish(3)
    status, findings = ask(word(pod))
    assert status == 0
    assert ("note", UNCHECKED) in findings
    with live(pod):
        status, findings = ask(word(pod), "--seconds", 0.5)
    assert status == 0
    assert not any(UNCHECKED in text for _, text in findings)


def test_no_event_without_a_replay_is_a_fault(ask):
    with LivePublisher(replay_endpoint=None) as pod:
        status, findings = ask(word(pod, replay=False))
    assert status == 1
    assert any("no event in 0.05 s" in text for text in wrong(findings))
    assert not any(UNCHECKED in text for _, text in findings)


def test_events_but_no_block(ask, pod):
    pod.publish(1, clear=True)
    status, findings = ask(word(pod))
    assert status == 1
    assert any("no block was stored" in text for text in wrong(findings))


@pytest.mark.parametrize(
    ("events", "named"),
    [
        (({"type": "BlockMoved", "block_hashes": [1]},), "1 event of unknown kind came ('BlockMoved')"),
        ((["BlockMoved", [1]], {"hashes": [2]}), "2 events of unknown kind came ('BlockMoved', one without a type)"),
    ],
)
def test_events_of_unknown_kind_alone_are_no_clean_bill(ask, pod, events, named):
    """The contract ignores unknown events, so the stream is exact. The command must still report them."""
    pod.publish_raw(payload(*events))
    status, findings = ask(word(pod))
    assert status == 1
    assert any(named in text for text in wrong(findings))
    assert not any("caches a whole block" in text for text in wrong(findings))
    (held,) = [(level, text) for level, text in findings if "stream is exact" in text]
    assert held[0] == "note"
    assert "ignored, and no block is held" in held[1]


def test_blocks_of_another_size(ask):
    with LivePublisher(block_size=6) as pod:
        pod.publish(3)
        status, findings = ask(word(pod))
    assert status == 1
    text = wrong(findings)[0]
    assert "blocks have 6 tokens, the index has blocks of 4: 3 events" in text
    assert "PrefixIndex(block_size=6)" in text


def test_another_topic(ask, pod):
    pod.publish(3)
    for topic in ("kv@other@m", "kv@po", "kv@pod@m "):
        status, findings = ask(word(pod), "--topic", topic)
        assert status == 1
        (text,) = wrong(findings)
        assert text == f"its topic is 'kv@pod@m', not {topic!r}: a subscription to {topic!r} receives nothing"


def test_another_rank(ask):
    with LivePublisher(ranks=2) as pod:
        pod.publish(3, rank=1)
        status, findings = ask(word(pod, rank=1))
    assert status == 1
    (text,) = wrong(findings)
    assert "of rank 1, not 0" in text


def neighbours(make, attempts=50):
    """Return the object that ``make`` opens at two consecutive ports.

    Another process may take one of the ports meanwhile. Then two other ports are tried.
    """
    for _ in range(attempts):
        with socket.create_server(("127.0.0.1", 0)) as first:
            number = first.getsockname()[1]
        with suppress(zmq.ZMQError):
            return make(f"tcp://127.0.0.1:{number}", f"tcp://127.0.0.1:{number + 1}")
    raise AssertionError("no two free ports")


def test_the_port_behind_is_looked_at(ask, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", 20.0)  # an answer may take longer than half a second
    with neighbours(lambda endpoint, behind: LivePublisher(endpoint=endpoint, replay_endpoint=behind)) as pod:
        endpoint, behind = pod.ranks[0]
        pod.publish(3)
        status, findings = ask(f"pod={endpoint}")
        assert status == 1
        assert any(f"no replay endpoint was given ({behind} looks like one)" in text for text in wrong(findings))
    with ExitStack() as stack:

        def both(endpoint, behind):
            with ExitStack() as opened:
                other = opened.enter_context(LivePublisher(name="other", endpoint=behind))
                pod = opened.enter_context(LivePublisher(endpoint=endpoint))
                stack.enter_context(opened.pop_all())
            return pod, other

        pod, other = neighbours(both)
        pod.publish(3)
        _, findings = ask(word(pod))
        assert (
            "note",
            f"{other.ranks[0][0]} publishes events as well. If it is a data-parallel rank of this pod, add --ranks 2",
        ) in findings
        with doctor.subscribed(other.ranks[0][0]) as sock:
            until(lambda: other.publish() or doctor.topics_of(sock) == {"kv@other@m"})
        pod.publish(3)
        status, findings = ask(f"pod={pod.ranks[0][0]}", "--ranks", 2)
        assert any(text.startswith("rank 1: a publisher is at") for _, text in findings)


@pytest.mark.parametrize(
    ("topics", "noted"), [({"kv@other@m"}, False), ({"kv@pod@m"}, True), ({"", "kv@pod@m"}, True), (set(), True)]
)
def test_a_neighbour_with_another_topic_is_no_rank(topics, noted):
    source = PodSource.from_string("pod=tcp://127.0.0.1:5557")
    patient = doctor.Patient(0, source.workers()[0], next_answers="PUB", next_topics=topics)
    patient.facts.add(payload(stored([1], range(4))))
    patient.topics["kv@pod@m"] += 1
    worker = SimpleNamespace(errors={}, state="exact", reason="")
    found = list(doctor.events(patient, worker, None, SimpleNamespace(seconds=1.0), True, set()))
    assert any(text.startswith("tcp://127.0.0.1:5558 publishes") for _, text, _ in found) == noted


@contextmanager
def live(pod):
    stop = threading.Event()

    def publish():
        while not stop.wait(0.01):
            pod.publish()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_without_a_replay_endpoint_history_is_missing(ask):
    with LivePublisher(replay_endpoint=None) as pod:
        pod.publish(5)
        with live(pod):
            status, findings = ask(word(pod, replay=False), "--seconds", 0.5)
    assert status == 1
    (cause,) = wrong(findings)
    assert cause.startswith("no replay endpoint was given")
    texts = consequences(findings, cause)
    for expected in ("are lost", "wait for a parent", "is degraded"):
        assert any(expected in text for text in texts), texts


def test_what_is_lost_or_unreadable(ask, pod):
    pod.publish(2)
    pod.publish_raw(b"\xc1")
    pod.faults.unencodable = 1
    pod.publish(3)
    pod.publish_raw(payload({"type": "BlockEaten"}, stored([900], [-1, 2, 3, 4])))
    status, findings = ask(word(pod))
    assert status == 1
    texts = wrong(findings)
    for expected in ("undecodable (", "unknown_event (1)", "bad_token (1)", "2 batches are lost"):
        assert any(expected in text for text in texts), texts


def test_what_a_prompt_has_to_agree_with(ask, pod, tmp_path):
    def batch(*events):
        return msgpack.packb([1.5, list(events)])

    pod.publish_raw(batch(
        stored([b"a" * 32], range(4), extra_keys=[["tenant-a"]]),
        stored([b"b" * 32], range(100, 104), lora_name="sql", extra_keys=[["sql"]]),
        stored([b"c" * 32], range(200, 204), cache_salt="tenant-b", medium="CPU"),
        stored([b"d" * 32], range(300, 304), extra_keys=[[["image", 3]]], group_idx=1,
               kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8),
        stored([b"e" * 32], [], medium="CPU", size=0),
    ))  # fmt: skip
    _, findings = ask(word(pod))
    notes = "\n".join(text for level, text in findings if level == "note")
    for expected in (
        "in CPU, GPU",
        "(0: full attention, 1: sliding_window of 8 tokens)",
        "1 of 5 blocks came under an adapter (sql)",
        "2 of 5 blocks came under cache salts",
        "1 block has further keys",
        "1 block came without tokens",
    ):
        assert expected in notes, notes
    assert ("ok", "hashes are 32 bytes") in findings
    assert "tenant" not in str(findings), "whose salts they are is nobody's business"


def test_chunked_attention_needs_its_chunk_size(ask, pod):
    event = stored([1], range(4), kv_cache_spec_kind="chunked_local_attention")
    pod.publish_raw(payload(event, rank=0))
    status, findings = ask(word(pod))
    assert status == 1
    assert any("chunk_size" in text for text in wrong(findings))


def test_a_prompt_whose_tokens_are_shifted_is_recognised(ask, pod, tmp_path):
    tokens = random.Random(7).sample(range(1000, 50_000), 40)
    pod.publish_raw(payload(stored(range(1, 11), tokens), stored([20], range(4)), rank=0))
    path = tmp_path / "prompt.json"

    def about(prompt):
        path.write_text(json.dumps(prompt))
        status, findings = ask(word(pod), "--tokens", path)
        return status, [text for text in wrong(findings) if "shifted" in text]

    assert about(tokens) == (0, [])
    status, (found,) = about([1, *tokens])
    assert ("so", "nothing of the prompt's 41 tokens is found") in ask(word(pod), "--tokens", path)[1]
    assert (status, found.partition(";")[0]) == (
        1, "its tokens are shifted by 1: without its first token (1) 40 would be found"
    )  # fmt: skip
    status, (found,) = about(tokens[1:])
    assert (status, found.partition(";")[0]) == (
        1, f"its tokens are shifted by 1: with the token {tokens[0]} in front 40 would be found"
    )  # fmt: skip
    (found,) = about(tokens[4:])[1]
    assert f"with the 4 tokens {', '.join(map(str, tokens[:4]))} in front 40 would be found" in found
    # None of the prompt is held, so no token in front would help, and nothing is reported.
    assert about(list(range(100, 140)))[1] == []


def test_a_prompt_is_looked_for(ask, pod, tmp_path, monkeypatch, capsys):
    pod.publish_raw(payload(stored([1, 2], range(8)), stored([3], range(50, 54), lora_name="sql", extra_keys=[["sql"]]),
                            stored([4], range(70, 74), cache_salt="tenant"), rank=0))  # fmt: skip
    path = tmp_path / "prompt.json"

    def about(tokens):
        path.write_text(json.dumps(list(tokens)))
        status, findings = ask(word(pod), "--tokens", path)
        return status, [text for _, text in findings if "token" in text and not re.search("blocks|engine=", text)]

    assert about(range(10)) == (0, ["8 of the prompt's 10 tokens are found"])
    assert about(range(50, 60)) == (
        1,
        ["nothing of the prompt's 10 tokens is found", "with lora_name='sql' 4 tokens would be found"],
    )
    assert about(range(70, 74))[1][1:] == ["with another tenant's cache_salt 4 tokens would be found"]
    assert about(range(900, 910))[1] == [
        "nothing of the prompt's 10 tokens is found: the engine computes other token ids for it, or has evicted the "
        "prompt. Send the prompt to the engine once more, and repeat this command"
    ]
    assert about([1, 2, 3]) == (1, ["the prompt's 3 tokens are fewer than a block of 4"])
    monkeypatch.setattr("sys.stdin", io.StringIO("[0, 1, 2, 3]"))
    assert ask(word(pod), "--tokens", "-")[0] == 0
    for text, message in (("{}", "not a list of token ids"), ("[", "is not JSON"), ("[1.5, 2, 3, 4]", "tokens")):
        path.write_text(text)
        assert main(["doctor", word(pod), "--block-size", "4", "--seconds", "0.01", "--tokens", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_what_happens_while_it_is_watched():
    """The figures are set by hand, because a test cannot control the time of real faults."""
    with LivePublisher() as pod, EventManager(PrefixIndex(block_size=4)) as manager:
        pod.publish(1)
        manager.add_pod(PodSource.from_string(word(pod)))
        assert manager.wait_until_current(20.0)
        until(lambda: manager.status()["pod"].batches == 1)
        worker = manager.status()["pod"].workers[0]
        patient = doctor.Patient(0, PodSource.from_string(word(pod)).workers()[0], live=1)
    sound = [found.text for found in doctor.losses(patient, worker) if found.level != "ok"]
    assert sound == []
    ill = dataclasses.replace(
        worker, restarts=2, gaps=3, lag=-77.0, errors={"bad_frame_count": 4, "partial_block": 1, "novel": 1},
        counters={"disconnects": 5},
    )  # fmt: skip
    text = "\n".join(found.text for found in doctor.losses(patient, ill))
    for expected in ("restarted 2 times", "3 gaps", "-77 s old", "bad_frame_count (4)", "novel (1)", "lost 5 times"):
        assert expected in text
    assert "partial_block" not in text


# Options of the engine

PLAIN = {
    "type": "BlockStored",
    "block_hashes": [1],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 4,
}
WINDOW = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}


def told_of(options, *events):
    """Return doctor's findings about the options of a pod that has sent these events."""
    source = PodSource("pod", endpoint="tcp://127.0.0.1:1", **options)
    patient = doctor.Patient(0, source.workers()[0])
    for event in events:
        patient.facts.add(msgpack.packb([1.0, [{**PLAIN, **event}], 0]))
    return list(doctor.engine(patient, source))


@pytest.mark.parametrize(
    ("options", "events", "level", "expected"),
    [
        ({}, [{}], "note", "no engine given"),
        ({"engine": "sglang"}, [{}, WINDOW], "WRONG", "as vLLM's do: engine=vllm?"),
        ({"engine": "vllm", "clear_media": ["GPU"]}, [{"medium": "CPU_PINNED"}], "WRONG", "have CPU_PINNED, as"),
        ({"engine": "vllm"}, [{"cache_salt": "x"}], "WRONG", "have cache_salt, as SGLang's do"),
        ({"engine": "trtllm"}, [{}], "note", "reuse are not known"),
        ({"engine": "vllm", "eagle": True}, [{"lookahead_token_ids": [[5, 6]]}], "note", "it has no effect"),
        ({"engine": "vllm", "eagle": [0, 3]}, [{}, WINDOW], "WRONG", "eagle names group 3, its events 0, 1"),
        ({"engine": "sglang", "hybrid": True}, [{}], "note", "never exact"),
        ({"engine": "vllm", "hybrid": True}, [{}, WINDOW], "WRONG", "hybrid= is for SGLang"),
        ({"engine": "vllm"}, [{}, {"medium": "cpu"}], "note", "whether they include CPU"),
        ({"engine": "vllm", "ignore_media": ["disk"]}, [{}], "note", "ignore_media names DISK"),
    ],
)  # fmt: skip
def test_an_option_that_is_missing_or_contradicts_the_stream_is_named(options, events, level, expected):
    (found,) = told_of(options, *events)
    assert found.level == level
    assert expected in found.text


@pytest.mark.parametrize(
    ("options", "events"),
    [
        ({"engine": "vllm"}, [{}, WINDOW]),
        ({"engine": "vllm"}, [{"extra_keys": [["salt"]]}, {"lookahead_token_ids": [[5]]}]),
        ({"engine": "vllm", "eagle": True}, [{}]),
        ({"engine": "vllm", "eagle": [1]}, [{}, WINDOW]),
        ({"engine": "vllm", "clear_media": ["GPU"]}, [{}, {"medium": "CPU"}]),
        ({"engine": "vllm", "ignore_media": ["cpu"]}, [{}, {"medium": "CPU"}]),
        ({"engine": "sglang"}, [{"cache_salt": "x"}, {"medium": "CPU_PINNED"}]),
        ({"engine": "sglang", "eagle": False}, [{"token_ids": [[1, 2], [2, 3], [3, 4], [4, 5]]}]),
    ],
)
def test_nothing_is_said_of_options_that_agree_with_the_stream(options, events):
    assert told_of(options, *events) == []
    assert told_of({}) == [], "nothing is known before a block is stored"


def test_what_contradicts_an_option_is_told_of_a_live_pod(ask, pod):
    ahead = {**PLAIN, "lookahead_token_ids": [[5]]}
    pod.publish_raw(msgpack.packb([1.0, [ahead], 0]))
    status, findings = ask(word(pod) + ",engine=vllm,eagle=true")
    assert status == 0
    notes = [text for level, text in findings if level == "note"]
    assert any(text.startswith("eagle= is for hashes") for text in notes)
    assert any("its stream is exact, but eagle has no effect" in text for text in notes)


# From the engine's own server


@contextmanager
def http_server(answers):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answers.get(self.path)).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_is_asked_where_its_events_are(ask, pod):
    pod.publish(3)
    endpoint, answers = pod.ranks[0]
    sources = [{"data_parallel_rank": 0, "endpoint": endpoint, "replay_endpoint": answers, "topic": "kv@pod@m"}]
    served = {"/kv_event_sources": sources, "/v1/models": {"data": [{"id": "m"}]}}
    described = {
        "kv_events": {"publishers": [{"dp_rank": 0, "endpoint": endpoint, "replay_endpoint": answers}]},
        "kv_events_config": json.dumps({"publisher": "zmq", "endpoint": endpoint}),
        "page_size": 5,
        "served_model_name": "m",
    }
    sglang = {"/server_info": described}
    with http_server(served) as vllm, http_server(sglang) as other, http_server({}) as neither:
        assert ask(vllm)[0] == 0
        status, findings = ask(other)
        assert status == 1
        assert "its server reports blocks of 5 tokens, its events have blocks of 4" in wrong(findings)
        assert main(["doctor", neither]) == 2


def test_a_url_without_a_server_is_one_cause(pod, capsys, monkeypatch):
    monkeypatch.setattr(PodSource, "from_vllm", partial(PodSource.from_vllm, timeout=0.2))
    events, replays = (endpoint.replace("tcp", "http") for endpoint in pod.ranks[0])
    for url, cause in (
        (events, f"{events} is a ZMQ PUB socket of events: give"),
        (replays, f"{replays} is a ZMQ ROUTER socket of events: give"),
        ("http://no-such-host.invalid:1", "the host name 'no-such-host.invalid' cannot be resolved\n"),
    ):
        assert main(["doctor", url]) == 2
        assert f"kvindex doctor: {cause}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("a=tcp://h:1", "--tokens", "/nonexistent")])
def test_what_can_not_be_examined_is_refused_with_2(arguments, capsys):
    try:
        status = main(["doctor", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_ends_the_watching_and_not_the_report(ask, pod, monkeypatch):
    pod.publish(3)
    # Other threads call time.sleep at any time, and replacing it would interrupt the whole test run.
    monkeypatch.setattr(doctor, "time", SimpleNamespace(sleep=lambda _: signal.raise_signal(signal.SIGINT)))
    status, findings = ask(word(pod))
    assert status == 0
    assert any("3 batches" in text for _, text in findings)


# Facts


def test_facts_never_raise_whatever_a_payload_is():
    rng = random.Random(5)
    good = [
        payload(stored([1, 2], range(8), extra_keys=[["a"], None]), {"type": "BlockRemoved", "block_hashes": [1]}),
        payload(["BlockStored", [b"x" * 16], None, list(range(4)), 4, 3, "CPU", {"cache_salt": "s"}], rank=2),
        msgpack.packb({"ts": 1.0, "events": [{"type": "AllBlocksCleared"}]}),
    ]
    facts = Facts()
    for _ in range(3000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        facts.add(bytes(data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.3 else data))
    assert facts.batches == 3000
    assert 0 < facts.undecodable < 3000


def test_the_block_size_is_the_smallest_of_the_usual_ones():
    facts = Facts()
    assert facts.block_size is None
    facts.add(payload(stored([1, 2, 3], range(48), size=16), stored([4], range(5), size=5)))  # a partial block
    facts.add(payload(stored([1], range(64), size=64, group_idx=1, kv_cache_spec_kind="mamba")))
    assert facts.block_size == 16
    assert facts.groups == {0: Group(None, None), 1: Group("mamba", None)}


@pytest.mark.parametrize("topic", ["kv@pod@m", "kv@other@m"])
def test_a_replay_endpoint_that_is_another_pods_is_said(ask, pod, topic):
    with LivePublisher(name="other", topic=topic) as other:
        other.publish(2)
        pod.publish(5)
        with live(pod):
            status, findings = ask(f"pod={pod.ranks[0][0]},{other.ranks[0][1]}", "--seconds", "2", tidy=False)
    assert status == 1
    (cause,) = wrong(findings)
    assert cause.startswith("its stream is degraded: ")
    assert other.ranks[0][1] in cause
    if topic == "kv@pod@m":
        assert "another process's replay endpoint" in cause
        assert pod.ranks[0][0] in cause
    assert not any(level == "ok" and "topic" in text and "," in text for level, text in findings)
    assert any(re.fullmatch(r"[0-9,]+ batch(es are| is) lost", text) for text in consequences(findings, cause))


def test_ranks_that_share_one_publisher_are_a_note(ask, pod):
    for rank in (0, 1):
        pod.publish_raw(payload(stored([rank + 1], [1, 2, 3, 4]), rank=rank))
    _, findings = ask(word(pod))
    assert ("note", "rank 1 publishes here too, and is counted separately") in findings

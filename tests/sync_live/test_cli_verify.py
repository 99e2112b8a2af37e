"""``kvindex verify``: equal if the router is configured like the engine, else the reason by name."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import urllib3
from sync_support import BRISK, nothing_left_behind

from kvindex import EventManager
from kvindex.cli import main, verify
from kvindex.sim import SimProcess
from kvindex.sim import tokenizer as sim_tokenizer

# The requests include block-aligned and repeated prompts, twice.
REQUESTS = 12
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(capsys, monkeypatch):
    """Run ``kvindex verify ARGUMENTS``. Returns the status and the output."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(verify, "EventManager", partial(EventManager, policy=BRISK))

    def run(*arguments, requests=REQUESTS, settle=1.0):
        with nothing_left_behind():
            status = main(["verify", *map(str, arguments), "--requests", str(requests), "--settle", str(settle)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@contextmanager
def engine(**options):
    with SimProcess(**{"name": "pod", "http": 0, "blocks": 5000, **options}) as pod:
        yield pod


def word(pod, **options):
    """Return the pod as the command line names it."""
    endpoint, answers = pod.ranks[0]
    return ",".join([f"pod={endpoint}", answers, *(f"{name}={value}" for name, value in options.items())])


# Right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "vllm-0.22.0"},
        {"form": "sglang-0.5.22"},
        {"ranks": 2},
        {"block_size": 32},
        {"lookahead": 3},
        {"form": "sglang-0.5.22", "lookahead": 1},
        {"window": 64},
        {"window": 64, "window_block_size": 32, "window_interval": 64},
        {"offload_blocks": 5000},
        {"offload_blocks": 5000, "offload_tokens": True, "offload_keyless": True},
        {"form": "sglang-0.5.22", "window": 64, "window_blocks": 5000},
        {"hashes": "bytes32"},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_an_engine_that_says_where_it_publishes_is_equal(check, options):
    with engine(**options) as pod:
        status, said = check(pod.url)
    assert f"equal: {REQUESTS} of {REQUESTS}" in said
    assert status == 0
    rows = dict(re.findall(r"^(new|growing|repeated|branching|block-aligned\S*(?: repeated)?) .* (\S+) *$", said, re.M))
    assert rows["new"] == "0"
    assert all(int(rows[kind].replace(",", "")) > 0 for kind in rows if kind != "new")
    assert len(rows) == 6


def test_an_engine_whose_options_are_given_is_equal(check):
    with engine(eagle=True) as pod:
        status, said = check(pod.url, word(pod, engine="vllm", eagle="true"))
    assert f"equal: {REQUESTS} of {REQUESTS}" in said
    assert status == 0


def test_adapters_and_salts_are_asked_for(check):
    with engine() as pod:
        for options in (["--lora-name", "adapter-1"], ["--cache-salt", "tenant"]):
            status, said = check(pod.url, *options)
            assert f"equal: {REQUESTS} of {REQUESTS}" in said
            assert status == 0


def test_the_routers_own_tokenizer_and_template(check, tmp_path):
    sim_tokenizer.save(tmp_path)
    files = ["--tokenizer", tmp_path / "tokenizer.json", "--chat-template", tmp_path / "chat_template.jinja"]
    with engine() as pod:
        status, said = check(pod.url, *files)
        assert f"equal: {REQUESTS} of {REQUESTS}" in said
        assert status == 0
        template = (tmp_path / "chat_template.jinja").read_text().replace('"<|end|>"', '"<|end|>\\n"')
        (tmp_path / "chat_template.jinja").write_text(template)
        status, said = check(pod.url, *files, settle=0.05)
    assert status == 1
    assert re.search(
        r"chat template differs from the engine's: from token \d+ on the router's ids are \[10, 257, \d+\], the ", said
    )


# Misconfigured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "reason"),
    [
        ({}, {}, "with engine='vllm', 12 of 12 are equal"),
        ({}, {"engine": "sglang"}, "with engine='vllm', 12 of 12 are equal"),
        ({"form": "sglang-0.5.22"}, {"engine": "vllm"}, "with engine='sglang', 12 of 12 are equal"),
        ({"eagle": True}, {"engine": "vllm"}, "with eagle=True, 12 of 12 are equal"),
        ({"eagle": True}, {}, "with engine='vllm' and eagle=True, 12 of 12 are equal"),
        ({}, {"engine": "vllm", "eagle": "true"}, "with eagle=False, 12 of 12 are equal"),
    ],
)
def test_the_option_that_makes_answers_equal_is_named(check, options, given, reason):
    with engine(**options) as pod:
        status, said = check(pod.url, word(pod, **given))
    assert status == 1
    assert reason in said
    assert re.search(
        r"block-aligned, repeated, [\d,]+ tokens: the index expected [\d,]+, the engine reported [\d,]+ \((16|32) ",
        said,
    )


def test_a_block_size_that_does_not_fit_is_named(check):
    with engine() as pod:
        status, said = check(pod.url, "--block-size", 24, settle=0.05)
    assert status == 1
    assert "the engine's blocks have 16 tokens, the index has blocks of 24: use --block-size 16" in said


def test_an_adapter_that_is_taken_for_a_model_is_named(check):
    with engine() as pod:
        status, said = check(pod.url, "--model", "adapter-1")
    assert status == 1
    assert "with lora_name='adapter-1', 12 of 12 are equal" in said


# Something between the router and the engine ----------------------------------------------------------------------


class Gateway(ThreadingHTTPServer):
    """Forwards requests to a pod. ``change_request`` and ``change_answer`` get the path and the JSON."""

    daemon_threads = True

    def __init__(self, url, change_request=None, change_answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.url = url, f"http://127.0.0.1:{self.server_port}"
        self.change_request = change_request or (lambda path, body: body)
        self.change_answer = change_answer or (lambda path, answer: answer)
        self.headers = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.hand_on(None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.hand_on(self.server.change_request(self.path, body))

    def hand_on(self, body):
        gateway = self.server
        gateway.headers.append((self.path, self.headers.get("Authorization")))
        # No kept-alive connection, because the test looks for the command's own afterwards.
        with urllib3.PoolManager() as http:
            answer = http.request(self.command, gateway.engine + self.path, json=body)
        found = gateway.change_answer(self.path, answer.json() if answer.status == 200 else answer.data)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


SALTS = count()


def salted(path, body, salt="tenant"):
    return {**body, "cache_salt": salt} if "completions" in path else body


def unreported(path, answer):
    if "completions" in path:
        answer["usage"]["prompt_tokens_details"] = None
    return answer


def less_its_first(path, answer):
    return {**answer, "tokens": answer["tokens"][1:]} if path == "/tokenize" else answer


def with_one_more(path, answer):
    return {**answer, "tokens": [7, *answer["tokens"]]} if path == "/tokenize" else answer


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    [
        (salted, None, "with cache_salt='tenant', 12 of 12 are equal"),
        (None, unreported, "the engine does not report cached tokens: start vLLM with --enable-prompt-tokens-details"),
        (lambda path, body: salted(path, body, f"{next(SALTS)}"), None, "the engine reuses nothing"),
    ],
    ids=["salt", "unreported", "a salt of each request's own"],
)
def test_what_a_gateway_changes_is_named(check, request_, answer, reason):
    with engine() as pod, Gateway(pod.url, request_, answer) as gateway:
        status, said = check(gateway.url, word(pod, engine="vllm"), settle=0.05 if reason[0] == "t" else 1.0)
    assert status == 1
    assert reason in said
    assert "12 of 12\n" not in said.replace("are equal", "")


def test_a_bos_that_only_one_side_adds_is_named(check):
    # Chats only: prompts sent as token ids have the router's tokens.
    for change, reason in (
        (less_its_first, "with token 256 before each prompt, which the engine adds (BOS), 8 of 12 are equal"),
        (with_one_more, "with prompts without their first token, which the engine does not add (BOS), 8 of 12 are"),
    ):
        with engine() as pod, Gateway(pod.url, None, change) as gateway:
            status, said = check(gateway.url, word(pod, engine="vllm"), settle=0.05)
        assert status == 1
        assert reason in said
        assert re.search(r"the engine counts [\d,]+ tokens in a prompt of [\d,]+: a BOS token", said)


def test_a_base_model_without_a_template_is_sent_token_ids(check):
    def no_template(path, answer):
        if path == "/tokenize" and isinstance(answer, dict) and 256 in answer["tokens"][:1]:
            return b"no chat template"
        return answer

    with engine() as pod, Gateway(pod.url, None, no_template) as gateway:
        status, said = check(gateway.url, word(pod, engine="vllm"), "--api-key", "secret")
        assert f"equal: {REQUESTS} of {REQUESTS}" in said
        assert status == 0
        assert {path for path, _ in gateway.headers} == {"/tokenize", "/v1/completions", "/v1/models"}
        assert {key for _, key in gateway.headers} == {"Bearer secret"}


# Impossible comparisons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (lambda path, found: b"<html>" if "completions" in path else found, "which is not JSON"),
        (lambda path, found: {"id": 3} if "completions" in path else found, "which has no usage"),
        (lambda path, found: [] if "completions" in path else found, "which has no usage"),
        (lambda path, found: {"data": []} if "models" in path else found, "names no model: give --model"),
        (lambda path, found: b"?" if "tokenize" in path else found, "without a list of token ids"),
    ],
)
def test_nonsense_is_one_clear_error(check, answer, named):
    with engine() as pod, Gateway(pod.url, None, answer) as gateway:
        status, said = check(gateway.url, word(pod))
    assert status == 2
    assert said.startswith("kvindex verify: ")
    assert named in said


def test_what_is_refused_or_not_there(check, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PATIENCE", 1.0)
    with engine(blocks=4) as pod:
        status, said = check(pod.url)
        assert status == 2
        assert "answered 400" in said
        status, said = check(pod.url, "tcp://127.0.0.1:1", "--model", "sim")
        assert status == 2
        assert "no events can be followed: 127.0.0.1:1 is stale" in said
        url = pod.url
        for options, named in (
            (["--chat-template", "x"], "--chat-template needs --tokenizer"),
            (["--tokenizer", tmp_path / "absent.json"], "absent.json is not a tokenizer"),
            (["--tokenizer", ROOT / "asv.conf.json"], "is not a tokenizer"),
        ):
            status, said = check(url, *options)
            assert status == 2
            assert named in said
        where = word(pod)
    for pods in ([], [where]):
        status, said = check(url, *pods)
        assert status == 2
        assert re.search("nothing listens at|does not answer", said)

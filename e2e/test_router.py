"""The whole router of the examples, before pods that answer as OpenAI-compatible servers."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from kvindex.sim import tokenizer as sim_tokenizer
from kvindex.text import PromptEncoder

from .fleet import ROOT, Pods, source, until

SYSTEM = {"role": "system", "content": "You are a router's own test. " * 12}
ENCODER = PromptEncoder(sim_tokenizer.tokenizer(), sim_tokenizer.TEMPLATE)


def command(pods: Path, model: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / "http_router.py"), f"--pods={pods}", f"--model={model}", *options]


@dataclass
class Served:
    """An answer: its pod, and the cached tokens that the router expected and the engine reported."""

    pod: str = ""
    expected: int = -1
    reported: int | None = None
    text: str = ""
    whole: bool = False


class Router:
    """The example as a process, and a client of it."""

    def __init__(self, pods: Path, model: Path, *options: str, log: Any = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = urllib3.PoolManager(maxsize=32, retries=False, timeout=60.0)
        self.process = subprocess.Popen(command(pods, model, f"--port={port}", *options), stderr=log)

    def health(self) -> int | None:
        """The status of ``/health``; None before the router listens."""
        assert self.process.poll() is None, "the router has ended"
        try:
            return self.http.request("GET", f"{self.url}/health").status
        except urllib3.exceptions.HTTPError:
            return None

    def asked(self, **body: Any) -> tuple[int, Any]:
        answer = self.http.request("POST", f"{self.url}/v1/completions", json={"prompt": "hello", **body})
        return answer.status, answer.json()

    def post(self, path: str, **body: Any) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self.http.request("POST", self.url + path, body=data, headers=headers, preload_content=False)

    def chat(self, messages: list[dict[str, str]], *, stream: bool = False, **more: Any) -> Served:
        """Send a chat to the router; ``whole`` is false when the answer is an error or cut off."""
        if stream:
            more |= {"stream": True, "stream_options": {"include_usage": True}}
        found = Served()
        try:
            answer = self.post("/v1/chat/completions", messages=messages, model="sim", **{"max_tokens": 20, **more})
            found.pod = answer.headers.get("x-kvindex-pod", "")
            found.expected = int(answer.headers.get("x-kvindex-expected", -1))
            data = answer.read().decode()
            answer.release_conn()
        except urllib3.exceptions.HTTPError:
            return found
        if answer.status != 200:
            return found
        parts = [data]
        if stream:
            *parts, done, rest = data.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
        events = [json.loads(part.removeprefix("data: ")) for part in parts]
        found.reported = events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        kind = "delta" if stream else "message"
        found.text = "".join(choice[kind]["content"] for event in events for choice in event["choices"])
        found.whole = True
        return found

    def metrics(self) -> dict[str, float]:
        """The router's metrics, by name and pod."""
        text = self.http.request("GET", f"{self.url}/metrics").data.decode()
        return {
            name + (f" {pod}" if pod else ""): float(value)
            for name, pod, value in re.findall(r'^(\w+)(?:\{pod="(\w+)"(?:,rank="0")?\})? (\S+)$', text, re.M)
        }

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.http.clear()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pods, Path, Path]]:
    """Four pods, the list of them, and the directory of their model."""
    directory = tmp_path_factory.mktemp("router")
    sim_tokenizer.save(directory / "model")
    with Pods(http=0, blocks=9000) as pods:
        listed = []
        for pod in pods.start("a", "b", "c", "d"):
            made = source(pod)
            ((endpoint, replay_endpoint),) = made.workers().values()
            listed.append(
                {"name": made.name, "endpoint": endpoint, "replay_endpoint": replay_endpoint, "model": made.model,
                 "engine": made.engine, "address": pod.url}
            )  # fmt: skip
        (directory / "pods.yaml").write_text(yaml.safe_dump(listed))
        yield pods, directory / "pods.yaml", directory / "model"


@contextmanager
def started(listed: Path, model: Path, *options: str, log: Any = None, ready: bool = True) -> Iterator[Router]:
    router = Router(listed, model, *options, log=log)
    try:
        if ready:
            until(lambda: router.health() == 200, "the router is not ready")
        yield router
    finally:
        router.close()


@pytest.fixture
def router(fleet: tuple[Pods, Path, Path]) -> Iterator[Router]:
    with started(*fleet[1:]) as made:
        yield made


def applied(router: Router, pods: Pods) -> None:
    """Wait until all batches of the pods are in the router's index."""

    def late() -> dict[str, tuple[float, int]]:
        found = router.metrics()
        return {
            pod.config.name: (batches, seqs)
            for pod in pods
            if (batches := found[f"kvindex_worker_batches_total {pod.config.name}"]) < (seqs := pod.seqs()[0])
        }

    # A pod may publish after it has answered, so wait for several looks without a new batch. Two were once too few on a
    # busy machine.
    looks: deque[list[int]] = deque(maxlen=8)

    def at_rest() -> bool:
        looks.append([pod.seqs()[0] for pod in pods])
        return len(looks) == looks.maxlen and all(look == looks[0] for look in looks) and not late()

    until(at_rest, late)


@pytest.mark.quick
def test_every_answers_cached_tokens_are_the_expected_ones(fleet: tuple[Pods, Path, Path], router: Router) -> None:
    """New, growing and repeated chats, streamed and whole. Every second turn ends at a block's end."""
    pods = fleet[0]
    # All pods get the system prompt first. Otherwise chance would decide which request finds it.
    for pod in pods:
        urllib3.request("POST", f"{pod.url}/v1/chat/completions", json={"messages": [SYSTEM], "model": "sim"})
    applied(router, pods)
    rng = random.Random(5)
    chats: list[list[dict[str, str]]] = [[SYSTEM] for _ in range(16)]
    answers: list[tuple[int, bool, Served]] = []

    def turn(number: int, again: bool) -> tuple[int, bool, Served]:
        served = router.chat(chats[number], stream=bool(number % 2))
        return len(ENCODER.encode_chat(chats[number])), again, served

    with ThreadPoolExecutor(8) as clients:
        for at in range(4):
            for chat in chats:
                content = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 99)))
                length = len(ENCODER.encode_chat([*chat, {"role": "user", "content": content}]))
                chat.append({"role": "user", "content": content + "." * (at % 2 * (-length % 16))})
            for again in (False, True):
                found = list(clients.map(turn, range(len(chats)), [again] * len(chats)))
                answers += found
                applied(router, pods)
            for chat, (*_, served) in zip(chats, found, strict=True):
                chat.append({"role": "assistant", "content": served.text})
    assert all(served.whole for *_, served in answers)
    assert [each for each in answers if each[2].reported != each[2].expected] == []
    aligned = [served for length, again, served in answers if again and length % 16 == 0]
    assert len(aligned) >= 32
    reused = sum(served.reported or 0 for *_, served in answers)
    assert reused > 0.7 * sum(length for length, *_ in answers)
    assert {served.pod for *_, served in answers} == set("abcd")
    figures = router.metrics()
    assert figures["kvindex_picks_total"] == len(answers)
    for name, count in Counter(served.pod for *_, served in answers).items():
        assert figures[f"kvindex_prediction_error_tokens_count {name}"] == count
        assert figures[f"kvindex_prediction_error_tokens_sum {name}"] == 0
        assert figures[f"kvindex_worker_requests {name}"] == 0


@pytest.mark.quick
def test_a_pod_that_is_killed_costs_no_request_but_those_in_flight_on_it(
    fleet: tuple[Pods, Path, Path], router: Router
) -> None:
    pods = fleet[0]
    before, after, stop = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    killed = threading.Event()

    def client(number: int) -> list[tuple[bool, Served]]:
        rng = random.Random(number)
        served, chat = [], [SYSTEM]
        while not stop.is_set():
            dead = killed.is_set()
            chat = [*chat[-6:], {"role": "user", "content": "".join(rng.choices("abc ", k=200))}]
            served.append((dead, router.chat(chat, stream=rng.random() < 0.5, max_tokens=60)))
            (after if dead else before).release()
        return served

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(client, number) for number in range(8)]
        try:
            for _ in range(60):
                assert before.acquire(timeout=60)
            pods["b"].kill()
            killed.set()
            for _ in range(120):
                assert after.acquire(timeout=60)
        finally:
            stop.set()
        answers = [each for one in running for each in one.result()]
    failed = [(dead, served) for dead, served in answers if not served.whole]
    # Only requests sent before the kill may fail, at most one of each client. All later ones were served.
    assert all(not dead and served.pod == "b" for dead, served in failed), failed
    assert len(failed) <= 8
    assert "b" in {served.pod for dead, served in answers if not dead}
    assert "b" not in {served.pod for dead, served in answers if dead}
    assert router.metrics()["kvindex_unplaced_requests_total"] == 0
    assert all(router.metrics()[f"kvindex_worker_requests {name}"] == 0 for name in "acd")
    # The pod comes back.
    pods["b"].launch()
    number = iter(range(10**6))
    until(lambda: router.chat([{"role": "user", "content": f"{next(number)} again"}]).pod == "b")


@pytest.mark.quick
def test_a_router_that_is_told_to_end_lets_requests_in_flight_end(fleet: tuple[Pods, Path, Path]) -> None:
    with started(*fleet[1:]) as router:
        messages = [{"role": "user", "content": "tell me everything"}]
        answer = router.post("/v1/chat/completions", messages=messages, model="sim", max_tokens=65536, stream=True)
        data = answer.read(1)
        # The answer is larger than the buffers of the sockets, so the unread part is not sent yet.
        assert sum(router.metrics()[f"kvindex_worker_requests {name}"] for name in "abcd") == 1
        router.process.send_signal(signal.SIGTERM)

        def refuses() -> bool:
            try:
                socket.create_connection(("127.0.0.1", int(router.url.rpartition(":")[2]))).close()
            except ConnectionRefusedError:
                return True
            return False

        until(refuses)
        while piece := answer.read(1 << 20):
            data += piece
        answer.release_conn()
        *parts, done, rest = data.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        # The router itself requested the usage, so it does not pass it on.
        assert len(parts) == 1 + 65536  # the first piece has the role
        assert "usage" not in parts[-1]
        router.http.clear()
        assert router.process.wait(60) in (0, -signal.SIGTERM)


@pytest.mark.quick
def test_what_is_wrong_is_refused_by_name_and_leaves_nothing_in_flight(router: Router) -> None:
    well = {"messages": [{"role": "user", "content": "hello"}], "model": "sim", "max_tokens": 1}
    for path, body, status, named in (
        ("/v1/chat/completions", {**well, "messages": [{"role": "robot", "content": ""}]}, 400, "no role robot"),
        ("/v1/chat/completions", {**well, "messages": None}, 400, "messages is missing"),
        ("/v1/chat/completions", {**well, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "lone surrogate"),
        ("/v1/chat/completions", {**well, "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/chat/completions", {**well, "max_tokens": 0, "stream": True}, 400, "max_tokens is 0"),
        ("/v1/chat/completions", {**well, "chat_template_kwargs": 3}, 400, "chat_template_kwargs must be an object"),
        ("/v1/chat/completions", {**well, "stream_options": [3]}, 400, "stream_options must be an object"),
        ("/v1/completions", {"prompt": [-1], "model": "sim"}, 400, "tokens"),
        ("/v1/completions", {"prompt": None}, 400, "tokens"),
        ("/v1/completions", {"prompt": "hello", "model": "absent"}, 404, "no model 'absent'"),
    ):
        answer = router.post(path, **body)
        text = answer.read().decode()
        assert (answer.status, named in text) == (status, True), text
        answer.release_conn()
    for wrong in (b"", b"{", b"\xff", b"[" * 99_999, b"[]"):
        refused = router.http.request("POST", f"{router.url}/v1/completions", body=wrong)
        assert refused.status == 400
        error = refused.json()["error"]
        assert (error["type"], error["message"]) == ("invalid_request_error", "the body must be a JSON object")
    for kind in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}):
        body = json.dumps(well).encode()
        assert router.http.request("POST", f"{router.url}/v1/chat/completions", body=body, headers=kind).status == 200
    assert router.chat(well["messages"]).whole
    assert router.http.request("GET", f"{router.url}/v1/models").json()["data"] == [{"id": "sim", "object": "model"}]
    figures = router.metrics()
    assert all(figures[f"kvindex_worker_requests {name}"] == 0 for name in "abcd")


def listed_as(pods: Path, path: Path, **changes: dict[str, Any]) -> Path:
    """Write a list of the fleet's pods that are named in ``changes``, with these changes."""
    found = {item["name"]: item for item in yaml.safe_load(pods.read_text())}
    path.write_text(yaml.safe_dump([{**found[name], **change} for name, change in changes.items()]))
    return path


@pytest.mark.quick
def test_a_request_names_a_served_model_or_a_known_adapter(fleet: tuple[Pods, Path, Path], tmp_path: Path) -> None:
    """Pod d is listed with another model, which its engine does not have, so the answer shows the chosen pod."""
    listed = listed_as(fleet[1], tmp_path / "pods.yaml", a={}, d={"model": "other"})
    with started(listed, fleet[2], "--lora=adapter-1=sim", "--lora=adapter-2=other") as router:
        for body in ({"model": "gpt-4"}, {"model": "adapter-3"}, {"model": ["sim"]}, {}):
            status, answer = router.asked(**body)
            assert status == 404
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["code"] == "model_not_found"
            assert "'adapter-1', 'adapter-2', 'other', 'sim'" in answer["error"]["message"]
        names = [each["id"] for each in router.http.request("GET", f"{router.url}/v1/models").json()["data"]]
        assert sorted(names) == ["adapter-1", "adapter-2", "other", "sim"]

        def pod_of(model: str) -> str | None:
            answer = router.post("/v1/completions", prompt="which of you?" * 20, model=model)
            answer.drain_conn()
            return answer.headers.get("x-kvindex-pod")

        for _ in range(5):
            assert [pod_of(name) for name in ("sim", "other", "adapter-1", "adapter-2")] == ["a", "d", "a", "d"]
        # An adapter has its own blocks, and the expected tokens follow them.
        ids = list(range(200)) * 2
        for model in ("sim", "adapter-1"):
            for expected in (0, 384):
                answer = router.post("/v1/completions", prompt=ids, model=model, max_tokens=1)
                usage = json.loads(answer.read())["usage"]["prompt_tokens_details"]
                answer.release_conn()
                assert usage["cached_tokens"] == int(answer.headers["x-kvindex-expected"]) == expected


@pytest.mark.quick
def test_a_router_without_a_ready_pod_gives_the_reason_of_each(fleet: tuple[Pods, Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, open(tmp_path / "log", "w+") as log:
        nowhere = f"127.0.0.1:{silent.getsockname()[1]}"
        listed = listed_as(
            fleet[1], tmp_path / "pods.yaml", a={"address": "http://127.0.0.1:1"}, b={"endpoint": f"tcp://{nowhere}"}
        )
        with started(listed, fleet[2], log=log, ready=False) as router:
            # The router listens although b never answers, and is not ready until the wait for b is over.
            until(lambda: router.health() == 503, "the router does not listen")

            def refused() -> bool:
                status, answer = router.asked(model="sim")
                assert (status, answer["error"]["type"]) == (503, "server_error")
                text = answer["error"]["message"]
                assert not set("{}'\"") & set(text.removeprefix("no pod of 'sim' is ready: "))
                return "ready: a: health check failed: http://127.0.0.1:1/health: " in text and "; b: stale: " in text

            until(refused, "the reasons are not named")
        log.seek(0)
        lines = [line for line in log if "kvindex.http_router" in line]
        assert len(lines) == 1, "once, not with each check"
        assert "WARNING kvindex.http_router: pod a is not healthy: health check failed: http://" in lines[0]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, (), "No such file"),
        ("a: 3", (), "is not a list of pods"),
        ('[{name: a, endpoint: "tcp://h:1", model: m}]', (), "pod 'a' has no address"),
        ('[{name: a, endpoint: "tcp://h:1", address: "http://h"}]', (), "pod 'a' has no model"),
        ("[]", ("--lora=sql",), "--lora sql: name the adapter's model"),
        ("[]", ("--model=/nonexistent",), "/nonexistent/tokenizer.json"),
    ],
)
def test_a_router_that_cannot_start_says_why_in_one_line(
    fleet: tuple[Pods, Path, Path], tmp_path: Path, text: str | None, options: tuple[str, ...], said: str
) -> None:
    pods = tmp_path / "pods.yaml"
    if text is not None:
        pods.write_text(text)
    ended = subprocess.run(command(pods, fleet[2], *options), stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_router_without_its_extra_names_it_in_one_line() -> None:
    script = "import runpy, sys; sys.modules['fastapi'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    path = str(ROOT / "examples" / "http_router.py")
    ended = subprocess.run([sys.executable, "-c", script, path], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.endswith(": pip install 'kvindex[examples]'")


@pytest.fixture
def prometheus() -> str:
    return shutil.which("prometheus") or pytest.skip("prometheus is not installed: make test-kv-sync-e2e")


def test_prometheus_scrapes_the_router_and_evaluates_the_rules_and_panels(
    router: Router, prometheus: str, tmp_path: Path
) -> None:
    for number in range(5):
        assert router.chat([{"role": "user", "content": f"{number}"}]).whole
    often = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    target = {"targets": [router.url.removeprefix("http://")]}
    config = {
        "global": often,
        "rule_files": [str(ROOT / "deploy" / "alerts.yml")],
        "scrape_configs": [{"job_name": "router", "static_configs": [target]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"config.file": tmp_path / "prometheus.yml", "storage.tsdb.path": tmp_path, "web.listen-address": at}
    process = subprocess.Popen(
        [prometheus, *(f"--{name}={value}" for name, value in options.items())], stderr=subprocess.DEVNULL
    )

    def ask(path: str, **fields: str) -> Any:
        try:
            answer = router.http.request("GET", f"http://{at}/api/v1/{path}", fields=fields)
        except urllib3.exceptions.HTTPError:
            return None
        assert answer.status in (200, 503), answer.data
        return answer.json()["data"] if answer.status == 200 else None

    def values(query: str) -> dict[str, float]:
        found = ask("query", query=query)
        return {row["metric"].get("pod", ""): float(row["value"][1]) for row in found["result"]} if found else {}

    try:
        until(lambda: values("kvindex_picks_total") == {"": 5}, lambda: ask("targets"))
        assert values('kvindex_worker_state{state="exact"}') == dict.fromkeys("abcd", 1)
        figures = router.metrics()
        for name in ("kvindex_reported_cached_tokens_total", "kvindex_worker_batches_total"):
            assert values(name) == {key.split()[1]: n for key, n in figures.items() if key.split()[0] == name}

        def evaluated() -> list[dict[str, Any]]:
            found = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
            return found if all(rule["health"] != "unknown" for rule in found) else []

        rules = until(evaluated, "the rules are not evaluated")
        assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}
        for panel in json.loads((ROOT / "deploy" / "grafana.json").read_text())["panels"]:
            for each in panel["targets"]:
                assert ask("query", query=each["expr"].replace("$__rate_interval", "1m")) is not None
    finally:
        process.kill()
        process.wait()

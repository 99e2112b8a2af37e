"""``kvindex serve`` beside Dynamo's standalone indexer, on the same publishers.

Both get the publishers by the same ``/register`` calls and the same ``/query`` requests from wrk, in turns. Four
simulated pods hold eight prompts of 2,048 blocks, and the measurement starts when both services answer all of it. For
the rows beside ingest, sixteen more publish 2,000 batches a second. Where Dynamo's runtime is not installed, its rows
are left out, with a message.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from kvindex import PrefixIndex
from kvindex.sim import SimProcess

from .data import BLOCK, beginning, chains, fill
from .interleave import Timings
from .publishers import Publishers, until
from .reach import Reached
from .report import amount
from .served import Served, free_url, started, wrk

PACKAGES = ("uvicorn", "starlette", "ai-dynamo-runtime")
DEPTH, PROMPTS, RATE = 2048, 8, 2000
LUA = """
local made, at = {}, 0
init = function()
  for n = 0, %d do
    local file = io.open("%s" .. n, "rb")
    made[n] = wrk.format("POST", nil, {["Content-Type"] = "application/%s"}, file:read("*a"))
    file:close()
  end
end
request = function() at = (at + 1) %% (#made + 1); return made[at] end
"""


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"})) as answer:
        said = answer.read()
    return json.loads(said) if said else None


def ours(url: str, *more: str) -> list[str]:
    return ["-m", "kvindex", "serve", f"--port={url.rpartition(':')[2]}", *more]


def measure(*, seconds: int = 3, rounds: int = 3, connections: int = 4) -> Iterator[str | Reached]:
    """``seconds``: of each turn; ``rounds``: turns of each service; ``connections``: of wrk."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield from beside(folder, seconds, rounds, connections, stack)
    yield from page(rounds)
    with tempfile.TemporaryDirectory() as place:
        yield from replica(Path(place))


def beside(folder: Path, seconds: int, rounds: int, connections: int, stack: ExitStack) -> Iterator[str | Reached]:
    """Both services on the same publishers: answers, requests a second, and p99 beside ingest."""
    prompts = [beginning(1, number, DEPTH) for number in range(PROMPTS)]
    questions = [{"model_name": "sim", "token_ids": prompt.tolist()} for prompt in prompts]
    for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        (folder / f"query{number}").write_text(json.dumps(question))
        (folder / f"match{number}").write_bytes(prompt.tobytes())
    (folder / "query").write_text(LUA % (PROMPTS - 1, folder / "query", "json"))
    (folder / "match").write_text(LUA % (PROMPTS - 1, folder / "match", "octet-stream"))
    uds = str(folder / "socket")
    services = ["kvindex", "dynamo"]
    if find_spec("dynamo") is None:
        services.remove("dynamo")
        yield "Dynamo's runtime is not installed: its rows are left out"
    pods = [stack.enter_context(SimProcess(name=name, blocks=2 * PROMPTS * DEPTH)) for name in "abcd"]
    writers = stack.enter_context(Publishers(16))
    writers.prepare(RATE * (seconds + 2))
    urls, processes = {}, {}
    listed = [(*pod.ranks[0], "sim") for pod in pods]
    listed += [(*ends, "m") for ends in writers.ends]
    for name in services:
        urls[name] = url = free_url()
        theirs = ["-m", "dynamo.indexer", "--port", url.rpartition(":")[2]]
        command = ours(url, f"--uds={uds}") if name == "kvindex" else theirs
        processes[name] = stack.enter_context(started(command, url))
        for instance, (live, replay, model) in enumerate(listed, 1):
            ask(f"{url}/register", {
                "instance_id": instance, "endpoint": live, "replay_endpoint": replay, "model_name": model,
                "block_size": BLOCK, "dp_rank": 0,
            })  # fmt: skip
    for pod in pods:
        for prompt in prompts:
            pod.serve(prompt)
    for url in urls.values():
        until(lambda url=url: all(held(url, each) == [DEPTH * BLOCK] * len(pods) for each in questions))
    yield (f"both answer {DEPTH * BLOCK} tokens for each of {len(pods)} pods and {PROMPTS} prompts")

    def asked(name: str, about: str, path: str = "query", query: str = "") -> Served:
        return wrk(f"{name} /{path}{about}", f"{urls[name]}/{path}{query}", processes[name].pid,
                   folder / path.rpartition("/")[2], seconds, connections)  # fmt: skip

    times, tails = Timings(), {name: list[float]() for name in services}
    for _ in range(rounds):
        for name in services:
            found = asked(name, ", list of 2,048 blocks")
            times.setdefault(name, []).append(1e9 / found.rate)
            yield found.text
    if len(services) == 2:
        ratio = times.ratio("dynamo", "kvindex")
        at = f"2,048 blocks as a list, {connections} connections"
        yield Reached("requests a second against Dynamo's", at, "query list", ratio.median, ratio)
    yield asked("kvindex", ", bytes", "v1/match", "?model=sim").text
    yield from unix(uds, urls["kvindex"], prompts, rounds)
    for _ in range(rounds):
        for name in services:
            writers.send(RATE * (seconds + 2), RATE)
            time.sleep(0.5)
            found = asked(name, f" beside {RATE:,} batches a second")
            tails[name].append(found.p99 / found.p50)
            yield f"{found.text}; p99 / p50 {amount(tails[name][-1])}"
    at = ", ".join(f"{name} {amount(statistics.median(tails[name]))}" for name in services)
    yield Reached(
        f"p99 against p50 beside {RATE:,} batches a second", at, "query tail", statistics.median(tails["kvindex"])
    )


def held(url: str, question: Any) -> list[int]:
    found = ask(f"{url}/query", question)["instances"].values()
    return [instance["longest_matched"] for instance in found if instance["longest_matched"]]


def p50(call: Callable[[Any], object], inputs: list[Any], times: int = 1000) -> float:
    taken = []
    for number in range(times):
        start = time.perf_counter()
        call(inputs[number % len(inputs)])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def unix(path: str, url: str, prompts: list[Any], rounds: int) -> Iterator[str | Reached]:
    """A match over a Unix socket with binary tokens, beside the match alone on the same index.

    The index is the service's, from its snapshot. The requests are bytes over a socket, because a client library would
    be a part of the figure.
    """
    with urlopen(f"{url}/v1/snapshot") as answer:
        index = PrefixIndex.loads(answer.read())
    head = (
        b"POST /v1/match?model=sim HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
        b"content-length: %d\r\n\r\n"
    )
    requests = [head % prompt.nbytes + prompt.tobytes() for prompt in prompts]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def over(request: bytes) -> None:
            sock.sendall(request)
            said = sock.recv(65536)
            while (found := re.search(rb"content-length: (\d+)\r\n\r\n", said)) is None or (
                len(said) < found.end() + int(found[1])
            ):
                said += sock.recv(65536)

        whole = min(p50(over, requests) for _ in range(rounds))
        empty = min(p50(over, [b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"]) for _ in range(rounds))
    alone = min(p50(lambda prompt: index.match_prefix(prompt, model="sim"), prompts) for _ in range(rounds))
    yield f"Unix socket: GET /healthz takes {empty * 1e6:.0f} us, p50 of the best round"
    at = f"2,048 blocks as bytes, {alone * 1e6:.0f} → {whole * 1e6:.0f} us"
    yield Reached("us that a Unix socket adds to a match, p50", at, "unix us", (whole - alone) * 1e6)


def page(rounds: int, looks: int = 15) -> Iterator[Reached]:
    """Processor time of the service with 500 silent pods, while one browser shows the page and without one, in turns.

    The page makes two requests every 2 seconds. Here they come every 0.6 seconds, because the service makes a new
    answer at most once in half a second. Only the answering thread is counted: the time of the threads of 500 streams
    varies by more than that of a request.
    """
    with ExitStack() as stack:
        # The port is chosen after the publishers have theirs, because they take a thousand.
        publishers = stack.enter_context(Publishers(500, history=1))
        url = free_url()
        served = stack.enter_context(started(ours(url), url))
        for number, (live, replay) in enumerate(publishers.ends, 1):
            ask(f"{url}/register", {"instance_id": number, "endpoint": live, "replay_endpoint": replay,
                                    "model_name": "m", "block_size": BLOCK, "dp_rank": 0})  # fmt: skip
        until(lambda: json.dumps(ask(f"{url}/v1/fleet")).count('"state": "exact"') == len(publishers.ends))
        browser = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)

        def answering() -> float:
            return next(sum(thread[1:]) for thread in served.threads() if thread.id == served.pid)

        spent: dict[bool, float] = {True: 0.0, False: 0.0}
        for looking in (True, False) * rounds:
            before = answering()
            for _ in range(looks):
                for path in ("/v1/fleet", f"/v1/history?since={time.time() - 2}") if looking else ():
                    browser.request("GET", path)
                    browser.getresponse().read()
                time.sleep(0.6)
            spent[looking] += answering() - before
        a_look = (spent[True] - spent[False]) / (looks * rounds)
        at = f"500 pods, {amount(1000 * a_look)} ms a look"
        yield Reached("% of a core that one browser takes", at, "page core", 100 * a_look / 2)


def replica(folder: Path) -> Iterator[str | Reached]:
    """Seconds until a new service answers: an empty one, and one with the million blocks of a running one."""
    index = PrefixIndex(block_size=BLOCK)
    fill(index, chains(7, 500, 2000), ["a"])
    index.save(folder / "snapshot")
    living, empty, new = free_url(), free_url(), free_url()
    with started(ours(living, f"--snapshot={folder / 'snapshot'}"), living):
        times = {}
        for what, url, more in (("empty", empty, ()), ("from a living one", new, (f"--from={living}",))):
            start = time.perf_counter()
            with started(ours(url, *more), url):
                times[what] = time.perf_counter() - start
                blocks = re.search(r"^kvindex_blocks(?:\{.*\})? (\S+)", metrics(url), re.M)
                yield (f"a new service, {what}: answers after {times[what]:.2f} s, "
                    f"{amount(float(blocks[1]) if blocks else 0)} blocks")  # fmt: skip
        taken = times["from a living one"]
        at = f"1 M blocks, the start of the process included; an empty one: {amount(times['empty'])} s"
        yield Reached("seconds until a new replica of a living one answers", at, "replica s", taken)


def metrics(url: str) -> str:
    with urlopen(f"{url}/metrics") as answer:
        return str(answer.read().decode())

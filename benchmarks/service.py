"""``kvindex serve`` beside Dynamo's standalone indexer, on the same publishers.

Both are given the publishers by the same ``/register`` calls, and asked the same ``/query`` by wrk. Four simulated pods
hold eight prompts of 2,048 blocks; for the rows beside ingest, sixteen more publish 2,000 batches a second. Where
Dynamo's runtime is not installed, its rows are left out and said so.
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
from .publishers import Publishers, until
from .report import amount
from .served import Served, free_url, started, wrk

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


def measure(*, seconds: int = 5, connections: int = 4) -> Iterator[str]:
    """``seconds`` of each row; ``connections`` of wrk."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield from beside(folder, seconds, connections, stack)
    yield page(max(seconds // 2, 1))
    with tempfile.TemporaryDirectory() as place:
        yield from replica(Path(place))


def beside(folder: Path, seconds: int, connections: int, stack: ExitStack) -> Iterator[str]:
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

    lists = {name: asked(name, ", list of 2,048 blocks") for name in services}
    yield from (each.text for each in lists.values())
    if len(lists) == 2:
        yield f"  kvindex / dynamo: {lists['kvindex'].rate / lists['dynamo'].rate:.2f}"
    yield asked("kvindex", ", bytes", "v1/match", "?model=sim").text
    yield unix(uds, urls["kvindex"], prompts)
    for name in services:
        writers.send(RATE * (seconds + 2), RATE)
        time.sleep(0.5)
        found = asked(name, f" beside {RATE:,} batches a second")
        yield f"{found.text}\n  p99 / p50: {found.p99 / found.p50:.1f}"


def held(url: str, question: Any) -> list[int]:
    found = ask(f"{url}/query", question)["instances"].values()
    return [instance["longest_matched"] for instance in found if instance["longest_matched"]]


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def p50(call: Callable[[Any], object], inputs: list[Any], times: int = 1000) -> float:
    taken = []
    for number in range(times):
        start = time.perf_counter()
        call(inputs[number % len(inputs)])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def unix(path: str, url: str, prompts: list[Any]) -> str:
    """A match over a Unix socket with binary tokens, beside the match alone on the same index, asked for by its
    snapshot."""
    with urlopen(f"{url}/v1/snapshot") as answer:
        index = PrefixIndex.loads(answer.read())
    connection = _Unix(path)

    def over(prompt: bytes) -> None:
        connection.request("POST", "/v1/match?model=sim", prompt, {"Content-Type": "application/octet-stream"})
        connection.getresponse().read()

    whole = p50(over, [prompt.tobytes() for prompt in prompts])
    alone = p50(lambda prompt: index.match_prefix(prompt, model="sim"), prompts)
    return (f"Unix socket, bytes, 2,048 blocks: p50 {whole * 1e6:.0f} us, the match alone {alone * 1e6:.0f} us: "
        f"{(whole - alone) * 1e6:.0f} us added, with http.client's share")  # fmt: skip


def page(times: int) -> str:
    """Processor time of the service with 500 silent pods while one browser looks, and while none does."""
    url = free_url()
    with started(ours(url), url) as served:
        for number in range(500):
            ask(f"{url}/register", {"instance_id": number + 1, "endpoint": f"tcp://127.0.0.1:{20000 + number}",
                                    "model_name": "m", "block_size": BLOCK, "dp_rank": 0})  # fmt: skip
        time.sleep(5)
        spent = {True: 0.0, False: 0.0}
        for looking in (True, False) * 4:  # in turns: what silent streams cost falls while they wait longer
            before = sum(served.cpu_times()[:2])
            for _ in range(times):
                if looking:
                    ask(f"{url}/v1/fleet")
                    ask(f"{url}/v1/history?since={time.time() - 2}")
                time.sleep(2)
            spent[looking] += sum(served.cpu_times()[:2]) - before
        shares = [spent[looking] / (4 * 2 * times) for looking in (False, True)]
        return (f"the page with 500 pods: {100 * (shares[1] - shares[0]):.1f} % of a core while one browser looks, "
            f"beside {100 * shares[0]:.1f} % while none does")  # fmt: skip


def replica(folder: Path) -> Iterator[str]:
    """Seconds until a new service answers, empty and from a living one with a million blocks."""
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
        yield f"  {times['from a living one'] - times['empty']:.2f} s for the blocks"


def metrics(url: str) -> str:
    with urlopen(f"{url}/metrics") as answer:
        return str(answer.read().decode())

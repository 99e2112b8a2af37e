"""``python -m e2e.sharing_cost``: eight routers on one log, with and without ``share=True``, and one for all requests.

Each router is a process with a follower of one log and an ``EndpointPicker``. Traffic of different prompts gives the
pods a load, and now and then all routers get one new prefix at once. No engine computes anything: the measure is the
choice of pods.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import resource
import signal
import sys
import time
from random import Random
from typing import Any, NamedTuple

import numpy as np
from benchmarks.machine import described
from benchmarks.report import say, table

from kvindex.replication import ReplicatedIndex, ReplicationPolicy
from kvindex.replication.entries import Described
from kvindex.routing import EndpointPicker
from kvindex.sync.status import Marked

from .log_server import LogServer, programs

__all__ = ["rows"]

_SPAWN = multiprocessing.get_context("spawn")
ROUTERS, PODS, TOKENS = 8, 32, 2048
#: Seconds within which all routers get a prefix.
SPREADS = (0.0, 0.005, 0.02, 0.1)
#: Tokens a second that a pod computes, and mean seconds of a request after its first token.
SPEED, REST = 20_000.0, 2.0
_POLICY = ReplicationPolicy(silence=20.0, lease=20.0)


class Request(NamedTuple):
    at: float
    prompt: int
    rest: float


class Pick(NamedTuple):
    at: float
    end: float
    prompt: int
    pod: str
    prefill: int


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _prompt(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 100_000, TOKENS, dtype=np.uint32)


def traffic(rate: float, seconds: float) -> list[list[Request]]:
    """The requests of each router. Those of a common prefix have a number below 10,000."""
    random, all_ = Random(1), []
    for router in range(ROUTERS):
        now, mine = 0.0, []
        while (now := now + random.expovariate(rate)) < seconds:
            mine.append(Request(now, 10**6 * (router + 1) + len(mine), random.expovariate(1 / REST)))
        all_.append(mine)
    for number in range(int((seconds - 1.0) * 4)):
        for mine in all_:
            at = 1.0 + number / 4 + random.random() * SPREADS[number % len(SPREADS)]
            mine.append(Request(at, number, random.expovariate(1 / REST)))
    return [sorted(mine) for mine in all_]


def _run(picker: EndpointPicker, requests: list[Request], began: float) -> tuple[list[Pick], float]:
    picks: list[Pick] = []
    later: list[tuple[float, int, Any]] = []
    spent = 0.0
    prompts = [_prompt(each.prompt) for each in requests]
    for place, (at, number, rest) in enumerate(requests):
        while True:
            until = min(at, later[0][0]) if later else at
            if (left := began + until - time.monotonic()) > 0:
                time.sleep(left)
            if until == at:
                break
            _, order, (choice, ends) = heapq.heappop(later)
            if ends is None:
                picker.finished(choice)
            else:
                picker.prefilled(choice)
                heapq.heappush(later, (ends, order, (choice, None)))
        before = time.perf_counter()
        choice = picker.pick(prompts[place], model="m")
        spent += time.perf_counter() - before
        first = at + max(choice.prefill_tokens, 100) / SPEED
        heapq.heappush(later, (first, place, (choice, first + rest)))
        picks.append(Pick(at, first + rest, number, choice.pod, choice.prefill_tokens))
    return picks, spent / len(requests)


def _router(url: str, share: bool, number: int, requests: list[Request], pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ReplicatedIndex(url, fleet="bench", collect=False, share=share, policy=_POLICY) as view:
        assert view.wait_until_exact(60.0, pods=[f"p{pod}" for pod in range(PODS)]) == {}
        picker = EndpointPicker(view.index, view, seed=number)
        pipe.send(None)
        began = pipe.recv()
        used = _cpu()
        picks, spent = _run(picker, requests, began)
        pipe.send((picks, spent, _cpu() - used, view.status().sharing))
        pipe.recv()


class Outcome(NamedTuple):
    picks: list[Pick]
    spent: float  # seconds a pick
    cpu: float  # seconds of all routers
    server: float
    memory: int
    sharing: list[Any]


def run(program: str, kind: str, requests: list[list[Request]]) -> Outcome:
    if kind == "one":
        requests = [sorted(each for mine in requests for each in mine)]
    with (
        LogServer(program) as server,
        server.client() as client,
        ReplicatedIndex(server.url, fleet="bench", policy=_POLICY) as view,
    ):
        (shard,) = view._shards
        while (manager := shard.manager) is None:
            time.sleep(0.01)

        def fill() -> None:
            for pod in range(PODS):
                shard._shown(Described(f"p{pod}", "m", None, {}, None))
                shard._shown(Marked(f"p{pod}", 0, "exact", ""))
                view.index.mark_worker(f"p{pod}", 0, "exact")

        manager.post(fill).result()
        pipes, processes = [], []
        for number, mine in enumerate(requests):
            pipe, end = _SPAWN.Pipe()
            args = (server.url, kind == "shared", number, mine, end)
            processes.append(_SPAWN.Process(target=_router, args=args, daemon=True))
            processes[-1].start()
            pipes.append(pipe)
        for pipe in pipes:
            pipe.recv()
        used = client.info()
        began = time.monotonic() + 0.5 + 2e-4 * sum(map(len, requests))  # the time to make the prompts
        for pipe in pipes:
            pipe.send(began)
        found = [pipe.recv() for pipe in pipes]
        then = client.info()
        memory = client.memory_usage("{kv:bench}:share") or 0
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()
    return Outcome(
        [pick for each in found for pick in each[0]],
        float(np.mean([each[1] for each in found])),
        sum(each[2] for each in found),
        sum(then[name] - used[name] for name in ("used_cpu_sys", "used_cpu_user")),
        memory,
        [each[3] for each in found],
    )


def pods_of_prefixes(picks: list[Pick], spread: int) -> float:
    """The average number of pods that compute a prefix that all routers get within one of the spreads."""
    found: dict[int, set[str]] = {}
    for pick in picks:
        if pick.prompt < 10_000 and pick.prompt % len(SPREADS) == spread:
            found.setdefault(pick.prompt, set()).add(pick.pod)
    return float(np.mean([len(pods) for pods in found.values()]))


def imbalance(picks: list[Pick]) -> float:
    """Requests of the busiest pod over the mean of all pods, on average over time."""
    moments = np.arange(2.0, max(pick.at for pick in picks), 0.05)
    running = np.zeros((PODS, len(moments)))
    for pick in picks:
        running[int(pick.pod[1:]), (moments >= pick.at) & (moments < pick.end)] += 1
    return float(np.mean(running.max(0) / running.mean(0)))


def rows(program: str, rate: float, seconds: float) -> list[tuple[str, str, str]]:
    requests = traffic(rate, seconds)
    all_ = {kind: run(program, kind, requests) for kind in ("alone", "shared", "one")}
    told = [*all_]
    found = [(f"{ROUTERS} routers, {rate:g} requests a second each: {', '.join(told)}", "", "")]
    for place, spread in enumerate(SPREADS):
        pods = ", ".join(f"{pods_of_prefixes(each.picks, place):.1f}" for each in all_.values())
        found.append((f"- pods that compute a prefix that all get within {spread * 1e3:g} ms", pods, ""))
    tokens = ", ".join(f"{sum(pick.prefill for pick in each.picks) / 1e6:.2f}" for each in all_.values())
    found.append(("- tokens to compute, M", tokens, ""))
    found.append(
        (
            "- requests of the busiest pod, of the mean",
            ", ".join(f"{imbalance(each.picks):.2f}" for each in all_.values()),
            "",
        )
    )
    found.append(("- a pick, us", ", ".join(f"{each.spent * 1e6:.0f}" for each in all_.values()), ""))
    alone, shared = all_["alone"], all_["shared"]
    count = len(shared.picks)
    entries = sum(each.written for each in shared.sharing)
    in_routers, in_server = (shared.cpu - alone.cpu) / ROUTERS, shared.server - alone.server
    written = sum(each.written_bytes for each in shared.sharing)
    refused = sum(sum(each.refused.values()) for each in shared.sharing)
    found += [
        ("sharing, a request: processor time of each router, us", f"{in_routers / count * 1e6:.0f}", ""),
        ("- of the server, us", f"{in_server / count * 1e6:.0f}", ""),
        (f"- bytes, of {TOKENS} tokens", f"{written / count:.0f}", ""),
        ("- entries", f"{entries / count:.2f}", ""),
        ("memory of the stream, MB", f"{shared.memory / 1e6:.1f}", ""),
        ("dropped, refused", f"{sum(each.dropped for each in shared.sharing)}, {refused}", ""),
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.sharing_cost", description=__doc__)
    parser.add_argument("--server", choices=sorted(programs()), default=min(programs(), default=None))
    parser.add_argument("--rate", type=float, default=25.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    say(f"{args.server}; {described('redis')}")
    say(table(("row", "measured", "target"), rows(programs()[args.server], args.rate, args.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m e2e.replication_cost``: a follower of the log beside direct subscription, in one run.

Three processes on the same publishers: the collector, a follower, and one with an ``EventManager`` of its own. Their
processor time and lag are measured at the same time, so the ratios are comparable. The absolute figures depend on the
machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from benchmarks.machine import described
from benchmarks.report import say, table

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex._core import peek_batch
from kvindex.replication import ReplicatedIndex, ReplicationPolicy
from kvindex.replication.entries import Hashed
from kvindex.sync.status import Batch

from .log_server import LogServer, programs
from .replication_fleet import BLOCK_SIZE, Settings, Shared, batch, publish

_SPAWN = multiprocessing.get_context("spawn")
#: Seconds between snapshots: so many that no snapshot falls into a measurement.
NEVER = 1e6


def note(view: ReplicatedIndex, ages: list[float]) -> None:
    """From now on, note the age of each batch when it has been applied."""
    (shard,) = view._shards
    carry = shard._carry

    def noted(effects: list[Any]) -> None:
        carry(effects)
        ages.extend(_ages(effects))

    shard._carry = noted  # type: ignore[method-assign]


def _ages(items: list[Any]) -> list[float]:
    now = time.time()
    return [now - at for each in items for at in _times(each)]


def _times(item: Any) -> Iterator[float]:
    if type(item) is Batch:
        yield peek_batch(item.payload, False)[0]
    elif type(item) is Hashed:
        at = 0
        while at < len(item.data):
            size, time_made = struct.unpack_from("<Id", item.data, at)
            yield time_made
            at += 4 + size


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _reader(kind: str, settings: Settings, ends: list[tuple[str, str]], pipe: Any) -> None:
    """A process that answers with its processor time, its batches and, after a request to note them, its lags."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    index = PrefixIndex(block_size=BLOCK_SIZE)
    sources = [
        PodSource(name, endpoint=endpoint, replay_endpoint=replay, model="m")
        for name, (endpoint, replay) in zip(settings.names, ends, strict=True)
    ]
    ages: list[float] = []
    if kind == "direct":
        keeper: Any = EventManager(index)
        asked = lambda: index  # noqa: E731
    else:
        keeper = ReplicatedIndex(settings.server, fleet="bench", block_size=BLOCK_SIZE, collect=kind == "collector")
        asked = lambda: keeper.index  # noqa: E731
    with keeper:
        if kind != "follower":
            for source in sources:
                keeper.add_pod(source)
        while (what := pipe.recv()) != "end":
            if what == "ages":
                ages.clear()
                if kind == "direct":
                    # A tap comes before the batch is applied, which takes some microseconds.
                    keeper.tap(lambda each: ages.extend(_ages([each])))
                else:
                    note(keeper, ages)
                pipe.send(None)
            elif what == "percentiles":
                pipe.send([float(each) * 1e3 for each in np.percentile(ages or [0.0], [50, 99])])
            elif what == "exact":
                states = asked().pods()
                pipe.send(sum(states.get(name) == "exact" for name in settings.names))
            else:
                pipe.send((_cpu(), asked().stats()["batches"]))


class Run:
    def __init__(self, server: LogServer, rate: float, pods: int) -> None:
        self.settings = Settings(server=server.url, pods=pods, followers=1, rate=rate)
        self.shared = Shared.make(pods, rate)
        self.publisher, end = _SPAWN.Pipe()
        self.processes = [_SPAWN.Process(target=publish, args=(self.settings, self.shared, end), daemon=True)]
        self.processes[0].start()
        ends = self.publisher.recv()
        self.readers: dict[str, Any] = {}
        for kind in ("collector", "follower", "direct"):
            self.readers[kind], end = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_reader, args=(kind, self.settings, ends, end), daemon=True)
            process.start()
            self.processes.append(process)
        deadline = time.monotonic() + 60.0
        while any(count < pods for count in self.ask("exact").values()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not exact after 60 s: {self.ask('exact')}")
            time.sleep(0.2)

    def ask(self, what: str) -> dict[str, Any]:
        for pipe in self.readers.values():
            pipe.send(what)
        return {kind: pipe.recv() for kind, pipe in self.readers.items()}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def cpu(server: LogServer, rate: float, pods: int, seconds: float) -> tuple[dict[str, float], float, int]:
    """Microseconds a batch by kind of process, those of the server, and the server's peak memory."""
    run = Run(server, rate, pods)
    try:
        with server.client() as client:
            before, used = run.ask("cpu"), client.info()
            most, until = 0, time.monotonic() + seconds
            while time.monotonic() < until:
                most = max(most, client.info("memory")["used_memory"])
                time.sleep(0.25)
            after, then = run.ask("cpu"), client.info()
    finally:
        run.end()
    spent = {
        kind: (after[kind][0] - before[kind][0]) / max(1, after[kind][1] - before[kind][1]) * 1e6 for kind in after
    }
    batches = after["direct"][1] - before["direct"][1]
    of_server = sum(then[name] - used[name] for name in ("used_cpu_sys", "used_cpu_user"))
    return spent, of_server / batches * 1e6, most


def lag(server: LogServer, rate: float, pods: int, seconds: float) -> dict[str, list[float]]:
    run = Run(server, rate, pods)
    try:
        run.ask("ages")
        time.sleep(seconds)
        return run.ask("percentiles")
    finally:
        run.end()


def warm_start(server: LogServer, blocks: int, batches: int) -> float:
    """Seconds until a new view is exact, from a snapshot of ``blocks`` blocks and a log of ``batches`` batches."""
    policy = ReplicationPolicy(snapshot_every=NEVER, snapshot_bytes=1 << 40, max_backlog=1 << 30)
    with ReplicatedIndex(server.url, fleet="warm", block_size=BLOCK_SIZE, policy=policy) as view:
        while (manager := view._shards[0].manager) is None:
            time.sleep(0.01)

        def feed(first: int, count: int, blocks: int) -> None:
            for number in range(first, first + count):
                pod = number % 32
                each = Batch(f"p{pod}", 0, "m", None, number // 32, batch(pod, number // 32 * 50 + 10**6, blocks))
                view._shards[0]._shown(each)
                view.index.ingest(each.pod, each.payload, model="m", dp_rank=0, seq=each.seq)

        def told() -> None:
            from kvindex.sync.status import Marked

            for pod in range(32):
                view._shards[0]._shown(Marked(f"p{pod}", 0, "exact", ""))
                view.index.mark_worker(f"p{pod}", 0, "exact")

        manager.post(lambda: feed(0, blocks // 1000, 1000)).result()
        manager.post(told).result()
        taken = view.status().snapshots
        view._shards[0].machine.collector._snapshot_at = 0.0  # a snapshot is due now
        while view.status().snapshots == taken:
            view._shards[0]._wake()
            time.sleep(0.01)
        for first in range(0, batches, 1000):
            manager.post(lambda first=first: feed(blocks // 1000 + first, 1000, 20)).result()
        while view._shards[0].machine.collector.shown or view._shards[0].machine.collector._unsent:
            time.sleep(0.01)
        time.sleep(0.2)
        began = time.monotonic()
        with ReplicatedIndex(server.url, fleet="warm", block_size=BLOCK_SIZE, policy=policy, collect=False) as late:
            while late.index.pods().get("p0") != "exact":
                time.sleep(0.002)
            took = time.monotonic() - began
            assert late.index.stats()["blocks"] == view.index.stats()["blocks"]
    return took


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.replication_cost", description=__doc__)
    parser.add_argument("--server", choices=sorted(programs()), default=min(programs(), default=None))
    parser.add_argument("--rate", type=float, default=5000.0)
    parser.add_argument("--pods", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    args = parser.parse_args()
    program = programs()[args.server]
    rows = []
    with LogServer(program) as server:
        spent, of_server, memory = cpu(server, args.rate, args.pods, args.seconds)
    ratio = spent["follower"] / spent["direct"]
    rows.append((f"follower's processor time at {args.rate:g} batches/s, of direct", f"{ratio:.2f}", "0.25"))
    for kind in ("direct", "follower", "collector"):
        rows.append((f"- {kind}, us a batch", f"{spent[kind]:.0f}", ""))
    rows.append(("- server, us a batch", f"{of_server:.0f}", ""))
    rows.append(("server's memory meanwhile, MB", f"{memory / 1e6:.0f}", "1000"))
    with LogServer(program) as server:
        lags = lag(server, 1000.0, args.pods, args.seconds / 2)
    for place, name in enumerate(("p50", "p99")):
        added = lags["follower"][place] - lags["direct"][place]
        rows.append((f"lag added at 1,000 batches/s, {name}, ms", f"{added:.1f}", ("2.5", "10")[place]))
    with LogServer(program) as server:
        took = warm_start(server, args.blocks, 30_000)
    rows.append((f"warm start, {args.blocks:,} blocks and 30,000 batches of log, s", f"{took:.2f}", "1.0"))
    say(f"{args.server}; {described('redis')}")
    say(table(("row", "measured", "target"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

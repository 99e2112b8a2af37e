"""The speed at which a fleet's trace can be replayed before the index falls behind.

A simulated fleet of 128 workers serves a trace once (Mooncake's JSON lines; without one, conversations made up from a
seed). The batches of its engines and the queries of its router are one timeline, which is then replayed open-loop:
every item is due at its time, sped up, even if the items before it are not done. A run is over when the queue is
drained, and has kept up when that took at most 1.1 times the window. The speed is raised until a run falls behind.

One thread does both, as a router's event loop would: a query that is due waits for the batch before it. Latencies are
measured from the time at which the query was due, and for the call alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvindex import PrefixIndex, decode_batch
from kvindex.sim.engine import Engine
from kvindex.sim.fleet import Fleet, Pod, PrefixAware
from kvindex.sim.workload import Arrival, chat, mooncake

from .data import BLOCK, newest
from .report import amount, say, table

#: A run that took longer than this many times its window has not kept up.
LATE = 1.1


class Timeline(NamedTuple):
    """Batches and queries in order of time: ``due`` in seconds; a batch is ``(pod, payload)``, a query its tokens."""

    due: npt.NDArray[np.float64]
    what: list[Any]
    asked: int
    stored: int
    removed: int

    @property
    def window(self) -> float:
        return float(self.due[-1])

    @property
    def blocks(self) -> int:
        """Blocks stored, removed and queried."""
        return self.asked + self.stored + self.removed


class Run(NamedTuple):
    """One replay: its duration, and the seconds of each query, from its due time and of the call alone."""

    took: float
    waited: npt.NDArray[np.float64]
    called: npt.NDArray[np.float64]


def record(arrivals: Sequence[Arrival], workers: int, blocks_per_worker: int) -> Timeline:
    """Serve the requests with a fleet that routes by an index of its own, and keep its batches and queries."""
    index = PrefixIndex(block_size=BLOCK)
    kept: list[tuple[float, Any]] = []
    form = newest()
    pods = [Pod(f"worker-{number}", form, {0: Engine(blocks_per_worker, BLOCK)}) for number in range(workers)]
    for pod in pods:
        index.configure_pod(pod.name, **pod.options)

    def publish(pod: str, rank: int, payload: bytes) -> None:
        index.ingest(pod, payload, dp_rank=rank)
        kept.append((fleet.now, (pod, payload)))

    fleet = Fleet(pods, publish)
    fleet.run(arrivals, PrefixAware(index), each=lambda arrival: kept.append((fleet.now, arrival.prompt.tokens)))
    asked = sum(len(what) // BLOCK for _, what in kept if not isinstance(what, tuple))
    stats = index.stats()
    due = np.array([at for at, _ in kept])
    return Timeline(due - due[0], [what for _, what in kept], asked, stats["blocks_stored"], stats["blocks_removed"])


def replay(timeline: Timeline, speed: float) -> Run:
    """Replay every item at its time, ``speed`` times as fast, or without waits where ``speed`` is infinite."""
    index = PrefixIndex(block_size=BLOCK)
    ingest, match, clock = index.ingest, index.match_prefix, perf_counter
    dues = (timeline.due / speed).tolist()
    waited: list[float] = []
    called: list[float] = []
    start = clock()
    for due, what in zip(dues, timeline.what, strict=True):
        now = clock() - start
        while now < due:
            # A sleep takes 0.1 ms too long, so the last part of the wait is a busy loop.
            if due - now > 0.001:
                sleep(due - now - 0.0005)
            now = clock() - start
        if isinstance(what, tuple):
            ingest(what[0], what[1])
        else:
            match(what).best()
            done = clock() - start
            waited.append(done - due)
            called.append(done - now)
    return Run(clock() - start, np.array(waited), np.array(called))


def fastest(timeline: Timeline, trials: int) -> list[tuple[float, bool, list[Run]]]:
    """The tried speeds in their order, each with its runs, and whether they kept up."""
    drained = min(replay(timeline, float("inf")).took for _ in range(3))
    # No run is faster than one without waits, apart from the tenth that a run may be late.
    low, high = timeline.window / drained / 8, timeline.window / drained * 1.3
    tried = []
    for step in range(8):
        speed = low if step == 0 else (low * high) ** 0.5
        runs = [replay(timeline, speed) for _ in range(trials)]
        kept_up = median(run.took for run in runs) <= LATE * timeline.window / speed
        tried.append((speed, kept_up, runs))
        say(f"{speed:,.0f} times as fast: {'kept up' if kept_up else 'fell behind'}")
        if step == 0 and not kept_up:
            break
        low, high = (speed, high) if kept_up else (low, speed)
    return tried


def measure(
    *, trace: str = "", workers: int = 128, blocks: int = 0, limit: int = 3000, trials: int = 3
) -> Iterator[str]:
    """``trace``: JSON lines, plain or gzip; without it, conversations are made up, the same every time.

    ``workers``: of the simulated fleet, with ``blocks`` each (0: 1,024; 16,384 for a trace); ``limit``: requests;
    ``trials``: runs at each speed.
    """
    if trace:
        arrivals, room = list(mooncake(trace, limit=limit)), 16_384
    else:
        arrivals = chat(conversations=limit // 6, system_tokens=2048, user_tokens=512, rate=16.0)
        # Small enough for evictions, as in a cache that has been used for a while.
        room = 1024
    say(f"serving {len(arrivals):,} requests by {workers} workers")
    timeline = record(arrivals, workers, blocks or room)
    events = sum(len(decode_batch(what[1]).events) for what in timeline.what if isinstance(what, tuple))
    batches = sum(isinstance(what, tuple) for what in timeline.what)
    tried = fastest(timeline, trials)
    rows = []
    for speed, kept_up, runs in sorted(tried, key=lambda each: each[0]):
        took = median(run.took for run in runs)
        waited = np.concatenate([run.waited for run in runs]) * 1e6
        called = np.concatenate([run.called for run in runs]) * 1e6
        rows.append(
            [
                f"{speed:,.0f}",
                "yes" if kept_up else "no",
                f"{timeline.blocks / took:,.0f}",
                f"{len(called) / len(runs) / took:,.0f}",
                *(amount(value) for value in np.percentile(called, [50, 99, 99.9])),
                *(amount(value) for value in np.percentile(waited, [50, 99, 99.9])),
            ]
        )
    yield f"{len(arrivals):,} requests in {timeline.window:,.0f} s by {workers} workers"
    yield f"blocks: {timeline.asked:,} asked for, {timeline.stored:,} stored, {timeline.removed:,} removed"
    yield f"batches: {batches:,} of {events:,} events"
    columns = ["times as fast", "kept up", "block ops/s", "requests/s", "call p50, µs", "p99", "p99.9"]
    yield table([*columns, "from due p50, µs", "p99", "p99.9"], rows)
    best = max((speed for speed, kept_up, _ in tried if kept_up), default=0.0)
    yield f"kept up to {best:,.0f} times the trace's own speed" if best else "never kept up"

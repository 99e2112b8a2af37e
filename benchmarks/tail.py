"""The slowest of 100,000 matches while another thread ingests flat out.

On a shared machine the slowest calls are those during which the system ran another process on this core. The system
counts them (``ru_nivcsw`` of the thread), so the distribution is given twice: of all calls, and of the undisturbed
ones.

From 16,384 tokens on, a match releases the interpreter lock. To get it back, it has to wait until the other thread
releases it. A control measures this cost: a checksum that takes as long, shares nothing with the index, and also
releases the lock. Shorter matches keep the lock, and then the ingesting thread gets the interpreter only when Python
takes it away from the matching thread, every 5 ms.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import cycle
from time import perf_counter_ns
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from kvindex import PrefixIndex

from .data import BLOCK, chain, chains, fill, payloads
from .reach import Reached
from .report import amount, table
from .writer import EACH, Writer

PODS = 8


class Latencies(NamedTuple):
    """Microseconds of every call, and whether the system took the core away during it."""

    us: npt.NDArray[np.float64]
    disturbed: npt.NDArray[np.bool_]


def timed(call: Callable[[Any], object], inputs: Iterable[object], calls: int) -> Latencies:
    asked = cycle(inputs)
    clock, usage, thread = perf_counter_ns, resource.getrusage, resource.RUSAGE_THREAD
    us, disturbed = np.empty(calls), np.empty(calls, dtype=bool)
    before = usage(thread).ru_nivcsw
    for place in range(calls):
        given = next(asked)
        start = clock()
        call(given)
        us[place] = clock() - start
        after = usage(thread).ru_nivcsw
        disturbed[place] = after != before
        before = after
    return Latencies(us / 1000, disturbed)


def as_long(us: float) -> bytes:
    """Bytes on which :func:`crc32` takes ``us`` microseconds."""
    data = bytes(1 << 20)
    best = min(timed(crc32, [data], 9).us)
    return data[: int(us / best * len(data))]


def measure(*, calls: int = 100_000) -> Iterator[Reached | str]:
    """``calls``: number of matches of each depth."""
    # The batches remove the stored blocks as well, so the size of the index stays the same.
    contents = chains(9, 64, 256)
    batches = [*payloads(contents, EACH), *payloads(contents, EACH, back=True)]
    prompts = 48
    index = PrefixIndex(block_size=BLOCK)
    fill(index, [chain(8, number, 2048) for number in range(prompts)], [f"pod-{number}" for number in range(PODS)])
    rows = []
    asked: dict[str, tuple[Callable[[Any], object], list[Any]]] = {}
    for depth in (8, 64, 512, 2048):
        tokens = [chain(8, number, 2048).tokens[: depth * BLOCK] for number in range(prompts)]
        asked[f"{depth} blocks"] = index.match_prefix, tokens
    asked["control"] = crc32, [as_long(float(np.median(timed(*asked["2048 blocks"], 999).us)))]
    for what, (call, inputs) in asked.items():
        for busy in (False, True):
            flood = Writer(index, cycle(batches))
            with flood if busy else nullcontext():
                start = perf_counter_ns()
                found = timed(call, inputs, calls)
                seconds = (perf_counter_ns() - start) / 1e9
            alone = found.us[~found.disturbed]
            p50, p99, p999 = np.percentile(found.us, [50, 99, 99.9])
            left = np.percentile(alone, 99.9)
            rows.append(
                [
                    f"{what}, {'ingest flat out' if busy else 'no ingest'}",
                    *(amount(value) for value in (p50, p99, p999, found.us.max(), left, alone.max())),
                    f"{found.disturbed.sum():,}",
                    f"{flood.applied / seconds:,.0f}" if busy else "",
                ]
            )
            if busy and what != "control":
                where = f"{what}, {calls:,} matches"
                yield Reached("p99.9 over p50, all calls", where, "tail", p999 / p50)
                yield Reached("p99.9 over p50, calls left alone", where, "tail", float(left / np.median(alone)))
    columns = ["µs", "p50", "p99", "p99.9", "max", "p99.9 left alone", "max left alone", "disturbed"]
    columns.append("ingested blocks/s")
    yield table(columns, rows)

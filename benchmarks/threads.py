"""Two reader threads against one, while a third ingests.

Two threads need two whole cores, which a shared machine seldom provides. So there are many short windows, the best of
one reader is compared with the best of two, and a control is measured in the same way: two threads that share nothing
and hold no lock. Where the control does not reach 1.9, the machine was too busy for a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

from kvindex import PrefixIndex
from kvindex.sim.wire import Cleared, encode_batch

from .data import BLOCK, Tokens, chain, chains, fill, newest, payloads
from .reach import Reached
from .report import amount
from .writer import EACH, Writer

DEPTH = 2048
PODS = 8


def together(calls: Sequence[Callable[[], object]], seconds: float) -> float:
    """Calls per second of all threads together, one thread per entry, for ``seconds``."""
    gate = threading.Barrier(len(calls))

    def rate(call: Callable[[], object]) -> float:
        gate.wait()
        start = now = perf_counter()
        count = 0
        while now - start < seconds:
            for _ in range(16):
                call()
            count += 16
            now = perf_counter()
        return count / (now - start)

    with ThreadPoolExecutor(len(calls)) as pool:
        return sum(pool.map(rate, calls))


def reader(call: Callable[[Tokens], object], prompts: Sequence[Tokens], start: int) -> Callable[[], object]:
    """A call that asks for the next prompt each time. Readers start at different prompts."""
    order = cycle([*prompts[start:], *prompts[:start]])
    return lambda: call(next(order))


def measure(*, rounds: int = 100, seconds: float = 0.04, pace: float = 200_000.0) -> Iterator[Reached | str]:
    """``rounds``: number of interleaved rounds; ``seconds``: of each window; ``pace``: blocks ingested a second."""
    index = PrefixIndex(block_size=BLOCK)
    contents = [chain(8, number, DEPTH) for number in range(48)]
    fill(index, contents, [f"pod-{number}" for number in range(PODS)])
    prompts = [content.tokens for content in contents]
    assert index.match_prefix(prompts[0]).best() == ("pod-0", DEPTH * BLOCK)

    def hashed(tokens: Tokens) -> Any:
        # Pure arithmetic, without the interpreter lock.
        return sha256(tokens)

    asked: dict[str, Callable[[Tokens], object]] = {"control": hashed, "match": index.match_prefix}
    # The last batch is a clear, so the size of the index stays the same.
    stores = [*payloads(chains(9, 64, 256), EACH), encode_batch([Cleared()], newest())]
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in asked for count in (1, 2)}
    begun = perf_counter()
    with Writer(index, cycle(stores), pace=pace) as writer:
        for number in range(rounds):
            for name, call in asked.items():
                for count in (1, 2) if number % 2 else (2, 1):
                    calls = [reader(call, prompts, place * len(prompts) // 2) for place in range(count)]
                    rates[name, count].append(together(calls, seconds))
        spent = perf_counter() - begun
    best, control = (max(rates[name, 2]) / max(rates[name, 1]) for name in ("match", "control"))
    windows = {name: [two / one for one, two in zip(rates[name, 1], rates[name, 2], strict=True)] for name in asked}
    where = f"{DEPTH} blocks, {PODS} pods, {amount(1e6 / max(rates['match', 1]))} µs alone"
    yield Reached("two readers against one, best windows", where, "two readers", best)
    yield f"control, best windows: {control:.2f}" + ("" if control >= 1.9 else "; the machine was too busy to tell")
    yield "medians of windows: " + ", ".join(f"{name} {median(ratios):.2f}" for name, ratios in windows.items())
    yield f"ingested meanwhile: {writer.applied / spent:,.0f} blocks/s"

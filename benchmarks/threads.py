"""``python -m benchmarks.threads``: two reader threads against one, while a third ingests.

Two threads can do no more than the machine gives them, and a shared machine seldom gives two whole cores. So there are
many short windows, the best of one reader is compared with the best of two, and a control is measured in the same way:
two threads that share nothing and hold no lock. Where the control gets no 1.9, the machine was too busy to tell.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import cycle
from statistics import median
from time import perf_counter, sleep
from typing import Any

from kvindex import PrefixIndex

from .data import BLOCK, Tokens, chain, chains, fill, payloads
from .machine import described
from .reach import Reached, verdicts
from .report import amount

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


class Ingester(threading.Thread):
    """Applies stored and removed blocks at a pace until it is stopped; the index stays as large as it was."""

    def __init__(self, index: PrefixIndex, blocks_per_second: float) -> None:
        super().__init__(daemon=True)
        self.index, self.pace = index, blocks_per_second
        self.applied = 0
        self.ended = threading.Event()
        self.stores = list(payloads(chains(9, 64, 256), 64))

    def run(self) -> None:
        start = perf_counter()
        for number in cycle(range(len(self.stores) + 1)):
            if self.ended.is_set():
                return
            if number < len(self.stores):
                self.index.ingest("writer", self.stores[number])
                self.applied += 64
            else:
                self.index.clear_worker("writer")
            ahead = self.applied / self.pace - (perf_counter() - start)
            if ahead > 0:
                sleep(ahead)


def reader(call: Callable[[Tokens], object], prompts: Sequence[Tokens], start: int) -> Callable[[], object]:
    """One more prompt with each call; readers start at different ones."""
    order = cycle([*prompts[start:], *prompts[:start]])
    return lambda: call(next(order))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="interleaved rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.04, help="of each window (%(default)s)")
    parser.add_argument("--pace", type=float, default=200_000, help="blocks that are ingested a second (%(default)s)")
    options = parser.parse_args()
    index = PrefixIndex(block_size=BLOCK)
    contents = [chain(8, number, DEPTH) for number in range(48)]
    fill(index, contents, [f"pod-{number}" for number in range(PODS)])
    prompts = [content.tokens for content in contents]
    assert index.match_prefix(prompts[0]).best() == ("pod-0", DEPTH * BLOCK)

    def hashed(tokens: Tokens) -> Any:
        # All of it arithmetic, without the interpreter lock.
        return sha256(tokens)

    asked: dict[str, Callable[[Tokens], object]] = {"control": hashed, "match": index.match_prefix}
    writer = Ingester(index, options.pace)
    writer.start()
    begun = perf_counter()
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in asked for count in (1, 2)}
    for number in range(options.rounds):
        for name, call in asked.items():
            for count in (1, 2) if number % 2 else (2, 1):
                calls = [reader(call, prompts, place * len(prompts) // 2) for place in range(count)]
                rates[name, count].append(together(calls, options.seconds))
    spent = perf_counter() - begun
    writer.ended.set()
    writer.join()
    best, control = (max(rates[name, 2]) / max(rates[name, 1]) for name in ("match", "control"))
    windows = {name: [two / one for one, two in zip(rates[name, 1], rates[name, 2], strict=True)] for name in asked}
    where = f"{DEPTH} blocks, {PODS} pods, {amount(1e6 / max(rates['match', 1]))} µs alone"
    print(verdicts([Reached("two readers against one, best windows", where, "two readers", best)]))
    print(f"control, best windows: {control:.2f}" + ("" if control >= 1.9 else "; the machine was too busy to tell"))
    print("medians of windows: " + ", ".join(f"{name} {median(ratios):.2f}" for name, ratios in windows.items()))
    print(f"ingested meanwhile: {writer.applied / spent:,.0f} blocks/s")
    print(", ".join(f"{name} {value}" for name, value in described("numpy").items()))


if __name__ == "__main__":
    main()

"""Rounds in which every contender does the same work in turn, so that what disturbs the machine hits all alike.

On a shared machine seconds drift by tens of percent within a minute; the ratio of two neighbours hardly does. So what
is reported is the median over rounds of the ratio within a round, beside each one's best round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median, quantiles
from time import perf_counter_ns
from typing import Any, NamedTuple

__all__ = ["Ratio", "Timings", "interleaved"]


class Ratio(NamedTuple):
    """One contender's time over another's: median and quartiles of the rounds' ratios, and best round over best round.

    The last shows what noise does to one side only: a contender that hands its work to another thread suffers more from
    a busy machine than one that does not.
    """

    median: float
    low: float
    high: float
    best: float


class Timings(dict[str, list[float]]):
    """Nanoseconds per call in each round, by contender."""

    def best(self, name: str) -> float:
        """Microseconds per call in the best round."""
        return min(self[name]) / 1000

    def ratio(self, over: str, under: str) -> Ratio:
        """How many times as long ``over`` takes as ``under``."""
        ratios = [a / b for a, b in zip(self[over], self[under], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        return Ratio(median(ratios), low, high, min(self[over]) / min(self[under]))


def interleaved(
    calls: Mapping[str, Callable[[Any], object]],
    inputs: Callable[[str, int], Sequence[Any]],
    rounds: int,
    *,
    warm: bool = True,
) -> Timings:
    """Times every call on ``inputs(name, round)``, one contender after the other in each round, in an order that turns.

    Each round has other inputs, so none is answered from a cache that its own last question warmed. The garbage
    collector rests meanwhile: its passes would be charged to whoever happens to allocate. ``warm``: a round before the
    first, not counted, on the inputs of the last; not for calls that can be made only once on an input.
    """
    names = list(calls)
    timings = Timings({name: [] for name in names})
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-1 if warm else 0, rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                items = inputs(name, number % rounds)
                spent = _timed(calls[name], items) / len(items)
                if number >= 0:
                    timings[name].append(spent)
    finally:
        if collects:
            gc.enable()
    return timings


def _timed(call: Callable[[Any], object], items: Iterable[Any]) -> int:
    start = perf_counter_ns()
    for item in items:
        call(item)
    return perf_counter_ns() - start

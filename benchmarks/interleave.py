"""Rounds in which every contender does the same work in turn, so disturbances of the machine hit all alike.

On a shared machine times drift by tens of percent within a minute; the ratio of two neighbours hardly does. So the
reports show the median over rounds of the ratio within a round, beside the best round of each contender.
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

    The last ratio shows noise that hits one side only: a contender that hands its work to another thread suffers more
    from a busy machine than one that does not.
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
        """The time of ``over`` divided by that of ``under``."""
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
    """Time every call on ``inputs(name, round)``, one contender after the other in each round, in a rotating order.

    Each round has other inputs, so no answer comes from a cache that the same query warmed. The garbage collector is
    off meanwhile: its passes would be charged to the contender that happens to allocate. ``warm`` adds an uncounted
    round before the first, on the inputs of the last; leave it out for calls that work only once on an input.
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

"""The cost of a match as the index grows, in blocks and in pods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any, NamedTuple

from kvindex import PrefixIndex

from .data import BLOCK, Tokens, beginning, chain, fill
from .interleave import Timings, interleaved
from .reach import Reached
from .report import amount, say

__all__ = ["Grown", "compare", "grown"]

DEPTHS = (8, 64, 512, 2048)
CALLS = {8: 64, 64: 32, 512: 8, 2048: 4}
#: A quarter of the blocks is in chains of 64 and the rest in chains of 2,048: many conversations begin, few are long.
LONG, SHORT = 2048, 64


class Grown(NamedTuple):
    """An index of chains that ``seed`` and a number reproduce: ``count`` chains of each length."""

    index: PrefixIndex
    seed: int
    count: dict[int, int]

    def prompt(self, depth: int, number: int) -> Tokens:
        """The first ``depth`` blocks of a chain, as a new array. Consecutive numbers give chains far apart."""
        length = SHORT if depth <= SHORT else LONG
        # Steps by the golden section, so every chain has its turn, and neighbours in time are far apart in memory.
        count = self.count[length]
        leap = next(leap for leap in range(max(int(count * 0.618), 1), 2 * count + 1) if gcd(leap, count) == 1)
        return beginning(self.seed + length, number * leap % count, depth)


def grown(seed: int, blocks: int, pods: int) -> Grown:
    """An index of about ``blocks`` blocks, all of them held by every pod."""
    index = PrefixIndex(block_size=BLOCK)
    names = [f"pod-{number}" for number in range(pods)]
    count = {LONG: max(blocks * 3 // 4 // LONG, 1), SHORT: blocks // 4 // SHORT}
    for length, chains in count.items():
        for number in range(chains):
            fill(index, [chain(seed + length, number, length)], names)
    return Grown(index, seed, count)


def compare(one: Grown, other: Grown, rounds: int) -> dict[int, Timings]:
    """Times of both indexes in turn, by depth."""
    indexes = {"small": one, "large": other}
    calls: dict[str, Callable[[Any], object]] = {name: each.index.match_prefix for name, each in indexes.items()}
    found = {}
    for depth in DEPTHS:

        def inputs(name: str, number: int, depth: int = depth) -> list[Tokens]:
            first = number * CALLS[depth]
            return [indexes[name].prompt(depth, place) for place in range(first, first + CALLS[depth])]

        for each in indexes.values():
            held = set(each.index.match_prefix(each.prompt(depth, 1)).tokens.values())
            assert held == {depth * BLOCK}, f"pods hold {held} where all hold {depth} blocks"
        found[depth] = interleaved(calls, inputs, rounds)
    return found


def measure(*, rounds: int = 101, blocks: int = 10_000_000) -> Iterator[Reached]:
    """``rounds``: number of interleaved rounds; ``blocks``: size of the large index."""
    say(f"storing {blocks:,} blocks")
    many = compare(grown(1, 10_000, 8), grown(2, blocks, 8), rounds)
    say("storing 131,072 blocks for 8 and for 256 pods")
    wide = compare(grown(3, 131_072, 8), grown(3, 131_072, 256), rounds)
    for what, goal, found in (
        (f"{blocks:,} blocks against 10,000", "growth blocks", many),
        ("256 pods against 8", "growth pods", wide),
    ):
        for depth, timings in found.items():
            ratio = timings.ratio("large", "small")
            us = f"{amount(timings.best('small'))} → {amount(timings.best('large'))} µs"
            yield Reached(f"match_prefix, {what}", f"{depth} blocks, {us}", goal, ratio.median, ratio)

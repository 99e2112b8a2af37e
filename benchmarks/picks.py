"""The cost of picking a pod, beside the match that it begins with."""

from __future__ import annotations

from collections.abc import Iterator

from kvindex import PrefixIndex
from kvindex.routing import EndpointPicker

from .data import BLOCK, Tokens, beginning, chain, fill
from .interleave import interleaved
from .reach import Reached
from .report import amount, say

DEPTH = 2048
CALLS = 4


def measure(*, rounds: int = 101) -> Iterator[Reached]:
    """``rounds``: number of interleaved rounds."""
    for pods in (64, 256):
        say(f"{DEPTH} blocks, held by {pods} pods")
        index = PrefixIndex(block_size=BLOCK)
        fill(index, [chain(1, number, DEPTH) for number in range(8)], [f"pod-{number}" for number in range(pods)])
        picker = EndpointPicker(index)

        def pick(tokens: Tokens, picker: EndpointPicker = picker) -> None:
            choice = picker.pick(tokens)
            assert choice is not None
            assert choice.cached_tokens == DEPTH * BLOCK
            picker.finished(choice)

        def inputs(_: str, number: int) -> list[Tokens]:
            return [beginning(1, (number * CALLS + call) % 8, DEPTH) for call in range(CALLS)]

        timings = interleaved({"match": index.match_prefix, "pick": pick}, inputs, rounds)
        ratio = timings.ratio("pick", "match")
        us = f"{amount(timings.best('match'))} → {amount(timings.best('pick'))} µs"
        what = "pick and finished against match_prefix"
        yield Reached(what, f"{pods} pods, {us}", f"picks {pods}", ratio.median, ratio)

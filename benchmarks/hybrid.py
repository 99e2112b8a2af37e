"""The cost of the pods of a hybrid model when their caches end at many places."""

from __future__ import annotations

from collections.abc import Iterator

from kvindex import PrefixIndex
from kvindex.sim.wire import Stored, encode_batch

from .data import BLOCK, Tokens, chain, newest, stored
from .interleave import interleaved
from .reach import Reached
from .report import amount

PODS, PROMPTS, CALLS = 256, 16, 64
WINDOW = 1024


def grouped(whole: Stored) -> list[Stored]:
    """The events of one run of blocks, of a model with full attention and a sliding window."""
    return [
        whole._replace(group_idx=0, kv_cache_spec_kind="full_attention"),
        whole._replace(group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=WINDOW),
    ]


def filled(places: int, depth: int, *, hybrid: bool) -> tuple[PrefixIndex, list[Tokens]]:
    """An index of :data:`PODS` pods whose caches of each prompt end at ``places`` places, and the prompts."""
    index = PrefixIndex(block_size=BLOCK)
    contents = [chain(19, number, depth) for number in range(PROMPTS)]
    for pod in range(PODS):
        for number, content in enumerate(contents):
            whole = stored(content, 0, depth - (pod + number) % places)
            index.ingest(f"pod-{pod}", encode_batch(grouped(whole) if hybrid else [whole], newest()))
    return index, [content.tokens for content in contents]


def measure(*, rounds: int = 101) -> Iterator[Reached]:
    """``rounds``: number of interleaved rounds."""
    for depth, places in ((64, 1), (64, 50)):
        hybrid, prompts = filled(places, depth, hybrid=True)
        plain, _ = filled(places, depth, hybrid=False)
        assert hybrid.match_prefix(prompts[0]).tokens == plain.match_prefix(prompts[0]).tokens
        calls = {"hybrid": hybrid.match_prefix, "plain": plain.match_prefix}
        questions = prompts * (CALLS // PROMPTS)
        found = interleaved(calls, lambda name, number, asked=questions: asked, rounds)
        where = f"{depth} blocks, ends at {places} places; plain pods {amount(found.best('plain'))} µs"
        yield Reached(f"match_prefix, {PODS} hybrid pods, µs", where, "hybrid us", found.best("hybrid"))

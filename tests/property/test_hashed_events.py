"""Blocks announced by hashes have the same result as the same blocks announced by tokens, in any order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support import report_of

import kvindex
from kvindex import AllBlocksCleared, BlockRemoved, BlockStored, PrefixIndex

SIZE = 4
FORMS = ("token_ids", "local_hashes", "prefix_hashes")
# Paths in a small tree of blocks, so prompts share prefixes. The name of a block is its path.
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
STORED = st.tuples(st.just("stored"), PATHS, st.integers(0, 4), st.sampled_from([None, "CPU"]))
REMOVED = st.tuples(st.just("removed"), PATHS, st.just(0), st.sampled_from([None, "CPU"]))
OTHER = st.tuples(st.sampled_from(["cleared", "reloaded"]), st.just(()), st.just(0), st.none())


def tokens_of(path: tuple[int, ...]) -> list[int]:
    return [block for block in path for _ in range(SIZE)]


def name_of(path: tuple[int, ...]) -> int:
    return int("1" + "".join(map(str, path)))


def content(form: str, path: tuple[int, ...], start: int) -> dict:
    if form == "token_ids":
        return {form: tokens_of(path[start:])}
    make = kvindex.local_hashes if form == "local_hashes" else kvindex.prefix_hashes
    return {form: make(tokens_of(path), block_size=SIZE)[start:]}


def apply(index: PrefixIndex, form: str, step: tuple) -> dict | None:
    kind, path, start, medium = step
    if kind == "stored":
        start = min(start, len(path) - 1)
        return report_of(
            index.process_block_stored(
                BlockStored(
                    pod="a",
                    block_hashes=[name_of(path[: i + 1]) for i in range(start, len(path))],
                    parent_block_hash=name_of(path[:start]) if start else None,
                    block_size=SIZE,
                    medium=medium,
                    **content(form, path, start),
                )
            )
        )
    if kind == "removed":
        return report_of(
            index.process_block_removed(BlockRemoved(pod="a", block_hashes=[name_of(path)], medium=medium))
        )
    return report_of(index.process_all_blocks_cleared(AllBlocksCleared(pod="a")))


def reloaded(index: PrefixIndex) -> PrefixIndex:
    with tempfile.TemporaryDirectory() as place:
        index.save(Path(place) / "index")
        loaded = PrefixIndex.load(Path(place) / "index")
    loaded.mark_worker("a", 0, "exact")
    return loaded


@given(st.lists(st.one_of(STORED, STORED, REMOVED, OTHER), max_size=25), st.lists(PATHS, min_size=1, max_size=4))
def test_hashes_are_placed_where_tokens_are(steps, prompts):
    indexes = {form: PrefixIndex(block_size=SIZE) for form in FORMS}
    for index in indexes.values():
        index.mark_worker("a", 0, "exact")
    for step in steps:
        if step[0] == "reloaded":
            indexes = {form: reloaded(index) for form, index in indexes.items()}
            continue
        by_tokens, by_local, by_prefix = (apply(index, form, step) for form, index in indexes.items())
        assert by_tokens == by_local == by_prefix
    for index in indexes.values():
        index._check()
    for path in prompts:
        tokens = np.array(tokens_of(path), dtype=np.uint32)
        answers = [(dict(index.match_prefix(tokens).tokens), index.pod_state("a")) for index in indexes.values()]
        assert answers[0] == answers[1] == answers[2]

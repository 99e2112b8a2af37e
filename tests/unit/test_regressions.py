"""Minimal cases of the failures that fuzzing found (see tests/fuzz; the slow model checks the answers)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support import cleared, payload, removed, stored

from kvindex import PrefixIndex


def ingest(index: PrefixIndex, pod: str, *events, **where):
    report = index.ingest(pod, payload(*events), **where)
    index._check()
    return report


def test_memory_is_what_it_was_at_the_start_when_the_last_pod_is_gone() -> None:
    index = PrefixIndex(1)
    empty = index.stats()["bytes"]
    ingest(index, "a", stored([1, 2, 3], [7, 7, 8], size=1), stored([4], [9], parent=2, size=1))
    ingest(index, "b", stored([1, 2], [7, 7], size=1), removed(2))
    for pod in "ab":
        index.remove_pod(pod)
    assert index.stats()["bytes"] == empty


def test_clearing_one_medium_leaves_no_set_that_nothing_uses() -> None:
    index = PrefixIndex(1)
    index.configure_pod("b", clear_media=["GPU"])
    ingest(index, "a", stored([1], [7], size=1))
    ingest(index, "b", stored([1], [7], size=1), stored([2], [8], parent=1, size=1, medium="CPU"))
    ingest(index, "b", cleared())
    assert index.match_prefix([7, 8]).tokens == {"a": 1}
    ingest(index, "b", stored([1], [7], size=1))
    assert index.match_prefix([7, 8]).tokens == {"a": 1, "b": 2}
    for pod in "ab":
        index.remove_pod(pod)
    assert index.stats()["sets"] == 1


def test_the_end_of_a_chunk_promises_nothing_that_only_another_pod_holds() -> None:
    index = PrefixIndex(1)
    index.configure_pod("a", chunk_size=1)
    ingest(index, "a", stored([1, 2], [7, 7], size=1, kv_cache_spec_kind="chunked_local_attention"))
    ingest(index, "b", stored([11, 12, 13], [8, 8, 8], size=1))
    assert index.match_prefix([8, 8, 8]).tokens == {"b": 3}
    assert index.match_prefix([7, 7, 8]).tokens == {"a": 2}


@pytest.mark.parametrize("first", [1, 2])
def test_a_declared_set_holds_a_hash_once_whatever_the_block_sizes(first) -> None:
    index = PrefixIndex(1, presence="set")
    small, large = stored([1, 2], [7, 8], size=1), stored([2], [7, 8], size=2)
    ingest(index, "a", *((small, large) if first == 1 else (large, small)))
    assert ingest(index, "a", removed(2)).removed == 1
    report = ingest(index, "a", removed(2))
    assert (report.removed, report.reasons) == (0, {"unknown_hash": 1})


@pytest.mark.parametrize("size", [3, 2**64 - 1])
def test_a_placeholder_of_a_size_that_does_not_fit_is_not_parked(size) -> None:
    index = PrefixIndex(4)
    report = ingest(index, "a", stored([1, 2], [], size=size))
    assert (report.parked, report.reasons) == (0, {"block_size_mismatch": 1})
    assert index.pod_state("a") == "degraded"


def test_a_prompt_may_hand_on_the_keys_of_an_event_with_its_adapter_first() -> None:
    index = PrefixIndex(2)
    keys = [["adapter", "image"], ["adapter"]]
    ingest(index, "a", stored([1, 2], [7, 7, 8, 8], size=2, lora_name="adapter", extra_keys=keys))
    for same in (keys, [["image"], None]):
        assert index.match_prefix([7, 7, 8, 8], lora_name="adapter", extra_keys=same).tokens == {"a": 4}
    assert index.match_prefix([7, 7, 8, 8], extra_keys=keys).tokens == {}


@pytest.mark.parametrize("end", ["expire", "remove"])
def test_a_guess_ends_where_its_prefix_hashes_collide_with_others(end) -> None:
    """With a known seed, tokens for such hashes take 2**32 attempts. A holder that was gone remained in a set."""
    index = PrefixIndex(4, clock=lambda: 0.0)
    paths = {"a": [1, 2, 3, 4], "b": [1, 2, 3, 1, 5], "c": [2, 1], "d": [1, 2, 3, 1, 5, 1]}
    hashes = {pod: np.array(path, np.uint64) for pod, path in paths.items()}
    for pod in paths:
        index._guess(pod, 0, b"", hashes[pod], 1.0)
        index._check()
    for pod, path in paths.items():
        assert index.match_hashes(hashes[pod]).tokens[pod] == 4 * len(path)
    for pod in paths:
        if end == "remove":
            index.remove_pod(pod)
        else:
            index._expire(1.0)
        index._check()
    assert index.stats()["blocks"] == 0


@pytest.mark.parametrize("blocks", range(100, 800, 50))
def test_room_is_made_for_what_hangs_on_a_chain_that_becomes_one_with_its_parent(blocks) -> None:
    """Two chains fork at the end of their parent. Evicting one joins the other to the parent and frees its number."""
    index = PrefixIndex(1, max_bytes=1 << 15)
    forks = [stored([number], [number], parent=2, size=1) for number in (3, 4, 5)]
    ingest(index, "a", stored([1, 2], [1, 2], size=1), *forks, removed(3))
    many = range(100, 100 + blocks)
    for _ in range(3):
        ingest(index, "a", stored(many, many, parent=5, size=1))


@pytest.mark.parametrize("first", ["a", "b"])
def test_what_is_remembered_for_a_block_goes_when_the_half_of_it_in_a_fork_is_shed(first) -> None:
    """An engine block of two index blocks lies across a fork, below a removed block that is kept only as a parent."""
    index = PrefixIndex(1, max_bytes=1 << 15)
    events = {
        "a": [stored([12, 34], [1, 2, 3, 4], size=2), removed(12)],
        "b": [stored([1, 2, 3, 5], [1, 2, 3, 5], size=1)],
    }
    for pod in sorted(events, reverse=first == "b"):
        ingest(index, pod, *events[pod])
    assert index.match_prefix([1, 2, 3, 4]).tokens == {"b": 3}
    assert index.match_prefix([1, 2, 3, 5]).tokens == {"b": 4}
    for number in itertools.count(1000):
        ingest(index, "c", stored([number], [number], size=1))
        if index.pod_state("a") == index.pod_state("b") == "degraded":
            break

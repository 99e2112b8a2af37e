"""Blocks whose hash also covers the tokens after them. The slow model checks each case too."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from support import Pair, cleared, payload, removed, stored

import kvindex
from kvindex import BlockStored, decode_batch

A, B, C, D = ([i] * 4 for i in (1, 2, 3, 4))  # the tokens of four blocks
CPU = {"medium": "CPU"}


@pytest.fixture
def pair() -> Pair:
    return Pair(4)


def ahead(*lists: list[int]) -> dict:
    return {"lookahead_token_ids": list(lists)}


def in_pairs(tokens: list[int], behind: int) -> list[list[int]]:
    """Return the tokens in the format of SGLang with EAGLE."""
    return [list(pair) for pair in zip(tokens, [*tokens[1:], behind], strict=True)]


def test_blocks_with_other_tokens_behind_them_are_other_blocks(pair):
    pair.ingest("a", stored([1, 2], A + B, **ahead([2], [9])))
    assert pair.tokens([*A, *B, 9]) == {"a": 8}
    assert pair.tokens([*A, *B, 8]) == {"a": 4}
    assert pair.tokens(A + C + D) == {}
    pair.ingest("a", stored([3], A, **ahead([3])), removed(1))
    assert pair.tokens([*A, *B, 9]) == {}  # block 3 has the tokens of block 1 but is another block
    assert pair.tokens([*A, 3]) == {"a": 4}


def test_a_block_with_nothing_behind_it_in_the_prompt_does_not_match(pair):
    pair.ingest("a", stored([1, 2], A + B, **ahead([2, 2, 2], [3, 3, 3])))
    assert [pair.tokens((A + B + C)[:n]).get("a", 0) for n in range(13)] == [0] * 7 + [4] * 4 + [8] * 2


def test_pairs_are_a_token_and_the_one_behind_it(pair):
    pair.ingest("a", stored([1, 2], in_pairs(A + B, 9)))
    assert (pair.tokens([*A, *B, 9]), pair.tokens([*A, *B, 8]), pair.state("a")) == ({"a": 8}, {"a": 4}, "exact")
    # A block of several one-token pages gives the same result.
    pair.ingest("b", stored([7], in_pairs(A + B, 9), size=8))
    assert pair.tokens([*A, *B, 9]) == {"a": 8, "b": 8}


def test_lengths_live_beside_one_another(pair):
    pair.ingest("a", stored([1, 2], A + B))
    pair.ingest("b", stored([1, 2], A + B, **ahead([2], [3])))
    pair.ingest("c", stored([1, 2], A + B, **ahead([2, 2, 2], [3, 3, 3])))
    pair.ingest("d", stored([1, 2], A + B), model="other")
    assert pair.tokens(A + B + C) == {"a": 8, "b": 8, "c": 8}
    assert pair.tokens([*A, *B, 3, 4]) == {"a": 8, "b": 8, "c": 4}
    pair.ingest("b", cleared())
    pair.do("remove_pod", "c")
    assert pair.tokens(A + B + C) == {"a": 8}


def test_one_worker_with_several_lengths_has_the_best_of_them(pair):
    pair.ingest("a", stored([1], A), stored([11, 12], A + B, **ahead([2], [3])), stored([21], B, **ahead([3, 3])))
    assert (pair.tokens(A + B + C), pair.tokens(A + C), pair.tokens(B + C)) == ({"a": 8}, {"a": 4}, {"a": 4})
    assert pair.state("a") == "exact"
    match = pair.index.match_prefix(A + B + C)
    assert (match.best(), match["a"].ranks, match.percent) == (("a", 8), {0: 8}, {"a": 66})


def test_a_chain_of_several_lengths_is_not_placed(pair):
    pair.ingest("a", stored([1], A, **ahead([2])))
    assert pair.ingest("a", stored([2], B, parent=1))["reasons"] == {"mixed_lookahead": 1}
    assert (pair.tokens(A + B + C), pair.state("a")) == ({"a": 4}, "degraded")


def test_hybrid_groups_have_it_too(pair):
    full = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 5}
    pair.ingest("a", stored([1, 2, 3], A + B + C, **full, **ahead([2], [3], [4])))
    pair.ingest("a", stored([2, 3], A + B + C, **window, **ahead([3], [4])))
    assert (pair.tokens(A + B + C + D), pair.tokens([*A, *B, *C, 5])) == ({"a": 12}, {"a": 8})
    pair.ingest("a", removed(2, group_idx=1))
    assert (pair.tokens(A + B + C + D), pair.state("a")) == ({"a": 12}, "exact")


def test_blocks_of_several_index_blocks(pair):
    pair.ingest("a", stored([1, 2], A + B + C + D, size=8, **ahead([3, 3, 3], [5, 5, 5])))
    assert pair.tokens([*A, *B, *C, *D, 5, 5, 5]) == {"a": 16}
    assert pair.tokens([*A, *B, *C, *D, 5, 5, 6]) == {"a": 8}
    # Tokens after an index block inside its own engine block count the same as lookahead tokens of single blocks.
    pair.ingest("b", stored([1, 2], A + B, **ahead([2, 2, 2], [3, 3, 3])))
    assert pair.tokens(A + B + C) == {"a": 8, "b": 8}


def test_keys_adapters_and_salts_come_with_it(pair):
    keys = {"lora_name": "L", "cache_salt": "s", "extra_keys": [None, ["img"]]}
    pair.ingest("a", stored([1, 2], A + B, **keys, **ahead([2], [3])))
    assert (pair.tokens(A + B + C, **keys), pair.tokens(A + B + C)) == ({"a": 8}, {})


def test_a_copy_elsewhere_needs_no_lookahead(pair):
    pair.ingest("a", stored([1, 2], A + B, **ahead([2], [3])), stored([1], (), size=0, **CPU))
    pair.ingest("a", stored([1, 2], A + B, **CPU), removed(1, 2))
    assert (pair.ask(A + B + C)["a"]["media"], pair.state("a")) == ({"CPU": 8}, "exact")


def test_an_orphan_keeps_its_lookahead(pair, tmp_path):
    pair.ingest("a", stored([2], B, parent=1, **ahead([3])))
    pair.index.save(tmp_path / "index")
    pair.index = kvindex.PrefixIndex.load(tmp_path / "index")
    pair.index.mark_worker("a", 0, "exact")
    pair.ingest("a", stored([1], A, **ahead([2])))
    assert (pair.tokens(A + B + C), pair.tokens(A + B + D), pair.state("a")) == ({"a": 8}, {"a": 4}, "exact")


def test_a_snapshot_has_lengths(pair, tmp_path):
    pair.ingest("a", stored([1, 2], A + B, **ahead([2], [3])))
    pair.index.save(tmp_path / "index")
    pair.index = kvindex.PrefixIndex.load(tmp_path / "index")
    assert (pair.tokens(A + B + C), pair.tokens(A + B + D)) == ({"a": 8}, {"a": 4})
    pair.index._check()


def test_a_guess_has_the_lengths_of_its_worker(pair):
    pair.ingest("a", stored([1], D, **ahead([2])))
    pair.do("add_prefix", "a", A + B, ttl=100.0, now=pair.index._clock())
    assert (pair.tokens(A + B), pair.tokens(A + C)) == ({"a": 4}, {})
    pair.do("add_prefix", "b", A + B, ttl=100.0, now=pair.index._clock())
    assert pair.tokens(A + B) == {"a": 4, "b": 8}


def test_prefix_hashes_have_no_lookahead(pair):
    pair.ingest("a", stored([1], A, **ahead([2])))
    pair.ingest("b", stored([1], A))
    assert pair.index.match_hashes(kvindex.prefix_hashes(A + B, block_size=4)).tokens == {"b": 4}


def test_a_model_has_so_many_lengths_and_no_more():
    index = kvindex.PrefixIndex(4)
    for length in range(1, 6):
        index.ingest(f"pod-{length}", payload(stored([1], A, **ahead([2] * length))))
    assert [index.pod_state(f"pod-{length}") for length in range(1, 6)] == ["exact"] * 4 + ["degraded"]
    assert index.stats()["skipped_reasons"] == {"over_limit": 1}
    index.remove_pod("pod-2")
    index.ingest("pod-6", payload(stored([1], A, **ahead([2] * 6))))
    assert set(index.match_prefix([*A, *[2] * 8]).tokens) == {"pod-1", "pod-3", "pod-4", "pod-6"}
    index._check()


BAD = {
    "another count": ahead([2]),
    "mixed lengths": ahead([2], [3, 3]),
    "text": ahead([2], ["3"]),
    "a negative": ahead([2], [-1]),
    "no list": {"lookahead_token_ids": 5},
    "no lists": {"lookahead_token_ids": [2, 3]},
    "nil": {"lookahead_token_ids": [[2], None]},
    "a map": {"lookahead_token_ids": {"a": 1}},
    "too many": ahead([2] * 65, [2] * 65),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_lookahead_that_is_none_costs_its_event(pair, bad):
    pair.ingest("a", stored([9], D))
    report = pair.ingest("a", stored([8], C), stored([1, 2], A + B, **bad), stored([7], B))
    assert (report["stored"], report["reasons"], report["errors"]) == (2, {"bad_event": 1}, 1)
    assert (pair.tokens(A + B + C), pair.tokens(C), pair.state("a")) == ({}, {"a": 4}, "degraded")


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_lookahead_of_an_object_is_looked_at(bad):
    index = kvindex.PrefixIndex(4)
    with pytest.raises((kvindex.InvalidTypeError, kvindex.InvalidValueError), match="lookahead_token_ids"):
        index.process_block_stored(BlockStored("a", block_hashes=[1, 2], token_ids=A + B, block_size=4, **bad))
    assert index.stats()["blocks"] == 0


@pytest.mark.parametrize(
    "tokens",
    [
        [[1, 1], [1, 1], [2, 1], [1, 2]],  # the second of a pair is not the first of the next
        [[1, 1], [1, 1], [1, 1], 1],
        [[1, 1], [1, 1], [1, 1], [1]],
        [[1, 1], [1, 1], [1, 1], [1, "x"]],
        [[1, 1], [1, -1], [1, 1], [1, 1]],
        [1, [1, 1], [1, 1], [1, 1]],
        [[1, 1, 1]] * 4,
    ],
)
def test_pairs_that_are_none_are_bad_tokens(pair, tokens):
    pair.ingest("a", stored([9], D))
    report = pair.ingest("a", stored([8], C), stored([1], tokens), stored([7], B))
    assert (report["stored"], report["reasons"], pair.state("a")) == (2, {"bad_token": 1}, "degraded")


def test_pairs_and_lists_together_are_a_contradiction(pair):
    assert pair.ingest("a", stored([1], in_pairs(A, 2), **ahead([2])))["reasons"] == {"bad_event": 1}


def test_decoded_events_have_it():
    lists, pairs, none = decode_batch(
        payload(stored([1, 2], A + B, **ahead([2], [3])), stored([1, 2], in_pairs(A + B, 3)), stored([1], A))
    ).events
    assert lists.lookahead_token_ids == pairs.lookahead_token_ids == [[2], [3]]
    assert lists.token_ids.tolist() == pairs.token_ids.tolist() == A + B
    assert none.lookahead_token_ids is None
    for event in (lists, pairs):
        index = kvindex.PrefixIndex(4)
        index.process_block_stored(event)
        assert index.match_prefix(A + B + C).tokens == {"": 8}
    array = BlockStored("a", block_hashes=[1], token_ids=A, block_size=4, lookahead_token_ids=np.array([[2]]))
    assert kvindex.PrefixIndex(4).process_block_stored(array).stored == 1


def test_events_that_are_alike_have_their_own():
    events = [stored([n], [n] * 4, **ahead([n + 1])) for n in range(1, 40)]
    index = kvindex.PrefixIndex(4)
    assert index.ingest("a", payload(*events)).stored == 39
    assert all(index.match_prefix([n] * 4 + [n + 1]).tokens == {"a": 4} for n in range(1, 40))
    assert not any(index.match_prefix([n] * 4 + [n + 2]).tokens for n in range(1, 40))
    # The keys may come in any order, even before the tokens.
    event = {key: events[0][key] for key in sorted(events[0], reverse=True)}
    for one in (event, dict(reversed(event.items()))):
        again = kvindex.PrefixIndex(4)
        assert again.ingest("a", msgpack.packb([1.0, [one, one], 0])).stored == 2
        assert again.match_prefix([1, 1, 1, 1, 2]).tokens == {"a": 4}

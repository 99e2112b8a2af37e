"""The semantics of the index, one sentence at a time. The slow model checks each case too."""

from __future__ import annotations

import numpy as np
import pytest
from model import NotABatch
from support import Pair, cleared, payload, removed, stored

import kvindex

A, B, C, D = ([i] * 4 for i in (1, 2, 3, 4))  # the tokens of four blocks
FULL = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


def sliding(window: int, group: int = 1) -> dict:
    return {"group_idx": group, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": window}


def chain(n: int, size: int = 4) -> tuple[list[int], list[int]]:
    """Return the hashes and tokens of n blocks."""
    return [1000 + i for i in range(n)], [i // size for i in range(n * size)]


@pytest.fixture
def pair() -> Pair:
    return Pair(4)


# ------------------------------------------------------------------------------------------------------------ terms


def test_the_answer_is_the_number_of_leading_tokens_that_a_pod_holds(pair):
    pair.ingest("a", stored([1, 2], A + B))
    assert pair.ask(A + B + C) == {"a": {"tokens": 8, "ranks": {0: 8}, "media": {"GPU": 8}}}


def test_a_pod_that_holds_nothing_of_the_prompt_is_left_out(pair):
    pair.ingest("a", stored([1], A))
    assert pair.tokens(B + A) == {}


def test_an_incomplete_last_block_does_not_count(pair):
    pair.ingest("a", stored([1, 2], A + B))
    assert pair.tokens(A + B[:3]) == {"a": 4}


def test_every_rank_has_a_cache_of_its_own(pair):
    pair.ingest("a", stored([1, 2], A + B), rank=0)
    pair.ingest("a", stored([1], A), rank=3)
    assert pair.ask(A + B)["a"] == {"tokens": 8, "ranks": {0: 8, 3: 4}, "media": {"GPU": 8}}
    pair.ingest("a", removed(1), rank=0)
    assert pair.ask(A + B)["a"]["ranks"] == {3: 4}


def test_the_rank_of_the_call_counts_before_that_of_the_batch(pair):
    assert pair.ingest("a", stored([1], A), rank=7, dp_rank=2)["dp_rank"] == 2
    assert pair.ask(A)["a"]["ranks"] == {2: 4}


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (None, "GPU"),
        ("GPU", "GPU"),
        ("gpu", "GPU"),
        ("cpu", "CPU"),
        ("Cpu_Pinned", "CPU_PINNED"),
        ("disk", "DISK"),
        ("STORAGE", "STORAGE"),
        ("external", "EXTERNAL"),
        ("Tape-7", "Tape-7"),
    ],
)
def test_media_are_compared_without_case_and_unknown_ones_kept(pair, written, shown):
    pair.ingest("a", stored([1], A, medium=written))
    assert pair.ask(A)["a"]["media"] == {shown: 4}
    pair.ingest("a", removed(1, medium=written and written.swapcase()))
    assert pair.tokens(A) == {}


def test_models_never_see_each_others_blocks(pair):
    pair.ingest("a", stored([1], A), model="m")
    assert pair.tokens(A, model="m") == {"a": 4}
    assert pair.tokens(A) == {}
    pair.ingest("a", removed(1))
    assert pair.tokens(A, model="m") == {"a": 4}


def test_no_group_is_group_0(pair):
    pair.ingest("a", stored([1], A))
    pair.ingest("a", removed(1, group_idx=0))
    assert pair.tokens(A) == {}


def test_two_pods_may_give_one_content_two_hashes(pair):
    pair.ingest("a", stored([1, 2], A + B))
    pair.ingest("b", stored([3, 4], A + B))
    assert pair.tokens(A + B) == {"a": 8, "b": 8}
    pair.ingest("a", removed(4, 3))
    assert pair.tokens(A + B) == {"a": 8, "b": 8}


def test_two_pods_may_give_two_contents_one_hash(pair):
    pair.ingest("a", stored([1, 2], A + B))
    pair.ingest("b", stored([1, 2], C + D))
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.tokens(C + D) == {"b": 8}
    pair.ingest("b", removed(2))
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.tokens(C + D) == {"b": 4}


def test_one_worker_may_give_one_content_two_hashes(pair):
    pair.ingest("a", stored([1], A), stored([2], A), stored([3], B, parent=2))
    pair.ingest("a", removed(1))
    assert pair.tokens(A + B) == {"a": 8}
    pair.ingest("a", removed(2))
    assert pair.tokens(A + B) == {}
    pair.ingest("a", stored([1], A))
    assert pair.tokens(A + B) == {"a": 8}


def test_the_last_announcement_of_a_hash_wins(pair):
    pair.ingest("a", stored([1, 2], A + B), stored([1, 2], A + B))
    pair.ingest("a", stored([2], C))
    assert pair.tokens(A + B) == {"a": 4}
    assert pair.tokens(C) == {"a": 4}
    pair.ingest("a", removed(2))
    assert pair.tokens(C) == {}


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (2**64 - 1, -1),
        (2**63, -(2**63)),
        (5, b"\x05"),
        (5, b"\0" * 7 + b"\x05"),
        (5, b"\xff" * 24 + b"\0" * 7 + b"\x05"),
        (0x0102030405060708, b"\xaa" * 56 + bytes(range(1, 9))),
    ],
)
def test_a_hash_is_the_same_however_it_is_written(pair, one, same):
    pair.ingest("a", stored([one], A))
    assert pair.ingest("a", removed(same))["removed"] == 1
    assert pair.tokens(A) == {}


# ---------------------------------------------------------------------------------------------------------- hashing


def test_the_check_value_of_the_hash():
    assert int(kvindex.local_hashes(range(64), block_size=16)[0]) == 15310707395893867146


def test_the_first_prefix_hash_is_the_first_local_hash_and_the_tail_is_not_hashed():
    local, prefix = kvindex.local_hashes(range(70)), kvindex.prefix_hashes(range(70))
    assert len(local) == len(prefix) == 4
    assert local[0] == prefix[0]
    assert set(local[1:].tolist()).isdisjoint(prefix[1:].tolist())


def test_extra_keys_change_their_block_and_every_later_one():
    plain = kvindex.prefix_hashes(range(64))
    keyed = kvindex.prefix_hashes(range(64), extra_keys=[None, ["image-7"]])
    assert (plain == keyed).tolist() == [True, False, False, False]


def test_a_salt_changes_every_block_through_the_first():
    assert not (kvindex.prefix_hashes(range(64)) == kvindex.prefix_hashes(range(64), cache_salt="s")).any()


def test_a_lora_name_changes_every_local_hash():
    assert not (kvindex.local_hashes(range(64)) == kvindex.local_hashes(range(64), lora_name="l")).any()


def test_another_seed_gives_other_hashes_and_the_same_answers():
    index = kvindex.PrefixIndex(4, hash_seed=2**64 - 7)
    index.process_block_stored(kvindex.BlockStored(pod="a", block_hashes=[1, 2], token_ids=A + B, block_size=4))
    match = index.match_prefix(A + B)
    assert match.tokens == {"a": 8}
    assert match.hashes.tolist() == kvindex.prefix_hashes(A + B, block_size=4, hash_seed=2**64 - 7).tolist()
    assert match.hashes.tolist() != kvindex.prefix_hashes(A + B, block_size=4).tolist()


# --------------------------------------------------------------------------------------------------------- presence


def test_copies_are_counted(pair):
    pair.ingest("a", stored([1], A), stored([1], A))
    pair.ingest("a", removed(1))
    assert pair.tokens(A) == {"a": 4}
    pair.ingest("a", removed(1))
    assert pair.tokens(A) == {}


def test_many_copies_are_counted(pair):
    pair.ingest("a", *[stored([1, 2], A + B) for _ in range(300)])
    pair.ingest("a", *[removed(1, 2) for _ in range(299)])
    assert pair.tokens(A + B) == {"a": 8}
    pair.ingest("a", removed(1))
    assert pair.tokens(A + B) == {}


def test_a_declared_set_holds_a_block_once(pair):
    pair.do("configure_pod", "a", presence="set")
    for pod in "ab":
        pair.ingest(pod, stored([1], A), stored([1], A), removed(1))
    assert pair.tokens(A) == {"b": 4}


def test_an_index_may_hold_sets_by_default():
    pair = Pair(4, presence="set")
    pair.do("configure_pod", "b", presence="count")
    for pod in "ab":
        pair.ingest(pod, stored([1], A), stored([1], A), removed(1))
    assert pair.tokens(A) == {"b": 4}


@pytest.mark.parametrize(
    ("group", "state"),
    [
        (FULL, "exact"),
        ({"group_idx": 1, "kv_cache_spec_kind": "mla_attention"}, "exact"),
        (sliding(9), "degraded"),
        ({"group_idx": 1, "kv_cache_spec_kind": "mamba"}, "degraded"),
        ({"group_idx": 1, "kv_cache_spec_kind": "chunked_local_attention"}, "degraded"),
    ],
)
def test_a_set_can_not_say_what_a_window_has_left(pair, group, state):
    """The number is still given, and the state marks it as possibly wrong. With counted copies it is exact."""
    pair.do("configure_pod", "a", presence="set", chunk_size=16)
    pair.do("configure_pod", "b", chunk_size=16)
    for pod in "ab":
        pair.ingest(pod, stored([1, 2], A + B, **FULL), stored([1, 2], A + B, **group))
    assert (pair.state("a"), pair.state("b")) == (state, "exact")
    assert pair.tokens(A + B) == {"a": 8, "b": 8}
    pair.do("configure_pod", "a", presence="count")
    pair.do("configure_pod", "b", presence="set")
    assert (pair.state("a"), pair.state("b")) == ("exact", state)
    pair.ingest("b", cleared())  # its groups are unknown again
    assert pair.state("b") == "exact"


def test_counts_start_again_after_a_clear(pair):
    pair.ingest("a", stored([1], A), stored([1], A), cleared(), stored([1], A), removed(1))
    assert pair.tokens(A) == {}


def test_a_removal_without_a_copy_is_counted_and_changes_nothing(pair):
    pair.ingest("a", stored([1], A))
    report = pair.ingest("a", removed(1, 1, 9))
    assert (report["removed"], report["skipped"], report["errors"]) == (1, 2, 0)
    assert report["reasons"] == {"unknown_hash": 2}
    assert pair.state("a") == "exact"
    pair.ingest("a", stored([1], A))
    assert pair.tokens(A) == {"a": 4}


def test_a_removal_of_something_parked_takes_it_back(pair):
    pair.ingest("a", stored([2, 3], B + C, parent=1))
    assert pair.ingest("a", removed(3))["removed"] == 1
    pair.ingest("a", stored([1], A))
    assert pair.tokens(A + B + C) == {"a": 8}
    assert pair.state("a") == "exact"


def test_what_is_parked_and_removed_keeps_its_place_for_what_follows(pair):
    pair.ingest("a", stored([2], B, parent=1), stored([3], C, parent=2), removed(2), stored([1], A))
    assert pair.tokens(A + B + C) == {"a": 4}
    assert pair.state("a") == "exact"
    pair.ingest("a", stored([2], B, parent=1))
    assert pair.tokens(A + B + C) == {"a": 12}


def test_the_latest_of_the_parked_copies_goes_first(pair):
    pair.ingest("a", stored([2], B, parent=1), stored([2], C, parent=8), removed(2), stored([1, 8], A + D))
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.tokens(A + D + C) == {"a": 8}
    assert pair.state("a") == "exact"


def test_one_pods_removal_touches_no_other_pod(pair):
    for pod in "abc":
        pair.ingest(pod, stored([1, 2], A + B))
    pair.ingest("b", removed(1, 2))
    assert pair.tokens(A + B) == {"a": 8, "c": 8}


def test_one_tiers_removal_touches_no_other_tier(pair):
    pair.ingest("a", stored([1], A), stored([1], A, medium="CPU"), stored([1], A, medium="DISK"))
    pair.ingest("a", removed(1, medium="CPU"))
    assert pair.ask(A)["a"]["media"] == {"GPU": 4, "DISK": 4}


def test_one_groups_removal_touches_no_other_group(pair):
    pair.ingest("a", stored([1, 2], A + B, **FULL), stored([1, 2], A + B, **sliding(5)))
    pair.ingest("a", removed(1, group_idx=1))
    assert pair.tokens(A + B) == {"a": 8}  # the window reaches one block back
    pair.ingest("a", removed(2, group_idx=1))
    assert pair.tokens(A + B) == {}


def test_the_tiers_of_a_worker_add_up(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C), stored([1, 2], (), size=0, medium="CPU"), removed(1, 2))
    assert pair.ask(A + B + C)["a"] == {"tokens": 12, "ranks": {0: 12}, "media": {"CPU": 8}}


def test_a_clear_takes_every_medium_group_and_model_of_its_rank_alone(pair):
    for rank in (0, 1):
        pair.ingest("a", stored([1], A), stored([2], B, medium="CPU"), rank=rank)
        pair.ingest("a", stored([1], A), rank=rank, model="m")
    assert pair.ingest("a", cleared(), rank=1)["cleared"] == 1
    assert pair.ask(A)["a"]["ranks"] == pair.ask(B)["a"]["ranks"] == pair.ask(A, model="m")["a"]["ranks"] == {0: 4}


def test_a_source_can_be_told_which_media_its_clears_mean(pair):
    pair.do("configure_pod", "a", clear_media={"gpu"})
    pair.ingest("a", stored([1], A), stored([2], B, medium="CPU"), cleared())
    assert pair.tokens(A) == {}
    assert pair.ask(B)["a"]["media"] == {"CPU": 4}
    pair.do("clear_worker", "a", 0)
    assert pair.tokens(B) == {}


# ------------------------------------------------------------------------------------------------- chains and holes


def test_the_blocks_of_an_event_hang_one_below_the_other(pair):
    pair.ingest("a", stored([1], A), stored([2, 3, 4], B + C + D, parent=1))
    assert pair.tokens(A + B + C + D) == {"a": 16}
    assert pair.tokens(A + C) == {"a": 4}
    assert pair.tokens(A + D) == {"a": 4}


def test_a_hole_ends_the_match_and_its_return_counts_at_once(pair):
    hashes, tokens = chain(512)
    pair.ingest("a", stored(hashes, tokens))
    pair.ingest("a", removed(hashes[256]))
    assert pair.tokens(tokens) == {"a": 256 * 4}
    pair.ingest("a", stored(hashes[256:257], tokens[1024:1028], parent=hashes[255]))
    assert pair.tokens(tokens) == {"a": 512 * 4}


def test_the_head_may_go_first_and_come_back(pair):
    hashes, tokens = chain(8)
    pair.ingest("a", stored(hashes, tokens))
    for i in range(7):
        pair.ingest("a", removed(hashes[i]))
        assert pair.tokens(tokens) == {}
    pair.ingest("a", stored(hashes[:7], tokens[:28]))
    assert pair.tokens(tokens) == {"a": 32}


def test_a_chain_may_grow_below_a_hole(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C), removed(2), stored([4], D, parent=3))
    assert pair.tokens(A + B + C + D) == {"a": 4}
    pair.ingest("a", stored([2], B, parent=1))
    assert pair.tokens(A + B + C + D) == {"a": 16}


def test_a_position_is_forgotten_when_nothing_below_is_held(pair):
    pair.ingest("a", stored([1, 2], A + B), removed(1, 2))
    assert pair.index.stats()["blocks"] == 0
    assert pair.ingest("a", stored([3], C, parent=2))["parked"] == 1
    assert pair.state("a") == "degraded"


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_children_may_come_before_their_parents(pair, order):
    events = [stored([1], A), stored([2], B, parent=1), stored([3, 4], C + D, parent=2)]
    for i in order:
        pair.ingest("a", events[i])
    assert pair.tokens(A + B + C + D) == {"a": 16}
    assert pair.state("a") == "exact"
    assert pair.parked("a") == 0


def test_an_unknown_parent_is_not_the_root(pair):
    report = pair.ingest("a", stored([2], B, parent=1))
    assert (report["stored"], report["parked"], report["skipped"]) == (0, 1, 0)
    assert pair.tokens(B) == {}
    assert pair.state("a") == "degraded"


def test_a_parent_of_another_worker_is_no_parent(pair):
    pair.ingest("a", stored([1], A), rank=0)
    pair.ingest("a", stored([2], B, parent=1), rank=1)
    pair.ingest("b", stored([2], B, parent=1))
    assert pair.tokens(A + B) == {"a": 4}
    assert pair.parked("a", 1) == pair.parked("b") == 1


def test_what_is_parked_is_bounded(pair):
    pair = Pair(4, max_parked=3)
    assert pair.ingest("a", stored([2, 3], B + C, parent=1))["parked"] == 2
    report = pair.ingest("a", stored([4, 5], B + C, parent=9))
    assert (report["parked"], report["skipped"], report["errors"]) == (0, 2, 0)
    assert report["reasons"] == {"parked_full": 2}
    pair.ingest("a", stored([1], A))
    assert pair.tokens(A + B + C) == {"a": 12}
    assert pair.parked("a") == 0
    assert pair.state("a") == "degraded"  # something was lost for good


def test_dead_orphans_take_no_room(pair):
    pair = Pair(4, max_parked=2)
    for i in range(10):
        assert pair.ingest("a", stored([10 + i], B, parent=1), removed(10 + i))["parked"] == 1
    assert pair.state("a") == "exact"


def test_a_clear_drops_what_is_parked(pair):
    pair.ingest("a", stored([2], B, parent=1), cleared(), stored([1], A))
    assert pair.tokens(A + B) == {"a": 4}
    assert pair.state("a") == "exact"


def test_masked_blocks_are_placed_by_what_is_known_of_them(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C, **FULL))
    assert pair.ingest("a", stored([2, 3], A + B + C, **sliding(9)))["stored"] == 2
    assert pair.tokens(A + B + C) == {"a": 12}


def test_a_masked_block_that_nobody_knows_waits_until_it_is_known(pair):
    report = pair.ingest("a", stored([3], A + B + C, **sliding(5)))
    assert (report["stored"], report["parked"]) == (0, 1)
    assert pair.state("a") == "degraded"
    pair.ingest("a", stored([1, 2, 3], A + B + C, **FULL))
    assert pair.tokens(A + B + C) == {"a": 12}
    assert pair.state("a") == "exact"


@pytest.mark.parametrize("size", [0, None])
def test_a_placeholder_attaches_to_a_known_hash_and_makes_no_prefix_of_its_own(pair, size):
    pair.ingest("a", stored([7], (), size=size, medium="CPU"))
    assert pair.tokens([]) == {}
    assert pair.state("a") == "degraded"
    pair.ingest("a", stored([7], A))
    assert pair.ask(A)["a"]["media"] == {"GPU": 4, "CPU": 4}
    pair.ingest("a", removed(7))
    assert pair.ask(A)["a"] == {"tokens": 4, "ranks": {0: 4}, "media": {"CPU": 4}}


def test_hash_0_is_a_hash(pair):
    pair.ingest("a", stored([0, 1], A + B), stored([2], C, parent=0))
    assert pair.tokens(A + B) == pair.tokens(A + C) == {"a": 8}
    pair.ingest("a", removed(0))
    assert pair.tokens(A + B) == {}


@pytest.mark.parametrize("top", [0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_every_64_bit_value_is_a_hash(pair, top):
    pair.ingest("a", stored([top], A), stored([7], B, parent=top))
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.ingest("a", removed(7, top))["removed"] == 2
    assert pair.index.stats()["blocks"] == 0


def test_a_block_that_is_its_own_parent_hangs_nothing(pair):
    pair.ingest("a", stored([5], A, parent=5))
    assert pair.tokens(A) == {}
    pair.ingest("a", stored([5], A))
    pair.ingest("a", stored([6], B, parent=6), stored([6], B, parent=5))
    assert pair.index.worker_stats("a")[0]["state"] == "degraded"


def test_a_circle_of_parents_hangs_nothing(pair):
    pair.ingest("a", stored([1], A, parent=2), stored([2], B, parent=3), stored([3], C, parent=1))
    assert pair.tokens(A) == {}
    assert pair.parked("a") == 3
    pair.ingest("a", cleared())
    assert pair.parked("a") == 0


def test_a_hash_that_comes_twice_in_one_event_ends_it_there(pair):
    report = pair.ingest("a", stored([1, 2, 1, 3], A + B + C + D))
    assert (report["stored"], report["skipped"], report["errors"]) == (2, 2, 0)
    assert report["reasons"] == {"duplicate_hash": 2}
    assert pair.tokens(A + B + C + D) == {"a": 8}
    assert pair.state("a") == "degraded"


def test_a_block_is_never_below_itself(pair):
    report = pair.ingest("a", stored([1, 2], A + B, parent=2))
    assert (report["stored"], report["parked"]) == (0, 1)
    assert report["reasons"] == {"duplicate_hash": 1}
    assert pair.ingest("a", stored([3], A, parent=3))["reasons"] == {"duplicate_hash": 1}
    assert pair.parked("a") == 1


def test_prompts_fork_and_meet_and_leave_nothing_behind(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C), stored([4, 5], D + C, parent=1))
    pair.ingest("b", stored([1, 4, 5], A + D + C))
    assert pair.tokens(A + B + C) == {"a": 12, "b": 4}
    assert pair.tokens(A + D + C) == {"a": 12, "b": 12}
    pair.ingest("a", removed(1, 2, 3, 4, 5))
    assert pair.tokens(A + D + C) == {"b": 12}
    pair.ingest("b", removed(5, 4, 1))
    assert pair.index.stats()["blocks"] == 0


# ------------------------------------------------------------------------------------------------------ block sizes


def test_a_larger_engine_block_is_placed_and_goes_as_one(pair):
    pair.ingest("a", stored([1, 2], A + B + C + D, size=8))
    assert pair.tokens(A + B + C + D) == {"a": 16}
    pair.ingest("a", removed(2))
    assert pair.tokens(A + B + C + D) == {"a": 8}


def test_an_answer_is_floored_to_the_workers_own_block_size(pair):
    pair.ingest("a", stored([1, 2], A + B + C + D, size=8))
    pair.ingest("b", stored([1, 2, 3, 4], A + B + C + D))
    assert pair.tokens(A + B + C) == {"a": 8, "b": 12}
    assert pair.tokens(A) == {"b": 4}


def test_groups_may_have_different_block_sizes(pair):
    hashes, tokens = chain(6)
    pair.ingest("a", stored(hashes, tokens, **FULL))
    pair.ingest("a", stored([hashes[2]], tokens[:12], size=12, group_idx=1, kv_cache_spec_kind="mamba"))
    assert pair.tokens(tokens) == {"a": 12}
    pair.ingest("a", stored([hashes[5]], tokens[12:], size=12, parent=hashes[2], group_idx=1))
    assert pair.tokens(tokens) == {"a": 24}
    assert pair.tokens(tokens[:20]) == {"a": 12}


def test_a_larger_block_must_start_where_one_can(pair):
    report = pair.ingest("a", stored([1], A), stored([2], B + C, size=8, parent=1))
    assert (report["stored"], report["skipped"]) == (1, 1)
    assert report["reasons"] == {"misaligned": 1}
    assert pair.tokens(A + B + C).get("a", 0) <= 4
    assert pair.state("a") == "degraded"


def test_an_orphan_that_was_taken_back_does_not_move_a_name_that_was_announced_since(pair):
    pair.ingest("a", stored([1], A, parent=2), stored([4], B, parent=1), removed(1))
    pair.ingest("a", stored([1], C))  # the block that waited for 1 follows this one, so the orphan is no longer needed
    assert pair.tokens(C + B) == {"a": 8}
    pair.ingest("a", stored([2], D, parent=4))
    assert (pair.tokens(C + B + D), pair.state("a")) == ({"a": 12}, "exact")


def test_a_masked_block_of_another_size_may_end_where_such_a_block_can_not(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C))
    report = pair.ingest("a", stored([1], [], size=8))
    assert report["reasons"] == {"misaligned": 1}
    # From here on, the group is assumed to have blocks of two, and only whole blocks count.
    assert (pair.state("a"), pair.tokens(A + B + C)) == ("degraded", {"a": 8})


@pytest.mark.parametrize(("hashes", "size"), [([1, 2], 2), ([1, 2], 3), ([1], 6), ([1, 2], 5), ([1], 7)])
def test_a_size_that_is_no_multiple_is_skipped_and_named(pair, hashes, size):
    report = pair.ingest("a", stored(hashes, [1] * size * len(hashes), size=size))
    assert (report["stored"], report["skipped"], report["errors"]) == (0, 1, 0)
    assert report["reasons"] == {"block_size_mismatch": 1}
    assert pair.tokens([1] * 16) == {}
    pair.ingest("a", stored([9], A))
    assert pair.state("a") == "degraded"
    pair.ingest("a", cleared())
    assert pair.state("a") == "exact"


def test_a_partial_block_is_skipped_and_its_promotion_placed(pair):
    pair.ingest("a", stored([1], A))
    assert pair.ingest("a", stored([2], B[:3], size=3, parent=1))["reasons"] == {"partial_block": 1}
    assert pair.state("a") == "exact"
    report = pair.ingest("a", removed(2), stored([3], B, parent=1))
    assert report["reasons"] == {"unknown_hash": 1}
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.state("a") == "exact"


def test_a_partial_block_before_any_full_one_may_be_a_wrong_size_until_one_comes(pair):
    assert pair.ingest("a", stored([2], B[:3], size=3))["reasons"] == {"block_size_mismatch": 1}
    assert pair.state("a") == "degraded"
    pair.ingest("a", stored([1], A))
    assert pair.state("a") == "exact"


def test_tokens_without_a_block_size_are_of_no_size(pair):
    for size in (0, None):
        assert pair.ingest("a", stored([1], A, size=size))["reasons"] == {"block_size_mismatch": 1}
    assert pair.state("a") == "degraded"


# --------------------------------------------------------------------------------------- LoRA, salts and extra keys


def test_a_lora_adapters_blocks_are_its_own(pair):
    pair.ingest("a", stored([1], A, lora_name="sql"), stored([2], A, lora_name="poetry"))
    assert pair.tokens(A) == {}
    assert pair.tokens(A, lora_name="sql") == {"a": 4}
    pair.ingest("a", removed(1))
    assert pair.tokens(A, lora_name="sql") == {}
    assert pair.tokens(A, lora_name="poetry") == {"a": 4}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lora_id": 7}, "7"),
        ({"lora_id": "sql"}, "sql"),
        ({"lora_id": 7, "lora_name": "sql"}, "sql"),
        ({"lora_id": 0}, None),
        ({"lora_id": -1}, None),
        ({"lora_id": None}, None),
    ],
)
def test_a_lora_id_names_the_adapter_where_no_name_does(pair, fields, name):
    pair.ingest("a", stored([1], A, **fields))
    assert pair.tokens(A, lora_name=name) == {"a": 4}


def test_the_lora_name_in_front_of_the_extra_keys_is_not_one_of_them(pair):
    pair.ingest("a", stored([1, 2], A + B, lora_name="sql", extra_keys=[["sql", "image"], ["sql"]]))
    assert pair.tokens(A + B, lora_name="sql", extra_keys=[["image"]]) == {"a": 8}


def test_a_salt_in_the_extra_keys_is_the_salt_of_the_query(pair):
    pair.ingest("a", stored([1, 2], A + B, extra_keys=[["tenant"], None]))
    assert pair.tokens(A + B) == pair.tokens(A + B, cache_salt="other") == {}
    assert pair.tokens(A + B, cache_salt="tenant") == {"a": 8}


def test_a_salt_as_a_field_is_the_same_salt(pair):
    pair.ingest("a", stored([1], A, extra_keys=[["tenant"]]))
    pair.ingest("b", stored([1], A, cache_salt="tenant"))
    assert pair.tokens(A, cache_salt="tenant") == {"a": 4, "b": 4}


def test_a_salt_stands_on_the_first_block_only(pair):
    pair.ingest("a", stored([1], A, cache_salt="tenant"), stored([2], B, parent=1, cache_salt="tenant"))
    assert pair.tokens(A + B, cache_salt="tenant") == {"a": 8}


def test_a_salt_stands_after_the_images_and_before_the_digests(pair):
    keys = [["image", 3], "tenant", b"\x01\x02"]
    pair.ingest("a", stored([1], A, extra_keys=[keys]))
    assert pair.tokens(A, cache_salt="tenant", extra_keys=[[("image", 3), b"\x01\x02"]]) == {"a": 4}
    assert pair.tokens(A, cache_salt="tenant", extra_keys=[[b"\x01\x02", ("image", 3)]]) == {}


def test_a_list_from_the_wire_is_a_tuple_from_python(pair):
    pair.ingest("a", stored([1], A, extra_keys=[[["image", -2], 7, b"x", None]]))
    assert pair.tokens(A, extra_keys=[(("image", -2), 7, b"x", None)]) == {"a": 4}
    assert pair.tokens(A, extra_keys=[[["image", -2], 7, "x", None]]) == {}
    assert pair.tokens(A, extra_keys=[[["image", 2], 7, b"x", None]]) == {}


def test_missing_and_empty_entries_are_none(pair):
    pair.ingest("a", stored([1, 2], A + B, extra_keys=[[]]))
    assert pair.tokens(A + B) == pair.tokens(A + B, extra_keys=[None, []]) == {"a": 8}


# ------------------------------------------------------------------------------------------------------ hybrid hits


@pytest.mark.parametrize("window", [17, 64, 100, 192, 256, 1024])
def test_a_sliding_window_needs_its_last_blocks_only(window):
    pair = Pair(16)
    hashes, tokens = chain(80, 16)
    need = -(-(window - 1) // 16)
    pair.ingest("a", stored(hashes, tokens, size=16, **FULL))
    pair.ingest("a", stored(hashes[:70], tokens[:1120], size=16, **sliding(window)))
    assert pair.tokens(tokens) == {"a": 70 * 16}
    # Blocks before the window may go, even some of the first `need` blocks, which short prompts need.
    pair.ingest("a", removed(*hashes[: 70 - need], group_idx=1))
    assert pair.tokens(tokens) == {"a": 70 * 16}
    assert pair.tokens(tokens[: 69 * 16]) == {}
    pair.ingest("a", removed(hashes[70 - need], group_idx=1))
    assert pair.tokens(tokens) == {}
    pair.ingest("a", removed(*hashes[71 - need : 70], group_idx=1))
    # The window may be anywhere. A short prompt needs all of its blocks.
    pair.ingest("a", stored(hashes[:need], tokens[: need * 16], size=16, **sliding(window)))
    assert pair.tokens(tokens) == {"a": need * 16}


def test_a_window_of_one_token_needs_a_block_as_in_vllm(pair):
    pair.ingest("a", stored([1, 2], A + B, **FULL), stored([1], A, **sliding(1)))
    assert pair.tokens(A + B) == {"a": 4}


def test_full_attention_in_a_hybrid_model_needs_every_block(pair):
    hashes, tokens = chain(10)
    pair.ingest("a", stored(hashes, tokens, **FULL), stored(hashes, tokens, **sliding(9)))
    pair.ingest("a", removed(hashes[6], group_idx=0))
    assert pair.tokens(tokens) == {"a": 24}


def test_groups_shrink_the_hit_until_none_objects(pair):
    hashes, tokens = chain(12)
    pair.ingest(
        "a",
        stored(hashes, tokens, **FULL),
        stored(hashes, tokens, **sliding(9, 1)),
        stored([hashes[3], hashes[8]], tokens, group_idx=2, kv_cache_spec_kind="mamba"),
    )
    assert pair.tokens(tokens) == {"a": 36}
    pair.ingest("a", removed(hashes[7], group_idx=1))
    assert pair.tokens(tokens) == {"a": 16}
    pair.ingest("a", removed(hashes[2], group_idx=1))
    assert pair.tokens(tokens) == {}


def test_a_mamba_group_needs_the_state_of_the_last_block_alone(pair):
    hashes, tokens = chain(6)
    pair.ingest("a", stored(hashes, tokens, **FULL))
    pair.ingest("a", stored([hashes[4]], tokens, group_idx=1, kv_cache_spec_kind="mamba"))
    assert pair.tokens(tokens) == {"a": 20}
    assert pair.tokens(tokens[:16]) == {}


def test_a_group_counts_from_its_first_event_even_if_that_has_no_hash(pair):
    pair.ingest("a", stored([1, 2], A + B, **FULL))
    assert pair.tokens(A + B) == {"a": 8}
    pair.ingest("a", stored([], A + B, **sliding(9)))
    assert pair.tokens(A + B) == {}


def test_a_chunked_local_group_needs_its_last_chunk(pair):
    hashes, tokens = chain(9)
    pair.do("configure_pod", "a", chunk_size=16)
    pair.ingest("a", stored(hashes, tokens, **FULL))
    pair.ingest("a", stored(hashes, tokens, group_idx=1, kv_cache_spec_kind="chunked_local_attention"))
    pair.ingest("a", removed(*hashes[:4], group_idx=1))
    assert pair.tokens(tokens) == {"a": 36}
    pair.ingest("a", removed(hashes[5], group_idx=1))
    assert pair.tokens(tokens) == {"a": 36}  # the chunk starts at block 8
    assert pair.tokens(tokens[:32]) == {"a": 32}  # a whole number of chunks needs no block
    assert pair.tokens(tokens[:28]) == {"a": 20}  # blocks 4 to 6 are needed, and 5 is gone
    assert pair.state("a") == "exact"


def test_a_chunked_local_group_without_a_chunk_size_degrades_its_worker(pair):
    pair.ingest("a", stored([1, 2], A + B, group_idx=1, kv_cache_spec_kind="chunked_local_attention"))
    assert pair.state("a") == "degraded"
    assert pair.tokens(A + B) == {"a": 8}


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention", "what_comes_next", None])
def test_every_other_kind_needs_every_block(pair, kind):
    pair.ingest("a", stored([1, 2, 3], A + B + C, group_idx=0, kv_cache_spec_kind=kind), removed(2, group_idx=0))
    assert pair.tokens(A + B + C) == {"a": 4}


def test_the_groups_are_forgotten_by_a_clear(pair):
    pair.ingest("a", stored([1], A, **FULL), stored([1], A, **sliding(5)), cleared(), stored([1], A))
    assert pair.tokens(A) == {"a": 4}


def test_no_medium_alone_gives_more_than_all_together(pair):
    hashes, tokens = chain(6)
    pair.ingest(
        "a",
        stored(hashes[:4], tokens[:16], **FULL),
        stored(hashes, tokens, medium="CPU", **sliding(9)),
        stored(hashes[:2], tokens[:8], group_idx=2, kv_cache_spec_kind="mamba"),
    )
    assert pair.ask(tokens)["a"] == {"tokens": 8, "ranks": {0: 8}, "media": {"GPU": 8, "CPU": 8}}


# ----------------------------------------------------------------------------------------------------------- states


def test_the_worst_state_of_a_pods_ranks_is_the_pods(pair):
    pair.ingest("a", stored([1], A), rank=0)
    pair.ingest("a", stored([2], B, parent=1), rank=1)
    assert pair.state("a") == "degraded"
    assert pair.index.worker_stats("a")[0]["state"] == "exact"
    assert pair.index.worker_stats("a")[1]["state"] == "degraded"


def test_the_streams_state_and_the_indexs_own_are_kept_apart(pair):
    pair.ingest("a", stored([2], B, parent=1))
    pair.do("mark_worker", "a", 0, "stale")
    assert pair.state("a") == "stale"
    pair.do("mark_worker", "a", 0, "exact")
    assert pair.state("a") == "degraded"
    pair.do("mark_worker", "a", 3, "degraded")
    pair.do("clear_worker", "a", 0)
    assert pair.state("a") == "degraded"


def test_every_answer_says_how_far_it_can_be_trusted(pair):
    pair.ingest("a", stored([1], A))
    pair.ingest("b", stored([1], A), stored([3], C, parent=2))
    match = pair.index.match_prefix(A)
    assert (match["a"].state, match["b"].state) == ("exact", "degraded")
    assert pair.index.match_prefix(A, only_exact=True).tokens == {"a": 4}


def test_an_undecodable_payload_degrades_an_existing_worker(pair):
    pair.ingest("a", stored([1], A))
    for it, error in ((pair.index, kvindex.EventDecodeError), (pair.model, NotABatch)):
        with pytest.raises(error):
            it.ingest("a", b"\xc1")
    assert pair.state("a") == pair.model.pod_state("a") == "degraded"
    assert pair.tokens(A) == {"a": 4}
    pair.ingest("a", cleared())
    assert pair.state("a") == "exact"


def test_a_clear_of_some_media_is_no_clean_start(pair):
    pair.do("configure_pod", "a", chunk_size=None, clear_media={"GPU"})
    pair.ingest("a", stored([1, 1], A + A), cleared())
    assert pair.state("a") == "degraded"
    pair.do("clear_worker", "a", 0)
    assert pair.state("a") == "exact"


# ---------------------------------------------------------------------------------------------- speculative entries


def test_an_added_prefix_counts_until_it_expires(pair):
    now = 1e9
    pair.do("add_prefix", "a", A + B + C[:2], ttl=2.0, now=now)
    assert pair.ask(A + B + C) == {"a": {"tokens": 8, "ranks": {0: 8}, "media": {"GPU": 8}}}
    assert pair.tokens(A + C) == {"a": 4}
    pair.index._expire(now + 1.9)
    assert pair.tokens(A + B) == {"a": 8}
    pair.index._expire(now + 2.0)
    pair.model.expire(now + 2.0)
    assert pair.tokens(A + B) == {}
    assert pair.index.stats()["blocks"] == 0


def test_an_added_prefix_never_touches_what_events_said(pair):
    pair.ingest("a", stored([1], A))
    pair.do("add_prefix", "a", A + B, ttl=2.0, now=1e9)
    pair.ingest("a", removed(1))
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.ingest("a", removed(1))["reasons"] == {"unknown_hash": 1}
    pair.ingest("a", stored([1], A))
    pair.index._expire(2e9)
    pair.model.expire(2e9)
    assert pair.tokens(A + B) == {"a": 4}


@pytest.mark.parametrize("end", ["clear", "clear_gpu", "clear_worker", "remove_pod"])
def test_a_clear_ends_an_added_prefix(pair, end):
    if end == "clear_gpu":
        pair.do("configure_pod", "a", clear_media=["GPU"])
    pair.do("add_prefix", "a", A, ttl=2.0, now=1e9)
    if end.startswith("clear_w") or end == "remove_pod":
        pair.do(end, "a")
    else:
        pair.ingest("a", cleared())
    assert pair.tokens(A) == {}


def test_a_clear_of_another_medium_leaves_an_added_prefix(pair):
    pair.do("configure_pod", "a", clear_media=["CPU"])
    pair.do("add_prefix", "a", A, ttl=2.0, now=1e9)
    pair.ingest("a", cleared())
    assert pair.tokens(A) == {"a": 4}


def test_the_longer_lived_of_two_added_prefixes_stays(pair):
    pair.do("add_prefix", "a", A + B, ttl=9.0, now=1e9)
    pair.do("add_prefix", "a", A + B + C, ttl=1.0, now=1e9)
    pair.index._expire(1e9 + 5)
    pair.model.expire(1e9 + 5)
    assert pair.tokens(A + B + C) == {"a": 8}


def test_time_passes_by_the_indexs_own_clock():
    now = [100.0]
    index = kvindex.PrefixIndex(4, clock=lambda: now[0])
    index.add_prefix("a", A, ttl=2.0)
    assert index.match_prefix(A).tokens == {"a": 4}
    now[0] = 101.9
    assert index.match_prefix(A).tokens == {"a": 4}
    now[0] = 102.1
    assert index.match_prefix(A).tokens == {}


# -------------------------------------------------------------------------------------------- pods that come and go


def test_a_removed_pod_is_gone_with_everything(pair):
    pair.ingest("a", stored([1], A), stored([1], A, medium="CPU"), rank=2)
    pair.do("mark_worker", "a", 2, "stale")
    pair.do("remove_pod", "a")
    assert pair.tokens(A) == {}
    assert pair.index.stats()["blocks"] == 0
    for call in (pair.index.pod_state, pair.index.remove_pod):
        with pytest.raises(kvindex.UnknownPodError, match="'a'"):
            call("a")


def test_a_late_event_does_not_bring_a_removed_pods_blocks_back(pair):
    pair.ingest("a", stored([1, 2], A + B))
    pair.do("remove_pod", "a")
    pair.ingest("a", stored([3], C, parent=2))
    assert pair.tokens(A + B + C) == {}
    assert pair.state("a") == "degraded"


def test_a_restarted_engine_keeps_nothing(pair):
    pair.ingest("a", stored([1, 2], A + B), stored([1], A, medium="CPU"))
    pair.ingest("a", stored([1], A), rank=1)
    pair.do("clear_worker", "a", 0)
    assert pair.ask(A + B) == {"a": {"tokens": 4, "ranks": {1: 4}, "media": {"GPU": 4}}}


def test_ready_pods_limit_the_answer(pair):
    for pod in "abc":
        pair.ingest(pod, stored([1], A))
    ready = pair.index.pod_set(["b", "nobody"])
    for names in (ready, ["b", "nobody"], {"b"}, ("b",), iter(["b"])):
        assert pair.index.match_prefix(A, ready_pods=names).tokens == {"b": 4}
    assert pair.index.match_prefix(A, ready_pods=[]).tokens == {}
    pair.ingest("nobody", stored([1], A))
    assert pair.index.match_prefix(A, ready_pods=ready).tokens == {"b": 4, "nobody": 4}


def test_many_pods_hold_one_block(pair):
    pods = [f"pod-{i}" for i in range(300)]
    for i, pod in enumerate(pods):
        pair.ingest(pod, stored([1, 2], A + (B if i % 3 else C)))
    assert pair.tokens(A + B) == {pod: 8 if i % 3 else 4 for i, pod in enumerate(pods)}
    for pod in pods[:299]:
        pair.do("remove_pod", pod)
    assert pair.tokens(A + B) == {"pod-299": 8}


def test_percent_is_of_the_complete_blocks_and_floored(pair):
    pair.ingest("a", stored([1, 2], A + B))
    match = pair.index.match_prefix(A + B + C + [9])
    assert (match.blocks, match.percent) == (3, {"a": 66})


def test_the_best_pod_is_the_one_that_holds_most(pair):
    pair.ingest("a", stored([1], A))
    pair.ingest("b", stored([1, 2], A + B))
    assert pair.index.match_prefix(A + B).best() == ("b", 8)
    assert pair.index.match_prefix(C).best() is None


def test_memory_goes_back_when_the_blocks_go():
    index = kvindex.PrefixIndex(16)
    start = index.stats()["bytes"]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 2**32, (20, 16 * 500), dtype=np.uint32)
    hashes = rng.integers(0, 2**64, (20, 500), dtype=np.uint64)
    for pod in ("a", "b", "c"):
        for row in range(20):
            index.process_block_stored(
                kvindex.BlockStored(pod=pod, block_hashes=hashes[row], token_ids=tokens[row], block_size=16)
            )
    full = index.stats()
    assert full["blocks"] == 20 * 500
    for pod in ("a", "b", "c"):
        for i in rng.permutation(20 * 500).tolist():
            index.process_block_removed(kvindex.BlockRemoved(pod=pod, block_hashes=[int(hashes.flat[i])]))
    index._check()
    assert index.stats()["blocks"] == index.stats()["chains"] == 0
    assert index.stats()["bytes"] - start < (full["bytes"] - start) / 20
    for pod in ("a", "b", "c"):
        index.remove_pod(pod)
    assert index.stats()["bytes"] == start


def test_reports_and_answers_show_what_is_in_them():
    index = kvindex.PrefixIndex(4)
    report = index.ingest("a", payload(stored([1, 2], A + B), removed(2, 9), stored([5], C, parent=4)))
    assert repr(report) == (
        "IngestReport(stored=2, removed=1, cleared=0, parked=1, skipped=1, errors=0, reasons={'unknown_hash': 1})"
    )
    assert repr(index.match_prefix(A + B)) == "PrefixMatch({'a': 4})"


def test_an_index_whose_tables_are_larger_than_a_large_page_is_as_right_and_gives_everything_back():
    """From 2 MiB on, memory comes from the system instead of malloc, and moves when a table grows."""
    index = kvindex.PrefixIndex(1)
    start = index.stats()["bytes"]
    rng = np.random.default_rng(2)
    blocks = 600_000
    tokens = rng.integers(0, 2**32, blocks, dtype=np.uint32)
    hashes = rng.permutation(np.arange(1, blocks + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for pod in ("a", "b"):
        index.process_block_stored(kvindex.BlockStored(pod=pod, block_hashes=hashes, token_ids=tokens, block_size=1))
    assert index.stats()["bytes"] > blocks * 16  # at least a prefix hash and an engine hash
    index.process_block_removed(kvindex.BlockRemoved(pod="a", block_hashes=hashes[200_000:]))
    index._check()
    assert index.match_prefix(tokens).tokens == {"a": 200_000, "b": 600_000}
    fork = tokens.copy()
    fork[-1] ^= 1
    assert index.match_prefix(fork).tokens == {"a": 200_000, "b": 599_999}
    for pod in ("a", "b"):
        index.remove_pod(pod)
    assert (index.stats()["bytes"], index.stats()["blocks"]) == (start, 0)

"""Events of engines, tiers and connectors beyond the blocks of their own pool. The slow model checks each case too."""

from __future__ import annotations

import pytest
from support import Pair, cleared, payload, removed, stored

import kvindex

A, B, C, D = ([i] * 4 for i in (1, 2, 3, 4))  # the tokens of four blocks
CPU = {"medium": "CPU"}


@pytest.fixture
def pair() -> Pair:
    return Pair(4)


# ----------------------------------------------------------------------------------------------------------- clears


def test_a_clear_without_a_medium_leaves_doubt_where_another_medium_held_something(pair):
    pair.ingest("a", stored([1, 2], A + B), stored([1], (), size=0, **CPU))
    pair.ingest("a", cleared())
    assert (pair.tokens(A + B), pair.state("a")) == ({}, "degraded")
    pair.ingest("a", stored([1], A), cleared())
    assert pair.state("a") == "degraded"
    pair.do("clear_worker", "a")
    pair.ingest("a", stored([1], A))
    assert (pair.tokens(A), pair.state("a")) == ({"a": 4}, "exact")


def test_a_clear_leaves_no_doubt_where_the_other_medium_held_nothing(pair):
    pair.ingest("a", stored([1, 2], A + B), stored([1], (), size=0, **CPU), removed(1, **CPU), cleared())
    assert pair.state("a") == "exact"


def test_a_copy_that_waits_elsewhere_leaves_doubt_too(pair):
    pair.ingest("a", stored([1], A), stored([7], (), size=0, **CPU), cleared())
    assert (pair.parked("a"), pair.state("a")) == (0, "degraded")


@pytest.mark.parametrize(
    ("engine", "media", "state"),
    [
        ("sglang", ["CPU_PINNED"], "exact"),
        ("sglang", ["CPU", "cpu_tier1"], "exact"),
        ("sglang", ["CPU_PINNED", "DISK"], "degraded"),
        ("sglang", ["EXTERNAL"], "degraded"),
        ("vllm", ["CPU_PINNED"], "degraded"),
        ("trtllm", ["CPU"], "degraded"),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
def test_a_clear_of_sglang_is_of_the_host_pool_as_well(pair, engine, media, state, waits):
    """SGLang resets its tree and the host pool in one step. Its storage stays."""
    pair.do("configure_pod", "a", engine=engine)
    pair.ingest("a", stored([1, 2], A + B), *(stored([7 if waits else 1], (), size=0, medium=m) for m in media))
    pair.ingest("a", cleared())
    assert (pair.tokens(A + B), pair.parked("a"), pair.state("a")) == ({}, 0, state)


def test_clear_media_says_what_a_clear_means(pair):
    pair.do("configure_pod", "a", clear_media={"GPU"})
    pair.ingest("a", stored([1, 2], A + B), stored([1], (), size=0, **CPU), cleared())
    assert (pair.ask(A + B)["a"]["media"], pair.state("a")) == ({"CPU": 4}, "exact")


@pytest.mark.parametrize("options", [{}, {"clear_media": {"GPU"}}, {"clear_media": {"CPU", "DISK"}}])
def test_a_clear_with_a_medium_clears_that(pair, options):
    pair.do("configure_pod", "a", **options)
    pair.ingest("a", stored([1, 2], A + B), stored([1, 2], (), size=0, **CPU), stored([1], (), size=0, medium="DISK"))
    assert pair.ingest("a", cleared(medium="cpu"))["cleared"] == 1
    assert pair.ask(A + B)["a"]["media"] == {"GPU": 8, "DISK": 4}
    pair.ingest("a", cleared(medium="Tape"))
    assert (pair.ask(A + B)["a"]["media"], pair.state("a")) == ({"GPU": 8, "DISK": 4}, "exact")


def test_a_clear_of_one_medium_is_no_clean_start():
    index = kvindex.PrefixIndex(4)
    index.ingest("a", payload(stored([1], A)), seq=5)
    index.ingest("a", payload(cleared(medium="CPU")), seq=6)
    assert not index.stream_places("a")[0].whole
    index.ingest("a", payload(cleared()), seq=7)
    assert index.stream_places("a")[0].whole


def test_the_doubt_is_in_a_snapshot(tmp_path):
    index = kvindex.PrefixIndex(4)
    index.ingest("a", payload(stored([1], A), stored([1], (), size=0, **CPU), cleared()))
    index.save(tmp_path / "index")
    again = kvindex.PrefixIndex.load(tmp_path / "index")
    again.mark_worker("a", 0, "exact")
    assert again.pod_state("a") == "degraded"


# ------------------------------------------------------------------------------------------------------ ignore_media


def test_an_ignored_medium_is_counted_and_changes_no_state(pair):
    pair.do("configure_pod", "a", ignore_media={"cpu", "Tape"})
    pair.ingest("a", stored([1, 2], A + B))
    report = pair.ingest(
        "a",
        stored([5, 6], C + D, parent=0, **CPU),  # would be parked if it were not ignored
        stored([8], [1, 2, "x", 4], **CPU),
        stored([9], A[:3], size=3, medium="tape"),
        removed(1, **CPU),
        cleared(medium="CPU"),
        {"type": "TierBlocksCleared", "medium": "CPU"},
    )
    assert report["reasons"] == {"ignored_medium": 6}
    assert (report["stored"], report["parked"], report["cleared"], report["errors"]) == (0, 0, 0, 0)
    assert (pair.ask(A + B)["a"]["media"], pair.state("a")) == ({"GPU": 8}, "exact")
    pair.ingest("a", removed(2), cleared())
    assert (pair.tokens(A), pair.state("a")) == ({}, "exact")


def test_of_a_medium_that_is_ignored_from_now_on_nothing_stays(pair):
    pair.ingest("a", stored([1, 2], A + B), stored([1, 2], (), size=0, **CPU), stored([7], (), size=0, **CPU))
    pair.ingest("a", removed(2))
    assert (pair.tokens(A + B), pair.state("a")) == ({"a": 8}, "degraded")
    pair.do("configure_pod", "a", ignore_media=["CPU"])
    assert (pair.tokens(A + B), pair.index.pod_state("a")) == ({"a": 4}, "exact")
    pair.do("configure_pod", "a", ignore_media=[])
    pair.ingest("a", stored([2], B, parent=1, **CPU))
    assert pair.tokens(A + B) == {"a": 8}


def test_ignored_media_are_in_a_snapshot(tmp_path):
    index = kvindex.PrefixIndex(4)
    index.configure_pod("a", ignore_media={"CPU"})
    index.save(tmp_path / "index")
    again = kvindex.PrefixIndex.load(tmp_path / "index")
    assert again.ingest("a", payload(stored([1], A, **CPU))).reasons == {"ignored_medium": 1}


@pytest.mark.parametrize("media", ["CPU", b"CPU", 5, [5]])
def test_ignored_media_are_names(media):
    with pytest.raises(kvindex.InvalidTypeError, match="ignore_media"):
        kvindex.PrefixIndex(4).configure_pod("a", ignore_media=media)


# ---------------------------------------------------------------------------------------------------------- LMCache


def test_one_token_too_many_masks_nothing(pair):
    # LMCache 0.5 slices [start : end + 1]: one hash, blocks of 8, 9 tokens.
    pair.ingest("a", stored([1, 2], A + B), stored([3, 4], C + D, parent=2))
    report = pair.ingest(
        "a", stored([901], [*A, *B, 3], size=8, **CPU), stored([902], [*C, *D, 9], size=8, parent=901, **CPU)
    )
    assert (report["stored"], report["parked"]) == (2, 0)
    assert (pair.ask(A + B + C + D)["a"]["media"], pair.state("a")) == ({"GPU": 16, "CPU": 16}, "exact")


def test_tokens_of_whole_blocks_still_mask(pair):
    pair.ingest("a", stored([1, 2], A + B))
    report = pair.ingest("a", stored([2], A + B, group_idx=1, kv_cache_spec_kind="mamba"))
    assert (report["stored"], pair.state("a")) == (1, "exact")


@pytest.mark.parametrize(
    "tail",
    [
        stored([905], C[:3], parent=901, size=3, **CPU),
        stored([905], [*C, 5], parent=901, size=5, **CPU),
        stored([905], C[:3], parent=901, size=8, **CPU),
    ],
)
def test_an_unfinished_chunk_is_partial(pair, tail):
    pair.ingest("a", stored([1, 2], A + B), stored([901], [*A, *B, 3], size=8, **CPU))
    assert pair.ingest("a", tail)["reasons"] == {"partial_block": 1}
    assert (pair.tokens(A + B), pair.state("a")) == ({"a": 8}, "exact")


# ----------------------------------------------------------------------------------------------------- other events


@pytest.mark.parametrize(
    "event", [{"type": "TierBlocksCleared", "medium": "GPU"}, ["BlockMoved", [1]], {"hashes": [1]}, 5, []]
)
def test_an_event_that_is_not_known_degrades(pair, event):
    pair.ingest("a", stored([1], A))
    pair.ingest("a", event)
    assert pair.state("a") == "degraded"
    pair.ingest("b", event)
    assert pair.state("b") == "exact"  # an empty pod has nothing to lose
    pair.ingest("a", cleared())
    assert pair.state("a") == "exact"


def test_of_many_that_are_not_known_none_is_missed(pair):
    pair.ingest("a", stored([1], A), *[["BlockMoved", [n]] for n in range(16)], cleared(), stored([1], A), 5)
    assert pair.ingest("a", *[5, ["BlockMoved"]] * 40)["reasons"] == {"bad_event": 40, "unknown_event": 40}
    assert pair.state("a") == "degraded"


def test_kinds_that_are_not_known_are_named():
    from kvindex.events import unknown_kinds

    events = [stored([1], A), {"type": "TierBlocksCleared"}, ["BlockMoved", [1]], {"hashes": [1]}, removed(1)]
    assert unknown_kinds(payload(*events)) == ["'TierBlocksCleared'", "'BlockMoved'", "without a name"]


# --------------------------------------------------------------------------------------------- copies that are left


def test_the_count_that_stays_is_the_count(pair):
    for _ in range(3):
        pair.ingest("a", stored([1, 2], A + B))
    pair.ingest("a", removed(2, remaining_copy_counts=[1]))
    assert pair.tokens(A + B) == {"a": 8}
    pair.ingest("a", removed(1, 2, remaining_copy_counts=[4, 0]))
    assert pair.tokens(A + B) == {"a": 4}
    for _ in range(3):
        pair.ingest("a", removed(1))
    assert pair.tokens(A + B) == {"a": 4}
    pair.ingest("a", removed(1))
    assert pair.tokens(A + B) == {}


def test_one_removal_of_the_last_copy_takes_all(pair):
    pair.ingest("a", stored([1], A), stored([1], A), stored([1], (), size=0, **CPU))
    assert pair.ingest("a", removed(1, remaining_copy_counts=[0]))["removed"] == 1
    assert pair.ask(A)["a"]["media"] == {"CPU": 4}


def test_what_waits_is_left_too(pair):
    pair.ingest("a", *[stored([7], (), size=0, **CPU)] * 3)
    pair.ingest("a", removed(7, **CPU, remaining_copy_counts=[1]))
    assert pair.parked("a") == 1
    pair.ingest("a", removed(7, **CPU, remaining_copy_counts=[0]))
    assert (pair.parked("a"), pair.state("a")) == (0, "exact")


def test_where_copies_do_not_count_any_that_stay_are_one(pair):
    pair.do("configure_pod", "a", presence="set")
    pair.ingest("a", stored([1], A))
    pair.ingest("a", removed(1, remaining_copy_counts=[5]))
    assert pair.tokens(A) == {"a": 4}
    pair.ingest("a", removed(1))
    assert pair.tokens(A) == {}


@pytest.mark.parametrize("counts", [[1], [1, 2, 3], [1, -1], [1, "2"], [1, None], 1, "ab", {}])
def test_counts_that_are_none_degrade(pair, counts):
    pair.ingest("a", stored([1, 2], A + B))
    assert pair.ingest("a", removed(1, 2, remaining_copy_counts=counts))["reasons"] == {"bad_event": 1}
    assert (pair.tokens(A + B), pair.state("a")) == ({"a": 8}, "degraded")


def test_counts_of_any_size_are_taken_at_once(pair):
    pair.ingest("a", stored([1], A))
    pair.index.ingest("a", payload(removed(1, remaining_copy_counts=[2**64 - 1])))
    pair.index.ingest("a", payload(removed(1, remaining_copy_counts=[0])))
    assert pair.index.match_prefix(A).tokens == {}
    pair.index._check()


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        ([1], kvindex.InvalidValueError),
        ([1, -2], kvindex.InvalidValueError),
        ("ab", kvindex.InvalidTypeError),
        (5, kvindex.InvalidTypeError),
    ],
)
def test_counts_of_an_object_are_looked_at(counts, error):
    index = kvindex.PrefixIndex(4)
    index.ingest("a", payload(stored([1, 2], A + B)))
    with pytest.raises(error, match="remaining_copy_counts"):
        index.process_block_removed(kvindex.BlockRemoved("a", block_hashes=[1, 2], remaining_copy_counts=counts))
    assert index.match_prefix(A + B).tokens == {"a": 8}


def test_a_decoded_event_has_what_only_maps_have():
    batch = kvindex.decode_batch(
        payload(removed(1, remaining_copy_counts=[2]), cleared(medium="CPU"), removed(1), cleared())
    )
    first, second, third, fourth = batch.events
    assert (first.remaining_copy_counts, second.medium, third.remaining_copy_counts, fourth.medium) == (
        [2],
        "CPU",
        None,
        None,
    )


# -------------------------------------------------------------------------------------------------- copies without keys

KEYS = [
    ({"cache_salt": "tenant-x"}, {"cache_salt": "tenant-x"}),
    ({"extra_keys": [None, ["img", 3], None]}, {"extra_keys": [None, ["img", 3], None]}),
    ({"lora_name": "L"}, {"lora_name": "L"}),
]


@pytest.mark.parametrize(("told", "asked"), KEYS, ids=["salt", "image", "adapter"])
@pytest.mark.parametrize("first", ["GPU", "CPU"])
@pytest.mark.parametrize("whole", [True, False], ids=["one event", "one event a block"])
def test_a_held_hash_means_one_content(pair, told, asked, first, whole):
    def events(medium, keys):
        if whole:
            return [stored([1, 2, 3], A + B + C, medium=medium, **keys)]
        return [
            stored([h], tokens, parent=h - 1 or None, medium=medium, **keys | {"extra_keys": entry})
            for h, tokens, entry in zip(
                (1, 2, 3), (A, B, C), ([e] for e in keys.get("extra_keys") or [None] * 3), strict=True
            )
        ]

    batches = [events("GPU", told), events("CPU", {})]
    for batch in batches if first == "GPU" else batches[::-1]:
        pair.ingest("a", *batch)
    plain = {"a": 4} if "extra_keys" in told else {}
    assert pair.ask(A + B + C, **asked)["a"]["media"] == {"GPU": 12, "CPU": 12}
    assert (pair.tokens(A + B + C), pair.state("a")) == (plain, "exact")
    pair.ingest("a", removed(1, 2, 3))
    assert pair.ask(A + B + C, **asked)["a"]["media"] == {"CPU": 12}
    assert pair.ingest("a", removed(1, 2, 3, **CPU))["removed"] == 3
    assert (pair.tokens(A + B + C, **asked), pair.state("a")) == ({}, "exact")


def test_what_follows_a_held_block_hangs_below_it(pair):
    # The tier has more blocks than the pool, because blocks 2 and 3 left the pool before the tier's event came.
    pair.ingest("a", stored([1], A, cache_salt="s"), stored([1, 2, 3], A + B + C, **CPU))
    assert pair.ask(A + B + C, cache_salt="s")["a"]["media"] == {"GPU": 4, "CPU": 12}
    assert (pair.tokens(A + B + C), pair.state("a")) == ({}, "exact")


def test_what_hangs_below_a_block_that_moves_is_in_doubt_until_it_is_told(pair):
    pair.ingest("a", stored([1, 2, 3], A + B + C, **CPU), stored([9], A))
    pair.ingest("a", stored([1], A, cache_salt="s"))
    assert pair.state("a") == "degraded"
    pair.ingest("a", stored([2], B, parent=1))
    assert pair.state("a") == "degraded"
    pair.ingest("a", stored([3], C, parent=2))
    assert pair.state("a") == "exact"
    assert pair.ask(A + B + C, cache_salt="s")["a"]["media"] == {"GPU": 12, "CPU": 12}
    assert pair.tokens(A + B + C) == {"a": 4}


def test_what_is_in_doubt_ends_with_its_removal(pair):
    pair.ingest("a", stored([1, 2], A + B, **CPU), stored([1], A, cache_salt="s"))
    assert pair.state("a") == "degraded"
    pair.ingest("a", removed(2, **CPU))
    assert pair.state("a") == "exact"


def test_copies_move_along_with_their_counts(pair):
    for _ in range(3):
        pair.ingest("a", stored([1], A, **CPU))
    pair.ingest("a", stored([1], A, cache_salt="s"))
    for left in (8, 8, 8):
        assert sum(pair.ask(A, cache_salt="s")["a"]["media"].values()) == left
        pair.ingest("a", removed(1, **CPU))
    assert pair.ask(A, cache_salt="s")["a"]["media"] == {"GPU": 4}


@pytest.mark.parametrize("medium", ["GPU", "CPU"])
def test_one_medium_with_two_contents_for_a_hash_degrades(pair, medium):
    pair.ingest("a", stored([1], A, medium=medium))
    report = pair.ingest("a", stored([1], B, medium=medium))
    assert (report["stored"], report["reasons"], pair.state("a")) == (0, {"hash_conflict": 1}, "degraded")
    assert pair.tokens(B if medium == "GPU" else A) == {"a": 4}


def test_a_hash_that_is_not_held_may_mean_something_new(pair):
    pair.ingest("a", stored([1, 2], A + B), removed(1))
    assert pair.ingest("a", stored([1], C, **CPU))["stored"] == 1
    assert (pair.tokens(C), pair.state("a")) == ({"a": 4}, "exact")


def test_groups_of_a_tier_follow_the_pool_that_has_gone(pair):
    full, window = (
        {"group_idx": 0},
        {"group_idx": 1, "kv_cache_spec_sliding_window": 4, "kv_cache_spec_kind": "sliding_window"},
    )
    pair.ingest("a", stored([1], A, cache_salt="s", **full), stored([1], A, cache_salt="s", **window))
    pair.ingest("a", stored([1], A, **full, **CPU), removed(1, **full), removed(1, group_idx=1))
    assert pair.ingest("a", stored([1], A, **window, **CPU))["stored"] == 1
    assert (pair.tokens(A, cache_salt="s"), pair.tokens(A), pair.state("a")) == ({"a": 4}, {}, "exact")


def test_orphans_of_a_tier_are_placed_by_what_is_held(pair):
    pair.ingest("a", stored([2, 3], B + C, parent=1, **CPU))
    pair.ingest("a", stored([1, 2], A + B, extra_keys=[["img"], ["img"]]))
    # The parked blocks were attached once their parent was known, and block 2 is the pool's.
    assert pair.tokens(A + B + C, extra_keys=[["img"], ["img"], None]) == {"a": 12}
    assert (pair.tokens(A + B + C), pair.state("a")) == ({}, "exact")


def test_a_snapshot_of_what_is_in_doubt_is_degraded(tmp_path):
    index = kvindex.PrefixIndex(4)
    index.ingest("a", payload(stored([1, 2], A + B, **CPU), stored([1], A, cache_salt="s")))
    index.save(tmp_path / "index")
    again = kvindex.PrefixIndex.load(tmp_path / "index")
    again.mark_worker("a", 0, "exact")
    assert again.pod_state("a") == "degraded"


def test_many_names_that_mean_something_else_cost_no_square():
    n = 20_000
    index = kvindex.PrefixIndex(1)
    index.ingest("a", payload(stored(range(1, n + 1), [7] * n, size=1, **CPU)))
    index.ingest("a", payload(stored(range(1, n + 1), [7] * n, size=1, extra_keys=[["img"]] * n)))
    assert index.match_prefix([7] * n, extra_keys=[["img"]] * n)["a"].media == {"GPU": n, "CPU": n}
    index.ingest("a", payload(stored(range(1, n + 1), [7] * n, size=1, **CPU)))
    assert (index.match_prefix([7] * n).tokens, index.pod_state("a")) == ({}, "exact")
    index._check()

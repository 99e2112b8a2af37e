"""Limits per pod, so that a single pod cannot fill the index."""

from __future__ import annotations

import random
import resource
import sys
from contextlib import suppress

import pytest
from support import cleared, payload, removed, stored

from kvindex import EventDecodeError, InvalidTypeError, InvalidValueError, PodSource, PrefixIndex


def tokens(*blocks: int) -> list[int]:
    return [token for block in blocks for token in range(block * 4, block * 4 + 4)]


@pytest.fixture
def index():
    index = PrefixIndex(block_size=4)
    index.configure_pod("a", max_blocks=4)
    return index


def test_what_is_over_the_limit_is_refused_and_said(index):
    assert index.ingest("a", payload(stored([1, 2, 3], tokens(1, 2, 3), size=4))).stored == 3
    report = index.ingest("a", payload(stored([4, 5], tokens(4, 5), parent=3, size=4)))
    assert (report.stored, report.skipped, report.reasons) == (0, 2, {"over_limit": 2})
    assert index.match_prefix(tokens(1, 2, 3, 4, 5)).tokens == {"a": 12}
    assert index.pod_state("a") == "degraded"
    index._check()


def test_room_that_is_given_back_may_be_taken_again(index):
    index.ingest("a", payload(stored([1, 2, 3, 4], tokens(1, 2, 3, 4), size=4)))
    assert index.pod_state("a") == "exact"
    index.ingest("a", payload(removed(4), stored([5], tokens(5), parent=3, size=4)))
    assert index.match_prefix(tokens(1, 2, 3, 5)).tokens == {"a": 16}
    assert index.pod_state("a") == "exact"
    index.ingest("a", payload(stored([6], tokens(6), parent=3, size=4), cleared()))
    index.ingest("a", payload(stored([1, 2, 3, 4], tokens(1, 2, 3, 4), size=4)))
    assert index.match_prefix(tokens(1, 2, 3, 4)).tokens == {"a": 16}
    assert index.pod_state("a") == "exact"


def test_ranks_media_and_groups_count_together(index):
    index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4)), dp_rank=0)
    index.ingest("a", payload(stored([1], tokens(1), size=4, medium="CPU")), dp_rank=1)
    report = index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4, group_idx=1)), dp_rank=1, model="other")
    assert report.reasons == {"over_limit": 2}


def test_other_pods_have_their_own(index):
    index.ingest("b", payload(stored(list(range(1, 41)), tokens(*range(1, 41)), size=4)))
    assert index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4))).stored == 2
    assert index.match_prefix(tokens(*range(1, 41))).tokens == {"a": 8, "b": 160}


def test_a_limit_can_be_changed_and_taken_away(index):
    index.configure_pod("a", max_blocks=1)
    assert index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4))).stored == 0
    index.configure_pod("a", presence="count")
    assert index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4))).stored == 0
    index.configure_pod("a", max_blocks=0)
    assert index.ingest("a", payload(stored([1, 2], tokens(1, 2), size=4))).stored == 2


def test_a_snapshot_keeps_the_limit(index, tmp_path):
    index.save(tmp_path / "index")
    index = PrefixIndex.load(tmp_path / "index")
    assert index.ingest("a", payload(stored([1, 2, 3, 4, 5], tokens(1, 2, 3, 4, 5), size=4))).stored == 0


def test_a_hostile_pod_stays_within_and_never_counts_for_more():
    """A limited index gets the same events as one without limits, and never answers more."""
    rng = random.Random(5)
    limited, free = PrefixIndex(block_size=4), PrefixIndex(block_size=4)
    limited.configure_pod("a", max_blocks=20)
    for _ in range(600):
        name, parent = rng.randrange(60), rng.choice([None, *range(60)])
        if rng.random() < 0.3:
            event = removed(name)
        else:
            count = rng.randrange(1, 5)
            hashes = [(name + step) % 60 for step in range(count)]
            event = stored(hashes, tokens(*[h % 7 for h in hashes]), parent=parent, size=4)
        for index in (limited, free):
            index.ingest("a", payload(event))
        stats = limited.worker_stats("a")[0]
        assert stats["blocks"] + stats["parked"] <= 20
        prompt = tokens(*[rng.randrange(7) for _ in range(5)])
        told, most = (index.match_prefix(prompt).tokens.get("a", 0) for index in (limited, free))
        assert told <= most
        if limited.pod_state("a") == "exact":
            assert told == most
    limited._check()
    assert limited.stats()["skipped_reasons"]["over_limit"] > 0


@pytest.mark.parametrize(
    ("value", "error"), [(-1, InvalidValueError), (1.5, InvalidTypeError), ("9", InvalidTypeError)]
)
def test_a_limit_that_is_none_is_refused(value, error):
    with pytest.raises(error, match="max_blocks"):
        PrefixIndex().configure_pod("a", max_blocks=value)
    with pytest.raises(error, match="max_blocks of pod 'p'"):
        PodSource("p", endpoint="tcp://127.0.0.1:5557", max_blocks=value)


def test_a_pod_may_not_have_ranks_without_end():
    """A look-up of a worker walks all workers of its pod: 50,000 of them took 15 seconds."""
    index = PrefixIndex(block_size=4)
    event = stored([1], tokens(1), size=4)
    for rank in range(1024):
        assert index.ingest("a", payload(event, rank=rank)).stored == 1
    assert index.pod_state("a") == "exact"
    for rank in range(1024, 1100):
        assert index.ingest("a", payload(event, rank=rank), seq=0).reasons == {"over_limit": 1}
    assert index.pod_state("a") == "degraded"
    # Existing ranks still work, removals of other ranks have no effect, and other pods have their own limit.
    assert index.ingest("a", payload(stored([2], tokens(2), parent=1, size=4), rank=1023)).stored == 1
    assert index.ingest("a", payload(removed(1), rank=1050)).reasons == {"unknown_hash": 1}
    index.add_prefix("a", tokens(1), ttl=1e6, dp_rank=2000)
    answer = index.match_prefix(tokens(1, 2))
    assert answer.tokens == {"a": 8}
    assert sorted(answer["a"].ranks) == list(range(1024))
    assert index.ingest("b", payload(event, rank=5000)).stored == 1
    assert index.pod_state("b") == "exact"
    index._check()
    index.remove_pod("a")
    assert index.ingest("a", payload(event, rank=1050)).stored == 1
    assert index.pod_state("a") == "exact"


@pytest.mark.parametrize("clear", ["event", "call"])
@pytest.mark.parametrize("media", [None, ["GPU"]])
def test_a_rank_that_found_no_room_is_forgiven_when_it_holds_nothing(clear, media):
    """Only clearing that very rank, in all media, restores the state.

    With several such ranks, their numbers are lost.
    """
    index = PrefixIndex(block_size=4)
    index.configure_pod("a", clear_media=media)

    def emptied(rank):
        if clear == "call":
            index.clear_worker("a", rank)
        else:
            index.ingest("a", payload(cleared(), rank=rank))
        index._check()
        return index.pod_state("a")

    for rank in range(1024):
        index.ingest("a", payload(stored([1], tokens(1), size=4), rank=rank))
    index.ingest("a", payload(stored([1], tokens(1), size=4), rank=1050))
    assert index.pod_state("a") == "degraded"
    assert emptied(5) == "degraded"
    assert emptied(1050) == ("degraded" if clear == "event" and media else "exact")
    for rank in (1050, 1051):
        index.ingest("a", payload(stored([1], tokens(1), size=4), rank=rank))
    assert [emptied(rank) for rank in (1050, 1051)] == ["degraded", "degraded"]
    index.remove_pod("a")
    index.ingest("a", payload(stored([1], tokens(1), size=4), rank=1050))
    assert index.pod_state("a") == "exact"


def test_names_that_had_one_place_in_the_tables_have_not():
    """If the mixing of names is public, a pod can choose names that make the table slow for all pods."""
    undo = pow(0x9E3779B97F4A7C15, -1, 1 << 64)  # the inverse of the multiplier: the upper half of the product is 7
    names = []
    for low in range(1, 4001):
        mixed = ((7 << 32 | low) * undo) % (1 << 64)
        names.append(mixed ^ mixed >> 32)
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(stored(names, tokens(*range(4000)), size=4)))
    assert index.worker_stats("a")[0]["blocks"] == 4000
    assert index._probes() < 10


# ---- groups, media and holders ---------------------------------------------------------------------------------------


def one(name: int, **where) -> dict:
    return stored([name], tokens(name), size=4, **where)


def test_a_worker_with_more_groups_than_engines_have_holds_nothing_until_it_is_cleared():
    """An unknown group restricts no answer, so the answers from the known groups would be too large."""
    index = PrefixIndex(block_size=4)
    assert index.ingest("a", payload(*[one(1, group_idx=group) for group in range(64)])).reasons == {}
    assert index.pod_state("a") == "exact"
    assert index.match_prefix(tokens(1)).tokens == {"a": 4}
    assert index.ingest("a", payload(one(1, group_idx=64), one(2))).reasons == {"over_limit": 2}
    assert index.pod_state("a") == "degraded"
    assert index.match_prefix(tokens(1)).tokens == {}
    assert index.stats()["blocks"] == 0
    index._check()
    index.ingest("a", payload(cleared(), one(1)))
    assert index.match_prefix(tokens(1)).tokens == {"a": 4}
    assert index.pod_state("a") == "exact"
    index._check()


def test_a_group_that_is_masked_counts_and_one_without_a_block_does_not():
    index = PrefixIndex(block_size=4)
    nothing = [stored([], (), size=4, group_idx=group, medium=f"m{group}") for group in range(100)]
    assert index.ingest("a", payload(*nothing)).reasons == {}
    assert index.worker_stats("a") == {}
    assert index.pod_state("a") == "exact"
    masked = [stored([], tokens(1), size=4, group_idx=group) for group in range(65)]
    assert index.ingest("a", payload(*masked)).reasons == {"over_limit": 1}
    assert index.pod_state("a") == "degraded"
    index._check()


def test_a_medium_too_many_is_refused_and_the_others_stay():
    index = PrefixIndex(block_size=4)
    assert index.ingest("a", payload(*[one(1, medium=f"m{medium}") for medium in range(32)])).reasons == {}
    assert index.pod_state("a") == "exact"
    assert index.ingest("a", payload(one(3, medium="m32"), one(2, medium="m0"))).reasons == {"over_limit": 1}
    assert index.ingest("a", payload(removed(3, medium="m32"))).reasons == {"unknown_hash": 1}
    match = index.match_prefix(tokens(1))
    assert match["a"].media == {f"m{medium}": 4 for medium in range(32)}
    assert index.match_prefix(tokens(2)).tokens == {"a": 4}
    assert index.pod_state("a") == "degraded"
    index._check()
    assert index.ingest("b", payload(one(1, medium="x" * 257))).reasons == {"over_limit": 1}
    assert index.ingest("c", payload(one(1, medium="x" * 256))).reasons == {}


def test_a_long_event_of_a_medium_too_many_takes_its_own_names_away_and_no_others():
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(*[one(1, medium=f"m{medium}") for medium in range(32)]))
    blocks = range(1000, 1600)
    report = index.ingest("a", payload(stored(list(blocks), tokens(*blocks), size=4, medium="m32")))
    assert (report.stored, report.reasons) == (0, {"over_limit": 600})
    assert index.match_prefix(tokens(1)).tokens == {"a": 4}
    assert index.match_prefix(tokens(*blocks)).tokens == {}
    index._check()


def test_a_medium_too_many_still_says_what_its_group_is():
    """Otherwise the group would restrict no answer."""
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(*[one(1, medium=f"m{medium}") for medium in range(32)]))
    report = index.ingest("a", payload(one(1, medium="m32", group_idx=1)))
    assert report.reasons == {"over_limit": 1}
    assert index.match_prefix(tokens(1)).tokens == {}


def test_holders_of_a_worker_and_of_a_pod_have_limits():
    index = PrefixIndex(block_size=1)

    def sizes(first, last):
        return payload(*[stored([size], [7] * size, size=size) for size in range(first, last)], rank=0)

    assert index.ingest("a", sizes(1, 257)).reasons == {}
    assert index.pod_state("a") == "exact"
    assert index.ingest("a", sizes(257, 260)).reasons == {"over_limit": 3}
    index._check()
    tiers = [(group, medium) for group in range(16) for medium in range(16)]
    events = [stored([1], [7], size=1, group_idx=group, medium=f"m{medium}") for group, medium in tiers]
    for rank in range(32):
        assert index.ingest("b", payload(*events, rank=rank)).reasons == {}
    assert index.ingest("b", payload(*events, rank=32)).reasons == {"over_limit": 256}
    assert index.ingest("c", payload(*events, rank=32)).reasons == {}
    index._check()
    index.clear_worker("b", 0)
    assert index.ingest("b", payload(*events, rank=33)).reasons == {}
    index._check()


def test_names_of_media_go_when_nobody_has_them():
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(one(1, medium="GPU")))

    def come_and_go():
        index.ingest("b", payload(*[removed(1, medium=f"m{medium}") for medium in range(1000)]))
        for medium in range(1000):
            index.ingest("b", payload(one(1, medium=f"m{medium}"), removed(1, medium=f"m{medium}"), cleared()))
        before = index.stats()["bytes"]
        index.ingest("b", payload(one(1, medium="n" * 256)))
        assert index.stats()["bytes"] > before + 512
        index.configure_pod("a", clear_media=["of nobody"])
        index.configure_pod("a", clear_media=["GPU"])
        index._check()
        index.remove_pod("b")
        index._check()
        return index.stats()["bytes"]

    assert come_and_go() == come_and_go()


def test_an_answer_that_names_a_medium_which_has_gone_names_no_other():
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(one(1, medium="tape"), one(1)))
    answer = index.match_prefix(tokens(1))
    index.ingest("a", payload(cleared(), one(1, medium="drum")))
    assert answer["a"].media == {"GPU": 4}
    assert index.match_prefix(tokens(1))["a"].media == {"drum": 4}


def test_a_block_has_so_many_names_and_what_is_beyond_them_is_said():
    index = PrefixIndex(block_size=4)
    report = index.ingest("a", payload(*[stored([name], tokens(1), size=4) for name in range(1, 600)]))
    assert report.stored + report.skipped == 599
    assert report.stored >= 256
    assert report.reasons == {"over_limit": report.skipped}
    assert index.pod_state("a") == "degraded"
    index._check()
    # Removing the last known name removes the block: an answer may be too small, but never too large.
    gone = index.ingest("a", payload(removed(*range(1, 600))))
    assert (gone.removed, gone.skipped) == (report.stored, report.skipped)
    assert index.match_prefix(tokens(1)).tokens == {}
    index._check()


def test_cancelled_blocks_that_wait_have_an_end():
    """Each is kept only for a block below it, so none of them counts as parked."""
    index = PrefixIndex(block_size=4, max_parked=4)
    skipped = 0
    for name in range(2, 8000):
        report = index.ingest("a", payload(one(name, parent=name - 1), removed(name - 1)))
        skipped += report.reasons.get("parked_full", 0)
    assert skipped > 0
    index._check()
    assert index.stats()["bytes"] < 8000 * 400
    index.ingest("a", payload(one(1)))
    index._check()
    assert index.pod_state("a") == "degraded"


@pytest.mark.parametrize("count", [2, 64, 511, 512, 513, 514, 3000])
def test_the_first_repeat_of_an_event_is_found_wherever_it_is(count):
    rng = random.Random(count)
    for _ in range(20):
        names = [rng.getrandbits(64) for _ in range(count)]
        for _ in range(rng.randrange(3)):
            names[rng.randrange(count)] = names[rng.randrange(count)]
        seen: set[int] = set()
        first = next((i for i, name in enumerate(names) if name in seen or seen.add(name)), count)
        report = PrefixIndex(block_size=1).ingest("a", payload(stored(names, range(count), size=1)))
        assert (report.stored, report.reasons.get("duplicate_hash", 0)) == (first, count - first)


def test_what_is_no_event_costs_a_counter():
    """Two million nils, in 1.9 MB, took 320 MB and kept them."""
    index = PrefixIndex(block_size=4, max_bytes=1 << 20)
    index.ingest("a", payload(one(1)))
    before, largest = index.stats()["bytes"], peak()
    count = 2_000_000
    for filler, reason in ((b"\xc0", "bad_event"), (b"\x90", "bad_event"), (b"\x80", "unknown_event")):
        data = b"\x93\xca\0\0\0\0\xdd" + count.to_bytes(4, "big") + filler * count + b"\xc0"
        assert index.ingest("a", data).reasons == {reason: count}
        with pytest.raises(EventDecodeError):
            index.ingest("a", data[:-1])
        assert index.stats()["bytes"] < before + 1024
    assert peak() - largest < 4 * count
    index._check()


def test_scratch_is_counted_and_given_back():
    names = list(range(1, 200_001))
    for data in (
        payload(stored(names, tokens(*names), size=4)),
        payload(stored(names, tokens(*names), size=4))[:-1],
        payload(removed(*names)),
        payload(stored([1], tokens(*names), size=4 * len(names))),
    ):
        index = PrefixIndex(block_size=4)
        index.ingest("a", payload(one(0)))
        empty = index.stats()["bytes"]
        with suppress(EventDecodeError):
            index.ingest("b", data)
        index._check()
        index.clear_worker("b", 0)
        assert index.stats()["bytes"] < empty + (2 << 20)
        index.remove_pod("a")
        index.remove_pod("b")
        assert index.stats()["bytes"] == PrefixIndex().stats()["bytes"]


def peak() -> int:
    """Return the peak memory of the process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Entries of other routers in any order, repeated or damaged: they change no state, and nothing grows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindex import BlockStored, PrefixIndex

pytest.importorskip("redis")

from kvindex.replication import ReplicationPolicy, hints
from kvindex.replication.entries import LogError
from kvindex.replication.hints import (
    SILENT,
    Begun,
    Finished,
    Held,
    Left,
    Open,
    Outbox,
    Peers,
    Prefilled,
    decode,
    encode,
)
from kvindex.replication.sharing import Sharing
from kvindex.routing import EndpointPicker

SETTINGS = 7
NAMES = st.sampled_from(["a", "b", "gone"])
IDS = st.integers(0, 5)
TTLS = st.sampled_from([0.0, 0.5, 3.0, 1e9])
ITEMS = st.one_of(
    st.builds(
        Held, NAMES, st.integers(0, 2), st.sampled_from(["m", "", "other"]), TTLS,
        st.lists(st.tuples(st.sampled_from([0, 0, 1, 3]), st.binary(max_size=64).map(lambda b: b[: len(b) // 8 * 8])),
                 max_size=2),
    ),
    st.builds(
        lambda id, pod, rank, prefill, more, ttl: Begun(id, pod, rank, prefill, prefill + more, ttl),
        IDS, NAMES, st.integers(0, 2), st.integers(0, 4096), st.integers(0, 4096), TTLS,
    ),
    st.builds(Prefilled, IDS),
    st.builds(Finished, IDS),
    st.builds(Open, st.none() | st.lists(IDS, max_size=4)),
    st.just(Left()),
)  # fmt: skip
WRITERS = st.sampled_from([bytes([n]) * 8 for n in range(3)])
ENTRIES = st.builds(encode, WRITERS, st.integers(0, 30), st.sampled_from([SETTINGS, 8]), st.lists(ITEMS, max_size=5))


@st.composite
def damaged(draw: Any) -> bytes:
    data = bytearray(draw(ENTRIES))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


STEPS = st.lists(
    st.tuples(st.one_of(ENTRIES, ENTRIES, damaged(), st.binary(max_size=30)), st.floats(-5, 30), st.floats(0, 2)),
    max_size=40,
)


def made() -> tuple[PrefixIndex, dict[str, Any]]:
    index = PrefixIndex(block_size=4)
    tokens = list(range(16))
    index.process_block_stored(
        BlockStored(pod="a", model="m", block_hashes=[1, 2, 3, 4], token_ids=tokens, block_size=4)
    )
    index.mark_worker("a", 0, "exact")
    index.mark_worker("a", 1, "exact")
    index.mark_worker("b", 0, "degraded")
    return index, verdicts(index)


def verdicts(index: PrefixIndex) -> dict[str, Any]:
    return {
        "pods": index.pods(),
        "ranks": {
            pod: {rank: (stats["state"], stats["blocks"]) for rank, stats in index.worker_stats(pod).items()}
            for pod in index.pods()
        },
    }


def sharing(index: PrefixIndex) -> Sharing:
    made = Sharing("redis://127.0.0.1:1", "t", ReplicationPolicy(), index)
    made._peers = Peers(b"ourselfs", SETTINGS)
    return made


@given(STEPS)
@settings(deadline=None)
def test_no_entry_changes_a_verdict_and_all_that_it_brings_ends(steps: list[Any]) -> None:
    index, before = made()
    share = sharing(index)
    picker = EndpointPicker(index, speculative_ttl=0)
    share.join(picker)
    now = 100.0
    for data, age, pause in steps:
        now += pause
        share._carry(share._peers.take(data, age, now))
        share._carry(share._peers.tick(now))
        after = verdicts(index)
        assert after["pods"] == before["pods"]
        for pod, ranks in before["ranks"].items():
            # The first prompt may create the worker of a followed rank.
            assert after["ranks"][pod].keys() == ranks.keys()
            assert {rank: each[0] for rank, each in after["ranks"][pod].items()} == {
                rank: each[0] for rank, each in ranks.items()
            }
        stats = picker.stats()
        assert stats["others"] == sum(row["requests"] for row in stats["workers"].values())
        assert stats["others"] <= share._peers.requests <= 3 * 6
    index._check()
    assert index.match_prefix(list(range(16)), model="m", only_exact=True).tokens["a"] == 16
    share._carry(share._peers.tick(now + SILENT + 31))
    assert share._peers.routers == share._peers.requests == 0
    assert picker.stats()["others"] == 0
    assert not any(any(row.values()) for row in picker.stats()["workers"].values())
    index._expire(index._clock() + 61)
    assert index.stats()["guesses"] == 0
    assert verdicts(index)["pods"] == before["pods"]
    index._check()


def items_of(data: bytes) -> list[Any]:
    try:
        return decode(data)[3]
    except LogError:
        return []


@given(STEPS)
@settings(deadline=None)
def test_each_request_has_one_beginning_and_one_end(steps: list[Any]) -> None:
    peers, now, open_ = Peers(b"ourselfs", SETTINGS), 100.0, Counter[Any]()
    for data, age, pause in steps:
        now += pause
        effects = peers.take(data, age, now)
        # Repeating the entry has no effect, unless its router has left and was removed.
        if not any(isinstance(each, Left) for each in items_of(data)):
            assert peers.take(data, age, now) == []
        for key, item in [*effects, *peers.tick(now)]:
            if isinstance(item, Begun):
                open_[key] += 1
            elif isinstance(item, Finished):
                open_[key] -= 1
            assert open_[key] in (0, 1)
        assert sum(open_.values()) == peers.requests
    for key, _ in peers.leave():
        open_[key] -= 1
    assert not any(open_.values())


KEYS = st.fixed_dictionaries(
    {
        "lora_name": st.none() | st.just("sql"),
        "cache_salt": st.none() | st.just("tenant"),
        "extra_keys": st.none() | st.just([None, ["image"], None]),
    }
)


@given(st.lists(st.integers(0, 3), max_size=40), KEYS, st.sampled_from([0, 1, 3]), st.integers(0, 2**32))
@settings(deadline=None)
def test_another_index_answers_as_the_one_that_added_the_prefix(
    tokens: list[int], keys: dict[str, Any], ahead: int, seed: int
) -> None:
    indexes = [PrefixIndex(block_size=4, hash_seed=seed) for _ in range(2)]
    for index in indexes:
        index.process_block_stored(
            BlockStored(
                pod="a", model="m", block_hashes=[1], token_ids=[9] * 4, block_size=4,
                lookahead_token_ids=[[9] * ahead] if ahead else None,
            )
        )  # fmt: skip
    first, second = indexes
    share = sharing(first)
    first._sharing = share
    first.add_prefix("a", tokens, ttl=50.0, model="m", **keys)
    items = share._outbox.take(0.0)
    assert all(isinstance(item, Held) and len(item.paths) == 1 for item in items)
    other = sharing(second)
    other._carry(other._peers.take(encode(share._writer, 0, SETTINGS, items), 0.1, 100.0))
    assert not other.status().refused
    for end in range(len(tokens) + 1):
        answers = [index.match_prefix(tokens[:end], model="m", **keys).tokens for index in indexes]
        assert answers[0] == answers[1]
    second._check()


def test_no_token_leaves_the_process() -> None:
    index = PrefixIndex(block_size=4)
    index.mark_worker("a", 0, "exact")
    share = index._sharing = sharing(index)
    tokens = [70_001 + each for each in range(8)]
    index.add_prefix("a", tokens, ttl=2.0)
    data = encode(share._writer, 0, SETTINGS, share._outbox.take(0.0))
    assert len(data) < 100
    assert not any(each.to_bytes(4, order) in data for each in tokens for order in ("little", "big"))


def test_a_late_entry_has_the_time_that_is_left_and_an_old_one_none() -> None:
    index = PrefixIndex(block_size=4, clock=lambda: 1000.0)
    index.mark_worker("a", 0, "exact")
    share = sharing(index)
    path = np.arange(1, 3, dtype=np.uint64).tobytes()
    for number, (ttl, age, until) in enumerate([(2.0, 0.5, 1001.5), (2.0, -9.0, 1002.0), (1e9, 0.0, 1060.0)]):
        share._carry(
            share._peers.take(encode(b"another!", number, SETTINGS, [Held("a", 0, "", ttl, [(0, path)])]), age, 0.0)
        )
        assert index.stats()["guesses"] == 1
        index._expire(until - 0.01)
        assert index.stats()["guesses"] == 1
        index._expire(until)
        assert index.stats()["guesses"] == 0
    share._carry(share._peers.take(encode(b"another!", 9, SETTINGS, [Held("a", 0, "", 2.0, [(0, path)])]), 2.0, 0.0))
    assert index.stats()["guesses"] == 0
    share._carry(share._peers.take(encode(b"another!", 10, SETTINGS, [Begun(1, "a", 0, 8, 8, 60.0)]), SILENT, 0.0))
    assert share.status().refused == {"late": 2}


def test_what_is_refused_is_named() -> None:
    index, _ = made()
    share = sharing(index)
    share.join(EndpointPicker(index))
    path = [(0, bytes(8))]
    for number, items in enumerate(
        (
            [Held("gone", 0, "m", 2.0, path)],
            [Held("a", 7, "m", 2.0, path)],
            [Held("a", 0, "other", 2.0, path)],
            [Held("a", 0, "m", 2.0, [(3, bytes(8))])],
            [Begun(1, "gone", 0, 8, 8, 60.0)],
        )
    ):
        share._carry(share._peers.take(encode(b"another!", number, SETTINGS, items), 0.0, 0.0))
    newer = bytes((hints.VERSION + 1,)) + encode(b"another!", 9, SETTINGS, [Left()])[1:]
    for data in (newer, b"", b"\x01x", encode(b"another!", 3, SETTINGS, [])):
        share._carry(share._peers.take(data, 0.0, 0.0))
    share._carry(share._peers.take(encode(b"another!", 20, 8, [Held("a", 0, "m", 2.0, path)]), 0.0, 0.0))
    assert share.status().refused == {
        "unknown_pod": 1, "unknown_worker": 4, "version": 1, "damaged": 2, "repeated": 1, "settings": 1,
    }  # fmt: skip
    assert index.stats()["guesses"] == 0
    assert index.pods().keys() == {"a", "b"}


@pytest.mark.parametrize(
    "item",
    [
        Begun(1, "a", 0, 9, 8, 60.0), Begun(1, "a", 0, 8, 1 << 40, 60.0), Begun(-1, "a", 0, 8, 8, 60.0),
        Begun(1, "a", -1, 8, 8, 60.0), Begun(1, "a", 0, 8, 8, float("nan")), Begun(True, "a", 0, 8, 8, 60.0),
        Begun(1, None, 0, 8, 8, 60.0), Held("a", 0, "m", 2.0, [(0, bytes(7))]), Held("a", 0, "m", 2.0, [(-1, b"")]),
        Held("a", 0, None, 2.0, []), Held("a", 0, "m", 2.0, [(0, bytes(8 * hints.BLOCKS + 8))]), Open([-1]), Open(3),
        Finished("1"), Prefilled(1.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_damage(item: Any) -> None:
    with pytest.raises(hints.LogError, match="damaged"):
        decode(encode(b"another!", 0, SETTINGS, [item]))


def test_fields_and_items_of_later_versions_are_skipped() -> None:
    import msgpack

    data = encode(b"another!", 0, SETTINGS, [])
    head = msgpack.unpackb(data[1:])
    head[3] = [[4, 1, "more"], [77, "new"], [6]]
    assert decode(data[:1] + msgpack.packb([*head, "more"]))[3] == [Finished(1), Left()]


def test_a_lost_end_is_made_up_for_by_the_list_of_those_that_are_open() -> None:
    peers = Peers(b"ourselfs", SETTINGS)
    begun = [Begun(id, "a", 0, 8, 8, 600.0) for id in range(3)]
    assert len(peers.take(encode(b"another!", 0, SETTINGS, begun), 0.0, 0.0)) == 3
    ended = peers.take(encode(b"another!", 5, SETTINGS, [Open([1, 99])]), 0.0, 5.0)
    assert {key[1] for key, _ in ended} == {0, 2}
    assert peers.take(encode(b"another!", 6, SETTINGS, [Open(None)]), 0.0, 10.0) == []
    assert peers.requests == 1


def test_requests_of_a_router_that_is_silent_end() -> None:
    peers = Peers(b"ourselfs", SETTINGS)
    peers.take(encode(b"another!", 0, SETTINGS, [Begun(1, "a", 0, 8, 8, 600.0)]), 0.0, 0.0)
    assert peers.tick(SILENT - 0.1) == []
    assert [type(item) for _, item in peers.tick(SILENT + 1)] == [Finished]


def test_bounds_of_what_others_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "_MOST_OPEN", 4)
    monkeypatch.setattr(hints, "_MOST_HELD", 4)
    monkeypatch.setattr(hints, "_MOST_WRITERS", 4)
    peers = Peers(b"ourselfs", SETTINGS)
    blocks = 0
    for number in range(40):
        writer = bytes([number % 7]) * 8
        items = [Begun(number, "a", 0, 8, 8, 600.0), Held("a", 0, "m", 2.0, [(0, bytes(16))])]
        effects = peers.take(encode(writer, number, SETTINGS, items), 0.0, 0.0)
        blocks += sum(2 for _, item in effects if isinstance(item, Held))
        assert peers.requests <= 4
        assert peers.routers <= 4
    assert blocks == 4
    assert peers.refused["full"] > 40


def test_the_outbox_drops_the_oldest_and_what_is_over() -> None:
    outbox = Outbox(most=3, entry=100)
    for id in range(5):
        outbox.put(Finished(id), 0.0)
    assert (outbox.dropped, outbox.take(0.0)) == (2, [Finished(2), Finished(3), Finished(4)])
    outbox.put(Held("a", 0, "m", 2.0, [(0, bytes(8))]), 0.0)
    outbox.put(Begun(1, "a", 0, 8, 8, 60.0), 1.0)
    assert outbox.take(2.0) == [Begun(1, "a", 0, 8, 8, 59.0)]
    for _ in range(3):
        outbox.put(Held("a", 0, "m", 2.0, [(0, bytes(80))]), 0.0)
    assert [len(outbox.take(0.5)) for _ in range(4)] == [1, 1, 1, 0]


def test_a_prefix_that_lasts_does_not_hold_the_budget_of_others() -> None:
    peers, now = Peers(b"ourselfs", SETTINGS), 100.0
    path = bytes(8 * 8192)
    most = hints._MOST_HELD // 8192
    peers.take(encode(b"another1", 0, SETTINGS, [Held("a", 0, "m", 60.0, [(0, path)])]), 0.0, now)
    for number in range(1, 4 * most):
        now += 2.0 / (most - 2)
        assert (
            len(peers.take(encode(b"another1", number, SETTINGS, [Held("a", 0, "m", 1.0, [(0, path)])]), 0.0, now)) == 1
        )
    assert peers.refused["full"] == 0


def test_a_picker_that_joins_late_counts_no_prefill_that_is_over() -> None:
    peers = Peers(b"ourselfs", SETTINGS)
    peers.take(encode(b"another1", 0, SETTINGS, [Begun(1, "a", 0, 40, 64, 60.0), Prefilled(1)]), 0.0, 100.0)
    (((_, id), begun),) = peers.open()
    assert (id, begun.prefill, begun.context) == (1, 0, 64)


def test_an_item_that_readers_refuse_is_dropped_alone() -> None:
    outbox = Outbox()
    outbox.put(Held("p" * 2000, 0, "m", 5.0, [(0, bytes(8))]), 100.0)
    outbox.put(Finished(1), 100.0)
    assert outbox.take(100.0) == [Finished(1)]
    assert outbox.dropped == 1


def test_prefixes_that_wait_are_bounded_in_bytes() -> None:
    outbox = Outbox()
    for number in range(5000):
        outbox.put(Held("a", 0, "m", 60.0, [(0, bytes(64))]), 100.0)
        outbox.put(Finished(number), 100.0)
    assert len(outbox) == 4096
    assert sum(type(each) is Held for _, each in outbox._items) <= 256

"""Similar events one after another in a batch: reading them together gives the same result as reading each alone."""

from __future__ import annotations

from itertools import product

import msgpack
import pytest
from support import COUNTS, as_array, cleared, payload, removed, report_of, stored

import kvindex

SIZE = 4
FIELDS = {"lora_id": None, "medium": "GPU", "lora_name": None}
FULL = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


def tokens(number: int, blocks: int = 1) -> range:
    return range(100 * number, 100 * number + SIZE * blocks)


def following(number: int, **more) -> dict:
    """Block ``number`` below block ``number - 1``, equal to its neighbours in every other field."""
    return stored([number], tokens(number), parent=number - 1, **{**FIELDS, **more})


# Events that may stand between an event and a similar one, or in its place.
BETWEEN = {
    "alike": following(2),
    "two blocks": stored([2, 20], tokens(2, 2), parent=1, **FIELDS),
    "no parent": stored([2], tokens(2), parent=None, **FIELDS),
    "an unknown parent": stored([2], tokens(2), parent=77, **FIELDS),
    "itself as parent": stored([2], tokens(2), parent=2, **FIELDS),
    "no tokens": stored([2], [], parent=1, **FIELDS),
    "no hashes": stored([], [], parent=1, **FIELDS),
    "a hash twice": stored([2, 2], tokens(2, 2), parent=1, **FIELDS),
    "hashes as bytes": stored([(2).to_bytes(32, "big")], tokens(2), parent=(1).to_bytes(32, "big"), **FIELDS),
    "a wrong hash": stored(["x"], tokens(2), parent=1, **FIELDS),
    "a wrong parent": stored([2], tokens(2), parent="x", **FIELDS),
    "a wrong token": stored([2], [1, 2, -3, 4], parent=1, **FIELDS),
    "a token that is none": stored([2], [1, 2, "x", 4], parent=1, **FIELDS),
    "another medium": following(2, medium="CPU"),
    "a wrong medium": following(2, medium=7),
    "an adapter": following(2, lora_id=3, lora_name="sql"),
    "a salt": following(2, cache_salt="mine"),
    "keys": following(2, extra_keys=[["img"]]),
    "another group": following(2, group_idx=1),
    "a window": following(2, group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8),
    "another block size": stored([2], tokens(2, 2), parent=1, size=2 * SIZE, **FIELDS),
    "a block size that does not fit": stored([2], tokens(2), parent=1, size=3, **FIELDS),
    "no block size": stored([2], tokens(2), parent=1, size=None, **FIELDS),
    "fields in another order": dict(reversed(following(2).items())),
    "removed": removed(1),
    "cleared": cleared(),
    "unknown": {"type": "Other", "block_hashes": [2]},
    "no event": 5,
}


def both(events: list, form) -> tuple[dict, dict]:
    """Return the results of an index that got all events at once and of one that got each event alone."""
    written = [form(event) if isinstance(event, dict) and "block_hashes" in event else event for event in events]
    written = [[event["type"]] if isinstance(event, dict) and form is as_array else event for event in written]
    found = []
    for batches in ([written], [[event] for event in written]):
        index = kvindex.PrefixIndex(SIZE)
        reports = [report_of(index.ingest("a", payload(*batch))) for batch in batches]
        index._check()
        reasons: dict[str, int] = {}
        for report in reports:
            for reason, times in report["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + times
        prompt = [token for number in range(1, 5) for token in tokens(number)]
        asked = [{}, {"lora_name": "sql"}, {"cache_salt": "mine"}, {"extra_keys": [None, ["img"], None, None]}]
        stats = index.stats()
        found.append(
            {
                "counts": {name: sum(report[name] for report in reports) for name in COUNTS},
                "reasons": reasons,
                "state": index.pod_state("a"),
                "workers": index.worker_stats("a"),
                "answers": [index.match_prefix(prompt, **how)["a"] for how in asked],
                "stats": {name: stats[name] for name in ("blocks", "chains", "sets", "holders", "parked")},
            }
        )
    return found[0], found[1]


# Only events in map form have field names.
FORMS = [(dict, name) for name in BETWEEN] + [
    (as_array, name) for name in BETWEEN if name not in ("unknown", "fields in another order")
]


@pytest.mark.parametrize(("form", "between"), FORMS)
@pytest.mark.parametrize("more", [{}, FULL], ids=["plain", "with a group"])
def test_a_batch_says_what_its_events_say_alone(between, more, form):
    different = BETWEEN[between]
    events = [following(number, **more) for number in range(1, 5)]
    events[0]["parent_block_hash"] = None
    for place in range(len(events) + 1):
        together, alone = both([*events[:place], different, *events[place:]], form)
        assert together == alone
        replaced = [*events[:place], different, *events[place + 1 :]]
        together, alone = both(replaced, form)
        assert together == alone


def test_pairs_of_what_differs():
    for one, other in product(BETWEEN.values(), repeat=2):
        together, alone = both([following(1), one, other, following(3)], dict)
        assert together == alone


def test_a_field_that_comes_twice_counts_as_it_came_last():
    def twice(number: int) -> bytes:
        event = following(number)
        pairs = b"".join(msgpack.packb(part) for item in event.items() for part in item)
        again = msgpack.packb("block_hashes") + msgpack.packb([number + 10])
        return bytes([0x80 | len(event) + 1]) + pairs + again

    index, alone = kvindex.PrefixIndex(SIZE), kvindex.PrefixIndex(SIZE)
    events = [twice(number) for number in (1, 2, 3)]
    index.ingest("a", b"\x92\x01\x93" + b"".join(events))
    for event in events:
        alone.ingest("a", b"\x92\x01\x91" + event)
    assert index.worker_stats("a") == alone.worker_stats("a")
    assert index.stats()["parked"] == alone.stats()["parked"] == 3


def test_what_is_cut_short_is_refused_wherever_it_is_cut():
    events = [following(number) for number in range(1, 5)]
    whole = payload(*events)
    index = kvindex.PrefixIndex(SIZE)
    for length in range(len(whole)):
        with pytest.raises(kvindex.EventDecodeError):
            index.ingest("a", whole[:length])
    assert index.stats()["blocks"] == 0
    assert index.stats()["parked"] == 0
    assert index.ingest("a", whole).parked == len(events)


@pytest.mark.parametrize("blocks", [1, 3, 600])
@pytest.mark.parametrize("ahead", range(8))
def test_parents_that_go_before_their_turn(ahead, blocks):
    """The index looks ahead for the parents of later events.

    A parent may be gone, with all its memory, by the time that such an event is applied.
    """
    first = stored(range(1000, 1000 + blocks), range(SIZE * blocks), **FIELDS)
    last = 999 + blocks
    below = [stored([number], tokens(number), parent=last, **FIELDS) for number in range(1, 9)]
    for gone in (cleared(), removed(*range(999 + blocks, 999, -1))):
        events = [*below[:ahead], gone, *below[ahead:]]
        together, alone = kvindex.PrefixIndex(SIZE), kvindex.PrefixIndex(SIZE)
        for index in (together, alone):
            index.ingest("a", payload(first))
        report = together.ingest("a", payload(*events))
        reports = [alone.ingest("a", payload(event)) for event in events]
        assert report.stored == sum(each.stored for each in reports)
        assert report.parked == sum(each.parked for each in reports)
        assert together.worker_stats("a") == alone.worker_stats("a")
        together._check()

"""The event types, and the results of decode_batch for wrong events."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import msgpack
import numpy as np
import pytest
from support import STORED

from kvindex.errors import EventDecodeError, InvalidTypeError, KVIndexError
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, decode_batch

SOUND = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
}
WITHOUT_TYPE = {name: value for name, value in SOUND.items() if name != "type"}
CLEARED = {"type": "AllBlocksCleared"}


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def decode(*events, ts=1.5, more=()) -> EventBatch:
    return decode_batch(msgpack.packb([ts, list(events), *more]))


# ---------------------------------------------------------------------------------------------------------- the types


def test_the_fields_are_the_engines_and_the_streams():
    assert names(BlockStored) == [
        "pod",
        "model",
        *STORED,
        "cache_salt",
        "session_id",
        "dp_rank",
        "lookahead_token_ids",
        "local_hashes",
        "prefix_hashes",
    ]
    assert names(BlockRemoved) == [
        *("pod", "model", "block_hashes", "medium", "group_idx", "dp_rank", "remaining_copy_counts"),
    ]
    assert names(AllBlocksCleared) == ["pod", "dp_rank", "medium"]
    assert names(EventBatch) == ["ts", "events", "dp_rank", "skipped"]


@pytest.mark.parametrize("event", [BlockStored(block_hashes=[1]), BlockRemoved(block_hashes=[1]), AllBlocksCleared()])
def test_what_is_not_given_is_not_set(event):
    given = {"block_hashes": [1]}
    empty = {"pod": "", "model": "", "token_ids": ()}
    for name in names(type(event)):
        assert getattr(event, name) == given.get(name, empty.get(name))


def test_an_event_does_not_change():
    event = BlockRemoved("pod-a", "llama", block_hashes=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.pod = "pod-b"
    with pytest.raises((AttributeError, TypeError)):
        event.nonsense = 1
    assert dataclasses.replace(event, pod="pod-b") == BlockRemoved("pod-b", "llama", block_hashes=[1])
    assert event.pod == "pod-a"


def test_equal_is_equal_in_every_field():
    one = BlockStored("p", "m", block_hashes=[1], token_ids=np.arange(4, dtype=np.uint32), block_size=4)
    assert one == BlockStored("p", "m", block_hashes=[1], token_ids=np.arange(4), block_size=4)
    assert one != BlockStored("p", "m", block_hashes=[1], token_ids=np.arange(1, 5), block_size=4)
    assert one != BlockStored("p", "m", block_hashes=[1], token_ids=np.arange(5), block_size=4)
    assert one != dataclasses.replace(one, medium="GPU")
    assert BlockRemoved(block_hashes=[1]) != BlockStored(block_hashes=[1])
    assert AllBlocksCleared("p") != "p"
    assert EventBatch(1.5, [one]) == EventBatch(1.5, [dataclasses.replace(one)])
    with pytest.raises(TypeError):
        hash(one)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda event: pickle.loads(pickle.dumps(event))])
def test_events_can_be_copied_and_sent(again):
    batch = decode(SOUND, CLEARED)
    assert again(batch) == batch
    assert len(batch.events) == 2


# --------------------------------------------------------------------------------------------------------- decode_batch


def test_pod_and_model_come_from_the_caller_and_the_rank_from_the_batch():
    payload = msgpack.packb([1.5, [SOUND, ["BlockRemoved", [1]], CLEARED], 3])
    stored, removed, cleared = decode_batch(payload, pod="pod-a", model="llama").events
    assert (stored.pod, stored.model, stored.dp_rank) == ("pod-a", "llama", 3)
    assert (removed.pod, removed.model, removed.dp_rank) == ("pod-a", "llama", 3)
    assert cleared == AllBlocksCleared("pod-a", dp_rank=3)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, dtype=np.uint8)])
def test_any_contiguous_bytes_are_a_payload(kind):
    assert [event.token_ids.tolist() for event in decode_batch(kind(msgpack.packb([1.5, [SOUND]]))).events] == [
        [1, 2, 3, 4]
    ]


@pytest.mark.parametrize(
    "payload", ["text", None, 7, [1.5, []], memoryview(b"0123")[::2]], ids=lambda payload: type(payload).__name__
)
def test_what_is_no_bytes_is_refused(payload):
    with pytest.raises(InvalidTypeError, match="payload"):
        decode_batch(payload)


@pytest.mark.parametrize(
    ("ts", "seconds"),
    [
        (1.25, 1.25),
        (0, 0.0),
        (-5, -5.0),
        (1_760_000_000, 1.76e9),
        (1_760_000_000_500, 1_760_000_000.5),
        (100_000_000_000, 1e11),
        (100_000_000_001, 100_000_000.001),
    ],
)
def test_a_timestamp_is_in_seconds_or_in_integer_milliseconds(ts, seconds):
    assert decode(ts=ts).ts == seconds


@pytest.mark.parametrize(("more", "rank"), [((), None), ((None,), None), ((0,), 0), ((2**31 - 1, "future"), 2**31 - 1)])
def test_the_rank_of_a_batch(more, rank):
    assert decode(more=more).dp_rank == rank


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "x",
        [],
        [1.5],
        [None, []],
        ["1.5", []],
        [True, []],
        [1.5, None],
        [1.5, {}],
        [1.5, "x"],
        [1.5, [], -1],
        [1.5, [], 2**31],
        [1.5, [], "0"],
        [1.5, [], 0.0],
        [1.5, [], [0]],
        {},
        {"ts": 1.5},
        {"events": []},
        {"ts": None, "events": []},
        {"ts": 1, "events": 5},
        {"ts": 1, "events": [], "data_parallel_rank": "0"},
    ],
    ids=repr,
)
def test_what_is_no_batch(value):
    payload = msgpack.packb(value)
    with pytest.raises(EventDecodeError, match="byte") as error:
        decode_batch(payload)
    assert 0 <= error.value.offset < len(payload)
    assert isinstance(error.value, KVIndexError)
    assert isinstance(error.value, ValueError)


def test_the_offset_is_that_of_the_value_that_is_wrong():
    front = b"\x93" + msgpack.packb(1.5)
    with pytest.raises(EventDecodeError) as error:
        decode_batch(front + msgpack.packb("no events") + b"\x00")
    assert error.value.offset == len(front)


WRONG = {
    "block_hashes": [None, 5, "x", {}, b"12345678", [None], ["x"], [1.5], [True], [b""], [[1]], [1, {}]],
    "parent_block_hash": ["x", 1.5, True, b"", [1], {}],
    "token_ids": [5, "x", b"1234", {}, 1.5],
    "block_size": [-1, 1.5, "16", True, [16]],
    "lora_id": [1.5, True, [7], 2**63],
    "medium": [5, b"GPU", ["GPU"]],
    "lora_name": [5, b"sql", ["sql"], {"cache_salt": "t"}],
    "extra_keys": [
        5,
        "x",
        {},
        ["x"],
        [5],
        [{}],
        [[{}]],
        [[["mm", {}]]],
        [None, msgpack.ExtType(1, b"x")],
        [[msgpack.ExtType(1, b"x")]],
    ],
    "group_idx": [-1, "0", 1.5, True, 2**63],
    "kv_cache_spec_kind": [5, b"x"],
    "kv_cache_spec_sliding_window": [-1, "x", 1.5],
    "cache_salt": [5, b"t", ["t"]],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values], ids=repr
)
def test_a_wrong_field_costs_its_event_and_no_other(field, value):
    batch = decode(SOUND, {**SOUND, field: value}, CLEARED)
    assert batch.skipped == [(1, "bad_event")]
    assert [type(event) for event in batch.events] == [BlockStored, AllBlocksCleared]
    assert batch.events[0].token_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "token", [-1, 2**32, 2**64 - 1, 1.0, "7", b"7", None, True, [1, 2], {}, msgpack.ExtType(1, b"x")], ids=repr
)
def test_a_wrong_token_is_its_own_reason(token):
    batch = decode({**SOUND, "token_ids": [1, token, 3, 4]}, SOUND)
    assert batch.skipped == [(0, "bad_token")]
    assert batch.events[0].token_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (5, "bad_event"),
        (None, "bad_event"),
        ("BlockStored", "bad_event"),
        ([], "bad_event"),
        ({}, "unknown_event"),
        ({"event_type": "stored"}, "unknown_event"),
        ([5], "unknown_event"),
        ([None, [1]], "unknown_event"),
        (["BlockMoved", [1]], "unknown_event"),
        ({"type": "blockstored"}, "unknown_event"),
        ({"type": 5}, "unknown_event"),
        ({"type": b"BlockStored", "block_hashes": [1]}, "unknown_event"),
        (["BlockStored"], "bad_event"),
        (["BlockStored", [1], None, [1, 2]], "bad_event"),
        (["BlockRemoved"], "bad_event"),
        ({"type": "BlockStored", "token_ids": [1], "block_size": 1}, "bad_event"),
        ({"type": "BlockRemoved", "medium": "GPU"}, "bad_event"),
        (["BlockRemoved", [1], 5], "bad_event"),
        (["BlockRemoved", [b""]], "bad_event"),
        (["BlockRemoved", [1], None, "0"], "bad_event"),
    ],
    ids=repr,
)
def test_an_event_that_cannot_be_read(event, reason):
    batch = decode(CLEARED, event, SOUND)
    assert batch.skipped == [(1, reason)]
    assert [type(kept) for kept in batch.events] == [AllBlocksCleared, BlockStored]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            ["BlockStored", [1], None, [1, 2], 2],
            BlockStored(block_hashes=[1], token_ids=np.array([1, 2]), block_size=2),
        ),
        (
            ["BlockStored", [1], -1, None, None],
            BlockStored(block_hashes=[1], parent_block_hash=2**64 - 1, token_ids=np.array([])),
        ),
        (
            ["BlockStored", [1], None, [], 0, None, "cpu", {"cache_salt": "t", "x": [1]}],
            BlockStored(block_hashes=[1], token_ids=np.array([]), block_size=0, medium="cpu", cache_salt="t"),
        ),
        ({"type": "BlockStored", "block_hashes": [b"\x01"]}, BlockStored(block_hashes=[1], token_ids=np.array([]))),
        (
            {"type": "BlockStored", "block_hashes": [], "extra_keys": [["a", ["mm", [1]]], None, []]},
            BlockStored(block_hashes=[], token_ids=np.array([]), extra_keys=[["a", ("mm", (1,))], None, []]),
        ),
        (
            {"type": "BlockRemoved", "block_hashes": [5], "token_ids": "not its field", "lora_id": {}},
            BlockRemoved(block_hashes=[5]),
        ),
        (["BlockRemoved", [5], None, 1, "LOCAL", "own"], BlockRemoved(block_hashes=[5], group_idx=1)),
        (["AllBlocksCleared", "GPU", 5], AllBlocksCleared()),
        ({"medium": 5, "type": "AllBlocksCleared", "block_hashes": "x"}, AllBlocksCleared()),
        ({**SOUND, "session_id": 5}, BlockStored(block_hashes=[1, 2], token_ids=np.arange(1, 5), block_size=2)),
        (
            {**SOUND, "session_id": "s"},
            BlockStored(block_hashes=[1, 2], token_ids=np.arange(1, 5), block_size=2, session_id="s"),
        ),
    ],
    ids=repr,
)
def test_an_event_that_is_odd_and_sound(event, expected):
    batch = decode(event)
    assert not batch.skipped
    assert batch.events == [expected]


def test_what_nobody_reads_may_be_anything():
    """Keys that are lists, timestamps of three bytes and text that is not UTF-8 are no reason to drop the event."""
    odd = b"\x81\x91\x01\x02" + b"\xc7\x03\xff123" + b"\xd6\x80abcd" + b"\xa2\xff\xfe"
    event = (
        b"\x84"
        + msgpack.packb("type")
        + msgpack.packb("BlockRemoved")
        + msgpack.packb("block_hashes")
        + b"\x91\x05"
        + odd
    )
    assert decode_batch(b"\x92\x01\x91" + event).events == [BlockRemoved(block_hashes=[5])]


def test_a_name_that_is_no_utf8_keeps_its_bytes():
    event = (
        b"\x83" + msgpack.packb("type") + msgpack.packb("BlockRemoved") + msgpack.packb("block_hashes") + b"\x91\x05"
    )
    (removed,) = decode_batch(b"\x92\x01\x91" + event + msgpack.packb("medium") + b"\xa2\xff\xfe").events
    assert removed.medium.encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_a_key_that_comes_twice_counts_as_it_came_last():
    twice = b"\x84" + b"".join(
        map(msgpack.packb, ("type", "BlockRemoved", "block_hashes", "x", "block_hashes", [7], "type", "BlockRemoved"))
    )
    assert decode_batch(b"\x92\x01\x91" + twice).events == [BlockRemoved(block_hashes=[7])]
    twice = b"\x83" + b"".join(map(msgpack.packb, ("type", "BlockRemoved", "block_hashes", [7], "block_hashes", "x")))
    assert decode_batch(b"\x92\x01\x91" + twice).skipped == [(0, "bad_event")]


def test_tokens_that_come_again_as_plain_ones_have_no_lookahead():
    fields = [*SOUND.items(), ("token_ids", [5, 6, 7, 8])]
    fields.insert(0, ("token_ids", [[1, 2], [2, 3], [3, 4], [4, 5]]))
    twice = bytes([0x80 + len(fields)]) + b"".join(msgpack.packb(part) for pair in fields for part in pair)
    (event,) = decode_batch(b"\x92\x01\x91" + twice).events
    assert event == BlockStored(**{**WITHOUT_TYPE, "token_ids": np.array([5, 6, 7, 8], np.uint32)})


def test_what_an_index_has_no_use_for_is_shown_as_it_was_written():
    """For an index, LoRA ids of nil, 0 and -1 are the same, a block size of 0 is no size, and counts end at 32 bits."""
    for written in (
        {"lora_id": -1},
        {"lora_id": 0},
        {"lora_id": None},
        {"block_size": 0},
        {"block_size": None},
        {"kv_cache_spec_sliding_window": 0},
        {"session_id": "s"},
        {"lookahead_token_ids": [[], []]},
    ):
        (event,) = decode({**SOUND, **written}).events
        assert {name: getattr(event, name) for name in written} == written
    (event,) = decode({"type": "BlockRemoved", "block_hashes": [1], "remaining_copy_counts": [2**40]}).events
    assert event.remaining_copy_counts == [2**40]
    # Only a name is a session. Any other value in its place is no reason to refuse the event.
    for written in (5, [1], msgpack.ExtType(5, b"abc")):
        (event,) = decode({**SOUND, "session_id": written}).events
        assert event.session_id is None

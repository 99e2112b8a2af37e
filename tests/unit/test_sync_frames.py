"""Message frames and the envelope of payloads, as bytes."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex import EventDecodeError, PrefixIndex, decode_batch
from kvindex.sync.frames import (
    END,
    FrameFault,
    batch_events,
    batch_rank,
    batch_time,
    carried_rank,
    parse_live,
    parse_replay,
    parse_topic,
    replay_request,
)

SEQ = struct.pack(">Q", 7)
MINUS_ONE = b"\xff" * 8


def test_a_live_message_has_topic_seq_and_payload():
    assert parse_live([b"kv", SEQ, b"x"]) == (b"kv", 7, b"x")


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "bad_frame_count"),
        ([b"kv", SEQ], "bad_frame_count"),
        ([b"kv", SEQ, b"x", b"y"], "bad_frame_count"),
        ([b"kv", SEQ[1:], b"x"], "bad_seq_size"),
        ([b"kv", SEQ + b"\0", b"x"], "bad_seq_size"),
        ([b"kv", b"", b"x"], "bad_seq_size"),
        ([b"kv", MINUS_ONE, b""], "bad_seq"),
        ([b"kv", b"\x80" + bytes(7), b"x"], "bad_seq"),
    ],
)
def test_what_is_no_live_message_has_a_name(frames, reason):
    with pytest.raises(FrameFault) as caught:
        parse_live(frames)
    assert caught.value.reason == reason


def test_both_framings_of_a_replay_are_read():
    assert parse_replay([b"", SEQ, b"x"]) == (None, 7, b"x")
    assert parse_replay([b"", b"kv", SEQ, b"x"]) == (b"kv", 7, b"x")
    assert parse_replay([b"", MINUS_ONE, b""]) is END
    assert parse_replay([b"", b"", MINUS_ONE, b""]) is END
    assert parse_replay([b"", b"kv", MINUS_ONE, b""]) is END


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([SEQ, b"x"], "bad_frame_count"),
        ([b"", b"kv", SEQ, b"x", b""], "bad_frame_count"),
        ([b"kv", SEQ, b"x"], "bad_delimiter"),
        ([b"", SEQ[:7], b"x"], "bad_seq_size"),
        ([b"", MINUS_ONE, b"not empty"], "bad_seq"),
    ],
)
def test_what_is_no_reply_has_a_name(frames, reason):
    with pytest.raises(FrameFault) as caught:
        parse_replay(frames)
    assert caught.value.reason == reason


def test_a_replay_is_asked_for_with_an_empty_frame_and_eight_bytes():
    assert replay_request(3) == [b"", b"\0\0\0\0\0\0\0\3"]


@pytest.mark.parametrize(
    ("topic", "parts"),
    [
        (b"kv@10.0.0.1@llama", ("10.0.0.1", "llama")),
        (b"kv@10.0.0.1:8000@org/llama@v2", ("10.0.0.1:8000", "org/llama@v2")),
        (b"kv@pod@", ("pod", "")),
        (b"kv@@llama", None),
        (b"kv@pod", None),
        (b"KV@pod@llama", None),
        (b"", None),
        (b"\xff\xfe@pod@llama", None),
    ],
)
def test_a_topic_names_pod_and_model(topic, parts):
    assert parse_topic(topic) == parts


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [
        ([12.5, [], 0], 12.5),
        ([12.5, []], 12.5),
        ([1_700_000_000, []], 1_700_000_000.0),
        ([1_700_000_000_123, []], 1_700_000_000.123),
        ({"events": [[1, [2]]], "ts": 3.5}, 3.5),
        ({"ts": 3.5}, 3.5),
        ({"events": []}, None),
        ([], None),
        ([None, []], None),
        ([True, []], None),
        ([float("nan"), []], None),
        ("text", None),
        (7, None),
    ],
)
def test_the_time_of_a_batch(batch, seconds):
    assert batch_time(msgpack.packb(batch)) == seconds


def test_the_time_in_arrays_with_long_headers():
    body = b"\xcb" + struct.pack(">d", 2.5) + b"\x90"
    assert batch_time(b"\xdc\x00\x02" + body) == 2.5
    assert batch_time(b"\xdd\x00\x00\x00\x02" + body) == 2.5


@pytest.mark.parametrize(
    ("batch", "rank"),
    [
        ([1.0, []], 0),
        ([1.0, [["BlockStored", [1], None, [1], 1]], 3], 3),
        ([1.0, [], 300], 300),
        ([1.0, [], None], 0),
        ([1.0, [], -1], 0),
        ([1.0, [], "x"], 0),
        ({"ts": 1.0, "events": [{"a": 1}], "data_parallel_rank": 5}, 5),
        ({"ts": 1.0}, 0),
        (3, 0),
    ],
)
def test_the_rank_of_a_batch(batch, rank):
    assert batch_rank(msgpack.packb(batch)) == rank


@given(st.binary(max_size=64))
def test_garbage_has_neither_time_nor_rank_and_raises_nothing(payload):
    seconds = batch_time(payload)
    assert seconds is None or isinstance(seconds, float)
    assert batch_rank(payload) >= 0


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_every_list_of_frames_is_read_or_refused_by_name(frames):
    for parse in (parse_live, parse_replay):
        try:
            message = parse(frames)
        except FrameFault as caught:
            reason = caught.reason
        else:
            assert message is END or (message.seq >= 0 and message.payload == frames[-1])
            continue
        assert reason in ("bad_frame_count", "bad_delimiter", "bad_seq_size", "bad_seq")


@given(
    pairs=st.lists(
        st.one_of(
            st.tuples(
                st.just("ts"),
                st.floats(allow_nan=False)
                | st.integers(-(2**63), 2**64 - 1)
                | st.sampled_from([10**11, 10**11 + 1, 1e11, 2e11]),
            ),
            st.tuples(st.sampled_from(["data_parallel_rank", "dp_rank"]), st.none() | st.integers(0, 2**31 - 1)),
            st.tuples(st.just("events"), st.just([])),
        ),
        max_size=6,
    ),
    form=st.sampled_from(["map", "array"]),
)
def test_time_and_rank_are_what_the_core_reads(pairs, form):
    """Repeated keys, numbers on both sides of the limit for milliseconds, and meaningless keys."""
    if form == "map":
        head = bytes([0x80 | len(pairs)])
        payload = head + b"".join(msgpack.packb(part) for pair in pairs for part in pair)
    else:
        last = dict(pairs)
        payload = msgpack.packb([last.get("ts", 0), [], last.get("data_parallel_rank")])
    try:
        report = PrefixIndex().ingest("a", payload)
    except EventDecodeError:
        return
    assert (batch_time(payload), batch_rank(payload)) == (report.ts, report.dp_rank)


def packed(value):
    """Return the value as msgpack, or nothing if msgpack cannot represent a number that large."""
    try:
        return msgpack.packb(value)
    except OverflowError:
        return b""


def payloads():
    """Generate valid and invalid batches, encoded by msgpack."""
    numbers = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**45), st.floats(), st.text(max_size=3))
    events = st.one_of(st.lists(st.lists(st.integers(0, 300), max_size=4), max_size=20), st.none(), st.integers())
    arrays = st.tuples(numbers, events, st.one_of(st.none(), st.integers(-2, 2**33))).map(list)
    keys = st.sampled_from(["ts", "events", "data_parallel_rank", "dp_rank", "x"])
    maps = st.dictionaries(keys, st.one_of(numbers, events), max_size=5)
    whole = st.one_of(arrays, maps).map(packed).filter(bool)
    return st.tuples(whole, st.integers(0, 8), st.binary(max_size=2)).map(
        lambda made: made[0] if made[1] else made[0][: len(made[0]) // 2] + made[2]
    )


@given(payloads())
def test_a_stream_reads_time_and_rank_as_the_index_does(payload):
    """For every batch that the index accepts, the stream must have read the same rank and time before."""
    try:
        batch = decode_batch(payload)
    except EventDecodeError:
        assert carried_rank(payload) is None or batch_time(payload) is None, "no other worker's by damage"
        return
    assert carried_rank(payload) == batch.dp_rank
    assert batch_time(payload) == (None if batch.ts != batch.ts else batch.ts)
    assert batch_events(payload) == max(1, min(len(batch.events) + len(batch.skipped), len(payload) // 3))

"""decode_batch with payloads of real engines, with every allowed encoding, and with bytes that no encoder writes."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import REMOVED, STORED

from kvindex.errors import EventDecodeError
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, decode_batch

KINDS = {
    "BlockStored": (BlockStored, STORED),
    "BlockRemoved": (BlockRemoved, REMOVED),
    "AllBlocksCleared": (AllBlocksCleared, ()),
}
SHARED = Path(__file__).resolve().parents[3] / "shared"


# ------------------------------------------------------------------------------------------------------- the oracle


def plain(value: Any) -> Any:
    """Return a value of vectors.json with its bytes as bytes."""
    if isinstance(value, dict) and value.keys() == {"$bytes"}:
        return bytes.fromhex(value["$bytes"])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def named(event: Any) -> tuple[str | None, dict]:
    """Return an event in either format as its tag and its fields by name."""
    if isinstance(event, dict):
        return event.get("type"), {key: value for key, value in event.items() if key != "type"}
    fields = dict(zip(KINDS.get(event[0], (None, ()))[1], event[1:], strict=False))
    if isinstance(fields.get("lora_name"), dict):
        fields |= {"lora_name": None, **fields["lora_name"]}
    return event[0], fields


def u64(block_hash: int | bytes) -> int:
    if isinstance(block_hash, bytes):
        return struct.unpack(">Q", block_hash[-8:].rjust(8, b"\0"))[0]
    return struct.unpack("<Q", struct.pack("<q" if block_hash < 0 else "<Q", block_hash))[0]


def assert_same(event: Any, tag: str, fields: dict, dp_rank: int | None) -> None:
    """Check that the decoded event has exactly these fields and the defaults for all others."""
    kind, _ = KINDS[tag]
    assert type(event) is kind
    assert event.dp_rank == dp_rank
    if kind is AllBlocksCleared:
        return
    assert list(event.block_hashes) == [u64(h) for h in fields["block_hashes"]]
    names = [*REMOVED[1:]]
    if kind is BlockStored:
        parent = fields.get("parent_block_hash")
        assert event.parent_block_hash == (None if parent is None else u64(parent))
        assert event.token_ids.dtype == np.uint32
        tokens, ahead = list(fields.get("token_ids") or ()), fields.get("lookahead_token_ids")
        if tokens and isinstance(tokens[0], (list, tuple)):
            # SGLang with EAGLE: a token and the next one.
            size = fields["block_size"]
            ahead = [[tokens[end - 1][1]] for end in range(size, len(tokens) + 1, size)]
            tokens = [first for first, _ in tokens]
        assert event.token_ids.tolist() == tokens
        assert event.lookahead_token_ids == ahead
        assert tupled(event.extra_keys) == tupled(fields.get("extra_keys"))
        names = [*STORED[3:7], *STORED[8:], "cache_salt", "session_id"]
    assert {name: getattr(event, name) for name in names} == {name: fields.get(name) for name in names}


def tupled(value: Any) -> Any:
    return tuple(map(tupled, value)) if isinstance(value, (list, tuple)) else value


def reading(payload: bytes) -> tuple[bool, Any]:
    """Return whether the msgpack package can read it, and the value, or None if Python types cannot represent it."""
    try:
        return True, msgpack.unpackb(
            payload,
            strict_map_key=False,
            unicode_errors="surrogateescape",
            object_pairs_hook=Pairs,
            ext_hook=lambda code, data: None,
        )
    except ValueError as error:
        return "timestamp" in str(error), None


# ----------------------------------------------------------------------------------------------- published by engines


def vectors() -> list:
    path = SHARED / "wire" / "vectors.json"
    found = json.loads(path.read_text())["vectors"] if path.is_file() else []
    return [pytest.param(vector, id=vector["name"]) for vector in found]


def test_the_vectors_are_there(shared):
    assert len(vectors()) >= 310


@pytest.mark.parametrize("vector", vectors())
def test_vector(vector):
    payload, raw, expect = bytes.fromhex(vector["hex"]), plain(vector["raw"]), vector.get("expect")
    if expect == "error":
        with pytest.raises(EventDecodeError) as error:
            decode_batch(payload)
        assert 0 <= error.value.offset <= len(payload)
        assert str(error.value.offset) in str(error.value)
        return

    batch = decode_batch(payload)
    ts, events, rank = (
        (raw["ts"], raw["events"], raw["data_parallel_rank"]) if isinstance(raw, dict) else [*raw, None][:3]
    )
    assert batch.ts == pytest.approx(1760000000.5, abs=0.6)
    assert batch.ts == (ts / 1000 if isinstance(ts, int) else ts)
    assert batch.dp_rank == rank

    reasons = {}
    for index, event in enumerate(events):
        tag, _ = named(event)
        if tag not in KINDS:
            reasons[index] = "unknown_event"
    if expect == "skip-event" and not reasons:
        reasons = {0: "bad_event"}
    assert dict(batch.skipped) == reasons
    assert (expect == "skip-event") <= bool(reasons)

    kept = [event for index, event in enumerate(events) if index not in reasons]
    assert len(batch.events) == len(kept)
    for got, event in zip(batch.events, kept, strict=True):
        assert_same(got, *named(event), rank)
    # The output of the engine's own typed decoder, if it was recorded, has the same defaults.
    typed = plain(vector.get("typed"))
    if typed:
        kept = [event for index, event in enumerate(typed["events"]) if index not in reasons]
        for got, event in zip(batch.events, kept, strict=True):
            assert_same(got, *named(event), typed["dp_rank"])


@pytest.mark.parametrize(
    "path", sorted((SHARED / "captures").glob("*.gz")), ids=lambda path: path.name.split(".msg")[0]
)
def test_every_payload_of_a_capture(path):
    with gzip.open(path) as file:
        records = msgpack.Unpacker(file, strict_map_key=False)
        payloads = [record[4] for record in records if isinstance(record, list) and record[0] == "msg"]
    assert payloads
    for payload in payloads:
        _, events, rank = msgpack.unpackb(payload)
        batch = decode_batch(payload)
        assert not batch.skipped
        for got, event in zip(batch.events, events, strict=True):
            assert_same(got, *named(event), rank)


# ---------------------------------------------------------------------------------------- allowed choices of an encoder


class Wire:
    """A msgpack encoder that may use any header and any width that fits; `how` selects one for each value.

    An empty `how` gives the package's own, minimal encoding.
    """

    def __init__(self, how: list[int]) -> None:
        self.how = iter(how)

    def pack(self, value: Any) -> bytes:
        if isinstance(value, dict):
            value = Pairs(value.items())
        if isinstance(value, Pairs):
            head = self.head(len(value), [(0x80, 15), (0xDE, ">H"), (0xDF, ">I")])
            return head + b"".join(self.pack(key) + self.pack(item) for key, item in value)
        if isinstance(value, (list, tuple)):
            head = self.head(len(value), [(0x90, 15), (0xDC, ">H"), (0xDD, ">I")])
            return head + b"".join(self.pack(item) for item in value)
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogateescape")
            return self.head(len(data), [(0xA0, 31), (0xD9, ">B"), (0xDA, ">H"), (0xDB, ">I")]) + data
        if isinstance(value, bytes):
            return self.head(len(value), [(0xC4, ">B"), (0xC5, ">H"), (0xC6, ">I")]) + value
        if isinstance(value, int) and not isinstance(value, bool):
            return self.integer(value)
        return msgpack.packb(value)

    def head(self, n: int, forms: list) -> bytes:
        fit = []
        for code, form in forms:
            if isinstance(form, int):
                fit += [bytes([code | n])] if n <= form else []
            elif n < 256 ** struct.calcsize(form):
                fit.append(bytes([code]) + struct.pack(form, n))
        return fit[next(self.how, 0) % len(fit)]

    def integer(self, value: int) -> bytes:
        fit = [msgpack.packb(value)]
        for code, form in zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True):
            try:
                fit.append(bytes([code]) + struct.pack(form, value))
            except struct.error:
                continue
        return fit[next(self.how, 0) % len(fit)]


class Pairs(tuple):
    """A map as its pairs, which may repeat a key or have one that Python cannot hash."""


U64 = st.integers(0, 2**64 - 1) | st.sampled_from((0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63))
HASH = (
    U64 | st.integers(-(2**63), -1) | st.sampled_from((16, 32, 64)).flatmap(lambda n: st.binary(min_size=n, max_size=n))
)
HASH |= st.binary(min_size=1, max_size=9)
TOKEN = st.sampled_from((7, 8, 9, 16, 17, 18, 32)).flatmap(lambda bits: st.integers(0, 2**bits - 1))
NAME = st.none() | st.sampled_from(("", "GPU", "cpu", "sql-adapter", "\udcff", "x" * 40)) | st.text(max_size=8)
SMALL = st.none() | st.integers(0, 2**63 - 1) | st.sampled_from((0, 1, 16, 2096))
KEY = st.recursive(
    st.none()
    | st.booleans()
    | U64
    | st.integers(-(2**63), -1)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
JUNK = st.recursive(
    KEY | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(inner, inner), max_size=3).map(Pairs),
    max_leaves=8,
)


@st.composite
def tokens(draw) -> list[int]:
    """Draw tokens: enough for every method of reading them, and with long runs of one width, like real ones."""
    some = draw(st.lists(TOKEN, max_size=40))
    return some * draw(st.sampled_from((1, 1, 2, 20)))


@st.composite
def stored(draw) -> dict:
    return {
        "block_hashes": draw(st.lists(HASH, max_size=20)),
        "parent_block_hash": draw(st.none() | HASH),
        "token_ids": draw(tokens() | st.none()),
        "block_size": draw(SMALL),
        "lora_id": draw(st.none() | st.integers(-1, 2**63 - 1) | st.text(max_size=4)),
        "medium": draw(NAME),
        "lora_name": draw(NAME),
        "extra_keys": draw(
            st.none()
            | st.integers(0, 40).map(lambda n: [None] * n)
            | st.lists(st.none() | st.lists(KEY, max_size=3), max_size=4)
        ),
        "group_idx": draw(SMALL),
        "kv_cache_spec_kind": draw(NAME),
        "kv_cache_spec_sliding_window": draw(SMALL),
        "cache_salt": draw(NAME),
        "session_id": draw(NAME),
    }


@st.composite
def written(draw) -> tuple[Any, str, dict]:
    """Draw one event: in the format of an engine, and as its tag and fields."""
    tag = draw(st.sampled_from(tuple(KINDS)))
    fields = draw(stored()) if tag == "BlockStored" else {}
    if tag == "BlockRemoved":
        fields = {"block_hashes": draw(st.lists(HASH, max_size=20)), "medium": draw(NAME), "group_idx": draw(SMALL)}

    if draw(st.booleans()):
        names = KINDS[tag][1]
        event = [tag, *(fields.get(name) for name in names)]
        least = {"BlockStored": 5, "BlockRemoved": 2, "AllBlocksCleared": 1}[tag]
        if tag == "BlockStored" and draw(st.booleans()):
            event[7] = {"cache_salt": fields["cache_salt"], "other": draw(JUNK)}
            fields = fields | {"lora_name": None}
        else:
            fields = fields | ({"cache_salt": None} if fields.get("cache_salt") is not None else {})
        fields = fields | ({"session_id": None} if tag == "BlockStored" else {})
        if draw(st.booleans()):
            while len(event) > least and event[-1] is None:
                event.pop()
        if len(event) == 1 + len(names):
            event += draw(st.lists(JUNK, max_size=3))
        return event, tag, fields

    pairs = [("type", tag)]
    for name, value in fields.items():
        if value is not None or name == "block_hashes" or draw(st.booleans()):
            pairs.append((name, value))
    pairs += draw(
        st.lists(
            st.tuples(st.sampled_from(("locality", "typ", 5, None, b"type")) | JUNK.filter(unnamed), JUNK), max_size=2
        )
    )
    pairs = draw(st.permutations(pairs))
    if draw(st.integers(0, 7)) == 0:
        pairs.insert(0, ("block_hashes", draw(JUNK)))  # repeated further on, where it counts
    return Pairs(pairs), tag, fields


def unnamed(key: Any) -> bool:
    return not isinstance(key, str)


@given(
    events=st.lists(written(), max_size=4),
    ts=st.floats(0, 2e9) | st.integers(-(2**53), 2**53),
    rank=st.none() | st.integers(0, 2**31 - 1),
    more=st.lists(JUNK, max_size=2),
    form=st.sampled_from(("array", "map")),
    how=st.lists(st.integers(0, 8), max_size=60),
    order=st.permutations(range(3)),
)
@example(events=[], ts=100_000_000_001, rank=None, more=[], form="array", how=[], order=[0, 1, 2])
@example(events=[], ts=100_000_000_000, rank=None, more=[], form="array", how=[], order=[0, 1, 2])
def test_whatever_way_it_is_written(events, ts, rank, more, form, how, order):
    if form == "array":
        value = [ts, [event for event, _, _ in events], rank, *more][: 3 + len(more) if rank is not None or more else 2]
    else:
        items = [("ts", ts), ("events", [event for event, _, _ in events]), ("data_parallel_rank", rank)]
        value = Pairs([*(items[i] for i in order), *(("future", item) for item in more)])
    payload = Wire(how).pack(value)
    assert reading(payload)[0]

    batch = decode_batch(payload)
    assert batch.ts == pytest.approx(ts / 1000 if isinstance(ts, int) and ts > 1e11 else ts, rel=1e-12)
    assert batch.dp_rank == rank
    assert not batch.skipped
    for got, (_, tag, fields) in zip(batch.events, events, strict=True):
        assert_same(got, tag, fields, rank)


@given(
    at=st.integers(0, 2_100),
    n=st.integers(1, 2_100),
    wrong=st.sampled_from((-1, 2**32, 1.5, "7", [1, 2], None, True)),
    widths=st.lists(TOKEN, min_size=1, max_size=12),
    tail=st.integers(0, 60),
)
def test_one_wrong_token_is_found_wherever_it_stands(at, n, wrong, widths, tail):
    ids: list = [widths[i * 7 % len(widths)] for i in range(n)]
    sound = ["BlockStored", [1], None, list(ids), 16, None, "x" * tail]
    ids.insert(at % (n + 1), wrong)
    batch = decode_batch(msgpack.packb([1.5, [["BlockStored", [1], None, ids, 16, None, "x" * tail], sound]]))
    assert batch.skipped == [(0, "bad_token")]
    assert batch.events[0].token_ids.tolist() == sound[3]


# ------------------------------------------------------------------------------------------ never written by an encoder


def payloads() -> list:
    """Return small payloads with both formats of batch and event, every type of field, and wide headers."""
    fields = {
        "block_hashes": [2**64 - 1, -1, b"\x01" * 32],
        "parent_block_hash": 300,
        "token_ids": [1, 200, 300, 70_000, 2**32 - 1] * 4,
        "block_size": 4,
        "lora_id": 7,
        "medium": "GPU",
        "lora_name": "sql",
        "extra_keys": [None, ["mm", ["id", -2], b"d"], None],
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 128,
    }
    as_map = {"type": "BlockStored", **fields, "cache_salt": "t", "future": {"a": [1.5, {}]}}
    as_array = ["BlockStored", *fields.values(), "future"]
    removed, cleared = ["BlockRemoved", [1, b"\x02" * 16], "CPU", 0], {"type": "AllBlocksCleared"}
    return [
        pytest.param(msgpack.packb([1.5, [as_array, removed, cleared], 3]), id="arrays"),
        pytest.param(msgpack.packb([1.5, [as_map, removed, cleared], None, "more"]), id="maps"),
        pytest.param(
            msgpack.packb({"ts": 1.5, "events": [as_map], "data_parallel_rank": 0, "more": 1}), id="map-of-maps"
        ),
        pytest.param(Wire([2] * 500).pack([1_760_000_000_500, [as_map, as_array], 1]), id="wide"),
    ]


@pytest.mark.parametrize("payload", payloads())
def test_cut_at_every_byte(payload):
    assert len(decode_batch(payload).events) == len(msgpack.unpackb(payload, object_hook=lambda m: [*m.values()])[1])
    for end in range(len(payload)):
        with pytest.raises(EventDecodeError) as error:
            decode_batch(payload[:end])
        assert 0 <= error.value.offset <= end


@pytest.mark.parametrize("payload", payloads())
def test_a_byte_too_many(payload):
    for more in (b"\0", b"\xc0", payload):
        with pytest.raises(EventDecodeError) as error:
            decode_batch(payload + more)
        assert error.value.offset == len(payload)


@pytest.mark.parametrize("payload", payloads())
def test_every_flipped_bit(payload):
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        decodes_or_names_the_byte(bytes(flipped))


@given(
    payload=st.sampled_from([param.values[0] for param in payloads()]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes(payload, changes):
    changed = bytearray(payload)
    for at, byte in changes:
        changed[at % len(changed)] = byte
    decodes_or_names_the_byte(bytes(changed))


@given(st.binary(max_size=60) | JUNK.map(lambda value: Wire([]).pack(value)))
def test_anything_at_all(payload):
    decodes_or_names_the_byte(payload)


def decodes_or_names_the_byte(payload: bytes) -> None:
    try:
        batch = decode_batch(payload)
    except EventDecodeError as error:
        offset = error.offset
    else:
        matches_what_is_readable(batch, payload)
        return
    assert 0 <= offset <= len(payload)


def matches_what_is_readable(batch: EventBatch, payload: bytes) -> None:
    sound, value = reading(payload)
    assert sound
    if value is not None:
        events = (
            dict(pair for pair in value if isinstance(pair[0], str))["events"] if isinstance(value, Pairs) else value[1]
        )
        assert len(batch.events) + len(batch.skipped) == len(events)
    assert len({index for index, _ in batch.skipped}) == len(batch.skipped)
    assert {reason for _, reason in batch.skipped} <= {"unknown_event", "bad_event", "bad_token"}


@pytest.mark.parametrize(
    "head",
    [
        b"\xdc\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xde\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x9f",
        b"\x8f",
        b"\xc5\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xda\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xc1",
        b"\xd8\x01",
    ],
)
@pytest.mark.parametrize("field", [*STORED, "cache_salt", "future", "type"])
def test_a_length_that_lies(field, head):
    """A few bytes that claim gigabytes are refused at their position, and before any allocation for them."""
    front = b"\x93" + msgpack.packb(1.5) + b"\x91\x82" + msgpack.packb("block_hashes") + b"\x90" + msgpack.packb(field)
    with pytest.raises(EventDecodeError) as error:
        decode_batch(front + head + b"\x01\x02\x03\x00")
    assert error.value.offset == len(front)


@pytest.mark.parametrize("depth", [10, 1_000, 1_000_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x01", b"\xdd\x00\x00\x00\x01"], ids=["arrays", "maps", "wide"])
def test_nesting_of_any_depth(opening, depth):
    event = b"\x82" + msgpack.packb("type") + msgpack.packb("AllBlocksCleared") + msgpack.packb("future")
    batch = decode_batch(b"\x92" + msgpack.packb(1.5) + b"\x92" + event + opening * depth + b"\xc0" + b"\x91\xa16")
    assert [type(event) for event in batch.events] == [AllBlocksCleared]
    assert batch.skipped == [(1, "unknown_event")]
    with pytest.raises(EventDecodeError):
        decode_batch(b"\x92" + msgpack.packb(1.5) + b"\x92" + event + opening * depth)

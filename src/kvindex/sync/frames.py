"""What travels in the ZMQ frames around a batch: live messages, replay replies, and the little of a payload that a
stream needs before the batch is applied.

Everything here is a function of bytes. A message that does not have the right form raises :class:`FrameFault`, whose
``reason`` is the name of the counter it belongs to:

=====================  ================================================================================
``bad_frame_count``    not 3 frames live, not 3 or 4 in a replay
``bad_delimiter``      a replay reply does not start with the empty frame
``bad_seq_size``       the sequence frame is not 8 bytes
``bad_seq``            the sequence number is negative (other than the end marker) or at least 2^63
=====================  ================================================================================

Both framings of replay replies are read, decided per reply and not per version: ``["", seq, payload]`` (vLLM < 0.26,
SGLang < 0.5.22) and ``["", topic, seq, payload]`` (later ones and TensorRT-LLM).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgpack

__all__ = [
    "END",
    "FrameFault",
    "LiveMessage",
    "ReplayMessage",
    "batch_events",
    "batch_rank",
    "batch_time",
    "carried_rank",
    "parse_live",
    "parse_replay",
    "parse_topic",
    "replay_request",
]

_U64 = struct.Struct(">Q")
_F64 = struct.Struct(">d")

# Engines write signed 64-bit numbers and use -1 as the end marker, so the upper half is never a sequence number.
_LIMIT: Final = 1 << 63
_MINUS_ONE: Final = b"\xff" * 8

# Seconds since 1970 reach 1e11 in the year 5138, milliseconds passed it in 1973: Mooncake's store writes the latter.
_MILLISECONDS_FROM: Final = 100_000_000_000


class FrameFault(ValueError):
    """A message whose frames are not a batch; ``reason`` names the counter, the text says what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class LiveMessage(NamedTuple):
    """One published message."""

    topic: bytes
    seq: int
    payload: bytes


class ReplayMessage(NamedTuple):
    """One batch of a replay; ``topic`` is None in the older framing, which has none."""

    topic: bytes | None
    seq: int
    payload: bytes


END: Final = ReplayMessage(None, -1, b"")
"""The end of a replay."""


def parse_live(frames: Sequence[bytes]) -> LiveMessage:
    """Read ``[topic, seq u64 BE, payload]``; :class:`FrameFault` when it is something else."""
    if len(frames) != 3:
        raise FrameFault("bad_frame_count", f"a published message has 3 frames, this one has {len(frames)}")
    topic, seq, payload = frames
    return LiveMessage(topic, _seq(seq), payload)


def parse_replay(frames: Sequence[bytes]) -> ReplayMessage:
    """Read one reply of a replay, in either framing, or :data:`END`; :class:`FrameFault` when it is something else."""
    if len(frames) == 4:
        delimiter, topic, seq, payload = frames
    elif len(frames) == 3:
        delimiter, seq, payload = frames
        topic = None
    else:
        raise FrameFault("bad_frame_count", f"a replay reply has 3 or 4 frames, this one has {len(frames)}")
    if delimiter:
        raise FrameFault("bad_delimiter", f"a replay reply starts with an empty frame, not with {delimiter[:16]!r}")
    if seq == _MINUS_ONE and not payload:
        return END
    return ReplayMessage(topic, _seq(seq), payload)


def _seq(frame: bytes) -> int:
    if len(frame) != 8:
        raise FrameFault("bad_seq_size", f"the sequence number has 8 bytes, this one has {len(frame)}")
    seq: int = _U64.unpack(frame)[0]
    if seq >= _LIMIT:
        raise FrameFault("bad_seq", f"{seq - 2 * _LIMIT} is no sequence number")
    return seq


def replay_request(start: int) -> list[bytes]:
    """The frames by which a DEALER asks for every batch from ``start`` on, ``start`` included.

    Without the empty frame an engine ignores the request silently (recorded for all six releases).
    """
    return [b"", _U64.pack(start)]


def parse_topic(topic: bytes) -> tuple[str, str] | None:
    """``kv@POD@MODEL`` -> ``(pod, model)``, or None when it is not of that form. A model's name may hold ``@``."""
    try:
        head, pod, model = topic.decode("utf-8").split("@", 2)
    except ValueError:
        return None
    return (pod, model) if head == "kv" and pod else None


def batch_time(payload: bytes) -> float | None:
    """When the engine made this batch, in seconds since 1970, or None when the payload does not say.

    Looks at the first bytes only, so it says nothing about the rest of the payload. O(1) for the array form that every
    released engine writes.
    """
    # 92 cb / 93 cb: an array of two or three that starts with a float64, which is what msgspec and msgpack write.
    if len(payload) > 9 and payload[1] == 0xCB and payload[0] & 0xF0 == 0x90:
        seconds: float = _F64.unpack_from(payload, 2)[0]
        return _seconds(seconds)
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False)
    try:
        unpacker.feed(payload)
        if payload[:1] and (payload[0] & 0xF0 == 0x90 or payload[0] in (0xDC, 0xDD)):
            return _seconds(unpacker.unpack()) if unpacker.read_array_header() else None
        return _seconds(_last(unpacker, b"ts"))
    except Exception:
        return None


def _last(unpacker: msgpack.Unpacker, key: bytes) -> object:
    """The value of a key in a map. Of a key that is there twice the last counts, as in the core."""
    value = None
    for _ in range(unpacker.read_map_header()):
        if unpacker.unpack() == key:
            value = unpacker.unpack()
        else:
            unpacker.skip()
    return value


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    # As the core reads it: only integers are milliseconds.
    return value / 1000.0 if isinstance(value, int) and value > _MILLISECONDS_FROM else float(value)


def batch_events(payload: bytes) -> int:
    """How many events a batch says that it has, at least one; what is no batch is one.

    Looks at the first bytes only, so it is no promise; it can not be more than there is room for. O(1) for the array
    form that every released engine writes.
    """
    count = 1
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False)
    try:
        # The list's own header comes within these in the array form: 1 byte, a time of at most 9, and 5.
        array = payload[:1] and (payload[0] & 0xF0 == 0x90 or payload[0] in (0xDC, 0xDD))
        unpacker.feed(payload[:32] if array else payload)
        if array:
            if unpacker.read_array_header() >= 2:
                unpacker.skip()
                count = unpacker.read_array_header()
        else:
            for _ in range(unpacker.read_map_header()):
                if unpacker.unpack() == b"events":
                    count = unpacker.read_array_header()
                    for _ in range(count):
                        unpacker.skip()
                else:
                    unpacker.skip()
    except Exception:
        return 1
    # An event is an array or a map with a name in it: three bytes. A damaged length must not cost a pod years.
    return max(1, min(count, len(payload) // 3))


def batch_rank(payload: bytes) -> int:
    """The data-parallel rank that a batch names, 0 when it names none."""
    return carried_rank(payload) or 0


def carried_rank(payload: bytes) -> int | None:
    """The data-parallel rank that a batch names, None when it names none.

    Needed only where several ranks share one publisher or one topic: whose a batch is has to be known before it is
    applied. Skips over the events, O(bytes), in C.
    """
    head = payload[:1]
    if head == b"\x92":
        return None
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False)
    try:
        unpacker.feed(payload)
        if head and (head[0] & 0xF0 == 0x90 or head[0] in (0xDC, 0xDD)):
            if unpacker.read_array_header() < 3:
                return None
            unpacker.skip()
            events = payload[unpacker.tell()]
            unpacker.skip()
            rank = _rank(unpacker.unpack())
            # Damage must not be taken for another rank.
            array = events & 0xF0 == 0x90 or events in (0xDC, 0xDD)
            return rank if array and unpacker.tell() == len(payload) else None
        return _rank(_last(unpacker, b"data_parallel_rank"))
    except Exception:
        return None


def _rank(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

"""The ZMQ frames around a batch: live messages, replay replies, and the few fields of a payload that a stream needs
before the batch is applied.

Everything here is a function of bytes. A message that does not have the right form raises :class:`FrameFault`, whose
``reason`` is the name of the message's counter:

=====================  ================================================================================
``bad_frame_count``    not 3 frames live, not 3 or 4 in a replay
``bad_delimiter``      a replay reply without a leading empty frame
``bad_seq_size``       not 8 bytes
``bad_seq``            negative (other than the end marker), or at least 2^63
=====================  ================================================================================

Both framings of replay replies are read: ``["", seq, payload]`` (vLLM < 0.26, SGLang < 0.5.22) and ``["", topic, seq,
payload]`` (later ones and TensorRT-LLM). Each reply decides, not the engine's version.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from .._core import peek_batch

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
    "same_model",
]

_U64 = struct.Struct(">Q")

# Engines write signed 64-bit numbers and use -1 as the end marker, so the upper half is never a sequence number.
_LIMIT: Final = 1 << 63
_MINUS_ONE: Final = b"\xff" * 8


class FrameFault(ValueError):
    """A message whose frames are not a batch. ``reason`` names the counter, and the text describes the frames."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class LiveMessage(NamedTuple):
    """One published message."""

    topic: bytes
    seq: int
    payload: bytes


class ReplayMessage(NamedTuple):
    """One batch of a replay; ``topic`` is None in the older framing, which has no topic."""

    topic: bytes | None
    seq: int
    payload: bytes


END: Final = ReplayMessage(None, -1, b"")
"""The end of a replay."""


def parse_live(frames: Sequence[bytes]) -> LiveMessage:
    """Read ``[topic, seq u64 BE, payload]``. Raises :class:`FrameFault` for anything else."""
    if len(frames) != 3:
        raise FrameFault("bad_frame_count", f"a published message has 3 frames, this one has {len(frames)}")
    topic, seq, payload = frames
    return LiveMessage(topic, _seq(seq), payload)


def parse_replay(frames: Sequence[bytes]) -> ReplayMessage:
    """Read one reply of a replay in either framing, or :data:`END`. Raises :class:`FrameFault` for anything else."""
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
        raise FrameFault("bad_seq", f"{seq - 2 * _LIMIT} is not a sequence number")
    return seq


def replay_request(start: int) -> list[bytes]:
    """Return the frames with which a DEALER requests every batch from ``start`` on, ``start`` included.

    Without the empty frame an engine ignores the request silently (recorded for all six releases).
    """
    return [b"", _U64.pack(start)]


def parse_topic(topic: bytes) -> tuple[str, str] | None:
    """``kv@POD@MODEL`` -> ``(pod, model)``, or None for any other form. A model's name may contain ``@``."""
    try:
        head, pod, model = topic.decode("utf-8").split("@", 2)
    except ValueError:
        return None
    return (pod, model) if head == "kv" and pod else None


def same_model(topic: bytes, other: bytes) -> bool:
    """Whether two topics are the same, or name one model and two pods: the name of a pod changes with each deployment,
    and an address as a name changes with each restart."""
    if topic == other:
        return True
    first, second = parse_topic(topic), parse_topic(other)
    return first is not None and second is not None and first[1] == second[1]


def batch_time(payload: bytes) -> float | None:
    """Return the time when the engine made a batch, in seconds since 1970, or None if the payload has no time.

    Reads the first bytes only and does not check the rest of the payload. O(1) for the array form that every released
    engine writes.
    """
    ts: float | None = peek_batch(payload, False)[0]
    return ts


def batch_events(payload: bytes) -> int:
    """Return the number of events that a batch announces, at least one; anything that is not a batch counts as one.

    Reads the first bytes only, so the number is not reliable, but it cannot exceed the room in the payload. O(1) for
    the array form that every released engine writes.
    """
    return max(1, peek_batch(payload, False)[1])


def batch_rank(payload: bytes) -> int:
    """Return the data-parallel rank that a batch names, 0 if it names no rank."""
    return carried_rank(payload) or 0


def carried_rank(payload: bytes) -> int | None:
    """Return the data-parallel rank that a batch names, None if it names no rank or is damaged.

    Needed only if several ranks share one publisher or one topic: the worker of a batch has to be known before the
    batch is applied. Skips over the events, O(bytes).
    """
    return peek_batch(payload, True)[2]

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
        raise FrameFault("bad_seq", f"{seq - 2 * _LIMIT} is not a sequence number")
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


def same_model(topic: bytes, other: bytes) -> bool:
    """Whether two topics are the same, or are of one model whose pod has another name: names of pods change with each
    deployment, and an address as a name with each restart."""
    if topic == other:
        return True
    first, second = parse_topic(topic), parse_topic(other)
    return first is not None and second is not None and first[1] == second[1]


def batch_time(payload: bytes) -> float | None:
    """When the engine made this batch, in seconds since 1970, or None when the payload does not say.

    Looks at the first bytes only, so it says nothing about the rest of the payload. O(1) for the array form that every
    released engine writes.
    """
    ts: float | None = peek_batch(payload, False)[0]
    return ts


def batch_events(payload: bytes) -> int:
    """How many events a batch says that it has, at least one; what is no batch is one.

    Looks at the first bytes only, so it is no promise; it cannot be more than there is room for. O(1) for the array
    form that every released engine writes.
    """
    return max(1, peek_batch(payload, False)[1])


def batch_rank(payload: bytes) -> int:
    """The data-parallel rank that a batch names, 0 when it names none."""
    return carried_rank(payload) or 0


def carried_rank(payload: bytes) -> int | None:
    """The data-parallel rank that a batch names, None when it names none or is damaged.

    Needed only where several ranks share one publisher or one topic: whose a batch is has to be known before it is
    applied. Skips over the events, O(bytes).
    """
    return peek_batch(payload, True)[2]

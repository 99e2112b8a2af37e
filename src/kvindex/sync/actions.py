"""Actions that a stream requests; its caller carries them out in order."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from ..answers import Verdict

__all__ = [
    "Action",
    "AwaitReplay",
    "CancelReplay",
    "Clear",
    "Incident",
    "Ingest",
    "Mark",
    "Reconnect",
    "Renew",
    "RequestReplay",
    "Verdict",
]


class Ingest(NamedTuple):
    """Apply this batch, then report the outcome by :meth:`WorkerStream.cleared` or :meth:`WorkerStream.rejected`."""

    seq: int
    payload: bytes
    ts: float | None
    joined: bool = True
    """Whether the batch is known to continue the applied ones. If not, the index must not get its number: a snapshot
    would record everything up to that number as one stream."""


class RequestReplay(NamedTuple):
    """Request every batch from ``start`` on, and call :meth:`WorkerStream.replay_sent` when the request is sent.

    It replaces a running replay, whose batches must no longer be handed in.
    """

    start: int


class AwaitReplay(NamedTuple):
    """Keep a request open and give its place among the running replays to another worker: the publisher has received
    the request and has not begun to answer."""


class CancelReplay(NamedTuple):
    """Release the running replay: it is over, or the stream has given it up."""


class Clear(NamedTuple):
    """Remove everything of this worker from the index."""


class Mark(NamedTuple):
    """Set the state of this worker's answers from here on; ``reason`` is for people."""

    state: Verdict
    reason: str


class Reconnect(NamedTuple):
    """Close the connection if there is one, and open another one after ``delay`` seconds."""

    delay: float


class Renew(NamedTuple):
    """Replace the connection if this side makes it: only another connection can end this state."""

    why: str


class Incident(NamedTuple):
    """An incident that is worth a line in a log: reported once, never once per batch."""

    kind: str
    detail: str


Action: TypeAlias = Ingest | RequestReplay | AwaitReplay | CancelReplay | Clear | Mark | Reconnect | Renew | Incident

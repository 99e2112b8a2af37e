"""What a stream decides: the caller carries the actions out in order."""

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
    """Apply this batch, then say by :meth:`WorkerStream.cleared` or :meth:`WorkerStream.rejected` what came of it."""

    seq: int
    payload: bytes
    ts: float | None
    joined: bool = True
    """Whether it is known to continue what is applied. If not, the index must not be told its number: a snapshot would
    say that everything up to there is one stream."""


class RequestReplay(NamedTuple):
    """Ask the publisher for every batch from ``start`` on, and say :meth:`WorkerStream.replay_sent` when that is done.

    It replaces a replay that is still running; what that one still brings must not be handed in any more.
    """

    start: int


class AwaitReplay(NamedTuple):
    """The publisher has the request and has not begun to answer: give the place among the running replays to another
    worker, and keep the request open."""


class CancelReplay(NamedTuple):
    """Nobody waits for the running replay any more: it is over, or given up."""


class Clear(NamedTuple):
    """Forget everything of this worker."""


class Mark(NamedTuple):
    """From here on, answers of this worker are of this quality; ``reason`` is for people."""

    state: Verdict
    reason: str


class Reconnect(NamedTuple):
    """Close the connection if there is one, and open a new one after ``delay`` seconds."""

    delay: float


class Renew(NamedTuple):
    """Replace the connection, if this side makes it: only a new one can end this state."""

    why: str


class Incident(NamedTuple):
    """Something that a person may want to read in a log: once per incident, never once per batch."""

    kind: str
    detail: str


Action: TypeAlias = Ingest | RequestReplay | AwaitReplay | CancelReplay | Clear | Mark | Reconnect | Renew | Incident

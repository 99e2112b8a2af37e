"""Requests of the state machines to the server, and their effects on the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from .entries import Id

__all__ = [
    "Append",
    "Claim",
    "Collect",
    "Drop",
    "Effect",
    "Fail",
    "Get",
    "Load",
    "Put",
    "Read",
    "Refused",
    "Release",
    "Renew",
    "ReplicationPolicy",
    "Request",
    "Snapshot",
    "StepDown",
    "Tip",
    "Trim",
    "Trust",
    "Wait",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationPolicy:
    """Times in seconds, and bounds, equal in all processes of a fleet. The defaults are for one data centre."""

    lease: float = 2.0
    """Time from a collector's last sign of life to its replacement. The lease only saves work: the ids of the log keep
    a former collector from writing."""
    beat: float = 0.25
    """Interval of the entries by which the collector shows that it follows its engines."""
    silence: float = 1.0
    """Time without such an entry after which a follower's answers are ``stale``."""
    linger: float = 0.001
    """Time for which changes are collected into one entry."""
    busy_linger: float = 0.005
    """The same while more than ``busy`` changes come per second: waking up for an entry costs a follower
    as much as ten batches."""
    busy: float = 2500.0
    """See ``busy_linger``."""
    max_entry: int = 128 << 10
    """Bytes of an entry, except for a single larger change."""
    max_backlog: int = 64 << 20
    """Bytes that wait for an unavailable server, or are kept to refill a log that has lost its end."""
    max_length: int = 200_000
    """Maximum number of entries in the log. Usually snapshots trim it earlier."""
    snapshot_every: float = 10.0
    """Interval of snapshots."""
    snapshot_bytes: int = 64 << 20
    """Bytes of log after which a snapshot is taken earlier."""
    piece: int = 1 << 20
    """Bytes of a snapshot per request, so that other clients of the server do not wait long."""
    count: int = 512
    """Maximum number of entries per read."""
    retry: tuple[float, float] = (0.05, 1.0)
    """Time between attempts to reach the server: first and longest."""
    patience: float = 5.0
    """Time for which a candidate without a snapshot waits for one before it starts with an empty index."""


# ------------------------------------------------------------------------------------------- requests of the server


class Tip(NamedTuple):
    """The id of the last entry ever written; None without a log."""


class Read(NamedTuple):
    """Entries after ``after``: ``[(id, data)]``, empty after ``block`` seconds."""

    after: Id
    most: int
    block: float


class Append(NamedTuple):
    """True, or :class:`Refused` if the log has this id or a higher one, or is gone and ``make`` is False."""

    id: Id
    data: bytes
    make: bool


class Claim(NamedTuple):
    """Whether the lease was free, and is this writer's now."""

    writer: str
    seconds: float


class Renew(NamedTuple):
    """True; False if the lease is another writer's; None if it is gone."""

    writer: str
    seconds: float


class Release(NamedTuple):
    writer: str


class Get(NamedTuple):
    """A value, or None. The key "" is the pointer to the snapshot."""

    key: str


class Put(NamedTuple):
    key: str
    data: bytes


class Drop(NamedTuple):
    keys: tuple[str, ...]


class Trim(NamedTuple):
    """Drop the entries before this id; the server may keep some of them."""

    before: Id
    max_length: int


class Wait(NamedTuple):
    """No request until this moment, or until there is something new."""

    until: float


Request: TypeAlias = Append | Claim | Drop | Get | Put | Read | Release | Renew | Tip | Trim | Wait


class Refused(NamedTuple):
    """The answer to an :class:`Append` that the log does not accept."""


class Fail(NamedTuple):
    """The answer to a request that was not carried out, or whose outcome is unknown."""

    kind: Literal["unreachable", "readonly", "full", "denied", "old", "other"]
    reason: str


# --------------------------------------------------------------------------------------------------- effects, in order


class Load(NamedTuple):
    """Replace the index by a snapshot, or by an empty one if ``data`` is None. Answered by ``Replica.loaded``."""

    data: bytes | None
    pods: Mapping[str, Any]
    states: list[tuple[str, int, str]]


class Trust(NamedTuple):
    """Call ``PrefixIndex.trust``."""

    until: float


class Collect(NamedTuple):
    """Follow the engines, and show every change of the index to ``Replica.shown``."""


class Snapshot(NamedTuple):
    """Make a snapshot between two changes, and show :class:`Cut` there. Answered by ``Replica.snapshot_made``."""


class StepDown(NamedTuple):
    """Stop following the engines."""

    reason: str


Effect: TypeAlias = Any
"""One of these, or an item of an entry to apply to the index."""

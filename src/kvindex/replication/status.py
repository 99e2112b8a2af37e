"""The status of a process in a fleet: :class:`ReplicationStatus`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from .follower import BEGINNING
from .sharing import SharingStatus

__all__ = ["ROLES", "ReplicationStatus", "together"]

ROLES = ("direct", "follower", "collector")
_LARGEST = ("age", "began", "lease_age", "snapshot_age")
_SUMS = (
    "snapshot_bytes", "read_bytes", "written_bytes", "refused", "entries", "written", "refilled", "snapshots", "holes",
    "takeovers", "step_downs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationStatus:
    """The part of one process in a fleet at one moment. Counters since its start."""

    role: Literal["collector", "follower", "direct"]
    """``collector``: it follows the engines and writes the log. ``follower``: it reads the log. ``direct``: it follows
    the engines, and there is no log."""
    reason: str
    """Why answers are not current; empty if they are."""
    hindrance: str
    """Why this process cannot become the collector, or which pods the collector lacks; empty if neither applies."""
    server: str
    """Address of the server, without credentials."""
    fleet: str
    """Name of the fleet."""
    place: str
    """Id of the last entry of the log that this process has applied or written; with several shards, those of all."""
    trusted: bool
    """Whether this process is up to date with the log, or with its engines if it follows them."""
    age: float | None
    """Seconds since the moment up to which this process has the log, or the messages that its engines have sent to it;
    None if that is unknown."""
    began: float | None
    """When the log's current epoch began, in seconds since 1970 by its collector's clock; None without one."""
    lease_age: float | None
    """Seconds since this process renewed the lease; None unless it is the collector."""
    snapshot_age: float | None
    """Seconds since the last snapshot was loaded or made here; None without one."""
    snapshot_bytes: int
    """Its size."""
    read_bytes: int
    """Bytes of entries read."""
    written_bytes: int
    """Bytes of entries written."""
    refused: int
    """Entries that the log did not take, because it has them or those of another collector."""
    entries: int
    """Entries read."""
    written: int
    """Entries written since this process became the collector."""
    refilled: int
    """Entries written again after the server had lost them."""
    snapshots: int
    """Snapshots loaded and written."""
    holes: int
    """Times that the log could not be continued without a snapshot."""
    takeovers: int
    """Times that this process became the collector."""
    step_downs: int
    """Times that another process replaced it as the collector."""
    failures: dict[str, int]
    """Failed requests to the server, by kind."""
    sharing: SharingStatus | None = None
    """Speculative entries and reservations that routers share; None without ``share``."""
    shards: tuple[ReplicationStatus, ...] = ()
    """The statuses of the shards, by number, if there are several. The other fields then have the worst state, the
    largest age, and the sums of sizes and counters."""


def together(each: list[ReplicationStatus]) -> ReplicationStatus:
    """The status of a process with several shards, from theirs."""
    failures: Counter[str] = Counter()
    for status in each:
        failures.update(status.failures)
    summed: dict[str, Any] = {name: sum(getattr(status, name) for status in each) for name in _SUMS}
    for name in _LARGEST:
        values = [getattr(status, name) for status in each]
        summed[name] = max((value for value in values if value is not None), default=None)
    if any(status.age is None for status in each):
        summed["age"] = None
    return replace(
        each[0],
        role=max((status.role for status in each), key=ROLES.index),
        reason=_worst([status.reason for status in each]),
        hindrance=_worst([status.hindrance for status in each]),
        place=", ".join(status.place or "-" for status in each),
        trusted=all(status.trusted for status in each),
        failures=dict(failures),
        shards=tuple(each),
        **summed,
    )


def _worst(reasons: list[str]) -> str:
    """Return one of the reasons with the number of its shard, or without it if all are the same."""
    if len(set(reasons)) == 1:
        return reasons[0]
    worst = next((reason for reason in reasons if reason not in ("", *BEGINNING)), None) or next(filter(None, reasons))
    return f"shard {reasons.index(worst)}: {worst}"

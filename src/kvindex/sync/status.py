"""What an :class:`EventManager` says about its streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from .actions import Verdict
    from .source import PodSource

__all__ = [
    "Batch", "Configured", "Forgotten", "IndexChange", "Marked", "PodStatus", "PodsChange", "Removed", "StateChange",
    "StatusTable", "WorkerStatus",
]  # fmt: skip

WORST_FIRST = ("stale", "degraded", "exact")


class Batch(NamedTuple):
    """One batch as it is handed to the index: each once, in the order of the stream, whether it can be read or not."""

    pod: str
    rank: int
    model: str
    topic: bytes | None
    """As it arrived; None where only a replay without topics has come so far."""
    seq: int
    payload: bytes
    joined: bool = True
    """Whether the batch is known to continue the one before it. If not, :meth:`PrefixIndex.ingest` is given no ``seq``,
    and the worker's stream place is not whole."""


class Forgotten(NamedTuple):
    """Everything of one worker is forgotten (:meth:`PrefixIndex.clear_worker`): its engine has restarted, its history
    is applied anew, or its pod was just added and no stream vouches for the blocks that the index has of it."""

    pod: str
    rank: int


class Marked(NamedTuple):
    """The verdict of one worker's stream (:meth:`PrefixIndex.mark_worker`). The state that answers show is the worse of
    this and the index's own."""

    pod: str
    rank: int
    verdict: Verdict
    reason: str


class Configured(NamedTuple):
    """A pod was added: ``options`` are the keyword arguments of :meth:`PrefixIndex.configure_pod`."""

    pod: str
    options: Mapping[str, Any]


class Removed(NamedTuple):
    """A pod was removed with all its blocks (:meth:`PrefixIndex.remove_pod`)."""

    pod: str


IndexChange: TypeAlias = Batch | Forgotten | Marked | Configured | Removed
"""Every call by which a manager changes its index."""


class PodsChange(NamedTuple):
    """Pods that a manager follows since now, and names that it follows no longer."""

    added: tuple[PodSource, ...]
    removed: tuple[str, ...]


class StateChange(NamedTuple):
    """A worker's answers have become better or worse."""

    pod: str
    rank: int
    old: str
    new: str
    reason: str
    """Why, for people; of ``exact``, what can not be known all the same, or nothing."""


# Not frozen: that sets each of 47 fields by a call, which is 5 of the 12 ms that a status of 1,000 pods took. Each call
# gives objects of its own, so nobody else sees a change.
@dataclass(slots=True, kw_only=True)
class WorkerStatus:
    """One worker's stream at one moment. Times in seconds, counters since the pod was added."""

    pod: str
    rank: int
    model: str
    endpoint: str | None
    replay_endpoint: str | None
    state: str
    """``exact``, ``degraded`` or ``stale``: the worse of what the stream and the index say."""
    reason: str
    """Why, for people; where it is ``exact``, what speaks against it all the same, or nothing."""
    connected: bool
    """Whether the subscription stands."""
    last_seq: int | None
    """The number of the last applied batch."""
    last_ts: float | None
    """When the engine made the last applied batch, seconds since 1970."""
    lag: float | None
    """From the own time of the last batch that came live to its application here, None before the first; clocks that
    disagree show in it. Replayed batches do not count: their age says nothing of this router."""
    replaying: bool
    """Whether a replay has been asked for that is not over."""
    waiting: int
    """Batches that wait for a hole to be filled."""
    batches: int
    """Batches applied."""
    gaps: int
    """Holes in the sequence of what arrived."""
    lost_batches: int
    """Batches that no replay had any more, and that were given up."""
    replays: int
    """Replays asked for."""
    replays_healed: int
    """Times that a replay has filled a hole."""
    replays_failed: int
    """Times that a hole was given up, since no replay filled it."""
    restarts: int
    """Times that another process was found behind the endpoint."""
    reconnects: int
    duplicates: int
    """Batches that came again, and were dropped."""
    throttled: int
    """Times that it had to wait for its limit: :attr:`PodSource.max_event_rate`."""
    errors: Mapping[str, int]
    """By reason: frames that are no message, payloads that are no batch, and events that could not be applied."""
    events: Mapping[str, int]
    """Blocks stored and removed, clears, blocks parked, events skipped."""
    blocks: int
    """Index blocks held at this moment, in every medium and group."""
    parked: int
    """Blocks that wait for their parent at this moment."""
    counters: Mapping[str, int]
    """Every counter of the stream by name."""


@dataclass(slots=True, kw_only=True)
class PodStatus:
    """A pod at one moment: of each field of :class:`WorkerStatus` the sum, or the worst, over its workers."""

    pod: str
    model: str
    state: str
    reason: str
    connected: bool
    """Whether every rank is."""
    last_seq: int | None
    """The highest of its ranks, which count each for itself."""
    lag: float | None
    """The longest of its ranks."""
    batches: int
    gaps: int
    lost_batches: int
    replays: int
    restarts: int
    throttled: int
    errors: Mapping[str, int]
    blocks: int
    parked: int
    workers: Mapping[int, WorkerStatus]

    def as_dict(self) -> dict[str, Any]:
        """The same in plain dicts, for JSON."""
        return asdict(self)


class StatusTable(dict[str, PodStatus]):
    """The :class:`PodStatus` of each pod by name: a dict, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        columns = (
            "pod",
            "state",
            "reason",
            "connected",
            "last_seq",
            "lag",
            "blocks",
            "gaps",
            "lost_batches",
            "restarts",
        )
        head = "".join(f"<th>{column}</th>" for column in columns)
        rows = ("".join(f"<td>{_cell(getattr(pod, column))}</td>" for column in columns) for pod in self.values())
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cell(value: Any) -> str:
    """Text for a cell of HTML. Names and reasons come from the wire, and may hold anything."""
    if value is None:
        return ""
    text = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return escape(text.encode("utf-8", "backslashreplace").decode())


def pod_status(pod: str, model: str, workers: Mapping[int, WorkerStatus]) -> PodStatus:
    """Put the workers of one pod together."""
    if len(workers) == 1:  # as nearly all pods have: a fleet of 1,000 is looked at in half the time
        (one,) = workers.values()
        return PodStatus(
            pod=pod, model=model, state=one.state, reason=one.reason, connected=one.connected, last_seq=one.last_seq,
            lag=one.lag, batches=one.batches, gaps=one.gaps, lost_batches=one.lost_batches, replays=one.replays,
            restarts=one.restarts, throttled=one.throttled, errors=dict(one.errors), blocks=one.blocks,
            parked=one.parked, workers=dict(workers),
        )  # fmt: skip
    table = list(workers.values())
    worst = min(table, key=lambda worker: (WORST_FIRST.index(worker.state), not worker.reason), default=None)
    errors: dict[str, int] = {}
    for worker in table:
        for reason, count in worker.errors.items():
            errors[reason] = errors.get(reason, 0) + count
    return PodStatus(
        pod=pod,
        model=model,
        state=worst.state if worst else "stale",
        reason=worst.reason if worst else "no stream yet",
        connected=bool(table) and all(worker.connected for worker in table),
        last_seq=max((worker.last_seq for worker in table if worker.last_seq is not None), default=None),
        lag=max((worker.lag for worker in table if worker.lag is not None), default=None),
        batches=sum(worker.batches for worker in table),
        gaps=sum(worker.gaps for worker in table),
        lost_batches=sum(worker.lost_batches for worker in table),
        replays=sum(worker.replays for worker in table),
        restarts=sum(worker.restarts for worker in table),
        throttled=sum(worker.throttled for worker in table),
        errors=errors,
        blocks=sum(worker.blocks for worker in table),
        parked=sum(worker.parked for worker in table),
        workers=dict(workers),
    )

"""The status of streams, and the changes that an :class:`EventManager` reports."""

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
    """One batch as it is passed to the index: once, in the order of the stream, valid or not."""

    pod: str
    rank: int
    model: str
    topic: bytes | None
    """Topic of its message; None as long as only replays without topics have arrived."""
    seq: int
    payload: bytes
    joined: bool = True
    """Whether the batch is known to continue the one before. If not, :meth:`PrefixIndex.ingest` gets no ``seq``, and
    the worker's stream place is not whole."""


class Forgotten(NamedTuple):
    """All blocks of one worker are dropped (:meth:`PrefixIndex.clear_worker`): its engine has restarted, its history
    is applied from the beginning, or its pod was just added without a stream to continue.
    """

    pod: str
    rank: int


class Marked(NamedTuple):
    """The state of one worker's stream is set (:meth:`PrefixIndex.mark_worker`). Answers have the worse of it and the
    index's own state.
    """

    pod: str
    rank: int
    state: Verdict
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
    """Pods that a manager follows from now on, and names that it no longer follows."""

    added: tuple[PodSource, ...]
    removed: tuple[str, ...]


class StateChange(NamedTuple):
    """The state of a worker has changed."""

    pod: str
    rank: int
    old: str
    new: str
    reason: str
    """The reason, as text. For ``exact``: a remaining doubt, or empty."""


# Not frozen: a frozen class sets each of 47 fields by a call, which took 5 of the 12 ms of a status of 1,000 pods. Each
# call returns objects of its own, so no other caller sees a change.
@dataclass(slots=True, kw_only=True)
class WorkerStatus:
    """One worker's stream at one moment. Times are in seconds; counters start when the pod is added."""

    pod: str
    rank: int
    model: str
    endpoint: str | None
    replay_endpoint: str | None
    state: str
    """``exact``, ``degraded`` or ``stale``: the worse of the stream's and the index's state."""
    reason: str
    """The reason, as text. For ``exact``: a remaining doubt, or empty."""
    connected: bool
    """Whether its subscription is connected."""
    last_seq: int | None
    """Sequence number of the last applied batch."""
    last_ts: float | None
    """Timestamp of the last applied batch by the engine's clock, seconds since 1970."""
    lag: float | None
    """Time from the timestamp of the last live batch to its application here; None before the first one. It contains
    the difference of the two clocks. Replayed batches do not count, since their age does not depend on this router."""
    replaying: bool
    """Whether a replay is running."""
    waiting: int
    """Batches that wait for a gap to be filled."""
    batches: int
    """Batches applied."""
    gaps: int
    """Gaps in the sequence of received batches."""
    lost_batches: int
    """Batches that replays no longer contained."""
    replays: int
    """Replays that were requested."""
    replays_healed: int
    """Replays that filled a gap."""
    replays_failed: int
    """Gaps that were accepted because no replay filled them."""
    restarts: int
    """Times that a new process was found behind the endpoint."""
    reconnects: int
    duplicates: int
    """Batches that arrived again and were dropped."""
    throttled: int
    """Waits for the rate limit, :attr:`PodSource.max_event_rate`."""
    errors: Mapping[str, int]
    """Counts by reason: malformed messages, payloads that are not batches, and events that could not be applied."""
    events: Mapping[str, int]
    """Counts of stored and removed blocks, clears, parked blocks and skipped events."""
    blocks: int
    """Index blocks held now, in every medium and group."""
    parked: int
    """Blocks that wait for their parent now."""
    counters: Mapping[str, int]
    """Every counter of the stream by name."""


@dataclass(slots=True, kw_only=True)
class PodStatus:
    """A pod at one moment: the sum, or the worst value, of each field of :class:`WorkerStatus` over its workers."""

    pod: str
    model: str
    state: str
    reason: str
    connected: bool
    """Whether every rank is connected."""
    last_seq: int | None
    """The highest of its ranks. Each rank counts by itself."""
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
        """Returns the status as plain dicts, for JSON."""
        return asdict(self)


class StatusTable(dict[str, PodStatus]):
    """A dict of each pod's :class:`PodStatus`, shown as a table in notebooks."""

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
    """Escaped text for a cell of HTML. Names and reasons come from the network."""
    if value is None:
        return ""
    text = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return escape(text.encode("utf-8", "backslashreplace").decode())


def pod_status(pod: str, model: str, workers: Mapping[int, WorkerStatus]) -> PodStatus:
    """Combines the workers of one pod."""
    if len(workers) == 1:  # nearly all pods: halves the time for a fleet of 1,000
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

"""Metrics for Prometheus: a collector over an index, its manager and its picker.

::

    from prometheus_client import CollectorRegistry, generate_latest
    from kvindex import EventManager, PrefixIndex
    from kvindex.metrics import KVIndexCollector
    from kvindex.routing import EndpointPicker

    index = PrefixIndex(block_size=16)
    manager = EventManager(index)
    registry = CollectorRegistry()                      # or prometheus_client.REGISTRY
    registry.register(KVIndexCollector(index, manager, EndpointPicker(index, manager)))
    assert b"kvindex_blocks 0.0" in generate_latest(registry)
    manager.close()

It needs the extra ``metrics`` (``pip install 'kvindex[metrics]'``). ``deploy/`` in the sources has alert rules and a
dashboard for Grafana.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

try:
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError:
    raise ImportError("kvindex.metrics needs prometheus_client: pip install 'kvindex[metrics]'") from None

from .index import PrefixIndex
from .routing import ERROR_TOKENS, PICK_SECONDS, EndpointPicker
from .sync.status import PodStatus

__all__ = ["KVIndexCollector"]

# Metric, key of stats(), help.
_INDEX_GAUGES = (
    ("kvindex_blocks", "blocks", "Distinct blocks in the index."),
    ("kvindex_bytes", "bytes", "Native memory of the index in bytes."),
    ("kvindex_pods", "pods", "Pods that the index knows."),
)
_INDEX_COUNTERS = (
    ("kvindex_evicted_blocks", "shed_blocks", "Blocks that max_bytes evicted."),
    ("kvindex_expired_blocks", "expired_blocks", "Blocks that the index's ttl dropped."),
    ("kvindex_bad_payloads", "bad_payloads", "Payloads that were not an event batch."),
)
_STATES = ("exact", "degraded", "stale")
_WORKER_GAUGES = (
    ("kvindex_worker_connected", "connected", "Whether the worker's subscription is connected."),
    ("kvindex_worker_blocks", "blocks", "Index blocks that the worker holds, in every medium and group."),
    ("kvindex_worker_pending_blocks", "parked", "Blocks of the worker that wait for their parent."),
    ("kvindex_worker_lag_seconds", "lag", "Seconds from the last live batch's timestamp to its application."),
)
_WORKER_COUNTERS = (
    ("kvindex_worker_batches", "batches", "Event batches applied."),
    ("kvindex_worker_gaps", "gaps", "Gaps in the sequence of batches."),
    ("kvindex_worker_lost_batches", "lost_batches", "Batches lost for good: no replay had them."),
    ("kvindex_worker_replays", "replays", "Replays requested."),
    ("kvindex_worker_restarts", "restarts", "Times that another process was found behind the endpoint."),
    ("kvindex_worker_throttled", "throttled", "Times that the worker waited for its rate limit."),
)
# Fields of a ReplicationStatus. A value of None has no series.
_ROLES = ("collector", "follower", "direct")
_LOG_GAUGES = (
    ("kvindex_log_trusted", "trusted", "Whether the log is alive; if not, every pod is stale here."),
    ("kvindex_log_age_seconds", "age", "Seconds since the moment up to which this process has the log."),
    ("kvindex_log_epoch_timestamp_seconds", "began", "When the log's epoch began, by its collector's clock."),
    ("kvindex_log_lease_age_seconds", "lease_age", "Seconds since the collector renewed its lease."),
    ("kvindex_log_snapshot_age_seconds", "snapshot_age", "Seconds since the last snapshot was loaded or made here."),
    ("kvindex_log_snapshot_bytes", "snapshot_bytes", "Size of that snapshot."),
)
_LOG_COUNTERS = (
    ("kvindex_log_entries_read", "entries", "Entries of the log that were read."),
    ("kvindex_log_entries_written", "written", "Entries of the log that were written."),
    ("kvindex_log_read_bytes", "read_bytes", "Bytes of entries that were read."),
    ("kvindex_log_written_bytes", "written_bytes", "Bytes of entries that were written."),
    ("kvindex_log_entries_refilled", "refilled", "Entries written again after the server had lost them."),
    ("kvindex_log_entries_refused", "refused", "Entries that the log refused."),
    ("kvindex_log_snapshots", "snapshots", "Snapshots loaded and written."),
    ("kvindex_log_holes", "holes", "Times that the log could not be continued without a snapshot."),
    ("kvindex_log_takeovers", "takeovers", "Times that this process became the collector."),
    ("kvindex_log_step_downs", "step_downs", "Times that another process replaced it as the collector."),
)
_PICKER_COUNTERS = (
    ("kvindex_picks", "picks", "Requests for which a pod was picked."),
    ("kvindex_unplaced_requests", "unplaced", "Requests for which no pod was ready."),
    ("kvindex_expired_reservations", "expired", "Reservations that were never finished."),
)
_LOADS = (
    ("kvindex_worker_requests", "requests", "Requests in flight."),
    ("kvindex_worker_prefill_tokens", "prefill_tokens", "Expected tokens that wait for prefill."),
    ("kvindex_worker_context_tokens", "context_tokens", "Tokens of the prompts of requests in flight."),
)
_REPORTS = (
    (
        "kvindex_expected_cached_tokens",
        "expected_tokens",
        "Expected cached tokens, of requests with a report.",
    ),
    ("kvindex_reported_cached_tokens", "reported_tokens", "Cached tokens that engines reported."),
)


class KVIndexCollector(Collector):
    """The figures of an index, its manager and its picker, read at each scrape. O(workers). Thread-safe.

    Series of a worker have the labels ``pod`` and ``rank``. The series of a pod end when the pod is removed.

    Args:
        index: The index.
        manager: The :class:`EventManager`, :class:`~kvindex.aio.AsyncEventManager` or
            :class:`~kvindex.replication.ReplicatedIndex` that follows the pods, if any. The last one also has the
            figures of its log, with the labels ``fleet`` and ``shard``.
        picker: The :class:`~kvindex.routing.EndpointPicker`, if any.
    """

    def __init__(self, index: PrefixIndex, manager: Any = None, picker: EndpointPicker | None = None) -> None:
        self._index, self._picker = index, picker
        manager = getattr(manager, "view", manager)
        self._log = manager.status if hasattr(manager, "pod_status") else None
        self._status = getattr(manager, "pod_status", None) or getattr(manager, "status", None)

    def describe(self) -> Iterable[Metric]:
        """Returns an empty list, so that a registry accepts the collector without scraping it."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics of this moment."""
        yield from _single(self._index.stats(), _INDEX_GAUGES, _INDEX_COUNTERS)
        if self._status is not None:
            yield from self._streams(self._status())
        if self._log is not None:
            yield from _replication(self._log())
        if self._picker is not None:
            yield from self._routing(self._picker.stats())

    def _streams(self, pods: Mapping[str, PodStatus]) -> Iterable[Metric]:
        workers = [worker for pod in pods.values() for worker in pod.workers.values()]
        state = GaugeMetricFamily(
            "kvindex_worker_state", "1 for the state that the worker is in, 0 for the others.",
            labels=["pod", "rank", "state"],
        )  # fmt: skip
        errors = CounterMetricFamily(
            "kvindex_worker_errors", "Messages and events that could not be applied, by reason.",
            labels=["pod", "rank", "reason"],
        )  # fmt: skip
        for worker in workers:
            of = [_shown(worker.pod), str(worker.rank)]
            for each in _STATES:
                state.add_metric([*of, each], worker.state == each)
            for reason, count in worker.errors.items():
                errors.add_metric([*of, reason], count)
        yield state
        yield errors
        rows = [((worker.pod, worker.rank), worker) for worker in workers]
        yield from _labelled(rows, _WORKER_GAUGES, GaugeMetricFamily, getattr)
        yield from _labelled(rows, _WORKER_COUNTERS, CounterMetricFamily, getattr)

    def _routing(self, stats: dict[str, Any]) -> Iterable[Metric]:
        yield from _single(stats, (), _PICKER_COUNTERS)
        yield from _labelled(stats["workers"].items(), _LOADS, GaugeMetricFamily, dict.__getitem__)
        for name, key, about in _REPORTS:
            family = CounterMetricFamily(name, about, labels=["pod"])
            for pod, figures in stats["pods"].items():
                family.add_metric([_shown(pod)], figures[key])
            yield family
        errors = HistogramMetricFamily(
            "kvindex_prediction_error_tokens", "Difference of expected and reported cached tokens, by request.",
            labels=["pod"],
        )  # fmt: skip
        for pod, figures in stats["pods"].items():
            total = figures["over_tokens"] + figures["under_tokens"]
            errors.add_metric([_shown(pod)], _buckets(ERROR_TOKENS, figures["error_buckets"]), total)
        yield errors
        seconds = stats["pick_seconds"]
        picks = HistogramMetricFamily("kvindex_pick_seconds", "Time of picking a pod, the match included.")
        picks.add_metric([], _buckets(PICK_SECONDS, seconds["buckets"]), seconds["sum"])
        yield picks


def _replication(status: Any) -> Iterable[Metric]:
    shards = [([status.fleet, str(number)], shard) for number, shard in enumerate(status.shards or (status,))]
    labels = ["fleet", "shard"]
    role = GaugeMetricFamily("kvindex_log_role", "1 for the role of this process.", labels=[*labels, "role"])
    failures = CounterMetricFamily(
        "kvindex_log_failures", "Requests that the log's server failed or refused, by kind.", labels=[*labels, "kind"]
    )
    for of, shard in shards:
        for each in _ROLES:
            role.add_metric([*of, each], shard.role == each)
        for kind, count in shard.failures.items():
            failures.add_metric([*of, kind], count)
    yield role
    yield failures
    kinds: tuple[tuple[Any, Any], ...] = ((GaugeMetricFamily, _LOG_GAUGES), (CounterMetricFamily, _LOG_COUNTERS))
    for family, metrics in kinds:
        for name, field, about in metrics:
            made = family(name, about, labels=labels)
            for of, shard in shards:
                if (value := getattr(shard, field)) is not None:
                    made.add_metric(of, value)
            yield made


def _single(stats: Mapping[str, Any], gauges: Iterable[Any], counters: Iterable[Any]) -> Iterable[Metric]:
    for name, key, about in gauges:
        yield GaugeMetricFamily(name, about, value=stats[key])
    for name, key, about in counters:
        yield CounterMetricFamily(name, about, value=stats[key])


def _labelled(rows: Iterable[Any], metrics: Iterable[Any], kind: Any, get: Any) -> Iterable[Metric]:
    for name, key, about in metrics:
        family = kind(name, about, labels=["pod", "rank"])
        for (pod, rank), figures in rows:
            # A lag is None before the first live batch.
            if (value := get(figures, key)) is not None:
                family.add_metric([_shown(pod), str(rank)], value)
        yield family


def _shown(pod: str) -> str:
    """A name for the exposition format. Names from a payload may contain bytes that are not UTF-8."""
    return pod.encode("utf-8", "replace").decode()


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, accumulate(counts), strict=True))

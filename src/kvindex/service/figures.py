"""The figures of a service: requests for Prometheus, under our names and those of peers, and counts over time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ..metrics import KVIndexCollector
from ..sync.status import PodStatus

__all__ = ["Figures"]

# Seconds between two samples, and how many are kept: half an hour.
EVERY: Final = 5.0
KEPT: Final = 360

# The buckets of Dynamo's indexer.
_SECONDS: Final = tuple(0.0001 * 2**k for k in range(20))
_RATES: Final = tuple(step / 20 for step in range(21))

# The names of our metrics, and a peer's name for the same metric.
_PEERS: Final = {
    "kvindex_http_request_duration_seconds": "dynamo_kvindexer_request_duration_seconds",
    "kvindex_http_requests": "dynamo_kvindexer_requests",
    "kvindex_http_errors": "dynamo_kvindexer_errors",
    "kvindex_hit_rate": "dynamo_component_router_kv_hit_rate",
}
# The names of llm-d's counters, with the key of the index's statistics that each one reports.
_LLM_D: Final = (
    ("llm_d_epp_kv_cache_index_admissions", "blocks_stored", "Blocks that events stored."),
    ("llm_d_epp_kv_cache_index_evictions", "blocks_removed", "Blocks that events removed."),
)


class Figures:
    """Counters, and a sample of all figures every few seconds. Only one thread counts."""

    def __init__(
        self, index: Any, manager: Any, picker: Any, counts: Callable[[], tuple[int, int, dict[str, int]]]
    ) -> None:
        self._index, self._manager, self._picker = index, manager, picker
        registry = CollectorRegistry()
        self._own = CollectorRegistry()
        self._duration = Histogram(
            "kvindex_http_request_duration_seconds", "Time of a request, its body's arrival included.", ["endpoint"],
            registry=self._own, buckets=_SECONDS,
        )  # fmt: skip
        self._requests = Counter("kvindex_http_requests", "Requests.", ["endpoint", "method"], registry=self._own)
        self._errors = Counter(
            "kvindex_http_errors",
            "Requests that were refused or failed.",
            ["endpoint", "status_class"],
            registry=self._own,
        )
        self._rate = Histogram(
            "kvindex_hit_rate", "Share of a prompt's tokens that the best pod holds, by question or pick.",
            registry=self._own, buckets=_RATES,
        )  # fmt: skip
        registry.register(KVIndexCollector(index, manager, picker))
        registry.register(_Renamed(self._own, index, counts))
        self._registry = registry
        self._bound: dict[tuple[str, str], tuple[Any, Any]] = {}
        self._questions = self._tokens = self._held = 0
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._due = 0.0

    def served(self, path: str, method: str, status: int, seconds: float) -> None:
        bound = self._bound.get((path, method))
        if bound is None:
            bound = self._bound[path, method] = (
                self._duration.labels(path), self._requests.labels(path, method)
            )  # fmt: skip
        bound[0].observe(seconds)
        bound[1].inc()
        if status >= 400:
            self._errors.labels(path, f"{status // 100}xx").inc()

    def asked(self, tokens: int, held: int) -> None:
        """Count a question or a pick, with the length of its prompt and the part of it that the best pod holds."""
        self._questions += 1
        self._tokens += tokens
        self._held += held
        if tokens:
            self._rate.observe(held / tokens)

    def tick(self) -> None:
        """Keep a sample. O(pods)."""
        self._samples.append(self.latest(self._manager.status()))

    def latest(self, pods: Mapping[str, PodStatus]) -> dict[str, Any]:
        """Return the counts since the start; the page computes differences between them. ``pods`` is the status of each
        pod, which takes longer to get than all the rest. O(pods)."""
        picks = self._picker.stats()
        reports = picks["pods"].values()
        states = [status.state for status in pods.values()]
        return {
            "time": time.time(),
            "questions": self._questions,
            "tokens": self._tokens,
            "held": self._held,
            "picks": picks["picks"],
            "in_flight": picks["in_flight"],
            "expected": sum(each["expected_tokens"] for each in reports),
            "reported": sum(each["reported_tokens"] for each in reports),
            "wrong": sum(each["over_tokens"] + each["under_tokens"] for each in reports),
            "blocks": self._index.stats()["blocks"],
            **{state: states.count(state) for state in ("exact", "degraded", "stale")},
        }

    def history(self, since: float) -> list[dict[str, Any]]:
        return [sample for sample in self._samples if sample["time"] > since]

    def exposition(self) -> bytes:
        text: bytes = generate_latest(self._registry)
        return text


class _Renamed(Collector):
    """The service's own metrics, each also under the name that a peer's dashboard expects."""

    def __init__(
        self, own: CollectorRegistry, index: Any, counts: Callable[[], tuple[int, int, dict[str, int]]]
    ) -> None:  # fmt: skip
        self._own, self._index, self._counts = own, index, counts

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for metric in self._own.collect():
            yield metric
            name = _PEERS.get(metric.name)
            if name is None:
                continue
            renamed = Metric(name, metric.documentation, metric.type)
            renamed.samples = [
                Sample(sample.name.replace(metric.name, name, 1), *sample[1:]) for sample in metric.samples
            ]
            yield renamed
        models, workers, listeners = self._counts()
        yield GaugeMetricFamily("dynamo_kvindexer_models", "Models and routing groups.", value=models)
        yield GaugeMetricFamily("dynamo_kvindexer_workers", "Instances.", value=workers)
        family = GaugeMetricFamily("dynamo_kvindexer_listeners", "Streams by status.", labels=["status"])
        for status, number in listeners.items():
            family.add_metric([status], number)
        yield family
        stats = self._index.stats()
        for name, key, about in _LLM_D:
            yield CounterMetricFamily(name, about, value=stats[key])

"""Stand-ins for the replicas and requests that a Ray Serve router sees, without a cluster."""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from kvindex import PodSource
from kvindex.integrations.ray import KVEvents

DEPLOYMENT = DeploymentID(name="engine", app_name="app")


class Replica:
    """The attributes of a RunningReplica that a router reads."""

    node_id, availability_zone, multiplexed_model_ids = "node", None, frozenset()
    max_ongoing_requests = 4

    def __init__(self, name: str, stats: dict[str, Any]) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.routing_stats = stats
        self.running = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.running


def announced(pod: Any) -> dict[str, Any]:
    mixin = KVEvents()
    assert mixin.record_routing_stats() == {}
    mixin.kv_events = PodSource.from_vllm(pod.url, name=pod.config.name)
    return mixin.record_routing_stats()


def replica_set(pods: Any) -> list[Replica]:
    return [Replica(name, announced(pod)) for name, pod in pods.items()]


def asked(first: Any, number: int = 0, **more: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id=f"r{number}", internal_request_id=f"i{number}")
    return PendingRequest(args=[first], kwargs=more, metadata=metadata)

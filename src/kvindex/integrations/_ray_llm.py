"""Ray Serve LLM's KV-aware router, with kvindex in place of Dynamo's selection service."""

from __future__ import annotations

import random
import weakref
from types import SimpleNamespace
from typing import Any

import ray

try:
    from ray.llm._internal.serve.routing_policies.kv_aware.kv_aware_router import KVAwareRouter
    from ray.llm._internal.serve.routing_policies.kv_aware.kv_token_tracker import KVTokenTracker
except ImportError as error:
    raise ImportError(f"KVIndexKVAwareRouter needs Ray Serve LLM 2.60 (pip install 'ray[llm]'): {error}") from error

from .. import EventManager, PodSource, PrefixIndex
from ..discovery import Reconciler
from ..routing import Choice, EndpointPicker

__all__ = ["KVIndexKVAwareRouter", "SelectionService"]

#: Releases of Ray whose tracker has the private names below.
TESTED = ("2.60",)
_PRIVATE = {"_create_selection_service": "_svc", "__init__": "_replica_id_by_worker", "_on_deployment_targets": ""}

for _method, _attribute in _PRIVATE.items():
    _found = getattr(KVTokenTracker, _method, None)
    if _found is None or (_attribute and _attribute not in _found.__code__.co_names):
        raise ImportError(
            f"Ray {ray.__version__}: KVTokenTracker has no {_attribute or _method}, on which KVIndexKVAwareRouter "
            f"relies; it was tested with Ray {', '.join(TESTED)}"
        )


class SelectionService:
    """The part of Dynamo's ``SelectionService`` that Ray's ``KVTokenTracker`` calls, over an index and a picker.

    Reservations of other ingress replicas are not counted: each replica weighs only the load of its own requests.
    """

    def __init__(self, *, block_size: int = 16, **options: Any) -> None:
        self.index = PrefixIndex(block_size)
        self.manager = EventManager(self.index)
        self.picker = EndpointPicker(self.index, self.manager, **options)
        self._pods = Reconciler(self.manager)
        # Ray may never report the end of a request. The picker then drops its choice with the reservation.
        self._choices: weakref.WeakValueDictionary[str, Choice] = weakref.WeakValueDictionary()
        weakref.finalize(self, self.manager.close)

    async def upsert_worker(self, worker: dict[str, Any]) -> None:
        """Follow a replica's events."""
        name = str(worker["worker_id"])
        ranks = {
            rank: (endpoint, worker.get("replay_endpoint")) for rank, endpoint in worker["kv_events_endpoints"].items()
        }
        # A replica that is already followed at these endpoints keeps its blocks.
        self._pods.reconcile({**self._pods.pods, name: PodSource(name, ranks=ranks, engine="vllm")})

    async def delete_worker(self, worker_id: int) -> None:
        """Stop following a replica."""
        self._pods.reconcile({name: each for name, each in self._pods.pods.items() if name != str(worker_id)})

    async def select_and_reserve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Pick one of the allowed replicas, at random if none of them has a current stream."""
        tokens, allowed = request["token_ids"], request["allowed_worker_ids"]
        choice = self.picker.pick(tokens, pods=map(str, allowed))
        if choice is not None:
            await self.free_reservation(request["selection_id"])
            self._choices[request["selection_id"]] = choice
        cached = 0 if choice is None else choice.cached_tokens
        return {
            "worker_id": random.choice(allowed) if choice is None else int(choice.pod),
            "dp_rank": 0 if choice is None else choice.rank,
            "overlap": {"longest_matched": cached},
            "effective_prefill_tokens": len(tokens) - cached,
            "isl_tokens": len(tokens),
            "sequence_hashes": [],
        }

    async def create_reservation(self, reservation: dict[str, Any]) -> None:
        """Ignore a reservation of another ingress replica."""

    async def prefill_complete(self, selection_id: str) -> None:
        """Note that a request has its first token."""
        if (choice := self._choices.get(selection_id)) is not None:
            self.picker.prefilled(choice)

    async def free_reservation(self, selection_id: str) -> None:
        """Note that a request is over."""
        if (choice := self._choices.pop(selection_id, None)) is not None:
            self.picker.finished(choice)

    def add_output_block(self, selection_id: str, *, decay_fraction: float | None = None) -> None:
        """Ignore the output of a request, which the picker does not weigh."""

    def shutdown(self) -> None:
        """Stop following all replicas."""
        self.manager.close()


class KVIndexKVAwareRouter(KVAwareRouter):
    """Ray Serve LLM's ``KVAwareRouter`` over an index of kvindex: ai-dynamo is not needed.

    Ray configures the engines' events for it, as for its own class. ``request_router_kwargs`` are ``block_size`` and
    the arguments of :class:`EndpointPicker`.
    """

    def initialize_state(self, **options: Any) -> None:
        """Ray's hook after the construction."""
        super().initialize_state()
        tracker = self._kv_token_tracker
        if tracker is None or isinstance(tracker._svc, SelectionService):
            return
        if tracker._svc is not None:
            tracker._svc.shutdown()
        tracker._svc = SelectionService(**options)
        # The replicas that the tracker got before were not registered anywhere.
        tracker._replica_id_by_worker.clear()

    def update_replicas(self, replicas: list[Any]) -> None:
        """Ray's hook when replicas come, go, or announce something else."""
        super().update_replicas(replicas)
        if self._kv_token_tracker is not None:
            self._kv_token_tracker._on_deployment_targets(SimpleNamespace(running_replicas=replicas))

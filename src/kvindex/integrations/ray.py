"""Ray Serve: request routers that send a request to the replica that reuses most of its prompt.

:class:`PrefixRequestRouter` is for any deployment whose replicas run an engine, :class:`KVIndexKVAwareRouter` for Ray
Serve LLM, and :class:`KVEvents` announces a replica's event streams. It needs the extra ``ray`` (``pip install
'kvindex[ray]'``).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

try:
    import ray
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
except ImportError as error:
    raise ImportError(f"kvindex.integrations.ray needs {error.name}: pip install 'kvindex[ray]'") from None

from .. import EventManager, InvalidValueError, PodSource, PrefixIndex
from ..discovery import Reconciler
from ..routing import Choice, EndpointPicker
from ._requests import encoder_of, token_ids

if TYPE_CHECKING:
    from ._ray_llm import KVIndexKVAwareRouter

__all__ = ["KVEvents", "KVIndexKVAwareRouter", "PrefixRequestRouter", "routing_stats", "vllm_source"]

_STATS = "kv_event_metadata"


def __getattr__(name: str) -> Any:
    # In a module of its own, because Ray Serve without Ray Serve LLM cannot import it.
    if name == "KVIndexKVAwareRouter":
        from ._ray_llm import KVIndexKVAwareRouter

        return KVIndexKVAwareRouter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def routing_stats(source: PodSource) -> dict[str, Any]:
    """Return the value of a replica's ``record_routing_stats`` that announces its event streams, as in Ray Serve LLM.

    Raises:
        InvalidValueError: The source has several ranks; the shape has room for one.
    """
    if len(ranks := source.workers()) != 1:
        raise InvalidValueError(f"{source.name!r} has {len(ranks)} ranks; a replica announces one")
    [(rank, pair)] = ranks.items()
    told = {"endpoint": pair.endpoint, "replay_endpoint": pair.replay_endpoint, "dp_rank": rank}
    return {_STATS: {**told, "block_size": source.block_size, "engine": source.engine}}


def vllm_source(config: Any, *, host: str | None = None) -> PodSource:
    """Return the event streams of a vLLM engine that runs in this process.

    Args:
        config: Its ``VllmConfig``: ``engine.vllm_config`` of an ``AsyncLLM``.
        host: The address of this node that the routers reach; None is Ray's.

    Raises:
        InvalidValueError: The engine publishes no events over ZMQ.
    """
    events, rank = config.kv_events_config, config.parallel_config.data_parallel_rank or 0
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        raise InvalidValueError("the engine publishes no KV events: give it kv_events_config with publisher 'zmq'")
    address = host or ray.util.get_node_ip_address()

    def reachable(endpoint: str | None) -> str | None:
        if not endpoint:
            return None
        where, _, port = endpoint.rpartition(":")
        # vLLM adds the rank to the port.
        where = f"tcp://{address}" if where in ("tcp://*", "tcp://0.0.0.0", "tcp://[::]") else where
        return f"{where}:{int(port) + rank}"

    pair = reachable(events.endpoint), reachable(events.replay_endpoint)
    return PodSource("vllm", ranks={rank: pair}, engine="vllm", block_size=config.cache_config.block_size)  # type: ignore[dict-item]


class KVEvents:
    """A replica that announces its event streams: a mixin for deployments. Set ``kv_events`` when the engine is up.

    ``kv_events`` is a :class:`PodSource` of one rank: :func:`vllm_source`, ``PodSource.from_vllm(url)`` or
    ``from_sglang(url)`` for servers beside the replica. The hosts of its endpoints have to be reachable from the
    routers.
    """

    kv_events: PodSource | None = None

    def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve's hook, which it calls in each replica every ``request_routing_stats_period_s`` seconds."""
        return {} if self.kv_events is None else routing_stats(self.kv_events)


class PrefixRequestRouter(RequestRouter):
    """Routes each request to the replica at which it costs least (:class:`EndpointPicker`).

    It follows the replicas that announce their event streams (:class:`KVEvents`). All other replicas form the next
    rank. Ray chooses among them by the length of their queues if the first replica is full, or if a
    request has no token ids.

    ``RequestRouterConfig(request_router_kwargs=...)`` takes:

    Args:
        block_size: Tokens per block of the index; engines' blocks are multiples of it.
        tokenizer: Directory with ``tokenizer.json`` and ``chat_template.jinja``, for requests that have texts.
        engine: The engine of replicas that do not announce theirs; Ray Serve LLM's are vLLM's.
        options: Further arguments of :class:`EndpointPicker`.
    """

    def initialize_state(
        self, *, block_size: int = 16, tokenizer: str | None = None, engine: str | None = "vllm", **options: Any
    ) -> None:
        """Ray's hook after the construction, with ``request_router_kwargs``."""
        self.index = PrefixIndex(block_size)
        self.manager = EventManager(self.index)
        self.picker = EndpointPicker(self.index, self.manager, **options)
        self._pods = Reconciler(self.manager)
        self._engine = engine
        self._encoder = None if tokenizer is None else encoder_of(tokenizer)
        # Ray may never report the end of a request: its choice is dropped with the reservation, by the picker.
        self._choices: weakref.WeakValueDictionary[str, Choice] = weakref.WeakValueDictionary()
        weakref.finalize(self, self.manager.close)

    def tokens(self, request: PendingRequest) -> tuple[Any, Mapping[str, Any]]:
        """Return the token ids of a request, or None, and its body. Override it for requests of another form.

        It reads the first argument of the call: token ids, a text, or an OpenAI request as a dict or as an object with
        ``model_dump``. It runs in a thread.
        """
        first: Any = next(iter([*request.args, *request.kwargs.values()]), None)
        if hasattr(first, "dtype"):
            return first, {}
        if hasattr(first, "model_dump"):
            first = first.model_dump()
        body = first if isinstance(first, Mapping) else {"prompt": first}
        return token_ids(body, self._encoder), body

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray's hook when replicas come, go, or announce something else."""
        super().update_replicas(replicas)
        found = {}
        for each in replicas:
            if told := each.routing_stats.get(_STATS):
                name, pair = _name(each.replica_id), (told["endpoint"], told.get("replay_endpoint"))
                engine = told.get("engine", self._engine)
                found[name] = PodSource(name, ranks={told.get("dp_rank") or 0: pair}, engine=engine)
        self._pods.reconcile(found)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ray's hook for the choice of replicas. It returns ranks of replicas, which Ray tries one after another."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        tokens, body = await asyncio.to_thread(self.tokens, pending_request)
        key = pending_request.metadata.internal_request_id
        self._finish(key)
        if tokens is None or not len(tokens):
            return [candidate_replicas]
        named = {_name(each.replica_id): each for each in candidate_replicas}
        choice = self.picker.pick(tokens, pods=named, cache_salt=body.get("cache_salt"))
        if choice is None:
            return [candidate_replicas]
        self._choices[key] = choice
        best = named.pop(choice.pod)
        return [[best], list(named.values())] if named else [[best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Ray's hook once a replica has taken the request. It is another replica if the first one was full."""
        key = pending_request.metadata.internal_request_id
        if (choice := self._choices.get(key)) is not None and choice.pod != _name(replica_id):
            self._finish(key)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray's hook at the end of a request."""
        self._finish(internal_request_id)

    def _finish(self, key: str) -> None:
        if (choice := self._choices.pop(key, None)) is not None:
            self.picker.finished(choice)


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.to_full_id_str())

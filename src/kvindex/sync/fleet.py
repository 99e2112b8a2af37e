"""The pods that a manager follows, and their arrival and removal in the thread of its loop."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import zmq

from ..answers import StreamPlace
from ..errors import InvalidTypeError, InvalidValueError, StreamError, UnknownPodError
from .addresses import same_endpoint
from .allowance import Allowance
from .loop import StreamLoop
from .policy import StreamPolicy
from .pulse import Pulse
from .resolver import Resolver
from .shared import SEATS, Subscriptions, may_share
from .sockets import SocketOptions
from .source import Endpoints, PodSource
from .status import Configured, Forgotten, IndexChange, PodsChange, Removed, StateChange
from .turns import Turns
from .worker import Index, Setting, Worker

__all__ = ["Fleet", "FollowedPod"]

log = logging.getLogger("kvindex.sync")

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

# File descriptors of a SUB socket: its own, and the two ends of its monitor.
_DESCRIPTORS: Final = 3

# Names of removed pods that are kept: messages that are still on their way must not bring these pods back.
_REMEMBERED: Final = 65_536


# The methods of its index that a manager calls.
_CALLS: Final = (
    "clear_worker", "configure_pod", "ingest", "mark_worker", "remove_pod", "stream_places", "worker_stats",
)  # fmt: skip

# All fleets of this process. Two fleets of one index must not follow the same pod: each would clear the batches that
# the other applies.
_FLEETS: Final[weakref.WeakSet[Fleet]] = weakref.WeakSet()
_CLAIMING: Final = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_CLAIMING.acquire, after_in_parent=_CLAIMING.release, after_in_child=lambda: _in_child()
    )  # fmt: skip


def _in_child() -> None:
    _CLAIMING.release()
    for fleet in list(_FLEETS):
        fleet.pulse.end()  # the loop is the parent's, and does not limit the child's use of the index


def check_index(index: object, replaces: bool = False) -> None:
    """Refuse an object that is not an index, and an index whose content another owner replaces, unless ``replaces``."""
    if isinstance(index, type) or not all(callable(getattr(index, call, None)) for call in _CALLS):
        raise InvalidTypeError(f"an EventManager needs a PrefixIndex, not {type(index).__name__}")
    if not replaces and (owner := getattr(index, "_owner", "")):
        raise InvalidValueError(
            f"an EventManager cannot follow pods for the index of {owner}, whose snapshots replace all of it: add the"
            " pods to that, by its add_pod, or give the EventManager a PrefixIndex of its own"
        )


class FollowedPod:
    """One followed pod. ``came_to`` is the bound endpoint at which it appeared by itself, None if it was added."""

    def __init__(self, source: PodSource, burst: float, came_to: object | None = None) -> None:
        self.source = source
        limits = (source.max_event_rate, source.max_byte_rate)
        self.allowance = None if limits == (None, None) else Allowance(*limits, burst)
        self.came_to = came_to
        self.key = source.server_key  # identifies its messages at bound endpoints with keys
        self.workers: dict[int, Worker] = {}
        self.places: dict[int, StreamPlace] = {}  # the progress of streams that were applied before this one began


class Fleet:
    """The followed pods, their loop, and the callbacks. The lists of callbacks may change at any time, from any thread;
    :attr:`pods` may be read from any thread. All methods except :meth:`unknown` belong to the loop's thread."""

    def __init__(
        self, index: Index, policy: StreamPolicy | None, options: SocketOptions, max_replays: int,
        context: zmq.Context[Any] | None, is_alone: bool,
    ) -> None:  # fmt: skip
        self.index = index
        limit = getattr(index, "_limit", None) if is_alone else None
        self.pulse = Pulse(None if limit is None else partial(limit, self), self._resumed)
        self.pods: dict[str, FollowedPod] = {}
        self.removed: OrderedDict[str, None] = OrderedDict()  # oldest first
        self.topics: dict[bytes, str] = {}
        """The names of pods by the topics that they connect with."""
        self.on_change: list[Callable[[StateChange], None]] = []
        self.on_pods: list[Callable[[PodsChange], None]] = []
        self.taps: list[Callable[[IndexChange], None]] = []
        self.wakers: list[Callable[[], None]] = []
        self.changed = threading.Condition()
        self.at_end: list[Callable[[], None]] = []
        """Called when the loop ends, after the workers have ended."""
        self.accepts = self.accepts_keys = False
        """Whether an endpoint is bound that pods may connect to, and whether one with keys is bound."""
        self._endpoints: dict[str, str] = {}  # pods by the endpoints at which they publish and answer replays
        self._burst = (policy or StreamPolicy()).burst
        self._turns = Turns(max_replays)
        self._resolver = Resolver()
        self.loop = StreamLoop(
            context=context, hurries=self._turns.__bool__, ending=self._end, ended=self.wake_all,
            pulse=self.pulse,
        )  # fmt: skip
        self._setting = Setting(
            index, policy, options, self.taps, self._tell, self._need, self._resolver.resolve, self._turns,
            Subscriptions(self.loop, options, self._need), self.pulse,
        )  # fmt: skip
        with _CLAIMING:
            _FLEETS.add(self)

    def alive(self) -> None:
        if self.loop.closed:
            raise StreamError("this EventManager is closed")

    def add(self, source: PodSource) -> None:
        self.alive()
        if not isinstance(source, PodSource):
            raise InvalidTypeError(f"add_pod takes a PodSource, not {type(source).__name__}")
        present = self.pods.get(source.name)
        if present is not None and present.came_to is None:
            raise StreamError(f"pod {source.name!r} is followed already; remove it first to follow it again")
        size, own = source.block_size, self.index.block_size
        if size is not None and size % own:
            raise InvalidValueError(
                f"pod {source.name!r} has blocks of {size} tokens, which an index of {own}-token blocks cannot hold:"
                f" start the engine with a multiple of {own}, or the index with block_size={size}"
            )
        ends = source.workers()
        bound = all(pair.endpoint is None for pair in ends.values())
        if bound and not self.accepts:
            raise InvalidValueError(
                f"pod {source.name!r} has no endpoint, and nothing is bound that it could connect to"
            )
        if bound and source.server_key is not None and not self.accepts_keys:
            raise InvalidValueError(
                f"pod {source.name!r} has a server_key, and nothing is bound with keys: bind(..., server_keys=...)"
            )
        topic = (source.topic or f"kv@{source.name}@{source.model}").encode()
        if bound and self.topics.get(topic, source.name) != source.name:
            raise StreamError(f"topic {topic.decode()!r} belongs to pod {self.topics[topic]!r} already")
        for use, endpoint in source.endpoints():
            owner = self._endpoints.get(same_endpoint(endpoint), source.name)
            if owner != source.name:
                raise StreamError(
                    f"{use} at {endpoint}, which is followed as pod {owner!r} already: one"
                    " engine has one name, and each engine its own ports"
                )
        if present is not None:
            self.remove(source.name)  # it appeared by itself, before it was described
        pod = FollowedPod(source, self._burst)
        self._enlist(pod, topic if bound else None)
        for rank, at in ends.items():
            if self.follows(pod):
                self.employ(pod, rank, at)
        if self.follows(pod):
            self._tell_pods(PodsChange((source,), ()))

    def appear(self, source: PodSource, topic: bytes, came_to: object) -> FollowedPod | None:
        """Follow a pod that has connected by itself. Returns None if a callback has removed it at once."""
        pod = FollowedPod(source, self._burst, came_to)
        self._enlist(pod, topic)
        log.info("%s: connected to %s", source.name, came_to)
        if self.follows(pod):
            self._tell_pods(PodsChange((source,), ()))
        return pod if self.follows(pod) else None

    def describe(self, source: PodSource) -> None:
        self.alive()
        pod = self.pods.get(source.name)
        if pod is None:
            raise self.unknown(source.name)
        if not pod.source.same_streams(source):
            raise InvalidValueError(
                f"pod {source.name!r} has other streams than it is followed by: remove it and add it again"
            )
        if pod.source != source:
            pod.source = source
            self._tell_pods(PodsChange((source,), ()))

    def remove(self, name: str) -> None:
        self.alive()
        pod = self.pods.pop(name, None) if isinstance(name, str) else None
        if pod is None:
            raise self.unknown(name)
        for worker in pod.workers.values():
            worker.close()
        for topic in [topic for topic, owner in self.topics.items() if owner == name]:
            del self.topics[topic]
        for _, endpoint in pod.source.endpoints():
            self._endpoints.pop(same_endpoint(endpoint), None)
        self.removed[name] = None
        while len(self.removed) > _REMEMBERED:
            self.removed.popitem(last=False)
        with suppress(UnknownPodError):  # another caller was faster, and the pod is gone as requested
            self.index.remove_pod(name)
        log.info("%s: removed", name)
        self.wake_all()
        # Last, because a callback may add the pod again.
        self._setting.show(Removed(name))
        self._tell_pods(PodsChange((), (name,)))

    def unknown(self, name: object) -> UnknownPodError:
        return UnknownPodError(
            f"no pod {name!r} is followed; followed are {', '.join(sorted(self.pods)) or 'none yet'}"
        )

    def follows(self, pod: FollowedPod) -> bool:
        """Whether no callback has removed the pod meanwhile."""
        return self.pods.get(pod.source.name) is pod

    def _shares(self, other: Fleet, name: str) -> bool:
        """Whether another fleet follows this pod in the same index."""
        return other is not self and other.index is self.index and name in other.pods and not other.loop.over

    def employ(self, pod: FollowedPod, rank: int, at: Endpoints) -> Worker:
        worker = Worker(
            self.loop, self._setting, pod.source, rank, at, pod.places.pop(rank, None), pod.allowance
        )  # fmt: skip
        pod.workers[rank] = worker
        worker.begin(self.loop.clock())
        return worker

    def _enlist(self, pod: FollowedPod, topic: bytes | None) -> None:
        """Register a pod, with the ``topic`` by which a bound endpoint recognizes it, and prepare the index for it."""
        source = pod.source
        options: dict[str, Any] = {
            "presence": source.presence,
            "clear_media": source.clear_media,
            "chunk_size": source.chunk_size,
            "engine": source.engine,
            "eagle": source.eagle,
            "hybrid": source.hybrid,
            "ignore_media": source.ignore_media,
            "max_blocks": source.max_blocks or 0,
        }
        ends = source.workers()
        with _CLAIMING:
            if any(self._shares(other, source.name) for other in _FLEETS):
                raise StreamError(
                    f"pod {source.name!r} of this index is followed by another EventManager: remove it there first"
                )
            self.index.configure_pod(source.name, **options)
            pod.places = {
                rank: place
                for rank, place in self.index.stream_places(source.name).items()
                if rank in ends and ends[rank].replay_endpoint is not None and place.model == source.model
            }
            # Before any callback, because a callback may remove the pod again.
            self.pods[source.name] = pod
        for _, endpoint in source.endpoints():
            self._endpoints[same_endpoint(endpoint)] = source.name
        if topic is not None:
            self.topics[topic] = source.name
        self.removed.pop(source.name, None)
        self._setting.show(Configured(source.name, options))
        # Blocks that are already counted would be counted twice, and blocks that no stream confirms may be gone.
        for rank in self.index.worker_stats(source.name) if self.follows(pod) else ():
            if rank in pod.places:
                continue
            self._setting.show(Forgotten(source.name, rank))
            if not self.follows(pod):
                return
            self.index.clear_worker(source.name, rank)

    # ---------------------------------------------------------------------------------------------------- callbacks

    def _tell(self, change: StateChange) -> None:
        for callback in list(self.on_change):
            try:
                callback(change)
            except Exception:
                log.exception("a callback for state changes has failed")
        self.wake_all()

    def _tell_pods(self, change: PodsChange) -> None:
        for callback in list(self.on_pods):
            try:
                callback(change)
            except Exception:
                log.exception("a callback for pods has failed")

    def _need(self) -> str:
        workers = own = 0
        for pod in list(self.pods.values()):
            limited = pod.allowance is not None or pod.source.server_key is not None
            ends = [at.endpoint or "" for at in pod.source.workers().values()]
            workers += len(ends)
            own += sum(limited or not may_share(endpoint) for endpoint in ends)
        sockets = own + -(-(workers - own) // SEATS)
        limit = "the system's limit" if resource is None else f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"
        need = workers + sockets * _DESCRIPTORS + 2 * self._turns.most
        return (
            f"`ulimit -n` allows this process {limit}, and {workers:,} workers need {need:,} beside the rest of the"
            " process; raise it, and the pods that wait are connected"
        )

    def wake_all(self) -> None:
        with self.changed:
            self.changed.notify_all()
        for waker in list(self.wakers):
            waker()

    def _resumed(self) -> None:
        for pod in list(self.pods.values()):
            for worker in list(pod.workers.values()):
                worker.compare_state()
        self.wake_all()

    def _end(self) -> None:
        failure = self.loop.failure
        reason = "the manager is closed" if failure is None else f"its thread failed: {failure!r}"
        self._turns.end()
        self._resolver.close()
        for pod in list(self.pods.values()):
            for worker in list(pod.workers.values()):
                worker.abandon(reason)
        for callback in self.at_end:
            callback()

"""The pods that a manager follows: what comes and goes in the thread of its loop."""

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

# Of a SUB socket: its own, and the two ends of its monitor.
_DESCRIPTORS: Final = 3

# Names of removed pods that are kept: what is still on its way must not bring them back.
_REMEMBERED: Final = 65_536


# What a manager calls of its index.
_CALLS: Final = (
    "clear_worker", "configure_pod", "ingest", "mark_worker", "remove_pod", "stream_places", "worker_stats",
)  # fmt: skip

# All of this process: two of one index must not follow the same pod, for each would clear what the other applies.
_FLEETS: Final[weakref.WeakSet[Fleet]] = weakref.WeakSet()
_CLAIMING: Final = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_CLAIMING.acquire, after_in_parent=_CLAIMING.release, after_in_child=lambda: _in_child()
    )  # fmt: skip


def _in_child() -> None:
    _CLAIMING.release()
    for fleet in list(_FLEETS):
        fleet.pulse.end()  # its loop is the parent's: what the child does with the index needs none


def check_index(index: object, replaces: bool = False) -> None:
    """Refuse what is no index, and one whose content somebody else ``replaces``."""
    if isinstance(index, type) or not all(callable(getattr(index, call, None)) for call in _CALLS):
        raise InvalidTypeError(f"an EventManager needs a PrefixIndex, not {type(index).__name__}")
    if not replaces and (owner := getattr(index, "_owner", "")):
        raise InvalidValueError(
            f"an EventManager cannot follow pods for the index of {owner}, whose snapshots replace all of it: add the"
            " pods to that, by its add_pod, or give the EventManager a PrefixIndex of its own"
        )


class FollowedPod:
    """One pod. ``came_to`` is the bound endpoint at which it appeared by itself, None where it was added."""

    def __init__(self, source: PodSource, burst: float, came_to: object | None = None) -> None:
        self.source = source
        limits = (source.max_event_rate, source.max_byte_rate)
        self.allowance = None if limits == (None, None) else Allowance(*limits, burst)
        self.came_to = came_to
        self.key = source.server_key  # whose messages are its own, at bound endpoints with keys
        self.workers: dict[int, Worker] = {}
        self.places: dict[int, StreamPlace] = {}  # how far streams were applied before this one began


class Fleet:
    """The followed pods, their loop, and who is told of them. The lists of callbacks may change at any time, from any
    thread; :attr:`pods` may be read from any. All methods but :meth:`unknown` belong to the loop's thread."""

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
        """Whose the topics are that pods connect with."""
        self.on_change: list[Callable[[StateChange], None]] = []
        self.on_pods: list[Callable[[PodsChange], None]] = []
        self.taps: list[Callable[[IndexChange], None]] = []
        self.wakers: list[Callable[[], None]] = []
        self.changed = threading.Condition()
        self.at_end: list[Callable[[], None]] = []
        """Called when the loop ends, after the workers have."""
        self.accepts = self.accepts_keys = False
        """Whether anything is bound that pods may connect to, and whether with keys."""
        self._endpoints: dict[str, str] = {}  # where followed pods publish and answer replays
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
            self.remove(source.name)  # it came by itself, before anybody could say what it is
        pod = FollowedPod(source, self._burst)
        self._enlist(pod, topic if bound else None)
        for rank, at in ends.items():
            if self.follows(pod):
                self.employ(pod, rank, at)
        if self.follows(pod):
            self._tell_pods(PodsChange((source,), ()))

    def appear(self, source: PodSource, topic: bytes, came_to: object) -> FollowedPod | None:
        """Follow a pod that has connected by itself; None where a callback has removed it at once."""
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
        with suppress(UnknownPodError):  # somebody was faster; it is gone, which is what was asked for
            self.index.remove_pod(name)
        log.info("%s: removed", name)
        self.wake_all()
        # Last: a callback may add the pod again.
        self._setting.show(Removed(name))
        self._tell_pods(PodsChange((), (name,)))

    def unknown(self, name: object) -> UnknownPodError:
        return UnknownPodError(
            f"no pod {name!r} is followed; followed are {', '.join(sorted(self.pods)) or 'none yet'}"
        )

    def follows(self, pod: FollowedPod) -> bool:
        """Whether no callback has removed it meanwhile."""
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
        """Enter a pod, with the ``topic`` by which a bound endpoint knows it, and prepare the index for it."""
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
            # Before any callback: it may remove the pod again.
            self.pods[source.name] = pod
        for _, endpoint in source.endpoints():
            self._endpoints[same_endpoint(endpoint)] = source.name
        if topic is not None:
            self.topics[topic] = source.name
        self.removed.pop(source.name, None)
        self._setting.show(Configured(source.name, options))
        # A count that is already there would be counted twice, and what no stream vouches for is not known.
        for rank in self.index.worker_stats(source.name) if self.follows(pod) else ():
            if rank in pod.places:
                continue
            self._setting.show(Forgotten(source.name, rank))
            if not self.follows(pod):
                return
            self.index.clear_worker(source.name, rank)

    # ------------------------------------------------------------------------------------------ who is told of what

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

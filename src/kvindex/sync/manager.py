"""Pods that come and go, and what people call: :class:`EventManager`."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self, TypeVar

import zmq

from ..answers import StreamPlace
from ..errors import InvalidTypeError, InvalidValueError, StreamError, UnknownPodError
from .allowance import Allowance
from .frames import FrameFault, batch_rank, parse_live, parse_topic
from .loop import StreamLoop
from .policy import Policy
from .ranks import MOST_RANKS
from .sockets import Bound, Doorkeeper, SocketOptions
from .source import Endpoints, Engine, PodSource, Presence, bind_endpoint, check_pair, is_key, same_endpoint
from .status import (
    Configured,
    Forgotten,
    IndexChange,
    PodsChange,
    PodStatus,
    Removed,
    StateChange,
    WorkerStatus,
    pod_status,
)
from .worker import Index, Setting, Worker

__all__ = ["EventManager", "Index"]

log = logging.getLogger("kvindex.sync")

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

# Of one worker: its SUB socket, the connection, and the two ends of its monitor.
_DESCRIPTORS: Final = 4


class _Pod:
    def __init__(self, source: PodSource, burst: float, came_to: Bound | None = None) -> None:
        self.source = source
        limits = (source.max_event_rate, source.max_byte_rate)
        self.allowance = None if limits == (None, None) else Allowance(*limits, burst)
        self.came_to = came_to  # the bound endpoint at which it appeared by itself
        self.key = source.server_key  # whose messages are its own, at bound endpoints with keys
        self.workers: dict[int, Worker] = {}
        self.places: dict[int, StreamPlace] = {}  # how far streams were applied before this one began


def _enter(table: list[T], item: T) -> Callable[[], None]:
    """Put something into a list; gives what takes it out again, once."""
    table.append(item)

    def end() -> None:
        with suppress(ValueError):
            table.remove(item)

    return end


class EventManager:
    """Keeps an index equal to a fleet of engines, over ZMQ, through everything that happens to them.

    One thread owns all sockets of all pods. ``index`` is a :class:`PrefixIndex`; every answer it gives says how far
    each pod's stream can be trusted at that moment.

    ``policy`` has the times and bounds of a stream (:class:`Policy`). ``heartbeat`` is how often, in seconds, a silent
    peer is asked whether it lives; one that is silent for two and a half of them after that counts as lost (0: never
    asked).
    ``connect_timeout`` is for making a connection, in seconds. ``queue`` messages may wait at a socket: what a
    publisher sends beyond that it drops, which is a gap here. Messages beyond ``max_message`` bytes are refused. At
    most ``max_replays`` replays run at once. ``context`` is a ``zmq.Context`` to use instead of an own one.

    A context manager: ``close`` ends the thread and leaves no socket behind, and every pod it kept is ``stale`` from
    then on. All methods may be called from any thread, also from callbacks, and take effect before they return.
    """

    def __init__(
        self, index: Index, *, policy: Policy | None = None, heartbeat: float = 0.5, connect_timeout: float = 3.0,
        queue: int = 2000, max_message: int = 32 << 20, max_replays: int = 16, context: zmq.Context[Any] | None = None,
    ) -> None:  # fmt: skip
        self._index = index
        self._options = SocketOptions(
            heartbeat=heartbeat, connect_timeout=connect_timeout, queue=queue, max_message=max_message
        )
        self._callbacks: list[Callable[[StateChange], None]] = []
        self._wakers: list[Callable[[], None]] = []
        self._taps: list[Callable[[IndexChange], None]] = []
        self._members: list[Callable[[PodsChange], None]] = []
        self._burst = (policy or Policy()).burst
        self._setting = Setting(index, policy, self._options, self._taps, self._tell, self._need)
        self._loop = StreamLoop(
            context=context, max_replays=max_replays, ending=self._end, ended=self._wake_all
        )  # fmt: skip
        self._pods: dict[str, _Pod] = {}
        self._bound: list[Bound] = []
        self._door: Doorkeeper | None = None
        self._admitted: dict[bytes, frozenset[str] | None] = {}  # by domain; None is everybody
        self._templates: dict[Bound, dict[str, Any]] = {}
        self._topics: dict[bytes, str] = {}
        self._endpoints: dict[str, str] = {}  # where followed pods publish and answer replays
        # Names that were removed: what is still on its way must not bring them back. Bounded, oldest first.
        self._removed: OrderedDict[str, None] = OrderedDict()
        self._faults: Counter[str] = Counter()
        self._changed = threading.Condition()

    # ------------------------------------------------------------------------------------------- what people call

    def start(self) -> None:
        """Start the thread; everything that needs it does so by itself. Raises :class:`StreamError` after a close."""
        self._loop.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, close every socket, and mark what was followed ``stale``. Closing twice is fine."""
        self._loop.close()

    def add_pod(self, source: PodSource) -> None:
        """Follow a pod. It is ``stale`` until its history is applied.

        What the index holds under that name is forgotten: only what this stream shows counts. Except where a stream was
        applied to it before (by another manager, or before it was saved and loaded), and this one has a replay that
        shows that stream's last batch again: then only what came later is applied. Raises
        :class:`StreamError` when a pod of that name is followed already, or another one at one of its endpoints, or
        :class:`InvalidValueError` when its blocks can not be placed.
        """
        self._loop.call(partial(self._add, source))

    def describe_pod(self, source: PodSource) -> None:
        """Give a followed pod another ``address`` or other ``labels``; its streams and blocks stay as they are.

        ``on_pods`` tells of it as of a pod that was added. Raises :class:`UnknownPodError`, or
        :class:`InvalidValueError` where anything else of the source differs: remove the pod and add it anew.
        """
        self._loop.call(partial(self._describe, source))

    def remove_pod(self, name: str) -> None:
        """Stop following a pod and forget all it held. When this returns, no event that is still on its way brings it
        back; :meth:`add_pod` does. Raises :class:`UnknownPodError`."""
        self._loop.call(partial(self._remove, name))

    def bind(
        self, endpoint: str, *, presence: Presence | None = None, clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None, engine: Engine | None = None, eagle: bool | Iterable[int] = False,
        hybrid: bool = False, ignore_media: Iterable[str] = (), max_blocks: int | None = None,
        max_event_rate: float | None = None, max_byte_rate: float | None = None, max_pods: int = 1024,
        server_keys: tuple[str, str] | None = None, publisher_keys: Iterable[str] | None = None,
    ) -> str:  # fmt: skip
        """Let pods connect here instead of connecting to them; gives the endpoint, with the port where it was a
        wildcard.

        Topics are ``kv@POD@MODEL``. A pod appears with its first message, with these options, up to ``max_pods`` of
        them; one that :meth:`add_pod` was told of (a :class:`PodSource` without endpoint) has its own, and may have a
        replay endpoint.

        ``server_keys`` are our own (public, secret) CURVE keys (Z85): connections are then encrypted, and only
        publishers that have keys too and know our public one are heard. ``publisher_keys`` are the public keys of those
        that are admitted beside the declared pods' ``server_key``; None admits every one. A pod belongs to a key: to
        its ``server_key``, or else to the first that speaks for it.

        Raises :class:`StreamError` when it can not be bound, :class:`InvalidValueError` for what are no keys.
        """
        options: dict[str, Any] = {
            "presence": presence,
            "clear_media": None if clear_media is None else frozenset(clear_media),
            "chunk_size": chunk_size,
            "engine": engine,
            "eagle": eagle,
            "hybrid": hybrid,
            "ignore_media": ignore_media,
            "max_blocks": max_blocks,
            "max_event_rate": max_event_rate,
            "max_byte_rate": max_byte_rate,
        }
        PodSource("options", **options)
        if server_keys is not None:
            server_keys = check_pair(server_keys, "server_keys")
        elif publisher_keys is not None:
            raise InvalidValueError("publisher_keys say nothing without server_keys")
        admitted = None if publisher_keys is None else frozenset(publisher_keys)
        if strange := [key for key in admitted or () if not is_key(key)]:
            raise InvalidValueError(f"publisher_keys must be CURVE keys, 40 characters of Z85, not {strange[0]!r:.60}")
        return self._loop.call(partial(self._bind, bind_endpoint(endpoint), options, max_pods, server_keys, admitted))

    def status(self) -> dict[str, PodStatus]:
        """What every followed pod is like at this moment, by name. O(workers); does not wait for the thread."""
        table = {}
        for name, pod in list(self._pods.items()):
            try:
                figures = self._index.worker_stats(name)
            except KeyError:
                figures = {}
            workers: dict[int, WorkerStatus] = {}
            for worker in list(pod.workers.values()):
                workers |= worker.describe(figures)
            table[name] = pod_status(name, pod.source.model, workers)
        return table

    def faults(self) -> dict[str, int]:
        """Messages at bound endpoints that no pod could be blamed for, by reason."""
        return dict(self._faults)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Call ``callback`` with a :class:`StateChange` whenever a worker's state changes; gives what ends that.

        It is called in the manager's thread and holds up every stream while it runs: hand over to a queue what takes
        time.
        """
        return _enter(self._callbacks, callback)

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        """Call ``callback`` with a :class:`PodsChange` after a pod was added or removed, by whoever it was; gives what
        ends that.

        It is called in the manager's thread and holds up every stream while it runs. Pods that were added before are
        in :meth:`pods`.
        """
        return _enter(self._members, callback)

    def pods(self) -> dict[str, PodSource]:
        """The source of every followed pod, by name: a router finds the pod's ``address`` and ``labels`` there.
        O(pods); does not wait for the thread."""
        return {name: pod.source for name, pod in list(self._pods.items())}

    def tap(self, callback: Callable[[IndexChange], None]) -> Callable[[], None]:
        """Call ``callback`` with every change of the index before it is made, in order; gives what ends that.

        A change is a :class:`Configured`, :class:`Batch`, :class:`Forgotten`, :class:`Marked` or :class:`Removed`, each
        named after the call of the index that it stands for: another index to which the same calls are made gives the
        same answers. A change that a callback prevents by removing the pod is not made.

        The callback is called in the manager's thread and holds up every stream while it runs.
        """
        return _enter(self._taps, callback)

    def on_progress(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Call ``waker`` whenever :meth:`is_current` or :attr:`closed` may have become true; gives what ends that.

        It is called in the manager's thread, must not raise and must not take time.
        """
        return _enter(self._wakers, waker)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, or this is a forked child; every pod is or is about to be stale then."""
        return self._loop.closed

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """Whether none of these pods (all if None) is stale: connected, and everything up to now is applied or given
        up.

        Raises :class:`UnknownPodError` for a pod that is not followed.
        """
        table = self._pods
        names = list(table) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        for name in names:
            pod = table.get(name)
            if pod is None:
                raise self._unknown(name)
            workers = list(pod.workers.values())
            if not workers or self._loop.closed or any(worker.verdict == "stale" for worker in workers):
                return False
        return True

    def wait_until_current(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> bool:
        """Wait until :meth:`is_current`, at most ``timeout`` seconds (None: as long as it takes). False when it was
        not.

        Not from a callback, which would wait for itself: :class:`StreamError`.
        """
        return self._wait(self.is_current, timeout, pods)

    def is_exact(self, pods: Iterable[str] | None = None) -> bool:
        """Whether all of these pods (all that are followed if None) are ``exact``.

        Raises :class:`UnknownPodError` for a pod that is not followed.
        """
        return not self._loop.closed and all(
            pod.workers and all(worker.state == "exact" for worker in list(pod.workers.values()))
            for pod in self._named(pods)
        )

    def inexact(self, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Which of these pods (all that are followed if None) are not ``exact``, and why:
        ``{"a": "stale: replaying"}``.

        O(workers); does not wait for the thread. Raises :class:`UnknownPodError` for a pod that is not followed.
        """
        names = [pod.source.name for pod in self._named(pods)]
        table = self.status()
        return {
            name: f"{table[name].state}: {table[name].reason}"
            for name in names
            if name in table and table[name].state != "exact"
        }

    def wait_until_exact(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Wait until :meth:`is_exact`, at most ``timeout`` seconds (None: as long as it takes). Gives :meth:`inexact`,
        which is empty when all are.

        Not from a callback, which would wait for itself: :class:`StreamError`.
        """
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        return {} if self._wait(self.is_exact, timeout, names) else self.inexact(names)

    def _named(self, pods: Iterable[str] | None) -> list[_Pod]:
        names = list(self._pods) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        found = []
        for name in names:
            pod = self._pods.get(name)
            if pod is not None:
                found.append(pod)
            elif pods is not None:
                raise self._unknown(name)
        return found

    def _wait(
        self, done: Callable[[list[str] | None], bool], timeout: float | None, pods: Iterable[str] | None
    ) -> bool:  # fmt: skip
        if self._loop.is_current:
            raise StreamError("a callback of the manager's own thread can not wait for that thread")
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        until = None if timeout is None else time.monotonic() + timeout
        if self._loop.closed:  # in a forked child, the parent's thread may have been at what follows
            return done(names)
        with self._changed:
            while not done(names):
                if self._loop.closed:
                    return False
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def post(self, command: Callable[[], T]) -> Future[T]:
        """Do something in the manager's thread and do not wait for it: what :mod:`kvindex.aio` is made of.

        ``command`` may call every method here and holds up every stream while it runs. Cancelling the future keeps it
        from being run as long as it has not begun. Raises :class:`StreamError` after a close.
        """
        return self._loop.post(command)

    # ------------------------------------------------------------------------------- what the loop and the workers say

    def _tell(self, change: StateChange) -> None:
        for callback in list(self._callbacks):
            try:
                callback(change)
            except Exception:
                log.exception("a callback for state changes has failed")
        self._wake_all()

    def _need(self) -> str:
        workers = sum(len(pod.source.workers()) for pod in list(self._pods.values()))
        limit = "the system's limit" if resource is None else f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"
        need = workers * _DESCRIPTORS + 2 * self._loop.max_replays
        return (
            f"`ulimit -n` allows this process {limit}, and {workers:,} workers need {need:,} beside the rest of the"
            " process; raise it, and the pods that wait are connected"
        )

    def _wake_all(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for waker in list(self._wakers):
            waker()

    def _end(self) -> None:
        reason = "the manager is closed" if self._loop.failure is None else f"its thread failed: {self._loop.failure!r}"
        for pod in list(self._pods.values()):
            for worker in list(pod.workers.values()):
                worker.abandon(reason)
        for bound in self._bound:
            bound.close()
        if self._door is not None:
            self._door.close()

    # --------------------------------------------------------------------------------------------------- pods

    def _alive(self) -> None:
        if self._loop.closed:
            raise StreamError("this EventManager is closed")

    def _add(self, source: PodSource) -> None:
        self._alive()
        if not isinstance(source, PodSource):
            raise InvalidTypeError(f"a pod is added by a PodSource, not by {type(source).__name__}")
        present = self._pods.get(source.name)
        if present is not None and present.came_to is None:
            raise StreamError(f"pod {source.name!r} is followed already; remove it first to follow it anew")
        size, own = source.block_size, self._index.block_size
        if size is not None and size % own:
            raise InvalidValueError(
                f"pod {source.name!r} has blocks of {size} tokens, which an index of {own}-token blocks can not hold:"
                f" start the engine with a multiple of {own}, or the index with block_size={size}"
            )
        bound = all(pair.endpoint is None for pair in source.workers().values())
        if bound and not self._bound:
            raise InvalidValueError(
                f"pod {source.name!r} has no endpoint, and nothing is bound that it could connect to"
            )
        if bound and source.server_key is not None and self._door is None:
            raise InvalidValueError(
                f"pod {source.name!r} has a server_key, and nothing is bound with keys: bind(..., server_keys=...)"
            )
        topic = (source.topic or f"kv@{source.name}@{source.model}").encode()
        if bound and self._topics.get(topic, source.name) != source.name:
            raise StreamError(f"topic {topic.decode()!r} belongs to pod {self._topics[topic]!r} already")
        for use, endpoint in source.endpoints():
            owner = self._endpoints.get(same_endpoint(endpoint), source.name)
            if owner != source.name:
                raise StreamError(
                    f"{use} at {endpoint}, which is followed as pod {owner!r} already: one"
                    " engine has one name, and each engine its own ports"
                )
        if present is not None:
            self._remove(source.name)  # it came by itself, before anybody could say what it is
        pod = _Pod(source, self._burst)
        self._enlist(pod, topic if bound else None)
        for rank, at in source.workers().items():
            if self._follows(pod):
                self._employ(pod, rank, at)
        if self._follows(pod):
            self._tell_pods(PodsChange((source,), ()))

    def _describe(self, source: PodSource) -> None:
        self._alive()
        pod = self._pods.get(source.name)
        if pod is None:
            raise self._unknown(source.name)
        if not pod.source.same_streams(source):
            raise InvalidValueError(
                f"pod {source.name!r} has other streams than it is followed by: remove it and add it anew"
            )
        if pod.source != source:
            pod.source = source
            self._tell_pods(PodsChange((source,), ()))

    def _follows(self, pod: _Pod) -> bool:
        """Whether no callback has removed it meanwhile."""
        return self._pods.get(pod.source.name) is pod

    def _tell_pods(self, change: PodsChange) -> None:
        for callback in list(self._members):
            try:
                callback(change)
            except Exception:
                log.exception("a callback for pods has failed")

    def _enlist(self, pod: _Pod, topic: bytes | None) -> None:
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
        self._index.configure_pod(source.name, **options)
        ends = source.workers()
        pod.places = {
            rank: place
            for rank, place in self._index.stream_places(source.name).items()
            if rank in ends and ends[rank].replay_endpoint is not None and place.model == source.model
        }
        # Before any callback: it may remove the pod again.
        self._pods[source.name] = pod
        for _, endpoint in source.endpoints():
            self._endpoints[same_endpoint(endpoint)] = source.name
        if topic is not None:
            self._topics[topic] = source.name
        self._removed.pop(source.name, None)
        self._setting.show(Configured(source.name, options))
        # A count that is already there would be counted twice, and what no stream vouches for is not known.
        for rank in self._index.worker_stats(source.name) if self._follows(pod) else ():
            if rank in pod.places:
                continue
            self._setting.show(Forgotten(source.name, rank))
            if not self._follows(pod):
                return
            self._index.clear_worker(source.name, rank)

    def _employ(self, pod: _Pod, rank: int, at: Endpoints) -> Worker:
        worker = Worker(
            self._loop, self._setting, pod.source, rank, at, pod.places.pop(rank, None), pod.allowance
        )  # fmt: skip
        pod.workers[rank] = worker
        worker.begin(self._loop.clock())
        return worker

    def _remove(self, name: str) -> None:
        self._alive()
        pod = self._pods.pop(name, None) if isinstance(name, str) else None
        if pod is None:
            raise self._unknown(name)
        for worker in pod.workers.values():
            worker.close()
        for topic in [topic for topic, owner in self._topics.items() if owner == name]:
            del self._topics[topic]
        for _, endpoint in pod.source.endpoints():
            self._endpoints.pop(same_endpoint(endpoint), None)
        self._removed[name] = None
        while len(self._removed) > 65536:
            self._removed.popitem(last=False)
        with suppress(UnknownPodError):  # somebody was faster; it is gone, which is what was asked for
            self._index.remove_pod(name)
        log.info("%s: removed", name)
        self._wake_all()
        # Last: a callback may add the pod again.
        self._setting.show(Removed(name))
        self._tell_pods(PodsChange((), (name,)))

    def _unknown(self, name: object) -> UnknownPodError:
        return UnknownPodError(
            f"no pod {name!r} is followed; followed are {', '.join(sorted(self._pods)) or 'none yet'}"
        )

    # -------------------------------------------------------------------------------------------- bound endpoints

    def _bind(
        self, endpoint: str, options: dict[str, Any], max_pods: int, keys: tuple[str, str] | None,
        admitted: frozenset[str] | None,
    ) -> str:  # fmt: skip
        self._alive()
        domain = f"kvindex-{len(self._bound)}".encode()
        try:
            if keys is not None and self._door is None:
                self._door = Doorkeeper(self._loop, self._loop.context, self._admits)
            bound = Bound(
                self._loop, self._loop.context, self._options, endpoint,
                lost=lambda connection, now: self._bound_lost(bound, connection, now),
                message=lambda frames, connection, key, now: self._bound_message(bound, frames, connection, key, now),
                secret=None if keys is None else keys[1].encode(), domain=domain,
            )  # fmt: skip
        except zmq.ZMQError as error:
            raise StreamError(f"{endpoint} can not be bound: {error}") from error
        self._admitted[domain] = admitted
        self._bound.append(bound)
        self._templates[bound] = {"options": options, "max_pods": max_pods, "by_connection": {}}
        return bound.endpoint

    def _admits(self, domain: bytes, key: str) -> bool:
        admitted = self._admitted.get(domain, frozenset())
        return admitted is None or key in admitted or any(pod.source.server_key == key for pod in self._pods.values())

    def _bound_lost(self, bound: Bound, connection: int, now: float) -> None:
        for worker in self._templates[bound]["by_connection"].pop(connection, ()):
            if worker.rival == connection and not worker.gone:
                worker.compete(None, now)
            if worker.connection == connection and not worker.gone:
                worker.disconnected(now, "the pod's connection was lost")

    def _bound_message(
        self, bound: Bound, frames: list[bytes], connection: int | None, key: str | None, now: float
    ) -> None:
        try:
            topic, seq, payload = parse_live(frames)
        except FrameFault as fault:
            self._bound_fault(fault.reason, str(fault))
            return
        worker = self._bound_worker(bound, topic, payload, key)
        if worker is None or worker.gone:
            return
        if connection is None:
            if worker.connection is None or worker.stream.is_connected:
                # Of a connection that is gone, while the worker has another one, or never had one that we saw.
                self._faults["late_frames"] += 1
                return
        elif worker.connection is None or connection > worker.connection:
            if worker.stream.is_connected:
                worker.disconnected(now, "another connection brings its stream")
            if worker.gone:
                return
            worker.connection, worker.rival = connection, None
            self._templates[bound]["by_connection"].setdefault(connection, set()).add(worker)
            worker.connected(now)
        elif connection < worker.connection:
            worker.errors["late_frames"] += 1
            worker.compete(connection, now)
            return
        worker.offer(frames, seq, payload, now)

    def _bound_fault(self, reason: str, detail: str) -> None:
        self._faults[reason] += 1
        if self._faults[reason] == 1:
            log.warning("bound endpoint: %s (further ones are only counted)", detail)

    def _bound_worker(self, bound: Bound, topic: bytes, payload: bytes, key: str | None) -> Worker | None:
        template = self._templates[bound]
        name = self._topics.get(topic)
        if name is None:
            parts = parse_topic(topic)
            if parts is None:
                self._bound_fault("bad_topic", f"topic {topic!r:.80} is not kv@POD@MODEL")
                return None
            name, model = parts
            if name in self._removed:
                self._faults["removed_pod"] += 1
                return None
            if name in self._pods:
                known = self._pods[name].source
                detail = (
                    f"topic {topic!r:.80} says it is pod {name!r}, which is followed as {known.topic or known.model!r}"
                )
                self._bound_fault("foreign_topic", detail)
                return None
            if sum(pod.came_to is bound for pod in self._pods.values()) >= template["max_pods"]:
                self._bound_fault("too_many_pods", f"pod {name!r:.80} would be one more than {template['max_pods']}")
                return None
            pod = _Pod(PodSource(name, model=model, topic=topic.decode(), **template["options"]), self._burst, bound)
            self._enlist(pod, topic)
            log.info("%s: connected to %s", name, bound.endpoint)
            if self._follows(pod):
                self._tell_pods(PodsChange((pod.source,), ()))
            if not self._follows(pod):
                return None
        pod = self._pods[name]
        if pod.key is None:
            pod.key = key
        if pod.key != key:
            self._bound_fault("foreign_key", f"pod {name!r} is another key's than who speaks for it here")
            return None
        rank = batch_rank(payload)
        worker = pod.workers.get(rank)
        if worker is None:
            if rank >= MOST_RANKS or (pod.source.ranks is not None and rank not in pod.source.ranks):
                self._bound_fault("bad_rank", f"pod {name!r} has no rank {rank}")
                return None
            worker = self._employ(pod, rank, Endpoints(None, None))
        return worker

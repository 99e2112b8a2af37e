"""What people call: :class:`EventManager`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar

import zmq

from ..errors import InvalidValueError, StreamError
from .addresses import bind_endpoint
from .bound import BoundEndpoints
from .fleet import Fleet, FollowedPod, check_index
from .policy import StreamPolicy
from .sockets import SocketOptions
from .source import Engine, PodSource, Presence, check_pair, is_key
from .status import IndexChange, PodsChange, PodStatus, StateChange, StatusTable, WorkerStatus, pod_status
from .worker import Index

__all__ = ["EventManager", "Index"]

T = TypeVar("T")


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

    ``policy`` has the times and bounds of a stream (:class:`StreamPolicy`). ``heartbeat`` is how often, in seconds, a
    silent peer is asked whether it lives; one that is silent for two and a half of them after that counts as lost (0:
    never asked).
    ``connect_timeout`` is for making a connection, in seconds. ``queue`` messages may wait at a socket: what a
    publisher sends beyond that it drops, which is a gap here. Messages beyond ``max_message`` bytes are refused. At
    most ``max_replays`` replays run at once. ``context`` is a ``zmq.Context`` to use instead of an own one.

    A context manager: ``close`` ends the thread and leaves no socket behind, and every pod it kept is ``stale`` from
    then on. One that nobody holds any more and that was not closed is a ``ResourceWarning``, and ends as well. All
    methods may be called from any thread, also from callbacks, and take effect before they return. Raises
    :class:`InvalidTypeError` for what is no index.
    """

    def __init__(
        self, index: Index, *, policy: StreamPolicy | None = None, heartbeat: float = 0.5, connect_timeout: float = 3.0,
        queue: int = 2000, max_message: int = 32 << 20, max_replays: int = 16, context: zmq.Context[Any] | None = None,
    ) -> None:  # fmt: skip
        check_index(index)
        options = SocketOptions(
            heartbeat=heartbeat, connect_timeout=connect_timeout, queue=queue, max_message=max_message
        )
        self._fleet = Fleet(index, policy, options, max_replays, context)
        self._bound = BoundEndpoints(self._fleet, options)
        self._loop = self._fleet.loop

    def __repr__(self) -> str:
        count = len(self._fleet.pods)
        pods = "1 pod" if count == 1 else f"{count:,} pods"
        return f"EventManager({self._fleet.index!r}, {pods}{', closed' if self.closed else ''})"

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # The thread knows the pods and their loop, not this object: so it is noticed when nobody holds it any more.
        loop = getattr(self, "_loop", None)
        if loop is not None and loop.runs:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            loop.stop()

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
        :class:`StreamError` when a pod of that name is followed already, by this manager or by another one of the same
        index, or another pod at one of its endpoints, or :class:`InvalidValueError` when its blocks can not be placed.
        """
        self._loop.call(partial(self._fleet.add, source))

    def describe_pod(self, source: PodSource) -> None:
        """Give a followed pod another ``address`` or other ``labels``; its streams and blocks stay as they are.

        ``on_pods`` tells of it as of a pod that was added. Raises :class:`UnknownPodError`, or
        :class:`InvalidValueError` where anything else of the source differs: remove the pod and add it anew.
        """
        self._loop.call(partial(self._fleet.describe, source))

    def remove_pod(self, name: str) -> None:
        """Stop following a pod and forget all it held. When this returns, no event that is still on its way brings it
        back; :meth:`add_pod` does. Raises :class:`UnknownPodError`."""
        self._loop.call(partial(self._fleet.remove, name))

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
        return self._loop.call(
            partial(self._bound.bind, bind_endpoint(endpoint), options, max_pods, server_keys, admitted)
        )

    def status(self) -> dict[str, PodStatus]:
        """What every followed pod is like at this moment, by name; a notebook shows a table. O(workers); does not wait
        for the thread."""
        table = StatusTable()
        for name, pod in list(self._fleet.pods.items()):
            try:
                figures = self._fleet.index.worker_stats(name)
            except KeyError:
                figures = {}
            workers: dict[int, WorkerStatus] = {}
            for worker in list(pod.workers.values()):
                workers |= worker.describe(figures)
            table[name] = pod_status(name, pod.source.model, workers)
        return table

    def faults(self) -> dict[str, int]:
        """Messages at bound endpoints that no pod could be blamed for, by reason."""
        return dict(self._bound.faults)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Call ``callback`` with a :class:`StateChange` whenever a worker's state changes; gives what ends that.

        It is called in the manager's thread and holds up every stream while it runs: hand over to a queue what takes
        time.
        """
        return _enter(self._fleet.on_change, callback)

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        """Call ``callback`` with a :class:`PodsChange` after a pod was added or removed, by whoever it was; gives what
        ends that.

        It is called in the manager's thread and holds up every stream while it runs. Pods that were added before are
        in :meth:`pods`.
        """
        return _enter(self._fleet.on_pods, callback)

    def pods(self) -> dict[str, PodSource]:
        """The source of every followed pod, by name: a router finds the pod's ``address`` and ``labels`` there.
        O(pods); does not wait for the thread."""
        return {name: pod.source for name, pod in list(self._fleet.pods.items())}

    def tap(self, callback: Callable[[IndexChange], None]) -> Callable[[], None]:
        """Call ``callback`` with every change of the index before it is made, in order; gives what ends that.

        A change is a :class:`Configured`, :class:`Batch`, :class:`Forgotten`, :class:`Marked` or :class:`Removed`, each
        named after the call of the index that it stands for: another index to which the same calls are made gives the
        same answers. A change that a callback prevents by removing the pod is not made.

        The callback is called in the manager's thread and holds up every stream while it runs.
        """
        return _enter(self._fleet.taps, callback)

    def on_progress(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Call ``waker`` whenever :meth:`is_current` or :attr:`closed` may have become true; gives what ends that.

        It is called in the manager's thread, must not raise and must not take time.
        """
        return _enter(self._fleet.wakers, waker)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, or this is a forked child; every pod is or is about to be stale then."""
        return self._loop.closed

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """Whether none of these pods (all if None) is stale: connected, and everything up to now is applied or given
        up.

        Raises :class:`UnknownPodError` for a pod that is not followed.
        """
        table = self._fleet.pods
        names = list(table) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        for name in names:
            pod = table.get(name)
            if pod is None:
                raise self._fleet.unknown(name)
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

    def _named(self, pods: Iterable[str] | None) -> list[FollowedPod]:
        names = list(self._fleet.pods) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        found = []
        for name in names:
            pod = self._fleet.pods.get(name)
            if pod is not None:
                found.append(pod)
            elif pods is not None:
                raise self._fleet.unknown(name)
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
        with self._fleet.changed:
            while not done(names):
                if self._loop.closed:
                    return False
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._fleet.changed.wait(left)
        return True

    def post(self, command: Callable[[], T]) -> Future[T]:
        """Do something in the manager's thread and do not wait for it: what :mod:`kvindex.aio` is made of.

        ``command`` may call every method here and holds up every stream while it runs. Cancelling the future keeps it
        from being run as long as it has not begun. Raises :class:`StreamError` after a close.
        """
        return self._loop.post(command)

"""The public class for live streams, :class:`EventManager`."""

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
    """Appends an item to a list, and returns a function that removes it once."""
    table.append(item)

    def end() -> None:
        with suppress(ValueError):
            table.remove(item)

    return end


class EventManager:
    """Follows the event streams of a fleet over ZMQ and keeps an index equal to the engines' caches.

    One background thread owns all sockets. It orders batches, requests lost ones again, notices restarts, and sets the
    state of each pod, which every answer of the index carries::

        from kvindex import EventManager, PodSource, PrefixIndex

        index = PrefixIndex(block_size=16)
        with EventManager(index) as manager:
            manager.add_pod(PodSource("a", endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558"))
            manager.wait_until_current(timeout=0.1)
            match = index.match_prefix(range(64))           # from any thread, at any time

    A context manager. :meth:`close` ends the thread, closes every socket, and marks every followed pod ``stale``. A
    manager that is garbage-collected without a close raises a :class:`ResourceWarning` and is closed.

    All methods are thread-safe, may be called from callbacks, and have taken effect when they return.

    Args:
        index: The :class:`PrefixIndex` to update.
        policy: Times and bounds of a stream.
        heartbeat: Seconds between heartbeats to a silent peer; 0 disables them. A peer that does not answer within
            another 1.5 intervals is considered disconnected.
        connect_timeout: Seconds that establishing a connection may take.
        queue: Messages that may wait at a socket. The publisher drops messages beyond it, which leaves a gap.
        max_message: Largest message in bytes. Larger ones are refused.
        max_replays: Replays that run at the same time.
        context: A ``zmq.Context`` to use; None creates one.

    Raises:
        InvalidTypeError: ``index`` is not an index, or another argument has the wrong type.
        InvalidValueError: An argument is out of range, or ``index`` belongs to a
            :class:`~kvindex.replication.ReplicatedIndex`, whose :meth:`add_pod` takes the pods.
    """

    _replaces = False  # whether it is closed before the content of the index is replaced

    def __init__(
        self, index: Index, *, policy: StreamPolicy | None = None, heartbeat: float = 0.7, connect_timeout: float = 3.0,
        queue: int = 2000, max_message: int = 32 << 20, max_replays: int = 16, context: zmq.Context[Any] | None = None,
    ) -> None:  # fmt: skip
        check_index(index, self._replaces)
        options = SocketOptions(
            heartbeat=heartbeat, connect_timeout=connect_timeout, queue=queue, max_message=max_message
        )
        self._fleet = Fleet(index, policy, options, max_replays, context, is_alone=not self._replaces)
        self._bound = BoundEndpoints(self._fleet, options)
        self._loop = self._fleet.loop

    def __repr__(self) -> str:
        count = len(self._fleet.pods)
        pods = "1 pod" if count == 1 else f"{count:,} pods"
        return f"EventManager({self._fleet.index!r}, {pods}{', closed' if self.closed else ''})"

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # The thread refers to the pods and their loop, not to this object, so this runs when no caller holds it.
        loop = getattr(self, "_loop", None)
        if loop is not None and loop.runs:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            loop.stop()

    # --------------------------------------------------------------------------------------------- public methods

    def start(self) -> None:
        """Starts the thread. Methods that need the thread start it themselves.

        Raises:
            StreamError: The manager is closed.
        """
        self._loop.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, closes every socket, and marks every followed pod ``stale``. A second call has no effect."""
        self._loop.close()

    def add_pod(self, source: PodSource) -> None:
        """Follows a pod. The pod is ``stale`` until its history is applied.

        The index drops the blocks that it has under that name, unless they come from an earlier stream (of another
        manager, or of the index before it was saved and loaded) whose last batch the pod's replay contains. Then only
        later batches are applied.

        Args:
            source: The pod's streams.

        Raises:
            StreamError: The pod is followed already, by this manager or another one of the same index. Or another pod
                is followed at one of its endpoints. Or the manager is closed.
            InvalidTypeError: ``source`` is not a :class:`PodSource`.
            InvalidValueError: The index cannot hold blocks of the pod's ``block_size``, or the pod has no endpoint and
                :meth:`bind` was not called.
        """
        self._loop.call(partial(self._fleet.add, source))

    def describe_pod(self, source: PodSource) -> None:
        """Changes the ``address`` or ``labels`` of a followed pod. Its streams and blocks stay as they are.

        Callbacks of :meth:`on_pods` are called as for an added pod.

        Args:
            source: The new source, equal to the old one except for ``address`` and ``labels``.

        Raises:
            UnknownPodError: The pod is not followed.
            InvalidValueError: Another field differs. Remove the pod and add it again.
        """
        self._loop.call(partial(self._fleet.describe, source))

    def remove_pod(self, name: str) -> None:
        """Stops following a pod and removes its blocks from the index.

        Events that are still being received do not create it again.

        Args:
            name: The pod's name.

        Raises:
            UnknownPodError: The pod is not followed.
        """
        self._loop.call(partial(self._fleet.remove, name))

    def bind(
        self, endpoint: str, *, presence: Presence | None = None, clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None, engine: Engine | None = None, eagle: bool | Iterable[int] = False,
        hybrid: bool = False, ignore_media: Iterable[str] = (), max_blocks: int | None = None,
        max_event_rate: float | None = None, max_byte_rate: float | None = None, max_pods: int = 1024,
        server_keys: tuple[str, str] | None = None, publisher_keys: Iterable[str] | None = None,
    ) -> str:  # fmt: skip
        """Binds an endpoint that pods connect to, in place of connections from here to the pods.

        Topics are ``kv@POD@MODEL``. A pod appears with its first message and has the options below. A pod that was
        added before with a :class:`PodSource` without ``endpoint`` has the options of that source, and may have a
        replay endpoint. The options ``presence`` to ``max_byte_rate`` are those of :class:`PodSource`.

        Args:
            endpoint: The endpoint, such as ``tcp://*:5557``. Port ``*`` or 0 binds a free one.
            presence: As in :class:`PodSource`.
            clear_media: As in :class:`PodSource`.
            chunk_size: As in :class:`PodSource`.
            engine: As in :class:`PodSource`.
            eagle: As in :class:`PodSource`.
            hybrid: As in :class:`PodSource`.
            ignore_media: As in :class:`PodSource`.
            max_blocks: As in :class:`PodSource`.
            max_event_rate: As in :class:`PodSource`.
            max_byte_rate: As in :class:`PodSource`.
            max_pods: Pods that may appear at this endpoint.
            server_keys: Our own CURVE keys, (public, secret) in Z85. Connections are then encrypted, and only
                publishers with keys of their own that know our public key are accepted.
            publisher_keys: Public keys of the publishers to accept, in addition to the ``server_key`` of added pods;
                None accepts every key. A pod belongs to one key: its ``server_key``, or else the first key that it
                appears with.

        Returns:
            The bound endpoint, with its port.

        Raises:
            StreamError: The endpoint cannot be bound.
            InvalidTypeError: An option has the wrong type.
            InvalidValueError: A key is not a CURVE key, or an option is out of range.
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
            raise InvalidValueError("publisher_keys need server_keys")
        admitted = None if publisher_keys is None else frozenset(publisher_keys)
        if strange := [key for key in admitted or () if not is_key(key)]:
            raise InvalidValueError(f"publisher_keys must be CURVE keys, 40 characters of Z85, not {strange[0]!r:.60}")
        return self._loop.call(
            partial(self._bound.bind, bind_endpoint(endpoint), options, max_pods, server_keys, admitted)
        )

    def status(self) -> dict[str, PodStatus]:
        """Returns the status of every followed pod at this moment. O(workers). Does not wait for the thread.

        Returns:
            ``{pod: PodStatus}``. Notebooks show it as a table.
        """
        table = StatusTable()
        for name, pod in list(self._fleet.pods.items()):
            try:
                figures = self._fleet.index.worker_stats(name)
            except KeyError:
                figures = {}
            workers: dict[int, WorkerStatus] = {}
            for worker in list(pod.workers.values()):
                worker.describe(figures, workers)
            table[name] = pod_status(name, pod.source.model, workers)
        return table

    def faults(self) -> dict[str, int]:
        """Returns counts of messages at bound endpoints that belong to no pod.

        Returns:
            ``{reason: count}``.
        """
        return dict(self._bound.faults)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Calls a function whenever the state of a worker changes.

        The function runs in the manager's thread and delays every stream meanwhile. Pass longer work to a queue.

        Args:
            callback: Called with a :class:`StateChange`.

        Returns:
            A function that ends the calls.
        """
        return _enter(self._fleet.on_change, callback)

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        """Calls a function whenever a pod was added, described or removed. :meth:`pods` has the pods that were added
        before.

        The function runs in the manager's thread and delays every stream meanwhile. Pass longer work to a queue.

        Args:
            callback: Called with a :class:`~kvindex.sync.status.PodsChange`.

        Returns:
            A function that ends the calls.
        """
        return _enter(self._fleet.on_pods, callback)

    def pods(self) -> dict[str, PodSource]:
        """Returns the source of every followed pod, with its ``address`` and ``labels``. O(pods). Does not wait for
        the thread.

        Returns:
            ``{pod: PodSource}``.
        """
        return {name: pod.source for name, pod in list(self._fleet.pods.items())}

    def tap(self, callback: Callable[[IndexChange], None]) -> Callable[[], None]:
        """Calls a function with every change of the index, in order, before the change is made.

        A change is a :class:`Configured`, :class:`Batch`, :class:`Forgotten`, :class:`Marked` or :class:`Removed`.
        Each stands for one call of the index; the same calls on another index give the same answers. A change is
        skipped if a callback removes its pod.

        The function runs in the manager's thread and delays every stream meanwhile. Pass longer work to a queue.

        Args:
            callback: Called with each change.

        Returns:
            A function that ends the calls.
        """
        return _enter(self._fleet.taps, callback)

    def on_progress(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Calls a function whenever :meth:`is_current` or :attr:`closed` may have become true.

        The function runs in the manager's thread. It must not raise, and must return at once.

        Args:
            waker: Called without arguments.

        Returns:
            A function that ends the calls.
        """
        return _enter(self._fleet.wakers, waker)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, or this process is a forked child. Every pod is then ``stale`` or about to
        be.
        """
        return self._loop.closed

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """Returns whether no pod is ``stale``: each is connected, and all batches so far are applied or given up.

        It is true for degraded pods, and without any pods. Use :meth:`is_exact` to exclude degraded ones.

        Args:
            pods: Names of the pods to check; None for all followed pods.

        Raises:
            UnknownPodError: A pod is not followed.
        """
        table = self._fleet.pods
        names = list(table) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        for name in names:
            pod = table.get(name)
            if pod is None:
                raise self._fleet.unknown(name)
            workers = list(pod.workers.values())
            if not workers or self._loop.closed or any(worker.told == "stale" for worker in workers):
                return False
        return not self._fleet.pulse.lapsed

    def wait_until_current(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> bool:
        """Waits until :meth:`is_current`.

        Args:
            timeout: Maximum time in seconds; None for no limit.
            pods: Names of the pods to wait for; None for all followed pods.

        Returns:
            Whether the pods are current. False after ``timeout`` seconds, or if the manager was closed.

        Raises:
            StreamError: Called from a callback, which would wait for itself.
            UnknownPodError: A pod is not followed.
        """
        return self._wait(self.is_current, timeout, pods)

    def is_exact(self, pods: Iterable[str] | None = None) -> bool:
        """Returns whether every pod is ``exact``.

        Args:
            pods: Names of the pods to check; None for all followed pods.

        Raises:
            UnknownPodError: A pod is not followed.
        """
        return not (self._loop.closed or self._fleet.pulse.lapsed) and all(
            pod.workers and all(worker.state == "exact" for worker in list(pod.workers.values()))
            for pod in self._named(pods)
        )

    def inexact(self, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Returns the pods that are not ``exact``, with the reasons. O(workers). Does not wait for the thread.

        Args:
            pods: Names of the pods to check; None for all followed pods.

        Returns:
            ``{pod: "state: reason"}``, for example ``{"a": "stale: replaying"}``.

        Raises:
            UnknownPodError: A pod is not followed.
        """
        names = [pod.source.name for pod in self._named(pods)]
        table = self.status()
        return {
            name: f"{table[name].state}: {table[name].reason}"
            for name in names
            if name in table and table[name].state != "exact"
        }

    def wait_until_exact(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Waits until :meth:`is_exact`.

        Args:
            timeout: Maximum time in seconds; None for no limit.
            pods: Names of the pods to wait for; None for all followed pods.

        Returns:
            :meth:`inexact` at the end: an empty dict if every pod is exact.

        Raises:
            StreamError: Called from a callback, which would wait for itself.
            UnknownPodError: A pod is not followed.
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
            raise StreamError("a callback of the manager's own thread cannot wait for that thread")
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        until = None if timeout is None else time.monotonic() + timeout
        if self._loop.closed:  # a forked child may have inherited the lock below while the thread held it
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
        """Runs a function in the manager's thread without waiting for it. :mod:`kvindex.aio` is built on it.

        The function may call every method of the manager, and delays every stream meanwhile.

        Args:
            command: Called without arguments.

        Returns:
            A future of its result. Cancelling the future prevents the call if it has not begun.

        Raises:
            StreamError: The manager is closed.
        """
        return self._loop.post(command)

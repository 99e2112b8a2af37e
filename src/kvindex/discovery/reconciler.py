"""The common part of every kind of discovery: :class:`Reconciler`."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping
from typing import Any, Protocol, Self

from ..errors import InvalidTypeError, KVIndexError, StreamError, UnknownPodError
from ..sync.source import PodSource

__all__ = ["Followers", "Reconciler", "Watcher", "followers"]

log = logging.getLogger("kvindex.discovery")


class Followers(Protocol):
    """The methods of :class:`kvindex.EventManager` that discovery calls."""

    @property
    def closed(self) -> bool: ...

    def add_pod(self, source: PodSource) -> None: ...

    def remove_pod(self, name: str) -> None: ...

    def describe_pod(self, source: PodSource) -> None: ...


def followers(manager: Any) -> Followers:
    """Returns the manager to call: the underlying one of an :class:`kvindex.aio.AsyncEventManager`.

    Raises:
        InvalidTypeError: ``manager`` is not a manager.
    """
    found = getattr(manager, "manager", manager)
    calls = [getattr(found, name, None) for name in ("add_pod", "remove_pod", "describe_pod")]
    if not all(callable(call) and not inspect.iscoroutinefunction(call) for call in calls):
        raise InvalidTypeError(f"discovery needs an EventManager, not {type(manager).__name__}")
    return found  # type: ignore[no-any-return]


class Reconciler:
    """Makes a manager follow exactly the given pods, among those that it has added itself. Not thread-safe.

    Pods that were added in another way are left alone. For your own kind of discovery::

        from kvindex import EventManager, PodSource, PrefixIndex
        from kvindex.discovery import Reconciler

        with EventManager(PrefixIndex(block_size=16)) as manager:
            fleet = Reconciler(manager)
            fleet.reconcile({"a": PodSource("a", endpoint="tcp://10.0.0.1:5557")})
            fleet.reconcile({"b": PodSource("b", endpoint="tcp://10.0.0.2:5557")})
            assert list(manager.pods()) == ["b"]

    Args:
        manager: A :class:`kvindex.EventManager` or a :class:`kvindex.aio.AsyncEventManager`.

    Raises:
        InvalidTypeError: ``manager`` is not a manager.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = followers(manager)
        self.pods: dict[str, PodSource] = {}
        """The pods that were added and are followed now, by name."""
        self.refused: dict[str, str] = {}
        """Pods that could not be added, and why: tried again by the next :meth:`reconcile`."""

    def reconcile(self, wanted: Mapping[str, PodSource]) -> None:
        """Adds new pods, removes missing ones, and does both for changed ones. O(pods).

        A pod with a changed ``address`` or ``labels`` keeps its streams and blocks. A pod that cannot be followed is
        logged once and listed in ``refused``; the others are followed.

        Args:
            wanted: ``{pod: PodSource}`` of all pods.

        Raises:
            StreamError: The manager is closed.
        """
        for name, source in list(self.pods.items()):
            new = wanted.get(name)
            if new == source:
                continue
            try:
                if new is not None and new.same_streams(source):
                    self._manager.describe_pod(new)
                    self.pods[name] = new
                    continue
                del self.pods[name]
                self._manager.remove_pod(name)
            except UnknownPodError:
                self.pods.pop(name, None)
                log.info("%s: it was removed already", name)
        for name in set(self.refused) - set(wanted):
            del self.refused[name]
        for name, source in wanted.items():
            if name in self.pods:
                continue
            try:
                self._manager.add_pod(source)
            except KVIndexError as error:
                if isinstance(error, StreamError) and self._manager.closed:
                    raise
                if self.refused.get(name) != str(error):
                    log.warning("%s: cannot be followed: %s", name, error)
                self.refused[name] = str(error)
            else:
                self.pods[name] = source
                self.refused.pop(name, None)


class Watcher:
    """The thread of one kind of discovery. A context manager; starting and closing twice is fine."""

    def __init__(self, manager: Any, name: str) -> None:
        self._manager = followers(manager)
        self._reconciler = Reconciler(manager)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._name = name

    @property
    def pods(self) -> dict[str, PodSource]:
        """The followed pods that this has added, by name. A copy; thread-safe."""
        return dict(self._reconciler.pods)

    @property
    def refused(self) -> dict[str, str]:
        """The pods that were found and cannot be followed, with the reasons. A copy; thread-safe."""
        return dict(self._reconciler.refused)

    def start(self) -> None:
        """Starts to watch. A second call has no effect.

        Raises:
            StreamError: It is closed already, or the first look failed.
        """
        if self._closing.is_set():
            raise StreamError("this watcher is closed")
        if self._thread is None:
            self._begin()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops watching. The pods that were added stay in the manager. A second call has no effect."""
        self._closing.set()
        if self._thread is None or self._thread is threading.current_thread():
            return
        while self._thread.is_alive():
            # More than once, because the thread may just be about to wait.
            self._interrupt()
            self._thread.join(0.05)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
        except StreamError:
            if not self._manager.closed:
                raise
            log.info("%s: the manager is closed, so the watch ends", self._name)

    def _begin(self) -> None:
        """Runs once, in the thread that calls :meth:`start`."""

    def _turn(self) -> None:
        """Waits for a change and reconciles it; the thread repeats it."""
        raise AssertionError("a subclass must define its turn")

    def _interrupt(self) -> None:
        """Wakes a turn that waits."""

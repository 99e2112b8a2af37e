"""What every kind of discovery does with the pods that it has found: :class:`Reconciler`."""

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
    """What discovery needs of a manager: :class:`kvindex.EventManager`, or whatever passes its calls on."""

    @property
    def closed(self) -> bool: ...

    def add_pod(self, source: PodSource) -> None: ...

    def remove_pod(self, name: str) -> None: ...

    def describe_pod(self, source: PodSource) -> None: ...


def followers(manager: Any) -> Followers:
    """The manager to call: the one underneath, where ``manager`` is that of an event loop, whose methods nobody here
    could await. Raises :class:`InvalidTypeError`."""
    found = getattr(manager, "manager", manager)
    calls = [getattr(found, name, None) for name in ("add_pod", "remove_pod", "describe_pod")]
    if not all(callable(call) and not inspect.iscoroutinefunction(call) for call in calls):
        raise InvalidTypeError(f"discovery adds pods to an EventManager, not to {type(manager).__name__}")
    return found  # type: ignore[no-any-return]


class Reconciler:
    """Makes a manager follow exactly the pods that it is given, among those that it has added itself.

    Pods that somebody else has added are left alone. ``manager`` is a :class:`kvindex.EventManager` or a
    :class:`kvindex.aio.AsyncEventManager`; anything else raises :class:`InvalidTypeError`. Belongs to one thread. For a
    kind of discovery of one's own::

        from kvindex import EventManager, PodSource, PrefixIndex
        from kvindex.discovery import Reconciler

        with EventManager(PrefixIndex(block_size=16)) as manager:
            fleet = Reconciler(manager)
            fleet.reconcile({"a": PodSource("a", endpoint="tcp://10.0.0.1:5557")})
            fleet.reconcile({"b": PodSource("b", endpoint="tcp://10.0.0.2:5557")})
            assert list(manager.pods()) == ["b"]
    """

    def __init__(self, manager: Any) -> None:
        self._manager = followers(manager)
        self.pods: dict[str, PodSource] = {}
        """The pods that were added and are followed now, by name."""
        self.refused: dict[str, str] = {}
        """Pods that could not be added, and why: tried again by the next :meth:`reconcile`."""

    def reconcile(self, wanted: Mapping[str, PodSource]) -> None:
        """Add what is new, remove what is gone, and both for what has changed. O(pods).

        A pod of which only ``address`` or ``labels`` have changed keeps its streams and blocks. Raises
        :class:`StreamError` when the manager is closed; anything else that is wrong with one pod is logged once, and
        costs the others nothing.
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
                log.info("%s: somebody else has removed it already", name)
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
                    log.warning("%s: can not be followed: %s", name, error)
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
        """The pods that this has added and that are followed now, by name. A copy; any thread."""
        return dict(self._reconciler.pods)

    @property
    def refused(self) -> dict[str, str]:
        """The pods that were found and can not be followed, and why. A copy; any thread."""
        return dict(self._reconciler.refused)

    def start(self) -> None:
        """Begin to watch. Raises what :meth:`_begin` raises; :class:`StreamError` after a close."""
        if self._closing.is_set():
            raise StreamError("this watch is closed")
        if self._thread is None:
            self._begin()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Watch no longer. The pods that were added stay in the manager."""
        self._closing.set()
        if self._thread is None or self._thread is threading.current_thread():
            return
        while self._thread.is_alive():
            # More than once: it may just be about to wait.
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
            log.info("%s: the manager is closed, so nothing is watched any more", self._name)

    def _begin(self) -> None:
        """What is done once, in the thread of whoever starts it."""

    def _turn(self) -> None:
        """Wait for something to become known, and reconcile it; the thread does this again and again."""
        raise AssertionError("a kind of discovery says what its turn is")

    def _interrupt(self) -> None:
        """Wake a turn that waits."""

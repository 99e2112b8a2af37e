"""What every kind of discovery does with what it has found: :class:`Keeper`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Self

from ..errors import KVIndexError, StreamError, UnknownPodError
from ..sync.manager import EventManager
from ..sync.source import PodSource

__all__ = ["Keeper", "Watcher"]

log = logging.getLogger("kvindex.discovery")


class Keeper:
    """Makes a manager follow exactly the pods that were found, among those that this keeper has added.

    Pods that somebody else has added are left alone. One thread.
    """

    def __init__(self, manager: EventManager) -> None:
        self._manager = manager
        self.pods: dict[str, PodSource] = {}
        self.refused: dict[str, str] = {}
        """Pods that could not be added, and why: tried again by the next :meth:`keep`."""

    def keep(self, wanted: Mapping[str, PodSource]) -> None:
        """Add what is new, remove what is gone, and both for what has changed. Raises :class:`StreamError` when the
        manager is closed; anything else that is wrong with one pod is logged once, and costs the others nothing."""
        for name, source in list(self.pods.items()):
            if wanted.get(name) != source:
                del self.pods[name]
                try:
                    self._manager.remove_pod(name)
                except UnknownPodError:
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

    def __init__(self, manager: EventManager, name: str) -> None:
        self._manager = manager
        self._keeper = Keeper(manager)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._name = name

    @property
    def pods(self) -> dict[str, PodSource]:
        """The pods that this has added and that are followed now, by name. A copy; any thread."""
        return dict(self._keeper.pods)

    @property
    def refused(self) -> dict[str, str]:
        """The pods that were found and can not be followed, and why. A copy; any thread."""
        return dict(self._keeper.refused)

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
        """Wait for something to become known, and keep it; the thread does this again and again."""
        raise AssertionError("a kind of discovery says what its turn is")

    def _interrupt(self) -> None:
        """Wake a turn that waits."""

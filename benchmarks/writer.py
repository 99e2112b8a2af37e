"""A thread that applies batches beside a measurement."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from time import perf_counter, sleep

from kvindex import PrefixIndex

__all__ = ["Writer"]

#: Blocks of each of its events.
EACH = 64


class Writer(threading.Thread):
    """A thread that applies batches of one event of 64 blocks until there are no more or the ``with`` ends.

    ``pace``: blocks a second; without it, as fast as possible. ``applied``: blocks so far.
    """

    def __init__(self, index: PrefixIndex, batches: Iterable[bytes], *, pace: float | None = None) -> None:
        super().__init__(daemon=True)
        self.index, self.batches, self.pace = index, batches, pace
        self.applied = 0
        self._ended = threading.Event()

    def run(self) -> None:
        start = perf_counter()
        for payload in self.batches:
            self.index.ingest("writer", payload)
            self.applied += EACH
            if self._ended.is_set():
                return
            if self.pace is not None:
                sleep(max(0.0, self.applied / self.pace - (perf_counter() - start)))

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

"""A small piece of work, done and timed again and again by a thread of its own.

The observer times queries with it. The runner, which otherwise waits, times work that is independent of the index.
Where this work takes longer too, the machine has become slower (by other load, or by a fault that stresses it), and not
the index.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .logs import Writer, latency_dtype

__all__ = ["Metronome", "nothing"]

#: Seconds between two measurements.
EVERY = 0.0025
_WORK = bytes(8192)


def nothing() -> None:
    """Do about 10 us of work."""
    hashlib.blake2b(_WORK).digest()


class Metronome:
    """A thread that writes the duration of each call to ``path``. The context manager ends it."""

    def __init__(self, path: Path, call: Callable[[], object] = nothing) -> None:
        self._log = Writer(path, latency_dtype)
        self._call = call
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-metronome", daemon=True)

    def _run(self) -> None:
        record = np.zeros(1, dtype=latency_dtype)
        while not self._over.wait(EVERY):
            start = time.perf_counter()
            self._call()
            record["seconds"] = time.perf_counter() - start
            record["at"] = time.monotonic()
            self._log.write(record)

    def __enter__(self) -> Metronome:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._log.close()

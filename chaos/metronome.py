"""What the machine itself does to the time that things take, beside the process that is judged.

A thread of the runner, which otherwise waits, does the same small piece of work again and again and times it. Where
that takes longer too, the machine has become slower (others run on it, a fault stresses it), and not the index.
"""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import numpy as np

from .logs import Writer, latency_dtype

__all__ = ["Metronome"]

#: Seconds between two measurements, as many as the observer asks questions, and bytes to digest: some 10 us of work.
EVERY = 0.0025
WORK = bytes(8192)


class Metronome:
    """Writes to ``path`` how long the work took. A context manager that ends its thread."""

    def __init__(self, path: Path) -> None:
        self._log = Writer(path, latency_dtype)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-metronome", daemon=True)

    def _run(self) -> None:
        record = np.zeros(1, dtype=latency_dtype)
        while not self._over.wait(EVERY):
            start = time.perf_counter()
            hashlib.blake2b(WORK).digest()
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

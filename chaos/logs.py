"""What the processes of a run write down while it goes on, and how it is read again.

Fixed-size records, written with one ``write`` each, so that a process that is killed leaves whole records behind.
All times are CLOCK_MONOTONIC, which processes of one machine share, whatever their wall clocks are made to say.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvindex.sim import Prompt
from kvindex.sim.process import SimConfig, own_workload

__all__ = [
    "PROBES",
    "Writer",
    "applied_dtype",
    "digest",
    "latency_dtype",
    "probes",
    "read",
    "sample_dtype",
    "truth_dtype",
]

#: Prompts that every pod and the index are asked about all the time.
PROBES = 16

#: A batch that a pod publishes: when, its number and content, and what the pod holds of each probe after it.
truth_dtype = np.dtype(
    [("at", "f8"), ("seq", "u8"), ("digest", "u8"), ("clear", "u1"), ("pad", "u1", 7), ("hits", "i4", PROBES)]
)

#: What the index did about a pod's stream: 0 a batch was applied, 1 the pod was cleared, 2 a batch was refused,
#: 3 the index began with what a snapshot had of it.
applied_dtype = np.dtype([("at", "f8"), ("pod", "u2"), ("kind", "u1"), ("pad", "u1", 5), ("digest", "u8")])

#: What the index answered about a pod: how it called its answer (0 exact, 1 degraded, 2 stale, 3 not known), how many
#: entries of the applied log it is made from, and its tokens of each probe.
sample_dtype = np.dtype(
    [("at", "f8"), ("pod", "u2"), ("state", "u1"), ("pad", "u1", 5), ("entries", "u8"), ("hits", "i4", PROBES)]
)

#: One timed question.
latency_dtype = np.dtype([("at", "f8"), ("seconds", "f8")])

STATES = ("exact", "degraded", "stale", "unknown")


class Writer:
    """Appends records to a file, unbuffered."""

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, records: npt.NDArray[np.void]) -> None:
        os.write(self._fd, records.tobytes())

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path, dtype: np.dtype) -> npt.NDArray[np.void]:
    """All whole records of a file, which may still grow."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype=dtype)


def digest(payload: bytes) -> int:
    """64 bits of a batch's content: what was published and what was applied are compared by it."""
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "big")


def probes() -> list[Prompt]:
    """Some of the prompts that pods serve by themselves, none of them a whole number of blocks long: vLLM looks up all
    tokens but the last, SGLang all, and for these prompts both are the same blocks."""
    config = SimConfig()
    found = []
    for arrival in own_workload(config):
        if len(arrival.prompt.tokens) % config.block_size:
            found.append(arrival.prompt)
        if len(found) == 6 * PROBES:
            return found[::6]
    raise AssertionError("the workload is endless")

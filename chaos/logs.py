"""The logs that the processes of a run write, and their reader.

Records have a fixed size, and one ``write`` each, so a killed process leaves complete records behind. All times are of
CLOCK_MONOTONIC, which the processes of one machine share even when a fault shifts their wall clocks.
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

#: Prompts of the queries that every pod and the index answer all the time.
PROBES = 16

#: A batch that a pod publishes: its time, number and content, and the pod's true hit of each probe after it.
truth_dtype = np.dtype(
    [("at", "f8"), ("seq", "u8"), ("digest", "u8"), ("clear", "u1"), ("pad", "u1", 7), ("hits", "i4", PROBES)]
)

#: An operation of the index for a pod's stream: 0 a batch was applied, 1 the pod was cleared, 2 a batch was refused,
#: 3 the index started from a snapshot of the pod.
applied_dtype = np.dtype([("at", "f8"), ("pod", "u2"), ("kind", "u1"), ("pad", "u1", 5), ("digest", "u8")])

#: An answer of the index about a pod: its state (0 exact, 1 degraded, 2 stale, 3 unknown), the number of entries of the
#: applied log before it, and the tokens of each probe.
sample_dtype = np.dtype(
    [("at", "f8"), ("pod", "u2"), ("state", "u1"), ("pad", "u1", 5), ("entries", "u8"), ("hits", "i4", PROBES)]
)

#: One timed query.
latency_dtype = np.dtype([("at", "f8"), ("seconds", "f8")])

STATES = ("exact", "degraded", "stale", "unknown")


class Writer:
    """A file to which records are appended, unbuffered."""

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, records: npt.NDArray[np.void]) -> None:
        os.write(self._fd, records.tobytes())

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path, dtype: np.dtype) -> npt.NDArray[np.void]:
    """All complete records of a file, which may still grow."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype=dtype)


def digest(payload: bytes) -> int:
    """64 bits of a batch's content, for the comparison of published with applied batches."""
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "big")


def probes() -> list[Prompt]:
    """Some of the prompts that pods serve by themselves, none of them a whole number of blocks long.

    vLLM looks up all tokens but the last, and SGLang looks up all. For these prompts both are the same blocks.
    """
    config = SimConfig()
    found = []
    for arrival in own_workload(config):
        if len(arrival.prompt.tokens) % config.block_size:
            found.append(arrival.prompt)
        if len(found) == 6 * PROBES:
            return found[::6]
    raise AssertionError("the workload is endless")

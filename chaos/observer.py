"""The judged index process: it follows pods as any router does, and logs its applied batches and its answers.

No batch is applied while a sample is taken, so an answer belongs to exactly one last batch. Queries are timed apart
from that, in a thread that shares nothing with the sampler but the index.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from e2e.fleet import IndexProcess
from e2e.server import Server, main

from .logs import STATES, Writer, applied_dtype, digest, probes, sample_dtype
from .metronome import Metronome

#: Seconds between two samples.
SAMPLE = 0.02


class Ledger:
    """The index for its manager, which logs every applied batch under the same lock."""

    def __init__(self, index: Any, pods: list[str], log: Writer) -> None:
        self.index = index
        self.lock = threading.Lock()
        self.entries = dict.fromkeys(pods, 0)
        self._numbers = {name: number for number, name in enumerate(pods)}
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def ingest(self, pod: str, payload: bytes, **where: Any) -> Any:
        with self.lock:
            kind = 2
            try:
                report = self.index.ingest(pod, payload, **where)
                kind = 0
            finally:
                self._note(pod, kind, digest(payload))
        return report

    def clear_worker(self, pod: str, *rank: int, **more: int) -> None:
        with self.lock:
            self.index.clear_worker(pod, *rank, **more)
            self._note(pod, 1, 0)

    def remove_pod(self, pod: str) -> None:
        with self.lock:
            self.index.remove_pod(pod)
            self._note(pod, 1, 0)

    def mark_worker(self, *what: Any, **more: Any) -> None:
        with self.lock:
            self.index.mark_worker(*what, **more)

    def restored(self) -> None:
        """Note that the index starts from a snapshot."""
        for pod in self._numbers:
            self._note(pod, 3, 0)

    def _note(self, pod: str, kind: int, content: int) -> None:
        if pod not in self._numbers:
            return
        record = np.zeros(1, dtype=applied_dtype)
        record[["at", "pod", "kind", "digest"]] = time.monotonic(), self._numbers[pod], kind, content
        self._log.write(record)
        self.entries[pod] += 1


class Observer(Server):
    def __init__(self, args: argparse.Namespace) -> None:
        self.pods = os.environ["CHAOS_PODS"].split(",")
        where = Path(os.environ["CHAOS_DIR"])
        logging.basicConfig(filename=where / "index.log", format="%(asctime)s %(levelname)s %(name)s %(message)s")
        life = f"{time.monotonic_ns()}.bin"
        self._applied_log = Writer(where / f"applied-{life}", applied_dtype)
        self._sample_log = Writer(where / f"samples-{life}", sample_dtype)
        self._asker = Metronome(where / f"latency-{life}", self._ask)
        self._probes = [prompt.tokens for prompt in probes()]
        self._asked = itertools.cycle(self._probes)
        self._others: Any = None
        self._restored = bool(args.snapshot) and Path(args.snapshot).exists()
        super().__init__(args)
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="chaos-sampler", daemon=True)

    def followed(self) -> Ledger:
        self.ledger = Ledger(self.index, self.pods, self._applied_log)
        if self._restored:
            self.ledger.restored()
        return self.ledger

    def run(self) -> None:
        self._sampler.start()
        with self._asker:
            super().run()
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            self._sample_log.write(self._look())
            due = max(due + SAMPLE, time.monotonic())
            self._over.wait(due - time.monotonic())

    def _look(self) -> Any:
        records = np.zeros(len(self.pods), dtype=sample_dtype)
        records["pod"] = np.arange(len(self.pods))
        with self.ledger.lock:
            matches = [self.index.match_prefix(tokens, model="sim") for tokens in self._probes]
            for record, pod in zip(records, self.pods, strict=True):
                state = self._state(pod)
                for match in matches:
                    # An answer has its own state; the pod's is for pods without a hit. The better state counts.
                    if pod in match.tokens:
                        state = min(state, STATES.index(match[pod].state))
                record["state"], record["entries"] = state, self.ledger.entries[pod]
                record["hits"] = [match.tokens.get(pod, 0) for match in matches]
            records["at"] = time.monotonic()
        return records

    def _state(self, pod: str) -> int:
        try:
            return STATES.index(self.index.pod_state(pod))
        except KeyError:
            return STATES.index("unknown")

    def _ask(self) -> None:
        self.index.match_prefix(next(self._asked), model="sim", ready_pods=self._others)

    def _op_others(self, pods: list[str]) -> dict[str, Any]:
        """Time queries about these pods."""
        self._others = self.index.pod_set(pods)
        return {}

    def _op_resources(self) -> dict[str, Any]:
        """The resources of this process: resident and held bytes, all threads, and file descriptors by kind."""
        gc.collect()
        # A long replay needs as many bytes as the pod's history for a while. Return the free memory first.
        psutil.heap_trim()
        kinds: Counter[str] = Counter()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor of listdir itself is closed by now
                kind = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
                kinds["file" if kind.startswith("/") else kind] += 1
        process = psutil.Process()
        size = process.memory_info().rss
        return {
            "rss": size,
            # A part of the index's memory is not from malloc. The part that is counted twice makes the test stricter.
            "held": size if (heap := in_heap()) is None else heap + self.index.stats()["bytes"],
            "threads": process.num_threads(),
            "fds": dict(kinds),
        }


#: Assumed bytes of a small Python object. Python's own allocator counts its blocks, and not their bytes.
SMALL = 128


def in_heap() -> int | None:
    """Bytes that are allocated from malloc, and those of Python's small objects.

    None where a sanitizer or another allocator replaces that of the C library, which then reports 0.
    """
    heap = psutil.heap_info()
    held = int(heap.heap_used + heap.mmap_used)
    return held + SMALL * sys.getallocatedblocks() if held else None


class ObserverProcess(IndexProcess):
    """The parent's handle of an :class:`Observer`."""

    module = "chaos.observer"


if __name__ == "__main__":
    sys.exit(main(make=Observer))

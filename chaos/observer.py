"""The index process that is judged: it follows pods as any router does, and writes down what it applied and answered.

A sample is one moment: while it is taken nothing is applied, so an answer belongs to exactly one last batch. Questions
are timed apart from that, in a thread that shares nothing with the sampler but the index.
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
    """The index as its manager sees it; what is applied is written down in the same moment."""

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
        """What the index holds is from a snapshot."""
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
                    # An answer says its own state; the pod's is for pods that hold nothing. The bolder claim counts.
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
        """Time questions about these pods."""
        self._others = self.index.pod_set(pods)
        return {}

    def _op_resources(self) -> dict[str, Any]:
        """What this process has of the machine: resident bytes, and those of them that somebody holds, threads of any
        kind, file descriptors by what they are."""
        gc.collect()
        # A long replay passes through as many bytes as the pod has history. What is free again goes back first.
        psutil.heap_trim()
        kinds: Counter[str] = Counter()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the directory's own is gone by now
                kind = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
                kinds["file" if kind.startswith("/") else kind] += 1
        process = psutil.Process()
        size = process.memory_info().rss
        return {
            "rss": size,
            # The index's own is partly not malloc's; what is counted twice by this makes it stricter.
            "held": size if (heap := in_heap()) is None else heap + self.index.stats()["bytes"],
            "threads": process.num_threads(),
            "fds": dict(kinds),
        }


#: Bytes that a small object of Python is taken for, which has its own allocator: they are counted, not measured.
SMALL = 128


def in_heap() -> int | None:
    """Bytes that were asked of malloc and not given back, and those of Python's small objects. None where a sanitizer
    or another allocator stands before the C library's, which then says 0."""
    heap = psutil.heap_info()
    held = int(heap.heap_used + heap.mmap_used)
    return held + SMALL * sys.getallocatedblocks() if held else None


class ObserverProcess(IndexProcess):
    """An :class:`Observer` from outside."""

    module = "chaos.observer"


if __name__ == "__main__":
    sys.exit(main(make=Observer))

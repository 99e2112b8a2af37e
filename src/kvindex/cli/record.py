"""``kvindex record``: write live streams to a capture, which ``kvindex replay`` reads."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .. import EventManager, PodSource, PrefixIndex
from ..capture import CaptureWriter, Forget, Message
from ..sync.status import Batch, Forgotten, IndexChange
from ._facts import Facts
from ._pods import add_arguments, sources
from ._terminal import CommandError, add_command, console, counted, positive, seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_parser"]

# Seconds: the part of a recording that a killed process may lose, and the time between two lines without a terminal.
FLUSH = 1.0
LINE = 10.0

# The header contains the block size, so batches wait for the first event that has one. After so many batches the header
# is written with 16.
PATIENCE = 1000


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "record",
        help="record live streams into a capture",
        description="Follow live streams and write every batch as published, in the order in which an index applies "
        "it, with the time of its arrival. With a replay endpoint, the capture starts with the publisher's earlier "
        "batches. Recording ends with Ctrl-C, --seconds or --batches. A capture contains token ids, so prompts can be "
        "read from it.",
        status="0 if a batch was recorded, 1 if none was",
        lines=[
            "kvindex record a=tcp://10.0.0.1:5557,5558 -o a.msgpack.gz --seconds 60",
            "kvindex record --pods pods.yaml -o fleet.msgpack.gz",
        ],
    )
    add_arguments(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="capture to write")
    parser.add_argument("--seconds", type=seconds, metavar="N", help="end after N seconds")
    parser.add_argument("--batches", type=positive, metavar="N", help="end after N batches of all pods together")
    parser.add_argument("--block-size", type=positive, metavar="TOKENS",
                        help="block size to note in the capture (default: from the events)")  # fmt: skip
    parser.set_defaults(run=run)


class Recorder:
    """The writer of the capture. The manager's thread calls ``show``, the main thread everything else."""

    def __init__(self, path: str, header: dict[str, Any], block_size: int | None, most: int | None) -> None:
        self.batches: Counter[str] = Counter()
        self.bytes = 0
        self.failed: OSError | None = None
        self.over = threading.Event()
        self._path = path
        self._header = header
        self._size = block_size
        self._most = most
        self._facts = Facts()
        self._early: list[Message | Forget] = []
        self._writer: CaptureWriter | None = None
        self._lock = threading.Lock()
        with open(path, "wb"):
            pass  # a path that cannot be written fails here, before the recording

    def show(self, item: IndexChange) -> None:
        if not isinstance(item, (Batch, Forgotten)):
            return
        with self._lock:
            if self.over.is_set():
                return
            try:
                self._take(item)
            except OSError as error:
                self.failed = error
                self.over.set()

    def _take(self, item: Batch | Forgotten) -> None:
        now = time.time()
        if isinstance(item, Forgotten):
            self._write(Forget(item.pod, item.rank, now))
            return
        topic = (item.topic or b"").decode("utf-8", "replace")
        if self._size is None and self._writer is None:
            self._facts.add(item.payload)
            self._size = self._facts.block_size
        self._write(Message(item.pod, topic, item.seq, item.payload, now, item.rank))
        self.batches[item.pod] += 1
        self.bytes += len(item.payload)
        if self._most is not None and self.batches.total() >= self._most:
            self.over.set()

    def _write(self, record: Message | Forget) -> None:
        if self._writer is None:
            self._early.append(record)
            if self._size is not None or len(self._early) >= PATIENCE:
                self._open()
            return
        self._writer.write(record)

    def _open(self) -> None:
        # Level 9, as in the samples, takes several times as long, and all streams wait for this thread.
        self._writer = CaptureWriter(self._path, {"block_size": self._size or 16, **self._header}, level=3)
        for record in self._early:
            self._writer.write(record)
        self._early.clear()

    def flush(self) -> None:
        with self._lock:
            try:
                if self._writer is not None:
                    self._writer.flush()
            except OSError as error:
                self.failed = error
                self.over.set()

    def close(self) -> None:
        # Before the lock: on a slow disk the streams' thread takes it again and again, and close() would never get it.
        self.over.set()
        with self._lock:
            try:
                if self._writer is None:
                    self._open()
                assert self._writer is not None
                self._writer.close()
            except OSError as error:
                self.failed = self.failed or error


def run(args: argparse.Namespace) -> int:
    out = console()
    pods = sources(args)
    recorder = Recorder(args.output, header(pods), args.block_size, args.batches)
    index = PrefixIndex(block_size=args.block_size or 16)
    if threading.current_thread() is threading.main_thread():
        # SIGTERM, which stops a container, must complete the file as well. SIGINT is set too, because a shell starts
        # background jobs with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    with EventManager(index) as manager:
        manager.tap(recorder.show)
        try:
            for source in pods:
                manager.add_pod(source)
            watch(out, manager, recorder, args.seconds)
        except KeyboardInterrupt:
            pass
        finally:
            recorder.close()
        return summary(out, manager, recorder, args.output)


def header(pods: list[PodSource]) -> dict[str, Any]:
    made: dict[str, Any] = {"pods": [source.name for source in pods], "recorded_at": time.time()}
    models = {source.model for source in pods}
    if len(models) == 1 and (model := models.pop()):
        made["model"] = model
    engines = {source.engine for source in pods}
    if len(engines) == 1 and (engine := engines.pop()):
        made["engine"] = engine
    return made


def watch(out: Console, manager: EventManager, recorder: Recorder, limit: float | None) -> None:
    """Show the progress until the recording is over."""
    start = time.monotonic()
    due = start + LINE
    with ExitStack() as stack:
        spinner = stack.enter_context(out.status("")) if out.is_terminal else None
        while not recorder.over.is_set():
            now = time.monotonic()
            if limit is not None and now >= start + limit:
                return
            line = progress(manager, recorder)
            if spinner is not None:
                spinner.update(line)
            elif now >= due:
                out.print(line, markup=False)
                due = now + LINE
            recorder.flush()
            recorder.over.wait(FLUSH if limit is None else min(FLUSH, start + limit - now))


def progress(manager: EventManager, recorder: Recorder) -> str:
    status = manager.status()
    states = Counter(pod.state for pod in status.values())
    shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    batches = counted(recorder.batches.total(), "batch", "batches")
    return f"{batches}, {counted(recorder.bytes, 'byte')}; pods: {shown}; Ctrl-C ends it"


def summary(out: Console, manager: EventManager, recorder: Recorder, path: str) -> int:
    if recorder.failed is not None:
        kept = counted(recorder.batches.total(), "batch", "batches")
        raise CommandError(
            f"{path} cannot be written any further: {recorder.failed.strerror or recorder.failed}; its part of"
            f" the {kept} until then can be read, and kvindex replay reports where it ends"
        )
    for name, pod in manager.status().items():
        told = counted(recorder.batches[name], "batch", "batches") if recorder.batches[name] else "nothing"
        if pod.lost_batches:
            told += f", {pod.lost_batches:,} lost"
        if pod.restarts:
            told += f", {counted(pod.restarts, 'restart')}"
        why = f" ({pod.reason})" if pod.reason else ""
        out.print(f"{name}: {told}; {pod.state}{why}", markup=False, soft_wrap=True)
    if not recorder.batches:
        out.print("nothing was recorded: kvindex doctor finds the cause", style="bold red")
        return 1
    size = os.path.getsize(path)
    batches = counted(recorder.batches.total(), "batch", "batches")
    out.print(f"{path}: {batches}, {size:,} bytes", markup=False, soft_wrap=True)
    return 0

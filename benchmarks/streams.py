"""``python -m benchmarks.streams``: blocks a second from one publisher's process, over TCP, until all are applied.

The publisher has its payloads ready and sends as fast as its socket takes them; nothing is dropped on the way, which
is checked. Wall time depends on what else the machine does (publisher, its I/O thread, ours and the manager's thread
share the cores), so the CPU time of the manager's thread stands beside it. The lower rows are parts of the work alone,
on the same payloads in the same run: they say where the time goes.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import msgpack
import numpy as np
import zmq

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sim.wire import Stored, encode_batch, wire_form

from .machine import described
from .report import amount, say, table

BLOCK_SIZE = 16
CHAIN = 64  # blocks of one prompt
TOPIC = b"kv@pod@m"
PATIENCE = 120.0

#: Blocks an event, and how many batches of one event there are.
SHAPES = {64: 10_000, 1: 100_000}


def payloads(per_event: int, batches: int) -> list[bytes]:
    """Batches of one stored event each: prompts of 64 blocks, every one new, one after another."""
    rng = np.random.default_rng(per_event)
    form = wire_form("vllm-0.33.0")
    made = []
    parent: bytes | None = None
    for batch in range(batches):
        number = batch * per_event
        if number % CHAIN == 0:
            parent = None
        # Any distinct 64 bits do as the engine's hashes: odd multiples of an odd constant.
        hashes = [((number + i + 1) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") for i in range(per_event)]
        tokens = rng.integers(0, 128_000, per_event * BLOCK_SIZE, dtype=np.uint32)
        made.append(encode_batch([Stored(hashes, parent, tokens, BLOCK_SIZE)], form, ts=1.7e9 + batch / 100))
        parent = hashes[-1]
    return made


def publish(per_event: int, batches: int) -> None:
    """The other process: says where it is, then sends everything each time it is told to, and ends with its input."""
    frames = [(struct.pack(">Q", seq), payload) for seq, payload in enumerate(payloads(per_event, batches))]
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    # Without a limit, or the fastest sender would lose most of it and the replays would be measured.
    socket.sndhwm = 0
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(port, flush=True)
    for _ in sys.stdin:
        for seq, payload in frames:
            socket.send_multipart((TOPIC, seq, payload), copy=False)
        print("sent", flush=True)
    context.destroy(linger=0)


class Publisher:
    def __init__(self, per_event: int, batches: int) -> None:
        command = [sys.executable, "-m", "benchmarks.streams", "--publish", str(per_event), str(batches)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.endpoint = f"tcp://127.0.0.1:{int(self.process.stdout.readline())}"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def wait_for(done: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > until:
            raise SystemExit(f"not done after {PATIENCE:.0f} s")
        time.sleep(0.002)


def followed(publisher: Publisher, batches: int, blocks: int) -> tuple[float, float]:
    """Everything, by an EventManager: seconds, and seconds of CPU of its thread."""
    index = PrefixIndex(BLOCK_SIZE)
    with EventManager(index) as manager:
        manager.add_pod(PodSource("pod", endpoint=publisher.endpoint, model="m"))
        wait_for(lambda: manager.status()["pod"].connected)
        time.sleep(0.2)  # the subscription is on its way to the publisher
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "kvindex-streams"]
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        start, cpu = time.perf_counter(), time.clock_gettime(clock)
        publisher.go()
        wait_for(lambda: manager.status()["pod"].batches >= batches)
        seconds, cpu = time.perf_counter() - start, time.clock_gettime(clock) - cpu
        status = manager.status()["pod"]
    if (status.state, status.lost_batches, status.blocks) != ("exact", 0, blocks):
        raise SystemExit(f"not everything has arrived: {status}")
    return seconds, cpu


def received(publisher: Publisher, batches: int) -> tuple[float, float]:
    """The same messages into a bare socket, and nothing done with them."""
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(TOPIC)
    socket.connect(publisher.endpoint)
    time.sleep(0.5)
    publisher.go()
    start, cpu = time.perf_counter(), time.thread_time()
    for _ in range(batches):
        socket.recv_multipart()
    taken = time.perf_counter() - start, time.thread_time() - cpu
    context.destroy(linger=0)
    return taken


def timed(each: Callable[[bytes], object], data: list[bytes]) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.thread_time()
    for payload in data:
        each(payload)
    return time.perf_counter() - start, time.thread_time() - cpu


def measure(per_event: int, batches: int, rounds: int) -> list[list[str]]:
    """The rows of one shape of events."""
    data, blocks = payloads(per_event, batches), per_event * batches
    with Publisher(per_event, batches) as publisher:
        works: dict[str, Callable[[], tuple[float, float]]] = {
            "EventManager, over TCP, until applied": lambda: followed(publisher, batches, blocks),
            "a bare SUB socket, over TCP": lambda: received(publisher, batches),
            "index.ingest alone": lambda: timed(partial(PrefixIndex(BLOCK_SIZE).ingest, "pod", model="m"), data),
            "msgpack.unpackb alone": lambda: timed(msgpack.unpackb, data),
        }
        # Round by round, so that a busy minute of the machine hits all of them.
        found = [{name: work() for name, work in works.items()} for _ in range(rounds)]
    rows = []
    for name in works:
        wall, cpu = (min(each[name][place] for each in found) for place in (0, 1))
        floor = min(each["msgpack.unpackb alone"][1] for each in found)
        figures = [f"{blocks / wall:,.0f}", f"{blocks / cpu:,.0f}", amount(cpu / batches * 1e6), f"{cpu / floor:.2f}"]
        rows.append([f"{per_event} blocks an event: {name}", *figures])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.streams", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--publish", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the best of them counts (%(default)s)")
    args = parser.parse_args()
    if args.publish:
        publish(*args.publish)
        return 0
    print("\n".join(f"{name}: {value}" for name, value in described("pyzmq", "msgpack").items()), end="\n\n")
    rows = []
    for per_event, batches in SHAPES.items():
        say(f"{batches:,} batches of {per_event} blocks")
        rows += measure(per_event, batches, args.rounds)
    columns = ["", "blocks/s, wall", "blocks/s of the thread's CPU", "µs of CPU a batch", "CPU of unpackb"]
    print(table(columns, rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Blocks a second from one publisher's process, over TCP, until all are applied.

The publisher has its payloads ready and sends as fast as its socket takes them. A check ensures that nothing is dropped
on the way. Wall time depends on the other load of the machine (the publisher, its I/O thread, ours and the manager's
thread share the cores), so the CPU time of the manager's thread stands beside it. The lower rows are parts of the work
alone, on the same payloads in the same run: they show where the time goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import msgpack
import zmq

from kvindex import EventManager, PodSource, PrefixIndex

from .publishers import Publishers, batches, until
from .report import amount, say, table

PACKAGES = ("pyzmq", "msgpack")
BLOCK_SIZE = 16
CHAIN = 64  # blocks of one prompt

#: Blocks of an event, and the number of batches of one event.
SHAPES = {64: 10_000, 1: 100_000}


def followed(publisher: Publishers, total: int, blocks: int) -> tuple[float, float]:
    """The whole work of an EventManager: seconds, and seconds of CPU of its thread."""
    with EventManager(PrefixIndex(BLOCK_SIZE)) as manager:
        manager.add_pod(PodSource("pod", endpoint=publisher.ends[0][0], model="m"))
        until(lambda: manager.status()["pod"].connected)
        time.sleep(0.2)  # until the subscription has reached the publisher
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "kvindex-streams"]
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        start, cpu = time.perf_counter(), time.clock_gettime(clock)
        publisher.send(total, anew=True)
        until(lambda: manager.status()["pod"].batches >= total)
        seconds, cpu = time.perf_counter() - start, time.clock_gettime(clock) - cpu
        status = manager.status()["pod"]
    assert (status.state, status.lost_batches, status.blocks) == ("exact", 0, blocks), status
    return seconds, cpu


def received(publisher: Publishers, total: int) -> tuple[float, float]:
    """The same figures of a bare socket that receives the messages and drops them."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(b"")
        socket.connect(publisher.ends[0][0])
        time.sleep(0.5)
        publisher.send(total, anew=True)
        return timed(lambda _: socket.recv_multipart(), [b""] * total)


def timed(each: Callable[[bytes], object], payloads: list[bytes]) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.thread_time()
    for payload in payloads:
        each(payload)
    return time.perf_counter() - start, time.thread_time() - cpu


def shape(per_event: int, total: int, rounds: int) -> Iterator[list[str]]:
    """The rows of one shape of events."""
    payloads, blocks = list(batches(1, total, per_event, CHAIN)), per_event * total
    with Publishers(blocks=per_event, chain=CHAIN) as publisher:
        publisher.prepare(total)
        works: dict[str, Callable[[], tuple[float, float]]] = {
            "EventManager, over TCP, until applied": lambda: followed(publisher, total, blocks),
            "a bare SUB socket, over TCP": lambda: received(publisher, total),
            "index.ingest alone": lambda: timed(partial(PrefixIndex(BLOCK_SIZE).ingest, "pod", model="m"), payloads),
            "msgpack.unpackb alone": lambda: timed(msgpack.unpackb, payloads),
        }
        # Round by round, so a busy minute of the machine hits all works alike.
        found = [{name: work() for name, work in works.items()} for _ in range(rounds)]
    floor = min(each["msgpack.unpackb alone"][1] for each in found)
    for name in works:
        wall, cpu = map(min, zip(*(each[name] for each in found), strict=True))
        figures = [f"{blocks / wall:,.0f}", f"{blocks / cpu:,.0f}", amount(cpu / total * 1e6), f"{cpu / floor:.2f}"]
        yield [f"{per_event} blocks an event: {name}", *figures]


def measure(*, rounds: int = 3, share: float = 1.0) -> Iterator[str]:
    """``rounds``: the best one counts; ``share``: part of 10,000 batches of 64 blocks and 100,000 of one block."""
    rows = []
    for per_event, most in SHAPES.items():
        total = int(most * share) // CHAIN * CHAIN
        say(f"{total:,} batches of {per_event} blocks")
        rows += shape(per_event, total, rounds)
    yield table(["", "blocks/s, wall", "blocks/s of the thread's CPU", "µs of CPU a batch", "CPU of unpackb"], rows)

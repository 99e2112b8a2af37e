"""Readers that start at once beside one publisher that serves whole histories one after another, as engines do.

The measure is the work of the publisher: N readers should cost it N histories, and all of them should be exact after N
times the time of one. The publisher's work is a pause, not a computation, so the figures do not depend on the machine:
the publisher is a thread that sleeps for each history, and the readers share the processor with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import zmq

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sim.publisher import Publisher

from .publishers import batches, until
from .report import table

BATCHES = 1000
SLICES = 10  # pauses a history
LIMIT = 300.0


class _Slow(Publisher):
    """A publisher that needs ``cost`` seconds for each history."""

    cost = 0.0
    sent = 0

    def _reply(self, client: bytes, seq: int, payload: bytes) -> None:
        if seq % (BATCHES // SLICES) == 0:
            time.sleep(self.cost / SLICES)
        self.sent += 1
        super()._reply(client, seq, payload)


def herd(readers: int, cost: float) -> tuple[float, float, int, int]:
    """Seconds until all readers are exact, histories sent, requests, and the most readers degraded at once."""
    with ExitStack() as stack:
        publisher = _Slow(stack.enter_context(zmq.Context()), "tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
        stack.callback(publisher.close)
        publisher.cost = cost
        for payload in batches(0, BATCHES, 1):
            publisher.publish(payload)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                if publisher.router is not None and publisher.router.poll(50):
                    publisher.serve()

        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        managers = [stack.enter_context(EventManager(PrefixIndex(16))) for _ in range(readers)]
        degraded = 0

        def exact() -> bool:
            nonlocal degraded
            states = [manager.status()["pod"].state for manager in managers]
            degraded = max(degraded, states.count("degraded"))
            time.sleep(0.1)
            return states.count("exact") == readers

        start = time.perf_counter()
        for manager in managers:
            manager.add_pod(PodSource("pod", endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint))
        until(exact, LIMIT)
        return time.perf_counter() - start, publisher.sent / BATCHES, publisher.replays, degraded


def measure(*, readers: tuple[int, ...] = (1, 16, 64), cost: float = 0.5) -> Iterator[str]:
    """``readers``: sizes of the herds; ``cost``: seconds that one history takes."""
    rows = []
    for count in readers:
        seconds, histories, asked, degraded = herd(count, cost)
        rows.append([f"{count}", f"{seconds:.1f} s", f"{histories:.1f}", f"{asked}", f"{degraded}"])
    yield table(["readers", "all exact after", "histories sent", "requests", "degraded meanwhile"], rows)

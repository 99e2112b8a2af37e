"""``python -m benchmarks.herd``: readers that start at once beside one publisher that serves whole histories one after
another, as engines do.

What counts is what the publisher has to send: N readers should cost it N histories, and all of them should be exact
after N times what one takes. The publisher's work is a pause, not a computation, so the figures say nothing about the
machine: it is a thread that waits so long a history, and the readers share the processor with it.
"""

from __future__ import annotations

import argparse
import struct
import threading
import time

import msgpack
import zmq

from kvindex import EventManager, PodSource, PrefixIndex

from .machine import described
from .report import say, table

BATCHES = 1000
BLOCK_SIZE = 16
SLICES = 10  # pauses a history
LIMIT = 300.0


class Publisher:
    """One thread, one history at a time, ``cost`` seconds each."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], cost: float) -> None:
        self._live = context.socket(zmq.PUB)
        self._answers = context.socket(zmq.ROUTER)
        self._answers.sndhwm = 0
        port = self._live.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.replay_endpoint = f"tcp://127.0.0.1:{self._answers.bind_to_random_port('tcp://127.0.0.1')}"
        self._cost = cost
        self._history = [
            msgpack.packb([1.7e9 + n, [["BlockStored", [n + 1], n or None, [n] * BLOCK_SIZE, BLOCK_SIZE]], 0])
            for n in range(BATCHES)
        ]
        self.asked = self.sent = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._answers.poll(50):
                continue
            who, _, start = self._answers.recv_multipart()
            self.asked += 1
            for seq in range(struct.unpack(">Q", start)[0], BATCHES):
                if seq % (BATCHES // SLICES) == 0:
                    time.sleep(self._cost / SLICES)
                self._answers.send_multipart([who, b"", b"", struct.pack(">Q", seq), self._history[seq]])
                self.sent += 1
            self._answers.send_multipart([who, b"", b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for each in (self._live, self._answers):
            each.close(0)


def herd(readers: int, cost: float) -> tuple[float, float, int, int]:
    """Seconds until all are exact, histories sent, requests, and the most readers that were degraded at once."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = Publisher(context, cost)
    managers = [EventManager(PrefixIndex(BLOCK_SIZE)) for _ in range(readers)]
    degraded = 0
    try:
        start = time.monotonic()
        for manager in managers:
            manager.add_pod(PodSource("pod", endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint))
        while not all(manager.is_exact() for manager in managers):
            states = [manager.status()["pod"].state for manager in managers]
            degraded = max(degraded, states.count("degraded"))
            if time.monotonic() - start > LIMIT:
                raise SystemExit(f"not all were exact after {LIMIT:.0f} s: {states}")
            time.sleep(0.1)
        return time.monotonic() - start, publisher.sent / BATCHES, publisher.asked, degraded
    finally:
        for manager in managers:
            manager.close()
        publisher.close()
        context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--cost", type=float, default=0.5, help="seconds that one history takes")
    args = parser.parse_args()
    say(described())
    rows = []
    for readers in args.readers:
        seconds, histories, asked, degraded = herd(readers, args.cost)
        rows.append([f"{readers}", f"{seconds:.1f} s", f"{histories:.1f}", f"{asked}", f"{degraded}"])
    print(table(["readers", "all exact after", "histories sent", "requests", "degraded meanwhile"], rows), end="")


if __name__ == "__main__":
    main()

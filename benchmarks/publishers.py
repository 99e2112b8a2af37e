"""Publishers of prepared batches in a process of their own, so the measured code has its process to itself.

``python -m benchmarks.publishers`` is that process; :class:`Publishers` is its handle. A publisher announces chains of
new blocks, has a history from the start, and answers replays, also while it sends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from kvindex import PodSource
from kvindex.sim.control import Control, ToldProcess, follow_parent
from kvindex.sim.publisher import Publisher

from . import data
from .data import chains

__all__ = ["BLOCKS", "Publishers", "batches", "until"]

#: Default blocks of a batch, which is one event that begins a chain.
BLOCKS = 20


def batches(pod: int, count: int, blocks: int = BLOCKS, chain: int = BLOCKS) -> Iterator[bytes]:
    """The first ``count`` batches of a pod, of ``blocks`` blocks each, of chains of ``chain`` blocks."""
    return data.payloads(chains(pod, count * blocks // chain, chain), blocks)


def until(done: Callable[[], object], patience: float = 120.0) -> float:
    """Wait until ``done()`` is true, and return the seconds. Ends the program after ``patience`` seconds."""
    start = time.perf_counter()
    while not done():
        if time.perf_counter() - start > patience:
            raise SystemExit(f"not done after {patience:.0f} s")
        time.sleep(0.002)
    return time.perf_counter() - start


class _Server:
    def __init__(self, pods: int, history: int, blocks: int, chain: int) -> None:
        self.shape = blocks, chain
        self.context: zmq.Context[Any] = zmq.Context()
        self.context.max_sockets = self.context.get(zmq.SOCKET_LIMIT)
        self.control = Control(self.context, self)
        # No limit of the queue: the fastest sender would lose most batches, and the replays would be measured.
        self.publishers = [
            Publisher(self.context, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", queue=0, buffer_steps=1 << 20)
            for _ in range(pods)
        ]
        for pod, publisher in enumerate(self.publishers):
            for payload in batches(pod, history, *self.shape):
                publisher.publish(payload)
        self.routers = {publisher.router: publisher for publisher in self.publishers}
        self.fresh: list[list[bytes]] = []
        self.sending: threading.Thread | None = None
        self.lock = threading.Lock()

    def run(self) -> None:
        ends = [(each.endpoint, each.replay_endpoint) for each in self.publishers]
        print(json.dumps({"control": self.control.endpoint, "ends": ends}), flush=True)
        poller = zmq.Poller()
        for sock in (self.control.socket, *self.routers):
            poller.register(sock, zmq.POLLIN)
        while True:
            for sock, _ in poller.poll():
                if sock is self.control.socket:
                    self.control.answer()
                elif not sock.closed:  # a command may have closed it earlier in the same turn
                    with self.lock:
                        self.routers[sock].serve()
                for gone in [each for each in self.routers if each.closed]:
                    poller.unregister(gone)
                    del self.routers[gone]

    def _op_prepare(self, total: int) -> dict[str, Any]:
        pods = len(self.publishers)
        self.fresh = [list(batches(pod + pods, -(-total // pods), *self.shape)) for pod in range(pods)]
        return {}

    def _op_send(self, total: int, rate: float | None, anew: bool) -> dict[str, Any]:
        if self.sending is not None:
            self.sending.join()
        if anew:  # as if nothing had been sent before
            for publisher in self.publishers:
                publisher.seq = 0
        self.sending = threading.Thread(target=self._send, args=(total, rate), daemon=True)
        self.sending.start()
        return {}

    def _send(self, total: int, rate: float | None) -> None:
        start = time.perf_counter()
        for number in range(total):
            while rate and (early := start + number / rate - time.perf_counter()) > 0:
                time.sleep(early)
            pod = number % len(self.publishers)
            with self.lock:
                self.publishers[pod].publish(self.fresh[pod][number // len(self.publishers)])

    def _op_die(self, count: int) -> dict[str, Any]:
        with self.lock:
            for publisher in self.publishers[:count]:
                publisher.close()
        return {}


class Publishers(ToldProcess):
    """A process of ``pods`` publishers, which have sent ``history`` batches before any client could connect."""

    def __init__(self, pods: int = 1, history: int = 0, *, blocks: int = BLOCKS, chain: int = BLOCKS) -> None:
        numbers = map(str, (pods, history, blocks, chain))
        super().__init__("publishers", [sys.executable, "-m", "benchmarks.publishers", *numbers], timeout=120.0)
        self.ends: list[tuple[str, str]] = [(live, replay) for live, replay in self.ready["ends"]]

    def sources(self) -> list[PodSource]:
        return [
            PodSource(f"p{n}", endpoint=live, replay_endpoint=replay, model="m")
            for n, (live, replay) in enumerate(self.ends)
        ]

    def prepare(self, total: int) -> None:
        """Make ``total`` batches, for every later ``send``."""
        self.ask("prepare", total=total)

    def send(self, total: int, rate: float | None = None, *, anew: bool = False) -> None:
        """Start to send by all publishers in turn, ``rate`` batches a second or as fast as possible; does not wait."""
        self.ask("send", total=total, rate=rate, anew=anew)

    def die(self, count: int) -> None:
        """Close the first ``count`` publishers."""
        self.ask("die", count=count)


if __name__ == "__main__":
    follow_parent(lambda: os._exit(0))
    _Server(*map(int, sys.argv[1:])).run()

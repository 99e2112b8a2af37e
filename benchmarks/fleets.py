"""``python -m benchmarks.fleets``: what many pods cost one manager, beside a bare SUB socket on the same messages.

Publishers live in one other process: a PUB and a ROUTER each. Every row is a process of its own, so that memory and
processor time are its alone; processor time is that of all its threads, libzmq's included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sim.wire import Stored, encode_batch, wire_form

from .machine import described, resident
from .report import amount, say, table

BLOCK_SIZE = 16
BLOCKS = 20  # of a batch
PATIENCE = 60.0
SETTLED = 40.0  # seconds after which silent streams ask at their longest interval


def payloads(pod: int, count: int) -> list[bytes]:
    """Batches of one chain of 20 new blocks each."""
    rng = np.random.default_rng(pod)
    form = wire_form("vllm-0.33.0")
    made = []
    for batch in range(count):
        first = (pod << 20) + batch * BLOCKS + 1
        hashes = [((first + block) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") for block in range(BLOCKS)]
        tokens = rng.integers(0, 128_000, BLOCKS * BLOCK_SIZE, dtype=np.uint32)
        made.append(encode_batch([Stored(hashes, None, tokens, BLOCK_SIZE)], form, ts=time.time()))
    return made


def publish(pods: int, history: int) -> None:
    """The other process. Each line of its input is a command: ``send RATE SECONDS``, or ``die N``: close N of the
    publishers."""
    context = zmq.Context()
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)
    sockets, routers, poller = [], {}, zmq.Poller()
    kept = [payloads(pod, history) for pod in range(pods)]
    ports = []
    for pod in range(pods):
        pub, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        pub.sndhwm = router.sndhwm = 0
        pub.linger = router.linger = 0
        ports.append((pub.bind_to_random_port("tcp://127.0.0.1"), router.bind_to_random_port("tcp://127.0.0.1")))
        sockets.append(pub)
        routers[router] = pod
        poller.register(router, zmq.POLLIN)
    ending, lock = threading.Event(), threading.Lock()

    def serve() -> None:
        while not ending.is_set():
            for router, _ in poller.poll(100):
                with lock:
                    if router.closed:
                        continue
                    who, _, start = router.recv_multipart()
                    known = kept[routers[router]]
                    for seq in range(struct.unpack(">Q", start)[0], len(known)):
                        router.send_multipart((who, b"", b"", struct.pack(">Q", seq), known[seq]))
                    router.send_multipart((who, b"", b"", b"\xff" * 8, b""))

    thread = threading.Thread(target=serve)
    thread.start()
    print(json.dumps(ports), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "send":
            rate, seconds = (float(number) for number in numbers)
            total = int(rate * seconds)
            each = -(-total // pods)
            fresh = [payloads(pod + pods, each) for pod in range(pods)]
            print("ready", flush=True)
            start = time.perf_counter()
            for number in range(total):
                pod = number % pods
                while (early := start + number / rate - time.perf_counter()) > 0:
                    time.sleep(early)
                with lock:
                    kept[pod].append(fresh[pod][number // pods])
                    frames = (b"", struct.pack(">Q", len(kept[pod]) - 1), kept[pod][-1])
                sockets[pod].send_multipart(frames)
            print("sent", flush=True)
        elif command == "die":
            with lock:
                for pod in range(int(numbers[0])):
                    sockets[pod].close(0)
            print("dead", flush=True)
    ending.set()
    thread.join()
    context.destroy(linger=0)


class Fleet:
    """Publishers in a process of their own."""

    def __init__(self, pods: int, history: int) -> None:
        command = [sys.executable, "-m", "benchmarks.fleets", "--publish", str(pods), str(history)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ports: list[tuple[int, int]] = json.loads(self.told())

    def told(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def do(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def sources(self) -> list[PodSource]:
        return [
            PodSource(
                f"p{n}", endpoint=f"tcp://127.0.0.1:{live}", replay_endpoint=f"tcp://127.0.0.1:{replay}", model="m"
            )
            for n, (live, replay) in enumerate(self.ports)
        ]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # waits for it, and closes what it is told by
            assert self._process.stdin is not None
            self._process.stdin.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for(done: Callable[[], object]) -> float:
    start = time.perf_counter()
    while not done():
        if time.perf_counter() - start > PATIENCE:
            raise SystemExit(f"not done after {PATIENCE:.0f} s")
        time.sleep(0.002)
    return time.perf_counter() - start


def sent(fleet: Fleet, rate: int, seconds: float, arrived: Callable[[], bool]) -> float:
    """Seconds of this process's processor time while the fleet sends, and until all of it has arrived."""
    fleet.do(f"send {rate} {seconds}")
    fleet.told()
    start = time.process_time()
    fleet.told()
    wait_for(arrived)
    return time.process_time() - start


def bare(pods: int, rate: int, seconds: float) -> dict[str, float]:
    """One SUB socket, connected to every publisher; nothing is done with its messages."""
    with Fleet(pods, 0) as fleet:
        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        for live, _ in fleet.ports:
            socket.connect(f"tcp://127.0.0.1:{live}")
        time.sleep(0.5)
        total, got = int(rate * seconds), [0]

        def receive() -> None:
            while got[0] < total:
                socket.recv_multipart()
                got[0] += 1

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        taken = sent(fleet, rate, seconds, lambda: got[0] >= total)
        context.destroy(linger=0)
        return {"us": taken / total * 1e6}


def bare_idle(pods: int, seconds: float) -> dict[str, float]:
    """One SUB socket with as many connections, and the heartbeats of an EventManager."""
    with Fleet(pods, 10) as fleet:
        context = zmq.Context()
        context.socket(zmq.PAIR).close()
        gc.collect()
        before, opened = resident(), descriptors()
        start, started = time.perf_counter(), time.process_time()
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        socket.heartbeat_ivl, socket.heartbeat_timeout = 500, 1250
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        for live, _ in fleet.ports:
            socket.connect(f"tcp://127.0.0.1:{live}")
        for _ in fleet.ports:
            monitor.recv_multipart()
        connected, started = time.perf_counter() - start, time.process_time() - started
        gc.collect()
        each, opened = (resident() - before) / pods, descriptors() - opened
        taken = time.process_time()
        time.sleep(seconds)
        taken = (time.process_time() - taken) / seconds
        context.destroy(linger=0)
        return {"exact": connected, "started": started, "kB": each / 1e3, "idle": taken * 100, "descriptors": opened}


def followed(pods: int, rate: int, seconds: float) -> dict[str, float]:
    with Fleet(pods, 0) as fleet, EventManager(PrefixIndex(BLOCK_SIZE)) as manager:
        for source in fleet.sources():
            manager.add_pod(source)
        manager.wait_until_current(PATIENCE)
        time.sleep(0.5)
        total = int(rate * seconds)
        taken = sent(fleet, rate, seconds, lambda: sum(pod.batches for pod in manager.status().values()) >= total)
        states = [pod.state for pod in manager.status().values()]
        if states.count("exact") != pods:
            raise SystemExit(f"not every pod is exact: {states}")
        return {"us": taken / total * 1e6}


def idle(pods: int, seconds: float) -> dict[str, float]:
    """Start, memory, rest and the death of half of them."""
    with Fleet(pods, 10) as fleet:
        sources = fleet.sources()
        index = PrefixIndex(BLOCK_SIZE)
        index.ingest("warm", payloads(0, 1)[0], model="m")
        index.remove_pod("warm")
        with EventManager(index) as manager:
            gc.collect()
            before, opened = resident(), descriptors()
            start, started = time.perf_counter(), time.process_time()
            for source in sources:
                manager.add_pod(source)
            added = time.perf_counter() - start
            manager.wait_until_current(PATIENCE)
            current, started = time.perf_counter() - start, time.process_time() - started
            wait_for(lambda: all(pod.state == "exact" for pod in manager.status().values()))
            held = index.stats()["bytes"]
            gc.collect()
            each, opened = (resident() - before - held) / pods, descriptors() - opened
            time.sleep(SETTLED)
            taken = time.process_time()
            time.sleep(seconds)
            taken = (time.process_time() - taken) / seconds
            asked = []
            for _ in range(5):
                start = time.process_time()
                manager.status()
                asked.append(time.process_time() - start)
            noticed = [0.0]
            gone: set[str] = set()

            def note(change: Any) -> None:
                if change.new == "stale":
                    gone.add(change.pod)
                    noticed[0] = time.perf_counter()

            manager.on_change(note)
            fleet.do(f"die {pods // 2}")
            fleet.told()
            dead = time.perf_counter()
            wait_for(lambda: len(gone) >= pods // 2)
            return {
                "added": added, "exact": current, "started": started, "kB": each / 1e3, "idle": taken * 100,
                "status": min(asked) * 1e3, "noticed": noticed[0] - dead, "descriptors": opened,
            }  # fmt: skip


def alone(row: str, *arguments: float) -> dict[str, float]:
    """A row in a process of its own."""
    say(f"{row} {' '.join(map(str, arguments))}")
    command = [sys.executable, "-m", "benchmarks.fleets", "--row", row, *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


ROWS: dict[str, Callable[..., dict[str, float]]] = {
    "bare": bare, "bare_idle": bare_idle, "followed": followed, "idle": idle,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fleets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--publish", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the best of them counts (%(default)s)")
    parser.add_argument("--pods", type=int, nargs="+", default=[256, 1000], help="of the idle fleets")
    args = parser.parse_args()
    if args.publish:
        publish(*args.publish)
        return 0
    if args.row:
        name, *arguments = args.row
        print(json.dumps(ROWS[name](int(arguments[0]), *(float(each) for each in arguments[1:]))))
        return 0
    print("\n".join(f"{name}: {value}" for name, value in described("pyzmq").items()), end="\n\n")
    rows = []
    for rate in (1000, 5000):
        found = [
            (alone("followed", 32, rate, 4.0)["us"], alone("bare", 32, rate, 4.0)["us"]) for _ in range(args.rounds)
        ]
        ours, floor = (min(each[place] for each in found) for place in (0, 1))
        name = f"µs of processor time a batch of {BLOCKS} blocks, 32 pods, {rate:,} a second"
        rows.append([name, amount(ours), amount(floor), f"{ours / floor:.2f}"])
    for pods in args.pods:
        one, floor = alone("idle", pods, 10.0), alone("bare_idle", pods, 10.0)
        rows += [
            [f"{pods:,} {what}", *(shown.format(each[key]) if key in each else "" for each in (one, floor)), ratio]
            for what, key, shown in (
                ("idle pods, of a core", "idle", "{:.2f} %"),
                ("pods, descriptors", "descriptors", "{:,.0f}"),
                ("pods, resident each", "kB", "{:.0f} kB"),
                ("pods, all added", "added", "{:.2f} s"),
                ("pods, all current", "exact", "{:.2f} s"),
                ("pods, processor time until then", "started", "{:.2f} s"),
                ("pods, half of them dead: last noticed", "noticed", "{:.3f} s"),
                ("pods, processor time of status()", "status", "{:.1f} ms"),
            )
            for ratio in [f"{one[key] / floor[key]:.2f}" if key in floor else ""]
        ]
    print(table(["", "kvindex", "a bare SUB socket", "ratio"], rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

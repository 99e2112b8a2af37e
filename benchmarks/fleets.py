"""The cost of many pods for one manager, beside a bare SUB socket on the same messages.

Every row has its own process, so memory and processor time are of that row alone. Processor time is that of all
threads, libzmq's included.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import zmq

from kvindex import EventManager, PrefixIndex

from .process import apart, resident
from .publishers import BLOCKS, Publishers, batches, until
from .report import amount, say, table

PACKAGES = ("pyzmq",)
BLOCK_SIZE = 16
PATIENCE = 60.0
SETTLED = 40.0  # seconds until silent streams check for missed batches at their longest interval

#: Figures of idle fleets: a name, the key of the figure, and its format.
IDLE = (
    ("idle pods, of a core", "idle", "{:.2f} %"),
    ("pods, descriptors", "descriptors", "{:,.0f}"),
    ("pods, resident each", "kB", "{:.0f} kB"),
    ("pods, all added", "added", "{:.2f} s"),
    ("pods, all current", "exact", "{:.2f} s"),
    ("pods, processor time until then", "started", "{:.2f} s"),
    ("pods, half of them dead: last noticed", "noticed", "{:.3f} s"),
    ("pods, processor time of status()", "status", "{:.1f} ms"),
)


def bare(pods: int, rate: int, seconds: float) -> float:
    """Microseconds of processor time a batch of one SUB socket that is connected to every publisher.

    Its messages are dropped.
    """
    total, got = int(rate * seconds), 0
    with Publishers(pods) as fleet, zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(b"")
        for live, _ in fleet.ends:
            socket.connect(live)

        def receive() -> None:
            nonlocal got
            while got < total:
                socket.recv_multipart()
                got += 1

        fleet.prepare(total)
        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        time.sleep(0.5)
        start = time.process_time()
        fleet.send(total, rate)
        time.sleep(seconds)  # a check of until() costs more than a batch
        until(lambda: got >= total)
        return (time.process_time() - start) / total * 1e6


def bare_idle(pods: int, seconds: float) -> dict[str, float]:
    """The same figures of one SUB socket with as many connections, and with the heartbeats of an EventManager."""
    with Publishers(pods, 10) as fleet, zmq.Context() as context:
        context.socket(zmq.PAIR).close()
        gc.collect()
        process = psutil.Process()
        before, opened = resident(), process.num_fds()
        start, started = time.perf_counter(), time.process_time()
        with context.socket(zmq.SUB) as socket:
            socket.subscribe(b"")
            socket.heartbeat_ivl, socket.heartbeat_timeout = 700, 1050
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            for live, _ in fleet.ends:
                socket.connect(live)
            for _ in fleet.ends:
                monitor.recv_multipart()
            connected, started = time.perf_counter() - start, time.process_time() - started
            gc.collect()
            each, opened = (resident() - before) / pods, process.num_fds() - opened
            taken = time.process_time()
            time.sleep(seconds)
            taken = (time.process_time() - taken) / seconds
            socket.disable_monitor()
            monitor.close()
        return {"exact": connected, "started": started, "kB": each / 1e3, "idle": taken * 100, "descriptors": opened}


def followed(pods: int, rate: int, seconds: float) -> float:
    """Microseconds of processor time a batch of a manager that follows the publishers."""
    total = int(rate * seconds)
    with Publishers(pods) as fleet, EventManager(PrefixIndex(BLOCK_SIZE)) as manager:
        for source in fleet.sources():
            manager.add_pod(source)
        manager.wait_until_current(PATIENCE)
        fleet.prepare(total)
        time.sleep(0.5)
        start = time.process_time()
        fleet.send(total, rate)
        time.sleep(seconds)  # a call of status() costs more than a batch
        until(lambda: sum(pod.batches for pod in manager.status().values()) >= total)
        taken = time.process_time() - start
        states = [pod.state for pod in manager.status().values()]
        assert states.count("exact") == pods, states
        return taken / total * 1e6


def idle(pods: int, seconds: float) -> dict[str, float]:
    """Figures of idle pods: their start, memory and rest, and the death of half of them."""
    process = psutil.Process()
    with Publishers(pods, 10) as fleet:
        sources = fleet.sources()
        index = PrefixIndex(BLOCK_SIZE)
        index.ingest("warm", next(batches(0, 1)), model="m")
        index.remove_pod("warm")
        with EventManager(index) as manager:
            gc.collect()
            before, opened = resident(), process.num_fds()
            start, started = time.perf_counter(), time.process_time()
            for source in sources:
                manager.add_pod(source)
            added = time.perf_counter() - start
            manager.wait_until_current(PATIENCE)
            current, started = time.perf_counter() - start, time.process_time() - started
            until(lambda: all(pod.state == "exact" for pod in manager.status().values()))
            held = index.stats()["bytes"]
            gc.collect()
            each, opened = (resident() - before - held) / pods, process.num_fds() - opened
            time.sleep(SETTLED)
            taken = time.process_time()
            time.sleep(seconds)
            taken = (time.process_time() - taken) / seconds
            asked = []
            for _ in range(5):
                start = time.process_time()
                manager.status()
                asked.append(time.process_time() - start)
            gone: dict[str, float] = {}

            def note(change: Any) -> None:
                if change.new == "stale":
                    gone.setdefault(change.pod, time.perf_counter())

            manager.on_change(note)
            fleet.die(pods // 2)
            dead = time.perf_counter()
            until(lambda: len(gone) >= pods // 2)
            return {
                "added": added, "exact": current, "started": started, "kB": each / 1e3, "idle": taken * 100,
                "status": min(asked) * 1e3, "noticed": max(gone.values()) - dead, "descriptors": opened,
            }  # fmt: skip


def measure(*, rounds: int = 3, pods: tuple[int, ...] = (256, 1000), seconds: float = 4.0) -> Iterator[str]:
    """``rounds``: the best one counts; ``pods``: sizes of the idle fleets; ``seconds``: length of each stream."""
    rows = []
    for rate in (1000, 5000):
        say(f"32 pods, {rate} a second")
        found = [[apart(call, 32, rate, seconds) for call in (followed, bare)] for _ in range(rounds)]
        ours, floor = map(min, zip(*found, strict=True))
        name = f"µs of processor time a batch of {BLOCKS} blocks, 32 pods, {rate:,} a second"
        rows.append([name, amount(ours), amount(floor), f"{ours / floor:.2f}"])
    for count in pods:
        say(f"{count} idle pods")
        both = apart(idle, count, 10.0), apart(bare_idle, count, 10.0)
        for what, key, shown in IDLE:
            figures = [each[key] for each in both if key in each]
            ratio = [f"{figures[0] / figures[1]:.2f}"] if len(figures) == 2 else ["", ""]
            rows.append([f"{count:,} {what}", *map(shown.format, figures), *ratio])
    yield table(["", "kvindex", "a bare SUB socket", "ratio"], rows)

"""Replication under faults, with processes of their own: pods that publish, one or two collectors, followers, a server.

    python -m e2e.replication --followers 8 --pods 32 --rate 1000        # the table of faults, for each server here

Each follower samples its own answers against the publisher's clock: the age of an answer that calls itself exact is the
time since the first batch was published that it lacks.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from kvindex import PodSource, PrefixIndex
from kvindex.replication import ReplicatedIndex, ReplicationPolicy
from kvindex.sim.publisher import Publisher

from .log_server import LogServer, programs

__all__ = ["FAULTS", "Fleet", "Outcome", "Settings", "measure"]

_SPAWN = multiprocessing.get_context("spawn")
_RING = 1 << 14
BLOCK_SIZE = 16
EVERY = 0.02


@dataclass(frozen=True)
class Settings:
    server: str
    pods: int
    followers: int
    rate: float
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"p{number}" for number in range(self.pods)]


def batch(pod: int, number: int, blocks: int = 20) -> bytes:
    """Batch ``number``: a chain of its own, and the removal of the one 200 batches before."""
    first = (pod << 32) + number * blocks
    tokens = [(first * BLOCK_SIZE + place) % 0xFFFFFFFF for place in range(blocks * BLOCK_SIZE)]
    events: list[Any] = [["BlockStored", [first + 1 + n for n in range(blocks)], None, tokens, BLOCK_SIZE, None]]
    if number >= 200:
        events.append(["BlockRemoved", [first - 200 * blocks + 1 + n for n in range(blocks)]])
    return bytes(msgpack.packb([time.time(), events]))


def _publish(settings: Settings, counts: Any, times: Any, rate: Any, pipe: Any) -> None:
    """Every pod's publisher, in turn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with zmq.Context() as context:
        pods = [
            Publisher(context, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@{name}@m")
            for name in settings.names
        ]
        pipe.send([(pod.endpoint, pod.replay_endpoint) for pod in pods])
        due, at = time.monotonic(), 0
        while not pipe.poll():
            now = time.monotonic()
            if rate.value <= 0:
                due = now
            while rate.value > 0 and due <= now:
                pod, at = at, (at + 1) % len(pods)
                number = counts[pod]
                times[pod * _RING + number % _RING] = time.monotonic()
                pods[pod].publish(batch(pod, number))
                counts[pod] = number + 1
                due += 1.0 / rate.value
            for each in pods:
                each.serve()
            time.sleep(0.0005)
        pipe.send([each.replays for each in pods])
        for each in pods:
            each.close()


def _replicate(
    settings: Settings, number: int, candidate: bool, ends: list[tuple[str, str]], counts: Any, times: Any, pipe: Any
) -> None:  # fmt: skip
    """A process with a view, which tells a line about itself whenever it has changed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ReplicatedIndex(
        settings.server, fleet="e2e", block_size=BLOCK_SIZE, collect=candidate,
        policy=ReplicationPolicy(**settings.policy),
    ) as view:  # fmt: skip
        if candidate:
            for name, (endpoint, replay) in zip(settings.names, ends, strict=True):
                view.add_pod(PodSource(name, endpoint=endpoint, replay_endpoint=replay, model="m"))
        said: Any = None
        worst = 0.0
        while True:
            if pipe.poll(EVERY):
                asked = pipe.recv()
                if asked == "end":
                    break
                if asked == "cpu":
                    pipe.send(("cpu", number, time.process_time()))
                    continue
                places = {}
                states = view.index.pods()
                for name in states:
                    place = view.index.stream_places(name).get(0)
                    places[name] = None if place is None else (place.seq, place.fingerprint, place.whole)
                view.index._check()
                pipe.send(("places", number, places, states, view.index.stats()["blocks"], view.status()))
                continue
            exact = 0
            states = view.index.pods()
            for pod, name in enumerate(settings.names):
                if states.get(name) != "exact":
                    continue
                place = view.index.stream_places(name).get(0)
                # Before the clock is read: what is published in between is not missing.
                first = 0 if place is None else place.seq + 1
                is_behind = first < counts[pod]
                missing = times[pod * _RING + first % _RING] if is_behind else None
                if view.index.pod_state(name) != "exact":
                    continue
                exact += 1
                if missing is not None:
                    worst = max(worst, time.monotonic() - missing)
            says = (exact == settings.pods, exact, view.role)
            if says != said or worst > 0.05:
                said = says
                pipe.send(("state", number, time.monotonic(), *says, worst))
                worst = 0.0


@dataclass
class Member:
    process: Any
    pipe: Any
    candidate: bool
    role: str = "follower"
    exact: int = 0
    log: list[tuple[float, bool, float]] = field(default_factory=list)
    """Moments at which all pods became exact or not all of them were any more, and the worst age until then."""


@dataclass
class Outcome:
    stale_after: float | None
    """Seconds until the last follower had noticed; None where nobody had to."""
    exact_after: float
    worst_age: float
    """Of all answers of followers that called themselves exact."""


class Fleet:
    """A context manager over everything."""

    def __init__(self, server: LogServer, settings: Settings, *, candidates: int = 2) -> None:
        self.server, self.settings = server, settings
        self.counts = _SPAWN.Array(ctypes.c_int64, settings.pods, lock=False)
        self.times = _SPAWN.Array(ctypes.c_double, settings.pods * _RING, lock=False)
        self.rate = _SPAWN.Value(ctypes.c_double, settings.rate, lock=False)
        self._pipe, end = _SPAWN.Pipe()
        self._publisher = _SPAWN.Process(
            target=_publish, args=(settings, self.counts, self.times, self.rate, end), daemon=True
        )
        self._publisher.start()
        assert self._publisher.pid is not None
        self.publisher: int = self._publisher.pid
        self.ends: list[tuple[str, str]] = self._pipe.recv()
        self.members: dict[int, Member] = {}
        for number in range(settings.followers):
            self.join(number, number < candidates)

    def join(self, number: int, candidate: bool) -> None:
        pipe, end = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_replicate, daemon=True,
            args=(self.settings, number, candidate, self.ends, self.counts, self.times, end),
        )  # fmt: skip
        process.start()
        self.members[number] = Member(process, pipe, candidate)

    def take(self, seconds: float = 0.0) -> None:
        """Read what members have told for so long."""
        until = time.monotonic() + seconds
        while True:
            for member in self.members.values():
                while member.process.is_alive() and member.pipe.poll():
                    kind, *what = member.pipe.recv()
                    if kind == "state":
                        _, at, all_exact, member.exact, member.role, worst = what
                        member.log.append((at, all_exact, worst))
            if time.monotonic() >= until:
                return
            time.sleep(0.005)

    def wait(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not done():
            self.take(0.01)
            if time.monotonic() > until:
                told = {number: (each.role, each.exact) for number, each in self.members.items()}
                raise AssertionError(f"not so after {seconds:g} s: {told}")

    def all_exact(self) -> bool:
        alive = [each for each in self.members.values() if each.process.is_alive()]
        return (
            all(each.exact == self.settings.pods for each in alive)
            and [each.role for each in alive].count("collector") == 1
        )

    @property
    def collector(self) -> Member:
        return next(each for each in self.members.values() if each.role == "collector" and each.process.is_alive())

    def ask(self, what: str) -> list[Any]:
        """An answer of each that is alive."""
        found = []
        for member in self.members.values():
            if not member.process.is_alive():
                continue
            member.pipe.send(what)
            while True:
                kind, *told = member.pipe.recv()
                if kind == what:
                    found.append(told)
                    break
        return found

    def outcome(self, began: float, watched: list[Member], settled: float) -> Outcome:
        """What became of it. ``watched``: the followers that are there all the time."""
        stale, exact, worst = [], [], 0.0
        for member in watched:
            since = [each for each in member.log if each[0] >= began]
            worst = max([worst, *(each[2] for each in since)])
            left = [at for at, all_exact, _ in since if not all_exact]
            if left:
                stale.append(left[0] - began)
                exact.append(next((at for at, all_exact, _ in since if all_exact and at > left[-1]), settled) - began)
        return Outcome(max(stale, default=None), max(exact, default=0.0), worst)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members.values():
            if member.process.is_alive():
                os.kill(member.process.pid, signal.SIGCONT)
                member.process.kill()
            member.process.join()
        self._publisher.kill()
        self._publisher.join()


def _kill_collector(fleet: Fleet) -> None:
    fleet.collector.process.kill()


def _freeze_collector(fleet: Fleet) -> None:
    pid = fleet.collector.process.pid
    os.kill(pid, signal.SIGSTOP)
    fleet.take(4.0)
    os.kill(pid, signal.SIGCONT)


def _restart_empty(fleet: Fleet) -> None:
    fleet.server.kill()
    fleet.take(0.5)
    fleet.server.start()


def _freeze_server(fleet: Fleet) -> None:
    fleet.server.freeze()
    fleet.take(3.0)
    fleet.server.thaw()


def _trim(fleet: Fleet) -> None:
    """One follower is away until what it would read next has been trimmed."""
    member = next(each for each in fleet.members.values() if not each.candidate)
    os.kill(member.process.pid, signal.SIGSTOP)
    fleet.take(1.0)
    with fleet.server.client() as client:
        client.execute_command("XTRIM", "{kv:e2e:0}:log", "MAXLEN", "1")
    fleet.take(0.5)
    os.kill(member.process.pid, signal.SIGCONT)


FAULTS: dict[str, Callable[[Fleet], None]] = {
    "collector killed": _kill_collector,
    "collector frozen for 4 s": _freeze_collector,
    "server back empty after 0.5 s": _restart_empty,
    "server frozen for 3 s": _freeze_server,
    "a follower away, and the log trimmed": _trim,
}


def measure(fleet: Fleet, fault: str) -> Outcome:
    """Cause one fault in a fleet that is well, and wait until it is well again."""
    fleet.wait(fleet.all_exact)
    fleet.take(0.5)
    watched = [each for each in fleet.members.values() if each.role != "collector"]
    for member in fleet.members.values():
        member.log.clear()
    began = time.monotonic()
    FAULTS[fault](fleet)
    fleet.take(1.5)
    fleet.wait(fleet.all_exact)
    settled = time.monotonic()
    fleet.take(1.0)
    fleet.wait(fleet.all_exact)
    dead = [number for number, each in fleet.members.items() if not each.process.is_alive()]
    for number in dead:
        fleet.join(number, fleet.members[number].candidate)
    fleet.wait(fleet.all_exact)
    return fleet.outcome(began, watched, settled)


def compare(fleet: Fleet) -> list[str]:
    """Stop publishing, and compare everybody with an index that was given every batch: differences."""
    settings, rate = fleet.settings, fleet.rate.value
    fleet.rate.value = 0.0
    fleet.take(1.5)
    found: list[str] = []
    own = PrefixIndex(block_size=BLOCK_SIZE)
    want = {}
    for pod, name in enumerate(settings.names):
        # The tokens and hashes of a batch, not its time, make blocks; the fingerprint is of the bytes.
        for number in range(max(0, fleet.counts[pod] - 400), fleet.counts[pod]):
            own.ingest(name, batch(pod, number), model="m", dp_rank=0, seq=number)
        want[name] = fleet.counts[pod] - 1
    told = fleet.ask("places")
    prints = {}
    for number, places, states, blocks, status in told:
        if blocks != own.stats()["blocks"]:
            found.append(f"{number} has {blocks} blocks, not {own.stats()['blocks']}")
        for name in settings.names:
            place = places.get(name)
            if place is None or place[0] != want[name] or not place[2] or states.get(name) != "exact":
                found.append(
                    f"{number} is at {place} of {name}, {states.get(name)}, not at {want[name]}: {status.reason}"
                )
            elif prints.setdefault(name, place[1]) != place[1]:
                found.append(f"{number} has another batch {place[0]} of {name}")
    fleet.rate.value = rate
    return found


@contextmanager
def running(program: str, **options: Any) -> Iterator[Fleet]:
    with ExitStack() as stack:
        server = stack.enter_context(LogServer(program))
        yield stack.enter_context(Fleet(server, Settings(server=server.url, **options)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.replication", description=__doc__)
    parser.add_argument("--followers", type=int, default=8)
    parser.add_argument("--pods", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--server", choices=sorted(programs()))
    args = parser.parse_args()
    wrong = 0
    for name, program in programs().items():
        if args.server not in (None, name):
            continue
        print(f"{name}: {args.followers} processes, {args.pods} pods, {args.rate:g} batches/s")
        print(f"| {'fault':<38} | stale after | exact again | oldest exact |\n|---|---|---|---|")
        with running(program, pods=args.pods, followers=args.followers, rate=args.rate) as fleet:
            for fault in FAULTS:
                found = measure(fleet, fault)
                stale = "-" if found.stale_after is None else f"{found.stale_after:.2f} s"
                print(
                    f"| {fault:<38} | {stale:>11} | {found.exact_after:>9.2f} s | {found.worst_age:>10.2f} s |",
                    flush=True,
                )
                wrong += found.worst_age > 1.25
            differences = compare(fleet)
            wrong += len(differences)
            print(f"{name}: {len(differences)} differences {differences[:3]}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

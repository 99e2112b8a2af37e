"""Pods that publish, collectors and followers as processes of their own, with samples of their answers and states.

Each member compares its own answers with the publisher's clock. The age of an exact answer is the time since the first
missing batch was published. Where it still has blocks of an engine that was restarted, it is the time since the
restart.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import msgpack
import zmq

from kvindex import PodSource
from kvindex.replication import ReplicatedIndex, ReplicationPolicy
from kvindex.sim.publisher import Publisher

from .log_server import connected

__all__ = ["BLOCK_SIZE", "Fleet", "Member", "Settings", "Shared", "batch", "publish"]

_SPAWN = multiprocessing.get_context("spawn")
_RING = 1 << 14
BLOCK_SIZE = 16
EVERY = 0.02


@dataclass(frozen=True)
class Settings:
    server: str
    """A URL for ``log_server.connected``."""
    pods: int
    followers: int
    rate: float
    policy: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    fleet: str = "e2e"
    block_size: int = BLOCK_SIZE
    prefix: str = "p"

    @property
    def names(self) -> list[str]:
        return [f"{self.prefix}{number}" for number in range(self.pods)]


class Shared(NamedTuple):
    """The memory that the publishers' process shares with all others. Arrays have an item for each pod."""

    counts: Any
    """Batches published since the engine's last restart."""
    times: Any
    """The times at which they were published, a ring for each pod."""
    rate: Any
    runs: Any
    """Number of restarts of the engine."""
    restarted: Any
    """Time of the last restart."""
    ended_at: Any
    """Batches of the run before."""
    restarts: Any
    """Requested restarts."""
    drops: Any
    """Batches that the publisher must not send."""

    @classmethod
    def make(cls, pods: int, rate: float) -> Shared:
        def array(kind: Any, length: int = pods) -> Any:
            return _SPAWN.Array(kind, length, lock=False)

        whole, real = ctypes.c_int64, ctypes.c_double
        return cls(
            counts=array(whole), times=array(real, pods * _RING), rate=_SPAWN.Value(real, rate, lock=False),
            runs=array(whole), restarted=array(real), ended_at=array(whole), restarts=array(whole), drops=array(whole),
        )  # fmt: skip


def batch(pod: int, number: int, blocks: int = 20, run: int = 0) -> bytes:
    """Batch ``number``: a chain of its own, and the removal of the chain 200 batches before."""
    first = (pod << 32) + (run << 26) + number * blocks
    events: list[Any] = [
        ["BlockStored", [first + 1 + n for n in range(blocks)], None, _tokens(first, blocks), BLOCK_SIZE, None]
    ]
    if number >= 200:
        events.append(["BlockRemoved", [first - 200 * blocks + 1 + n for n in range(blocks)]])
    return bytes(msgpack.packb([time.time(), events]))


def _tokens(first: int, blocks: int) -> list[int]:
    return [(first * BLOCK_SIZE + place) % 0xFFFFFFFF for place in range(blocks * BLOCK_SIZE)]


def prompt(pod: int, number: int, run: int) -> list[int]:
    """The tokens of the first block of a batch."""
    return _tokens((pod << 32) + (run << 26) + number * 20, 1)


def publish(settings: Settings, shared: Shared, pipe: Any) -> None:
    """The process with the publishers of all pods, which send in turn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    counts, times = shared.counts, shared.times
    with zmq.Context() as context:
        pods = [
            Publisher(context, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@{name}@m")
            for name in settings.names
        ]
        pipe.send([(pod.endpoint, pod.replay_endpoint) for pod in pods])
        due, at = time.monotonic(), 0
        while not pipe.poll():
            now = time.monotonic()
            for pod, each in enumerate(pods):
                if shared.restarts[pod] > shared.runs[pod]:
                    each.restart()
                    shared.ended_at[pod], counts[pod] = counts[pod], 0
                    shared.restarted[pod] = time.monotonic()
                    shared.runs[pod] += 1
                if shared.drops[pod]:
                    each.faults.drop += shared.drops[pod]
                    shared.drops[pod] = 0
            rate = shared.rate.value  # another process changes it
            if rate <= 0:
                due = now
            while rate > 0 and due <= now:
                pod, at = at, (at + 1) % len(pods)
                number = counts[pod]
                times[pod * _RING + number % _RING] = time.monotonic()
                pods[pod].publish(batch(pod, number, run=shared.runs[pod]))
                counts[pod] = number + 1
                due += 1.0 / rate
            for each in pods:
                each.serve()
            time.sleep(0.0005)
        pipe.send([each.replays for each in pods])
        for each in pods:
            each.close()


class _Lines(logging.Handler):
    """A handler that keeps log lines for the thread that may send them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def _replicate(
    settings: Settings, number: int, candidate: bool, ends: list[tuple[str, str]], shared: Shared, pipe: Any
) -> None:  # fmt: skip
    """A process with a view, which sends its state after every change."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = _Lines()
    logging.getLogger("kvindex.replication").addHandler(lines)
    logging.getLogger("kvindex.replication").setLevel(logging.INFO)
    with ReplicatedIndex(
        connected(settings.server), fleet=settings.fleet, block_size=settings.block_size, collect=candidate,
        shards=settings.shards, policy=ReplicationPolicy(**settings.policy),
    ) as view:  # fmt: skip
        if candidate:
            for name, (endpoint, replay) in zip(settings.names, ends, strict=True):
                view.add_pod(PodSource(name, endpoint=endpoint, replay_endpoint=replay, model="m"))
        said: Any = None
        worst = 0.0
        while True:
            try:
                if pipe.poll(EVERY):
                    asked = pipe.recv()
                    if asked == "end":
                        break
                    pipe.send((asked, number, *_told(view, asked)))
                    continue
                exact, age = _sample(view, settings, shared)
                worst = max(worst, age)
                status = view.status()
                says = (exact == settings.pods, exact, view.role, f"{status.reason}\n{status.hindrance}")
                if says != said or worst > 0.05 or lines.kept:
                    said = says
                    text = "\n".join(lines.kept.popleft() for _ in range(len(lines.kept)))
                    pipe.send(("state", number, time.monotonic(), *says, worst, text))
                    worst = 0.0
            except Exception:
                pipe.send(("raised", number, traceback.format_exc()))


def _told(view: ReplicatedIndex, asked: str) -> tuple[Any, ...]:
    if asked == "cpu":
        return (time.process_time(),)
    places = {}
    states = view.index.pods()
    for name in states:
        place = view.index.stream_places(name).get(0)
        places[name] = None if place is None else (place.seq, place.fingerprint, place.whole)
    view.index._check()
    return places, states, view.index.stats()["blocks"], view.status()


def _sample(view: ReplicatedIndex, settings: Settings, shared: Shared) -> tuple[int, float]:
    """The number of exact pods, and the age of the oldest exact answer."""
    index, counts = view.index, shared.counts
    exact, worst = 0, 0.0
    states = index.pods()
    for pod, name in enumerate(settings.names):
        if states.get(name) != "exact":
            continue
        run, ended_at = shared.runs[pod], shared.ended_at[pod]
        place = index.stream_places(name).get(0)
        # Read before the clock, so a batch that is published in between does not count as missing.
        first = 0 if place is None else place.seq + 1
        missing = shared.times[pod * _RING + first % _RING] if first < counts[pod] else None
        # After a restart an engine holds no block of an earlier run.
        if run and index.match_prefix(prompt(pod, ended_at - 1, run - 1), model="m").tokens.get(name):
            missing = shared.restarted[pod]
        if index.pod_state(name) != "exact" or shared.runs[pod] != run:
            continue
        exact += 1
        if missing is not None:
            worst = max(worst, time.monotonic() - missing)
    if not exact:
        index.match_prefix(prompt(0, max(0, counts[0] - 1), shared.runs[0]), model="m", only_exact=True)
    return exact, worst


@dataclass
class Member:
    process: Any
    pipe: Any
    candidate: bool
    settings: Settings
    role: str = "follower"
    exact: int = 0
    log: list[tuple[float, bool, float, str]] = field(default_factory=list)
    """Changes between all and not all pods exact: the time, whether all are, the worst age until then, the role."""
    said: set[str] = field(default_factory=set)
    """Reasons in its status."""
    logged: set[str] = field(default_factory=set)

    def has_said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.said)

    def has_named(self, pattern: str, counted: bool = False) -> bool:
        """Whether its status and its log contain ``pattern``, or its log alone where the status has ``counted`` it."""
        return (counted or self.has_said(pattern)) and any(re.search(pattern, line) for line in self.logged)

    def clear(self) -> None:
        for each in (self.log, self.said, self.logged):
            each.clear()

    def end(self) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        self.process.join()


@dataclass
class Outcome:
    stale_after: float | None
    """Seconds until the last follower was stale; None where no follower became stale."""
    exact_after: float
    healed_after: float
    """The same as ``exact_after`` from the end of the fault; never negative."""
    worst_age: float
    """The greatest age of all exact answers."""
    way: float
    """The same of the collector, which subscribes to the engines: the longest time of a message in transit."""


class Fleet:
    """A context manager for the publisher and all members. ``guests`` are members that are not part of the fleet."""

    def __init__(self, server: Any, settings: Settings, *, candidates: int = 2) -> None:
        self.server, self.settings = server, settings
        self.shared = Shared.make(settings.pods, settings.rate)
        self._pipe, end = _SPAWN.Pipe()
        self._publisher = _SPAWN.Process(target=publish, args=(settings, self.shared, end), daemon=True)
        self._publisher.start()
        assert self._publisher.pid is not None
        self.publisher: int = self._publisher.pid
        self.ends: list[tuple[str, str]] = self._pipe.recv()
        self.members: dict[int, Member] = {}
        self.guests: dict[int, Member] = {}
        self.raised: list[str] = []
        for number in range(settings.followers):
            self.members[number] = self._member(number, number < candidates, settings)

    def _member(self, number: int, candidate: bool, settings: Settings) -> Member:
        pipe, end = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_replicate, daemon=True, args=(settings, number, candidate, self.ends, self.shared, end)
        )
        process.start()
        return Member(process, pipe, candidate, settings)

    def restart(self, number: int) -> Member:
        """Replace a member by a new process."""
        old = self.members[number]
        old.end()
        self.members[number] = self._member(number, old.candidate, self.settings)
        return self.members[number]

    def invite(self, **differs: Any) -> Member:
        """Add a guest: a candidate with other settings."""
        number = 1000 + len(self.guests)
        self.guests[number] = self._member(number, True, replace(self.settings, **differs))
        return self.guests[number]

    def take(self, seconds: float = 0.0) -> None:
        """Read the messages of members for ``seconds``."""
        until = time.monotonic() + seconds
        while True:
            for member in (*self.members.values(), *self.guests.values()):
                with suppress(EOFError, ConnectionError):  # the member was just killed
                    while member.process.is_alive() and member.pipe.poll():
                        self._hear(member, member.pipe.recv())
            if time.monotonic() >= until:
                return
            time.sleep(0.005)

    def _hear(self, member: Member, told: Any) -> None:
        kind, _, *what = told
        if kind == "raised":
            self.raised.append(what[0])
        elif kind == "state":
            before = member.role
            at, all_exact, member.exact, member.role, said, worst, logged = what
            member.log.append((at, all_exact, worst, before))
            member.said |= {line for line in said.split("\n") if line}
            member.logged |= {line for line in logged.split("\n") if line}

    def wait(self, done: Callable[[], Any], seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not done():
            self.take(0.01)
            if time.monotonic() > until:
                told = {
                    number: (each.role, each.exact, each.said)
                    for number, each in (*self.members.items(), *self.guests.items())
                }
                raise AssertionError(f"not so after {seconds:g} s: {told}")

    @property
    def alive(self) -> list[Member]:
        return [each for each in self.members.values() if each.process.is_alive()]

    def all_exact(self) -> bool:
        alive = self.alive
        collectors = [each.role for each in alive].count("collector")
        return all(each.exact == self.settings.pods for each in alive) and 1 <= collectors <= self.settings.shards

    @property
    def collector(self) -> Member:
        return next(each for each in self.alive if each.role == "collector")

    @property
    def follower(self) -> int:
        """The number of a member that never collects."""
        return next(number for number, each in self.members.items() if not each.candidate)

    def ask(self, what: str) -> list[Any]:
        """The answers of all members that are alive."""
        found = []
        for member in self.alive:
            member.pipe.send(what)
            while (told := member.pipe.recv())[0] != what:
                self._hear(member, told)
            found.append(told[1:])
        return found

    def outcome(self, began: float, ended: float, watched: list[int], settled: float) -> Outcome:
        """The outcome of a fault. ``watched``: the followers that run all the time."""
        stale, exact = [], []
        worst = max(
            (age for member in self.members.values() for at, _, age, _ in member.log if at >= began), default=0.0
        )
        for member in (self.members[number] for number in watched):
            since = [each for each in member.log if each[0] >= began]
            left = [at for at, all_exact, *_ in since if not all_exact]
            if left:
                stale.append(left[0] - began)
                exact.append(next((at for at, all_exact, *_ in since if all_exact and at > left[-1]), settled) - began)
        exact_after = max(exact, default=0.0)
        way = [age for *_, age, role in self.collector.log if role == "collector"]
        return Outcome(
            stale_after=max(stale, default=None), exact_after=exact_after, worst_age=worst, way=max(way, default=0.0),
            healed_after=max(0.0, exact_after - (ended - began)),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in (*self.members.values(), *self.guests.values()):
            member.end()
        self._publisher.kill()
        self._publisher.join()

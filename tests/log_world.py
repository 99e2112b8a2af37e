"""A simulation by seed of engines, servers, a network and processes that share a log, with every possible fault.

Nothing here has a clock, a thread or a socket, so a seed always gives the same history. The state machines are those of
the product. The index is a model that mixes each batch into a number, so a missing, repeated or reordered batch changes
the number. Every answer is compared with the engine's state at that moment.

    python tests/log_world.py --seconds 60            # new seeds until the time is over
    python tests/log_world.py --seed 17 --trace       # one of them again
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack

from kvindex.replication.collector import Cut
from kvindex.replication.entries import Described, Hashed
from kvindex.replication.replica import Replica
from kvindex.replication.requests import (
    Append,
    Claim,
    Collect,
    Drop,
    Fail,
    Get,
    Load,
    Put,
    Read,
    Refused,
    Release,
    Renew,
    ReplicationPolicy,
    Snapshot,
    StepDown,
    Tip,
    Trim,
    Trust,
    Wait,
)  # fmt: skip
from kvindex.replication.shard import shard_of
from kvindex.replication.snapshots import pack
from kvindex.sync.status import Configured, Forgotten, Marked, Removed

SETTINGS = {"block_size": 16, "hash_seed": 1337}
POLICY = ReplicationPolicy(
    snapshot_every=2.0, patience=3.0, count=64, max_entry=2048, max_backlog=64 << 10, snapshot_bytes=1 << 20
)
#: The greatest age of an answer that is called exact, in seconds, in addition to the longest delay of a message from
#: the engine through the collector and the log.
BOUND = 1.25
#: The length of the client's timeout in seconds.
TIMEOUT = 1.0
START = 1


def mix(content: int, payload: bytes) -> int:
    return zlib.crc32(payload, content)


def batch(pod: str, seq: int, payload: bytes, joined: bool) -> Hashed:
    """Encode a batch for the model of the index. The batches of the real core have their own tests."""
    return Hashed(msgpack.packb([pod, seq, payload, joined]))


class Wrong(AssertionError):
    pass


class Engine:
    """One pod. ``past`` contains every earlier state of its cache and the time when that state ended."""

    def __init__(self, world: World, name: str, buffer: int) -> None:
        self.world, self.name, self.buffer = world, name, buffer
        self.run = 0
        self.up = True
        self.seq = -1
        self.content = START
        self.batches: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self.past: dict[int, float] = {}
        self.every = world.random.choice((0.005, 0.02, 0.1))

    def publish(self) -> None:
        self.seq += 1
        payload = b"%d %d %s" % (self.run, self.seq, self.name.encode())
        self.past[self.content] = self.world.now
        self.content = mix(self.content, payload)
        self.batches.append((self.seq, payload))
        for node in self.world.nodes:
            if node.collects and self in node.engines:
                node.hear(self, self.run, self.seq, payload)

    def restart(self) -> None:
        self.run += 1
        self.seq = -1
        self.past[self.content] = self.world.now
        self.content = START
        self.past.pop(START, None)
        self.batches.clear()
        for node in self.world.nodes:
            if node.collects and self in node.engines:
                node.hear(self, self.run, -1, b"")
        self.every = self.world.random.choice((0.005, 0.02, 0.1))


class Server:
    """A Redis server that handles the requests of one shard, and its faults."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.frozen_until = 0.0
        self.generation = 0
        self.undo: deque[Callable[[], None]] = deque(maxlen=400)  # writes that a replica may lack
        self.blocked: list[Any] = []
        self.empty()

    def empty(self) -> None:
        self.entries: list[tuple[tuple[int, int], bytes]] = []
        self.last: tuple[int, int] | None = None
        self.values: dict[str, bytes] = {}
        self.lease: tuple[str, float] | None = None
        self.undo.clear()

    def do(self, request: Any) -> Any:
        now = self.world.now
        if self.lease is not None and self.lease[1] <= now:
            self.lease = None
        kind = type(request)
        if kind is Append:
            return self.append(request)
        if kind is Tip:
            return self.last
        if kind is Claim:
            if self.lease is not None:
                return False
            self.lease = (request.writer, now + request.seconds)
            return True
        if kind is Renew:
            if self.lease is None:
                return None
            if self.lease[0] != request.writer:
                return False
            self.lease = (request.writer, now + request.seconds)
            return True
        if kind is Release:
            if self.lease is not None and self.lease[0] == request.writer:
                self.lease = None
            return True
        if kind is Get:
            return self.values.get(request.key)
        if kind is Put:
            before = self.values.get(request.key)
            self.undo.append(lambda: self.put(request.key, before))
            damaged = self.world.random.random() < self.world.damage
            self.values[request.key] = request.data[:-1] + b"?" if damaged else request.data
            return True
        if kind is Drop:
            for key in request.keys:
                self.values.pop(key, None)
            return True
        assert kind is Trim, request
        first = next((at for at, (id, _) in enumerate(self.entries) if id >= request.before), len(self.entries))
        del self.entries[:first]
        return True

    def put(self, key: str, data: bytes | None) -> None:
        if data is None:
            self.values.pop(key, None)
        else:
            self.values[key] = data

    def append(self, request: Append) -> Any:
        if self.last is None and not request.make:
            return Refused()
        if self.last is not None and request.id <= self.last:
            return Refused()
        before = self.last
        self.entries.append((request.id, request.data))
        self.last = request.id

        def undo() -> None:
            self.last = before
            if self.entries and self.entries[-1][0] == request.id:
                self.entries.pop()

        self.undo.append(undo)
        self.world.written(self)
        return True

    def behind(self, after: tuple[int, int], count: int) -> list[tuple[tuple[int, int], bytes]]:
        entries = self.entries
        low = len(entries)
        while low and entries[low - 1][0] > after:
            low -= 1
        return entries[low : low + count]

    def fail_over(self, lost: int) -> None:
        """Promote a replica that lacks the last ``lost`` writes."""
        for _ in range(min(lost, len(self.undo))):
            self.undo.pop()()


class Index:
    """A model of PrefixIndex."""

    def __init__(self) -> None:
        self.content: dict[str, int] = {}
        self.place: dict[str, tuple[int, int, bool]] = {}  # run, number, and whether it is complete
        self.state: dict[str, str] = {}
        self.until: float | None = 0.0

    def apply(self, item: Any) -> None:
        kind = type(item)
        if kind is Hashed:
            batches = msgpack.Unpacker()
            batches.feed(item.data)
            for pod, seq, payload, joined in batches:
                run = int(payload.split()[0])
                self.content[pod] = mix(self.content.get(pod, START), payload)
                before = self.place.get(pod)
                self.place[pod] = (run, seq, joined and (before is None or before[2]))
        elif kind is Forgotten:
            self.content[item.pod] = START
            self.place.pop(item.pod, None)
        elif kind is Marked:
            self.state[item.pod] = item.state
        elif kind is Removed:
            for table in (self.content, self.place, self.state):
                table.pop(item.pod, None)

    def dumps(self) -> bytes:
        return msgpack.packb([self.content, self.place])

    def loads(self, data: bytes | None) -> None:
        if data is None:
            self.__init__()
            return
        content, place = msgpack.unpackb(data)
        self.content, self.place = content, {pod: tuple(at) for pod, at in place.items()}
        self.state = {}


class Node:
    """One shard of a process: a replica, its index and the streams that it follows while it collects.

    ``process`` contains all shards of the same process, which share its fate.
    """

    def __init__(self, world: World, name: str, candidate: bool, shard: int, process: list[Node]) -> None:
        self.world, self.name, self.candidate = world, name, candidate
        self.server, self.process = world.servers[shard], process
        process.append(self)
        self.engines = [
            engine for engine in world.engines.values() if shard_of(engine.name, len(world.servers)) == shard
        ]
        self.alive = False
        self.incarnation = 0
        self.frozen_until = 0.0
        self.cut_until = 0.0
        self.held: list[Callable[[], None]] = []
        self.wall = world.random.choice((0.0, 0.0, 3600.0, -3600.0, 86400.0))
        self.rate = 1.0 + world.random.uniform(-0.001, 0.001)
        self.start()

    def start(self) -> None:
        self.incarnation += 1
        self.alive = True
        writer = f"{self.name}.{self.incarnation}"
        count = len(self.world.servers)
        settings = {**SETTINGS, **({"shards": count} if count > 1 else {})}
        self.replica: Replica = self.world.replica(POLICY, settings, writer, candidate=self.candidate)
        self.index = Index()
        self.collects = False
        self.step_number = 0
        self.waits = False
        self.streams: dict[str, tuple[int, int] | None] = {}
        self.arrived = 0.0
        self.step()

    def crash(self) -> None:
        self.alive = self.collects = False
        self.incarnation += 1

    @property
    def clock(self) -> float:
        return self.world.now * self.rate + 1000.0

    def at(self, local: float) -> float:
        return (local - 1000.0) / self.rate

    def later(self, at: float, call: Callable[..., None], *given: Any) -> None:
        """Schedule a call in this process.

        It is dropped if the process restarts, and delayed while the process is frozen.
        """
        incarnation = self.incarnation

        def do() -> None:
            if self.incarnation != incarnation:
                return
            if self.frozen_until > self.world.now:
                self.held.append(do)  # in order, however often it is frozen meanwhile
                return
            call(*given)

        self.world.call(at, do)

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.world.now) + seconds
        self.world.call(self.frozen_until, self.thaw)

    def thaw(self) -> None:
        if self.frozen_until <= self.world.now:
            held, self.held = self.held, []
            for do in held:
                do()

    # ------------------------------------------------------------------------------------------------- the thread

    def step(self) -> None:
        self.waits = False
        world = self.world
        self.replica.defer_to([each.replica for each in self.process if each is not self])
        request = self.replica.next(self.clock, world.now + self.wall + 1e6)
        if type(request) is Wait:
            self.waits = True
            self.step_number += 1
            number = self.step_number
            if request.until < 1e17:
                self.later(max(self.at(request.until), world.now), self.wake, number)
            self.do(self.replica.due(self.clock))
            return
        world.requests += 1
        sent, server, generation = self.clock, self.server, self.server.generation
        incarnation = self.incarnation

        def reply(answer: Any, after: float) -> None:
            if incarnation == self.incarnation:
                self.later(world.now + after, self.answered, request, answer, sent)

        def arrive() -> None:
            if incarnation != self.incarnation:
                return
            if server.generation != generation or not server.up or self.cut_until > world.now:
                reply(Fail("unreachable", "reset"), 0.001)
            elif server.frozen_until > world.now:
                if server.frozen_until > world.now + TIMEOUT:
                    # The client gives up. The server still executes the request when it goes on.
                    reply(Fail("unreachable", "timeout"), TIMEOUT)
                    if type(request) is not Read:
                        world.call(server.frozen_until, lambda: server.generation == generation and server.do(request))
                else:
                    world.call(server.frozen_until, arrive)
            elif type(request) is Read:
                found = server.behind(request.after, request.most)
                if found:
                    reply(found, world.delay())
                else:
                    server.blocked.append((self, request, reply, generation, incarnation))
                    world.call(world.now + request.block, lambda: world.unblock(self, request))
            else:
                answer = server.do(request)
                if world.random.random() < world.loss:
                    reply(Fail("unreachable", "reset"), world.delay())
                else:
                    reply(answer, world.delay())

        world.call(world.now + world.delay(), arrive)

    def wake(self, number: int) -> None:
        if self.waits and self.step_number == number:
            self.step()

    def answered(self, request: Any, answer: Any, sent: float) -> None:
        self.do(self.replica.answered(request, answer, sent, self.clock))
        self.step()

    def do(self, effects: list[Any]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Load:
                self.index.loads(effect.data)
                for pod, _, state in effect.states:
                    self.index.state[pod] = state
                self.index.until = 0.0
                self.replica.loaded(None)
            elif kind is Trust:
                self.index.until = effect.until
            elif kind is Collect:
                self.collect()
            elif kind is StepDown:
                self.collects = False
            elif kind is Snapshot:
                self.later(self.world.now + 0.001, self.snapshot)
            else:
                self.index.apply(effect)

    # ------------------------------------------------------------------------------------------------ its streams

    def collect(self) -> None:
        self.collects = True
        self.index.until = None
        self.streams = {}
        self.arrived = self.world.now
        for engine in self.engines:
            self.show(Described(engine.name, "", None, {}, None))
            self.show(Configured(engine.name, {}))
            self.show(Marked(engine.name, 0, "stale", "new"))
            self.later(self.world.now + self.world.random.uniform(0.01, 0.3), self.connect, engine)
        self.replica.beat(self.clock)
        self.later(self.world.now + POLICY.beat, self.beat, self.replica.collector)

    def beat(self, collector: object) -> None:
        if self.collects and self.replica.collector is collector:
            self.replica.beat(self.clock)
            self.kick()
            self.later(self.world.now + POLICY.beat, self.beat, collector)

    def show(self, item: Any) -> None:
        self.replica.known.take(item)
        self.replica.shown(item)
        self.index.apply(item)

    def kick(self) -> None:
        if self.waits:
            self.step()

    def connect(self, engine: Engine) -> None:
        """Do the same as EventManager at the start of a stream: continue it, or begin from scratch."""
        if not self.collects or engine.name in self.streams:
            return
        if not engine.up:
            self.later(self.world.now + 0.2, self.connect, engine)
            return
        place = self.index.place.get(engine.name)
        first = engine.batches[0][0] if engine.batches else engine.seq + 1
        if place is None or place[0] != engine.run or place[1] + 1 < first:
            self.show(Forgotten(engine.name, 0))
            place = (engine.run, -1, True)
        joined = place[1] + 1 >= first
        for seq, payload in engine.batches:
            if seq > place[1]:
                self.show(batch(engine.name, seq, payload, joined))
                joined = True
        state = "exact" if self.index.place.get(engine.name, place)[2] else "degraded"
        self.streams[engine.name] = (engine.run, engine.seq)
        self.show(Marked(engine.name, 0, state, ""))
        self.kick()

    def hear(self, engine: Engine, run: int, seq: int, payload: bytes) -> None:
        # In order, after a delay.
        self.arrived = max(self.arrived + 1e-9, self.world.now + self.world.delay())
        self.later(self.arrived, self.live, engine, run, seq, payload)

    def live(self, engine: Engine, run: int, seq: int, payload: bytes) -> None:
        at = self.streams.get(engine.name)
        if not self.collects or at is None or run < at[0] or (run == at[0] and seq <= at[1]):
            return
        if run > at[0]:
            # The engine's connection was lost.
            self.show(Marked(engine.name, 0, "stale", "restarted"))
            del self.streams[engine.name]
            self.connect(engine)
            return
        assert seq == at[1] + 1, (self.name, run, seq, at, engine.run, engine.seq)
        self.streams[engine.name] = (run, seq)
        self.show(batch(engine.name, seq, payload, True))
        self.kick()

    def snapshot(self) -> None:
        cut = Cut()
        self.replica.shown(cut)
        contents = self.replica.known.contents(self.index.dumps())
        self.replica.snapshot_made(cut, pack(contents), self.clock)
        self.kick()

    # ---------------------------------------------------------------------------------------------------- answers

    def claims(self, pod: str) -> int | None:
        """Return the content that answers a question if the pod is called exact, else None."""
        index = self.index
        if index.state.get(pod) != "exact" or (index.until is not None and self.clock >= index.until):
            return None
        return index.content.get(pod, START)


@dataclass
class Faults:
    """Mean seconds between faults of each kind, or 0 for never."""

    crash: float = 6.0
    freeze: float = 4.0
    cut: float = 8.0
    server_freeze: float = 15.0
    server_restart: float = 20.0
    server_empty: float = 20.0
    fail_over: float = 15.0
    engine_restart: float = 10.0
    trim: float = 15.0
    damage: float = 0.05
    loss: float = 0.002


class World:
    def __init__(
        self, seed: int, *, replica: Callable[..., Replica] = Replica, faults: Faults | None = None, nodes: int = 4,
        pods: int = 3, shards: int = 1, trace: bool = False,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.seed, self.replica, self.trace = seed, replica, trace
        self.now = 0.0
        self.steps = self.requests = self.judged = self.exact = 0
        self.happened: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.faults = faults or Faults()
        self.loss, self.damage = self.faults.loss, self.faults.damage
        self.latency = self.random.choice((0.0002, 0.002, 0.01))
        self.servers = [Server(self) for _ in range(shards)]
        self.nodes: list[Node] = []
        self.engines = {
            name: Engine(self, name, self.random.choice((20, 200, 5000))) for name in (f"p{n}" for n in range(pods))
        }
        for n in range(nodes):
            candidate, process = n < 2 or self.random.random() < 0.3, []
            for shard in range(shards):
                self.nodes.append(Node(self, f"n{n}" + f".{shard}" * (shards > 1), candidate, shard, process))
        for engine in self.engines.values():
            self.call(self.random.random() * 0.1, lambda engine=engine: self.publish(engine))
        for kind in ("crash", "freeze", "cut", "server_freeze", "server_restart", "server_empty", "fail_over",
                     "engine_restart", "trim"):  # fmt: skip
            mean = getattr(self.faults, kind)
            if mean:
                self.call(self.random.expovariate(1 / mean), lambda kind=kind, mean=mean: self.fault(kind, mean))
        self.call(0.01, self.judge)
        self.quiet = False

    def call(self, at: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (at, self._number, what))

    def delay(self) -> float:
        return self.latency * (0.5 + self.random.random()) * (20 if self.random.random() < 0.01 else 1)

    def run(self, until: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, _, what = heapq.heappop(heap)
            self.now = at
            self.steps += 1
            what()
        self.now = until

    def publish(self, engine: Engine) -> None:
        if engine.up:
            engine.publish()
        self.call(self.now + self.random.expovariate(1 / engine.every), lambda: self.publish(engine))

    @property
    def server(self) -> Server:
        """Return the server of the only shard."""
        (server,) = self.servers
        return server

    def written(self, server: Server) -> None:
        """Wake the nodes that wait for entries."""
        waiting, server.blocked = server.blocked, []
        for node, request, reply, generation, incarnation in waiting:
            if generation != server.generation:
                self.call(self.now + TIMEOUT, lambda reply=reply: reply(Fail("unreachable", "reset"), 0.0))
            elif incarnation == node.incarnation:
                reply(server.behind(request.after, request.most), self.delay())

    def unblock(self, node: Node, request: Any) -> None:
        server = node.server
        for at, (other, asked, reply, generation, _) in enumerate(server.blocked):
            if other is node and asked is request:
                del server.blocked[at]
                gone = generation != server.generation or not server.up
                if server.frozen_until > self.now + TIMEOUT:
                    reply(Fail("unreachable", "timeout"), TIMEOUT)
                elif server.frozen_until > self.now:
                    self.call(server.frozen_until, partial(reply, [], self.delay()))
                else:
                    reply(Fail("unreachable", "reset") if gone else [], self.delay())
                return

    # ----------------------------------------------------------------------------------------------------- faults

    def say(self, what: str) -> None:
        if self.trace:
            print(f"{self.now:9.3f} {what}")

    def fault(self, kind: str, mean: float) -> None:
        if self.quiet:
            return
        self.call(self.now + self.random.expovariate(1 / mean), lambda: self.fault(kind, mean))
        self.happened[kind] += 1
        rand, servers = self.random, self.servers
        node = rand.choice(self.nodes)
        if rand.random() < 0.5:  # the collector is hit more often
            node = next((each for each in self.nodes if each.collects), node)
        self.say(f"{kind} {node.name}")
        match kind:
            case "crash" if node.alive:
                after = rand.choice((0.05, 1.0, 4.0))
                for each in node.process:
                    each.crash()
                    self.call(self.now + after, lambda each=each: each.alive or each.start())
            case "freeze":
                seconds = rand.choice((0.2, 0.9, 1.5, 4.0, 8.0))
                for each in node.process:
                    each.freeze(seconds)
            case "cut":
                until = self.now + rand.choice((0.2, 1.5, 5.0))
                for each in node.process:
                    each.cut_until = until
            case "server_freeze":
                until = self.now + rand.choice((0.1, 0.8, 3.0))
                for server in servers:
                    server.frozen_until = until
            case "server_restart" | "server_empty":
                after = rand.choice((0.02, 0.5, 3.0))
                for server in servers:
                    server.up = False
                    server.generation += 1
                    if kind == "server_empty":
                        server.empty()
                    self.call(self.now + after, lambda server=server: setattr(server, "up", True))
            case "fail_over":
                lost = rand.choice((0, 0, 1, 5, 50, 300))
                for server in servers:
                    server.generation += 1
                    server.fail_over(lost)
            case "engine_restart":
                engine = rand.choice([*self.engines.values()])
                engine.restart()
                if rand.random() < 0.5:
                    engine.up = False
                    self.call(self.now + rand.choice((0.1, 2.0)), lambda: setattr(engine, "up", True))
            case "trim":
                for server in servers:
                    del server.entries[: len(server.entries) * 3 // 4]

    # ---------------------------------------------------------------------------------------------------- answers

    def judge(self) -> None:
        self.call(self.now + 0.01, self.judge)
        for node in self.nodes:
            if not node.alive or node.frozen_until > self.now:
                continue
            for engine in node.engines:
                name = engine.name
                content = node.claims(name)
                self.judged += 1
                if content is None:
                    continue
                self.exact += 1
                if content == engine.content:
                    continue
                until = engine.past.get(content)
                if until is None or until < self.now - BOUND - 60 * self.latency:
                    age = "never" if until is None else f"{self.now - until:.2f} s ago"
                    raise Wrong(
                        f"seed {self.seed} at {self.now:.3f}: {node.name} calls {name} exact, and it was so {age}"
                    )

    def settle(self) -> None:
        """End all faults, then require that every node is right soon."""
        self.quiet = True
        self.loss = self.damage = 0.0
        for server in self.servers:
            server.up = True
        for node in self.nodes:
            node.cut_until = 0.0
            node.frozen_until = min(node.frozen_until, self.now)
            node.thaw()
            if not node.alive:
                node.start()
        for engine in self.engines.values():
            engine.up = True
        self.run(self.now + 15.0)
        missing: set[str] = set()
        for _ in range(5):
            self.run(self.now + 0.7)
            missing = found if not (found := self.unsettled()) or not missing else missing & found
            if not found:
                return
        raise Wrong(f"seed {self.seed}: not settled: {sorted(missing)}")

    def unsettled(self) -> set[str]:
        missing: set[str] = set()
        for shard, server in enumerate(self.servers):
            nodes = [node for node in self.nodes if node.server is server]
            collectors = [node for node in nodes if node.collects]
            if len(collectors) != 1:
                missing.add(f"{len(collectors)} collectors of shard {shard}")
                continue
            missing |= {
                f"{node.name} for {name}: {node.replica.reason!r}, marked {node.index.state.get(name)}"
                for node in nodes
                for name in (engine.name for engine in node.engines)
                if not node.collects and collectors[0].index.state.get(name) == "exact" and node.claims(name) is None
            }
        return missing


def one(seed: int, seconds: float = 30.0, **options: Any) -> World:
    """Run one history. Raises :class:`Wrong`."""
    world = World(seed, **options)
    world.run(seconds)
    world.settle()
    return world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    end, seed = time.monotonic() + args.seconds, args.first
    tried = steps = judged = exact = 0
    failed: list[str] = []
    happened: Counter[str] = Counter()
    began = time.monotonic()
    while time.monotonic() < end or seed == args.first:
        seed = args.seed if args.seed is not None else seed
        tried += 1
        try:
            world = one(seed, shards=2 if seed % 4 == 0 else 1, trace=args.trace)
            steps, judged, exact = steps + world.steps, judged + world.judged, exact + world.exact
            happened += world.happened
        except Exception as wrong:
            failed.append(f"{type(wrong).__name__}: {wrong}")
            print(failed[-1], f"(again: python tests/log_world.py --seed {seed} --trace)", flush=True)
            if args.seed is not None:
                raise
        if args.seed is not None:
            break
        seed += 1
    took = time.monotonic() - began
    print(
        f"{tried:,} seeds, {steps:,} steps in {took:.0f} s ({steps / took * 60:,.0f} a minute);"
        f" {judged:,} answers, {exact:,} called exact, {len(failed)} seeds failed; {dict(happened)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

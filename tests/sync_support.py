"""Shared helpers of the stream tests.

:class:`World` simulates a publisher, its channel and an index around the pure stream machine. The publisher keeps the
truth: the batches it has published. The index is a list of the payloads that were applied. Nothing in it reads the
machine's own counters, so the check is independent of the machine's claims.

:class:`LivePublisher` is a simulated publisher with real sockets in a thread. :data:`BRISK` is a policy with short
times for tests.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from kvindex import EventDecodeError, PrefixIndex
from kvindex.sim.publisher import Publisher
from kvindex.sync.actions import (
    AwaitReplay,
    CancelReplay,
    Clear,
    Incident,
    Ingest,
    Mark,
    Reconnect,
    Renew,
    RequestReplay,
)
from kvindex.sync.policy import StreamPolicy
from kvindex.sync.stream import WorkerStream

GARBAGE = b"\xc1 damaged on the way"


def batch(ts: float, name: object, *, clear: bool = False, rank: int = 0) -> bytes:
    """Build a well-formed payload with a recognisable name in it."""
    return msgpack.packb([ts, [["AllBlocksCleared"] if clear else ["BlockStored", name]], rank])


@dataclass
class Process:
    """One lifetime of an engine's publisher process."""

    buffer_steps: int = 10_000
    published: list[bytes | None] = field(default_factory=list)  # None: the engine failed to encode it
    buffer: deque[tuple[int, bytes]] = field(default_factory=deque)
    last_sent: int = -1

    def publish(self, payload: bytes | None) -> tuple[int, bytes] | None:
        seq = len(self.published)
        self.published.append(payload if payload != GARBAGE else None)
        if payload is None:
            return None
        self.last_sent = seq
        self.buffer.append((seq, payload))
        while len(self.buffer) > self.buffer_steps:
            self.buffer.popleft()
        return seq, payload

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [(seq, payload) for seq, payload in self.buffer if seq >= start]

    def truth(self, upto: int) -> list[bytes] | None:
        """Return the batches in an index that applied all before ``upto``, or None if a relevant one was never sent."""
        held: list[bytes] | None = []
        for payload in self.published[:upto]:
            if payload is None:
                held = None
            elif is_clear(payload):
                held = [payload]
            elif held is not None:
                held.append(payload)
        return held


def is_clear(payload: bytes) -> bool:
    return b"AllBlocksCleared" in payload


class World:
    """A stream machine with its inputs and its recorded actions."""

    def __init__(
        self, *, replay: bool = True, policy: StreamPolicy | None = None, buffer_steps: int = 10_000, **addresses: str
    ) -> None:
        self.now = 1000.0
        self.clock = 1.7e9  # the engines' wall clock
        self.stream = WorkerStream(replay=replay, policy=policy, uniform=lambda: 0.5, **addresses)
        self.buffer_steps = buffer_steps
        self.process = Process(buffer_steps)
        self.liar: Process | None = None  # another process that answers instead of this one
        self.awaits = 0  # requests that gave up their place among the running ones
        self.connection_open = False
        self.channel: deque[tuple[int, bytes]] = deque()
        self.request: int | None = None
        self.answer: deque[tuple[int, bytes] | None] = deque()
        self.answering = False
        self.held: list[bytes] = []
        self.state: str | None = None
        self.incidents: list[Incident] = []
        self.requests: list[int] = []
        self.clears = 0
        self.reconnect_in: float | None = None
        self.renewals: list[float] = []
        self.back_at: float | None = None  # time of the driver's next connect, after the stream has closed a connection
        self.deaf = False  # the publisher has no subscription of this connection
        self.names = 0
        self.inputs = 0  # calls of the machine, with or without actions
        self.owed = -1  # the last batch that an exact answer must include
        self.held_back = False  # a batch has arrived that may not be taken yet
        self.heard = False  # a batch was published over this connection
        self.heard_from = self.now  # or may have been published, from this time on
        self.was_silent = False  # no batch came for the whole time of the policy's silence
        self.do(self.stream.tick(self.now))

    def do(self, actions: list) -> None:
        self.inputs += 1
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case Ingest(seq, payload):
                    if payload == GARBAGE:
                        todo.extend(self.stream.rejected(seq, payload, self.now, "no batch"))
                    elif is_clear(payload):
                        self.held = [payload]
                        todo.extend(self.stream.cleared(seq, self.now))
                    else:
                        self.held.append(payload)
                case Clear():
                    assert self.state == "stale", "an exact answer could be read while the worker is cleared"
                    self.held = []
                    self.clears += 1
                case Mark(state):
                    self.state = state
                case RequestReplay(start):
                    self.requests.append(start)
                    self.request = start
                    self.answer.clear()
                    self.answering = False
                    self.stream.replay_sent(self.now)
                case AwaitReplay():
                    assert self.request is not None, "nothing was asked that could be waited for"
                    self.awaits += 1
                case CancelReplay():
                    self.request = None
                    self.answer.clear()
                    self.answering = False
                case Reconnect(delay):
                    self.reconnect_in = delay
                    if self.renewals and self.renewals[-1] == self.now:
                        self.back_at = self.now + delay
                case Renew():
                    self.renewals.append(self.now)
                    self.connection_open = False
                    self.channel.clear()
                    todo.extend(self.stream.disconnected(self.now))
                case Incident() as incident:
                    self.incidents.append(incident)

    # The events of the world

    def connect(self) -> None:
        self.connection_open = True
        self.back_at = None
        self.channel.clear()
        self.held_back = self.heard = self.was_silent = False
        self.heard_from = max(self.heard_from, self.now)
        self.owed = self.process.last_sent
        self.do(self.stream.connected(self.now))

    def disconnect(self) -> None:
        self.connection_open = False
        self.do(self.stream.disconnected(self.now))
        self.channel.clear()

    def restart(self) -> None:
        """End the engine's process, which closes the connection, and start another one in its place."""
        if self.connection_open:
            self.disconnect()
        self.process = Process(self.buffer_steps)
        self.owed = -1

    def publish(
        self, count: int = 1, *, encodable: bool = True, readable: bool = True, clear: bool = False, clock: float = 0.01
    ) -> None:
        for _ in range(count):
            self.clock += clock
            self.names += 1
            payload = batch(self.clock, self.names, clear=clear) if readable else GARBAGE
            message = self.process.publish(payload if encodable else None)
            if message is not None and self.connection_open and not self.deaf:
                self.channel.append(message)

    def deliver(self, count: int | None = None) -> None:
        for _ in range(len(self.channel) if count is None else min(count, len(self.channel))):
            seq, payload = self.channel.popleft()
            self.owed = max(self.owed, seq)
            self.heard = True
            self.do(self.stream.live(seq, payload, self.now))

    def limit(self, seconds: float) -> None:
        """Put the stream over its limit: it takes no arriving batch for this many seconds."""
        self.held_back = bool(seconds)
        if seconds:
            self.heard_from = max(self.heard_from, self.now + seconds)
            self.stream.hold_up(self.now, self.now + seconds)
        self.do(self.stream.behind(self.now, "over the limit" if seconds else ""))

    def overlook(self, count: int) -> None:
        """Hand in the batches that have arrived, except the last ``count``, for which there was no room."""
        self.deliver(max(0, len(self.channel) - count))
        if self.channel:
            highest = max(seq for seq, _ in self.channel)
            self.channel.clear()
            self.owed = max(self.owed, highest)
            self.heard = True
            self.do(self.stream.overlooked(highest, self.now))

    def do_reach(self) -> None:
        """Let the request reach the publisher without an answer yet."""
        self.stream.replay_reached(self.now)

    def serve(self, *, upto: int | None = None, end: bool = True) -> None:
        """Answer the pending request. Only ``upto`` batches of the answer leave the publisher's queue."""
        if self.request is None or self.answering:
            return
        self.stream.replay_reached(self.now)
        found = (self.liar or self.process).replay(self.request)
        self.answer = deque(found if upto is None else found[:upto])
        self.answering = True
        # A cut answer ends with an end marker only if the queue was full for a while, which takes a long answer.
        if end and (len(self.answer) == len(found) or len(self.answer) >= self.stream.policy.replay_confirm):
            self.answer.append(None)

    def receive(self, count: int | None = None) -> None:
        """Receive ``count`` replies of the answer."""
        while self.answer and (count is None or count > 0):
            item = self.answer.popleft()
            if item is None:
                self.request = None
                self.answering = False
                self.do(self.stream.replay_ended(self.now))
            else:
                self.do(self.stream.replayed(*item, self.now))
            count = None if count is None else count - 1

    def wait(self, seconds: float, *, serve: bool = True, step: float = 0.05) -> None:
        """Let time pass. With ``serve``, the publisher answers every request in full."""
        until = self.now + seconds
        while True:
            for _ in range(100):
                if not serve or self.request is None:
                    break
                self.serve()
                self.receive()
            if self.now >= until:
                return
            due = self.stream.deadline() if self.back_at is None else self.back_at
            self.now = min(until, max(self.now + 1e-6, due) if due is not None else self.now + step)
            silent_at = self.heard_from + self.stream.policy.silence
            self.was_silent = self.was_silent or (not self.heard and self.now >= silent_at)
            self.do(self.stream.tick(self.now))
            if self.back_at is not None and self.now >= self.back_at:
                self.connect()

    def up(self) -> None:
        """Connect, then answer every request and deliver every batch."""
        if not self.connection_open:
            self.connect()
        self.serve()
        self.receive()
        self.deliver()
        self.wait(0.6)

    # The invariants

    @property
    def waits_for_batch(self) -> bool:
        """Return whether only the next batch can show that the publisher and the replay endpoint belong together."""
        doubts = ("publishes no batch that its replay endpoint returns", "the next one shows whether the engine")
        return any(each in self.stream.reason for each in doubts)

    def applied_upto(self) -> int:
        return (self.stream.last_seq if self.stream.last_seq is not None else -1) + 1

    def check(self) -> None:
        """Check that ``exact`` means equal to the publisher's truth up to the last applied batch."""
        if self.state == "exact":
            assert self.connection_open, "exact without a connection"
            assert not self.held_back, "exact, though something waits"
            assert self.applied_upto() > self.owed, "exact, though something is known to be missing"
            truth = self.process.truth(self.applied_upto())
            assert truth is not None, "exact, though a batch never left the engine"
            assert self.held == truth
        assert self.state == self.stream.state


class Router(World):
    """A world with an index that stores stream places, so another stream can continue from them."""

    def __init__(self, **options: Any) -> None:
        self.index = PrefixIndex()
        self.index.configure_pod("pod")
        self.replay = options.get("replay", True)
        super().__init__(**options)

    def do(self, actions: list) -> None:
        for action in actions:
            if isinstance(action, Ingest):
                with suppress(EventDecodeError):
                    self.index.ingest("pod", action.payload, seq=action.seq if action.joined else None)
            elif isinstance(action, Clear):
                self.index.clear_worker("pod")
        super().do(actions)

    def restart_router(self) -> None:
        """Replace the router's process by another one that starts from the saved state of the first."""
        self.connection_open = False
        self.channel.clear()
        self.request = None
        self.answer.clear()
        self.answering = False
        place = self.index.stream_places("pod").get(0) if self.replay else None
        if place is None:
            self.held = []
            self.index.clear_worker("pod")
        self.state = "stale"
        self.stream = WorkerStream(replay=self.replay, policy=self.stream.policy, uniform=lambda: 0.5, place=place)
        self.do(self.stream.tick(self.now))


BRISK = StreamPolicy(
    reconnect=(0.05, 0.3),
    replay_timeout=0.4,
    replay_patience=(2.0, 5.0),
    replay_pause=0.1,
    replay_retry=(0.02, 0.2),
    idle_probe=(0.1, 1.0),
    silence=0.1,
    heal=(0.2, 0.5),
)


class LivePublisher:
    """Publishers for the ranks of one pod, on real sockets, served by a thread.

    Batch number n stores block n below block n - 1 with tokens of its own, so an index that applied all batches matches
    the whole chain. ``chain(rank)`` returns the tokens of all batches since the last clear.
    """

    def __init__(self, *, ranks: int = 1, block_size: int = 4, name: str = "pod", **options: Any) -> None:
        self.name = name
        self.block_size = block_size
        self.context = zmq.Context()
        options = {"topic": f"kv@{name}@m", **options}
        endpoint = options.pop("endpoint", "tcp://127.0.0.1:*")
        answers = options.pop("replay_endpoint", "tcp://127.0.0.1:*")
        try:
            self.publishers = [Publisher(self.context, endpoint, answers, **options) for _ in range(ranks)]
        except zmq.ZMQError:
            self.context.destroy(linger=0)
            raise
        self.lock = threading.Lock()
        self.count = [0] * ranks
        self.first = [0] * ranks
        self.life = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.wait(0.002):
            with self.lock:
                for publisher in self.publishers:
                    publisher.serve()

    @property
    def ranks(self) -> dict[int, tuple[str, str | None]]:
        return {rank: (each.endpoint, each.replay_endpoint) for rank, each in enumerate(self.publishers)}

    @property
    def faults(self):
        return self.publishers[0].faults

    def block(self, rank: int, number: int) -> list[int]:
        start = ((self.life * 8 + rank) * 100_000 + number) * self.block_size
        return [(start + place) % (1 << 32) for place in range(self.block_size)]

    def publish(self, count: int = 1, *, rank: int = 0, clear: bool = False) -> None:
        with self.lock:
            for _ in range(count):
                number = self.count[rank]
                self.count[rank] += 1
                if clear:
                    self.first[rank] = number + 1
                    event: list[Any] = ["AllBlocksCleared"]
                else:
                    parent = None if number == self.first[rank] else number
                    event = ["BlockStored", [number + 1], parent, self.block(rank, number), self.block_size, None]
                self.publishers[rank].publish(msgpack.packb([time.time(), [event], rank]))

    def publish_raw(self, payload: bytes, *, rank: int = 0) -> None:
        with self.lock:
            self.count[rank] += 1
            self.publishers[rank].publish(payload)

    def chain(self, rank: int = 0) -> list[int]:
        return [token for number in range(self.first[rank], self.count[rank]) for token in self.block(rank, number)]

    def restart(self) -> None:
        with self.lock:
            self.life += 1
            for publisher in self.publishers:
                publisher.restart()
            self.count = [0] * len(self.count)
            self.first = [0] * len(self.first)

    def restart_behind_a_proxy(self) -> None:
        """Restart the engine behind a proxy: the new process keeps the connections of the old one."""
        with self.lock:
            self.life += 1
            for publisher in self.publishers:
                publisher.seq = 0
                publisher._buffer.clear()
            self.count = [0] * len(self.count)
            self.first = [0] * len(self.first)

    def drop_connections(self) -> None:
        """Lose the connections while the process goes on."""
        with self.lock:
            for publisher in self.publishers:
                publisher.close()
                publisher._open()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for publisher in self.publishers:
            publisher.close()
        self.context.term()

    def __enter__(self) -> LivePublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition holds. The limit is generous, because the duration is not under test."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.005)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Check that this process has no further thread or file descriptor afterwards. libzmq closes the descriptors of an
    earlier socket in its own time, so there may be fewer."""
    import psutil

    this = psutil.Process()

    def here() -> tuple[set[str], int]:
        return {thread.name for thread in threading.enumerate()}, this.num_fds()

    threads, descriptors = here()
    yield
    until(lambda: here()[0] <= threads and here()[1] <= descriptors)


@contextmanager
def listener(answer: bytes | None, *, stays: bool = False) -> Iterator[str]:
    """Run a TCP server that is not a publisher: it sends ``answer``, if any, and hangs up unless it ``stays``."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            kept.append(client)
            if answer is not None:
                client.sendall(answer)
                if not stays:
                    client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for client in kept:
            client.close()

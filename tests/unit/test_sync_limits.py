"""A limit on events and bytes per second: one pod's flood waits, is reported, and is complete again afterwards.

The tests drive the workers by hand, over publishers in the same process. The clock moves only when no work is left, so
a test checks the exact state at each time.
"""

from __future__ import annotations

import heapq
import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq

from kvindex import InvalidTypeError, InvalidValueError, PodSource, PrefixIndex
from kvindex.sim.publisher import Publisher
from kvindex.sync.allowance import PAUSE, Allowance
from kvindex.sync.frames import batch_events
from kvindex.sync.policy import StreamPolicy
from kvindex.sync.pulse import Pulse
from kvindex.sync.shared import Subscriptions
from kvindex.sync.sockets import SocketOptions
from kvindex.sync.source import Endpoints
from kvindex.sync.status import Batch, IndexChange, WorkerStatus
from kvindex.sync.turns import Turns
from kvindex.sync.worker import Setting, Worker


def described(worker: Worker) -> WorkerStatus:
    table: dict[int, WorkerStatus] = {}
    worker.describe({}, table)
    return table[worker.rank]


class Host:
    """A poll loop without a thread, with a simulated clock."""

    def __init__(self, context: zmq.Context) -> None:
        self.context = context
        self.now = 1000.0
        self.hot: dict[Any, None] = {}
        self.watched: dict[int, Any] = {}
        self.timers: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = itertools.count()
        self.publishers: list[Publisher] = []

    def clock(self) -> float:
        return self.now

    def watch(self, fd: int, handler: Any) -> None:
        self.watched[fd] = handler

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def again(self, handler: Any) -> None:
        self.hot[handler] = None

    def within(self, command: Callable[[], None]) -> None:
        command()

    def call_at(self, due: float, callback: Callable[[float], None]) -> None:
        heapq.heappush(self.timers, (due, next(self.order), callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()

    def busy(self) -> None:
        """Do all work that is possible at this moment."""
        for _ in range(10):
            for publisher in self.publishers:
                publisher._pub.get(zmq.EVENTS)  # processes new subscriptions
                publisher.serve()
            self.hot |= dict.fromkeys(self.watched.values())
            while self.hot:
                hot, self.hot = self.hot, {}
                for handler in hot:
                    if not handler.closed and handler.ready(self.now):
                        self.again(handler)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            self.busy()
            if not self.timers or self.timers[0][0] > until:
                break
            due, _, callback = heapq.heappop(self.timers)
            self.now = max(self.now, due)
            callback(self.now)
        self.now = until


class Fleet:
    """Pods with and without limits, an index, and the payloads that each pod has published."""

    def __init__(self, context: zmq.Context, **policy: Any) -> None:
        self.host = Host(context)
        self.index = PrefixIndex(block_size=4)
        self.options = SocketOptions(heartbeat=0.0, connect_timeout=1.0, queue=0, max_message=1 << 30)
        self.applied: list[tuple[float, str, int]] = []
        self.changes: list[tuple[str, str, str]] = []
        self.setting = Setting(
            self.index, StreamPolicy(**policy), self.options,
            [self._applied],
            lambda change: self.changes.append((change.pod, change.new, change.reason)),
            lambda: "none",
            lambda endpoint, then: then(endpoint, ""),
            Turns(16),
            Subscriptions(self.host, self.options, lambda: "none"),
            Pulse(None, lambda: None),
        )  # fmt: skip
        self.workers: dict[str, Worker] = {}
        self.publishers: dict[str, Publisher] = {}
        self.allowances: dict[str, Allowance] = {}

    def _applied(self, item: IndexChange) -> None:
        if isinstance(item, Batch):
            self.applied.append((self.host.now, item.pod, item.seq))

    def open(self, name: str, *, queue: int = 0, replay: bool = True, **options: Any) -> Publisher:
        publisher = Publisher(
            self.host.context, f"inproc://{name}", f"inproc://{name}-replay" if replay else None, queue=queue, **options
        )
        self.host.publishers.append(publisher)
        self.publishers[name] = publisher
        return publisher

    def follow(self, name: str, *, pod: str | None = None, rank: int = 0, bound: bool = False, **limits: Any) -> Worker:
        publisher, pod = self.publishers[name], pod or name
        at = Endpoints(None if bound else publisher.endpoint, publisher.replay_endpoint)
        source = PodSource(pod, endpoint="tcp://127.0.0.1:1", **limits)
        if limits and pod not in self.allowances:
            burst = self.setting.policy.burst
            self.allowances[pod] = Allowance(source.max_event_rate, source.max_byte_rate, burst)
        self.index.configure_pod(pod)
        worker = Worker(self.host, self.setting, source, rank, at, None, self.allowances.get(pod))
        self.workers[name] = worker
        worker.begin(self.host.now)
        self.host.busy()
        return worker

    def publish(self, name: str, count: int = 1, *, events: int = 1, size: int = 0) -> list[int]:
        """Publish batches of ``events`` one-block events each. Returns the tokens that the pod holds now."""
        publisher = self.publishers[name]
        for _ in range(count):
            publisher.publish(batch(publisher.seq * events, events, size))
        return [token for block in range(publisher.seq * events) for token in tokens(block)]

    def batches(self, pod: str) -> list[tuple[float, int]]:
        return [(at, seq) for at, who, seq in self.applied if who == pod]

    def held(self, pod: str, prompt: list[int]) -> int:
        return self.index.match_prefix(prompt).tokens.get(pod, 0)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        for publisher in self.host.publishers:
            publisher.close()


def tokens(block: int) -> list[int]:
    return list(range(block * 4, block * 4 + 4))


def batch(first: int, events: int, size: int = 0) -> bytes:
    stored = [["BlockStored", [n + 1], n or None, tokens(n), 4, None] for n in range(first, first + events)]
    if size:
        stored[0] += [*[None] * 6, b"x" * size]
    return msgpack.packb([1.7e9 + first, stored])


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def fleet(context: zmq.Context) -> Iterator[Fleet]:
    made = Fleet(context)
    yield made
    made.close()


def check_rate(fleet: Fleet, pod: str, rate: float, *, events: int = 1, burst: float = 2.0) -> None:
    """Check that in any span of time the pod got at most its rate, its saved allowance and the cost of one message."""
    times = [at for at, _ in fleet.batches(pod)]
    for first in range(len(times)):
        for last in range(first, len(times)):
            most = (times[last] - times[first] + burst) * rate + events
            assert (last - first) * events <= most + 1e-6


def test_a_flood_waits_and_is_stale_until_all_of_it_is_applied(fleet):
    """A quiet pod is not affected: it is exact all the time, and none of its batches waits."""
    fleet.open("flood")
    fleet.open("quiet")
    fleet.follow("flood", max_event_rate=10.0)
    fleet.follow("quiet", max_event_rate=10.0)
    fleet.host.run(5.0)
    assert {pod: fleet.index.pod_state(pod) for pod in ("flood", "quiet")} == {"flood": "exact", "quiet": "exact"}
    flooded = fleet.publish("flood", 100)
    for second in range(20):
        prompt = fleet.publish("quiet")
        fleet.host.busy()
        assert fleet.held("quiet", prompt) == len(prompt)
        assert fleet.index.pod_state("quiet") == "exact"
        status = described(fleet.workers["flood"])
        done = fleet.held("flood", flooded) == len(flooded)
        assert (fleet.index.pod_state("flood") == "exact") == done
        assert done or "limit" in status.reason
        # 100 events, 20 of them from the saved allowance, and no pause longer than 0.1 s.
        assert not done or second >= 8
        assert done or second < 9
        fleet.host.run(1.0)
    assert [seq for _, seq in fleet.batches("flood")] == list(range(100))
    check_rate(fleet, "flood", 10.0)
    assert described(fleet.workers["flood"]).throttled > 0
    assert described(fleet.workers["quiet"]).throttled == 0
    counters = fleet.workers["flood"].stream.counts
    assert (counters["gaps"], counters["lost_batches"], counters["overflow"]) == (0, 0, 0)


def test_a_large_batch_is_applied_whole_and_paid_for_afterwards(fleet):
    fleet.open("a")
    fleet.follow("a", max_event_rate=10.0)
    fleet.host.run(5.0)
    prompt = fleet.publish("a", 2, events=100)
    fleet.host.busy()
    assert fleet.held("a", prompt) == len(prompt) // 2
    fleet.host.run(7.9)
    assert fleet.held("a", prompt) == len(prompt) // 2
    fleet.host.run(0.3)
    assert fleet.held("a", prompt) == len(prompt)


def test_bytes_are_limited_too(fleet):
    fleet.open("a")
    fleet.follow("a", max_event_rate=1e9, max_byte_rate=10_000.0)
    fleet.host.run(5.0)
    prompt = fleet.publish("a", 10, size=10_000)
    fleet.host.run(3.0)
    assert 4 <= len(fleet.batches("a")) <= 6
    assert fleet.index.pod_state("a") == "stale"
    fleet.host.run(10.0)
    assert fleet.held("a", prompt) == len(prompt)
    assert fleet.index.pod_state("a") == "exact"


def test_a_replay_keeps_to_the_limit_and_is_not_taken_for_silent(fleet):
    fleet.open("a")
    prompt = fleet.publish("a", 200)
    fleet.follow("a", max_event_rate=10.0)
    fleet.host.run(17.0)
    assert fleet.index.pod_state("a") == "stale"
    check_rate(fleet, "a", 10.0)
    while fleet.index.pod_state("a") == "stale":
        fleet.host.run(0.1)
    assert fleet.host.now < 1000.0 + 20.0
    assert fleet.held("a", prompt) == len(prompt)
    assert fleet.index.pod_state("a") == "exact"
    counters = fleet.workers["a"].stream.counts
    assert counters["replays_asked"] <= 2  # one of them in silence
    assert (counters["cut_replays"], counters["replays_unanswered"]) == (0, 0)


def test_an_answer_that_comes_while_nothing_is_taken_is_waited_for(fleet):
    """The debt of one batch is longer than the publisher's time to answer."""
    fleet.open("a")
    fleet.follow("a", max_event_rate=10.0)
    fleet.host.run(5.0)
    fleet.publish("a", 1, events=300)
    fleet.host.busy()
    fleet.publishers["a"].faults.drop = 1
    prompt = fleet.publish("a", 2, events=300)
    fleet.host.run(120.0)
    assert fleet.held("a", prompt) == len(prompt)
    counters = fleet.workers["a"].stream.counts
    assert (counters["gaps_healed"], counters["replays_unanswered"], counters["lost_batches"]) == (1, 0, 0)
    assert fleet.index.pod_state("a") == "exact"


def test_what_no_queue_keeps_is_a_gap_and_heals(context):
    fleet = Fleet(context)
    fleet.options.queue = 5
    fleet.open("a", queue=5)
    fleet.follow("a", max_event_rate=10.0)
    fleet.host.run(5.0)
    fleet.publish("a", 15)
    fleet.host.busy()
    fleet.publish("a", 100)  # the queues keep 10 of them
    fleet.host.run(3.0)
    prompt = fleet.publish("a")
    seen = set()
    for _ in range(40):
        fleet.host.run(0.5)
        seen.add(fleet.index.pod_state("a"))
        if fleet.index.pod_state("a") == "exact":
            assert fleet.held("a", prompt) == len(prompt)
    assert seen == {"stale", "exact"}
    assert [seq for _, seq in fleet.batches("a")] == list(range(116))
    check_rate(fleet, "a", 10.0)
    fleet.close()


def test_ranks_share_the_limit_and_none_is_left_out(fleet):
    for rank in range(2):
        fleet.open(f"r{rank}")
        fleet.follow(f"r{rank}", pod="a", rank=rank, max_event_rate=20.0)
    fleet.host.run(5.0)
    for rank in range(2):
        fleet.publish(f"r{rank}", 200)
    fleet.host.run(10.0)
    assert len(fleet.batches("a")) <= 20 * 12 + 1
    assert min(described(fleet.workers[f"r{rank}"]).batches for rank in range(2)) > 50
    fleet.host.run(15.0)
    assert [described(fleet.workers[f"r{rank}"]).batches for rank in range(2)] == [200, 200]
    assert fleet.index.pod_state("a") == "exact"


def offer(fleet: Fleet, name: str, payloads: list[bytes], first: int = 0) -> None:
    for seq, payload in enumerate(payloads, first):
        fleet.workers[name].offer([b"kv@a@", struct.pack(">Q", seq), payload], seq, payload, fleet.host.now)


def test_what_shares_a_socket_waits_in_a_bounded_queue(fleet):
    fleet.open("a", replay=False)
    worker = fleet.follow("a", bound=True, max_event_rate=10.0)
    worker.connected(fleet.host.now)
    offer(fleet, "a", [batch(n, 1) for n in range(100)])
    assert 20 <= len(fleet.batches("a")) <= 21
    assert fleet.index.pod_state("a") == "stale"
    fleet.host.run(10.0)
    assert [seq for _, seq in fleet.batches("a")] == list(range(100))
    check_rate(fleet, "a", 10.0)
    assert worker.stream.counts["lost_batches"] == 0
    assert fleet.index.pod_state("a") == "exact"


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("room", [{"max_pending": 30}, {"max_pending_bytes": 1500}])
def test_what_does_not_fit_there_is_lost_counted_and_healed_where_it_can_be(context, room, replay):
    fleet = Fleet(context, **room)
    publisher = fleet.open("a", replay=replay)
    worker = fleet.follow("a", bound=True, max_event_rate=10.0)
    worker.connected(fleet.host.now)
    fleet.host.run(5.0)
    payloads = [batch(n, 1) for n in range(100)]
    for payload in payloads:
        publisher.publish(payload)
    # No batch comes after the dropped ones. The loss is detected all the same.
    offer(fleet, "a", payloads)
    states = set()
    for _ in range(60):
        fleet.host.run(0.5)
        state = fleet.index.pod_state("a")
        states.add(state)
        if state == "exact":
            assert [seq for _, seq in fleet.batches("a")] == list(range(100))
    counts = worker.stream.counts
    assert counts["overflow"] > 0
    if replay:
        assert states == {"stale", "exact"}
        assert counts["lost_batches"] == 0
    else:
        assert states == {"stale", "degraded"}
        assert counts["lost_batches"] == counts["overflow"]
        assert len(fleet.batches("a")) + counts["lost_batches"] == 100
    check_rate(fleet, "a", 10.0)
    fleet.close()


def test_what_waited_when_the_connection_was_lost_is_not_applied_after_it(fleet):
    publisher = fleet.open("a")
    worker = fleet.follow("a", bound=True, max_event_rate=10.0)
    worker.connected(fleet.host.now)
    fleet.host.run(5.0)
    payloads = [batch(n, 1) for n in range(100)]
    for payload in payloads:
        publisher.publish(payload)
    offer(fleet, "a", payloads)
    worker.disconnected(fleet.host.now, "gone")
    before = len(fleet.batches("a"))
    fleet.host.run(5.0)
    assert len(fleet.batches("a")) == before
    worker.connected(fleet.host.now)
    fleet.host.run(30.0)
    assert [seq for _, seq in fleet.batches("a")] == list(range(100))
    assert fleet.index.pod_state("a") == "exact"


@pytest.mark.parametrize("seed", range(5))
def test_an_allowance_is_never_passed_and_never_wasted(seed):
    """Compare an allowance with its definition.

    In any span of time, the total is at most the rate times (the span plus the burst), plus the last message. A sender
    below the rate never waits.
    """
    rng = random.Random(seed)
    rate, burst = rng.uniform(1, 100), rng.uniform(0.5, 5)
    allowance, now, taken = Allowance(rate, None, burst), 50.0, []
    for _ in range(300):
        now = max(now + rng.expovariate(1 / 0.3), allowance.opens() if rng.random() < 0.8 else 0.0)
        if allowance.opens() <= now:
            cost = rng.randrange(1, 50)
            allowance.charge(cost, 1 << 40, now)
            taken.append((now, cost))
    for first in range(len(taken)):
        spent = 0
        for at, cost in taken[first:]:
            assert spent <= rate * (at - taken[first][0] + burst) + 1e-6
            spent += cost
    patient, now = Allowance(rate, 1e9, burst), 50.0
    for _ in range(300):
        assert patient.opens() <= now
        cost = rng.randrange(1, 1 + max(1, int(rate * burst)))
        patient.charge(cost, 1, now)
        now += cost / rate + 1e-9


def test_a_burst_shorter_than_the_pauses_is_made_as_long():
    allowance = Allowance(100.0, None, 0.0)
    for _ in range(int(100 * 2 * PAUSE)):
        assert allowance.opens() <= 50.0
        allowance.charge(1, 0, 50.0)


@pytest.mark.parametrize(
    ("payload", "count"),
    [
        (batch(0, 1), 1),
        (batch(0, 20), 20),
        (msgpack.packb([1, [], 3]), 1),
        (msgpack.packb([1700000000000, [["a"]] * 5]), 5),
        (msgpack.packb([None, [["a"]] * 3, 0]), 3),
        (msgpack.packb({"ts": 1.0, "data_parallel_rank": 2, "events": [["a"]] * 7}), 7),
        (msgpack.packb({"ts": 1.0}), 1),
        (msgpack.packb([["x" * 99] * 50, [["a"]] * 9]), 9),  # a time that is not a number
        (b"\x92\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff" + bytes(30), 1),  # more than fit
        (b"\x92\xcb" + bytes(8) + b"\xdc\x00\x1e" + bytes(30), 14),  # as many as fit
        (b"", 1),
        (b"\xc1", 1),
        (b"\x92", 1),
        (msgpack.packb("text"), 1),
        (msgpack.packb([1.0, {"a": 1}]), 1),
    ],
)
def test_events_are_counted_by_what_a_batch_says(payload, count):
    assert batch_events(payload) == count


@pytest.mark.parametrize("name", ["max_event_rate", "max_byte_rate"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, InvalidValueError), (-1.0, InvalidValueError), (float("nan"), InvalidValueError),
     (float("inf"), InvalidValueError), ("9", InvalidTypeError), (True, InvalidTypeError)],
)  # fmt: skip
def test_a_rate_that_is_none_is_refused(name, value, error):
    with pytest.raises(error, match=f"{name} of pod 'p'"):
        PodSource("p", endpoint="tcp://127.0.0.1:5557", **{name: value})

"""Many publishers on one SUB socket: each message belongs to the connection that delivered it, or to no connection."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from kvindex.sync import shared
from kvindex.sync.shared import SEATS, Seat, Subscriptions
from kvindex.sync.sockets import BUDGET, SocketOptions, Subscription, Watched


class Loop:
    """The sockets of one thread, polled by hand. ``turn`` waits until one of them is ready."""

    def __init__(self, context: zmq.Context) -> None:
        self.context = context
        self.handlers: dict[int, Any] = {}
        self.publishers: list[zmq.Socket] = []  # keeps them from garbage collection

    def clock(self) -> float:
        return 100.0

    def watch(self, fd: int, handler: Any) -> None:
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        del self.handlers[fd]

    def again(self, handler: Any) -> None:
        pass

    def until(self, done: Callable[[], object]) -> None:
        poller = zmq.Poller()
        for fd in self.handlers:
            poller.register(fd, zmq.POLLIN)
        for _ in range(10_000):
            for handler in list(self.handlers.values()):
                if not handler.closed:
                    handler.ready(100.0)
            if done():
                return
            poller.poll(10)
        raise AssertionError("it has not come to that")


class Peer:
    """A stand-in for a worker that records the events of its connection in order."""

    def __init__(self, subscriptions: Subscriptions, endpoint: str, topic: bytes = b"", **options: Any) -> None:
        self.told: list[Any] = []
        self.seat = subscriptions.open(
            endpoint, topic, made=lambda now: self.told.append("made"),
            lost=lambda now, why: self.told.append(why), message=self.message, **options,
        )  # fmt: skip

    def message(self, frames: list[bytes], now: float) -> None:
        self.told.append(frames)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def loop(context: zmq.Context) -> Iterator[Loop]:
    loop = Loop(context)
    yield loop
    for handler in list(loop.handlers.values()):
        if isinstance(handler, Watched):
            handler.close()
    for publisher in loop.publishers:
        publisher.close()


@pytest.fixture
def subscriptions(loop: Loop) -> Subscriptions:
    options = SocketOptions(heartbeat=0.0, connect_timeout=5.0, queue=0, max_message=1 << 20)
    return Subscriptions(loop, options, lambda: "more of them")


def published(loop: Loop) -> tuple[zmq.Socket, str]:
    publisher = loop.context.socket(zmq.XPUB)
    loop.publishers.append(publisher)
    publisher.linger = 0
    publisher.bind("tcp://127.0.0.1:*")
    return publisher, publisher.last_endpoint.rstrip(b"\0").decode()


def fleet(loop: Loop, subscriptions: Subscriptions, count: int) -> tuple[list, list[Peer]]:
    """Return publishers with established subscriptions, and their peers."""
    publishers, ends = zip(*(published(loop) for _ in range(count)), strict=True)
    peers = [Peer(subscriptions, endpoint) for endpoint in ends]
    for publisher in publishers:
        assert publisher.poll(20_000)
        assert publisher.recv() == b"\x01"
    loop.until(lambda: all("made" in peer.told for peer in peers))
    return list(publishers), peers


def test_each_message_is_of_its_own_publisher(loop, subscriptions):
    publishers, peers = fleet(loop, subscriptions, 5)
    sent: list[list[list[bytes]]] = [[] for _ in publishers]
    for round in range(40):
        for number, publisher in enumerate(publishers):
            for part in range((number * round) % 3):
                sent[number].append([b"one topic of all", struct.pack(">QQ", round, part), bytes([number]) * 9])
                publisher.send_multipart(sent[number][-1])
    loop.until(lambda: sum(len(peer.told) for peer in peers) == sum(map(len, sent)) + len(peers))
    assert [peer.told for peer in peers] == [["made", *each] for each in sent]
    assert len({peer.seat._group for peer in peers}) == 1
    assert len(loop.handlers) == 2  # a socket and its monitor


def test_a_publisher_that_ends_is_lost_after_its_last_message_and_the_others_go_on(loop, subscriptions):
    publishers, peers = fleet(loop, subscriptions, 3)
    publishers[1].linger = 10_000
    publishers[1].send_multipart([b"", b"last"])
    publishers[1].close()
    loop.until(lambda: len(peers[1].told) == 3)
    assert peers[1].told == ["made", [b"", b"last"], "the connection was lost"]
    publishers[2].send_multipart([b"", b"on"])
    loop.until(lambda: len(peers[2].told) == 2)
    assert (peers[0].told, peers[2].told) == (["made"], ["made", [b"", b"on"]])


def test_a_last_message_that_comes_between_the_messages_and_the_monitor_is_handed_over(
    loop, subscriptions, monkeypatch
):
    publishers, peers = fleet(loop, subscriptions, 3)
    read_events = shared._Group._read_events

    def late(group):
        if not publishers[1].closed:
            publishers[1].linger = 10_000
            publishers[1].send_multipart([b"", b"last"])
            publishers[1].close()
            assert group._monitor.socket.poll(20_000)
        read_events(group)

    monkeypatch.setattr(shared._Group, "_read_events", late)
    loop.until(lambda: len(peers[1].told) == 3)
    assert peers[1].told == ["made", [b"", b"last"], "the connection was lost"]


def test_another_attempt_at_an_endpoint_goes_to_another_socket(loop, subscriptions):
    _, (peer, other) = fleet(loop, subscriptions, 2)
    peer.seat.close()
    again = Peer(subscriptions, peer.seat.endpoint)
    assert again.seat._group is not other.seat._group
    loop.until(lambda: again.told == ["made"])
    third = Peer(subscriptions, "tcp://127.0.0.1:1")
    assert third.seat._group is other.seat._group  # the first group has room for all others


def test_a_connection_that_is_left_ends_and_the_others_do_not(loop, subscriptions):
    (publisher, other), (peer, beside) = fleet(loop, subscriptions, 2)
    peer.seat.close()
    loop.until(lambda: publisher.poll(0))
    assert publisher.recv() == b"\x00"  # the subscription is gone
    publisher.send_multipart([b"", b"to nobody"])
    other.send_multipart([b"", b"on"])
    loop.until(lambda: len(beside.told) == 2)
    assert (peer.told, beside.told) == (["made"], ["made", [b"", b"on"]])


def test_a_socket_without_connections_is_closed(loop, subscriptions):
    _, peers = fleet(loop, subscriptions, 3)
    for peer in peers:
        assert loop.handlers
        peer.seat.close()
        peer.seat.close()
    assert not loop.handlers


def test_a_socket_has_so_many_connections_and_no_more(loop, subscriptions):
    seats = [Peer(subscriptions, f"tcp://127.0.0.1:{1 + number}").seat for number in range(2 * SEATS + 1)]
    groups = {seat._group for seat in seats}
    assert len(groups) == 3
    assert max(sum(seat._group is group for seat in seats) for group in groups) == SEATS
    for seat in seats:
        seat.close()


@pytest.mark.parametrize(
    ("endpoint", "options"),
    [
        ("tcp://[::1]:5557", {}),
        ("tcp://127.0.0.1:05557", {}),
        ("ipc:///nowhere/there", {}),
        ("inproc://nobody", {}),
        ("tcp://127.0.0.1:5557", {"admits": lambda now: True}),
        ("tcp://127.0.0.1:5557", {"curve": (b"0" * 40,) * 3}),
    ],
)
def test_a_connection_that_cannot_be_shared_has_a_socket_of_its_own(subscriptions, endpoint, options):
    if "curve" in options:
        public, secret = zmq.curve_keypair()
        options = {"curve": (public, public, secret)}
    seat = Peer(subscriptions, endpoint, **options).seat
    assert isinstance(seat, Subscription)
    seat.close()


def test_pods_with_other_topics_have_other_sockets(loop, subscriptions):
    publisher, endpoint = published(loop)
    other, beside = published(loop)
    one, two = Peer(subscriptions, endpoint, b"a"), Peer(subscriptions, beside, b"b")
    for each, topic in ((publisher, b"a"), (other, b"b")):
        assert each.poll(20_000)
        assert each.recv() == b"\x01" + topic
        each.send_multipart([b"b", b"no"])
        each.send_multipart([topic, b"yes"])
    loop.until(lambda: len(one.told) > 1 and len(two.told) > 2)
    assert one.told == ["made", [b"a", b"yes"]]
    assert two.told == ["made", [b"b", b"no"], [b"b", b"yes"]]


def test_a_stream_that_fails_is_lost_alone(loop, subscriptions, caplog):
    publishers, peers = fleet(loop, subscriptions, 2)

    def fails(frames: list[bytes], now: float) -> None:
        raise ZeroDivisionError("of one pod")

    peers[0].seat.message = fails
    for publisher in publishers:
        publisher.send_multipart([b"", b"x"])
    loop.until(lambda: len(peers[0].told) == 2 and len(peers[1].told) == 2)
    assert peers[0].told == ["made", "closed here: ZeroDivisionError('of one pod')"]
    assert peers[1].told == ["made", [b"", b"x"]]


def test_a_seat_that_is_left_while_messages_are_handed_over_gets_no_more(loop, subscriptions):
    (publisher, other), (peer, beside) = fleet(loop, subscriptions, 2)

    def leaves(frames: list[bytes], now: float) -> None:
        peer.told.append(frames)
        peer.seat.close()

    peer.seat.message = leaves
    for number in range(8):
        publisher.send_multipart([b"", bytes([number])])
    other.send_multipart([b"", b"after"])
    loop.until(lambda: len(beside.told) == 2)
    loop.until(lambda: len(peer.told) == 2)
    assert peer.told == ["made", [b"", b"\0"]]


def test_a_connection_is_taken_away_when_nothing_is_left_to_read(loop, subscriptions, monkeypatch):
    peer, beside = (Peer(subscriptions, f"tcp://127.0.0.1:{port}") for port in (1, 2))
    group = peer.seat._group
    queue = [(7, [b"", b"seq", b"payload"])] * (BUDGET + 5)
    ended: list[tuple[str, int]] = []

    def receive(_: zmq.Socket) -> tuple[int, list[bytes]]:
        if not queue:
            raise zmq.Again
        return queue.pop()

    monkeypatch.setattr(shared, "receive_from", receive)
    monkeypatch.setattr(type(group), "_is_readable", lambda _: bool(queue))
    # No publisher listens there, which the monitor could report before the queue is read.
    monkeypatch.setattr(type(group), "_events", lambda _: [])
    monkeypatch.setattr(group._sock, "disconnect", lambda endpoint: ended.append((endpoint, len(queue))))
    peer.seat.close()
    assert group.ready(100.0)
    assert (ended, len(queue)) == ([], 5)
    group.ready(100.0)
    assert ended == [("tcp://127.0.0.1:1", 0)]
    beside.seat.close()


def test_connections_come_and_go_in_a_flood_and_no_message_is_anothers(loop, subscriptions):
    """Every queue has messages when a connection is closed. At the wrong moment, libzmq would mix up the messages."""
    publishers, peers = fleet(loop, subscriptions, SEATS)
    rng = random.Random(7)
    number = 0
    for peer in rng.sample(peers, SEATS - 1):
        for _ in range(6):
            for place, publisher in enumerate(publishers):
                publisher.send_multipart([b"%d" % place, struct.pack(">Q", number), b"%d" % place])
                number += 1
        peer.seat.close()
        for handler in list(loop.handlers.values()):
            handler.ready(100.0)
    (left,) = [place for place, peer in enumerate(peers) if not peer.seat.closed]
    loop.until(lambda: len(peers[left].told) == 1 + 6 * (SEATS - 1))
    for place, peer in enumerate(peers):
        assert all(len(frames) == 3 and frames[0] == frames[2] == b"%d" % place for frames in peer.told[1:])


# The scripted tests control the system's timing: the events and messages that libzmq has at one look.


class Scripted:
    """A shared socket with given messages and events."""

    def __init__(self, loop: Loop, subscriptions: Subscriptions, count: int = 2) -> None:
        # No publisher is at these ports, and libzmq is never asked.
        self.peers = [Peer(subscriptions, f"tcp://127.0.0.1:{port + 1}") for port in range(count)]
        self.irregular = False
        seats = [peer.seat for peer in self.peers]
        assert all(isinstance(seat, Seat) for seat in seats)
        self.group = seats[0]._group
        kind = type(self.group)
        self.events: list[tuple[int, int, str]] = []
        self.messages: list[tuple[int, list[bytes]]] = []
        scripted = type("Scripted", (kind,), {
            "__slots__": (),
            "_receive": lambda _: (self._give(self.messages), False),
            "_events": lambda _: self._give(self.events),
        })  # fmt: skip
        self.group.__class__ = scripted

    @staticmethod
    def _give(table: list) -> list:
        given = list(table)
        table.clear()
        return given

    def look(self, events: list[tuple[int, int, int]], messages: list[tuple[int, bytes]] = ()) -> None:  # type: ignore[assignment]
        self.events += [(int(event), value, f"tcp://127.0.0.1:{port}") for event, value, port in events]
        self.messages += [(fd, [b"", b"seq", payload]) for fd, payload in messages]
        self.group._irregular = self.irregular
        self.group.ready(100.0)


_CONNECTED, _MADE, _LOST = zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED


def test_messages_of_a_descriptor_that_two_connections_had_are_of_neither(loop, subscriptions):
    """The system gives the descriptor to another connection before the first one's messages are read."""
    script = Scripted(loop, subscriptions)
    first, second = script.peers
    script.look([(_CONNECTED, 7, 1), (_MADE, 0, 1)], [(7, b"of the first")])
    script.look([(_LOST, 7, 1), (_CONNECTED, 7, 2), (_MADE, 0, 2)], [(7, b"of whom?"), (7, b"of whom?")])
    assert first.told == ["made", [b"", b"seq", b"of the first"], "the connection was lost"]
    assert second.told == ["closed here, since its first messages cannot be told from another connection's"]
    assert not loop.handlers


def test_a_descriptor_stays_nobodys_until_what_it_has_brought_is_gone(loop, subscriptions):
    """Three connections have the descriptor in turn, and the first two are closed only after the third has come."""
    script = Scripted(loop, subscriptions, 4)
    beside = script.peers[3]
    script.irregular = True  # no connection is closed yet
    script.look([(_CONNECTED, 7, 1), (_MADE, 0, 1)])
    script.look([(_LOST, 7, 1), (_CONNECTED, 7, 2)], [(7, b"of whom?")])
    script.look([(_CONNECTED, 7, 3), (_MADE, 0, 3)], [(7, b"of whom?")])
    assert [peer.told[-1][:11] for peer in script.peers[:3]] == ["the connect", "closed here", "closed here"]
    assert not any(isinstance(told, list) for peer in script.peers for told in peer.told)
    beside.seat.close()


def test_a_descriptor_whose_loss_was_carried_out_is_the_next_connections(loop, subscriptions):
    script = Scripted(loop, subscriptions)
    first, second = script.peers
    script.look([(_CONNECTED, 7, 1), (_MADE, 0, 1)])
    script.look([(_LOST, 7, 1)], [(7, b"the last")])
    script.look([(_CONNECTED, 7, 2), (_MADE, 0, 2)], [(7, b"of the second")])
    assert first.told == ["made", [b"", b"seq", b"the last"], "the connection was lost"]
    assert second.told == ["made", [b"", b"seq", b"of the second"]]
    second.seat.close()


def test_messages_of_a_descriptor_that_nobody_is_known_to_have_are_of_nobody(loop, subscriptions):
    script = Scripted(loop, subscriptions)
    script.look([(_CONNECTED, 7, 1), (_MADE, 0, 1)], [(8, b"?"), (-1, b"?")])
    assert [peer.told for peer in script.peers] == [["made"], []]
    for peer in script.peers:
        peer.seat.close()


def test_a_message_before_a_handshake_is_of_a_peer_that_cannot_be_followed(loop, subscriptions):
    script = Scripted(loop, subscriptions)
    script.look([(_CONNECTED, 7, 1)], [(7, b"early")])
    (why,) = script.peers[0].told
    assert "ZMTP 2 or older" in why
    script.peers[1].seat.close()


def test_late_events_of_a_connection_that_was_left_are_nobodys(loop, subscriptions):
    script = Scripted(loop, subscriptions)
    script.look([(_CONNECTED, 7, 1)])
    script.peers[0].seat.close()
    script.look([(_MADE, 0, 1), (_LOST, 7, 1)], [(7, b"late")])
    script.look([(_CONNECTED, 7, 2), (_MADE, 0, 2)], [(7, b"in time")])
    assert [peer.told for peer in script.peers] == [[], ["made", [b"", b"seq", b"in time"]]]
    script.peers[1].seat.close()

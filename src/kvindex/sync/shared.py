"""Sockets that many pods share: SUB sockets for what is published, ROUTER sockets for replays.

A SUB socket of its own costs a pod 45 kB and four descriptors: the socket, its connection, and the two ends of its
monitor. In a shared one the connection is all that a pod adds: 26 kB and one descriptor. A question by a DEALER of its
own costs 308 us of processor time, by a shared ROUTER 112.

A published message carries the descriptor that it was read from, and the monitor tells which endpoint a descriptor
belongs to. Three rules keep that unambiguous:

* Messages are received first and the monitor is read second. libzmq reports a connection before it delivers a message
  of it, so every descriptor of the received messages is known by then.
* A SUB socket connects to an endpoint once. A late event of an earlier attempt therefore cannot be mistaken for one of
  a later attempt, which goes to another socket.
* The system gives a descriptor that was closed to the next connection. If both events are read at once, the messages
  between them may be of either connection: they are dropped, and both connections count as lost.

A reply carries the routing id that its question was given, and no id is used twice.

``zmq_disconnect`` takes a queue away from those that a socket reads in turn. libzmq does that when it looks at its
commands, which it also does in the middle of a message, at every hundredth frame: if the queue had its turn coming, the
rest of the message is then another's, or an assertion ends the process (libzmq issues 2163 and 3663; with a ROUTER
socket, one of 6,500 answers was mixed). So a connection is taken away only when the socket is empty, and every queue
has had its turn before the hundredth frame: :meth:`_Shared._part`.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import zmq

from .frames import replay_request
from .loop import StreamLoop
from .sockets import (
    BUDGET,
    LOST_EVENTS,
    MADE_EVENT,
    OUTDATED,
    TURN,
    Replay,
    SocketOptions,
    Subscription,
    Watched,
    explained,
    receive_from,
    receive_reply,
    why_lost,
)
from .source import Curve

__all__ = ["SEATS", "Seat", "SharedSockets", "may_share"]

log = logging.getLogger("kvindex.sync")

SEATS: Final = 32
"""Connections that one SUB socket makes in its life. The socket and its monitor, 19 kB, are 0.6 kB a pod."""

# Connections of one ROUTER socket at once. Each message of a replay has up to five frames.
_QUESTIONS: Final = 19

# Messages that are received before they are handed over. Each look at the monitor costs 1 us.
_AT_ONCE: Final = 16
_BYTES_AT_ONCE: Final = 1 << 18

# Events of other addresses name them in another spelling than the one that was connected to.
_SHARABLE: Final = re.compile(r"tcp://(?:0|[1-9]\d{0,2})(?:\.(?:0|[1-9]\d{0,2})){3}:[1-9]\d{0,4}")


class Seat:
    """One connection of a shared socket. Its callbacks are those of :class:`Subscription`."""

    __slots__ = ("_socket", "closed", "endpoint", "fd", "lost", "made", "message", "name", "stands")

    immediate: Final = False

    def __init__(
        self, socket: _Shared, endpoint: str, made: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None],
    ) -> None:  # fmt: skip
        self._socket = socket
        self.endpoint = endpoint
        self.made = made
        self.lost = lost
        self.message = message
        self.fd = -1
        self.name: int | bytes = -1
        """What its messages carry: the descriptor, or the routing id."""
        self.stands = False
        self.closed = False

    def close(self) -> None:
        """End the connection. Nothing of it is handed over any more."""
        if not self.closed:
            self.closed = True
            self._socket.leave(self)


class _Shared(Watched):
    """One socket with many connections, and its monitor."""

    __slots__ = ("_by_name", "_irregular", "_leaving", "_losses", "_need", "_seats")

    _most_seats = 0
    _most_frames = 0

    def __init__(self, loop: StreamLoop, sock: zmq.Socket[bytes], need: Callable[[], str]) -> None:
        super().__init__(loop, sock)
        self._need = need
        self._seats: dict[str, Seat] = {}  # by endpoint
        self._by_name: dict[int | bytes, Seat] = {}
        self._leaving: dict[str, Seat] = {}  # closed here, and connected still
        self._irregular = False  # there were messages of more frames than are counted on
        self._losses: list[tuple[Seat, int]] = []
        self._or_close(lambda: self._watch_events(MADE_EVENT | zmq.EVENT_CONNECTED | LOST_EVENTS, self._happened))

    def _connect(self, seat: Seat) -> None:
        self._seats[seat.endpoint] = seat
        try:
            self._sock.connect(seat.endpoint)
        except BaseException:
            seat.close()
            raise

    def leave(self, seat: Seat) -> None:
        if self._seats.pop(seat.endpoint, None) is None:
            return
        self._leaving[seat.endpoint] = seat
        self._loop.again(self)

    def _part(self) -> bool:
        """Take the connections away that were left, if the socket is empty."""
        messages: list[tuple[int | bytes, list[bytes]]] = []
        try:
            # Where there is nothing, libzmq begins anew to count frames, and no queue has its turn coming.
            messages.append(self._next())
        except zmq.Again:
            for seat in self._leaving.values():
                if self._by_name.get(seat.name) is seat:
                    del self._by_name[seat.name]
                with suppress(zmq.ZMQError):
                    self._sock.disconnect(seat.endpoint)
            self._leaving.clear()
            # What has come meanwhile: at most a message of each queue.
            with suppress(zmq.Again):
                while len(messages) < self._most_seats:
                    messages.append(self._next())
        self._attend(messages)
        return not self.closed

    def _happened(self, now: float) -> None:
        if self.ready(now):
            self._loop.again(self)

    def ready(self, now: float) -> bool:
        end = now + TURN
        more = True
        for _ in range(BUDGET // _AT_ONCE):
            messages, more = self._receive()
            self._attend(messages)
            if self.closed or not more or self._loop.clock() >= end:
                break
        losses, self._losses = self._losses, []
        for seat, event in losses:
            self._drop(seat, self._why(seat, event))
        if self._leaving and not more and not self._irregular and not self.closed:
            return self._part()
        return more and not self.closed

    def _attend(self, messages: list[tuple[int | bytes, list[bytes]]]) -> None:
        self._read_events()
        for name, frames in messages:
            self._hand_over(name, frames)

    def _receive(self) -> tuple[list[tuple[int | bytes, list[bytes]]], bool]:
        """Messages with their names, and whether there may be more."""
        found: list[tuple[int | bytes, list[bytes]]] = []
        size = 0
        while len(found) < _AT_ONCE and size < _BYTES_AT_ONCE:
            # Asking takes 1 us and failing 9, and most wake-ups are for a few messages.
            if 0 < len(found) < 8 and not self._is_readable():
                return found, False
            try:
                name, frames = self._next()
            except zmq.Again:
                return found, False
            found.append((name, frames))
            size += len(frames[-1])
        return found, True

    def _next(self) -> tuple[int | bytes, list[bytes]]:
        """The name and the frames of the next message; raises ``zmq.Again`` when there is none."""
        raise NotImplementedError

    def _read_events(self) -> None:
        for event, value, endpoint in self._events():
            seat = self._seats.get(endpoint) or self._leaving.get(endpoint)
            if seat is None or (seat.closed and event != zmq.EVENT_CONNECTED):
                continue
            if event == zmq.EVENT_CONNECTED:
                seat.fd = value
                self._connected(seat)
            elif event == MADE_EVENT:
                if seat.fd < 0:  # of the question before
                    continue
                seat.stands = True
                try:
                    seat.made(self._loop.clock())
                except Exception as error:
                    self._failed(seat, error)
            elif event != zmq.EVENT_DISCONNECTED or value == seat.fd:
                self._losses.append((seat, event))

    def _connected(self, seat: Seat) -> None:
        """A connection has its descriptor."""

    def _hand_over(self, name: int | bytes, frames: list[bytes]) -> None:
        if len(frames) > self._most_frames:
            self._irregular = True
        seat = self._by_name.get(name)
        if seat is None or seat.closed:
            return
        if not seat.stands:
            self._drop(seat, OUTDATED)
            return
        try:
            seat.message(frames, self._loop.clock())
        except Exception as error:
            self._failed(seat, error)

    def _failed(self, seat: Seat, error: Exception) -> None:
        """One pod's failure is not the others'."""
        log.exception("a stream has failed")
        self._drop(seat, f"closed here: {error!r}")

    def _drop(self, seat: Seat, why: str) -> None:
        if not seat.closed:
            seat.close()
            try:
                seat.lost(self._loop.clock(), why)
            except Exception:
                log.exception("a stream has failed")

    def _why(self, seat: Seat, event: int) -> str:
        if event == zmq.EVENT_CONNECT_RETRIED:
            try:
                check_descriptors()
            except OSError as error:  # libzmq's own thread had none left, and does not say so
                return explained(error, self._need)
        return why_lost(event, keyed=False, stood=seat.stands)

    def failed(self, now: float, error: Exception) -> None:
        self.close()
        for seat in list(self._seats.values()):
            self._drop(seat, f"closed here: {error!r}")


class _Publishers(_Shared):
    """A SUB socket with up to :data:`SEATS` connections. Closes itself after the last of them."""

    __slots__ = ("_used",)

    _most_seats = SEATS
    _most_frames = 3

    def __init__(self, loop: StreamLoop, options: SocketOptions, topic: bytes, need: Callable[[], str]) -> None:
        sock: zmq.Socket[bytes] = loop.context.socket(zmq.SUB)
        options.apply(sock)
        sock.setsockopt(zmq.SUBSCRIBE, topic)
        self._used: set[str] = set()  # every endpoint of its life
        super().__init__(loop, sock, need)

    def admits(self, endpoint: str) -> bool:
        return endpoint not in self._used

    @property
    def is_full(self) -> bool:
        return self.closed or len(self._used) >= SEATS

    def join(self, seat: Seat) -> None:
        self._used.add(seat.endpoint)
        self._connect(seat)

    def leave(self, seat: Seat) -> None:
        super().leave(seat)
        if not self._seats:
            self.close()

    def _next(self) -> tuple[int, list[bytes]]:
        return receive_from(self._sock)

    def _connected(self, seat: Seat) -> None:
        former = self._by_name.get(seat.fd)
        seat.name, self._by_name[seat.fd] = seat.fd, seat
        if former is not None:
            self._losses.append((former, zmq.EVENT_DISCONNECTED))
            self._drop(seat, "closed here, since its first messages cannot be told from another connection's")


class _Answers(_Shared):
    """A ROUTER socket for replays, each over a connection of its own.

    A connection that does not come about is not reported: the question runs into its timeout, like one that nobody
    answers.
    """

    __slots__ = ("_count",)

    _most_seats = _QUESTIONS
    _most_frames = 4

    def __init__(self, loop: StreamLoop, options: SocketOptions, need: Callable[[], str]) -> None:
        sock: zmq.Socket[bytes] = loop.context.socket(zmq.ROUTER)
        options.apply(sock, queue=Replay.QUEUE)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._count = 0
        super().__init__(loop, sock, need)

    def admits(self, endpoint: str) -> bool:
        if self.closed or len(self._seats) + len(self._leaving) >= _QUESTIONS:
            return False
        return endpoint not in self._seats and endpoint not in self._leaving

    def ask(self, seat: Seat, start: int) -> None:
        self._read_events()  # those of the question before
        self._loop.again(self)  # it rings no bell for them any more
        self._count += 1
        seat.name = name = self._count.to_bytes(8, "big")
        self._by_name[name] = seat
        self._sock.setsockopt(zmq.CONNECT_ROUTING_ID, name)
        self._connect(seat)
        self._sock.send_multipart([name, *replay_request(start)], zmq.NOBLOCK)

    def leave(self, seat: Seat) -> None:
        super().leave(seat)
        if self._irregular and not self._seats:
            self.close()

    def _next(self) -> tuple[bytes, list[bytes]]:
        return receive_reply(self._sock)

    def _drop(self, seat: Seat, why: str) -> None:
        if seat.stands:
            super()._drop(seat, why)
        else:
            seat.close()


def may_share(endpoint: str) -> bool:
    """Whether a publisher there may have its connection in a shared socket, once its host is looked up."""
    return endpoint.startswith("tcp://") and "[" not in endpoint


def check_descriptors() -> None:
    """Raises ``OSError`` if this process cannot open another descriptor."""
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


class SharedSockets:
    """Opens subscriptions and replays, in shared sockets where that is possible. Belongs to the loop's thread.

    A socket has one key, and only one of its own can be left unread while a pod is over its limit.
    """

    def __init__(self, loop: StreamLoop, options: SocketOptions, need: Callable[[], str]) -> None:
        self._loop = loop
        self._options = options
        self._need = need
        self._publishers: dict[bytes, list[_Publishers]] = {}  # those with room, by topic
        self._answers: list[_Answers] = []

    def subscribe(
        self, endpoint: str, topic: bytes, *, made: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None], curve: Curve | None = None,
        admits: Callable[[float], bool] | None = None, waiting: Callable[[float, bool], None] | None = None,
    ) -> Subscription | Seat:  # fmt: skip
        """Connect to a publisher; the callbacks are those of :class:`Subscription`."""
        if curve is not None or admits is not None or not _SHARABLE.fullmatch(endpoint):
            return Subscription(
                self._loop, self._loop.context, self._options, endpoint, topic, made=made, lost=lost, message=message,
                curve=curve, admits=admits, waiting=waiting,
            )  # fmt: skip
        check_descriptors()
        groups = [group for group in self._publishers.get(topic, ()) if not group.is_full]
        group = next((group for group in groups if group.admits(endpoint)), None)
        if group is None:
            group = _Publishers(self._loop, self._options, topic, self._need)
            groups.append(group)
        self._publishers[topic] = groups
        seat = Seat(group, endpoint, made, lost, message)
        group.join(seat)
        return seat

    def ask(
        self, endpoint: str, start: int, *, reached: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None], curve: Curve | None = None,
        admits: Callable[[float], bool] | None = None,
    ) -> Replay | Seat:  # fmt: skip
        """Ask for a replay; the callbacks are those of :class:`Replay`."""
        if curve is not None or admits is not None or not _SHARABLE.fullmatch(endpoint):
            return Replay(
                self._loop, self._loop.context, self._options, endpoint, start, reached=reached, lost=lost,
                message=message, curve=curve, admits=admits,
            )  # fmt: skip
        check_descriptors()
        answers = next((each for each in self._answers if each.admits(endpoint)), None)
        if answers is None:
            answers = _Answers(self._loop, self._options, self._need)
            self._answers = [*(each for each in self._answers if not each.closed), answers]
        seat = Seat(answers, endpoint, reached, lost, message)
        answers.ask(seat, start)
        return seat

    def close(self) -> None:
        """Close the sockets for replays."""
        for answers in self._answers:
            answers.close()

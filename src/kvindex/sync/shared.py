"""One SUB socket for the publishers of many pods.

A socket of its own costs a pod 45 kB and four descriptors: the socket, its connection, and the two ends of its monitor.
In a shared socket, a pod adds only its connection: 26 kB and one descriptor. At 1,000 pods, a wake-up finds the
messages of all of them in one place.

Each message has the descriptor that it was read from, and the monitor reports which endpoint a descriptor belongs to.
Three rules keep that unambiguous:

* Messages are received first and the monitor is read second. libzmq reports a connection before it delivers a message
  of it, so the descriptor of every received message is known by then.
* A socket connects to an endpoint once. A late event of an earlier attempt therefore cannot be mistaken for one of a
  later attempt, which uses another socket.
* The system gives the descriptor of a closed connection to the next one. If both events are read at once, the messages
  between them may be of either connection: they are dropped, and both connections count as lost.

``zmq_disconnect`` removes a queue from those that a socket reads in turn. libzmq does that when it processes its
commands, which also happens in the middle of a message, at every hundredth frame. If the next turn is that queue's, the
rest of the message is taken from another queue, or an assertion ends the process (libzmq issues 2163 and 3663; with a
ROUTER socket, one of 6,500 answers was mixed). A connection is therefore removed only when the socket is empty, and
every queue has its turn before the hundredth frame: :meth:`_Group._part`.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import zmq

from .loop import StreamLoop
from .sockets import (
    BUDGET,
    LOST_EVENTS,
    MADE_EVENT,
    OUTDATED,
    TURN,
    SocketOptions,
    Subscription,
    Watched,
    explained,
    receive_from,
    why_lost,
)
from .source import Curve

__all__ = ["SEATS", "Seat", "Subscriptions", "may_share"]

log = logging.getLogger("kvindex.sync")

SEATS: Final = 32
"""Connections that one socket makes in its life. The socket and its monitor take 19 kB, which is 0.6 kB a pod."""

# Messages to receive before they are handed over. Each look at the monitor costs 1 us.
_AT_ONCE: Final = 16
_BYTES_AT_ONCE: Final = 1 << 18

# For other addresses, libzmq's events use another spelling than the one that was connected to.
_SHARABLE: Final = re.compile(r"tcp://(?:0|[1-9]\d{0,2})(?:\.(?:0|[1-9]\d{0,2})){3}:[1-9]\d{0,4}")


class Seat:
    """One connection of a shared socket. Its callbacks are those of :class:`Subscription`."""

    __slots__ = ("_group", "closed", "endpoint", "fd", "lost", "made", "message", "stands")

    immediate: Final = False

    def __init__(
        self, group: _Group, endpoint: str, made: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None],
    ) -> None:  # fmt: skip
        self._group = group
        self.endpoint = endpoint
        self.made = made
        self.lost = lost
        self.message = message
        self.fd = -1
        self.stands = False
        self.closed = False

    def close(self) -> None:
        """End the connection. Its messages are no longer handed over."""
        if not self.closed:
            self.closed = True
            self._group.leave(self)


class _Group(Watched):
    """One SUB socket with up to :data:`SEATS` connections. It closes itself after the last of them."""

    __slots__ = ("_by_fd", "_irregular", "_leaving", "_losses", "_need", "_seats", "_used")

    def __init__(
        self, loop: StreamLoop, context: zmq.Context[Any], options: SocketOptions, topic: bytes, need: Callable[[], str]
    ) -> None:
        sock: zmq.Socket[bytes] = context.socket(zmq.SUB)
        options.apply(sock)
        sock.setsockopt(zmq.SUBSCRIBE, topic)
        super().__init__(loop, sock)
        self._need = need
        self._seats: dict[str, Seat] = {}  # by endpoint
        self._used: set[str] = set()  # every endpoint that has ever joined
        self._by_fd: dict[int, Seat] = {}
        self._leaving: dict[str, Seat] = {}  # closed here, but still connected
        self._irregular = False  # messages with more than three frames have arrived
        self._losses: list[tuple[Seat, int]] = []
        self._or_close(lambda: self._watch_events(MADE_EVENT | zmq.EVENT_CONNECTED | LOST_EVENTS, self._happened))

    def admits(self, endpoint: str) -> bool:
        return not self.closed and len(self._used) < SEATS and endpoint not in self._used

    @property
    def is_full(self) -> bool:
        return self.closed or len(self._used) >= SEATS

    def join(self, seat: Seat) -> None:
        self._used.add(seat.endpoint)
        self._seats[seat.endpoint] = seat
        try:
            self._sock.connect(seat.endpoint)
        except BaseException:
            seat.close()
            raise

    def leave(self, seat: Seat) -> None:
        if self._seats.pop(seat.endpoint, None) is None:
            return
        if not self._seats:
            self.close()
            return
        self._leaving[seat.endpoint] = seat
        self._loop.again(self)

    def _part(self) -> bool:
        """Remove the connections that were left, if the socket is empty."""
        messages: list[tuple[int, list[bytes]]] = []
        try:
            # On an empty socket, libzmq starts its count of frames again, and no queue has the next turn.
            messages.append(receive_from(self._sock))
        except zmq.Again:
            for seat in self._leaving.values():
                if self._by_fd.get(seat.fd) is seat:
                    del self._by_fd[seat.fd]
                with suppress(zmq.ZMQError):
                    self._sock.disconnect(seat.endpoint)
            self._leaving.clear()
            # Messages that have arrived meanwhile: at most one of each queue, with three frames each.
            with suppress(zmq.Again):
                while len(messages) < SEATS:
                    messages.append(receive_from(self._sock))
        self._attend(messages)
        return not self.closed

    def _happened(self, now: float) -> None:
        if self.ready(now):
            self._loop.again(self)

    def ready(self, now: float) -> bool:
        end = now + TURN
        more = True
        for _ in range(BUDGET // _AT_ONCE):
            known = len(self._losses)
            messages, more = self._receive()
            self._attend(messages)
            # A connection that was lost after the messages were received has delivered its last ones by now.
            more = more or len(self._losses) > known
            if self.closed or not more or self._loop.clock() >= end:
                break
        losses, self._losses = self._losses, []
        for seat, event in losses:
            self._drop(seat, self._why(seat, event))
        if self._leaving and not more and not self._irregular and not self.closed:
            return self._part()
        return more and not self.closed

    def _attend(self, messages: list[tuple[int, list[bytes]]]) -> None:
        self._read_events()
        for fd, frames in messages:
            self._hand_over(fd, frames)

    def _receive(self) -> tuple[list[tuple[int, list[bytes]]], bool]:
        """Return messages with their descriptors, and whether there may be more."""
        found: list[tuple[int, list[bytes]]] = []
        size = 0
        while len(found) < _AT_ONCE and size < _BYTES_AT_ONCE:
            # A check takes 1 us and a failed receive 9, and most wake-ups are for a few messages.
            if 0 < len(found) < 8 and not self._is_readable():
                return found, False
            try:
                fd, frames = receive_from(self._sock)
            except zmq.Again:
                return found, False
            found.append((fd, frames))
            size += len(frames[-1])
        return found, True

    def _read_events(self) -> None:
        for event, value, endpoint in self._events():
            seat = self._seats.get(endpoint) or self._leaving.get(endpoint)
            if seat is None or (seat.closed and event != zmq.EVENT_CONNECTED):
                continue
            if event == zmq.EVENT_CONNECTED:
                former = self._by_fd.get(value)
                seat.fd, self._by_fd[value] = value, seat
                if former is not None:
                    self._losses.append((former, zmq.EVENT_DISCONNECTED))
                    self._drop(seat, "closed here, since its first messages cannot be told from another connection's")
            elif event == MADE_EVENT:
                seat.stands = True
                try:
                    seat.made(self._loop.clock())
                except Exception as error:
                    self._failed(seat, error)
            else:
                self._losses.append((seat, event))

    def _hand_over(self, fd: int, frames: list[bytes]) -> None:
        if len(frames) != 3:
            self._irregular = True
        seat = self._by_fd.get(fd)
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
        """Drop one pod's connection: its failure must not affect the others."""
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
            except OSError as error:  # libzmq's own thread had no descriptor left, and does not report that
                return explained(error, self._need)
        return why_lost(event, keyed=False, stood=seat.stands)

    def failed(self, now: float, error: Exception) -> None:
        self.close()
        for seat in list(self._seats.values()):
            self._drop(seat, f"closed here: {error!r}")


def may_share(endpoint: str) -> bool:
    """Whether a publisher at this endpoint may be followed in a shared socket, once its host is looked up."""
    return endpoint.startswith("tcp://") and "[" not in endpoint


def check_descriptors() -> None:
    """Raises ``OSError`` if this process cannot open another descriptor."""
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


class Subscriptions:
    """Opens subscriptions, in shared sockets if that is possible. Belongs to the loop's thread."""

    def __init__(self, loop: StreamLoop, options: SocketOptions, need: Callable[[], str]) -> None:
        self._loop = loop
        self._options = options
        self._need = need
        self._open: dict[bytes, list[_Group]] = {}  # groups with room, by topic

    def open(
        self, endpoint: str, topic: bytes, *, made: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None], curve: Curve | None = None,
        admits: Callable[[float], bool] | None = None, waiting: Callable[[float, bool], None] | None = None,
    ) -> Subscription | Seat:  # fmt: skip
        """Connect to a publisher. The callbacks are those of :class:`Subscription`.

        A socket has one key, and only a pod's own socket can be left unread while the pod is over its limit.
        """
        if curve is not None or admits is not None or not _SHARABLE.fullmatch(endpoint):
            return Subscription(
                self._loop, self._loop.context, self._options, endpoint, topic, made=made, lost=lost, message=message,
                curve=curve, admits=admits, waiting=waiting,
            )  # fmt: skip
        check_descriptors()
        groups = [group for group in self._open.get(topic, ()) if not group.is_full]
        group = next((group for group in groups if group.admits(endpoint)), None)
        if group is None:
            group = _Group(self._loop, self._loop.context, self._options, topic, self._need)
            groups.append(group)
        self._open[topic] = groups
        seat = Seat(group, endpoint, made, lost, message)
        group.join(seat)
        return seat

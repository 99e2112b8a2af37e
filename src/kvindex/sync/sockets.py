"""The sockets of streams: one connection to one publisher, and one replay.

Each is driven by the poll loop of the manager's thread: :meth:`ready` takes what has arrived, up to a budget or until
its turn is over, and says whether there may be more. ZMQ's file descriptors are edge-triggered: they are readable when
something has *changed*, so whoever stops before a socket is empty has to come back without being woken.

A connection is made once, and ended when it is lost: a stream's messages are therefore of one TCP connection and so of
one process, and libzmq's own reconnecting, which would hide a restart, never happens. :mod:`.shared` has the
connections of many publishers in one socket.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import zmq

from .frames import replay_request
from .loop import StreamLoop
from .source import Curve

__all__ = [
    "BUDGET", "LOST_EVENTS", "MADE_EVENT", "OUTDATED", "TURN", "Replay", "SocketOptions", "Subscription", "Watched",
    "explained", "receive_frames", "receive_from", "why_lost",
]  # fmt: skip

# What is taken from one socket before the others have their turn: so many messages, and none after so many seconds. By
# messages alone, batches of 4 MB from one pod kept the others waiting for nine seconds. What a pod waits for another's
# flood is therefore this and one message (32 MB, which is 0.3 s, unless `max_message` says otherwise), with what waited
# for it: filling a hole in front of 20 MB takes 0.1 s.
BUDGET: Final = 256
TURN: Final = 0.002

# Longer than any process lives: a lost connection is closed and made anew by us, see above.
_NEVER_MS: Final = 24 * 3600 * 1000

MADE_EVENT: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
LOST_EVENTS: Final = int(
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


# Not by pyzmq's recv_monitor_message: it makes a member of an enum of every value, and those are kept for ever. A pod
# that cannot be reached costs 1 kB of that at each attempt, for the value is a random time.
_EVENT: Final = struct.Struct("=Hi")


class SocketOptions:
    """What all sockets of a manager share. Seconds, messages, bytes."""

    def __init__(self, *, heartbeat: float, connect_timeout: float, queue: int, max_message: int) -> None:
        self.heartbeat = heartbeat
        self.connect_timeout = connect_timeout
        self.queue = queue
        connecting = max(1, int(connect_timeout * 1000))
        # Set one by one as attributes, they cost as much as the socket does: 1,000 pods open 3,000 at their start.
        self._values = [
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, max_message),
            (zmq.RECONNECT_IVL, _NEVER_MS),
            (zmq.HANDSHAKE_IVL, connecting),
            (zmq.CONNECT_TIMEOUT, connecting),
        ]
        if heartbeat > 0:
            # The timeout counts from the first beat that stays unanswered, which may be one interval after the silence
            # began: two and a half in all. At 0.7 s it is noticed as soon as at 0.5 s with a timeout of two and a half
            # intervals, and 1,000 idle pods take 2.3 % of a core in place of 3.4.
            self._values += [
                (zmq.HEARTBEAT_IVL, max(1, int(heartbeat * 1000))),
                (zmq.HEARTBEAT_TIMEOUT, max(1, int(heartbeat * 1500))),
            ]

    @property
    def patience(self) -> float:
        """Seconds after which a connection that is neither made nor refused counts as lost."""
        return 2 * self.connect_timeout + 1.0

    def apply(self, sock: zmq.Socket[bytes], *, queue: int | None = None) -> None:
        sock.setsockopt(zmq.RCVHWM, self.queue if queue is None else queue)
        for option, value in self._values:
            sock.setsockopt(option, value)


def _authenticate(sock: zmq.Socket[bytes], curve: Curve | None) -> None:
    """Believe only who has the secret key to ``curve.server``."""
    if curve is not None:
        sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = curve


# As plain integers: an operation on a member of an enum costs 0.5 us.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)
_SRCFD: Final = 2  # ZMQ_SRCFD, which pyzmq does not name


def receive_frames(sock: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """The next message; raises ``zmq.Again`` when there is none, which costs 7 us.

    ``recv_multipart`` looks at RCVMORE after every frame by way of an enum: 8 us for three frames, or 2.6. A frame
    knows by itself whether there are more.
    """
    recv = sock.recv
    frame: zmq.Frame = recv(_NOBLOCK, False)
    frames = [frame]
    while frame.more:
        frame = recv(_NOBLOCK, False)
        frames.append(frame)
    return frames


def receive_from(sock: zmq.Socket[bytes]) -> tuple[int, list[bytes]]:
    """As :func:`receive_frames`: the descriptor that the message was read from, -1 if libzmq does not say, and bytes.

    libzmq puts the descriptor among the properties of a message for every peer that completes a handshake.
    """
    recv = sock.recv
    frame: zmq.Frame = recv(_NOBLOCK, False)
    try:
        fd: int = frame.get(_SRCFD)
    except zmq.ZMQError:
        fd = -1
    message = [frame.bytes]
    while frame.more:
        frame = recv(_NOBLOCK, False)
        message.append(frame.bytes)
    return fd, message


def _bytes(sock: zmq.Socket[bytes]) -> list[bytes]:
    """As :func:`receive_frames`, as bytes."""
    recv = sock.recv
    frame: zmq.Frame = recv(_NOBLOCK, False)
    message = [frame.bytes]
    while frame.more:
        frame = recv(_NOBLOCK, False)
        message.append(frame.bytes)
    return message


def _readiness(sock: zmq.Socket[bytes]) -> int:
    """POLLIN and POLLOUT, as far as they are so: 1 us. Where they are not, the descriptor rings for them."""
    return cast(int, sock.getsockopt(_EVENTS))


class _Monitor:
    """The loop's handler for a socket's monitor: apart from the socket's own, so that no message pays for a look at
    the monitor."""

    __slots__ = ("closed", "fd", "happened", "socket")

    def __init__(self, socket: zmq.Socket[bytes], events: int, happened: Callable[[float], None]) -> None:
        self.socket = socket.get_monitor_socket(events)
        self.socket.linger = 0
        self.fd = cast(int, self.socket.fd)
        self.happened = happened
        self.closed = False

    def ready(self, now: float) -> bool:
        self.happened(now)
        return False

    def failed(self, now: float, error: Exception) -> None:
        pass


class Watched:
    """A socket in the loop, with or without a monitor.

    ``admits`` is asked before each message whether it may be taken; who says no sees to it that :meth:`ready` is called
    again. ``waiting`` is told whether something is there that may not be taken.
    """

    __slots__ = ("_admits", "_fd", "_loop", "_monitor", "_sock", "_waiting", "closed")

    def __init__(
        self, loop: StreamLoop, sock: zmq.Socket[bytes], *, admits: Callable[[float], bool] | None = None,
        waiting: Callable[[float, bool], None] | None = None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._sock = sock
        self._admits = admits
        self._waiting = waiting
        self._monitor: _Monitor | None = None
        self._fd = cast(int, sock.fd)  # asked for once: a closed socket has none
        self.closed = False
        loop.watch(self._fd, self)

    def _watch_events(self, events: int, happened: Callable[[float], None]) -> None:
        self._monitor = _Monitor(self._sock, events, happened)
        self._loop.watch(self._monitor.fd, self._monitor)

    def _events(self) -> list[tuple[int, int, str]]:
        """The events of the socket: each with its value (a descriptor, a time, an error) and its endpoint."""
        found: list[tuple[int, int, str]] = []
        while self._monitor is not None and _readiness(self._monitor.socket) & _POLLIN:
            event, endpoint = _bytes(self._monitor.socket)
            found.append((*_EVENT.unpack(event), endpoint.decode("utf-8", "replace")))
        return found

    def _is_readable(self) -> bool:
        return bool(_readiness(self._sock) & _POLLIN)

    def _take(
        self, handle: Callable[[list[Any], float], None], receive: Callable[[zmq.Socket[bytes]], list[Any]] = _bytes
    ) -> bool:
        """Hand over what has arrived, up to the budget; gives whether there may be more."""
        clock = self._loop.clock
        sock = self._sock
        now = clock()
        end = now + TURN
        for count in range(BUDGET):
            if self.closed:
                return False
            if self._admits is not None and not self._admits(now):
                # libzmq rings until somebody asks, so this is asked even where nobody wants to know.
                some = bool(_readiness(sock) & _POLLIN)
                if self._waiting is not None:
                    self._waiting(now, some)
                return False
            try:
                # Most wake-ups are for one message, and asking is cheaper than failing.
                frames = receive(sock) if count != 1 or _readiness(sock) & _POLLIN else None
            except zmq.Again:
                frames = None
            if frames is None:
                if self._waiting is not None:
                    self._waiting(now, False)
                return False
            handle(frames, now)
            now = clock()
            if now >= end:
                break
        return True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.unwatch(self._fd)
        if self._monitor is not None:
            self._monitor.closed = True
            self._loop.unwatch(self._monitor.fd)
            self._sock.disable_monitor()
            self._monitor.socket.close(0)
        self._sock.close(0)

    def failed(self, now: float, error: Exception) -> None:
        """Handling what arrived has raised ``error``."""
        self.close()

    def _or_close(self, step: Callable[[], object]) -> None:
        """Do a step of opening; a socket that cannot be opened does not stay with the loop."""
        try:
            step()
        except BaseException:
            self.close()
            raise


class Subscription(Watched):
    """One SUB socket with one connection to one publisher.

    Calls ``made(now)`` when the subscription stands, ``lost(now, why)`` once when it cannot be made or is over, and
    ``message(frames, now)`` for everything that arrives, before or after that.
    """

    __slots__ = ("_keyed", "_lost", "_made", "_message", "_over", "_stands", "immediate")

    def __init__(
        self, loop: StreamLoop, context: zmq.Context[Any], options: SocketOptions, endpoint: str, topic: bytes, *,
        made: Callable[[float], None], lost: Callable[[float, str], None],
        message: Callable[[list[bytes], float], None], curve: Curve | None = None,
        admits: Callable[[float], bool] | None = None, waiting: Callable[[float, bool], None] | None = None,
    ) -> None:  # fmt: skip
        sock: zmq.Socket[bytes] = context.socket(zmq.SUB)
        options.apply(sock)
        _authenticate(sock, curve)
        if endpoint.startswith("tcp://["):
            sock.setsockopt(zmq.IPV6, 1)
        sock.setsockopt(zmq.SUBSCRIBE, topic)
        super().__init__(loop, sock, admits=admits, waiting=waiting)
        self._made = made
        self._lost = lost
        self._message = message
        self._keyed = curve is not None
        self._stands = self._over = False
        # No process of this kind has connections inside itself but for tests; libzmq reports no events for those.
        self.immediate = endpoint.startswith("inproc://")
        if not self.immediate:
            self._or_close(lambda: self._watch_events(MADE_EVENT | LOST_EVENTS, self._happened))
        self._or_close(lambda: sock.connect(endpoint))

    def _happened(self, now: float) -> None:
        for event, _, _ in self._events():
            if self._over or self.closed:
                return
            if event == MADE_EVENT:
                self._stands = True
                self._made(now)
            else:
                # What has arrived before is the stream's, in this order.
                self._take(self._message if self._stands else self._early)
                if self.closed or self._over:
                    return
                self._over = True
                self._lost(now, why_lost(event, keyed=self._keyed, stood=self._stands))

    def ready(self, now: float) -> bool:
        if self._stands or self.immediate:
            return self._take(self._message)
        self._happened(now)
        return self._take(self._early)

    def _early(self, frames: list[bytes], now: float) -> None:
        """A message before the connection is known to stand: libzmq tells of that first, but for old peers never."""
        if not self._stands:
            self._happened(now)
        if self._stands:
            self._message(frames, now)
        elif not self._over and not self.closed:
            self._over = True
            self._lost(now, OUTDATED)

    def failed(self, now: float, error: Exception) -> None:
        self.close()
        if not self._over:
            self._over = True
            self._lost(now, f"closed here: {error!r}")


# A handshake, of which libzmq tells, came with ZMTP 3; and heartbeats, without which a silent death is not noticed.
OUTDATED: Final = (
    "the service there is not a ZMQ publisher, or speaks ZMTP 2 or older, as libzmq before 4.0 does, which cannot be"
    " followed"
)


def explained(failure: OSError | zmq.ZMQError, need: Callable[[], str]) -> str:
    """An error of opening a socket; ``need`` says how many descriptors the manager needs, and how many there may be."""
    if failure.errno not in (errno.EMFILE, errno.ENFILE):
        return str(failure)
    return f"no file descriptor is left: {need()}"


def why_lost(event: int, *, keyed: bool, stood: bool) -> str:
    """The reason for a lost connection, as text."""
    if event == zmq.EVENT_DISCONNECTED and not stood:
        return (
            "the service there closes the connection at once: it is not a publisher. If it is a replay endpoint, swap"
            " the two ports"
        )
    if event == zmq.EVENT_DISCONNECTED:
        return "the connection was lost"
    if event == zmq.EVENT_CONNECT_RETRIED:
        return "nobody accepts connections there"
    if keyed:
        return "the service there does not have the server_key, or hangs"
    return "the service there is not a ZMQ publisher, or needs a key, or hangs"


class Replay(Watched):
    """One question of one DEALER. A new one for every question, so that no late answer is taken for another's.

    Calls ``reached(now)`` when a ROUTER has taken the request, and ``lost(now)`` once when its connection is over.
    """

    __slots__ = ("_lost", "_message", "_reached", "_request")

    # Larger than the 10,000 batches that engines keep: what does not fit here, their ROUTER drops.
    QUEUE: Final = 20_000

    def __init__(
        self, loop: StreamLoop, context: zmq.Context[Any], options: SocketOptions, endpoint: str, start: int, *,
        reached: Callable[[float], None], lost: Callable[[float], None],
        message: Callable[[list[bytes], float], None], curve: Curve | None = None,
        admits: Callable[[float], bool] | None = None,
    ) -> None:  # fmt: skip
        sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        options.apply(sock, queue=self.QUEUE)
        _authenticate(sock, curve)
        if endpoint.startswith("tcp://["):
            sock.setsockopt(zmq.IPV6, 1)
        # It is writable only while a connection to a ROUTER stands. A monitor would say the same for two more sockets.
        sock.setsockopt(zmq.IMMEDIATE, 1)
        super().__init__(loop, sock, admits=admits)
        self._reached = reached
        self._lost = lost
        self._message = message
        self._request: list[bytes] | None = replay_request(start)
        self._or_close(lambda: sock.connect(endpoint))

    def ready(self, now: float) -> bool:
        if self._request is not None:
            try:
                self._sock.send_multipart(self._request, _NOBLOCK)
            except zmq.Again:
                return False
            self._request = None
            self._reached(now)
        more = self._take(self._message)
        if more or self.closed:
            return more
        events = _readiness(self._sock)
        if not events & (_POLLOUT | _POLLIN):
            self._lost(now)
        # Asking for events takes the bell's ring: what has come since the last look would not ring again. Where nothing
        # may be taken, who said so comes back.
        return bool(events & _POLLIN) and (self._admits is None or self._admits(now))

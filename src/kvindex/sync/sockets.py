"""The sockets of streams: one connection to one publisher, and one replay.

Each is driven by the poll loop of the manager's thread: :meth:`ready` takes the messages that have arrived, up to a
budget or until its turn is over, and returns whether there may be more. ZMQ's file descriptors are edge-triggered: they
are readable when something has *changed*. A reader that stops before a socket is empty therefore has to come back
without a wake-up.

A connection is made once, and ended when it is lost. A stream's messages are therefore of one TCP connection and so of
one process. libzmq's own reconnecting, which would hide a restart, never happens. :mod:`.shared` has the connections of
many publishers in one socket.
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

# The budget of one socket before the others have their turn: so many messages, and no further one after so many
# seconds. With a limit on messages alone, batches of 4 MB from one pod kept the others waiting for nine seconds. During
# another pod's flood, a pod therefore waits for this time and one message, which is 32 MB and 0.3 s unless
# `max_message` sets another size. Batches that waited for that message are added: filling a hole in front of 20 MB
# takes 0.1 s.
BUDGET: Final = 256
TURN: Final = 0.002

# Longer than the life of any process: lost connections are closed and replaced here, see above.
_NEVER_MS: Final = 24 * 3600 * 1000

MADE_EVENT: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
LOST_EVENTS: Final = int(
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


# pyzmq's recv_monitor_message makes every value a member of an enum, and keeps those members forever. A pod that cannot
# be reached would cost 1 kB of that at each attempt, because the value is a random time.
_EVENT: Final = struct.Struct("=Hi")


class SocketOptions:
    """Options of all sockets of a manager. Seconds, messages, bytes."""

    def __init__(self, *, heartbeat: float, connect_timeout: float, queue: int, max_message: int) -> None:
        self.heartbeat = heartbeat
        self.connect_timeout = connect_timeout
        self.queue = queue
        connecting = max(1, int(connect_timeout * 1000))
        # Set one by one as attributes, they cost as much as the socket does: 1,000 pods open 3,000
        # sockets at their start.
        self._values = [
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, max_message),
            (zmq.RECONNECT_IVL, _NEVER_MS),
            (zmq.HANDSHAKE_IVL, connecting),
            (zmq.CONNECT_TIMEOUT, connecting),
        ]
        if heartbeat > 0:
            # The timeout counts from the first unanswered heartbeat, which may be one interval after the silence began:
            # two and a half intervals in all. An interval of 0.7 s notices a silence as soon as one of 0.5 s with a
            # timeout of two and a half intervals, and 1,000 idle pods take 2.3 % of a core instead of 3.4.
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
    """Accept only a peer that has the secret key of ``curve.server``."""
    if curve is not None:
        sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = curve


# Plain integers, because an operation on a member of an enum costs 0.5 us.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)
_SRCFD: Final = 2  # ZMQ_SRCFD, for which pyzmq has no name


def receive_frames(sock: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Receive the next message. Raises ``zmq.Again`` if there is no message, which costs 7 us.

    ``recv_multipart`` reads RCVMORE through an enum after every frame: 8 us for three frames, compared with 2.6. A
    frame has this flag itself.
    """
    recv = sock.recv
    frame: zmq.Frame = recv(_NOBLOCK, False)
    frames = [frame]
    while frame.more:
        frame = recv(_NOBLOCK, False)
        frames.append(frame)
    return frames


def receive_from(sock: zmq.Socket[bytes]) -> tuple[int, list[bytes]]:
    """As :func:`receive_frames`: the descriptor that the message was read from (-1 if libzmq does not
    report it), and bytes.

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
    """Return POLLIN and POLLOUT as far as they are set, in 1 us. For the others, the descriptor
    becomes readable later."""
    return cast(int, sock.getsockopt(_EVENTS))


class _Monitor:
    """The loop's handler for a socket's monitor. It is separate from the socket's own, so that messages do not pay for
    a look at the monitor."""

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

    ``admits`` is called before each message and returns whether the message may be taken. If it refuses, its owner has
    to call :meth:`ready` again later. ``waiting`` is called with whether messages have arrived that may not be taken.
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
        self._fd = cast(int, sock.fd)  # read once: a closed socket has no descriptor
        self.closed = False
        loop.watch(self._fd, self)

    def _watch_events(self, events: int, happened: Callable[[float], None]) -> None:
        self._monitor = _Monitor(self._sock, events, happened)
        self._loop.watch(self._monitor.fd, self._monitor)

    def _events(self) -> list[tuple[int, int, str]]:
        """Read the events of the socket: each with its value (a descriptor, a time, an error) and its endpoint."""
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
        """Hand over the messages that have arrived, up to the budget. Returns whether there may be more."""
        clock = self._loop.clock
        sock = self._sock
        now = clock()
        end = now + TURN
        for count in range(BUDGET):
            if self.closed:
                return False
            if self._admits is not None and not self._admits(now):
                # libzmq signals until its events are read, so they are read even without a ``waiting`` callback.
                some = bool(_readiness(sock) & _POLLIN)
                if self._waiting is not None:
                    self._waiting(now, some)
                return False
            try:
                # Most wake-ups are for one message, and a check is cheaper than a failed receive.
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
        """Close the socket: handling a message has raised ``error``."""
        self.close()

    def _or_close(self, step: Callable[[], object]) -> None:
        """Run a step of opening. A socket that cannot be opened is removed from the loop."""
        try:
            step()
        except BaseException:
            self.close()
            raise


class Subscription(Watched):
    """One SUB socket with one connection to one publisher.

    Calls ``made(now)`` when the subscription is connected, ``lost(now, why)`` once when it cannot be made or is over,
    and ``message(frames, now)`` for every message, before or after that.
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
        # Only tests have connections inside one process, and libzmq reports no events for those.
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
                # Messages that have arrived before belong to the stream, and come first.
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
        """Handle a message before the connection is known to be made. libzmq reports that first,
        but for old peers never."""
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


# ZMTP 3 introduced the handshake that libzmq reports, and heartbeats, without which a silent death is not noticed.
OUTDATED: Final = (
    "the service there is not a ZMQ publisher, or speaks ZMTP 2 or older, as libzmq before 4.0 does, which cannot be"
    " followed"
)


def explained(failure: OSError | zmq.ZMQError, need: Callable[[], str]) -> str:
    """Explain an error of opening a socket. ``need`` returns the required and the allowed number of
    descriptors, as text."""
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
        return "nothing accepts connections there"
    if keyed:
        return "the service there does not have the server_key, or hangs"
    return "the service there is not a ZMQ publisher, or needs a key, or hangs"


class Replay(Watched):
    """One question of one DEALER. Every question has its own socket, so that a late answer is not taken for another's.

    Calls ``reached(now)`` when a ROUTER has taken the request, and ``lost(now)`` once when its connection is over.
    """

    __slots__ = ("_lost", "_message", "_reached", "_request")

    # Larger than the 10,000 batches that engines keep: an engine's ROUTER drops the messages that do not fit here.
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
        # It is writable only while it is connected to a ROUTER. A monitor would report the same with two more sockets.
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
        # Reading the events resets the descriptor: messages since the last look would not make it readable again. If
        # they may not be taken now, the owner of ``admits`` comes back.
        return bool(events & _POLLIN) and (self._admits is None or self._admits(now))

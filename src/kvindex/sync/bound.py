"""Endpoints that pods connect to, and the workers that the messages arriving there belong to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import zmq
from zmq.utils import z85

from ..errors import StreamError
from .fleet import Fleet, FollowedPod
from .frames import FrameFault, batch_rank, parse_live, parse_topic
from .loop import StreamLoop
from .ranks import MOST_RANKS
from .sockets import SocketOptions, Watched, receive_frames
from .source import Endpoints, PodSource
from .worker import Worker

__all__ = ["BoundEndpoints"]

log = logging.getLogger("kvindex.sync")


class BoundSocket(Watched):
    """One SUB socket that many publishers connect to.

    Calls ``message(frames, connection, key, now)`` with a number that is higher for a later connection (None if the
    connection is already gone), and ``lost(connection, now)`` when a connection ends. With a ``secret`` key, only the
    connections are made that a :class:`Doorkeeper` admits to the ``domain``, and ``key`` is the publisher's own public
    key.
    """

    def __init__(
        self, loop: StreamLoop, context: zmq.Context[Any], options: SocketOptions, endpoint: str, *,
        lost: Callable[[int, float], None], message: Callable[[list[bytes], int | None, str | None, float], None],
        secret: bytes | None = None, domain: bytes = b"",
    ) -> None:  # fmt: skip
        sock: zmq.Socket[bytes] = context.socket(zmq.SUB)
        options.apply(sock)
        sock.ipv6 = endpoint.startswith("tcp://[")
        sock.subscribe(b"")
        self._keyed = secret is not None
        if secret is not None:
            sock.curve_server = True
            sock.curve_secretkey = secret
            sock.zap_domain = domain
        try:
            sock.bind(endpoint)
        except zmq.ZMQError:
            sock.close(0)
            raise
        super().__init__(loop, sock)
        self.endpoint = cast(bytes, sock.last_endpoint).rstrip(b"\0").decode()
        self._lost = lost
        self._message = message
        self._connections: dict[int, int] = {}  # file descriptor -> number of its connection
        self._count = 0
        self._watch_events(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED, self._note_connections)

    def _note_connections(self, now: float) -> None:
        for event, fd, _ in self._events():
            if event == zmq.EVENT_ACCEPTED:
                self._count += 1
                self._connections[fd] = self._count
            elif (connection := self._connections.pop(fd, None)) is not None:
                self._lost(connection, now)

    def ready(self, now: float) -> bool:
        self._note_connections(now)  # first: a reused descriptor belongs to another connection
        return self._take(self._hand_over, receive_frames)

    def _hand_over(self, frames: list[zmq.Frame], now: float) -> None:
        # libzmq adds the descriptor that a message was read from to its properties, except for inproc.
        try:
            fd = int(frames[0].get("__fd"))
        except (zmq.ZMQError, ValueError, TypeError):
            fd = -1
        if fd not in self._connections and fd != -1:
            self._note_connections(now)
        key = cast(str, frames[0].get("User-Id")) if self._keyed else None
        self._message([frame.bytes for frame in frames], self._connections.get(fd), key, now)

    def failed(self, now: float, error: Exception) -> None:
        # The socket stays open: one of its pods has caused the failure, and the other pods still need it.
        pass


class Doorkeeper(Watched):
    """Decides which publishers may connect to endpoints with keys, and has libzmq attach the publisher's key to each
    message (ZAP, rfc.zeromq.org/spec/27). pyzmq's own authenticators need a thread or an event loop of their own.

    Asks ``admits(domain, key)``. A refused publisher may try again, because it may be admitted a moment later. A
    context has one such socket: a second one raises ``zmq.ZMQError``.
    """

    def __init__(self, loop: StreamLoop, context: zmq.Context[Any], admits: Callable[[bytes, str], bool]) -> None:
        sock: zmq.Socket[bytes] = context.socket(zmq.REP)
        sock.linger = 0
        try:
            sock.bind("inproc://zeromq.zap.01")
        except zmq.ZMQError:
            sock.close(0)
            raise
        super().__init__(loop, sock)
        self._admits_to = admits

    def ready(self, now: float) -> bool:
        return self._take(self._answer)

    def _answer(self, frames: list[bytes], now: float) -> None:
        version, request, domain, _, _, mechanism, *credentials = frames
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        admitted = key != "" and self._admits_to(domain, key)
        answer = [b"200", b"OK", key.encode()] if admitted else [b"300", b"not admitted", b""]
        self._sock.send_multipart([version, request, *answer, b""], zmq.NOBLOCK)

    def failed(self, now: float, error: Exception) -> None:
        # The socket stays open: without it, publishers could no longer connect.
        pass


class BoundEndpoints:
    """All bound endpoints of a manager. ``faults`` counts messages that belong to no known pod, by reason. Belongs to
    the loop's thread."""

    def __init__(self, fleet: Fleet, options: SocketOptions) -> None:
        self.faults: Counter[str] = Counter()
        self._fleet = fleet
        self._options = options
        self._bound: list[_Endpoint] = []
        self._door: Doorkeeper | None = None
        self._admitted: dict[bytes, frozenset[str] | None] = {}  # by domain; None admits every key
        fleet.at_end.append(self._close)

    def bind(
        self, endpoint: str, options: dict[str, Any], max_pods: int, keys: tuple[str, str] | None,
        admitted: frozenset[str] | None,
    ) -> str:  # fmt: skip
        """Let pods connect here: see :meth:`EventManager.bind`."""
        fleet, loop = self._fleet, self._fleet.loop
        fleet.alive()
        domain = f"kvindex-{len(self._bound)}".encode()
        bound = _Endpoint(fleet, self.faults, options, max_pods)
        try:
            if keys is not None and self._door is None:
                self._door = Doorkeeper(loop, loop.context, self._admits)
                fleet.accepts_keys = True
            bound.socket = BoundSocket(
                loop, loop.context, self._options, endpoint, lost=bound.lost, message=bound.message,
                secret=None if keys is None else keys[1].encode(), domain=domain,
            )  # fmt: skip
        except zmq.ZMQError as error:
            raise StreamError(f"{endpoint} cannot be bound: {error}") from error
        self._admitted[domain] = admitted
        self._bound.append(bound)
        fleet.accepts = True
        return bound.socket.endpoint

    def _admits(self, domain: bytes, key: str) -> bool:
        admitted = self._admitted.get(domain, frozenset())
        if admitted is None or key in admitted:
            return True
        return any(pod.source.server_key == key for pod in self._fleet.pods.values())

    def _close(self) -> None:
        for bound in self._bound:
            bound.socket.close()
        if self._door is not None:
            self._door.close()


class _Endpoint:
    """One bound endpoint. ``options`` are those of pods that appear here by themselves."""

    socket: BoundSocket

    def __init__(self, fleet: Fleet, faults: Counter[str], options: dict[str, Any], max_pods: int) -> None:
        self._fleet = fleet
        self._faults = faults
        self._options = options
        self._max_pods = max_pods
        self._by_connection: dict[int, set[Worker]] = {}

    def __str__(self) -> str:
        return self.socket.endpoint

    def lost(self, connection: int, now: float) -> None:
        for worker in self._by_connection.pop(connection, ()):
            if worker.rival == connection and not worker.gone:
                worker.compete(None, now)
            if worker.connection == connection and not worker.gone:
                worker.disconnected(now, "the pod's connection was lost")

    def message(self, frames: list[bytes], connection: int | None, key: str | None, now: float) -> None:
        try:
            topic, seq, payload = parse_live(frames)
        except FrameFault as fault:
            self._fault(fault.reason, str(fault))
            return
        worker = self._worker(topic, payload, key)
        if worker is None or worker.gone:
            return
        if connection is None:
            if worker.connection is None or worker.stream.is_connected:
                # The message is of a connection that is gone, and the worker has another one or never
                # had one that was seen.
                self._faults["late_frames"] += 1
                return
        elif worker.connection is None or connection > worker.connection:
            if worker.stream.is_connected:
                worker.disconnected(now, "another connection brings its stream")
            if worker.gone:
                return
            worker.connection, worker.rival = connection, None
            self._by_connection.setdefault(connection, set()).add(worker)
            worker.connected(now)
        elif connection < worker.connection:
            worker.errors["late_frames"] += 1
            worker.compete(connection, now)
            return
        worker.offer(frames, seq, payload, now)

    def _fault(self, reason: str, detail: str) -> None:
        self._faults[reason] += 1
        if self._faults[reason] == 1:
            log.warning("bound endpoint: %s (further ones are only counted)", detail)

    def _worker(self, topic: bytes, payload: bytes, key: str | None) -> Worker | None:
        """Return the worker that a message belongs to, or None if it belongs to no worker."""
        fleet = self._fleet
        name = fleet.topics.get(topic)
        pod = self._appear(topic) if name is None else fleet.pods[name]
        if pod is None:
            return None
        if pod.key is None:
            pod.key = key
        if pod.key != key:
            self._fault("foreign_key", f"pod {pod.source.name!r} is another key's than who speaks for it here")
            return None
        rank = batch_rank(payload)
        worker = pod.workers.get(rank)
        if worker is None:
            if rank >= MOST_RANKS or (pod.source.ranks is not None and rank not in pod.source.ranks):
                self._fault("bad_rank", f"pod {pod.source.name!r} has no rank {rank}")
                return None
            worker = fleet.employ(pod, rank, Endpoints(None, None))
        return worker

    def _appear(self, topic: bytes) -> FollowedPod | None:
        """Return the pod that a topic names for the first time."""
        fleet = self._fleet
        parts = parse_topic(topic)
        if parts is None:
            self._fault("bad_topic", f"topic {topic!r:.80} is not kv@POD@MODEL")
            return None
        name, model = parts
        if name in fleet.removed:
            self._faults["removed_pod"] += 1
            return None
        if name in fleet.pods:
            known = fleet.pods[name].source
            self._fault(
                "foreign_topic",
                f"topic {topic!r:.80} says it is pod {name!r}, which is followed as {known.topic or known.model!r}",
            )
            return None
        if sum(pod.came_to is self for pod in fleet.pods.values()) >= self._max_pods:
            self._fault("too_many_pods", f"pod {name!r:.80} would be one more than {self._max_pods}")
            return None
        source = PodSource(name, model=model, topic=topic.decode(), **self._options)
        try:
            return fleet.appear(source, topic, self)
        except StreamError as error:
            self._fault("followed_elsewhere", str(error))
            return None

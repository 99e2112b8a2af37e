"""The event publisher of a simulated engine: PUB and ROUTER sockets, a replay buffer, and the known faults of both.

Frames are those of the real publishers, as recorded from six releases. A live message is ``[topic, seq, payload]``. A
client requests a replay with ``["", start]`` and gets ``["", topic, seq, payload]`` for each batch; older releases
leave the topic out. The end marker has seq -1 and an empty payload.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, cast

import zmq

from ..errors import InvalidValueError

__all__ = ["Faults", "Publisher", "offset_port", "topic_in_replay"]

_U64 = struct.Struct(">Q")
_END: Final = b"\xff" * 8


def topic_in_replay(form: str) -> bool:
    """Whether the replays of the releases with this wire form (a name like ``vllm-0.33.0``) have the topic."""
    engine, _, version = form.partition("-")
    numbers = tuple(int(part) for part in version.split("."))
    return numbers >= ((0, 26) if engine == "vllm" else (0, 5, 22))


def offset_port(endpoint: str, rank: int) -> str:
    """The endpoint of another rank: ``rank`` ports higher, as in the engines. A wildcard port stays."""
    head, _, port = endpoint.rpartition(":")
    return endpoint if port in ("*", "0") else f"{head}:{int(port) + rank}"


@dataclass(slots=True)
class Faults:
    """The faults of a publisher, each active while it is set. Counts go down with every fault that happens."""

    drop: int = 0
    """Messages that are not sent; a replay still has them."""
    duplicate: int = 0
    """Messages that are sent twice."""
    reorder: int = 0
    """Messages that change places with the next one."""
    delay: float = 0.0
    """Seconds between a batch and its message."""
    unencodable: int = 0
    """Batches that get a sequence number and nothing else, as when the engine's encoder fails."""
    damage: int = 0
    """Messages with a damaged payload; a replay still has the original."""
    mute: bool = False
    """Nothing is published live at all; a replay still has it."""
    bad_frames: int = 0
    """Messages with a sequence number of 7 bytes; a replay still has the correct frames."""
    replay_cut: int | None = None
    """A replay stops after so many batches, without its end marker, as it does behind a full queue."""
    replay_silent: bool = False
    """Requests for a replay are not answered while this is set, as when the publisher's thread is held up."""
    replay_endless: bool = False
    """A replay repeats its batches and never ends."""
    replay_no_end: bool = False
    """A replay has no end marker."""
    replay_delay: float = 0.0
    """Seconds until a request for a replay is answered."""


class Publisher:
    """The event publisher of one rank. Call :meth:`publish` and :meth:`serve` from one thread.

    The publisher binds ``endpoint``, or connects to it with ``connect`` (for subscribers that bind). It always binds
    ``replay_endpoint``. The attributes of the same names have the port that replaced a wildcard. ``buffer_steps``
    batches are kept for replays. ``with_topic`` is the framing of replays, see :func:`topic_in_replay`. With a
    ``secret_key`` (CURVE, Z85) only clients with its public key are served; with ``connect``, the key identifies the
    publisher to the peer with the ``server_key``.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, replay_endpoint: str | None = None, *, topic: str = "",
        buffer_steps: int = 10_000, with_topic: bool = True, connect: bool = False, queue: int = 100_000,
        secret_key: bytes | None = None, server_key: bytes | None = None,
    ) -> None:  # fmt: skip
        if buffer_steps < 1:
            raise InvalidValueError(f"buffer_steps must be at least 1, not {buffer_steps}")
        if (server_key is not None) != (connect and secret_key is not None):
            raise InvalidValueError(
                "a publisher that connects has a secret_key and the server_key of who binds, or none"
            )
        self.faults = Faults()
        self.seq = 0
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.replays = 0
        self._context = context
        self._topic = topic.encode()
        self._with_topic = with_topic
        self._connect = connect
        self._queue = queue
        self._secret_key = secret_key
        self._server_key = server_key
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._held: bytes | None = None
        self._held_seq = 0
        self._late: deque[tuple[float, list[bytes]]] = deque()
        self._asked: deque[tuple[float, list[bytes]]] = deque()
        self._endless: tuple[bytes, int] | None = None
        self._open()

    def _open(self) -> None:
        self._router: zmq.Socket[bytes] | None = None
        try:
            self._open_sockets()
        except zmq.ZMQError:
            self.close()  # the context cannot terminate with an open socket
            raise

    def _open_sockets(self) -> None:
        self._pub: zmq.Socket[bytes] = self._context.socket(zmq.PUB)
        self._pub.linger = 0
        self._pub.sndhwm = self._queue
        if self._connect:
            if self._server_key is not None and self._secret_key is not None:
                self._pub.curve_serverkey = self._server_key
                self._pub.curve_publickey = zmq.curve_public(self._secret_key)
                self._pub.curve_secretkey = self._secret_key
            self._pub.connect(self.endpoint)
        else:
            self._encrypt(self._pub)
            self.endpoint = _bind(self._pub, self.endpoint)
        if self.replay_endpoint is not None:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.linger = 0
            self._encrypt(self._router)
            self.replay_endpoint = _bind(self._router, self.replay_endpoint)

    def _encrypt(self, sock: zmq.Socket[bytes]) -> None:
        if self._secret_key is not None:
            sock.curve_server = True
            sock.curve_secretkey = self._secret_key

    @property
    def router(self) -> zmq.Socket[bytes] | None:
        """The socket for requests of replays: call :meth:`serve` when it is readable."""
        return self._router

    def publish(self, payload: bytes) -> int:
        """Publish one batch, and return its sequence number."""
        faults, seq = self.faults, self.seq
        self.seq += 1
        if faults.unencodable > 0:
            faults.unencodable -= 1
            return seq
        self._buffer.append((seq, payload))
        frames = [self._topic, _U64.pack(seq), payload]
        if faults.mute:
            return seq
        if faults.drop > 0:
            faults.drop -= 1
            return seq
        if faults.damage > 0:
            faults.damage -= 1
            frames[2] = b"\xc1" + payload[1:]
        if faults.bad_frames > 0:
            faults.bad_frames -= 1
            frames[1] = frames[1][1:]
        if faults.delay > 0.0:
            self._late.append((time.monotonic() + faults.delay, frames))
            return seq
        if faults.reorder > 0 and self._held is None:
            faults.reorder -= 1
            self._held, self._held_seq = payload, seq
            return seq
        self._send(frames)
        if self._held is not None:
            held, self._held = self._held, None
            self._send([self._topic, _U64.pack(self._held_seq), held])
        return seq

    def send_raw(self, frames: list[bytes]) -> None:
        """Publish frames as they are, for tests of publishers that send invalid messages."""
        self._pub.send_multipart(frames)

    def _send(self, frames: list[bytes]) -> None:
        self._pub.send_multipart(frames)
        if self.faults.duplicate > 0:
            self.faults.duplicate -= 1
            self._pub.send_multipart(frames)

    def serve(self) -> float | None:
        """Send the delayed messages that are due, and answer the requests for replays. Never blocks.

        Returns the seconds until there is more to do, or None when nothing is due.
        """
        now = time.monotonic()
        while self._late and self._late[0][0] <= now:
            self._send(self._late.popleft()[1])
        while self._router is not None:
            try:
                request = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            # The engines ignore a request without the empty frame.
            if len(request) == 3 and request[1] == b"":
                self._asked.append((now + self.faults.replay_delay, request))
        asked = () if self.faults.replay_silent else self._asked
        while asked and asked[0][0] <= now:
            asker, _, asked_from = self._asked.popleft()[1]
            self._answer(asker, int.from_bytes(asked_from, "big"))
        if self._endless is not None and self.faults.replay_endless:
            client, start = self._endless
            for seq, payload in [item for item in self._buffer if item[0] >= start][:200]:
                self._reply(client, seq, payload)
            return 0.01
        due = [queue[0][0] for queue in (self._late, asked) if queue]
        return max(0.0, min(due) - now) if due else None

    def _answer(self, client: bytes, start: int) -> None:
        faults = self.faults
        self.replays += 1
        found = [item for item in self._buffer if item[0] >= start]
        for seq, payload in found if faults.replay_cut is None else found[: faults.replay_cut]:
            self._reply(client, seq, payload)
        if faults.replay_endless:
            self._endless = (client, start)
        elif faults.replay_cut is None and not faults.replay_no_end:
            assert self._router is not None
            self._router.send_multipart([client, b"", *([b""] if self._with_topic else []), _END, b""])

    def _reply(self, client: bytes, seq: int, payload: bytes) -> None:
        assert self._router is not None
        self._router.send_multipart(
            [client, b"", *([self._topic] if self._with_topic else []), _U64.pack(seq), payload]
        )

    def restart(self) -> None:
        """Act as a new process of the same engine: new sockets at the same endpoints, seq 0, nothing to replay."""
        self.close()
        self.seq = 0
        self._buffer.clear()
        self._late.clear()
        self._asked.clear()
        self._held = self._endless = None
        self._open()

    def close(self) -> None:
        """Close the sockets at once, and drop unsent messages. A second call has no effect."""
        self._pub.close(0)
        if self._router is not None:
            self._router.close(0)


def _bind(sock: zmq.Socket[bytes], endpoint: str) -> str:
    # The kernel may not have released the port of a process that was killed a moment ago.
    for attempt in range(50):
        try:
            sock.bind(endpoint)
            break
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or attempt == 49:
                raise
            time.sleep(0.02)
    found = cast(bytes, sock.last_endpoint).rstrip(b"\0").decode()
    return found.replace("tcp://0.0.0.0:", "tcp://*:")

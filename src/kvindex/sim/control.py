"""Child processes with a control socket: the socket inside the process, and its handle in the parent.

The process prints one line of JSON when it is ready, whose ``control`` is the address of its control socket. It then
answers each request ``{"op": NAME, ...}`` with a map, one request at a time. Simulated pods work this way, and so do
the other processes that a harness starts beside them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import msgpack
import zmq

from ..errors import StreamError

__all__ = ["Control", "Teller", "ToldProcess", "follow_parent"]


class Control:
    """The control socket of a process. The target's ``_op_NAME`` methods answer; an exception of theirs is the reply.

    Poll ``socket``, and call :meth:`answer` when it is readable. For one thread.
    """

    def __init__(self, context: zmq.Context[Any], target: object, host: str = "127.0.0.1", port: int = 0) -> None:
        self._target = target
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(f"tcp://{host}:{port or '*'}")
        self.endpoint = cast(bytes, self.socket.last_endpoint).rstrip(b"\0").decode()

    def answer(self) -> None:
        """Receive one request and answer it."""
        try:
            question = msgpack.unpackb(self.socket.recv(), strict_map_key=False)
            reply = getattr(self._target, f"_op_{question.pop('op')}")(**question)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        self.socket.send(msgpack.packb(reply))

    def close(self) -> None:
        self.socket.close(0)


class Teller:
    """A client of a :class:`Control` within the same process. Any thread may call it; the calls run one at a time.

    :meth:`ask` raises ValueError with the error that the control answered.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(endpoint)

    def ask(self, op: str, **what: Any) -> dict[str, Any]:
        with self._lock:
            self._socket.send(msgpack.packb({"op": op, **what}))
            # Polls in short turns, so that close() does not wait for a caller that will get no answer any more.
            while not self._closed and not self._socket.poll(100):
                pass
            if self._closed:
                raise ValueError("the pod is stopping")
            reply: dict[str, Any] = msgpack.unpackb(self._socket.recv(), strict_map_key=False)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def close(self) -> None:
        self._closed = True
        with self._lock:
            self._socket.close(0)


def follow_parent(ended: Callable[[], object]) -> None:
    """Call ``ended`` from a thread when the process at the other end of stdin is gone, even by SIGKILL."""

    def follow() -> None:
        sys.stdin.read()
        ended()

    threading.Thread(target=follow, daemon=True).start()


class ToldProcess:
    """The parent's handle of a process: start it, send it requests, pause it, kill it, start it again.

    ``command`` is the command line; ``prefix`` comes before it (``["ip", "netns", "exec", "a"]``), and ``env`` is added
    to the environment. As a context manager it leaves no process behind. For one thread at a time. Raises
    :class:`StreamError` when the process does not come up, does not answer within ``timeout`` seconds, or answers with
    an error.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, timeout: float = 20.0, prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.ready: dict[str, Any] = {}
        self._command = list(command)
        self._timeout = timeout
        self._prefix = list(prefix)
        self._env = dict(env or {})
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._process: subprocess.Popen[str] | None = None
        try:
            self.launch()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start the process and wait until it is ready."""
        # A process group of its own: a Ctrl-C at the terminal reaches the parent only, and the parent ends the process.
        self._process = subprocess.Popen(
            [*self._prefix, *self._command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **self._env}, process_group=0,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._reap()
            raise StreamError(f"{self.name} did not come up: exit status {status}")
        self.ready = json.loads(line)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask(self, op: str, *, patience: float | None = None, **what: Any) -> dict[str, Any]:
        """Send one request and return the answer, within ``patience`` seconds (None: ``timeout``)."""
        if self._socket is None:
            self._socket = self._context.socket(zmq.REQ)
            self._socket.linger = 0
            self._socket.connect(self.ready["control"])
        self._socket.send(msgpack.packb({"op": op, **what}))
        if not self._socket.poll(int((self._timeout if patience is None else patience) * 1000)):
            self._hang_up()
            raise StreamError(f"{self.name} does not answer {op!r}")
        reply: dict[str, Any] = msgpack.unpackb(self._socket.recv(), strict_map_key=False)
        if "error" in reply:
            raise StreamError(f"{self.name}: {reply['error']}")
        return reply

    def kill(self) -> None:
        """Kill the process with SIGKILL, as a crash does."""
        self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """Suspend the process with its sockets open, as a hanging process leaves them."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the process and close the handle. Has no effect on a process that has ended."""
        self.kill()
        if not self._context.closed:
            self._context.term()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None

    def _reap(self) -> None:
        self._hang_up()
        if self._process is not None:
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

"""Look-ups of names, in threads of their own: :class:`Resolver`."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, TypeAlias

from .addresses import is_address, join_tcp, split_tcp

__all__ = ["Resolver"]

Then: TypeAlias = Callable[[str | None, str], None]

# A look-up may take as long as the system's name servers may be silent, 5 s each. One name without an answer must not
# hold up all others, and 300 of them must not be 300 threads.
THREADS: Final = 4


class Resolver:
    """Finds the addresses of endpoints' hosts, in a few threads that all pods of a manager share.

    libzmq would look names up in its single I/O thread, where a name server that does not answer stops every stream of
    the process, heartbeats included. A name is looked up again for every connection, because pods move. Callers that
    request a name during its look-up share the answer. :meth:`close` does not wait for look-ups, because nothing can
    interrupt one.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._waiting: dict[str, list[tuple[int, Then]]] = {}
        self._lock = threading.Lock()
        self._threads = self._idle = 0
        self._closed = False

    def resolve(self, endpoint: str, then: Then) -> None:
        """Call ``then(endpoint with an address, "")``, or ``then(None, error)``, possibly in another thread."""
        parts = split_tcp(endpoint)
        if parts is None or is_address(parts[0]):
            then(endpoint, "")
            return
        with self._lock:
            if self._closed:
                return
            host, port = parts
            waiting = self._waiting.setdefault(host, [])
            waiting.append((port, then))
            if len(waiting) > 1:
                return
            self._asked.put(host)
            if self._idle < len(self._waiting) and self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._run, name="kvindex-resolver", daemon=True).start()

    def close(self) -> None:
        """End the threads after their look-ups, whose answers are dropped."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            for _ in range(self._threads):
                self._asked.put(None)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            host = self._asked.get()
            with self._lock:
                self._idle -= 1
                if host is None or self._closed:
                    return
            found, error = _look_up(host)
            with self._lock:
                waiting = self._waiting.pop(host, [])
            for port, then in waiting:
                then(join_tcp(random.choice(found), port) if found else None, error)


def _look_up(host: str) -> tuple[list[str], str]:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return [], f"{host} resolves to nothing: {error}"
    # Publishers bind IPv4 wildcards by default. Among several addresses, each attempt takes another one.
    addresses = [str(entry[4][0]) for entry in entries if entry[0] == socket.AF_INET]
    return addresses or [str(entry[4][0]) for entry in entries], ""

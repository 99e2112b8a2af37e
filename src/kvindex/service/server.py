"""The process around a :class:`Service`: its sockets, its snapshots, and its orderly shutdown."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import socket
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvicorn

from ..discovery import read_pods
from ..errors import CapacityError, KVIndexError, SnapshotError, StreamError
from ..index import PrefixIndex
from ..sync.source import PodSource
from .app import Service
from .v1 import spelled_source

__all__ = ["Server", "Snapshots", "fetched", "keep_freed_memory", "restored"]

log = logging.getLogger("kvindex.service")

# Seconds that a whole snapshot may take to arrive from another service.
_FETCHING: Final = 120.0


class Server:
    """Serves until :meth:`stop`, SIGINT or SIGTERM.

    Args:
        service: The service to run.
        host, port: The TCP address to listen on; port 0 takes any free port, and a host of None turns TCP off.
        uds: Path of a Unix socket, in addition to TCP or instead of it.
        uds_mode: File mode of the Unix socket, which determines the users that may connect.
        ssl: Options of uvicorn that begin with ``ssl_``, for the TCP socket; a Unix socket is never encrypted.
        max_connections: The most connections; beyond them, uvicorn answers 503.

    Raises:
        OSError: An address cannot be bound.
    """

    def __init__(
        self, service: Service, *, host: str | None = "127.0.0.1", port: int = 8090, uds: str | None = None,
        uds_mode: int = 0o660, ssl: Mapping[str, Any] | None = None, max_connections: int = 16384,
    ) -> None:  # fmt: skip
        self.uds = uds
        self._service = service
        self._tcp: socket.socket | None = None
        self._unix: socket.socket | None = None
        if host is not None:
            self._tcp = _listening(host, port)
        if uds is not None:
            self._unix = _unix_socket(uds, uds_mode)
        given = {name: value for name, value in (ssl or {}).items() if value is not None}
        config = uvicorn.Config(
            service, log_level="warning", lifespan="on", access_log=False, server_header=False, date_header=False,
            limit_concurrency=max_connections, backlog=2048, timeout_keep_alive=75,
            timeout_graceful_shutdown=5, proxy_headers=False, **given,
        )  # fmt: skip
        scheme = "https" if given else "http"
        self.url = f"{scheme}://{_shown(self._tcp)}" if self._tcp is not None else None
        self._server = _Uvicorn(config, self._unix)

    def run(self) -> None:
        """Serve in this thread."""
        try:
            self._server.run(sockets=[self._tcp] if self._tcp is not None else [])
        finally:
            for sock in (self._tcp, self._unix):
                if sock is not None:
                    sock.close()
            if self.uds is not None:
                with suppress(OSError):
                    os.unlink(self.uds)

    def stop(self) -> None:
        """Stop serving, from any thread. Requests in progress have 5 seconds to finish."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn with a Unix socket beside the others; the Unix socket never uses TLS."""

    def __init__(self, config: uvicorn.Config, unix: socket.socket | None) -> None:
        super().__init__(config)
        self._unix = unix

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._unix is not None and self.started:
            loop = asyncio.get_running_loop()
            self.servers.append(await loop.create_unix_server(self._protocol, sock=self._unix, backlog=2048))

    def _protocol(self) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[no-any-return]


def keep_freed_memory(most: int = 32 << 20) -> None:
    """Have the C library keep up to ``most`` freed bytes of this process for the next request.

    Otherwise glibc returns the pages of each large body to the system and requests them again: 0.1 of 0.23 ms of
    processor time for a body of 230 kB that is only read. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, from malloc.h.
        mallopt(-3, most)
        mallopt(-1, most)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def _shown(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unix_socket(path: str, mode: int) -> socket.socket:
    # A socket that a killed process left behind is removed. Any other file belongs to another program.
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(f"{path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise FileExistsError(f"{path} is the socket of a process that listens")
    sock = socket.socket(socket.AF_UNIX)
    try:
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(2048)
    except BaseException:
        sock.close()
        raise
    return sock


class Snapshots:
    """Keeps a service's index and its registrations in files: ``FILE``, and ``FILE.pods.json``."""

    def __init__(self, service: Service, path: str, every: float) -> None:
        self._service, self._path, self._every = service, path, every

    async def run(self) -> None:
        """Save at each interval. An error of the disk is logged, and the next interval tries again."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await asyncio.to_thread(self.save)
            except (KVIndexError, OSError) as error:
                log.error("%s", error)

    def save(self) -> None:
        """Write both files, each as a whole. Raises SnapshotError or OSError; a file that
        fails keeps its old content."""
        pods = [spelled_source(source) for source in self._service.v1.registered()]
        self._service.index.save(self._path)
        target = pods_file(self._path)
        beside = f"{target}.{os.getpid()}"
        try:
            Path(beside).write_text(json.dumps(pods))
            os.replace(beside, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise


def pods_file(path: str) -> str:
    return f"{path}.pods.json"


def restored(path: str, options: Mapping[str, Any], block_size: int) -> tuple[PrefixIndex | None, list[PodSource]]:
    """Return the index and the registrations from the files of :class:`Snapshots`; None and [] if nothing can be used.
    The reason is logged: a service that starts empty is better than one that does not start."""
    index = _loaded(path, options, block_size) if os.path.exists(path) else None
    pods: list[PodSource] = []
    if os.path.exists(pods_file(path)):
        try:
            pods = list(read_pods(pods_file(path)).values())
        except (KVIndexError, OSError) as error:
            log.error("the registered pods are not restored: %s", error)
    return index, pods


def fetched(
    url: str, token: str | None, options: Mapping[str, Any], block_size: int
) -> tuple[PrefixIndex | None, list[PodSource]]:  # fmt: skip
    """The same from a running service. An answer that cannot be used is logged as well."""
    with tempfile.TemporaryDirectory() as folder:
        path, pods = f"{folder}/snapshot", f"{folder}/pods.json"
        try:
            _fetch(f"{url.rstrip('/')}/v1/snapshot", token, path)
            _fetch(f"{url.rstrip('/')}/v1/sources", token, pods)
            return _loaded(path, options, block_size), list(read_pods(pods).values())
        except (KVIndexError, OSError) as error:
            log.error("nothing is taken over: %s", error)
            return None, []


def _loaded(path: str, options: Mapping[str, Any], block_size: int) -> PrefixIndex | None:
    try:
        index = PrefixIndex.load(path, **options)
    except (SnapshotError, CapacityError) as error:
        log.error("the snapshot is left out: %s", error)
        return None
    if index.block_size != block_size:
        log.error("the snapshot is left out: its blocks have %d tokens, not %d", index.block_size, block_size)
        return None
    return index


def _fetch(url: str, token: str | None, path: str) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with (
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_FETCHING) as answer,
            open(path, "wb") as file,
        ):
            expected = int(answer.headers.get("content-length", -1))
            while piece := answer.read(1 << 20):
                file.write(piece)
            if expected not in (-1, file.tell()):
                raise StreamError(f"{url} ended after {file.tell():,} of {expected:,} bytes")
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        error.close()
        raise StreamError(f"{url} answered {error.code}: {said}") from None
    except (OSError, ValueError) as error:
        raise StreamError(f"{url} cannot be asked: {getattr(error, 'reason', error)}") from None

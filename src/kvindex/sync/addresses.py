"""Addresses of sockets as text: their validation and their comparison."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final

from ..arguments import sendable
from ..errors import InvalidTypeError, InvalidValueError

__all__ = [
    "WILDCARDS", "bind_endpoint", "check_endpoint", "is_address", "join_tcp", "offset_endpoint", "same_endpoint",
    "split_tcp",
]  # fmt: skip

_TCP: Final = re.compile(r"tcp://(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})/?")
WILDCARDS: Final = ("*", "0.0.0.0", "::", "[::]", "")
"""Hosts that can be bound and cannot be connected to."""


def check_endpoint(endpoint: str, whose: str) -> None:
    """Refuse an endpoint that cannot be connected to. The error names its owner, ``whose``."""
    sendable(endpoint, f"an endpoint of {whose}")
    if endpoint.startswith(("ipc://", "inproc://")) and len(endpoint.partition("://")[2]) > 0:
        return
    found = _TCP.fullmatch(endpoint)
    if found is None:
        remedy = ""
        if endpoint.startswith(("http://", "https://")):
            remedy = "; for the URL of a server use PodSource.from_vllm or PodSource.from_sglang"
        raise InvalidValueError(
            f"{whose}: {endpoint!r} is not an endpoint: tcp://host:port, ipc://path or inproc://name{remedy}"
        )
    host, port = found["v6"] or found["host"], int(found["port"])
    if host in WILDCARDS:
        raise InvalidValueError(f"{whose}: {endpoint} is what a publisher binds; name the host that it runs on")
    if not 0 < port <= 65535:
        raise InvalidValueError(f"{whose}: port {port} of {endpoint} is not in 1..65535")


def bind_endpoint(endpoint: str) -> str:
    """Check an endpoint to bind. The host or the port may also be a wildcard."""
    if not isinstance(endpoint, str):
        raise InvalidTypeError(f"an endpoint to bind is a str, not {type(endpoint).__name__}")
    sendable(endpoint, "an endpoint to bind")
    if endpoint.startswith(("ipc://", "inproc://")) or _TCP.fullmatch(endpoint):
        return endpoint
    if re.fullmatch(r"tcp://[^\s/]+:(\*|\d{1,5})", endpoint):
        return endpoint
    raise InvalidValueError(f"{endpoint!r} is not an endpoint to bind: tcp://*:port, tcp://address:port, ipc://path")


def split_tcp(endpoint: str) -> tuple[str, int] | None:
    """Return ``(host, port)`` of a tcp endpoint, None for any other."""
    found = _TCP.fullmatch(endpoint)
    return None if found is None else (found["v6"] or found["host"], int(found["port"]))


def same_endpoint(endpoint: str) -> str:
    """Return one spelling for all spellings of an endpoint that can be compared without a look-up."""
    at = split_tcp(endpoint)
    if at is None:
        return endpoint
    host = at[0].lower()
    return join_tcp(str(ipaddress.ip_address(host)) if is_address(host) and "%" not in host else host, at[1])


def join_tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def offset_endpoint(endpoint: str, rank: int, whose: str) -> str:
    """Return the endpoint of another rank: its port is higher by the rank, as in vLLM and SGLang."""
    if (found := _TCP.fullmatch(endpoint)) is not None:
        port = int(found["port"]) + rank
        if port > 65535:
            raise InvalidValueError(f"rank {rank} of {whose} would be at port {port} of {endpoint}")
        return endpoint[: found.start("port")] + str(port)
    if endpoint.startswith("inproc://"):
        return f"{endpoint}_dp{rank}"
    raise InvalidValueError(
        f"{endpoint} of {whose} has no port to count ranks by: say where each of them is, by ranks={{...}}"
    )


@lru_cache(4096)  # two hosts per pod, checked at each connection and replay
def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True

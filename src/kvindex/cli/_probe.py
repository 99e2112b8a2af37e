"""A probe of the address of a stream that does not start: :func:`what_answers`."""

from __future__ import annotations

import socket
import struct
import time
from typing import Final

__all__ = ["what_answers"]

# ZMTP 3 (rfc.zeromq.org/spec/23): the greeting of a peer without security. The other side answers with a greeting and a
# command that names the type of its socket, which libzmq's API does not report. The probe sends nothing more, so no
# handshake fails. A socket with keys closes this connection. It answers a CURVE greeting with its own greeting, and
# sends nothing else before it has received the client's key.
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_KEYED: Final = _GREETING.replace(b"NULL\0", b"CURVE")
_SOCKET_TYPE: Final = b"\x0bSocket-Type"


def what_answers(host: str, port: int, timeout: float) -> str:
    """The type of the ZMQ socket at an address: ``PUB``, ``ROUTER``, …, or ``CURVE`` for any encrypted socket.

    Without a ZMQ socket it is one of ``HTTP``, ``silence``, ``something else``, ``refused``, ``no answer`` and
    ``unknown host``. Blocks for up to a few times ``timeout``.
    """
    try:
        found = _ask(host, port, timeout, _GREETING)
        if found.startswith(b"HTTP/"):
            return "HTTP"
        kind = _socket_type(found)
        if not kind and found[:1] in (b"\xff", b"") and _KEYED[12:17] == _ask(host, port, timeout, _KEYED)[12:17]:
            return "CURVE"
        if found[:1] == b"\xff" and found[9:10] == b"\x7f":
            return kind or "something else"
        if not found:
            # Some servers send an error only after the end of a line.
            found = _ask(host, port, timeout, b"GET / HTTP/1.0\r\n\r\n")
            return "HTTP" if found.startswith(b"HTTP/") else "something else" if found else "silence"
    except socket.gaierror:
        return "unknown host"
    except ConnectionRefusedError:
        return "refused"
    except UnicodeError:  # a label of a host name that is too long
        return "unknown host"
    except OSError:
        return "no answer"
    return "something else"


def _ask(host: str, port: int, timeout: float, question: bytes) -> bytes:
    """The answer to ``question``: until the part that matters is complete, the peer closes, or ``timeout``."""
    said = b""
    with socket.create_connection((host, port), timeout) as sock:
        until = time.monotonic() + timeout
        try:
            sock.sendall(question)
            while len(said) < 4096 and time.monotonic() < until:
                sock.settimeout(max(0.01, until - time.monotonic()))
                more = sock.recv(4096)
                if not more:
                    break
                said += more
                if _socket_type(said) or (question is _KEYED and len(said) >= len(_KEYED)) or said.startswith(b"HTTP/"):
                    break
        except (TimeoutError, ConnectionError):
            pass
    return said


def _socket_type(said: bytes) -> str:
    place = said.find(_SOCKET_TYPE, len(_GREETING)) + len(_SOCKET_TYPE)
    if place < len(_GREETING) or len(said) < place + 4:
        return ""
    (length,) = struct.unpack_from(">I", said, place)
    return said[place + 4 :].decode("ascii", "replace")[:length] if len(said) >= place + 4 + length else ""

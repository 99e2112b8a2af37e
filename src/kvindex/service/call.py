"""One HTTP call: its authorization, its limits, and its errors as JSON with field and reason. It has no routes."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import logging
import re
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .._core import lift_tokens
from ..errors import CapacityError, InvalidTypeError, InvalidValueError, KVIndexError

__all__ = ["Endpoint", "Gate", "Limits", "Refused", "encode", "refusal"]

log = logging.getLogger("kvindex.service")

encode: Final = msgspec.json.Encoder().encode
JSON: Final = (b"content-type", b"application/json")
BINARY: Final = b"application/octet-stream"
_CLOSE: Final = {"connection": "close"}
# The most that is read of a body that is too large, in multiples of the limit.
_DISCARDED: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one service. A request beyond a limit is refused and does not affect others."""

    max_body: int = 8 << 20
    """Bytes of one body: a million token ids as JSON. Beyond it: 413."""
    max_tokens: int = 1 << 20
    """Tokens, or hashes, of one prompt. Beyond it: 413."""
    max_in_flight: int = 1024
    """Requests whose body has arrived and whose answer is not finished. Beyond it: 503."""
    max_receiving: int = 256 << 20
    """Bytes of bodies that have arrived in part. Beyond it: 503."""
    body_seconds: float = 10.0
    """Seconds that a body may take to arrive. Beyond them: 408."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        reason: str,
        error: str,
        *,
        field: str | None = None,
        index: int | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.reason, self.field, self.index = status, reason, field, index
        self.headers, self.more = headers or {}, more or {}

    def body(self) -> bytes:
        said: dict[str, Any] = {"error": str(self), "reason": self.reason}
        if self.field is not None:
            said["field"] = self.field
        if self.index is not None:
            said["index"] = self.index
        return encode({**said, **self.more})


def _header(scope: Scope, wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            found: bytes = value
            return found
    return b""


class Gate:
    """The state that all endpoints of a service share: its limits, its token, and the requests and bytes in flight."""

    def __init__(self, limits: Limits, token: str | None) -> None:
        self.limits = limits
        self._token = None if token is None else b"Bearer " + token.encode()
        self.in_flight = 0
        self.receiving = 0

    def admit(self, scope: Scope) -> None:
        if self._token is None:
            return
        given = _header(scope, b"authorization")
        if not hmac.compare_digest(given, self._token):
            what = "the bearer token is another one" if given else "this service wants a bearer token"
            raise Refused(
                401, "unauthorized", f"{what}: send Authorization: Bearer TOKEN", field="authorization",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client has disconnected."""
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await self._read(scope, receive)
        except TimeoutError:
            raise Refused(
                408, "too_slow", f"the body took more than {self.limits.body_seconds:g} s", headers=_CLOSE
            ) from None

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self.limits.max_body
        length = int(_header(scope, b"content-length") or b"0")
        parts: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part: bytes = message.get("body", b"")
                more = message.get("more_body", False)
                size += len(part)
                if max(size, length) > most:
                    # A client that is cut off while it sends never sees the answer, so part of the
                    # rest is read and discarded.
                    if size > _DISCARDED * most:
                        break
                    self.receiving -= sum(map(len, parts))
                    parts.clear()
                    continue
                if not more and not parts:
                    return part
                parts.append(part)
                self.receiving += len(part)
                if self.receiving > self.limits.max_receiving:
                    raise Refused(
                        503, "too_many_requests",
                        f"bodies on their way take more than {self.limits.max_receiving:,} bytes",
                        headers={"retry-after": "1", **_CLOSE},
                    )  # fmt: skip
        finally:
            self.receiving -= sum(map(len, parts))
        if max(size, length) > most:
            raise Refused(
                413, "too_large", f"the body has {max(size, length):,} bytes; at most {most:,} are taken",
                headers=_CLOSE if more else {},
            )  # fmt: skip
        return b"".join(parts)


# The reasons of msgspec's error messages, by the beginning of the message.
_WRONG: Final = (
    (re.compile(r"Object missing required field `(.+?)`"), "missing"),
    (re.compile(r"Object contains unknown field `(.+?)`"), "unknown_field"),
    (re.compile(r"Expected `array.*?`, got (?!`array)"), "not_array"),
    (re.compile(r"Expected `.+?`, got"), "invalid_type"),
    (re.compile(r"Expected `.+?` (?:>|<)|.*out of range"), "out_of_range"),
)
_PLACE: Final = re.compile(r"(.*?) - at `\$\.?(.*)`", re.DOTALL)
# The argument and its position, at the beginning of an error message of the index.
_ARGUMENT: Final = re.compile(r"(\w+)(?:\[(\d+)\])?(?= )")


def invalid(error: msgspec.ValidationError) -> Refused:
    said, field, index = str(error), "", None
    if (placed := _PLACE.fullmatch(said)) is not None:
        said, field = placed[1], placed[2]
        if (item := re.fullmatch(r"(.*)\[(\d+)\]", field)) is not None:
            field, index = item[1], int(item[2])
    reason = "invalid_value"
    for pattern, name in _WRONG:
        if (found := pattern.match(said)) is not None:
            reason = name
            if found.groups():
                field = f"{field}.{found[1]}" if field else found[1]
            break
    return Refused(400, reason, str(error), field=field or None, index=index)


def refusal(error: BaseException, names: Mapping[str, str]) -> Refused:
    """The answer to an exception of a handler. ``names`` maps arguments of the index to fields of the request."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (CapacityError, MemoryError)):
        return Refused(503, "no_memory", str(error) or "no memory", headers={"retry-after": "1"})
    if isinstance(error, (InvalidTypeError, InvalidValueError)):
        found = _ARGUMENT.match(str(error))
        field = found and names.get(found[1], found[1])
        index = int(found[2]) if found and found[2] else None
        reason = "invalid_type" if isinstance(error, InvalidTypeError) else "invalid_value"
        return Refused(400, reason, str(error), field=field, index=index)
    if isinstance(error, KVIndexError):
        return Refused(409, "conflict", str(error))
    log.error("a request could not be answered", exc_info=error)
    return Refused(500, "internal", "this is a fault of the service; its log has the rest")


class Endpoint:
    """The ASGI application of one path.

    It uses ASGI directly, because starlette's Request and Response cost as much as a match.

    Args:
        gate, figures: Those of the service.
        path: The path's name in the figures.
        call: The handler. It gets the request (an object of ``body``, a struct of ``query``, or nothing) and returns
            bytes of JSON, ``(status, bytes)``, a Response, or an awaitable of these.
        body: The struct that the body is decoded as; None for a call without a body.
        query: The struct that the query string is read as.
        binary: Decoder of a body of type BINARY, which replaces the struct's field ``tokens``. The other fields are
            then in the query string.
        free: Whether the call is answered without the token.
        names: As for :func:`refusal`.
    """

    def __init__(
        self,
        gate: Gate,
        figures: Any,
        path: str,
        call: Callable[..., Any],
        *,
        body: type[msgspec.Struct] | None = None,
        query: type[msgspec.Struct] | None = None,
        binary: Callable[[bytes], Any] | None = None,
        free: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._gate, self._path, self._call = gate, path, call
        self._figures = figures
        self._body, self._query, self._binary, self._free = body, query, binary, free
        self._decode = msgspec.json.Decoder(body).decode if body is not None else None
        fields = body.__struct_fields__ if body is not None else ()
        self._tokens = next((name for name in ("tokens", "token_ids") if name in fields), None)
        self._names = names or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status, headers = 200, [JSON]
        answer: Any = b""
        try:
            answer = await self._answer(scope, receive)
            if answer is None:
                return
            if isinstance(answer, tuple):
                status, answer = answer
        except Exception as error:
            refused = refusal(error, self._names)
            status, answer = refused.status, refused.body()
            headers += [(name.encode(), value.encode()) for name, value in refused.headers.items()]
        if isinstance(answer, Response):
            status = answer.status_code
            await answer(scope, receive, send)
        else:
            headers.append((b"content-length", b"%d" % len(answer)))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": answer})
        self._figures.served(self._path, scope["method"], status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive) -> Any:
        gate = self._gate
        if not self._free:
            gate.admit(scope)
        asked: tuple[Any, ...] = ()
        if self._body is not None:
            data = await gate.read(scope, receive)
            if data is None:
                return None
            asked = (self._parsed(scope, data),)
        elif self._query is not None:
            asked = (_of_query(scope["query_string"], self._query),)
        if gate.in_flight >= gate.limits.max_in_flight:
            raise Refused(
                503, "too_many_requests", f"{gate.in_flight:,} requests are being answered",
                headers={"retry-after": "1"},
            )  # fmt: skip
        answer = self._call(*asked)
        if isinstance(answer, bytes) or not inspect.isawaitable(answer):
            return answer
        gate.in_flight += 1
        try:
            return await answer
        finally:
            gate.in_flight -= 1

    def _parsed(self, scope: Scope, data: bytes) -> Any:
        assert self._decode is not None
        if self._binary is not None and _header(scope, b"content-type") == BINARY:
            asked = copy(_of_query(scope["query_string"], self._body))
            asked.tokens = self._binary(data)
            return asked
        # Decoding to a list of ints takes four times as long as to an array. lift_tokens leaves anything that is not an
        # array of token ids to the decoder, which refuses it.
        name = self._tokens
        lifted = None if name is None else lift_tokens(data, name.encode())
        try:
            if name is None or lifted is None:
                return self._decode(data)
            tokens, rest = lifted
            asked = self._decode(rest)
            setattr(asked, name, tokens)
            return asked
        except msgspec.ValidationError as error:
            raise invalid(error) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refused(400, "invalid_json", f"the body is not JSON: {error}") from None


@lru_cache(256)
def _of_query(query: bytes, struct: Any) -> Any:
    """Parse a query string as a struct. It is cached and shared: clients repeat their query strings, and parsing one
    takes as long as the match."""
    given: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except (UnicodeDecodeError, ValueError) as error:
        raise Refused(400, "invalid_value", f"the query string cannot be read: {error}", field="query") from None
    for name, value in pairs:
        if name in ("pods",):
            given.setdefault(name, []).append(value)
        elif name in given:
            raise Refused(400, "invalid_value", f"{name} is given twice", field=name)
        else:
            given[name] = value
    try:
        return msgspec.convert(given, struct, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from None

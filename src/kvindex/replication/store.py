"""The requests of the state machines, as a Redis-protocol server carries them out, over redis-py."""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

from ..errors import InvalidValueError
from .entries import Id, id_text, parse_id
from .requests import (
    Append,
    Claim,
    Drop,
    Fail,
    Get,
    Put,
    Read,
    Refused,
    Release,
    Renew,
    ReplicationPolicy,
    Tip,
    Trim,
)

try:
    import redis
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError("kvindex.replication needs redis-py: pip install 'kvindex[redis]'") from error

__all__ = ["Store", "entries_of"]

R = TypeVar("R")

_OLDEST: Final = (6, 2)
_FIELD: Final = b"e"


class Store(Generic[R]):
    """One connection, one request at a time. ``server`` is a URL for ``redis.Redis.from_url``, or a client of redis-py,
    such as ``Sentinel(...).master_for(...)``."""

    def __init__(
        self, server: str | redis.Redis, fleet: str, shard: int, policy: ReplicationPolicy, timeout: float = 1.0
    ) -> None:
        if isinstance(server, str):
            try:
                self._client = redis.Redis.from_url(
                    server, socket_timeout=timeout, socket_connect_timeout=timeout, protocol=2,
                    retry=Retry(NoBackoff(), 0), client_name="kvindex",
                )  # fmt: skip
            except ValueError as error:
                raise InvalidValueError(f"no server can be reached by that URL: {error}") from None
            self._is_own = True
        else:
            self._client, self._is_own = server, False
        self._policy = policy
        # In braces, so that a cluster keeps these keys together.
        prefix = f"{{kv:{fleet}:{shard}}}:"
        self._log, self._lease, self._pointer, self._piece = (
            f"{prefix}{name}" for name in ("log", "lease", "snap", "snap:")
        )
        self._connection: Any = None
        self.read_bytes = self.written_bytes = self.refused = 0
        """Bytes of the data of entries, and the number of entries that the server refused."""

    @property
    def name(self) -> str:
        """The server's address, without secrets."""
        options = self._client.connection_pool.connection_kwargs
        if "path" in options:
            return str(options["path"])
        return f"{options.get('host', 'sentinel')}:{options.get('port', '')}"

    def do(self, request: R) -> Any:
        """Carry out a request. Returns its answer, or a :class:`Fail`. Faults of the server raise no exception."""
        try:
            return self._do(request)
        except exceptions.AuthenticationError as error:
            return self._failed("denied", f"{self.name} does not let us in: {error}")
        except exceptions.NoPermissionError as error:
            return Fail("denied", f"{self.name} does not allow it: {error}")
        except exceptions.ReadOnlyError as error:
            # The server has become a replica. Another connection is made, to the address that Sentinel returns.
            return self._failed("readonly", f"{self.name} is read-only: {error}")
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            return self._failed("unreachable", f"{self.name} cannot be reached: {error}")
        except exceptions.OutOfMemoryError as error:
            return Fail("full", f"{self.name} has no memory: {error}")
        except exceptions.ResponseError as error:
            if "OOM" in str(error):
                return Fail("full", f"{self.name} has no memory: {error}")
            return Fail("other", f"{self.name} refuses {type(request).__name__}: {error}")
        except exceptions.RedisError as error:
            return self._failed("other", f"{self.name}: {error!r}")
        except _Old as error:
            return self._failed("old", str(error))

    def _failed(self, kind: Any, reason: str) -> Fail:
        self.drop()
        return Fail(kind, reason)

    def drop(self) -> None:
        """End the connection. The next request makes another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                # It does not go back to the pool as it is: an answer may be on its way.
                connection.connection.disconnect()
                connection.close()
            except Exception:  # it is closed in either case
                pass

    def close(self) -> None:
        self.drop()
        if self._is_own:
            self._client.close()

    def _connect(self) -> Any:
        connection: Any = self._client.client()  # type: ignore[no-untyped-call]
        # A connection that redis-py makes again by itself may lead to another server, with another log.
        connection.connection.retry = Retry(NoBackoff(), 0)
        self._connection = connection
        try:
            version = connection.execute_command("INFO", "server")["redis_version"]
        except exceptions.NoPermissionError:
            return connection
        if tuple(int(part) for part in str(version).split(".")[:2]) < _OLDEST:
            raise _Old(f"{self.name} is version {version}; {'.'.join(map(str, _OLDEST))} or later is needed")
        return connection

    def _do(self, request: Any) -> Any:
        do = (self._connection or self._connect()).execute_command
        match request:
            case Read(after, most, block):
                found = do("XREAD", "COUNT", most, "BLOCK", max(1, round(block * 1e3)), "STREAMS", self._log,
                           id_text(after))  # fmt: skip
                entries = [(parse_id(id), fields.get(_FIELD, b"")) for id, fields in entries_of(found)]
                self.read_bytes += sum(len(data) for _, data in entries)
                return entries
            case Append(id, data, make):
                try:
                    done = do("XADD", self._log, *(() if make else ("NOMKSTREAM",)), "MAXLEN", "~",
                              self._policy.max_length, id_text(id), _FIELD, data)  # fmt: skip
                except exceptions.ResponseError as error:
                    if "equal or smaller" not in str(error):
                        raise
                    done = None
                if done is None:
                    self.refused += 1
                    return Refused()
                self.written_bytes += len(data)
                return True
            case Tip():
                return self._tip(do)
            case Claim(writer, seconds):
                return bool(do("SET", self._lease, writer, "NX", "PX", round(seconds * 1e3)))
            case Renew(writer, seconds):
                return self._change_lease(do, writer, ("PEXPIRE", self._lease, round(seconds * 1e3)))
            case Release(writer):
                return self._change_lease(do, writer, ("DEL", self._lease))
            case Get(key):
                return do("GET", self._key(key))
            case Put(key, data):
                # Pieces that a collector leaves behind unfinished expire by themselves.
                expiry = ("EX", 3600) if key else ()
                return bool(do("SET", self._key(key), data, *expiry))
            case Drop(keys):
                return bool(do("DEL", *map(self._key, keys)))
            case Trim(before):
                do("XTRIM", self._log, "MINID", "~", id_text(before))
                return True
        raise AssertionError(request)

    def _key(self, key: str) -> str:
        return self._piece + key if key else self._pointer

    def _tip(self, do: Any) -> Id | None:
        try:
            found = do("XINFO STREAM", self._log)
        except exceptions.ResponseError as error:
            if "no such key" in str(error):
                return None
            raise
        return parse_id(found["last-generated-id"])

    def _change_lease(self, do: Any, writer: str, change: tuple[Any, ...]) -> bool | None:
        """Whether the lease was this writer's and is changed; None if there is no lease."""
        do("WATCH", self._lease)
        holder = do("GET", self._lease)
        if holder is None or holder != writer.encode():
            do("UNWATCH")
            return None if holder is None else False
        do("MULTI")
        do(*change)
        return True if do("EXEC") else None


class _Old(Exception):
    pass


def entries_of(found: Any) -> Any:
    """Return the entries of an XREAD of one stream."""
    if not found:
        return ()
    (entries,) = found.values() if isinstance(found, dict) else (pair[1] for pair in found)
    return entries[0] if isinstance(found, dict) and entries and isinstance(entries[0], list) else entries

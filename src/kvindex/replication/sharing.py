"""Speculative entries and reservations of one router, shared with the others by a second stream in the same server."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import KVIndexError, UnknownPodError
from ..index import PrefixIndex
from .hints import (
    BEAT,
    BLOCKS,
    SILENT,
    Begun,
    Effect,
    Finished,
    Held,
    Item,
    Key,
    Left,
    Outbox,
    Peers,
    Prefilled,
    encode,
    listed,
)  # fmt: skip
from .requests import Fail, ReplicationPolicy
from .store import Store, entries_of

if TYPE_CHECKING:
    import redis

    from ..routing import Choice, EndpointPicker

__all__ = ["Sharing", "SharingStatus"]

log = logging.getLogger("kvindex.replication")

#: Entries of the stream. They take some 64 MB at most, if each is full.
LENGTH: Final = 2000
#: Seconds for which beginnings and ends of requests wait for others: waking up for an entry costs a reader as much as
#: ten of them. New prefixes do not wait.
LINGER: Final = 0.05
#: Least time between entries of a router, and between reads. With 0.01, 0.001 and 0.001 s for these three, 225 requests
#: a second took each of eight routers 426 us a request.
WRITE_PACE: Final = 0.002
READ_PACE: Final = 0.005
#: Seconds between looks at the server's clock.
CLOCK_EVERY: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingStatus:
    """The requests that a router shares with the others (``share=True``). Counters since its start."""

    reason: str
    """Why entries are not written or read at the moment; empty if they are."""
    routers: int
    """Other routers that have sent an entry in the last 15 s."""
    requests: int
    """Requests of these routers that count in the loads of this router's pickers."""
    written: int
    """Entries written."""
    read: int
    """Entries of others read."""
    written_bytes: int
    """Bytes of entries written."""
    read_bytes: int
    """Bytes of entries read, its own included."""
    dropped: int
    """Items that were not written, because the server was unavailable or full, or did not keep up."""
    refused: dict[str, int] = field(default_factory=dict)
    """Items and entries of others without an effect, by reason: ``unknown_pod``, ``unknown_worker``, ``damaged``,
    ``version``, ``settings``, ``late``, ``repeated``, ``full``."""


class _Clock(NamedTuple):
    """The server's time, in seconds since 1970."""


class _Hear(NamedTuple):
    after: bytes


class _Tell(NamedTuple):
    data: bytes


class _Store(Store[_Clock | _Hear | _Tell]):
    """A connection of its own, so that a read that waits delays no other request."""

    def __init__(self, server: str | redis.Redis, fleet: str, policy: ReplicationPolicy) -> None:
        super().__init__(server, fleet, 0, policy)
        self._stream, self._block = f"{{kv:{fleet}}}:share", max(1, round(policy.beat * 1e3))

    def _do(self, request: Any) -> Any:
        do = (self._connection or self._connect()).execute_command
        match request:
            case _Hear(after):
                found = do("XREAD", "COUNT", 256, "BLOCK", self._block, "STREAMS", self._stream, after)
                return [(id, fields.get(b"e", b"")) for id, fields in entries_of(found)]
            case _Tell(data):
                return do("XADD", self._stream, "MAXLEN", "~", LENGTH, "*", "e", data)
            case _Clock():
                seconds, microseconds = do("TIME")
                return int(seconds) + int(microseconds) / 1e6
        raise AssertionError(request)


class Line:
    """The line of one picker: its requests go out, and those of other routers come in. Calls neither wait nor raise."""

    def __init__(self, sharing: Sharing, picker: EndpointPicker, number: int) -> None:
        self._sharing, self.picker, self._number = sharing, picker, number << 40

    def began(self, choice: Choice, ttl: float) -> None:
        self._sharing.put(Begun(self._number | choice.id, choice.pod, choice.rank, choice._waits, choice._context, ttl))

    def prefilled(self, choice: Choice) -> None:
        self._sharing.put(Prefilled(self._number | choice.id))

    def finished(self, choice: Choice) -> None:
        self._sharing.put(Finished(self._number | choice.id))

    def held(self, pod: str, rank: int, model: str, tokens: Any, keys: tuple[Any, Any, Any], ttl: float) -> None:
        self._sharing.held(pod, rank, model.encode("utf-8", "surrogateescape"), tokens, keys, ttl)

    def take(self, key: Key, item: Begun | Finished | Prefilled) -> bool:
        """Apply an effect to the picker. Returns False if the picker does not have the worker."""
        match item:
            case Begun(_, pod, rank, prefill, context):
                return self.picker._other_began(key, pod, rank, prefill, context)
            case Prefilled():
                self.picker._other_prefilled(key)
            case Finished():
                self.picker._other_finished(key)
        return True

    def open(self) -> list[int]:
        return [self._number | id for id in self.picker._open_ids()]

    def close(self) -> None:
        self._sharing.leave(self)


_SHARING: weakref.WeakSet[Sharing] = weakref.WeakSet()


def _in_child() -> None:
    # The threads, and the locks that they held, are the parent's.
    for each in list(_SHARING):
        each._lock, each._stop = threading.Lock(), threading.Event()
        each._stop.set()
        each._reasons = dict.fromkeys(each._reasons, "its threads are in the process that this one was forked from")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class Sharing:
    """One thread writes the items that callers leave in a queue, another one reads. Everything here is best effort."""

    def __init__(
        self, server: str | redis.Redis, fleet: str, policy: ReplicationPolicy, index: PrefixIndex
    ) -> None:  # fmt: skip
        self.index = index
        self.fleet = fleet
        self._settings = zlib.crc32(f"{index.block_size}:{index.hash_seed}".encode())
        self._writer = secrets.token_bytes(8)
        self._peers = Peers(self._writer, self._settings)
        self._outbox = Outbox()
        self._policy = policy
        self._to, self._from = (_Store(server, fleet, policy) for _ in range(2))
        self._lock = threading.Lock()  # of the entries that are read, and of the lines
        self._lines: list[Line] = []  # replaced at each change
        self._made = 0
        self._refused: Counter[str] = Counter()
        self._dropped = self._written = 0
        self._number = 0
        self._reasons = {"written": "", "read": "not started"}
        self._stop = threading.Event()
        _SHARING.add(self)
        _SHARING.add(self)
        self._something, self._hurry = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"kvindex-share-{name}", daemon=True)
            for name, work in (("write", self._write), ("read", self._read))
        ]

    # --------------------------------------------------------------------------------------------- from any thread

    def put(self, item: Item) -> None:
        if self._stop.is_set():
            return
        self._outbox.put(item, time.monotonic())
        if not self._something.is_set():
            self._something.set()

    def held(self, pod: str, rank: int, model: bytes, tokens: Any, keys: tuple[Any, Any, Any], ttl: float) -> None:
        """Share an entry that :meth:`PrefixIndex.add_prefix` has made from these arguments. O(blocks)."""
        try:
            paths = [
                (ahead, path[: 8 * BLOCKS])
                for ahead, path in self.index._locals(pod, rank, model, tokens, keys)
                if path
            ]
        except (KVIndexError, MemoryError):  # the pod has gone
            return
        if paths and ttl > 0:
            self.put(Held(pod, rank, model.decode("utf-8", "surrogateescape"), ttl, paths))
            self._hurry.set()

    def join(self, picker: EndpointPicker) -> Line:
        """Return the line of a picker, which gets the open requests of others at once."""
        with self._lock:
            self._made += 1
            line = Line(self, picker, self._made)
            self._lines = [*self._lines, line]
            for key, item in self._peers.open():
                line.take(key, item)
        return line

    def leave(self, line: Line) -> None:
        with self._lock:
            self._lines = [each for each in self._lines if each is not line]

    def status(self) -> SharingStatus:
        """O(1)."""
        with self._lock:
            refused = dict(self._peers.refused + self._refused)
            return SharingStatus(
                reason=next(filter(None, self._reasons.values()), ""),
                routers=self._peers.routers, requests=self._peers.requests, written=self._written,
                read=self._peers.entries, written_bytes=self._to.written_bytes, read_bytes=self._from.read_bytes,
                dropped=self._dropped + self._outbox.dropped, refused=refused,
            )  # fmt: skip

    def start(self) -> None:
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def close(self) -> None:
        """Ends the threads. Requests of others no longer count here, and this router's no longer count there."""
        self._stop.set()
        self._something.set()
        self._hurry.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._to.close()
        self._from.close()
        self._reasons = {"written": "closed", "read": "closed"}
        with self._lock:
            self._carry(self._peers.leave())

    # -------------------------------------------------------------------------------------------------- its threads

    def _run(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception:
                log.exception("%s: a thread that shares has failed, and begins anew", self.fleet)
                self._stop.wait(1.0)

    def _write(self) -> None:
        listed_at, retry = 0.0, 0.0
        while True:
            is_last = self._stop.is_set()
            if not is_last:
                if not self._outbox:
                    self._something.wait(BEAT)
                if not self._hurry.is_set():
                    self._hurry.wait(LINGER)
                self._hurry.clear()
            self._something.clear()
            now = time.monotonic()
            items: list[Item] = []
            if now >= listed_at + BEAT:
                # Before the items that follow it, which may be newer than the list.
                ids = [id for line in self._lines for id in line.open()]
                # After a failure, an empty list is sent as well, to see whether the server is back.
                items += [listed(ids)] if ids or self._outbox or self._reasons["written"] else []
                listed_at = now
            items += self._outbox.take(now)
            items += [Left()] if is_last else []
            if items:
                told = _Tell(encode(self._writer, self._number, self._settings, items))
                answer = self._to.do(told)
                if isinstance(answer, Fail) and answer.kind == "unreachable":
                    # The connection may have ended since the last entry. An entry that arrives twice counts once.
                    answer = self._to.do(told)
                self._number += 1
                self._note("written", answer)
                if isinstance(answer, Fail):
                    self._dropped += len(items)
                    listed_at = -BEAT  # list again as soon as the server is back: ends may have been lost
                    retry = min(max(2 * retry, self._policy.retry[0]), self._policy.retry[1])
                else:
                    self._written += 1
                    self._to.written_bytes += len(told.data)
                    retry = 0.0
            if is_last:
                return
            self._stop.wait(max(WRITE_PACE, retry))

    def _read(self) -> None:
        place, ahead, looked_at, retry = b"", 0.0, 0.0, 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            request = _Clock() if not place or now >= looked_at + CLOCK_EVERY else _Hear(place)
            answer = self._from.do(request)
            now = time.monotonic()
            self._note("read", answer)
            if isinstance(answer, Fail):
                # The next connection may lead to another server, with another clock.
                place = b""
                retry = min(max(2 * retry, self._policy.retry[0]), self._policy.retry[1])
                answer = []
            elif type(request) is _Clock:
                ahead, looked_at, retry = answer - now, now, 0.0
                place = place or b"%d-0" % max(0, round((answer - SILENT) * 1e3))
                answer = []
            for id, data in answer:
                place = id
                self._from.read_bytes += len(data)
                age = now + ahead - int(id.partition(b"-")[0]) / 1e3
                with self._lock:
                    self._carry(self._peers.take(data, age, now))
            with self._lock:
                self._carry(self._peers.tick(now))
            self._stop.wait(max(READ_PACE if answer else 0.0, retry))

    def _note(self, what: str, answer: Any) -> None:
        reason = answer.reason if isinstance(answer, Fail) else ""
        if reason != self._reasons[what]:
            self._reasons[what] = reason
            log.log(logging.WARNING if reason else logging.INFO, "%s: sharing: %s", self.fleet,
                    f"nothing is {what}: {reason}" if reason else f"entries are {what}")  # fmt: skip

    def _carry(self, effects: list[Effect]) -> None:
        for key, item in effects:
            if isinstance(item, Held):
                self._hold(item)
                continue
            taken = [line.take(key, item) for line in self._lines]
            if not all(taken):
                self._refused["unknown_worker"] += 1

    def _hold(self, item: Held) -> None:
        model = item.model.encode("utf-8", "surrogateescape")
        until = self.index._clock() + item.ttl
        for ahead, path in item.paths:
            try:
                if path and not self.index._hint(item.pod, item.rank, model, ahead, path, until):
                    self._refused["unknown_worker"] += 1
            except UnknownPodError:
                self._refused["unknown_pod"] += 1
            except (KVIndexError, MemoryError) as error:
                self._refused["damaged" if isinstance(error, KVIndexError) else "full"] += 1

"""Requests that the routers of a fleet share: wire format, and a state machine without socket, clock or thread.

Everything here is best effort. A lost entry costs a worse choice, never a wrong state: speculative entries and loads
are no evidence of a block.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from .entries import LogError

__all__ = [
    "BEAT", "BLOCKS", "SILENT", "VERSION", "Begun", "Effect", "Finished", "Held", "Item", "Key", "Left",
    "Open", "Outbox", "Peers", "Prefilled", "decode", "encode", "is_sound", "listed",
]  # fmt: skip

VERSION: Final = 1
BEAT: Final = 5.0
"""Seconds between the lists of a router's open requests, as long as it has any."""
SILENT: Final = 3 * BEAT
"""Seconds without an entry of a router after which its requests no longer count. Older entries are not read."""
BLOCKS: Final = 8192
"""The most blocks of a prompt that are sent: 131,072 tokens at the usual 16 a block."""

# Bounds of the items that are accepted from others.
_LONGEST_HELD, _LONGEST_OPEN = 60.0, 3600.0  # seconds
_MOST_TOKENS: Final = 1 << 26  # of a request
_MOST_OPEN, _MOST_HELD, _MOST_WRITERS = 1 << 16, 1 << 20, 1 << 10  # requests, blocks, routers
_MOST_LISTED = 4096  # requests of a list

Key: TypeAlias = tuple[bytes, int]
"""``(router, request)``."""


class Held(NamedTuple):
    """A call of ``PrefixIndex.add_prefix`` by a router. The prompt is sent as local hashes, once for
    each length of lookahead."""

    pod: str
    rank: int
    model: str
    ttl: float
    paths: list[tuple[int, bytes]]


class Begun(NamedTuple):
    """A request was sent to a worker."""

    id: int
    pod: str
    rank: int
    prefill: int
    context: int
    ttl: float


class Prefilled(NamedTuple):
    id: int


class Finished(NamedTuple):
    id: int


class Open(NamedTuple):
    """All open requests of this router; None if there are too many to list. Earlier requests that are
    not listed are over."""

    ids: list[int] | None


class Left(NamedTuple):
    """The router has ended."""


Item: TypeAlias = Begun | Finished | Held | Left | Open | Prefilled
Effect: TypeAlias = tuple[Key, Begun | Finished | Held | Prefilled]
"""An effect on this process. A request ends once, by the first end that arrives."""

# Numbers are permanent. A newer version may append fields to an item, and add kinds: both are skipped.
_KINDS: Final[dict[int, type[Any]]] = {1: Held, 2: Begun, 3: Prefilled, 4: Finished, 5: Open, 6: Left}
_NUMBERS: Final = {kind: number for number, kind in _KINDS.items()}
_FIELDS: Final = {number: len(kind._fields) for number, kind in _KINDS.items()}
_pack = msgpack.Packer(unicode_errors="surrogateescape").pack


def encode(writer: bytes, number: int, settings: int, items: Iterable[Item]) -> bytes:
    """Encode one entry. O(bytes)."""
    body: bytes = _pack([writer, number, settings, [[_NUMBERS[type(item)], *item] for item in items]])
    return bytes((VERSION,)) + body


def decode(data: bytes) -> tuple[bytes, int, int, list[Item]]:
    """Decode the writer, number, settings and items of an entry. Raises :class:`LogError` if a
    value is out of range."""
    if data[:1] != bytes((VERSION,)):
        raise LogError(f"an entry of a router has version {data[0] if data else 0}, this kvindex reads {VERSION}")
    try:
        writer, number, settings, listed = msgpack.unpackb(
            memoryview(data)[1:], unicode_errors="surrogateescape", strict_map_key=False
        )[:4]
        items = [_KINDS[kind](*fields[: _FIELDS[kind]]) for kind, *fields in listed if kind in _KINDS]
        if type(writer) is not bytes or len(writer) != 8 or not _whole(number, 1 << 63) or type(settings) is not int:
            raise ValueError("its head is none")
        for item in items:
            if not _CHECKS[type(item)](item):
                raise ValueError(f"{type(item).__name__} has a value out of range")
    except Exception as error:
        raise LogError(f"an entry of {len(data):,} bytes is damaged: {error!r}") from None
    return writer, number, settings, items


def _whole(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _worker(item: Any) -> bool:
    return type(item.pod) is str and len(item.pod) <= 1024 and _whole(item.rank, 1 << 31) and _seconds(item.ttl)


def _paths(paths: Any) -> bool:
    return type(paths) is list and all(
        _whole(ahead, 1 << 16) and type(path) is bytes and len(path) % 8 == 0 and len(path) <= 8 * BLOCKS
        for ahead, path in paths
    )


_CHECKS: Final[dict[type[Any], Callable[[Any], bool]]] = {
    Held: lambda each: _worker(each) and type(each.model) is str and len(each.model) <= 1024 and _paths(each.paths),
    Begun: lambda each: (
        _worker(each) and _whole(each.id, 1 << 63) and _whole(each.context, _MOST_TOKENS)
        and _whole(each.prefill, each.context + 1)
    ),
    Prefilled: lambda each: _whole(each.id, 1 << 63),
    Finished: lambda each: _whole(each.id, 1 << 63),
    Open: lambda each: each.ids is None or (type(each.ids) is list and all(_whole(id, 1 << 63) for id in each.ids)),
    Left: lambda each: True,
}  # fmt: skip


def is_sound(item: Item) -> bool:
    """Whether readers accept an item. They refuse an entry as a whole."""
    return bool(_CHECKS[type(item)](item))


# Such an item has up to 64 KB, and is worthless after some seconds.
_MOST_WAITING_HELD: Final = 256


class Outbox:
    """Items on their way to the server. It is bounded: the oldest items are dropped. Any thread may put, one takes."""

    def __init__(self, most: int = 4096, entry: int = 32 << 10) -> None:
        self._most, self._entry = most, entry
        self._items: deque[tuple[float, Item]] = deque()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item, now: float) -> None:
        if not is_sound(item) or (type(item) is Held and len(self._items) >= _MOST_WAITING_HELD):
            self.dropped += 1
            return
        if len(self._items) >= self._most:
            with suppress(IndexError):  # they were taken meanwhile
                self._items.popleft()
            self.dropped += 1
        self._items.append((now, item))

    def take(self, now: float) -> list[Item]:
        """Return the items of one entry. Items that have waited have less time left, or are left out."""
        items: list[Item] = []
        size = 0
        while self._items and (not items or size < self._entry):
            at, item = self._items.popleft()
            size += 32
            if isinstance(item, Held | Begun):
                item = item._replace(ttl=item.ttl - (now - at))
                if item.ttl <= 0:
                    self.dropped += 1
                    continue
                if isinstance(item, Held):
                    size += sum(len(path) for _, path in item.paths)
            items.append(item)
        return items


def listed(ids: list[int]) -> Open:
    """Make the list of a router's open requests."""
    return Open(ids if len(ids) <= _MOST_LISTED else None)


class _Writer:
    __slots__ = ("heard_at", "number", "open")

    def __init__(self) -> None:
        self.number = -1
        self.heard_at = -math.inf
        self.open: dict[int, float] = {}  # the time until which each counts


class Peers:
    """The entries of other routers, as effects: speculative entries, and beginnings and ends of requests."""

    def __init__(self, writer: bytes, settings: int) -> None:
        self.writer, self.settings = writer, settings
        self.entries = 0
        """Entries of others that were read."""
        self.refused: Counter[str] = Counter()
        """Items and entries that had no effect, by reason."""
        self._writers: OrderedDict[bytes, _Writer] = OrderedDict()
        self._open: OrderedDict[Key, Begun] = OrderedDict()
        self._held: list[tuple[float, int]] = []  # a heap: each has its own time
        self._blocks = 0
        self._looked_at = -math.inf

    @property
    def routers(self) -> int:
        """Other routers with an entry in the last :data:`SILENT` seconds."""
        return len(self._writers)

    @property
    def requests(self) -> int:
        """Open requests of other routers."""
        return len(self._open)

    def open(self) -> list[tuple[Key, Begun]]:
        """Return the open requests of other routers, for a picker that comes later."""
        return list(self._open.items())

    def take(self, data: bytes, age: float, now: float) -> list[Effect]:
        """Return the effects of an entry that was written ``age`` seconds ago."""
        age = max(age, 0.0)
        try:
            name, number, settings, items = decode(data)
        except LogError:
            self.refused["version" if data[:1] > bytes((VERSION,)) else "damaged"] += 1
            return []
        if name == self.writer:
            return []
        if age >= SILENT:
            self.refused["late"] += 1
            return []
        writer = self._writers.get(name)
        effects: list[Effect] = []
        if writer is None:
            if len(self._writers) >= _MOST_WRITERS:
                effects += self._leave(next(iter(self._writers)))
                self.refused["full"] += 1
            writer = self._writers[name] = _Writer()
        elif number <= writer.number:
            self.refused["repeated"] += 1
            return []
        self.entries += 1
        writer.number = number
        writer.heard_at = max(writer.heard_at, now - age)
        self._writers.move_to_end(name)
        for item in items:
            match item:
                case Held():
                    effects += self._hold(name, item, settings, age, now)
                case Begun():
                    effects += self._begin(name, writer, item, age, now)
                case Prefilled(id):
                    if id in writer.open:
                        self._open[name, id] = self._open[name, id]._replace(prefill=0)
                        effects.append(((name, id), item))
                case Finished(id):
                    effects += self._end(name, writer, [id])
                case Open(ids):
                    if ids is not None:
                        effects += self._end(name, writer, writer.open.keys() - set(ids))
                case Left():
                    return effects + self._leave(name)
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Return the effects of the time that has passed. O(requests of others), once a second."""
        if now < self._looked_at + 1.0:
            return []
        self._looked_at = now
        effects: list[Effect] = []
        for name, writer in list(self._writers.items()):
            if now >= writer.heard_at + SILENT:
                effects += self._leave(name)
            else:
                effects += self._end(name, writer, [id for id, until in writer.open.items() if now >= until])
        return effects

    def leave(self) -> list[Effect]:
        """Ends all requests of others."""
        return [effect for name in list(self._writers) for effect in self._leave(name)]

    def _hold(self, name: bytes, item: Held, settings: int, age: float, now: float) -> list[Effect]:
        left = min(item.ttl, _LONGEST_HELD) - age
        if left <= 0 or settings != self.settings:
            self.refused["late" if left <= 0 else "settings"] += 1
            return []
        while self._held and self._held[0][0] <= now:
            self._blocks -= heappop(self._held)[1]
        blocks = sum(len(path) // 8 for _, path in item.paths)
        if self._blocks + blocks > _MOST_HELD or len(self._held) >= _MOST_OPEN:
            self.refused["full"] += 1
            return []
        heappush(self._held, (now + left, blocks))
        self._blocks += blocks
        return [((name, 0), item._replace(ttl=left))]

    def _begin(self, name: bytes, writer: _Writer, item: Begun, age: float, now: float) -> list[Effect]:
        left = min(item.ttl, _LONGEST_OPEN) - age
        if left <= 0 or item.id in writer.open:
            self.refused["late" if left <= 0 else "repeated"] += 1
            return []
        effects: list[Effect] = []
        if len(self._open) >= _MOST_OPEN:
            of, id = next(iter(self._open))
            effects += self._end(of, self._writers[of], [id])
            self.refused["full"] += 1
        # Many requests share one pod's name, so they share one string.
        item = item._replace(pod=sys.intern(item.pod))
        writer.open[item.id] = now + left
        self._open[name, item.id] = item
        return [*effects, ((name, item.id), item)]

    def _end(self, name: bytes, writer: _Writer, ids: Iterable[int]) -> list[Effect]:
        effects: list[Effect] = []
        for id in ids:
            if writer.open.pop(id, None) is not None:
                del self._open[name, id]
                effects.append(((name, id), Finished(id)))
        return effects

    def _leave(self, name: bytes) -> list[Effect]:
        writer = self._writers.pop(name)
        return self._end(name, writer, list(writer.open))

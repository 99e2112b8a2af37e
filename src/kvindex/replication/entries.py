"""The log's wire format: an entry is a version byte and a MessagePack array of items."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from ..errors import KVIndexError
from ..sync.status import Configured, Forgotten, Marked, Removed

__all__ = [
    "VERSION", "ZERO", "Beat", "Begun", "Described", "ForeignError", "Hashed", "Id", "Item", "LogError",
    "Previous", "decode", "encode", "epoch_time", "id_text", "next_epoch", "parse_id",
]  # fmt: skip

VERSION: Final = 2
_SALTED: Final = 22  # bits; a server's ids have 64, and milliseconds since 1970 take 41

Id: TypeAlias = tuple[int, int]
"""``(epoch, number)``: numbers count from 1 without holes, and a collector begins an epoch of its own."""

ZERO: Final[Id] = (0, 0)


class LogError(KVIndexError, ValueError):
    """An entry or a snapshot that cannot be read: damaged, of another version, or of another fleet."""


class ForeignError(LogError):
    """It is of a newer version or another fleet: nothing may be written there."""


class Begun(NamedTuple):
    """The first item of an epoch: its collector, and the settings that an index needs to take part."""

    writer: str
    settings: Mapping[str, Any]


class Previous(NamedTuple):
    """The first item of an epoch's second entry: the place at which an index continues with this epoch. All other
    indexes need a snapshot."""

    epoch: int
    number: int


class Beat(NamedTuple):
    """The collector receives from its engines, and everything that it has received is before this item."""

    at: float
    """The time of that by the collector's own clock, which means nothing to other processes."""


class Described(NamedTuple):
    """A pod's source as routers need it."""

    pod: str
    model: str
    address: str | None
    labels: Mapping[str, str]
    engine: str | None


class Hashed(NamedTuple):
    """Batches with hashes in place of tokens, one after another. Consecutive ones of an entry are one item, which an
    index takes in one call."""

    data: bytes
    """As ``kvindex._core.hash_batch`` writes them."""


Item: TypeAlias = Beat | Begun | Configured | Described | Forgotten | Hashed | Marked | Previous | Removed

# Numbers are permanent (4 was a batch with its tokens, in version 1). A newer version may append fields to an item, and
# add kinds: both are skipped.
_KINDS: Final[dict[int, type[Any]]] = {
    1: Begun, 2: Previous, 3: Beat, 5: Forgotten, 6: Marked, 7: Configured, 8: Removed, 9: Described, 10: Hashed,
}  # fmt: skip
_NUMBERS: Final = {kind: number for number, kind in _KINDS.items()}
_FIELDS: Final = {number: len(kind._fields) for number, kind in _KINDS.items()}

_pack = msgpack.Packer(default=lambda value: sorted(value), unicode_errors="surrogateescape").pack


def encode(items: Iterable[Item]) -> bytes:
    """Encode one entry. O(bytes)."""
    listed: list[list[Any]] = []
    for kind, run in groupby(items, type):
        if kind is Hashed:
            listed.append([_NUMBERS[Hashed], b"".join([item.data for item in run if isinstance(item, Hashed)])])
        else:
            listed += ([_NUMBERS[kind], *item] for item in run)
    packed: bytes = _pack(listed)
    return bytes((VERSION,)) + packed


def decode(data: bytes) -> list[Item]:
    """Decode the items of an entry, without those of unknown kinds. Raises :class:`LogError`."""
    version = data[0] if data else 0
    if version > VERSION:
        raise ForeignError(f"an entry has version {version}, this kvindex reads {VERSION}: upgrade the readers first")
    if version != VERSION:
        raise LogError(f"an entry has version {version}, this kvindex reads {VERSION}: upgrade the collector")
    try:
        listed = msgpack.unpackb(memoryview(data)[1:], unicode_errors="surrogateescape", strict_map_key=False)
        return [_KINDS[number](*fields[: _FIELDS[number]]) for number, *fields in listed if number in _KINDS]
    except Exception as error:
        raise LogError(f"an entry of {len(data):,} bytes is damaged: {error!r}") from None


def next_epoch(above: int, salt: str, wall: float = 0.0) -> int:
    """Return an epoch above another one and, in milliseconds, above the time of day. Its low bits are the salt's: two
    collectors that begin behind one place, in a server that has come back empty in between, have different epochs."""
    return (max(above >> _SALTED, round(wall * 1e3)) + 1 << _SALTED) | zlib.crc32(salt.encode()) >> (32 - _SALTED)


def epoch_time(epoch: int) -> float:
    """Return the time when an epoch began, in seconds since 1970."""
    return (epoch >> _SALTED) / 1e3


def id_text(id: Id) -> str:
    return f"{id[0]}-{id[1]}"


def parse_id(text: str | bytes) -> Id:
    epoch, _, number = (text if isinstance(text, str) else text.decode()).partition("-")
    return int(epoch), int(number)

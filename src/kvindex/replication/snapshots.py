"""Snapshots in pieces. The pointer is written last, so that only a complete snapshot is ever found."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgpack

from .entries import ForeignError, Id, LogError, id_text
from .requests import Drop, Get, Put, Request

__all__ = ["Contents", "Download", "Pointer", "Upload", "pack", "unpack"]

_VERSION: Final = 1


class Contents(NamedTuple):
    """The contents of a snapshot: an index from ``PrefixIndex.dumps``, and facts that the index does not contain."""

    data: bytes
    pods: Mapping[str, Any]
    """The facts about a pod's source that routers need, by name: the fields of ``entries.Described`` after the name."""
    states: list[tuple[str, int, str]]


class Pointer(NamedTuple):
    """The place of the last complete snapshot. Its key belongs to one snapshot, which is never written again."""

    id: Id
    key: str
    pieces: int
    size: int
    checksum: int
    settings: Mapping[str, Any]

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb([_VERSION, *self])
        return packed + zlib.crc32(packed).to_bytes(4, "big")

    @classmethod
    def decode(cls, data: bytes) -> Pointer:
        """Decode a pointer. Raises :class:`LogError`."""
        if len(data) < 5 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise LogError(f"the pointer to the snapshot is damaged: {len(data)} bytes do not fit their checksum")
        try:
            version, id, *rest = msgpack.unpackb(data[:-4])
            if version == _VERSION:
                return cls(tuple(id), *rest[: len(cls._fields) - 1])
        except Exception as error:
            raise LogError(f"the pointer to the snapshot is damaged: {error!r}") from None
        raise ForeignError(
            f"the snapshot has version {version}, this kvindex reads {_VERSION}: upgrade the readers first"
        )

    def keys(self) -> tuple[str, ...]:
        return tuple(f"{self.key}:{number}" for number in range(self.pieces))


def pack(contents: Contents) -> bytes:
    packed: bytes = msgpack.packb([*contents], unicode_errors="surrogateescape", default=sorted)
    return packed


def unpack(pointer: Pointer, data: bytes) -> Contents:
    """Unpack the pieces of a snapshot. Raises :class:`LogError`."""
    if len(data) != pointer.size or zlib.crc32(data) != pointer.checksum:
        raise LogError(f"snapshot {id_text(pointer.id)} is damaged: its bytes do not fit its checksum")
    try:
        index, pods, states, *_ = msgpack.unpackb(data, unicode_errors="surrogateescape")
        return Contents(index, pods, [(pod, rank, state) for pod, rank, state in states])
    except Exception as error:
        raise LogError(f"snapshot {id_text(pointer.id)} cannot be read: {error!r}") from None


class Upload:
    """One snapshot on its way into the store. ``next`` returns requests until it returns None."""

    def __init__(
        self, id: Id, data: bytes, writer: str, settings: Mapping[str, Any], piece: int, dropped: tuple[str, ...]
    ) -> None:  # fmt: skip
        pieces = max(1, -(-len(data) // piece))
        self.pointer = Pointer(id, f"{id_text(id)}:{writer}", pieces, len(data), zlib.crc32(data), settings)
        self._data = data
        self._piece = piece
        self._dropped = dropped
        self._done = 0

    def next(self) -> Request | None:
        at = self._done
        if at < self.pointer.pieces:
            return Put(self.pointer.keys()[at], self._data[at * self._piece : (at + 1) * self._piece])
        if at == self.pointer.pieces:
            return Put("", self.pointer.encode())
        if at == self.pointer.pieces + 1 and self._dropped:
            return Drop(self._dropped)
        return None

    def done(self) -> None:
        """Note that the last request was carried out."""
        self._done += 1

    @property
    def is_whole(self) -> bool:
        """Whether the pointer leads to this snapshot."""
        return self._done > self.pointer.pieces


class Download:
    """One snapshot on its way here."""

    def __init__(self) -> None:
        self.pointer: Pointer | None = None
        self._pieces: list[bytes] = []

    def next(self) -> Request:
        return Get("" if self.pointer is None else self.pointer.keys()[len(self._pieces)])

    def got(self, data: bytes | None) -> Contents | None:
        """Take an answer. Returns the contents with the last one. Raises :class:`LogError`."""
        assert self.pointer is not None
        if data is None:
            raise LogError(f"piece {len(self._pieces)} of snapshot {id_text(self.pointer.id)} is gone")
        self._pieces.append(data)
        return unpack(self.pointer, b"".join(self._pieces)) if len(self._pieces) == self.pointer.pieces else None

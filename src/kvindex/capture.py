"""Captures: recorded event streams in one file, with the reuse that the engines' own caches had.

A capture is a gzip stream of msgpack objects: first a header map, then records in order::

    {"format": "kvindex-capture/1", "engine": "vllm", "version": "0.33.0", "block_size": 16, "pods": [...], ...}
    ["msg", pod, topic, seq, payload]
    ["msg", pod, topic, seq, payload, at, rank]
    ["forget", pod, rank, at]
    ["query", id, tokens, {"lora_name", "lora_id", "cache_salt", "extra_keys"}, {pod: hit}]

``tokens`` are little-endian u32 bytes. ``hit`` is the number of tokens that the engine's own cache would have reused.
Recordings of live streams have the time of arrival (``at``, seconds since 1970) and the rank of the stream. ``forget``
marks a restart of an engine, after which its blocks start from nothing.

:func:`read_capture` reads one record at a time, so a capture may be larger than memory. :class:`CaptureWriter` writes
one.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Generator, Mapping
from typing import Any, BinaryIO, NamedTuple, Self, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt

from .errors import CaptureError, InvalidValueError

__all__ = ["FORMAT", "CaptureWriter", "Forget", "Message", "Query", "Record", "read_capture"]

FORMAT = "kvindex-capture/1"

# The gzip layer hands out at most one of its own buffers a call, so larger pieces would not be larger.
_CHUNK = 1 << 16


class Message(NamedTuple):
    """One batch of events, exactly as an engine encoded it."""

    pod: str
    topic: str
    seq: int
    payload: bytes
    at: float | None = None
    """Time of its arrival in seconds since 1970; None if it was not recorded."""
    rank: int | None = None
    """Rank of its stream; None for the rank in the batch."""


class Forget(NamedTuple):
    """The blocks of a worker were dropped: its engine has restarted, or its history is replayed from the beginning."""

    pod: str
    rank: int
    at: float | None = None


class Query(NamedTuple):
    """One prompt, with the tokens that each engine's own cache would have reused at this moment."""

    id: str
    tokens: npt.NDArray[np.uint32]
    hits: dict[str, int]
    lora_name: str | None = None
    lora_id: int | None = None
    cache_salt: str | None = None
    extra_keys: list[Any] | None = None


_KINDS = ("msg", "forget", "query")

Record: TypeAlias = Message | Forget | Query


def read_capture(source: str | os.PathLike[str] | BinaryIO) -> Generator[dict[str, Any] | Record, None, None]:
    """Reads a capture: first its header, then every record in order.

    It reads one chunk ahead at most, so memory is bounded by the largest record. An iterator belongs to one thread.

    Args:
        source: A path, or a binary file. A file is read from its current position and left open.

    Yields:
        The header as a dict, then :class:`Message`, :class:`Forget` and :class:`Query` records.

    Raises:
        CaptureError: The file is not a capture, is damaged, or is cut off. Every record before that point was yielded.
        OSError: The file cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield from _read(file, os.fspath(source))
    else:
        yield from _read(source, str(getattr(source, "name", "capture")))


def _read(file: BinaryIO, name: str) -> Generator[dict[str, Any] | Record, None, None]:
    stream = gzip.GzipFile(fileobj=file, mode="rb")
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=1 << 30)
    received = 0
    start = 0
    seen_header = False
    cut = False
    while not cut:
        try:
            chunk = stream.read1(_CHUNK)
        except EOFError:
            chunk, cut = b"", True
        except (gzip.BadGzipFile, zlib.error) as error:
            if received == 0:
                raise CaptureError(f"{name} is not a gzip file: {error}", 0) from error
            where = f"after byte {received} of its uncompressed stream"
            raise CaptureError(f"{name} is damaged {where}: {error}", received) from error
        if not chunk:
            break
        received += len(chunk)
        unpacker.feed(chunk)
        while True:
            try:
                item = next(unpacker)
            except StopIteration:
                break
            # The C unpacker's errors have no common base class: FormatError, StackError and UnicodeDecodeError are
            # ValueErrors, a map key that cannot be hashed is a TypeError.
            except (ValueError, TypeError) as error:
                raise CaptureError(f"{name}, byte {start}: no msgpack object: {error}", start) from error
            try:
                parsed = _record(item) if seen_header else _header(item)
            except ValueError as error:
                raise CaptureError(f"{name}, byte {start}: {error}", start) from None
            seen_header = True
            start = unpacker.tell()
            yield parsed
    if cut or start != received or not seen_header:
        inside = f"inside the record that starts at byte {start}" if start != received else "after a whole record"
        raise CaptureError(f"{name} is cut off at byte {received} of its uncompressed stream, {inside}", received)


def _header(item: object) -> dict[str, Any]:
    if not isinstance(item, dict) or "format" not in item:
        raise ValueError(f"a capture starts with a header map that names its format, not with {_shown(item)}")
    if item["format"] != FORMAT:
        raise ValueError(f"the format is {_shown(item['format'])}, this version reads {FORMAT!r}")
    size = item.get("block_size")
    if type(size) is not int or size <= 0:
        raise ValueError(f"the header's block_size must be a positive number of tokens, not {_shown(size)}")
    return item


def _record(item: object) -> Record:
    match item:
        case ["msg", str(pod), str(topic), int(seq), bytes(payload)]:
            return Message(pod, topic, seq, payload)
        case ["msg", str(pod), str(topic), int(seq), bytes(payload), float() | None as at, int() | None as rank] if (
            rank is None or rank >= 0
        ):
            return Message(pod, topic, seq, payload, at, rank)
        case ["forget", str(pod), int(rank), float() | None as at] if rank >= 0:
            return Forget(pod, rank, at)
        case ["query", str(ident), bytes(tokens), dict(context), dict(hits)]:
            if len(tokens) % 4:
                raise ValueError(f"query {ident!r} has {len(tokens)} bytes of tokens, which is not a multiple of 4")
            if not all(isinstance(pod, str) and type(hit) is int for pod, hit in hits.items()):
                raise ValueError(f"query {ident!r} must map pods to numbers of tokens, not {_shown(hits)}")
            return Query(
                ident,
                np.frombuffer(tokens, dtype="<u4").astype(np.uint32, copy=False),
                hits,
                context.get("lora_name"),
                context.get("lora_id"),
                context.get("cache_salt"),
                context.get("extra_keys"),
            )
        case [str(kind), *fields] if kind in _KINDS:
            raise ValueError(f"a {kind!r} record has other fields than these: {_shown(fields)}")
        case [str(kind), *_]:
            raise ValueError(f"unknown kind of record {_shown(kind)}, this version reads {', '.join(_KINDS)}")
    raise ValueError(f"a record is an array that starts with its kind, not {_shown(item)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class CaptureWriter:
    """Writes a capture: the header on construction, then records in order.

    A context manager. Without :meth:`close` the file is cut off. Equal records produce equal bytes. A writer belongs
    to one thread.

    Args:
        target: A path, or a binary file, which is left open.
        header: A map with ``block_size`` and, by convention, ``engine``, ``version``, ``pods`` and ``model``.
            ``format`` is filled in.
        level: Level of gzip, 1 (fastest) to 9 (smallest).

    Raises:
        InvalidValueError: The header has no valid ``block_size``.
        OSError: The file cannot be opened.
    """

    def __init__(
        self, target: str | os.PathLike[str] | BinaryIO, header: Mapping[str, Any], *, level: int = 9
    ) -> None:  # fmt: skip
        try:
            item = _header({**header, "format": FORMAT})
        except ValueError as error:
            raise InvalidValueError(str(error)) from None
        self._packer = msgpack.Packer(use_bin_type=True)
        self._opened = open(target, "wb") if isinstance(target, (str, os.PathLike)) else None  # noqa: SIM115
        # No name and no time in the gzip header, so that samples under version control change only with their content.
        self._stream = gzip.GzipFile("", "wb", level, self._opened or target, mtime=0)  # type: ignore[arg-type]
        self._stream.write(self._packer.pack(item))

    def write(self, record: Record) -> None:
        """Appends one record. O(bytes).

        Args:
            record: A :class:`Message`, :class:`Forget` or :class:`Query`.
        """
        item: list[Any]
        if isinstance(record, Message):
            item = ["msg", *record]
            if record.at is record.rank is None:
                del item[5:]
        elif isinstance(record, Forget):
            item = ["forget", *record]
        else:
            context = {"lora_name": record.lora_name, "lora_id": record.lora_id, "cache_salt": record.cache_salt}
            if record.extra_keys is not None:
                context["extra_keys"] = record.extra_keys  # type: ignore[assignment]
            tokens = np.ascontiguousarray(record.tokens, dtype="<u4").tobytes()
            item = ["query", record.id, tokens, context, record.hits]
        self._stream.write(self._packer.pack(item))

    def flush(self) -> None:
        """Makes all records so far readable even if this process is killed. Frequent calls increase the size of the
        file.
        """
        self._stream.flush()

    def close(self) -> None:
        """Finishes the file. A second call has no effect."""
        self._stream.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The exceptions of kvindex.

Each is a :class:`KVIndexError` and also the matching builtin. ``except kvindex.KVIndexError`` catches every exception
that the library raises on purpose, and code that handles builtins (``except ValueError``) works too::

    from kvindex import InvalidValueError, PrefixIndex

    try:
        PrefixIndex(block_size=0)
    except ValueError as error:
        assert isinstance(error, InvalidValueError) and "block_size" in str(error)

Exceptions can be pickled.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CaptureError",
    "EventDecodeError",
    "InvalidTypeError",
    "InvalidValueError",
    "KVIndexError",
    "SnapshotError",
    "StreamError",
    "UnknownPodError",
]


class KVIndexError(Exception):
    """Base class of every exception that kvindex raises on purpose."""


class _AtByte(KVIndexError):
    """A :class:`KVIndexError` with the position of the fault."""

    offset: int

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset

    # BaseException pickles as cls(*args), which has no offset to give; errors cross process borders in worker pools.
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.offset)


class EventDecodeError(_AtByte, ValueError):
    """A payload is not a batch of events. No part of it was applied.

    Attributes:
        offset: The byte of the payload at which decoding stopped.
    """


class InvalidValueError(KVIndexError, ValueError):
    """An argument has the right type and a wrong value. The message has its name, its value and the valid values."""


class InvalidTypeError(KVIndexError, TypeError):
    """An argument has a wrong type. The message has its name, its type and the valid types."""


class UnknownPodError(KVIndexError, KeyError):
    """The index or the manager has no pod of that name. The message lists some that it has."""

    # KeyError shows the repr of its argument, which would put the whole sentence into quotes.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CapacityError(KVIndexError, MemoryError):
    """A limit of the index (ids, pods, bytes) is reached. Its content is unchanged."""


class SnapshotError(KVIndexError, OSError):
    """A snapshot cannot be written or read. The message has the path and, for a damaged file, the byte."""


class CaptureError(_AtByte, ValueError):
    """A capture cannot be read any further.

    Attributes:
        offset: The byte of the uncompressed stream at which a wrong record starts, or a cut-off file ends.
    """


class StreamError(KVIndexError, RuntimeError):
    """A live stream cannot be used in this way, or an engine cannot be reached to find its streams."""

"""The exceptions of kvindex.

Every one is a :class:`KVIndexError` and the builtin that says the same thing, so ``except kvindex.KVIndexError``
catches whatever this library raises on purpose, and code that knows only the builtins (``except ValueError``) works as
well.
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
    """Base of every exception that kvindex raises on purpose."""


class _AtByte(KVIndexError):
    """A :class:`KVIndexError` that knows the byte it is about."""

    offset: int

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset

    # BaseException pickles as cls(*args), which has no offset to give; errors cross process borders in worker pools.
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.offset)


class EventDecodeError(_AtByte, ValueError):
    """A payload is no batch of events; nothing of it was applied.

    ``offset`` is the byte of the payload at which reading stopped.
    """


class InvalidValueError(KVIndexError, ValueError):
    """An argument has the right type and an impossible value; the message names it and what would be right."""


class InvalidTypeError(KVIndexError, TypeError):
    """An argument has a type that is not taken; the message names it and what would be right."""


class UnknownPodError(KVIndexError, KeyError):
    """No pod of that name is known to the index."""

    # KeyError shows the repr of its argument, which would put the whole sentence into quotes.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CapacityError(KVIndexError, MemoryError):
    """A limit of the index (ids, pods, bytes) is reached; what was there before is untouched."""


class SnapshotError(KVIndexError, OSError):
    """A snapshot can not be written, or is not one, or does not fit its checksum."""


class CaptureError(_AtByte, ValueError):
    """A capture can not be read any further.

    ``offset`` is the byte of the uncompressed stream at which a wrong record starts, or a cut-off file ends.
    """


class StreamError(KVIndexError, RuntimeError):
    """A live stream was used in a way that its state does not allow."""

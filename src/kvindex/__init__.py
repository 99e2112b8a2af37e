"""An exact index of which pod holds which prefix in its KV cache, kept from the engines' own event streams."""

from .errors import (
    CapacityError,
    CaptureError,
    EventDecodeError,
    InvalidTypeError,
    InvalidValueError,
    KVIndexError,
    SnapshotError,
    StreamError,
    UnknownPodError,
)

__version__ = "0.1.0"

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

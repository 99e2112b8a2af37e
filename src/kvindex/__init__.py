"""An exact index of the prompt prefixes in the KV caches of LLM servers, updated by the engines' event streams."""

try:
    from ._core import IngestReport, PodSet, PrefixMatch
except ModuleNotFoundError as error:
    if error.name != "kvindex._core":
        raise
    raise ImportError("kvindex's compiled core is not built; in a checkout: pip install --editable .") from error
from .answers import IndexStats, PodMatch, StreamPlace, Verdict, WorkerStats
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
from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, decode_batch
from .hashing import local_hashes, prefix_hashes, roll_hashes
from .index import PrefixIndex
from .sync.manager import EventManager
from .sync.policy import StreamPolicy
from .sync.source import PodSource
from .sync.status import PodStatus, StateChange, WorkerStatus
from .tokens import tokens_from_bytes, tokens_to_bytes

__version__ = "0.1.0"

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "CapacityError",
    "CaptureError",
    "EventBatch",
    "EventDecodeError",
    "EventManager",
    "IndexStats",
    "IngestReport",
    "InvalidTypeError",
    "InvalidValueError",
    "KVIndexError",
    "PodMatch",
    "PodSet",
    "PodSource",
    "PodStatus",
    "PrefixIndex",
    "PrefixMatch",
    "SnapshotError",
    "StateChange",
    "StreamError",
    "StreamPlace",
    "StreamPolicy",
    "UnknownPodError",
    "Verdict",
    "WorkerStats",
    "WorkerStatus",
    "decode_batch",
    "local_hashes",
    "prefix_hashes",
    "roll_hashes",
    "tokens_from_bytes",
    "tokens_to_bytes",
]

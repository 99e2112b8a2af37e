"""The engines' events as Python objects, and the decoding of a payload into them.

:meth:`PrefixIndex.ingest` needs none of this: it decodes and applies a payload natively. The objects are for those who
make events themselves, and :func:`decode_batch` is for tools and tests that want to see what a payload says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ._core import decode_events

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "Event", "EventBatch", "decode_batch"]

BlockHash: TypeAlias = int | bytes
ExtraKeys: TypeAlias = Sequence[Sequence[Any] | None]
ContentHashes: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]


class _ByValue:
    """Equality field by field that knows arrays: comparing two of them with == gives an array, which has no truth."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return all(
            np.array_equal(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b for a, b in pairs
        )


@dataclass(frozen=True, slots=True, eq=False)
class BlockStored(_ByValue):
    """Blocks that a worker's cache holds now: vLLM's and SGLang's event, with the stream's pod and model.

    ``block_hashes`` are chained one after another, the first from ``parent_block_hash`` (None: a prompt starts here).
    A hash is an int (unsigned or signed 64 bits, the same modulo 2**64) or bytes, of which the last eight count,
    big-endian. ``token_ids`` are ``len(block_hashes) * block_size`` u32 token ids; fewer or more of them (masked
    blocks of hybrid models), or none (a placeholder of an offloading tier), name blocks that are known already.

    ``block_size`` is in tokens, ``kv_cache_spec_sliding_window`` too. ``extra_keys`` has one entry per block: None, or
    what the engine put into that block's hash besides tokens (strings, ints, bytes, ``(id, offset)`` pairs).
    ``lora_name`` names the adapter; without it a positive or string ``lora_id`` does. ``medium`` is the tier (None:
    GPU), ``group_idx`` the group of a hybrid model (None: group 0). ``session_id`` is kept and means nothing here.
    ``dp_rank`` is the data-parallel rank inside the pod (None: 0).

    ``local_hashes`` or ``prefix_hashes`` stand in place of ``token_ids`` where a publisher sends hashes of the
    interoperable scheme (:func:`local_hashes`, :func:`prefix_hashes`) and no tokens, one for each of ``block_hashes``.
    They count only with the index's own block size and seed, and hold adapter, salt and extra keys already: those
    fields mean nothing beside them. ``prefix_hashes`` are taken as they are, not rolled from the parent's.

    ``lookahead_token_ids`` has one list per block, all of one length (at most 64): the tokens behind the block that are
    in its hash, as vLLM has them with speculative decoding. A question takes them from the prompt itself, and matches
    no block that has fewer behind it. None: none.

    Nothing is checked before :meth:`PrefixIndex.process_block_stored`. Not mutable, so safe to share between threads
    as long as nobody writes to the sequences in it. Making one is O(1): nothing is copied.
    """

    pod: str = ""
    model: str = ""
    _: KW_ONLY
    block_hashes: Sequence[BlockHash]
    parent_block_hash: BlockHash | None = None
    token_ids: TokenIds = ()
    block_size: int | None = None
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: ExtraKeys | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    dp_rank: int | None = None
    lookahead_token_ids: Sequence[Sequence[int]] | None = None
    local_hashes: ContentHashes | None = None
    prefix_hashes: ContentHashes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BlockRemoved(_ByValue):
    """One copy of each of these blocks has left one tier (``medium``, None: GPU) and group of one worker.

    ``block_hashes``, ``group_idx`` and ``dp_rank`` are as in :class:`BlockStored`. ``remaining_copy_counts`` has one
    int per hash: how many copies stay there after this event. None: one copy goes. A hash that has no counted copy
    there is counted and nothing else.
    """

    pod: str = ""
    model: str = ""
    _: KW_ONLY
    block_hashes: Sequence[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    dp_rank: int | None = None
    remaining_copy_counts: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AllBlocksCleared(_ByValue):
    """A worker's cache is empty: rank ``dp_rank`` (None: 0) of the pod, in every model.

    ``medium`` is the tier that was cleared. None, which is what engines write: every medium, unless the pod is
    configured otherwise (``clear_media``).
    """

    pod: str = ""
    _: KW_ONLY
    dp_rank: int | None = None
    medium: str | None = None


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch(_ByValue):
    """One decoded payload.

    ``ts`` is in seconds, ``events`` are those that can be applied, in their order, ``dp_rank`` is the batch's (None
    where it has none). ``skipped`` has an ``(index, reason)`` for each of the others: its place in the payload's list
    and ``"unknown_event"``, ``"bad_event"`` or ``"bad_token"``, as in the reasons of an :class:`IngestReport`.
    """

    ts: float
    events: Sequence[Event]
    dp_rank: int | None = None
    skipped: Sequence[tuple[int, str]] = ()


def decode_batch(payload: bytes | bytearray | memoryview, *, pod: str = "", model: str = "") -> EventBatch:
    """Decodes one payload, exactly as an engine published it, into an :class:`EventBatch`.

    Every wire form is taken: arrays (vLLM 0.9-0.23, SGLang <= 0.5.19) and maps (vLLM >= 0.24, SGLang >= 0.5.20), each
    event by itself. Hashes come folded to u64, ``token_ids`` as a ``uint32`` array, everything else as the wire has
    it, with the pairs of ``extra_keys`` as tuples. The payload does not say which ``pod`` and ``model`` it is about:
    what is given here goes into every event, and the batch's rank does too.

    An event that is broken or unknown costs its siblings nothing: it is in ``skipped``. A payload that is no batch, is
    cut short or lies about a length raises :class:`EventDecodeError`, whose ``offset`` is the byte.

    What is skipped, and where a broken payload ends, is what :meth:`PrefixIndex.ingest` says of it, with one exception:
    the msgpack package follows nesting for about 1,000 levels only, and an event whose extra keys have more is a
    ``"bad_event"`` here.

    O(bytes), and slow beside :meth:`PrefixIndex.ingest`. Safe from any thread.
    """
    ts, dp_rank, found = decode_events(payload)
    events: list[Event] = []
    skipped: list[tuple[int, str]] = []
    for index, (kind, reason, wire) in enumerate(found):
        if reason is not None:
            skipped.append((index, reason))
        elif kind == "stored":
            events.append(BlockStored(pod, model, dp_rank=dp_rank, **wire))
        elif kind == "removed":
            events.append(BlockRemoved(pod, model, dp_rank=dp_rank, **wire))
        else:
            events.append(AllBlocksCleared(pod, dp_rank=dp_rank, **wire))
    return EventBatch(ts, events, dp_rank, skipped)


def unknown_kinds(payload: bytes | bytearray | memoryview) -> list[str]:
    """What the events of a batch that are of no known kind call themselves, as far as they do."""
    names = (wire["type"] for _, reason, wire in decode_events(payload)[2] if reason == "unknown_event")
    return ["without a name" if name is None else f"{name!r:.40}" for name in names]

"""The engines' events as Python objects, and a decoder for payloads.

:meth:`PrefixIndex.ingest` decodes and applies a payload natively and needs no objects. Use them to create events
yourself, and :func:`decode_batch` to inspect a payload::

    import msgpack
    from kvindex import decode_batch

    payload = msgpack.packb([1700000000.0, [["BlockStored", [7], None, list(range(16)), 16, None]]])
    (event,) = decode_batch(payload, pod="a").events
    assert (event.pod, event.block_hashes, len(event.token_ids)) == ("a", [7], 16)
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
    """Field-by-field equality that handles arrays, whose own ``==`` returns an array."""

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
    """Blocks were added to a worker's cache: the event of vLLM and SGLang, with the pod and model of its stream.

    Creating an event copies and checks nothing, in O(1). :meth:`PrefixIndex.process_block_stored` checks the fields.
    An event is immutable, so it is safe to share between threads as long as the sequences in it do not change.

    Args:
        pod: The pod's name.
        model: Model of the blocks.
        block_hashes: Engine hashes of consecutive blocks: ints (signed or unsigned 64 bits, equal modulo 2**64) or
            bytes, of which the last eight count, big-endian.
        parent_block_hash: Engine hash of the block before the first one; None at the start of a prompt.
        token_ids: ``len(block_hashes) * block_size`` token ids, 0 to 2**32 - 1. With fewer or more (masked blocks of
            hybrid models), or without any (a placeholder of an offloading tier), the hashes refer to known blocks.
        block_size: Tokens per block.
        lora_id: Adapter, used if there is no ``lora_name``: a positive int or a string.
        medium: Medium of the copy, such as ``"GPU"`` or ``"CPU"``; None for ``"GPU"``.
        lora_name: Name of the LoRA adapter.
        extra_keys: One entry per block: None, or the list of keys besides tokens that the engine has hashed (strings,
            ints, bytes, ``(id, offset)`` pairs).
        group_idx: Group of a hybrid model; None for group 0.
        kv_cache_spec_kind: Kind of attention of the group, as vLLM names it.
        kv_cache_spec_sliding_window: Window of the group, in tokens.
        cache_salt: Cache salt of the request.
        session_id: Kept without an effect.
        dp_rank: Data-parallel rank inside the pod; None for 0.
        lookahead_token_ids: One list per block, all of one length of at most 64: the tokens behind the block that its
            hash covers, as in vLLM with speculative decoding. A match compares them with the tokens of the prompt, and
            does not match a block with fewer tokens behind it.
        local_hashes: In place of ``token_ids``: one interoperable hash per block (:func:`local_hashes`), uint64, for
            publishers without tokens. The index must have the same block size and seed. The hashes cover adapter, salt
            and extra keys, so these fields have no effect beside them.
        prefix_hashes: The same with prefix hashes (:func:`prefix_hashes`). They are used as given, without the parent.
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
    """One copy of each block was removed from one medium and group of a worker.

    Args:
        pod: The pod's name.
        model: Model of the blocks.
        block_hashes: As in :class:`BlockStored`. A hash without a counted copy is skipped and counted.
        medium: Medium of the copy; None for ``"GPU"``.
        group_idx: As in :class:`BlockStored`.
        dp_rank: As in :class:`BlockStored`.
        remaining_copy_counts: One int per hash: the copies that remain after this event. None removes one copy of
            each.
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
    """The cache of a worker was cleared, for every model.

    Args:
        pod: The pod's name.
        dp_rank: Data-parallel rank; None for 0.
        medium: Medium that was cleared. None, as engines write it, clears every medium unless the pod is configured
            with ``clear_media``.
    """

    pod: str = ""
    _: KW_ONLY
    dp_rank: int | None = None
    medium: str | None = None


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch(_ByValue):
    """One decoded payload.

    Args:
        ts: Timestamp in seconds since 1970.
        events: The valid events, in order.
        dp_rank: Data-parallel rank of the batch, or None.
        skipped: ``(position, reason)`` of each other event in the payload: ``"unknown_event"``, ``"bad_event"`` or
            ``"bad_token"``, as in :attr:`IngestReport.reasons`.
    """

    ts: float
    events: Sequence[Event]
    dp_rank: int | None = None
    skipped: Sequence[tuple[int, str]] = ()


def decode_batch(payload: bytes | bytearray | memoryview, *, pod: str = "", model: str = "") -> EventBatch:
    """Decodes one payload, exactly as an engine published it.

    All wire formats are supported, event by event: arrays (vLLM 0.9 to 0.23, SGLang up to 0.5.19) and maps (vLLM from
    0.24, SGLang from 0.5.20). An event that is invalid or unknown does not affect the others: it is in ``skipped``.

    :meth:`PrefixIndex.ingest` accepts and skips the same events, with one exception: extra keys with more than about
    1,000 levels of nesting are a ``"bad_event"`` here, because the msgpack package does not decode them.

    Thread-safe. O(bytes), and much slower than :meth:`PrefixIndex.ingest`.

    Args:
        payload: The payload, bytes-like.
        pod: Pod of the events. The payload does not contain it.
        model: Model of the events. The payload does not contain it.

    Returns:
        The batch. Hashes are unsigned 64-bit ints, ``token_ids`` are uint32 arrays, pairs in ``extra_keys`` are
        tuples, and each event has the rank of the batch.

    Raises:
        EventDecodeError: The payload is not a batch, is cut short, or contains a wrong length.
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
    """Names of the events of unknown kind in a payload, as far as they have one."""
    names = (wire["type"] for _, reason, wire in decode_events(payload)[2] if reason == "unknown_event")
    return ["without a name" if name is None else f"{name!r:.40}" for name in names]

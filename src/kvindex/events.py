"""The engines' events as Python objects, and the decoding of a payload into them.

:meth:`PrefixIndex.ingest` needs none of this: it decodes and applies a payload natively. The objects are for those who
make events themselves, and :func:`decode_batch` is for tools and tests that want to see what a payload says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt

from ._core import scan_batch

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


# Element by element, in the order of the engines' array forms.
_STORED = (
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
_REMOVED = ("type", "block_hashes", "medium", "group_idx")
# What only maps have.
_KEYS = {"stored": ("cache_salt", "lookahead_token_ids"), "removed": ("remaining_copy_counts",)}


def decode_batch(payload: bytes | bytearray | memoryview, *, pod: str = "", model: str = "") -> EventBatch:
    """Decodes one payload, exactly as an engine published it, into an :class:`EventBatch`.

    Every wire form is taken: arrays (vLLM 0.9-0.23, SGLang <= 0.5.19) and maps (vLLM >= 0.24, SGLang >= 0.5.20), each
    event by itself. Hashes come folded to u64, ``token_ids`` as a ``uint32`` array, everything else as the wire has
    it, with the pairs of ``extra_keys`` as tuples. The payload does not say which ``pod`` and ``model`` it is about:
    what is given here goes into every event, and the batch's rank does too.

    An event that is broken or unknown costs its siblings nothing: it is in ``skipped``. A payload that is no batch, is
    cut short or lies about a length raises :class:`EventDecodeError`, whose ``offset`` is the byte.

    What is skipped, and where a broken payload ends, is what :meth:`PrefixIndex.ingest` says of it, with one exception:
    the msgpack package follows nesting for about 1,000 levels only, and an event with more is a ``"bad_event"`` here.

    O(bytes), and slow beside :meth:`PrefixIndex.ingest`. Safe from any thread.
    """
    ts, dp_rank, found = scan_batch(payload)
    data = memoryview(payload).cast("B")
    events: list[Event] = []
    skipped: list[tuple[int, str]] = []
    for index, (kind, reason, offset, n_bytes, medium) in enumerate(found):
        if reason is None and kind == "cleared":
            name = None if medium is None else medium.decode("utf-8", "surrogateescape")
            events.append(AllBlocksCleared(pod, dp_rank=dp_rank, medium=name))
        elif reason is None:
            try:
                events.append(_event(kind, bytes(data[offset : offset + n_bytes]), pod, model, dp_rank))
            except (msgpack.StackError, RecursionError):
                reason = "bad_event"
        if reason is not None:
            skipped.append((index, reason))
    return EventBatch(ts, events, dp_rank, skipped)


def unknown_kinds(payload: bytes | bytearray | memoryview) -> list[str]:
    """What the events of a batch that are of no known kind call themselves, as far as they do."""
    data = memoryview(payload).cast("B")
    names = []
    for _, reason, offset, n_bytes, _ in scan_batch(payload)[2]:
        if reason == "unknown_event":
            event = bytes(data[offset : offset + n_bytes])
            spans = _array_spans(event, ("type",)) if _is_array(event[0]) else _map_spans(event)
            tag = spans.get("type", b"\xc0")
            names.append(f"{_unpack(tag)!r:.40}" if _is_str(tag[0]) else "without a name")
    return names


def _event(kind: str, data: bytes, pod: str, model: str, dp_rank: int | None) -> Event:
    """The object for one event that the native check has found to be sound."""
    wire = _fields(data, kind)
    hashes = [_folded(h) for h in wire["block_hashes"]]
    medium, group_idx = wire.get("medium"), wire.get("group_idx")
    if kind == "removed":
        remaining = wire.get("remaining_copy_counts")
        return BlockRemoved(
            pod,
            model,
            block_hashes=hashes,
            medium=medium,
            group_idx=group_idx,
            dp_rank=dp_rank,
            remaining_copy_counts=None if remaining is None else list(remaining),
        )
    parent, extra_keys = wire.get("parent_block_hash"), wire.get("extra_keys")
    tokens, ahead = _split(wire.get("token_ids") or (), wire.get("block_size") or 0, len(hashes))
    ahead = wire.get("lookahead_token_ids") if ahead is None else ahead
    return BlockStored(
        pod,
        model,
        block_hashes=hashes,
        parent_block_hash=None if parent is None else _folded(parent),
        token_ids=np.array(tokens, dtype=np.uint32),
        block_size=wire.get("block_size"),
        lora_id=wire.get("lora_id"),
        medium=medium,
        lora_name=wire.get("lora_name"),
        extra_keys=None if extra_keys is None else [keys if keys is None else list(keys) for keys in extra_keys],
        group_idx=group_idx,
        kv_cache_spec_kind=wire.get("kv_cache_spec_kind"),
        kv_cache_spec_sliding_window=wire.get("kv_cache_spec_sliding_window"),
        cache_salt=wire.get("cache_salt"),
        session_id=wire.get("session_id"),
        dp_rank=dp_rank,
        lookahead_token_ids=None if ahead is None else [list(tokens) for tokens in ahead],
    )


def _split(tokens: Sequence[Any], size: int, n: int) -> tuple[Sequence[int], list[list[int]] | None]:
    """Tokens, and the one behind each block where they come in pairs (SGLang with EAGLE)."""
    if not tokens or not isinstance(tokens[0], tuple):
        return tokens, None
    ends = [min(j * size, len(tokens)) - 1 for j in range(1, n + 1)]
    return [token for token, _ in tokens], [[tokens[end][1]] for end in ends]


def _fields(data: bytes, kind: str) -> dict[str, Any]:
    """The fields of one event by name: of an array those at their places, of a map those with such keys.

    Only these are decoded, because only they have been checked. The others may be what Python cannot hold, a list as a
    key or a timestamp of three bytes, and are nobody's business: a newer engine may send anything there.
    """
    names = _STORED if kind == "stored" else _REMOVED
    is_array = _is_array(data[0])
    spans = _array_spans(data, names) if is_array else _map_spans(data)
    # Element 7 of an array is the LoRA name, except in SGLang's, where a map around the cache salt is there.
    if is_array and _is_map(spans.get("lora_name", b"\xc0")[0]):
        spans |= {"lora_name": b"\xc0"} | {k: v for k, v in _map_spans(spans["lora_name"]).items() if k in _NAMESPACE}
    wire = {name: _unpack(spans[name]) for name in (*names[1:], *_KEYS[kind]) if name in spans}
    if kind == "stored" and _is_str(spans.get("session_id", b"\xc0")[0]):
        wire["session_id"] = _unpack(spans["session_id"])
    return wire


_NAMESPACE = frozenset({"lora_name", "cache_salt"})


def _unpack(data: bytes) -> Any:
    # Surrogates stand for what is no UTF-8: a name that an engine wrote wrongly is still a name.
    return msgpack.unpackb(data, use_list=False, unicode_errors="surrogateescape")


def _array_spans(data: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    reader = _reader(data)
    n = reader.read_array_header()
    return dict(zip(names[:n], (_value(data, reader) for _ in range(n)), strict=False))


def _map_spans(data: bytes) -> dict[str, bytes]:
    reader = _reader(data)
    spans = {}
    for _ in range(reader.read_map_header()):
        key, value = _value(data, reader), _value(data, reader)
        if _is_str(key[0]):
            spans[_unpack(key)] = value
    return spans


def _value(data: bytes, reader: Any) -> bytes:
    start = reader.tell()
    reader.skip()
    return data[start : reader.tell()]


def _reader(data: bytes) -> Any:
    reader = msgpack.Unpacker(max_buffer_size=len(data))
    reader.feed(data)
    return reader


def _is_array(first: int) -> bool:
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)


def _is_map(first: int) -> bool:
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def _is_str(first: int) -> bool:
    return 0xA0 <= first <= 0xBF or first in (0xD9, 0xDA, 0xDB)


def _folded(block_hash: BlockHash) -> int:
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash % 2**64

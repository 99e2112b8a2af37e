"""The encoders of every wire form that vLLM and SGLang have released, from one neutral list of events.

The forms come from payloads of the releases' own encoders, and the tests compare byte for byte with those. A form
writes only the fields of its release: an older form leaves out a LoRA name, a cache salt or a group, as its release
did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import InvalidValueError

__all__ = ["FORMS", "Cleared", "Event", "HashForm", "Removed", "Stored", "WireForm", "encode_batch", "wire_form"]


class Stored(NamedTuple):
    """Blocks that were stored one after another below ``parent_block_hash``.

    Hashes are the engine's digests (bytes, any length); the form decides which part of them goes on the wire.
    ``token_ids`` is an array of u32, empty for a placeholder, and two-dimensional where SGLang writes pairs.
    ``extra_keys`` and ``lookahead_token_ids`` have one entry per hash.
    """

    block_hashes: Sequence[bytes]
    parent_block_hash: bytes | None
    token_ids: npt.NDArray[np.uint32]
    block_size: int | None
    lora_id: int | None = None
    medium: str | None = "GPU"
    lora_name: str | None = None
    extra_keys: Sequence[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    lookahead_token_ids: Sequence[Sequence[int]] | None = None


class Removed(NamedTuple):
    """One copy of each of these blocks was removed from ``medium``."""

    block_hashes: Sequence[bytes]
    medium: str | None = "GPU"
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class Cleared(NamedTuple):
    """The worker dropped all its blocks."""


Event: TypeAlias = Stored | Removed | Cleared
HashForm: TypeAlias = Literal["u64", "i64", "bytes16", "bytes32"]

_TAGS: dict[type, str] = {Stored: "BlockStored", Removed: "BlockRemoved", Cleared: "AllBlocksCleared"}


@dataclass(frozen=True, slots=True)
class WireForm:
    """The wire form of one range of releases. See :data:`FORMS`.

    ``stored`` and ``removed`` are the fields in their order. An array has them all; a map leaves out unset fields after
    the first ``always`` (per event type). ``map16``: stored events of any size have a map16 header, as in vLLM 0.33.
    ``page_events``: one event per block, as in SGLang before 0.5.18.
    """

    name: str
    engine: Literal["vllm", "sglang"]
    layout: Literal["array", "map"]
    stored: tuple[str, ...]
    removed: tuple[str, ...]
    hashes: HashForm
    always: tuple[int, int] = (0, 0)
    has_rank: bool = True
    map16: bool = False
    page_events: bool = False

    def says(self, field: str) -> bool:
        """Whether a stored event of this form can carry ``field``."""
        return field in self.stored


_STORED = (
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
    "locality",
    "ownership",
    "session_id",
)
_REMOVED = ("block_hashes", "medium", "group_idx", "locality", "ownership")
_SGLANG_MAP = (*_STORED[:6], "cache_salt", "session_id", "lora_name")


def _vllm(name: str, stored: int, removed: int, **options: Any) -> WireForm:
    return WireForm(f"vllm-{name}", "vllm", "array", _STORED[:stored], _REMOVED[:removed], "u64", **options)


def _vllm_map(name: str, *more: str, **options: Any) -> WireForm:
    return WireForm(f"vllm-{name}", "vllm", "map", (*_STORED, *more), _REMOVED, "u64", always=(7, 2), **options)


def _sglang(name: str, stored: int, removed: int, **options: Any) -> WireForm:
    return WireForm(f"sglang-{name}", "sglang", "array", _STORED[:stored], _REMOVED[:removed], "i64", **options)


def _sglang_map(name: str, stored: tuple[str, ...]) -> WireForm:
    return WireForm(f"sglang-{name}", "sglang", "map", stored, _REMOVED[:2], "i64", always=(5, 1))


#: Every form, by its first release.
FORMS: dict[str, WireForm] = {
    form.name: form
    for form in (
        _vllm("0.9.0", 5, 1, has_rank=False),
        _vllm("0.9.1", 5, 1),
        _vllm("0.10.2", 6, 2),
        _vllm("0.14.0", 7, 2),
        _vllm("0.17.0", 8, 2),
        _vllm("0.20.0", 9, 3),
        _vllm("0.22.0", 11, 3),
        _vllm_map("0.24.0"),
        _vllm_map("0.33.0", "lookahead_token_ids", map16=True),
        _sglang("0.4.6", 5, 1, has_rank=False, page_events=True),
        _sglang("0.4.7", 5, 1, page_events=True),
        _sglang("0.5.9", 6, 2, page_events=True),
        _sglang("0.5.18", 6, 2),
        _sglang_map("0.5.20", _SGLANG_MAP[:6]),
        _sglang_map("0.5.22", _SGLANG_MAP),
    )
}


def wire_form(name: str, hashes: HashForm | None = None) -> WireForm:
    """The form ``name`` of :data:`FORMS`, with the form ``hashes`` of its hashes if given.

    Raises :class:`InvalidValueError` for an unknown name.
    """
    try:
        form = FORMS[name]
    except KeyError:
        raise InvalidValueError(f"no wire form is called {name!r}; there are {', '.join(FORMS)}") from None
    return form if hashes is None else replace(form, hashes=hashes)


# msgpack-python writes the shortest header for every value, as the engines' encoder does for all but map16.
_packer = msgpack.Packer(use_bin_type=True)


def encode_batch(events: Iterable[Event], form: WireForm, *, ts: float = 0.0, dp_rank: int | None = 0) -> bytes:
    """Encode one batch as an engine of ``form`` would put it on the wire.

    ``ts`` is in seconds. ``dp_rank`` is written where the form has a place for it. O(bytes written); one thread at a
    time.
    """
    if form.page_events:
        events = _pages(events)
    # Under pressure nine of ten events are removals of one block and differ only in the hash. The bytes around the hash
    # are made once a batch: 0.8 instead of 2.0 microseconds an event.
    frames: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}
    parts = []
    for event in events:
        if not isinstance(event, Removed):
            parts.append(_event(event, form))
            continue
        rest = event[1:]
        frame = frames.get(rest)
        if frame is None:
            frame = frames[rest] = _around(_event(Removed([], *rest), form), form)
        hashes = _packer.pack([_hash(digest, form.hashes) for digest in event.block_hashes])
        parts.append(frame[0] + hashes + frame[1])
    head = b"\x93" if form.has_rank else b"\x92"
    tail = _packer.pack(dp_rank) if form.has_rank else b""
    return b"".join([head, _packer.pack(float(ts)), _packer.pack_array_header(len(parts)), *parts, tail])


def _around(packed: bytes, form: WireForm) -> tuple[bytes, bytes]:
    """Split an event without hashes into the bytes before and after its (empty) array of hashes."""
    before = _packer.pack(_TAGS[Removed])
    if form.layout == "map":
        before = _packer.pack("type") + before + _packer.pack("block_hashes")
    return packed[: 1 + len(before)], packed[2 + len(before) :]


def _event(event: Event, form: WireForm) -> bytes:
    stored = isinstance(event, Stored)
    fields = form.stored if stored else form.removed if isinstance(event, Removed) else ()
    values = [_value(field, getattr(event, field), form.hashes) for field in fields]
    tag = _TAGS[type(event)]
    packed: bytes
    if form.layout == "array":
        packed = _packer.pack([tag, *values])
        return packed
    always = form.always[0] if stored else form.always[1]
    item = {"type": tag}
    for place, (field, value) in enumerate(zip(fields, values, strict=True)):
        if value is not None or place < always:
            item[field] = value
    packed = _packer.pack(item)
    # The packer's own header is the first byte, or three from 16 keys on.
    if stored and form.map16 and len(item) < 16:
        return b"\xde\x00" + bytes([len(item)]) + packed[1:]
    return packed


def _value(field: str, value: Any, hashes: HashForm) -> Any:
    if value is None:
        return None
    if field == "block_hashes":
        return [_hash(digest, hashes) for digest in value]
    if field == "parent_block_hash":
        return _hash(value, hashes)
    return value.tolist() if field == "token_ids" else value


def _hash(digest: bytes, hashes: HashForm) -> int | bytes:
    # vLLM's integers are the last eight bytes of the digest. Byte hashes keep the end as well, to agree with them.
    if hashes == "bytes32":
        return digest[-32:]
    if hashes == "bytes16":
        return digest[-16:]
    return int.from_bytes(digest[-8:], "big", signed=hashes == "i64")


def _pages(events: Iterable[Event]) -> Iterable[Event]:
    for event in events:
        if not isinstance(event, Stored) or not event.block_size:
            yield event
            continue
        parent = event.parent_block_hash
        for place, digest in enumerate(event.block_hashes):
            tokens = event.token_ids[place * event.block_size : (place + 1) * event.block_size]
            keys = None if event.extra_keys is None else event.extra_keys[place : place + 1]
            yield event._replace(block_hashes=[digest], parent_block_hash=parent, token_ids=tokens, extra_keys=keys)
            parent = digest

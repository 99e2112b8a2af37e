"""The facts about an engine in the batches of its stream: block sizes, hash forms, groups, adapters and salts."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import msgpack

from .. import AllBlocksCleared, BlockRemoved, BlockStored, EventDecodeError, decode_batch

__all__ = ["Facts", "Group"]

# Adapters, salts or unknown kinds that are kept: an engine may have thousands.
EXAMPLES = 20
# Beginnings of prompts that are kept. A comparison of a prompt with one of them takes microseconds.
ROOTS = 1000


class Group(NamedTuple):
    """A group of a model's layers, as the stored events describe it."""

    kind: str | None
    window: int | None


class Facts:
    """The facts of the payloads so far. ``add`` takes a payload, and does not raise for any content."""

    def __init__(self) -> None:
        self.batches = 0
        self.undecodable = 0
        self.blocks = 0
        """Blocks stored, in the engine's own blocks, as are the counts below."""
        self.removed = 0
        self.cleared = 0
        self.without_tokens = 0
        self.sizes: dict[int, Counter[int]] = {}
        """By group: the number of blocks of each size in tokens."""
        self.groups: dict[int, Group] = {}
        self.hashes: Counter[str] = Counter()
        self.adapters: set[str] = set()
        self.salts: set[str] = set()
        self.under_adapter = 0
        self.under_salt = 0
        self.other_keys = 0
        self.media: Counter[str] = Counter()
        self.roots: dict[tuple[int, ...], None] = {}
        """The tokens of blocks without a parent, the first :data:`ROOTS` of them in their order."""
        self.lookahead: set[int] = set()
        """Numbers of tokens behind a block that its hash covers; 0 without a lookahead."""
        self.salt_fields = 0
        """Blocks whose event has the salt as a field, as in SGLang; vLLM has it among the extra keys."""
        self.ranks: Counter[int | None] = Counter()
        self.first_ts: float | None = None
        self.unknown = 0
        """Events of unknown kinds; ``kinds`` has the names of some."""
        self.kinds: set[str] = set()

    @property
    def block_size(self) -> int | None:
        """The block size that suits an index: the smallest usual size of any group. None before any stored event."""
        usual = [sizes.most_common(1)[0][0] for sizes in self.sizes.values() if sizes]
        return min(usual, default=None)

    def add(self, payload: bytes) -> None:
        self.batches += 1
        try:
            batch = decode_batch(payload)
        except EventDecodeError:
            self.undecodable += 1
            return
        if self.first_ts is None:
            self.first_ts = batch.ts
        self.ranks[batch.dp_rank] += 1
        self._note_hashes(payload)
        if unknown := [place for place, reason in batch.skipped if reason == "unknown_event"]:
            self.unknown += len(unknown)
            self._note_kinds(payload, unknown)
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._stored(event)
            elif isinstance(event, BlockRemoved):
                self.removed += len(event.block_hashes)
                self.media[(event.medium or "GPU").upper()] += 0
            elif isinstance(event, AllBlocksCleared):
                self.cleared += 1

    def _stored(self, event: BlockStored) -> None:
        count = len(event.block_hashes)
        self.blocks += count
        self.media[(event.medium or "GPU").upper()] += count
        group = event.group_idx or 0
        if event.block_size and len(event.token_ids):
            if event.parent_block_hash is None and len(self.roots) < ROOTS:
                self.roots[tuple(map(int, event.token_ids[: event.block_size]))] = None
            self.sizes.setdefault(group, Counter())[event.block_size] += count
        else:
            self.without_tokens += count
        if event.kv_cache_spec_kind is not None or event.kv_cache_spec_sliding_window is not None:
            self.groups[group] = Group(event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window)
        else:
            self.groups.setdefault(group, Group(None, None))
        adapter = event.lora_name
        if adapter is None and event.lora_id not in (None, 0, -1):
            adapter = str(event.lora_id)
        if len(event.token_ids):
            ahead = event.lookahead_token_ids
            self.lookahead.add(len(ahead[0]) if ahead else 0)
        salt, others = event.cache_salt, False
        self.salt_fields += count if salt is not None else 0
        for place, keys in enumerate(event.extra_keys or ()):
            for key in keys or ():
                if key == adapter:
                    continue
                # vLLM puts the salt among the extra keys of a prompt's first block, as the only plain string there.
                if isinstance(key, str) and place == 0 and event.parent_block_hash is None:
                    salt = key
                else:
                    others = True
        if adapter is not None:
            self.under_adapter += count
            if len(self.adapters) < EXAMPLES:
                self.adapters.add(adapter)
        if salt is not None:
            self.under_salt += count
            if len(self.salts) < EXAMPLES:
                self.salts.add(salt)
        if others:
            self.other_keys += count

    def _note_kinds(self, payload: bytes, places: list[int]) -> None:
        """Note the names of unknown events, which the decoded batch does not have."""
        with suppress(*_BROKEN):
            events = _raw(payload)
            for event in (events[place] for place in places):
                kind = event.get("type") if isinstance(event, dict) else event[0]
                if len(self.kinds) < EXAMPLES:
                    self.kinds.add("one without a type" if kind is None else f"{kind!r:.40}")

    def _note_hashes(self, payload: bytes) -> None:
        """Note the form of the hashes on the wire, which the decoded events do not have."""
        with suppress(*_BROKEN):
            for event in _raw(payload):
                hashes = event["block_hashes"] if isinstance(event, dict) else event[1]
                for each in hashes[:1]:
                    self.hashes[_form(each)] += len(hashes)


# Errors of a broken payload. They are ignored here, because decode_batch() reports them.
_BROKEN = (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, msgpack.UnpackException)


def _raw(payload: bytes) -> Any:
    batch = msgpack.unpackb(payload, strict_map_key=False, unicode_errors="surrogateescape")
    return batch.get("events", ()) if isinstance(batch, dict) else batch[1]


def _form(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return "integers"

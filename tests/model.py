"""A slow reference model of the index, written so that a reader can check it against the contract.

The model recomputes every answer from four facts per worker: names, copies, parked events and groups. It compares
content as tuples of tokens and extra keys, never as hashes, so it shares no arithmetic with the index under test.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgpack

STORED_FIELDS = (
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
REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")
STATES = ("exact", "degraded", "stale")
ENGINES = ("vllm", "sglang", "trtllm")
KNOWN_MEDIA = ("GPU", "CPU", "CPU_PINNED", "DISK", "STORAGE", "EXTERNAL")


class NotABatch(ValueError):
    """Raised for a payload that is not a batch. No part of it was applied."""


class BadEvent(ValueError):
    """Raised for an event that cannot be used. `reason` is the report's name for the defect."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Report:
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    parked: int = 0
    skipped: int = 0
    errors: int = 0
    reasons: Counter = field(default_factory=Counter)
    ts: float | None = None
    dp_rank: int = 0

    def skip(self, reason: str, n: int = 1) -> None:
        self.skipped += n
        self.errors += n * (reason in ("bad_event", "bad_token"))
        self.reasons[reason] += n


class Position:
    """A content prefix: the content of one block below a parent prefix. Equal content is the same object."""

    def __init__(self, parent: Position | None = None, lookahead: int = 0):
        self.parent = parent
        self.lookahead = lookahead  # number of lookahead tokens that are part of its identity
        self.depth = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple, Position] = {}

    def child(self, content: tuple) -> Position:
        if content not in self.children:
            self.children[content] = Position(self, len(content[3]))
        return self.children[content]

    def last(self, k: int) -> list[Position]:
        """Return this position and the k - 1 before it."""
        chain, at = [], self
        for _ in range(k):
            chain.append(at)
            at = at.parent
        return chain


@dataclass
class Group:
    kind: str | None = None
    window: int | None = None
    k: int = 1

    @property
    def rule(self) -> str:
        if self.kind is None:
            return "sliding" if self.window else "full"
        names = {"sliding_window": "sliding", "mamba": "mamba", "linear": "mamba", "chunked_local": "chunked"}
        return next((rule for part, rule in names.items() if part in self.kind), "full")


@dataclass(eq=False)
class Parked:
    """An event with an unknown parent (`parent`, `blocks`), or one copy of an unknown hash (`blocks` is None)."""

    waits_for: int
    medium: str
    group: int
    k: int
    hashes: list[int]
    live: list[bool]
    blocks: list[list[tuple]] | None = None
    lookahead: int = 0


@dataclass
class Worker:
    names: dict[int, Position] = field(default_factory=dict)
    copies: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)  # (medium, group, hash) -> k per copy
    parked: list[Parked] = field(default_factory=list)  # in order of arrival
    groups: dict[int, Group] = field(default_factory=dict)
    seen: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # (medium, group) -> k, as first announced
    added: list[tuple[Position, float]] = field(default_factory=list)  # (end of the prefix, expiry time)
    damaged: bool = False  # only a full clear heals this
    doubtful: bool = False  # a clear may have meant another medium as well: only a restart heals this
    lengths: set[int] = field(default_factory=set)  # numbers of lookahead tokens in its events
    unsure: set[int] = field(default_factory=set)  # names below a name whose meaning in a tier was wrong
    partial_first: bool = False  # a smaller block came before any full one: the first full one heals this
    placed: bool = False

    @property
    def parked_copies(self) -> int:
        return sum(sum(p.live) for p in self.parked)

    def parked_of(self, medium: str, group: int, h: int) -> list[tuple[Parked, int]]:
        return [
            (p, i)
            for p in self.parked
            if (p.medium, p.group) == (medium, group)
            for i in range(len(p.hashes))
            if p.hashes[i] == h and p.live[i]
        ]

    def forget(self) -> None:
        """Drop every name without a copy, without a known child and without a parked event that waits for it."""
        waited = {p.waits_for for p in self.parked}
        needed: set[Position] = set()
        for name in [h for (_, _, h), ks in self.copies.items() if ks] + [h for h in waited if h in self.names]:
            at = self.names[name]
            while at is not None and at not in needed:
                needed.add(at)
                at = at.parent
        self.names = {h: at for h, at in self.names.items() if at in needed}
        self.unsure &= self.names.keys()

    def forget_above(self, at: Position) -> None:
        """Do the same as `forget` for one position and its ancestors.

        A parked event does not keep the name that it waits for. A child that was announced before its parent therefore
        ends in the same state as one that was announced after it.
        """
        while at.parent is not None:
            named = {h for h, p in self.names.items() if p is at}
            if any(ks for (_, _, h), ks in self.copies.items() if h in named):
                return
            if any(at in p.last(p.depth) for p in self.names.values() if p is not at):
                return
            self.names = {h: p for h, p in self.names.items() if h not in named}
            at = at.parent

    def forget_parked(self) -> None:
        """Drop parked events without a live copy, unless another parked event depends on them, even indirectly."""
        kept = [p for p in self.parked if any(p.live)]
        while True:
            waited = {p.waits_for for p in kept}
            more = [p for p in self.parked if p not in kept and waited & set(p.hashes) and p.blocks is not None]
            if not more:
                break
            kept += more
        self.parked = [p for p in self.parked if p in kept]

    def held(self, group: int | None, medium: str | None) -> set[Position]:
        """Return the positions a group holds in one medium or in any.

        Speculative entries count for all groups, on the GPU.
        """
        copies = {
            at
            for (m, g, h), ks in self.copies.items()
            if g == group and medium in (None, m)
            for k in ks
            for at in self.names[h].last(k)
        }
        added = {at for end, _ in self.added for at in end.last(end.depth)}
        return copies | added if medium in (None, "GPU") else copies


@dataclass
class Pod:
    presence: str
    clear_media: frozenset[str] | None = None
    ignore_media: frozenset[str] = frozenset()
    chunk_size: int | None = None
    engine: str | None = None
    eagle: bool | frozenset[int] = False
    hybrid: bool = False
    workers: dict[tuple[int, str], Worker] = field(default_factory=dict)  # (rank, model)
    told: dict[int, str] = field(default_factory=dict)  # state of the event stream, by rank
    # "no": no event yet. "yes": an event or a stream state has arrived. "cut off": waits for the next stream state.
    heard: str = "no"

    def hear(self) -> None:
        self.heard = "yes" if self.heard == "no" else self.heard

    def state(self, worker: Worker) -> str:
        unruled = self.chunk_size is None and any(g.rule == "chunked" for g in worker.groups.values())
        # No copy counts exist for blocks that enter and leave with a window or a state.
        uncounted = self.presence == "set" and any(g.rule != "full" for g in worker.groups.values())
        return STATES[
            self.hybrid
            or worker.damaged
            or worker.doubtful
            or bool(worker.unsure)
            or worker.partial_first
            or worker.parked_copies > 0
            or unruled
            or uncounted
            or self.unruled_tiers(worker)
        ]

    def unruled_tiers(self, worker: Worker) -> bool:
        """Return whether vLLM's reuse of a tier follows an unknown rule or is not a whole number of blocks."""
        windows = any(group.rule in ("sliding", "chunked") for group in worker.groups.values())
        drops = len(worker.groups) > 1 and bool(self.flagged(worker))
        return self.engine == "vllm" and (windows or drops) and any(medium != "GPU" for medium, _ in worker.seen)

    def flagged(self, worker: Worker) -> set[int]:
        """Return the groups that drop the last block that they match."""
        if self.engine != "vllm" or any(worker.lengths):
            return set()
        return {
            number
            for number, group in worker.groups.items()
            if (self.eagle is True or (self.eagle and number in self.eagle)) and group.rule in ("full", "sliding")
        }


# ---------------------------------------------------------------------------------------------- values off the wire


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def fold(value: Any) -> int:
    if is_int(value):
        return value % 2**64
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    raise BadEvent("bad_event")


def tag(key: Any) -> tuple:
    """Return a representation of one extra key that is equal exactly when the kind and the value are equal."""
    if key is None:
        return ("n",)
    if isinstance(key, (bool, int)):
        return ("i", int(key) % 2**64)
    if isinstance(key, float):
        return ("f", struct.pack("<d", key))
    if isinstance(key, str):
        return ("s", key)
    if isinstance(key, bytes):
        return ("b", key)
    if isinstance(key, (list, tuple)):
        return ("(", *map(tag, key))
    raise BadEvent("bad_event")


def with_salt(keys: tuple, salt: str | None) -> tuple:
    """Insert the cache salt before the trailing digests, the place where vLLM puts it."""
    if salt is None:
        return keys
    end = len(keys)
    while end and keys[end - 1][0] == "b":
        end -= 1
    return (*keys[:end], ("s", salt), *keys[end:])


def contents(
    tokens, size: int, n: int, k: int, lora, entries, salt, first: bool, ahead: list | None = None
) -> list[list[tuple]]:
    """Return n engine blocks as k contents each. The extra keys of an engine block belong to the first of its k.

    ahead: the lookahead tokens of each engine block. They are part of the identity of each of its k contents.
    """
    blocks = []
    for i in range(n):
        keys = tuple(map(tag, entries[i] or ())) if entries is not None and i < len(entries) else ()
        if keys and lora is not None and keys[0] == ("s", lora):
            keys = keys[1:]
        if first and i == 0:
            keys = with_salt(keys, salt)
        at = i * k * size
        own = [*tokens[at : at + k * size], *(ahead[i] if ahead else ())]
        more = len(own) - k * size
        blocks.append(
            [
                (
                    tuple(own[j * size : (j + 1) * size]),
                    lora,
                    keys if j == 0 else (),
                    tuple(own[(j + 1) * size : (j + 1) * size + more]),
                )
                for j in range(k)
            ]
        )
    return blocks


# ------------------------------------------------------------------------------------------------------------ model


class Model:
    def __init__(self, block_size: int = 16, *, presence: str = "count", max_parked: int = 65536):
        self.block_size = block_size
        self.presence = presence
        self.max_parked = max_parked
        self.pods: dict[str, Pod] = {}
        self.roots: dict[str, Position] = {}
        self.media = {name.lower(): name for name in KNOWN_MEDIA}

    # --------------------------------------------------------------------------------------------------- the events

    def ingest(self, pod: str, payload: bytes, *, model: str = "", dp_rank: int | None = None) -> Report:
        try:
            ts, events, rank = read_batch(payload)
        except NotABatch:
            for (r, _), worker in self.pods[pod].workers.items() if pod in self.pods else ():
                worker.damaged |= r == (dp_rank or 0)
            raise
        rank = dp_rank if dp_rank is not None else rank if rank is not None else 0
        report = Report(ts=ts, dp_rank=rank)
        self._pod(pod).hear()
        for event in events:
            self._apply(pod, rank, model, event, report)
        return report

    def process_block_stored(self, event: Any) -> Report:
        return self._object(event, "BlockStored", (*STORED_FIELDS, "cache_salt", "lookahead_token_ids"))

    def process_block_removed(self, event: Any) -> Report:
        return self._object(event, "BlockRemoved", (*REMOVED_FIELDS, "remaining_copy_counts"))

    def process_all_blocks_cleared(self, event: Any) -> Report:
        return self._object(event, "AllBlocksCleared", ("medium",))

    def _object(self, event: Any, name: str, fields: tuple[str, ...]) -> Report:
        report = Report(dp_rank=event.dp_rank or 0)
        wire = {"type": name, **{f: getattr(event, f) for f in fields}}
        self._pod(event.pod).hear()
        self._apply(event.pod, report.dp_rank, getattr(event, "model", ""), wire, report)
        return report

    def _apply(self, pod: str, rank: int, model: str, event: Any, report: Report) -> None:
        if self._ignored(self._pod(pod), event):
            report.skip("ignored_medium")
            return
        # Only a stored event creates a worker. Before it, there is nothing to remove.
        worker = self.pods[pod].workers.get((rank, model), Worker())
        try:
            name, fields = read_event(event)
        except BadEvent as bad:
            worker.damaged = True
            report.skip(bad.reason)
            return
        new = (rank, model) not in self.pods[pod].workers
        if name == "BlockStored":
            self.pods[pod].workers[rank, model] = worker
        try:
            if name == "AllBlocksCleared":
                medium = fields.get("medium")
                self._clear(pod, rank, medium=medium if isinstance(medium, str) else None)
                report.cleared += 1
            elif name == "BlockStored":
                said = self._stored(self.pods[pod], worker, model, fields, report)
                if new and not said:
                    del self.pods[pod].workers[rank, model]
            else:
                self._removed(self.pods[pod], worker, model, fields, report)
        except BadEvent as bad:
            worker.damaged |= bad.reason in (
                "bad_event",
                "bad_token",
                "block_size_mismatch",
                "misaligned",
                "mixed_lookahead",
            )
            report.skip(bad.reason)

    def _ignored(self, pod: Pod, event: Any) -> bool:
        """Return whether the event is about an ignored medium. A clear without a medium is about all of them."""
        if isinstance(event, dict):
            name, medium = event.get("type"), event.get("medium")
        else:
            name = event[0] if isinstance(event, list) and event else None
            place = {"BlockStored": 6, "BlockRemoved": 2}.get(name)
            medium = event[place] if place is not None and place < len(event) else None
        if medium is not None and not isinstance(medium, str):
            medium = None
        if medium is None and name not in ("BlockStored", "BlockRemoved"):
            return False
        return bool(pod.ignore_media) and self._medium(medium) in pod.ignore_media

    def _stored(self, pod: Pod, worker: Worker, model: str, event: dict, report: Report) -> bool:
        hashes = read_hashes(event)
        parent = event.get("parent_block_hash")
        parent = None if parent is None else fold(parent)
        size = event.get("block_size") or 0
        tokens, ahead = read_lookahead(event, size, len(hashes))
        medium, group = self._medium(read(event, "medium", str)), read(event, "group_idx", int) or 0
        lora = read_lora(event)
        kind, window = read(event, "kv_cache_spec_kind", str), read(event, "kv_cache_spec_sliding_window", int)
        entries, salt = read(event, "extra_keys", list), read(event, "cache_salt", str)
        for entry in entries or ():
            if not isinstance(entry, (list, tuple, type(None))):
                raise BadEvent("bad_event")
            tag(entry)
        if not is_int(size) or size < 0:
            raise BadEvent("bad_event")

        # The event describes no block, not even a masked one.
        if not hashes and not tokens:
            return False

        cut = bool(tokens) and len(tokens) < size <= 65535 * self.block_size
        small = size < self.block_size * max((g.k for g in worker.groups.values()), default=1)
        partial = len(hashes) == 1 and size > 0 and (cut or small)
        if size % self.block_size or (tokens and not size) or size > 65535 * self.block_size or (partial and cut):
            if partial:
                if worker.placed:
                    raise BadEvent("partial_block")
                worker.partial_first = True
                report.skip("block_size_mismatch")
                return True
            raise BadEvent("block_size_mismatch")

        learned = worker.groups.setdefault(group, Group())
        learned.kind = kind if kind is not None else learned.kind
        learned.window = window or learned.window
        learned.k = max(learned.k, size // self.block_size)

        n, k = len(hashes), size // self.block_size or learned.k
        sizes = worker.seen.setdefault((medium, group), [])
        if k not in sizes:
            sizes.append(k)
        # Tokens that are not a whole number of blocks mask nothing: the first tokens are those of the blocks.
        whole = bool(tokens) and (len(tokens) == n * size or (len(tokens) > n * size and len(tokens) % size != 0))
        above = [parent] if whole else []
        distinct = hashes[: next((i for i in range(n) if hashes[i] in above + hashes[:i]), n)]
        if len(distinct) < n:
            report.skip("duplicate_hash", n - len(distinct))
            worker.damaged = True

        if whole and not distinct:
            return True
        if whole:
            blocks = contents(tokens, self.block_size, len(distinct), k, lora, entries, salt, parent is None, ahead)
            length = len(ahead[0]) if ahead else 0
            worker.lengths.add(length)
            things = [Parked(parent, medium, group, k, distinct, [True] * len(distinct), blocks, length)]
            worker.placed, worker.partial_first = True, False
        else:
            things = [Parked(h, medium, group, k, [h], [True]) for h in distinct]
        for thing in things:
            try:
                if self._place(pod, worker, model, thing):
                    report.stored += len(thing.hashes) - self.conflicts
                    if self.conflicts:
                        report.skip("hash_conflict", self.conflicts)
                        worker.damaged = True
                    self._attach(pod, worker, model, thing.hashes)
                    continue
                # Without copy counts, the last announcement replaces the one before.
                old = [it for h in thing.hashes for it in worker.parked_of(medium, group, h) if pod.presence == "set"]
                if worker.parked_copies - len(old) + len(thing.hashes) <= self.max_parked:
                    report.parked += len(thing.hashes)
                    for before, i in old:
                        before.live[i] = False
                    worker.parked.append(thing)
                    worker.forget_parked()
                else:
                    worker.damaged = True
                    report.skip("parked_full", len(thing.hashes))
            except BadEvent as bad:
                worker.damaged = True
                report.skip(bad.reason)
        return True

    def _place(self, pod: Pod, worker: Worker, model: str, thing: Parked) -> bool:
        """Place the event, or return False if its place is unknown. Count the names with two meanings in one medium."""
        self.conflicts = 0
        above = self._above(worker, model, thing)
        if above is None:
            return False
        if above.depth % thing.k:
            raise BadEvent("misaligned")
        if thing.blocks is not None and above.parent is not None and above.lookahead != thing.lookahead:
            raise BadEvent("mixed_lookahead")
        moved: dict[tuple[str, int, int], list[int]] = {}
        if thing.blocks is None:
            targets: list[Position] | None = [above]
        elif thing.medium == "GPU":
            targets = self._decide(worker, model, thing, moved)
        else:
            targets = self._follow(worker, model, thing, above)
        if targets is None:
            # The names moved, and the parent was kept only for the sake of their previous meaning.
            worker.damaged |= bool(moved)
            self.conflicts = 0
            return False
        if any(at.depth % thing.k for at in targets):
            raise BadEvent("misaligned")
        for h, at, live in zip(thing.hashes, targets, thing.live, strict=True):
            worker.names[h] = at
            copies = worker.copies.setdefault((thing.medium, thing.group, h), [])
            if live and not (copies and pod.presence == "set"):
                copies.append(thing.k)
        for (medium, group, h), ks in moved.items():
            copies = worker.copies.setdefault((medium, group, h), [])
            fit = [k for k in ks if worker.names[h].depth % k == 0]
            worker.damaged |= len(fit) < len(ks)
            copies.extend(fit if pod.presence == "count" else fit[: not copies])
        if thing.blocks is not None and thing.medium == "GPU":
            worker.unsure -= set(thing.hashes)
        return True

    def _above(self, worker: Worker, model: str, thing: Parked) -> Position | None:
        """Return the position of the parent or, for an event without content, of the block itself."""
        if thing.waits_for is None:
            return self.roots.setdefault(model, Position())
        return worker.names.get(thing.waits_for)

    def _forget_name(self, worker: Worker, h: int) -> None:
        at = worker.names.pop(h)
        worker.copies = {key: ks for key, ks in worker.copies.items() if key[2] != h}
        worker.forget_above(at)
        worker.unsure &= worker.names.keys()

    def _decide(self, worker: Worker, model: str, thing: Parked, moved: dict) -> list[Position] | None:
        """Resolve names by an event of the engine's own pool.

        Copies in other media that were announced before move to the new content.
        """
        while True:
            at = self._above(worker, model, thing)
            if at is None:
                return None
            targets = []
            for block in thing.blocks or ():
                for content in block:
                    at = at.child(content)
                targets.append(at)
            others = [h for h, to in zip(thing.hashes, targets, strict=True) if worker.names.get(h, to) is not to]
            if not others:
                return targets
            h = others[0]
            own = any(ks for (m, _, name), ks in worker.copies.items() if name == h and m == "GPU")
            unsure = h in worker.unsure
            self.conflicts += own and not unsure
            along = {key: ks for key, ks in worker.copies.items() if key[2] == h and ks and (unsure or key[0] != "GPU")}
            moved.update(along)
            if along:
                gpu = {name for (m, _, name), ks in worker.copies.items() if m == "GPU" and ks}
                was = worker.names[h]
                below = {name for name, p in worker.names.items() if p is not was and was in p.last(p.depth)}
                worker.unsure |= below - gpu
            self._forget_name(worker, h)

    def _follow(self, worker: Worker, model: str, thing: Parked, at: Position) -> list[Position] | None:
        """Resolve names by an event of a tier.

        A name keeps the content that is held under it, even if the event lacks keys.
        """
        targets = []
        for h, block in zip(thing.hashes, thing.blocks or (), strict=True):
            mixed = at.parent is not None and at.lookahead != thing.lookahead
            for content in block:
                at = at.child(content)
            known = worker.names.get(h, at)
            if known is not at:
                where = {key[:2] for key, ks in worker.copies.items() if key[2] == h and ks}
                if where:
                    if known.depth % thing.k:
                        raise BadEvent("misaligned")
                    self.conflicts += where == {(thing.medium, thing.group)}
                    at = known
                    mixed = False
                else:
                    self._forget_name(worker, h)
            if mixed:
                raise BadEvent("mixed_lookahead")
            targets.append(at)
        return targets if self._above(worker, model, thing) is not None else None

    def _attach(self, pod: Pod, worker: Worker, model: str, hashes: list[int]) -> None:
        """Place the events that waited for these hashes, in order of arrival, and then their dependents."""
        fresh = list(hashes)
        while fresh:
            name = fresh.pop()
            for thing in [p for p in worker.parked if p.waits_for == name]:
                if name not in worker.names:
                    break
                try:
                    placed = self._place(pod, worker, model, thing)
                except BadEvent:
                    placed, worker.damaged = True, True
                else:
                    worker.damaged |= placed and self.conflicts > 0
                    fresh += thing.hashes if placed and thing.blocks is not None else []
                worker.parked.remove(thing)
                if not placed:
                    worker.parked.append(thing)
        worker.forget_parked()
        worker.forget()

    def _removed(self, pod: Pod, worker: Worker, model: str, event: dict, report: Report) -> None:
        hashes = read_hashes(event)
        medium, group = self._medium(read(event, "medium", str)), read(event, "group_idx", int) or 0
        remaining = read(event, "remaining_copy_counts", list)
        counts = remaining or ()
        if remaining is not None and (len(counts) != len(hashes) or not all(is_int(n) and n >= 0 for n in counts)):
            raise BadEvent("bad_event")
        for i, h in enumerate(hashes):
            copies, parked = worker.copies.get((medium, group, h)), worker.parked_of(medium, group, h)
            if not copies and not parked:
                report.skip("unknown_hash")
                continue
            report.removed += 1
            if copies:
                # The event has no block size. Copies of the size that was announced first are removed first.
                k = next(k for k in worker.seen[medium, group] if k in copies)
                left = copies.count(k) - 1 if remaining is None else remaining[i]
                left = min(left, 1) if pod.presence == "set" else left
                copies[:] = [other for other in copies if other != k] + [k] * left
            else:
                for thing, j in parked[-1:] if remaining is None else parked[remaining[i] :]:
                    thing.live[j] = False
        worker.forget_parked()
        worker.forget()

    def _clear(self, name: str, rank: int, *, medium: str | None = None, everything: bool = False) -> None:
        pod = self._pod(name)
        pod.hear()
        media = None if everything else pod.clear_media if medium is None else {self._medium(medium)}
        for (r, model), worker in pod.workers.items():
            if r != rank:
                continue
            if media is None:
                held = {m for (m, _, _), ks in worker.copies.items() if ks} | {
                    p.medium for p in worker.parked if any(p.live)
                }
                cleared = {m for m in held if m == "GPU" or (pod.engine == "sglang" and m.upper().startswith("CPU"))}
                doubtful = not everything and (worker.doubtful or bool(held - cleared))
                pod.workers[r, model] = Worker(doubtful=doubtful)
                continue
            self._clear_media(worker, media)

    def _clear_media(self, worker: Worker, media: Any) -> None:
        worker.copies = {key: ks for key, ks in worker.copies.items() if key[0] not in media}
        worker.added = [] if "GPU" in media else worker.added
        for p in worker.parked:
            if p.medium in media:
                p.live = [False] * len(p.live)
        worker.forget_parked()
        worker.forget()

    # ----------------------------------------------------------------------------------------------------- the rest

    def add_prefix(
        self,
        pod: str,
        tokens,
        *,
        ttl: float,
        now: float,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys=None,
        dp_rank: int = 0,
    ) -> None:
        worker = self._pod(pod).workers.setdefault((dp_rank, model), Worker())
        for lookahead in sorted(worker.lengths) or [0]:
            at = self.roots.setdefault(model, Position())
            for content in self._query(tokens, lora_name, cache_salt, extra_keys, lookahead):
                at = at.child(content)
            if at.parent is not None:  # A prompt shorter than a block and its lookahead adds nothing.
                worker.added.append((at, now + ttl))
                worker.lengths.add(lookahead)

    def expire(self, now: float) -> None:
        for pod in self.pods.values():
            for worker in pod.workers.values():
                worker.added = [(end, expiry) for end, expiry in worker.added if expiry > now]

    def remove_pod(self, pod: str) -> None:
        del self.pods[pod]

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None:
        self._clear(pod, dp_rank, everything=True)

    def configure_pod(
        self, pod: str, *, presence=None, clear_media=None, chunk_size=None, ignore_media=None, engine=None, eagle=None,
        hybrid=None,
    ) -> None:  # fmt: skip
        it = self._pod(pod)
        if ignore_media is not None:
            it.ignore_media = frozenset(map(self._medium, ignore_media))
            for worker in it.workers.values():
                self._clear_media(worker, it.ignore_media)
        it.presence = presence or it.presence
        it.clear_media = frozenset(map(self._medium, clear_media)) if clear_media is not None else it.clear_media
        it.chunk_size = chunk_size or it.chunk_size
        it.engine = engine or it.engine
        it.eagle = it.eagle if eagle is None else eagle if isinstance(eagle, bool) else frozenset(eagle)
        it.hybrid = it.hybrid if hybrid is None else hybrid

    def mark_worker(self, pod: str, dp_rank: int, state: str) -> None:
        it = self._pod(pod)
        it.told[dp_rank], it.heard = state, "yes"

    def pod_state(self, pod: str) -> str:
        it = self.pods[pod]
        if it.heard != "yes":
            return "stale"
        return max([*map(it.state, it.workers.values()), *it.told.values(), STATES[it.hybrid]], key=STATES.index)

    def _medium(self, name: str | None) -> str:
        """Return the canonical name of a medium. Case does not matter, and an unknown name keeps its first spelling."""
        return "GPU" if name is None else self.media.setdefault(name.lower(), name)

    def _pod(self, pod: str) -> Pod:
        return self.pods.setdefault(pod, Pod(self.presence))

    # ------------------------------------------------------------------------------------------------- the question

    def match(self, tokens, **query: Any) -> dict[str, dict]:
        """Return {pod: {"tokens": the best rank's, "ranks": {rank: tokens}, "media": {medium: the best rank's}}}."""
        return {
            pod: {"tokens": max(it["ranks"].values()), "ranks": it["ranks"], "media": it["media"]}
            for pod, it in self._answers(tokens, **query).items()
            if it["ranks"]
        }

    def holdings(self, tokens, **query: Any) -> dict[str, dict]:
        """Return {pod: {"held", "tiers" of the best rank, "order" of these}} for all pods that hold anything."""
        return {
            pod: {"held": it["held"], "tiers": it["tiers"], "order": list(it["tiers"])}
            for pod, it in self._answers(tokens, **query).items()
            if it["held"] or it["tiers"]
        }

    def _answers(
        self,
        tokens,
        *,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys=None,
        lengths: set[int] | None = None,
    ) -> dict[str, dict]:
        if lengths is None:
            lengths = {0}.union(*(w.lengths for pod in self.pods.values() for w in pod.workers.values()))
        paths = []
        for lookahead in sorted(lengths):
            path, at = [], self.roots.get(model)
            for content in self._query(tokens, lora_name, cache_salt, extra_keys, lookahead):
                at = at.children.get(content) if at else None
                path.append(at)
            paths.append(path)
        answers = {}
        for name, pod in self.pods.items():
            ranks: Counter = Counter()
            media: Counter = Counter()
            tiers = {}
            held = 0
            for (rank, m), worker in sorted(pod.workers.items()):
                reached: dict[str, int] = {}
                places = {medium for medium, _ in worker.seen} | ({"GPU"} if worker.added else set())
                for path in paths if m == model else ():
                    whole = self._hit(pod, worker, path, set(worker.groups), None)
                    held = max(held, whole)
                    for medium in places:
                        groups = {g for seen, g in worker.seen if seen == medium} or set(worker.groups)
                        # A single medium never gives more than all of them together.
                        alone = self._hit(pod, worker, path[: whole // self.block_size], groups, medium)
                        media[medium] = max(media[medium], alone)
                    there = {medium: whole for medium in places if whole} if len(places) == 1 else {}
                    if pod.engine in ("vllm", "sglang"):
                        reuse = Reuse(self, pod, worker, path, sorted(places, key=tier))
                        whole, there = reuse.tokens(len(tokens)), reuse.tiers()
                    ranks[rank] = max(ranks[rank], whole)
                    for medium, tokens_there in there.items():
                        reached[medium] = max(reached.get(medium, 0), tokens_there)
                if m == model:
                    tiers[rank] = reached
            best = max(tiers, key=lambda r: (ranks[r], max(tiers[r].values(), default=0), -r), default=None)
            answers[name] = {
                "ranks": dict(+ranks),
                "media": dict(+media),
                "held": held,
                "tiers": {} if best is None else tiers[best],
            }
        return answers

    def _query(self, tokens, lora, salt, extra_keys, lookahead: int = 0) -> list[tuple]:
        size, tokens = self.block_size, list(tokens)
        n = max(0, len(tokens) - lookahead) // size
        ahead = [tokens[(i + 1) * size : (i + 1) * size + lookahead] for i in range(n)]
        return [b[0] for b in contents(tokens, size, n, 1, lora, extra_keys, salt, True, ahead)]

    def _hit(self, pod: Pod, worker: Worker, path: list, groups: set[int], medium: str | None) -> int:
        rows = [(in_medium(pod, worker, g, medium), worker.held(g, medium)) for g in groups or {None}]
        flags = [(group, [at in held for at in path]) for group, held in rows]
        return next(
            length * self.block_size
            for length in range(len(path), -1, -1)
            if (length == 0 or any(held[length - 1] for _, held in flags))
            and all(self._agrees(pod, group, held, length) for group, held in flags)
        )

    def _agrees(self, pod: Pod, group: Group, held: list[bool], length: int) -> bool:
        """Return whether this group lets the worker reuse `length` blocks."""
        size = group.k * self.block_size
        if length % group.k:
            return False
        start = 0
        if group.rule == "sliding" and group.window:
            # vLLM looks for at least one block, however small the window is.
            start = length - max(1, -(-(group.window - 1) // size)) * group.k
        elif group.rule == "mamba":
            start = length - 1  # Only the state behind the last block is needed, for any block size.
        elif group.rule == "chunked" and pod.chunk_size:
            start = length * self.block_size // pod.chunk_size * pod.chunk_size // size * group.k
        return all(held[max(start, 0) : length])


def tier(medium: str) -> tuple[int, str]:
    """Sort key for the order in which an engine reads media: the known ones in a fixed order, then the others."""
    return (KNOWN_MEDIA.index(medium) if medium in KNOWN_MEDIA else len(KNOWN_MEDIA), medium)


def in_medium(pod: Pod, worker: Worker, group: int | None, medium: str | None) -> Group:
    """Return the group with its block size in a medium, or with its smallest block size if no medium is given."""
    it = worker.groups.get(group, Group())
    sizes = [k for (m, g), ks in worker.seen.items() if g == group and medium in (None, m) for k in ks]
    if pod.engine not in ("vllm", "sglang") or not sizes:
        return it
    return Group(it.kind, it.window, min(sizes) if medium is None else max(sizes))


class Reuse:
    """The part of a prompt that vLLM or SGLang reuses from one of its workers. Lengths are in index blocks."""

    def __init__(self, model: Model, pod: Pod, worker: Worker, path: list, places: list[str]) -> None:
        self.model, self.pod, self.worker, self.path, self.places = model, pod, worker, path, places
        self.windows = any(group.rule != "full" for group in worker.groups.values())
        self.flagged = pod.flagged(worker)

    def flags(self, group: int | None, medium: str, base: int = 0) -> list[bool]:
        held = self.worker.held(group, medium)
        return [i < base or at in held for i, at in enumerate(self.path)]

    def agreed(self, medium: str, most: int, *, base: int = 0) -> int:
        """Return the largest length up to `most` that all groups agree on. Everything before `base` counts as held."""
        groups = set(self.worker.groups)
        rows = [(in_medium(self.pod, self.worker, g, medium), self.flags(g, medium, base)) for g in groups or {None}]
        return next(
            length
            for length in range(most, -1, -1)
            if (length == 0 or any(held[length - 1] for _, held in rows))
            and all(self.model._agrees(self.pod, group, held, length) for group, held in rows)
        )

    def beyond(self, medium: str, start: int, most: int) -> int:
        return start if start >= most else max(start, self.agreed(medium, most, base=start))

    def tiers(self) -> dict[str, int]:
        at, reached = 0, {}
        for medium in self.places:
            there = self.agreed(medium, len(self.path)) if medium == "GPU" else self.beyond(medium, at, len(self.path))
            if there > at:
                reached[medium] = there * self.model.block_size
            at = there
        return reached

    def tokens(self, n: int) -> int:
        at = 0
        cut = len(self.path)
        if self.pod.engine == "vllm" and n:
            cut = min(cut, (n - 1) // self.model.block_size)
        for medium in self.places:
            if medium == "GPU":
                at = self.dropped(cut) if self.flagged else self.agreed("GPU", cut)
                continue
            there = self.beyond(medium, at, cut if self.windows else len(self.path))
            if self.flagged and there > at:
                there -= min(there - at, in_medium(self.pod, self.worker, min(self.worker.groups), medium).k)
            at = there
        return at * self.model.block_size

    def dropped(self, cut: int) -> int:
        """Do vLLM's look-up over several groups, some of which drop the last block that they match."""
        groups = {g: in_medium(self.pod, self.worker, g, "GPU") for g in sorted(self.worker.groups)}
        if len(groups) == 1:
            run = self.agreed("GPU", cut)
            return max(0, run - next(iter(groups.values())).k)
        spec = {g: (it.rule, it.window if it.rule == "sliding" else None, it.k) for g, it in groups.items()}
        drops = {spec[g] for g in self.flagged}
        specs = list(dict.fromkeys(sorted(spec.values(), key=lambda it: it[0] != "full")))
        unit = math.lcm(*(it.k for it in groups.values()))
        found: dict[tuple, int] = {}
        verified: set[tuple] = set()
        hit = cut
        while True:
            at = hit
            for one in specs:
                if one[0] == "full" and one in found:
                    at = min(at, found[one])
                    continue
                drop = one in drops and one not in verified
                most = min(at + one[2], len(self.path)) if drop else at
                now = self.found([g for g in groups if spec[g] == one], groups, most, drop, unit)
                if drop:
                    verified.add(one)
                elif now < at:
                    verified.clear()
                at = found[one] = now
            if at >= hit:
                return hit
            hit = at
            if len(specs) == 2 and specs[0][0] == "full":
                return hit

    def found(self, members: list[int], groups: dict[int, Group], most: int, drop: bool, unit: int) -> int:
        rows = [self.flags(g, "GPU") for g in members]
        held = [all(flags) for flags in zip(*rows, strict=True)]
        group = groups[members[0]]
        if group.rule == "full":
            run = next((i for i in range(most) if not held[i]), most)
            run -= run % group.k
            run = max(0, run - group.k) if drop else run
            return run - run % unit
        more = group.k if drop else 0
        for length in range(most - more, 0, -1):
            if length % unit:
                continue
            if drop and group.rule == "sliding":
                size = group.k * self.model.block_size
                start = length - max(1, -(-(group.window - 1) // size)) * group.k
                if all(held[max(0, start) : length + more]):
                    if start >= 0:
                        return length
                    # A prefix shorter than the window is aligned once more before its last block is dropped.
                    run = (length + more) // unit * unit
                    return max(0, run - group.k) // unit * unit
            elif self.model._agrees(self.pod, group, held, length):
                return length
        return 0


# ------------------------------------------------------------------------------------------------------- the reader


def read_batch(payload: bytes) -> tuple[float, list, int | None]:
    try:
        batch = msgpack.unpackb(payload, strict_map_key=False)
    except Exception as error:
        raise NotABatch(str(error)) from error
    if isinstance(batch, dict):
        batch = [batch.get("ts"), batch.get("events"), batch.get("data_parallel_rank")]
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise NotABatch("no batch")
    ts, events, rank = (*batch, None)[:3]
    if isinstance(ts, bool) or not isinstance(ts, (int, float)):
        raise NotABatch("no timestamp")
    # Integers above 1e11 are milliseconds: as seconds they would be after the year 5000.
    return (ts / 1000 if isinstance(ts, int) and ts > 10**11 else float(ts)), events, rank


def read_event(event: Any) -> tuple[str, dict]:
    if isinstance(event, dict):
        name, fields = event.get("type"), dict(event)
    elif isinstance(event, list) and event:
        name, values = event[0], event[1:]
        fields = dict(zip(REMOVED_FIELDS if name == "BlockRemoved" else STORED_FIELDS, values, strict=False))
        if isinstance(fields.get("lora_name"), dict):
            fields["cache_salt"] = fields.pop("lora_name").get("cache_salt")
        if name == "BlockStored" and len(values) < 4:
            fields = {}
    else:
        raise BadEvent("bad_event")
    if name not in ("BlockStored", "BlockRemoved", "AllBlocksCleared"):
        raise BadEvent("unknown_event")
    return name, fields


def read(event: dict, name: str, kind: type) -> Any:
    value = event.get(name)
    accepted = is_int(value) if kind is int else isinstance(value, (list, tuple) if kind is list else kind)
    if value is not None and not accepted:
        raise BadEvent("bad_event")
    return value


def read_hashes(event: dict) -> list[int]:
    hashes = event.get("block_hashes")
    if hashes is None:
        raise BadEvent("bad_event")
    if isinstance(hashes, (str, bytes, int, float, dict)):
        raise BadEvent("bad_event")
    return [fold(h.item() if hasattr(h, "item") else h) for h in hashes]


def read_tokens(event: dict) -> list[int]:
    tokens = event.get("token_ids")
    if tokens is None:
        return []
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if not isinstance(tokens, (list, tuple, range)):
        raise BadEvent("bad_event")
    if not all(is_int(t) and 0 <= t < 2**32 for t in tokens):
        raise BadEvent("bad_token")
    return list(tokens)


def read_lookahead(event: dict, size: int, n: int) -> tuple[list[int], list | None]:
    """Return the tokens and each block's lookahead tokens, from separate lists or from the second elements of pairs."""
    tokens, lists = event.get("token_ids"), event.get("lookahead_token_ids")
    pairs = isinstance(tokens, (list, tuple)) and bool(tokens) and isinstance(tokens[0], (list, tuple))
    if pairs:
        if not all(isinstance(t, (list, tuple)) and len(t) == 2 for t in tokens):
            raise BadEvent("bad_token")
        behind = read_tokens({"token_ids": [second for _, second in tokens]})
        tokens = read_tokens({"token_ids": [first for first, _ in tokens]})
        if behind[:-1] != tokens[1:]:
            raise BadEvent("bad_token")
        if lists is not None:
            raise BadEvent("bad_event")
        return tokens, [[behind[min(j * size, len(tokens)) - 1]] for j in range(1, n + 1)] if is_int(size) else None
    tokens = read_tokens(event)
    if lists is None:
        return tokens, None
    if not isinstance(lists, (list, tuple)) or len(lists) != n:
        raise BadEvent("bad_event")
    for ahead in lists:
        if not isinstance(ahead, (list, tuple)) or len(ahead) != len(lists[0]) or len(ahead) > 64:
            raise BadEvent("bad_event")
        if not all(is_int(t) and 0 <= t < 2**32 for t in ahead):
            raise BadEvent("bad_event")
    return tokens, [list(ahead) for ahead in lists]


def read_lora(event: dict) -> str | None:
    name, number = read(event, "lora_name", str), event.get("lora_id")
    if name is not None:
        return name
    if isinstance(number, str):
        return number
    return str(number) if is_int(number) and number > 0 else None

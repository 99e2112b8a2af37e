"""The slow model: what the index must answer, written so that a reader can check it against the contract.

Everything is recomputed from four facts per worker (names, copies, parked things, groups). Content is compared as
tuples of tokens and extra keys, never as hashes, so the model shares no arithmetic with what it judges.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgpack

STORED_FIELDS = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window",
)
REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")
STATES = ("exact", "degraded", "stale")


class NotABatch(ValueError):
    """The payload is no batch: nothing of it was applied."""


class BadEvent(ValueError):
    """One event cannot be used; `reason` is the report's name for it."""

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

    def skip(self, reason: str) -> None:
        self.skipped += 1
        self.errors += reason in ("bad_event", "bad_token")
        self.reasons[reason] += 1


class Position:
    """One content prefix: a block's content below a parent prefix. Equal content is the same object."""

    def __init__(self, parent: Position | None = None):
        self.parent = parent
        self.depth = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple, Position] = {}

    def child(self, content: tuple) -> Position:
        if content not in self.children:
            self.children[content] = Position(self)
        return self.children[content]

    def last(self, k: int) -> list[Position]:
        """This position and the k - 1 before it."""
        chain, at = [], self
        for _ in range(k):
            chain.append(at)
            at = at.parent
        return chain


@dataclass
class Group:
    kind: str = ""
    window: int | None = None
    k: int = 1


@dataclass(eq=False)
class Parked:
    """An event whose parent is unknown (`parent`, `blocks`), or one copy of an unknown hash (`blocks` is None)."""

    waits_for: int
    medium: str
    group: int
    k: int
    hashes: list[int]
    live: list[bool]
    blocks: list[list[tuple]] | None = None


@dataclass
class Worker:
    names: dict[int, Position] = field(default_factory=dict)
    copies: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)  # (medium, group, hash) -> k per copy
    parked: list[Parked] = field(default_factory=list)  # in order of arrival
    groups: dict[int, Group] = field(default_factory=dict)
    seen: set[tuple[str, int]] = field(default_factory=set)  # (medium, group)
    damaged: bool = False  # what only a full clear heals
    partial_first: bool = False  # a smaller block came before any full one: heals with the first full one
    placed: bool = False

    @property
    def parked_copies(self) -> int:
        return sum(sum(p.live) for p in self.parked)

    @property
    def state(self) -> str:
        return STATES[self.damaged or self.partial_first or self.parked_copies > 0]

    def forget(self) -> None:
        """Drop every name whose position nobody needs: no copy, no known child, nothing parked that waits for it."""
        waited = {p.waits_for for p in self.parked}
        needed: set[Position] = set()
        for name in [h for (_, _, h), ks in self.copies.items() if ks] + [h for h in waited if h in self.names]:
            at = self.names[name]
            while at is not None and at not in needed:
                needed.add(at)
                at = at.parent
        self.names = {h: at for h, at in self.names.items() if at in needed}

    def forget_parked(self) -> None:
        """Drop parked events without a copy that nothing parked (directly or in turn) hangs below."""
        kept = [p for p in self.parked if any(p.live)]
        while True:
            waited = {p.waits_for for p in kept}
            more = [p for p in self.parked if p not in kept and waited & set(p.hashes) and p.blocks is not None]
            if not more:
                break
            kept += more
        self.parked = [p for p in self.parked if p in kept]

    def held(self, group: int, medium: str | None = None) -> set[Position]:
        return {
            at
            for (m, g, h), ks in self.copies.items()
            if g == group and medium in (None, m)
            for k in ks
            for at in self.names[h].last(k)
        }


@dataclass
class Pod:
    presence: str
    clear_media: frozenset[str] | None = None
    chunk_size: int | None = None
    workers: dict[tuple[int, str], Worker] = field(default_factory=dict)  # (rank, model)
    verdicts: dict[int, str] = field(default_factory=dict)  # the stream's, by rank
    added: list[tuple[int, str, Position, float]] = field(default_factory=list)  # rank, model, end of prefix, expiry


# ---------------------------------------------------------------------------------------------- values off the wire


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def fold(value: Any) -> int:
    if is_int(value):
        return value % 2**64
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    raise BadEvent("bad_event")


def upper(medium: str | None) -> str:
    return "GPU" if medium is None else medium.upper()


def tag(key: Any) -> tuple:
    """One extra key as something that is equal exactly when kind and value are."""
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
    """The cache salt stands before the trailing digests, where vLLM puts it."""
    if salt is None:
        return keys
    end = len(keys)
    while end and keys[end - 1][0] == "b":
        end -= 1
    return (*keys[:end], ("s", salt), *keys[end:])


def contents(tokens, size: int, n: int, k: int, lora, entries, salt, first: bool) -> list[list[tuple]]:
    """n engine blocks as k contents each. An engine block's extra keys belong to the first of its k."""
    blocks = []
    for i in range(n):
        keys = tuple(map(tag, entries[i] or ())) if entries is not None and i < len(entries) else ()
        if keys and lora is not None and keys[0] == ("s", lora):
            keys = keys[1:]
        if first and i == 0:
            keys = with_salt(keys, salt)
        at = i * k * size
        blocks.append(
            [(tuple(tokens[at + j * size : at + (j + 1) * size]), lora, keys if j == 0 else ()) for j in range(k)]
        )
    return blocks


# ----------------------------------------------------------------------------------------------------------- model


class Model:
    def __init__(self, block_size: int = 16, *, presence: str = "count", max_parked: int = 65536):
        self.block_size = block_size
        self.presence = presence
        self.max_parked = max_parked
        self.pods: dict[str, Pod] = {}
        self.roots: dict[str, Position] = {}

    # -------------------------------------------------------------------------------------------------- the events

    def ingest(self, pod: str, payload: bytes, *, model: str = "", dp_rank: int | None = None) -> Report:
        try:
            ts, events, rank = read_batch(payload)
        except NotABatch:
            existing = self.pods[pod].workers.get((dp_rank or 0, model)) if pod in self.pods else None
            if existing is not None:
                existing.damaged = True
            raise
        rank = dp_rank if dp_rank is not None else rank if rank is not None else 0
        report = Report(ts=ts, dp_rank=rank)
        self._worker(pod, rank, model)
        for event in events:
            self._apply(pod, rank, model, event, report)
        return report

    def process_block_stored(self, event: Any) -> Report:
        return self._object(event, "BlockStored", (*STORED_FIELDS, "cache_salt"))

    def process_block_removed(self, event: Any) -> Report:
        return self._object(event, "BlockRemoved", REMOVED_FIELDS)

    def process_all_blocks_cleared(self, event: Any) -> Report:
        report = Report(dp_rank=event.dp_rank or 0)
        self._clear(event.pod, report.dp_rank)
        report.cleared = 1
        return report

    def _object(self, event: Any, name: str, fields: tuple[str, ...]) -> Report:
        report = Report(dp_rank=event.dp_rank or 0)
        wire = {"type": name, **{f: getattr(event, f) for f in fields}}
        self._apply(event.pod, report.dp_rank, event.model, wire, report)
        return report

    def _apply(self, pod: str, rank: int, model: str, event: Any, report: Report) -> None:
        try:
            name, fields = read_event(event)
        except BadEvent as bad:
            report.skip(bad.reason)
            return
        if name == "AllBlocksCleared":
            self._clear(pod, rank)
            report.cleared += 1
            return
        worker = self._worker(pod, rank, model)
        try:
            (self._stored if name == "BlockStored" else self._removed)(self.pods[pod], worker, model, fields, report)
        except BadEvent as bad:
            worker.damaged |= bad.reason in ("bad_event", "bad_token", "block_size_mismatch", "misaligned")
            report.skip(bad.reason)

    def _stored(self, pod: Pod, worker: Worker, model: str, event: dict, report: Report) -> None:
        hashes = read_hashes(event)
        parent = event.get("parent_block_hash")
        parent = None if parent is None else fold(parent)
        tokens = read_tokens(event)
        size = event.get("block_size") or 0
        lora, medium, group = read_lora(event), upper(read(event, "medium", str)), read(event, "group_idx", int) or 0
        kind, window = read(event, "kv_cache_spec_kind", str), read(event, "kv_cache_spec_sliding_window", int)
        entries, salt = read(event, "extra_keys", list), read(event, "cache_salt", str)
        for entry in entries or ():
            if not isinstance(entry, (list, tuple, type(None))):
                raise BadEvent("bad_event")
            tag(entry)
        if not is_int(size) or size < 0:
            raise BadEvent("bad_event")

        if size % self.block_size or (tokens and not size):
            if len(hashes) == 1 and size < self.block_size:
                if worker.placed:
                    raise BadEvent("partial_block")
                worker.partial_first = True
                report.skip("block_size_mismatch")
                return
            raise BadEvent("block_size_mismatch")

        learned = worker.groups.setdefault(group, Group())
        worker.seen.add((medium, group))
        learned.kind = kind or learned.kind
        learned.window = window or learned.window
        learned.k = size // self.block_size or learned.k
        worker.damaged |= learned.kind.startswith("chunked_local") and pod.chunk_size is None

        n, k = len(hashes), learned.k
        whole = bool(tokens) and len(tokens) == n * size
        distinct = list(dict.fromkeys(hashes))
        if len(distinct) < n:
            distinct = hashes[: next(i for i in range(n) if hashes[i] in hashes[:i])]
            report.skip("duplicate_hash")

        if whole:
            blocks = contents(tokens, self.block_size, len(distinct), k, lora, entries, salt, parent is None)
            things = [Parked(parent, medium, group, k, distinct, [True] * len(distinct), blocks)]
        else:
            things = [Parked(h, medium, group, k, [h], [True]) for h in distinct]
        for thing in things:
            try:
                if self._place(pod, worker, model, thing):
                    report.stored += len(thing.hashes)
                elif sum(len(p.hashes) for p in worker.parked) + len(thing.hashes) <= self.max_parked:
                    worker.parked.append(thing)
                    report.parked += len(thing.hashes)
                else:
                    worker.damaged = True
                    report.skip("parked_full")
            except BadEvent as bad:
                worker.damaged = True
                report.skip(bad.reason)
        self._attach(pod, worker, model)

    def _place(self, pod: Pod, worker: Worker, model: str, thing: Parked) -> bool:
        """Put it where it belongs; False where that is not known."""
        worker.forget()
        targets = self._targets(worker, model, thing)
        if targets and thing.blocks is not None and not targets[0].depth % thing.k:
            # The last announcement of a hash wins, even over the copies that its old place had.
            moved = {h for h, at in zip(thing.hashes, targets) if worker.names.get(h, at) is not at}
            worker.names = {h: at for h, at in worker.names.items() if h not in moved}
            worker.copies = {key: ks for key, ks in worker.copies.items() if key[2] not in moved}
            worker.forget()
            targets = self._targets(worker, model, thing)
        if targets is None:
            return False
        if any(at.depth % thing.k for at in targets):
            raise BadEvent("misaligned")
        for h, at, live in zip(thing.hashes, targets, thing.live):
            worker.names[h] = at
            copies = worker.copies.setdefault((thing.medium, thing.group, h), [])
            if live and not (copies and pod.presence == "set"):
                copies.append(thing.k)
        worker.placed |= bool(targets)
        worker.partial_first &= not targets
        return True

    def _targets(self, worker: Worker, model: str, thing: Parked) -> list[Position] | None:
        if thing.waits_for is None:
            at = self.roots.setdefault(model, Position())
        elif thing.waits_for in worker.names:
            at = worker.names[thing.waits_for]
        else:
            return None
        if thing.blocks is None:
            return [at]
        targets = []
        for block in thing.blocks:
            for content in block:
                at = at.child(content)
            targets.append(at)
        return targets

    def _attach(self, pod: Pod, worker: Worker, model: str) -> None:
        """Place what is parked and can be, the oldest first, until nothing moves."""
        while ready := next((p for p in worker.parked if p.waits_for in worker.names), None):
            try:
                if not self._place(pod, worker, model, ready):
                    continue
            except BadEvent:
                worker.damaged = True
            worker.parked.remove(ready)
        worker.forget()

    def _removed(self, pod: Pod, worker: Worker, model: str, event: dict, report: Report) -> None:
        hashes = read_hashes(event)
        medium, group = upper(read(event, "medium", str)), read(event, "group_idx", int) or 0
        for h in hashes:
            copies = worker.copies.get((medium, group, h))
            parked = [
                (p, i)
                for p in reversed(worker.parked)
                if (p.medium, p.group) == (medium, group)
                for i in range(len(p.hashes))
                if p.hashes[i] == h and p.live[i]
            ]
            if not copies and not parked:
                report.skip("unknown_hash")
                continue
            report.removed += 1
            # A declared set holds a block once, however often it was announced, placed or not.
            cancelled = parked if pod.presence == "set" else [] if copies else parked[:1]
            for p, i in cancelled:
                p.live[i] = False
            if copies:
                copies.pop()
        worker.forget_parked()
        worker.forget()

    def _clear(self, name: str, rank: int, *, everything: bool = False) -> None:
        pod = self._pod(name)
        media = None if everything else pod.clear_media
        pod.added = [a for a in pod.added if a[0] != rank or (media is not None and "GPU" not in media)]
        for (r, model), worker in pod.workers.items():
            if r != rank:
                continue
            if media is None:
                pod.workers[r, model] = Worker()
                continue
            worker.copies = {key: ks for key, ks in worker.copies.items() if key[0] not in media}
            for p in worker.parked:
                if p.medium in media:
                    p.live = [False] * len(p.live)
            worker.forget_parked()
            worker.forget()

    # ---------------------------------------------------------------------------------------------------- the rest

    def add_prefix(self, pod: str, tokens, *, ttl: float, now: float, model: str = "", lora_name: str | None = None,
                   cache_salt: str | None = None, extra_keys=None, dp_rank: int = 0) -> None:
        at = self.roots.setdefault(model, Position())
        for content in self._query(tokens, lora_name, cache_salt, extra_keys):
            at = at.child(content)
        self._pod(pod).added.append((dp_rank, model, at, now + ttl))

    def expire(self, now: float) -> None:
        for pod in self.pods.values():
            pod.added = [a for a in pod.added if a[3] > now]

    def remove_pod(self, pod: str) -> None:
        del self.pods[pod]

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None:
        self._clear(pod, dp_rank, everything=True)

    def configure_pod(self, pod: str, *, presence=None, clear_media=None, chunk_size=None) -> None:
        it = self._pod(pod)
        it.presence = presence or it.presence
        it.clear_media = frozenset(map(upper, clear_media)) if clear_media is not None else it.clear_media
        it.chunk_size = chunk_size or it.chunk_size

    def mark_worker(self, pod: str, dp_rank: int, verdict: str) -> None:
        self._pod(pod).verdicts[dp_rank] = verdict

    def pod_state(self, pod: str) -> str:
        it = self.pods[pod]
        return max([*(w.state for w in it.workers.values()), *it.verdicts.values(), "exact"], key=STATES.index)

    def _pod(self, pod: str) -> Pod:
        return self.pods.setdefault(pod, Pod(self.presence))

    def _worker(self, pod: str, rank: int, model: str) -> Worker:
        return self._pod(pod).workers.setdefault((rank, model), Worker())

    # ------------------------------------------------------------------------------------------------ the question

    def match(self, tokens, *, model: str = "", lora_name: str | None = None, cache_salt: str | None = None,
              extra_keys=None) -> dict[str, dict]:
        """{pod: {"tokens": the best rank's, "ranks": {rank: tokens}, "media": {medium: the best rank's}}}."""
        path, at = [], self.roots.get(model)
        for content in self._query(tokens, lora_name, cache_salt, extra_keys):
            at = at.children.get(content) if at else None
            path.append(at)
        answers = {}
        for name, pod in self.pods.items():
            ranks: Counter = Counter()
            media: Counter = Counter()
            for (rank, m), worker in pod.workers.items():
                if m == model:
                    ranks[rank] = self._hit(pod, worker, path, set(worker.groups), None)
                    for medium in {medium for medium, _ in worker.seen}:
                        groups = {g for seen, g in worker.seen if seen == medium}
                        media[medium] = max(media[medium], self._hit(pod, worker, path, groups, medium))
            for rank, m, end, _ in pod.added:
                if m == model:
                    prefix = set(end.last(end.depth))
                    length = next((i for i, at in enumerate(path) if at not in prefix), len(path)) * self.block_size
                    ranks[rank] = max(ranks[rank], length)
                    media["GPU"] = max(media["GPU"], length)
            if any(ranks.values()):
                answers[name] = {"tokens": max(ranks.values()), "ranks": dict(+ranks), "media": dict(+media)}
        return answers

    def _query(self, tokens, lora, salt, extra_keys) -> list[tuple]:
        n = len(tokens) // self.block_size
        return [b[0] for b in contents(tokens, self.block_size, n, 1, lora, extra_keys, salt, True)]

    def _hit(self, pod: Pod, worker: Worker, path: list, groups: set[int], medium: str | None) -> int:
        if not groups:
            return 0
        rows = [(worker.groups[g], worker.held(g, medium)) for g in groups]
        flags = [(group, [at in held for at in path]) for group, held in rows]
        return next(length * self.block_size for length in range(len(path), -1, -1)
                    if all(self._agrees(pod, group, held, length) for group, held in flags))

    def _agrees(self, pod: Pod, group: Group, held: list[bool], length: int) -> bool:
        """Whether this group lets the worker reuse `length` blocks."""
        size = group.k * self.block_size
        if length % group.k:
            return False
        start = 0
        if "sliding_window" in group.kind and group.window:
            start = length - -(-(group.window - 1) // size) * group.k
        elif "mamba" in group.kind or "linear" in group.kind:
            start = length - group.k
        elif group.kind.startswith("chunked_local") and pod.chunk_size:
            start = length * self.block_size // pod.chunk_size * pod.chunk_size // size * group.k
        return all(held[max(start, 0) : length])


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
    return (ts / 1000 if isinstance(ts, int) else ts), events, rank


def read_event(event: Any) -> tuple[str, dict]:
    if isinstance(event, dict):
        name, fields = event.get("type"), dict(event)
    elif isinstance(event, list) and event:
        name, values = event[0], event[1:]
        fields = dict(zip(REMOVED_FIELDS if name == "BlockRemoved" else STORED_FIELDS, values))
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


def read_lora(event: dict) -> str | None:
    name, number = read(event, "lora_name", str), event.get("lora_id")
    if name is not None:
        return name
    if isinstance(number, str):
        return number
    return str(number) if is_int(number) and number > 0 else None

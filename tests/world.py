"""A random fleet of engines, for tests that send the same calls to the index and to the model and compare all answers.

Contents are drawn from a handful of block types, so prompts fork and meet often. A pod names its hashes in one of three
ways: with the names shared by several pods, with names of its own, or with small numbers that mean something else on
every worker. A step is plain data, interpreted by the state at the time. Any part of a list of steps is therefore a
valid list of steps, which makes a failure easy to shrink.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
from model import Model, NotABatch
from support import answer_of, as_array, cleared, holdings_of, payload, removed, report_of, stored

import kvindex

PODS = ("a", "b", "c")
RANKS = (0,) * 6 + (1,)
MODELS = ("",) * 9 + ("m",)
MEDIA = (None, None, "GPU", "gpu", "cpu", "CPU", "Tape")
CONTEXTS = ((None, None),) * 7 + (("L", None), ("7", None), (None, "s"), ("L", "s"))  # (lora_name, cache_salt)

# Block types 0, 1 and 2 differ in their tokens. Types 3 to 5 differ from 0 only in their extra keys.
EXTRA = {3: ["mm"], 4: [("mm", 1)], 5: [b"\x07" * 3, 2**64 - 1, b"\x01"]}
TYPES = (0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5)


def draw_path(rng: Random, most: int = 4) -> tuple[int, ...]:
    return even(tuple(rng.choice(TYPES) for _ in range(rng.randint(1, most))))


def even(path: Iterable[int]) -> tuple[int, ...]:
    """Keep extra keys on every second block only: a larger engine block has them on its first index block."""
    return tuple(0 if b in EXTRA and i % 2 else b for i, b in enumerate(path))


# ------------------------------------------------------------------------------------------------------ the engines


@dataclass(frozen=True)
class Layout:
    """The configuration of one pod and the shape of its events."""

    naming: str
    groups: tuple[tuple[int | None, str | None, int | None, int], ...]  # id, kind, window in tokens, k
    presence: str | None
    clear_media: tuple[str, ...] | None
    chunk_size: int | None
    one_medium: bool
    ignore_media: tuple[str, ...] | None = None
    lookahead: int = 0
    engine: str | None = None
    eagle: bool | tuple[int, ...] = False
    hybrid: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the arguments of configure_pod."""
        told = ("presence", "clear_media", "chunk_size", "ignore_media", "engine", "eagle", "hybrid")
        return {name: getattr(self, name) for name in told}


@dataclass(frozen=True)
class Setup:
    """The parameters of one random fleet.

    `stretch`: blocks for each element of a path, to fill pages and runs. `crowd`: number of other pods that hold the
    first block, to fill words of bits. `wide`: enough different contents for a hundredfold fork.
    """

    size: int
    presence: str
    max_parked: int
    pods: tuple[Layout, ...]
    stretch: int = 1
    crowd: int = 0
    wide: bool = False


GROUPS = {
    "full": ("full_attention", "mla_attention", None),
    "sliding": ("sliding_window", "sliding_window_mla"),
    "mamba": ("mamba", "linear_attention"),
    "chunked": ("chunked_local_attention",),
}
MIXES = (
    ("full",),
    ("full",),
    ("full",),
    ("full", "sliding"),
    ("full", "sliding"),
    ("full", "mamba"),
    ("sliding",),
    ("full", "chunked"),
    ("full", "sliding", "mamba"),
    ("full", "full"),
)


def draw_layout(rng: Random, size: int) -> Layout:
    mix = rng.choice(MIXES)
    groups = tuple(
        (
            i if len(mix) > 1 else rng.choice((None, 0, 1)),
            rng.choice(GROUPS[kind]),
            rng.randint(1, 4 * size + 1) if kind == "sliding" else None,
            rng.choice((1, 1, 1, 2)),
        )
        for i, kind in enumerate(mix)
    )
    return Layout(
        naming=rng.choice(("shared", "shared", "own", "small")),
        groups=groups,
        presence=rng.choice((None, None, None, "set")),
        clear_media=rng.choice((None, None, None, ("gpu",), ("CPU", "Tape"))),
        chunk_size=rng.choice((None, 2 * size, 3 * size)),
        one_medium=rng.random() < 0.5,
        ignore_media=rng.choice((None, None, None, None, None, ("cpu",))),
        lookahead=rng.choice((0, 0, 0, 0, 0, 1, 1, 3)),
        engine=rng.choice((None, None, "vllm", "vllm", "vllm", "sglang", "trtllm")),
        eagle=rng.choice((False, False, True, (0,), (1,), (0, 2))),
        hybrid=rng.random() < 0.05,
    )


def draw_setup(rng: Random) -> Setup:
    # The block sizes with specialised code in the core are included, but small sizes reach more edge cases.
    size = rng.choice((1, 2, 4, 1, 2, 4, 1, 2, 4, 16, 32, 64, 128))
    return Setup(
        size=size,
        presence=rng.choice(("count", "count", "count", "set")),
        max_parked=rng.choice((65536, 65536, 5)),
        pods=tuple(draw_layout(rng, size) for _ in PODS),
        stretch=rng.choice((1, 1, 1, 1, 1, 1, 1, 11)) if size < 64 else 1,
        crowd=rng.choice((0, 0, 0, 0, 0, 0, 0, 70)),
        wide=rng.random() < 0.15,
    )


@dataclass
class Book:
    """The engine hashes of one naming domain, assigned in order of first use."""

    start: int
    of: dict[Any, int] = field(default_factory=dict)
    back: dict[int, Any] = field(default_factory=dict)

    def name(self, context: tuple, path: tuple, alias: int = 0) -> int:
        key = (context, path, alias)
        if key not in self.of:
            # The first hash of the shared and of the small names is 0. Later ones need all 64 bits.
            h = (self.start + len(self.of) * 0x9E3779B97F4A7C15) % 2**64
            self.of[key] = h
            self.back[h] = key
        return self.of[key]


# ------------------------------------------------------------------------------------------------- events and calls


@dataclass(frozen=True)
class Op:
    """The parameters of one event. The meaning of `pick` and `n` depends on the kind and on the state."""

    kind: str
    context: tuple
    path: tuple
    cut: int
    group: int
    medium: str | None
    pick: int
    n: int
    twist: str | None


@dataclass(frozen=True)
class Step:
    """One call: a batch of events for one worker, or another operation on a pod."""

    kind: str
    pod: str
    rank: int
    model: str
    ops: tuple[Op, ...]
    form: str = "map"
    hashes: str = "unsigned"
    n: int = 0


TWISTS = (
    (None,) * 26
    + ("keyless",) * 4
    + ("alias",) * 4
    + ("moved",) * 6
    + ("parent-alias", "parent-alias", "repeat", "odd", "self", "random", "more", "more")
)
EVENTS = {
    "store": 30,
    "extend": 20,
    "again": 9,
    "parent": 9,
    "mask": 7,
    "remove": 22,
    "remove-any": 8,
    "bad": 2,
    "clear": 1,
}
STEPS = {
    "batch": 90,
    "evict": 9,
    "add_prefix": 4,
    "expire": 2,
    "clear_worker": 1,
    "mark_worker": 1,
    "crowd": 3,
    "remove_pod": 1,
    "no_batch": 1,
}
BADS = (
    "cut",
    "tag",
    "token",
    "pair",
    "hash",
    "hash-removed",
    "size",
    "partial",
    "partial",
    "short",
    "no-event",
    "no-size",
)


def draw_op(rng: Random, kind: str | None = None) -> Op:
    kind = kind or rng.choices(list(EVENTS), list(EVENTS.values()))[0]
    return Op(
        kind,
        rng.choice(CONTEXTS),
        draw_path(rng),
        rng.choice((0, 0, 0, 1, 1, 2, 3)),
        rng.randrange(6),
        rng.choice(MEDIA),
        rng.randrange(2**16),
        rng.randrange(2**16),
        rng.choice(TWISTS),
    )


def draw_step(rng: Random, kind: str | None = None, event: str | None = None) -> Step:
    kind = kind or rng.choices(list(STEPS), list(STEPS.values()))[0]
    count = rng.choice((1, 1, 1, 2, 3)) if kind == "batch" else 1
    return Step(
        kind,
        rng.choice((*PODS, "a", "a", "b")),
        rng.choice(RANKS),
        rng.choice(MODELS),
        tuple(draw_op(rng, event) for _ in range(count)),
        rng.choice(("map", "map", "array", "objects")),
        rng.choice(("unsigned", "signed", "bytes")),
        rng.randrange(2**16),
    )


def same(what: Any, got: Any, want: Any) -> None:
    assert got == want, f"{what}: the index says {got}, the model {want}"


def outcome(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a call, or the type of the exception that it raises."""
    try:
        return call(*args, **kwargs)
    except (ValueError, KeyError) as error:
        return type(error)


class World:
    """The index and the model side by side."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.size = setup.size
        # The index also reads the clock itself. Speculative entries get a long TTL and expire only by a step.
        self.lookahead = 0
        self.now = time.monotonic()
        self.index = self.make_index()
        self.model = Model(setup.size, presence=setup.presence, max_parked=setup.max_parked)
        self.layouts = dict(zip(PODS, setup.pods, strict=True))
        self.books: dict[Any, Book] = {}
        self.asked: dict[tuple, None] = {}
        self.turn = 0
        self.log: list[tuple[str, bytes, dict]] = []
        for pod, layout in self.layouts.items():
            self.both("configure_pod", pod, **layout.options)
        for i in range(setup.crowd):
            self.join_crowd(f"crowd-{i}")

    def make_index(self) -> kvindex.PrefixIndex:
        setup = self.setup
        return kvindex.PrefixIndex(setup.size, presence=setup.presence, max_parked=setup.max_parked)

    def reported(self, pod: str, got: Any, want: Any) -> None:
        same("report", report_of(got), report_of(want))

    def join_crowd(self, pod: str) -> None:
        name = self.books.setdefault("shared", Book(0)).name((None, None), (0,))
        self.ingest(pod, payload(stored([name], self.tokens((0,)), size=self.size)))

    def both(self, call: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.index, call)(*args, **kwargs)
        getattr(self.model, call)(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------- names, content

    def tokens(self, path: tuple) -> list[int]:
        patterns = {1: [7] * (self.size - 1) + [8], 2: [9] * self.size}
        return [token for b in path for token in patterns.get(b, [7 if b < 6 else b] * self.size)]

    def path(self, op: Op) -> tuple:
        path = op.path if not self.setup.wide else (*op.path[:-1], 6 + op.n % 90)
        return tuple(b for b in path for _ in range(self.setup.stretch))

    def book(self, pod: str, rank: int, model: str) -> Book:
        naming = self.layouts[pod].naming
        if naming == "shared":
            return self.books.setdefault(naming, Book(0))
        return self.books.setdefault((pod, rank, model), Book(0 if naming == "small" else 1000 * (2 + len(self.books))))

    def worker(self, pod: str, rank: int, model: str) -> Any:
        return self.model.pods[pod].workers.get((rank, model)) if pod in self.model.pods else None

    # --------------------------------------------------------------------------------------------------- the events

    def event(self, pod: str, rank: int, model: str, op: Op) -> Any:
        """Return the event that `op` means in the current state, or None."""
        layout, worker, book = self.layouts[pod], self.worker(pod, rank, model), self.book(pod, rank, model)
        # Mostly a single lookahead length. A pod that changes it does so for every block.
        self.lookahead = layout.lookahead if op.pick % 13 else (0, 1, 3)[op.n % 3]
        copies = [key for key, ks in worker.copies.items() for _ in ks] if worker else []
        known = [h for h in worker.names if h in book.back] if worker else []
        if op.kind == "clear":
            return cleared(medium=op.medium) if op.n % 2 else cleared()
        if op.kind == "bad":
            return self.bad(BADS[op.n % len(BADS)], op, book)
        if op.kind == "remove":
            # Remove one to seven blocks (times `stretch`): from the head of a chain, from its tail, or from any place.
            if not copies:
                return None
            medium, group, _ = copies[op.pick % len(copies)]
            same = [h for m, g, h in copies if (m, g) == (medium, group)]
            order = op.n % 3
            same = same if order == 0 else same[::-1] if order == 1 else same[op.pick % len(same) :]
            same = same[: (1 + op.n // 3 % 7) * self.setup.stretch]
            return removed(*same, medium=medium, group_idx=group, **self.remaining(op, len(same)))

        group, kind, window, k = layout.groups[op.group % len(layout.groups)]
        where: dict[str, Any] = {"medium": None if layout.one_medium else op.medium, "group_idx": group}
        if op.kind == "remove-any":
            # Mostly parked blocks, from the medium and group where they wait.
            parked = [(p, h) for p in worker.parked for h in p.hashes] if worker else []
            choice: list[int] = list(book.back) or [1]
            if parked and op.pick % 4:
                thing, _ = parked[op.pick % len(parked)]
                where = {"medium": thing.medium, "group_idx": thing.group}
                choice = [h for p, h in parked if (p.medium, p.group) == (thing.medium, thing.group)]
            n = 1 + op.n % 3
            hashes = (choice[(op.pick + i * op.n) % len(choice)] for i in range(n))
            return removed(*hashes, **where, **self.remaining(op, n))
        if kind is not None and op.n % 5:
            where["kv_cache_spec_kind"] = kind
        if window is not None:
            where["kv_cache_spec_sliding_window"] = window

        if op.kind == "again" and copies:
            medium, number, h = copies[op.pick % len(copies)]
            if h in book.back:
                context, path, _ = book.back[h]
                if op.n % 4 == 0:
                    # The same copy again, another copy elsewhere, or its whole prompt, held by all groups of a hybrid.
                    where, k = {"medium": medium, "group_idx": number}, worker.copies[medium, number, h][-1]
                if op.n % 4 < 2 and len(path) >= k:
                    return self.stored(book, context, path, len(path) - k, k, where, op, hashes=[h])
                return self.stored(book, context, path, 0, k, where, op)
        if op.kind == "extend" and known:
            h = known[op.pick % len(known)]
            context, path, _ = book.back[h]
            return self.stored(book, context, even(path + self.path(op)), len(path), k, where, op, parent=h)
        if op.kind == "parent":
            # Store the blocks that a parked event waits for: from the beginning, or only the last one.
            waited = [p.waits_for for p in worker.parked if p.waits_for in book.back] if worker else []
            if not waited:
                return None
            context, path, _ = book.back[waited[op.pick % len(waited)]]
            return self.stored(book, context, path, 0 if op.n % 3 else len(path) - k, k, where, op)
        context, path, cut = op.context, even(self.path(op)), op.cut * self.setup.stretch - op.n % self.setup.stretch
        if known and op.pick % 3:
            # Follow a stored prompt, then leave it.
            context, path, _ = book.back[known[op.pick % len(known)]]
            path = even(path[: len(path) - op.n % 3] + self.path(op))
        if op.kind == "mask":
            return self.masked(worker, book, context, path, k, where, op)
        return self.stored(book, context, path, cut, k, where, op)

    def stored(
        self,
        book: Book,
        context: tuple,
        path: tuple,
        cut: int,
        k: int,
        where: dict,
        op: Op,
        *,
        parent: int | None = None,
        hashes: list[int] | None = None,
    ) -> Any:
        """Build a BlockStored event for the blocks of `path` from `cut` on, below the name of the block before them."""
        if parent is None and hashes is None:
            cut = max(0, min(cut, len(path) - 1))
            if op.twist != "odd":
                cut -= cut % k
        path = path[: cut + (len(path) - cut) // k * k]
        ends = range(cut + k, len(path) + 1, k)
        alias = int(op.twist == "alias")
        ahead = [self.behind(path, end, op) for end in ends]
        if hashes:
            was = book.back[hashes[-1]][2]
            ahead[-1:] = [was[1] if isinstance(was, tuple) else ()]
        else:
            hashes = [
                book.name(context, path[:end], (alias, a) if a else alias) for end, a in zip(ends, ahead, strict=True)
            ]
        if not hashes:
            return None
        if cut and parent is None:
            other = int(op.twist == "parent-alias")
            before = self.behind(path, cut, op)
            parent = book.name(context, path[:cut], (other, before) if before else other)
        names = list(book.back)
        if op.twist == "repeat":
            hashes[op.n % len(hashes)] = hashes[op.pick % len(hashes)]
        elif op.twist == "self":
            parent = hashes[op.n % len(hashes)]
        elif op.twist in ("moved", "random"):
            # A hash that has another meaning in the book, perhaps below another parent as well.
            hashes[op.n % len(hashes)] = names[op.pick % len(names)]
            if op.twist == "random":
                parent = names[op.n % len(names)]
        # LMCache sends one token too many. Tokens that are not a whole number of blocks mask nothing.
        more = [7] if op.twist == "more" and k * self.size > 1 else []
        tokens: list[Any] = self.tokens(path[cut:]) + more
        if len(ahead[0]) == 1 and op.n % 2 and not more and len(tokens) == len(hashes) * k * self.size:
            # The format of SGLang.
            tokens = [list(pair) for pair in zip(tokens, [*tokens[1:], ahead[-1][0]], strict=True)]
        elif ahead[0]:
            where = {**where, "lookahead_token_ids": [list(a) for a in ahead]}
        return stored(
            hashes,
            tokens,
            parent=parent,
            size=k * self.size,
            **where,
            # A connector leaves out the adapter, the salt and the extra keys.
            **({} if op.twist == "keyless" else self.keys(context, path[cut::k], cut == 0, op.n)),
        )

    def behind(self, path: tuple, end: int, op: Op) -> tuple:
        """Return a block's lookahead tokens: those after it in its prompt, then some after the prompt's end."""
        return tuple(self.tokens((*path[end:], *(op.n % 3,) * 3))[: self.lookahead])

    def remaining(self, op: Op, n: int) -> dict[str, Any]:
        """Return the numbers of copies that stay, which some removals report."""
        return {"remaining_copy_counts": [(op.n >> i) % 3 for i in range(n)]} if op.pick % 6 == 0 else {}

    def keys(self, context: tuple, blocks: tuple, first: bool, n: int) -> dict[str, Any]:
        """Return LoRA, salt and extra keys: as fields, or in vLLM's format among the extra keys."""
        lora, salt = context
        entries = [list(EXTRA.get(b, ())) for b in blocks]
        fields: dict[str, Any] = {}
        if salt is not None and (lora is not None or n % 2):
            if first:
                digests = 1 if entries[0] and isinstance(entries[0][-1], bytes) else 0
                entries[0].insert(len(entries[0]) - digests, salt)
        elif salt is not None:
            fields["cache_salt"] = salt
        if lora == "7" and n % 2:
            fields["lora_id"] = 7
        elif lora is not None:
            fields["lora_name"] = lora
            if n % 3:
                entries = [[lora, *keys] for keys in entries]
        if any(entries):
            fields["extra_keys"] = [keys or None for keys in entries]
        return fields

    def masked(self, worker: Any, book: Book, context: tuple, path: tuple, k: int, where: dict, op: Op) -> Any:
        """Store some hashes of a path with the tokens of the whole path, or as a placeholder without tokens."""
        path = path[: len(path) // k * k]
        number = where["group_idx"] or 0
        ends = list(range(k, len(path) + 1, k))
        ahead = {end: self.behind(path, end, op) for end in ends}
        hashes = [
            book.name(context, path[:end], (0, ahead[end]) if ahead[end] else 0)
            for i, end in enumerate(ends)
            if op.n >> i % 16 & 1
        ]
        if op.pick % 2:
            # Until the group's block size is known, a placeholder must report it.
            sizes = (0, None, k * self.size) if k == 1 or (worker and number in worker.groups) else (k * self.size,)
            return stored(hashes, (), size=sizes[op.n % len(sizes)], **where)
        return stored(hashes if len(hashes) < len(ends) else hashes[1:], self.tokens(path), size=k * self.size, **where)

    def bad(self, what: str, op: Op, book: Book) -> Any:
        path = op.path
        hashes = [book.name((None, None), path[: i + 1]) for i in range(len(path))]
        event = stored(hashes, self.tokens(path), size=self.size)
        wrong = op.pick % 4
        if what == "tag":
            event["type"] = "BlockMoved"
        elif what == "token":
            event["token_ids"][-1] = (-1, 2**32, 1.0, "7")[wrong]
        elif what == "pair":
            event["token_ids"][0] = [1, 2]
        elif what == "hash":
            event["block_hashes"][-1] = (b"", "x", None, 1.5)[wrong]
        elif what == "hash-removed":
            return removed(*hashes[:-1], b"")
        elif what == "size":
            size = 3 * self.size + 1 if self.size > 1 else 0
            event.update(block_size=size, token_ids=[7] * max(1, size) * len(hashes))
        elif what == "no-size":
            event["block_size"] = None
        elif what == "partial":
            return stored(hashes[:1], [7] * (self.size - 1), size=self.size - 1) if self.size > 1 else None
        elif what == "cut":
            return stored(hashes[:1], [7] * (2 * self.size - 1), size=2 * self.size)
        elif what == "short":
            return ["BlockStored", hashes, None]
        elif what == "no-event":
            return 5
        return event

    # ---------------------------------------------------------------------------------------------------- the steps

    def do(self, step: Step) -> None:
        getattr(self, "do_" + step.kind)(step)
        self.compare()

    def do_batch(self, step: Step) -> None:
        pod, rank, model = step.pod, step.rank, step.model
        events = []
        for op in step.ops:
            if step.form == "objects":
                self.by_object(pod, rank, model, self.event(pod, rank, model, op))
            elif (event := self.event(pod, rank, model, op)) is not None:
                self.remember(pod, rank, model, event)
                event = in_form(event, step.hashes)
                known = isinstance(event, dict) and event["type"] != "BlockMoved"
                events.append(as_array(event) if known and step.form == "array" else event)
        if step.form != "objects":
            # The rank of the call takes precedence over the rank of the batch. Without both, the rank is 0.
            wire, call = ((rank, None), (rank + 5, rank), (rank or None, None))[step.n % 3]
            self.ingest(pod, payload(*events, ts=step.n / 4, rank=wire), model=model, dp_rank=call)

    def ingest(self, pod: str, data: bytes, **where: Any) -> None:
        self.log.append((pod, data, where))
        self.reported(pod, self.index.ingest(pod, data, **where), self.model.ingest(pod, data, **where))

    def by_object(self, pod: str, rank: int, model: str, event: Any) -> None:
        if not isinstance(event, dict) or not sound(event):
            return
        self.remember(pod, rank, model, event)
        fields = {name: value for name, value in event.items() if name != "type"}
        dp_rank = rank or None
        if event["type"] == "AllBlocksCleared":
            thing, call = kvindex.AllBlocksCleared(pod=pod, dp_rank=dp_rank, **fields), "process_all_blocks_cleared"
        elif event["type"] == "BlockRemoved":
            thing, call = kvindex.BlockRemoved(pod=pod, model=model, dp_rank=dp_rank, **fields), "process_block_removed"
        else:
            if len(fields["block_hashes"]) % 2:
                fields["token_ids"] = np.asarray(fields["token_ids"], dtype=np.uint32)
            thing, call = kvindex.BlockStored(pod=pod, model=model, dp_rank=dp_rank, **fields), "process_block_stored"
        self.reported(pod, getattr(self.index, call)(thing), getattr(self.model, call)(thing))

    def remember(self, pod: str, rank: int, model: str, event: Any) -> None:
        """Queue a question about the prompt of this event."""
        book = self.book(pod, rank, model)
        for h in event.get("block_hashes", ())[-1:] if isinstance(event, dict) else ():
            if isinstance(h, int) and h in book.back:
                context, path, _ = book.back[h]
                self.asked.pop((context, path, model), None)
                self.asked[context, path, model] = None

    def do_evict(self, step: Step) -> None:
        """Remove most of a worker's blocks, one event per block, which leaves ghosts behind and removes them again."""
        worker = self.worker(step.pod, step.rank, step.model)
        live = [key for key, ks in worker.copies.items() for _ in ks] if worker else []
        live = live if step.n % 2 else live[::-1]
        live = live[: max(0, len(live) - step.n // 2 % 4)]
        self.ingest(
            step.pod,
            payload(*(removed(h, medium=m, group_idx=g) for m, g, h in live), rank=step.rank),
            model=step.model,
        )

    def do_add_prefix(self, step: Step) -> None:
        op = step.ops[0]
        lora, salt = op.context
        self.both(
            "add_prefix",
            step.pod,
            self.tokens(op.path),
            ttl=1000.0 * (1 + step.n % 5),
            now=self.now,
            model=step.model,
            lora_name=lora,
            cache_salt=salt,
            extra_keys=[EXTRA.get(b) for b in op.path],
            dp_rank=step.rank,
        )
        self.asked[op.context, op.path, step.model] = None

    def do_expire(self, step: Step) -> None:
        self.now += 1000.0 * (1 + step.n % 4)
        self.index._expire(self.now)
        self.model.expire(self.now)

    def do_crowd(self, step: Step) -> None:
        for i in range(step.n % 9 if self.setup.crowd else 0):
            pod = f"crowd-{(step.n + i * 7) % self.setup.crowd}"
            if pod in self.model.pods:
                self.both("remove_pod", pod)
            else:
                self.join_crowd(pod)

    def do_clear_worker(self, step: Step) -> None:
        if step.pod in self.model.pods:
            self.both("clear_worker", step.pod, step.rank)

    def do_mark_worker(self, step: Step) -> None:
        if step.pod in self.model.pods:
            self.both("mark_worker", step.pod, step.rank, ("exact", "degraded", "stale")[step.n % 3])

    def do_remove_pod(self, step: Step) -> None:
        if step.pod in self.model.pods:
            self.both("remove_pod", step.pod)
        for question in (self.index.pod_state, self.index.remove_pod):
            same(question.__name__, outcome(question, step.pod), kvindex.UnknownPodError)

    def do_no_batch(self, step: Step) -> None:
        data = (b"", b"\xc1", b"\x2a", b"\x92\x01", b"\x93\x01\x80\x00")[step.n % 5]
        for it, error in ((self.index, kvindex.EventDecodeError), (self.model, NotABatch)):
            same("no batch", outcome(it.ingest, step.pod, data, model=step.model, dp_rank=step.rank or None), error)

    # --------------------------------------------------------------------------------------------------- comparison

    def compare(self) -> None:
        self.index._check()
        for pod in self.model.pods:
            same(f"state of {pod}", self.index.pod_state(pod), self.model.pod_state(pod))
            waiting = {rank: stats["parked"] for rank, stats in self.index.worker_stats(pod).items() if stats["parked"]}
            parked: Counter = Counter()
            for (rank, _), worker in self.model.pods[pod].workers.items():
                parked[rank] += worker.parked_copies
            same(f"parked of {pod}", waiting, dict(+parked))
        self.turn += 1
        # Ask the newest questions with one more block or with another last block, and the older ones in turn. With a
        # crowd, the model computes seventy workers for each question.
        asked = list(self.asked)
        older = asked[self.turn % max(1, len(asked)) :][:2]
        for context, path, model in dict.fromkeys(asked[-1:] if self.setup.crowd else asked[-2:] + older):
            self.question(context, (*path, self.turn % 3), model)
            if not self.setup.crowd or self.turn % 4 == 0:
                self.question(context, (*path[:-1], (path[-1] + 1) % 3, *path[-1:]), model)
        if self.turn % 4 == 0:
            self.question((None, None), (2, 1, 0), "")

    def question(self, context: tuple, path: tuple, model: str) -> None:
        path = even(path)
        keys = [EXTRA.get(b) for b in path]
        given = {"lora_name": context[0], "cache_salt": context[1], "extra_keys": keys if any(keys) else None}
        tokens = self.tokens(path) + [7] * (self.turn % self.size)
        want = self.model.match(tokens, model=model, **given)
        states = {pod: self.model.pod_state(pod) for pod in want}
        match = self.index.match_prefix(tokens, model=model, **given)
        asked = f"{tokens} of model {model!r} with {given}"
        same(asked, answer_of(match), want)
        holdings = self.model.holdings(tokens, model=model, **given)
        same("holdings: " + asked, holdings_of(match, self.model.pods), holdings)
        same("blocks", match.blocks, len(path))
        same("percent", match.percent, {p: 100 * a["tokens"] // (len(path) * self.size) for p, a in want.items()})
        same("states", {pod: match[pod].state for pod in want}, states)
        same(
            "blocks per pod", {p: match[p].blocks * self.size for p in want}, {p: a["tokens"] for p, a in want.items()}
        )
        same("tokens per pod", {pod: match[pod].tokens for pod in want}, {p: a["tokens"] for p, a in want.items()})
        best = match.best()
        if want:
            assert best is not None
            same("best", best[1], max(answer["tokens"] for answer in want.values()))
            same("best's tokens", best[1], want[best[0]]["tokens"])
        else:
            assert best is None
        hashes = kvindex.prefix_hashes(tokens, block_size=self.size, **given)
        same("hashes", match.hashes.tolist(), hashes.tolist())
        # Prefix hashes have no lookahead.
        plain = self.model.match(tokens, model=model, lengths={0}, **given)
        same(
            "by hashes: " + asked, answer_of(self.index.match_hashes(hashes, model=model, n_tokens=len(tokens))), plain
        )
        only = self.index.match_prefix(tokens, model=model, only_exact=True, **given)
        same("only exact: " + asked, answer_of(only), {pod: a for pod, a in want.items() if states[pod] == "exact"})
        some = self.index.match_prefix(tokens, model=model, ready_pods=("a", "c", "nobody"), **given)
        same("of a and c: " + asked, answer_of(some), {pod: a for pod, a in want.items() if pod in ("a", "c")})

    def finish(self) -> None:
        """Remove everything, block by block where possible, and check that the index is empty."""
        for context, path, model in self.asked:
            self.question(context, path, model)
        for name, pod in list(self.model.pods.items()):
            for (rank, model), worker in list(pod.workers.items()):
                if worker.parked:
                    self.both("clear_worker", name, rank)
                live = [key for key, ks in self.worker(name, rank, model).copies.items() for _ in ks]
                Random(len(live)).shuffle(live)
                self.ingest(
                    name, payload(*(removed(h, medium=m, group_idx=g) for m, g, h in live), rank=rank), model=model
                )
        self.now += 1e6
        self.index._expire(self.now)
        self.model.expire(self.now)
        self.index._check()
        same("blocks at the end", self.index.stats()["blocks"], 0)
        for context, path, model in self.asked:
            self.question(context, path, model)
        for pod in list(self.model.pods):
            self.both("remove_pod", pod)
        self.index._check()


def in_form(event: Any, how: str) -> Any:
    """Return the event with its hashes in one of the three formats that engines use."""

    def form(h: Any) -> Any:
        if isinstance(h, bool) or not isinstance(h, int):
            return h
        return h - 2**64 * (h >= 2**63) if how == "signed" else b"\xee" * 24 + h.to_bytes(8, "big")

    if not isinstance(event, dict) or how == "unsigned":
        return event
    event = dict(event)
    if "block_hashes" in event:
        event["block_hashes"] = [form(h) for h in event["block_hashes"]]
    if event.get("parent_block_hash") is not None:
        event["parent_block_hash"] = form(event["parent_block_hash"])
    return event


def sound(event: dict) -> bool:
    """Return whether the values of an event are acceptable in an event object."""
    return (
        event["type"] != "BlockMoved"
        and all(isinstance(h, int) for h in event.get("block_hashes", ()))
        and all(isinstance(t, int) and 0 <= t < 2**32 for t in event.get("token_ids", ()))
    )


def run(setup: Setup, steps: Iterable[Step], kind: type[World]) -> None:
    world = kind(setup)
    for step in steps:
        world.do(step)
    world.finish()


def fails(setup: Setup, steps: list[Step], kind: type[World] | None = None) -> Exception | None:
    try:
        run(setup, steps, kind or World)
    except Exception as error:
        return error
    return None


def minimise(setup: Setup, steps: list[Step], kind: type[World] | None = None) -> list[Step]:
    """Drop every step and every event without which the run still fails."""
    size = max(1, len(steps) // 2)
    while size:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if fails(setup, fewer, kind) is not None:
                steps = fewer
            else:
                at += size
        size //= 2
    for i, step in enumerate(steps):
        for op in step.ops if len(step.ops) > 1 else ():
            fewer = [*steps[:i], replace(steps[i], ops=tuple(o for o in steps[i].ops if o is not op)), *steps[i + 1 :]]
            if fails(setup, fewer, kind) is not None:
                steps = fewer
    return steps

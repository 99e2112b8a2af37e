"""The workloads of the asv suite and of the counted instructions, by name.

A :class:`Workload` makes the inputs of each round, does the work on them, and undoes its changes. Only the work is
measured, and no two rounds in a row have the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kvindex import PrefixIndex, local_hashes, prefix_hashes
from kvindex.sim.wire import FORMS, WireForm, encode_batch, wire_form

from .data import BLOCK, Chain, Tokens, beginning, chain, fill, newest, payloads, removed, stored

__all__ = ["CORE", "KINDS", "Workload", "hashing", "ingest", "match", "remove", "store_objects", "workload"]

#: The hit of a prompt: all of it, nothing, half of it, one of 16 branches below its half, all but single missing blocks
#: (others on each pod), or the two groups of a hybrid model.
KINDS = ("full", "none", "half", "forked", "holes", "hybrid")
#: Blocks of content in an index for queries: with the tokens far larger than the L2 cache.
CONTENT = 65_536
WINDOW = 1024


def _nothing() -> None:
    return None


@dataclass
class Workload:
    """A named work: ``call`` on each of ``items(round)`` is measured, while ``items`` and ``undo`` are not."""

    name: str
    items: Callable[[int], Sequence[Any]]
    call: Callable[[Any], object]
    undo: Callable[[], object] = _nothing

    def work(self, items: Sequence[Any]) -> None:
        call = self.call
        for item in items:
            call(item)


def _calls(depth: int) -> int:
    return min(max(8, 8192 // depth), 512)


def match(kind: str, depth: int, pods: int, *, form: str = "numpy", content: int = CONTENT) -> Workload:
    """Queries of ``depth`` blocks; ``form`` is the type of the input: numpy, list or hashes."""
    index = PrefixIndex(block_size=BLOCK)
    names = [f"pod-{number}" for number in range(pods)]
    count = max(content // depth, 2)
    prompts = list(_FILLED[kind](index, names, depth, count))
    calls = _calls(depth)

    def items(number: int) -> Sequence[Any]:
        some = (prompts[(number * calls + place) % len(prompts)] for place in range(calls))
        if form == "list":
            return [tokens.tolist() for tokens in some]
        if form == "hashes":
            return [prefix_hashes(tokens, block_size=BLOCK) for tokens in some]
        return [tokens.copy() for tokens in some]

    ask = index.match_hashes if form == "hashes" else index.match_prefix
    name = f"match {form} {kind} {depth} blocks {pods} pods"
    return Workload(name, items, ask)


def _full(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    contents = [chain(10, number, depth) for number in range(count)]
    fill(index, contents, names)
    yield from (content.tokens for content in contents)


def _none(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    for number, _ in enumerate(_full(index, names, depth, count)):
        yield chain(11, number, depth).tokens


def _half(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    for number in range(count):
        content = chain(12, number, depth)
        fill(index, [Chain(content.tokens[: depth * BLOCK // 2], content.hashes[: depth // 2])], names)
        yield content.tokens


def _forked(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    branches, half = 16, depth // 2
    for number in range(max(count // branches, 1)):
        stem = chain(13, number, half)
        for branch in range(branches):
            rest = chain(14, number * branches + branch, depth - half)
            whole = Chain(np.concatenate([stem.tokens, rest.tokens]), np.concatenate([stem.hashes, rest.hashes]))
            # Every pod holds the stem and half of the branches; the halves of neighbours differ.
            holders = [name for place, name in enumerate(names) if (place + branch) % 2 or branch == 0]
            fill(index, [whole], holders)
            yield whole.tokens


def _holes(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    for number, tokens in enumerate(_full(index, names, depth, count)):
        content = chain(10, number, depth)
        for place, name in enumerate(names):
            gone = (place * 7 + number) % depth
            index.ingest(name, encode_batch([removed(content, gone, gone + 1)], newest()))
        yield tokens


def _hybrid(index: PrefixIndex, names: Sequence[str], depth: int, count: int) -> Iterator[Tokens]:
    for number in range(count):
        content = chain(15, number, depth)
        whole = stored(content, 0, depth)
        groups = [
            whole._replace(group_idx=0, kv_cache_spec_kind="full_attention"),
            whole._replace(group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=WINDOW),
        ]
        events: list[Any] = list(groups)
        out_of_window = depth - WINDOW // BLOCK
        if out_of_window > 0:
            events.append(removed(content, 0, out_of_window)._replace(group_idx=1))
        payload = encode_batch(events, newest())
        for name in names:
            index.ingest(name, payload)
        yield content.tokens


_FILLED: dict[str, Callable[[PrefixIndex, Sequence[str], int, int], Iterator[Tokens]]] = {
    "full": _full,
    "none": _none,
    "half": _half,
    "forked": _forked,
    "holes": _holes,
    "hybrid": _hybrid,
}


def hashing(what: str, depth: int, *, content: int = CONTENT) -> Workload:
    """``local`` or ``prefix`` hashes of ``depth`` blocks."""
    prompts = [beginning(16, number, depth) for number in range(max(content // depth, 2))]
    calls = _calls(depth)
    call = partial({"local": local_hashes, "prefix": prefix_hashes}[what], block_size=BLOCK)

    def items(number: int) -> Sequence[Tokens]:
        return [prompts[(number * calls + place) % len(prompts)].copy() for place in range(calls)]

    return Workload(f"{what}_hashes {depth} blocks", items, call)


def _filled(content: int) -> PrefixIndex:
    index = PrefixIndex(block_size=BLOCK)
    fill(index, [chain(17, number, 2048) for number in range(max(content // 2048, 1))], ["filler"])
    return index


def _batches(each: int, form: WireForm, number: int) -> list[bytes]:
    """About 1,024 new blocks, as one engine step after another announces them."""
    together, depth = {256: (1, 1024), 64: (4, 256), 1: (64, 16)}[each]
    contents = [chain(18 + each, number * together + place, depth) for place in range(together)]
    return list(payloads(contents, each, batch=together, form=form))


def ingest(each: int, *, form: str | None = None, known: bool = False, content: int = CONTENT) -> Workload:
    """Stored events of ``each`` blocks; ``known``: of content that another pod holds already."""
    index = _filled(content)
    wire = newest() if form is None else wire_form(form)

    def items(number: int) -> list[bytes]:
        batches = _batches(each, wire, number)
        if known:
            for payload in batches:
                index.ingest("pod-other", payload)
        return batches

    def undo() -> None:
        index.clear_worker("pod")
        if known:
            index.clear_worker("pod-other")

    name = f"ingest {each} blocks an event" + (" known" if known else "") + (f" {form}" if form else "")
    return Workload(name, items, partial(index.ingest, "pod"), undo)


def remove(each: int, *, content: int = CONTENT) -> Workload:
    """Removed events of ``each`` blocks, from the ends of chains."""
    index = _filled(content)

    def items(number: int) -> list[bytes]:
        contents = [chain(20 + each, number * 4 + place, 256) for place in range(4)]
        for payload in payloads(contents, 256):
            index.ingest("pod", payload)
        return list(payloads(contents, each, back=True))

    return Workload(f"remove {each} blocks an event", items, partial(index.ingest, "pod"))


def store_objects(each: int, *, content: int = CONTENT) -> Workload:
    """Stored events as objects, for callers with a decoder of their own."""
    from kvindex import BlockStored

    index = _filled(content)

    def items(number: int) -> list[BlockStored]:
        blocks = chain(21 + each, number, 1024)
        return [
            BlockStored(
                pod="pod",
                model="",
                block_hashes=blocks.hashes[start : start + each],
                parent_block_hash=int(blocks.hashes[start - 1]) if start else None,
                token_ids=blocks.tokens[start * BLOCK : (start + each) * BLOCK],
                block_size=BLOCK,
            )
            for start in range(0, 1024, each)
        ]

    def undo() -> None:
        index.clear_worker("pod")

    return Workload(f"store {each} blocks an object", items, index.process_block_stored, undo)


def _named() -> dict[str, Callable[..., Workload]]:
    """The smaller set whose instructions are counted: the most frequent calls of routers and streams."""
    made: list[tuple[str, Callable[..., Workload]]] = []
    for depth in (8, 64, 512, 2048):
        made.append((f"match numpy full {depth} blocks 8 pods", partial(match, "full", depth, 8)))
    for depth in (8, 512):
        made.append((f"match numpy full {depth} blocks 64 pods", partial(match, "full", depth, 64)))
    for form in ("list", "hashes"):
        for depth in (64, 2048):
            made.append((f"match {form} full {depth} blocks 8 pods", partial(match, "full", depth, 8, form=form)))
    for kind in KINDS[1:]:
        made.append((f"match numpy {kind} 512 blocks 8 pods", partial(match, kind, 512, 8)))
    made.append(("prefix_hashes 512 blocks", partial(hashing, "prefix", 512)))
    for each in (256, 64, 1):
        made.append((f"ingest {each} blocks an event", partial(ingest, each)))
    made.append(("ingest 64 blocks an event known", partial(ingest, 64, known=True)))
    made.append(("remove 1 blocks an event", partial(remove, 1)))
    made.append(("store 64 blocks an object", partial(store_objects, 64)))
    return dict(made)


CORE = _named()
#: Wire forms that differ for a decoder.
WIRE_FORMS = tuple(FORMS)


def workload(name: str, **options: Any) -> Workload:
    """The workload ``name`` of :data:`CORE`."""
    made = CORE[name](**options)
    assert made.name == name, f"{made.name} is listed as {name}"
    return made

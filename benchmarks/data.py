"""Seeded content for every measurement: chains of blocks, and the payloads with which an engine would announce them.

All data comes from the seed, so two builds are measured on the same data. Vocabulary and hashes are like those of real
engines: tokens below 128,000 (three or five bytes in msgpack), engine hashes spread over all of u64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvindex import PrefixIndex
from kvindex.sim.wire import Event, Removed, Stored, WireForm, encode_batch, wire_form

__all__ = ["BLOCK", "Chain", "beginning", "chain", "chains", "fill", "newest", "own", "payloads", "removed", "stored"]

#: Tokens per block, everywhere.
BLOCK = 16
VOCABULARY = 128_000

Tokens = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Chain:
    """One content: the tokens of its blocks, and the engine's hashes of them."""

    tokens: Tokens
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.hashes)


def chain(seed: int, number: int, blocks: int) -> Chain:
    """Chain ``number`` of ``seed``: the same on every machine, and independent of other chains."""
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    tokens = rng.integers(0, VOCABULARY, blocks * BLOCK, dtype=np.uint32)
    return Chain(tokens, rng.integers(1, 2**63, blocks, dtype=np.uint64))


def beginning(seed: int, number: int, blocks: int) -> Tokens:
    """The tokens of the first ``blocks`` blocks of a chain of any length."""
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    return rng.integers(0, VOCABULARY, blocks * BLOCK, dtype=np.uint32)


def chains(seed: int, count: int, blocks: int) -> list[Chain]:
    return [chain(seed, number, blocks) for number in range(count)]


def own(hashes: Hashes, pod: int) -> Hashes:
    """The hashes that ``pod`` has for the same content, where pods do not agree on hashes."""
    return hashes ^ np.uint64(pod * 0x9E3779B97F4A7C15 % 2**64)


def newest() -> WireForm:
    """The newest wire form of vLLM."""
    return wire_form("vllm-0.33.0")


def _digests(hashes: Hashes) -> list[bytes]:
    raw = hashes.astype(">u8").tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]


def stored(content: Chain, start: int, stop: int, *, medium: str | None = "GPU", group: int | None = None) -> Stored:
    """The event that announces blocks ``start`` to ``stop`` of a chain."""
    names = _digests(content.hashes[max(start - 1, 0) : stop])
    parent, names = (names[0], names[1:]) if start else (None, names)
    return Stored(names, parent, content.tokens[start * BLOCK : stop * BLOCK], BLOCK, medium=medium, group_idx=group)


def removed(content: Chain, start: int, stop: int) -> Removed:
    """The event that removes the same blocks."""
    return Removed(_digests(content.hashes[start:stop]))


def payloads(
    contents: Sequence[Chain], each: int, *, batch: int = 1, form: WireForm | None = None, back: bool = False
) -> Iterator[bytes]:
    """Batches of ``batch`` events of ``each`` blocks that store all of ``contents``, or remove it with ``back``.

    When ``batch`` is more than one, the events of a batch belong to different chains, as those of one engine step do.
    Removals start at the ends of the chains, as an engine evicts.
    """
    form = form or newest()
    for first in range(0, len(contents), batch):
        together = contents[first : first + batch]
        starts = range(0, max(map(len, together)), each)
        for start in reversed(starts) if back else starts:
            events: list[Event] = []
            for content in together:
                if start < len(content):
                    event = removed if back else stored
                    events.append(event(content, start, min(start + each, len(content))))
            yield encode_batch(events, form)


def fill(index: PrefixIndex, contents: Sequence[Chain], pods: Sequence[str], *, agree: bool = True) -> None:
    """Store every chain for every pod, in batches of 256 blocks. Unless they ``agree``, pods have their own hashes."""
    batch = max(256 // max(map(len, contents)), 1)
    if agree:
        for payload in payloads(contents, 256, batch=batch):
            for pod in pods:
                index.ingest(pod, payload)
        return
    for number, pod in enumerate(pods):
        named = [Chain(content.tokens, own(content.hashes, number)) for content in contents]
        for payload in payloads(named, 256, batch=batch):
            index.ingest(pod, payload)

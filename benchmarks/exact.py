"""Figures that repeat exactly: sizes and counts of what is stored, and of what a match has to look at, the same on
every run of one build. Nearly so where the secret of a process decides: how many slots a look-up has to look at."""

from __future__ import annotations

from kvindex import PrefixIndex

from .data import BLOCK, Chain, chains, fill, own, payloads
from .workloads import KINDS, match

__all__ = ["DEPTHS", "KINDS", "compared", "exact"]

DEPTHS = (64, 2048)


def compared() -> dict[str, float]:
    """Blocks that a match compares with what is stored, for every kind of hit, on average."""
    figures: dict[str, float] = {}
    for kind in KINDS:
        for depth in DEPTHS:
            made = match(kind, depth, 8, content=32768)
            index = made.call.__self__  # type: ignore[attr-defined]
            found = [index._compared(index.match_prefix(tokens)) for tokens in made.items(0)]
            figures[f"blocks compared, {kind} {depth}"] = sum(found) / len(found)
    return figures


def exact() -> dict[str, float]:
    """Bytes per block in four situations, bytes after all of it has gone, and how much the index has to remember."""
    contents = chains(30, 32, 2048)
    blocks = sum(map(len, contents))
    pods = [f"pod-{number}" for number in range(8)]
    figures: dict[str, float] = {}
    for case, names, agree in (("1 pod", pods[:1], True), ("8 pods equal", pods, True), ("8 pods own", pods, False)):
        index = PrefixIndex(block_size=BLOCK)
        fill(index, contents, names, agree=agree)
        stats = index.stats()
        assert stats["blocks"] == blocks, stats
        figures[f"bytes per block, {case}"] = stats["bytes"] / blocks
        figures[f"sets, {case}"] = stats["sets"]
        figures[f"chains, {case}"] = stats["chains"]
        figures[f"probes, {case}"] = index._probes()
        for number, name in enumerate(names):
            back = contents if agree else [Chain(each.tokens, own(each.hashes, number)) for each in contents]
            for payload in payloads(back, 256, back=True):
                index.ingest(name, payload)
        stats = index.stats()
        assert stats["blocks"] == 0, stats
        figures[f"bytes when all blocks are gone, {case}"] = stats["bytes"]
    figures["bytes of an unused index"] = PrefixIndex(block_size=BLOCK).stats()["bytes"]
    return {**figures, **compared()}

"""Figures that repeat exactly: sizes and counts of what is stored, the same on every run of one build."""

from __future__ import annotations

from kvindex import PrefixIndex

from .data import BLOCK, Chain, chains, fill, own, payloads

__all__ = ["exact"]


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
        for number, name in enumerate(names):
            back = contents if agree else [Chain(each.tokens, own(each.hashes, number)) for each in contents]
            for payload in payloads(back, 256, back=True):
                index.ingest(name, payload)
        stats = index.stats()
        assert stats["blocks"] == 0, stats
        figures[f"bytes when all blocks are gone, {case}"] = stats["bytes"]
    figures["bytes of an unused index"] = PrefixIndex(block_size=BLOCK).stats()["bytes"]
    return figures

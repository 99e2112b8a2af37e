"""The times of saving an index to a file and of loading it, with the disk and without.

Events wait during "copied" only; matches go on during all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import NamedTuple

from kvindex import PrefixIndex

from .data import BLOCK, chains, fill
from .reach import Reached
from .report import amount, table

PODS = 8
DEPTH = 2048


class Took(NamedTuple):
    """Seconds by the clock, and of the processor. On a shared machine the latter are more reliable."""

    clock: float
    processor: float


def timed(call: Callable[[], object]) -> Took:
    before = perf_counter(), process_time()
    call()
    return Took(perf_counter() - before[0], process_time() - before[1])


def measure(*, blocks: int = 1_000_000, rounds: int = 7) -> Iterator[Reached | str]:
    """``blocks``: held by every pod; ``rounds``: their median counts."""
    rows = []
    contents = chains(11, blocks // DEPTH, DEPTH)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot"
        for kind, agree in (("the same names", True), ("names of their own", False)):
            index = PrefixIndex(block_size=BLOCK)
            fill(index, contents, [f"pod-{number}" for number in range(PODS)], agree=agree)
            held = index.stats()["blocks"]
            found: dict[str, list[Took]] = {"copied": [], "saved": [], "loaded": []}
            for _ in range(rounds):
                found["copied"].append(timed(lambda index=index: index._saved()))
                found["saved"].append(timed(lambda index=index: index.save(path)))
                found["loaded"].append(timed(lambda: PrefixIndex.load(path)))
            assert PrefixIndex.load(path).stats()["blocks"] == held
            middle = {what: Took(*map(median, zip(*took, strict=True))) for what, took in found.items()}
            size = os.path.getsize(path)
            rows.append(
                [
                    f"{held:,} blocks, {PODS} pods with {kind}",
                    *(f"{amount(1e3 * took.clock)} ({amount(1e3 * took.processor)})" for took in middle.values()),
                    amount(size / 1e6),
                    amount(size / held),
                ]
            )
            where = f"{held:,} blocks, {PODS} pods, {kind}"
            for what, at in (("save + load, seconds", 0), ("the same, of the processor", 1)):
                yield Reached(what, where, "snapshot seconds", middle["saved"][at] + middle["loaded"][at])
    yield table(["ms (of the processor)", "copied", "saved to the disk", "loaded", "MB", "bytes a block"], rows)

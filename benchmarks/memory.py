"""``python -m benchmarks.memory``: bytes of short prompts, and how the process's own memory follows the index's.

Each figure of the process comes from a process of its own, so that none is measured on top of what another one left.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from kvindex import PrefixIndex

from .churn import settle
from .data import BLOCK, Chain, chain, chains, own, payloads
from .machine import described, resident
from .reach import Reached, verdicts
from .report import amount, table

PODS = 2
#: Just beside a power of two, where tables are as full as they get, and half as full.
SIZES = (88_000, 96_000, 128_000)


def short(blocks: int, depth: int = 1) -> float:
    """Bytes a block of ``blocks`` blocks in prompts of ``depth``."""
    index = PrefixIndex(block_size=BLOCK)
    for number in range(blocks // 1000):
        for payload in payloads(chains(70 + number, 1000 // depth, depth), depth, batch=250):
            index.ingest("pod", payload)
    stats = index.stats()
    return float(stats["bytes"] / stats["blocks"])


def streams(blocks: int, lengths: tuple[int, ...], *, back: bool = False) -> Iterator[tuple[str, bytes]]:
    """Payloads of prompts of those lengths, of pods with names of their own, until there are ``blocks`` names."""
    numbers = range(max(blocks // (sum(lengths) * PODS // len(lengths)), 1))
    # Taken back in another order, so that what goes lies anywhere.
    for number in Random(1).sample(numbers, len(numbers)) if back else numbers:
        content = chain(71, number, lengths[number % len(lengths)])
        for pod in range(PODS):
            named = Chain(content.tokens, own(content.hashes, pod))
            for payload in payloads([named], 64, back=back):
                yield f"pod-{pod}", payload


def stays(blocks: int) -> tuple[float, float]:
    """MB that all blocks took, and the share of it in percent that stays once each has been removed by its name."""
    lengths = (2048, 64, 8, 1, 1)
    index = PrefixIndex(block_size=BLOCK)
    for pod, payload in streams(PODS * 4096, lengths):
        index.ingest(pod, payload)
    for pod, payload in streams(PODS * 4096, lengths, back=True):
        index.ingest(pod, payload)
    empty = settle()
    for pod, payload in streams(blocks, lengths):
        index.ingest(pod, payload)
    full = settle()
    for pod, payload in streams(blocks, lengths, back=True):
        index.ingest(pod, payload)
    assert not index.stats()["blocks"]
    return (full - empty) / 1e6, 100 * (settle() - empty) / (full - empty)


def peak(budget: int, *phases: tuple[int, ...]) -> float:
    """The most that was resident over ``budget``, while several times as much of each kind of prompts was stored."""
    for pod, payload in streams(4096, (64,)):
        PrefixIndex(block_size=BLOCK).ingest(pod, payload)
    index = PrefixIndex(block_size=BLOCK, max_bytes=budget)
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    for lengths in phases:
        shed = index.stats()["shed_blocks"]
        for number, (pod, payload) in enumerate(streams(1 << 30, lengths)):
            index.ingest(pod, payload)
            if number % 64 == 0 and index.stats()["shed_blocks"] - shed > budget // 400:
                break
    lines = Path("/proc/self/status").read_text().splitlines()
    (most,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return (most - before) / budget


def apart(call: Callable[..., Any], *given: Any) -> Any:
    """The answer of a process that has done nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(call, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="names that are stored and removed (%(default)s)")
    parser.add_argument("--budget", type=int, default=32_000_000, help="bytes (%(default)s)")
    options = parser.parse_args()
    depths = (1, 2, 8, 1000)
    found = {depth: [short(blocks, depth) for blocks in SIZES] for depth in depths}
    where = f"prompts of one block, the most of {', '.join(f'{size:,}' for size in SIZES)}"
    marks = [Reached("bytes a block", where, "bytes 1 block", max(found[1]))]
    megabytes, left = apart(stays, options.blocks)
    marks.append(Reached("resident after everything was removed, %", f"of {amount(megabytes)} MB", "stays", left))
    mixed = (2048, 64, 8, 1, 1)
    for what, phases in (
        ("prompts of 64 blocks", [(64,)]),
        ("prompts of 1 block", [(1,)]),
        ("prompts of 1 to 2,048 blocks", [mixed]),
        ("first of 1, then of 64, then of 2,048", [(1,), (64,), (2048,)]),
    ):
        over = apart(peak, options.budget, *phases)
        marks.append(Reached("peak resident over max_bytes", f"{options.budget / 1e6:.0f} MB, {what}", "peak", over))
    print(verdicts(marks))
    columns = ["bytes a block", *(f"{size:,} blocks" for size in SIZES)]
    print(table(columns, [[f"prompts of {depth}", *map(amount, bytes_)] for depth, bytes_ in found.items()]))
    print(", ".join(f"{name} {value}" for name, value in described("numpy").items()))


if __name__ == "__main__":
    main()

"""Bytes of short prompts, and the memory of the process beside that of the index.

Each figure of the process comes from a new process, so no figure includes the leftovers of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from kvindex import PrefixIndex

from .data import BLOCK, Chain, chain, chains, own, payloads
from .process import apart, resident, settle
from .reach import Reached
from .report import amount, table

PODS = 2


def short(blocks: int, depth: int = 1) -> float:
    """Bytes per block of ``blocks`` blocks in prompts of ``depth`` blocks."""
    index = PrefixIndex(block_size=BLOCK)
    for number in range(blocks // 1000):
        for payload in payloads(chains(70 + number, 1000 // depth, depth), depth, batch=250):
            index.ingest("pod", payload)
    stats = index.stats()
    return float(stats["bytes"] / stats["blocks"])


def streams(blocks: int, lengths: tuple[int, ...], *, back: bool = False) -> Iterator[tuple[str, bytes]]:
    """Payloads of prompts of ``lengths``, of pods with their own hashes, until there are ``blocks`` hashes."""
    numbers = range(max(blocks // (sum(lengths) * PODS // len(lengths)), 1))
    # Removals come in another order, so the removed blocks are all over the memory.
    for number in Random(1).sample(numbers, len(numbers)) if back else numbers:
        content = chain(71, number, lengths[number % len(lengths)])
        for pod in range(PODS):
            named = Chain(content.tokens, own(content.hashes, pod))
            for payload in payloads([named], 64, back=back):
                yield f"pod-{pod}", payload


def stays(blocks: int) -> tuple[float, float]:
    """MB that all blocks took, and the percentage of it that stays once each has been removed by its hash."""
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
    """The peak of resident memory over ``budget``, while several times as much of each kind of prompts is stored."""
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


def measure(
    *, blocks: int = 1_000_000, budget: int = 32_000_000, sizes: tuple[int, ...] = (88_000, 96_000, 128_000)
) -> Iterator[Reached | str]:
    """``blocks``: hashes that are stored and removed; ``budget``: bytes; ``sizes``: blocks of short prompts.

    The sizes are close to a power of two, where tables are as full as possible, or half as full.
    """
    depths = (1, 2, 8, 1000)
    found = {depth: [short(each, depth) for each in sizes] for depth in depths}
    where = f"prompts of one block, the most of {', '.join(f'{size:,}' for size in sizes)}"
    yield Reached("bytes a block", where, "bytes 1 block", max(found[1]))
    megabytes, left = apart(stays, blocks)
    yield Reached("resident after everything was removed, %", f"of {amount(megabytes)} MB", "stays", left)
    mixed = (2048, 64, 8, 1, 1)
    for what, phases in (
        ("prompts of 64 blocks", [(64,)]),
        ("prompts of 1 block", [(1,)]),
        ("prompts of 1 to 2,048 blocks", [mixed]),
        ("first of 1, then of 64, then of 2,048", [(1,), (64,), (2048,)]),
    ):
        over = apart(peak, budget, *phases)
        yield Reached("peak resident over max_bytes", f"{budget / 1e6:.0f} MB, {what}", "peak", over)
    columns = ["bytes a block", *(f"{size:,} blocks" for size in sizes)]
    yield table(columns, [[f"prompts of {depth}", *map(amount, bytes_)] for depth, bytes_ in found.items()])

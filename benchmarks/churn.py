"""Does memory come back when the pods go, and does a budget hold?

First a fleet comes, works and goes, round after round, always with other content. Bytes are the index's own count and
the resident memory of the process. The index's are compared with those of the empty index. The process's are compared
with those after one round, because the interpreter and the allocator keep some freed memory. Then a stream passes
through a budget that has room for a seventh of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns

import numpy as np

from kvindex import PrefixIndex

from .data import BLOCK, Chain, chain, own, payloads
from .process import settle
from .reach import Reached
from .report import amount, say, table

PODS = 8
#: Lengths of the conversations of a round, in blocks: some long, more short ones. Half of them share a system prompt.
LENGTHS = (2048, 512, 512, 64, 64, 64, 64, 8, 8, 8, 8, 8, 8, 8, 8, 1)


def contents(seed: int, blocks: int) -> Iterator[Chain]:
    """Chains of about ``blocks`` blocks together; every second one begins with the same 40 blocks."""
    common = chain(seed, 0, 40)
    made = number = 0
    while made < blocks:
        number += 1
        new = chain(seed, number, LENGTHS[number % len(LENGTHS)])
        made += len(new)
        if number % 2:
            new = Chain(np.concatenate([common.tokens, new.tokens]), np.concatenate([common.hashes, new.hashes]))
        yield new


def work(index: PrefixIndex, seed: int, blocks: int) -> None:
    """One round: half of the pods agree on names, copies come twice, and a part of all content is evicted."""
    rng = np.random.default_rng(seed)
    for number, content in enumerate(contents(seed, blocks)):
        for pod in rng.permutation(PODS)[: 1 + number % PODS]:
            named = content if pod % 2 else Chain(content.tokens, own(content.hashes, int(pod)))
            for _ in range(1 + (number % 5 == 0)):
                for payload in payloads([named], 64):
                    index.ingest(f"pod-{pod}", payload)
            if number % 3 == 0:
                for payload in payloads([named], 64, back=True):
                    index.ingest(f"pod-{pod}", payload)
        index.match_prefix(content.tokens)
        if number % 4 == 0:
            index.add_prefix("pod-0", content.tokens[: 64 * BLOCK], ttl=3600.0)


def come_and_go(count: int, blocks: int) -> Iterator[Reached]:
    """The most memory that is left after each of ``count`` rounds of ``blocks`` blocks."""
    index = PrefixIndex(block_size=BLOCK)
    empty, full, left, process = index.stats()["bytes"], [], [], []
    for seed in range(count + 1):
        work(index, seed, blocks)
        full.append(index.stats()["bytes"])
        for pod in range(PODS):
            index.remove_pod(f"pod-{pod}")
        left.append(index.stats()["bytes"])
        process.append(settle())
        if seed % 20 == 0:
            say(f"round {seed}: {full[-1]:,} bytes at work, {left[-1]:,} after, {process[-1] >> 10:,} KiB resident")
    where = f"{count} rounds of {np.mean(full) / 1e6:.1f} MB"
    yield Reached("the index's bytes without pods over those at the start", where, "churn", max(left) / empty)
    yield Reached("the process's over those after one round", where, "churn", max(process[1:]) / process[0])


def through(budget: int, blocks: int) -> list[list[str]]:
    """A stream of ``blocks`` blocks through an index with a budget, and through one without."""
    rows = []
    for limit in (None, budget):
        index = PrefixIndex(block_size=BLOCK, max_bytes=limit)
        done, most, shown = 0, 0, []
        for number in range(blocks // 1024):
            content = chain(99, number, 1024)
            for payload in payloads([content], 64):
                start = perf_counter_ns()
                index.ingest(f"pod-{number % PODS}", payload)
                shown.append(perf_counter_ns() - start)
                most = max(most, index.stats()["bytes"])
            done += 1024
        stats = index.stats()
        assert limit is None or most <= limit, f"{most} bytes in a budget of {limit}"
        rows.append(
            [
                f"{limit / 1e6:.0f} MB" if limit else "no budget",
                f"{done:,}",
                f"{stats['blocks']:,}",
                f"{stats['shed_blocks']:,}",
                f"{most / 1e6:.2f}",
                amount(sum(shown) / done),
                amount(float(np.percentile(shown, 99.9)) / 1000),
                amount(max(shown) / 1000),
            ]
        )
    return rows


def measure(
    *, rounds: int = 100, blocks: int = 20_000, stream: int = 1_000_000, budget: int = 5_000_000
) -> Iterator[Reached | str]:
    """``rounds``: after the first one; ``blocks``: in each round; ``stream``: blocks through ``budget`` bytes."""
    yield from come_and_go(rounds, blocks)
    columns = ["", "streamed", "kept", "evicted", "most MB", "ns a block", "p99.9 µs of 64", "slowest µs of 64"]
    yield table(columns, through(budget, stream))

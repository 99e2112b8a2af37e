"""Returning memory to the system, and pages with blocks of several chains."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from random import Random

import numpy as np
import pytest
from support import payload, removed, stored

from kvindex import PrefixIndex

SIZE = 4


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitizer keeps what is freed")
def test_resident_memory_goes_back_with_the_blocks() -> None:
    script = """
        import resource
        from random import Random
        import msgpack
        from kvindex import PrefixIndex

        def resident():
            with open("/proc/self/statm") as figures:
                return int(figures.read().split()[1]) * resource.getpagesize()

        def prompts(seed):
            for number in range(12_000):
                depth = (1, 1, 2, 9, 70)[number % 5]
                yield [seed << 40 | number << 16 | block for block in range(1, depth + 1)]

        def each(seed, order):
            for hashes in order(list(prompts(seed))):
                for pod in range(3):
                    yield f"pod-{pod}", [hash ^ pod << 60 for hash in hashes], hashes

        def store(seed):
            for pod, names, hashes in each(seed, list):
                tokens = [hash >> 16 & 0xFFFF if block == 0 else block for block, hash in enumerate(hashes)]
                index.ingest(pod, msgpack.packb([0.0, [["BlockStored", names, None, tokens, 1, None]]]))

        def remove(seed):
            for pod, names, _ in each(seed, lambda all: Random(seed).sample(all, len(all))):
                index.ingest(pod, msgpack.packb([0.0, [["BlockRemoved", names[::-1]]]]))

        index = PrefixIndex(1)
        # What the interpreter and the loader keep is taken before.
        store(1), remove(1)
        bytes_, empty = index.stats()["bytes"], resident()
        store(2)
        full = resident()
        assert index.stats()["blocks"] > 100_000 and full - empty > 8_000_000, (index.stats(), full - empty)
        remove(2)
        assert index.stats()["blocks"] == 0
        assert index.stats()["bytes"] == bytes_, index.stats()
        assert resident() - empty < (full - empty) / 5, (empty, full, resident())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def prompt(number: int, depth: int) -> np.ndarray:
    """Return the first ``depth`` blocks of a prompt that shares no block with any other."""
    return np.asarray([number * 100 + block for block in range(depth) for _ in range(SIZE)], dtype=np.uint32)


def named(number: int, depth: int, first: int = 0) -> list[int]:
    return [number * 100 + block + 1 for block in range(first, depth)]


def verify(index: PrefixIndex, depths: dict[int, int]) -> None:
    index._check()
    for number, depth in depths.items():
        assert index.match_prefix(prompt(number, 9)).tokens == ({"a": depth * SIZE} if depth else {})


def test_short_prompts_come_grow_and_go_in_any_order(tmp_path: Path) -> None:
    """Chains of one block share pages, and a growing chain gets a page of its own. Answers must not change."""
    index = PrefixIndex(SIZE)
    rng = Random(11)
    depths = dict.fromkeys(range(60), 0)
    for step in range(1200):
        number = rng.randrange(60)
        depth = depths[number]
        to = rng.choice((0, 1, 1, 1, depth, min(depth + 1, 9), rng.randrange(9)))
        if to > depth:
            tokens = prompt(number, to)[depth * SIZE :].tolist()
            parent = named(number, depth)[-1] if depth else None
            index.ingest("a", payload(stored(named(number, to, depth), tokens, parent=parent)))
        elif to < depth:
            index.ingest("a", payload(removed(*named(number, depth, to)[::-1])))
        depths[number] = to
        index._check()
        if step % 100 == 99:
            verify(index, depths)
            index.save(tmp_path / "saved")
            index = PrefixIndex.load(tmp_path / "saved")
            verify(index, depths)
    assert sum(depth == 1 for depth in depths.values()) > 8, "pages are shared at the end"
    before = PrefixIndex(SIZE).stats()["bytes"]
    index.remove_pod("a")
    index._check()
    assert index.stats()["bytes"] == before


def test_prompts_that_share_a_page_expire_one_by_one() -> None:
    """Of the eight chains in a page, those that were asked for stay, and the slots of the others are used again."""
    now = [0.0]
    index = PrefixIndex(SIZE, ttl=100.0, clock=lambda: now[0])
    for number in range(16):
        index.ingest("a", payload(stored(named(number, 1), prompt(number, 1).tolist())))
    for moment in (60.0, 120.0, 180.0):
        now[0] = moment
        for number in range(0, 16, 3):
            assert index.match_prefix(prompt(number, 1)).tokens == {"a": SIZE}
        index._check()
    verify(index, {number: int(number % 3 == 0) for number in range(16)})
    assert index.stats()["expired_blocks"] == 10
    for number in range(16, 40):
        index.ingest("a", payload(stored(named(number, 1), prompt(number, 1).tolist())))
    verify(index, {number: int(number % 3 == 0 or number >= 16) for number in range(40)})

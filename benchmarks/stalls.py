"""The longest wait of a match for one call, and the longest pause of every other Python thread.

A wait is the longest call of ``match_prefix`` while another thread stores blocks without a pause, so every table grows.
A pause is the longest time for which a thread that only sleeps was kept from running beside one call on a large index.

By the clock, both are mostly due to a shared machine, which takes a core away from either thread for milliseconds. So
the figures use the processor time of all threads of the process meanwhile, where it is less than the time by the clock.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain as chain_of
from itertools import repeat
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvindex import PrefixIndex
from kvindex.sim.wire import Cleared, encode_batch

from .data import BLOCK, beginning, chain, chains, fill, newest, payloads
from .reach import Reached
from .report import amount, say, table
from .writer import EACH, Writer

NAP = 0.0002


def touch(size: int = 1 << 29) -> None:
    """Make the host of a virtual machine provide memory in large pages, as on a machine that has run for a while.

    The first use of 2 MB that no process had used before took 5 ms here, and later uses took 0.2 ms.
    """
    with mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS) as memory:
        memory.madvise(MADV_HUGEPAGE)
        memory[:: 1 << 12] = bytes(size >> 12)


class Waits(NamedTuple):
    """Milliseconds of every call, by the clock and by the processor time of the process."""

    clock: npt.NDArray[np.float64]
    processor: npt.NDArray[np.float64]


def waits(blocks: int, budget: int | None) -> Waits:
    """The times of matches of a known prompt while another thread stores ``blocks`` blocks."""
    index = PrefixIndex(block_size=BLOCK, max_bytes=budget)
    fill(index, [chain(50, 0, 8)], ["pod"])
    prompt = chain(50, 0, 8).tokens
    stores = (payload for number in range(blocks // EACH) for payload in payloads([chain(51, number, EACH)], EACH))
    writer = Writer(index, stores)
    clock, processor, match, nap = time.perf_counter, time.process_time, index.match_prefix, time.sleep
    found = array("d"), array("d")
    # The match keeps the interpreter lock, and no other thread takes it between two readings of the clock.
    before = sys.getswitchinterval()
    sys.setswitchinterval(10)
    try:
        writer.start()
        while writer.is_alive():
            nap(NAP)
            used, at = processor(), clock()
            match(prompt)
            found[0].append(clock() - at)
            found[1].append(processor() - used)
    finally:
        sys.setswitchinterval(before)
        writer.join()
    stats = index.stats()
    assert stats["blocks"] + stats["shed_blocks"] == blocks // EACH * EACH + 8, stats
    by_clock = 1000 * np.asarray(found[0])
    return Waits(by_clock, np.minimum(by_clock, 1000 * np.asarray(found[1])))


class Pause(NamedTuple):
    """Milliseconds, by the clock and by the processor time of the process."""

    clock: float
    processor: float


def pause(call: Callable[[], object]) -> Pause:
    """The longest time for which a thread that sleeps 0.2 ms at a time was kept from running beside the call."""
    worst, ready, ended = [0.0, 0.0], threading.Event(), threading.Event()

    def tick() -> None:
        ready.set()
        last, used = time.perf_counter(), time.process_time()
        while not ended.is_set():
            time.sleep(NAP)
            now, uses = time.perf_counter(), time.process_time()
            worst[0] = max(worst[0], now - last)
            worst[1] = max(worst[1], min(now - last, uses - used))
            last, used = now, uses

    ticker = threading.Thread(target=tick)
    ticker.start()
    ready.wait()
    call()
    ended.set()
    ticker.join()
    return Pause(*(1000 * max(seconds - NAP, 0) for seconds in worst))


Call: TypeAlias = Callable[[PrefixIndex], object]


def calls(folder: Path) -> dict[str, Call]:
    """The measured calls, each on an index of its own."""
    prompt = beginning(53, 0, 65_536)
    (event,) = payloads([chain(53, 0, 65_536)], 65_536)
    clear = encode_batch([Cleared()], newest())
    return {
        "match_prefix of 1,048,576 tokens": lambda index: index.match_prefix(prompt),
        "match_many of 1,000 prompts": lambda index: index.match_many([prompt[: 512 * BLOCK]] * 1000),
        "stats": lambda index: index.stats(),
        "pod_state": lambda index: index.pod_state("pod"),
        "worker_stats": lambda index: index.worker_stats("pod"),
        "stream_places": lambda index: index.stream_places("pod"),
        "mark_worker": lambda index: index.mark_worker("pod", 0, "exact"),
        "save": lambda index: index.save(folder / "again"),
        "load": lambda index: index.load(folder / "saved"),
        "add_prefix of 1,048,576 tokens": lambda index: index.add_prefix("pod", prompt, ttl=60),
        "ingest of one event of 65,536 blocks": lambda index: index.ingest("pod", event),
        "ingest of a clear": lambda index: index.ingest("pod", clear),
        "clear_worker": lambda index: index.clear_worker("pod"),
        "configure_pod, presence": lambda index: index.configure_pod("pod", presence="set"),
        "configure_pod, ignore_media": lambda index: index.configure_pod("pod", ignore_media=["GPU"]),
        "remove_pod": lambda index: index.remove_pod("pod"),
        "match_prefix that expires all": lambda index: index.match_prefix(prompt[:BLOCK]),
    }


def pauses(blocks: int, rounds: int) -> dict[str, Pause]:
    """The pause of each call in its best round, on an index of ``blocks`` blocks of one pod."""
    found = {}
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        index = PrefixIndex(block_size=BLOCK)
        for number in range(blocks // 1024):
            fill(index, chains(52 + number, 16, 64), ["pod"])
        index.save(saved)
        for name, call in calls(Path(folder)).items():
            ttl = 1.0 if "expires" in name else None
            of_call = []
            for _ in range(rounds):
                times = chain_of([0.0], repeat(1e6))
                index = PrefixIndex.load(saved, ttl=ttl, clock=times.__next__)
                of_call.append(pause(partial(call, index)))
            found[name] = Pause(*map(min, zip(*of_call, strict=True)))
    return found


def measure(*, blocks: int = 3_000_000, held: int = 2_000_000, rounds: int = 3) -> Iterator[Reached | str]:
    """``blocks``: stored while matches wait; ``held``: while threads pause; ``rounds``: the best one counts."""
    rows = []
    for what, budget in (("no budget", None), ("a budget of half of it", blocks * 20)):
        say(f"storing {blocks:,} blocks, {what}")
        touch()
        found = waits(blocks, budget)
        where = f"{blocks:,} blocks stored, {what}; {len(found.clock):,} matches"
        yield Reached("longest wait of a match, ms", where, "wait ms", float(found.processor.max()))
        for kind, ms in zip(("by the clock", "by the processor"), found, strict=True):
            rows.append([f"{what}, {kind}", *(amount(1000 * q) for q in np.percentile(ms, [50, 99, 99.9, 100]))])
    say(f"storing {held:,} blocks")
    before = sys.getswitchinterval()
    # A short interval, because a thread's wait for another one's Python code is not measured.
    sys.setswitchinterval(NAP)
    paused = pauses(held, rounds)
    sys.setswitchinterval(before)
    longest = max(paused, key=lambda name: paused[name].processor)
    where = f"{held:,} blocks, {longest}"
    yield Reached("longest pause of another thread, ms", where, "pause ms", paused[longest].processor)
    yield table(["µs of a match", "p50", "p99", "p99.9", "max"], rows)
    columns = ["ms of a pause", "by the clock", "by the processor"]
    yield table(columns, [[name, *map(amount, ms)] for name, ms in paused.items()])

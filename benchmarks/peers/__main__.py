"""``python -m benchmarks.peers``: kvindex, Dynamo's RadixTree, a dict of sets and the floor, in one process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack

from kvindex import PrefixIndex

from .. import machine
from ..data import BLOCK, Chain, chain, payloads
from ..interleave import Timings, interleaved
from ..report import say
from . import page
from .contenders import Ask, Contender, DictOfSets, array, available, dynamo_problem, floor
from .memory import CASES
from .result import Result

#: Calls per contender and round: enough for a round to take long compared with the clock's resolution.
CALLS = {8: 64, 64: 32, 512: 8, 2048: 4}
#: Blocks of every depth in the index, by pods: larger than the L2 cache, while Dynamo still fits into memory.
BLOCKS = {8: 65_536, 64: 32_768, 256: 16_384}
#: A set of 256 pods takes 16 KiB, so the dict of sets holds only the first prompts. This is no disadvantage for it.
SETS_BYTES = 200 << 20


def compare_matches(pods: int, rounds: int, kinds: Sequence[type[Contender]], out: Result) -> None:
    contenders = [kind(pods) for kind in kinds]
    prompts = {
        depth: [chain(pods * 10_000 + depth, number, depth) for number in range(BLOCKS[pods] // depth)]
        for depth in CALLS
    }
    for contender in contenders:
        for contents in prompts.values():
            contender.store(contents[: _held(contender.name, pods, contents)])
    for depth, contents in prompts.items():
        expected = dict.fromkeys(range(pods), depth)
        for contender in contenders:
            for content in contents[: min(8, _held(contender.name, pods, contents))]:
                found = contender.answer(content.tokens)
                assert found == expected, f"{contender.name} answers {found} where all {pods} pods hold {depth} blocks"
        for question in ("tokens", "answer", "hashes"):
            timings = ask(question, pods, contents, contenders, rounds)
            out.matches[question, depth, pods] = timings
            say(
                f"{pods:4} pods {depth:5} blocks {question}: "
                + ", ".join(f"{n} {timings.best(n):.2f}" for n in timings)
            )


def _held(name: str, pods: int, contents: Sequence[Chain]) -> int:
    if not name.startswith(DictOfSets.name):
        return len(contents)
    return max(SETS_BYTES // len(CALLS) // (216 + 64 * pods) // len(contents[0]), 2)


def ask(question: str, pods: int, contents: Sequence[Chain], contenders: Sequence[Contender], rounds: int) -> Timings:
    """Times of one kind of query by every contender, with other prompts each time."""
    asks: dict[str, Ask] = {}
    for contender in contenders:
        asks |= contender.asks[question]
    if question == "tokens":
        asks["floor"] = Ask(array, floor)
    places = {label: place for place, label in enumerate(asks)}

    def inputs(label: str, number: int) -> Sequence[Any]:
        calls = CALLS[len(contents[0])]
        if label.startswith(DictOfSets.name):
            calls = max(calls // 8, 1)
        among = min(_held(label, pods, contents), len(contents))
        # Two contenders in a row get different prompts: the same tokens would be partly in the processor's cache.
        first = (number * len(asks) + places[label]) * calls
        # Made again each time: the lists of all prompts would take more memory than all contenders.
        return [asks[label].prepare(contents[place % among].tokens) for place in range(first, first + calls)]

    return interleaved({label: each.call for label, each in asks.items()}, inputs, rounds)


def compare_ingest(rounds: int, out: Result) -> None:
    """``ingest`` of content that no pod holds yet, and of content that another pod has, over ``msgpack.unpackb``."""
    # Many short rounds: other processes take whole milliseconds from some of them, and the median excludes those.
    rounds *= 3
    for each, together, depth in ((256, 1, 512), (64, 4, 128), (1, 64, 6)):
        index = PrefixIndex(block_size=BLOCK)
        for payload in payloads([chain(6, number, 2048) for number in range(64)], 256):
            index.ingest("filler", payload)
        batches = []
        for number in range(rounds):
            contents = [chain(7 + each, number * together + place, depth) for place in range(together)]
            batches.append(list(payloads(contents, each, batch=together)))
        for case in ("new", "known"):

            def apply(payload: bytes, pod: str = case) -> object:
                return index.ingest(pod, payload)  # noqa: B023

            calls = {"kvindex": apply, "msgpack": msgpack.unpackb}
            # No round to warm up, because a batch can be applied for the first time only once.
            timings = interleaved(calls, lambda _, number: batches[number], rounds, warm=False)  # noqa: B023
            out.ingest[case, each] = timings
            say(f"ingest, {each} blocks an event, {case}: {timings.ratio('kvindex', 'msgpack').median:.3f} of unpackb")
        report = index.stats()
        assert report["skipped"] == report["parked"] == 0, report


def compare_memory(kinds: Sequence[type[Contender]], out: Result) -> None:
    """Bytes per block of each contender in a new process: memory freed by one would otherwise serve the next."""
    for case in CASES:
        for kind in kinds:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.peers.memory", kind.name, case],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                out.memory[kind.name, case] = done.stderr.strip().splitlines()[-1]
            else:
                out.memory[kind.name, case] = json.loads(done.stdout)
            say(f"memory, {case}, {kind.name}: {out.memory[kind.name, case]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds of each comparison (%(default)s)")
    parser.add_argument("--pods", type=int, nargs="+", default=sorted(BLOCKS), choices=sorted(BLOCKS))
    parser.add_argument("--no-memory", action="store_true", help="leave out bytes per block, the slowest part")
    parser.add_argument("--out", type=Path, help="directory for peers.md and peers.svg; without it, only print")
    options = parser.parse_args()

    out = Result(machine.described("numpy", "msgpack", "xxhash", "ai-dynamo-runtime"), options.rounds)
    kinds = available()
    problem = dynamo_problem()
    if problem is not None:
        out.skipped.append(problem)
        say(f"Dynamo is left out: {problem}")
    for pods in options.pods:
        compare_matches(pods, options.rounds, kinds, out)
    compare_ingest(options.rounds, out)
    if not options.no_memory:
        compare_memory(kinds, out)
    text = page.markdown(out)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "peers.md").write_text(text)
        page.plot(out, options.out / "peers.svg")


if __name__ == "__main__":
    main()

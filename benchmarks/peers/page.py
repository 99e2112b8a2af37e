"""The comparison as a page and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..interleave import Timings
from ..reach import verdicts
from ..report import amount, table
from .memory import CASES
from .result import Result

__all__ = ["markdown", "plot"]

METHOD = """\
Method: one process, one thread that asks. All contenders hold the same chains (seeded, larger than the L2 cache) for
the same pods, every pod every chain, and their answers are checked against each other first. A round asks every
contender in turn, in an order that turns, about prompts that nobody was asked about lately; {rounds} rounds. The tokens
were written just before the call, as a tokenizer does; the index is cold. Microseconds are the best round's; ratios are
medians over rounds of the ratio within a round, so noise of the machine hits both alike; beside them is the ratio of
the best rounds, and the worse of the two decides. Calls are timed in a loop of Python with the garbage collector at
rest; what they return is freed within the time. Dynamo gets the form that it is faster with, a list; it hands each
question to a thread of its own, which costs it more the busier a machine is. The dict of sets hashes each block with
the `xxhash` package; the floor is one `xxhash.xxh3_64_intdigest` over the bytes of all tokens. `From hashes` starts
with the hashes that the contender itself computed, an array for kvindex and a list for the others. Ingest is
`PrefixIndex.ingest` (decode, hash, place) of what vLLM 0.33 writes, beside `msgpack.unpackb` of the same payloads.
Resident bytes are what a process of its own grows by: the mean of 16 samples while the index doubles in size, since
tables grow in steps; the largest in brackets."""

INTRO = """
Made by `make bench-peers`. *kvindex* and *Dynamo* are asked with an array of tokens or hashes, *list* is the same from
a list of ints; the *dict of sets* is what one would write first: prefix hash to set of pods. The *floor* is one hash
over the bytes of the prompt. Each of the pods holds all of the prompt. A verdict *reached* is within what was promised
(at least), *stretch* within what was hoped for, *not* is not. The method is [at the end](#measured-on), and [how it is
measured](measuring.md) has what is behind it.
"""

WEAK = """\
## Where kvindex is weak

- *Short prompts.* Of a call on 8 blocks, most is crossing from Python into native code and back.
- *Lists*, of tokens or of hashes, are read object by object, and for a long one that is most of the time; an array of
  tokens costs a quarter.
- *Own names.* Pods that disagree on the engine's hashes (vLLM before 0.29 without a fixed seed) cost memory per pod and
  block: removals come by name, so the names have to be kept. Dynamo's tree refuses such events.
- *Reading the whole answer* builds a dict of all pods: 14 µs for 256 of them, beside 1 µs for `best()`.
- *Short prompts in a huge index* wait for memory twice: at 10 million blocks a match of 8 blocks takes 0.6 µs instead
  of 0.2, for neither the place of a prompt's first block nor the block is in any cache.
- *Events of one block* cost two and a half times as much per block as long ones: there is a name to find for each.
- *Hybrid models and offloading*: a worker with several groups or media costs some 35 ns a match, 10 µs for 256 of them,
  where one with a single group costs one.
- *A router that never rests*: Python gives the thread that ingests its turn every 5 ms, and batches wait for it.
- *What is not compared*: contenders that Python cannot call (the routers in Go and Rust), and networks: all of this is
  one process."""


def _times(out: Result, question: str) -> str:
    asked = {key: timings for key, timings in out.matches.items() if key[0] == question}
    labels = list(dict.fromkeys(label for timings in asked.values() for label in timings))
    rows = [
        [f"{depth} blocks, {pods} pods", *(amount(timings.best(label)) if label in timings else "" for label in labels)]
        for (_, depth, pods), timings in asked.items()
    ]
    return table(["µs per call", *labels], rows)


def _ingest(out: Result) -> str:
    columns = ["", "ns per block", "`unpackb`, ns per block", "of `unpackb`", "quartiles"]
    rows = []
    for (case, each), timings in out.ingest.items():
        ratio = timings.ratio("kvindex", "msgpack")
        blocks = {256: 256, 64: 256, 1: 64}[each]
        per = [amount(timings.best(name) * 1000 / blocks) for name in ("kvindex", "msgpack")]
        quartiles = f"{ratio.low:.3f} to {ratio.high:.3f}"
        rows.append([f"{each} blocks an event, {case} content", *per, f"{ratio.median:.3f}", quartiles])
    return table(columns, rows)


def _memory(out: Result) -> str:
    names = list(dict.fromkeys(name for name, _ in out.memory))
    notes: list[str] = []

    def cell(name: str, case: str) -> str:
        figures = out.memory[name, case]
        if not isinstance(figures, str):
            return f"{figures['mean']:.1f} ({figures['largest']:.1f})"
        notes.append(f"{name}, {case}: `{figures}`")
        return "no"

    rows = [[case, *(cell(name, case) for name in names)] for case in CASES]
    return table(["bytes per block", *names], rows) + "".join(f"\n{note}\n" for note in notes)


def markdown(out: Result) -> str:
    """The page; also what is printed."""
    parts = ["# Beside others", INTRO]
    parts += [f"Left out: {reason}." for reason in out.skipped]
    parts += ["![Time per call by depth of the prompt](peers.svg)"]
    parts += ["## From tokens", _times(out, "tokens"), "## From tokens to what a router reads", _times(out, "answer")]
    parts += ["## From hashes", _times(out, "hashes"), "## Events", _ingest(out)]
    if out.memory:
        parts += ["## Memory", _memory(out)]
    parts += ["## What was promised", verdicts(out.reached())]
    parts += [WEAK, "## Measured on", table(["", ""], [[name, value] for name, value in out.machine.items()])]
    parts += [METHOD.format(rounds=out.rounds)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot(out: Result, path: Path) -> None:
    """Time per call over depth, one panel per number of pods, both axes logarithmic."""
    from matplotlib.figure import Figure

    numbers = sorted({pods for _, _, pods in out.matches})
    figure = Figure(figsize=(4.2 * len(numbers), 4), layout="constrained")
    panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for panel, pods in zip(panels, numbers, strict=True):
        series = _series(out, pods)
        for label, (depths, values) in series.items():
            line = ":" if label == "floor" else "-"
            panel.plot(depths, values, line, marker="o", markersize=3, label=label)
        panel.set(xscale="log", yscale="log", title=f"{pods} pods", xlabel="blocks of 16 tokens")
        panel.set_xticks(sorted({depth for _, depth, _ in out.matches}), minor=False)
        panel.set_xticklabels([str(depth) for depth in sorted({depth for _, depth, _ in out.matches})])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("µs per call, from tokens")
    panels[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _series(out: Result, pods: int) -> dict[str, tuple[list[int], Sequence[float]]]:
    asked: dict[int, Timings] = {depth: t for (q, depth, p), t in out.matches.items() if (q, p) == ("tokens", pods)}
    labels = dict.fromkeys(label for timings in asked.values() for label in timings)
    return {label: (list(asked), [timings.best(label) for timings in asked.values()]) for label in labels}

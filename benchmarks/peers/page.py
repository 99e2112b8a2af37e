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
contender once, in a rotating order, about prompts that were not matched recently; {rounds} rounds. The tokens
were written just before the call, as a tokenizer does; the index is cold. Microseconds are the best round's; ratios are
medians over rounds of the ratio within a round, so noise of the machine affects both alike. Beside them is the ratio of
the best rounds, and the worse of the two counts. Calls are timed in a loop of Python with the garbage collector at
rest, including the release of their results. Dynamo gets its faster input, a list. It hands each
query to its own thread, which takes longer on a busy machine. The dict of sets hashes each block with
the `xxhash` package; the floor is one `xxhash.xxh3_64_intdigest` over the bytes of all tokens. `From hashes` starts
with the hashes that the contender itself computed, an array for kvindex and a list for the others. Ingest is
`PrefixIndex.ingest` (decode, hash, place) of payloads of vLLM 0.33, beside `msgpack.unpackb` of the same payloads.
Resident bytes are the growth of a separate process: the mean of 16 samples while the index doubles in size, since
tables grow in steps, and the largest in brackets."""

INTRO = """
Made by `make bench-peers`. *kvindex* and *Dynamo* get an array of tokens or hashes, *list* a list of ints. The *dict of
sets* is a naive implementation: a dict from prefix hash to set of pods. The *floor* is one hash over the bytes of the
prompt. Every pod holds the whole prompt. Each result is compared with a target (*at least*) and a more ambitious one
(*stretch*); *not* means that the target was missed. The method is [at the end](#measured-on);
[how it is measured](measuring.md) has the background.
"""

WEAK = """\
## Where kvindex is weak

- *Short prompts.* Most of the time of a call on 8 blocks is the transition between Python and native code.
- *Lists* of tokens or hashes are read object by object, which is most of the time of a long one. An array of tokens
  takes a quarter of it.
- *Own hashes.* Pods with different engine hashes for equal content (vLLM before 0.29 without a fixed seed) need memory
  per pod and block: removals name these hashes, so the index keeps them. Dynamo's tree refuses such events.
- *Reading the whole answer* builds a dict of all pods: 14 µs for 256 pods; `best()` takes 1 µs.
- *Short prompts in a huge index* wait for memory twice, for the table entry of the first block and for the block. At 10
  million blocks, a match of 8 blocks takes 0.6 µs instead of 0.2.
- *Events of one block* take two and a half times as long per block as long ones: each needs its own look-up.
- *Hybrid models and offloading*: a worker with several groups or media adds about 35 ns to a match, 10 µs for 256
  workers; a worker with a single group adds 1 ns.
- *A busy router*: Python switches to the ingesting thread every 5 ms, and batches wait until then.
- *Not compared*: implementations that Python cannot call (routers in Go and Rust), and networks. All of this is one
  process."""


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
    """The page in Markdown, for the file and for the terminal."""
    parts = ["# Beside others", INTRO]
    parts += [f"Left out: {reason}." for reason in out.skipped]
    parts += ["![Time per call by depth of the prompt](peers.svg)"]
    parts += ["## From tokens", _times(out, "tokens"), "## From tokens to a Python result", _times(out, "answer")]
    parts += ["## From hashes", _times(out, "hashes"), "## Events", _ingest(out)]
    if out.memory:
        parts += ["## Memory", _memory(out)]
    parts += ["## Targets", verdicts(out.reached())]
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

"""``python -m benchmarks.baseline make|check``: the figures that this commit had, and whether they still hold.

Kept in ``baseline_metrics.json`` are no seconds: times over a floor or over a peer measured in the same moment,
instruction counts, and sizes, which repeat exactly. A ratio still drifts with what else a machine does (a busy
neighbour costs more where memory is waited for), so one that is beyond the threshold is only a suspicion. The commit
that the baseline was made from is then built, and both take turns as in the gate; that decides.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time_ns
from typing import Any

from .exact import verdict
from .gate import instructions
from .gate.builds import BrokenRun, Build, built, frozen
from .gate.compare import Worker, compare
from .machine import commit, described
from .peers.contenders import CONTENDERS, Dynamo, KVIndex, dynamo_problem
from .report import say, table
from .workloads import CORE

FILE = Path(__file__).with_name("baseline_metrics.json")
PROCESSES = 5
SHOTS = 60
#: Blocks and pods of the comparison with peers: where hashing outweighs handing work to another thread.
PEERS_AT = (512, 8)


def over_floor(build: Build, names: Sequence[str]) -> dict[str, float]:
    """Times over the floor. The best of many short rounds, so that a busy neighbour has to be there all the time."""
    votes: dict[str, list[float]] = {name: [] for name in names}
    for process in range(PROCESSES):
        with Worker(build) as worker:
            for name in names:
                worker.ask("open", name)
                spent = [worker.ask("run", 2 + 2 * shot, 2) for shot in range(SHOTS)]
                votes[name].append(min(work for work, _ in spent) / min(floor for _, floor in spent))
        say(f"process {process + 1} of {PROCESSES}")
    return {name: round(median(each), 4) for name, each in votes.items()}


def over_kvindex() -> dict[str, float]:
    """How many times kvindex's processor time, all threads, each peer takes for the same prompts."""
    from .data import chain

    depth, pods = PEERS_AT
    contents = [chain(50, number, depth) for number in range(64)]
    kinds = [kind for kind in CONTENDERS if kind is not Dynamo or dynamo_problem() is None]
    best: dict[str, float] = {}
    calls: dict[str, tuple[Callable[[Any], Any], Callable[[Any], object]]] = {}
    for kind in kinds:
        contender = kind(pods)
        contender.store(contents)
        # The first of its ways to be asked from tokens is the one that it is faster with.
        calls[kind.name] = next(iter(contender.asks["tokens"].values()))
    for shot in range(40):
        for name, (prepare, call) in calls.items():
            prompts = [prepare(contents[(shot * 8 + place) % len(contents)].tokens) for place in range(8)]
            start = process_time_ns()
            for prompt in prompts:
                call(prompt)
            spent = (process_time_ns() - start) / len(prompts)
            best[name] = min(best.get(name, spent), spent)
    return {name: round(spent / best[KVIndex.name], 3) for name, spent in best.items() if name != KVIndex.name}


def toolchain() -> str:
    """What instruction counts depend on besides the code."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[
        0
    ]
    facts = described("numpy", "xxhash", "msgpack", "cython")
    parts = [
        compiler,
        platform.machine(),
        *(f"{name} {facts[name]}" for name in ("Python", "numpy", "xxhash", "cython")),
    ]
    return "; ".join(parts)


def measured(build: Build, names: Sequence[str]) -> dict[str, Any]:
    with Worker(build) as worker:
        exact = worker.ask("exact")
    figures: dict[str, Any] = {"exact": exact, "instructions": {}, "over floor": over_floor(build, names)}
    if instructions.available():
        say("counting instructions")
        figures["instructions"] = instructions.count(build, names)
    figures["peers over kvindex"] = over_kvindex()
    return figures


def make() -> int:
    with frozen(built("HEAD")) as (build,):
        figures = measured(build, list(CORE))
    facts = {"commit": build.commit, "machine": described()["processor"], "toolchain": toolchain()}
    FILE.write_text(json.dumps(facts | figures, indent=1) + "\n")
    print(f"{FILE}: {sum(map(len, figures.values()))} figures of {build.commit[:10]}")
    return 0


def check(threshold: float, only: str, out: Path | None) -> int:
    try:
        kept = json.loads(FILE.read_text())
    except OSError as error:
        raise BrokenRun(f"there is no baseline ({error}); make bench-baseline makes one") from None
    names = [name for name in CORE if only in name]
    limit = 1 + threshold
    with frozen(built("HEAD", changes=True)) as (new,):
        found = measured(new, names)
    rows: list[list[str]] = []
    worse: list[str] = []
    suspects: list[str] = []

    def row(kind: str, name: str, before: float, after: float, said: str) -> None:
        rows.append([kind, name, f"{before:g}", f"{after:g}", f"{after / before:.3f}" if before else "", said])
        if said.startswith("worse"):
            worse.append(
                f"{kind}, {name}: {before:g} → {after:g}, {_change(after, before)} since {kept['commit'][:10]}"
            )

    for name, before in kept["exact"].items():
        if name in found["exact"] and found["exact"][name] != before:
            after = found["exact"][name]
            row("exact", name, before, after, verdict(name, before, after, limit))
    if kept["instructions"] and found["instructions"] and kept["toolchain"] != toolchain():
        say(f"instructions are not compared: the baseline's are of {kept['toolchain']}, this is {toolchain()}")
    else:
        for name in names:
            if name in kept["instructions"] and name in found["instructions"]:
                before, after = kept["instructions"][name], found["instructions"][name]
                row("instructions", name, before, after, "worse" if after > before * limit else "")
    for name in names:
        if name in kept["over floor"]:
            before, after = kept["over floor"][name], found["over floor"][name]
            suspect = after > before * limit
            suspects += [name] * suspect
            row("time over floor", name, before, after, "asked again" if suspect else "")
    for name, before in kept["peers over kvindex"].items():
        after = found["peers over kvindex"].get(name)
        if after is not None:
            # Which of the two has changed is not known; the workloads above are the same code and know it.
            row("peers over kvindex", f"{name}, {PEERS_AT[0]} blocks", before, after, "")
            if before > after * limit and "match numpy full 512 blocks 8 pods" not in suspects:
                suspects.append("match numpy full 512 blocks 8 pods")
    if suspects:
        worse += _again(kept["commit"], suspects, limit)
    columns = ["figure", "", "baseline", "now", "now / baseline", ""]
    since = f"baseline of {kept['commit'][:10]} on {kept['machine']}; now {commit()}, threshold {threshold:.0%}"
    end = ["WORSE THAN THE BASELINE:", *worse] if worse else ["Nothing is worse than the baseline."]
    text = "\n".join([table(columns, rows), since, "", *end])
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench-check.md").write_text(text + "\n")
        plot(rows, limit, since, out / "bench-check.svg")
    return bool(worse)


def plot(rows: Sequence[Sequence[str]], limit: float, title: str, path: Path) -> None:
    """Each figure as a point: where it stands beside the baseline, and beside the threshold."""
    from matplotlib.figure import Figure

    kinds = {"time over floor": "o", "instructions": "x"}
    names = sorted({row[1] for row in rows if row[0] in kinds}, reverse=True)
    figure = Figure(figsize=(9, 1 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    for kind, marker in kinds.items():
        points = [(float(row[4]), names.index(row[1])) for row in rows if row[0] == kind and row[4]]
        axes.plot([ratio for ratio, _ in points], [place for _, place in points], marker, markersize=5, label=kind)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.axvline(limit, color="red", linewidth=0.8, linestyle="--", label="threshold")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("now / baseline")
    axes.set_title(title, fontsize=7, loc="left")
    figure.legend(loc="outside lower left", ncols=3, fontsize=7)
    figure.savefig(path)


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "from nothing"


def _again(base: str, names: Sequence[str], limit: float) -> list[str]:
    """Asks the two builds themselves about what a ratio made suspicious."""
    say(f"beside the baseline's own commit once more: {', '.join(names)}")
    with frozen(built(base), built("HEAD", changes=True)) as (old, new):
        found = compare(old, new, names, limit, say)
    for each in found:
        blamed = "slower" if each.slower(limit) else "the machine, not the code"
        say(f"{each.name}: {each.ratio:.3f} times as long as {base[:10]}: {blamed}")
    return [f"time, {each.name}: {each.ratio - 1:+.1%} since {base[:10]}" for each in found if each.slower(limit)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline", description=__doc__)
    parser.add_argument("what", choices=("make", "check"))
    parser.add_argument("--threshold", type=float, default=0.10)
    parser.add_argument("--only", default="", help="check only workloads whose name contains this")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put the table and a plot of it there, too")
    options = parser.parse_args()
    try:
        return make() if options.what == "make" else check(options.threshold, options.only, options.out)
    except BrokenRun as error:
        print(f"BROKEN: {error}\nNothing is known about speed.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.baseline make|check``: record the exact figures of a commit, or compare with the record.

The figures are those that asv's suite tracks: counted instructions, sizes, and counts of the work of a match. None of
them is a time, so a busy machine does not matter. ``baseline_metrics.json`` keeps them for one commit. Instructions are
compared only where compiler and packages are the same; elsewhere ``asv continuous`` counts those of both commits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

from . import instructions
from .machine import commit, described
from .report import say, table
from .suite import sizes

FILE = Path(__file__).with_name("baseline_metrics.json")
#: Figures that repeat exactly: any growth counts. The others may grow by the threshold. Small changes mean nothing in
#: instructions, and in figures that depend on the secret of a process (the number of slots that a look-up reads).
EXACT = ("track_bytes", "track_sets", "track_chains", "track_blocks_compared")


def measured(only: str = "") -> dict[str, float]:
    """Every figure that the suite tracks, by class, method and parameters, as asv names them."""
    figures: dict[str, float] = {}
    for name, kind in vars(sizes).items():
        methods = [method for method in vars(kind) if method.startswith("track_")] if isinstance(kind, type) else []
        methods = [method for method in methods if only in f"{name}.{method}"]
        cached = [kind().setup_cache()] if methods and hasattr(kind, "setup_cache") else []
        for method, values in itertools.product(methods, itertools.product(*kind.params) if methods else ()):
            figures[f"{name}.{method}({', '.join(map(str, values))})"] = getattr(kind(), method)(*cached, *values)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def make() -> int:
    if commit().endswith("-dirty"):
        say("the figures are to be those of a commit: commit what is changed first")
        return 1
    figures = measured()
    kept = {"commit": commit(), "machine": described()["processor"], "toolchain": instructions.toolchain()}
    FILE.write_text(json.dumps({**kept, "figures": figures}, indent=1) + "\n")
    print(f"{FILE}: {len(figures)} figures of {kept['commit']}")
    return 0


def check(threshold: float, only: str, out: Path | None) -> int:
    kept = json.loads(FILE.read_text())
    alike = kept["toolchain"] == instructions.toolchain()
    found = measured(only)
    rows, worse = [], []
    for name, before in kept["figures"].items():
        if name not in found or (name.startswith("Instructions") and not alike):
            continue
        after = found[name]
        limit = before if any(each in name for each in EXACT) else before * (1 + threshold)
        said = "worse" if after > limit else "better" if after < before else ""
        if said == "worse":
            change = f"{after / before - 1:+.1%}" if before else "from nothing"
            worse.append(f"{name}: {before:g} → {after:g}, {change} since {kept['commit']}")
        rows.append([name, f"{before:g}", f"{after:g}", f"{after / before:.3f}" if before else "", said])
    if not alike:
        say(f"the baseline's instructions are of {kept['toolchain']}; here both commits' are counted")
        worse += both(kept["commit"], threshold)
    end = ["WORSE THAN THE BASELINE:", *worse] if worse else ["Nothing is worse than the baseline."]
    since = f"baseline of {kept['commit']} on {kept['machine']}; now {commit()}, threshold {threshold:.0%}"
    text = "\n".join([table(["figure", "baseline", "now", "now / baseline", ""], rows), since, "", *end])
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench-check.md").write_text(text + "\n")
    return bool(worse)


def both(base: str, threshold: float) -> list[str]:
    """Compare the instructions of the baseline's commit with those of HEAD, both built here."""
    command = ["asv", "continuous", f"--factor={1 + threshold}", "--bench=Instructions", "--split", base, "HEAD"]
    done = subprocess.run(command, check=False)
    return [f"instructions: see asv's table, exit status {done.returncode}"] if done.returncode else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline", description=__doc__)
    parser.add_argument("what", choices=("make", "check"))
    parser.add_argument("--threshold", type=float, default=0.10)
    parser.add_argument("--only", default="", help="check only figures whose name contains this")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put the table there, too")
    options = parser.parse_args()
    return make() if options.what == "make" else check(options.threshold, options.only, options.out)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.gate BASE``: is this checkout slower or larger than BASE?

Exit code 0: no. 1: yes, and by how much stands in the table. 2: the run is broken, and nothing is known.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from ..exact import verdict
from ..report import say, table
from ..workloads import CORE
from . import instructions
from .builds import BrokenRun, Build, built, frozen
from .compare import Comparison, Worker, compare


def exact(base: Build, new: Build) -> list[tuple[str, float, float]]:
    with Worker(base) as one, Worker(new) as other:
        before, after = one.ask("exact"), other.ask("exact")
    return [(name, before[name], after[name]) for name in before.keys() & after.keys()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("base", help="revision that nothing may be slower than")
    parser.add_argument("--new", default="HEAD", help="what is judged (%(default)s, with what is not committed yet)")
    parser.add_argument("--threshold", type=float, default=0.10, help="of time and instructions (%(default)s)")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--allow", action="append", default=[], help="figure that may get worse; repeatable")
    parser.add_argument("--no-instructions", action="store_true")
    options = parser.parse_args()
    try:
        return judge(options)
    except BrokenRun as error:
        print(f"BROKEN: {error}\nNothing is known about speed.", file=sys.stderr)
        return 2


def judge(options: argparse.Namespace) -> int:
    names = [name for name in CORE if options.only in name]
    if not names:
        raise BrokenRun(f"no workload is called {options.only!r}; there are {', '.join(CORE)}")
    say(f"building {options.base} and {options.new}")
    with frozen(built(options.base), built(options.new, changes=options.new == "HEAD")) as (base, new):
        return _judge(base, new, names, options)


def _judge(base: Build, new: Build, names: list[str], options: argparse.Namespace) -> int:
    limit = 1 + options.threshold
    worse: list[str] = []
    if base.library == new.library:
        say("both are the same build")

    rows = []
    for name, before, after in sorted(exact(base, new)):
        said = verdict(name, before, after, limit)
        if after != before:
            rows.append([name, f"{before:g}", f"{after:g}", said])
        if said == "worse" and name not in options.allow:
            worse.append(f"{name}: {before:g} → {after:g}")
    text = table(["exact", "base", "new", ""], rows) if rows else "Exact figures: all the same."

    counted: dict[str, list[str]] = {name: ["", ""] for name in names}
    if options.no_instructions or not instructions.available():
        say("instructions are not counted" + ("" if options.no_instructions else ": valgrind is not installed"))
    else:
        say("counting instructions of both")
        with ThreadPoolExecutor(2) as pool:
            before, after = pool.map(lambda build: instructions.count(build, names), (base, new))
        for name in names:
            ratio = after[name] / before[name]
            counted[name] = [f"{before[name]:,}", f"{ratio:.3f}"]
            if ratio > limit and name not in options.allow:
                worse.append(f"{name}: {ratio:.3f} times the instructions")

    found = compare(base, new, names, limit, say)
    worse += [f"{each.name}: {each.ratio:.3f} times as long" for each in found
              if each.slower(limit) and each.name not in options.allow]  # fmt: skip
    columns = ["workload", "time, new / base", "votes", "instructions of base", "new / base", ""]
    print(text)
    print(table(columns, [_row(each, counted[each.name], worse) for each in found]))
    print(f"base {base.name} {base.commit[:10]}, new {new.name} {new.commit[:10]}, threshold {options.threshold:.0%}")
    if worse:
        print("\n".join(["", "SLOWER OR LARGER:", *worse]))
    return bool(worse)


def _row(found: Comparison, counted: list[str], worse: list[str]) -> list[str]:
    votes = f"{min(found.votes):.3f} to {max(found.votes):.3f}, {len(found.votes)}"
    mark = "**worse**" if any(each.startswith(found.name + ":") for each in worse) else ""
    return [found.name, f"{found.ratio:.3f}", votes, *counted, mark]


if __name__ == "__main__":
    sys.exit(main())

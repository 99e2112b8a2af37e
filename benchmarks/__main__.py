"""``python -m benchmarks NAME [OPTION...]``: run one measurement.

``python -m benchmarks rows`` runs all measurements with a target, each in a process of its own.

A measurement is a module with a function ``measure``. Its keyword arguments are the options. It yields text and figures
with a target (:class:`~benchmarks.reach.Reached`). The figures are shown first, beside their targets.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .machine import described
from .reach import Reached, verdicts

__all__ = ["NAMES", "ROWS", "options", "page"]

#: The measurements on the page of targets that are not part of the comparison with others.
ROWS = ("growth", "hybrid", "picks", "encoding", "threads", "tail", "snapshot", "churn", "stalls", "hostile", "memory")
NAMES = (*ROWS, "streams", "herd", "fleets", "replay", "router", "routers", "service")
#: Options with which all of them run in half a minute. They show that the measurements work; the figures mean nothing.
QUICK = {
    "growth": "--rounds 3 --blocks 50000",
    "hybrid": "--rounds 3",
    "picks": "--rounds 3",
    "encoding": "--rounds 2",
    "threads": "--rounds 3",
    "tail": "--calls 1000",
    "snapshot": "--blocks 20000 --rounds 2",
    "churn": "--rounds 1 --blocks 4000 --stream 20000 --budget 1000000",
    "stalls": "--blocks 20000 --held 20000 --rounds 1",
    "hostile": "--rounds 3 --events 2 --blocks 20000",
    "memory": "--blocks 20000 --budget 1000000 --sizes 4000",
}
INTRO = "Made by `make bench-rows`, one command a section. *At least* is the target, *stretch* a more ambitious one."


def options(module: ModuleType) -> argparse.ArgumentParser:
    """A parser with an option for each argument of ``measure``, of its default's type."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module.__name__.replace('.', ' ')}",
        description=f"{module.__doc__}\n{inspect.getdoc(module.measure)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for each in inspect.signature(module.measure).parameters.values():
        many = isinstance(each.default, tuple)
        parser.add_argument(
            f"--{each.name}", default=each.default, type=type(each.default[0] if many else each.default),
            nargs="+" if many else None, metavar="X", help="(default: %(default)s)",
        )  # fmt: skip
    return parser


def page(module: ModuleType, **options: Any) -> str:
    """The figures of one measurement, and the machine that it ran on."""
    found = list(module.measure(**options))
    marks = [each for each in found if isinstance(each, Reached)]
    texts = [each for each in found if not isinstance(each, Reached)]
    facts = described("numpy", *getattr(module, "PACKAGES", ()))
    return "\n".join([*([verdicts(marks)] if marks else []), *texts, ", ".join(f"{k} {v}" for k, v in facts.items())])


def rows(out: Path | None, *, quick: bool) -> int:
    sections = [f"# {', '.join(ROWS).capitalize()}", INTRO]
    failed = []
    for name in ROWS:
        command = [sys.executable, "-m", "benchmarks", name, *(QUICK[name].split() if quick else ())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(f"\n## {name}\n\n{done.stdout}", flush=True)
        sections += [f"## {name}", f"`python -m benchmarks {name}`", done.stdout.strip()]
        failed += [name] if done.returncode else []
    if failed:
        print(f"no figures: {', '.join(failed)}", file=sys.stderr)
    elif out is not None:
        out.write_text("\n\n".join(sections) + "\n")
    return bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=("rows", *NAMES))
    parser.add_argument("--out", type=Path, help="of rows: file that the tables are written to as well")
    parser.add_argument("--quick", action="store_true", help="of rows: only see that each of them runs")
    name = parser.parse_args(sys.argv[1:2]).name
    if name == "rows":
        given = parser.parse_args()
        return rows(given.out, quick=given.quick)
    module = import_module(f"benchmarks.{name}")
    print(page(module, **vars(options(module).parse_args(sys.argv[2:]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

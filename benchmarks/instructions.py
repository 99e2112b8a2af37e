"""Instructions that a workload executes, counted by valgrind's callgrind: on one machine the same number every time.

Users feel times, but a count needs no quiet machine. It does not include cache misses, so it stands beside the times
and does not replace them. As a program inside callgrind, this module runs every workload between two calls of
``getppid``, at which callgrind writes its counts.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import kvindex

from .machine import described

__all__ = ["available", "count", "toolchain"]

#: Small enough for callgrind, which is fifty times slower, to end in a minute.
CONTENT = 2048
ROUNDS = 2


def available() -> bool:
    return shutil.which("valgrind") is not None


def toolchain() -> str:
    """Compiler, machine and packages, on which the counts depend besides the code."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout
    facts = described("numpy", "xxhash", "msgpack", "cython")
    versions = [f"{name} {facts[name]}" for name in ("Python", "numpy", "xxhash", "cython")]
    return "; ".join([compiler.partition("\n")[0], platform.machine(), *versions])


def count(names: Sequence[str]) -> dict[str, int]:
    """Instructions per round of each workload, with the kvindex package that this process imports.

    Raises RuntimeError when a workload fails.
    """
    path = [Path(kvindex.__file__).parents[1], Path(__file__).parents[1]]
    # Without PYTHONSAFEPATH, the checkout's own package would come first where it is the current directory.
    env = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory(prefix="kvindex-callgrind-") as place:
        out = Path(place) / "out"
        done = subprocess.run(
            ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-before=getppid",
             sys.executable, "-m", "benchmarks.instructions", *names],
            cwd=place, env=os.environ | env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"a workload fails under callgrind:\n{done.stderr[-4000:]}")
        # Part n has the instructions before the n-th call: parts 2, 4, ... are the workloads, between two calls.
        totals = []
        for part in range(2, 2 * len(names) + 1, 2):
            text = Path(f"{out}.{part}").read_text(errors="replace")
            found = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if found is None:
                raise RuntimeError(f"callgrind wrote no total for part {part}")
            totals.append(int(found[1]) // ROUNDS)
    return dict(zip(names, totals, strict=True))


def _run(name: str) -> None:
    # A function of its own, so the memory of one workload is not freed in the count of the next.
    from .workloads import workload

    made = workload(name, content=CONTENT)
    for number in range(2):
        made.work(made.items(number))
        made.undo()
    items = [made.items(number) for number in range(2, 2 + ROUNDS)]
    os.getppid()
    for each in items:
        made.work(each)
    os.getppid()
    made.undo()


if __name__ == "__main__":
    gc.disable()
    for name in sys.argv[1:]:
        _run(name)

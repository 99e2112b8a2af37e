"""``python -m benchmarks.rows``: every promised figure that the comparison with others leaves open."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

__all__ = ["ROWS"]

#: Each is a command of its own as well: ``python -m benchmarks.growth``.
ROWS = ("growth", "hybrid", "picks", "encoding", "threads", "tail", "snapshot", "churn", "stalls", "hostile", "memory")

INTRO = "Made by `make bench-rows`, one command a section. *At least* is the target, *stretch* a more ambitious one."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--out", type=Path, help="file that the tables are written to as well")
    options = parser.parse_args()
    page = [
        "# Growth, hybrid pods, picks, encoding, threads, tail, snapshot, churn, stalls, hostile pods, memory",
        INTRO,
    ]
    failed = []
    for name in ROWS:
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        page += [f"## {name}", f"`python -m benchmarks.{name}`", done.stdout.strip()]
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"no figures: {', '.join(failed)}", file=sys.stderr)
    elif options.out is not None:
        options.out.write_text("\n\n".join(page) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

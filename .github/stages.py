"""Run the make steps of a workflow here, in its order: ``python .github/stages.py WORKFLOW.yml``.

The workflow is the list of stages, so the two cannot differ. Steps that are not make are the runner's own (checkout,
artifacts) and are left out, and so are steps under a condition, which are said. Stops at the first that fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import yaml


def stages(workflow: Path) -> list[tuple[str, bool]]:
    """(command, whether a condition stands before it), jobs in the order of their needs, which is that of the file."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    return [(step["run"], "if" in step) for step in steps if step.get("run", "").startswith("make ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workflow", type=Path)
    rows = []
    failed = False
    for command, conditional in stages(parser.parse_args().workflow):
        if conditional:
            rows.append((command, "left out: it has a condition", 0.0))
            continue
        print(f"\n== {command}", flush=True)
        start = time.monotonic()
        failed = subprocess.run(command, shell=True, check=False).returncode != 0
        rows.append((command, "failed" if failed else "passed", time.monotonic() - start))
        if failed:
            break
    print()
    for command, result, seconds in rows:
        print(f"{seconds:7.1f} s  {result:8}  {command}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

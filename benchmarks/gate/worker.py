"""A process that runs workloads of one build when it is told to: one JSON line in, one JSON line out.

``["open", NAME]`` makes the workload and runs it twice; ``["run", FIRST, ROUNDS]`` answers with the nanoseconds of
processor time that the work and its floor took; ``["exact"]`` answers with the figures that repeat exactly.
Processor time of the thread, not time on the wall: when somebody else has the core, the clock stands still.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvindex

from ..exact import exact
from ..workloads import Workload, run, workload


def answer(told: list[Any], opened: list[Workload]) -> Any:
    if told[0] == "open":
        opened[:] = [workload(told[1])]
        gc.collect()
        gc.disable()
        run(opened[0], 0, 2)
        return True
    if told[0] == "run":
        return run(opened[0], told[1], told[2])
    if told[0] == "exact":
        return exact()
    if told[0] == "where":
        return str(Path(kvindex.__file__).parents[1])
    raise ValueError(f"no such command: {told}")


def main() -> None:
    opened: list[Workload] = []
    say: Callable[[str], object] = sys.stdout.write
    for line in sys.stdin:
        try:
            reply = {"is": answer(json.loads(line), opened)}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}"}
        say(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

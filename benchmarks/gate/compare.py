"""Two builds timed against each other, in pairs of processes that take turns.

What would be mistaken for a difference between builds, and what is done about it. The machine is slower now than a
moment ago: both builds run the same round one right after the other, in turning order, and only their ratio counts.
Somebody else has the core: processor time is measured. A process was lucky with where its memory lies: each pair of
processes has one vote, the median of its ratios, and there are more pairs as long as the votes do not agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

from .builds import BrokenRun, Build

__all__ = ["Comparison", "Worker", "compare"]

#: A pair's vote is the median over so many rounds.
SHOTS = 40
#: Rounds of a workload in one go, between two looks at the clock.
TOGETHER = 4
FEWEST, MOST = 5, 15


class Worker:
    """One build in one process. Use as a context manager: the process ends with it."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gate.worker"],
            cwd=build.benchmarks, env=build.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        where = self.ask("where")
        if where != str(build.library):
            raise BrokenRun(f"{build.name} was to be imported from {build.library}, and came from {where}")

    def ask(self, *command: Any) -> Any:
        """Raises :class:`BrokenRun` when the command fails or the process is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise BrokenRun(f"the process of {self.build.name} is gone at {command}: exit code {self.process.wait()}")
        reply = json.loads(line)
        if "failed" in reply:
            raise BrokenRun(f"{self.build.name} fails at {command}: {reply['failed']}")
        return reply["is"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Comparison(NamedTuple):
    """How many times as long the new build takes, by each pair's vote."""

    name: str
    votes: list[float]

    @property
    def ratio(self) -> float:
        return median(self.votes)

    def slower(self, threshold: float) -> bool | None:
        """Whether it is beyond the threshold; None while the votes do not say."""
        over = sum(vote > threshold for vote in self.votes) / len(self.votes)
        if len(self.votes) >= MOST:
            return over > 0.5
        return None if 0.25 < over < 0.75 else over >= 0.75


def compare(
    base: Build, new: Build, names: Sequence[str], threshold: float, say: Callable[[str], None]
) -> list[Comparison]:
    """Pairs of processes until every workload is decided; those that are not beyond the threshold leave early."""
    found = {name: Comparison(name, []) for name in names}
    open_ = list(names)
    for pair in range(MOST):
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(build)) for build in ((base, new) if pair % 2 else (new, base))]
            for name in open_:
                vote = _vote(workers, name, pair)
                found[name].votes.append(vote if workers[0].build is base else 1 / vote)
        if pair + 1 >= FEWEST:
            open_ = [name for name in open_ if found[name].slower(threshold) is None]
        say(f"pair {pair + 1}: {len(open_)} of {len(names)} workloads to go")
        if not open_:
            break
    return list(found.values())


def _vote(workers: Sequence[Worker], name: str, pair: int) -> float:
    """The median over rounds of the second worker's time over the first's."""
    for worker in workers:
        worker.ask("open", name)
    ratios = []
    for shot in range(SHOTS):
        first = 2 + (pair * SHOTS + shot) * TOGETHER
        turn = (0, 1) if shot % 2 else (1, 0)
        spent = {which: workers[which].ask("run", first, TOGETHER)[0] for which in turn}
        ratios.append(spent[1] / spent[0])
    return median(ratios)

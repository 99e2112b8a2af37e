"""The targets of kvindex's figures, and the mark of a measurement against each: reached, stretch or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from .interleave import Ratio
from .report import amount, table

__all__ = ["GOALS", "Goal", "Mark", "Reached", "mark", "verdicts"]

Mark: TypeAlias = Literal["stretch", "reached", "not"]


class Goal(NamedTuple):
    """A target: ``least`` has to be met, ``stretch`` is a more ambitious one. Where ``more``, larger is better."""

    least: float
    stretch: float | None
    more: bool


def _times(least: float, stretch: float | None = None) -> Goal:
    return Goal(least, stretch, more=True)


def _at_most(least: float, stretch: float | None = None) -> Goal:
    return Goal(least, stretch, more=False)


#: The goals, by the name of the figure. Depths are blocks of 16 tokens.
GOALS: dict[str, Goal] = {
    "match numpy 8": _times(6, 10),
    "match numpy 64": _times(12, 20),
    "match numpy 512": _times(15, 30),
    "match numpy 2048": _times(15, 30),
    "match floor 2048": _at_most(5),
    "match list 8": _times(5, 7),
    "match list 64": _times(5, 7),
    "match list 512": _times(5, 7),
    "match list 2048": _times(5, 7),
    "match hashes 8": _times(6),
    "match hashes 64": _times(8),
    "match hashes 512": _times(15),
    "match hashes 2048": _times(20, 40),
    "match hashes us": _at_most(5),
    "ingest 256": _at_most(0.40, 0.20),
    "ingest 64": _at_most(0.35, 0.175),
    "ingest 1": _at_most(0.20, 0.10),
    "bytes 1 pod": _at_most(56, 40),
    "bytes 8 pods equal": _at_most(64, 44),
    "bytes 8 pods own": _at_most(240, 160),
    "growth blocks": _at_most(2, 1.3),
    "growth pods": _at_most(2, 1.3),
    "hybrid us": _at_most(40, 15),
    "picks 64": _at_most(2, 1.3),
    "picks 256": _at_most(3, 1.3),
    "conversation": _times(12, 20),
    "last turn ms": _at_most(3, 1.5),
    "encode pause ms": _at_most(2),
    "two readers": _times(1.7, 1.9),
    "tail": _at_most(20, 10),
    "snapshot seconds": _at_most(1, 0.2),
    "churn": _at_most(1.05),
    "wait ms": _at_most(2, 0.5),
    "pause ms": _at_most(10, 2),
    "long event": _at_most(1.5, 1),
    "hostile": _at_most(1.1, 1),
    "bytes 1 block": _at_most(150, 96),
    "stays": _at_most(5, 1),
    "peak": _at_most(1),
    "query list": _times(2, 5),
    "query tail": _at_most(10, 5),
    "unix us": _at_most(100, 40),
    "page core": _at_most(5, 2),
    "replica s": _at_most(2, 0.5),
}


def mark(goal: str, value: float) -> Mark:
    """The mark of ``value`` against the goal of that name."""
    least, stretch, more = GOALS[goal]
    if stretch is not None and (value >= stretch if more else value <= stretch):
        return "stretch"
    return "reached" if (value >= least if more else value <= least) else "not"


class Reached(NamedTuple):
    """One figure with a target: its name, the case that was measured, the goal, and the value."""

    what: str
    where: str
    goal: str
    value: float
    spread: Ratio | None = None

    @property
    def mark(self) -> Mark:
        """The mark of the worse of two values: the median of ratios and the ratio of the best rounds."""
        values = [self.value] if self.spread is None else [self.value, self.spread.best]
        return mark(self.goal, min(values) if GOALS[self.goal].more else max(values))


def verdicts(rows: Iterable[Reached]) -> str:
    """All figures as a Markdown table."""
    columns = ["", "at", "measured", "quartiles", "best rounds", "at least", "stretch", "result"]
    return table(columns, [_cells(row) for row in rows])


def _cells(row: Reached) -> list[str]:
    least, stretch, more = GOALS[row.goal]
    sign = "≥" if more else "≤"
    spread = f"{amount(row.spread.low)} to {amount(row.spread.high)}" if row.spread else ""
    best = amount(row.spread.best) if row.spread else ""
    wanted = f"{sign} {stretch:g}" if stretch is not None else ""
    return [row.what, row.where, amount(row.value), spread, best, f"{sign} {least:g}", wanted, f"**{row.mark}**"]

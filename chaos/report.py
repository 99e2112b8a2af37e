"""The reports of a run: a table of all experiments, and a timeline of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .judge import Cycle, Witness
from .logs import STATES

__all__ = ["plot", "say", "table"]

JUDGEMENTS = ("safety", "honesty", "recovery", "resources", "others")
_COLORS = {"exact": "#2a9d53", "degraded": "#e0a030", "stale": "#b0b0b0", "unknown": "#ffffff"}
_SHORT = {"passed": "[green]ok[/]", "failed": "[red]FAILED[/]", "skipped": "[yellow]skipped[/]"}


def table(console: Console, results: Sequence[Any]) -> None:
    """Print one row for each experiment, and below the table the reasons for failures and skips."""
    made = Table(title="chaos", title_justify="left")
    for column in ("experiment", "", *JUDGEMENTS, "seconds"):
        made.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=column != "experiment")
    for result in results:
        cells = []
        for name in JUDGEMENTS:
            judgement = None if result.judgements is None else getattr(result.judgements, name)
            color = "" if judgement is None or judgement.passed else "[red]"
            cells.append("-" if judgement is None else f"{color}{judgement.figure}")
        made.add_row(result.experiment.name, _SHORT[result.verdict], *cells, f"{result.seconds:.0f}")
    console.print(made)
    for result in results:
        say(console, result)


def say(console: Console, result: Any) -> None:
    """Print the reason why an experiment failed or was skipped; nothing for one that passed."""
    name = result.experiment.name
    if result.skipped:
        console.print(f"{name}: skipped: {result.skipped}", markup=False, highlight=False, soft_wrap=True)
    if result.failed:
        console.print(result.failed, style="red", markup=False, highlight=False)
    for judge, judgement in [] if result.judgements is None else vars(result.judgements).items():
        for problem in judgement.problems:
            console.print(f"{name}: {judge}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)


def plot(path: Path, title: str, witness: Witness, cycles: Sequence[Cycle], zero: float) -> None:
    """Draw a timeline: the state of each pod's answers, their missing batches, and the time of queries.

    Faults are shaded.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = len(witness.pods)
    figure, axes = pyplot.subplots(
        rows + 1, 1, sharex=True, figsize=(12, 1.3 * rows + 2.2), layout="constrained",
        gridspec_kw={"height_ratios": [1] * rows + [1.4]},
    )  # fmt: skip
    for axis, pod in zip(axes, witness.pods, strict=False):
        samples = witness.samples[pod]
        at, states = samples.at - zero, samples.state
        starts = np.flatnonzero(np.diff(states, prepend=255))
        for start, end in zip(starts, [*starts[1:], len(states) - 1], strict=True):
            axis.axvspan(at[start], at[end], color=_COLORS[STATES[states[start]]], alpha=0.55, linewidth=0)
        axis.plot(at, samples.behind, color="black", linewidth=0.8)
        axis.plot(at[samples.wrong != 0], np.zeros((samples.wrong != 0).sum()), "r|", markersize=14)
        axis.set_ylim(0, max(4, samples.behind.max(initial=0)) * 1.05)
        axis.set_ylabel(f"{pod}\nbehind", fontsize=8)
    named = [Patch(color=color, alpha=0.55, label=state) for state, color in _COLORS.items()]
    axes[0].legend(handles=named, loc="upper right", ncols=len(named), fontsize=7)
    axes[-1].plot(witness.questions["at"] - zero, witness.questions["seconds"] * 1e6, ",", color="#3060a0")
    axes[-1].set_xlim(left=0)
    axes[-1].set_yscale("log")
    axes[-1].set_ylabel("question, us", fontsize=8)
    axes[-1].set_xlabel("seconds")
    for cycle in cycles:
        for axis, pod in zip(axes, [*witness.pods, ""], strict=True):
            hit = pod in cycle.pods or not cycle.pods
            axis.axvspan(cycle.injected - zero, cycle.healed - zero, color="red", alpha=0.18 if hit else 0.06, lw=0)
            axis.axvline(cycle.healed - zero, color="red", linewidth=0.6)
    figure.suptitle(f"{title}: how each pod's answers were called, and how many batches they were behind", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)

"""The run of an experiment: start a scene, measure it, inject the fault again and again, and judge the logs."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.fleet import ROOT, at_rest, compare, own_prompts, until
from rich.console import Console

from kvindex.sync.policy import StreamPolicy

from .experiment import Experiment, ExperimentError, load
from .faults import Fault, fault_of
from .hosts import enter, inside, refuse
from .judge import RECOVER, Cycle, Judgements, Witness, judge, surplus
from .logs import read, truth_dtype
from .metronome import Metronome
from .report import plot, say, table
from .scene import Scene

__all__ = ["main"]

#: Seconds in which a new scene warms up, and seconds of the measurement before the first fault.
WARM = 2.0
BASELINE = 3.0
#: The experiments of ``--quick``, which have to pass on every machine.
QUICK = ("random-kill", "publisher-stopped")
#: Seconds for which all pods have to be exact and up to date until an experiment counts as over.
STEADY = 1.0


@dataclass
class Result:
    """The result of one experiment."""

    experiment: Experiment
    skipped: str | None = None
    failed: str | None = None
    judgements: Judgements | None = None
    seconds: float = 0.0
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return "passed" if self.judgements is not None and self.judgements.passed else "failed"

    def as_dict(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.name,
            "file": self.experiment.file,
            "verdict": self.verdict,
            "skipped": self.skipped,
            "failed": self.failed,
            "seconds": round(self.seconds, 1),
            "repetitions": len(self.cycles),
            "judgements": None
            if self.judgements is None
            else {name: judgement._asdict() for name, judgement in vars(self.judgements).items()},
        }


def run(experiment: Experiment, reports: Path, *, repeats: int, seed: int) -> Result:
    """Run one experiment from its start to its report. No process or file of it is left behind, except the report."""
    started = time.monotonic()
    result = Result(experiment)
    fault = fault_of(experiment)
    if why := fault.missing():
        result.skipped = why
        return result
    where = Path(tempfile.mkdtemp(prefix="chaos-", dir="/run" if inside() else None))
    try:
        _run(fault, where, reports, result, repeats, seed)
    except Exception:
        result.failed = traceback.format_exc()
    finally:
        shutil.rmtree(where)
        result.seconds = time.monotonic() - started
    return result


def _run(fault: Fault, where: Path, reports: Path, result: Result, repeats: int, seed: int) -> None:
    env, index_env = fault.pod_env(where), fault.index_env(where)
    with (
        Scene(where, proxied=fault.proxied, env=env, index_env=index_env, seed=seed) as scene,
        Metronome(where / "metronome.bin"),
    ):
        scene.rates(fault.rate)
        _settle(scene, 30.0)
        time.sleep(WARM if repeats > 1 else WARM / 2)
        start = time.monotonic()
        time.sleep(BASELINE if repeats > 1 else BASELINE / 2)
        baseline = start, time.monotonic()
        before = scene.index.ask("resources")
        for number in range(1, repeats + 1):
            fault.choose(scene)
            traits = {name: getattr(fault, name) for name in ("pods", "cuts", "lies", "slow", "anew", "notice")}
            cycle = Cycle(**traits)
            result.cycles.append(cycle)
            lost = _connections_lost(scene)
            scene.index.ask("others", pods=[name for name in scene.pods if name not in fault.pods])
            with closing(fault.steps(fault, scene)) as steps:
                cycle.injected = time.monotonic()
                time.sleep(next(steps))
                cycle.healing = time.monotonic()
                more = next(steps, None)
                cycle.healed = time.monotonic()
                _settle(scene, RECOVER + 2.0)
                cycle.ended = time.monotonic()
                if more is not None:
                    next(steps, None)
            cycle.resources = _resources(scene, before)
            if number < repeats and _connections_lost(scene) != lost:
                # The manager reconnects later and later after connections that do not last. Wait, so every repetition
                # starts with the shortest delay.
                time.sleep(StreamPolicy().settled)
        differences = _rest(scene)
        counters = {name: status["workers"][0]["counters"] for name, status in scene.index.status().items()}
        problems = fault.problems + _errors(where / "index.log")
    witness = Witness(where, list(scene.pods))
    result.judgements = judge(
        witness, result.cycles, baseline=baseline, resources=before, counters=counters, differences=differences,
        problems=problems,
    )  # fmt: skip
    plot(reports / f"{result.experiment.name}.png", result.experiment.name, witness, result.cycles, baseline[0])


def _connections_lost(scene: Scene) -> int:
    return sum(
        worker["counters"].get("disconnects", 0)
        for status in scene.index.status().values()
        for worker in status["workers"].values()
    )


def _settle(scene: Scene, patience: float) -> None:
    """Wait until every pod is exact and up to date, and stays so for a while.

    This only decides when the run goes on. The judgements use the logs.
    """
    since = time.monotonic()

    def steady() -> bool:
        nonlocal since
        published = {name: read(scene.where / f"truth-{name}.bin", truth_dtype)[-1] for name in scene.pods}
        status = scene.index.status()
        if not all(
            status[name]["state"] == "exact" and (status[name]["last_seq"] or 0) + 20 > int(last["seq"])
            for name, last in published.items()
        ):
            since = time.monotonic()
        return time.monotonic() - since > STEADY

    with suppress(AssertionError):
        until(steady, seconds=patience, pause=0.1)


def _resources(scene: Scene, before: Mapping[str, Any]) -> dict[str, Any]:
    """The resources of the index, after a wait for replays that still run with a socket of their own."""

    def few() -> bool:
        return not surplus(before, scene.index.ask("resources"), len(scene.pods))

    with suppress(AssertionError):
        until(few, seconds=5.0, pause=0.05)
    return scene.index.ask("resources")


def _rest(scene: Scene) -> int | None:
    """Stop all requests, and count the differences of all answers; None when the fleet does not come to rest."""
    scene.rates(0.0)
    pods = list(scene.pods.values())
    try:
        at_rest(scene.index, pods, RECOVER)
    except AssertionError:
        return None
    scene.index.ask("check")
    return len(compare(scene.index, pods, own_prompts(pods[0].config)).differences)


def _errors(log: Path) -> list[str]:
    """The errors in the log of the index's process, which mean unexpected failures."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [f"the index logged {line!r:.300}" for line in lines if " ERROR " in line][:5]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Apply each fault of Chaos Mesh experiments to a local fleet, hold it, heal it, and judge what the "
        "index claimed meanwhile and how it recovered. What needs rights or tools that are missing is skipped, and "
        "says so. Results: a table, chaos/reports/results.json, and a timeline per experiment beside it.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="experiments (chaos/experiments/*.yaml)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only the experiment of this name")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="per experiment (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"once, without namespaces: {', '.join(QUICK)}")
    parser.add_argument("--seed", type=int, default=0, help="of who is hit (%(default)s)")
    parser.add_argument("--reports", type=Path, default=ROOT / "chaos" / "reports", metavar="DIR",
                        help="for results and timelines (chaos/reports)")  # fmt: skip
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 150  # the width of the table, in a log
    try:
        experiments = [experiment for path in args.files for experiment in load(path)]
        for experiment in experiments:
            fault_of(experiment)
    except (ExperimentError, OSError) as error:
        console.print(f"chaos: {error}", style="red", markup=False, highlight=False)
        return 2
    if args.only:
        if strange := set(args.only) - {experiment.name for experiment in experiments}:
            console.print(f"chaos: no experiment {sorted(strange)} in these files", style="red", markup=False)
            return 2
        experiments = [experiment for experiment in experiments if experiment.name in args.only]
    if args.quick:
        args.repeats = 1
        experiments = [experiment for experiment in experiments if experiment.name in QUICK]
        refuse("switched off by --quick")
    enter("chaos", argv)
    args.reports.mkdir(parents=True, exist_ok=True)
    results = []
    for experiment in experiments:
        console.print(f"{experiment.name}: {experiment.hold:g} s, {args.repeats} times", style="dim", highlight=False)
        result = run(experiment, args.reports, repeats=args.repeats, seed=args.seed)
        results.append(result)
        console.print(f"{experiment.name}: {result.verdict}", highlight=False)
        say(console, result)
    (args.reports / "results.json").write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")
    table(console, results)
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("passed", "failed", "skipped")}
    console.print(f"chaos: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}", highlight=False)
    return 1 if counts["failed"] else 0

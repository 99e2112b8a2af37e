"""Streams by seed: publishers that lie, fall silent, restart and lose tails, behind a channel with every kind of fault.

The histories come from the state machines in tests/property, drawn by Hypothesis. Nothing there has a clock, a thread
or a socket, so a seed always gives the same histories. After every step, an answer that is called exact must equal the
batches that its engine has published.

    python tests/stream_world.py --seconds 60            # new seeds until the time is over
    python tests/stream_world.py --seed 17               # one of them again; a failure is shrunk
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "property")]

import test_sync_engine as engines  # noqa: E402
import test_sync_machine as streams  # noqa: E402

#: The first three have lists of payloads as their index: a faulty channel, a router that restarts and continues, and
#: replays of another process. The last has the real index behind a simulated engine whose own answers are the truth.
KINDS: dict[str, type[RuleBasedStateMachine]] = {
    "faulty": streams.FaultyChannel,
    "restarting": streams.Restarting,
    "lying": streams.Lying,
    "engine": engines.FaultyStream,
}


class Tally(Counter[str]):
    """Counts of histories, steps, inputs of the stream machine, judged answers and answers called exact."""


def counted(kind: type[RuleBasedStateMachine], tally: Tally) -> type[RuleBasedStateMachine]:
    class Counted(kind):  # type: ignore[misc, valid-type]
        def check_invariants(self, *given: Any, **options: Any) -> None:
            super().check_invariants(*given, **options)
            tally["steps"] += 1
            if (world := getattr(self, "world", None)) is not None:
                tally["judged"] += 1
                tally["exact"] += world.state == "exact"

        def teardown(self) -> None:
            super().teardown()
            tally["histories"] += 1
            if (world := getattr(self, "world", None)) is not None:
                tally["inputs"] += world.inputs
                tally.update({f"incident {each.kind}": 1 for each in world.incidents})

    # The name is printed with a history that fails.
    Counted.__name__ = Counted.__qualname__ = kind.__name__
    return Counted


def one(number: int, histories: int = 25, *, kinds: Any = KINDS, shrinks: bool = False) -> Tally:
    """Run the histories of one seed. Raises AssertionError at the first failure."""
    tally = Tally()
    phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
    for name in kinds:
        run_state_machine_as_test(
            seed(number)(counted(KINDS[name], tally)),
            settings=settings(
                max_examples=histories, stateful_step_count=60, phases=phases, database=None, deadline=None,
                derandomize=False, report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--first", type=int, default=1)
    args = parser.parse_args()
    if args.seed is not None:
        print(dict(one(args.seed, shrinks=True)))
        return 0
    began, number = time.monotonic(), args.first
    total, failed = Tally(), 0
    while number == args.first or time.monotonic() < began + args.seconds:
        try:
            total += one(number)
        except Exception as wrong:
            failed += 1
            print(f"seed {number}: {wrong!r} (again: python tests/stream_world.py --seed {number})", flush=True)
        number += 1
    took = time.monotonic() - began
    happened = {name.removeprefix("incident "): count for name, count in total.items() if name.startswith("incident")}
    print(
        f"{number - args.first:,} seeds, {total['histories']:,} histories, {total['steps']:,} steps and"
        f" {total['inputs']:,} inputs of streams in {took:.0f} s ({total['inputs'] / took * 60:,.0f} a minute);"
        f" {total['judged']:,} answers, {total['exact']:,} called exact, {failed} seeds failed; {happened}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

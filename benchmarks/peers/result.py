"""The figures of one run of the comparison, and the targets that they reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..interleave import Timings
from ..reach import Reached

__all__ = ["Result"]


#: By question: the label that is compared with Dynamo's, the name of the figure, and its goal.
FASTER = {
    "tokens": (("kvindex", "match_prefix, numpy", "numpy"), ("kvindex, list", "match_prefix, list", "list")),
    "hashes": (("kvindex", "match_hashes", "hashes"),),
}


@dataclass
class Result:
    machine: dict[str, str]
    rounds: int
    #: (question, depth in blocks, pods)
    matches: dict[tuple[str, int, int], Timings] = field(default_factory=dict)
    #: (new or known content, blocks an event)
    ingest: dict[tuple[str, int], Timings] = field(default_factory=dict)
    #: (contender, case); a string is the reason for a missing figure
    memory: dict[tuple[str, str], dict[str, float] | str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def reached(self) -> Iterator[Reached]:
        """Every figure of this run that has a target."""

        def ratio(what: str, where: str, goal: str, timings: Timings, over: str, under: str) -> Reached:
            found = timings.ratio(over, under)
            return Reached(what, where, goal, found.median, found)

        for (question, depth, pods), timings in self.matches.items():
            # The targets are for 8 and 64 pods; 256 pods are only in the tables.
            if pods > 64 or question == "answer":
                continue
            where = f"{depth} blocks, {pods} pods"
            if "Dynamo, list" in timings:
                for label, what, goal in FASTER[question]:
                    what = f"{what}: times faster than Dynamo"
                    yield ratio(what, where, f"match {goal} {depth}", timings, "Dynamo, list", label)
            if question == "tokens" and depth == 2048:
                what = "match_prefix, numpy: times one bulk hash"
                yield ratio(what, where, "match floor 2048", timings, "kvindex", "floor")
            if question == "hashes" and (depth, pods) == (2048, 64):
                yield Reached("match_hashes: microseconds", where, "match hashes us", timings.best("kvindex"))
        for (case, each), timings in self.ingest.items():
            if case == "new":
                where = f"{each} blocks an event"
                yield ratio("ingest: of unpackb's time", where, f"ingest {each}", timings, "kvindex", "msgpack")
        for (name, case), figures in self.memory.items():
            if name == "kvindex" and not isinstance(figures, str):
                yield Reached("resident bytes per block", case, f"bytes {case}", figures["mean"])

"""Memory, exact counts and the time of an import."""

from __future__ import annotations

from kvindex import PrefixIndex

from .. import instructions
from ..data import BLOCK, chain, fill
from ..exact import DEPTHS, KINDS, compared, exact
from ..workloads import CORE

CASES = ("1 pod", "8 pods equal", "8 pods own")


class Exact:
    """The same on every run of one build, so a change of the last digit means something."""

    params = (list(CASES),)
    param_names = ("case",)

    def setup_cache(self) -> dict[str, float]:
        return exact()

    def track_bytes_per_block(self, figures: dict[str, float], case: str) -> float:
        return figures[f"bytes per block, {case}"]

    def track_sets(self, figures: dict[str, float], case: str) -> float:
        return figures[f"sets, {case}"]

    def track_chains(self, figures: dict[str, float], case: str) -> float:
        return figures[f"chains, {case}"]

    def track_probes(self, figures: dict[str, float], case: str) -> float:
        """Slots of the tables that are looked at to find a name or the beginning of a chain."""
        return figures[f"probes, {case}"]

    def track_bytes_of_an_unused_index(self, figures: dict[str, float], _case: str) -> float:
        return figures["bytes of an unused index"]

    def track_bytes_when_all_blocks_are_gone(self, figures: dict[str, float], case: str) -> float:
        return figures[f"bytes when all blocks are gone, {case}"]


class Compared:
    """Blocks compared with what is stored, a match."""

    params = (list(KINDS), list(DEPTHS))
    param_names = ("kind", "depth")

    def setup_cache(self) -> dict[str, float]:
        return compared()

    def track_blocks_compared(self, figures: dict[str, float], kind: str, depth: int) -> float:
        return figures[f"blocks compared, {kind} {depth}"]


class Instructions:
    """Per round of a workload, counted by callgrind; not a number where valgrind is missing."""

    params = (list(CORE),)
    param_names = ("workload",)
    timeout = 900

    def setup_cache(self) -> dict[str, float]:
        if not instructions.available():
            return dict.fromkeys(CORE, float("nan"))
        return {**instructions.count(list(CORE))}

    setup_cache.timeout = 900  # type: ignore[attr-defined]

    def track_instructions(self, figures: dict[str, float], workload: str) -> float:
        return figures[workload]


class Memory:
    """The whole process with 262,144 blocks for 8 pods in it."""

    def peakmem_stored(self) -> None:
        index = PrefixIndex(block_size=BLOCK)
        for number in range(128):
            fill(index, [chain(41, number, 2048)], [f"pod-{pod}" for pod in range(8)])
        assert index.stats()["blocks"] == 128 * 2048


class Import:
    """In a new process."""

    def timeraw_import(self) -> str:
        return "import kvindex"

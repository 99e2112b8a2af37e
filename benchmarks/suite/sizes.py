"""Memory, exact counts and the time of an import."""

from __future__ import annotations

from kvindex import PrefixIndex

from .. import instructions
from ..data import BLOCK, Chain, chain, chains, fill, own, payloads
from ..workloads import CORE, KINDS, match


class Exact:
    """Figures that are the same on every run of one build, so a change of the last digit is significant.

    Only the number of slots that a look-up reads varies a little, because it depends on the secret of a process.
    """

    #: The number of pods, and whether they agree on hashes.
    cases = {"1 pod": (1, True), "8 pods equal": (8, True), "8 pods own": (8, False)}  # noqa: RUF012
    params = (list(cases),)
    param_names = ("case",)

    def setup_cache(self) -> dict[tuple[str, str], float]:
        contents = chains(30, 32, 2048)
        blocks = sum(map(len, contents))
        found: dict[tuple[str, str], float] = {}
        for case, (pods, agree) in self.cases.items():
            index = PrefixIndex(block_size=BLOCK)
            found["unused", case] = index.stats()["bytes"]
            names = [f"pod-{number}" for number in range(pods)]
            fill(index, contents, names, agree=agree)
            stats = index.stats()
            assert stats["blocks"] == blocks, stats
            found["bytes", case] = stats["bytes"] / blocks
            found["sets", case], found["chains", case] = stats["sets"], stats["chains"]
            found["probes", case] = index._probes()
            for number, name in enumerate(names):
                back = contents if agree else [Chain(each.tokens, own(each.hashes, number)) for each in contents]
                for payload in payloads(back, 256, back=True):
                    index.ingest(name, payload)
            stats = index.stats()
            assert stats["blocks"] == 0, stats
            found["gone", case] = stats["bytes"]
        return found

    def track_bytes_per_block(self, found: dict[tuple[str, str], float], case: str) -> float:
        return found["bytes", case]

    def track_sets(self, found: dict[tuple[str, str], float], case: str) -> float:
        return found["sets", case]

    def track_chains(self, found: dict[tuple[str, str], float], case: str) -> float:
        return found["chains", case]

    def track_probes(self, found: dict[tuple[str, str], float], case: str) -> float:
        """Slots of the tables that are looked at to find a name or the beginning of a chain."""
        return found["probes", case]

    def track_bytes_of_an_unused_index(self, found: dict[tuple[str, str], float], case: str) -> float:
        return found["unused", case]

    def track_bytes_when_all_blocks_are_gone(self, found: dict[tuple[str, str], float], case: str) -> float:
        return found["gone", case]


class Compared:
    """Blocks that a match compares with the stored content, on average, for every kind of hit."""

    params = (list(KINDS), [64, 2048])
    param_names = ("kind", "depth")

    def track_blocks_compared(self, kind: str, depth: int) -> float:
        made = match(kind, depth, 8, content=32768)
        index = made.call.__self__  # type: ignore[attr-defined]
        found = [index._compared(index.match_prefix(tokens)) for tokens in made.items(0)]
        return sum(found) / len(found)


class Instructions:
    """Instructions per round of a workload, counted by callgrind; NaN where valgrind is missing."""

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
    """Peak memory of the whole process, with 262,144 blocks of 8 pods."""

    def peakmem_stored(self) -> None:
        index = PrefixIndex(block_size=BLOCK)
        for number in range(128):
            fill(index, [chain(41, number, 2048)], [f"pod-{pod}" for pod in range(8)])
        assert index.stats()["blocks"] == 128 * 2048


class Import:
    """Time of ``import kvindex`` in a new process."""

    def timeraw_import(self) -> str:
        return "import kvindex"

"""A saved and loaded index equals the original, for any history before and any events after.

The slow model continues without a restart, except for the parts that a snapshot leaves out on purpose: speculative
entries, and the knowledge of later batches in the streams.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, draw_setup, draw_step, even, same

from kvindex import PrefixIndex

# The fill of the tables is not saved. Chains are joined when a speculative entry ends, but not when it is left out.
OWN = {"bytes"}
GUESSED = {"bytes", "guesses", "chains"}


class Restarted(World):
    """A world whose index is replaced by one that was read back from a file."""

    def restart(self, folder: Path) -> None:
        old, path, again = self.index, folder / "snapshot", folder / "again"
        # Speculative entries first: blocks that only they hold end with them, and the figures are those of the rest.
        self.model.expire(math.inf)
        old.save(path)
        assert sorted(p.name for p in folder.iterdir() if p != again) == ["snapshot"]
        own = GUESSED if old.stats()["guesses"] else OWN
        old._expire(math.inf)
        self.index = PrefixIndex.load(path)
        self.index._check()
        self.index.save(again)
        assert again.read_bytes() == path.read_bytes(), "an index that was loaded is saved as it was"
        before, after = old.stats(), self.index.stats()
        for figures in (before, after):
            for name in own:
                del figures[name]
        same("figures", after, before)
        for name, pod in self.model.pods.items():
            pod.heard = "cut off"
            figures, told = self.index.worker_stats(name), old.worker_stats(name)
            same("ranks", figures.keys(), told.keys())
            for rank, worker in figures.items():
                same("state after a restart", worker["state"], "stale")
                self.index.mark_worker(name, rank, pod.told.get(rank, "exact"))
                pod.heard = "yes"
            same("workers", self.index.worker_stats(name), told)
        self.compare()

    def restore(self, other: Restarted) -> None:
        """Restore the snapshot in another world's index, replacing all of its content."""
        self.model.expire(math.inf)
        self.index._expire(math.inf)
        data, index = self.index.dumps(), other.index
        asked = [index.match_prefix(other.tokens(even(path)), model=model) for _, path, model in other.asked]
        said = [{pod: list(match[pod].media) for pod in match} for match in asked[::2]]
        index._restore(data, "it")
        index._check()
        same("pods", index.pods(), dict.fromkeys(sorted(self.model.pods), "stale"))
        same("saved again", len(index.dumps()), len(data))
        for match, media in zip(asked[::2], said, strict=True):
            same("media of an answer from before", {pod: list(match[pod].media) for pod in match}, media)
        # Answers that were not read before have lost the names of removed media, but have no wrong names.
        for match in asked[1::2]:
            assert {None, *(name for pod in match for name in match[pod].media)} <= {None, "GPU", "CPU", "Tape"}
        self.index = index
        for name, pod in self.model.pods.items():
            pod.heard = "cut off"
            for rank in index.worker_stats(name):
                index.mark_worker(name, rank, pod.told.get(rank, "exact"))
                pod.heard = "yes"
        self.compare()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=max(4, settings.default.max_examples // 7))
def test_a_loaded_index_goes_on_as_the_one_that_was_saved(seed) -> None:
    rng = Random(seed)
    world = Restarted(draw_setup(rng))
    with TemporaryDirectory() as folder:
        for _ in range(4):
            for _ in range(rng.randrange(30)):
                world.do(draw_step(rng))
            world.restart(Path(folder))
    world.finish()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=max(4, settings.default.max_examples // 7))
def test_an_index_that_has_another_content_goes_on_as_the_one_that_was_saved(seed) -> None:
    rng = Random(seed)
    setup = draw_setup(rng)
    world = Restarted(setup)
    for _ in range(3):
        other = Restarted(setup)
        for each in (world, other):
            for _ in range(rng.randrange(30)):
                each.do(draw_step(rng))
        world.restore(other)
    world.finish()

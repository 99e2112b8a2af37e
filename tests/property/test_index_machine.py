"""Everything that an engine may do, applied to the index and to the slow model, which must always agree.

Answers, states and reports are compared in full after every step, and the index's own invariants are checked.
Hypothesis can shrink the histories of the state machine. The long runs reach the cases that need fifty steps.
"""

from __future__ import annotations

from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from world import STEPS, World, draw_setup, draw_step, fails, minimise

randoms = st.randoms(use_true_random=False)


def steps(kind: str = "batch", event: str | None = None) -> st.SearchStrategy:
    return randoms.map(lambda rng: draw_step(rng, kind, event))


class IndexMachine(RuleBasedStateMachine):
    world: World | None = None

    @initialize(setup=randoms.map(draw_setup))
    def start(self, setup) -> None:
        self.world = World(setup)

    @rule(step=steps(event="store"))
    def store(self, step) -> None:
        self.world.do(step)

    @rule(step=steps(event="extend"))
    def extend(self, step) -> None:
        self.world.do(step)

    @rule(step=steps(event="again"))
    def store_again(self, step) -> None:
        self.world.do(step)

    @rule(step=steps(event="mask"))
    def store_masked(self, step) -> None:
        self.world.do(step)

    @rule(step=steps(event="remove"))
    def remove(self, step) -> None:
        self.world.do(step)

    @rule(step=steps("evict"))
    def evict(self, step) -> None:
        self.world.do(step)

    @rule(step=steps())
    def batch(self, step) -> None:
        self.world.do(step)

    @rule(step=st.sampled_from([kind for kind in STEPS if kind not in ("batch", "evict")]).flatmap(steps))
    def whole_worker(self, step) -> None:
        self.world.do(step)

    def teardown(self) -> None:
        if self.world is not None:
            self.world.finish()


# The same examples each time, except in the nightly run, which draws thousands at half a second each.
TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=max(8, settings.default.max_examples // 2))


@given(seed=st.integers(0, 2**32 - 1))
# A smaller seed does not give a smaller history. minimise() shortens it: shrinking took five minutes.
@settings(max_examples=max(5, settings.default.max_examples // 10), phases=[Phase.generate])
def test_long_interleavings(seed) -> None:
    rng = Random(seed)
    setup = draw_setup(rng)
    history = [draw_step(rng) for _ in range(120)]
    if fails(setup, history) is not None:
        shortest = minimise(setup, history)
        error = fails(setup, shortest)
        raise AssertionError("\n".join(["the shortest run that fails:", repr(setup), *map(repr, shortest)])) from error

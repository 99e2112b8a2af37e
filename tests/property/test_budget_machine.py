"""A budget and a time to live may make an answer too small, which its state reports, but never too large.

The random fleets are the same as without a budget. Their events go to an index that has too little room or a time to
live, and to the slow model, which keeps everything. The answer of a pod in state exact must equal the model's answer.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import STATES
from support import answer_of, report_of
from world import EXTRA, Op, Setup, World, draw_setup, draw_step, even, fails, minimise, same

import kvindex

BUDGET = 32768  # the minimum: about sixty chains, so most histories exceed it


class Narrow(World):
    """An index that must evict, beside a model that need not."""

    max_bytes: int | None = BUDGET
    ttl: float | None = None

    def __init__(self, setup: Setup) -> None:
        self.states: dict[str, str] = {}  # before the step
        super().__init__(setup)

    def make_index(self) -> kvindex.PrefixIndex:
        setup = self.setup
        if self.max_bytes is not None and setup.crowd and setup.size > 2:
            # Room for all workers of the crowd. The minimum has room for half of them.
            self.max_bytes = 4 * BUDGET
        return kvindex.PrefixIndex(
            setup.size,
            presence=setup.presence,
            max_parked=setup.max_parked,
            max_bytes=self.max_bytes,
            ttl=self.ttl,
            clock=lambda: self.now,
        )

    def both(self, call: str, *args: Any, **kwargs: Any) -> None:
        super().both(call, *args, **kwargs)
        self.within()

    def within(self) -> None:
        if self.max_bytes is not None:
            assert self.index.stats()["bytes"] <= self.max_bytes

    def reported(self, pod: str, got: Any, want: Any) -> None:
        self.within()
        # A batch may evict blocks, then clear the pod, and so end in state exact.
        if {self.states.get(pod, "exact"), self.index.pod_state(pod)} == {"exact"} and not want.cleared:
            same("report", report_of(got), report_of(want))

    def compare(self) -> None:
        self.index._check()
        self.within()
        for pod in self.model.pods:
            got, want = self.index.pod_state(pod), self.model.pod_state(pod)
            assert STATES.index(got) >= STATES.index(want), f"{pod} is {got}, the model says {want}"
        self.states = {pod: self.index.pod_state(pod) for pod in self.model.pods}
        self.turn += 1
        asked = list(self.asked)
        older = asked[self.turn % max(1, len(asked)) :][:4]
        for context, path, model in dict.fromkeys(asked[-1:] if self.setup.crowd else asked[-2:] + older):
            self.question(context, path, model)

    def question(self, context: tuple, path: tuple, model: str) -> None:
        path = even(path)
        keys = [EXTRA.get(b) for b in path]
        given = {"lora_name": context[0], "cache_salt": context[1], "extra_keys": keys if any(keys) else None}
        tokens = self.tokens(path)
        # The question comes first: it may detect expired blocks, which changes the states.
        match = self.index.match_prefix(tokens, model=model, **given)
        want, got = self.model.match(tokens, model=model, **given), answer_of(match)
        # Speculative entries that found no room do not affect a state.
        stats = self.index.stats()
        least = want if not stats["shed_guesses"] + stats["expired_guesses"] else self.announced(tokens, model, given)
        # The model parks or refuses a tier's event below an unknown parent. An index that has evicted content of the
        # worker places the copies by their names at once, and the engine has them: it may answer more than the model.
        lacking = {pod for pod in self.model.pods if self.model.pod_state(pod) != "exact"}
        assert got.keys() - lacking <= want.keys(), f"{got.keys() - want.keys()} hold nothing of {tokens}"
        for pod, truth in want.items():
            answer = got.get(pod, {"tokens": 0, "ranks": {}, "media": {}})
            if self.index.pod_state(pod) == "exact":
                sure = least.get(pod, {"tokens": 0, "ranks": {}, "media": {}})
                assert answer["tokens"] >= sure["tokens"], (tokens, pod)
                for part in ("ranks", "media"):
                    for name, n in sure[part].items():
                        assert answer[part].get(name, 0) >= n, f"{tokens}: {pod}, exact, answers {answer}, not {sure}"
            if pod in lacking:
                continue
            assert answer["tokens"] <= truth["tokens"], (tokens, pod)
            for part in ("ranks", "media"):
                for name, n in answer[part].items():
                    assert n <= truth[part].get(name, 0), f"{tokens}: {pod} answers {n} for {name}, the model {truth}"
        hashes = kvindex.prefix_hashes(tokens, block_size=self.size, **given)
        # Prefix hashes have no lookahead, and the engine's rule for the last token depends on the prompt's length.
        by_hashes = answer_of(self.index.match_hashes(hashes, model=model, n_tokens=len(tokens)))
        plain = {name for name, pod in self.model.pods.items() if not any(any(w.lengths) for w in pod.workers.values())}
        same(
            "by hashes",
            {pod: answer for pod, answer in by_hashes.items() if pod in plain},
            {pod: answer for pod, answer in got.items() if pod in plain},
        )
        assert all(n["tokens"] <= got.get(pod, n)["tokens"] for pod, n in by_hashes.items()), by_hashes

    def announced(self, tokens: list[int], model: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the model's answer without speculative entries."""
        workers = [worker for pod in self.model.pods.values() for worker in pod.workers.values()]
        guesses = [worker.added for worker in workers]
        for worker in workers:
            worker.added = []
        answer = self.model.match(tokens, model=model, **given)
        for worker, added in zip(workers, guesses, strict=True):
            worker.added = added
        return answer

    def finish(self) -> None:
        for pod in list(self.model.pods):
            self.both("remove_pod", pod)
        self.index._check()
        same("blocks at the end", self.index.stats()["blocks"], 0)
        same("bytes at the end", self.index.stats()["bytes"], self.make_index().stats()["bytes"])


class Forgetful(Narrow):
    max_bytes, ttl = None, 2500.0


class Both(Narrow):
    ttl = 2500.0


def meant_once(op: Op) -> Op:
    # A block without its keys is another block once nothing is left of the first announcement.
    return replace(op, twist=None) if op.twist in ("moved", "random", "self", "repeat", "keyless") else op


@pytest.mark.parametrize("kind", [Narrow, Forgetful, Both])
@given(seed=st.integers(0, 2**32 - 1))
# The same examples each time, except in the nightly run, which draws hundreds.
@settings(max_examples=max(4, settings.default.max_examples // 15))
def test_too_small_and_said_so_or_exact(kind: type[Narrow], seed: int) -> None:
    rng = Random(seed)
    setup, history = draw_setup(rng), [draw_step(rng) for _ in range(120)]
    if rng.random() < 0.5:
        # A hash may change its meaning while the first meaning waits for its parent. In the model, the older meaning
        # wins when the parent comes. An index that no longer has the parked event keeps the newer meaning, which is
        # correct. So either no hash changes its meaning, or nothing is parked.
        setup = replace(setup, max_parked=0)
    else:
        history = [replace(step, ops=tuple(map(meant_once, step.ops))) for step in history]
    if fails(setup, history, kind) is not None:
        shortest = minimise(setup, history, kind)
        error = fails(setup, shortest, kind)
        raise AssertionError("\n".join(["the shortest run that fails:", repr(setup), *map(repr, shortest)])) from error

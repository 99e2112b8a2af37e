"""Many threads: every answer was correct at some moment, and nothing is lost or broken."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from support import answer_of, cleared, payload, removed, stored, together
from world import PODS, World, draw_setup, draw_step

import kvindex
from kvindex import PrefixIndex


class Timeline:
    """A value that one thread changes. Other threads may see any value that it had while they looked."""

    def __init__(self, first: int) -> None:
        self.values = [first]
        self.settled = 0  # the index of the newest value that is certainly visible

    def changes_to(self, *values: int) -> None:
        self.values.extend(values)

    def settle(self) -> None:
        self.settled = len(self.values) - 1

    def check(self, since: int, seen: int) -> None:
        until = len(self.values)
        assert seen in self.values[since:until], f"{seen} was never the case between {since} and {until}"


@pytest.mark.parametrize("blocks", [60, 700], ids=["short prompts keep the interpreter", "long prompts give it up"])
@pytest.mark.parametrize("per_event", [1, 7])
def test_an_answer_is_one_between_two_events(blocks, per_event):
    """A chain grows and shrinks by whole events. No answer may have a length between two events, or an outdated one."""
    size = 4
    index = PrefixIndex(size)
    tokens = np.arange(blocks * size, dtype=np.uint32)
    prefixes = kvindex.prefix_hashes(tokens, block_size=size)
    hashes = list(range(1, blocks + 1))
    line = Timeline(0)
    # Other pods share the content, so that runs split and merge under the reader.
    for pod, n in (("b", blocks), ("c", blocks // 2)):
        index.ingest(pod, payload(stored(hashes[:n], tokens[: n * size].tolist(), size=size)))

    def grow(at: int, n: int) -> dict:
        return stored(
            hashes[at : at + n],
            tokens[at * size : (at + n) * size].tolist(),
            size=size,
            parent=hashes[at - 1] if at else None,
        )

    def write() -> None:
        rng = Random(per_event)
        length = 0
        for _ in range(4000 if blocks < 100 else 1000):
            events, lengths = [], []
            for _ in range(per_event):
                step = rng.randint(2, 20)
                if rng.random() < 0.5 and length + step <= blocks:
                    events.append(grow(length, step))
                    length += step
                elif length:
                    step = min(step, length)
                    # Head of the range first: half of such an event would leave a hole.
                    events.append(removed(*hashes[length - step : length]))
                    length -= step
                lengths.append(length)
            line.changes_to(*lengths)
            index.ingest("a", payload(*events))
            line.settle()

    def ask() -> None:
        since = line.settled
        match = index.match_prefix(tokens)
        line.check(since, match.tokens.get("a", 0) // size)
        assert (match.tokens["b"], match.tokens["c"]) == (blocks * size, blocks // 2 * size)

    def ask_by_hashes() -> None:
        since = line.settled
        match = index.match_hashes(prefixes)
        line.check(since, match.tokens.get("a", 0) // size)
        assert (match.best() or ("", 0))[1] == blocks * size

    together(ask, ask, ask_by_hashes, main=write)
    index._check()


def test_a_clear_is_seen_whole():
    """Between a clear and the next store, the pod holds no block. Both are events of one batch."""
    index = PrefixIndex(4)
    tokens = np.arange(4000, dtype=np.uint32)
    hashes = list(range(1, 1001))
    everything = stored(hashes, tokens.tolist())
    batch = payload(cleared(), everything)
    index.ingest("a", payload(everything))
    seen = set()

    def write() -> None:
        for _ in range(400):
            index.ingest("a", batch)

    together(lambda: seen.add(index.match_prefix(tokens).tokens.get("a", 0)), main=write)
    assert seen <= {0, 4000}


def test_a_pod_that_comes_and_goes_is_there_or_not():
    index = PrefixIndex(4)
    tokens = list(range(400))
    data = payload(stored(list(range(1, 101)), tokens))
    seen = set()

    def write() -> None:
        for _ in range(1500):
            index.ingest("a", data)
            index.remove_pod("a")

    def ask() -> None:
        match = index.match_prefix(tokens)
        seen.add(match.tokens.get("a", 0))
        best = match.best()
        assert best is None or best == ("a", 400) or best[0] is None

    together(ask, ask, main=write)
    assert seen <= {0, 400}
    assert index.stats()["blocks"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_pods_are_written_side_by_side(seed):
    """One thread for each pod's stream gives the same index as one thread for all."""
    rng = Random(seed)
    world = World(replace(draw_setup(rng), crowd=0))
    for _ in range(150):
        kind = rng.choice(("batch",) * 9 + ("evict",))
        step = draw_step(rng, kind)
        getattr(world, "do_" + kind)(replace(step, form="map") if step.form == "objects" else step)
    world.index = index = PrefixIndex(world.size, presence=world.setup.presence, max_parked=world.setup.max_parked)
    for pod, layout in world.layouts.items():
        index.configure_pod(pod, **layout.options)

    def stream(pod: str) -> Callable[[], None]:
        todo = iter([entry for entry in world.log if entry[0] == pod])

        def write() -> None:
            for name, data, where in todo:
                index.ingest(name, data, **where)

        return write

    def ask() -> None:
        match = index.match_prefix([7] * 20)
        assert all(0 < tokens <= 20 and tokens % world.size == 0 for tokens in match.tokens.values())

    together(*(stream(pod) for pod in PODS[1:]), ask, main=stream(PODS[0]))
    index._check()
    world.compare()
    world.finish()


def test_everything_at_once():
    """Every method from many threads: only documented exceptions may be raised, and the structure holds."""
    index = PrefixIndex(4, max_parked=50)
    rng = Random(7)
    prompts = [[rng.randrange(3) for _ in range(rng.choice((4, 40, 1600)))] for _ in range(20)]
    # One hash per content, like engines with a common hash function.
    names: dict[tuple, int] = {}

    def batch(rng: Random) -> bytes:
        tokens = rng.choice(prompts)
        n = len(tokens) // 4
        hashes = [names.setdefault(tuple(tokens[: 4 * i + 4]), len(names)) for i in range(n)]
        cut = rng.randrange(n)
        parent = hashes[cut - 1] if cut else None
        events = [
            stored(hashes[cut:], tokens[4 * cut : 4 * n], parent=parent),
            removed(*rng.sample(hashes, n // 2)),
            stored(hashes[:cut], tokens[: 4 * cut]),
            stored(hashes[:3], (), size=0, medium="CPU"),
            cleared(),
        ]
        return payload(*rng.sample(events, rng.randint(1, 4)), rank=rng.randrange(2))

    batches = [batch(rng) for _ in range(200)]
    turns = itertools.count()

    def anything() -> None:
        rng = Random(next(turns))
        pod, tokens = rng.choice("abcd"), rng.choice(prompts)
        calls: list[Callable[[], object]] = [
            lambda: index.ingest(pod, rng.choice(batches), model=rng.choice(("", "m"))),
            lambda: index.ingest(pod, rng.choice(batches)[:-3]),
            lambda: answer_of(index.match_prefix(tokens, ready_pods=index.pod_set(["a", "b"]))),
            lambda: index.match_prefix(np.array(tokens, np.uint32), only_exact=True).best(),
            lambda: index.match_hashes(index.match_prefix(tokens).hashes, model="m").percent,
            lambda: index.add_prefix(pod, tokens, ttl=rng.random() / 100),
            lambda: index._expire(1e9),
            lambda: index.remove_pod(pod),
            lambda: index.clear_worker(pod, rng.randrange(2)),
            lambda: index.mark_worker(pod, rng.randrange(2), rng.choice(("exact", "degraded", "stale"))),
            lambda: index.configure_pod(
                pod, presence=rng.choice(("count", "set")), clear_media=rng.choice((None, ["CPU"]))
            ),
            lambda: (index.stats(), index.worker_stats(pod), index.pod_state(pod)),
            lambda: index.process_all_blocks_cleared(kvindex.AllBlocksCleared(pod=pod)),
            lambda: index.process_block_removed(kvindex.BlockRemoved(pod=pod, block_hashes=[rng.randrange(100)])),
            index._check,
        ]
        with contextlib.suppress(kvindex.UnknownPodError, kvindex.EventDecodeError):
            rng.choice(calls)()

    def write() -> None:
        for _ in range(8000):
            anything()

    together(anything, anything, anything, main=write)
    index._check()
    for pod in "abcd":
        index.configure_pod(pod)
        index.remove_pod(pod)
    index._check()
    assert index.stats()["blocks"] == 0
    assert index.match_prefix(prompts[0]).tokens == {}

"""An index of several parts answers like one index with all pods, and each part is replaced and distrusted alone."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex import AllBlocksCleared, BlockRemoved, BlockStored, PrefixIndex, SnapshotError
from kvindex.routing import EndpointPicker

joined = pytest.importorskip("kvindex.replication.joined")
shard_of = pytest.importorskip("kvindex.replication.shard").shard_of

PODS = [f"p{number}" for number in range(6)]
SIZE = 2
#: Prompts that share prefixes: paths in a tree.
PROMPTS = [[1, 1], [1, 1, 2, 2], [1, 1, 3, 3], [1, 1, 2, 2, 4, 4], [1, 1, 2, 2, 5, 5, 6, 6], [7, 7, 8]]
STATES = ("exact", "degraded", "stale")


def held(index: PrefixIndex, pod: str) -> dict[int, Any]:
    """Return the statistics of the ranks that hold blocks. A snapshot has no other ranks."""
    return {rank: stats for rank, stats in index.worker_stats(pod).items() if stats["blocks"]}


class Fleet:
    """Makes the same calls on an index with all pods, which is the reference, and on one of several parts."""

    def __init__(self, parts: int, rand: random.Random) -> None:
        self.now = 0.0
        self.rand = rand
        self.marks: dict[str, str] = {}
        made = partial(PrefixIndex, SIZE, clock=lambda: self.now)
        self.whole = made()
        self.parts = [made() for _ in range(parts)]
        self.joined = joined.JoinedIndex.of(self.parts, self.place)

    def place(self, pod: str) -> int:
        return shard_of(pod, len(self.parts))

    def both(self, call: str, *given: Any, **options: Any) -> None:
        outcomes = []
        for index in (self.whole, self.joined):
            try:
                outcomes.append(getattr(index, call)(*given, **options))
            except Exception as error:
                outcomes.append(type(error))
        assert repr(outcomes[0]) == repr(outcomes[1]), call

    def step(self) -> None:
        rand, pod = self.rand, self.rand.choice(PODS)
        prompt = rand.choice(PROMPTS)
        blocks = len(prompt) // SIZE
        # A hash names the same content everywhere, like an engine's hash.
        names = [hash(tuple(prompt[: (n + 1) * SIZE])) & 0xFFFFFFFF for n in range(blocks)]
        medium = rand.choice((None, None, "CPU", "disk"))
        match rand.randrange(9):
            case 0 | 1 | 2 | 3:
                first = rand.randrange(blocks)
                event = BlockStored(
                    pod=pod, block_hashes=names[first:], token_ids=prompt[first * SIZE : blocks * SIZE],
                    parent_block_hash=names[first - 1] if first else None, block_size=SIZE, medium=medium,
                )  # fmt: skip
                self.both("process_block_stored", event)
            case 4:
                self.both("process_block_removed", BlockRemoved(pod=pod, block_hashes=names[-1:], medium=medium))
            case 5:
                self.both("process_all_blocks_cleared", AllBlocksCleared(pod=pod))
            case 6:
                self.marks[pod] = rand.choice(STATES)
                self.both("mark_worker", pod, 0, self.marks[pod])
            case 7:
                self.both("add_prefix", pod, prompt, ttl=rand.choice((1.0, 3.0)))
            case 8:
                self.marks.pop(pod, None)
                self.both("remove_pod", pod)
        self.now += 0.1

    def reload(self, number: int) -> None:
        """Load one part from its snapshot, with the states of its streams, as in a follower."""
        self.now += 10.0  # expires the speculative entries, which a snapshot does not have
        self.ask()
        part = self.parts[number]
        others = [each.dumps() for each in self.parts if each is not part]
        part._restore(part.dumps(), "it")
        assert others == [each.dumps() for each in self.parts if each is not part], "byte for byte"
        for index in (self.whole, part):
            for pod in part._pods():
                index.mark_worker(pod, 0, self.marks.setdefault(pod, "exact"))

    def ask(self, lapsed: int | None = None) -> None:
        """Compare every answer. ``lapsed`` is the part whose content is unknown."""
        whole, own = self.whole, self.joined
        stale = {pod for pod in PODS if self.place(pod) == lapsed}
        states = {pod: "stale" if pod in stale else state for pod, state in whole.pods().items()}
        assert own.pods() == states
        some = self.rand.sample(PODS, 3)
        for prompt in PROMPTS:
            expected, found = whole.match_prefix(prompt), own.match_prefix(prompt)
            assert found.tokens == expected.tokens
            assert found.percent == expected.percent
            assert found.best() == expected.best()
            assert own.match_hashes(found.hashes).tokens == whole.match_hashes(found.hashes).tokens
            assert {pod: hit._replace(state=states[pod]) for pod, hit in expected.items()} == dict(found)
            assert (
                own.match_prefix(prompt, ready_pods=some).tokens == whole.match_prefix(prompt, ready_pods=some).tokens
            )
            exact = {pod: n for pod, n in expected.tokens.items() if states[pod] == "exact"}
            assert own.match_prefix(prompt, only_exact=True).tokens == exact
            assert [m.tokens for m in own.match_many([prompt, prompt])] == [expected.tokens] * 2
            usable = [pod for pod in some if pod not in stale]
            right = EndpointPicker(whole, speculative_ttl=0.0).pick(prompt, pods=usable) if usable else None
            choice = EndpointPicker(own, speculative_ttl=0.0).pick(prompt, pods=some)
            assert (choice is None) == (right is None)
            if choice is not None:
                assert right is not None
                assert (choice.cost, choice.candidates) == (right.cost, right.candidates)
        for pod in whole.pods():
            assert own.stream_places(pod) == whole.stream_places(pod)
            if pod not in stale:
                assert held(own, pod) == held(whole, pod)
        figures, wanted = own.stats(), whole.stats()
        for name in ("pods", "workers", "parked", "guesses", "events_stored", "events_removed", "skipped_reasons"):
            assert figures[name] == wanted[name], name
        own._check()


@given(parts=st.integers(2, 4), seed=st.integers(0, 2**32), steps=st.integers(1, 40))
def test_parts_answer_as_one_index(parts: int, seed: int, steps: int) -> None:
    rand = random.Random(seed)
    fleet = Fleet(parts, rand)
    for _ in range(steps):
        fleet.step()
        if rand.random() < 0.2:
            fleet.ask()
    fleet.ask()
    number = rand.randrange(parts)
    fleet.parts[number].trust(0.0)
    fleet.ask(lapsed=number)
    fleet.parts[number].trust(None)
    fleet.reload(number)
    fleet.ask()
    for _ in range(5):
        fleet.step()
    fleet.ask()


def test_it_has_no_snapshot_of_its_own() -> None:
    fleet = Fleet(2, random.Random(1))
    with pytest.raises(SnapshotError, match="2 shards"):
        fleet.joined.dumps()


def test_the_load_of_a_worker_stays_while_its_part_is_replaced() -> None:
    fleet = Fleet(3, random.Random(1))
    for pod in PODS:
        fleet.both("process_block_stored", BlockStored(pod=pod, block_hashes=[1], token_ids=[1, 1], block_size=SIZE))
    picker = EndpointPicker(fleet.joined)
    choices = [picker.pick([9, 9, 9, 9]) for _ in range(2 * len(PODS))]
    assert {load["requests"] for load in picker.stats()["workers"].values()} == {2}
    for number in range(3):
        fleet.reload(number)
    assert {load["requests"] for load in picker.stats()["workers"].values()} == {2}
    for choice in choices:
        picker.finished(choice)
    assert {load["requests"] for load in picker.stats()["workers"].values()} == {0}


def test_a_limit_of_trust_is_one_of_all_parts() -> None:
    fleet = Fleet(3, random.Random(1))
    for pod in PODS:
        fleet.both("process_block_stored", BlockStored(pod=pod, block_hashes=[1], token_ids=[1, 1], block_size=SIZE))
    fleet.joined.trust(0.0)
    assert set(fleet.joined.pods().values()) == {"stale"}
    assert fleet.joined.match_prefix([1, 1], only_exact=True).tokens == {}
    fleet.parts[0].trust(None)
    assert fleet.joined.pods() == {pod: "stale" if fleet.place(pod) else "exact" for pod in PODS}
    fleet.joined.trust(None)
    assert fleet.joined.pods() == fleet.whole.pods()


def test_requests_of_other_routers_go_to_the_part_of_their_pod() -> None:
    fleet = Fleet(3, random.Random(1))
    for pod in PODS:
        fleet.both("process_block_stored", BlockStored(pod=pod, block_hashes=[1], token_ids=[1, 1], block_size=SIZE))
    picker = EndpointPicker(fleet.joined)
    for number, pod in enumerate(PODS):
        assert picker._other_began(pod, pod, 0, 4, 6)
        assert not picker._other_began(None, pod, 7, 4, 6)
        path = [10 + number, 11, 12, 13]
        ((ahead, hashes),) = fleet.whole._locals(pod, 0, b"", path, (None, None, None))
        assert fleet.joined._locals(pod, 0, b"", path, (None, None, None)) == [(ahead, hashes)]
        assert fleet.joined._hint(pod, 0, b"", ahead, hashes, 1.0)
        assert fleet.joined.match_prefix(path).tokens == {pod: 4}
    assert not picker._other_began(None, "none", 0, 4, 6)
    loads = picker.stats()["workers"]
    assert loads == {(pod, 0): {"requests": 1, "prefill_tokens": 4, "context_tokens": 6} for pod in PODS}
    for pod in PODS:
        picker._other_finished(pod)
    assert {load["requests"] for load in picker.stats()["workers"].values()} == {0}
    fleet.now = 2.0
    assert fleet.joined.match_prefix([10, 11, 12, 13]).tokens == {}

"""The content of an index is replaced as a whole while threads use it: every answer comes from one content."""

from __future__ import annotations

import contextlib
import itertools
from random import Random

import numpy as np
import pytest
from support import cleared, payload, stored, together

import kvindex
from kvindex import PrefixIndex, SnapshotError
from kvindex.routing import EndpointPicker

SIZE = 4
TOKENS = np.arange(80 * SIZE, dtype=np.uint32)


def filled(holds: dict[str, tuple[int, str | None]], state: str = "exact") -> PrefixIndex:
    """An index with pods in this order, each with a number of the prompt's blocks in a medium."""
    index = PrefixIndex(SIZE)
    for number, (pod, (blocks, medium)) in enumerate(holds.items()):
        index.ingest(pod, payload(cleared(), rank=number % 2), seq=0)
        event = stored(list(range(1, blocks + 1)), TOKENS[: blocks * SIZE].tolist(), size=SIZE, medium=medium)
        index.ingest(pod, payload(event, rank=number % 2), seq=1)
        index.mark_worker(pod, number % 2, state)
    return index


CONTENTS = (
    {"a": (80, None), "b": (20, "CPU"), "c": (5, "DISK")},
    {"b": (60, "Tape"), "d": (60, None), "a": (7, "CPU")},
    {"e": (33, "DISK"), "c": (33, "Tape")},
    {},
)


def said(holds: dict[str, tuple[int, str | None]]) -> dict[str, tuple[int, str]]:
    return {pod: (blocks * SIZE, medium or "GPU") for pod, (blocks, medium) in holds.items()}


def read(match: kvindex.PrefixMatch) -> dict[str, tuple[int, str]]:
    """The tokens and the medium of each pod. If an answer is read too late, the medium may have no name."""
    return {pod: (it.held, next(iter(it.media), "?")) for pod, it in match.items()}


@pytest.mark.parametrize("blocks", [80, 5000], ids=["short prompts keep the interpreter", "long prompts give it up"])
def test_an_answer_is_of_one_content(blocks):
    index = PrefixIndex(SIZE)
    contents = [(filled(holds).dumps(), said(holds)) for holds in CONTENTS]
    right = [answer for _, answer in contents]
    tokens = np.zeros(blocks * SIZE, dtype=np.uint32)
    tokens[: len(TOKENS)] = TOKENS
    index._restore(contents[0][0], "it")
    ready = index.pod_set(["a", "c"])
    kept = index.match_prefix(tokens)
    assert read(kept) == right[0]
    seen: set[int] = set()

    def ask() -> None:
        match = index.match_prefix(tokens)
        found = {pod: match[pod].held for pod in match}
        (number,) = [n for n, answer in enumerate(right) if {pod: held for pod, (held, _) in answer.items()} == found]
        seen.add(number)
        if match:
            best = match.best()
            assert best is not None
            assert best[1] == max(found.values())
        media = read(match)
        assert all(named[1] in (right[number][pod][1], "?") for pod, named in media.items())

    def ask_some() -> None:
        found = {pod: it.held for pod, it in index.match_prefix(tokens, ready_pods=ready).items()}
        assert found in [{pod: held for pod, (held, _) in answer.items() if pod in "ac"} for answer in right]

    def write() -> None:
        rng = Random(blocks)
        for _ in range(2000):
            index._restore(rng.choice(contents)[0], "it")
        # An early answer is still the same.
        assert read(kept) == right[0]

    together(ask, ask_some, main=write)
    assert len(seen) > 1
    index._check()


def test_everything_else_goes_on_meanwhile():
    """Batches, pods that come and go, marks, snapshots and picks: even if some are refused, the index is consistent."""
    index = PrefixIndex(SIZE, max_bytes=1 << 20)
    contents = [filled(holds).dumps() for holds in CONTENTS[:3]]
    picker = EndpointPicker(index)
    batch = payload(stored(list(range(1, 801)), list(range(800 * SIZE)), size=SIZE))
    turns = itertools.count()

    def anything() -> None:
        rng = Random(next(turns))
        pod = rng.choice("abcdxyz")
        match rng.randrange(8):
            case 0:
                index.ingest(pod, batch, seq=rng.randrange(9), dp_rank=rng.randrange(2))
            case 1:
                with contextlib.suppress(kvindex.UnknownPodError):
                    index.remove_pod(pod)
            case 2:
                index.mark_worker(pod, 0, "exact")
            case 3:
                index.configure_pod(pod, clear_media=["Tape", f"medium {rng.randrange(20)}"])
            case 4:
                index.add_prefix(pod, TOKENS, ttl=0.01)
            case 5:
                if (choice := picker.pick(TOKENS)) is not None:
                    picker.prefilled(choice)
                    picker.finished(choice)
            case 6:
                PrefixIndex.loads(index.dumps())._check()
            case 7:
                with contextlib.suppress(kvindex.UnknownPodError):
                    index.worker_stats(pod)
                    index.stream_places(pod)
                index.pods()

    def write() -> None:
        rng = Random(3)
        for _ in range(1000):
            index._restore(rng.choice(contents), "it")

    together(anything, anything, anything, main=write)
    index._check()
    index._restore(contents[0], "it")
    assert index.pods() == dict.fromkeys("abc", "stale")
    assert {pod: it.held for pod, it in index.match_prefix(TOKENS).items()} == {"a": 320, "b": 80, "c": 20}
    # Each pod can be used, and no pod has two numbers.
    for pod in "abcdxyz":
        assert index.ingest(pod, batch).skipped == 0
        index.remove_pod(pod)
    index._check()
    assert index.stats()["blocks"] == 0


def test_pods_that_stay_keep_their_load_and_new_ranks_are_found():
    index = PrefixIndex(SIZE)
    first = {"a": (80, None), "b": (20, None)}
    index._restore(filled(first).dumps(), "it")
    for rank, pod in enumerate(first):
        index.mark_worker(pod, rank, "exact")
    picker = EndpointPicker(index)
    choice = picker.pick(TOKENS)
    assert choice is not None
    assert (choice.pod, choice.rank) == ("a", 0)
    # Now rank 1 of "a" holds the prompt. The pod has as many ranks as before, and "c" is a further pod.
    other = PrefixIndex(SIZE)
    for pod in ("a", "b", "c"):
        other.ingest(pod, payload(stored([1, 2], TOKENS[:8].tolist(), size=SIZE), rank=1))
    index._restore(other.dumps(), "it")
    for pod in "abc":
        index.mark_worker(pod, 1, "exact")
    loads = picker.stats()["workers"]
    assert loads["a", 0]["requests"] == 1, "the request is still on its way"
    assert {picker.pick(TOKENS).rank for _ in range(4)} == {1}
    picker.finished(choice)
    assert sum(load["requests"] for load in picker.stats()["workers"].values()) == 4


def test_between_equals_the_order_of_the_saved_index_decides():
    index = PrefixIndex(SIZE)
    for order in ("abc", "cab", "bc", "cba", "abcd"):
        saved = filled(dict.fromkeys(order, (9, None)))
        index._restore(saved.dumps(), "it")
        assert index.match_prefix(TOKENS).best() == saved.match_prefix(TOKENS).best() == (order[0], 36)


def test_what_is_refused_changes_nothing():
    index = filled(CONTENTS[0])
    before, data = index.dumps(), filled(CONTENTS[1]).dumps()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    for bad, why in (
        (bytes(damaged), "damaged"),
        (data[:-1], "refused"),
        (b"", "refused"),
        (PrefixIndex(8).dumps(), "it has block size 8 and seed 1337, this index has 4 and 1337"),
        (PrefixIndex(SIZE, hash_seed=7).dumps(), "seed 7"),
    ):
        with pytest.raises(SnapshotError, match=why):
            index._restore(bad, "it")
        assert index.dumps() == before
        assert index.pods() == dict.fromkeys("abc", "exact")
    index._restore(data, "it")
    assert {pod: it.held for pod, it in index.match_prefix(TOKENS).items()} == {"b": 240, "d": 240, "a": 28}


def test_limits_stay_those_of_the_index():
    index = PrefixIndex(SIZE, max_bytes=65536, ttl=10.0, clock=lambda: now)
    now = 100.0
    other = PrefixIndex(SIZE)
    other.ingest("a", payload(stored(list(range(1, 4001)), list(range(16000)), size=SIZE)))
    index.trust(0.0)
    index._restore(other.dumps(), "it")
    index.mark_worker("a", 0, "exact")
    assert index.pod_state("a") == "stale", "the index is not trusted"
    index.trust(None)
    assert index.pod_state("a") == "degraded", "not all of it fits"
    figures = index.stats()
    assert figures["bytes"] <= 65536
    assert 0 < figures["blocks"] < 4000
    now = 109.0
    index._expire(now)
    assert index.stats()["blocks"] == figures["blocks"]
    now = 111.0
    index._expire(now)
    assert index.stats()["blocks"] == 0
    index._check()

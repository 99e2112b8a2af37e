"""States with a time limit: answers of an index after the moment until which it was trusted."""

import time

import numpy as np
import pytest

from kvindex import BlockStored, InvalidTypeError, InvalidValueError, PrefixIndex
from kvindex.routing import EndpointPicker

TOKENS = np.arange(64, dtype=np.uint32)
PAST, FUTURE = -1.0, 3600.0


@pytest.fixture
def index() -> PrefixIndex:
    made = PrefixIndex(16)
    for pod, rank, state in (("a", 0, "exact"), ("b", 0, "exact"), ("b", 1, "degraded")):
        made.process_block_stored(
            BlockStored(
                pod=pod, model="m", block_hashes=[1, 2], parent_block_hash=None, token_ids=TOKENS[:32], block_size=16,
                dp_rank=rank,
            )
        )  # fmt: skip
        made.mark_worker(pod, rank, state)
    made.mark_worker("c", 0, "exact")  # holds nothing
    return made


def _states(index: PrefixIndex) -> tuple[object, ...]:
    match = index.match_prefix(TOKENS, model="m")
    by_hash = index.match_hashes(match.hashes, model="m")
    (of_many,) = index.match_many([TOKENS], model="m")
    return (
        index.pods(),
        *({pod: found[pod].state for pod in "abc"} for found in (match, by_hash, of_many)),
        {pod: index.pod_state(pod) for pod in "abc"},
        {rank: worker["state"] for rank, worker in index.worker_stats("b").items()},
    )


def _of_match(index: PrefixIndex) -> tuple[object, ...]:
    match = index.match_prefix(TOKENS, model="m")
    return match.tokens, match.best(), {pod: match[pod].tokens for pod in match}


def _exact(index: PrefixIndex) -> list[set[str]]:
    hashes = index.match_prefix(TOKENS, model="m").hashes
    (of_many,) = index.match_many([TOKENS], model="m", only_exact=True)
    matches = (
        index.match_prefix(TOKENS, model="m", only_exact=True),
        index.match_hashes(hashes, model="m", only_exact=True),
        of_many,
    )
    assert all((match.best() is None) == (not match) for match in matches)
    return [set(match) for match in matches]


def test_every_state_is_stale_from_then_on_and_what_it_was_again_with_a_later_moment(index: PrefixIndex) -> None:
    before, held = _states(index), _of_match(index)
    assert before[0] == {"a": "exact", "b": "degraded", "c": "exact"}
    assert _exact(index) == [{"a"}] * 3

    index.trust(time.monotonic() + PAST)
    pods, *rest = _states(index)
    assert pods == {"a": "stale", "b": "stale", "c": "stale"}
    assert [set(each.values()) for each in rest] == [{"stale"}] * 5
    assert _exact(index) == [set()] * 3
    assert _of_match(index) == held, "what is held is said all the same"
    index.mark_worker("a", 0, "exact")
    assert index.pod_state("a") == "stale", "a state does not make it later"

    for until in (time.monotonic() + FUTURE, None, 1e17):
        index.trust(until)
        assert _states(index) == before
        assert _exact(index) == [{"a"}] * 3
    index._check()


def test_a_moment_that_passes_needs_nobody_who_watches_it(index: PrefixIndex) -> None:
    until = time.monotonic() + 0.05
    index.trust(until)
    while index.pod_state("a") == "exact":
        pass
    assert time.monotonic() >= until


def test_a_match_keeps_the_state_of_its_moment(index: PrefixIndex) -> None:
    index.trust(time.monotonic() + FUTURE)
    match = index.match_prefix(TOKENS, model="m")
    index.trust(time.monotonic() + PAST)
    assert match["a"].state == "exact"


def test_a_picker_takes_nobody_whose_state_has_ended(index: PrefixIndex) -> None:
    picker = EndpointPicker(index)
    assert picker.pick(TOKENS, model="m") is not None
    index.trust(time.monotonic() + PAST)
    assert picker.pick(TOKENS, model="m") is None
    index.trust(None)
    choice = picker.pick(TOKENS, model="m")
    assert choice is not None
    assert choice.cached_tokens == 32


def test_a_snapshot_does_not_have_it(index: PrefixIndex) -> None:
    index.trust(time.monotonic() + PAST)
    loaded = PrefixIndex.loads(index.dumps())
    loaded.mark_worker("a", 0, "exact")
    assert loaded.pod_state("a") == "exact"


@pytest.mark.parametrize(("until", "error"), [
    ("soon", InvalidTypeError), (float("nan"), InvalidValueError), (float("inf"), InvalidValueError),
])  # fmt: skip
def test_what_is_no_moment_is_refused_and_changes_nothing(index: PrefixIndex, until: object, error: type) -> None:
    with pytest.raises(error, match="until"):
        index.trust(until)  # type: ignore[arg-type]
    assert index.pod_state("a") == "exact"

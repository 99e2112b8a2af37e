"""max_bytes and ttl: the order of eviction, the effect on references to evicted blocks, and the scope of the budget."""

from __future__ import annotations

import threading
from random import Random

import pytest
from support import cleared, payload, removed, stored

import kvindex
from kvindex import InvalidTypeError, InvalidValueError, PrefixIndex

LEAST = 32768
SIZE = 4


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def prompt(number: int, blocks: int) -> list[int]:
    """Return a prompt that shares no block with the other prompts here."""
    return [number * 1000 + i for i in range(blocks * SIZE)]


def names(number: int, blocks: int) -> list[int]:
    return [number << 20 | i for i in range(1, blocks + 1)]


def store(index: PrefixIndex, pod: str, number: int, blocks: int, **more) -> kvindex.IngestReport:
    report = index.ingest(pod, payload(stored(names(number, blocks), prompt(number, blocks), **more)))
    index._check()
    return report


def held(index: PrefixIndex, number: int, blocks: int) -> dict[str, int]:
    return {pod: tokens // SIZE for pod, tokens in index.match_prefix(prompt(number, blocks)).tokens.items()}


def fill(index: PrefixIndex, pod: str, start: int, *, blocks: int = 8, until: str = "shed_blocks") -> int:
    """Store prompts until something is evicted. Returns the number of prompts."""
    before = index.stats()[until]
    for count in range(1, 1000):
        store(index, pod, start + count, blocks)
        if index.stats()[until] > before:
            return count
    raise AssertionError("nothing was shed")


# ------------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("bad", [0, 100, LEAST - 1, -1])
def test_a_budget_that_holds_nothing_is_refused(bad):
    with pytest.raises(InvalidValueError, match="max_bytes"):
        PrefixIndex(SIZE, max_bytes=bad)


def test_a_budget_is_a_whole_number():
    with pytest.raises(InvalidTypeError, match="max_bytes"):
        PrefixIndex(SIZE, max_bytes=1.5)


def test_what_was_stored_longest_ago_goes_first():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    count = fill(index, "a", 0)
    gone = [number for number in range(1, count + 1) if held(index, number, 8).get("a", 0) < 8]
    assert gone == list(range(1, len(gone) + 1))
    assert len(gone) < count / 2
    assert held(index, count, 8) == {"a": 8}
    assert index.pod_state("a") == "degraded"
    stats = index.stats()
    assert 0 < stats["bytes"] <= LEAST
    assert stats["shed_blocks"] == 8 * count - stats["blocks"]


def test_what_was_matched_stays():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    for number in (1, 2):
        store(index, "a", number, 8)
    for count in range(3, 300):
        assert held(index, 1, 8) == {"a": 8}
        store(index, "a", count, 8)
    assert held(index, 2, 8) == {}


def test_the_order_of_last_use_outlives_the_ages_that_are_told_apart():
    """Ages are kept in 128 classes. The order among blocks older than all classes must still be known."""
    index = PrefixIndex(SIZE, max_bytes=2 * LEAST)

    def pass_time() -> None:
        for _ in range(150):  # each of these begins a new age, because the index is small
            store(index, "passing", 1000, 8)
            index.ingest("passing", payload(removed(*names(1000, 8))))

    pods = [f"pod{number}" for number in range(6)]
    for number, pod in enumerate(pods):
        store(index, pod, number, 64)
        pass_time()
    assert held(index, 2, 64) == {"pod2": 64}
    assert index.stats()["shed_blocks"] == 0
    gone: list[str] = []
    for number in range(2000, 4000):
        store(index, "filling", number, 64)  # few of these, so that few ages begin
        gone += [pod for pod in pods if pod not in gone and index.pod_state(pod) == "degraded"]
        if len(gone) == len(pods):
            break
    assert gone == ["pod0", "pod1", "pod3", "pod4", "pod5", "pod2"]


def test_a_long_chain_goes_from_its_end():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 300)
    seen = []
    for number in range(2, 200):
        store(index, "b", number, 3)
        seen.append(index.match_hashes(kvindex.prefix_hashes(prompt(1, 300), block_size=SIZE)).tokens.get("a", 0))
        if seen[-1] == 0:
            break
        # The question has made it the newest. Other blocks must be evicted first.
        store(index, "b", number, 3)
    assert seen == sorted(seen, reverse=True)


def test_a_parent_stays_as_long_as_its_children():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    base = prompt(1, 4)
    store(index, "a", 1, 4)
    for number in range(2, 400):
        tail = prompt(number, 8)
        index.ingest("a", payload(stored(names(number, 8), tail, parent=names(1, 4)[-1])))
        index._check()
        assert index.match_prefix(base + tail).tokens == {"a": 12 * SIZE}
    assert index.stats()["shed_blocks"] > 0


def test_whoever_shares_a_chain_loses_it_together_and_says_so():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    for pod in "abc":
        store(index, pod, 1, 8)
    store(index, "d", 2, 8)
    for number in range(3, 300):
        store(index, "e", number, 8)
    assert (held(index, 1, 8), held(index, 2, 8)) == ({}, {})
    assert {pod: index.pod_state(pod) for pod in "abcd"} == dict.fromkeys("abcd", "degraded")


def test_a_removal_of_what_was_shed_takes_nothing_else():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 8)
    store(index, "a", 1, 8)
    fill(index, "a", 10)
    assert held(index, 1, 8) == {}
    # Two copies were evicted. One comes back, and then the engine removes one of its three copies.
    assert store(index, "a", 1, 8).stored == 8
    assert index.ingest("a", payload(removed(*names(1, 8)))).removed == 8
    report = index.ingest("a", payload(removed(*names(1, 8))))
    assert (report.removed, report.errors, report.reasons) == (0, 0, {"unknown_hash": 8})
    assert held(index, 1, 8) == {}
    index._check()


def test_a_child_of_what_was_shed_is_counted_and_waits_for_nothing():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 8)
    fill(index, "a", 10)
    report = index.ingest("a", payload(stored([7], prompt(2, 1), parent=names(1, 8)[-1])))
    assert (report.stored, report.parked, report.reasons) == (0, 0, {"shed": 1})
    # When the parent comes back, the index makes no assumption about the child.
    store(index, "a", 1, 8)
    assert index.match_prefix(prompt(1, 8) + prompt(2, 1)).tokens == {"a": 8 * SIZE}


def test_a_clear_makes_exact_again():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    fill(index, "a", 0)
    assert index.pod_state("a") == "degraded"
    index.ingest("a", payload(cleared()))
    assert index.pod_state("a") == "exact"
    store(index, "a", 1, 2)
    report = index.ingest("a", payload(stored([7], prompt(9, 1), parent=8)))
    assert report.parked == 1
    assert held(index, 1, 2) == {"a": 2}


def test_a_monster_is_refused_and_costs_nobody_anything():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 8)
    report = store(index, "b", 2, 5000)
    assert (report.stored, report.errors, report.reasons) == (0, 0, {"over_budget": 5000})
    assert held(index, 1, 8) == {"a": 8}
    assert (index.pod_state("a"), index.pod_state("b")) == ("exact", "degraded")
    assert index.stats()["skipped_reasons"] == {"over_budget": 5000}
    assert store(index, "b", 3, 8).stored == 8


def test_a_refused_event_takes_back_what_its_names_meant():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 2)
    index.ingest("a", payload(stored([*names(1, 2), *names(2, 4998)], prompt(2, 5000))))
    index._check()
    assert held(index, 1, 2) == {}


def test_one_endless_conversation_keeps_its_beginning():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    tokens = prompt(1, 4000)
    parent = None
    for at in range(0, 4000, 8):
        ids = names(1, 4000)[at : at + 8]
        index.ingest("a", payload(stored(ids, tokens[at * SIZE : (at + 8) * SIZE], parent=parent)))
        index._check()
        parent = ids[-1]
    known = held(index, 1, 4000)["a"]
    assert 200 < known < 4000
    assert index.pod_state("a") == "degraded"


def test_what_waits_is_part_of_the_budget():
    index = PrefixIndex(SIZE, max_bytes=4 * LEAST)
    store(index, "b", 1, 8)
    for number in range(2, 500):
        index.ingest("a", payload(stored(names(number, 8), prompt(number, 8), parent=number)))
        index._check()
    stats = index.stats()
    assert stats["bytes"] <= 4 * LEAST
    assert stats["shed_parked"] > 0
    assert index.worker_stats("a")[0]["parked"] == 0
    assert index.pod_state("a") == "degraded"
    # Parked blocks answer nothing, so no block that answers was evicted for them.
    assert held(index, 1, 8) == {"b": 8}
    assert index.pod_state("b") == "exact"


def test_second_copies_are_part_of_the_budget():
    index = PrefixIndex(SIZE, max_bytes=4 * LEAST)
    for turn in range(40):
        for number in range(1, 60):
            index.ingest("a", payload(stored(names(number, 8), prompt(number, 8), medium=("GPU", "CPU")[turn % 2])))
        index._check()
    assert index.stats()["bytes"] <= 4 * LEAST


def test_ever_new_ranks_groups_and_media_end_at_the_budget():
    index = PrefixIndex(SIZE, max_bytes=2 * LEAST)
    store(index, "b", 1, 8)
    for i in range(300):
        index.ingest("a", payload(stored([1], prompt(2, 1)), rank=i))
        index.ingest("c", payload(stored([1], prompt(2, 1), group_idx=i)))
        index.ingest("d", payload(stored([1], prompt(2, 1), medium=f"tier {i}")))
        index.ingest("d", payload(removed(1, medium=f"shelf {i}")))
        index._check()
        assert index.stats()["bytes"] <= 2 * LEAST
    assert index.stats()["skipped_reasons"]["over_budget"] > 0
    assert {index.pod_state(pod) for pod in "acd"} == {"degraded"}
    # A group that was not learned could restrict the answer, so the pod is left out.
    assert index.match_prefix(prompt(2, 1)).tokens.keys() <= {"a", "d"}


def test_a_clear_that_may_spare_a_tier_does_not_make_up_for_a_worker_that_found_no_room():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    for i in range(300):
        index.ingest("a", payload(stored([1], prompt(2, 1)), rank=i))
    index.ingest("gpu", payload(stored([1], prompt(2, 1))))
    index.ingest("cpu", payload(stored([1], prompt(2, 1), medium="CPU")))
    assert index.worker_stats("gpu") == index.worker_stats("cpu") == {}
    assert index.pod_state("gpu") == index.pod_state("cpu") == "degraded"
    for pod in ("gpu", "cpu"):
        index.ingest(pod, payload(cleared()))
    assert (index.pod_state("gpu"), index.pod_state("cpu")) == ("exact", "degraded")
    index.clear_worker("cpu", 0)
    index.mark_worker("cpu", 0, "exact")
    assert index.pod_state("cpu") == "exact"


def test_guesses_are_part_of_the_budget():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    for number in range(300):
        index.add_prefix("a", prompt(number, 16), ttl=1000)
        index._check()
        assert index.stats()["bytes"] <= LEAST
        assert held(index, number, 16) == {"a": 16}
    assert index.stats()["shed_guesses"] > 0


def test_guesses_go_one_by_one_and_the_one_that_ends_first_goes_first(clock):
    index = PrefixIndex(SIZE, max_bytes=8 * LEAST, clock=clock)
    ends = {number: 1000 + number * 7919 % 1009 for number in range(100)}
    there: set[int] = set()
    most = 0
    for number, end in ends.items():
        index.add_prefix("a", prompt(number, 8), ttl=end)
        index._check()
        stay = {n for n in there if held(index, n, 8)}
        gone = there - stay
        assert held(index, number, 8) == {"a": 8}
        assert all(ends[n] < ends[m] for n in gone for m in stay)
        there = stay | {number}
        most = max(most, len(gone))
        assert index.stats()["guesses"] == len(there)
    assert index.stats()["shed_guesses"] == len(ends) - len(there) > 0
    assert most == 1  # all entries have the same size, so evicting one makes room for another


def test_a_guess_that_is_a_monster_is_refused_and_costs_nobody_anything():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    store(index, "a", 1, 8)
    index.add_prefix("a", prompt(2, 20_000), ttl=1000)
    index.add_prefix("b", prompt(2, 20_000), ttl=1000)
    index._check()
    assert (held(index, 1, 8), held(index, 2, 20_000)) == ({"a": 8}, {})
    # The index has no event of b.
    assert (index.pod_state("a"), index.pod_state("b")) == ("exact", "stale")
    assert (index.stats()["shed_guesses"], index.stats()["guesses"]) == (2, 0)


@pytest.mark.parametrize("budget", [LEAST, 3 * LEAST, 10 * LEAST])
def test_guesses_change_no_state_and_leave_events_their_room(budget):
    """An index with speculative entries and one without get the same events, up to a full index and beyond."""
    plain, guessed = PrefixIndex(SIZE, max_bytes=budget), PrefixIndex(SIZE, max_bytes=budget)
    most = {plain: 0, guessed: 0}  # blocks that were stored before the first eviction
    for number in range(1, 400):
        for index in (plain, guessed):
            store(index, "ba"[number % 2], number, 16)
            if index.stats()["shed_blocks"] == 0:
                most[index] = number * 16
        for pod, tokens in (("abc"[number % 3], prompt(number // 2, 20)), ("c", prompt(10_000 + number, 3))):
            before = guessed.stats()["shed_blocks"], guessed.worker_stats("a")
            guessed.add_prefix(pod, tokens, ttl=1000)
            assert (guessed.stats()["shed_blocks"], guessed.worker_stats("a")) == before
        guessed._check()
        if guessed.stats()["shed_blocks"] == 0:
            assert guessed.pod_state("a") == "exact"
        assert guessed.pod_state("c") == "stale"
    assert plain.stats()["shed_blocks"] > 0
    assert guessed.stats()["shed_guesses"] > 0
    # A table may double a few blocks earlier.
    assert most[guessed] >= most[plain] * 15 // 16


def test_a_chain_that_is_over_takes_the_guesses_that_go_through_it_and_no_others(clock):
    index = PrefixIndex(SIZE, ttl=100, clock=clock)
    index.mark_worker("a", 0, "exact")
    base = prompt(1, 10)
    for blocks in (10, 8, 4):
        index.add_prefix("a", base[: blocks * SIZE], ttl=1000)
    branch = base[: 4 * SIZE] + prompt(2, 6)
    for blocks in (10, 9):
        index.add_prefix("a", branch[: blocks * SIZE], ttl=1000)
    clock.now += 60
    index.match_prefix(base)  # touches it, and with it the chain below which the branch hangs
    clock.now += 60
    assert index.match_prefix(branch).tokens == {"a": 4 * SIZE}
    assert index.match_prefix(base).tokens == {"a": 10 * SIZE}
    index._check()
    assert (index.stats()["guesses"], index.stats()["expired_guesses"]) == (3, 2)
    assert index.pod_state("a") == "exact"


def test_blocks_of_two_go_whole():
    index = PrefixIndex(SIZE, max_bytes=LEAST)
    fork = prompt(1, 1)
    for number in range(2, 300):
        # Two engine blocks of two. All prompts share the first index block.
        index.ingest("a", payload(stored(names(number, 2), fork + prompt(number, 3), size=2 * SIZE)))
        index._check()
    assert index.stats()["shed_blocks"] > 0
    assert index.match_prefix(fork + prompt(299, 3)).tokens == {"a": 4 * SIZE}
    # The others hang below the chain of the first prompt.
    assert index.match_prefix(fork + prompt(2, 3)).tokens == {"a": 4 * SIZE}
    assert index.match_prefix(fork + prompt(3, 3)).tokens == {}


# ----------------------------------------------------------------------------------------------------- time to live


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_a_time_to_live_is_more_than_nothing(bad):
    with pytest.raises(InvalidValueError, match="ttl"):
        PrefixIndex(SIZE, ttl=bad)


def test_what_nobody_touches_is_forgotten(clock):
    index = PrefixIndex(SIZE, ttl=10, clock=clock)
    store(index, "a", 1, 8)
    clock.now += 9.8
    store(index, "a", 2, 8)
    assert index.stats()["blocks"] == 16
    clock.now += 0.2
    assert held(index, 1, 8) == {}
    assert held(index, 2, 8) == {"a": 8}
    assert index.pod_state("a") == "degraded"
    stats = index.stats()
    assert (stats["blocks"], stats["expired_blocks"], stats["expired_chains"], stats["shed_blocks"]) == (8, 8, 1, 0)


def test_asking_keeps_it(clock):
    index = PrefixIndex(SIZE, ttl=10, clock=clock)
    store(index, "a", 1, 8)
    for _ in range(50):
        clock.now += 9
        # A chain is touched as a whole, even by a prompt with only a part of it.
        assert held(index, 1, 1) == {"a": 1}
    assert held(index, 1, 8) == {"a": 8}
    assert index.pod_state("a") == "exact"
    clock.now += 10
    assert held(index, 1, 8) == {}


def test_an_event_keeps_what_it_extends(clock):
    index = PrefixIndex(SIZE, ttl=10, clock=clock)
    tokens, ids = prompt(1, 100), names(1, 100)
    store(index, "b", 2, 2)
    for at in range(100):
        index.ingest(
            "a", payload(stored([ids[at]], tokens[at * SIZE : at * SIZE + SIZE], parent=ids[at - 1] if at else None))
        )
        clock.now += 5
    assert held(index, 1, 100) == {"a": 100}
    assert (index.pod_state("a"), index.pod_state("b")) == ("exact", "degraded")


def test_a_quiet_index_forgets_when_it_is_told_of_anything(clock):
    index = PrefixIndex(SIZE, ttl=10, clock=clock)
    store(index, "a", 1, 8)
    clock.now += 1000
    store(index, "b", 2, 8)
    assert index.stats()["blocks"] == 8
    # Blocks that come after a long silence have their full time to live.
    clock.now += 9.8
    assert held(index, 2, 8) == {"b": 8}


def test_a_guess_ends_with_its_own_time_or_with_the_indexs(clock):
    index = PrefixIndex(SIZE, ttl=10, clock=clock)
    index.add_prefix("a", prompt(1, 4), ttl=2)
    index.add_prefix("a", prompt(2, 4), ttl=1000)
    clock.now += 3
    assert (held(index, 1, 4), held(index, 2, 4)) == ({}, {"a": 4})
    clock.now += 100
    assert held(index, 2, 4) == {}
    index._check()


def test_no_limit_asks_no_clock():
    def clock() -> float:
        raise AssertionError("nobody needs the time")

    index = PrefixIndex(SIZE, max_bytes=LEAST, clock=clock)
    store(index, "a", 1, 8)
    assert held(index, 1, 8) == {"a": 8}


# ------------------------------------------------------------------------------------------------------------ churn


def churn(index: PrefixIndex, rng: Random, pods: list[str], steps: int) -> int:
    """Run conversations that grow and fork on all pods, with evictions and restarts.

    Returns the peak memory in bytes.
    """
    peak = 0
    live: list[tuple[str, list[int], list[int]]] = []
    for _ in range(steps):
        pod, kind = rng.choice(pods), rng.random()
        if kind < 0.75 or not live:
            at = rng.randrange(len(live)) if live and kind < 0.4 else -1
            pod, ids, tokens = live[at] if at >= 0 else (pod, [], prompt(rng.randrange(8), 4))
            n = rng.randint(1, 20)
            start = len(tokens) if ids else 0
            tokens = tokens + [rng.randrange(1 << 31) for _ in range(n * SIZE)]
            fresh = [rng.getrandbits(60) for _ in range((len(tokens) - start) // SIZE)]
            index.ingest(pod, payload(stored(fresh, tokens[start:], parent=ids[-1] if ids else None)))
            live.append((pod, [*ids, *fresh], tokens))
        elif kind < 0.95:
            pod, ids, tokens = live.pop(rng.randrange(len(live)))
            index.ingest(pod, payload(removed(*ids[::-1])))
        elif kind < 0.97:
            index.ingest(pod, payload(cleared()))
        else:
            index.match_prefix(live[rng.randrange(len(live))][2])
        peak = max(peak, index.stats()["bytes"])
    return peak


@pytest.mark.parametrize("options", [{}, {"max_bytes": 2 * LEAST}, {"ttl": 1e9}, {"max_bytes": 8 * LEAST, "ttl": 1e9}])
def test_memory_comes_back_round_after_round(options):
    index = PrefixIndex(SIZE, **options)
    start = index.stats()["bytes"]
    rng = Random(7)
    pods = [f"pod-{i}" for i in range(20)]
    peaks = []
    for _ in range(8):
        peaks.append(churn(index, rng, pods, 150))
        index._check()
        for pod in pods:
            if known(index, pod):
                index.remove_pod(pod)
        index._check()
        assert index.stats()["bytes"] <= start * 1.05
    assert min(peaks) > 4 * start
    if "max_bytes" in options:
        assert max(peaks) <= options["max_bytes"]


def known(index: PrefixIndex, pod: str) -> bool:
    try:
        index.pod_state(pod)
    except kvindex.UnknownPodError:
        return False
    return True


def test_readers_may_ask_while_it_sheds():
    index = PrefixIndex(SIZE, max_bytes=2 * LEAST, ttl=0.001)
    done, errors = threading.Event(), []

    def ask() -> None:
        rng = Random(3)
        while not done.is_set():
            number = rng.randrange(400)
            for pod, blocks in held(index, number, 8).items():
                if pod != "a" or blocks > 8:
                    errors.append((pod, blocks))

    readers = [threading.Thread(target=ask) for _ in range(3)]
    for reader in readers:
        reader.start()
    rng = Random(4)
    for _ in range(3000):
        number = rng.randrange(400)
        index.ingest("a", payload(stored(names(number, 8), prompt(number, 8))))
        assert index.stats()["bytes"] <= 2 * LEAST
    done.set()
    for reader in readers:
        reader.join(30)
    index._check()
    assert not errors
    assert index.stats()["expired_blocks"] + index.stats()["shed_blocks"] > 0

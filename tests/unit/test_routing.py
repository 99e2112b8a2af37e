"""The picker compared with a slow one that keeps lists, and common faults of routers."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindex import BlockRemoved, BlockStored, InvalidTypeError, InvalidValueError, KVIndexError, PodSource, PrefixIndex
from kvindex.routing import EndpointPicker

SIZE = 4
BLOCKS = 6
SHARED = list(range(1000, 1000 + SIZE * BLOCKS))
MEDIA = ("GPU", "CPU", "DISK")
CREDIT = {"GPU": 1.0, "CPU": 0.75, "DISK": 0.25}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make(block_size=SIZE, **options):
    clock = Clock()
    index = PrefixIndex(block_size=block_size, clock=clock)
    options.setdefault("speculative_ttl", 0)
    return clock, index, EndpointPicker(index, seed=0, **options)


def store(index, pod, tokens, *, first=1, **more):
    size = index.block_size
    index.process_block_stored(
        BlockStored(pod=pod, block_hashes=list(range(first, first + len(tokens) // size)), token_ids=tokens,
                    block_size=size, **{"model": "", **more})
    )  # fmt: skip


def exact(index, *pods):
    for pod in pods:
        index.mark_worker(pod, 0, "exact")


# ---- a slow picker --------------------------------------------------------------------------------------------------


class Slow:
    """A slow picker: it finds the cheapest worker from sets of positions and a list of assigned requests."""

    def __init__(self, tie, context, request, half_life):
        self.tie, self.context, self.request, self.half_life = tie, context, request, half_life
        self.held = {}  # (pod, rank) -> {medium: positions}
        self.engine = {}
        self.state = {}
        self.given = {}
        self.open = {}

    @staticmethod
    def run(positions, start=0):
        while start in positions:
            start += 1
        return start

    def finds(self, worker, blocks, n):
        """Return the number of reused tokens and their worth."""
        held = {m: {p for p in positions if p < blocks} for m, positions in self.held[worker].items() if positions}
        engine = self.engine[worker[0]]
        if engine is None:
            reused = self.run(set().union(*held.values())) if held else 0
            alone = {m: self.run(positions) for m, positions in held.items()}
            worth = 0.0
            for block in range(reused):
                reaching = [CREDIT[m] for m, reach in alone.items() if reach > block]
                worth += max(reaching) if reaching else min(CREDIT[m] for m, reach in alone.items() if reach)
            return reused * SIZE, worth * SIZE
        at = worth = 0
        for medium in MEDIA:
            to = self.run(held.get(medium, ()), at)
            if engine == "vllm":  # only the engine's own pool in this test
                to = min(to, max(n - 1, 0) // SIZE)
            worth += (to - at) * CREDIT[medium]
            at = to
        return at * SIZE, worth * SIZE

    def waits(self, worker):
        mine = [each for each in self.open.values() if each["worker"] == worker]
        return sum(e["prefill"] for e in mine) + sum(self.context * e["n"] + self.request for e in mine)

    def lately(self, worker, now):
        return sum(work * 2 ** (-(now - then) / self.half_life) for then, work in self.given[worker])

    def equals(self, blocks, n, now, pods=None):
        costs = {
            worker: n - self.finds(worker, blocks, n)[1] + self.waits(worker)
            for worker in self.held
            if self.state[worker[0]] != "stale" and (pods is None or worker[0] in pods)
        }
        if not costs:
            return {}, set()
        limit = min(costs.values()) + self.tie * n
        near = [worker for worker, cost in costs.items() if cost <= limit + 1e-9]
        least = min(self.lately(worker, now) for worker in near)
        return costs, {worker for worker in near if self.lately(worker, now) <= least + 1e-6 * (1 + least)}


positions = st.sets(st.integers(0, BLOCKS - 1))


@st.composite
def fleets(draw):
    pods = {}
    for name in ["a", "b", "c"][: draw(st.integers(1, 3))]:
        engine = draw(st.sampled_from([None, "sglang", "vllm"]))
        media = ("GPU",) if engine == "vllm" else MEDIA
        pods[name] = (engine, [{m: draw(positions) for m in media} for _ in range(draw(st.integers(1, 2)))])
    return pods


steps = st.lists(
    st.one_of(
        st.tuples(st.just("pick"), st.integers(0, BLOCKS), st.integers(0, 9)),
        st.tuples(st.just("pick"), st.integers(0, BLOCKS), st.just(0)),
        st.tuples(st.just("ready"), st.integers(0, BLOCKS), st.integers(1, 7)),
        st.tuples(st.just("prefilled"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("finished"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 70), st.just(0)),
        st.tuples(st.just("state"), st.integers(0, 2), st.sampled_from(["exact", "degraded", "stale"])),
    ),
    max_size=40,
)


@given(fleets(), steps, st.sampled_from([0.0, 0.05, 0.5]), st.sampled_from([0.0, 0.1, 2.0]))
@settings(max_examples=150)
def test_every_pick_is_the_slow_pickers(fleet, history, tie, context):
    options = {"tie": tie, "context_weight": context, "request_weight": 3.0, "half_life": 50.0}
    clock, index, picker = make(credit=CREDIT, reservation_ttl=60.0, **options)
    slow = Slow(tie, context, 3.0, 50.0)
    for pod, (engine, ranks) in fleet.items():
        if engine:
            index.configure_pod(pod, engine=engine)
        slow.engine[pod], slow.state[pod] = engine, "exact"
        for rank, media in enumerate(ranks):
            index.mark_worker(pod, rank, "exact")
            slow.held[pod, rank], slow.given[pod, rank] = media, []
            for medium, kept in media.items():
                if kept:
                    store(index, pod, SHARED, dp_rank=rank, medium=medium)
                    gone = [p + 1 for p in range(BLOCKS) if p not in kept]
                    index.process_block_removed(
                        BlockRemoved(pod=pod, model="", block_hashes=gone, medium=medium, dp_rank=rank)
                    )
    choices, names, unique = [], list(fleet), 10**6
    for what, number, more in history:
        now = clock.now
        for old in [key for key, each in slow.open.items() if each["ends"] <= now]:
            del slow.open[old]
        if what in ("pick", "ready"):
            pods = None if what == "pick" else [name for i, name in enumerate(names) if more >> i & 1]
            tail = 5 if what == "ready" else more
            prompt = np.array(SHARED[: number * SIZE] + [unique + i for i in range(tail)], dtype=np.uint32)
            unique += 100
            n = len(prompt)
            costs, equals = slow.equals(number, n, now, pods)
            choice = picker.pick(prompt, pods=pods)
            assert (choice is None) == (not costs)
            if choice is None:
                continue
            worker = choice.pod, choice.rank
            assert worker in equals
            reused = slow.finds(worker, number, n)[0]
            assert (choice.cached_tokens, choice.prefill_tokens) == (reused, n - reused)
            assert choice.candidates == len(costs)
            assert math.isclose(choice.cost, costs[worker], abs_tol=1e-6)
            choices.append(choice)
            slow.open[choice.id] = {"worker": worker, "prefill": n - reused, "n": n, "ends": now + 60}
            slow.given[worker].append((now, n - reused + context * n + 3.0))
        elif what == "wait":
            clock.now += number
        elif what == "state" and number < len(names):
            for rank in range(len(fleet[names[number]][1])):
                index.mark_worker(names[number], rank, more)
            slow.state[names[number]] = more
        elif what in ("prefilled", "finished") and number < len(choices):
            choice = choices[number]
            if not choice._open:
                continue
            getattr(picker, what)(choice)
            if what == "finished":
                slow.open.pop(choice.id, None)
            elif choice.id in slow.open:
                slow.open[choice.id]["prefill"] = 0
    now = clock.now
    left = [each for each in slow.open.values() if each["ends"] > now]
    stats = picker.stats()
    assert stats["in_flight"] == len(left)
    for worker, figures in stats["workers"].items():
        mine = [each for each in left if each["worker"] == worker]
        assert figures == {
            "requests": len(mine),
            "prefill_tokens": sum(each["prefill"] for each in mine),
            "context_tokens": sum(each["n"] for each in mine),
        }
    index._check()


# ---- common faults of routers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [False, True])
def test_one_system_prompt_draws_no_herd(finish):
    _, index, picker = make(16)
    pods = ["a", "b", "c", "d"]
    exact(index, *pods)
    system = list(range(16))
    store(index, "a", system)
    counts = Counter()
    for i in range(1000):
        choice = picker.pick(
            np.arange(16 + 10_000 * i, 2016 + 10_000 * i) if i % 2 else [*system, *range(50_000, 52_000)]
        )
        counts[choice.pod] += 1
        if finish:
            picker.finished(choice)
    assert set(counts) == set(pods)
    assert max(counts.values()) <= 1.1 * 1000 / 4


def test_a_dead_pod_gets_nothing_and_comes_back():
    _, index, picker = make()
    exact(index, "a", "b")
    store(index, "a", SHARED)
    assert picker.pick(SHARED).pod == "a"
    index.mark_worker("a", 0, "stale")
    assert {picker.pick(SHARED).pod for _ in range(20)} == {"b"}
    index.mark_worker("b", 0, "stale")
    assert picker.pick(SHARED) is None
    assert picker.stats()["unplaced"] == 1
    index.mark_worker("a", 0, "exact")
    assert picker.pick(SHARED).pod == "a"


def test_degraded_pods_by_choice():
    for degraded, expected in ((True, "a"), (False, "b")):
        _, index, picker = make(degraded=degraded)
        exact(index, "a", "b")
        store(index, "a", SHARED)
        index.mark_worker("a", 0, "degraded")
        assert picker.pick(SHARED).pod == expected


def test_equal_prompts_that_arrive_together_go_to_one_pod_until_they_weigh_too_much():
    clock, index, picker = make(speculative_ttl=2.0, context_weight=0.0, request_weight=0.0)
    exact(index, "a", "b", "c")
    new = list(range(70, 70 + 10 * SIZE))
    # The prefill of the first prompt waits there, and is as long as the prompt that the others would compute.
    first = picker.pick(new)
    picker.prefilled(first)
    assert {picker.pick(new).pod for _ in range(10)} == {first.pod}
    # No event has come, so no pod holds it after the time to live.
    clock.now += 2.5
    assert index.match_prefix(new).tokens == {}


def test_a_prompt_that_is_wholly_held_makes_no_speculative_entry():
    _, index, picker = make(speculative_ttl=2.0)
    store(index, "a", SHARED)
    picker.pick(SHARED)
    assert index.stats()["guesses"] == 0
    picker.pick([*SHARED, *range(SIZE)])
    assert index.stats()["guesses"] == 1


def test_work_goes_to_ranks():
    _, index, picker = make()
    for rank in range(3):
        index.mark_worker("a", rank, "exact")
    store(index, "a", SHARED, dp_rank=1)
    assert (picker.pick(SHARED).pod, picker.pick(SHARED).rank) == ("a", 1)
    assert Counter(picker.pick(list(range(50 * i, 50 * i + 40))).rank for i in range(1, 31)).keys() == {0, 1, 2}


def test_a_single_rank_need_not_be_rank_0():
    _, index, picker = make()
    index.configure_pod("a", engine="vllm")
    assert picker.pick(SHARED) is None
    index.mark_worker("a", 5, "exact")
    choice = picker.pick(SHARED)
    assert (choice.rank, choice.candidates) == (5, 1)


def test_pods_of_another_model_are_no_candidates():
    _, index, picker = make()
    store(index, "a", SHARED, model="llama")
    store(index, "b", SHARED, model="other")
    assert {picker.pick(list(range(9)), model="llama").pod for _ in range(4)} == {"a"}
    assert picker.pick(SHARED, model="third") is None
    # A caller that names the pods must know their models.
    assert picker.pick(SHARED, model="third", pods=["b"]).pod == "b"


def test_a_removed_pod_takes_its_load_and_figures_along_and_is_not_opened_again():
    _, index, picker = make(speculative_ttl=2.0)
    exact(index, "a")
    choice = picker.pick(SHARED)
    picker.finished(picker.pick(SHARED), cached_tokens=0)
    index.remove_pod("a")
    picker.finished(choice, cached_tokens=3)
    stats = picker.stats()
    assert (stats["workers"], stats["pods"], stats["in_flight"]) == ({}, {}, 0)
    assert index.stats()["pods"] == 0
    exact(index, "a")
    assert picker.stats()["workers"] == {("a", 0): {"requests": 0, "prefill_tokens": 0, "context_tokens": 0}}


def test_a_pod_that_joins_late_is_not_flooded_by_ties():
    _, index, picker = make(half_life=1e6)
    exact(index, "a")
    for i in range(100):
        picker.finished(picker.pick([i] * 8))
    exact(index, "b")
    counts = Counter()
    for i in range(100):
        choice = picker.pick([i] * 8)
        counts[choice.pod] += 1
        picker.finished(choice)
    assert counts["a"] == counts["b"] == 50


# ---- reservations ---------------------------------------------------------------------------------------------------


def test_what_is_never_finished_expires():
    clock, index, picker = make(reservation_ttl=10.0)
    exact(index, "a")
    old = picker.pick(SHARED)
    clock.now += 9.0
    young = picker.pick(SHARED)
    clock.now += 2.0
    stats = picker.stats()
    assert (stats["in_flight"], stats["expired"], stats["workers"]["a", 0]["requests"]) == (1, 1, 1)
    picker.prefilled(old)
    picker.finished(old, cached_tokens=0)
    picker.finished(young)
    assert picker.stats()["late"] == 1
    assert picker.stats()["workers"]["a", 0] == {"requests": 0, "prefill_tokens": 0, "context_tokens": 0}


def test_reservations_are_bounded():
    _, index, picker = make(max_in_flight=10)
    exact(index, "a")
    choices = [picker.pick([i]) for i in range(25)]
    assert (picker.stats()["in_flight"], picker.stats()["expired"]) == (10, 15)
    for choice in choices:
        picker.finished(choice)
    assert picker.stats()["workers"]["a", 0]["requests"] == 0


def test_wrong_use_is_named():
    _, index, picker = make()
    exact(index, "a")
    choice = picker.pick(SHARED)
    other = EndpointPicker(index)
    for wrong in (None, "a", 3):
        with pytest.raises(InvalidValueError, match="not a choice of this picker"):
            picker.finished(wrong)
    with pytest.raises(KVIndexError, match="not a choice of this picker"):
        other.finished(choice)
    with pytest.raises(InvalidValueError, match=f"cached_tokens is 25; it must be 0 to {len(SHARED)}"):
        picker.finished(choice, cached_tokens=len(SHARED) + 1)
    picker.finished(choice)
    for again in (picker.finished, picker.prefilled):
        with pytest.raises(KVIndexError, match=r"choice 1 \(pod a\) was finished before"):
            again(choice)
    for wrong in ([-1], b"abcd", "x", None):
        with pytest.raises((InvalidValueError, InvalidTypeError)):
            picker.pick(wrong)
    with pytest.raises(InvalidValueError, match="labels"):
        picker.pick(SHARED, labels={"role": "decode"})
    assert picker.stats()["in_flight"] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"credit": {"GPU": 1.5}}, "credit of GPU is 1.5; it must be 0 to 1"),
        ({"credit": 0.5}, "credit is 0.5; it must be a mapping"),
        ({"tie": -1}, "tie is -1"),
        ({"half_life": 0}, "half_life is 0; it must be more than 0"),
        ({"reservation_ttl": 0}, "reservation_ttl"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"context_weight": math.nan}, "context_weight"),
        ({"degraded": "no"}, "degraded"),
        ({"manager": 3}, "manager is 3; it must be an EventManager"),
        ({"clock": 3}, "clock"),
    ],
)
def test_wrong_arguments_are_named(options, named):
    with pytest.raises((InvalidValueError, InvalidTypeError), match=named):
        EndpointPicker(PrefixIndex(), **options)
    with pytest.raises(InvalidTypeError, match="index is 16"):
        EndpointPicker(16)


def test_threads_leave_no_load_behind():
    index = PrefixIndex(block_size=SIZE)
    exact(index, "a", "b", "c")
    picker = EndpointPicker(index, speculative_ttl=0.001)
    wrong = []

    def route(seed):
        try:
            for i in range(300):
                choice = picker.pick([seed, i] * 8)
                if i % 3:
                    picker.prefilled(choice)
                picker.finished(choice, cached_tokens=0)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=route, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = picker.stats()
    assert (wrong, stats["picks"], stats["in_flight"]) == ([], 1200, 0)
    assert all(set(figures.values()) == {0} for figures in stats["workers"].values())
    assert sum(figures["requests"] for figures in stats["pods"].values()) == 1200
    assert sum(stats["pick_seconds"]["buckets"]) == 1200
    index._check()


# ---- sources --------------------------------------------------------------------------------------------------------


class Manager:
    """The methods of EventManager that a picker calls."""

    def __init__(self, *sources):
        self.sources = {source.name: source for source in sources}
        self.callbacks = []

    def pods(self):
        return dict(self.sources)

    def on_pods(self, callback):
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def follow(self, source):
        self.sources[source.name] = source
        for callback in self.callbacks:
            callback(None)


def source(name, model="", **labels):
    return PodSource(name, endpoint="tcp://127.0.0.1:1", model=model, address=f"http://{name}:8000", labels=labels)


def test_roles_models_and_addresses_come_from_sources():
    index = PrefixIndex(block_size=SIZE)
    manager = Manager(source("p", role="prefill"), source("d", role="decode"), source("m", "llama", role="decode"))
    exact(index, "p", "d", "m", "unfollowed")
    picker = EndpointPicker(index, manager)

    def picked(**options):
        choices = [picker.pick(SHARED, **options) for _ in range(12)]
        for choice in choices:
            picker.finished(choice)
        return {choice.pod for choice in choices}

    assert picked() == {"p", "d"}
    assert picked(labels={"role": "decode"}) == {"d"}
    assert picked(labels={"role": "decode"}, model="llama") == {"m"}
    assert picked(labels={"role": "decode"}, pods=["p", "m"]) == {"m"}
    assert picked(pods=index.pod_set(["unfollowed"])) == {"unfollowed"}
    assert picker.pick(SHARED, labels={"role": "encode"}) is None
    assert picker.pick(SHARED, pods=[]) is None
    assert picker.pick(SHARED, labels={"role": "prefill"}).address == "http://p:8000"
    manager.follow(source("d2", role="decode"))
    exact(index, "d2")
    assert picked(labels={"role": "decode"}) == {"d", "d2"}
    picker.close()
    picker.close()
    assert manager.callbacks == []
    with pytest.raises(InvalidTypeError, match="labels is"):
        picker.pick(SHARED, labels="decode")


def test_a_model_that_no_pod_serves_is_logged_once(caplog):
    index = PrefixIndex(block_size=SIZE)
    manager = Manager(source("a", "sim"), source("b", "sim"))
    exact(index, "a", "b")
    picker = EndpointPicker(index, manager)
    for _ in range(3):
        assert picker.pick(SHARED) is None
        assert picker.pick(SHARED, model="sim") is not None
    (told,) = caplog.messages
    assert "no pod serves model ''; the pods were added with 'sim'" in told
    index.mark_worker("a", 0, "stale")
    index.mark_worker("b", 0, "stale")
    assert picker.pick(SHARED, model="sim") is None
    assert len(caplog.messages) == 1


def test_a_pod_of_which_the_index_has_no_block_is_explained_by_that(caplog):
    index = PrefixIndex(block_size=SIZE)
    exact(index, "a")
    picker = EndpointPicker(index)
    for prompt in grown():
        choice = picker.pick(prompt)
        picker.finished(choice, cached_tokens=SIZE)
    (told,) = caplog.messages
    assert "the index has no block of it" in told


# ---- expected and reported ------------------------------------------------------------------------------------------


def served(picker, prompts, reports):
    """Pick and finish each prompt, and report the engine's cached tokens given the prompt length and the estimate."""
    for prompt in prompts:
        choice = picker.pick(prompt)
        picker.finished(choice, cached_tokens=reports(len(prompt), choice.cached_tokens))


def grown():
    return [[*SHARED, *range(50, 50 + i % 7)] for i in range(40)]


@pytest.mark.parametrize(
    ("prompts", "reports", "reason"),
    [
        (grown(), lambda n, expected: expected, ""),
        ([SHARED] * 40, lambda n, expected: expected - SIZE, "engine='vllm'"),
        (grown(), lambda n, expected: expected - SIZE, "eagle=True"),
        (grown(), lambda n, expected: 0, "prefix caching is off"),
        (grown(), lambda n, expected: expected - (n % 3), "most of its requests reuse less"),
        ([[7, *SHARED]] * 40, lambda n, expected: len(SHARED), "with the first token one too many"),
        ([SHARED[1:]] * 40, lambda n, expected: len(SHARED) - SIZE, "chat template"),
    ],
)
def test_a_pod_that_is_systematically_wrong_is_explained_once(caplog, prompts, reports, reason):
    caplog.set_level(logging.WARNING, "kvindex.routing")
    _, index, picker = make()
    exact(index, "a")
    store(index, "a", SHARED)
    served(picker, prompts, reports)
    said = [record.getMessage() for record in caplog.records]
    if not reason:
        assert said == []
        assert picker.stats()["pods"]["a"]["reason"] == ""
        return
    assert reason in said[-1]
    assert said[-1].startswith("pod a: ")
    assert len(said) <= 3
    # Correct reports end the warning.
    served(picker, grown() * 2, lambda n, expected: expected)
    assert picker.stats()["pods"]["a"]["reason"] == ""


def test_a_first_token_that_the_router_leaves_out_is_found(caplog):
    _, index, picker = make()
    exact(index, "a")
    bos = [7, 7, *SHARED]
    store(index, "a", bos[: len(bos) // SIZE * SIZE])
    served(picker, [bos[1:]] * 40, lambda n, expected: 4 * SIZE)
    assert "with the first token one too few (BOS?) they agree" in caplog.text


def test_errors_are_counted_by_pod():
    _, index, picker = make()
    exact(index, "a")
    store(index, "a", SHARED)
    for error in (0, 0, 1, -2, 20):
        choice = picker.pick([*SHARED, 1, 2, 3])
        picker.finished(choice, cached_tokens=choice.cached_tokens - error)
    assert picker.stats()["pods"]["a"] == {
        "requests": 5,
        "expected_tokens": 5 * len(SHARED),
        "reported_tokens": 5 * len(SHARED) - 19,
        "over_tokens": 21,
        "under_tokens": 2,
        "error_buckets": [2, 2, 1, 0, 0, 0, 0, 0],
        "reason": "",
    }
    picker.finished(picker.pick(SHARED))
    assert picker.stats()["pods"]["a"]["requests"] == 5

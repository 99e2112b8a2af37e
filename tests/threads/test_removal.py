"""A pod is removed while other calls use its name: afterwards, the name works like a new one."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable

import numpy as np
import pytest
from support import payload, stored, together
from sync_support import BRISK, LivePublisher, until

import kvindex
from kvindex import AllBlocksCleared, BlockRemoved, BlockStored, EventManager, PodSource, PrefixIndex, UnknownPodError

TOKENS = np.arange(400, dtype=np.uint32)
LONG = payload(stored(list(range(1, 101)), TOKENS.tolist()))
SHORT = payload(stored([1], TOKENS[:4].tolist()))
LARGE = payload(stored(list(range(1, 1001)), list(range(4000))))
SEVERAL = payload(*(stored([1000 + i], [i] * 4) for i in range(300)))

NAMING: dict[str, Callable[[PrefixIndex], object]] = {
    "ingest": lambda index: index.ingest("a", SHORT),
    "ingest of several turns": lambda index: index.ingest("a", SEVERAL, seq=0),
    "ingest without the interpreter": lambda index: index.ingest("a", LARGE),
    "ingest of garbage": lambda index: index.ingest("a", b"\xc1"),
    "add_prefix": lambda index: index.add_prefix("a", TOKENS, ttl=2.0),
    "match": lambda index: dict(index.match_prefix(TOKENS)),
    "match[pod]": lambda index: index.match_prefix(TOKENS)["a"],
    "ready_pods": lambda index: index.match_prefix(TOKENS, ready_pods=["a"]).best(),
    "stored": lambda index: index.process_block_stored(
        BlockStored(pod="a", block_hashes=[1], token_ids=TOKENS[:4], block_size=4)
    ),
    "removed": lambda index: index.process_block_removed(BlockRemoved(pod="a", block_hashes=[1])),
    "cleared": lambda index: index.process_all_blocks_cleared(AllBlocksCleared(pod="a")),
    "configure_pod": lambda index: index.configure_pod("a", max_blocks=0),
    "clear_worker": lambda index: index.clear_worker("a"),
    "mark_worker": lambda index: index.mark_worker("a", 0, "degraded"),
    "pod_state": lambda index: index.pod_state("a"),
    "worker_stats": lambda index: index.worker_stats("a"),
    "stream_places": lambda index: index.stream_places("a"),
    "remove_pod": lambda index: index.remove_pod("a"),
}


def beside(jobs: list[Callable[[], object]], main: Callable[[], None]) -> None:
    """Run `main` here while each job runs in a thread of its own, even if some of its calls are refused."""

    def again(job: Callable[[], object]) -> None:
        with contextlib.suppress(UnknownPodError, kvindex.EventDecodeError):
            job()

    together(*(functools.partial(again, job) for job in jobs), main=main)


def assert_stored(index: PrefixIndex) -> None:
    """An engine's events under the name are stored: the name is alive, without another removal that would free it."""
    report = index.ingest("a", LONG)
    assert (report.stored, report.skipped) == (100, 0), report


def assert_alive(index: PrefixIndex) -> None:
    """The same without other threads. The pod's removal also removes all its blocks."""
    assert_stored(index)
    assert index.match_prefix(TOKENS).tokens == {"a": 400}
    index._check()
    index.remove_pod("a")
    with pytest.raises(UnknownPodError):
        index.pod_state("a")
    assert index.match_prefix(TOKENS).tokens == {}
    assert_stored(index)
    assert index.pod_state("a") == "exact"


@pytest.mark.parametrize("call", NAMING)
def test_a_name_outlives_every_race_with_its_removal(call):
    index, job = PrefixIndex(4), NAMING[call]
    index.ingest("b", SEVERAL)

    def remove() -> None:
        for _ in range(400):
            if call != "remove_pod":
                assert_stored(index)
            else:
                index.ingest("a", LONG)
            with contextlib.suppress(UnknownPodError):
                index.remove_pod("a")

    beside([lambda: job(index), lambda: job(index), lambda: index.ingest("b", SEVERAL)], remove)
    assert_alive(index)


def test_a_name_outlives_all_calls_at_once():
    index = PrefixIndex(4)

    def remove() -> None:
        for _ in range(400):
            assert_stored(index)
            index.remove_pod("a")

    beside([lambda job=job: job(index) for name, job in NAMING.items() if name != "remove_pod"], remove)
    assert_alive(index)


def test_of_two_who_remove_a_pod_one_does():
    for _ in range(100):
        index, done = PrefixIndex(4), []
        index.ingest("a", LONG)
        start = threading.Barrier(4)

        def remove(index=index, done=done, start=start) -> None:
            start.wait()
            with contextlib.suppress(UnknownPodError):
                index.remove_pod("a")
                done.append(None)

        threads = [threading.Thread(target=remove) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 1


def test_what_is_on_its_way_to_a_removed_pod_is_dropped_and_says_so():
    """No batch opens a pod again that was removed while the batch waited or ran. Its report counts the dropped part."""
    index, reports = PrefixIndex(4), []
    batch = payload(*(stored([1000 + i], [i] * 4) for i in range(2000)))

    def ingest() -> None:
        index.configure_pod("a")
        reports.append(index.ingest("a", batch))

    def remove() -> None:
        while sum(report.skipped for report in reports) == 0 and len(reports) < 3000:
            with contextlib.suppress(UnknownPodError):
                index.remove_pod("a")

    beside([ingest], remove)
    dropped = [report for report in reports if report.skipped]
    assert dropped, "nothing was ever dropped"
    for report in dropped:
        assert report.reasons == {"pod_removed": report.skipped}
        assert report.stored + report.skipped == 2000
    assert_alive(index)


def test_a_manager_removes_pods_beside_routers_that_confirm():
    """The use in production: streams feed, discovery removes and adds pods, routers query and call add_prefix."""
    index = PrefixIndex(4)
    with LivePublisher() as pod, EventManager(index, policy=BRISK) as manager:
        pod.publish()
        tokens = pod.chain(0)

        def route() -> None:
            index.match_prefix(tokens, model="m").best()
            index.add_prefix(pod.name, tokens[:4], ttl=2.0, model="m")
            index.pod_state(pod.name)

        def come_and_go() -> None:
            for _ in range(12):
                manager.add_pod(PodSource(pod.name, ranks=pod.ranks, model="m"))
                manager.remove_pod(pod.name)

        beside([route, route, route], come_and_go)
        with contextlib.suppress(UnknownPodError):
            index.remove_pod(pod.name)  # a router may have named it last
        manager.add_pod(PodSource(pod.name, ranks=pod.ranks, model="m"))
        pod.publish()
        tokens = pod.chain(0)
        until(lambda: index.match_prefix(tokens, model="m").tokens == {pod.name: len(tokens)})
        until(lambda: index.pod_state(pod.name) == "exact")
    index._check()

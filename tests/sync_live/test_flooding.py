"""A pod over its limit among pods below theirs, on real sockets, for both directions of the connection."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from rich.console import Console
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import InvalidTypeError, PodSource, PrefixIndex
from kvindex.cli import top
from kvindex.sync.manager import EventManager

RATE, BURST, FLOOD = 1000.0, 0.2, 1500


@pytest.fixture
def index():
    return PrefixIndex(block_size=4)


@pytest.fixture
def manager(index):
    with nothing_left_behind(), EventManager(index, policy=replace(BRISK, burst=BURST)) as made:
        yield made


def whole(index: PrefixIndex, pod: LivePublisher) -> bool:
    chain = pod.chain()
    return index.match_prefix(chain, model="m").tokens.get(pod.name, 0) == len(chain)


def shown(view: top.View) -> str:
    with Console(width=200) as console, console.capture() as capture:
        console.print(view.table(width=200))
    return capture.get()


@pytest.mark.parametrize("bound", [False, True])
def test_a_flood_is_slowed_down_and_the_others_are_not(index, manager, bound):
    """All batches arrive in the end, because the queues have room for them, but never faster than the limit."""
    names = ["flood", "quiet", "other"]
    times = []
    manager.tap(lambda item: times.append(time.monotonic()) if item.pod == "flood" else None)
    endpoint = manager.bind("tcp://127.0.0.1:*", max_event_rate=RATE) if bound else None
    with ExitStack() as stack:
        options = {"connect": True, "endpoint": endpoint, "replay_endpoint": None} if bound else {}
        pods = {name: stack.enter_context(LivePublisher(name=name, **options)) for name in names}
        if not bound:
            for name, pod in pods.items():
                manager.add_pod(PodSource(name, ranks=pod.ranks, model="m", max_event_rate=RATE))
            assert manager.wait_until_current(30.0)
        for pod in pods.values():
            until(lambda pod=pod: pod.publish() or manager.status().get(pod.name) or time.sleep(0.01))
            pod.publish(clear=True)  # batches from before the connection no longer matter
        view = top.View(manager)
        started, before = time.monotonic(), len(times)
        pods["flood"].publish(FLOOD)
        while not whole(index, pods["flood"]) and time.monotonic() < started + 60.0:
            for name in ("quiet", "other"):
                pods[name].publish()
                until(lambda name=name: whole(index, pods[name]))
            time.sleep(0.005)  # keeps them below their own limits
        assert whole(index, pods["flood"])
        until(lambda: manager.is_current())
        assert {name: index.pod_state(name) for name in names} == dict.fromkeys(names, "exact")
        for count, at in enumerate(times[before:]):
            assert count <= RATE * (at - started + BURST) + 1
        status = manager.status()
        assert status["flood"].throttled > 0
        assert [status[name].throttled for name in ("quiet", "other")] == [0, 0]
        assert "throttled" in shown(view)


def test_nobody_is_limited_who_was_not_told_to_be(index, manager):
    with LivePublisher(name="a") as pod:
        manager.add_pod(PodSource("a", ranks=pod.ranks, model="m"))
        assert manager.wait_until_current(30.0)
        pod.publish(FLOOD)
        until(lambda: whole(index, pod))
        assert manager.status()["a"].throttled == 0
        assert "throttled" not in shown(top.View(manager))


def test_a_rate_that_is_none_is_refused_where_pods_connect_to(manager):
    with pytest.raises(InvalidTypeError, match="max_byte_rate"):
        manager.bind("tcp://127.0.0.1:*", max_byte_rate="fast")

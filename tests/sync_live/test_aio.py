"""The manager in an event loop: the same streams, no blocked thread of the loop, and a clean end in every case."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import subprocess
import sys
import threading

import pytest
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import InvalidTypeError, InvalidValueError, PodSource, PrefixIndex, StreamError, UnknownPodError
from kvindex.aio import AsyncEventManager

LONG = 20.0


@pytest.fixture
def index():
    return PrefixIndex(block_size=4)


@pytest.fixture
def pod():
    with LivePublisher() as made:
        yield made


def manager_of(index):
    return AsyncEventManager(index, policy=BRISK)


def source(pod, **options):
    return PodSource(pod.name, **{"ranks": pod.ranks, "model": "m", **options})


def run(main):
    """Run an event loop in which no task or resource may be left over: warnings are errors here."""
    with nothing_left_behind():
        return asyncio.run(main(), debug=True)


async def becomes(done):
    async with asyncio.timeout(LONG):
        while not done():
            await asyncio.sleep(0.005)


def test_a_pod_is_followed(index, pod):
    async def main():
        async with manager_of(index) as manager:
            pod.publish(5)
            await manager.add_pod(source(pod))
            assert await manager.wait_until_current(LONG)
            assert manager.is_current()
            assert await manager.wait_until_exact(LONG) == {}
            assert (manager.is_exact(), manager.inexact()) == (True, {})
            assert index.match_prefix(pod.chain(), model="m", only_exact=True).best() == ("pod", 20)
            pod.publish(2)
            await becomes(lambda: manager.status()["pod"].last_seq == 6)
            assert index.match_prefix(pod.chain(), model="m").tokens == {"pod": 28}
            await manager.remove_pod("pod")
            assert manager.status() == {}
            assert manager.faults() == {}
        assert manager.manager.closed

    run(main)


def test_a_pod_connects_to_a_bound_endpoint(index):
    async def main():
        async with manager_of(index) as manager:
            endpoint = await manager.bind("tcp://127.0.0.1:*", presence="set")
            with LivePublisher(endpoint=endpoint, replay_endpoint=None, connect=True) as pod:
                await becomes(lambda: pod.publish() or "pod" in manager.status())
                assert await manager.wait_until_current(LONG, pods="pod")

    run(main)


def test_errors_are_those_of_the_manager(index, pod):
    async def main():
        manager = manager_of(index)
        async with manager:
            await manager.add_pod(source(pod))
            with pytest.raises(StreamError, match="followed already"):
                await manager.add_pod(source(pod))
            with pytest.raises(InvalidTypeError):
                await manager.add_pod("pod")
            with pytest.raises(InvalidValueError):
                await manager.add_pod(source(pod, block_size=3).named("other"))
            with pytest.raises(UnknownPodError):
                await manager.remove_pod("other")
            with pytest.raises(UnknownPodError):
                await manager.wait_until_current(pods=["other"])
            with pytest.raises(InvalidValueError):
                await manager.bind("nonsense")
        await manager.close()
        for refused in (manager.add_pod(source(pod)), manager.remove_pod("pod"), manager.bind("tcp://127.0.0.1:*")):
            with pytest.raises(StreamError, match="closed"):
                await refused
        assert not await manager.wait_until_current(LONG)

    run(main)


def test_the_event_loop_goes_on_while_the_managers_thread_does_not(index, pod):
    """The manager's thread is blocked until the event loop releases it, so the loop must go on meanwhile."""

    async def main():
        async with manager_of(index) as manager:
            for call in (
                lambda: manager.add_pod(source(pod)),
                lambda: manager.wait_until_current(LONG),
                lambda: manager.bind("tcp://127.0.0.1:*"),
                lambda: manager.remove_pod("pod"),
                manager.close,
            ):
                free = threading.Event()
                held = manager.manager.post(lambda free=free: free.wait(LONG))
                task = asyncio.create_task(call())
                for _ in range(3):
                    await asyncio.sleep(0)
                manager.status()
                free.set()
                await task
                assert await asyncio.wrap_future(held), "it was the time that set it free"

    run(main)


def test_waiting_ends_in_time(index):
    async def main():
        async with manager_of(index) as manager:
            assert await manager.wait_until_current(0)  # without pods, all of them are current
            await manager.add_pod(PodSource("absent", endpoint="tcp://127.0.0.1:1"))
            assert not await manager.wait_until_current(0)
            assert not await manager.wait_until_current(0.05)
            assert not manager.is_current()
            waits = [asyncio.create_task(manager.wait_until_current(pods=pods)) for pods in (None, "absent")]
            await asyncio.sleep(0.01)
            await manager.remove_pod("absent")
            assert await waits[0]
            with pytest.raises(UnknownPodError):
                await waits[1]
            await manager.add_pod(PodSource("absent", endpoint="tcp://127.0.0.1:1"))
            wait = asyncio.create_task(manager.wait_until_current())
            await asyncio.sleep(0.01)
            await manager.close()
            assert not await wait

    run(main)


# Changes


def test_changes_come_one_by_one_until_the_manager_is_closed(index):
    async def main():
        seen = []
        async with manager_of(index) as manager:
            changes = manager.changes()
            with LivePublisher() as pod:
                await manager.add_pod(source(pod))
                seen.append(await anext(changes))
            seen.append(await anext(changes))
            rest = asyncio.create_task(anext(changes, None))
            await asyncio.sleep(0)
        assert await rest is None
        assert [change async for change in changes] == []
        assert [(change.pod, change.rank, change.old, change.new) for change in seen] == [
            ("pod", 0, "stale", "exact"),
            ("pod", 0, "exact", "stale"),
        ]
        assert seen[1].reason

    run(main)


def test_changes_end_when_a_manager_is_closed_that_was_never_used(index):
    async def main():
        manager = manager_of(index)
        waiting = asyncio.create_task(anext(manager.changes(), None))
        await asyncio.sleep(0)
        await manager.close()
        assert await waiting is None

    run(main)


def test_changes_that_nobody_takes_are_bounded_and_counted(index):
    async def main():
        async with manager_of(index) as manager:
            slow, quick = manager.changes(limit=3), manager.changes()
            with LivePublisher(ranks=4) as pod:
                for _ in range(2):
                    await manager.add_pod(source(pod))
                    assert await manager.wait_until_current(LONG)
                    await manager.remove_pod("pod")
            assert [(await anext(slow)).rank for _ in range(3)] == [
                change.rank for change in [await anext(quick) for _ in range(8)][-3:]
            ]
            assert (slow.dropped, quick.dropped) == (5, 0)

    run(main)


def test_changes_that_are_left_or_closed_are_not_fed_any_more(index, pod):
    async def main():
        async with manager_of(index) as manager:
            inner = manager.manager
            changes = manager.changes()
            await manager.add_pod(source(pod))
            async for _ in changes:
                break
            del changes
            gc.collect()
            assert not inner._fleet.on_change + inner._fleet.wakers
            changes = manager.changes()
            waiting = asyncio.create_task(anext(changes, None))
            await asyncio.sleep(0)
            await changes.aclose()
            await changes.aclose()
            assert await waiting is None
            assert not inner._fleet.on_change + inner._fleet.wakers

    run(main)


# Cancelled, closed, left open


def test_what_is_cancelled_before_it_began_never_happens(index, pod):
    async def main():
        async with manager_of(index) as manager:
            free = threading.Event()
            held = manager.manager.post(lambda: free.wait(LONG))
            task = asyncio.create_task(manager.add_pod(source(pod)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            free.set()
            assert await asyncio.wrap_future(held)
            await manager.bind("tcp://127.0.0.1:*")  # the thread is alive and has passed that call
            assert manager.status() == {}

    run(main)


def test_a_wait_that_is_cancelled_leaves_nothing(index):
    async def main():
        async with manager_of(index) as manager:
            await manager.add_pod(PodSource("absent", endpoint="tcp://127.0.0.1:1"))
            task = asyncio.create_task(manager.wait_until_current())
            await becomes(lambda: manager.manager._fleet.wakers)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not manager.manager._fleet.wakers
            with pytest.raises(TimeoutError):  # the caller's timeout, which must not be mistaken for the wait's own
                async with asyncio.timeout(0.01):
                    await manager.wait_until_current(LONG)

    run(main)


def test_a_close_that_is_cancelled_closes_all_the_same(index, pod):
    async def main():
        manager = manager_of(index)
        await manager.add_pod(source(pod))
        free = threading.Event()
        held = manager.manager.post(lambda: free.wait(LONG))
        task = asyncio.create_task(manager.close())
        await becomes(lambda: manager.manager.closed)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        free.set()
        assert await asyncio.wrap_future(held)

    run(main)
    assert index.pod_state("pod") == "stale"


def test_a_loop_that_is_closed_leaves_the_streams_alone(index, caplog):
    """A manager that was not closed goes on, and logs nothing about the loop that has ended."""
    manager = manager_of(index)
    kept = []

    async def main(pod):
        kept.append(manager.changes())
        await manager.add_pod(source(pod))
        assert await manager.wait_until_current(LONG)
        kept.append(manager.changes())
        kept.append(asyncio.create_task(manager.wait_until_current(pods="pod")))

    with nothing_left_behind(), caplog.at_level(logging.INFO, "kvindex"):
        with LivePublisher() as pod:
            asyncio.run(main(pod))
            pod.publish(3)
            until(lambda: manager.status()["pod"].last_seq == 2)
        until(lambda: manager.status()["pod"].state == "stale")
        assert index.pod_state("pod") == "stale"

        async def another():
            return await manager.wait_until_current(0)

        assert asyncio.run(another()) is False
        asyncio.run(manager.close())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_process_ends_with_one_warning_when_the_manager_is_still_open():
    code = """
import asyncio
from kvindex import PodSource, PrefixIndex
from kvindex.aio import AsyncEventManager

manager = AsyncEventManager(PrefixIndex())
async def main():
    manager.changes()
    await manager.add_pod(PodSource("a", endpoint="tcp://127.0.0.1:1"))
    await manager.wait_until_current(0.2)
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert re.findall("ResourceWarning: .*", done.stderr) == [
        "ResourceWarning: unclosed EventManager(PrefixIndex(block_size=16, 1 pod: 1 stale, 0 blocks, 0.0 MB), 1 pod)"
    ]

"""An index is trusted only while the loops that feed it show signs of life."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from sync_support import until

from kvindex import EventManager, PrefixIndex
from kvindex.sync import pulse
from kvindex.sync.loop import StreamLoop
from kvindex.sync.pulse import Pulse

MS, NEVER = 0.001, float("-inf")


class Told:
    def __init__(self) -> None:
        self.limits: list[float | None] = []
        self.resumed = 0
        self.pulse = Pulse(self.limits.append, self._resumed)

    def _resumed(self) -> None:
        self.resumed += 1


def test_a_loop_that_turns_is_believed_and_asked_for_twice_a_second() -> None:
    told, now = Told(), 100.0
    while now < 110.0:
        told.pulse.beat(now, NEVER)
        assert told.limits[-1] == now + pulse.SILENCE
        assert now + 0.4 < told.pulse.due < now + pulse.SILENCE / 2
        now = told.pulse.due
    assert told.resumed == 0


@pytest.mark.parametrize("pause", [0.9, 1.5, 1.99])
def test_a_pause_within_the_limit_ends_nothing(pause: float) -> None:
    told = Told()
    told.pulse.beat(100.0, NEVER)
    told.pulse.beat(100.0 + pause, NEVER)
    assert told.limits == [102.0, 102.0 + pause]
    assert told.resumed == 0


def test_after_a_pause_the_messages_come_first() -> None:
    told = Told()
    told.pulse.beat(100.0, NEVER)
    for now in (104.0, 104.1, 104.249):
        told.pulse.beat(now, NEVER)
        assert told.limits == [102.0]
        assert told.pulse.due == 104.25
    assert told.pulse.lapsed
    told.pulse.beat(104.25, NEVER)
    assert told.limits == [102.0, 106.25]
    assert told.resumed == 1


def test_after_a_pause_all_messages_come_first() -> None:
    told = Told()
    told.pulse.beat(100.0, NEVER)
    told.pulse.beat(104.0, NEVER)
    now = 104.25
    while now < 106.0:  # a backlog
        told.pulse.beat(now, now - MS)
        assert told.limits == [102.0]
        assert now < told.pulse.due <= now + 0.1
        now = told.pulse.due
    told.pulse.beat(106.0, 105.99)
    assert told.limits == [102.0]
    told.pulse.beat(106.1, 105.99)
    assert told.limits == [102.0, 108.1]


def test_a_flood_is_not_waited_for_for_ever() -> None:
    told, now = Told(), 104.0
    told.pulse.beat(100.0, NEVER)
    while now < 120.0 and not told.resumed:
        told.pulse.beat(now, now)
        now = told.pulse.due
    assert 114.0 < now < 115.0
    assert told.limits[-1] is not None


def test_a_loop_tells_when_it_left_messages() -> None:
    loop = StreamLoop(
        context=None, hurries=lambda: True, ending=lambda: None, ended=lambda: None, pulse=Pulse(None, lambda: None)
    )
    seen: list[float] = []

    class Backlog:
        closed = False
        left = 5

        def ready(self, now: float) -> bool:
            seen.append(loop.behind_at)
            self.left -= 1
            return self.left > 0

    loop.start()
    handler = Backlog()
    began = time.monotonic()
    loop.call(lambda: loop.again(handler))
    until(lambda: not handler.left)
    loop.close()
    assert seen[0] == NEVER
    assert began < seen[1] < seen[2] < seen[3] < seen[4] == loop.behind_at
    assert len(seen) == 5


def test_a_failing_callback_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("ours")

    limits: list[float | None] = []
    made = Pulse(limits.append, fails)
    for now in (100.0, 104.0, 104.25):
        made.beat(now, NEVER)
    assert limits == [102.0, 106.25]
    assert "ours" in caplog.text


def test_a_pause_while_messages_are_read_begins_anew() -> None:
    told = Told()
    told.pulse.beat(100.0, NEVER)
    told.pulse.beat(104.0, NEVER)
    told.pulse.beat(108.0, NEVER)
    assert (told.limits, told.pulse.due) == ([102.0], 108.25)


def test_its_end_takes_the_limit_back() -> None:
    told = Told()
    told.pulse.beat(time.monotonic(), NEVER)
    assert not told.pulse.lapsed
    told.pulse.end()
    assert told.limits[-1] is None
    assert told.pulse.due == float("inf")
    assert not told.pulse.lapsed


def test_an_index_without_limits_needs_no_signs_of_life() -> None:
    nothing = Pulse(None, lambda: None)
    nothing.beat(1.0, NEVER)
    nothing.end()
    assert nothing.due == float("inf")
    assert not nothing.lapsed


@pytest.fixture
def index() -> PrefixIndex:
    made = PrefixIndex(block_size=4)
    made.mark_worker("a", 0, "exact")
    return made


def test_the_earliest_of_several_limits_counts(index: PrefixIndex) -> None:
    now = time.monotonic()
    index._limit("first", now + 100)
    index._limit("second", now - 1)
    assert index.pod_state("a") == "stale"
    index.trust(None)
    assert index.pod_state("a") == "stale"
    index._limit("second", now + 100)
    assert index.pod_state("a") == "exact"
    index.trust(now - 1)
    index._limit("first", now + 200)
    assert index.pod_state("a") == "stale"
    index.trust(None)
    index._limit("first", None)
    index._limit("second", None)
    assert index.pod_state("a") == "exact"
    assert not index._limits


def beaten(manager: EventManager) -> bool:
    return manager._fleet.pulse._last is not None


def test_a_manager_limits_its_index_until_it_is_closed(index: PrefixIndex) -> None:
    manager, other = EventManager(index), EventManager(index)
    assert not hasattr(index, "_limits")
    with manager, other:
        until(lambda: beaten(manager) and beaten(other))
        assert len(index._limits) == 2
        assert index.pod_state("a") == "exact"
        index.trust(time.monotonic() - 1)
        assert index.pod_state("a") == "stale", "a manager does not extend what another caller has ended"
        index.trust(None)
        other.close()
        assert len(index._limits) == 1
    assert index._limits == {}
    assert index.pod_state("a") == "exact", "it was nobody's"


def test_a_manager_that_fails_or_is_forgotten_takes_its_limit_along(
    index: PrefixIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = EventManager(index)
    failing.start()
    until(lambda: beaten(failing))
    monkeypatch.setattr(failing._loop, "_turn", lambda: 1 / 0)
    failing._loop._poke()
    until(lambda: failing._loop.failure is not None and not index._limits)
    forgotten: Any = EventManager(index)
    forgotten.start()
    until(lambda: bool(index._limits))
    with pytest.warns(ResourceWarning):
        del forgotten
    until(lambda: not index._limits)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_child_is_not_limited_by_the_loop_of_its_parent(index: PrefixIndex) -> None:
    with EventManager(index) as manager:
        until(lambda: beaten(manager))
        if (child := os.fork()) == 0:
            index.mark_worker("a", 0, "exact")
            os._exit(0 if not index._limits and index.pod_state("a") == "exact" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert index._limits


def test_a_callback_that_takes_long_is_a_pause(index: PrefixIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENCE", 0.6)
    with EventManager(index) as manager:
        until(lambda: beaten(manager))

        def hold() -> None:
            until(lambda: index.pod_state("a") == "stale")

        manager.post(hold).result()
        assert manager._fleet.pulse.lapsed
        assert not manager.is_current()
        until(lambda: index.pod_state("a") == "exact")
        assert manager.is_current()

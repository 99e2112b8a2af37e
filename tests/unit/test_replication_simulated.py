"""Replication under simulated faults, by seed. The simulation must also detect faulty machines."""

from __future__ import annotations

from typing import Any

import pytest
from log_world import POLICY, Faults, World, Wrong, one

from kvindex.replication.collector import Collector
from kvindex.replication.entries import Beat, Hashed, Id, decode
from kvindex.replication.follower import Follower
from kvindex.replication.replica import Replica
from kvindex.replication.requests import Append, ReplicationPolicy, Wait

SEEDS = range(1, 5)
NOTHING = dict.fromkeys(Faults.__dataclass_fields__, 0.0)


@pytest.mark.parametrize(("seed", "shards"), [*((seed, 1) for seed in SEEDS), (4, 2)])
def test_no_answer_that_calls_itself_exact_is_older_than_it_may_be(seed: int, shards: int) -> None:
    world = one(seed, 10.0, shards=shards)
    assert world.exact > 100, "answers were looked at"
    assert len(world.happened) > 4, "and something had happened"


def test_a_seed_is_one_history() -> None:
    first, again = one(3, 4.0), one(3, 4.0)
    assert (first.steps, first.requests, first.exact) == (again.steps, again.requests, again.exact)
    assert first.server.entries == again.server.entries
    assert first.steps != one(4, 4.0).steps


def test_without_faults_everything_is_exact_and_nobody_is_replaced() -> None:
    world = World(1, faults=Faults(**NOTHING))
    world.run(20.0)
    assert world.exact / world.judged > 0.85
    assert sum(node.replica.takeovers for node in world.nodes) == 1
    assert sum(node.replica.follower.holes for node in world.nodes) == 0
    assert len(world.server.entries) < 15 / world.engines["p0"].every * 3, "the log is trimmed"


def collecting(world: World) -> dict[str, str]:
    """Return the collecting process of each shard."""
    return {node.name.partition(".")[2]: node.name.partition(".")[0] for node in world.nodes if node.collects}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_candidates_collect_a_shard_each_and_one_takes_both_where_it_is_alone(seed: int) -> None:
    world = World(seed, faults=Faults(**NOTHING), nodes=2, pods=6, shards=2)
    world.run(10.0)
    both = collecting(world)
    assert {*both} == {"0", "1"}
    assert len({*both.values()}) == 2
    gone = both["0"]
    for node in world.nodes:
        if node.name.startswith(gone):
            node.crash()
    moment = world.now
    while len(collecting(world)) < 2:
        world.run(world.now + 0.05)
    assert {*collecting(world).values()} == {"n0", "n1"} - {gone}
    assert world.now < moment + POLICY.lease + 2.0
    kept = {node.name: node.replica.takeovers for node in world.nodes if node.alive}
    assert sorted(kept.values()) == [1, 1], "the shard that it had stays undisturbed"


def test_a_silent_shard_makes_its_own_pods_stale_only() -> None:
    world = World(5, faults=Faults(**NOTHING), nodes=2, pods=6, shards=2)
    world.run(10.0)
    for node in world.nodes:
        node.replica.candidate = False
    silent = next(node for node in world.nodes if node.collects)
    silent.crash()
    world.run(world.now + 5.0)
    for node in world.nodes:
        if node.alive:
            lost = node.server is silent.server
            assert {node.claims(engine.name) is None for engine in node.engines} == {lost}


def caught(replica: type[Replica], faults: Faults, seeds: int = 60, **options: Any) -> str:
    """Return the failure that the simulation finds in a broken machine."""
    for seed in range(1, seeds):
        try:
            one(seed, 20.0, replica=replica, faults=faults, **options)
        except Wrong as wrong:
            return str(wrong)
    return ""


class CountsInTheServer(Replica):
    def _epoch(self, wall: float) -> int:
        return (self.follower.place or (0, 0))[0] % 1000 + 1


class ReadsOnBehindHoles(Follower):
    def _is_next(self, id: Id) -> bool:
        return True


class IgnoresHoles(Replica):
    follower_type = ReadsOnBehindHoles


class WritesOn(Collector):
    def _compare(self, tip: Id | None, now: float) -> Any:
        if tip is None or tip <= self.id:
            return super()._compare(tip, now)
        # Continues after another collector's entry, in that collector's epoch.
        self._unsure = False
        unsent = [data for _, data in self._unsent]
        self._unsent.clear()
        self._ring.clear()
        self.id = self.acked = tip
        for data in unsent:
            self._enter(data)
        return []

    def _leased(self, request: Any, answer: Any, now: float) -> Any:
        self._renew_at = now + self.policy.lease / 4
        return []


class IgnoresFencing(Replica):
    collector_type = WritesOn


@pytest.mark.parametrize(
    ("replica", "faults"),
    [
        (CountsInTheServer, {"server_empty": 3.0, "freeze": 3.0, "crash": 4.0, "cut": 3.0}),
        (IgnoresHoles, {"trim": 1.0, "freeze": 3.0}),
        (IgnoresFencing, {"freeze": 2.0}),
    ],
)
def test_the_simulation_finds_a_machine_that_is_wrong(replica: type[Replica], faults: dict[str, float]) -> None:
    assert caught(replica, Faults(**(NOTHING | faults)))


def appended(collector: Collector, now: float) -> Append:
    while type(request := collector.next(now)) is not Append:
        collector.answered(request, True, now)
    collector.answered(request, True, now)
    return request


@pytest.mark.parametrize(("paused", "written"), [(0.02, [Beat]), (1.5, [])], ids=["at work", "after a pause"])
def test_a_beat_that_waits_behind_an_entry_is_written_at_once_or_not_at_all(paused: float, written: list[type]) -> None:
    """If a process was suspended between the two, the log does not yet contain the changes of the meantime."""
    collector = Collector(ReplicationPolicy(), {}, "w", 5, (0, 0), [], None, 0.0)
    appended(collector, 0.0)
    collector.show(Hashed(b"batch"))
    collector.show(Beat(0.1))
    first = appended(collector, 0.1)
    assert [type(item) for item in decode(first.data)] == [Hashed]
    second = appended(collector, 0.1 + paused)
    assert (second.id, [type(item) for item in decode(second.data)]) == ((5, first.id[1] + 1), written)


def test_entries_gather_longer_while_changes_come_fast() -> None:
    policy = ReplicationPolicy(linger=0.001, busy_linger=0.005, busy=2500.0)
    collector = Collector(policy, {}, "w", 5, (0, 0), [], None, 0.0)
    appended(collector, 0.0)
    sizes: dict[int, list[int]] = {}
    now, number = 0.0, 0
    for rate in (1000, 5000, 1000):
        sizes[number] = found = []
        end = now + 1.0
        while now < end:
            now += 1 / rate
            collector.show(Hashed(b"batch"))
            number += 1
            while type(request := collector.next(now)) is not Wait:
                if type(request) is Append:
                    found.append(sum(len(item.data) // len(b"batch") for item in decode(request.data)))
                collector.answered(request, True, now)
        del found[: len(found) // 2]  # until the rate is known
    slow, fast, again = sizes.values()
    assert max(slow) <= 3
    assert min(fast) >= 20
    assert max(again) <= 3

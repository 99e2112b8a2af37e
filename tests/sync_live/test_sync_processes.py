"""Pods in processes of their own that are killed, stopped and restarted, compared with their own reports."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from sync_support import BRISK, nothing_left_behind, until

from kvindex import PrefixIndex, StreamError
from kvindex.sim.process import SimProcess
from kvindex.sim.workload import chat
from kvindex.sync.manager import EventManager
from kvindex.sync.source import PodSource

# The same conversations that the pods serve by themselves, so the questions are about prompts that they have seen.
PROMPTS = [arrival.prompt.tokens for arrival in chat(conversations=32, turns=4, system_tokens=256, rate=8.0, seed=0)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[list[SimProcess]]:
    pods = []
    try:
        for name, options in {
            "array": {"form": "vllm-0.22.0", "hash_seed": "one"},
            "map": {"form": "vllm-0.33.0", "hashes": "bytes32", "ranks": 2, "window": 64},
            "sglang": {"form": "sglang-0.5.22", "blocks": 400},
        }.items():
            pods.append(SimProcess(name=name, **options))
        yield pods
    finally:
        for pod in pods:
            pod.stop()


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex()


@pytest.fixture
def manager(index: PrefixIndex, fleet: list[SimProcess]) -> Iterator[EventManager]:
    for pod in fleet:
        pod.ask("restart")
    with nothing_left_behind(), EventManager(index, policy=BRISK) as made:
        yield made


def follow(manager: EventManager, pods: list[SimProcess]) -> None:
    for pod in pods:
        manager.add_pod(PodSource(pod.config.name, ranks=pod.ranks, model="sim", **pod.options))
    assert manager.wait_until_current(30.0)


def at_rest(manager: EventManager, pods: list[SimProcess]) -> None:
    """Wait until no batch is on its way and every pod is exact."""
    for pod in pods:
        seqs = pod.seqs()
        name = pod.config.name
        until(
            lambda name=name, seqs=seqs: (
                manager.status()[name].state == "exact"
                and all(
                    (manager.status()[name].workers[rank].last_seq, seq) in ((seq - 1, seq), (None, 0))
                    for rank, seq in seqs.items()
                )
            )
        )


def compare(index: PrefixIndex, pods: list[SimProcess], prompts: int = 40) -> int:
    """Compare every rank's own answer with the index's."""
    hits = 0
    for tokens in random.Random(1).sample(PROMPTS, prompts):
        for pod in pods:
            truth = pod.truth(tokens)
            match = index.match_prefix(tokens, model="sim")
            ranks = match[pod.config.name].ranks if pod.config.name in match.tokens else {}
            assert {rank: ranks.get(rank, 0) for rank in truth} == truth
            hits += sum(truth.values())
    index._check()
    return hits


def test_a_fleet_of_several_forms_is_equal(index, manager, fleet):
    for pod in fleet:
        pod.ask("run", requests=30)
    follow(manager, fleet)
    for pod in fleet:
        pod.ask("run", requests=60)
    at_rest(manager, fleet)
    assert compare(index, fleet) > 10_000
    assert all(status.lost_batches == 0 for status in manager.status().values())


def test_a_killed_pod_is_stale_and_its_successor_exact(index, manager, fleet):
    victim, *others = fleet
    follow(manager, fleet)
    for pod in fleet:
        pod.ask("run", requests=40)
    at_rest(manager, fleet)
    prompt = PROMPTS[20]
    victim.kill()
    until(lambda: index.pod_state("array") == "stale")
    assert "array" not in index.match_prefix(prompt, model="sim", only_exact=True).tokens
    for pod in others:
        pod.ask("run", requests=10)
    at_rest(manager, others)
    assert compare(index, others) > 0
    victim.launch()
    # About as many batches as before the kill, so the numbers alone do not show the restart.
    victim.ask("run", requests=45)
    until(lambda: manager.status()["array"].restarts == 1)
    at_rest(manager, fleet)
    assert compare(index, fleet) > 0
    assert manager.status()["array"].workers[0].counters["disconnects"] == 1
    assert {name: status.restarts for name, status in manager.status().items()} == {"array": 1, "map": 0, "sglang": 0}


def test_a_pod_that_hangs_with_its_sockets_open_is_noticed(index, manager, fleet):
    follow(manager, fleet)
    for pod in fleet:
        pod.ask("run", requests=20)
    at_rest(manager, fleet)
    blocks = manager.status()["map"].blocks
    fleet[1].pause()
    try:
        until(lambda: index.pod_state("map") == "stale")
        assert index.pod_state("array") == "exact"
    finally:
        fleet[1].go_on()
    at_rest(manager, fleet)
    assert compare(index, fleet) > 0
    # It was the same process all the time, so nothing had to be rebuilt.
    assert manager.status()["map"].restarts == 0
    assert manager.status()["map"].blocks == blocks


def test_a_buffer_that_is_too_short_is_admitted_and_never_answers_too_much(index, manager):
    with SimProcess(name="short", buffer_steps=20) as pod:
        pod.ask("run", requests=60)
        follow(manager, [pod])
        status = manager.status()["short"]
        assert status.state == "degraded"
        assert status.lost_batches == pod.seqs()[0] - 20
        for tokens in PROMPTS[:40]:
            truth = pod.truth(tokens)
            assert index.match_prefix(tokens, model="sim").tokens.get("short", 0) <= truth[0]
        pod.ask("reset")
        pod.ask("run", requests=20)
        at_rest(manager, [pod])
        assert compare(index, [pod]) > 0


def test_restarts_in_any_order_while_everybody_serves(index, manager, fleet):
    """Kills, restarts inside a process, faults and clears at random places.

    At the end, all pods are exact and equal.
    """
    follow(manager, fleet)
    dice = random.Random(3)
    for pod in fleet:
        pod.ask("rate", rate=60.0)
    for _ in range(12):
        pod = dice.choice(fleet)
        match dice.randrange(5):
            case 0:
                pod.kill()
                pod.launch()
                pod.ask("rate", rate=60.0)
            case 1:
                pod.ask("restart")
            case 2:
                pod.ask("fault", drop=dice.randrange(1, 5), duplicate=3)
            case 3:
                pod.ask("reset")
            case 4:
                pod.ask("fault", replay_cut=dice.randrange(1, 9), drop=2)
                pod.ask("run", requests=3)
                pod.ask("fault", replay_cut=None)
        pod.ask("run", requests=dice.randrange(8))
    for pod in fleet:
        pod.ask("rate", rate=0.0)
    at_rest(manager, fleet)
    assert compare(index, fleet) > 0
    assert all(not status.workers[0].waiting for status in manager.status().values())


def test_a_router_that_starts_warm_replays_only_the_rest(index, manager, fleet, tmp_path):
    """While the router is away, one engine restarts and the others go on."""
    newcomer, *others = fleet
    for pod in fleet:
        pod.ask("run", requests=40)
    follow(manager, fleet)
    at_rest(manager, fleet)
    index.save(tmp_path / "snapshot")
    manager.close()
    seen = {pod.config.name: pod.seqs() for pod in fleet}
    newcomer.kill()
    newcomer.launch()
    # About as many batches as before the kill, so the numbers alone do not show the restart.
    newcomer.ask("run", requests=45)
    for pod in others:
        pod.ask("run", requests=10)
    loaded = PrefixIndex.load(tmp_path / "snapshot")
    assert [loaded.pod_state(pod.config.name) for pod in fleet] == ["stale"] * len(fleet)
    with EventManager(loaded, policy=BRISK) as second:
        follow(second, fleet)
        at_rest(second, fleet)
        assert compare(loaded, fleet) > 10_000
        table = second.status()
        for pod in others:
            status = table[pod.config.name]
            for rank, seq in pod.seqs().items():
                worker = status.workers[rank]
                assert worker.batches == seq - seen[pod.config.name][rank], "only what was missed is applied"
                assert (worker.counters["resumed"], worker.restarts) == (1, 0)
        worker = table[newcomer.config.name].workers[0]
        assert (worker.batches, worker.restarts) == (newcomer.seqs()[0], 1)
        assert "resumed" not in worker.counters
        # From here on, both are followed as usual.
        for pod in fleet:
            pod.ask("run", requests=10)
        at_rest(second, fleet)
        assert compare(loaded, fleet) > 10_000


def test_what_a_pod_can_not_do_is_the_askers_error_and_the_pod_goes_on(fleet):
    pod = fleet[2]  # with 400 blocks
    tokens = np.arange(1, 65, dtype=np.uint32)
    with pytest.raises(StreamError, match=r"sglang: .*no faults \['nonsense'\]"):
        pod.ask("fault", nonsense=1)
    with pytest.raises(StreamError, match="_op_nonsense"):
        pod.ask("nonsense")
    with pytest.raises(StreamError, match="does not fit"):
        pod.serve(np.arange(400 * 16 + 17))
    before = pod.serve(tokens, [7, 8])["hit"]
    # SGLang reuses held blocks up to the last token. The pod has had no other request since.
    assert (before, pod.serve(tokens)["hit"], pod.truth(tokens)) == (0, 64, {0: 64})
    pod.pause()
    with pytest.raises(StreamError, match="does not answer 'status'"):
        pod.ask("status", patience=0.1)
    pod.go_on()
    assert pod.ask("status")["requests"] >= 2


def test_a_pod_that_does_not_come_up_says_with_what(capfd):
    with pytest.raises(StreamError, match="wrong did not come up: exit status 2"):
        SimProcess(name="wrong", ranks=0)
    assert "must be positive" in capfd.readouterr().err


def test_a_pod_without_a_replay_has_none():
    with SimProcess(name="deaf", replay_port=None) as pod:
        assert [answers for _, answers in pod.ranks.values()] == [None]
        assert pod.alive
        pod.kill()
        assert not pod.alive

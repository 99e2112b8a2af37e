"""The way from an event in a pod's process to the decision in a router's process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from kvindex.sim import FORMS, Arrival, Prompt, chat, wire_form

from .fleet import IndexProcess, Pods, Routed, at_rest, own_prompts


@pytest.mark.quick
def test_a_decision_follows_the_events(index: IndexProcess, pods: Pods, equal) -> None:
    """Every turn of a conversation goes to the pod of the turns before, by the pod's events."""
    index.follow(*pods.start(old={"form": "vllm-0.22.0"}, new={"form": "vllm-0.33.0"}, other={"form": "sglang-0.5.22"}))
    at_rest(index, pods)
    arrivals = []
    conversations: list[list[tuple[Arrival, Routed]]] = []
    for seed in range(6):
        conversations.append([])
        for arrival in chat(conversations=1, turns=4, system_tokens=320, regenerate=0.0, seed=seed):
            # Without slack, the pod with the longest hit gets the request, even if it has served more than others.
            (routed,) = index.route([arrival], slack=0.0)
            assert routed.told == routed.hit
            conversations[-1].append((arrival, routed))
            arrivals.append(arrival)
            at_rest(index, pods)
    assert len({routed.pod for turns in conversations for _, routed in turns}) > 1
    for turns in conversations:
        for (before, first), (_, second) in pairwise(turns):
            assert second.pod == first.pod
            # All but the incomplete block and the last token, which is computed only when another follows.
            assert second.hit >= len(before.prompt) + len(before.output) - 17
    equal(index, pods, [arrival.prompt for arrival in arrivals])


def test_routing_by_what_pods_hold_saves_more_than_dealing_out(index: IndexProcess, pods: Pods) -> None:
    """The same requests to the same pods, by the index and in turn; the pods report the reused tokens."""
    arrivals = chat(conversations=12, turns=4, system_prompts=6, seed=12)
    index.follow(*pods.start("a", "b", "c", blocks=600))
    at_rest(index, pods)
    routed = 0
    for arrival in arrivals:
        routed += index.route([arrival])[0].hit
        at_rest(index, pods)
    dealt = 0
    for pod in pods:
        pod.ask("restart")
    table = list(pods)
    for number, arrival in enumerate(arrivals):
        dealt += table[number % 3].serve(arrival.prompt.tokens, arrival.output)["hit"]
    assert routed > dealt


@pytest.mark.quick
def test_every_wire_form_in_one_fleet(index: IndexProcess, pods: Pods, equal) -> None:
    """One pod for each release's form, all started earlier, through their history and live."""
    names = {}
    for name in FORMS:
        form = wire_form(name)
        # No salts where the release cannot publish them.
        salts = int(form.says("extra_keys") if form.engine == "vllm" else form.says("cache_salt"))
        names[f"pod-{name}"] = {"form": name, "blocks": 300, "adapters": 1, "salts": salts, "seed": 3}
    started = pods.start(**names)
    pods.run(12)
    index.follow(*started)
    pods.run(24)
    at_rest(index, pods)
    equal(index, pods, own_prompts(started[-1].config, 40))
    assert {status["lost_batches"] for status in index.status().values()} == {0}


@pytest.mark.parametrize("hashes", ["u64", "i64", "bytes16", "bytes32"])
def test_every_form_of_hashes(index: IndexProcess, pods: Pods, equal, hashes: str) -> None:
    started = pods.start(array={"form": "vllm-0.22.0"}, map={"form": "vllm-0.33.0"}, hashes=hashes, blocks=300)
    index.follow(*started)
    pods.run(40)
    at_rest(index, pods)
    equal(index, pods, own_prompts(started[0].config, 60))


@pytest.mark.quick
def test_an_index_that_joins_late_knows_the_whole_history(pods: Pods, equal) -> None:
    started = pods.start(a={"form": "vllm-0.33.0"}, b={"form": "vllm-0.20.0"}, c={"form": "sglang-0.5.22"}, blocks=400)
    pods.run(80)
    with IndexProcess() as late:
        late.follow(*started)
        at_rest(late, pods)
        equal(late, pods, own_prompts(started[0].config, 100))
        assert {status["lost_batches"] for status in late.status().values()} == {0}
        # Live from here on.
        pods.run(10)
        at_rest(late, pods)
        equal(late, pods, own_prompts(started[0].config, 100))


@pytest.mark.quick
def test_two_routers_on_the_same_streams_agree(pods: Pods, equal) -> None:
    """Requests arrive at either router, and the other one also learns of them from the pod's events."""
    arrivals = chat(conversations=8, turns=3, system_prompts=4, seed=14)
    with IndexProcess("first") as first, IndexProcess("second") as second:
        started = pods.start(a={"form": "vllm-0.33.0"}, b={"form": "sglang-0.5.22"}, c={"form": "vllm-0.24.0"})
        for router in (first, second):
            router.follow(*started)
            at_rest(router, pods)
        for number, arrival in enumerate(arrivals):
            (routed,) = (first, second)[number % 2].route([arrival])
            assert routed.told == routed.hit
            for router in (first, second):
                at_rest(router, pods)
        prompts = [Prompt(arrival.prompt.tokens) for arrival in arrivals]
        assert first.match(prompts)["answers"] == second.match(prompts)["answers"]
        for router in (first, second):
            equal(router, pods, prompts)


def test_ten_pods_and_a_thousand_events_each(index: IndexProcess, pods: Pods, equal) -> None:
    """The load of the original system's test (an event every 100 ms from each of ten pods), as fast as possible.

    Queries run all the time. In the end no batch is lost, and all answers are equal.
    """
    started = pods.start(**{f"pod-{number}": {"seed": number % 4, "blocks": 1500} for number in range(10)})
    index.follow(*started)
    at_rest(index, pods)
    prompts = own_prompts(started[0].config, 16)

    def drive(pod) -> int:
        while pod.seqs()[0] < 1000:
            pod.ask("run", requests=5)
        return pod.ask("status")["requests"]

    asked = 0
    with ThreadPoolExecutor(10) as drivers:
        running = [drivers.submit(drive, pod) for pod in started]
        while not all(each.done() for each in running):
            asked += len(index.match(prompts)["answers"])
        served = min(each.result() for each in running)
    at_rest(index, pods)
    assert asked > 0
    status = index.status()
    assert sum(each["batches"] for each in status.values()) >= 10_000
    assert {each["lost_batches"] for each in status.values()} == {0}
    equal(index, pods, own_prompts(started[0].config, served)[-100:])


def test_a_prompt_that_nobody_has_goes_to_the_idlest(index: IndexProcess, pods: Pods, equal) -> None:
    index.follow(*pods.start("a", "b"))
    at_rest(index, pods)
    rng = np.random.Generator(np.random.PCG64(5))
    used = []
    for _ in range(4):
        tokens = rng.integers(0, 50_000, 200, dtype=np.uint32)
        (routed,) = index.route([Arrival(0.0, Prompt(tokens), tokens[:0])])
        assert (routed.told, routed.hit) == (0, 0)
        used.append(routed.pod)
        at_rest(index, pods)
    assert sorted(used) == ["a", "a", "b", "b"]

"""Pods that come, go, and come back with another cache while the rest of the fleet serves."""

from __future__ import annotations

from random import Random

import pytest

from kvindex.sim import Arrival

from .fleet import IndexProcess, Pods, at_rest, own_prompts, until


@pytest.mark.quick
def test_a_pod_is_added_drained_and_removed_while_the_others_serve(index: IndexProcess, pods: Pods, equal) -> None:
    pods.start("a", "b")
    index.follow(*pods)
    at_rest(index, pods)
    prompts = own_prompts(pods["a"].config, 60)
    pods.run(20)
    (late,) = pods.start("late", form="sglang-0.5.22")
    late.ask("run", requests=25)
    index.follow(late)
    pods.run(10)
    at_rest(index, pods)
    equal(index, pods, prompts)

    # Drained: no new requests go to the pod, but its blocks stay in the index and its stream is followed.
    index.drain("late")
    routed = index.route([Arrival(0.0, prompt, prompt.tokens[:0]) for prompt in prompts[:30]])
    assert {each.pod for each in routed} == {"a", "b"}
    late.ask("run", requests=2)
    at_rest(index, pods)
    assert any("late" in answer for answer in index.match(prompts)["answers"])
    equal(index, pods, prompts)

    # Removed while it still publishes: no event in transit brings it back.
    late.ask("rate", rate=200.0)
    before = late.seqs()[0]
    until(lambda: late.seqs()[0] > before + 50)
    index.forget("late")
    assert "late" not in index.status()
    there = late.seqs()[0]
    until(lambda: late.seqs()[0] > there + 50)
    assert not any("late" in answer for answer in index.match(prompts)["answers"])
    pods.remove("late")
    at_rest(index, pods)
    equal(index, pods, prompts)


@pytest.mark.quick
def test_a_pod_is_replaced_under_its_name(index: IndexProcess, pods: Pods, equal) -> None:
    """At another address, like a new container, and at the same address, like a restarted server."""
    pods.start(a={"seed": 1}, b={"seed": 2}, blocks=600)
    index.follow(*pods)
    pods.run(30)
    at_rest(index, pods)
    old, new = own_prompts(pods["a"].config, 30), own_prompts(pods["b"].config, 30)
    equal(index, pods, old + new)

    # At another address, with other conversations and another wire form.
    index.forget("a")
    pods.remove("a")
    (successor,) = pods.start("a", seed=2, form="vllm-0.22.0", blocks=600)
    index.follow(successor)
    successor.ask("run", requests=10)
    at_rest(index, pods)
    equal(index, pods, old + new)
    assert not any("a" in answer for answer in index.match(old)["answers"])

    # At the same address, without a call to the index.
    successor.kill()
    until(lambda: index.state("a") == "stale")
    assert index.state("b") == "exact"
    assert not any("a" in answer for answer in index.match(new, only_exact=True)["answers"])
    successor.launch()
    successor.ask("run", requests=5)
    at_rest(index, pods)
    equal(index, pods, old + new)
    assert index.status()["a"]["restarts"] == 1


def test_from_one_pod_to_thirty_two_and_back(index: IndexProcess, pods: Pods, equal) -> None:
    """The fleet is doubled and halved while all pods serve. In the end nothing is left of the removed pods."""
    forms = ["vllm-0.33.0", "vllm-0.22.0", "sglang-0.5.22", "vllm-0.9.0"]
    (first,) = pods.start("pod-0", blocks=300)
    index.follow(first)
    first.ask("run", requests=15)
    at_rest(index, pods)
    prompts = own_prompts(first.config, 30)
    equal(index, pods, prompts)
    small = index.ask("stats")
    for size in (2, 4, 8, 16, 32):
        names = [f"pod-{number}" for number in range(len(pods), size)]
        started = pods.start(**{name: {"form": forms[int(name[4:]) % 4], "blocks": 300} for name in names})
        for pod in started:
            pod.ask("rate", rate=20.0)
        index.follow(*started)
        assert len(index.status()) == size
        for pod in pods:
            pod.ask("rate", rate=0.0)
        at_rest(index, pods, 60.0)
        equal(index, pods, prompts)
    large = index.ask("stats")
    assert large["threads"] == small["threads"]
    for size in (16, 8, 4, 2, 1):
        for number in range(size, len(pods)):
            index.forget(f"pod-{number}")
            pods.remove(f"pod-{number}")
        at_rest(index, pods)
        equal(index, pods, prompts)
    at_end = until(lambda: (s := index.ask("stats"))["fds"] <= small["fds"] and s, lambda: index.ask("stats"))
    assert set(index.status()) == {"pod-0"}
    assert at_end["threads"] == small["threads"]
    assert at_end["index"]["blocks"] == small["index"]["blocks"]
    assert at_end["index"]["workers"] == small["index"]["workers"]


def test_pods_that_come_and_go_again_and_again_are_exact_soon_after(index: IndexProcess, pods: Pods, equal) -> None:
    """Each time the manager requests the history again, and does not wait for the answers to earlier requests."""
    names = "abcdef"
    pods.start(*names, blocks=40_000)
    pods.run(1500)
    for pod in pods:
        pod.ask("rate", rate=60.0)
    random, followed = Random(1), set()
    for _ in range(1000):
        name = random.choice(names)
        if name in followed:
            index.forget(name)
        else:
            index.follow(pods[name])
        followed ^= {name}
    index.follow(*(pods[name] for name in names if name not in followed))
    for pod in pods:
        pod.ask("rate", rate=0.0)
    at_rest(index, pods)
    equal(index, pods, own_prompts(pods["a"].config, 30))

"""A simulated fleet serves and publishes every request, and its comparison finds every difference."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest

from kvindex.errors import InvalidValueError
from kvindex.sim import (
    Engine,
    Fleet,
    Pod,
    PrefixAware,
    Prompt,
    RandomChoice,
    RoundRobin,
    chat,
    wire_form,
)
from kvindex.sim.workload import Arrival

FORM = wire_form("vllm-0.24.0")
SGLANG = wire_form("sglang-0.5.22")


class Oracle:
    """A perfect index: it asks the simulated engines themselves."""

    def __init__(self, pods):
        self.pods = pods
        self.asked = []

    def match_prefix(self, tokens, *, model="", lora_name=None, cache_salt=None, extra_keys=None):
        self.asked.append((model, lora_name, cache_salt))
        prompt = Prompt(tokens, lora_name=lora_name, cache_salt=cache_salt, extra_keys=extra_keys)
        return SimpleNamespace(tokens={pod.name: pod.hit(prompt) for pod in self.pods if pod.hit(prompt)})


def pods(count=4, blocks=400, **options):
    return [Pod(f"pod-{i}", FORM, {0: Engine(blocks, **options)}) for i in range(count)]


def run(route, arrivals, blocks=400, count=4):
    fleet = Fleet(pods(count, blocks), lambda pod, rank, payload: None)
    fleet.run(arrivals, route(fleet.pods))
    return fleet


def arrival(at, length, output=0, start=0):
    return Arrival(at, Prompt(np.arange(start, start + length)), np.arange(output, dtype=np.uint32))


def test_every_request_is_served_and_every_block_comes_back():
    arrivals = chat(conversations=30, turns=4, seed=2)
    fleet = run(lambda pods: RoundRobin(), arrivals)
    assert Counter(served.prompt_tokens for served in fleet.served) == Counter(len(a.prompt) for a in arrivals)
    assert [pod.load for pod in fleet.pods] == [0] * 4
    assert all(engine.free_blocks == 400 for pod in fleet.pods for engine in pod.ranks.values())
    assert sum(pod.served for pod in fleet.pods) == fleet.prompt_tokens
    assert fleet.hit_tokens == sum(served.hit_tokens for served in fleet.served)


def test_prefix_aware_routing_saves_more_than_the_others():
    arrivals = chat(conversations=60, turns=5, system_prompts=3, seed=3)
    rates = {
        name: run(route, arrivals).hit_rate
        for name, route in {
            "round robin": lambda pods: RoundRobin(),
            "random": lambda pods: RandomChoice(1),
            "prefix aware": lambda pods: PrefixAware(Oracle(pods)),
        }.items()
    }
    assert rates["prefix aware"] > 1.15 * max(rates["round robin"], rates["random"])


def test_prefix_aware_routing_spreads_what_nobody_holds_and_keeps_what_somebody_does():
    fleet = Fleet(pods(3), lambda *_: None)
    route = PrefixAware(Oracle(fleet.pods))
    chosen = [fleet.serve(arrival(i, 160, start=1000 * i), route).name for i in range(6)]
    assert sorted(chosen) == ["pod-0", "pod-0", "pod-1", "pod-1", "pod-2", "pod-2"]
    fleet.finish()
    again = [fleet.serve(arrival(100 + i, 200, start=1000 * i), route).name for i in range(6)]
    assert again == chosen


def test_a_busy_pod_loses_what_it_holds_to_an_idle_one():
    fleet = Fleet(pods(2), lambda *_: None)
    fleet.serve(arrival(0, 160, output=5000), RoundRobin())
    holder = fleet.pods[0]
    assert PrefixAware(Oracle(fleet.pods), balance=0.0)(Prompt(np.arange(200)), fleet.pods) is holder
    assert PrefixAware(Oracle(fleet.pods), balance=1.0)(Prompt(np.arange(200)), fleet.pods) is not holder


def test_the_same_workload_gives_the_same_run():
    def record():
        published = []
        fleet = Fleet(pods(), lambda *message: published.append(message))
        fleet.run(chat(conversations=10, seed=9), PrefixAware(Oracle(fleet.pods)))
        return published, fleet.served

    assert record() == record()


def test_batches_carry_time_and_rank_and_come_in_order():
    published = []
    engines = {2: Engine(100), 5: Engine(100)}
    fleet = Fleet([Pod("p", FORM, engines)], lambda *message: published.append(message), decode_rate=10)
    fleet.run([arrival(0, 64, output=33), arrival(1, 64, output=17), arrival(2, 64)], RoundRobin())
    # The first two go to different ranks, because the first is still being answered. The third finds both busy.
    assert [(pod, rank) for pod, rank, _ in published] == [("p", 2), ("p", 5), ("p", 5), ("p", 5), ("p", 2)]
    batches = [msgpack.unpackb(payload) for _, _, payload in published]
    assert [batch[2] for batch in batches] == [2, 5, 5, 5, 2]
    times = [batch[0] for batch in batches]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(3.3, abs=0.01)


def test_what_finds_no_room_waits_for_it():
    fleet = Fleet(pods(1, blocks=10), lambda *_: None, decode_rate=10)
    for place in range(3):
        fleet.serve(arrival(0.0, 96, output=20, start=1000 * place), RoundRobin())
    assert len(fleet.served) == 1
    fleet.advance(2.5)
    assert len(fleet.served) == 2
    fleet.finish()
    assert [served.at for served in fleet.served] == pytest.approx([0, 2.0, 4.0], abs=0.05)
    assert fleet.truncated == 0


def test_answers_are_cut_short_where_room_ends():
    fleet = Fleet(pods(1, blocks=10), lambda *_: None)
    fleet.run([arrival(0, 96, output=200)], RoundRobin())
    assert fleet.truncated == 1
    assert fleet.pods[0].load == 0


def test_a_prompt_that_never_fits_is_refused_by_name():
    fleet = Fleet(pods(1, blocks=10), lambda *_: None)
    fleet.serve(arrival(0, 160), RoundRobin())
    with pytest.raises(InvalidValueError, match="161 tokens needs 11 blocks, pod-0 has 10"):
        fleet.serve(arrival(0, 161), RoundRobin())
    fleet.finish()
    assert len(fleet.served) == 1
    assert Engine(10, window=20).blocks_for(33) == 6


def test_a_reset_is_published():
    published = []
    fleet = Fleet(pods(1), lambda *message: published.append(message))
    fleet.serve(arrival(0, 64, output=10), RoundRobin())
    assert not fleet.reset(fleet.pods[0])
    fleet.finish()
    assert fleet.reset(fleet.pods[0])
    assert msgpack.unpackb(published[-1][2])[1] == [{"type": "AllBlocksCleared"}]
    assert fleet.truth(Prompt(np.arange(64))) == {"pod-0": 0}


def test_a_wrong_index_is_caught_and_a_right_one_is_not():
    class Wrong(Oracle):
        def match_prefix(self, tokens, **context):
            right = super().match_prefix(tokens, **context).tokens
            return SimpleNamespace(tokens={**right, "pod-1": 16})

    fleet = Fleet(pods(2), lambda *_: None)
    fleet.run([arrival(0, 64)], RoundRobin())
    prompt = Prompt(np.arange(64))
    assert fleet.compare(Oracle(fleet.pods), prompt) == (2, [])
    answers, differences = fleet.compare(Wrong(fleet.pods), prompt)
    assert answers == 2
    assert [tuple(difference) for difference in differences] == [("pod-1", 16, 0)]


def test_engines_are_asked_about_the_whole_prompt():
    mixed = [Pod("v", FORM, {0: Engine(20)}), Pod("s", SGLANG, {0: Engine(20, flavor="sglang")})]
    fleet = Fleet(mixed, lambda *_: None)
    for _ in mixed:
        fleet.serve(arrival(0, 64), RoundRobin())
    fleet.run([arrival(0, 64), arrival(0, 64)], RoundRobin())

    class Lengths(Oracle):
        def match_prefix(self, tokens, **context):
            self.asked.append(len(tokens))
            return SimpleNamespace(tokens={"v": 48, "s": 64})

    index = Lengths(mixed)
    assert fleet.compare(index, Prompt(np.arange(64))) == (2, [])
    assert index.asked == [64, 64]
    assert [pod.options["engine"] for pod in mixed] == ["vllm", "sglang"]


def test_an_adapter_is_asked_for_by_the_name_that_was_published():
    prompt = Prompt(np.arange(20), lora_name="a", lora_id=3, cache_salt="s")
    for form, expected in ((FORM, "a"), (wire_form("vllm-0.9.1"), "3")):
        fleet = Fleet([Pod("p", form, {0: Engine(20)})], lambda *_: None)
        index = Oracle(fleet.pods)
        fleet.compare(index, prompt, model="m")
        PrefixAware(index, model="n")(prompt, fleet.pods)
        assert index.asked == [("m", expected, "s"), ("n", expected, "s")]
        assert fleet.pods[0].lora_name(Prompt([1])) is None


def test_hit_rate_over_time_ends_at_the_hit_rate():
    fleet = run(lambda pods: RoundRobin(), chat(conversations=8, seed=1))
    times, rates = fleet.history()
    assert len(times) == len(rates) == len(fleet.served)
    assert np.all(np.diff(times) >= 0)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(fleet.hit_rate)


def test_fleets_that_cannot_be():
    engine = Engine(4)
    for wrong in (lambda: Pod("p", FORM, {}), lambda: Pod("p", SGLANG, {0: engine})):
        with pytest.raises(InvalidValueError, match="'p'"):
            wrong()
    pod = Pod("p", FORM, {0: engine})
    for wrong in ([], [pod, pod]):
        with pytest.raises(InvalidValueError, match="a name of its own"):
            Fleet(wrong, lambda *_: None)

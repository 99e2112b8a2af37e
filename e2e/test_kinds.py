"""Pods that differ in models, adapters, salts, ranks, tiers and groups."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from kvindex.sim import Arrival, Prompt

from .fleet import IndexProcess, Pods, at_rest, own_prompts


def test_models_never_see_each_other(index: IndexProcess, pods: Pods, equal) -> None:
    """Two models on two pods each; all four serve the same prompts."""
    small = pods.start("s1", "s2", model="small")
    large = pods.start("l1", "l2", model="large", form="sglang-0.5.22")
    index.follow(*pods)
    pods.run(30)
    at_rest(index, pods)
    prompts = own_prompts(small[0].config, 40)
    equal(index, pods, prompts)
    for model, mine in (("small", small), ("large", large)):
        names = {pod.config.name for pod in mine}
        found = {name for answer in index.match(prompts, model=model)["answers"] for name in answer}
        assert found == names
        assert {
            index.route([Arrival(0.0, prompt, prompt.tokens[:0])], model=model)[0].pod for prompt in prompts
        } <= names
    assert not any(index.match(prompts, model="another")["answers"])


@pytest.mark.quick
@pytest.mark.parametrize("form", ["vllm-0.33.0", "vllm-0.22.0", "vllm-0.17.0", "sglang-0.5.22"])
def test_adapters_and_salts_never_see_each_other(index: IndexProcess, pods: Pods, equal, form: str) -> None:
    """Every text under every adapter and salt. Only half of the pairs are served, and the others have no hits."""
    (pod,) = pods.start("a", form=form, blocks=8000)
    index.follow(pod)
    texts = [prompt.tokens for prompt in own_prompts(pod.config, 8)]
    contexts = [
        {"lora_name": name, "lora_id": number or None, "cache_salt": salt}
        for (number, name), salt in product(enumerate([None, "adapter-a", "adapter-b"]), [None, "x", "y"])
    ]
    for text, context in product(texts, contexts[::2]):
        pod.serve(text, **context)
    at_rest(index, pods)
    prompts = [Prompt(text, **context) for text, context in product(texts, contexts)]
    equal(index, pods, prompts)
    # The texts share their system prompts, so the text alone would match in every context.
    told = [bool(answer) for answer in index.match(prompts)["answers"]]
    assert told == [place % 2 == 0 for _, place in product(texts, range(len(contexts)))]


@pytest.mark.quick
def test_images_never_see_each_other(index: IndexProcess, pods: Pods, equal) -> None:
    """One text with several images, whose identifiers are in the keys of the blocks that they cover."""
    index.follow(*pods.start("map", array={"form": "vllm-0.22.0", "hashes": "bytes16"}))
    tokens = np.arange(321, dtype=np.uint32)
    below = [Prompt(tokens, extra_keys=[None, [(name, 4)], [(name, -12)]]) for name in ("cat", "dog", "owl")]
    for pod in pods:
        for prompt in below[:2]:
            pod.serve(tokens, extra_keys=prompt.extra_keys)
    at_rest(index, pods)
    prompts = [*below, Prompt(tokens)]
    equal(index, pods, prompts)
    # The block before the image is common to all.
    told = [answer["map"]["tokens"] for answer in index.match(prompts)["answers"]]
    assert told == [320, 320, 16, 16]


@pytest.mark.quick
def test_ranks_are_told_apart(index: IndexProcess, pods: Pods, equal) -> None:
    """Each rank has its own cache, and a router gets the hit of each rank."""
    pods.start(map={}, array={"form": "vllm-0.22.0"}, sglang={"form": "sglang-0.5.22"}, ranks=4, blocks=600)
    index.follow(*pods)
    at_rest(index, pods)
    pods.run(40)
    at_rest(index, pods)
    prompts = own_prompts(pods["map"].config, 60)
    equal(index, pods, prompts)
    alone = Prompt(range(700_000, 700_161))
    pods["map"].serve(alone.tokens, rank=2)
    at_rest(index, pods)
    (answer,) = index.match([alone])["answers"]
    assert {name: found["ranks"] for name, found in answer.items()} == {"map": {2: 160}}
    assert {status["connected"] for status in index.status().values()} == {True}
    assert sorted(index.status()["map"]["workers"]) == [0, 1, 2, 3]


@pytest.mark.quick
def test_tiers(index: IndexProcess, pods: Pods, equal) -> None:
    """A small first tier and a second one behind it, which announces its blocks with or without their tokens."""
    pods.start(
        named={"offload_tokens": True}, bare={"form": "vllm-0.20.0"}, disk={"offload_medium": "DISK"},
        sglang={"form": "sglang-0.5.22", "offload_medium": "CPU_PINNED"}, blocks=200, offload_blocks=900,
    )  # fmt: skip
    # These resets clear all tiers, but vLLM's clears do not name the tiers.
    index.follow(*(pod for pod in pods if pod.name != "sglang"), clear_media=["GPU", "CPU", "DISK"])
    index.follow(pods["sglang"])
    pods.run(60)
    at_rest(index, pods)
    prompts = own_prompts(pods["named"].config, 70)[-50:]
    equal(index, pods, prompts)
    answers = index.match(prompts)["answers"]
    for name, tier in {"named": "CPU", "bare": "CPU", "disk": "DISK", "sglang": "CPU_PINNED"}.items():
        # Some prompts are longer in the second tier than in the first, so the tiers matter here.
        found = [answer[name] for answer in answers if name in answer]
        assert any(each["media"].get(tier, 0) > each["media"].get("GPU", 0) for each in found)
    for pod in pods:
        pod.ask("reset")
    at_rest(index, pods)
    equal(index, pods, prompts, something=False)


@pytest.mark.quick
def test_hybrid_models(index: IndexProcess, pods: Pods, equal) -> None:
    """Sliding windows beside full attention: several widths, larger blocks, blocks that are left out."""
    pods.start(
        w17={"window": 17}, w64={"window": 64, "form": "vllm-0.22.0"}, w100={"window": 100, "hashes": "bytes32"},
        w1024={"window": 1024}, wide={"window": 65, "window_block_size": 32},
        sparse={"window": 40, "window_interval": 96}, ranks={"window": 64, "ranks": 2}, blocks=350,
    )  # fmt: skip
    index.follow(*pods)
    pods.run(50)
    at_rest(index, pods)
    prompts = own_prompts(pods["w17"].config, 60)
    done = equal(index, pods, prompts)
    assert {name: status["errors"] for name, status in index.status().items()} == {pod.name: {} for pod in pods}
    # Prompts cut at any place, not only at the end of a turn.
    cut = [Prompt(prompt.tokens[: len(prompt) * part // 7]) for prompt in prompts[::5] for part in range(1, 7)]
    assert done.answers + equal(index, pods, cut).answers > 500

"""The engines' own answers compared with those read from their events, for every feature and every wire format.

The engine answers from its block tables and the judge only from encoded payloads, so the two share nothing but the
contract. A difference is an error in the engine, in the encoder or in the judge.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from judges import JUDGES

from kvindex.sim import FORMS, Engine, Pod, Prompt, encode_batch, wire_form

BLOCK = 4
# Few tokens and few blocks, so prompts often share a prefix, diverge and repeat.
WORDS = [[1, 1, 1, 1], [1, 1, 1, 2], [2, 1, 1, 1]]
EXTRA = [None, [None, [["image", -1]]], [["image", b"\x01"]], [None, None, ["audio"]]]


@st.composite
def pods(draw):
    """Draw two pods of one engine type, the second with two ranks, and the configuration for the index."""
    form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
    if form.engine == "vllm":
        form = wire_form(form.name, draw(st.sampled_from(["u64", "bytes16", "bytes32"])))
    options = {"num_blocks": draw(st.sampled_from([6, 12, 30])), "flavor": form.engine}
    # Without its kind and window in the events, a group cannot be recognised as a sliding window.
    if form.engine == "vllm" and form.says("kv_cache_spec_sliding_window") and draw(st.booleans()):
        options["num_blocks"] *= 2
        options["window"] = draw(st.sampled_from([2, 4, 5, 5, 6, 9, 9, 17, 40]))
        size = options["window_block_size"] = draw(st.sampled_from([4, 4, 8, 12]))
        options["window_interval"] = draw(st.sampled_from([None, size, 2 * size, 4 * size]))
    elif draw(st.integers(0, 3)) == 0:
        options["block_size"] = 2 * BLOCK
    if form.says("medium") and draw(st.booleans()):
        options["offload_blocks"] = draw(st.sampled_from([3, 20]))
        options["offload_tokens"] = draw(st.booleans())
        options["offload_keyless"] = draw(st.booleans())
    told = {"engine": form.engine} if draw(st.booleans()) else {}
    if "offload_blocks" in options:
        # SGLang has no reset that keeps its host pool.
        if form.engine == "vllm" and draw(st.booleans()):
            told["clear_media"] = ["GPU"]
    elif (form.says("lookahead_token_ids") or form.engine == "sglang") and draw(st.booleans()):
        options["lookahead"] = 1 if form.engine == "sglang" else draw(st.sampled_from([1, 3]))
    elif form.engine == "vllm" and "window" not in options and draw(st.integers(0, 3)) == 0:
        options["eagle"] = True
        told = {"engine": "vllm", "eagle": True}
    options = {"block_size": BLOCK, **options}
    own = draw(st.booleans())
    seeds = iter(range(3))
    return [
        Pod(name, form, {rank: Engine(hash_seed=bytes([next(seeds) * own]), **options) for rank in range(ranks)})
        for name, ranks in (("one", 1), ("two", 2))
    ], told


class Truth(RuleBasedStateMachine):
    judge_type = JUDGES[0]

    @initialize(pods=pods())
    def begin(self, pods):
        pods, self.told = pods
        self.pods = pods
        self.form = pods[0].form
        self.engines = [(pod.name, rank, engine) for pod in pods for rank, engine in pod.ranks.items()]
        self.judge = self.judge_type(BLOCK)
        for pod in pods:
            self.judge.configure(pod.name, **self.told)
        self.running = []
        self.asked = [Prompt(WORDS[0] * 3)]
        self.time = 0.0

    def flush(self, name, rank, engine):
        events = engine.take_events()
        if events:
            self.time += 1.0
            report = self.judge.ingest(name, encode_batch(events, self.form, ts=self.time, dp_rank=rank))
            assert report.skipped == report.parked == 0, report

    # Several requests a step, most of them answered at once, because failures need a cache that has been full for long.
    @rule(
        where=st.integers(0, 2),
        requests=st.lists(
            st.tuples(
                st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
                st.sampled_from([0, 0, 0, 1, 3]),
                st.sampled_from([None, 3, 4, 8]),
                st.sampled_from([True, True, False]),
            ),
            min_size=1,
            max_size=6,
        ),
        named=st.tuples(*[st.sampled_from([False, False, True])] * 2, st.sampled_from([None, *EXTRA])),
    )
    def serve(self, where, requests, named):
        # The formats without ranks publish for rank 0 only.
        name, rank, engine = self.engines[where if self.form.has_rank else where % 2]
        for words, cut, chunk, done in requests:
            tokens = [token for word in words for token in word]
            prompt = Prompt(tokens[: len(tokens) - cut], **self.context(engine, *named))
            self.asked = [*self.asked[-5:], prompt]
            request = engine.start(prompt, chunk)
            if request is not None and done:
                # In chunks, so that blocks leave the window, and are evicted, before those that are still inside it.
                while request.computed < len(prompt) and engine.prefill(request, chunk):
                    pass
                engine.finish(request)
            elif request is not None:
                self.running.append((name, rank, engine, request))
            self.flush(name, rank, engine)
            self.answers_are_the_engines_own()

    def context(self, engine, adapter, salt, extra):
        """Return only the context that this format can express. The index cannot know the rest."""
        context = {}
        if adapter and (self.form.says("lora_name") or self.form.engine == "vllm"):
            context |= {"lora_name": "adapter", "lora_id": 3}
        if self.form.says("extra_keys") or self.form.says("cache_salt"):
            context |= {"cache_salt": "salt"} if salt else {}
            # A larger block has one list of keys, which the index assigns to its first part.
            if extra is not None and self.form.engine == "vllm" and set(engine.block_sizes) == {BLOCK}:
                context["extra_keys"] = extra
        return context

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 20), chunk=st.sampled_from([None, 4, 5]))
    def prefill(self, which, chunk):
        name, rank, engine, request = self.running[which % len(self.running)]
        engine.prefill(request, chunk)
        self.flush(name, rank, engine)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 20), tokens=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=9))
    def decode(self, which, tokens):
        name, rank, engine, request = self.running[which % len(self.running)]
        if engine.prefill(request):
            engine.decode(request, tokens)
            old = request.prompt
            names = {"lora_name": old.lora_name, "lora_id": old.lora_id, "cache_salt": old.cache_salt}
            self.asked[-1] = Prompt(request.tokens, extra_keys=old.extra_keys, **names)
        self.flush(name, rank, engine)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 20))
    def finish(self, which):
        name, rank, engine, request = self.running.pop(which % len(self.running))
        engine.finish(request)
        self.flush(name, rank, engine)

    @rule(where=st.integers(0, 2), chance=st.integers(0, 3))
    def reset(self, where, chance):
        name, rank, engine = self.engines[where if self.form.has_rank else where % 2]
        if chance == 0 and engine.reset(offloaded="clear_media" not in self.told):
            self.flush(name, rank, engine)
            if self.form.engine == "sglang" and "engine" in self.told:
                assert self.judge.state(name) == "exact"

    @invariant()
    def answers_are_the_engines_own(self):
        if not hasattr(self, "asked"):
            return
        for prompt in self.asked:
            named = "engine" in self.told
            told = self.judge.ask(
                prompt.tokens,
                lora_name=self.pods[0].lora_name(prompt),
                cache_salt=prompt.cache_salt,
                extra_keys=prompt.extra_keys,
            )
            truth = {pod.name: pod.hit(prompt) if named else pod.held(prompt) for pod in self.pods}
            # Held blocks after a gap that only another tier fills are not reused.
            assert all(pod.hit(prompt) <= pod.held(prompt) for pod in self.pods)
            assert told.tokens == {name: hit for name, hit in truth.items() if hit}, (self.form.name, self.told)
            for pod in self.pods if not named else ():
                media = told.media.get(pod.name, {})
                for medium in ("GPU", "CPU") if pod.name in told.tokens else ():
                    # On each rank, a single tier is never worth more than all tiers together.
                    alone = max(min(e.held_prompt(prompt, medium), e.held_prompt(prompt)) for e in pod.ranks.values())
                    assert media.get(medium, 0) == alone, (self.form.name, medium)

    @invariant()
    def no_block_is_lost(self):
        if not hasattr(self, "engines"):
            return
        for name, rank, engine in self.engines:
            held = Counter(
                block
                for where, number, _, request in self.running
                if (where, number) == (name, rank)
                for table in request.tables
                for block in table
                if block >= 0
            )
            assert engine.free_blocks == engine.num_blocks - len(held)


@pytest.mark.parametrize("judge", JUDGES)
def test_every_answer_is_the_engines_own(judge):
    run_state_machine_as_test(type("Judged", (Truth,), {"judge_type": judge}))

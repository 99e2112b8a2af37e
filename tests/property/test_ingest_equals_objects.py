"""The same events as payloads, in every wire format, and as objects give the same index."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support import COUNTS, answer_of, as_array, payload, report_of
from world import World, draw_setup, draw_step, in_form, sound

import kvindex


def as_object(pod: str, rank: int, model: str, event: dict, arrays: bool) -> tuple[str, object]:
    """Return the name of the call that applies an event as an object, and the object."""
    fields = {name: value for name, value in event.items() if name != "type"}
    if event["type"] == "AllBlocksCleared":
        return "process_all_blocks_cleared", kvindex.AllBlocksCleared(pod=pod, dp_rank=rank, **fields)
    if event["type"] == "BlockRemoved":
        return "process_block_removed", kvindex.BlockRemoved(pod=pod, model=model, dp_rank=rank, **fields)
    if arrays:
        fields["token_ids"] = np.array(fields["token_ids"], np.int64)
    return "process_block_stored", kvindex.BlockStored(pod=pod, model=model, dp_rank=rank, **fields)


def total(reports: list) -> dict:
    """Return the sum of several reports, without the fields that only a batch has."""
    reports = [report_of(report) for report in reports]
    reasons: Counter = Counter()
    for report in reports:
        reasons.update(report["reasons"])
    return {**{name: sum(report[name] for report in reports) for name in COUNTS}, "reasons": dict(reasons)}


def state_of(index: kvindex.PrefixIndex, world: World) -> dict:
    stats = index.stats()
    asked = {}
    for context, path, model in world.asked:
        given = {"lora_name": context[0], "cache_salt": context[1], "model": model}
        asked[context, path, model] = answer_of(index.match_prefix(world.tokens(path), **given))
    return {
        "answers": asked,
        "states": {pod: (index.pod_state(pod), index.worker_stats(pod)) for pod in world.layouts},
        "stats": {name: stats[name] for name in ("blocks", "chains", "sets", "holders", "workers", "parked")},
    }


@given(seed=st.integers(0, 2**32 - 1))
def test_every_way_to_give_an_event_is_the_same(seed):
    rng = Random(seed)
    world = World(replace(draw_setup(rng), crowd=0))
    ways = {
        name: kvindex.PrefixIndex(world.size, presence=world.setup.presence, max_parked=world.setup.max_parked)
        for name in ("maps", "arrays", "one by one", "objects", "arrays of tokens", "decoded")
    }
    for index in ways.values():
        for pod, layout in world.layouts.items():
            index.configure_pod(pod, **layout.options)
    for _ in range(25):
        step = draw_step(rng, "batch")
        pod, rank, model = step.pod, step.rank, step.model
        # The events depend on the current state, so the world applies them as well.
        events = [
            event for op in step.ops if isinstance(event := world.event(pod, rank, model, op), dict) and sound(event)
        ]
        if not events:
            continue  # a batch without events is a sign of life, which has no equivalent as an object
        for event in events:
            world.remember(pod, rank, model, event)
        world.ingest(pod, payload(*events, rank=rank), model=model)
        written = [in_form(event, step.hashes) for event in events]
        arrays = [as_array(event) for event in written]
        reports = {
            "maps": [ways["maps"].ingest(pod, payload(*written, rank=rank), model=model)],
            "arrays": [ways["arrays"].ingest(pod, memoryview(payload(*arrays)), model=model, dp_rank=rank)],
            "one by one": [ways["one by one"].ingest(pod, payload(event, rank=rank), model=model) for event in written],
        }
        for way, tokens in (("objects", False), ("arrays of tokens", True)):
            calls = [as_object(pod, rank, model, event, tokens) for event in written]
            reports[way] = [getattr(ways[way], call)(thing) for call, thing in calls]
        decoded = kvindex.decode_batch(payload(*arrays, rank=rank), pod=pod, model=model)
        assert not decoded.skipped
        reports["decoded"] = [getattr(ways["decoded"], call_of(event))(event) for event in decoded.events]
        first = total(reports["maps"])
        assert {way: total(some) for way, some in reports.items()} == dict.fromkeys(reports, first)
        for index in ways.values():
            index._check()
    want = state_of(world.index, world)
    for index in ways.values():
        assert state_of(index, world) == want


def call_of(event: object) -> str:
    return {
        kvindex.BlockStored: "process_block_stored",
        kvindex.BlockRemoved: "process_block_removed",
        kvindex.AllBlocksCleared: "process_all_blocks_cleared",
    }[type(event)]

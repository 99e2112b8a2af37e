"""Removing several blocks in one event and removing them event by event give the same index."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from support import answer_of, payload, report_of
from world import World, draw_setup, draw_step, sound

COMPARED = ("blocks", "chains", "sets", "workers", "parked")


def pieces(event: dict) -> list[dict]:
    """Return one event for each name in the event."""
    if event["type"] != "BlockRemoved":
        return [event]
    counts = event.get("remaining_copy_counts")
    return [
        {**event, "block_hashes": [name], **({"remaining_copy_counts": [counts[i]]} if counts else {})}
        for i, name in enumerate(event["block_hashes"])
    ]


@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_that_go_together_go_as_one_by_one(seed):
    rng = Random(seed)
    # Longer chains than a single draw gives, so that one event can remove many blocks.
    world = World(replace(draw_setup(rng), crowd=0, stretch=rng.choice([1, 3, 7])))
    apart = world.make_index()
    for pod, layout in world.layouts.items():
        apart.configure_pod(pod, **layout.options)
    for _ in range(25):
        step = draw_step(rng, "batch", rng.choice(["store", "extend", "remove", "remove"]))
        pod, rank, model = step.pod, step.rank, step.model
        for op in step.ops:
            event = world.event(pod, rank, model, op)
            if not (isinstance(event, dict) and sound(event)):
                continue
            world.remember(pod, rank, model, event)
            report = world.index.ingest(pod, payload(event, rank=rank), model=model)
            world.model.ingest(pod, payload(event, rank=rank), model=model)
            some = [apart.ingest(pod, payload(piece, rank=rank), model=model) for piece in pieces(event)]
            assert sum(each.removed for each in some) == report.removed
            assert sum(report_of(each)["skipped"] for each in some) == report_of(report)["skipped"]
            world.index._check()
            apart._check()
            for context, path, asked in world.asked:
                query = {"lora_name": context[0], "cache_salt": context[1], "model": asked}
                tokens = world.tokens(path)
                assert answer_of(world.index.match_prefix(tokens, **query)) == answer_of(
                    apart.match_prefix(tokens, **query)
                )
            for name in world.layouts:
                assert world.index.pod_state(name) == apart.pod_state(name)
                assert world.index.worker_stats(name) == apart.worker_stats(name)
            together, one_by_one = world.index.stats(), apart.stats()
            assert {name: together[name] for name in COMPARED} == {name: one_by_one[name] for name in COMPARED}

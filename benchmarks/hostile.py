"""The most that one pod can cost all others, by one event or by invented groups."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kvindex import PrefixIndex
from kvindex.sim.wire import Stored, encode_batch

from .data import BLOCK, chain, chains, fill, newest, payloads, stored
from .interleave import interleaved
from .reach import Reached

DEPTH, PROMPTS, CALLS = 64, 16, 512


def invented(groups: int, media: int) -> list[bytes]:
    """Batches that store one block in ``groups`` groups, and then in ``media`` media."""
    whole = stored(chain(61, 0, 1), 0, 1)
    events: list[Stored] = [whole._replace(group_idx=number) for number in range(groups)]
    events += [whole._replace(medium=f"medium-{number}") for number in range(media)]
    return [encode_batch(events[first : first + 1000], newest()) for first in range(0, len(events), 1000)]


def measure(*, rounds: int = 51, events: int = 7, blocks: int = 1_000_000) -> Iterator[Reached]:
    """``rounds``: interleaved rounds of matches; ``events``: rounds of long events; ``blocks``: in the long event."""
    contents = chains(60, PROMPTS, DEPTH)
    prompts = [content.tokens for content in contents] * (CALLS // PROMPTS)
    indexes = {"without": PrefixIndex(block_size=BLOCK), "beside": PrefixIndex(block_size=BLOCK)}
    for index in indexes.values():
        fill(index, contents, [f"pod-{number}" for number in range(8)])
    for payload in invented(20_000, 100_000):
        indexes["beside"].ingest("hostile", payload)
    matches = {name: index.match_prefix for name, index in indexes.items()}
    asked = interleaved(matches, lambda name, number: prompts, rounds).ratio("beside", "without")

    whole = chain(62, 0, blocks)
    sent = {name: list(payloads([whole], each)) for name, each in (("long", blocks), ("short", 10_000))}

    def store(name: str, index: PrefixIndex) -> None:
        for payload in sent[name]:
            index.ingest("pod", payload)

    stores = {name: partial(store, name) for name in sent}
    fresh = interleaved(stores, lambda name, number: [PrefixIndex(block_size=BLOCK)], events, warm=False).ratio(
        "long", "short"
    )
    where = f"{DEPTH} blocks, 8 pods"
    long = f"one event of {blocks:,} blocks against events of 10,000"
    yield Reached("match beside a pod of 20,000 groups, 100,000 media", where, "hostile", asked.median, asked)
    yield Reached("ns a block", long, "long event", fresh.median, fresh)

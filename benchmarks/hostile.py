"""``python -m benchmarks.hostile``: what one pod can cost all others, by one event or by inventing groups."""

from __future__ import annotations

import argparse
from functools import partial

from kvindex import PrefixIndex
from kvindex.sim.wire import Stored, encode_batch

from .data import BLOCK, chain, chains, fill, newest, payloads, stored
from .interleave import interleaved
from .machine import described
from .reach import Reached, verdicts

DEPTH, PROMPTS, CALLS = 64, 16, 512


def invented(groups: int, media: int) -> list[bytes]:
    """Batches of a pod that says of one block that it lies in so many groups, and then in so many media."""
    whole = stored(chain(61, 0, 1), 0, 1)
    events: list[Stored] = [whole._replace(group_idx=number) for number in range(groups)]
    events += [whole._replace(medium=f"medium-{number}") for number in range(media)]
    return [encode_batch(events[first : first + 1000], newest()) for first in range(0, len(events), 1000)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--rounds", type=int, default=51, help="interleaved rounds of matches (%(default)s)")
    parser.add_argument("--events", type=int, default=7, help="interleaved rounds of long events (%(default)s)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="of the long event (%(default)s)")
    options = parser.parse_args()
    contents = chains(60, PROMPTS, DEPTH)
    prompts = [content.tokens for content in contents] * (CALLS // PROMPTS)
    indexes = {"without": PrefixIndex(block_size=BLOCK), "beside": PrefixIndex(block_size=BLOCK)}
    for index in indexes.values():
        fill(index, contents, [f"pod-{number}" for number in range(8)])
    for payload in invented(20_000, 100_000):
        indexes["beside"].ingest("hostile", payload)
    matches = {name: index.match_prefix for name, index in indexes.items()}
    asked = interleaved(matches, lambda name, number: prompts, options.rounds).ratio("beside", "without")

    whole = chain(62, 0, options.blocks)
    sent = {name: list(payloads([whole], each)) for name, each in (("long", options.blocks), ("short", 10_000))}

    def store(name: str, index: PrefixIndex) -> None:
        for payload in sent[name]:
            index.ingest("pod", payload)

    stores = {name: partial(store, name) for name in sent}
    fresh = interleaved(stores, lambda name, number: [PrefixIndex(block_size=BLOCK)], options.events, warm=False).ratio(
        "long", "short"
    )
    where = f"{DEPTH} blocks, 8 pods"
    events = f"one event of {options.blocks:,} blocks against events of 10,000"
    marks = [
        Reached("match beside a pod of 20,000 groups, 100,000 media", where, "hostile", asked.median, asked),
        Reached("ns a block", events, "long event", fresh.median, fresh),
    ]
    print(verdicts(marks))
    print(", ".join(f"{name} {value}" for name, value in described("numpy").items()))


if __name__ == "__main__":
    main()

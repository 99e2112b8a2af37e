"""Fleets of hybrid pods with different contents: their shared walk must give each pod its own answer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support import Pair, removed, stored

SIZE, DEPTH = 4, 24
KINDS = {
    "full": {"kv_cache_spec_kind": "full_attention"},
    "sliding": {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 9},
    "mamba": {"kv_cache_spec_kind": "mamba"},
    "chunked": {"kv_cache_spec_kind": "chunked_local_attention"},
}
MIXES = (("full", "sliding"), ("full", "mamba"), ("full", "full"), ("sliding",), ("full", "chunked"), ("full",))

# A group's copies in one medium: blocks from 0 to an end, with some missing in between.
runs = st.tuples(
    st.integers(1, DEPTH // 2), st.lists(st.integers(0, DEPTH // 2 - 1), max_size=2), st.sampled_from((1, 2))
)
pods = st.tuples(st.sampled_from(MIXES), st.booleans(), st.lists(runs, min_size=4, max_size=4), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(pods, min_size=2, max_size=40), st.integers(1, DEPTH), st.data())
def test_every_pod_has_its_own_answer(fleet, depth, data):
    pair = Pair(SIZE)
    hashes = list(range(1, DEPTH + 1))
    tokens = [h for h in hashes for _ in range(SIZE)]
    for number, (mix, two_media, held, alike) in enumerate(fleet):
        name = f"pod-{number}"
        events = []
        for group, kind in enumerate(mix):
            for medium in ("GPU", "CPU") if two_media else ("GPU",):
                end, gone, k = held[0] if alike else held[2 * (group % 2) + (medium == "CPU")]
                here = {"group_idx": group, "medium": medium}
                events.append(
                    stored(hashes[k - 1 : end * k : k], tokens[: end * k * SIZE], size=k * SIZE, **here, **KINDS[kind])
                )
                events += [removed(hashes[k - 1 + b * k], **here) for b in set(gone) if b < end]
        pair.ingest(name, *events)
        if number % 5 == 0:
            pair.do("configure_pod", name, chunk_size=2 * SIZE)
        if number % 7 == 0:
            pair.do("add_prefix", name, tokens[: 3 * SIZE], ttl=1e12, now=0.0)
    answer = pair.ask(tokens[: depth * SIZE])
    # A filter does not change the answers of the other pods.
    some = data.draw(st.sets(st.sampled_from([f"pod-{number}" for number in range(len(fleet))])))
    match = pair.index.match_prefix(tokens[: depth * SIZE], ready_pods=some)
    assert match.tokens == {pod: it["tokens"] for pod, it in answer.items() if pod in some}
    best = match.best()
    assert (best and best[1]) == max((it["tokens"] for pod, it in answer.items() if pod in some), default=None)

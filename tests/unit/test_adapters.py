"""Adapters: payloads written after their sources, compared with the answers for the same tokens."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvindex
from kvindex import EventDecodeError, InvalidTypeError, InvalidValueError, KVIndexError, PrefixIndex
from kvindex.adapters import DynamoEvents, MooncakeEvents, TrtllmEvents

SIZE = 4
TOKENS = np.arange(100, 124, dtype=np.uint32)
LOCAL, PREFIX = (
    make(TOKENS, block_size=SIZE).tolist() for make in (kvindex.local_hashes, kvindex.prefix_hashes)
)  # fmt: skip


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(block_size=SIZE)


def held(index: PrefixIndex, n: int = len(TOKENS), **context: Any) -> dict[str, int]:
    return index.match_prefix(TOKENS[:n], **context).tokens


# ------------------------------------------------------------------------------------------------------- TensorRT-LLM


def trt_block(name: Any, i: int, level: int = 0, extra: int = 0, n: int = SIZE) -> dict:
    tokens = TOKENS[i * SIZE : i * SIZE + n].tolist()
    return {
        "type": "stored_block", "block_hash": name, "cache_level": level, "priority": 35,
        "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": extra} for t in tokens],
    }  # fmt: skip


def trt(number: int, kind: str, window: int = 4096, rank: int | None = None, **data: Any) -> dict:
    event = {"event_id": number, "data": {"type": kind, **data}, "window_size": window}
    return event if rank is None else {**event, "attention_dp_rank": rank}


def moved(old: int, new: int) -> dict:
    return {"type": "event_diff", "new_value": new, "old_value": old}


@pytest.fixture
def server(index) -> TrtllmEvents:
    events = TrtllmEvents(index, "t", block_size=SIZE)
    events.apply(trt(0, "created", num_blocks_per_cache_level=[100, 10]))
    blocks = [trt_block(-5, 0), trt_block(2**63 + 1, 1), trt_block(7, 2)]
    assert events.apply([trt(1, "stored", parent_hash=None, blocks=blocks)])["stored"] == 3
    return events


def test_trtllm_blocks_are_held_until_they_are_removed(index, server):
    assert held(index) == {"t": 12}
    assert index.pod_state("t") == "exact"
    server.apply(json.dumps([trt(2, "removed", block_hashes=[7])]))
    assert held(index) == {"t": 8}
    server.apply(trt(3, "stored", parent_hash=2**63 + 1, blocks=[trt_block(7, 2)]))
    assert held(index) == {"t": 12}


def test_trtllm_an_update_moves_a_block_to_another_tier(index, server):
    server.apply(trt(2, "updated", block_hash=7, cache_level=moved(0, 1), priority=None))
    match = index.match_prefix(TOKENS)
    assert match.tokens == {"t": 12}
    assert match["t"].media["GPU"] == 8
    server.apply(trt(3, "updated", block_hash=7, cache_level=None, priority=moved(35, 90)))
    server.apply(trt(4, "removed", block_hashes=[7]))
    assert held(index) == {"t": 8}


def test_trtllm_blocks_of_one_event_lie_in_their_own_tiers(index, server):
    blocks = [trt_block(8, 3, level=1), trt_block(9, 4)]
    server.apply(trt(2, "stored", parent_hash=7, blocks=blocks))
    match = index.match_prefix(TOKENS)
    assert (match.tokens, match["t"].media["GPU"]) == ({"t": 20}, 12)


def test_trtllm_a_stored_event_that_repeats_a_block_makes_no_second_copy(index, server):
    server.apply(trt(2, "stored", parent_hash=2**63 + 1, blocks=[trt_block(7, 2)]))
    server.apply(trt(3, "removed", block_hashes=[7]))
    assert held(index) == {"t": 8}
    assert index.pod_state("t") == "exact"


def test_trtllm_a_partial_block_is_left_out_and_so_is_its_removal(index, server):
    counts = server.apply(trt(2, "stored", parent_hash=7, blocks=[trt_block(8, 3), trt_block(9, 4, n=2)]))
    assert (counts["stored"], counts["partial_block"]) == (1, 1)
    assert server.apply(trt(3, "removed", block_hashes=[9]))["skipped"] == 0
    assert (held(index), index.pod_state("t")) == ({"t": 16}, "exact")


def test_trtllm_extra_ids_are_a_part_of_a_block(index, server):
    server.apply(trt(2, "stored", parent_hash=7, blocks=[trt_block(8, 3, extra=9)]))
    assert held(index) == {"t": 12}
    assert held(index, extra_keys=[None, None, None, [9] * SIZE]) == {"t": 16}


def test_trtllm_ranks_are_kept_apart_and_have_numbers_of_their_own(index, server):
    server.apply([trt(0, "created", rank=1, num_blocks_per_cache_level=[1]),
                  trt(1, "stored", rank=1, parent_hash=None, blocks=[trt_block(-5, 0)])])  # fmt: skip
    assert index.match_prefix(TOKENS)["t"].ranks == {0: 12, 1: 4}
    assert index.pod_state("t") == "exact"


def test_trtllm_lost_events_degrade_the_server_until_it_starts_anew(index, server):
    assert server.apply(trt(4, "removed", block_hashes=[7]))["lost"] == 2
    assert (held(index), index.pod_state("t")) == ({"t": 8}, "degraded")
    server.apply([trt(0, "created", num_blocks_per_cache_level=[100]),
                  trt(1, "stored", parent_hash=None, blocks=[trt_block(1, 0)])])  # fmt: skip
    assert (held(index), index.pod_state("t")) == ({"t": 4}, "exact")


def test_trtllm_a_smaller_window_limits_the_answer_and_is_not_exact(index):
    events = TrtllmEvents(index, "t", block_size=SIZE)
    events.apply([
        trt(0, "created", 8, num_blocks_per_cache_level=[9]), trt(1, "created", 4096, num_blocks_per_cache_level=[9]),
        trt(2, "stored", 4096, parent_hash=None, blocks=[trt_block(i, i) for i in range(6)]),
        trt(3, "stored", 8, parent_hash=None, blocks=[trt_block(i, i) for i in range(6)]),
    ])  # fmt: skip
    assert held(index) == {"t": 24}
    events.apply(trt(4, "removed", 8, block_hashes=[4]))
    assert held(index) == {"t": 16}
    assert index.pod_state("t") == "degraded"


def test_trtllm_a_window_that_nothing_announced_cannot_be_told_from_full_attention(index):
    events = TrtllmEvents(index, "t", block_size=SIZE)
    events.apply(trt(0, "stored", 8, parent_hash=None, blocks=[trt_block(1, 0)]))
    late = trt(1, "stored", 4096, parent_hash=None, blocks=[trt_block(1, 0)])
    assert events.apply(late)["bad_event"] == 1
    assert index.pod_state("t") == "degraded"
    told = TrtllmEvents(index, "u", block_size=SIZE, full_window=4096)
    assert told.apply([trt(0, "stored", 8, parent_hash=None, blocks=[trt_block(1, 0)]), late])["bad_event"] == 0


def test_trtllm_hexadecimal_hashes_of_the_second_cache_manager(index):
    events = TrtllmEvents(index, "t", block_size=SIZE)
    first, second = "ab" * 32, "cd" * 32
    events.apply(trt(0, "stored", parent_hash=None, blocks=[trt_block(first, 0), trt_block(second, 1)]))
    events.apply(trt(1, "removed", block_hashes=[second]))
    assert held(index) == {"t": 4}


# -------------------------------------------------------------------------------------------------------------- Dynamo


def router_event(number: int, data: Any, worker: int = 3, tier: str | None = None, rank: int = 0, **more: Any) -> dict:
    event = {"worker_id": worker, "event": {"event_id": number, "data": data, "dp_rank": rank}, **more}
    return event if tier is None else {**event, "storage_tier": tier}


def dynamo_stored(first: int, end: int, parent: int | None = None) -> dict:
    blocks = [
        {"block_hash": 1000 + i, "tokens_hash": LOCAL[i], "mm_extra_info": None} for i in range(first, end)
    ]  # fmt: skip
    return {"stored": {"parent_hash": parent, "blocks": blocks}}


def test_dynamo_blocks_are_placed_by_the_hash_of_their_tokens(index):
    events = DynamoEvents(index, model="m")
    events.apply(json.dumps([router_event(0, dynamo_stored(0, 3)), router_event(1, dynamo_stored(3, 6, 1002))]))
    assert held(index, model="m") == {"3": 24}
    events.apply(router_event(2, {"removed": {"block_hashes": [1004]}}))
    assert (held(index, model="m"), index.pod_state("3")) == ({"3": 16}, "exact")


def test_dynamo_a_prompt_with_an_adapter_has_its_hash(index):
    tokens_hash = int(kvindex.local_hashes(TOKENS[:4], block_size=SIZE, lora_name="sql")[0])
    data = {"stored": {"parent_hash": None, "blocks": [{"block_hash": 1, "tokens_hash": tokens_hash}]}}
    DynamoEvents(index).apply(router_event(0, data))
    assert (held(index), held(index, lora_name="sql")) == ({}, {"3": 4})


def test_dynamo_tiers_and_ranks(index):
    events = DynamoEvents(index, pod=lambda worker: f"w{worker}")
    events.apply([router_event(0, dynamo_stored(0, 2), tier="device"),
                  router_event(1, dynamo_stored(0, 4), tier="host_pinned"),
                  router_event(0, dynamo_stored(0, 1), rank=1)])  # fmt: skip
    match = index.match_prefix(TOKENS)["w3"]
    assert match.ranks == {0: 16, 1: 4}
    assert match.media == {"GPU": 8, "CPU_PINNED": 16}
    events.apply(router_event(1, "cleared", rank=1))
    assert index.match_prefix(TOKENS)["w3"].ranks == {0: 16}


def test_dynamo_a_gap_degrades_and_a_clear_makes_up_for_it(index):
    events = DynamoEvents(index)
    events.apply([router_event(0, dynamo_stored(0, 2)), router_event(5, dynamo_stored(2, 4, 1001))])
    assert (held(index), index.pod_state("3")) == ({"3": 16}, "degraded")
    events.apply([router_event(6, "cleared"), router_event(7, dynamo_stored(0, 1))])
    assert (held(index), index.pod_state("3")) == ({"3": 4}, "exact")
    events.apply(router_event(0, dynamo_stored(0, 2)))
    assert (held(index), index.pod_state("3")) == ({"3": 8}, "exact")


def test_dynamo_a_dump_is_taken_whatever_its_numbers_are(index):
    ours = [router_event(9, dynamo_stored(0, 2)), router_event(9, dynamo_stored(0, 1), 4)]
    other = [router_event(0, dynamo_stored(0, 6), 5)]
    dump = {
        "llama:default": {"block_size": SIZE, "events": ours},
        "other:default": {"block_size": 64, "events": other},
    }
    counts = DynamoEvents(index).load(json.dumps(dump))
    assert (counts["stored"], counts["block_size_mismatch"], counts["lost"]) == (3, 1, 0)
    assert held(index) == {"3": 8, "4": 4}
    assert index.pod_state("3") == "exact"


def test_dynamo_lines_of_the_recorder_and_events_that_are_no_workers(index):
    events = DynamoEvents(index)
    line = {"timestamp": 12, "event": router_event(0, dynamo_stored(0, 2))}
    assert events.apply(json.dumps(line))["stored"] == 2
    outside = router_event(1, dynamo_stored(2, 4, 1001), residency_domain="cache_owner")
    assert events.apply(outside)["not_a_workers"] == 1
    assert (held(index), index.pod_state("3")) == ({"3": 8}, "exact")


# ------------------------------------------------------------------------------------------------------------ Mooncake


def store_event(number: int, kind: str, backend: str = "s", **more: Any) -> dict:
    return {
        "event_id": number, "timestamp": 1739145600000, "event_type": kind, "model_name": None, "block_size": SIZE,
        "additional_salt": None, "lora_name": None, "tenant_id": "default", "backend_id": backend, "medium": "cpu",
        "dp_rank": 0, **more,
    }  # fmt: skip


def put(number: int, first: int, end: int, **more: Any) -> dict:
    place = {"base_block_idx": first, "parent_hash": PREFIX[first - 1] if first else None, "token_ids": None}
    return store_event(number, "stored", seq_hashes=PREFIX[first:end], **{**place, **more})


def batch(*events: dict) -> bytes:
    return msgpack.packb([1739145600000, list(events), 0])


def test_mooncake_blocks_are_placed_by_their_prefix_hashes(index):
    events = MooncakeEvents(index)
    events.apply(batch(put(1, 0, 2), put(2, 2, 6), put(3, 0, 1, backend_id="t", medium="disk")))
    match = index.match_prefix(TOKENS)
    assert match.tokens == {"s": 24, "t": 4}
    assert (match["s"].media, match["t"].media) == ({"CPU": 24}, {"DISK": 4})
    events.apply(batch(store_event(4, "removed", seq_hashes=[PREFIX[3]])))
    assert (held(index)["s"], index.pod_state("s")) == (12, "exact")


def test_mooncake_one_medium_goes_and_the_other_stays(index):
    events = MooncakeEvents(index)
    events.apply(batch(put(0, 0, 2), put(1, 0, 2, medium="disk"), put(2, 0, 2)))
    events.apply(batch(store_event(3, "removed", seq_hashes=PREFIX[:2])))
    assert index.match_prefix(TOKENS)["s"].media == {"DISK": 8}
    events.apply(batch(store_event(4, "cleared", medium=None)))
    assert held(index) == {}


def test_mooncake_a_block_without_a_place_waits_for_one(index):
    events = MooncakeEvents(index)
    nowhere = put(1, 0, 1, base_block_idx=None)
    assert events.apply(batch(nowhere))["parked"] == 1
    assert (held(index), index.pod_state("s")) == ({}, "degraded")
    events.apply(batch(put(2, 0, 1)))
    assert (held(index), index.pod_state("s")) == ({"s": 4}, "exact")
    events.apply(batch(store_event(3, "removed", seq_hashes=PREFIX[:1])))
    assert held(index) == {}


def test_mooncake_legacy_names_signed_hashes_and_keys_without_a_hash(index):
    events = MooncakeEvents(index)
    legacy = put(1, 0, 1)
    del legacy["event_type"], legacy["seq_hashes"]
    signed = int(np.array(PREFIX[0], dtype=np.uint64).astype(np.int64))
    events.apply(batch({**legacy, "type": "BlockStored", "block_hashes": [signed]}))
    assert held(index) == {"s": 4}
    counts = events.apply(batch(store_event(2, "stored", seq_hashes=[], object_key="model@1@abc")))
    assert (counts["no_hash"], index.pod_state("s")) == (1, "degraded")


def test_mooncake_models_and_tenants(index):
    events = MooncakeEvents(index)
    other = put(2, 0, 1, tenant_id="acme")
    counts = events.apply(batch(put(1, 0, 2, model_name="m"), other))
    assert (counts["stored"], counts["other_tenant"]) == (2, 1)
    assert (held(index), held(index, model="m")) == ({}, {"s": 8})
    named = PrefixIndex(block_size=SIZE)
    MooncakeEvents(named, model="n", tenant="acme").apply(batch(put(1, 0, 2, model_name="m"), other))
    assert held(named, model="n") == {"s": 4}


def test_mooncake_a_gap_or_a_late_start_degrades_all_pods_also_those_to_come(index):
    events = MooncakeEvents(index)
    assert events.apply(batch(put(7, 0, 2)))["lost"] == 6
    events.apply(batch(put(8, 0, 2, backend_id="t")))
    assert {index.pod_state(name) for name in "st"} == {"degraded"}
    events.apply(batch(store_event(9, "cleared", "t", medium=None)))
    assert (index.pod_state("s"), index.pod_state("t")) == ("degraded", "exact")
    events.apply(batch(put(1, 0, 1)))
    assert (held(index), index.pod_state("s")) == ({"s": 4}, "exact")


def test_mooncake_blocks_of_another_size_are_not_placed(index):
    assert MooncakeEvents(index).apply(batch(put(1, 0, 1, block_size=64)))["block_size_mismatch"] == 1
    assert index.pod_state("s") == "degraded"


# ----------------------------------------------------------------------------------------------------------- bad input


def test_hashes_of_another_seed_are_refused():
    index = PrefixIndex(block_size=SIZE, hash_seed=1)
    for make in (DynamoEvents, MooncakeEvents):
        with pytest.raises(InvalidValueError, match=r"hash_seed is 1; .* need PrefixIndex\(hash_seed=1337\)"):
            make(index)
    with pytest.raises(InvalidValueError, match="multiple of the index's 4"):
        TrtllmEvents(index, "t", block_size=6)


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x93\x01", msgpack.packb({"a": 1}), msgpack.packb([1]), b"\x91" * 9999]
)
def test_mooncake_what_is_no_batch_is_refused(index, payload):
    with pytest.raises(EventDecodeError, match="the payload is no"):
        MooncakeEvents(index).apply(payload)


def test_what_is_no_json_or_no_events_is_refused(index):
    for adapter in (DynamoEvents(index), TrtllmEvents(index, "t", block_size=SIZE)):
        with pytest.raises(EventDecodeError) as caught:
            adapter.apply('[{"a": ]')
        assert caught.value.offset == 7
        with pytest.raises(EventDecodeError):
            adapter.apply(b"\xff\xfe\xff")
        with pytest.raises(InvalidTypeError, match="events are 7"):
            adapter.apply(7)


GOOD = {
    "trtllm": trt(0, "stored", parent_hash=None, blocks=[trt_block(1, 0), trt_block(2, 1)]),
    "dynamo": router_event(0, dynamo_stored(0, 2), tier="device"),
    "mooncake": put(0, 0, 2),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def spoilt(value: Any, dice: st.DataObject) -> Any:
    """Return the value with a part replaced or removed."""
    if isinstance(value, (dict, list)) and value and dice.draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = dice.draw(st.sampled_from(keys))
        copy = value.copy()
        copy[key] = spoilt(value[key], dice)
        if isinstance(value, dict) and dice.draw(st.integers(0, 4)) == 0:
            del copy[key]
        return copy
    return dice.draw(JSON)


@pytest.mark.parametrize("name", list(GOOD))
@given(st.data())
def test_an_event_that_is_not_as_described_costs_itself_only(name, data):
    index = PrefixIndex(block_size=SIZE)
    adapter: Any = {"dynamo": DynamoEvents, "mooncake": MooncakeEvents}.get(name)
    adapter = adapter(index) if adapter else TrtllmEvents(index, "t", block_size=SIZE, full_window=4096)
    bad = spoilt(GOOD[name], data)
    events = [bad, GOOD[name]]
    try:
        adapter.apply([0, events, 0] if name == "mooncake" else events)
    except KVIndexError as error:
        pytest.fail(f"{error!r} for {bad!r}")
    index._check()
    # The good event is applied, even after the number of the bad event.
    assert 8 in index.match_prefix(TOKENS).tokens.values()

"""Bad input: one clear exception or a counted skip, and never a half-applied change."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from support import Pair, cleared, payload, removed, stored

import kvindex
from kvindex import AllBlocksCleared, BlockRemoved, BlockStored, KVIndexError, PrefixIndex

A, B, C = ([i] * 4 for i in (1, 2, 3))
PROMPT = A + B + C


@pytest.fixture
def index() -> PrefixIndex:
    """Two pods with a few blocks, a parked block, and a third pod with a speculative entry."""
    index = PrefixIndex(4)
    index.ingest("a", payload(stored([1, 2], A + B), stored([1], A, medium="CPU"), stored([9], C, parent=8)))
    index.ingest("b", payload(stored([1], A), stored([2], B, parent=1)), dp_rank=1)
    index.add_prefix("c", A, ttl=1e6)
    return index


def everything(index: PrefixIndex) -> dict[str, Any]:
    """Return the whole visible state of an index, except the counters of its input."""
    index._check()
    stats = index.stats()
    match = index.match_prefix(PROMPT)
    return {
        "stats": {
            name: stats[name] for name in ("blocks", "chains", "holders", "pods", "workers", "parked", "guesses")
        },
        "tokens": match.tokens,
        "pods": {pod: match[pod] for pod in match.tokens},
        "workers": {pod: index.worker_stats(pod) for pod in "abc"},
    }


def refused(
    index: PrefixIndex, builtin: type[Exception], said: tuple[str, ...], call, *args: Any, **kwargs: Any
) -> None:
    """Check that the call raises a KVIndexError of type `builtin` with all of `said`, and changes nothing."""
    before = everything(index)
    with pytest.raises(KVIndexError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, builtin)
    for part in said:
        assert part in str(caught.value)
    assert everything(index) == before


# ------------------------------------------------------------------------------------ payloads that are not batches

NO_BATCH = {
    "nothing": b"",
    "an int": b"\x2a",
    "a string": msgpack.packb("x" * 40),
    "an empty array": b"\x90",
    "no events": msgpack.packb([1.5]),
    "events as a map": msgpack.packb([1.5, cleared(), 0]),
    "a timestamp as text": msgpack.packb(["now", []]),
    "a rank as text": msgpack.packb([1.5, [], "0"]),
    "a byte that means nothing": b"\xc1",
    "an array of 2^32 - 1": b"\xdd\xff\xff\xff\xff\x01",
    "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff\x01",
    "events of 2^32 - 1": b"\x92\xcb" + b"\0" * 8 + b"\xdd\xff\xff\xff\xff",
    "hashes of 2^32 - 1": b"\x92\xcb" + b"\0" * 8 + b"\x91\x92\xacBlockRemoved\xdd\xff\xff\xff\xff\x01",
    "bytes longer than the payload": b"\x92\xcb" + b"\0" * 8 + b"\x91\x92\xacBlockRemoved\x91\xc6\xff\xff\xff\xff\x01",
    "one byte too many": payload(stored([5], C)) + b"\x00",
    "two batches": payload(stored([5], C)) * 2,
    "nesting without end": b"\x91" * 100_000,
}


@pytest.mark.parametrize("data", NO_BATCH.values(), ids=NO_BATCH)
def test_a_payload_that_is_no_batch_is_one_error_and_changes_nothing(index, data):
    before = everything(index)
    for pod in ("b", "new"):
        with pytest.raises(kvindex.EventDecodeError, match="byte") as caught:
            index.ingest(pod, data)
        assert isinstance(caught.value, ValueError)
        assert 0 <= caught.value.offset <= len(data)
    assert everything(index) == before
    with pytest.raises(kvindex.UnknownPodError):
        index.pod_state("new")
    assert index.stats()["bad_payloads"] == 2


def test_a_payload_cut_at_any_byte_changes_nothing(index):
    data = payload(
        stored([5, 6], B + C, lora_name="sql", extra_keys=[["sql", ["mm", 1]], None]),
        removed(1, b"\x01" * 32),
        cleared(),
        rank=1,
    )
    before = everything(index)
    for at in range(len(data)):
        with pytest.raises(kvindex.EventDecodeError) as caught:
            index.ingest("b", data[:at])
        assert caught.value.offset <= at
    assert everything(index) == before


def test_a_lost_payload_degrades_the_worker_whose_it_was(index):
    for _ in range(2):
        with pytest.raises(kvindex.EventDecodeError):
            index.ingest("b", b"\xc1", dp_rank=1)
    assert index.pod_state("b") == "degraded"
    assert index.match_prefix(PROMPT).tokens["b"] == 8


@pytest.mark.parametrize("data", ["text", 7, None, [1.5, []], np.zeros((4, 4), np.uint8)[:, ::2]], ids=repr)
def test_a_payload_is_bytes(index, data):
    refused(index, TypeError, ("payload",), index.ingest, "a", data)


# --------------------------------------------------------------------------------------- bad events among good ones

BAD_EVENTS = {
    "a negative token": (stored([7], [1, 2, 3, -1]), "bad_token"),
    "a huge token": (stored([7], [1, 2, 2**32, 4]), "bad_token"),
    "a float token": (stored([7], [1, 2.0, 3, 4]), "bad_token"),
    "a string token": (stored([7], [1, "2", 3, 4]), "bad_token"),
    "pairs that do not join": (stored([7], [[1, 2], [2, 3], [4, 4], [4, 5]]), "bad_token"),
    "no token": (stored([7], [1, None, 3, 4]), "bad_token"),
    "tokens as bytes": ({**stored([7], A), "token_ids": b"1234"}, "bad_event"),
    "tokens as text": ({**stored([7], A), "token_ids": "1234"}, "bad_event"),
    "no hash": ({**stored([7], A), "block_hashes": None}, "bad_event"),
    "an empty hash": (stored([7, b""], A + B), "bad_event"),
    "a float as hash": (stored([7, 1.5], A + B), "bad_event"),
    "text as hash": (stored([7, "8"], A + B), "bad_event"),
    "text as parent": (stored([7], A, parent="8"), "bad_event"),
    "a negative size": (stored([7], A, size=-4), "bad_event"),
    "text as size": (stored([7], A, size="4"), "bad_event"),
    "a wrong size": (stored([7, 8], [1] * 6, size=3), "block_size_mismatch"),
    "no size": (stored([7], A, size=0), "block_size_mismatch"),
    "a huge size": (stored([7], A, size=2**31), "block_size_mismatch"),
    "keys that are none": (stored([7], A, extra_keys=["image"]), "bad_event"),
    "a map as key": (stored([7, 8], A + B, extra_keys=[None, [{"image": 1}]]), "bad_event"),
    "a number as medium": (stored([7], A, medium=1), "bad_event"),
    "text as group": (stored([7], A, group_idx="0"), "bad_event"),
    "a removal with a bad hash": (removed(1, b""), "bad_event"),
    "a removal without hashes": ({"type": "BlockRemoved"}, "bad_event"),
    "a removal of a number": ({"type": "BlockRemoved", "block_hashes": 1}, "bad_event"),
    "a stored event cut short": (["BlockStored", [7], None], "bad_event"),
    "a number": (5, "bad_event"),
    "nothing": (None, "bad_event"),
    "text": ("BlockStored", "bad_event"),
    "an empty array": ([], "bad_event"),
    "an unknown tag": (["BlockMoved", [1]], "unknown_event"),
    "an unknown type": ({"type": "BlockMoved", "block_hashes": [1]}, "unknown_event"),
    "no type": ({"event_type": "stored", "seq_hashes": [1]}, "unknown_event"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_EVENTS.values(), ids=BAD_EVENTS)
def test_one_bad_event_does_not_cost_its_siblings(bad, reason):
    pair = Pair(4)
    pair.ingest("a", stored([1], A))
    report = pair.ingest("a", stored([2], B, parent=1), bad, stored([3], C, parent=2))
    assert report["stored"] == 2
    assert report["reasons"] == {reason: 1}
    assert report["skipped"] == 1
    assert report["errors"] == (reason in ("bad_event", "bad_token"))
    assert pair.tokens(PROMPT) == {"a": 12}
    assert pair.index.stats()["blocks"] == 3


@pytest.mark.parametrize(("bad", "reason"), BAD_EVENTS.values(), ids=BAD_EVENTS)
def test_a_bad_event_of_a_new_pod_leaves_it_empty(bad, reason):
    pair = Pair(4)
    assert pair.ingest("a", bad)["reasons"] == {reason: 1}
    assert pair.tokens([1] * 12) == {}
    assert pair.index.stats()["blocks"] == pair.index.stats()["parked"] == 0


def test_events_have_room_for_what_comes_next():
    pair = Pair(4)
    future = ["BlockStored", [1], None, A, 4, None, "GPU", None, None, 0, "full_attention", None, "LOCAL", {"x": [1]}]
    pair.ingest("a", future, {**stored([2], B, parent=1), "locality": "REMOTE", "": None, "later": [{"deep": [1]}]})
    assert pair.tokens(A + B) == {"a": 8}
    assert pair.state("a") == "exact"


def test_nothing_at_all_is_fine():
    pair = Pair(4)
    assert pair.ingest("a")["skipped"] == 0
    assert pair.ingest("", stored([1], A))["stored"] == 1
    for event in (stored([], ()), stored([], (), size=0), stored([], (), size=None), removed(), cleared()):
        report = pair.ingest("a", event)
        assert (report["stored"], report["removed"], report["skipped"]) == (0, 0, 0)
    assert pair.tokens(A) == {"": 4}
    assert pair.state("a") == "exact"
    assert pair.tokens([]) == {}
    assert pair.index.match_hashes([]).tokens == {}
    assert pair.index.match_prefix([]).best() is None
    assert pair.index.match_prefix([]).percent == {}
    assert PrefixIndex().match_prefix(range(100)).tokens == {}


# ------------------------------------------------------------------------------------------------ events as objects

BAD_STORED = {
    "tokens as bytes": ({"token_ids": b"1234"}, TypeError, ("token_ids", "tokens_from_bytes")),
    "a negative token": ({"token_ids": [1, 2, -3, 4]}, ValueError, ("token_ids[2]", "-3", "4294967295")),
    "a huge token": ({"token_ids": np.array([1, 2, 3, 2**32])}, ValueError, ("token_ids[3]", "4294967296")),
    "a float token": ({"token_ids": [1, 2.5, 3, 4]}, TypeError, ("token_ids[1]", "2.5")),
    "float tokens": ({"token_ids": np.ones(4)}, TypeError, ("token_ids",)),
    "tokens in two dimensions": ({"token_ids": np.ones((2, 2), np.uint32)}, ValueError, ("token_ids", "2 dimensions")),
    "tokens in no order": ({"token_ids": {1, 2, 3, 4}}, TypeError, ("token_ids", "set")),
    "no hashes": ({"block_hashes": None}, TypeError, ("block_hashes",)),
    "a hash as text": ({"block_hashes": [5, "6"]}, TypeError, ("block_hashes[1]", "'6'")),
    "an empty hash": ({"block_hashes": [5, b""]}, ValueError, ("block_hashes[1]",)),
    "a hash of 65 bits": ({"block_hashes": [2**64]}, ValueError, ("block_hashes[0]", "64 bits")),
    "a very negative hash": ({"block_hashes": [-(2**63) - 1]}, ValueError, ("block_hashes[0]", "64 bits")),
    "a float hash": ({"block_hashes": [1.0]}, TypeError, ("block_hashes[0]",)),
    "a parent as text": ({"parent_block_hash": "1"}, TypeError, ("parent_block_hash", "'1'")),
    "a size as text": ({"block_size": "4"}, TypeError, ("block_size", "'4'")),
    "a negative size": ({"block_size": -4}, ValueError, ("block_size", "-4")),
    "a float size": ({"block_size": 4.0}, TypeError, ("block_size", "4.0")),
    "a group as text": ({"group_idx": "1"}, TypeError, ("group_idx", "'1'")),
    "a negative group": ({"group_idx": -1}, ValueError, ("group_idx", "-1")),
    "a medium as number": ({"medium": 3}, TypeError, ("medium", "3")),
    "a lora_name as bytes": ({"lora_name": b"x"}, TypeError, ("lora_name",)),
    "a lora_id as float": ({"lora_id": 1.5}, TypeError, ("lora_id", "1.5")),
    "a kind as number": ({"kv_cache_spec_kind": 1}, TypeError, ("kv_cache_spec_kind",)),
    "a window as text": ({"kv_cache_spec_sliding_window": "9"}, TypeError, ("kv_cache_spec_sliding_window",)),
    "a salt as bytes": ({"cache_salt": b"s"}, TypeError, ("cache_salt",)),
    "keys as text": ({"extra_keys": "image"}, TypeError, ("extra_keys",)),
    "an entry as text": ({"extra_keys": [None, "image"]}, TypeError, ("extra_keys[1]",)),
    "a key of no kind": ({"extra_keys": [[object()]]}, ValueError, ("extra_keys",)),
    "a rank as text": ({"dp_rank": "1"}, TypeError, ("dp_rank", "'1'")),
    "a negative rank": ({"dp_rank": -1}, ValueError, ("dp_rank", "-1")),
    "a pod as number": ({"pod": 7}, TypeError, ("pod", "7")),
    "a model as bytes": ({"model": b"m"}, TypeError, ("model",)),
    "a pod without UTF-8": ({"pod": "\ud800"}, ValueError, ("pod", "UTF-8")),
}


@pytest.mark.parametrize(("wrong", "builtin", "said"), BAD_STORED.values(), ids=BAD_STORED)
@pytest.mark.parametrize("pod", ["a", "new"])
def test_a_wrong_field_of_a_stored_object_is_named_and_nothing_is_stored(index, wrong, builtin, said, pod):
    event = BlockStored(
        **{"pod": pod, "block_hashes": [5], "token_ids": C, "parent_block_hash": 2, "block_size": 4, **wrong}
    )
    refused(index, builtin, said, index.process_block_stored, event)


@pytest.mark.parametrize(
    ("wrong", "builtin", "said"),
    [
        (case)
        for name, case in BAD_STORED.items()
        if set(case[0]) <= {"block_hashes", "group_idx", "medium", "dp_rank", "pod"}
    ],
)
@pytest.mark.parametrize("pod", ["a", "new"])
def test_a_wrong_field_of_a_removed_object_is_named_and_nothing_is_removed(index, wrong, builtin, said, pod):
    refused(
        index, builtin, said, index.process_block_removed, BlockRemoved(**{"pod": pod, "block_hashes": [1], **wrong})
    )


@pytest.mark.parametrize(
    ("wrong", "builtin", "said"),
    [
        ({"dp_rank": "1"}, TypeError, ("dp_rank",)),
        ({"dp_rank": -2}, ValueError, ("dp_rank", "-2")),
        ({"pod": None}, TypeError, ("pod",)),
    ],
)
def test_a_wrong_field_of_a_cleared_object_is_named_and_nothing_is_cleared(index, wrong, builtin, said):
    refused(index, builtin, said, index.process_all_blocks_cleared, AllBlocksCleared(**{"pod": "a", **wrong}))


def test_a_key_that_no_engine_sends_is_a_counted_skip(index):
    before = everything(index)["tokens"]
    report = index.process_block_stored(
        BlockStored(
            pod="a", block_hashes=[5], token_ids=C, parent_block_hash=2, block_size=4, extra_keys=[[{"image": 1}]]
        )
    )
    assert (report.stored, report.skipped, report.errors, report.reasons) == (0, 1, 1, {"bad_event": 1})
    assert everything(index)["tokens"] == before


def test_an_event_that_is_none_is_refused(index):
    for call in (index.process_block_stored, index.process_block_removed, index.process_all_blocks_cleared):
        for thing in (None, {"type": "AllBlocksCleared"}, "AllBlocksCleared"):
            refused(index, TypeError, (), call, thing)


# ---------------------------------------------------------------------------------------------------------- prompts

BAD_TOKENS = {
    "bytes": (b"12345678", TypeError, ("tokens", "tokens_from_bytes")),
    "a bytearray": (bytearray(8), TypeError, ("tokens", "tokens_from_bytes")),
    "text": ("12345678", TypeError, ("tokens", "str")),
    "nothing": (None, TypeError, ("tokens",)),
    "a number": (12, TypeError, ("tokens",)),
    "a set": ({1, 2}, TypeError, ("tokens", "set")),
    "a map": ({1: 2}, TypeError, ("tokens", "dict")),
    "floats": ([1, 2.0], TypeError, ("tokens[1]", "2.0")),
    "text inside": ([1, 2, "3"], TypeError, ("tokens[2]", "'3'")),
    "nothing inside": ([None], TypeError, ("tokens[0]",)),
    "lists inside": ([[1, 2], [3, 4]], TypeError, ("tokens[0]",)),
    "pairs inside": ([1, (2, 3)], TypeError, ("tokens[1]",)),
    "a negative int": ([1, 2, 3, -4], ValueError, ("tokens[3]", "-4", "4294967295")),
    "an int too large": ((1, 2**32), ValueError, ("tokens[1]", "4294967296")),
    "an int much too large": ([2**80], ValueError, ("tokens[0]", str(2**80))),
    "a range below zero": (range(-1, 5), ValueError, ("tokens[0]", "-1")),
    "int32 below zero": (np.array([0, -1], np.int32), ValueError, ("tokens[1]", "-1")),
    "int64 below zero": (np.array([5, -(2**63)], np.int64), ValueError, ("tokens[1]", str(-(2**63)))),
    "int64 too large": (np.array([5, 2**32], np.int64), ValueError, ("tokens[1]", "4294967296")),
    "uint64 too large": (np.array([2**64 - 1], np.uint64), ValueError, ("tokens[0]", str(2**64 - 1))),
    "every other int64, one too large": (
        np.array([1, 0, 2**40, 0], np.int64)[::2],
        ValueError,
        ("tokens[1]", str(2**40)),
    ),
    "float64": (np.zeros(4), TypeError, ("tokens",)),
    "float32": (np.zeros(4, np.float32), TypeError, ("tokens",)),
    "bool": (np.zeros(4, bool), TypeError, ("tokens",)),
    "uint8": (np.zeros(8, np.uint8), TypeError, ("tokens",)),
    "int16": (np.zeros(8, np.int16), TypeError, ("tokens",)),
    "big-endian": (np.zeros(8, ">u4"), TypeError, ("tokens",)),
    "complex": (np.zeros(4, complex), TypeError, ("tokens",)),
    "text array": (np.array(["a"]), TypeError, ("tokens",)),
    "a struct array": (np.zeros(4, [("a", "u4")]), TypeError, ("tokens",)),
    "two dimensions": (np.zeros((4, 4), np.uint32), ValueError, ("tokens", "2 dimensions")),
    "no dimension": (np.array(5, np.uint32), ValueError, ("tokens", "0 dimensions")),
}


@pytest.mark.parametrize(("tokens", "builtin", "said"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_tokens_that_are_none_are_refused_everywhere_with_their_position(index, tokens, builtin, said):
    refused(index, builtin, said, index.match_prefix, tokens)
    refused(index, builtin, said, index.add_prefix, "new", tokens, ttl=1.0)
    refused(index, builtin, said, kvindex.prefix_hashes, tokens)
    refused(index, builtin, said, kvindex.local_hashes, tokens)


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        lambda t: np.array(t, np.uint32),
        lambda t: np.array(t, np.int32),
        lambda t: np.array(t, np.int64),
        lambda t: np.array(t, np.uint64),
        lambda t: np.repeat(np.array(t, np.uint32), 3)[::3],
        lambda t: np.array(t[::-1], np.int64)[::-1],
        lambda t: memoryview(np.array(t, np.uint32)),
        lambda t: list(np.array(t, np.int64)),
        lambda t: np.array([0, *t], np.uint32)[1:],
    ],
)
def test_tokens_may_be_of_many_kinds(index, kind):
    assert index.match_prefix(kind(PROMPT)).tokens == {"a": 8, "b": 8, "c": 4}


@pytest.mark.parametrize(
    ("wrong", "builtin", "said"),
    [
        ({"model": None}, TypeError, ("model", "None")),
        ({"model": b"m"}, TypeError, ("model",)),
        ({"lora_name": 7}, TypeError, ("lora_name", "7")),
        ({"lora_name": b"x"}, TypeError, ("lora_name",)),
        ({"cache_salt": 7}, TypeError, ("cache_salt", "7")),
        ({"extra_keys": "image"}, TypeError, ("extra_keys",)),
        ({"extra_keys": ["image"]}, TypeError, ("extra_keys[0]", "image")),
        ({"extra_keys": 5}, TypeError, ("extra_keys",)),
        ({"extra_keys": [None, [{}]]}, ValueError, ("extra_keys",)),
        ({"extra_keys": [[2**64]]}, ValueError, ("extra_keys",)),
        ({"ready_pods": "pod-a"}, TypeError, ("pod-a",)),
        ({"ready_pods": 5}, TypeError, ("5",)),
        ({"ready_pods": ["a", 5]}, TypeError, ("5",)),
        ({"lora_name": "\ud800"}, ValueError, ("lora_name", "UTF-8")),
    ],
)
def test_what_else_a_question_has_is_looked_at_too(index, wrong, builtin, said):
    refused(index, builtin, said, index.match_prefix, PROMPT, **wrong)
    if set(wrong) <= {"model", "ready_pods"}:
        refused(index, builtin, said, index.match_hashes, kvindex.prefix_hashes(PROMPT, block_size=4), **wrong)
    else:
        refused(index, builtin, said, kvindex.prefix_hashes, PROMPT, block_size=4, **wrong)


@pytest.mark.parametrize(
    ("hashes", "builtin"),
    [
        (b"12345678", TypeError),
        ("x", TypeError),
        (None, TypeError),
        (5, TypeError),
        ([1.5], TypeError),
        (["1"], TypeError),
        ([2**64], ValueError),
        (np.zeros(3), TypeError),
        (np.zeros((2, 2), np.uint64), ValueError),
        ([None], TypeError),
    ],
)
def test_hashes_that_are_none_are_refused(index, hashes, builtin):
    refused(index, builtin, ("hashes",), index.match_hashes, hashes)


# -------------------------------------------------------------------------------------------------- everything else


@pytest.mark.parametrize(
    ("options", "builtin", "said"),
    [
        ({"block_size": 0}, ValueError, ("block_size", "0")),
        ({"block_size": -16}, ValueError, ("block_size", "-16")),
        ({"block_size": 16.0}, TypeError, ("block_size", "16.0")),
        ({"block_size": "16"}, TypeError, ("block_size",)),
        ({"block_size": 2**40}, ValueError, ("block_size",)),
        ({"hash_seed": -1}, ValueError, ("hash_seed", "-1")),
        ({"hash_seed": 2**64}, ValueError, ("hash_seed",)),
        ({"hash_seed": "1337"}, TypeError, ("hash_seed",)),
        ({"presence": "counts"}, ValueError, ("presence", "counts")),
        ({"presence": None}, ValueError, ("presence",)),
        ({"max_parked": -1}, ValueError, ("max_parked", "-1")),
        ({"max_parked": 1.5}, TypeError, ("max_parked", "1.5")),
    ],
)
def test_an_index_that_cannot_be(options, builtin, said):
    with pytest.raises(KVIndexError) as caught:
        PrefixIndex(**options)
    assert isinstance(caught.value, builtin)
    assert all(part in str(caught.value) for part in said)


def test_pods_that_nobody_knows_are_named(index):
    for call in (index.pod_state, index.remove_pod, index.worker_stats, index.match_prefix(PROMPT).__getitem__):
        refused(index, KeyError, ("'nobody'",), call, "nobody")
    for pod in (None, 7, b"a"):
        for call in (index.pod_state, index.remove_pod):
            refused(index, Exception, (repr(pod),), call, pod)


@pytest.mark.parametrize(
    ("wrong", "builtin", "said"),
    [
        ({"presence": "counts"}, ValueError, ("presence", "counts")),
        ({"clear_media": "GPU"}, TypeError, ("clear_media", "GPU")),
        ({"clear_media": [1]}, TypeError, ("clear_media", "1")),
        ({"chunk_size": 0}, ValueError, ("chunk_size", "0")),
        ({"chunk_size": "8192"}, TypeError, ("chunk_size",)),
        ({"chunk_size": -5}, ValueError, ("chunk_size", "-5")),
    ],
)
def test_options_of_a_pod_that_cannot_be(index, wrong, builtin, said):
    refused(index, builtin, said, index.configure_pod, "new", **wrong)


@pytest.mark.parametrize(
    ("wrong", "builtin", "said"),
    [
        ({"ttl": -1.0}, ValueError, ("ttl", "-1.0")),
        ({"ttl": float("nan")}, ValueError, ("ttl", "nan")),
        ({"ttl": float("inf")}, ValueError, ("ttl", "inf")),
        ({"ttl": "2"}, TypeError, ("ttl", "'2'")),
        ({"ttl": None}, TypeError, ("ttl",)),
        ({"dp_rank": -1}, ValueError, ("dp_rank", "-1")),
        ({"dp_rank": "0"}, TypeError, ("dp_rank",)),
        ({"model": 5}, TypeError, ("model",)),
    ],
)
def test_a_prefix_that_cannot_be_added(index, wrong, builtin, said):
    refused(index, builtin, said, index.add_prefix, "new", A, **{"ttl": 1.0, **wrong})


@pytest.mark.parametrize(
    ("args", "builtin", "said"),
    [
        (("new", 0, "fine"), ValueError, ("state", "fine")),
        (("new", -1, "exact"), ValueError, ("dp_rank", "-1")),
        (("new", "0", "exact"), TypeError, ("dp_rank",)),
        ((5, 0, "exact"), TypeError, ("pod", "5")),
    ],
)
def test_a_state_that_cannot_be(index, args, builtin, said):
    refused(index, builtin, said, index.mark_worker, *args)


@pytest.mark.parametrize(
    ("where", "builtin", "said"),
    [
        ({"dp_rank": -1}, ValueError, ("dp_rank", "-1")),
        ({"dp_rank": "0"}, TypeError, ("dp_rank",)),
        ({"model": None}, TypeError, ("model",)),
        ({"dp_rank": 1.0}, TypeError, ("dp_rank",)),
    ],
)
def test_a_place_that_a_batch_cannot_come_from(index, where, builtin, said):
    refused(index, builtin, said, index.ingest, "new", payload(stored([1], A)), **where)
    refused(index, Exception, ("pod",), index.ingest, None, payload(stored([1], A)))


# ------------------------------------------------------------------------------------------------- tokens as bytes


@pytest.mark.parametrize("order", ["big", "little"])
def test_tokens_as_bytes_are_what_struct_makes_of_them(order):
    tokens = [0, 1, 255, 65_536, 2**31, 2**32 - 1]
    data = struct.pack(("<" if order == "little" else ">") + "6I", *tokens)
    assert kvindex.tokens_to_bytes(tokens, byteorder=order) == data
    assert kvindex.tokens_to_bytes([], byteorder=order) == b""
    spread = bytearray(2 * len(data))
    spread[::2] = data
    for kind in (data, bytearray(data), memoryview(data), memoryview(spread)[::2]):
        read = kvindex.tokens_from_bytes(kind, byteorder=order)
        assert (read.dtype, read.tolist()) == (np.uint32, tokens)


@pytest.mark.parametrize(
    ("call", "builtin", "said"),
    [
        (lambda: kvindex.tokens_from_bytes("12345678"), TypeError, "str"),
        (lambda: kvindex.tokens_from_bytes([1, 2]), TypeError, "list"),
        (lambda: kvindex.tokens_from_bytes(b"1234567"), ValueError, "7 bytes"),
        (lambda: kvindex.tokens_from_bytes(b"", byteorder="middle"), ValueError, "'middle'"),
        (lambda: kvindex.tokens_to_bytes([], byteorder="middle"), ValueError, "'middle'"),
        (lambda: kvindex.tokens_to_bytes([1], byteorder=["big"]), ValueError, "['big']"),
        (lambda: kvindex.tokens_to_bytes("abc"), TypeError, "0-dimensional"),
        (lambda: kvindex.tokens_to_bytes([1.0]), TypeError, "float64"),
        (lambda: kvindex.tokens_to_bytes([True]), TypeError, "bool"),
        (lambda: kvindex.tokens_to_bytes([[1, 2]]), TypeError, "2-dimensional"),
        (lambda: kvindex.tokens_to_bytes([[1], [1, 2]]), TypeError, "not a sequence of ints"),
        (lambda: kvindex.tokens_to_bytes([1, 2**70]), TypeError, "object"),
        (lambda: kvindex.tokens_to_bytes([7, 8, -1]), ValueError, "tokens[2] is -1"),
        (lambda: kvindex.tokens_to_bytes(np.array([7, 2**32])), ValueError, "tokens[1] is 4294967296"),
    ],
)
def test_what_is_no_token_is_refused_in_bytes_too(call, builtin, said):
    with pytest.raises(KVIndexError) as caught:
        call()
    assert isinstance(caught.value, builtin)
    assert said in str(caught.value)


def test_a_long_prompt_costs_no_more_than_what_somebody_holds(index):
    """The client decides the length of a prompt, but not the number of blocks that the index compares."""
    prompt = np.arange(4_000_000, dtype=np.uint32)
    held = kvindex.BlockStored(pod="long", block_hashes=range(1, 101), token_ids=prompt[:400], block_size=4)
    index.process_block_stored(held)
    compared = [index._compared(index.match_prefix(prompt[:length])) for length in (400, 404, 40_000, 4_000_000)]
    assert compared[0] >= 100
    assert compared[0] <= compared[1] <= compared[2] == compared[3] <= compared[0] + 8

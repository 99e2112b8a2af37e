"""Wrong values times parameters: every call answers or raises a KVIndexError, and no nonsensical value is accepted."""

from __future__ import annotations

import array
import collections
import contextlib
import copy
import decimal
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from support import payload, stored

import kvindex
from kvindex import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    InvalidTypeError,
    InvalidValueError,
    KVIndexError,
    PrefixIndex,
    UnknownPodError,
)

PROMPT = [1, 2, 3, 4]
EMPTY = payload()


class Mine(Exception):
    """Raised by a caller's own object. It reaches the caller unchanged."""


class Odd:
    """An object with a different defect in each part."""

    def __init__(self, index: Any = 3, *, shows: bool = True) -> None:
        self.index, self.shows = index, shows

    def __index__(self) -> Any:
        if self.index is Mine:
            raise Mine
        return self.index

    def __repr__(self) -> str:
        if not self.shows:
            raise ValueError("no repr")
        return "Odd"


class LongWithoutItems(list):
    def __len__(self) -> int:
        return 10**9


class Failing:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> Any:
        raise Mine


def released() -> memoryview:
    view = memoryview(bytes(16))
    view.release()
    return view


def values() -> dict[str, Any]:
    numbers = [None, True, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**70), 10**5000, 1j, float("nan"), float("inf")]
    texts = ["", "x", "\ud800", "a\0b", "y" * 100_000, b"", b"abcd", bytearray(8), b"\xc1"]
    lists = [
        [], [None] * 4, [True] * 4, [1.0], ["a"], [[1, 2], [3, 4]], [-1], [2**63] * 2, [decimal.Decimal(1)],
        [np.int64(3)] * 4, [np.float32(3)] * 4, [Odd()] * 4, [Odd("x")], [Odd(Mine)], [Odd(shows=False), "x"],
        (1, 2, 3, 4), range(8), {1, 2}, {1: 2}, collections.deque(PROMPT), LongWithoutItems(PROMPT), Failing(),
        [[["a", [["b", 1]]]]], [["a"], None, [b"c", 2, ("d", 5)]],
    ]  # fmt: skip
    arrays = [
        np.ones(8, dtype=kind) for kind in ("u4", "i4", "u8", "i8", ">u4", ">u8", "u1", "i2", "f8", "?", "O", "m8[s]")
    ] + [
        np.zeros((2, 4), np.uint32), np.zeros((0, 4), np.uint32), np.zeros(0), np.array(5), np.uint32(7),
        np.arange(32, dtype=np.uint32)[::3], np.arange(8, dtype=np.uint64)[::-1], np.broadcast_to(np.uint32(3), 8),
        np.frombuffer(bytes(33), np.uint8)[1:].view(np.uint32), np.array([-1, 2]), np.array([2**40, 1]),
        np.ma.array(PROMPT, mask=[0, 1, 0, 0]), np.ma.array(PROMPT), np.array(["a", "b"]), np.array([1, None], object),
        np.zeros(4, dtype=[("a", "u4")]), memoryview(np.zeros((2, 2), np.uint32)), memoryview(bytes(8)).cast("I"),
        released(), *(array.array(kind, [1] * 4) for kind in "BiqLd"),
    ]  # fmt: skip
    others = [len, int, object(), Odd(), Odd(shows=False), PrefixIndex(4), PrefixIndex(4).match_prefix(PROMPT)]
    every = [*numbers, *texts, *lists, *arrays, *others]
    return {f"{number}: {type(value).__name__}": value for number, value in enumerate(every)}


STORED = ("model", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
          "extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "cache_salt", "dp_rank",
          "pod")  # fmt: skip
REMOVED = ("pod", "model", "block_hashes", "medium", "group_idx", "dp_rank")


def calls(index: PrefixIndex) -> dict[str, Callable[[Any], object]]:
    """Return a call for each parameter of each public function, with valid values for all others."""

    def of(call: Callable[..., object], *sound: Any, **kwargs: Any) -> Callable[[str], Callable[[Any], object]]:
        return lambda name: lambda value: call(*sound, **{**kwargs, name: value})

    def event(kind: type, sound: dict[str, Any], call: Callable[..., object]) -> Callable[[str], Any]:
        return lambda name: lambda value: call(kind(**{**sound, name: value}))

    asked = ("model", "lora_name", "cache_salt", "extra_keys", "ready_pods", "only_exact")
    block = {"pod": "z", "block_hashes": [1], "token_ids": PROMPT, "block_size": 4}
    of_all: list[tuple[str, Callable[[str], Callable[[Any], object]], tuple[str, ...]]] = [
        ("PrefixIndex", of(PrefixIndex),
         ("block_size", "hash_seed", "presence", "max_parked", "max_bytes", "ttl", "clock")),
        ("ingest", of(index.ingest, pod="a", payload=EMPTY), ("pod", "payload", "model", "dp_rank", "seq")),
        ("match_prefix", of(index.match_prefix, tokens=PROMPT), ("tokens", *asked)),
        ("match_hashes", of(index.match_hashes, hashes=[1]), ("hashes", "model", "ready_pods", "only_exact")),
        ("match_many", of(index.match_many, prompts=[PROMPT]), ("prompts", *asked)),
        ("pod_set", of(index.pod_set), ("pods",)),
        ("add_prefix", of(index.add_prefix, pod="a", tokens=PROMPT, ttl=1),
         ("pod", "tokens", "ttl", "now", "model", "lora_name", "cache_salt", "extra_keys", "dp_rank")),
        ("configure_pod", of(index.configure_pod, pod="a"),
         ("pod", "presence", "clear_media", "chunk_size", "max_blocks")),
        ("clear_worker", of(index.clear_worker, pod="z"), ("pod", "dp_rank")),
        ("mark_worker", of(index.mark_worker, pod="a", dp_rank=0, state="exact"), ("pod", "dp_rank", "state")),
        ("pod_state", of(index.pod_state), ("pod",)),
        ("worker_stats", of(index.worker_stats), ("pod",)),
        ("stream_places", of(index.stream_places), ("pod",)),
        ("remove_pod", of(index.remove_pod), ("pod",)),
        ("stored", event(BlockStored, block, index.process_block_stored), STORED),
        ("removed", event(BlockRemoved, {"pod": "z", "block_hashes": [1]}, index.process_block_removed), REMOVED),
        ("cleared", event(AllBlocksCleared, {"pod": "z"}, index.process_all_blocks_cleared), ("pod", "dp_rank")),
        ("prefix_hashes", of(kvindex.prefix_hashes, tokens=PROMPT, block_size=4),
         ("tokens", "block_size", "hash_seed")),
        ("local_hashes", of(kvindex.local_hashes, tokens=PROMPT, block_size=4), ("tokens", "block_size", "hash_seed")),
        ("decode_batch", of(kvindex.decode_batch), ("payload",)),
        ("tokens_from_bytes", of(kvindex.tokens_from_bytes, data=b"abcd"), ("data", "byteorder")),
        ("tokens_to_bytes", of(kvindex.tokens_to_bytes, tokens=PROMPT), ("tokens", "byteorder")),
    ]  # fmt: skip
    made = {f"{name}({parameter})": call(parameter) for name, call, parameters in of_all for parameter in parameters}
    return {
        **made,
        "match[pod]": lambda value: index.match_prefix(PROMPT)[value],
        "match_many([tokens])": lambda value: index.match_many([value]),
        "match_prefix([token])": lambda value: index.match_prefix([value] * 4),
        "extra_keys[0]": lambda value: index.match_prefix(PROMPT, extra_keys=[value]),
        "extra_keys[0][0]": lambda value: index.match_prefix(PROMPT, extra_keys=[[value]]),
        "pod_set([pod])": lambda value: index.pod_set([value]),
        "clear_media[0]": lambda value: index.configure_pod("a", clear_media=[value]),
        "block_hashes[0]": lambda value: index.process_block_stored(BlockStored(**{**block, "block_hashes": [value]})),
        "token_ids[0]": lambda value: index.process_block_stored(BlockStored(**{**block, "token_ids": [value] * 4})),
        "stored": lambda value: index.process_block_stored(value),
        "removed": lambda value: index.process_block_removed(value),
        "cleared": lambda value: index.process_all_blocks_cleared(value),
        # Alphanumeric texts could be the names of real files. The snapshot tests cover those.
        "save": lambda value: None if isinstance(value, str) and value.isalnum() else index.save(value),
        "load": lambda value: PrefixIndex.load(value),
    }


def test_every_refusal_is_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = PrefixIndex(4)
    index.ingest("a", payload(stored([1], PROMPT)))
    odd, seen = [], 0
    for name, call in calls(index).items():
        for kind, value in values().items():
            seen += 1
            with contextlib.suppress(Mine):
                try:
                    call(value)
                except KVIndexError as error:
                    if len(str(error)) > 1000:
                        odd.append(f"{name} of {kind}: {len(str(error))} characters: {str(error)[:200]}")
                except Mine:
                    raise
                except Exception as error:
                    odd.append(f"{name} of {kind}: {type(error).__name__}: {str(error)[:100]}")
    index._check()
    assert not odd, "\n".join(odd)
    assert seen > 8000


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda index: index.add_prefix("a", PROMPT, ttl=1, now=float("nan")), InvalidValueError),
        (lambda index: index.add_prefix("a", PROMPT, ttl=1, now=float("inf")), InvalidValueError),
        (lambda index: index.add_prefix("a", PROMPT, ttl=1, now=-1e300), InvalidValueError),
        (lambda index: index.add_prefix("a", PROMPT, ttl=1, now="5"), InvalidTypeError),
        (lambda index: index.configure_pod("a", clear_media=""), InvalidTypeError),
        (lambda index: index.configure_pod("a", clear_media=0), InvalidTypeError),
        (lambda index: index.configure_pod("a", clear_media=False), InvalidTypeError),
        (lambda index: index.match_many(None), InvalidTypeError),
        (lambda index: index.match_prefix(PROMPT, only_exact="no"), InvalidTypeError),
        (lambda index: index.match_prefix(np.ma.array(PROMPT, mask=[0, 1, 0, 0])), InvalidValueError),
        (lambda index: index.match_hashes(np.ma.array([1, 2], mask=[0, 1], dtype=np.uint64)), InvalidValueError),
        (lambda index: kvindex.tokens_to_bytes(np.ma.array(PROMPT, mask=[0, 1, 0, 0])), InvalidValueError),
        (lambda index: kvindex.prefix_hashes(np.ma.array(PROMPT, mask=True), block_size=4), InvalidValueError),
        *(
            (
                lambda index, field=field, value=value: index.process_block_stored(
                    BlockStored(**{"pod": "a", "block_hashes": [1], "token_ids": (), "block_size": 0, field: value})
                ),
                InvalidTypeError,
            )
            for field in ("block_size", "kv_cache_spec_sliding_window")
            for value in ("", [], 0.0, ())
        ),
        (lambda index: PrefixIndex(4, clock=5), InvalidTypeError),
        (lambda index: PrefixIndex(4, ttl=1, clock=lambda: float("nan")).ingest("a", EMPTY), InvalidValueError),
        (lambda index: PrefixIndex(4, ttl=1, clock=lambda: "1").match_prefix(PROMPT), InvalidTypeError),
    ],
)
def test_nonsense_is_not_accepted_in_silence(call, error):
    index = PrefixIndex(4)
    index.configure_pod("a", clear_media=["CPU"])
    index.ingest("a", payload(stored([1], PROMPT)))
    before = index.stats()
    with pytest.raises(error):
        call(index)
    assert index.stats() == before
    assert index.match_prefix(PROMPT).tokens == {"a": 4}


def test_a_masked_array_that_hides_nothing_is_an_array():
    index = PrefixIndex(4)
    index.ingest("a", payload(stored([1], PROMPT)))
    assert index.match_prefix(np.ma.array(PROMPT)).tokens == {"a": 4}


# ------------------------------------------------------------------------------------------------ objects that change


class Shrinking:
    """An item that empties its own list while the list is read."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __index__(self) -> int:
        self.items.clear()
        return 1


READING: dict[str, Callable[[PrefixIndex, list[Any]], object]] = {
    "match_prefix": lambda index, items: index.match_prefix(items),
    "match_many": lambda index, items: index.match_many([items]),
    "match_hashes": lambda index, items: index.match_hashes(items),
    "add_prefix": lambda index, items: index.add_prefix("a", items, ttl=1),
    "prefix_hashes": lambda index, items: kvindex.prefix_hashes(items, block_size=4),
    "local_hashes": lambda index, items: kvindex.local_hashes(items, block_size=4),
    "token_ids": lambda index, items: index.process_block_stored(
        BlockStored(pod="a", block_hashes=[1], token_ids=items, block_size=4)
    ),
    "block_hashes": lambda index, items: index.process_block_removed(BlockRemoved(pod="a", block_hashes=items)),
    "tokens_to_bytes": lambda index, items: kvindex.tokens_to_bytes(items),
}


@pytest.mark.parametrize("call", READING)
@pytest.mark.parametrize("place", [0, 1, 5000])
def test_a_list_that_shrinks_while_it_is_read(call, place):
    index = PrefixIndex(4)
    items: list[Any] = list(range(1000, 11000))
    items[place] = Shrinking(items)
    with contextlib.suppress(KVIndexError):
        READING[call](index, items)
    index._check()


def test_tokens_are_those_of_the_list_when_the_first_item_had_a_say():
    items: list[Any] = list(range(1000, 1100))
    items[7] = Shrinking(items)
    expected = [*range(1000, 1007), 1, *range(1008, 1100)]
    assert (kvindex.local_hashes(items, block_size=4) == kvindex.local_hashes(expected, block_size=4)).all()
    assert items == []


# ------------------------------------------------------------------------------------------------------- return values


def test_a_match_is_a_mapping_of_the_pods_that_hold_something():
    index = PrefixIndex(4)
    index.ingest("a", payload(stored([1, 2], PROMPT * 2)))
    index.ingest("b", payload(stored([1], PROMPT)), dp_rank=1)
    index.ingest("c", payload(stored([9], [9] * 4)))
    match = index.match_prefix(PROMPT * 2)
    assert isinstance(match, Mapping)
    assert list(match) == list(match.keys()) == ["a", "b"]
    assert (len(match), bool(match), "a" in match, "c" in match, "d" in match, 0 in match) == (
        2, True, True, False, False, False,
    )  # fmt: skip
    assert dict(match) == dict(match.items()) == {"a": match["a"], "b": match["b"]}
    assert [held.tokens for held in match.values()] == [8, 4]
    assert match["b"].ranks == {1: 4}
    assert match["c"].tokens == 0
    assert match.get("d") is None
    with pytest.raises(UnknownPodError):
        match["d"]
    assert not index.match_prefix([5] * 4)


def test_an_answer_names_pods_that_were_removed_since_while_few_were():
    index = PrefixIndex(4)
    for pod in ("a", "b"):
        index.ingest(pod, payload(stored([1], PROMPT)))
    looked, fresh, late = (index.match_prefix(PROMPT) for _ in range(3))
    assert set(looked) == {"a", "b"}
    index.remove_pod("a")
    assert fresh.tokens == {"a": 4, "b": 4}
    assert fresh.best() == ("a", 4)
    assert index.match_prefix(PROMPT).tokens == {"b": 4}
    index.ingest("a", payload(stored([1], PROMPT)))
    assert fresh["a"].tokens == 4
    for number in range(1100):
        index.configure_pod(f"other-{number}")
        index.remove_pod(f"other-{number}")
    assert set(looked) == {"a", "b"}
    assert late.tokens == {"b": 4}
    assert late.best() == ("b", 4)


def test_reports_can_be_copied_and_sent_elsewhere():
    index = PrefixIndex(4)
    reports = [
        index.ingest(
            "a", payload(stored([1], PROMPT), stored([2], PROMPT, parent=7), {"type": "No"}, ts=3.5), dp_rank=2
        ),
        index.process_block_removed(BlockRemoved(pod="a", block_hashes=[5])),
    ]
    for report in reports:
        for again in (copy.copy(report), copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
            assert (repr(again), again.ts, again.dp_rank) == (repr(report), report.ts, report.dp_rank)
            assert again.reasons == report.reasons


def test_an_index_can_be_referred_to_weakly():
    index = PrefixIndex(4)
    seen = weakref.ref(index)
    assert seen() is index
    del index
    assert seen() is None


def test_a_message_names_some_pods_however_many_there_are():
    index = PrefixIndex(4)
    with pytest.raises(UnknownPodError, match="no pods yet"):
        index.pod_state("a")
    for number in range(20_000):
        index.configure_pod(f"pod-{number}")
    with pytest.raises(UnknownPodError, match=r"no pod 'a' in this index; it has pod-.* and 19992 more") as caught:
        index.pod_state("a")
    assert len(str(caught.value)) < 1000
    with pytest.raises(UnknownPodError) as caught:
        index.pod_state("a" * 1_000_000)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------ unknown names


def test_a_pod_of_which_nothing_was_heard_is_stale():
    index = PrefixIndex(4)
    index.configure_pod("configured", max_blocks=5)
    index.add_prefix("guessed", PROMPT, ttl=1000)
    assert {index.pod_state(pod) for pod in ("configured", "guessed")} == {"stale"}
    assert index.match_prefix(PROMPT).tokens == {"guessed": 4}
    assert index.match_prefix(PROMPT)["guessed"].state == "stale"
    assert index.match_prefix(PROMPT, only_exact=True).tokens == {}
    index.ingest("guessed", EMPTY)
    assert index.match_prefix(PROMPT, only_exact=True).tokens == {"guessed": 4}


@pytest.mark.parametrize(
    "hear",
    [
        lambda index: index.ingest("a", EMPTY),
        lambda index: index.process_block_stored(
            BlockStored(pod="a", block_hashes=[1], token_ids=PROMPT, block_size=4)
        ),
        lambda index: index.process_block_removed(BlockRemoved(pod="a", block_hashes=[1])),
        lambda index: index.process_all_blocks_cleared(AllBlocksCleared(pod="a")),
        lambda index: index.clear_worker("a"),
        lambda index: index.mark_worker("a", 0, "exact"),
    ],
)
def test_whatever_tells_of_its_content_ends_that(hear):
    for known in (True, False):
        index = PrefixIndex(4)
        if known:
            index.configure_pod("a")
        hear(index)
        assert index.pod_state("a") == "exact"


def test_a_payload_that_is_no_batch_tells_nothing():
    index = PrefixIndex(4)
    index.configure_pod("a")
    with pytest.raises(kvindex.EventDecodeError):
        index.ingest("a", b"\xc1")
    assert index.pod_state("a") == "stale"


def test_guesses_change_no_state():
    index = PrefixIndex(4)
    index.ingest("a", payload(stored([1], PROMPT)))
    for rank in range(2000):  # more ranks than a pod may have
        index.add_prefix("a", PROMPT, ttl=1000, dp_rank=rank)
    assert index.pod_state("a") == "exact"
    assert index.stats()["shed_guesses"] > 0

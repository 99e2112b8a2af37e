"""Stored events with the hashes of their blocks instead of tokens."""

from __future__ import annotations

import numpy as np
import pytest

import kvindex
from kvindex import BlockRemoved, BlockStored, InvalidValueError, PrefixIndex

SIZE = 4
TOKENS = np.arange(16, dtype=np.uint32)
LOCAL, PREFIX = (make(TOKENS, block_size=SIZE) for make in (kvindex.local_hashes, kvindex.prefix_hashes))


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(block_size=SIZE)


def test_a_pool_that_says_prefix_hashes_shares_content_with_an_engine_that_says_tokens(index):
    index.process_block_stored(BlockStored(pod="gpu", block_hashes=[1, 2, 3, 4], token_ids=TOKENS, block_size=SIZE))
    pool = BlockStored(pod="pool", block_hashes=PREFIX, prefix_hashes=PREFIX, block_size=SIZE, medium="cpu")
    assert index.process_block_stored(pool).stored == 4
    assert index.stats()["blocks"] == 4
    assert index.match_prefix(TOKENS).tokens == {"gpu": 16, "pool": 16}
    index.process_block_removed(BlockRemoved(pod="pool", block_hashes=PREFIX[2:3], medium="cpu"))
    assert index.match_prefix(TOKENS).tokens == {"gpu": 16, "pool": 8}
    assert index.match_hashes(PREFIX)["pool"].media == {"CPU": 8}


def test_copies_are_counted_by_hash_too(index):
    twice = BlockStored(pod="pool", block_hashes=PREFIX, prefix_hashes=PREFIX, block_size=SIZE)
    index.process_block_stored(twice)
    index.process_block_stored(twice)
    index.process_block_removed(BlockRemoved(pod="pool", block_hashes=PREFIX[:1]))
    assert index.match_prefix(TOKENS).tokens == {"pool": 16}
    index.process_block_removed(BlockRemoved(pod="pool", block_hashes=PREFIX[:1]))
    assert index.match_prefix(TOKENS).tokens == {}


def test_a_child_by_hash_waits_for_its_parent(index):
    child = BlockStored(
        pod="pool", block_hashes=PREFIX[2:], prefix_hashes=PREFIX[2:], parent_block_hash=PREFIX[1], block_size=SIZE
    )
    assert index.process_block_stored(child).parked == 2
    assert index.pod_state("pool") == "degraded"
    assert index.match_prefix(TOKENS).tokens == {}
    index.process_block_stored(
        BlockStored(pod="pool", block_hashes=PREFIX[:2], local_hashes=LOCAL[:2], block_size=SIZE)
    )
    assert index.match_prefix(TOKENS).tokens == {"pool": 16}
    assert index.pod_state("pool") == "exact"


def test_hashes_of_blocks_of_another_size_are_not_placed(index):
    report = index.process_block_stored(
        BlockStored(pod="pool", block_hashes=[1], prefix_hashes=[1], block_size=2 * SIZE)
    )
    assert (report.skipped, report.reasons) == (1, {"block_size_mismatch": 1})
    assert index.pod_state("pool") == "degraded"
    report = index.process_block_stored(BlockStored(pod="pool", block_hashes=[1], local_hashes=[1]))
    assert report.reasons == {"block_size_mismatch": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"local_hashes": [1]}, "local_hashes has 1 hashes for 2 block_hashes"),
        ({"prefix_hashes": [1, 2, 3]}, "prefix_hashes has 3 hashes for 2 block_hashes"),
        ({"local_hashes": [1, 2], "prefix_hashes": [1, 2]}, "both given"),
        ({"local_hashes": [1, 2], "token_ids": [1]}, "local_hashes is given beside token_ids"),
        ({"prefix_hashes": [1, 1 << 64]}, "prefix_hashes"),
        ({"prefix_hashes": "ab"}, "prefix_hashes is 'ab'"),
    ],
)
def test_hashes_that_say_nothing_certain_are_refused(index, fields, said):
    with pytest.raises(kvindex.KVIndexError, match=said) as caught:
        index.process_block_stored(BlockStored(pod="a", block_hashes=[1, 2], block_size=SIZE, **fields))
    assert isinstance(caught.value, (InvalidValueError, TypeError))
    assert index.stats()["pods"] == 0

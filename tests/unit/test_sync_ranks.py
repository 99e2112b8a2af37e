"""The assignment of one publisher's batches to ranks."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.sync.frames import carried_rank
from kvindex.sync.ranks import MOST_RANKS, Ranks


def batch(rank: object, *, tail: object = 1) -> bytes:
    return msgpack.packb([1.5, [["BlockStored", [tail], None, [1, 2], 2]], rank])


def test_a_publisher_that_names_one_rank_speaks_for_its_own_worker_whatever_that_is():
    ranks = Ranks(0, set())
    assert [ranks.of(batch(5, tail=tail)) for tail in range(4)] == [0, 0, 0, 0]
    assert (ranks.several, ranks.others) == (False, set())


def test_different_ranks_are_different_workers():
    ranks = Ranks(0, set())
    assert [ranks.of(batch(rank)) for rank in (0, 1, 0, 2, 1)] == [0, 1, 0, 2, 1]
    assert (ranks.several, ranks.others) == (True, {1, 2})


def test_what_another_rank_published_first_has_to_be_applied_anew():
    ranks = Ranks(0, set())
    assert [ranks.of(batch(rank)) for rank in (1, 1, 0)] == [0, 0, None]
    assert [ranks.of(batch(rank)) for rank in (1, 1, 0)] == [1, 1, 0]


def test_a_rank_that_has_a_stream_of_its_own_is_misplaced():
    ranks = Ranks(0, {1, 2})
    assert ranks.of(batch(1)) == 0
    assert ranks.misplaced == 1
    assert not ranks.others


NONE = [
    b"",
    b"\x93",
    b"\x93\xc0",
    msgpack.packb([1.5, []]),
    b"\x93 this is no batch",
    batch(1) + b"\x01",
    batch(1)[:-3] + b"\x01",
]
NONE += [batch(rank) for rank in (None, "x", -1, True, MOST_RANKS)]


@pytest.mark.parametrize("payload", NONE)
def test_what_names_no_rank_is_the_own_workers(payload):
    ranks = Ranks(3, set())
    assert ranks.of(batch(3)) == 3
    assert ranks.of(payload) == 3
    assert not ranks.several


ANY_RANK = st.integers(0, MOST_RANKS - 1) | st.sampled_from([0, 1, 127, 128, 255, 256, 257, 512])


@given(st.lists(st.tuples(ANY_RANK, st.integers(0, 2**64 - 1)), min_size=1))
def test_the_short_look_says_what_the_long_one_says(batches):
    """The fast path reads only one byte of a rank. It must agree with reading the whole number."""
    ranks, first = Ranks(0, set()), batches[0][0]
    for rank, tail in batches:
        payload = batch(rank, tail=tail)
        assert carried_rank(payload) == rank
        several = ranks.several
        whose = ranks.of(payload)
        if several or rank != first:
            assert whose == (None if not several and first != 0 else rank)
        else:
            assert whose == 0

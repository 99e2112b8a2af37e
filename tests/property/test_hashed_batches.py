"""An index that reads hashed batches equals one that reads the payloads, byte for byte in its snapshot."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import cleared, payload, removed, stored
from world import World, draw_setup, draw_step, fails, minimise

import kvindex
from kvindex import EventDecodeError, PrefixIndex
from kvindex._core import hash_batch
from kvindex.capture import Message, read_capture

SAMPLES = sorted((Path(__file__).resolve().parent.parent / "samples").glob("*.msgpack.gz"))
#: Other calls that change an index.
CALLS = (
    "add_prefix", "clear_worker", "configure_pod", "mark_worker", "remove_pod", "process_block_stored",
    "process_block_removed", "process_all_blocks_cleared", "_expire",
)  # fmt: skip


class Followed(PrefixIndex):
    """Applies every change to a follower as well, several batches at a time, as in an entry."""

    follower: PrefixIndex
    gathered: bytes = b""
    numbers: Any = None

    def ingest(self, pod: str, data: bytes, *, model: str = "", dp_rank: int | None = None, seq: int | None = None):
        self.numbers = self.numbers or count()
        # A batch that may not continue the previous one has no number.
        number = next(self.numbers)
        seq = number if number % 5 else None
        try:
            report = super().ingest(pod, data, model=model, dp_rank=dp_rank, seq=seq)
            rank = report.dp_rank
            return report
        except EventDecodeError:
            rank = dp_rank or 0
            raise
        finally:
            self.gathered += hash_batch(pod, rank, model, seq, data, self.block_size, self.hash_seed)
            if number % 3 == 0:
                self.apply()

    def apply(self) -> None:
        data, self.gathered = self.gathered, b""
        self.follower._ingest_hashed(data)


def followed(name: str) -> Any:
    def call(self: Followed, *args: Any, **kwargs: Any) -> Any:
        self.apply()
        getattr(self.follower, name)(*args, **kwargs)
        return getattr(PrefixIndex, name)(self, *args, **kwargs)

    return call


for each in CALLS:
    setattr(Followed, each, followed(each))


def assert_equal(index: Followed) -> None:
    index.apply()
    index.follower._check()
    own, follower = index.stats(), index.follower.stats()
    assert {**own, "bytes": 0} == {**follower, "bytes": 0}
    assert index.pods() == index.follower.pods()
    for pod in index.pods():
        assert index.stream_places(pod) == index.follower.stream_places(pod)
        assert index.worker_stats(pod) == index.follower.worker_stats(pod)
    assert bytes(index.dumps()) == bytes(index.follower.dumps())


class FollowedWorld(World):
    def make_index(self) -> PrefixIndex:
        given = {"presence": self.setup.presence, "max_parked": self.setup.max_parked}
        index = Followed(self.setup.size, **given)
        index.follower = PrefixIndex(self.setup.size, **given)
        return index

    def compare(self) -> None:
        """Compare with the follower. test_index_machine compares with the model."""
        self.turn += 1
        if self.turn % 4 == 0:
            assert_equal(self.index)

    def finish(self) -> None:
        assert_equal(self.index)


@given(seed=st.integers(0, 2**32 - 1))
# A smaller seed does not give a smaller history. minimise() shortens it instead.
@settings(max_examples=max(20, settings.default.max_examples // 2), phases=[Phase.generate])
def test_a_follower_of_any_history_has_the_same_index(seed: int) -> None:
    rng = Random(seed)
    setup = draw_setup(rng)
    history = [draw_step(rng) for _ in range(60)]
    if fails(setup, history, FollowedWorld) is not None:
        shortest = minimise(setup, history, FollowedWorld)
        error = fails(setup, shortest, FollowedWorld)
        raise AssertionError("\n".join(["the shortest run that fails:", repr(setup), *map(repr, shortest)])) from error


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name.removesuffix(".msgpack.gz"))
def test_a_follower_of_a_real_engine_answers_as_the_engine(path: Path) -> None:
    reader = read_capture(path)
    header = next(reader)
    index = Followed(header["block_size"])
    index.follower = PrefixIndex(header["block_size"])
    for pod in header["pods"]:
        index.configure_pod(pod, engine=header["engine"])
    asked = 0
    for record in reader:
        if isinstance(record, Message):
            index.ingest(record.pod, record.payload)
            continue
        index.apply()
        context = {"lora_name": record.lora_name, "cache_salt": record.cache_salt, "extra_keys": record.extra_keys}
        match = index.follower.match_prefix(record.tokens, **context)
        assert {pod: match.tokens.get(pod, 0) for pod in record.hits} == record.hits
        asked += 1
    assert asked
    assert_equal(index)


SECRET = "tenant-secret-salt"
TOKENS = np.arange(70_000, 70_064)


def test_neither_tokens_nor_keys_nor_salts_are_in_a_hashed_batch() -> None:
    whole = payload(
        stored([1, 2], TOKENS[:32].tolist(), size=16, extra_keys=[["image-of-me"], None], cache_salt=SECRET),
        stored([3, 4], TOKENS[:40].tolist(), size=16, lora_name="adapter-of-me"),
        {"type": "BlockMoved", "token_ids": TOKENS.tolist(), "salt": SECRET},
    )
    cut = whole[:-3]
    for data in (whole, cut):
        hashed = hash_batch("a", 0, "m", 7, data, 16, 1337)
        for text in (SECRET, "image-of-me", "adapter-of-me"):
            assert text.encode() in data
            assert text.encode() not in hashed
        for token in TOKENS[:40].tolist():
            assert msgpack.packb(token) in data
            for width in (4, 8):
                assert token.to_bytes(width, "little") not in hashed
                assert token.to_bytes(width, "big") not in hashed
            assert msgpack.packb(token) not in hashed
    index, follower = PrefixIndex(16), PrefixIndex(16)
    index.ingest("a", whole, model="m", seq=7)
    with pytest.raises(EventDecodeError):
        index.ingest("a", cut, model="m", seq=8)
    both = b"".join(hash_batch("a", 0, "m", seq, data, 16, 1337) for seq, data in ((7, whole), (8, cut)))
    assert follower._ingest_hashed(both) == (2, 1)
    assert bytes(index.dumps()) == bytes(follower.dumps())
    assert follower.stats()["bad_payloads"] == 1


def some_batches() -> bytes:
    tokens = list(range(64))
    batches = [
        payload(stored([1, 2, 3, 4], tokens, size=16, medium="GPU"), stored([5], tokens[:16], parent=4, size=16)),
        payload(removed(2, remaining_copy_counts=[1]), removed(1, medium="CPU"), cleared(), {"type": "x"}),
        payload(stored([9], tokens[:5], size=16), stored([9, 8], tokens[:32], size=16, group_idx="no")),
    ]
    return b"".join(hash_batch(f"pod-{n}", n, "m", n or None, data, 16, 1337) for n, data in enumerate(batches))


@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_bytes_of_any_kind_are_refused_or_leave_a_sound_index(data: Any) -> None:
    written = bytearray(some_batches())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(written) - 1))
        how = data.draw(st.sampled_from(("set", "cut", "insert")))
        if how == "set":
            written[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del written[at : at + data.draw(st.integers(1, 8))]
        else:
            written[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not written:
            return
    index = PrefixIndex(16)
    with suppress(EventDecodeError):
        index._ingest_hashed(bytes(written))
    index._check()
    index.match_prefix(range(64), model="m")
    kvindex.PrefixIndex.loads(index.dumps())._check()


def test_what_is_cut_short_is_refused_at_each_byte() -> None:
    whole = some_batches()
    ends = {int.from_bytes(whole[:4], "little") + 4}
    while (end := max(ends)) < len(whole):
        ends.add(end + int.from_bytes(whole[end : end + 4], "little") + 4)
    assert max(ends) == len(whole)
    for size in range(len(whole)):
        index = PrefixIndex(16)
        if size in ends or not size:
            index._ingest_hashed(whole[:size])
            continue
        with pytest.raises(EventDecodeError, match="no hashed batch"):
            index._ingest_hashed(whole[:size])
        assert index.stats()["batches"] == sum(end < size for end in ends)


@pytest.mark.parametrize("k", [1, 2], ids=["blocks of the index", "larger blocks"])
@pytest.mark.parametrize("ahead", [0, 3], ids=["", "lookahead"])
def test_events_of_many_turns_are_the_same(k: int, ahead: int) -> None:
    index = Followed(2)
    index.follower = PrefixIndex(2)
    rng = np.random.default_rng(k + ahead)
    for first, n in ((0, 1500), (1500, 513), (2013, 700)):
        tokens = rng.integers(0, 1 << 20, n * 2 * k).tolist()
        more = {"lookahead_token_ids": rng.integers(0, 9, (n, ahead)).tolist()} if ahead else {}
        names = list(range(first + 1, first + n + 1))
        names[-3] = names[0] if first else names[-3]  # a name that occurs twice
        index.ingest("a", payload(stored(names, tokens, parent=first or None, size=2 * k, **more)))
    index.ingest("a", payload(removed(*range(100, 900))))
    assert index.stats()["blocks"] > 1000
    assert_equal(index)

"""Block hashes compared with the `xxhash` package and with a second implementation of their input."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import kvindex
from kvindex import _core

MASK = 2**64 - 1
# Distinguishes a block with extra keys from one without: the fraction of the golden ratio, as 64 bits.
KEYED = 0x9E3779B97F4A7C15
SEEDS = [0, 1, 1337, 2**32 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
# The hash algorithm changes at 4, 9, 17, 129 and 241 bytes, stripes end every 64 and rounds every 1,024.
EVERY_LENGTH = range(2101)
LARGE = [3071, 3072, 3073, 4096, 4097, 8191, 65537, 2**20 + 3]
# Sizes 16, 32, 64 and 128 have code of their own. 60 is the last size that uses the short form.
BLOCK_SIZES = [*range(1, 131), 192, 256, 257, 512, 1000]

u64 = st.integers(0, MASK)
u32 = st.integers(0, 2**32 - 1)
lora_names = st.one_of(st.none(), st.sampled_from(["adapter", "org/adapter-7b", "übersetzer", "名" * 90]))


def reference(data: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def tokens_of(n: int, salt: int = 0) -> np.ndarray:
    return np.random.default_rng([n, salt]).integers(0, 2**32, n, dtype=np.uint32)


def expected_locals(tokens, size: int, seed: int, lora: str | None) -> list[int]:
    if lora is not None:
        seed = (seed + reference(lora.encode(), 0)) & MASK
    return [
        reference(struct.pack(f"<{size}I", *map(int, tokens[at : at + size])), seed)
        for at in range(0, len(tokens) - size + 1, size)
    ]


def expected_prefixes(local: list[int], seed: int) -> list[int]:
    rolled = local[:1]
    for one in local[1:]:
        rolled.append(reference(struct.pack("<QQ", rolled[-1], one), seed))
    return rolled


def encoded(key) -> bytes:
    if key is None:
        return b"n"
    if isinstance(key, float):
        return b"f" + struct.pack("<d", key)
    if isinstance(key, int):
        return b"i" + struct.pack("<Q", key & MASK)
    if isinstance(key, str):
        raw = key.encode()
        return b"s" + struct.pack("<I", len(raw)) + raw
    if isinstance(key, bytes):
        return b"b" + struct.pack("<I", len(key)) + key
    return b"(" + struct.pack("<I", len(key)) + b"".join(map(encoded, key))


def salted(keys: list, salt: str | None) -> list:
    if salt is None:
        return keys
    trailing = 0
    for key in reversed(keys):
        if not isinstance(key, bytes):
            break
        trailing += 1
    end = len(keys) - trailing
    return [*keys[:end], salt, *keys[end:]]


def expected_keyed(local: list[int], seed: int, salt: str | None, entries: list | None) -> list[int]:
    out = []
    for i, one in enumerate(local):
        keys = list(entries[i] or []) if entries is not None and i < len(entries) else []
        if i == 0:
            keys = salted(keys, salt)
        if keys:
            digest = reference(b"".join(map(encoded, keys)), seed)
            one = reference(struct.pack("<QQ", one, digest), seed ^ KEYED)
        out.append(one)
    return out


def as_ints(hashes: np.ndarray) -> list[int]:
    assert hashes.dtype == np.uint64
    assert hashes.ndim == 1
    return hashes.tolist()


# ------------------------------------------------------------------------------------------------------------ XXH3


@pytest.mark.parametrize("seed", SEEDS)
def test_every_length_agrees(seed):
    data = random.Random(seed).randbytes(max(LARGE))
    wrong = [n for n in (*EVERY_LENGTH, *LARGE) if _core._xxh3_64(data[:n], seed) != reference(data[:n], seed)]
    assert wrong == []


@pytest.mark.parametrize("seed", [0, 1337, MASK])
def test_every_instruction_set_agrees(seed):
    data = random.Random(7).randbytes(max(LARGE))
    isas = _core._isas()
    assert "portable" in isas
    for isa in isas:
        wrong = [n for n in (*EVERY_LENGTH, *LARGE) if _core._xxh3_64(data[:n], seed, isa) != reference(data[:n], seed)]
        assert wrong == [], isa


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_extreme_words_agree(byte):
    # All-ones words reveal a lost carry between the halves of a product.
    for n in (1, 4, 8, 9, 16, 17, 64, 128, 129, 240, 241, 256, 512, 1024, 1025, 2100):
        for seed in SEEDS:
            assert _core._xxh3_64(byte * n, seed) == reference(byte * n, seed), (n, seed)


@given(st.binary(max_size=700), u64)
def test_any_bytes_agree(data, seed):
    assert _core._xxh3_64(data, seed) == reference(data, seed)


# ---------------------------------------------------------------------------------------------------- local hashes


def test_the_published_check_value():
    assert as_ints(kvindex.local_hashes(range(64), block_size=16))[0] == 15310707395893867146
    assert as_ints(kvindex.prefix_hashes(range(64), block_size=16))[0] == 15310707395893867146


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_every_block_size_agrees(size):
    # Seven blocks and a tail: the last group of blocks that are hashed together is incomplete.
    tokens = tokens_of(7 * size + size // 2)
    for seed in (0, 1337, MASK):
        for lora in (None, "adapter"):
            local = expected_locals(tokens, size, seed, lora)
            assert len(local) == 7
            got = kvindex.local_hashes(tokens, block_size=size, hash_seed=seed, lora_name=lora)
            assert as_ints(got) == local
            rolled = kvindex.prefix_hashes(tokens, block_size=size, hash_seed=seed, lora_name=lora)
            assert as_ints(rolled) == expected_prefixes(local, seed)


@pytest.mark.parametrize("size", [1, 16, 17, 32, 60, 61, 64, 128])
def test_every_number_of_blocks_agrees(size):
    tokens = tokens_of(40 * size)
    local = expected_locals(tokens, size, 1337, None)
    rolled = expected_prefixes(local, 1337)
    for n in range(41):
        part = tokens[: n * size]
        assert as_ints(kvindex.local_hashes(part, block_size=size)) == local[:n]
        assert as_ints(kvindex.prefix_hashes(part, block_size=size)) == rolled[:n]


@pytest.mark.parametrize("size", [5, 16, 32, 64, 100, 128])
def test_tokens_may_start_anywhere(size):
    buffer = tokens_of(5 * size + 16)
    for offset in range(16):
        view = buffer[offset : offset + 5 * size]
        local = expected_locals(view, size, 1337, None)
        assert as_ints(kvindex.local_hashes(view, block_size=size)) == local
        assert as_ints(kvindex.prefix_hashes(view, block_size=size)) == expected_prefixes(local, 1337)


@pytest.mark.parametrize("size", [1, 16, 32, 64, 128, 130])
def test_incomplete_blocks_are_not_hashed(size):
    for n in {0, 1, size - 1} - {size}:
        assert as_ints(kvindex.local_hashes(tokens_of(n), block_size=size)) == []
        assert as_ints(kvindex.prefix_hashes(tokens_of(n), block_size=size, cache_salt="s")) == []
    whole = tokens_of(2 * size)
    longer = np.concatenate([whole, tokens_of(size - 1, salt=1)])
    assert as_ints(kvindex.prefix_hashes(longer, block_size=size)) == as_ints(
        kvindex.prefix_hashes(whole, block_size=size)
    )


def test_empty_sequences_have_no_hashes():
    for nothing in ([], (), range(0), np.empty(0, np.uint32)):
        assert as_ints(kvindex.local_hashes(nothing)) == []
        assert as_ints(kvindex.prefix_hashes(nothing)) == []


@given(st.lists(u32, max_size=150), st.integers(1, 70), u64, lora_names)
def test_any_tokens_agree(tokens, size, seed, lora):
    local = expected_locals(tokens, size, seed, lora)
    got = kvindex.local_hashes(tokens, block_size=size, hash_seed=seed, lora_name=lora)
    assert as_ints(got) == local
    rolled = kvindex.prefix_hashes(tokens, block_size=size, hash_seed=seed, lora_name=lora)
    assert as_ints(rolled) == expected_prefixes(local, seed)


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_has_tokens(size):
    for function in (kvindex.local_hashes, kvindex.prefix_hashes):
        with pytest.raises(ValueError, match="block_size") as caught:
            function([1, 2, 3], block_size=size)
        assert isinstance(caught.value, kvindex.KVIndexError)


# ------------------------------------------------------------------------------------------ LoRA, salt, extra keys


def test_a_lora_name_changes_blocks_and_not_the_rolling_step():
    tokens = tokens_of(48)
    seed = MASK  # the sum of both seeds has to wrap
    moved = (seed + reference(b"adapter", 0)) & MASK
    local = as_ints(kvindex.local_hashes(tokens, hash_seed=seed, lora_name="adapter"))
    assert local == as_ints(kvindex.local_hashes(tokens, hash_seed=moved))
    rolled = as_ints(kvindex.prefix_hashes(tokens, hash_seed=seed, lora_name="adapter"))
    assert rolled[1] == reference(struct.pack("<QQ", local[0], local[1]), seed)
    assert rolled[1] != as_ints(kvindex.prefix_hashes(tokens, hash_seed=moved))[1]


keys = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), MASK),
        st.floats(allow_nan=False),
        st.text(max_size=20).filter(lambda text: "adapter" not in text),
        st.binary(max_size=40),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner)),
    max_leaves=5,
)
entries = st.one_of(st.none(), st.lists(keys, max_size=4))


@given(
    n_blocks=st.integers(0, 5),
    size=st.sampled_from([1, 3, 16, 32, 64, 128]),
    seed=u64,
    lora=st.sampled_from([None, "adapter"]),
    salt=st.one_of(st.none(), st.text(min_size=1, max_size=12)),
    extra_keys=st.one_of(st.none(), st.lists(entries, max_size=5)),
)
def test_extra_keys_agree(n_blocks, size, seed, lora, salt, extra_keys):
    tokens = tokens_of(n_blocks * size + size - 1)
    if extra_keys is not None:
        extra_keys = extra_keys[:n_blocks]
    local = expected_keyed(expected_locals(tokens, size, seed, lora), seed, salt, extra_keys)
    got = kvindex.prefix_hashes(
        tokens, block_size=size, hash_seed=seed, lora_name=lora, cache_salt=salt, extra_keys=extra_keys
    )
    assert as_ints(got) == expected_prefixes(local, seed)


@pytest.mark.parametrize(
    ("block_keys", "in_order"),
    [
        ([], ["salt"]),
        ([("image", 3)], [("image", 3), "salt"]),
        ([b"digest"], ["salt", b"digest"]),
        ([("image", 3), b"one", b"two"], [("image", 3), "salt", b"one", b"two"]),
        ([b"one", "text"], [b"one", "text", "salt"]),
    ],
)
def test_the_salt_stands_where_the_engine_puts_it(block_keys, in_order):
    tokens = tokens_of(32)
    salted_hashes = kvindex.prefix_hashes(tokens, cache_salt="salt", extra_keys=[block_keys])
    spelt_out = kvindex.prefix_hashes(tokens, extra_keys=[in_order])
    assert as_ints(salted_hashes) == as_ints(spelt_out)
    local = expected_keyed(expected_locals(tokens, 16, 1337, None), 1337, None, [in_order])
    assert as_ints(salted_hashes) == expected_prefixes(local, 1337)


def test_extra_keys_change_their_block_and_every_later_one():
    tokens = tokens_of(64)
    plain = as_ints(kvindex.prefix_hashes(tokens))
    keyed = as_ints(kvindex.prefix_hashes(tokens, extra_keys=[None, ["image"]]))
    assert keyed[0] == plain[0]
    assert all(a != b for a, b in zip(keyed[1:], plain[1:], strict=True))


def test_no_keys_and_an_empty_list_are_one_thing():
    tokens = tokens_of(48)
    plain = as_ints(kvindex.prefix_hashes(tokens))
    for nothing in ([], [None], [[], None, []], [()]):
        assert as_ints(kvindex.prefix_hashes(tokens, extra_keys=nothing)) == plain


def test_a_pair_is_the_same_from_the_wire_and_from_python():
    tokens = tokens_of(16)
    assert as_ints(kvindex.prefix_hashes(tokens, extra_keys=[[("image", 3)]])) == as_ints(
        kvindex.prefix_hashes(tokens, extra_keys=[[["image", 3]]])
    )


def test_keys_of_different_kinds_or_borders_differ():
    tokens = tokens_of(16)
    some = [["1"], [b"1"], [1], [1.0], [None], [["1"]], [[1]], ["1", "1"], ["11"], [("1", "1")], [""], [b""], [[]], [0]]
    assert len({as_ints(kvindex.prefix_hashes(tokens, extra_keys=[one]))[0] for one in some}) == len(some)


# ------------------------------------------------------------------------------------------------------- the index


@given(
    n_blocks=st.integers(0, 9),
    size=st.sampled_from([1, 16, 17, 32, 64, 128]),
    seed=u64,
    lora=st.sampled_from([None, "adapter"]),
    salt=st.sampled_from([None, "salt"]),
    first_keys=entries,
)
def test_a_match_reports_the_same_hashes(n_blocks, size, seed, lora, salt, first_keys):
    tokens = tokens_of(n_blocks * size)
    index = kvindex.PrefixIndex(block_size=size, hash_seed=seed)
    match = index.match_prefix(tokens, lora_name=lora, cache_salt=salt, extra_keys=[first_keys][:n_blocks])
    local = expected_keyed(expected_locals(tokens, size, seed, lora), seed, salt, [first_keys])
    assert as_ints(match.hashes) == expected_prefixes(local, seed)

"""The interoperable hashes: XXH3-64 of a block's tokens, and rolled over a prefix (Dynamo, Mooncake RFC #1527).

They depend on the content only, so any process can compute them::

    from kvindex import local_hashes, prefix_hashes, roll_hashes

    tokens = list(range(40))
    assert len(prefix_hashes(tokens, block_size=16)) == 2
    assert (roll_hashes(local_hashes(tokens)) == prefix_hashes(tokens)).all()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import arguments
from ._core import _xxh3_64, hash_tokens

if TYPE_CHECKING:
    from ._core import _ExtraKeys, _Tokens

__all__ = ["local_hashes", "prefix_hashes", "roll_hashes"]


def local_hashes(
    tokens: _Tokens, *, block_size: int = 16, hash_seed: int = 1337, lora_name: str | None = None
) -> npt.NDArray[np.uint64]:
    """Returns the hash of each complete block, independent of the blocks before it.

    The hash is XXH3-64 of the block's tokens as little-endian u32; the name of an adapter changes the seed. O(tokens).
    Thread-safe; releases the GIL.

    Args:
        tokens: Token ids, 0 to 2**32 - 1: an integer array or buffer of 32 or 64 bits, or a sequence of ints.
        block_size: Tokens per block.
        hash_seed: Seed, 0 to 2**64 - 1.
        lora_name: LoRA adapter of the request.

    Returns:
        uint64 array of length ``len(tokens) // block_size``. An incomplete block at the end is left out.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range; for tokens, the message has the position.
    """
    return hash_tokens(tokens, block_size, hash_seed, lora_name, None, None, False)


def prefix_hashes(
    tokens: _Tokens,
    *,
    block_size: int = 16,
    hash_seed: int = 1337,
    lora_name: str | None = None,
    cache_salt: str | None = None,
    extra_keys: _ExtraKeys | Sequence[Any] | None = None,
) -> npt.NDArray[np.uint64]:
    """Returns the rolling hash of each prefix that ends at a complete block, for :meth:`PrefixIndex.match_hashes`.

    O(tokens). Thread-safe; releases the GIL. The hashes cover no lookahead tokens, so they do not match the blocks of
    workers with lookahead hashes (EAGLE or MTP); :meth:`PrefixIndex.match_prefix` does.

    Args:
        tokens: As for :func:`local_hashes`.
        block_size: Tokens per block.
        hash_seed: Seed, 0 to 2**64 - 1.
        lora_name: LoRA adapter of the request.
        cache_salt: Cache salt of the request; it changes every hash.
        extra_keys: One entry per block; each changes the hash of its block and of all later ones.

    Returns:
        uint64 array of length ``len(tokens) // block_size``. An incomplete block at the end is left out.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range; for tokens, the message has the position.
    """
    return hash_tokens(tokens, block_size, hash_seed, lora_name, cache_salt, extra_keys, True)


def roll_hashes(local_hashes: Iterable[int], *, hash_seed: int = 1337) -> npt.NDArray[np.uint64]:
    """Returns the prefix hashes of a prompt from the local hashes of its blocks.

    O(blocks), 0.5 µs per block. Thread-safe; holds the GIL.

    Args:
        local_hashes: Local hashes in order, signed or unsigned 64-bit ints. They cover the adapter.
        hash_seed: Seed of the index, 0 to 2**64 - 1.

    Returns:
        uint64 array of the same length.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range; for hashes, the message has the position.
    """
    rolled = arguments.hash_array(local_hashes, "local_hashes").copy()
    before: int | None = None
    for i, local in enumerate(rolled.tolist()):
        # The first block's prefix hash is its local hash.
        if before is not None:
            local = _xxh3_64((before | local << 64).to_bytes(16, "little"), hash_seed)
        rolled[i] = before = local
    return rolled

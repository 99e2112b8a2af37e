"""The interoperable hashes: XXH3-64 of a block's tokens, and rolled over a prefix (Dynamo, Mooncake RFC #1527)."""

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
    """uint64[len(tokens) // block_size]: the hash of each complete block's content, whatever stands before it.

    XXH3-64 of the block's tokens as little-endian u32; an adapter's name changes the seed. An incomplete tail is left
    out. O(tokens). Any thread; releases the interpreter lock. Raises InvalidTypeError or InvalidValueError, which names
    the position.
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
    """uint64[len(tokens) // block_size]: the rolling hash of the whole prefix up to and including each complete block.

    What :meth:`PrefixIndex.match_hashes` takes. ``cache_salt`` and ``extra_keys`` (one entry per block) change their
    block's hash, and so every later one. They cover no lookahead tokens, so blocks of a worker with EAGLE or MTP whose
    hashes do are not found by them. O(tokens). Any thread; releases the interpreter lock. Raises InvalidTypeError
    or InvalidValueError, which names the position.
    """
    return hash_tokens(tokens, block_size, hash_seed, lora_name, cache_salt, extra_keys, True)


def roll_hashes(local_hashes: Iterable[int], *, hash_seed: int = 1337) -> npt.NDArray[np.uint64]:
    """uint64[blocks]: the prefix hashes of a prompt from the local hashes of its blocks.

    ``hash_seed`` is the index's; an adapter is in the local hashes already. Signed hashes wrap. O(blocks), 0.5 µs
    each, with the interpreter lock. Any thread. Raises InvalidTypeError or InvalidValueError, which names the position.
    """
    rolled = arguments.hash_array(local_hashes, "local_hashes").copy()
    before: int | None = None
    for i, local in enumerate(rolled.tolist()):
        # The first block's prefix hash is its local hash.
        if before is not None:
            local = _xxh3_64((before | local << 64).to_bytes(16, "little"), hash_seed)
        rolled[i] = before = local
    return rolled

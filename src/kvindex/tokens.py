"""Token ids as bytes, with the byte order said."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from . import arguments
from .errors import InvalidTypeError, InvalidValueError

__all__ = ["tokens_from_bytes", "tokens_to_bytes"]


def tokens_from_bytes(
    data: bytes | bytearray | memoryview, byteorder: Literal["big", "little"] = "big"
) -> npt.NDArray[np.uint32]:
    """Token ids from u32 bytes, as uint32[len(data) / 4] in this machine's order.

    The default is what AIBrix sends. Copies only where the order differs. O(tokens); any thread. Raises
    :class:`InvalidTypeError` for anything but bytes, :class:`InvalidValueError` for a length that is no multiple of 4
    or an unknown byte order.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidTypeError(f"data is {type(data).__name__}; it must be bytes, bytearray or memoryview")
    try:
        view = memoryview(data)
    except ValueError as error:
        raise InvalidTypeError(f"data cannot be read: {error}") from None
    size = view.nbytes
    if size % 4:
        raise InvalidValueError(f"data has {size} bytes; tokens of 4 bytes need a multiple of 4")
    if not view.c_contiguous:
        data = view.tobytes()
    return np.frombuffer(data, dtype=_dtype(byteorder)).astype(np.uint32, copy=False)


def tokens_to_bytes(tokens: npt.ArrayLike, byteorder: Literal["big", "little"] = "big") -> bytes:
    """The inverse of :func:`tokens_from_bytes`: 4 bytes a token, in the order that is said.

    O(tokens); any thread. Raises :class:`InvalidTypeError` if the tokens are no integers, :class:`InvalidValueError`
    naming the position of the first that is no u32.
    """
    order = _dtype(byteorder)
    try:
        arguments.unmasked(tokens, "tokens")
        array = np.asarray(tokens)
    except InvalidValueError:
        raise
    except ValueError as error:  # lists of several lengths
        raise InvalidTypeError(f"tokens are no sequence of ints: {error}") from None
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidTypeError(f"tokens are {array.ndim}-dimensional {array.dtype}; they must be a sequence of ints")
    wrong = np.flatnonzero((array < 0) | (array > 0xFFFFFFFF))
    if wrong.size:
        raise InvalidValueError(f"tokens[{wrong[0]}] is {array[wrong[0]]}; token ids are 0 to 4294967295")
    return array.astype(order).tobytes()


def _dtype(byteorder: str) -> str:
    return ("<u4", ">u4")[arguments.choice(byteorder, "byteorder", ("little", "big"))]

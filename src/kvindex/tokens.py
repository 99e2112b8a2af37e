"""Conversion of token ids from and to bytes, with an explicit byte order.

::

    from kvindex import tokens_from_bytes, tokens_to_bytes

    assert tokens_from_bytes(b"\\x00\\x00\\x00\\x07").tolist() == [7]
    assert tokens_to_bytes([7], "little") == b"\\x07\\x00\\x00\\x00"
"""

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
    """Converts bytes to token ids. O(tokens). Thread-safe.

    The data is copied only if its byte order differs from that of the machine, or it is not contiguous.

    Args:
        data: 4 bytes per token.
        byteorder: ``"big"``, as AIBrix sends them, or ``"little"``.

    Returns:
        uint32 array of length ``len(data) // 4``.

    Raises:
        InvalidTypeError: ``data`` is not ``bytes``, ``bytearray`` or ``memoryview``.
        InvalidValueError: The length is not a multiple of 4, or ``byteorder`` is another value.
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
    """Converts token ids to bytes: the inverse of :func:`tokens_from_bytes`. O(tokens). Thread-safe.

    Args:
        tokens: A one-dimensional sequence or array of ints, 0 to 2**32 - 1.
        byteorder: ``"big"`` or ``"little"``.

    Returns:
        4 bytes per token.

    Raises:
        InvalidTypeError: The tokens are not one-dimensional integers.
        InvalidValueError: A token is out of range; the message has the position. Or ``byteorder`` is another value.
    """
    order = _dtype(byteorder)
    try:
        arguments.unmasked(tokens, "tokens")
        array = np.asarray(tokens)
    except InvalidValueError:
        raise
    except ValueError as error:  # lists of several lengths
        raise InvalidTypeError(f"tokens are not a sequence of ints: {error}") from None
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

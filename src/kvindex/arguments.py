"""Checks of arguments before they reach the core, where speed does not matter, and errors that name a right value."""

from __future__ import annotations

import math
import operator
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from reprlib import Repr
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from .errors import InvalidTypeError, InvalidValueError, KVIndexError

__all__: list[str] = []

# Fields of a BlockStored that replace token_ids, in the order in which the core numbers them.
HASHED = ("local_hashes", "prefix_hashes")
TOKENS_ARE = "tokens are a uint32, int32, int64 or uint64 array, or a sequence of ints"


# Messages show the beginning of a value, however large it is, and even if its repr fails.
_repr = Repr()
_repr.maxstring = _repr.maxother = 120


def shown(value: Any) -> str:
    try:
        return _repr.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


# The errors of msgpack for nesting that is too deep.
TooDeep = (msgpack.StackError, RecursionError)


def unpacked(data: bytes) -> Any:
    # Surrogates stand for bytes that are not UTF-8: a name that an engine encoded wrongly is still a name.
    return msgpack.unpackb(data, use_list=False, unicode_errors="surrogateescape")


def listed(some: Sequence[bytes], of: int) -> str:
    """Name some pods in an error message, with the number of the others."""
    if not of:
        return "it has no pods yet"
    names = ", ".join(sorted(shown(name.decode("utf-8", "surrogateescape"))[1:-1] for name in some))
    return f"it has {names}" + (f" and {of - len(some)} more" if of > len(some) else "")


def whole(value: Any, what: str, low: int, high: int) -> int:
    try:
        n = operator.index(value)
    except TypeError:
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be an int") from None
    if not low <= n <= high:
        raise InvalidValueError(f"{what} is {shown(n)}; it must be {low} to {high}")
    return n


def number(value: Any, what: str, low: int, high: int) -> int:
    return 0 if value is None else whole(value, what, low, high)


def seed(value: Any) -> int:
    return whole(value, "hash_seed", 0, 0xFFFFFFFFFFFFFFFF)


def rank(value: Any) -> int:
    return 0 if value is None else whole(value, "dp_rank", 0, 1 << 31)


def choice(value: Any, what: str, choices: tuple[str, ...]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise InvalidValueError(f"{what} is {shown(value)}; it must be one of {', '.join(choices)}")
    return choices.index(value)


def flag(value: Any, what: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be True or False")
    return bool(value)


def called(value: Any, what: str) -> Any:
    if not callable(value):
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be a callable without arguments")
    return value


def eagle(value: Any) -> tuple[int, list[int]]:
    """Return whether groups drop the last matched block (-1: not given), and the list of these
    groups, empty for all."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return (-1 if value is None else int(value)), []
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InvalidTypeError(
            f"eagle is {shown(value)}; it must be True, False or the group indexes that drop a block"
        )
    groups = sorted({whole(group, "a group of eagle", 0, 1 << 31) for group in value})
    return int(bool(groups)), groups


def moment(value: Any, what: str) -> float:
    try:
        s = math.nan if isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError):
        s = math.nan
    if isinstance(value, (int, float, np.number)) and not -1e18 < s < 1e18:
        raise InvalidValueError(f"{what} is {shown(value)}; it must be a finite number of seconds")
    if s != s:
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be a number of seconds")
    return s


def seconds(value: Any, what: str) -> float:
    s = moment(value, what)
    if s < 0:
        raise InvalidValueError(f"{what} is {shown(value)}; it must be 0 or more seconds, and finite")
    return s


def octets(value: Any, what: str) -> bytes:
    """Return bytes, by a copy of other buffers: another thread may write to a buffer that is read without the
    interpreter lock."""
    if type(value) is bytes:
        return value
    try:
        return memoryview(value).tobytes()
    except TypeError:
        raise InvalidTypeError(f"{what} is {type(value).__name__}; it must be bytes-like") from None


def path(value: Any, what: str) -> str:
    try:
        name = os.fspath(value)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be a str or a path")
    try:
        written = os.fsencode(name)
    except UnicodeEncodeError:
        written = b""
    if not written or b"\0" in written or len(written) > 4096:
        raise InvalidValueError(f"{what} is {shown(name)}; it must be the name of a file")
    return name


def each(values: Any, what: str) -> Iterator[Any]:
    try:
        yield from values
    # NotImplementedError: a memoryview of another format than Python's own.
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InvalidTypeError(f"{what} is {shown(values)}, which is not iterable: {error}") from error


def unmasked(value: Any, what: str) -> None:
    if np.ma.is_masked(value):
        raise InvalidValueError(f"{what} has masked items; pass filled() or compressed()")


def budget(max_bytes: Any) -> int:
    """Return the budget in bytes, 0 for no limit. Below the minimum, the first chain's tables would have no room, and
    no content would ever be kept."""
    return 0 if max_bytes is None else whole(max_bytes, "max_bytes", 1 << 15, (1 << 63) - 1)


def lifetime(ttl: Any) -> float:
    if ttl is None:
        return 0.0
    s = seconds(ttl, "ttl")
    if s == 0:
        raise InvalidValueError("ttl is 0, after which nothing would be left; it must be more than 0 seconds, or None")
    return s


def utf8(value: Any, what: str) -> bytes:
    if not isinstance(value, str):
        raise InvalidTypeError(f"{what} is {shown(value)}; it must be a str")
    try:
        # Names from a payload may contain bytes that are not UTF-8. They are encoded to the same bytes again.
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidValueError(f"{what} is {shown(value)}, which has no UTF-8 form") from None


def sendable(value: str, what: str) -> None:
    """Refuse a name that no socket, log or answer can carry."""
    try:
        value.encode()
    except UnicodeEncodeError as wrong:
        raise InvalidValueError(
            f"{what} is {shown(value)}, which has no UTF-8 form: write it without the lone surrogate"
            f" {value[wrong.start]!r} at character {wrong.start}"
        ) from None


def text(value: Any, what: str) -> bytes | None:
    return None if value is None else utf8(value, what)


def field(event: Any, name: str) -> Any:
    try:
        return getattr(event, name)
    except AttributeError:
        raise InvalidTypeError(
            f"event is {shown(event)}, which has no {name}; it must be a BlockStored, BlockRemoved or AllBlocksCleared"
        ) from None


def hashed_fields(event: Any) -> tuple[int, bytes, npt.NDArray[np.uint64], int, bytes | None]:
    """Return the fields that stored and removed events share: rank, model, hashes, group (-1: not given) and medium."""
    group = field(event, "group_idx")
    return (
        rank(field(event, "dp_rank")),
        utf8(field(event, "model"), "model"),
        hash_array(field(event, "block_hashes"), "block_hashes"),
        -1 if group is None else whole(group, "group_idx", 0, 1 << 31),
        text(event.medium, "medium"),
    )


def remaining(event: Any) -> Any:
    """Return the number of remaining copies of each removed hash; empty if the event does not contain it."""
    counts = event.remaining_copy_counts
    if counts is None:
        return ()
    if isinstance(counts, (str, bytes)) or not hasattr(counts, "__len__"):
        raise InvalidTypeError(f"remaining_copy_counts is {counts!r}; it has one int per hash")
    if len(counts) != len(event.block_hashes):
        raise InvalidValueError(
            f"remaining_copy_counts has {len(counts)} entries for {len(event.block_hashes)} hashes; it has one per hash"
        )
    return counts


def stored_fields(event: Any) -> tuple[bool, int, int, int, int, list[bytes | None], int, list[int]]:
    """Return the fields of a BlockStored alone: has_parent, parent, block size, window, adapter, texts, keys, form.

    The form is that of the content: 0 for tokens, otherwise the index of the field in HASHED plus 1.
    """
    tokens = field(event, "token_ids")
    hashed = content_hashes(event)
    if hashed is not None and tokens is not None and len(tokens):
        raise InvalidValueError(f"{hashed[0]} is given beside token_ids; give one of them")
    parent = event.parent_block_hash
    named = isinstance(event.lora_id, str)
    return (
        parent is not None,
        0 if parent is None else fold(parent, "parent_block_hash"),
        number(event.block_size, "block_size", 0, 1 << 40),
        number(event.kv_cache_spec_sliding_window, "kv_cache_spec_sliding_window", 0, 1 << 40),
        0 if named else number(event.lora_id, "lora_id", -(1 << 62), 1 << 62),
        [
            text(event.lora_id, "lora_id") if named else None,
            text(event.lora_name, "lora_name"),
            text(event.kv_cache_spec_kind, "kv_cache_spec_kind"),
            text(event.cache_salt, "cache_salt"),
            None if event.extra_keys is None else packed_keys(event.extra_keys),
        ],
        0 if hashed is None else HASHED.index(hashed[0]) + 1,
        lookahead(event, hashed),
    )


def lookahead(event: Any, hashed: Any) -> list[int]:
    """Return the lookahead tokens of all blocks, one list after another."""
    lists = event.lookahead_token_ids
    if lists is None:
        return []
    if isinstance(lists, (str, bytes)) or not hasattr(lists, "__len__"):
        raise InvalidTypeError(f"lookahead_token_ids is {lists!r}; it has one list of tokens per block")
    if hashed is not None:
        raise InvalidValueError(
            f"lookahead_token_ids is given beside {hashed[0]}, which have them in the hashes already"
        )
    if len(lists) != len(event.block_hashes):
        raise InvalidValueError(
            f"lookahead_token_ids has {len(lists)} lists for {len(event.block_hashes)} block_hashes; each block has one"
        )
    flat: list[int] = []
    for i, tokens in enumerate(lists):
        if isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__len__"):
            raise InvalidTypeError(f"lookahead_token_ids[{i}] is {tokens!r}; it is a list of tokens")
        if len(tokens) != len(lists[0]) or len(tokens) > 64:
            raise InvalidValueError(
                f"lookahead_token_ids[{i}] has {len(tokens)} tokens, the first list {len(lists[0])}; all have the same "
                "number, at most 64"
            )
        flat += [token(value, f"lookahead_token_ids[{i}]", at) for at, value in enumerate(tokens)]
    return flat


def content_hashes(event: Any) -> tuple[str, Any] | None:
    """Return the name and the value of the field that has hashes in place of tokens, or None."""
    given = [(name, field(event, name)) for name in HASHED if field(event, name) is not None]
    if len(given) > 1:
        raise InvalidValueError("local_hashes and prefix_hashes are both given; give one of them")
    return given[0] if given else None


def with_content(event: Any, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the event's hashes, followed by those that stand for its blocks' content if it has them."""
    hashed = content_hashes(event)
    if hashed is None:
        return hashes
    content = hash_array(hashed[1], hashed[0])
    if len(content) != len(hashes):
        raise InvalidValueError(
            f"{hashed[0]} has {len(content)} hashes for {len(hashes)} block_hashes; each block has one"
        )
    return np.concatenate((hashes, content))


def names(values: Any, what: str) -> list[bytes]:
    if isinstance(values, (str, bytes)):
        raise InvalidTypeError(f"{what} is {shown(values)}; it must be an iterable of str")
    return [utf8(value, f"each of {what}") for value in each(values, what)]


def token(value: Any, what: str, at: int) -> int:
    try:
        n = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise InvalidTypeError(f"{what}[{at}] is {shown(value)} of type {kind}; {TOKENS_ARE}") from None
    if not 0 <= n <= 0xFFFFFFFF:
        raise InvalidValueError(f"{what}[{at}] is {shown(n)}; token ids are 0 to 4294967295")
    return n


def fold(value: Any, what: str) -> int:
    """Return an engine hash as u64: ints as they are (signed ones wrap), bytes by their last
    eight, big-endian (vLLM)."""
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise InvalidValueError(f"{what} is empty bytes; an engine hash has at least one")
        return int.from_bytes(value[-8:], "big")
    try:
        n = operator.index(value)
    except TypeError:
        raise InvalidTypeError(f"{what} is {shown(value)}; an engine hash is an int or bytes") from None
    if not -(1 << 63) <= n < 1 << 64:
        raise InvalidValueError(f"{what} is {shown(n)}; an engine hash has 64 bits")
    return n & 0xFFFFFFFFFFFFFFFF


def hash_array(values: Any, what: str) -> npt.NDArray[np.uint64]:
    if isinstance(values, np.ndarray):
        unmasked(values, what)
        if values.dtype in (np.uint64, np.int64) and values.ndim == 1:
            return np.ascontiguousarray(values).view(np.uint64)
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Iterable):
        raise InvalidTypeError(f"{what} is {shown(values)}; it must be a sequence of hashes")
    # Nearly all lists are of plain ints and are read natively: 14 ns a hash, not 300. Others are checked one by one.
    if isinstance(values, list) and set(map(type, values)) == {int}:
        with suppress(OverflowError):
            return np.frombuffer(array("Q", values), dtype=np.uint64)
    return np.array([fold(value, f"{what}[{i}]") for i, value in enumerate(each(values, what))], dtype=np.uint64)


def packed_keys(extra_keys: Any) -> bytes:
    """Return extra_keys in the form that events have, so that one native reader serves both."""
    if extra_keys is None:
        return b""
    if isinstance(extra_keys, (str, bytes)) or not hasattr(type(extra_keys), "__len__"):
        raise InvalidTypeError(f"extra_keys is {shown(extra_keys)}; it has one entry per block: None or a list of keys")
    entries = list(each(extra_keys, "extra_keys"))
    for i, entry in enumerate(entries):
        if entry is not None and not isinstance(entry, (list, tuple)):
            raise InvalidTypeError(f"extra_keys[{i}] is {shown(entry)}; an entry is None or a list of keys")
    try:
        return bytes(msgpack.packb(entries, unicode_errors="surrogateescape"))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidValueError(
            f"extra_keys cannot be read ({error}); keys are str, int, bytes or (id, offset) pairs"
        ) from None


def unbroken(report: bytes) -> None:
    if report:
        raise KVIndexError(f"broken invariant: {report.decode()}")

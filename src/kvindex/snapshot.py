"""Snapshots as files: written whole or not at all, and never believed before they are checked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from ._core import snapshot_head
from .errors import CapacityError, InvalidValueError, SnapshotError

if TYPE_CHECKING:
    from .index import PrefixIndex

__all__: list[str] = []

T = TypeVar("T", bound="PrefixIndex")

# What tells a snapshot from other files, and how long it is.
_HEAD = 56


def save(index: PrefixIndex, path: str | os.PathLike[str]) -> None:
    # A link stays one: what it leads to is what is replaced.
    target = os.path.realpath(path)
    try:
        index._save(lambda data: _replace(target, data))
    except ValueError as error:
        raise SnapshotError(f"this index cannot be saved to {path}: {error}") from None
    except MemoryError:
        raise CapacityError(f"no memory to save an index of {index.stats()['blocks']} blocks to {path}") from None
    except OSError as error:
        raise _failed(
            f"no snapshot could be written to {path}", error, "; what was there before is as it was"
        ) from error


def load(
    cls: type[T],
    path: str | os.PathLike[str],
    *,
    max_parked: int | None,
    max_bytes: int | None,
    ttl: float | None,
    clock: Callable[[], float],
) -> T:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = snapshot_head(file.read(_HEAD), size)
            file.seek(0)
            data = file.read(size)
        index = cls(
            head["block_size"],
            hash_seed=head["seed"],
            presence="set" if head["set_presence"] else "count",
            max_parked=head["max_parked"] if max_parked is None else max_parked,
            max_bytes=max_bytes,
            ttl=ttl,
            clock=clock,
        )
        # Content that is loaded counts as touched now, so the index has to know what time it is.
        index._expire(clock())
        index._load(data)
    except InvalidValueError:
        raise  # an argument of ours
    except ValueError as error:
        raise SnapshotError(f"{path} is refused: {error}") from None
    except MemoryError:
        raise CapacityError(f"no memory to load {path}") from None
    except OSError as error:
        raise _failed(f"{path} cannot be read", error) from error
    return index


def _failed(what: str, error: OSError, then: str = "") -> SnapshotError:
    failure = SnapshotError(f"{what}: {error.strerror or error}{then}")
    failure.errno = error.errno
    return failure


def _replace(target: str, data: memoryview) -> None:
    folder, name = os.path.split(target)
    # In the same directory, for a rename does not cross file systems.
    beside = os.path.join(folder, f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    # The name has to outlive a power failure as well.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

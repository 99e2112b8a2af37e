"""Snapshots as files: written whole or not at all, and never believed before they are checked."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from . import arguments
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
    target = os.path.realpath(arguments.path(path, "path"))
    try:
        data = memoryview(index._saved())
    except ValueError as error:
        raise SnapshotError(f"this index cannot be saved to {path}: {error}") from None
    except MemoryError:
        raise CapacityError(f"no memory to save an index of {index.stats()['blocks']} blocks to {path}") from None
    try:
        folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
        try:
            _replace(folder, os.path.basename(target), data)
            try:
                # The name has to outlive a power failure as well.
                os.fsync(folder)
            except OSError as error:
                then = "; the snapshot is there, and may be gone after a power failure"
                raise _failed(f"the folder of {path} could not be brought to the disk", error, then) from error
        finally:
            os.close(folder)
    except SnapshotError:
        raise
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
    name = arguments.path(path, "path")
    try:
        # Opening a pipe would wait for its other end.
        with open(name, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            _only_regular(found)
            size = found.st_size
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


def _only_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _replace(folder: int, name: str, data: memoryview) -> None:
    mode = None
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder)
        _only_regular(found)
        mode = stat.S_IMODE(found.st_mode)
    # In the same directory, for a rename does not cross file systems. Its name is short, whatever the other's length.
    beside = f".kvindex-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open(beside, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
        try:
            if mode is not None:
                os.fchmod(file, mode)
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside, dir_fd=folder)
        raise

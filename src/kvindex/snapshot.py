"""Snapshots as files: written as a whole or not at all, read from regular files only. It does
not depend on an index."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ._core import snapshot_head
from .errors import CapacityError, InvalidValueError, SnapshotError

__all__: list[str] = []

# Bytes at the beginning that distinguish a snapshot from other files and contain its length.
_HEAD = 56


@contextmanager
def refused(where: str) -> Iterator[None]:
    """Raises the core's errors about a snapshot's bytes as :class:`SnapshotError`, with the name of their place."""
    try:
        yield
    except InvalidValueError:
        raise  # an argument of the caller
    except ValueError as error:
        raise SnapshotError(f"{where} is refused: {error}") from None
    except MemoryError:
        raise CapacityError(f"no memory to load {where}") from None


def head(data: bytes, size: int) -> dict[str, int]:
    """Return the properties of an index, from the first bytes of its snapshot of ``size`` bytes."""
    return snapshot_head(data[:_HEAD], size)


def write(path: str, data: memoryview) -> None:
    # A link stays a link: its target is replaced.
    target = os.path.realpath(path)
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
        raise _failed(f"no snapshot could be written to {path}", error, "; a previous file is unchanged") from error


def read(path: str) -> bytes:
    """Return the bytes of a file that begins as a snapshot does, and has the length that its beginning gives."""
    with refused(path):
        try:
            # Opening a pipe would wait for its other end.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                found = os.fstat(file.fileno())
                _only_regular(found)
                # A large file that is not a snapshot is not read into memory.
                head(file.read(_HEAD), found.st_size)
                file.seek(0)
                return file.read(found.st_size)
        except OSError as error:
            raise _failed(f"{path} cannot be read", error) from error


def _failed(what: str, error: OSError, then: str = "") -> SnapshotError:
    failure = SnapshotError(f"{what}: {error.strerror or error}{then}")
    failure.errno = error.errno
    return failure


def _only_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def _replace(folder: int, name: str, data: memoryview) -> None:
    mode = None
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder)
        _only_regular(found)
        mode = stat.S_IMODE(found.st_mode)
    # In the same directory, because a rename does not cross file systems. The name is short, even if
    # the other one is long.
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

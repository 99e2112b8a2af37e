"""Pods from a file that is read again whenever it changes: :class:`PodFile`.

The file is a list of pods, each a map of :class:`~kvindex.PodSource`'s fields, as YAML or JSON (which is YAML)::

    - {name: a, endpoint: "tcp://10.0.0.1:5557", replay_endpoint: "tcp://10.0.0.1:5558", model: llama}
    - name: b
      model: llama
      ranks:
        0: ["tcp://10.0.0.2:5557", "tcp://10.0.0.2:5558"]
        1: ["tcp://10.0.0.3:5557", "tcp://10.0.0.3:5558"]
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from typing import Any, NamedTuple

from ..errors import InvalidTypeError, InvalidValueError, KVIndexError
from ..sync.addresses import same_endpoint
from ..sync.source import PodSource
from .reconciler import Watcher

__all__ = ["PodFile", "read_pods"]

log = logging.getLogger("kvindex.discovery")


def read_pods(path: str | os.PathLike[str]) -> dict[str, PodSource]:
    """Reads the pods of a file. O(bytes).

    A name that ends in ``.json`` is read as JSON, any other as YAML, which needs the ``pyyaml`` package.

    Args:
        path: Path of the file.

    Returns:
        ``{pod: PodSource}``, in the order of the file.

    Raises:
        InvalidTypeError: A field has the wrong type. The message has the file and the pod.
        InvalidValueError: A field is out of range, or the file is malformed.
        OSError: The file cannot be read.
    """
    path = os.fspath(path)
    return _parse(_read(path).data, path)


class _Version(NamedTuple):
    inode: int
    data: bytes


def _read(path: str) -> _Version:
    # Without waiting: if the path is a pipe, no process may ever write into it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        return _Version(found.st_ino, file.read())


def _parse(data: bytes, path: str) -> dict[str, PodSource]:
    items = _load(data, path)
    if not isinstance(items, list):
        # An empty file is no list either: a reader may find the file empty while it is being written.
        raise InvalidValueError(f"{path} is not a list of pods (an empty one is []): {items!r:.60}")
    pods: dict[str, PodSource] = {}
    owners: dict[str, str] = {}
    for number, item in enumerate(items, 1):
        try:
            source = PodSource.from_mapping(item)
        except (ValueError, TypeError) as error:
            kind = InvalidTypeError if isinstance(error, TypeError) else InvalidValueError
            raise kind(f"{path}, pod {number}: {error}") from None
        if source.name in pods:
            raise InvalidValueError(f"{path}, pod {number}: there is a pod {source.name!r} before it")
        for use, endpoint in source.endpoints():
            if (owner := owners.setdefault(same_endpoint(endpoint), source.name)) != source.name:
                raise InvalidValueError(
                    f"{path}, pod {number}: {use} at {endpoint}, which is of pod {owner!r} before it"
                )
        pods[source.name] = source
    return pods


def _load(data: bytes, path: str) -> Any:
    try:
        if path.endswith(".json"):
            return json.loads(data)
        import yaml
    except ImportError:
        raise InvalidValueError(
            f"{path}: reading YAML needs a package that is not installed: pip install pyyaml (or name it .json)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} is not JSON: {error}") from None
    try:
        return yaml.safe_load(data)
    # Its constructors raise Python's own errors: ValueError for a date of month 13, TypeError for a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


class PodFile(Watcher):
    """Keeps a manager's pods equal to the list in a file. A context manager.

    The file is read every ``interval`` seconds, and a change takes effect once two reads agree. New pods are added,
    missing pods are removed, changed pods are removed and added again, and all others are untouched.

    A file that is renamed into place, as ``kubectl`` and editors do, is complete. A file that is written in place may
    be read half-written: pods that are missing from it are removed only after it was unchanged for ``settle`` seconds.
    While the file is missing or malformed, the pods stay as they are, and the problem is logged once.

    :meth:`start` raises as :func:`read_pods` does, so that a mistake in the first version is found at once. When it is
    closed, the pods stay in the manager.

    Args:
        manager: A :class:`kvindex.EventManager` or a :class:`kvindex.aio.AsyncEventManager`.
        path: Path of the file.
        interval: Seconds between reads.
        settle: Seconds without a change after which pods that are missing from a file written in place are removed.

    Raises:
        InvalidTypeError: ``manager`` is not a manager.
        InvalidValueError: ``interval`` or ``settle`` is out of range.
    """

    def __init__(
        self, manager: Any, path: str | os.PathLike[str], *, interval: float = 1.0, settle: float = 5.0
    ) -> None:  # fmt: skip
        if not interval > 0:
            raise InvalidValueError(f"interval must be more than 0 seconds, not {interval}")
        if not settle >= 0:
            raise InvalidValueError(f"settle must be 0 seconds or more, not {settle}")
        super().__init__(manager, "kvindex-pod-file")
        self.path = os.fspath(path)
        self._interval = interval
        self._settle = settle
        self._taken: _Version | None = None  # the version that the pods come from
        self._seen: _Version | None = None  # the version of the last look
        self._seen_since = 0.0
        self._wanted: dict[str, PodSource] = {}
        self._trouble = ""

    def _begin(self) -> None:
        self._taken = self._seen = _read(self.path)
        self._wanted = _parse(self._taken.data, self.path)
        self._reconciler.reconcile(self._wanted)

    def _turn(self) -> None:
        if self._closing.wait(self._interval):
            return
        # The whole file is compared and not its time: an editor may write twice within one tick of the file system's
        # clock, and Kubernetes replaces the directory that a ConfigMap's file lies in.
        try:
            version = _read(self.path)
        except OSError as error:
            self._taken = self._seen = None
            self._complain(error)
        else:
            if version != self._seen:
                self._seen, self._seen_since = version, time.monotonic()
            elif version != self._taken:
                self._take(version)
        self._reconciler.reconcile(self._wanted)

    def _take(self, version: _Version) -> None:
        """Reconciles with a version that two reads agree on."""
        try:
            wanted = _parse(version.data, self.path)
        except KVIndexError as error:
            self._taken = version
            self._complain(error)
            return
        self._trouble = ""
        in_place = self._taken is None or version.inode == self._taken.inode
        gone = {name: source for name, source in self._wanted.items() if name not in wanted}
        if gone and in_place and time.monotonic() < self._seen_since + self._settle:
            self._wanted = {**gone, **wanted}
            return
        self._taken, self._wanted = version, wanted
        log.info("%s: %d pods", self.path, len(wanted))

    def _complain(self, error: Exception) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.warning("the pods stay as they are: %s", error)

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
from typing import Any

from ..errors import InvalidTypeError, InvalidValueError, KVIndexError
from ..sync.manager import EventManager
from ..sync.source import PodSource
from .keeper import Watcher

__all__ = ["PodFile", "read_pods"]

log = logging.getLogger("kvindex.discovery")


def read_pods(path: str | os.PathLike[str]) -> dict[str, PodSource]:
    """The pods that a file lists, by name, in its order. O(bytes).

    A name that ends in ``.json`` is read as JSON, any other as YAML, which needs the ``pyyaml`` package. Raises
    :class:`InvalidValueError` or :class:`InvalidTypeError` naming the file and the pod, ``OSError`` when the file can
    not be read.
    """
    with open(path, "rb") as file:
        return _parse(file.read(), os.fspath(path))


def _parse(data: bytes, path: str) -> dict[str, PodSource]:
    items = _load(data, path)
    if not isinstance(items, list):
        # An empty file is one too: it is what somebody sees who looks while it is written.
        raise InvalidValueError(f"{path} is no list of pods (an empty one is []): {items!r:.60}")
    pods: dict[str, PodSource] = {}
    for number, item in enumerate(items, 1):
        try:
            source = PodSource.from_mapping(item)
        except (ValueError, TypeError) as error:
            kind = InvalidTypeError if isinstance(error, TypeError) else InvalidValueError
            raise kind(f"{path}, pod {number}: {error}") from None
        if source.name in pods:
            raise InvalidValueError(f"{path}, pod {number}: there is a pod {source.name!r} before it")
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
        raise InvalidValueError(f"{path} is no JSON: {error}") from None
    try:
        return yaml.safe_load(data)
    # Its constructors raise what Python's own raise: ValueError for a date of month 13, TypeError for a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


class PodFile(Watcher):
    """Keeps a manager's pods equal to those that a file lists.

    The file is looked at every ``interval`` seconds. A pod that is new in it is added, one that is gone removed, one
    that has changed followed anew, all others notice nothing. While the file is missing or broken the pods stay as
    they are, which is logged once. Starting raises as :func:`read_pods` does, so that a mistake in the first version
    shows at once.
    """

    def __init__(self, manager: EventManager, path: str | os.PathLike[str], *, interval: float = 1.0) -> None:
        if not interval > 0:
            raise InvalidValueError(f"interval must be more than 0 seconds, not {interval}")
        super().__init__(manager, "kvindex-pod-file")
        self.path = os.fspath(path)
        self._interval = interval
        self._data: bytes | None = None
        self._wanted: dict[str, PodSource] = {}
        self._trouble = ""

    def _begin(self) -> None:
        with open(self.path, "rb") as file:
            self._data = file.read()
        self._wanted = _parse(self._data, self.path)
        self._keeper.keep(self._wanted)

    def _turn(self) -> None:
        if self._closing.wait(self._interval):
            return
        # The whole file and not its time: an editor may write twice within one tick of the file system's clock, and
        # Kubernetes replaces the directory that a ConfigMap's file lies in.
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except OSError as error:
            self._data = None
            self._complain(error)
        else:
            if data != self._data:
                self._data = data
                self._read(data)
        self._keeper.keep(self._wanted)

    def _read(self, data: bytes) -> None:
        try:
            self._wanted = _parse(data, self.path)
        except KVIndexError as error:
            self._complain(error)
        else:
            self._trouble = ""
            log.info("%s: %d pods", self.path, len(self._wanted))

    def _complain(self, error: Exception) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.warning("the pods stay as they are: %s", error)

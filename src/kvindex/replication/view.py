"""The public class: :class:`ReplicatedIndex`."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from .. import arguments
from ..errors import InvalidValueError, StreamError
from ..index import PrefixIndex
from ..sync.source import PodSource
from ..sync.status import PodsChange, PodStatus, StateChange
from .exchange import Exchange
from .joined import JoinedIndex
from .replica import Replica
from .requests import ReplicationPolicy
from .shard import Shard, shard_of
from .sharing import Sharing
from .status import ROLES, ReplicationStatus, together

if TYPE_CHECKING:
    import redis

__all__ = ["ReplicatedIndex"]

T = TypeVar("T")

_MOST_SHARDS = 64  # kMostParts of the core


class ReplicatedIndex:
    """One view of a fleet for many processes, through a server with the Redis protocol (6.2 or later).

    One process, the collector, follows the engines and writes each change of its index to a log in the server. The
    others read the log into an index of their own. If the collector ends, another candidate takes over within
    ``policy.lease`` seconds. Matches use :attr:`index`, which is local; an answer with the state ``exact`` is at most
    ``policy.silence`` seconds behind the log.

    A context manager. Any thread may call any method. Faults of the server raise no exception: they are in
    :meth:`status` and in the logger ``kvindex.replication``, and answers are ``stale`` meanwhile::

        from kvindex import PodSource
        from kvindex.replication import ReplicatedIndex

        with ReplicatedIndex("redis://127.0.0.1:6379", fleet="prod", block_size=16) as view:
            view.add_pod(PodSource("a", endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558"))
            match = view.index.match_prefix(range(64), only_exact=True)
            print(view.role, match.best())

    Args:
        server: A URL as of ``redis.Redis.from_url`` (``rediss://`` for TLS), or a client of redis-py, such as
            ``Sentinel(...).master_for(name)``.
        fleet: A name, which becomes a part of all keys. Two fleets in one server need two names.
        block_size: Tokens per block of the index, equal in all processes of the fleet.
        collect: Whether this process may become the collector. All candidates need the same pods, by :meth:`add_pod`.
        log: False for the exchange of snapshots only: this process follows the engines itself, starts with a snapshot
            of its neighbours, and writes one every ``policy.snapshot_every`` seconds.
        share: Whether routers see one another's requests: prefixes that :meth:`PrefixIndex.add_prefix` or an
            ``EndpointPicker(view.index, view)`` adds, and the reservations of such a picker. Best effort, without an
            effect on states.
        shards: Number of logs, 1 to 64, equal in all processes of the fleet. Each has a part of the pods, a collector
            and snapshots of its own. Use more than one if a collector's processor is full.
        policy: Times and bounds.
        manager_options: Options of the collector's :class:`EventManager`.
        index_options: Further options of :class:`PrefixIndex`. Each shard has an equal part of ``max_bytes``.

    Raises:
        InvalidValueError: ``fleet`` is not a name, ``server`` is not a valid URL, or ``shards`` is out of range.
    """

    def __init__(
        self, server: str | redis.Redis, *, fleet: str, block_size: int = 16, collect: bool = True, log: bool = True,
        share: bool = False, shards: int = 1, policy: ReplicationPolicy | None = None,
        manager_options: dict[str, Any] | None = None, **index_options: Any,
    ) -> None:  # fmt: skip
        if not fleet or any(letter in fleet for letter in "{}:"):
            raise InvalidValueError(f"fleet is {fleet!r:.60}; it must be a name without braces and colons")
        shards = arguments.whole(shards, "shards", 1, _MOST_SHARDS if log else 1)
        self.fleet = fleet
        self.policy = ReplicationPolicy() if policy is None else policy
        self._on_change: list[Callable[[StateChange], None]] = []
        self._on_pods: list[Callable[[PodsChange], None]] = []
        if shards > 1 and index_options.get("max_bytes") is not None:
            index_options["max_bytes"] = arguments.budget(index_options["max_bytes"]) // shards
        writer = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        turn = threading.Lock()
        self._shards: list[Shard] = []
        for number in range(shards):
            index = PrefixIndex(block_size, **index_options)
            settings = {
                "block_size": index.block_size,
                "hash_seed": index.hash_seed,
                "presence": index_options.get("presence", "count"),
                # A single shard is not named, so that logs from before shards existed stay valid.
                **({"shards": shards} if shards > 1 else {}),
            }
            machine = (
                Replica(self.policy, settings, writer, candidate=collect)
                if log
                else Exchange(self.policy, settings, writer)
            )
            self._shards.append(
                Shard(server, fleet, number, self.policy, index, machine, manager_options or {}, turn, self._on_change,
                      self._on_pods)
            )  # fmt: skip
        for shard in self._shards:
            shard.mates = [mate for mate in self._shards if mate is not shard]
        self._index: PrefixIndex = self._shards[0].index
        if shards > 1:
            self._index = JoinedIndex.of([shard.index for shard in self._shards], partial(shard_of, shards=shards))
            self._index._owner = self._shards[0].index._owner
        self._sharing = Sharing(server, fleet, self.policy, self._index) if share else None
        if self._sharing is not None:
            self._index._sharing = self._sharing
        self._closing = False

    def _of(self, pod: str) -> Shard:
        # A value that is not a name is in no shard, and every shard reports that.
        return self._shards[shard_of(pod, len(self._shards)) if isinstance(pod, str) else 0]

    def __repr__(self) -> str:
        server = self._shards[0].store.name
        return f"ReplicatedIndex({server!r}, fleet={self.fleet!r}, {self.role}, {self._index!r})"

    # --------------------------------------------------------------------------------------------------- public methods

    @property
    def index(self) -> PrefixIndex:
        """The index of this process, the same object at any time. O(1).

        A snapshot replaces the content of its shard as a whole: each match answers from the content before or after.
        Call methods that read only; with several shards, :meth:`PrefixIndex.save` and ``dumps`` raise
        :class:`SnapshotError`. An :class:`EventManager` refuses it: :meth:`add_pod` takes the pods.
        """
        return self._index

    @property
    def role(self) -> Literal["collector", "follower", "direct"]:
        """The current role, as in :attr:`ReplicationStatus.role`. O(shards)."""
        return max((shard.role for shard in self._shards), key=ROLES.index)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called. O(1)."""
        return self._closing

    def start(self) -> None:
        """Starts a thread for each shard. Entering the context manager does it, too.

        Raises:
            StreamError: It is closed.
        """
        if self._closing:
            raise StreamError("this ReplicatedIndex is closed")
        for shard in self._shards:
            with suppress(RuntimeError):  # it runs already
                shard.thread.start()
        if self._sharing is not None:
            self._sharing.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if any(shard.thread.is_alive() for shard in getattr(self, "_shards", ())) and not self._closing:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def close(self) -> None:
        """Ends the threads and releases the leases. Every pod is ``stale`` afterwards. Closing twice is fine."""
        self._closing = True
        for shard in self._shards:
            shard.close()
        for shard in self._shards:
            if shard.thread.is_alive() and threading.current_thread() is not shard.thread:
                shard.thread.join()
        if self._sharing is not None:
            self._sharing.close()
        self._index.trust(0.0)

    def add_pod(self, source: PodSource) -> None:
        """Adds a pod that this process follows while it is the collector.

        Args:
            source: The pod, as for :meth:`EventManager.add_pod`.

        Raises:
            StreamError: The name has been added already.
            InvalidValueError: This process is the collector, and the index cannot contain the pod's blocks.
        """
        self._of(source.name).add_pod(source)

    def remove_pod(self, name: str) -> None:
        """Removes a pod with its blocks. If this process is the collector, followers remove it, too.

        Args:
            name: The pod's name.

        Raises:
            UnknownPodError: No pod of that name has been added here.
        """
        self._of(name).remove_pod(name)

    def describe_pod(self, source: PodSource) -> None:
        """Changes the address and the labels of a pod, as :meth:`EventManager.describe_pod`.

        Args:
            source: The pod with its new address and labels.

        Raises:
            UnknownPodError: No pod of that name has been added here.
            InvalidValueError: Another field differs.
        """
        self._of(source.name).describe_pod(source)

    def pods(self) -> dict[str, PodSource]:
        """Returns the sources of all pods by name: those of the collector, and those added here. O(pods).

        In a follower, a source that comes from the log has a name, model, address, labels and engine only.
        """
        return {name: source for shard in self._shards for name, source in shard.pods().items()}

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        """Registers a callback for added and removed pods, as :meth:`EventManager.on_pods`, also for those in the log.

        Args:
            callback: Receives a :class:`PodsChange`, in a thread of the view. Several shards have several.

        Returns:
            A function that ends the registration.
        """
        return _enter(self._on_pods, callback)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Registers a callback for changes of state, as :meth:`EventManager.on_change`.

        A silent log makes all of its pods ``stale`` without a call.

        Args:
            callback: Receives a :class:`StateChange`, in a thread of the view. Several shards have several.

        Returns:
            A function that ends the registration.
        """
        return _enter(self._on_change, callback)

    def inexact(self, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Returns the pods that are not ``exact``, with their states. O(pods).

        Args:
            pods: Names; None for all of :meth:`pods`.

        Returns:
            ``{"a": "stale"}``.
        """
        names = list(self.pods()) if pods is None else list(pods)
        states = self._index.pods()
        return {name: states.get(name, "stale") for name in names if states.get(name) != "exact"}

    def wait_until_exact(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> dict[str, str]:
        """Waits until pods are ``exact``.

        Args:
            timeout: Seconds; None for no limit.
            pods: Names; None for all of :meth:`pods`, and at least one.

        Returns:
            :meth:`inexact`, which is empty on success.
        """
        names = None if pods is None else list(pods)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            missing = self.inexact(names)
            if not missing and (names is not None or self.pods()):
                return {}
            if self._closing or (until is not None and time.monotonic() >= until):
                return missing
            time.sleep(0.01)

    def wait_until_current(self, timeout: float | None = None) -> bool:
        """Waits until there are pods and none is ``stale``, as :meth:`EventManager.wait_until_current`.

        Args:
            timeout: Seconds; None for no limit.

        Returns:
            False after ``timeout`` seconds, or if the view was closed.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not (pods := self.pods()) or "stale" in self.inexact(pods).values():
            if self._closing or (until is not None and time.monotonic() >= until):
                return False
            time.sleep(0.01)
        return True

    def status(self) -> ReplicationStatus:
        """Returns the role, place and faults of this process. O(pods); it does not wait for the thread."""
        each = [shard.status() for shard in self._shards]
        status = each[0] if len(each) == 1 else together(each)
        return status if self._sharing is None else replace(status, sharing=self._sharing.status())

    def pod_status(self) -> dict[str, PodStatus]:
        """Returns every pod's status, as :meth:`EventManager.status`. O(workers).

        In a follower, it has the state, the reason, the place and the blocks of each rank. Its counters are 0, because
        only the collector has them, and ``connected`` is whether the log is alive.
        """
        return {name: status for shard in self._shards for name, status in shard.pod_status().items()}


def _enter(table: list[T], item: T) -> Callable[[], None]:
    table.append(item)

    def end() -> None:
        with suppress(ValueError):
            table.remove(item)

    return end

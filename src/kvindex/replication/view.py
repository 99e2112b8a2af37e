"""The public class: :class:`ReplicatedIndex`."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from .._core import hash_batch
from ..answers import WorkerStats
from ..errors import EventDecodeError, InvalidValueError, KVIndexError, StreamError, UnknownPodError
from ..index import PrefixIndex
from ..sync.manager import EventManager
from ..sync.source import PodSource
from ..sync.status import (
    Batch,
    Configured,
    Forgotten,
    Marked,
    PodsChange,
    PodStatus,
    Removed,
    StateChange,
    WorkerStatus,
    pod_status,
)  # fmt: skip
from .collector import Collector, Cut
from .entries import ZERO, Described, Hashed, epoch_time, id_text, parse_id
from .exchange import Exchange
from .follower import BEGINNING, Follower
from .replica import Replica
from .requests import Claim, Collect, Load, Renew, ReplicationPolicy, Request, Snapshot, StepDown, Trust, Wait
from .sharing import Sharing, SharingStatus
from .snapshots import pack
from .store import Store

if TYPE_CHECKING:
    import redis

__all__ = ["ReplicatedIndex", "ReplicationStatus"]

log = logging.getLogger("kvindex.replication")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationStatus:
    """The part of one process in a fleet at one moment. Counters since its start."""

    role: Literal["collector", "follower", "direct"]
    """``collector``: it follows the engines and writes the log. ``follower``: it reads the log. ``direct``: it follows
    the engines, and there is no log."""
    reason: str
    """Why answers are not current; empty where they are."""
    hindrance: str
    """Why this process cannot become the collector, or which pods the collector lacks; empty where neither is so."""
    server: str
    """Address of the server, without credentials."""
    fleet: str
    """Name of the fleet."""
    place: str
    """Id of the last entry of the log that this process has applied or written."""
    trusted: bool
    """Whether this process is up to date with the log, or with its engines if it follows them."""
    age: float | None
    """Seconds since the moment up to which this process has the log, or the messages that its engines have sent to it;
    None if that is unknown."""
    began: float | None
    """When the log's current epoch began, in seconds since 1970 by its collector's clock; None without one."""
    lease_age: float | None
    """Seconds since this process renewed the lease; None unless it is the collector."""
    snapshot_age: float | None
    """Seconds since the last snapshot was loaded or made here; None without one."""
    snapshot_bytes: int
    """Its size."""
    read_bytes: int
    """Bytes of entries read."""
    written_bytes: int
    """Bytes of entries written."""
    refused: int
    """Entries that the log did not take, because it has them or those of another collector."""
    entries: int
    """Entries read."""
    written: int
    """Entries written since this process became the collector."""
    refilled: int
    """Entries written again after the server had lost them."""
    snapshots: int
    """Snapshots loaded and written."""
    holes: int
    """Times that the log could not be continued without a snapshot."""
    takeovers: int
    """Times that this process became the collector."""
    step_downs: int
    """Times that another process replaced it as the collector."""
    failures: dict[str, int]
    """Failed requests to the server, by kind."""
    sharing: SharingStatus | None
    """Speculative entries and reservations that routers share; None without ``share``."""


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
        policy: Times and bounds.
        manager_options: Options of the collector's :class:`EventManager`.
        index_options: Further options of :class:`PrefixIndex`.

    Raises:
        InvalidValueError: ``fleet`` is not a name, or ``server`` is not a valid URL.
    """

    def __init__(
        self, server: str | redis.Redis, *, fleet: str, block_size: int = 16, collect: bool = True, log: bool = True,
        share: bool = False, policy: ReplicationPolicy | None = None,
        manager_options: dict[str, Any] | None = None, **index_options: Any,
    ) -> None:  # fmt: skip
        if not fleet or any(letter in fleet for letter in "{}:"):
            raise InvalidValueError(f"fleet is {fleet!r:.60}; it must be a name without braces and colons")
        self.fleet = fleet
        self.policy = ReplicationPolicy() if policy is None else policy
        self._index = PrefixIndex(block_size, **index_options)
        self._index.trust(0.0)
        self._index._owner = f"the ReplicatedIndex of fleet {fleet!r}"
        self._manager_options = manager_options or {}
        settings = {
            "block_size": self._index.block_size,
            "hash_seed": self._index.hash_seed,
            "presence": index_options.get("presence", "count"),
        }
        writer = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._machine: Replica | Exchange = (
            Replica(self.policy, settings, writer, candidate=collect)
            if log
            else Exchange(self.policy, settings, writer)
        )
        self._store: Store[Request] = Store(server, fleet, self.policy)
        self._sharing = Sharing(server, fleet, self.policy, self._index) if share else None
        if self._sharing is not None:
            self._index._sharing = self._sharing
        self._manager: EventManager | None = None
        self._sources: dict[str, PodSource] = {}
        self._lock = threading.RLock()  # of the sources, and of the manager's coming and going
        self._on_change: list[Callable[[StateChange], None]] = []
        self._on_pods: list[Callable[[PodsChange], None]] = []
        self._inbox: deque[Callable[[float], None]] = deque()
        self._awake = threading.Event()
        self._is_idle = False
        self._closing = False
        self._until = 0.0
        self._said = ""
        self._silent = (
            f"the log is silent: no collector has written for {self.policy.silence:g} s that it follows the engines;"
            " none may run, or the server may not let it write"
        )
        self._late = (
            f"this process has not looked at its engines' messages for {self.policy.silence:g} s: it was suspended, or"
            " needs more of a processor"
        )
        self._lacks = ""
        self._look_at = 0.0
        self._beats_end = threading.Event()
        self._beaten_at = 0.0
        self._is_late = False
        self._leased_at = 0.0
        self._snapshot_at: float | None = None
        self._snapshot_bytes = 0
        self._thread = threading.Thread(target=self._run, name="kvindex-replication", daemon=True)

    def __repr__(self) -> str:
        return f"ReplicatedIndex({self._store.name!r}, fleet={self.fleet!r}, {self.role}, {self._index!r})"

    # ------------------------------------------------------------------------------------------------- what people call

    @property
    def index(self) -> PrefixIndex:
        """The index of this process, the same object at any time. O(1).

        A snapshot replaces the content as a whole: each match answers from the content before or after. Call methods
        that read only. An :class:`EventManager` refuses it: :meth:`add_pod` takes the pods.
        """
        return self._index

    @property
    def role(self) -> Literal["collector", "follower", "direct"]:
        """The current role, as in :attr:`ReplicationStatus.role`. O(1)."""
        return self._machine.role  # type: ignore[return-value]

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called. O(1)."""
        return self._closing

    def start(self) -> None:
        """Starts the thread. Entering the context manager does it, too.

        Raises:
            StreamError: It is closed.
        """
        if self._closing:
            raise StreamError("this ReplicatedIndex is closed")
        with suppress(RuntimeError):  # it runs already
            self._thread.start()
            if self._sharing is not None:
                self._sharing.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_thread", None) is not None and self._thread.is_alive() and not self._closing:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def close(self) -> None:
        """Ends the thread and releases the lease. Every pod is ``stale`` afterwards. Closing twice is fine."""
        self._closing = True
        self._awake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
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
        with self._lock:
            if source.name in self._sources:
                raise StreamError(f"pod {source.name!r} has been added already; remove it first")
            self._sources[source.name] = source
            if self._manager is not None:
                try:
                    self._manager.add_pod(source)
                except BaseException:
                    del self._sources[source.name]
                    raise

    def remove_pod(self, name: str) -> None:
        """Removes a pod with its blocks. If this process is the collector, followers remove it, too.

        Args:
            name: The pod's name.

        Raises:
            UnknownPodError: No pod of that name has been added here.
        """
        with self._lock:
            if self._sources.pop(name, None) is None:
                raise UnknownPodError(f"no pod {name!r} has been added here")
            if self._manager is not None:
                with suppress(UnknownPodError):
                    self._manager.remove_pod(name)

    def describe_pod(self, source: PodSource) -> None:
        """Changes the address and the labels of a pod, as :meth:`EventManager.describe_pod`.

        Args:
            source: The pod with its new address and labels.

        Raises:
            UnknownPodError: No pod of that name has been added here.
            InvalidValueError: Another field differs.
        """
        with self._lock:
            if source.name not in self._sources:
                raise UnknownPodError(f"no pod {source.name!r} has been added here")
            if self._manager is not None:
                self._manager.describe_pod(source)
            self._sources[source.name] = source

    def pods(self) -> dict[str, PodSource]:
        """Returns the sources of all pods by name: those of the collector, and those added here. O(pods).

        In a follower, a source that comes from the log has a name, model, address, labels and engine only.
        """
        if self._manager is not None:
            return self._manager.pods()
        table = dict(self._sources)
        for name, described in list(self._known.pods.items()):
            table.setdefault(name, _source(described))
        return table

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        """Registers a callback for added and removed pods, as :meth:`EventManager.on_pods`, also for those in the log.

        Args:
            callback: Receives a :class:`PodsChange`, in a thread of the view.

        Returns:
            A function that ends the registration.
        """
        return _enter(self._on_pods, callback)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Registers a callback for changes of state, as :meth:`EventManager.on_change`.

        A silent log makes all pods ``stale`` without a call.

        Args:
            callback: Receives a :class:`StateChange`, in a thread of the view.

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
        machine = self._machine
        replica = machine if isinstance(machine, Replica) else None
        follower = None if replica is None else replica.follower
        collector = None if replica is None else replica.collector
        now = time.monotonic()
        return ReplicationStatus(
            role=self.role,
            reason=self._reason if self._thread.is_alive() else "closed" if self._closing else "not started",
            hindrance=machine.hindrance or self._missing(),
            server=self._store.name,
            fleet=self.fleet,
            place=machine.place,
            trusted=self._is_trusted,
            age=self._age(now),
            began=None if machine.place in ("", id_text(ZERO)) else epoch_time(parse_id(machine.place)[0]),
            lease_age=None if collector is None else now - self._leased_at,
            snapshot_age=None if self._snapshot_at is None else now - self._snapshot_at,
            snapshot_bytes=self._snapshot_bytes,
            read_bytes=self._store.read_bytes,
            written_bytes=self._store.written_bytes,
            refused=self._store.refused,
            entries=0 if follower is None else follower.entries,
            written=0 if collector is None else collector.written,
            refilled=0 if collector is None else collector.refilled,
            snapshots=sum(
                made.snapshots for made in (follower, collector, machine) if isinstance(made, _WITH_SNAPSHOTS)
            ),
            holes=0 if follower is None else follower.holes,
            takeovers=0 if replica is None else replica.takeovers,
            step_downs=0 if replica is None else replica.step_downs,
            failures=dict(machine.failures),
            sharing=None if self._sharing is None else self._sharing.status(),
        )  # fmt: skip

    def pod_status(self) -> dict[str, PodStatus]:
        """Returns every pod's status, as :meth:`EventManager.status`. O(workers).

        In a follower, it has the state, the reason, the place and the blocks of each rank. Its counters are 0, because
        only the collector has them, and ``connected`` is whether the log is alive.
        """
        manager = self._manager
        if manager is not None:
            return manager.status()
        status = self.status()
        sources, reasons = self.pods(), dict(self._known.reasons)
        table: dict[str, PodStatus] = {}
        for name in sorted({*sources, *self._index.pods()}):
            model = sources[name].model if name in sources else ""
            workers = {}
            with suppress(UnknownPodError):
                for rank, stats in self._index.worker_stats(name).items():
                    reason = status.reason if not status.trusted else reasons.get((name, rank), "")
                    workers[rank] = _worker_status(name, rank, model, reason, status.trusted, stats)
            if not workers:
                missing: WorkerStats = {
                    "blocks": 0, "parked": 0, "state": "stale", "last_seq": None, "in_doubt": False, "lookahead": []
                }  # fmt: skip
                reason = status.reason or status.hindrance
                workers[0] = _worker_status(name, 0, model, reason, status.trusted, missing)
            table[name] = pod_status(name, model, workers)
        return table

    @property
    def _is_trusted(self) -> bool:
        return time.monotonic() < self._until

    def _age(self, now: float) -> float | None:
        return None if self._until == 0.0 else now - (self._until - self.policy.silence)

    @property
    def _reason(self) -> str:
        # A machine hears of an entry that comes, not of the one that does not.
        if self._manager is not None:
            return self._machine.reason or ("" if self._is_trusted else self._late)
        return self._machine.reason or ("" if self._is_trusted else self._silent)

    def _missing(self) -> str:
        if self.role != "follower" or self._until == 0.0:
            return ""
        missing = sorted(set(self._sources) - set(self._known.pods))
        if not missing:
            return ""
        return (
            f"the collector does not follow {', '.join(missing[:5])}{' and others' * (len(missing) > 5)}: it may have"
            " another list of pods, or another fleet may have this name"
        )

    @property
    def _known(self) -> Any:
        return self._machine.known

    # ------------------------------------------------------------------------------------------------------ its thread

    def _run(self) -> None:
        while True:
            try:
                self._loop()
                break
            except Exception:
                log.exception("%s: the thread has failed, and begins anew", self.fleet)
                with suppress(Exception):
                    self._step_down("its thread failed")
                self._trust(0.0)
                self._store.drop()
                machine = self._machine
                if isinstance(machine, Replica):
                    self._machine = Replica(self.policy, machine.settings, machine.writer, candidate=machine.candidate)
                self._awake.wait(1.0)
        with suppress(Exception):
            self._step_down("closed")
            self._trust(0.0)
            self._store.close()

    def _loop(self) -> None:
        clock = time.monotonic
        while True:
            if self._closing:
                self._machine.closing = True
            now = clock()
            while self._inbox:
                self._inbox.popleft()(now)
            request = self._machine.next(now, time.time())
            if type(request) is Wait:
                if self._closing:
                    return
                self._carry(self._machine.due(now))
                self._sleep(request.until - clock())
            else:
                answer = self._store.do(request)
                if answer is True and type(request) in _LEASES:
                    self._leased_at = now
                self._carry(self._machine.answered(request, answer, now, clock()))
            self._say(now)

    def _sleep(self, seconds: float) -> None:
        if seconds <= self.policy.busy_linger:
            # Changes gather: nobody has to wake this thread for each of them.
            if seconds > 0:
                time.sleep(seconds)
            return
        self._awake.clear()
        self._is_idle = True
        collector = self._machine.collector if isinstance(self._machine, Replica) else None
        if not (self._inbox or self._closing or (collector is not None and collector.shown)):
            self._awake.wait(min(seconds, 60.0))
        self._is_idle = False

    def _wake(self) -> None:
        if self._is_idle:
            self._awake.set()

    def _say(self, now: float) -> None:
        if now >= self._look_at:
            # O(pods), and this is done for each entry.
            self._look_at = now + self.policy.silence
            self._lacks = self._missing()
        reason = self._machine.hindrance or self._lacks or self._reason
        if reason != self._said:
            self._said = reason
            level = logging.INFO if reason in ("", *BEGINNING) else logging.WARNING
            log.log(level, "%s: %s: %s", self.fleet, self.role, reason or "current")

    def _carry(self, effects: list[Any]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Hashed:
                try:
                    _, unsound = self._index._ingest_hashed(effect.data)
                except EventDecodeError as error:
                    assert isinstance(self._machine, Replica)
                    return self._carry(self._machine.unfit(f"an entry is damaged: {error}"))
                if unsound:
                    # As for the collector: the index has seen that it lacks something.
                    log.warning("%s: %d payloads that the collector got were no batches", self.fleet, unsound)
                continue
            match effect:
                case Trust(until):
                    self._trust(until)
                case Load():
                    self._load(effect)
                case Collect():
                    self._collect()
                case StepDown(reason):
                    self._step_down(reason)
                case Snapshot():
                    self._snapshot()
                case _:
                    self._apply(effect)

    def _trust(self, until: float) -> None:
        self._until = until
        self._index.trust(until)

    def _apply(self, item: Any) -> None:
        index = self._index
        match item:
            case Marked(pod, rank, state, reason):
                old = index.pod_state(pod) if pod in index.pods() else "stale"
                index.mark_worker(pod, rank, state)
                if old != state:
                    _call(self._on_change, StateChange(pod, rank, old, state, reason))
            case Forgotten(pod, rank):
                index.clear_worker(pod, rank)
            case Configured(pod, options):
                index.configure_pod(pod, **options)
            case Removed(pod):
                with suppress(UnknownPodError):
                    index.remove_pod(pod)
                _call(self._on_pods, PodsChange((), (pod,)))
            case Described():
                _call(self._on_pods, PodsChange((_source(item),), ()))

    def _load(self, load: Load) -> None:
        index = self._index
        self._trust(0.0)
        before = set(index.pods())
        try:
            if load.data is None:
                for pod in before:
                    index.remove_pod(pod)
            else:
                index._restore(load.data, "it")
            for pod, rank, state in load.states:
                index.mark_worker(pod, rank, state)  # type: ignore[arg-type]
        except (KVIndexError, MemoryError) as error:
            self._machine.loaded(f"the snapshot cannot be loaded: {error}")
            return
        if load.data is not None:
            self._snapshot_at, self._snapshot_bytes = time.monotonic(), len(load.data)
        self._machine.loaded(None)
        added = tuple(_source(described) for described in self._known.pods.values())
        removed = tuple(sorted(before - set(index.pods())))
        if added or removed:
            _call(self._on_pods, PodsChange(added, removed))

    # --------------------------------------------------------------------------------------------------- as a collector

    def _collect(self) -> None:
        with self._lock:
            manager = _Manager(self._index, **self._manager_options)
            manager.tap(self._shown)
            manager.on_change(partial(_call, self._on_change))
            manager.on_pods(self._described)
            manager.start()
            self._manager = manager
            self._beaten_at, self._is_late = time.monotonic(), False
            self._trust(self._beaten_at + self.policy.silence)
            self._beats_end = threading.Event()
            threading.Thread(
                target=self._post_beats, args=(manager, self._beats_end), name="kvindex-replication-beats", daemon=True
            ).start()
            for source in self._sources.values():
                try:
                    manager.add_pod(source)
                except KVIndexError as error:
                    log.error("%s: pod %s cannot be followed: %s", self.fleet, source.name, error)
        log.info("%s: this process follows %d pods", self.fleet, len(self._sources))

    def _shown(self, item: Any) -> None:
        machine = self._machine
        if type(item) is Batch:
            if machine.role == "direct":
                return
            seq = item.seq if item.joined else None
            index = self._index
            item = Hashed(
                hash_batch(item.pod, item.rank, item.model, seq, item.payload, index.block_size, index.hash_seed)
            )
        machine.known.take(item)
        machine.shown(item)
        if self._is_idle:
            self._awake.set()

    def _described(self, change: PodsChange) -> None:
        for source in change.added:
            self._shown(Described(source.name, source.model, source.address, dict(source.labels), source.engine))
        _call(self._on_pods, change)

    def _post_beats(self, manager: EventManager, end: threading.Event) -> None:
        """Posts beats to the thread of the manager, behind all changes up to then. In a thread of its own, since the
        view's waits for the server."""
        with suppress(StreamError):
            beaten = manager.post(partial(self._beat, manager))
            while not end.wait(self.policy.beat):
                # Never two at once, which would seem to have messages between them.
                if beaten.done():
                    beaten = manager.post(partial(self._beat, manager))

    def _beat(self, manager: EventManager) -> None:
        if self._manager is not manager:
            return
        now = time.monotonic()
        is_late, was_late = now >= self._beaten_at + 2 * self.policy.beat, self._is_late
        self._beaten_at, self._is_late = now, is_late
        # The loop carries out what was posted before it reads its sockets: the beat after a late one may still be ahead
        # of what has come during the pause.
        if not (is_late or was_late):
            self._trust(now + self.policy.silence)
            self._machine.beat(now)
        self._wake()

    def _snapshot(self) -> None:
        manager = self._manager
        if manager is None:
            return

        def make() -> None:
            cut = Cut()
            contents = None
            try:
                contents = self._known.contents(self._index.dumps())
                self._snapshot_at, self._snapshot_bytes = time.monotonic(), len(contents.data)
                self._machine.shown(cut)
            except KVIndexError as error:
                log.error("%s: no snapshot: %s", self.fleet, error)
            self._inbox.append(
                lambda now: self._machine.snapshot_made(cut, None if contents is None else pack(contents), now)
            )
            self._wake()

        with suppress(StreamError):
            manager.post(make)

    def _step_down(self, reason: str) -> None:
        with self._lock:
            manager, self._manager = self._manager, None
            if manager is None:
                return
            self._beats_end.set()
            manager.close()
            self._trust(0.0)  # its last beat may have been under way
        log.warning("%s: this process follows the engines no longer: %s", self.fleet, reason)


_LEASES = (Claim, Renew)


class _Manager(EventManager):
    _replaces = True


_WITH_SNAPSHOTS = (Follower, Collector, Exchange)


def _worker_status(
    pod: str, rank: int, model: str, reason: str, connected: bool, stats: WorkerStats
) -> WorkerStatus:  # fmt: skip
    return WorkerStatus(
        pod=pod, rank=rank, model=model, endpoint=None, replay_endpoint=None, state=stats["state"], reason=reason,
        connected=connected, last_seq=stats["last_seq"], last_ts=None, lag=None, replaying=False, waiting=0, batches=0,
        gaps=0, lost_batches=0, replays=0, replays_healed=0, replays_failed=0, restarts=0, reconnects=0, duplicates=0,
        throttled=0, errors={}, events={}, blocks=stats["blocks"], parked=stats["parked"], counters={},
    )  # fmt: skip


def _source(described: Described) -> PodSource:
    return PodSource(
        described.pod, model=described.model, address=described.address, labels=dict(described.labels),
        engine=described.engine,  # type: ignore[arg-type]
    )  # fmt: skip


def _enter(table: list[T], item: T) -> Callable[[], None]:
    table.append(item)

    def end() -> None:
        with suppress(ValueError):
            table.remove(item)

    return end


def _call(table: list[Callable[[T], None]], item: T) -> None:
    for callback in list(table):
        try:
            callback(item)
        except Exception:
            log.exception("a callback has failed")

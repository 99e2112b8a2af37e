"""One shard: one process's part in one log. Everything with a thread, a socket or a clock is here."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .._core import hash_batch
from ..answers import WorkerStats
from ..errors import EventDecodeError, KVIndexError, StreamError, UnknownPodError
from ..index import PrefixIndex
from ..sync.manager import EventManager
from ..sync.pulse import is_read
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
from .snapshots import pack
from .status import ReplicationStatus
from .store import Store

if TYPE_CHECKING:
    import redis

__all__ = ["Shard", "shard_of"]

log = logging.getLogger("kvindex.replication")

T = TypeVar("T")


@lru_cache(maxsize=4096)
def shard_of(pod: str, shards: int) -> int:
    """Return the number of a pod's shard, which is the one with the highest hash of both (rendezvous hashing). Another
    number of shards moves only the pods that have to move. Equal in all processes; a part of the log's format."""
    name = pod.encode(errors="surrogatepass")
    return max(range(shards), key=lambda shard: blake2b(name, digest_size=8, key=b"%d" % shard).digest())


class Shard:
    """One log in one process: its thread, its state machine, the pods that belong to it, and an index of its own.

    ``turn`` is shared by the shards of a process. ``on_change`` and ``on_pods`` are tables of callbacks.
    """

    def __init__(
        self, server: str | redis.Redis, fleet: str, number: int, policy: ReplicationPolicy, index: PrefixIndex,
        machine: Replica | Exchange, manager_options: dict[str, Any], turn: threading.Lock,
        on_change: list[Callable[[StateChange], None]], on_pods: list[Callable[[PodsChange], None]],
    ) -> None:  # fmt: skip
        self.fleet = fleet
        self.policy = policy
        self.index = index
        self.index.trust(0.0)
        self.index._owner = f"the ReplicatedIndex of fleet {fleet!r}"
        self.machine = machine
        self.store: Store[Request] = Store(server, fleet, number, policy)
        self.manager: EventManager | None = None
        self.mates: list[Shard] = []
        """The other shards of this process."""
        self._name = f"{fleet}, shard {number}" if "shards" in machine.settings else fleet
        self._manager_options = manager_options
        self._turn = turn
        self._sources: dict[str, PodSource] = {}
        self._lock = threading.RLock()  # of the sources, and of the start and end of the manager
        self._on_change = on_change
        self._on_pods = on_pods
        self._inbox: deque[Callable[[float], None]] = deque()
        self._awake = threading.Event()
        self._is_idle = False
        self.closing = False
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
        self._beaten_at = self._late_at = 0.0
        self._is_late = False
        self._leased_at = 0.0
        self._snapshot_at: float | None = None
        self._snapshot_bytes = 0
        self.thread = threading.Thread(target=self._run, name="kvindex-replication", daemon=True)

    @property
    def role(self) -> Literal["collector", "follower", "direct"]:
        return self.machine.role  # type: ignore[return-value]

    def close(self) -> None:
        """Ask the thread to end, and do not wait for it."""
        self.closing = True
        self._awake.set()

    def add_pod(self, source: PodSource) -> None:
        with self._lock:
            if source.name in self._sources:
                raise StreamError(f"pod {source.name!r} has been added already; remove it first")
            self._sources[source.name] = source
            if self.manager is not None:
                try:
                    self.manager.add_pod(source)
                except BaseException:
                    del self._sources[source.name]
                    raise

    def remove_pod(self, name: str) -> None:
        with self._lock:
            if self._sources.pop(name, None) is None:
                raise UnknownPodError(f"no pod {name!r} has been added here")
            if self.manager is not None:
                with suppress(UnknownPodError):
                    self.manager.remove_pod(name)

    def describe_pod(self, source: PodSource) -> None:
        with self._lock:
            if source.name not in self._sources:
                raise UnknownPodError(f"no pod {source.name!r} has been added here")
            if self.manager is not None:
                self.manager.describe_pod(source)
            self._sources[source.name] = source

    def pods(self) -> dict[str, PodSource]:
        if self.manager is not None:
            return self.manager.pods()
        table = dict(self._sources)
        for name, described in list(self._known.pods.items()):
            table.setdefault(name, _source(described))
        return table

    def status(self) -> ReplicationStatus:
        machine = self.machine
        replica = machine if isinstance(machine, Replica) else None
        follower = None if replica is None else replica.follower
        collector = None if replica is None else replica.collector
        now = time.monotonic()
        return ReplicationStatus(
            role=self.role,
            reason=self._reason if self.thread.is_alive() else "closed" if self.closing else "not started",
            hindrance=machine.hindrance or self._missing(),
            server=self.store.name,
            fleet=self.fleet,
            place=machine.place,
            trusted=self._is_trusted,
            age=self._age(now),
            began=None if machine.place in ("", id_text(ZERO)) else epoch_time(parse_id(machine.place)[0]),
            lease_age=None if collector is None else now - self._leased_at,
            snapshot_age=None if self._snapshot_at is None else now - self._snapshot_at,
            snapshot_bytes=self._snapshot_bytes,
            read_bytes=self.store.read_bytes,
            written_bytes=self.store.written_bytes,
            refused=self.store.refused,
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
        )  # fmt: skip

    def pod_status(self) -> dict[str, PodStatus]:
        manager = self.manager
        if manager is not None:
            return manager.status()
        status = self.status()
        sources, reasons = self.pods(), dict(self._known.reasons)
        table: dict[str, PodStatus] = {}
        for name in sorted({*sources, *self.index.pods()}):
            model = sources[name].model if name in sources else ""
            workers = {}
            with suppress(UnknownPodError):
                for rank, stats in self.index.worker_stats(name).items():
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
        # A state machine notices an entry that arrives, but not one that does not.
        if self.manager is not None:
            return self.machine.reason or ("" if self._is_trusted else self._late)
        return self.machine.reason or ("" if self._is_trusted else self._silent)

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
        return self.machine.known

    # ------------------------------------------------------------------------------------------------------ its thread

    def _run(self) -> None:
        while True:
            try:
                self._loop()
                break
            except Exception:
                log.exception("%s: the thread has failed, and begins anew", self._name)
                with suppress(Exception):
                    self._step_down("its thread failed")
                self._trust(0.0)
                self.store.drop()
                machine = self.machine
                if isinstance(machine, Replica):
                    self.machine = Replica(self.policy, machine.settings, machine.writer, candidate=machine.candidate)
                self._awake.wait(1.0)
        with suppress(Exception):
            self._step_down("closed")
            self._trust(0.0)
            self.store.close()

    def _loop(self) -> None:
        clock = time.monotonic
        while True:
            if self.closing:
                self.machine.closing = True
            now = clock()
            while self._inbox:
                self._inbox.popleft()(now)
            with self._turn:
                machine = self.machine
                if self.mates and isinstance(machine, Replica):
                    machine.defer_to(mate.machine for mate in self.mates if isinstance(mate.machine, Replica))
                request = machine.next(now, time.time())
            if type(request) is Wait:
                if self.closing:
                    return
                self._carry(self.machine.due(now))
                self._sleep(request.until - clock())
            else:
                answer = self.store.do(request)
                if answer is True and type(request) in _LEASES:
                    self._leased_at = now
                self._carry(self.machine.answered(request, answer, now, clock()))
            self._say(now)

    def _sleep(self, seconds: float) -> None:
        if seconds <= self.policy.busy_linger:
            # Changes gather, so they do not have to wake this thread one by one.
            if seconds > 0:
                time.sleep(seconds)
            return
        self._awake.clear()
        self._is_idle = True
        collector = self.machine.collector if isinstance(self.machine, Replica) else None
        if not (self._inbox or self.closing or (collector is not None and collector.shown)):
            self._awake.wait(min(seconds, 60.0))
        self._is_idle = False

    def _wake(self) -> None:
        if self._is_idle:
            self._awake.set()

    def _say(self, now: float) -> None:
        if now >= self._look_at:
            # This takes O(pods), and this method is called for each entry.
            self._look_at = now + self.policy.silence
            self._lacks = self._missing()
        reason = self.machine.hindrance or self._lacks or self._reason
        if reason != self._said:
            self._said = reason
            level = logging.INFO if reason in ("", *BEGINNING) else logging.WARNING
            log.log(level, "%s: %s: %s", self._name, self.role, reason or "current")

    def _carry(self, effects: list[Any]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Hashed:
                try:
                    _, unsound = self.index._ingest_hashed(effect.data)
                except EventDecodeError as error:
                    assert isinstance(self.machine, Replica)
                    return self._carry(self.machine.unfit(f"an entry is damaged: {error}"))
                if unsound:
                    # As in the collector, the index has noticed that it lacks something.
                    log.warning("%s: %d payloads that the collector got were no batches", self._name, unsound)
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
        self.index.trust(until)

    def _apply(self, item: Any) -> None:
        index = self.index
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
        index = self.index
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
            self.machine.loaded(f"the snapshot cannot be loaded: {error}")
            return
        if load.data is not None:
            self._snapshot_at, self._snapshot_bytes = time.monotonic(), len(load.data)
        self.machine.loaded(None)
        added = tuple(_source(described) for described in self._known.pods.values())
        removed = tuple(sorted(before - set(index.pods())))
        if added or removed:
            _call(self._on_pods, PodsChange(added, removed))

    # --------------------------------------------------------------------------------------------------- as a collector

    def _collect(self) -> None:
        with self._lock:
            manager = _Manager(self.index, **self._manager_options)
            manager.tap(self._shown)
            manager.on_change(partial(_call, self._on_change))
            manager.on_pods(self._described)
            manager.start()
            self.manager = manager
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
                    log.error("%s: pod %s cannot be followed: %s", self._name, source.name, error)
        log.info("%s: this process follows %d pods", self._name, len(self._sources))

    def _shown(self, item: Any) -> None:
        machine = self.machine
        if type(item) is Batch:
            if machine.role == "direct":
                return
            seq = item.seq if item.joined else None
            index = self.index
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

    def _post_beats(self, manager: _Manager, end: threading.Event) -> None:
        """Posts beats to the thread of the manager, behind all changes up to then. It runs in a thread of its own,
        because the view's thread waits for the server."""
        with suppress(StreamError):
            beaten = manager.post(partial(self._beat, manager))
            while not end.wait(self.policy.beat):
                # Never two at once: they would look as if messages had been read between them.
                if beaten.done():
                    beaten = manager.post(partial(self._beat, manager))

    def _beat(self, manager: _Manager) -> None:
        if self.manager is not manager:
            return
        now = time.monotonic()
        if is_late := now >= self._beaten_at + 2 * self.policy.beat:
            self._late_at = now
        was_late = self._is_late
        is_late = is_late or (was_late and not is_read(now, self._late_at, manager.behind_at))
        self._beaten_at, self._is_late = now, is_late
        # The loop carries out posted calls before it reads its sockets. The beat after a late one may therefore still
        # be ahead of messages that arrived during the pause, and so is every other beat until the loop
        # has read all of these.
        if not (is_late or was_late):
            self._trust(now + self.policy.silence)
            self.machine.beat(now)
        self._wake()

    def _snapshot(self) -> None:
        manager = self.manager
        if manager is None:
            return

        def make() -> None:
            cut = Cut()
            contents = None
            try:
                contents = self._known.contents(self.index.dumps())
                self._snapshot_at, self._snapshot_bytes = time.monotonic(), len(contents.data)
                self.machine.shown(cut)
            except KVIndexError as error:
                log.error("%s: no snapshot: %s", self._name, error)
            self._inbox.append(
                lambda now: self.machine.snapshot_made(cut, None if contents is None else pack(contents), now)
            )
            self._wake()

        with suppress(StreamError):
            manager.post(make)

    def _step_down(self, reason: str) -> None:
        with self._lock:
            manager, self.manager = self.manager, None
            if manager is None:
                return
            self._beats_end.set()
            manager.close()
            self._trust(0.0)  # its last beat may have been on its way
        log.warning("%s: this process follows the engines no longer: %s", self._name, reason)


_LEASES = (Claim, Renew)


class _Manager(EventManager):
    _replaces = True

    @property
    def behind_at(self) -> float:
        return self._loop.behind_at


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


def _call(table: list[Callable[[T], None]], item: T) -> None:
    for callback in list(table):
        try:
            callback(item)
        except Exception:
            log.exception("a callback has failed")

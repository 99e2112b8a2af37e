"""The thread that owns every socket: :class:`EventManager`."""

from __future__ import annotations

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol, Self, TypeVar

import zmq

from ..errors import EventDecodeError, InvalidTypeError, InvalidValueError, StreamError, UnknownPodError
from .frames import END, FrameFault, batch_rank, parse_live, parse_replay, parse_topic
from .sockets import Bound, Replay, SocketOptions, Subscription, resolve
from .source import Endpoints, PodSource, Presence, bind_endpoint
from .status import WORST_FIRST, Batch, Forgotten, PodStatus, StateChange, WorkerStatus, pod_status
from .stream import (
    Action,
    CancelReplay,
    Clear,
    Incident,
    Ingest,
    Mark,
    Policy,
    Reconnect,
    RequestReplay,
    Verdict,
    WorkerStream,
)

__all__ = ["EventManager", "Index"]

log = logging.getLogger("kvindex.sync")

T = TypeVar("T")

# What an operator has to look at; everything else is the stream looking after itself.
_SERIOUS: Final = frozenset(
    {"gap_accepted", "rejected", "replay_conflict", "replay_endless", "replay_failed", "unreachable", "bad_frames"}
)

# Engines have tens of ranks; a number beyond this in a payload is damage and must not create a worker.
_MOST_RANKS: Final = 1024


class Index(Protocol):
    """What a manager needs of a :class:`PrefixIndex`."""

    @property
    def block_size(self) -> int: ...

    def ingest(self, pod: str, payload: bytes, *, model: str = "", dp_rank: int | None = None) -> Any: ...

    def mark_worker(self, pod: str, dp_rank: int, verdict: Verdict) -> None: ...

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None: ...

    def configure_pod(
        self, pod: str, *, presence: Presence | None = None, clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None,
    ) -> None: ...  # fmt: skip

    def remove_pod(self, pod: str) -> None: ...

    def worker_stats(self, pod: str) -> dict[int, dict[str, Any]]: ...


class _Worker:
    """One (pod, rank): its stream, its sockets and its figures."""

    def __init__(self, source: PodSource, rank: int, at: Endpoints, policy: Policy | None) -> None:
        self.pod = source.name
        self.rank = rank
        self.at = at
        self.source = source
        self.model = source.model
        self.stream = WorkerStream(replay=at.replay_endpoint is not None, policy=policy)
        self.topic = None if source.topic is None else source.topic.encode()
        self.seen_topic: bytes | None = self.topic
        self.replay_topic: bytes | None = None
        self.subscription: Subscription | None = None
        self.opened_at: float | None = None
        self.reconnect_at: float | None = None
        self.replay: Replay | None = None
        self.attempt = 0  # connections are numbered, so that nothing of an old one is taken for the new one's
        self.question = 0  # and so are replays
        self.due: float | None = None
        self.gone = False
        self.connection: int | None = None  # of a bound endpoint
        # What is carried out: the stream itself is ahead of it while its actions are.
        self.verdict: Verdict = "stale"
        self.last_seq: int | None = None
        self.state = "stale"  # the worse of the verdict and the index's own
        self.lag: float | None = None
        self.stored = self.removed = 0
        self.events: Counter[str] = Counter()  # those that are not in every batch
        self.errors: Counter[str] = Counter()
        self.explained: set[str] = set()
        self.tokens = 10.0  # of the log's bucket
        self.tokens_at = 0.0
        self.unsaid = 0

    @property
    def who(self) -> str:
        return f"{self.pod}[{self.rank}]"


class _Pod:
    def __init__(self, source: PodSource, came_to: Bound | None = None) -> None:
        self.source = source
        self.came_to = came_to  # the bound endpoint at which it appeared by itself
        self.workers: dict[int, _Worker] = {}


def _enter(table: list[T], item: T) -> Callable[[], None]:
    """Put something into a list; gives what takes it out again, once."""
    table.append(item)

    def end() -> None:
        with suppress(ValueError):
            table.remove(item)

    return end


class EventManager:
    """Keeps an index equal to a fleet of engines, over ZMQ, through everything that happens to them.

    One thread owns all sockets of all pods. ``index`` is a :class:`PrefixIndex`; every answer it gives says how far
    each pod's stream can be trusted at that moment.

    ``policy`` has the times and bounds of a stream (:class:`Policy`). ``heartbeat`` is how often, in seconds, a silent
    peer is asked whether it lives; one that is silent for two and a half of them after that counts as lost (0: never
    asked).
    ``connect_timeout`` is for making a connection, in seconds. ``queue`` messages may wait at a socket: what a
    publisher sends beyond that it drops, which is a gap here. Messages beyond ``max_message`` bytes are refused. At
    most ``max_replays`` replays run at once. ``context`` is a ``zmq.Context`` to use instead of an own one.

    A context manager: ``close`` ends the thread and leaves no socket behind, and every pod it kept is ``stale`` from
    then on. All methods may be called from any thread, also from callbacks, and take effect before they return.
    """

    def __init__(
        self, index: Index, *, policy: Policy | None = None, heartbeat: float = 0.5, connect_timeout: float = 3.0,
        queue: int = 2000, max_message: int = 32 << 20, max_replays: int = 16, context: zmq.Context[Any] | None = None,
    ) -> None:  # fmt: skip
        self._index = index
        self._policy = policy
        self._options = SocketOptions(
            heartbeat=heartbeat, connect_timeout=connect_timeout, queue=queue, max_message=max_message
        )
        self._connect_patience = 2 * connect_timeout + 1.0
        self._max_replays = max_replays
        self._own_context = context is None
        self._context: zmq.Context[Any] | None = context
        self._pods: dict[str, _Pod] = {}
        self._bound: list[Bound] = []
        self._templates: dict[Bound, dict[str, Any]] = {}
        self._topics: dict[bytes, str] = {}
        # Names that were removed: what is still on its way must not bring them back. Bounded, oldest first.
        self._removed: OrderedDict[str, None] = OrderedDict()
        self._faults: Counter[str] = Counter()
        self._callbacks: list[Callable[[StateChange], None]] = []
        self._wakers: list[Callable[[], None]] = []
        self._taps: list[Callable[[Batch | Forgotten], None]] = []
        self._changed = threading.Condition()
        self._lock = threading.Lock()
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = self._stopped = False
        # Of the loop.
        self._hot: set[Any] = set()
        self._timers: list[tuple[float, int, _Worker]] = []
        self._order = itertools.count()
        self._replaying: set[_Worker] = set()
        self._replay_queue: OrderedDict[_Worker, int] = OrderedDict()
        self._looks: set[_Worker] = set()

    # ------------------------------------------------------------------------------------------- what people call

    def start(self) -> None:
        """Start the thread; everything that needs it does so by itself. Raises :class:`StreamError` after a close."""
        with self._lock:
            if self._stopping:
                raise StreamError("this EventManager is closed")
            if self._thread is not None:
                return
            if self._context is None:
                self._context = zmq.Context()
            self._selector = selectors.DefaultSelector()
            self._wake, self._woken = socket.socketpair()
            for end in (self._wake, self._woken):
                end.setblocking(False)
            self._selector.register(self._woken, selectors.EVENT_READ, None)
            self._thread = threading.Thread(target=self._run, name="kvindex-streams", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, close every socket, and mark what was followed ``stale``. Closing twice is fine."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is None:
            self._wake_all()
            return
        self._poke()
        if thread is not threading.current_thread():
            thread.join()

    def add_pod(self, source: PodSource) -> None:
        """Follow a pod. It is ``stale`` until its history is applied.

        What the index holds under that name is forgotten: only what this stream shows counts. Raises
        :class:`StreamError` when a pod of that name is followed already, or :class:`InvalidValueError` when its blocks
        can not be placed.
        """
        self._call(partial(self._add, source))

    def remove_pod(self, name: str) -> None:
        """Stop following a pod and forget all it held. When this returns, no event that is still on its way brings it
        back; :meth:`add_pod` does. Raises :class:`UnknownPodError`."""
        self._call(partial(self._remove, name))

    def bind(
        self, endpoint: str, *, presence: Presence | None = None, clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None, max_pods: int = 1024,
    ) -> str:  # fmt: skip
        """Let pods connect here instead of connecting to them; gives the endpoint, with the port where it was a
        wildcard.

        Topics are ``kv@POD@MODEL``. A pod appears with its first message, with these options, up to ``max_pods`` of
        them; one that :meth:`add_pod` was told of (a :class:`PodSource` without endpoint) has its own, and may have a
        replay endpoint. Raises :class:`StreamError` when it can not be bound.
        """
        options: dict[str, Any] = {
            "presence": presence,
            "clear_media": None if clear_media is None else frozenset(clear_media),
            "chunk_size": chunk_size,
        }
        PodSource("options", **options)
        return self._call(partial(self._bind, bind_endpoint(endpoint), options, max_pods))

    def status(self) -> dict[str, PodStatus]:
        """What every followed pod is like at this moment, by name. O(workers); does not wait for the thread."""
        table = {}
        for name, pod in list(self._pods.items()):
            try:
                figures = self._index.worker_stats(name)
            except KeyError:
                figures = {}
            workers = {
                rank: self._describe(worker, figures.get(rank, {})) for rank, worker in list(pod.workers.items())
            }
            table[name] = pod_status(name, pod.source.model, workers)
        return table

    def faults(self) -> dict[str, int]:
        """Messages at bound endpoints that no pod could be blamed for, by reason."""
        return dict(self._faults)

    def on_change(self, callback: Callable[[StateChange], None]) -> Callable[[], None]:
        """Call ``callback`` with a :class:`StateChange` whenever a worker's state changes; gives what ends that.

        It is called in the manager's thread and holds up every stream while it runs: hand over to a queue what takes
        time.
        """
        return _enter(self._callbacks, callback)

    def tap(self, callback: Callable[[Batch | Forgotten], None]) -> Callable[[], None]:
        """Call ``callback`` with every :class:`Batch` before it is handed to the index, and with a :class:`Forgotten`
        where a worker starts anew: what records or examines streams sees what the index sees. Gives what ends that.

        It is called in the manager's thread and holds up every stream while it runs.
        """
        return _enter(self._taps, callback)

    def on_progress(self, waker: Callable[[], None]) -> Callable[[], None]:
        """Call ``waker`` whenever :meth:`is_current` or :attr:`closed` may have become true; gives what ends that.

        It is called in the manager's thread, must not raise and must not take time.
        """
        return _enter(self._wakers, waker)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; every pod is or is about to be stale then."""
        return self._stopping

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """Whether none of these pods (all if None) is stale: connected, and everything up to now is applied or given
        up.

        Raises :class:`UnknownPodError` for a pod that is not followed.
        """
        table = self._pods
        names = list(table) if pods is None else [pods] if isinstance(pods, str) else list(pods)
        for name in names:
            pod = table.get(name)
            if pod is None:
                raise self._unknown(name)
            workers = list(pod.workers.values())
            if not workers or any(worker.verdict == "stale" for worker in workers):
                return False
        return True

    def wait_until_current(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> bool:
        """Wait until :meth:`is_current`, at most ``timeout`` seconds (None: as long as it takes). False when it was
        not.

        Not from a callback, which would wait for itself: :class:`StreamError`.
        """
        if threading.current_thread() is self._thread:
            raise StreamError("a callback of the manager's own thread can not wait for that thread")
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self.is_current(names):
                if self._stopping:
                    return False
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    # ---------------------------------------------------------------------------------------- commands, and the loop

    def _call(self, command: Callable[[], T]) -> T:
        """Do something in the manager's thread and give what came of it."""
        if threading.current_thread() is self._thread:
            return command()
        return self.post(command).result()

    def post(self, command: Callable[[], T]) -> Future[T]:
        """Do something in the manager's thread and do not wait for it: what :mod:`kvindex.aio` is made of.

        ``command`` may call every method here and holds up every stream while it runs. Cancelling the future keeps it
        from being run as long as it has not begun. Raises :class:`StreamError` after a close.
        """
        self.start()
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._stopped:
                raise StreamError("this EventManager is closed")
            self._commands.append(run)
        self._poke()
        return future

    def _wake_all(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for waker in list(self._wakers):
            waker()

    def _poke(self) -> None:
        # Full: it is awake already. Closed: there is nobody to wake.
        with suppress(OSError):
            self._wake.send(b"\0")

    def watch(self, fd: int, handler: Any) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)
        self._hot.add(handler)  # what came before the registration rings no bell

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            log.exception("the thread of kvindex's streams has failed; every pod is stale from here on")
        finally:
            self._end()

    def _turn(self) -> None:
        now = time.monotonic()
        wait = 0.0 if self._hot else max(0.0, self._timers[0][0] - now) if self._timers else None
        for key, _ in self._selector.select(wait):
            if key.data is None:
                try:
                    while self._woken.recv(4096):
                        pass
                except BlockingIOError:
                    pass
            else:
                self._hot.add(key.data)
        while self._commands:
            try:
                self._commands.popleft()()
            except Exception:
                # Of what people call they get to know; this is of the loop's own, and one pod's.
                log.exception("something of one stream has failed; its time will bring it again")
        now = time.monotonic()
        hot, self._hot = self._hot, set()
        for handler in hot:
            try:
                if not handler.closed and handler.ready(now):
                    self._hot.add(handler)
            except Exception as error:
                # One stream's trouble is not the others'.
                log.exception("a stream has failed")
                handler.failed(now, error)
        while self._timers and self._timers[0][0] <= now:
            due, _, worker = heapq.heappop(self._timers)
            if worker.due == due and not worker.gone:
                worker.due = None
                try:
                    self._time(worker, now)
                except Exception:
                    log.exception("%s: its time could not be kept; trying again", worker.who)
                    worker.reconnect_at = now + 1.0
                    self._schedule(worker)
        if self._looks:
            looks, self._looks = self._looks, set()
            for worker in looks:
                self._compare_state(worker)

    def _end(self) -> None:
        with self._lock:
            self._stopping = True
        for pod in list(self._pods.values()):
            for worker in list(pod.workers.values()):
                self._close_worker(worker)
                worker.verdict, worker.stream.reason = "stale", "the manager is closed"
                try:
                    self._index.mark_worker(worker.pod, worker.rank, "stale")
                except Exception:
                    log.exception("%s: can not be marked stale", worker.who)
                worker.state = "stale"
        for bound in self._bound:
            bound.close()
        with self._lock:
            self._stopped = True
            left, self._commands = self._commands, deque()
        for command in left:
            command()
        if self._own_context and self._context is not None:
            self._context.destroy(linger=0)
        self._selector.close()
        self._wake.close()
        self._woken.close()
        self._wake_all()

    # --------------------------------------------------------------------------------------------------- pods

    def _alive(self) -> None:
        if self._stopping:
            raise StreamError("this EventManager is closed")

    def _add(self, source: PodSource) -> None:
        self._alive()
        if not isinstance(source, PodSource):
            raise InvalidTypeError(f"a pod is added by a PodSource, not by {type(source).__name__}")
        present = self._pods.get(source.name)
        if present is not None and present.came_to is None:
            raise StreamError(f"pod {source.name!r} is followed already; remove it first to follow it anew")
        size, own = source.block_size, self._index.block_size
        if size is not None and size % own:
            raise InvalidValueError(
                f"pod {source.name!r} has blocks of {size} tokens, which an index of {own}-token blocks can not hold:"
                f" start the engine with a multiple of {own}, or the index with block_size={size}"
            )
        bound = all(pair.endpoint is None for pair in source.workers().values())
        if bound and not self._bound:
            raise InvalidValueError(
                f"pod {source.name!r} has no endpoint, and nothing is bound that it could connect to"
            )
        topic = (source.topic or f"kv@{source.name}@{source.model}").encode()
        if bound and self._topics.get(topic, source.name) != source.name:
            raise StreamError(f"topic {topic.decode()!r} is pod {self._topics[topic]!r}'s already")
        if present is not None:
            self._remove(source.name)  # it came by itself, before anybody could say what it is
        pod = _Pod(source)
        self._enlist(pod)
        if bound:
            self._topics[topic] = source.name
        self._removed.pop(source.name, None)
        for rank, at in source.workers().items():
            self._employ(pod, rank, at)

    def _enlist(self, pod: _Pod) -> None:
        source = pod.source
        self._index.configure_pod(
            source.name, presence=source.presence, clear_media=source.clear_media, chunk_size=source.chunk_size
        )
        # A count that is already there would be counted twice, and what no stream vouches for is not known.
        for rank in self._index.worker_stats(source.name):
            self._index.clear_worker(source.name, rank)
        self._pods[source.name] = pod

    def _employ(self, pod: _Pod, rank: int, at: Endpoints) -> _Worker:
        worker = _Worker(pod.source, rank, at, self._policy)
        now = time.monotonic()
        pod.workers[rank] = worker
        self._carry(worker, worker.stream.tick(now), now)
        if at.endpoint is not None:
            worker.reconnect_at = now
            self._schedule(worker)
        return worker

    def _remove(self, name: str) -> None:
        self._alive()
        pod = self._pods.pop(name, None) if isinstance(name, str) else None
        if pod is None:
            raise self._unknown(name)
        for worker in pod.workers.values():
            self._close_worker(worker)
        for topic in [topic for topic, owner in self._topics.items() if owner == name]:
            del self._topics[topic]
        self._removed[name] = None
        while len(self._removed) > 65536:
            self._removed.popitem(last=False)
        with suppress(UnknownPodError):  # somebody was faster; it is gone, which is what was asked for
            self._index.remove_pod(name)
        log.info("%s: removed", name)
        self._wake_all()

    def _unknown(self, name: object) -> UnknownPodError:
        return UnknownPodError(
            f"no pod {name!r} is followed; followed are {', '.join(sorted(self._pods)) or 'none yet'}"
        )

    def _close_worker(self, worker: _Worker) -> None:
        worker.gone = True
        worker.due = None
        self._end_replay(worker)
        self._looks.discard(worker)
        if worker.subscription is not None:
            worker.subscription.close()
            worker.subscription = None

    # ---------------------------------------------------------------------------------------------- connections

    def _connect(self, worker: _Worker, now: float) -> None:
        if worker.subscription is not None:
            worker.subscription.close()
            worker.subscription = None
        worker.opened_at = now
        worker.attempt += 1
        attempt = worker.attempt
        assert worker.at.endpoint is not None

        def found(endpoint: str | None, error: str) -> None:
            if threading.current_thread() is self._thread:
                self._subscribe(worker, attempt, endpoint, error)
            elif not self._stopping:
                self._commands.append(partial(self._subscribe, worker, attempt, endpoint, error))
                self._poke()

        resolve(worker.at.endpoint, found)

    def _subscribe(self, worker: _Worker, attempt: int, endpoint: str | None, error: str) -> None:
        if worker.gone or worker.attempt != attempt or worker.opened_at is None:
            return
        now = time.monotonic()
        if endpoint is None:
            self._lost(worker, attempt, now, error)
            return
        assert self._context is not None
        worker.seen_topic = worker.topic
        try:
            worker.subscription = Subscription(
                self, self._context, self._options, endpoint, worker.topic or b"",
                made=partial(self._made, worker, attempt),
                lost=partial(self._lost, worker, attempt),
                message=partial(self._live, worker),
            )  # fmt: skip
        except zmq.ZMQError as failure:
            self._lost(worker, attempt, now, f"{endpoint}: {failure}")
            return
        if worker.subscription.immediate:
            self._made(worker, attempt, now)

    def _made(self, worker: _Worker, attempt: int, now: float) -> None:
        if worker.gone or worker.attempt != attempt:
            return
        worker.opened_at = None
        self._carry(worker, worker.stream.connected(now), now)
        self._schedule(worker)

    def _lost(self, worker: _Worker, attempt: int, now: float, why: str) -> None:
        if worker.gone or worker.attempt != attempt:
            return
        worker.opened_at = None
        worker.attempt += 1  # a connection is lost once
        self._carry(worker, worker.stream.disconnected(now, f"{worker.at.endpoint}: {why}"), now)
        self._schedule(worker)

    def _time(self, worker: _Worker, now: float) -> None:
        if worker.reconnect_at is not None and now >= worker.reconnect_at:
            worker.reconnect_at = None
            self._connect(worker, now)
        if worker.opened_at is not None and now >= worker.opened_at + self._connect_patience:
            self._lost(worker, worker.attempt, now, "no connection came about")
        self._carry(worker, worker.stream.tick(now), now)
        self._schedule(worker)

    def _schedule(self, worker: _Worker) -> None:
        if worker.gone:
            return
        patience = None if worker.opened_at is None else worker.opened_at + self._connect_patience
        due = min(
            (at for at in (worker.stream.deadline(), worker.reconnect_at, patience) if at is not None), default=None
        )
        if due is not None and due != worker.due:
            worker.due = due
            heapq.heappush(self._timers, (due, next(self._order), worker))
        elif due is None:
            worker.due = None

    # -------------------------------------------------------------------------------------------------- messages

    def _live(self, worker: _Worker, frames: list[bytes], now: float) -> None:
        if worker.gone:
            return
        try:
            topic, seq, payload = parse_live(frames)
        except FrameFault as fault:
            self._fault(worker, fault, now)
            return
        if topic != worker.seen_topic:
            if worker.seen_topic is not None:
                # ZMQ compares prefixes: kv@10.0.0.1 also gets what kv@10.0.0.10 publishes.
                self._foreign(worker, topic, worker.seen_topic, now)
                return
            worker.seen_topic = topic
        self._hear(worker, seq, payload, now)

    def _hear(self, worker: _Worker, seq: int, payload: bytes, now: float) -> None:
        """Hand a published batch to its stream."""
        actions: list[Action] = []
        plain = worker.stream.follows(seq, payload, now)
        if plain is None:
            actions = worker.stream.live(seq, payload, now)
        else:
            self._ingest(worker, plain, actions, now)
            worker.last_seq = seq
            if not actions:
                return
        self._carry(worker, actions, now)
        self._schedule(worker)

    def _foreign(self, worker: _Worker, topic: bytes, expected: bytes, now: float) -> None:
        worker.errors["foreign_topic"] += 1
        if worker.errors["foreign_topic"] == 1:
            self._say(worker, "foreign_topic", f"ignoring topic {topic!r:.80}, this stream is {expected!r:.80}", now)

    def _fault(self, worker: _Worker, fault: FrameFault, now: float) -> None:
        worker.errors[fault.reason] += 1
        self._say(worker, "bad_frames", str(fault), now)
        self._carry(worker, worker.stream.suspect(now), now)
        self._schedule(worker)

    def _reply(self, worker: _Worker, question: int, frames: list[bytes], now: float) -> None:
        if worker.gone or worker.replay is None or question != worker.question:
            return
        try:
            reply = parse_replay(frames)
        except FrameFault as fault:
            worker.errors[f"replay_{fault.reason}"] += 1
            self._say(worker, "bad_frames", f"in a replay: {fault}", now)
            return
        if reply is END:
            self._carry(worker, worker.stream.replay_ended(now), now)
        elif reply.topic is not None and worker.seen_topic is not None and reply.topic != worker.seen_topic:
            self._foreign(worker, reply.topic, worker.seen_topic, now)
            return
        else:
            worker.replay_topic = reply.topic
            self._carry(worker, worker.stream.replayed(reply.seq, reply.payload, now), now)
        self._schedule(worker)

    # --------------------------------------------------------------------------------------------------- actions

    def _carry(self, worker: _Worker, actions: list[Action], now: float) -> None:
        """Carry out what a stream decided; what comes of it is appended and carried out after it."""
        for action in actions:
            kind = type(action)
            if kind is Ingest:
                self._ingest(worker, action, actions, now)  # type: ignore[arg-type]
                continue
            match action:
                case RequestReplay(start):
                    self._end_replay(worker)
                    self._ask(worker, start, now)
                case CancelReplay():
                    self._end_replay(worker)
                case Clear():
                    if self._taps:
                        self._show(Forgotten(worker.pod, worker.rank))
                    self._index.clear_worker(worker.pod, worker.rank)
                    worker.explained.clear()
                case Mark(verdict):
                    self._index.mark_worker(worker.pod, worker.rank, verdict)
                    worker.verdict, worker.last_seq = verdict, worker.stream.last_seq
                    self._compare_state(worker)
                case Reconnect(delay):
                    if worker.at.endpoint is not None:
                        worker.reconnect_at = now + delay
                case Incident(what, detail):
                    self._say(worker, what, detail, now)
        worker.last_seq = worker.stream.last_seq

    def _show(self, item: Batch | Forgotten) -> None:
        for tap in list(self._taps):
            try:
                tap(item)
            except Exception:
                log.exception("a callback for batches has failed")

    def _ingest(self, worker: _Worker, action: Ingest, actions: list[Action], now: float) -> None:
        if self._taps:
            topic = worker.replay_topic if worker.seen_topic is None else worker.seen_topic
            self._show(Batch(worker.pod, worker.rank, worker.model, topic, action.seq, action.payload))
        try:
            report = self._index.ingest(worker.pod, action.payload, model=worker.model, dp_rank=worker.rank)
        except EventDecodeError as error:
            worker.errors["undecodable"] += 1
            actions += worker.stream.rejected(action.seq, action.payload, now, str(error))
            return
        except Exception as error:
            # Whatever it is, the batch is not applied; the stream goes on and the worker is not exact any more.
            worker.errors["refused"] += 1
            actions += worker.stream.rejected(action.seq, action.payload, now, f"the index refuses it: {error!r}")
            return
        worker.stored += report.stored
        worker.removed += report.removed
        if action.ts is not None:
            worker.lag = time.time() - action.ts
        if report.cleared:
            worker.events["cleared"] += report.cleared
            if worker.source.clear_media is None:
                actions += worker.stream.cleared(action.seq, now)
        if report.parked or report.skipped:
            worker.events["parked"] += report.parked
            worker.events["skipped"] += report.skipped
            self._skipped(worker, report, action.payload, now)

    def _skipped(self, worker: _Worker, report: Any, payload: bytes, now: float) -> None:
        self._looks.add(worker)
        for reason, count in report.reasons.items():
            worker.errors[reason] += count
            if reason not in worker.explained and reason != "unknown_hash":
                # Once for each reason until the worker starts anew: the counters have the rest.
                worker.explained.add(reason)
                self._say(worker, reason, self._explain(reason, payload), now)

    def _explain(self, reason: str, payload: bytes) -> str:
        if reason != "block_size_mismatch":
            return "an event could not be applied"
        from ..events import decode_batch

        sizes = {getattr(event, "block_size", None) for event in decode_batch(payload).events}
        named = ", ".join(str(size) for size in sorted(size for size in sizes if size))
        return f"its blocks have {named} tokens, the index counts in {self._index.block_size}"

    def _ask(self, worker: _Worker, start: int, now: float) -> None:
        if worker.at.replay_endpoint is None:
            return
        if len(self._replaying) >= self._max_replays:
            self._replay_queue[worker] = start
            return
        self._replaying.add(worker)
        worker.question += 1
        question = worker.question

        def found(endpoint: str | None, error: str) -> None:
            if threading.current_thread() is self._thread:
                self._send(worker, question, start, endpoint, error)
            elif not self._stopping:
                self._commands.append(partial(self._send, worker, question, start, endpoint, error))
                self._poke()

        resolve(worker.at.replay_endpoint, found)

    def _send(self, worker: _Worker, question: int, start: int, endpoint: str | None, error: str) -> None:
        if worker.gone or worker not in self._replaying or worker.replay is not None or question != worker.question:
            return
        now = time.monotonic()
        assert self._context is not None
        if endpoint is not None:
            try:
                worker.replay = Replay(
                    self, self._context, self._options, endpoint, start, message=partial(self._reply, worker, question)
                )
            except zmq.ZMQError as failure:
                error = str(failure)
        if worker.replay is None:
            self._say(worker, "replay_unreachable", error, now)
        # Where it can not be asked the question runs into its timeout like one that nobody answers.
        worker.stream.replay_sent(now)
        self._schedule(worker)

    def _end_replay(self, worker: _Worker) -> None:
        self._replay_queue.pop(worker, None)
        if worker.replay is not None:
            worker.replay.close()
            worker.replay = None
        if worker in self._replaying:
            self._replaying.discard(worker)
            if self._replay_queue and not self._stopping:
                following, start = self._replay_queue.popitem(last=False)
                self._ask(following, start, time.monotonic())

    # -------------------------------------------------------------------------------------------- bound endpoints

    def _bind(self, endpoint: str, options: dict[str, Any], max_pods: int) -> str:
        self._alive()
        assert self._context is not None
        try:
            bound = Bound(
                self, self._context, self._options, endpoint,
                lost=lambda connection, now: self._bound_lost(bound, connection, now),
                message=lambda frames, connection, now: self._bound_message(bound, frames, connection, now),
            )  # fmt: skip
        except zmq.ZMQError as error:
            raise StreamError(f"{endpoint} can not be bound: {error}") from error
        self._bound.append(bound)
        self._templates[bound] = {"options": options, "max_pods": max_pods, "by_connection": {}}
        return bound.endpoint

    def _bound_lost(self, bound: Bound, connection: int, now: float) -> None:
        for worker in self._templates[bound]["by_connection"].pop(connection, ()):
            if worker.connection == connection and not worker.gone:
                self._carry(worker, worker.stream.disconnected(now, "the pod's connection was lost"), now)
                self._schedule(worker)

    def _bound_message(self, bound: Bound, frames: list[bytes], connection: int | None, now: float) -> None:
        try:
            topic, seq, payload = parse_live(frames)
        except FrameFault as fault:
            self._bound_fault(fault.reason, str(fault))
            return
        worker = self._bound_worker(bound, topic, payload)
        if worker is None:
            return
        if connection is None:
            if worker.connection is None or worker.stream.is_connected:
                # Of a connection that is gone, while the worker has another one, or never had one that we saw.
                self._faults["late_frames"] += 1
                return
        elif worker.connection is None or connection > worker.connection:
            if worker.stream.is_connected:
                self._carry(worker, worker.stream.disconnected(now, "another connection brings its stream"), now)
            worker.connection = connection
            self._templates[bound]["by_connection"].setdefault(connection, set()).add(worker)
            self._carry(worker, worker.stream.connected(now), now)
        elif connection < worker.connection:
            worker.errors["late_frames"] += 1
            return
        self._hear(worker, seq, payload, now)

    def _bound_fault(self, reason: str, detail: str) -> None:
        self._faults[reason] += 1
        if self._faults[reason] == 1:
            log.warning("bound endpoint: %s (further ones are only counted)", detail)

    def _bound_worker(self, bound: Bound, topic: bytes, payload: bytes) -> _Worker | None:
        template = self._templates[bound]
        name = self._topics.get(topic)
        if name is None:
            parts = parse_topic(topic)
            if parts is None:
                self._bound_fault("bad_topic", f"topic {topic!r:.80} is not kv@POD@MODEL")
                return None
            name, model = parts
            if name in self._removed:
                self._faults["removed_pod"] += 1
                return None
            if name in self._pods:
                known = self._pods[name].source
                detail = (
                    f"topic {topic!r:.80} says it is pod {name!r}, which is followed as {known.topic or known.model!r}"
                )
                self._bound_fault("foreign_topic", detail)
                return None
            if sum(pod.came_to is bound for pod in self._pods.values()) >= template["max_pods"]:
                self._bound_fault("too_many_pods", f"pod {name!r:.80} would be one more than {template['max_pods']}")
                return None
            self._topics[topic] = name
            source = PodSource(name, model=model, topic=topic.decode(), **template["options"])
            self._enlist(_Pod(source, bound))
            log.info("%s: connected to %s", name, bound.endpoint)
        pod = self._pods[name]
        rank = batch_rank(payload)
        worker = pod.workers.get(rank)
        if worker is None:
            if rank >= _MOST_RANKS or (pod.source.ranks is not None and rank not in pod.source.ranks):
                self._bound_fault("bad_rank", f"pod {name!r} has no rank {rank}")
                return None
            worker = self._employ(pod, rank, Endpoints(None, None))
        return worker

    # --------------------------------------------------------------------------------------- what others get to know

    def _compare_state(self, worker: _Worker) -> None:
        """Tell about a worker's state when it has changed: the worse of the stream's verdict and the index's own."""
        if worker.gone:
            return
        state, reason = self._state(worker)
        if state == worker.state:
            return
        old, worker.state = worker.state, state
        log.info("%s: %s, was %s%s", worker.who, state, old, f" ({reason})" if reason else "")
        change = StateChange(worker.pod, worker.rank, old, state, reason)
        for callback in list(self._callbacks):
            try:
                callback(change)
            except Exception:
                log.exception("a callback for state changes has failed")
        self._wake_all()

    def _state(self, worker: _Worker, figures: dict[str, Any] | None = None) -> tuple[str, str]:
        if figures is None:
            try:
                figures = self._index.worker_stats(worker.pod).get(worker.rank, {})
            except KeyError:
                figures = {}
        own = figures.get("state", worker.verdict)
        if WORST_FIRST.index(own) < WORST_FIRST.index(worker.verdict):
            return own, "blocks could not be placed"
        return worker.verdict, worker.stream.reason

    def _describe(self, worker: _Worker, figures: dict[str, Any]) -> WorkerStatus:
        stream = worker.stream
        counts = stream.counts
        state, reason = self._state(worker, figures)
        return WorkerStatus(
            pod=worker.pod,
            rank=worker.rank,
            model=worker.model,
            endpoint=worker.at.endpoint,
            replay_endpoint=worker.at.replay_endpoint,
            state=state,
            reason=reason,
            connected=stream.is_connected,
            last_seq=worker.last_seq,
            last_ts=stream.last_ts,
            lag=worker.lag,
            replaying=stream.replaying,
            waiting=stream.waiting,
            batches=counts["batches"],
            gaps=counts["gaps"],
            lost_batches=counts["lost_batches"],
            replays=counts["replays_asked"],
            replays_healed=counts["gaps_healed"],
            replays_failed=counts["replays_failed"],
            restarts=counts["restarts"],
            reconnects=counts["reconnects"],
            duplicates=counts["duplicates"],
            errors=dict(worker.errors),
            events={"stored": worker.stored, "removed": worker.removed, **worker.events},
            blocks=figures.get("blocks", 0),
            parked=figures.get("parked", 0),
            counters=dict(counts),
        )

    def _say(self, worker: _Worker, kind: str, detail: str, now: float) -> None:
        """One line per incident; a pod that has many of them every second gets a few, and a number."""
        worker.tokens = min(10.0, worker.tokens + (now - worker.tokens_at) * 0.5)
        worker.tokens_at = now
        if worker.tokens < 1.0:
            worker.unsaid += 1
            return
        worker.tokens -= 1.0
        more, worker.unsaid = worker.unsaid, 0
        tail = f" ({more} incidents before it are only counted)" if more else ""
        log.log(logging.WARNING if kind in _SERIOUS else logging.INFO, "%s: %s: %s%s", worker.who, kind, detail, tail)

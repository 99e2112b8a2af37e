"""Carries out the decisions of one worker's :class:`WorkerStream`, between its sockets and the index."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import zmq

from ..answers import StreamPlace
from ..errors import EventDecodeError
from ..events import AllBlocksCleared, decode_batch, unknown_kinds
from .actions import (
    Action,
    AwaitReplay,
    CancelReplay,
    Clear,
    Incident,
    Ingest,
    Mark,
    Reconnect,
    Renew,
    RequestReplay,
    Verdict,
)
from .allowance import PAUSE, Allowance
from .frames import END, FrameFault, batch_events, parse_live, parse_replay, parse_topic, same_model
from .loop import StreamLoop
from .policy import StreamPolicy
from .pulse import SILENCE, Pulse
from .ranks import Ranks
from .reasons import Reason
from .resolver import Then
from .shared import Seat, Subscriptions
from .sockets import BUDGET, OUTDATED, Replay, SocketOptions, Subscription, Watched, explained
from .source import Endpoints, Engine, PodSource, Presence
from .status import WORST_FIRST, Batch, Forgotten, IndexChange, Marked, StateChange, WorkerStatus
from .stream import WorkerStream
from .turns import Turns

__all__ = ["Index", "Setting", "Worker"]

log = logging.getLogger("kvindex.sync")

# Incidents that need an operator, logged as warnings. The stream deals with all others by itself.
_SERIOUS: Final = frozenset(
    {
        "bad_frames", "distrusted", "gap_accepted", "option_contradicted", "rejected", "replay_conflict",
        "replay_endless", "replay_failed", "replay_useless", "rival", "silent", "throttled", "unreachable",
    }
)  # fmt: skip


# Refusals of the index that are part of a healthy stream.
_HARMLESS: Final = frozenset({"unknown_hash", "ignored_medium"})


class Index(Protocol):
    """The part of :class:`PrefixIndex` that a manager uses."""

    @property
    def block_size(self) -> int: ...

    def ingest(
        self, pod: str, payload: bytes, *, model: str = "", dp_rank: int | None = None, seq: int | None = None
    ) -> Any: ...

    def mark_worker(self, pod: str, dp_rank: int, state: Verdict) -> None: ...

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None: ...

    def configure_pod(
        self, pod: str, *, presence: Presence | None = None, clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None, max_blocks: int | None = None, ignore_media: Iterable[str] | None = None,
        engine: Engine | None = None, eagle: bool | Iterable[int] | None = None, hybrid: bool | None = None,
    ) -> None: ...  # fmt: skip

    def remove_pod(self, pod: str) -> None: ...

    def worker_stats(self, pod: str) -> dict[int, Any]: ...

    def stream_places(self, pod: str) -> dict[int, StreamPlace]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Objects that all workers of a manager share."""

    index: Index
    policy: StreamPolicy | None
    options: SocketOptions
    taps: list[Callable[[IndexChange], None]]
    """Called with every change of the index, before the change is made; the list may change."""
    tell: Callable[[StateChange], None]
    """Called with every change of a worker's state."""
    need: Callable[[], str]
    """Returns the required and the allowed number of descriptors, as text."""
    resolve: Callable[[str, Then], None]
    """Looks up the host of an endpoint."""
    turns: Turns
    """Turns for replays."""
    subscriptions: Subscriptions
    pulse: Pulse

    def show(self, item: IndexChange) -> None:
        for tap in list(self.taps):
            try:
                tap(item)
            except Exception:
                log.exception("a callback for changes of the index has failed")


def _contradicted(ahead: Iterable[int]) -> str:
    covered = " or ".join(str(length) for length in sorted(ahead) if length)
    return Reason.EAGLE_IDLE.text(lengths=covered)


def _named(topic: bytes) -> str:
    return repr(topic.decode("utf-8", "replace"))[:80]


class Worker:
    """One (pod, rank): its stream, its sockets and its figures.

    Messages go to the stream, and the stream's decisions are carried out at once. All methods except :meth:`describe`
    belong to the loop's thread.
    """

    __slots__ = (
        "_allowance", "_asking", "_backlog", "_backlog_bytes", "_blamed", "_curve", "_first_topic", "_heard",
        "_heard_at", "_looking_up", "_loop", "_overlooked", "_resume_at", "_setting", "_unbeaten", "_uncleared", "at",
        "attempt", "connection", "due", "errors", "events", "explained", "gone", "lag", "last_seq", "misfit", "model",
        "opened_at", "pod", "question", "rank", "ranks", "reconnect_at", "removed", "replay", "replay_topic",
        "rival", "seen_topic", "source", "state", "stored", "stream", "subscription", "tokens", "tokens_at", "told",
         "topic", "unknown", "unsaid",
    )  # fmt: skip

    def __init__(
        self, loop: StreamLoop, setting: Setting, source: PodSource, rank: int, at: Endpoints,
        place: StreamPlace | None, allowance: Allowance | None = None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._setting = setting
        self.pod = source.name
        self.rank = rank
        self.at = at
        self.source = source
        self.model = source.model
        # At a bound endpoint, the manager separates the ranks: each has its own connection.
        siblings = {*(source.ranks or range(source.dp_size))} - {rank}
        self.ranks = None if at.endpoint is None else Ranks(rank, tuple(siblings))
        self._curve = source.curve()
        self._allowance = allowance
        self._resume_at: float | None = None  # no message is taken before this time
        # Batches of a bound endpoint, whose socket cannot wait for one pod. None while empty: an empty deque takes 760
        # bytes.
        self._backlog: deque[tuple[int, bytes]] | None = None
        self._backlog_bytes = 0
        self._overlooked = -1  # the highest batch that was dropped because the backlog was full
        self.stream = WorkerStream(
            replay=at.replay_endpoint is not None,
            policy=setting.policy,
            place=place,
            endpoint=at.endpoint or "its publisher",
            replay_endpoint=at.replay_endpoint or "",
        )
        self.topic = None if source.topic is None else source.topic.encode()
        self.seen_topic: bytes | None = self.topic
        self.replay_topic: bytes | None = None
        self._first_topic = self.topic  # the first topic of any connection
        self.subscription: Subscription | Seat | None = None
        self.opened_at: float | None = None
        self._looking_up = False
        self.reconnect_at: float | None = None
        self.replay: Replay | None = None
        # Connections and replays are numbered, so that a late callback of an earlier one has no effect.
        self.attempt = 0
        self.question = 0
        self._asking = False  # holds one of the turns for replays
        self.due: float | None = None
        self.gone = False
        self.connection: int | None = None  # the number of a connection to a bound endpoint
        self.rival: int | None = None  # an earlier connection that publishes for this worker as well
        # State as far as the actions are carried out; the stream itself may be ahead.
        self.told: Verdict = "stale"  # the stream's state, as the index has it
        self.last_seq: int | None = None
        self.state = "stale"  # the worse of the stream's and the index's state
        self.lag: float | None = None
        self._heard = -1  # the last live batch
        self.stored = self.removed = 0
        self.events: Counter[str] = Counter()  # counts of rare events
        self.errors: Counter[str] = Counter()
        self.explained: frozenset[str] = frozenset()  # an empty set takes 216 bytes
        # Until the worker starts from scratch: the kind of an unknown event, and blocks of another size.
        self.unknown: str | None = None
        self.misfit: str | None = None
        self._heard_at: float | None = None  # time of the last message of this connection, or of its beginning
        self._unbeaten = 0  # consecutive connections that ended like those with unanswered heartbeats
        self._blamed = False  # this connection has brought batches of another rank
        self._uncleared = False  # the index could not clear this worker yet
        self.tokens = 10.0  # token bucket of the log
        self.tokens_at = 0.0
        self.unsaid = 0

    @property
    def speaks_for(self) -> list[int]:
        """The ranks in its stream: its own, and others that share its publisher."""
        return [self.rank] if self.ranks is None or not self.ranks.others else [self.rank, *self.ranks.others]

    @property
    def who(self) -> str:
        return f"{self.pod}[{self.rank}]"

    def begin(self, now: float) -> None:
        """Mark the worker as unknown so far, and connect unless its pod connects to us."""
        self._carry(self.stream.tick(now), now)
        if self.at.endpoint is not None:
            self.reconnect_at = now
            self.schedule()

    def close(self) -> None:
        """Close every socket. Later callbacks have no effect."""
        self.gone = True
        self.due = None
        self._end_replay()
        self._hang_up()

    # ---------------------------------------------------------------------------------------------- connections

    def _hang_up(self) -> None:
        if self.subscription is not None:
            self.subscription.close()
            self.subscription = None

    def _connect(self, now: float) -> None:
        self._hang_up()
        self.attempt += 1
        attempt = self.attempt
        assert self.at.endpoint is not None
        self._looking_up = True
        self._setting.resolve(
            self.at.endpoint,
            lambda endpoint, error: self._loop.within(partial(self._subscribe, attempt, endpoint, error)),
        )

    def _subscribe(self, attempt: int, endpoint: str | None, error: str) -> None:
        if self.gone or self.attempt != attempt:
            return
        now = self._loop.clock()
        self._looking_up = False
        if endpoint is None:
            self._lost(attempt, now, error)
            return
        self.seen_topic, self.replay_topic = self.topic, None
        self.opened_at = now  # the time of the look-up does not count
        self.schedule()
        try:
            self.subscription = self._setting.subscriptions.open(
                endpoint, self.topic or b"",
                made=partial(self._made, attempt),
                lost=partial(self._lost, attempt),
                message=self._live,
                curve=self._curve,
                admits=None if self._allowance is None else self._admits,
                waiting=None if self._allowance is None else self._waiting,
            )  # fmt: skip
        except (zmq.ZMQError, OSError) as failure:
            self._lost(attempt, now, explained(failure, self._setting.need))
            return
        if self.subscription.immediate:
            self._made(attempt, now)

    def connected(self, now: float) -> None:
        """The subscription is connected."""
        self._carry(self.stream.connected(now), now)
        self.schedule()

    def disconnected(self, now: float, why: str) -> None:
        """The connection is lost."""
        self._backlog, self._backlog_bytes, self._overlooked = None, 0, -1
        self._carry(self.stream.disconnected(now, why), now)
        self.schedule()

    def _made(self, attempt: int, now: float) -> None:
        if self.gone or self.attempt != attempt:
            return
        self.opened_at = None
        self._blamed = False
        self._heard_at = now
        self.connected(now)

    def _lost(self, attempt: int, now: float, why: str) -> None:
        if self.gone or self.attempt != attempt:
            return
        self.opened_at = None
        self.attempt += 1  # each connection is lost once
        why += self._beatless(now)
        self.disconnected(now, f"{self.at.endpoint}: {why}")

    def _beatless(self, now: float) -> str:
        """Addition to the reason of a loss, if connections end as they do when heartbeats are not answered."""
        beat = self._setting.options.heartbeat
        silent = None if self._heard_at is None else now - self._heard_at
        self._heard_at = None
        if silent is None or not beat:
            return ""
        # From the last message to the first heartbeat, it is one interval at most; from there to the
        # end, one and a half.
        self._unbeaten = self._unbeaten + 1 if 1.4 * beat <= silent <= 3.0 * beat else 0
        if self._unbeaten < 2:
            return ""
        return (
            f", {self._unbeaten} times in a row when heartbeats had no answer: publishers of ZMTP 3.0 give none"
            " (EventManager(heartbeat=0))"
        )

    def _on_time(self, now: float) -> None:
        if self.gone or self.due is None or self.due > now:
            return
        self.due = None
        try:
            self.tick(now)
        except Exception:
            log.exception("%s: a timer has failed; trying again in 1 s", self.who)
            self.reconnect_at = now + 1.0
            self.schedule()

    def tick(self, now: float) -> None:
        """Carry out the actions that are due."""
        if self.reconnect_at is not None and now >= self.reconnect_at:
            self.reconnect_at = None
            self._connect(now)
        if self.opened_at is not None and now >= self.opened_at + self._setting.options.patience:
            self._lost(self.attempt, now, f"no connection came about: {OUTDATED}")
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            for sock in (self.subscription, self.replay):  # a pod with a limit has sockets of its own
                if isinstance(sock, Watched):
                    self._loop.again(sock)
            if self.at.endpoint is None:
                self._work_off(now)
        self._carry(self.stream.tick(now), now)
        self.schedule()

    def schedule(self) -> None:
        """Let :meth:`tick` be called when something is due."""
        if self.gone:
            return
        due = self.stream.deadline()
        patience = None if self.opened_at is None else self.opened_at + self._setting.options.patience
        for at in (self.reconnect_at, patience, self._resume_at):
            if at is not None and (due is None or at < due):
                due = at
        if due is None:
            self.due = None
        elif self.due is None or due < self.due:  # a timer that is early finds nothing due, and is set again
            self.due = due
            self._loop.call_at(due, self._on_time)

    # -------------------------------------------------------------------------------------------------- messages

    def _admits(self, now: float) -> bool:
        """Whether the pod's limit admits one more message. If not, :meth:`tick` is called when it does again."""
        assert self._allowance is not None
        if self._resume_at is not None:
            return False
        opens = self._allowance.opens()
        if opens <= now:
            return True
        # With jitter, so that the same rank is not always the first.
        self._resume_at = max(opens, now + PAUSE) + PAUSE * random.random()
        self.stream.hold_up(now, self._resume_at)
        self.schedule()
        return False

    def _waiting(self, now: float, some: bool) -> None:
        self._carry(self.stream.behind(now, "more than its limit allows: what comes has to wait" if some else ""), now)
        self.schedule()

    def _charge(self, frames: list[bytes], now: float) -> None:
        assert self._allowance is not None
        self._allowance.charge(batch_events(frames[-1]), sum(map(len, frames)), now)

    def compete(self, connection: int | None, now: float) -> None:
        """Note an earlier connection to a bound endpoint that publishes for this worker as well;
        None if it has ended."""
        if connection == self.rival:
            return
        self.rival = connection
        if connection is not None:
            self._say("rival", self._rivalry(), now)
        self._carry([self.stream.mark], now)

    def _rivalry(self) -> str:
        return Reason.RIVAL.text(topic=f"{self.topic!r:.80}", rank=self.rank)

    def offer(self, frames: list[bytes], seq: int, payload: bytes, now: float) -> None:
        """Take a batch of a bound endpoint. Other pods share its socket, so batches over the limit wait here."""
        if self.gone:
            return
        if self._allowance is None:
            self.hear(seq, payload, now)
        elif not self._backlog and self._admits(now):
            self._charge(frames, now)
            self.hear(seq, payload, now)
        else:
            policy = self.stream.policy
            if self._backlog is None:
                self._backlog = deque()
            if (
                len(self._backlog) < policy.max_pending
                and self._backlog_bytes + len(payload) <= policy.max_pending_bytes
            ):
                self._backlog.append((seq, payload))
                self._backlog_bytes += len(payload)
            else:
                self.stream.counts["overflow"] += 1
                self._overlooked = max(self._overlooked, seq)
            self._waiting(now, True)

    def _work_off(self, now: float) -> None:
        """Take the batches that have waited in the backlog."""
        for _ in range(BUDGET):
            if not self._backlog:
                self._backlog = None
                if self._overlooked >= 0:
                    self._carry(self.stream.overlooked(self._overlooked, now), now)
                    self._overlooked = -1
                self._waiting(now, False)
                return
            if not self._admits(now):
                return
            seq, payload = self._backlog.popleft()
            self._backlog_bytes -= len(payload)
            self._charge([payload], now)
            self.hear(seq, payload, now)
        self._resume_at = now + PAUSE  # the other pods get their turn

    def _live(self, frames: list[bytes], now: float) -> None:
        if self.gone:
            return
        if self._allowance is not None:
            self._charge(frames, now)
        try:
            topic, seq, payload = parse_live(frames)
        except FrameFault as fault:
            self._fault(fault, now)
            return
        if topic != self.seen_topic:
            if self.seen_topic is not None:
                # ZMQ compares prefixes: a subscription to kv@10.0.0.1 also gets the messages of kv@10.0.0.10.
                self._foreign(topic, self.seen_topic, now)
                return
            self.seen_topic = topic
            self._note_topic(topic, now)
            if self.replay_topic is not None and self.replay_topic != topic:
                why = Reason.OTHER_TOPIC_BEFORE.text(
                    endpoint=self.at.endpoint, replay=self.at.replay_endpoint, topic=_named(self.replay_topic),
                    expected=_named(topic),
                )  # fmt: skip
                self._carry(self.stream.replay_foreign(now, why), now)
            if self.gone:  # a callback has removed it
                return
        self.hear(seq, payload, now)

    def hear(self, seq: int, payload: bytes, now: float) -> None:
        """Hand a published batch to its stream."""
        self._heard = seq
        self._heard_at = now
        if (ts := self.stream.follows(seq, payload, now)) is not None:
            self._apply(seq, payload, ts, now)
            return
        self._carry(self.stream.live(seq, payload, now), now)
        self.schedule()

    def _apply(self, seq: int, payload: bytes, ts: float, now: float) -> None:
        """Apply a batch that changes only the stream's position."""
        actions: list[Action] = []
        self._ingest(seq, payload, ts, True, actions, now)
        if self.gone:
            return
        self.last_seq = seq
        if actions:
            self._carry(actions, now)
            self.schedule()

    def _note_topic(self, topic: bytes, now: float) -> None:
        """Note the topic of the first message or reply of a connection, for a source that names no topic."""
        if self._first_topic is None:
            self._first_topic = topic
        if not same_model(self._first_topic, topic):
            before = _named(self._first_topic)
            why = Reason.OTHER_ENGINE.text(endpoint=self.at.endpoint, topic=_named(topic), before=before)
            self._carry(self.stream.distrust(now, why), now)

    def _foreign(self, topic: bytes, expected: bytes, now: float) -> None:
        self.errors["foreign_topic"] += 1
        if self.errors["foreign_topic"] == 1:
            self._say("foreign_topic", f"ignoring topic {_named(topic)}, this stream is {_named(expected)}", now)

    def _fault(self, fault: FrameFault, now: float) -> None:
        self.errors[fault.reason] += 1
        self._say("bad_frames", str(fault), now)
        self._carry(self.stream.suspect(now), now)
        self.schedule()

    def _reply(self, question: int, frames: list[bytes], now: float) -> None:
        if self.gone or self.replay is None or question != self.question:
            return
        if self._allowance is not None:
            self._charge(frames, now)
        try:
            reply = parse_replay(frames)
        except FrameFault as fault:
            self.errors[f"replay_{fault.reason}"] += 1
            self._say("bad_frames", f"in a replay: {fault}", now)
            return
        if reply is END:
            self._carry(self.stream.replay_ended(now), now)
        elif reply.topic is not None and self.seen_topic is not None and reply.topic != self.seen_topic:
            self._foreign(reply.topic, self.seen_topic, now)
            why = Reason.OTHER_TOPIC.text(
                replay=self.at.replay_endpoint, topic=_named(reply.topic), expected=_named(self.seen_topic)
            )
            self._carry(self.stream.replay_refused(now, why), now)
        else:
            if reply.topic is not None and self.seen_topic is None and self.replay_topic != reply.topic:
                self._note_topic(reply.topic, now)
            self.replay_topic = reply.topic
            if (ts := self.stream.continues(reply.seq, reply.payload, now)) is not None:
                self._apply(reply.seq, reply.payload, ts, now)
                return
            self._carry(self.stream.replayed(reply.seq, reply.payload, now), now)
        self.schedule()

    # --------------------------------------------------------------------------------------------------- actions

    def _carry(self, actions: list[Action], now: float) -> None:
        """Carry out the stream's decisions in order. Decisions that follow from them are appended to ``actions``. If a
        callback removes the pod, the rest is dropped."""
        for action in actions:
            if self.gone:
                return
            kind = type(action)
            if kind is Ingest:
                self._ingest(*action, actions, now)  # type: ignore[call-arg]
                continue
            match action:
                case RequestReplay(start):
                    self._end_replay()
                    self.ask(start)
                case AwaitReplay():
                    self._setting.turns.leave(self)  # a waiting request costs nothing here
                case CancelReplay():
                    self._end_replay()
                case Clear():
                    if all(self._shows(Forgotten(self.pod, rank)) for rank in self.speaks_for):
                        self._uncleared = True
                        self._clear(now)
                case Mark(state, reason):
                    if self._uncleared and state != "stale" and not self._clear(now):
                        state, reason = "stale", Reason.UNCLEARED.text()
                    if self.rival is not None and state == "exact":
                        state, reason = "degraded", self._rivalry()
                    for rank in self.speaks_for:
                        if not self._shows(Marked(self.pod, rank, state, reason)):
                            return
                        self._setting.index.mark_worker(self.pod, rank, state)
                    self.told, self.last_seq = state, self.stream.last_seq
                    self.compare_state()
                case Reconnect(delay):
                    if self.at.endpoint is not None:
                        self.reconnect_at = now + delay
                case Renew(why):
                    if self.at.endpoint is not None:
                        self._hang_up()
                        self.attempt += 1
                        actions += self.stream.disconnected(now, f"{self.at.endpoint}: {why}")
                case Incident(what, detail):
                    self._say(what, detail, now)
        self.last_seq = self.stream.last_seq

    def _shows(self, item: IndexChange) -> bool:
        """Show a change of the index to the taps. Returns whether to make it: a tap may remove the pod."""
        if self._setting.taps:
            self._setting.show(item)
        return not self.gone

    def _clear(self, now: float) -> bool:
        """Clear the blocks of a former process. If the index raises, the worker stays stale, no batch is applied, and
        the index is asked again before each batch."""
        try:
            for rank in self.speaks_for:
                self._setting.index.clear_worker(self.pod, rank)
        except Exception as error:
            self.errors["refused"] += 1
            self._say("refused", f"{Reason.UNCLEARED.text()}, and is asked again: {error!r}", now)
            return False
        self._uncleared = False
        self.explained = frozenset()
        self.unknown = self.misfit = None
        return True

    def _whose(self, ranks: Ranks, payload: bytes, actions: list[Action], now: float) -> int | None:
        """The rank that a batch belongs to; None if the stream is applied again from its beginning."""
        known = len(ranks.others)
        rank = ranks.of(payload)
        if rank is None:
            actions += self.stream.start_anew(now, Reason.SHARED_SOCKET.text())
        elif len(ranks.others) > known:
            self._say("ranks", f"rank {rank} publishes through the socket of rank {self.rank}: kept apart", now)
            if self._shows(Marked(self.pod, rank, self.told, self.stream.reason)):
                self._setting.index.mark_worker(self.pod, rank, self.told)
        if ranks.misplaced is not None and not self._blamed:
            self._blamed = True
            actions += self.stream.distrust(
                now,
                Reason.SWAPPED_RANKS.text(
                    other=ranks.misplaced, endpoint=self.at.endpoint, replay=self.at.replay_endpoint, rank=self.rank
                ),
            )
        return rank

    def _ingest(
        self, seq: int, payload: bytes, ts: float | None, joined: bool, actions: list[Action], now: float
    ) -> None:  # fmt: skip
        rank, ranks, setting = self.rank, self.ranks, self._setting
        if ranks is not None and (ranks.misplaced is not None or not ranks.is_own(payload)):
            whose = self._whose(ranks, payload, actions, now)
            if whose is None or self.gone:
                return
            rank = whose
        # If several workers share one sequence, each has only a part of it, and no position in it.
        joined = joined and (ranks is None or not ranks.several)
        if setting.taps:
            topic = self.replay_topic if self.seen_topic is None else self.seen_topic
            if not self._shows(Batch(self.pod, rank, self.model, topic, seq, payload, joined)):
                return
        if self._uncleared:
            if not self._clear(now):
                actions += self.stream.rejected(seq, payload, now, "what was before cannot be cleared")
                return
            actions.append(self.stream.mark)
        try:
            report = setting.index.ingest(
                self.pod, payload, model=self.model, dp_rank=rank, seq=seq if joined else None
            )  # fmt: skip
        except EventDecodeError as error:
            self.errors["undecodable"] += 1
            actions += self.stream.rejected(seq, payload, now, str(error))
            return
        except Exception as error:
            # The batch is not applied, the stream goes on, and the worker is degraded.
            self.errors["refused"] += 1
            actions += self.stream.rejected(seq, payload, now, f"the index refuses it: {error!r}")
            return
        self.stored += report.stored
        self.removed += report.removed
        if ts is not None and seq == self._heard:
            self.lag = time.time() - ts
        if report.cleared:
            self.events["cleared"] += report.cleared
            whole = (isinstance(e, AllBlocksCleared) and e.medium is None for e in decode_batch(payload).events)
            if self.source.clear_media is None and (ranks is None or not ranks.several) and any(whole):
                self.unknown = self.misfit = None
                actions += self.stream.cleared(seq, now)
        if self.source.eagle and report.stored and "eagle" not in self.explained:
            self._compare_eagle(now)
        if report.parked or report.skipped:
            self.events["parked"] += report.parked
            self.events["skipped"] += report.skipped
            self._skipped(report, payload, now)

    def _skipped(self, report: Any, payload: bytes, now: float) -> None:
        self._loop.call_soon(self.compare_state)
        for reason, count in report.reasons.items():
            self.errors[reason] += count
            if reason not in self.explained and reason not in _HARMLESS:
                # Once for each reason until the worker starts from scratch. The counters contain every occurrence.
                self.explained |= {reason}
                self._say(reason, self._explain(reason, payload), now, logging.WARNING)

    def _compare_eagle(self, now: float) -> None:
        """Compare the option with the first stored blocks, which show whether hashes cover lookahead tokens. Logged
        once."""
        ahead = self._lookahead(self._setting.index.worker_stats(self.pod))
        if ahead:
            self.explained |= {"eagle"}
        if max(ahead, default=0):
            self._say("option_contradicted", _contradicted(ahead), now)

    def _lookahead(self, figures: Mapping[int, dict[str, Any]]) -> set[int]:
        return {length for rank in self.speaks_for if rank in figures for length in figures[rank]["lookahead"]}

    def _explain(self, reason: str, payload: bytes) -> str:
        if reason == "unknown_event":
            self.unknown = ", ".join(sorted(set(unknown_kinds(payload))))
            return Reason.UNKNOWN_EVENT.text(kind=self.unknown)
        if reason != "block_size_mismatch":
            return "an event could not be applied"
        sizes = {getattr(event, "block_size", None) for event in decode_batch(payload).events}
        named = ", ".join(str(size) for size in sorted(size for size in sizes if size))
        self.misfit = Reason.BLOCK_SIZE.text(sizes=named, block_size=self._setting.index.block_size)
        return self.misfit

    def ask(self, start: int) -> None:
        """Request a replay, now or when it is this worker's turn."""
        if self.gone or self.at.replay_endpoint is None:
            return
        if not self._setting.turns.take(self, partial(self.ask, start)):
            return
        self._asking = True
        self.question += 1
        question = self.question

        self._setting.resolve(
            self.at.replay_endpoint,
            lambda endpoint, error: self._loop.within(partial(self._send, question, start, endpoint, error)),
        )

    def _send(self, question: int, start: int, endpoint: str | None, error: str) -> None:
        if self.gone or not self._asking or self.replay is not None or question != self.question:
            return
        now = self._loop.clock()
        if endpoint is not None:
            try:
                self.replay = Replay(
                    self._loop,
                    self._loop.context,
                    self._setting.options,
                    endpoint,
                    start,
                    reached=partial(self._reached, question),
                    lost=partial(self._answer_lost, question),
                    message=partial(self._reply, question),
                    curve=self._curve,
                    admits=None if self._allowance is None else self._admits,
                )
            except (zmq.ZMQError, OSError) as failure:
                error = explained(failure, self._setting.need)
        if self.replay is None:
            self._say("replay_unreachable", error, now)
        # A request that could not be sent ends in the same timeout as one without an answer.
        self.stream.replay_sent(now)
        self.schedule()

    def _reached(self, question: int, now: float) -> None:
        if not self.gone and question == self.question:
            self.stream.replay_reached(now)
            self.schedule()

    def _answer_lost(self, question: int, now: float) -> None:
        if not self.gone and self.replay is not None and question == self.question:
            self._carry(self.stream.replay_lost(now), now)
            self.schedule()

    def _end_replay(self) -> None:
        self._asking = False
        if self.replay is not None:
            self.replay.close()
            self.replay = None
        self._setting.turns.leave(self)

    # ------------------------------------------------------------------------------------------------------- reports

    def compare_state(self) -> None:
        """Report the worker's state if it has changed: the worse of the stream's and the index's."""
        if not self.gone:
            self._become(*self._judged())

    def _become(self, state: str, reason: str) -> None:
        if state == self.state:
            return
        old, self.state = self.state, state
        # A worker that is gone belongs to a manager that ends, which is not the pod's loss.
        is_loss = not self.gone and WORST_FIRST.index(state) < WORST_FIRST.index(old)
        level = logging.WARNING if is_loss else logging.INFO
        log.log(level, "%s: %s, was %s%s", self.who, state, old, f" ({reason})" if reason else "")
        change = StateChange(self.pod, self.rank, old, state, reason)
        self._setting.tell(change)

    def abandon(self, reason: str) -> None:
        """The manager ends, by a close or because its thread has failed: close the sockets, and mark the worker
        stale."""
        self.close()
        self.told = "stale"
        self.stream.abandon(reason)
        try:
            for rank in self.speaks_for:
                if self._setting.taps:
                    self._setting.show(Marked(self.pod, rank, "stale", reason))
                self._setting.index.mark_worker(self.pod, rank, "stale")
        except Exception:
            log.exception("%s: cannot be marked stale", self.who)
        self._become("stale", reason)

    def _judged(self, figures: Mapping[int, dict[str, Any]] | None = None) -> tuple[str, str]:
        if figures is None:
            try:
                figures = self._setting.index.worker_stats(self.pod)
            except KeyError:
                figures = {}
        state, reason = self._state_of(figures)
        if state == "exact" and self.topic is None and self._first_topic:
            reason = "; ".join(filter(None, (reason, self._other_model(self._first_topic))))
        if self.source.eagle and max(ahead := self._lookahead(figures), default=0):
            reason = "; ".join(filter(None, (reason, _contradicted(ahead))))
        return state, reason

    def _other_model(self, topic: bytes) -> str:
        """The reason for a topic with another model than the pod was added with. It may be an alias."""
        said = parse_topic(topic)
        if said is None or not self.model or said[1] == self.model:
            return ""
        return Reason.OTHER_MODEL.text(named=f"{said[1]!r:.80}", model=f"{self.model!r:.80}")

    def _state_of(self, figures: Mapping[int, dict[str, Any]]) -> tuple[str, str]:
        if self.ranks is None or not self.ranks.others:  # nearly all workers
            own = figures[self.rank]["state"] if self.rank in figures else self.told
        else:
            states = [figures[rank]["state"] for rank in self.speaks_for if rank in figures]
            own = min(states, key=WORST_FIRST.index, default=self.told)
        if own != self.told and WORST_FIRST.index(own) < WORST_FIRST.index(self.told):
            if own != "stale":
                return own, self._objection(figures)
            return own, (
                Reason.UNREAD.text(seconds=f"{SILENCE:g}") if self._setting.pulse.lapsed else Reason.LAPSED.text()
            )
        if self._uncleared:
            return self.told, Reason.UNCLEARED.text()
        if self._looking_up and self.attempt == 1:  # later, the reason of the last failure is more useful
            return self.told, Reason.LOOKED_UP.text(endpoint=self.at.endpoint)
        if self.rival is not None and self.told == "degraded":
            return self.told, self._rivalry()
        if self.told != self.stream.state:
            return self.told, Reason.BEING_APPLIED.text()  # in the loop's thread, at this moment
        return self.told, self.stream.reason

    def _objection(self, figures: Mapping[int, dict[str, Any]]) -> str:
        """Why the index's state is worse than the stream's."""
        if self.unknown is not None:
            return Reason.UNKNOWN_EVENT.text(kind=self.unknown)
        if any(figures[rank]["in_doubt"] for rank in self.speaks_for if rank in figures):
            return Reason.CLEAR_IN_DOUBT.text()
        if self.misfit is not None:
            return self.misfit
        if self.source.hybrid:
            return Reason.HYBRID.text()
        return Reason.NOT_PLACED.text(refusals=", ".join(sorted(self.explained - {"eagle"})) or "see its errors")

    def describe(self, table: Mapping[int, dict[str, Any]], into: dict[int, WorkerStatus]) -> None:
        """Enter the status of this worker, and of others that share its publisher, by rank. ``table`` has the index's
        figures by rank."""
        into[self.rank] = own = self._described(table)
        if self.ranks is None or not self.ranks.others:
            return
        for rank in sorted(self.ranks.others):
            figures = table.get(rank, {})
            into[rank] = replace(
                own, rank=rank, blocks=figures.get("blocks", 0), parked=figures.get("parked", 0), batches=0
            )

    def _described(self, table: Mapping[int, dict[str, Any]]) -> WorkerStatus:
        figures = table.get(self.rank, {})
        stream = self.stream
        counts = stream.counts
        count = counts.get  # a Counter's subscript calls __missing__ for zeros
        state, reason = self._judged(table)
        ignored = self.errors.get("unknown_event", 0)
        if state == "exact" and ignored and not figures.get("blocks"):
            # There were no blocks that such an event could remove. But a pod that announces its blocks only in events
            # of this kind would look like one without blocks.
            events = Reason.IGNORED_EVENT if ignored == 1 else Reason.IGNORED_EVENTS
            reason = events.text(count=f"{ignored:,}")
        return WorkerStatus(
            pod=self.pod,
            rank=self.rank,
            model=self.model,
            endpoint=self.at.endpoint,
            replay_endpoint=self.at.replay_endpoint,
            state=state,
            reason=reason,
            connected=stream.is_connected,
            last_seq=self.last_seq,
            last_ts=stream.last_ts,
            lag=self.lag,
            replaying=stream.replaying,
            waiting=stream.waiting,
            batches=count("batches", 0),
            gaps=count("gaps", 0),
            lost_batches=count("lost_batches", 0),
            replays=count("replays_asked", 0),
            replays_healed=count("gaps_healed", 0),
            replays_failed=count("replays_failed", 0),
            restarts=count("restarts", 0),
            reconnects=count("reconnects", 0),
            duplicates=count("duplicates", 0),
            throttled=count("throttled", 0),
            errors=dict(self.errors),
            events={"stored": self.stored, "removed": self.removed, **self.events},
            blocks=figures.get("blocks", 0),
            parked=figures.get("parked", 0),
            counters=dict(counts),
        )

    def _say(self, kind: str, detail: str, now: float, level: int | None = None) -> None:
        """Log an incident. If many occur in a short time, a few are logged and the rest are counted."""
        self.tokens = min(10.0, self.tokens + (now - self.tokens_at) * 0.5)
        self.tokens_at = now
        if self.tokens < 1.0:
            self.unsaid += 1
            return
        self.tokens -= 1.0
        more, self.unsaid = self.unsaid, 0
        tail = f" ({more} earlier incidents were not logged)" if more else ""
        if level is None:
            level = logging.WARNING if kind in _SERIOUS else logging.INFO
        log.log(level, "%s: %s: %s%s", self.who, kind, detail, tail)

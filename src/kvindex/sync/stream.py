"""One worker's stream as a pure state machine: messages and times in, actions out.

The machine decides what is applied, in which order, and how far the result can be trusted. It has no socket, no clock
and no thread: every method takes ``now`` (seconds of any steady clock) and gives a list of actions, which the caller
carries out in order. Every path can therefore be tested in microseconds, and the thread around it only moves bytes.

What it guarantees:

* a batch is applied at most once, and in the order of sequence numbers, whatever arrives twice, late or out of order;
* the verdict is ``exact`` only when every batch since a clean start of the process behind the connection was applied;
  anything that was given up makes it ``degraded``, anything that is not known at the moment makes it ``stale``;
* nothing grows without bound: what waits is limited in batches and bytes, tries are limited in number, replays in time.

How it decides whether a connection leads to the process it knew before: it keeps fingerprints of the last batches it
has applied, asks for a replay from 0 and compares. Equal bytes under an equal sequence number mean the same process (a
batch carries its time, so another process has other bytes). Other bytes, a newer time under an old number, an answer
that ends before the last known number or starts behind it mean that what is known does not continue: the worker is
cleared and rebuilt.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeAlias

from .._core import _xxh3_64
from ..answers import StreamPlace
from .frames import batch_time

__all__ = [
    "Action",
    "CancelReplay",
    "Clear",
    "Incident",
    "Ingest",
    "Mark",
    "Policy",
    "Reconnect",
    "RequestReplay",
    "Verdict",
    "WorkerStream",
]

Verdict: TypeAlias = Literal["exact", "degraded", "stale"]


class Ingest(NamedTuple):
    """Apply this batch, then say by :meth:`WorkerStream.cleared` or :meth:`WorkerStream.rejected` what came of it."""

    seq: int
    payload: bytes
    ts: float | None
    joined: bool = True
    """Whether it is known to continue what is applied. If not, the index must not be told its number: a snapshot would
    say that everything up to there is one stream."""


class RequestReplay(NamedTuple):
    """Ask the publisher for every batch from ``start`` on, and say :meth:`WorkerStream.replay_sent` when that is done.

    It replaces a replay that is still running; what that one still brings must not be handed in any more.
    """

    start: int


class CancelReplay(NamedTuple):
    """Nobody waits for the running replay any more: it is over, or given up."""


class Clear(NamedTuple):
    """Forget everything of this worker."""


class Mark(NamedTuple):
    """From here on, answers of this worker are of this quality; ``reason`` is for people."""

    verdict: Verdict
    reason: str


class Reconnect(NamedTuple):
    """Close the connection if there is one, and open a new one after ``delay`` seconds."""

    delay: float


class Incident(NamedTuple):
    """Something that a person may want to read in a log: once per incident, never once per batch."""

    kind: str
    detail: str


Action: TypeAlias = Ingest | RequestReplay | CancelReplay | Clear | Mark | Reconnect | Incident


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Times in seconds, and bounds. The defaults are for engines in one data centre."""

    replay_timeout: float = 2.0
    """How long a replay may take to begin. vLLM looks for requests every 100 ms; recorded were 98 to 528 ms."""
    replay_pause: float = 0.5
    """How long a replay that has begun may pause before it counts as over."""
    replay_deadline: float = 60.0
    """How long one replay may last altogether."""
    replay_surplus: int = 1000
    """How many batches of one replay may repeat earlier ones before it is given up."""
    replay_confirm: int = 256
    """An answer of this many batches is asked for its end again: a ROUTER drops what its queue (1,000) does not
    take."""
    replay_tries: int = 3
    """How often an unanswered replay is asked for before its hole is accepted."""
    hole_tries: int = 2
    """How often a hole is asked for that the publisher answers without filling it, before it is accepted."""
    replay_retry: tuple[float, float] = (0.1, 5.0)
    """Back-off between replays: first and longest wait."""
    reconnect: tuple[float, float] = (1.0, 30.0)
    """Back-off between connections: first and longest wait, doubled each time."""
    jitter: float = 0.25
    """Waits grow by a random part of up to this share, so that a fleet does not come back in step."""
    settled: float = 5.0
    """A connection that lasted this long lets the next back-off start from the beginning."""
    idle_probe: tuple[float, float] = (0.5, 30.0)
    """How long a silent stream waits until it asks whether it has missed the end: first and longest wait."""
    heal: tuple[float, float] = (2.0, 8.0)
    """How long a degraded stream waits until it asks whether its history can be had after all: first and longest."""
    clock_step: float = 1.0
    """A batch older than the one before by more than this makes the stream ask whether it is still the same process."""
    restart_rate: float = 1000.0
    """Batches a second that an engine publishes at most: bounds how far a new process can have got meanwhile."""
    seq_jump: int = 1_000_000_000
    """A sequence number further ahead than this is damage: no outage loses so many batches."""
    max_pending: int = 10_000
    """Batches that may wait for a hole to be filled."""
    max_pending_bytes: int = 64 << 20
    """Bytes that may wait for a hole to be filled."""
    memory: int = 1024
    """Fingerprints of applied batches that are kept. One would do; more tell duplicates from restarts."""
    burst: float = 2.0
    """How many seconds of its limit a silent pod saves up (:attr:`PodSource.max_event_rate`)."""
    max_conflicts: int = 3
    """Restarts that replays claim within one connection before the replay endpoint counts as somebody else's."""


class _Purpose(Enum):
    START = "start"  # nothing is known yet
    VERIFY = "verify"  # is this the process we knew?
    GAP = "gap"  # a hole is in front of what waits
    IDLE = "idle"  # was the end missed? Live batches are applied meanwhile
    HEAL = "heal"  # could the whole history be had again? Live batches are applied meanwhile


class _Replay:
    """One question to the publisher, over all the requests that its answer takes."""

    __slots__ = (
        "bound", "brought", "contiguous", "deadline", "expect", "first", "frames", "jump", "matched", "pos", "progress",
        "purpose", "start", "surplus",
    )  # fmt: skip

    def __init__(self, purpose: _Purpose, start: int, expect: int) -> None:
        self.purpose = purpose
        self.start = start
        # Of the whole answer.
        self.first: int | None = None
        self.pos = start - 1  # highest seq so far
        self.jump = -1  # where the answer left something out for the first time
        self.contiguous = start == 0  # it starts at 0 and leaves out nothing
        self.matched = False  # a batch that is applied came with the same bytes
        self.brought = False  # something was applied that had not come live
        self.surplus = 0  # batches that repeated earlier ones
        self.again(expect)

    def again(self, expect: int) -> None:
        # Of this request.
        self.expect = expect  # what the publisher must have, if it is the one we know; -1 is nothing
        self.deadline: float | None = None  # when it counts as over if nothing comes
        self.bound: float | None = None  # when it counts as over whatever comes
        self.frames = 0
        self.progress = False


class _Waiting(NamedTuple):
    payload: bytes
    ts: float | None


_LOST: Final = 0  # in place of a fingerprint: given up


def _fingerprint(payload: bytes) -> int:
    # 64 bits, never _LOST. Keyed per process, and kept in the bytes object, so hashing one object again is free.
    return (hash(payload) & 0x7FFF_FFFF_FFFF_FFFF) or 1


class WorkerStream:
    """The stream of one (pod, rank). See the module's text; belongs to one thread.

    ``replay`` says whether the publisher has a replay endpoint. ``uniform`` gives numbers in [0, 1), which jitter is
    made of. ``place`` is how far a stream was applied by somebody before: if this one shows that batch again it goes on
    behind it, otherwise all of it is cleared.

    Feed it by :meth:`connected`, :meth:`disconnected`, :meth:`live`, :meth:`replayed`, :meth:`replay_ended`,
    :meth:`replay_sent`, :meth:`suspect` and :meth:`tick`; after an :class:`Ingest` say :meth:`cleared` or
    :meth:`rejected` where that is what happened. :meth:`deadline` says when the next tick is due. ``counts`` has every
    counter by name, ``verdict`` and ``reason`` what the last :class:`Mark` said. A call is O(1) but for what it
    applies.
    """

    def __init__(
        self,
        *,
        replay: bool,
        policy: Policy | None = None,
        uniform: Callable[[], float] = random.random,
        place: StreamPlace | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.counts: Counter[str] = Counter()
        self.is_connected = False
        self.last_ts: float | None = None
        self.verdict: Verdict = "stale"
        self.reason = "not connected yet"
        self._uniform = uniform
        self._has_replay = replay
        self._trust_replay = replay
        self._out: list[Action] = []
        self._marked: Verdict | None = None
        self._steady = False  # the next batch can be applied without another thought
        # What is applied.
        self._known = False  # something of a process is applied or given up
        self._next = 0
        self._memory = array("q", bytes(8 * self.policy.memory))
        self._base = 0  # the first seq that the memory knows
        # The last batch that is applied, with its fingerprint, once so many behind it are given up that the memory has
        # no other: without it a stream that lost much could not tell its own process from another.
        self._anchor: tuple[int, int] | None = None
        self._dated = -1  # the batch that last_ts is of
        # What is given up since the last clean start.
        self._holes = 0
        self._holes_end = 0
        self._bad: dict[int, int] = {}  # seq -> fingerprint of a batch that could not be applied
        self._hopeless = False  # the publisher does not have the whole history any more
        # What the connection is worth.
        self._connected_at = 0.0
        self._lost_at: float | None = None
        self._why_lost = self.reason
        self._attempts = 0
        self._verified = False  # what is applied is of the process behind this connection
        self._started = False  # and everything up to the first live batch is applied
        self._unproven = False  # as far as can be said without a replay
        self._guessed = 0  # what is applied before this batch is of the same process only as far as can be guessed
        self._mixed = False  # more than one process has come over this connection
        # An answer has stopped without its end marker: there may be more of it until another one shows its end, or a
        # live batch behind this one is applied.
        self._open: int | None = None
        self._conflicts = 0
        # What waits.
        self._waiting: dict[int, _Waiting] = {}
        self._waiting_bytes = 0
        self._outdated = False  # something waits that is applied already
        self._seen = -1  # the highest live seq of this process
        self._hole_at: int | None = None  # where a hole was noticed that is neither filled nor given up
        self._replay: _Replay | None = None
        self._retry: _Replay | None = None
        self._retry_at = 0.0
        self._tries = 0
        self._tries_at = -1
        self._held_up_until = float("-inf")
        self._behind = False  # something has arrived that may not be taken yet
        self._heard_at = 0.0
        self._probe_at: float | None = None
        self._probe_wait = 0.0
        self._verified_at = float("-inf")
        self._heal_at: float | None = None
        self._heal_wait = self.policy.heal[0]
        # The last batch of what was applied before this stream began, until it is recognised.
        self._place = place
        if place is not None:
            self._known = True
            self._next = self._base = place.seq + 1
            self.last_ts, self._dated = place.ts, place.seq
            if not place.whole:
                self._holes, self._holes_end = 1, place.seq + 1

    # ------------------------------------------------------------------------------------------------------ questions

    @property
    def last_seq(self) -> int | None:
        """The last sequence number that was applied or given up, None before the first."""
        return self._next - 1 if self._next else None

    @property
    def waiting(self) -> int:
        """Batches that wait for a hole to be filled."""
        return len(self._waiting)

    @property
    def replaying(self) -> bool:
        """Whether a replay is running, or is going to be asked for again."""
        return self._replay is not None or self._retry is not None

    def deadline(self) -> float | None:
        """When :meth:`tick` is due, or None when nothing is waited for."""
        if not self.is_connected:
            return None
        if self._replay is not None:
            due = (self._replay.deadline, self._replay.bound)
        elif self._retry is not None:
            return self._retry_at
        else:
            due = (self._heal_at, self._probe_at)
        return min((at for at in due if at is not None), default=None)

    # ----------------------------------------------------------------------------------------------------- connection

    def connected(self, now: float) -> list[Action]:
        """The subscription stands: live messages from here on are of the process behind this connection."""
        if self.is_connected:
            return []
        if self._lost_at is not None:
            self.counts["reconnects"] += 1
            self._say("connected", f"again after {now - self._lost_at:.1f} s")
        elif self._attempts:
            self._say("connected", f"at attempt {self._attempts + 1}")
        self.is_connected = True
        self._connected_at = self._heard_at = now
        self._conflicts = 0
        self._mixed = self._behind = False
        self._open = None
        self._trust_replay = self._has_replay
        self._stop_replay()
        # What waited came over the connection before: a replay brings it again, and nobody else could place it.
        self._drop_waiting()
        self._verified = not self._known
        if self._trust_replay:
            self._started = False
            # What a snapshot goes back to may be most of the history: then its last batch has to do.
            start = 0 if self._place is None else self._place.seq
            self._ask(_Purpose.VERIFY if self._known else _Purpose.START, start)
        elif not self._known:
            self._started = self._unproven = True
        return self._settle(now)

    def disconnected(self, now: float, why: str = "the connection was lost") -> list[Action]:
        """The connection is gone, or could not be made."""
        if self.is_connected:
            self.is_connected = False
            self._lost_at = now
            self.counts["disconnects"] += 1
            self._say("disconnected", why)
            if now - self._connected_at >= self.policy.settled:
                self._attempts = 0
        else:
            self.counts["failed_connects"] += 1
            if self._attempts == 0:
                self._say("unreachable", why)
        self._why_lost = why
        self._stop_replay()
        first, longest = self.policy.reconnect
        delay = min(longest / (1.0 + self.policy.jitter), first * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        self._out.append(Reconnect(self._spread(delay)))
        return self._settle(now)

    # ------------------------------------------------------------------------------------------------------- messages

    def follows(self, seq: int, payload: bytes, now: float) -> Ingest | None:
        """As :meth:`live` for a message that is just the next one of a stream that is well, which nearly all are; None,
        with nothing done, for any other. Nothing else changes by it, no deadline either."""
        if not self._steady or seq != self._next:
            return None
        ts = batch_time(payload)
        if ts is not None:
            if self.last_ts is not None and ts < self.last_ts - self.policy.clock_step:
                return None
            self.last_ts, self._dated = ts, seq
        self._heard_at = now
        self._note(seq, payload)
        return Ingest(seq, payload, ts)

    def live(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A published message has arrived."""
        if (action := self.follows(seq, payload, now)) is not None:
            return [action]
        ts = batch_time(payload)
        self._heard_at = now
        if self._known and seq > self._next + self.policy.seq_jump:
            self.counts["bad_seq_jump"] += 1
            return self.suspect(now)
        if self._known and not self._verified:
            if self.replaying:
                self._hold(seq, payload, ts)
            else:
                self._judge(seq, payload, ts)
        elif seq < self._next:
            self._backwards(seq, payload, ts, now)
        elif seq == self._next and self._older(ts) and self._may_verify(now):
            # A restarted engine that happens to be at the next number looks just like a clock that was set back.
            self.counts["clock_steps"] += 1
            self._verified = self._started = False
            self._hold(seq, payload, ts)
            self._ask(_Purpose.VERIFY, 0)
        else:
            self._hold(seq, payload, ts)
            self._drain()
            self._look_at_hole(now)
        return self._settle(now)

    def replay_sent(self, now: float) -> None:
        """The request of the last :class:`RequestReplay` is on its way; its time counts from here."""
        if self._replay is not None and self._replay.bound is None:
            since = max(now, self._held_up_until)
            self._replay.deadline = since + self.policy.replay_timeout
            self._replay.bound = since + self.policy.replay_deadline

    def replayed(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A batch of the running replay has arrived."""
        replay = self._replay
        if replay is None:
            self.counts["late_replay"] += 1
            return []
        self._recognise(seq, payload)
        replay.deadline = now + self.policy.replay_pause
        replay.frames += 1
        if replay.first is None:
            replay.first = seq
        if seq <= replay.pos:
            replay.surplus += 1
        elif seq == replay.pos + 1 or replay.purpose is not _Purpose.HEAL or replay.pos in (-1, replay.jump):
            replay.contiguous = replay.contiguous and seq == replay.pos + 1
            replay.pos = seq
            replay.progress = True
        else:
            # Left out by the publisher, or dropped by its full queue: the second time tells.
            replay.jump = replay.pos
            self._later(replay, now)
            return self._settle(now)
        if seq < self._next:
            self.counts["overlap"] += 1
            self._compare(replay, seq, payload, now)
        elif not self._verified and not replay.matched:
            why = f"the replay goes on at {seq}, which does not continue {self._next - 1}"
            self._not_ours(replay, seq, payload, now, why)
        else:
            self._take(replay, seq, payload, now)
        if self._replay is replay and replay.surplus > self.policy.replay_surplus:
            self._endless(f"{replay.surplus} batches repeat earlier ones", now)
        return self._settle(now)

    def replay_ended(self, now: float) -> list[Action]:
        """The end marker of the running replay has arrived."""
        replay = self._replay
        if replay is None:
            self.counts["late_replay"] += 1
        elif replay.frames >= self.policy.replay_confirm:
            self.counts["long_replays"] += 1
            self._continue(replay)
        else:
            self._end(replay, now)
        return self._settle(now)

    def suspect(self, now: float) -> list[Action]:
        """A message of this connection was not readable: look whether what was applied is what was published."""
        self._plan_heal(now)
        return self._settle(now)

    # ------------------------------------------------------------------------------------------------ limits of ours

    def hold_up(self, now: float, until: float) -> None:
        """Nothing of this stream is taken before ``until``: what is late meanwhile is so by our own will, and the
        publisher's silence is none."""
        self.counts["throttled"] += 1
        more = until - max(now, self._held_up_until)
        if more <= 0.0:
            return
        self._held_up_until = until
        self._heard_at = max(self._heard_at, until)
        if self._replay is not None and self._replay.bound is not None and self._replay.deadline is not None:
            self._replay.deadline += more
            self._replay.bound += more

    def behind(self, now: float, why: str) -> list[Action]:
        """Something has arrived that may not be taken yet: ``why``. Nothing does any more where that is empty."""
        if bool(why) == self._behind:
            return []
        self._behind = bool(why)
        if why:
            self._say("throttled", why)
        return self._settle(now)

    def overlooked(self, seq: int, now: float) -> list[Action]:
        """Batch ``seq`` has arrived and was let go, for want of room to wait in. What arrived before and was not let go
        has been handed in."""
        if seq > self._next + self.policy.seq_jump:
            return self.suspect(now)
        self._seen = max(self._seen, seq)
        if self._verified:
            self._look_at_hole(now)
        return self._settle(now)

    # --------------------------------------------------------------------------------------- what came of an Ingest

    def cleared(self, seq: int, now: float) -> list[Action]:
        """Batch ``seq`` cleared the whole worker: what was given up before it does not matter any more."""
        if seq >= self._holes_end - 1 and (self._holes or self._unproven):
            self._say("clean", f"batch {seq} cleared the worker, nothing that was given up before matters any more")
            self._forget_holes()
            self._unproven = False
        return self._settle(now)

    def rejected(self, seq: int, payload: bytes, now: float, why: str) -> list[Action]:
        """Batch ``seq`` could not be applied at all: it counts as lost."""
        self.counts["rejected"] += 1
        self.counts["lost_batches"] += 1
        self._say("rejected", f"batch {seq}: {why}")
        self._holes += 1
        self._holes_end = max(self._holes_end, seq + 1)
        if self._anchor is not None and self._anchor[0] == seq:
            self._anchor = None
        if self._base <= seq < self._next:
            self._memory[seq % len(self._memory)] = _LOST
        if len(self._bad) < 256:
            self._bad[seq] = _fingerprint(payload)
        else:
            self._hopeless = True
        return self._settle(now)

    # ----------------------------------------------------------------------------------------------------------- time

    def tick(self, now: float) -> list[Action]:
        """Do what is due; harmless when nothing is."""
        replay = self._replay
        if not self.is_connected:
            pass
        elif replay is not None:
            if replay.bound is not None and now >= replay.bound:
                self._endless(f"it was not over after {self.policy.replay_deadline:g} s", now)
            elif replay.deadline is not None and now >= replay.deadline:
                self._silence(replay, now)
        elif self._retry is not None:
            if now >= self._retry_at:
                self._continue(self._retry)
        elif self._heal_at is not None and now >= self._heal_at:
            self._heal_at = None
            self._ask(_Purpose.START if not self._known else _Purpose.HEAL if self._verified else _Purpose.VERIFY, 0)
        elif self._probe_at is not None and now >= self._probe_at:
            if now < self._heard_at + self._probe_wait:
                self._probe_at = self._heard_at + self._probe_wait
            else:
                self._probe_at = None
                self._ask(_Purpose.IDLE, max(0, self._next - 1))
        return self._settle(now)

    # ------------------------------------------------------------------------------------------------------- applying

    def _note(self, seq: int, payload: bytes) -> None:
        """This batch is applied: remember it."""
        memory = self._memory
        memory[seq % len(memory)] = _fingerprint(payload)
        if seq - self._base >= len(memory):
            self._base = seq - len(memory) + 1
        self._next = seq + 1
        self.counts["batches"] += 1

    def _apply(self, seq: int, payload: bytes, ts: float | None) -> None:
        self._note(seq, payload)
        if self._waiting and (item := self._waiting.pop(seq, None)) is not None:
            self._waiting_bytes -= len(item.payload)
            self.counts["overlap"] += 1
        if not self._known:
            self._known = True
            self._unproven = False  # seq is 0: whatever comes later has nothing before it that could be missing
        if ts is not None:
            self.last_ts, self._dated = ts, seq
        self._out.append(Ingest(seq, payload, ts, seq != self._guessed or not seq))

    def _recall(self, seq: int) -> int | None:
        """The fingerprint of an applied batch, ``_LOST`` when it was given up, None when it is not remembered."""
        if self._base <= seq < self._next:
            return self._memory[seq % len(self._memory)]
        return self._anchor[1] if self._anchor is not None and self._anchor[0] == seq else None

    def _accept(self, upto: int, why: str) -> None:
        """Give up everything from the next batch to ``upto``, which is not included."""
        at = self._next
        self.counts["gaps_accepted"] += 1
        self.counts["lost_batches"] += upto - at
        self._say("gap_accepted", f"{upto - at} batches from {at} to {upto - 1} are lost: {why}")
        size = len(self._memory)
        last = self._recall(at - 1)
        if last is not None and last != _LOST:
            self._anchor = (at - 1, last)
        for seq in range(max(at, upto - size), upto):
            self._memory[seq % size] = _LOST
        self._base = max(self._base, upto - size)
        self._known = True
        self._next = self._holes_end = upto
        self._holes += 1
        self._hole_at = None

    def _hold(self, seq: int, payload: bytes, ts: float | None) -> None:
        self._seen = max(self._seen, seq)
        if seq in self._waiting:
            self.counts["duplicates"] += 1
        elif (
            len(self._waiting) >= self.policy.max_pending
            or self._waiting_bytes + len(payload) > self.policy.max_pending_bytes
        ) and seq != self._next:
            # The newest goes: the replay that fills the hole it leaves brings it again.
            self.counts["overflow"] += 1
        else:
            self._waiting[seq] = _Waiting(payload, ts)
            self._waiting_bytes += len(payload)
            self._outdated = self._outdated or seq < self._next

    def _drain(self) -> None:
        """Apply what waits and is next."""
        waiting = self._waiting
        while waiting and (item := waiting.pop(self._next, None)) is not None:
            self._waiting_bytes -= len(item.payload)
            self._apply(self._next, item.payload, item.ts)
        if self._outdated:
            # Held while it was not known whose they are, and now known to be applied already. Seldom, for this looks at
            # all that waits, and there may be 10,000.
            self._outdated = False
            for seq in [seq for seq in waiting if seq < self._next]:
                self._waiting_bytes -= len(waiting.pop(seq).payload)
                self.counts["overlap"] += 1
        if self._missing():
            return
        if self._seen >= 0 and not self._mixed:
            self._started = True  # live and applied meet, so nothing before the live batches is missing
            self._meet(self._seen)
        if self._hole_at is not None and self._hole_at < self._next:
            self._hole_at = None
            self.counts["gaps_healed"] += 1
            self._say("gap_healed", f"everything up to {self._next - 1} is applied")
        for replay in (self._replay, self._retry):
            if replay is not None and replay.purpose is _Purpose.GAP and self._hole_at is None:
                self._stop_replay()

    def _meet(self, seq: int) -> None:
        """Everything up to this live batch is applied."""
        if self._open is not None and seq > self._open and not self._mixed:
            self._open = None

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
        self._seen = -1
        self._hole_at = None
        self._tries_at = -1

    # ----------------------------------------------------------------------------------------------------------- gaps

    def _missing(self) -> bool:
        return self._seen >= self._next

    def _look_at_hole(self, now: float) -> None:
        """See to it that somebody is asked for what is missing."""
        if not self._missing() or not self.is_connected:
            return
        if not self._trust_replay:
            self._accept_all("there is no replay to ask")
        elif self._started and (not self.replaying or self._background()):
            self._open_hole()
            self._ask(_Purpose.GAP, max(0, self._next - 1))

    def _background(self) -> bool:
        return self._replay is not None and self._replay.purpose in (_Purpose.IDLE, _Purpose.HEAL)

    def _open_hole(self) -> None:
        if self._hole_at is not None:
            return
        self._hole_at = self._next
        if self._known:
            self.counts["gaps"] += 1
            self._say("gap", f"expected batch {self._next}, got {min(self._waiting, default=self._seen)}")
        else:
            self.counts["heads_cut"] += 1

    def _accept_all(self, why: str) -> None:
        # In one pass: thousands may wait, with a hole in front of each.
        for seq in [*sorted(self._waiting), self._seen + 1]:
            if seq > self._next:
                self._open_hole()
                self._accept(seq, why)
            self._drain()
        self._started = True

    def _backwards(self, seq: int, payload: bytes, ts: float | None, now: float) -> None:
        known = self._recall(seq)
        newer = self._newer(seq, ts)
        if known == _fingerprint(payload):
            self.counts["duplicates"] += 1
            self._meet(seq)
        elif known == _LOST and not newer:
            self.counts["late"] += 1  # what came after it is applied, so its time is over
        elif known is None and not newer and ts is not None and seq < self._base:
            # Older than anything remembered, in number and in time: a copy that comes very late, or a restart under a
            # clock that was set back. Only the publisher can tell.
            if self._may_verify(now):
                self._verified = self._started = False
                self._hold(seq, payload, ts)
                self._ask(_Purpose.VERIFY, 0)
            elif self._trust_replay:
                self.counts["duplicates"] += 1
            else:
                self._start_over(seq, payload, ts, now)
        else:
            self._start_over(seq, payload, ts, now)

    def _start_over(self, seq: int, payload: bytes, ts: float | None, now: float) -> None:
        """This batch is the first that we see of a new process."""
        reached = max(self._next, self._seen + 1)
        self._restarted(f"batch {seq} came after {self._next - 1}")
        self._hold(seq, payload, ts)
        # One connection leads to one process. If two lives come over it, something between mixes them, and what was
        # taken for the old one's last batches may have been the new one's first.
        self._mixed = True
        if self._trust_replay:
            self._ask(_Purpose.START, 0)
        else:
            self._drain()
            self._look_at_hole(now)
            self._started = self._unproven = True
            # And those are forgotten: a clear that comes before them does not make up for that.
            self._holes += 1
            self._holes_end = max(self._holes_end, reached)

    # -------------------------------------------------------------------------------------------------- who is there?

    def _older(self, ts: float | None) -> bool:
        return ts is not None and self.last_ts is not None and ts < self.last_ts - self.policy.clock_step

    def _newer(self, seq: int, ts: float | None) -> bool:
        """Whether a batch that is behind us says a time that is not: no batch of this process does."""
        # What was given up behind the last batch with a time is newer than that one by rights.
        return ts is not None and self.last_ts is not None and ts > self.last_ts and seq <= self._dated

    def _may_verify(self, now: float) -> bool:
        # Rarely, for a publisher with an unsteady clock would otherwise be asked all the time.
        if not self._trust_replay or (self.replaying and not self._background()):
            return False
        if now - self._verified_at < self.policy.idle_probe[1]:
            return False
        self._verified_at = now
        return True

    def _judge(self, seq: int, payload: bytes, ts: float | None) -> None:
        """After a reconnect with no replay to ask: is this the process we knew?"""
        self._recognise(seq, payload)
        if self._recall(seq) == _fingerprint(payload):
            self.counts["duplicates"] += 1
            self._verified = self._started = True
            return
        # A new process can only be ahead of the old one if it had the time to publish as much.
        since = self._lost_at if self._lost_at is not None else self._connected_at
        ahead = seq > self._next and seq < (self._heard_at - since) * self.policy.restart_rate
        # And what was applied before this stream began has to be shown: nobody knows how long ago that was.
        if seq < self._next or ahead or self._older(ts) or self._place is not None:
            self._restarted(f"batch {seq} came after {self._next - 1}, over a new connection")
        else:
            self._verified = self._started = self._unproven = True
            self._guessed = self._next
        self._hold(seq, payload, ts)
        self._drain()
        self._accept_all("no replay can be had")

    def _recognise(self, seq: int, payload: bytes) -> None:
        """If this is the last batch of what was applied before, it is remembered like any other from here on."""
        place = self._place
        if place is not None and seq == place.seq and _xxh3_64(payload, 0) == place.fingerprint:
            self._place = None
            self._base = seq
            self._memory[seq % len(self._memory)] = _fingerprint(payload)
            self.counts["resumed"] += 1
            self._say("resumed", f"batch {seq} is the last of what was there: going on behind it")

    def _compare(self, replay: _Replay, seq: int, payload: bytes, now: float) -> None:
        """A replay brings a batch that is applied, or given up: is it the same?"""
        known = self._recall(seq)
        mine = _fingerprint(payload)
        if self._bad.get(seq) == mine:
            replay.contiguous = False  # the publisher's own copy is as unreadable as ours
        if known == mine:
            replay.matched = True
            self._verified = True
            if seq < self._guessed:
                self._guessed = 0
            if seq == self._next - 1:
                self._drain()
        elif known is None:
            ts = batch_time(payload)
            if self._newer(seq, ts):
                self._not_ours(replay, seq, payload, now, f"batch {seq} is newer than {self._next - 1}")
        elif known != _LOST:
            self._not_ours(replay, seq, payload, now, f"batch {seq} is another one than before")

    def _not_ours(self, replay: _Replay, seq: int, payload: bytes, now: float, why: str) -> None:
        """A replay shows that what is applied is not of the process that answers."""
        if self._too_many_conflicts(now):
            return
        if replay.purpose is _Purpose.VERIFY and replay.frames == 1 and replay.first == seq and replay.start == 0:
            # The first batch of an answer from 0: the worker is rebuilt from this very answer, and what has arrived
            # live since the connection was made is of the same process.
            waiting, size, seen = self._waiting, self._waiting_bytes, self._seen
            self._waiting = {}
            self._restarted(why, keep_replay=True)
            self._waiting, self._waiting_bytes, self._seen = waiting, size, seen
            replay.purpose, replay.expect = _Purpose.START, -1
            self._take(replay, seq, payload, now)
        else:
            self._restarted(why)
            self._ask(_Purpose.START, 0)

    def _too_many_conflicts(self, now: float) -> bool:
        self._conflicts += 1
        if self._conflicts <= self.policy.max_conflicts:
            return False
        self.counts["replay_conflicts"] += 1
        self._say("replay_conflict", "its replay is of another stream, and is not asked again on this connection")
        waiting = sorted(self._waiting.items())
        self._reset("what the replay brought was of another stream")
        self._trust_replay = False
        self._started = self._unproven = True
        for seq, item in waiting:
            self._hold(seq, item.payload, item.ts)
        self._drain()
        self._look_at_hole(now)
        return True

    def _restarted(self, why: str, *, keep_replay: bool = False) -> None:
        self.counts["restarts"] += 1
        self._say("restart", f"{why}: cleared, building again")
        self._reset("the engine has restarted", keep_replay=keep_replay)

    def _reset(self, reason: str, *, keep_replay: bool = False) -> None:
        self._mark("stale", reason)  # before the Clear: nobody may read an exact answer while it is rebuilt
        if not keep_replay:
            self._stop_replay()
        self._out.append(Clear())
        self._drop_waiting()
        self._forget_holes()
        self._known = self._started = self._unproven = self._mixed = False
        self._verified = True
        self._next = self._base = 0
        self._open = self._place = self._anchor = None
        self.last_ts = None

    def _forget_holes(self) -> None:
        self._holes = self._holes_end = self._guessed = 0
        self._bad.clear()
        self._hopeless = False
        self._heal_at = None
        self._heal_wait = self.policy.heal[0]

    # -------------------------------------------------------------------------------------------------------- replays

    def _ask(self, purpose: _Purpose, start: int) -> None:
        if not self.is_connected:
            return
        self._replay, self._retry = _Replay(purpose, start, self._next - 1 if self._known else -1), None
        if purpose is not _Purpose.IDLE:
            self._probe_at, self._probe_wait = None, 0.0
        self.counts["replays_asked"] += 1
        self._out.append(RequestReplay(start))

    def _continue(self, replay: _Replay) -> None:
        """Ask for the rest of an answer, from the last batch that is known, which has to come again."""
        last = self._next - 1
        surveying = replay.purpose in (_Purpose.VERIFY, _Purpose.HEAL)
        replay.again(last if self._known else -1)
        self._replay, self._retry = replay, None
        self.counts["replays_asked"] += 1
        self._out.append(RequestReplay(max(0, min(replay.pos, last) if surveying else last)))

    def _stop_replay(self) -> None:
        if self._replay is not None:
            self._out.append(CancelReplay())
        self._replay = self._retry = None

    def _later(self, replay: _Replay, now: float) -> None:
        first, longest = self.policy.replay_retry
        self._stop_replay()
        self._retry = replay
        self._retry_at = now + self._spread(min(longest, first * 4.0 ** min(max(self._tries - 1, 0), 20)))

    def _tried(self, limit: int) -> bool:
        """One more try at this place has failed: True when it was the last."""
        if self._tries_at != self._next:
            self._tries_at, self._tries = self._next, 0
        self._tries += 1
        if self._tries < limit:
            return False
        self.counts["replays_failed"] += 1
        self._tries_at = -1
        return True

    def _take(self, replay: _Replay, seq: int, payload: bytes, now: float) -> None:
        """A replay brings a batch that is not applied yet."""
        if not self._known and replay.purpose in (_Purpose.START, _Purpose.IDLE):
            # Where it was given up before: somebody answers after all, and has more than this one batch.
            replay.purpose, self._started = _Purpose.START, False
        if seq > self._next:
            if replay.purpose is _Purpose.HEAL:
                return
            # In an answer the order is the publisher's own: what it leaves out it does not have, or its queue was full.
            self._open_hole()
            if not self._tried(self.policy.hole_tries):
                self._later(replay, now)
                return
            self._accept(min(seq, min(self._waiting, default=seq)), "the replay leaves them out")
            self._drain()
        if seq == self._next:
            if replay.purpose is _Purpose.IDLE:
                self.counts["tails_recovered"] += 1
            replay.brought = True
            self._apply(seq, payload, batch_time(payload))
        self._drain()

    def _end(self, replay: _Replay, now: float, *, marked: bool = True) -> None:
        """The answer is complete; without its end marker, as far as anybody can tell."""
        self._stop_replay()
        short = replay.pos < replay.expect
        unlike = not replay.matched and (short or replay.purpose is _Purpose.VERIFY)
        if replay.expect >= 0 and (not replay.frames or unlike):
            # It does not have the last batch that is applied, or nothing at all that is.
            if replay.purpose is not _Purpose.HEAL and not self._too_many_conflicts(now):
                self._restarted(f"the replay does not have batch {replay.expect}")
                self._ask(_Purpose.START, 0)
            return
        if short and replay.purpose is not _Purpose.HEAL:
            # The same process, but its queue was full: the end of the answer is still to be had.
            if self._tried(self.policy.replay_tries):
                self._unanswered(replay, now, final=True)
            else:
                self._later(replay, now)
            return
        self._verified = True
        if marked:
            self._open = self._open if short else None
        elif replay.purpose in (_Purpose.START, _Purpose.VERIFY) or self._unproven:
            self._open = -1
        elif replay.purpose is _Purpose.IDLE and replay.brought:
            self._open = self._seen
        self._drain()
        shown = self._seen if self._hole_at is None else max(self._seen, replay.pos)
        if shown >= self._next:
            # Either the answer is older than what waits, or the publisher does not have it any more.
            self._open_hole()
            if not self._tried(self.policy.hole_tries):
                self._later(replay, now)
                return
            self._accept(min(self._waiting, default=shown + 1), "no replay brings them")
            self._drain()
        self._hole_at = None
        self._started = True
        self._mixed = self._mixed and not marked
        # An answer that matches what came after a guess alone says nothing of what was before.
        self._unproven = self._guessed > 0
        if replay.purpose is _Purpose.HEAL:
            self._healed(replay)
        self._look_at_hole(now)

    def _healed(self, replay: _Replay) -> None:
        """The publisher has shown its history: is it whole?"""
        if not replay.contiguous or replay.pos < max(self._holes_end, self._guessed) - 1:
            self._hopeless = True
        elif self._holes or self._guessed:
            self.counts["rebuilds"] += 1
            self._say("rebuild", "the publisher still has every batch from 0 on: cleared, building again")
            self._reset("building again from the whole history")
            self._ask(_Purpose.START, 0)

    def _silence(self, replay: _Replay, now: float) -> None:
        """A replay has stopped without its end marker."""
        if replay.progress:
            # It may have been cut: a ROUTER drops what its queue does not take, the end marker included.
            self.counts["cut_replays"] += 1
            self._out.append(CancelReplay())
            self._continue(replay)
        elif replay.frames and replay.pos >= replay.expect:
            # Just the batch that is known, and nothing behind it: as an end without its marker looks, and as an answer
            # does that was cut at the same place again. It is not asked for ever, nor believed.
            self.counts["missing_end_markers"] += 1
            self._end(replay, now, marked=False)
        else:
            self._unanswered(replay, now)

    def _endless(self, why: str, now: float) -> None:
        self.counts["endless_replays"] += 1
        self._say("replay_endless", why)
        if self._replay is not None:
            self._unanswered(self._replay, now)

    def _unanswered(self, replay: _Replay, now: float, *, final: bool = False) -> None:
        """A replay has brought nothing that helps."""
        self.counts["replays_unanswered"] += 1
        if replay.purpose is _Purpose.HEAL or (replay.purpose is _Purpose.IDLE and self._hole_at is None):
            self._stop_replay()
        elif not final and not self._tried(self.policy.replay_tries):
            self._later(replay, now)
        else:
            self._stop_replay()
            self._say("replay_failed", f"no useful answer in {self.policy.replay_tries} tries")
            if not self._verified:
                # Whether the process is the old one is for the live batches to show.
                waiting, seen = sorted(self._waiting.items()), self._seen
                self._drop_waiting()
                for seq, item in waiting:
                    if not self._verified:
                        self._judge(seq, item.payload, item.ts)
                    elif seq >= self._next:
                        self._hold(seq, item.payload, item.ts)
                self._seen = max(self._seen, seen)  # what did not fit is missing all the same
            else:
                self._unproven = self._unproven or replay.purpose in (_Purpose.START, _Purpose.VERIFY)
                if self._hole_at is not None and not self._missing():
                    # Only a replay has shown that there is more, and it can not be had any more.
                    self._accept(replay.pos + 1, "no replay brings them")
                self._started = True
            if self._missing():
                self._accept_all("no replay answers")

    # ---------------------------------------------------------------------------------------------------------- waits

    def _plan_heal(self, now: float) -> None:
        if self._trust_replay and self._heal_at is None:
            self._heal_at = now + self._spread(self._heal_wait)
            self._heal_wait = min(self._heal_wait * 2.0, self.policy.heal[1])

    def _plan_probe(self, now: float) -> None:
        """Keep a silent stream asking whether it has missed the end: soon at first, then ever more rarely."""
        if self._probe_at is None and self._trust_replay and self._verified and self._started and not self.replaying:
            first, longest = self.policy.idle_probe
            self._probe_wait = min(longest, self._probe_wait * 2.0) if self._probe_wait else first
            self._probe_at = now + self._spread(self._probe_wait)

    def _spread(self, wait: float) -> float:
        return wait * (1.0 + self.policy.jitter * self._uniform())

    # -------------------------------------------------------------------------------------------------------- verdict

    def _judgement(self) -> tuple[Verdict, str]:
        if not self.is_connected:
            return "stale", self._why_lost
        if self._behind:
            return "stale", "it sends more than its limit allows"
        if not self._verified:
            asking = "asking" if self.replaying else "nothing has shown yet"
            return "stale", f"{asking} whether this is still the process it was"
        if not self._started:
            return "stale", "replaying"
        if self._missing() or self._hole_at is not None:
            return "stale", f"batch {self._next} is missing"
        if self._holes:
            return "degraded", f"{self._holes} hole(s) in the stream had to be accepted"
        if self._unproven:
            return "degraded", "no replay has shown what was before"
        if self._open is not None:
            return "degraded", f"a replay stopped without its end marker, there may be more than {self.last_seq}"
        return "exact", ""

    def _mark(self, verdict: Verdict, reason: str) -> None:
        self.verdict, self.reason = verdict, reason
        if verdict != self._marked:
            self._marked = verdict
            self._out.append(Mark(verdict, reason))

    def _say(self, kind: str, detail: str) -> None:
        self._out.append(Incident(kind, detail))

    def _settle(self, now: float) -> list[Action]:
        if self.is_connected:
            self._plan_probe(now)
            # That a history can not be had any more is no reason not to ask who is there.
            wanting = (self._holes or self._unproven) and not self._hopeless
            if (wanting or not self._verified) and not self.replaying:
                self._plan_heal(now)
        self._mark(*self._judgement())
        whole = self._hole_at is None and not self._missing()
        well = self._known and self._verified and self._started and self._open is None
        self._steady = self.is_connected and well and whole
        out, self._out = self._out, []
        return out

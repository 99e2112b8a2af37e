"""One worker's stream as a pure state machine: messages and times in, actions out.

The machine decides which batches are applied, in which order, and how far the result can be trusted. It has no socket,
no clock and no thread: every method takes ``now`` (seconds of any steady clock) and returns a list of actions, which
the caller carries out in order. Every path can therefore be tested in microseconds, and the thread around it only moves
bytes.

Guarantees:

* A batch is applied at most once, and in the order of sequence numbers, even if batches arrive twice, late or out of
  order.
* The state is ``exact`` only when every batch since a clean start of the process behind the connection was applied. A
  batch that was given up makes it ``degraded``; a batch that may be missing at the moment makes it ``stale``.
* An answer proves only its own batches. A replay endpoint that has other bytes than the publisher under one number, or
  ends before a published batch, belongs to another process. An empty answer proves nothing. An answer that no published
* Nothing grows without bound: waiting batches are limited in number and bytes, tries in number, replays in time.

To find out whether a connection leads to the same process as before, the machine keeps fingerprints of the last applied
batches, requests a replay from 0 and compares. Equal bytes under an equal sequence number mean the same process: a
batch contains its time, so another process has other bytes. Other bytes, a newer time under an old number, and an
answer that ends before the last applied number or starts after it mean another process: the worker is cleared and
rebuilt.

Parts: :mod:`.actions` and :mod:`.policy`, :mod:`.history` (applied batches), :mod:`.losses` (batches that were given
up), :mod:`.pending` (batches that wait), :mod:`.replay` (a question, its tries, and the patience with its answer),
:mod:`.trust` (the worth of answers), :mod:`.waits` (the times of its own questions).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from .._core import _xxh3_64, peek_batch
from ..answers import StreamPlace
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
from .frames import batch_time
from .history import LOST, History, fingerprint
from .losses import Losses
from .pending import Pending
from .policy import StreamPolicy
from .reasons import Reason
from .replay import Patience, Purpose, Question, Tries
from .trust import Trust
from .waits import Waits

__all__ = ["WorkerStream"]


class WorkerStream:
    """The stream of one (pod, rank). Belongs to one thread.

    ``replay``: whether the publisher has a replay endpoint. ``endpoint`` and ``replay_endpoint`` are the addresses in
    reasons. ``uniform`` returns numbers in [0, 1), for jitter. ``place`` is the last batch that an earlier stream has
    applied: if this stream contains it, the worker continues behind it; otherwise the worker is cleared.

    Feed it by :meth:`connected`, :meth:`disconnected`, :meth:`live`, :meth:`replay_sent`, :meth:`replay_reached`,
    :meth:`replayed`, :meth:`replay_refused`, :meth:`replay_ended`, :meth:`replay_lost`, :meth:`suspect`,
    :meth:`distrust` and :meth:`tick`. After an :class:`Ingest`, call :meth:`cleared` or :meth:`rejected` if that is
    the outcome. :meth:`deadline` is the time of the next tick. ``counts`` has every counter by name; ``state`` and
    ``reason`` are those of the last :class:`Mark`. A call is O(1), plus the batches that it applies.
    """

    __slots__ = (
        "_attempts", "_behind", "_blame", "_connected_at", "_history", "_hole_at", "_known", "_losses", "_lost_at",
        "_marked", "_mixed", "_open", "_out", "_patience", "_pending", "_place", "_replay", "_retry", "_retry_at",
        "_silent_at", "_started", "_steady", "_tries", "_trust", "_verified", "_verified_at", "_waits", "_why_lost",
        "counts", "is_connected", "mark", "policy",
    )  # fmt: skip

    def __init__(
        self,
        *,
        replay: bool,
        policy: StreamPolicy | None = None,
        uniform: Callable[[], float] = random.random,
        place: StreamPlace | None = None,
        endpoint: str = "its endpoint",
        replay_endpoint: str = "its replay endpoint",
    ) -> None:
        self.policy = policy or StreamPolicy()
        self.counts: Counter[str] = Counter()
        self.is_connected = False
        self.mark = Mark("stale", Reason.NOT_CONNECTED.text())
        self._out: list[Action] = []
        self._marked: Verdict | None = None
        self._steady = False  # the next batch can be applied without further checks
        # Batches: applied, given up, waiting.
        self._known = False  # batches of a process are applied or given up
        self._history = History(self.policy.memory)
        self._losses = Losses()
        self._pending = Pending(self.policy.max_pending, self.policy.max_pending_bytes)
        self._hole_at: int | None = None  # the start of a hole that is neither filled nor given up
        self._behind = False  # messages have arrived that may not be taken yet
        # The connection.
        self._connected_at = 0.0
        self._lost_at: float | None = None
        self._why_lost = self.mark.reason
        self._attempts = 0
        self._verified = False  # the applied batches are of the process behind this connection
        self._verified_at = float("-inf")  # the time of the last verification that no loss had caused
        self._started = False  # everything up to the first live batch is applied as well
        self._mixed = False  # this connection has brought batches of more than one process
        self._blame = ""  # the caller's objection to this connection
        # Questions and answers.
        self._trust = Trust(replay, endpoint, replay_endpoint)
        self._replay: Question | None = None
        self._retry: Question | None = None
        self._retry_at = 0.0
        self._tries = Tries()
        self._patience = Patience(self.policy)
        self._waits = Waits(self.policy, uniform)
        self._silent_at: float | None = None  # when silence counts as much as a batch
        # An answer has stopped without its end marker. There may be more of it, until another answer has its end marker
        # or a later live batch is applied.
        self._open: int | None = None
        # The last batch that was applied before this stream began, until it is recognised.
        self._place = place
        if place is not None:
            self._known = True
            self._history.place(place.seq, place.ts)
            if not place.whole:
                self._losses.accept(place.seq + 1)

    # ------------------------------------------------------------------------------------------------------ questions

    @property
    def state(self) -> Verdict:
        """State of the last :class:`Mark`."""
        return self.mark.state

    @property
    def reason(self) -> str:
        """The reason of the state, as text."""
        return self.mark.reason

    @property
    def last_ts(self) -> float | None:
        """Time of the last applied batch with a time."""
        return self._history.ts

    @property
    def last_seq(self) -> int | None:
        """The last sequence number that was applied or given up; None before the first."""
        return self._history.next - 1 if self._history.next else None

    @property
    def waiting(self) -> int:
        """Batches that wait for a hole to be filled."""
        return len(self._pending)

    @property
    def replaying(self) -> bool:
        """Whether a replay is running, or will be requested again."""
        return self._replay is not None or self._retry is not None

    def deadline(self) -> float | None:
        """When :meth:`tick` is due; None if no time is planned."""
        if not self.is_connected:
            return None
        if self._replay is not None:
            due = (self._replay.deadline, self._replay.bound)
        elif self._retry is not None:
            due = (self._retry_at, None)
        else:
            due = (self._waits.heal_at, self._waits.probe_at)
        return min((at for at in (*due, self._silent_at, self._waits.renew_at) if at is not None), default=None)

    # ----------------------------------------------------------------------------------------------------- connection

    def connected(self, now: float) -> list[Action]:
        """The subscription is connected: later live messages are of the process behind this connection."""
        if self.is_connected:
            return []
        if self._lost_at is not None:
            self.counts["reconnects"] += 1
            self._say("connected", f"again after {now - self._lost_at:.1f} s")
        elif self._attempts:
            self._say("connected", f"at attempt {self._attempts + 1}")
        self.is_connected = True
        self._connected_at = now
        # The limit outlives the connection: until then, messages may have arrived that were not taken.
        self._waits.heard_at = max(now, self._waits.held_up_until)
        self._mixed = self._behind = False
        self._open = None
        self._blame = ""
        self._trust.connected()
        self._history.connected()
        self._patience.calm()
        self._stop_replay()
        # Waiting batches came over the earlier connection. A replay brings them again, and only it can place them.
        self._drop_waiting()
        self._verified = not self._known
        if self._trust.asks:
            self._started = False
            # A snapshot may contain most of the history: then its last batch is enough.
            start = 0 if self._place is None else self._place.seq
            self._ask(Purpose.VERIFY if self._known else Purpose.START, start)
        elif not self._known:
            self._started = self._losses.unproven = True
        return self._settle(now)

    def disconnected(self, now: float, why: str = "the connection was lost") -> list[Action]:
        """The connection is lost, or could not be made."""
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
        self._out.append(Reconnect(self._waits.spread(delay)))
        return self._settle(now)

    # ------------------------------------------------------------------------------------------------------- messages

    def follows(self, seq: int, payload: bytes, now: float) -> float | None:
        """The fast path of :meth:`live`: returns the time of a batch that continues a healthy stream, and the caller
        applies it. Returns None for any other batch, without any change. No deadline changes."""
        history = self._history
        if not self._steady or seq != history.next:
            return None
        ts: float | None = peek_batch(payload, False)[0]
        last = history.ts
        if ts is None or (last is not None and ts < last - self.policy.clock_step):
            return None
        self._waits.heard_at = now
        history.note(seq, payload, ts, True)
        self.counts["batches"] += 1
        return ts

    def live(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A published message has arrived."""
        if (time := self.follows(seq, payload, now)) is not None:
            return [Ingest(seq, payload, time)]
        ts = batch_time(payload)
        self._waits.heard(now)
        self._trust.unheard, self._trust.tails = False, 0
        if self._known and seq > self._history.next + self.policy.seq_jump:
            self.counts["bad_seq_jump"] += 1
            return self.suspect(now)
        if self._known and not self._verified:
            if self.replaying:
                self._hold(seq, payload, ts)
            else:
                self._judge(seq, payload, ts)
        elif seq < self._history.next:
            self._backwards(seq, payload, ts, now)
        elif seq == self._history.next and self._older(ts) and self._may_verify(now):
            # An engine that has restarted and is at this very number looks like a clock that was set back.
            self.counts["clock_steps"] += 1
            self._verified = self._started = False
            self._hold(seq, payload, ts)
            self._ask(Purpose.VERIFY, 0)
        else:
            self._hold(seq, payload, ts)
            self._drain()
            self._look_at_hole(now)
        return self._settle(now)

    def replay_sent(self, now: float) -> None:
        """The request of the last :class:`RequestReplay` is sent; its timeout starts here."""
        if self._replay is not None and self._replay.sent_at is None:
            self._replay.sent(max(now, self._waits.held_up_until), self.policy)

    def replay_reached(self, now: float) -> None:
        """The publisher's socket has accepted the request. The answer may be late, but it comes."""
        self._trust.unreached = False
        if self._replay is not None and not self._replay.reached:
            self._replay.reached = True
            # Batches that were published while the request waited for its connection are in the answer as well.
            self._replay.shown = self._shown()
            self._replay.expires = max(now, self._waits.held_up_until) + self._waits.spread(self._patience.late)

    def replay_lost(self, now: float) -> list[Action]:
        """The connection of the request is lost, and with it the rest of the answer."""
        if self._replay is not None:
            self._silence(self._replay, now)
        return self._settle(now)

    def replay_refused(self, now: float, why: str) -> list[Action]:
        """Note that a reply belongs to another stream and is ignored; ``why`` is the reason."""
        replay = self._replay
        if replay is not None:
            replay.heard(now, self._patience.pause, self.policy)
            replay.refused += 1
            self._trust.refusal = why
        return []

    def replay_foreign(self, now: float, why: str) -> list[Action]:
        """Note that replays have brought another stream than the published one; ``why`` is the reason."""
        if self._trust.asks and self._history.next and not self._trust.agrees:
            self._trust.conflicts += 1
            self._disown(why)
        return self._settle(now)

    def start_anew(self, now: float, why: str) -> list[Action]:
        """The batches were applied wrongly: clear the worker, and request all of them again."""
        self.counts["rebuilds"] += 1
        self._say("rebuild", f"{why}: cleared, rebuilding")
        reached = self._history.next
        self._reset(why)
        if self._trust.asks:
            self._ask(Purpose.START, 0)
        else:
            self._started = self._losses.unproven = True
            self._accept(reached, self._why_unasked())
        return self._settle(now)

    def distrust(self, now: float, why: str) -> list[Action]:
        """Note that not all messages of this connection are this worker's; ``why`` is valid
        until the next connection."""
        if why and not self._blame:
            self._say("distrusted", why)
        self._blame = why
        return self._settle(now)

    def continues(self, seq: int, payload: bytes, now: float) -> float | None:
        """The fast path of :meth:`replayed`, as :meth:`follows` is of :meth:`live`: returns the time of the next batch
        of a history, before the first live batch. Deadlines only become later."""
        replay, history = self._replay, self._history
        if (
            replay is None or replay.purpose is not Purpose.START or not replay.frames or seq != history.next
            or seq != replay.pos + 1 or not self._known or not self._verified or self._pending.seen >= 0
            or self._hole_at is not None or self._losses.guessed or self._trust.witness is not None
        ):  # fmt: skip
            return None
        ts: float | None = peek_batch(payload, False)[0]
        if ts is None:
            return None
        replay.heard(now, self._patience.pause, self.policy)
        replay.frames += 1
        replay.pos = seq
        replay.progress = True
        self._bring(replay, seq, payload)
        history.note(seq, payload, ts, False)
        self.counts["batches"] += 1
        return ts

    def _bring(self, replay: Question, seq: int, payload: bytes) -> None:
        """Note an applied batch that an answer has brought."""
        replay.brought = True
        self._trust.brought, self._trust.brought_mark = seq, fingerprint(payload)

    def replayed(self, seq: int, payload: bytes, now: float) -> list[Action]:
        """A batch of the running replay has arrived."""
        if (time := self.continues(seq, payload, now)) is not None:
            return [Ingest(seq, payload, time)]
        replay = self._replay
        if replay is None:
            self.counts["late_replay"] += 1
            return []
        self._recognise(seq, payload)
        replay.heard(now, self._patience.pause, self.policy)
        self._trust.answered()
        replay.frames += 1
        if replay.first is None:
            replay.first = seq
        if seq <= replay.pos:
            replay.surplus += 1
        elif seq == replay.pos + 1 or replay.purpose is not Purpose.HEAL or replay.pos == replay.jump:
            replay.contiguous = replay.contiguous and seq == replay.pos + 1
            replay.pos = seq
            replay.progress = True
        else:
            # Left out by the publisher, or dropped by its full queue: a second answer shows which.
            replay.jump = replay.pos
            self._later(replay, now)
            return self._settle(now)
        if seq < self._history.next:
            self.counts["overlap"] += 1
            self._compare(replay, seq, payload, now)
        elif not self._verified and not replay.matched:
            why = f"the replay goes on at {seq}, which does not continue {self._history.next - 1}"
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
        elif replay.frames >= self.policy.replay_confirm and replay.progress:
            self.counts["long_replays"] += 1
            self._continue(replay)
        else:
            self._end(replay, now)
        return self._settle(now)

    def suspect(self, now: float) -> list[Action]:
        """A message of this connection was unreadable: check whether the applied batches are the published ones."""
        self._plan_heal(now)
        return self._settle(now)

    def abandon(self, reason: str) -> None:
        """Set the last state: the caller no longer feeds this stream."""
        self.mark = Mark("stale", reason)

    # --------------------------------------------------------------------------------------------------- rate limits

    def hold_up(self, now: float, until: float) -> None:
        """No message of this stream is taken before ``until``, by our own choice: timeouts are extended, and the
        publisher does not count as silent."""
        self.counts["throttled"] += 1
        more = until - max(now, self._waits.held_up_until)
        if more <= 0.0:
            return
        self._waits.held_up_until = until
        self._waits.heard_at = max(self._waits.heard_at, until)
        if self._replay is not None:
            self._replay.hold_up(more)

    def behind(self, now: float, why: str) -> list[Action]:
        """Note that messages have arrived that may not be taken yet; ``why`` is the reason. An
        empty ``why`` ends this."""
        if bool(why) == self._behind:
            return []
        self._behind = bool(why)
        if why:
            self._say("throttled", why)
        return self._settle(now)

    def overlooked(self, seq: int, now: float) -> list[Action]:
        """Batch ``seq`` has arrived and was dropped, because the backlog was full. Earlier batches that were kept have
        been handed in."""
        if seq > self._history.next + self.policy.seq_jump:
            return self.suspect(now)
        self._pending.seen = max(self._pending.seen, seq)
        if self._verified:
            self._look_at_hole(now)
        return self._settle(now)

    # ---------------------------------------------------------------------------------------- outcomes of an Ingest

    def cleared(self, seq: int, now: float) -> list[Action]:
        """Batch ``seq`` has cleared the whole worker: earlier losses no longer matter."""
        if seq >= self._losses.end - 1 and (self._losses.count or self._losses.unproven):
            self._say("clean", f"batch {seq} cleared the worker, so earlier losses no longer matter")
            self._forget_holes()
            self._losses.unproven = False
        if self._history.came_live(seq):
            self._trust.brought = -1  # batches that only answers have shown were before it
        return self._settle(now)

    def rejected(self, seq: int, payload: bytes, now: float, why: str) -> list[Action]:
        """Batch ``seq`` could not be applied, and counts as lost."""
        self.counts["rejected"] += 1
        self.counts["lost_batches"] += 1
        self._say("rejected", f"batch {seq}: {why}")
        self._losses.reject(seq, payload)
        self._history.spoil(seq)
        return self._settle(now)

    # ----------------------------------------------------------------------------------------------------------- time

    def tick(self, now: float) -> list[Action]:
        """Carry out the actions that are due, if there are any."""
        replay = self._replay
        if not self.is_connected:
            pass
        elif self._waits.renew_at is not None and now >= self._waits.renew_at:
            self._waits.renew_at = None
            self._out.append(Renew("closed here, since another connection may be of more use"))
        elif replay is not None:
            if replay.bound is not None and now >= replay.bound:
                self._endless(f"it was not over after {self.policy.replay_deadline:g} s", now)
            elif replay.deadline is not None and now >= replay.deadline:
                if replay.reached and not replay.frames and not replay.refused:
                    self._late(replay, now)
                else:
                    self._silence(replay, now)
        elif self._retry is not None:
            if now >= self._retry_at:
                self._continue(self._retry)
        elif self._waits.heal_at is not None and now >= self._waits.heal_at:
            self._waits.heal_at = None
            if not self._trust.asks:
                self._ask(Purpose.AGREE, self._history.next - 1)
            else:
                self._ask(Purpose.START if not self._known else Purpose.HEAL if self._verified else Purpose.VERIFY, 0)
        elif self._waits.probe_at is not None and now >= self._waits.probe_at:
            if now < self._waits.heard_at + self._waits.probe_wait and not (
                self._trust.unconfirmed and self._shown() >= 0
            ):
                self._waits.probe_at = self._waits.heard_at + self._waits.probe_wait
            else:
                self._waits.probe_at = None
                # A stream that is never silent would not notice that its replays are another process's.
                self._trust.unconfirmed = self._trust.unconfirmed and self._shown() < 0
                self._ask(Purpose.IDLE, self._witness())
        return self._settle(now)

    # ------------------------------------------------------------------------------------------------------- applying

    def _apply(self, seq: int, payload: bytes, ts: float | None, *, live: bool) -> None:
        self._history.note(seq, payload, ts, live)
        self.counts["batches"] += 1
        if not self._known:
            self._known = True
            self._losses.unproven = False  # seq is 0, so no batch before it can be missing
        self._out.append(Ingest(seq, payload, ts, seq != self._losses.guessed or not seq))

    def _accept(self, upto: int, why: str) -> None:
        """Give up the batches from the next one to ``upto``, exclusive."""
        at = self._history.next
        self.counts["gaps_accepted"] += 1
        self.counts["lost_batches"] += upto - at
        self._say("gap_accepted", f"{upto - at} batches from {at} to {upto - 1} are lost: {why}")
        self._history.lose(upto)
        self._known = True
        self._losses.accept(upto)
        self._hole_at = None

    def _hold(self, seq: int, payload: bytes, ts: float | None) -> None:
        if why := self._pending.hold(seq, payload, ts, self._history.next):
            self.counts[why] += 1

    def _drain(self) -> None:
        """Apply waiting batches as long as one is the next."""
        while len(self._pending) and (item := self._pending.pop(self._history.next)) is not None:
            self._apply(self._history.next, item.payload, item.ts, live=True)
        for seq, item in self._pending.outdated(self._history.next):
            self.counts["overlap"] += 1
            self._met(seq, item.payload, item.ts)
        if self._missing():
            return
        if self._pending.seen >= 0 and not self._mixed:
            self._started = True  # applied batches reach the live ones, so none is missing between them
            self._meet(self._pending.seen)
        if self._hole_at is not None and self._hole_at < self._history.next:
            self._hole_at = None
            self.counts["gaps_healed"] += 1
            self._say("gap_healed", f"everything up to {self._history.next - 1} is applied")
        for replay in (self._replay, self._retry):
            if replay is not None and replay.purpose is Purpose.GAP and self._hole_at is None:
                self._stop_replay()

    def _met(self, seq: int, payload: bytes, ts: float | None) -> None:
        """A live batch was applied already: compare it with the replayed one of its number."""
        if not self._history.came_by_replay(seq):
            return
        if self._history.recall(seq) == fingerprint(payload):
            self._history.confirm(seq)
            self._agree()
        elif self._history.is_older_than(seq, ts):
            self._trust.contradiction = seq
        elif ts is not None:  # without a time, it is damaged
            self._trust.suspect(seq)

    def _meet(self, seq: int) -> None:
        """All batches up to this live one are applied."""
        if self._open is not None and seq > self._open and not self._mixed:
            self._open = None
            self._patience.calm()

    def _why_unasked(self) -> str:
        return f"{self._trust.replay_endpoint} is not asked" if self._trust.has else "there is no replay endpoint"

    def _drop_waiting(self) -> None:
        self._pending.clear()
        self._hole_at = None
        self._tries.reset()

    # ----------------------------------------------------------------------------------------------------------- gaps

    def _shown(self) -> int:
        """The last batch that was published over this connection; -1 before the first."""
        return max(self._pending.seen, self._history.lived)

    def _missing(self) -> bool:
        return self._pending.seen >= self._history.next

    def _look_at_hole(self, now: float) -> None:
        """Request missing batches, if there is a replay endpoint; otherwise give them up."""
        if not self._missing() or not self.is_connected:
            return
        if not self._trust.asks:
            self._accept_all(self._why_unasked())
        elif self._started and (not self.replaying or self._background()):
            self._open_hole()
            self._tries.reset()  # earlier tries were probes of a silent stream
            if self._replay is not None and self._replay.purpose is Purpose.IDLE:
                # Its answer contains the missing batches. A second request would cost the publisher the same again.
                self._replay.purpose = Purpose.GAP
            else:
                self._ask(Purpose.GAP, self._witness())

    def _background(self) -> bool:
        return all(each is None or each.background for each in (self._replay, self._retry))

    def _open_hole(self) -> None:
        if self._hole_at is not None:
            return
        self._hole_at = self._history.next
        if self._known:
            self.counts["gaps"] += 1
            self._say("gap", f"expected batch {self._history.next}, got {self._pending.lowest(self._pending.seen)}")
        else:
            self.counts["heads_cut"] += 1

    def _accept_all(self, why: str) -> None:
        # In one pass: thousands of batches may wait, with a hole in front of each.
        for seq in [*(seq for seq, _ in self._pending.items()), self._pending.seen + 1]:
            if seq > self._history.next:
                self._open_hole()
                self._accept(seq, why)
            self._drain()
        self._started = True

    def _backwards(self, seq: int, payload: bytes, ts: float | None, now: float) -> None:
        known = self._history.recall(seq)
        newer = self._history.is_older_than(seq, ts)
        if known == fingerprint(payload):
            self.counts["duplicates"] += 1
            self._met(seq, payload, ts)
            self._meet(seq)
        elif known == LOST and not newer:
            self.counts["late"] += 1  # later batches are applied, so it is too late for this one
        elif known is None and not newer and ts is not None and seq < self._history.base:
            # Older than every remembered batch, in number and in time: a very late copy, or a restart with a clock that
            # was set back. Only the publisher's replay distinguishes them. If all applied batches are of a replay, that
            # may be another process's, which would confirm itself.
            if self._trust.is_hearsay:
                self._trust.suspect(seq)
            if self._may_verify(now):
                self._verified = self._started = False
                self._hold(seq, payload, ts)
                self._ask(Purpose.VERIFY, 0)
            elif self._trust.asks:
                self.counts["duplicates"] += 1
            else:
                self._start_over(seq, payload, ts, now)
        else:
            self._start_over(seq, payload, ts, now)

    def _start_over(self, seq: int, payload: bytes, ts: float | None, now: float) -> None:
        """This batch is the first known one of a new process."""
        reached = max(self._history.next, self._pending.seen + 1)
        self._restarted(f"batch {seq} came after {self._history.next - 1}")
        self._hold(seq, payload, ts)
        # One connection leads to one process. If it brings two, something in between mixes them, and the last batches
        # of the old process may have been the first ones of the new.
        self._mixed = True
        if self._trust.asks:
            self._ask(Purpose.START, 0)
        else:
            self._drain()
            self._look_at_hole(now)
            self._started = self._losses.unproven = True
            # Those batches are dropped, and a clear that comes before them does not make up for that.
            self._losses.count += 1
            self._losses.end = max(self._losses.end, reached)

    # ---------------------------------------------------------------------------------------- identity of the process

    def _older(self, ts: float | None) -> bool:
        last = self._history.ts
        return ts is not None and last is not None and ts < last - self.policy.clock_step

    def _may_verify(self, now: float) -> bool:
        # Rarely: otherwise a publisher with an unsteady clock would be asked all the time.
        if not self._trust.asks or (self.replaying and not self._background()):
            return False
        if now - self._verified_at < self.policy.idle_probe[1]:
            return False
        self._verified_at = now
        return True

    def _judge(self, seq: int, payload: bytes, ts: float | None) -> None:
        """After a reconnect without replays: is this the same process as before?"""
        self._recognise(seq, payload)
        if self._history.recall(seq) == fingerprint(payload):
            self.counts["duplicates"] += 1
            self._verified = self._started = True
            return
        # A new process can be ahead of the old one only if there was time to publish as many batches.
        since = self._lost_at if self._lost_at is not None else self._connected_at
        ahead = seq > self._history.next and seq < (self._waits.heard_at - since) * self.policy.restart_rate
        # Batches from before this stream began have to be shown: their age is unknown.
        if seq < self._history.next or ahead or self._older(ts) or self._place is not None:
            self._restarted(f"batch {seq} came after {self._history.next - 1}, over a new connection")
        else:
            self._verified = self._started = self._losses.unproven = True
            self._losses.guessed = self._history.next
        self._hold(seq, payload, ts)
        self._drain()
        self._accept_all("no replay can be had")

    def _recognise(self, seq: int, payload: bytes) -> None:
        """Remember the last batch of the earlier stream like any other, if this is it."""
        place = self._place
        if place is not None and seq == place.seq and _xxh3_64(payload, 0) == place.fingerprint:
            self._place = None
            self._history.restore(seq, payload)
            self.counts["resumed"] += 1
            self._say("resumed", f"batch {seq} is the last one of the earlier stream: continuing behind it")

    def _compare(self, replay: Question, seq: int, payload: bytes, now: float) -> None:
        """A replay brings a batch that is applied, or given up: compare the two."""
        known = self._trust.brought_mark if seq == self._trust.brought else self._history.recall(seq)
        mine = fingerprint(payload)
        waiting = self._pending.get(seq)
        if waiting is not None and waiting.ts is not None and batch_time(payload) is not None:
            # It came live and is older than the remembered ones: only this answer can be compared with it.
            if waiting.payload == payload:
                self._agree()
            elif not self._trust.agrees and known in (None, mine):
                self._disagree(seq)
                return
        if self._losses.rejected(seq, mine):
            replay.contiguous = False  # the publisher's own copy is unreadable as well
        if known == mine:
            replay.matched = True
            self._verified = True
            if seq < self._losses.guessed:
                self._losses.guessed = 0
            if self._history.came_live(seq):
                self._agree()
            if seq == self._history.next - 1:
                self._drain()
        elif replay.purpose is Purpose.AGREE:
            pass
        elif self._history.came_live(seq) and not self._trust.agrees and batch_time(payload) is not None:
            self._disagree(seq)
        elif known is None:
            ts = batch_time(payload)
            if self._history.is_older_than(seq, ts):
                self._not_ours(replay, seq, payload, now, f"batch {seq} is newer than {self._history.next - 1}")
        elif known != LOST:
            self._not_ours(replay, seq, payload, now, f"batch {seq} is another one than before")

    def _not_ours(self, replay: Question, seq: int, payload: bytes, now: float, why: str) -> None:
        """A replay shows that the applied batches are not of the process that answers."""
        if self._too_many_conflicts(now):
            return
        if replay.purpose is Purpose.VERIFY and replay.frames == 1 and replay.first == seq and replay.start == 0:
            # The first batch of an answer from 0: the worker is rebuilt from this answer, and the live batches since
            # the connection was made are of the same process.
            with self._keeping():
                self._restarted(why, keep_replay=True, against=seq)
            replay.purpose, replay.expect = Purpose.START, -1
            self._take(replay, seq, payload, now)
        else:
            self._replaced(replay, why, seq)

    def _too_many_conflicts(self, now: float) -> bool:
        self._trust.conflicts += 1
        if self._trust.conflicts <= self.policy.max_conflicts:
            return False
        self._disown(self._trust.say(Reason.CHANGES))
        return True

    def _agree(self) -> None:
        """A batch has come both live and in an answer: the replay endpoint is the publisher's."""
        self._trust.agrees = True
        self._trust.doubt = ""
        if self._trust.foreign:
            self._say("replay_agrees", f"{self._trust.replay_endpoint} gives what {self._trust.endpoint} publishes")
            self._trust.foreign = ""
            if not self._trust.asks:
                self._trust.asks, self._waits.heal_at, self._waits.heal_wait = True, None, self.policy.heal[0]

    def _disagree(self, seq: int) -> None:
        """An answer is of another process than the publisher."""
        self._trust.conflicts += 1
        self._disown(self._trust.say(Reason.OTHER_BATCH, seq=seq))

    def _disown(self, why: str) -> None:
        """Drop the batches that replays have brought, and do not trust replays until they agree."""
        self.counts["replay_conflicts"] += 1
        self._say("replay_conflict", why)
        waiting, seen = self._pending.items(), self._pending.seen
        self._reset(Reason.DISOWNED.text())
        self._trust.foreign = why
        self._trust.asks = False
        self._started = self._losses.unproven = True
        for seq, item in waiting:
            self._hold(seq, item.payload, item.ts)
        self._pending.seen = seen  # batches that did not fit are missing all the same
        self._drain()
        if self._missing():
            self._accept_all(self._why_unasked())

    def _restarted(self, why: str, *, keep_replay: bool = False, against: int | None = None) -> None:
        """Another process answers; ``against`` is a batch with other bytes there, or None."""
        # A batch of an earlier connection may be of an earlier process, unless later ones have come live since.
        history = self._history
        if self._shown() < 0 or (against is not None and not history.is_of_connection(against) and history.lived < 0):
            against = None
        lived, last = history.lived, history.recall(history.lived)
        self.counts["restarts"] += 1
        self._say("restart", f"{why}: cleared, rebuilding")
        self._reset(Reason.RESTARTED.text(), keep_replay=keep_replay)
        if against is not None:  # the batches of this connection are of more than one process
            self._trust.suspect(against)
            if last is not None and last != LOST:
                self._trust.witness = lived, last

    def _replaced(self, replay: Question, why: str, against: int) -> None:
        with self._keeping() if replay.purpose is Purpose.VERIFY else nullcontext():
            self._restarted(why, against=against)
        self._ask(Purpose.START, 0)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep waiting batches: they arrived over this connection, and are of the process that answers."""
        kept = self._pending
        self._pending = Pending(self.policy.max_pending, self.policy.max_pending_bytes)
        yield
        self._pending = kept

    def _reset(self, reason: str, *, keep_replay: bool = False) -> None:
        self._mark(Mark("stale", reason))  # before the Clear: no answer may be exact while the worker is rebuilt
        if not keep_replay:
            self._stop_replay()
        self._out.append(Clear())
        self._drop_waiting()
        self._forget_holes()
        self._known = self._started = self._losses.unproven = self._mixed = False
        self._verified = True
        self._history.forget()
        self._trust.forget()
        self._open = self._place = None

    def _forget_holes(self) -> None:
        self._losses.forget()
        self._waits.well()

    # -------------------------------------------------------------------------------------------------------- replays

    def _ask(self, purpose: Purpose, start: int) -> None:
        if not self.is_connected:
            return
        expect = self._history.next - 1 if self._known else -1
        self._replay, self._retry = Question(purpose, start, expect, self._shown()), None
        if purpose is not Purpose.IDLE:
            self._waits.stop_probing()
        self.counts["replays_asked"] += 1
        self._out.append(RequestReplay(start))

    def _witness(self) -> int:
        """Return the start of a question for later batches: the last applied batch, which shows whether the answer
        continues it. If the last batches are unconfirmed, it is the last one that an answer has brought, which may be
        of another process than the next answer."""
        return max(0, self._trust.brought if self._trust.is_hearsay else self._history.next - 1)

    def _continue(self, replay: Question) -> None:
        """Request the rest of an answer."""
        start = self._witness()
        if replay.purpose in (Purpose.VERIFY, Purpose.HEAL):
            # An answer compares the last batch that an answer has brought, and may continue behind it with its own
            # batches. A request from that batch on would get an answer of the same length each time, and
            # never the last one.
            start = max(0, min(replay.pos, self._history.next - 1))
        replay.again(self._history.next - 1 if self._known else -1, self._shown())
        self._replay, self._retry = replay, None
        self.counts["replays_asked"] += 1
        self._out.append(RequestReplay(start))

    def _stop_replay(self) -> None:
        if self._replay is not None:
            self._out.append(CancelReplay())
        self._replay = self._retry = None

    def _later(self, replay: Question, now: float) -> None:
        self._stop_replay()
        self._retry = replay
        self._retry_at = now + self._waits.spread(self._tries.wait(self.policy))

    def _tried(self, limit: int, at: int | None = None) -> bool:
        """One more try at this place has failed. Returns whether it was the last."""
        if not self._tries.failed(self._history.next if at is None else at, limit):
            return False
        self.counts["replays_failed"] += 1
        return True

    def _take(self, replay: Question, seq: int, payload: bytes, now: float) -> None:
        """A replay has brought a batch that is not applied yet."""
        if not self._known and replay.purpose in (Purpose.START, Purpose.IDLE):
            # It was given up before, but there is an answer after all, with more than this one batch.
            replay.purpose, self._started = Purpose.START, False
        if replay.purpose is Purpose.AGREE:
            return
        if seq > self._history.next:
            if replay.purpose is Purpose.HEAL:
                return
            # Answers are in the publisher's order: a batch that is left out does not exist there,
            # or the queue was full.
            self._open_hole()
            if not self._tried(self.policy.hole_tries):
                self._later(replay, now)
                return
            self._accept(min(seq, self._pending.lowest(seq)), "the replay leaves them out")
            self._drain()
        if seq == self._history.next:
            ts = batch_time(payload)
            item = self._pending.pop(seq)
            if item is not None:
                self.counts["overlap"] += 1
                if item.payload == payload:
                    self._agree()
                elif item.ts is not None and ts is not None and item.ts > ts:
                    self._hold(seq, item.payload, item.ts)
                    self._disagree(seq)
                    return
                elif item.ts is not None:  # or it was damaged on the way
                    self._trust.suspect(seq)
            if replay.purpose is Purpose.IDLE:
                self.counts["tails_recovered"] += 1
            published = item is not None and item.payload == payload
            if item is None and self._trust.witness == (seq, fingerprint(payload)):
                published = True
                self._agree()
            self._bring(replay, seq, payload)
            # A published batch counts as published only if it is the applied one. Otherwise an answer that was doubted
            # would be confirmed by the next answer of the same wrong process.
            self._apply(seq, payload, ts, live=published)
        self._drain()

    def _end(self, replay: Question, now: float, *, marked: bool = True) -> None:
        """The answer is complete; without ``marked``, its end marker is missing."""
        self._stop_replay()
        self._trust.answered()
        if marked and not replay.stalled:
            self._patience.calm()
        if replay.purpose is Purpose.AGREE:
            return
        lacks = marked and not replay.refused and replay.pos < replay.shown and not self._trust.agrees
        if lacks and (replay.frames or self._trust.brought >= 0):
            # The publisher has its published batches. Its queue may have been full: a second answer shows that.
            self._trust.presumed = False
            if replay.frames and not self._tried(self.policy.hole_tries, replay.start + 1):
                self._later(replay, now)
            else:
                self._trust.conflicts += 1
                self._disown(self._trust.say(Reason.ENDS_BEFORE, seq=replay.shown))
            return
        if not replay.frames and (replay.refused or replay.shown >= 0):
            self._shows_nothing(replay, now)
            return
        short = replay.pos < replay.expect
        unlike = not replay.matched and (short or replay.purpose is Purpose.VERIFY)
        if replay.expect >= 0 and (not replay.frames or unlike):
            # It lacks the last applied batch, or all of them.
            if replay.purpose is not Purpose.HEAL and not self._too_many_conflicts(now):
                why = f"the replay does not have batch {replay.expect}"
                self._replaced(replay, why, replay.expect)
            return
        if short and replay.purpose is not Purpose.HEAL:
            # The same process, but its queue was full: the end of the answer can be requested again.
            if self._tried(self.policy.replay_tries):
                self._unanswered(replay, now, final=True)
            else:
                self._later(replay, now)
            return
        self._verified = True
        if replay.matched or replay.brought:
            self._trust.doubt = ""
        if replay.purpose is Purpose.IDLE:
            self._trust.tails += replay.brought and not self._behind
        if marked:
            self._open = self._open if short else None
        elif replay.purpose in (Purpose.START, Purpose.VERIFY) or self._losses.unproven:
            self._open = -1
        elif replay.purpose is Purpose.IDLE and replay.brought:
            self._open = self._pending.seen
        if self._open is not None:
            self._patience.stalled()
        self._drain()
        shown = self._pending.seen if self._hole_at is None else max(self._pending.seen, replay.pos)
        if shown >= self._history.next:
            # The answer is older than the waiting batches, or the publisher no longer has the missing ones.
            self._open_hole()
            if not self._tried(self.policy.hole_tries):
                self._later(replay, now)
                return
            self._accept(self._pending.lowest(shown + 1), "no replay brings them")
            self._drain()
        self._hole_at = None
        self._started = True
        self._mixed = self._mixed and not marked
        # An answer that matches only batches after an unproven transition proves nothing about earlier ones, and an
        # answer without any batch that was published before the question proves nothing at all.
        self._losses.unproven = self._losses.guessed > 0 or (
            self._trust.is_hearsay and self._history.has_live and self._history.lived <= replay.shown
        )
        if replay.purpose is Purpose.HEAL:
            self._healed(replay)
        self._look_at_hole(now)

    def _shows_nothing(self, replay: Question, now: float) -> None:
        """An answer was complete, without a batch that could be used."""
        why = self._trust.refusal if replay.refused else self._trust.say(Reason.EMPTY, seq=replay.shown)
        if not self._trust.doubt:
            self._say("replay_useless", why)
        self._trust.doubt = why
        if replay.background or self._tried(self.policy.hole_tries):
            self._unanswered(replay, now, final=True)
        else:
            self._later(replay, now)

    def _healed(self, replay: Question) -> None:
        """The publisher has sent its history: check whether it is complete."""
        if not replay.contiguous or replay.pos < max(self._losses.end, self._losses.guessed) - 1:
            self._losses.hopeless = True
        elif self._losses.count or self._losses.guessed:
            self.counts["rebuilds"] += 1
            self._say("rebuild", "the publisher still has every batch from 0 on: cleared, rebuilding")
            self._reset(Reason.REBUILT.text())
            self._ask(Purpose.START, 0)

    def _silence(self, replay: Question, now: float) -> None:
        """A replay has stopped without its end marker."""
        if replay.progress:
            # It may be cut: a ROUTER drops messages beyond its queue, the end marker included.
            self.counts["cut_replays"] += 1
            replay.stalled = True
            self._patience.stalled()
            self._out.append(CancelReplay())
            self._continue(replay)
        elif replay.frames and replay.pos >= replay.expect:
            # Only the batch that was known has come. This is an end without its marker, or an answer that was cut at
            # the same place again. It is neither requested forever, nor trusted.
            self.counts["missing_end_markers"] += 1
            self._end(replay, now, marked=False)
        else:
            self._unanswered(replay, now)

    def _late(self, replay: Question, now: float) -> None:
        """The publisher has a request and does not begin to answer: it serves others first, or is dead."""
        replay.waits += 1
        if replay.waits == 1:
            self._out.append(AwaitReplay())
        if now >= replay.expires:
            self._patience.expired()
            self._unanswered(replay, now, final=True)
            return
        if replay.waits < self.policy.replay_tries:
            replay.deadline = min(replay.expires, now + self.policy.replay_timeout)
            return
        replay.deadline = replay.expires
        if replay.purpose is Purpose.IDLE:
            self.counts["replays_unanswered"] += 1
            self._silent()

    def _silent(self) -> None:
        # If it has never answered, the stream is degraded already, and silence shows nothing new.
        if self._trust.answers and not self._trust.unheard:
            self._trust.unheard = True
            self._say("silent", self._trust.say(Reason.SILENT))

    def _give_up_proof(self) -> None:
        """No later answer will confirm the batches that answers have brought."""
        self._losses.unproven = self._losses.unproven or (self._trust.is_hearsay and self._history.has_live)

    def _endless(self, why: str, now: float) -> None:
        self.counts["endless_replays"] += 1
        self._say("replay_endless", why)
        if self._replay is not None:
            self._unanswered(self._replay, now)

    def _unanswered(self, replay: Question, now: float, *, final: bool = False) -> None:
        """A replay was of no use."""
        self.counts["replays_unanswered"] += 1
        self._trust.unreached = not replay.reached
        silent = replay.purpose is Purpose.IDLE and self._hole_at is None
        if replay.purpose in (Purpose.HEAL, Purpose.AGREE) or (silent and final):
            self._stop_replay()
            self._give_up_proof()
        elif silent:
            if self._tried(self.policy.replay_tries, replay.start + 1):  # live batches are applied meanwhile
                self._stop_replay()
                self._silent()
                self._give_up_proof()
            else:
                self._later(replay, now)
        elif not final and not self._tried(self.policy.replay_tries):
            self._later(replay, now)
        else:
            self._stop_replay()
            what = "no connection" if self._trust.unreached else "no useful answer"
            self._say("replay_failed", f"{self._trust.replay_endpoint}: {what} in {self.policy.replay_tries} tries")
            if not self._verified:
                # The live batches have to show whether this is the old process.
                waiting, seen = self._pending.items(), self._pending.seen
                self._drop_waiting()
                for seq, item in waiting:
                    if not self._verified:
                        self._judge(seq, item.payload, item.ts)
                    elif seq >= self._history.next:
                        self._hold(seq, item.payload, item.ts)
                self._pending.seen = max(self._pending.seen, seen)  # batches that did not fit are missing
            else:
                # If batch 0 came live, no batch before it can be missing.
                seen_from_0 = self._known and self._trust.brought < 0 and not self._losses.count and not self._mixed
                if replay.purpose is Purpose.VERIFY or (replay.purpose is Purpose.START and not seen_from_0):
                    self._losses.unproven = True
                if self._hole_at is not None and not self._missing():
                    # Only a replay has shown that there are more batches, and it is no longer available.
                    self._accept(replay.pos + 1, "no replay brings them")
                self._started = True
            if self._missing():
                self._accept_all("no replay answers")

    # ---------------------------------------------------------------------------------------------------------- waits

    def _plan_heal(self, now: float) -> None:
        asks = self._trust.asks or (
            self._trust.has
            and self._trust.conflicts <= self.policy.max_conflicts
            and self._history.came_live(self._history.next - 1)
        )
        if asks:
            self._waits.plan_heal(now)

    def _plan_probe(self, now: float) -> None:
        """Let a silent stream ask whether it has missed the last batches."""
        idle = self._trust.asks and self._verified and self._started and not self.replaying
        if idle and self._waits.probe_at is None:
            self._waits.plan_probe(now)
        if self._waits.probe_at is not None and self._trust.is_unconfirmed and self._shown() >= 0:
            self._waits.probe_at_once(now)

    # ---------------------------------------------------------------------------------------------------------- state

    def _judgement(self, now: float) -> Mark:
        """The state at this moment: the first objection counts."""
        self._silent_at = None
        if stale := self._unknown():
            return Mark("stale", stale)
        if degraded := self._objection():
            return Mark("degraded", degraded)
        if self._is_hearsay(now):
            return Mark("stale", self._trust.say(Reason.UNCONFIRMED))
        if not self._trust.has:
            return Mark("exact", Reason.NO_REPLAY.text())
        return Mark("exact", "" if self._trust.answers else self._trust.say(Reason.NO_ANSWER))

    def _unknown(self) -> str:
        """Why it is unknown at this moment whether all batches are applied; empty if it is known."""
        if not self.is_connected:
            return self._why_lost
        if self._behind:
            return Reason.LIMITED.text()
        if not self._verified:
            why = (Reason.SAME_PROCESS_ASKED if self.replaying else Reason.SAME_PROCESS_UNSHOWN).text()
            return f"{why}: {self._trust.doubt}" if self._trust.doubt else why
        if not self._started:
            return self._waits_for_replay()
        if self._missing() or self._hole_at is not None:
            return Reason.MISSING.text(seq=self._history.next)
        return self._trust.say(Reason.SILENT) if self._trust.unheard else ""

    def _is_hearsay(self, now: float) -> bool:
        """Whether only an answer supports the state, which may be another process's. This ends when a batch comes both
        ways, or when the publisher is silent for a while: an idle engine cannot show more than that."""
        if not self._trust.asks or self._trust.presumed or (self._known and not self._trust.is_hearsay):
            return False
        if not self._history.has_live:
            self._trust.presumed = now >= self._waits.silent_at
            self._silent_at = None if self._trust.presumed else self._waits.silent_at
        return not self._trust.presumed

    def _objection(self) -> str:
        """Why the applied batches may be wrong or incomplete; empty if there is no objection."""
        trust = self._trust
        return (
            trust.foreign or self._blame or trust.doubt or trust.complaint() or self._lost()
            or ("" if self._open is None else Reason.CUT_SHORT.text(seq=self.last_seq))
        )  # fmt: skip

    def _lost(self) -> str:
        lost = self._losses.complaint()
        return f"{lost}; {self._trust.say(Reason.UNREACHED)}" if lost and self._trust.unreached else lost

    def _waits_for_replay(self) -> str:
        if self._replay is not None and self._replay.waits:
            return self._trust.say(Reason.QUEUED)
        if self._trust.unreached:
            return self._trust.say(Reason.UNREACHED)
        return Reason.REPLAYING.text()

    def _mark(self, mark: Mark) -> None:
        self.mark = mark
        if mark.state != self._marked:
            self._marked = mark.state
            self._out.append(mark)

    def _say(self, kind: str, detail: str) -> None:
        self._out.append(Incident(kind, detail))

    def _settle(self, now: float) -> list[Action]:
        if self._trust.contradiction is not None:
            self._disagree(self._trust.contradiction)
        if self.is_connected:
            self._plan_probe(now)
            # The process is verified even if the history is no longer available.
            if (self._losses.can_heal or not self._verified or not self._trust.asks) and not self.replaying:
                self._plan_heal(now)
        # Bytes of the connection may have been damaged while it was made, and bytes of its replays on the way.
        if self.is_connected and (self._trust.conflicts > self.policy.max_conflicts or self._trust.tails > 1):
            self._waits.plan_renewal(now)
        else:
            self._waits.renew_at = None
        self._mark(self._judgement(now))
        if self.mark.state == "exact":
            self._waits.renew_wait = self.policy.renew[0]
        whole = self._hole_at is None and not self._missing()
        well = self._known and self._verified and self._started and self._open is None
        heard = self._waits.probe_wait <= self.policy.idle_probe[0] and self._trust.is_heard
        self._steady = self.is_connected and well and whole and heard
        out, self._out = self._out, []
        return out

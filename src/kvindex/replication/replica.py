"""One process's part in a fleet: a follower that becomes the collector if there is no other. Pure, as its parts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from ..sync.status import Marked, Removed
from .collector import Collector, Cut
from .entries import Beat, Begun, Described, Hashed, Id, Item, LogError, encode, id_text, next_epoch
from .follower import Follower
from .requests import (
    Append,
    Claim,
    Collect,
    Effect,
    Fail,
    Get,
    Load,
    Refused,
    Release,
    Renew,
    ReplicationPolicy,
    Request,
    StepDown,
    Wait,
)
from .snapshots import Contents, Pointer

__all__ = ["Known", "Replica"]

# The latest time at which a candidate claims the lease, in quarters of its duration.
_LATEST_SHARE: Final = 1.25


class Known:
    """Facts about pods that an index does not keep: how routers reach them, and the last states of their streams."""

    def __init__(self) -> None:
        self.pods: dict[str, Described] = {}
        self.states: dict[tuple[str, int], str] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        """Reasons of the streams that were marked since the last snapshot."""

    def take(self, item: object) -> None:
        if isinstance(item, Marked):
            self.states[item.pod, item.rank] = item.state
            self.reasons[item.pod, item.rank] = item.reason
        elif isinstance(item, Described):
            self.pods[item.pod] = item
        elif isinstance(item, Removed):
            self.pods.pop(item.pod, None)
            self.states = {at: state for at, state in self.states.items() if at[0] != item.pod}
            self.reasons = {at: reason for at, reason in self.reasons.items() if at[0] != item.pod}

    def load(self, load: Load) -> None:
        self.pods = {pod: Described(pod, *fields) for pod, fields in load.pods.items()}
        self.states = {(pod, rank): state for pod, rank, state in load.states}
        self.reasons = {}

    def contents(self, data: bytes) -> Contents:
        pods = {pod: [*described[1:]] for pod, described in self.pods.items()}
        return Contents(data, pods, [(*at, state) for at, state in self.states.items()])

    def stale(self, reason: str) -> list[Item]:
        return [Marked(pod, rank, "stale", reason) for pod, rank in self.states]


class Replica:
    """:meth:`next` returns the next request, one at a time. Each answer is passed to :meth:`answered`, which returns
    the effects to carry out, in order. ``writer`` is unique among all processes of all times."""

    follower_type, collector_type = Follower, Collector  # tests replace them by broken ones

    def __init__(self, policy: ReplicationPolicy, settings: Mapping[str, Any], writer: str, *, candidate: bool) -> None:
        self.policy = policy
        self.settings = dict(settings)
        self.writer = writer
        self.candidate = candidate
        self.follower = self.follower_type(policy, settings)
        self.collector: Collector | None = None
        self.known = Known()
        self.unreachable = ""
        """Why the server cannot be reached, for people; empty while it can."""
        self.hindrance = ""
        """Why this process cannot become the collector."""
        self.takeovers = self.step_downs = 0
        self.failures: dict[str, int] = {}
        self.closing = False
        self._has_lease = self._is_claiming = False
        self._claim_at = 0.0
        self._ready_since: float | None = None  # the time from which the lease might be claimed
        self._defers = 0.0
        self._takeover: Id | None = None  # the first entry of the epoch that is to begin here
        self._is_written = False
        self._afresh = False
        self._kept: Pointer | None = None
        self._looked = False
        self._read_again = False
        self._highest = 0  # the highest epoch that was seen
        self._beaten_at = -1e18
        self._retry_at = -1e18
        self._delay = policy.retry[0]
        # Candidates that start together do not claim together.
        self._share = 0.75 + (_LATEST_SHARE - 0.75) * (sum(writer.encode()) % 64) / 64

    @property
    def role(self) -> Literal["collector", "follower"]:
        return "follower" if self.collector is None else "collector"

    # ------------------------------------------------------------------------------------------------------- requests

    def next(self, now: float, wall: float) -> Request:
        """Return the next request. ``wall`` is the time of day, in seconds, for the numbers of epochs."""
        if self.closing:
            return Release(self.writer) if self._has_lease else Wait(float("inf"))
        if now < self._retry_at:
            return Wait(self._retry_at)
        if self.collector is not None:
            return self.collector.next(now)
        if self._takeover is None and self._may_claim(now):
            self._is_claiming = True
            return (Renew if self._has_lease else Claim)(self.writer, self.policy.lease)
        if self._takeover is None and self._has_lease and self._is_ready(now):
            self._takeover = (self._epoch(wall), 1)
            self._is_written = self._looked = False
            self._afresh = self.follower.place is None
        if self._takeover is not None:
            if not self._is_written:
                return Append(self._takeover, encode([Begun(self.writer, self.settings)]), True)
            if (self._afresh or self._is_begun) and not self._looked:
                return Get("")
        return self.follower.next(now)

    def _epoch(self, wall: float) -> int:
        """Return an epoch above the log's, so that its entries are accepted. The server's count alone is not enough: a
        server that has come back empty would count up to places that followers are at, and these would read on."""
        place = self.follower.place or (0, 0)
        return next_epoch(max(place[0], self._highest), f"{self.writer}:{self.takeovers}:{wall}", wall)

    def _is_ready(self, now: float) -> bool:
        follower = self.follower
        if follower.is_foreign:
            return False
        if follower.place is not None:
            # If the server has lost the lease, its holder claims it first.
            is_silent = follower.heard_at is None or now >= follower.heard_at + self.policy.silence
            return is_silent and follower.tip_at is not None
        since = follower.booting_since
        return since is not None and now >= since + self.policy.patience

    def _may_claim(self, now: float) -> bool:
        if not self.candidate or now < self._claim_at or self._has_lease:
            return False
        if not self._is_ready(now):
            self._ready_since = None
            return False
        if self._ready_since is None:
            self._ready_since = now
        return now >= self._ready_since + self._defers

    def defer_to(self, mates: Iterable[Replica]) -> None:
        """Leave this log to other candidates for a while if this process collects another shard. Each candidate then
        collects one shard if there are enough candidates. Called before :meth:`next`, with the other replicas of this
        process."""
        policy, mates = self.policy, [*mates]
        self._defers = 0.0
        if any(mate.follower.is_foreign for mate in mates):
            # The fleet has another number of shards: no process would read the entries that this one writes.
            self._defers = float("inf")
        elif any(mate.is_engaged for mate in mates):
            # Until other candidates have noticed the end of the lease, possibly later than this
            # process, and have claimed it.
            self._defers = max(0.0, policy.lease - policy.silence) + policy.lease / 4 * _LATEST_SHARE + policy.beat

    @property
    def is_engaged(self) -> bool:
        """Whether this process collects here, or is about to."""
        return self.collector is not None or self._has_lease or self._is_claiming

    @property
    def _is_begun(self) -> bool:
        return self.follower.place == self._takeover and self.follower.begun_by == self.writer

    def answered(self, request: Request, answer: Any, sent: float, now: float) -> list[Effect]:
        if type(answer) is Fail:
            return self._failed(request, answer, now)
        if type(request) is Release:
            self._has_lease = False
            return []
        self.unreachable = ""
        self._delay = self.policy.retry[0]
        if self.collector is not None:
            effects = self.collector.answered(request, answer, now)
            if effects:
                return self._step_down(effects[0].reason)
            return self.collector.due(now)
        match request:
            case Claim() | Renew():
                self._claim_at = now + self.policy.lease / 4 * self._share
                self._has_lease, self._is_claiming = answer is True, False
                self.hindrance = ""
                return []
            case Append():
                self._is_written = True
                if type(answer) is Refused:
                    self._afresh = False
                return []
            case Get("") if self._takeover is not None:
                self._looked = True
                try:
                    self._kept = None if answer is None else Pointer.decode(answer)
                except LogError:
                    self._kept = None
                return self._take_over(now)
        effects = self.follower.answered(request, answer, sent, now)
        if self.follower.place is not None:
            self._highest = max(self._highest, self.follower.place[0])
        for effect in effects:
            if type(effect) is Hashed:  # nearly all effects
                continue
            if type(effect) is Load:
                self.known.load(effect)
            else:
                self.known.take(effect)
        if self._takeover is not None and not self._afresh:
            place = self.follower.place
            at_end = place is not None and self.follower.tip_at is not None and place < self._takeover
            if (
                place is None
                or place > self._takeover
                or (at_end and self._read_again)
                or (place == self._takeover and self.follower.begun_by != self.writer)
            ):
                self._give_up()
            self._read_again = at_end
        return effects

    def _take_over(self, now: float) -> list[Effect]:
        assert self._takeover is not None
        follower, epoch = self.follower, self._takeover[0]
        effects: list[Effect] = []
        previous = follower.behind
        if self._afresh or previous is None:
            effects = follower.begin((0, 0))
            self.known.load(effects[0])
            previous = (epoch, 0)
        stale = self.known.stale("another collector has just taken over")
        self.collector = self.collector_type(
            self.policy, self.settings, self.writer, epoch, previous,
            stale, self._kept, now,
        )  # fmt: skip
        self.takeovers += 1
        self._takeover = None
        return [*effects, *stale, Collect()]

    def _give_up(self) -> None:
        self._takeover = None
        self._read_again = self._has_lease = False

    def _step_down(self, reason: str) -> list[Effect]:
        assert self.collector is not None
        self._highest = max(self._highest, self.collector.id[0])
        self.collector = None
        self._has_lease = False
        self.step_downs += 1
        return [StepDown(reason), *self.follower.reboot(reason)]

    def _failed(self, request: Request, fail: Fail, now: float) -> list[Effect]:
        self.failures[fail.kind] = self.failures.get(fail.kind, 0) + 1
        self._is_claiming = False
        if type(request) is Release:
            self._has_lease = False
            return []
        if type(request) in (Claim, Renew, Append) and self.collector is None and fail.kind != "unreachable":
            # It may still read, which is all that a follower needs.
            self.hindrance = fail.reason
            self._claim_at = now + self.policy.patience
            self._has_lease = False
            self._give_up()
            return []
        self.unreachable = fail.reason
        self._retry_at = now + self._delay
        self._delay = min(2 * self._delay, self.policy.retry[1])
        if self.collector is not None:
            self.collector.lost(fail.reason, full=fail.kind == "full")
        else:
            self.follower.lost()
            if type(request) is Append:
                self._is_written = True  # possibly
                if self._afresh:
                    self._give_up()
        return []

    # ----------------------------------------------------------------------------------------------------- other inputs

    def loaded(self, error: str | None) -> None:
        """Note whether the index could be made from the last :class:`Load`."""
        self.follower.loaded(error)

    def unfit(self, error: str) -> list[Effect]:
        """Note that the index could not take an item, and therefore differs from the log."""
        return self.follower.hole(error)

    def shown(self, item: Item | Cut) -> None:
        """Take a change of the index that is about to be made, if this process collects. May be
        called from any one thread."""
        collector = self.collector
        if collector is not None:
            collector.show(item)

    def beat(self, now: float) -> None:
        """Write a beat into the log: this process receives from its engines. Called every ``beat`` seconds in the
        thread that shows the items. Not written after a pause, when messages that have arrived meanwhile may not be
        shown yet."""
        if now < self._beaten_at + 2 * self.policy.beat:
            self.shown(Beat(now))
        self._beaten_at = now

    def snapshot_made(self, cut: Cut, data: bytes | None, now: float) -> None:
        if self.collector is not None:
            self.collector.snapshot_made(cut, data, now)

    def due(self, now: float) -> list[Effect]:
        """Return the effects that are due."""
        return [] if self.collector is None else self.collector.due(now)

    def stepped_down_for(self, reason: str) -> list[Effect]:
        """Stop collecting, for a reason of this process's own."""
        return [] if self.collector is None else self._step_down(reason)

    @property
    def reason(self) -> str:
        """Why answers are not current, for people; empty if they are."""
        if self.unreachable:
            return self.unreachable
        return self.follower.reason if self.collector is None else self.collector.reason

    @property
    def place(self) -> str:
        at = self.follower.place if self.collector is None else self.collector.acked
        return "" if at is None else id_text(at)

"""One question to a publisher, its tries, and how long its answer is waited for."""

from __future__ import annotations

from enum import Enum

from .policy import StreamPolicy

__all__ = ["Patience", "Purpose", "Question", "Tries"]


class Purpose(Enum):
    START = "start"  # nothing is known yet
    VERIFY = "verify"  # is this the process we knew?
    GAP = "gap"  # a hole is in front of what waits
    IDLE = "idle"  # was the end missed? Live batches are applied meanwhile
    HEAL = "heal"  # could the whole history be had again? Live batches are applied meanwhile
    AGREE = "agree"  # is the replay endpoint the publisher's after all? Live batches are applied meanwhile


class Question:
    """One question to the publisher, over all the requests that its answer takes."""

    __slots__ = (
        "bound", "brought", "contiguous", "deadline", "expect", "expires", "first", "frames", "jump", "matched", "pos",
        "progress", "purpose", "reached", "refused", "sent_at", "shown", "stalled", "start", "surplus", "waits",
    )  # fmt: skip

    def __init__(self, purpose: Purpose, start: int, expect: int, shown: int) -> None:
        self.purpose = purpose
        self.start = start
        # Of the whole answer.
        self.first: int | None = None
        self.pos = start - 1  # highest seq so far
        self.jump: int | None = None  # where the answer left something out for the first time
        self.contiguous = start == 0  # it starts at 0 and leaves out nothing
        self.matched = False  # a batch that is applied came with the same bytes
        self.brought = False  # something was applied that had not come live
        self.surplus = 0  # batches that repeated earlier ones
        self.stalled = False  # it has stopped in the middle
        self.again(expect, shown)

    def again(self, expect: int, shown: int) -> None:
        # Of this request.
        self.expect = expect  # what the publisher must have, if it is the one we know; -1 is nothing
        self.shown = shown  # the last batch that it has published over this connection; -1 is none
        self.deadline: float | None = None  # when something is to be done if nothing comes
        self.bound: float | None = None  # when it counts as over whatever comes
        self.sent_at: float | None = None
        self.reached = False  # the publisher has the request
        self.expires = float("inf")  # when it is not waited for any more
        self.waits = 0  # timeouts that have gone by since
        self.frames = 0
        self.refused = 0  # replies of which nothing was taken
        self.progress = False

    @property
    def background(self) -> bool:
        """Whether live batches are applied meanwhile."""
        return self.purpose in (Purpose.IDLE, Purpose.HEAL, Purpose.AGREE)

    def sent(self, now: float, policy: StreamPolicy) -> None:
        self.sent_at = now
        self.deadline = now + policy.replay_timeout

    def hold_up(self, seconds: float) -> None:
        """Nothing is taken for so long: all times are as much later."""
        if self.deadline is not None:
            self.deadline += seconds
        if self.bound is not None:
            self.bound += seconds
        self.expires += seconds

    def heard(self, now: float, pause: float, policy: StreamPolicy) -> None:
        """A reply has come."""
        self.deadline = now + pause
        if self.bound is None:
            # From the first reply on: before it others may have their turn at the publisher.
            self.bound = now + policy.replay_deadline


class Patience:
    """How long an answer may be late and how long it may pause, learned from those that were.

    A publisher serves whole histories one after another, so a request that is given up costs the same history again:
    16 routers that asked anew every 2 s never got one (115 histories of 0.5 s sent in 60 s, 15 routers without any).
    """

    __slots__ = ("_policy", "late", "pause")

    def __init__(self, policy: StreamPolicy) -> None:
        self._policy = policy
        self.calm()

    def calm(self) -> None:
        """An answer was complete and in time."""
        self.late = self._policy.replay_patience[0]
        self.pause = self._policy.replay_pause

    def expired(self) -> None:
        """A request that the publisher has was not answered."""
        self.late = min(self._policy.replay_patience[1], self.late * 4.0)

    def stalled(self) -> None:
        """An answer has stopped in the middle."""
        self.pause = min(max(self._policy.replay_pause, self._policy.replay_timeout * 4.0), self.pause * 2.0)


class Tries:
    """How often something was tried at one place in vain."""

    __slots__ = ("_at", "count")

    def __init__(self) -> None:
        self._at = -1
        self.count = 0

    def reset(self) -> None:
        self._at = -1

    def failed(self, at: int, limit: int) -> bool:
        """One more try at this place has failed: True when it was the last."""
        if self._at != at:
            self._at, self.count = at, 0
        self.count += 1
        if self.count < limit:
            return False
        self._at = -1
        return True

    def wait(self, policy: StreamPolicy) -> float:
        """How long to wait for the next."""
        first, longest = policy.replay_retry
        return min(longest, first * 4.0 ** min(max(self.count - 1, 0), 20))

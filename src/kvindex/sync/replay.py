"""One question to a publisher, its tries, and the time to wait for its answer."""

from __future__ import annotations

from enum import Enum

from .policy import StreamPolicy

__all__ = ["Patience", "Purpose", "Question", "Tries"]


class Purpose(Enum):
    START = "start"  # nothing is known yet
    VERIFY = "verify"  # is this the same process as before?
    GAP = "gap"  # a hole is in front of the waiting batches
    IDLE = "idle"  # were the last batches missed? Live batches are applied meanwhile
    HEAL = "heal"  # is the whole history available again? Live batches are applied meanwhile
    AGREE = "agree"  # does the replay endpoint belong to the publisher after all? Live batches are applied meanwhile


class Question:
    """One question to the publisher, over all the requests that its answer takes."""

    __slots__ = (
        "bound", "brought", "contiguous", "deadline", "expect", "expires", "first", "frames", "jump", "matched", "pos",
        "progress", "purpose", "reached", "refused", "sent_at", "shown", "stalled", "start", "surplus", "waits",
    )  # fmt: skip

    def __init__(self, purpose: Purpose, start: int, expect: int, shown: int) -> None:
        self.purpose = purpose
        self.start = start
        # State of the whole answer.
        self.first: int | None = None
        self.pos = start - 1  # highest seq so far
        self.jump: int | None = None  # the position at which the answer first left out batches
        self.contiguous = start == 0  # it starts at 0 and leaves out nothing
        self.matched = False  # a batch that is already applied came with the same bytes
        self.brought = False  # a batch was applied that had not come live
        self.surplus = 0  # batches that repeated earlier ones
        self.stalled = False  # the answer has stopped in the middle
        self.again(expect, shown)

    def again(self, expect: int, shown: int) -> None:
        # State of the current request.
        self.expect = expect  # the last batch that the same process must have; -1 if there is no such batch
        self.shown = shown  # the last batch published over this connection; -1 if there is no such batch
        self.deadline: float | None = None  # when to act if nothing arrives
        self.bound: float | None = None  # when the answer counts as over in any case
        self.sent_at: float | None = None
        self.reached = False  # the publisher has the request
        self.expires = float("inf")  # when the wait for the answer ends
        self.waits = 0  # timeouts that have passed without an answer
        self.frames = 0
        self.refused = 0  # replies that were ignored
        self.progress = False

    @property
    def background(self) -> bool:
        """Whether live batches are applied meanwhile."""
        return self.purpose in (Purpose.IDLE, Purpose.HEAL, Purpose.AGREE)

    def sent(self, now: float, policy: StreamPolicy) -> None:
        self.sent_at = now
        self.deadline = now + policy.replay_timeout

    def hold_up(self, seconds: float) -> None:
        """Extend all times by ``seconds``, during which no reply is taken."""
        if self.deadline is not None:
            self.deadline += seconds
        if self.bound is not None:
            self.bound += seconds
        self.expires += seconds

    def heard(self, now: float, pause: float, policy: StreamPolicy) -> None:
        """Note a reply."""
        self.deadline = now + pause
        if self.bound is None:
            # From the first reply on, because the publisher may serve other readers before it.
            self.bound = now + policy.replay_deadline


class Patience:
    """How long an answer may be late and how long it may pause, learned from earlier answers.

    A publisher serves whole histories one after another, so a request that is given up costs it the same history again.
    With 16 routers that asked again every 2 s, the publisher sent 115 histories of 0.5 s in 60 s, and 15 routers still
    had no history.
    """

    __slots__ = ("_policy", "late", "pause")

    def __init__(self, policy: StreamPolicy) -> None:
        self._policy = policy
        self.calm()

    def calm(self) -> None:
        """Reset after an answer that was complete and in time."""
        self.late = self._policy.replay_patience[0]
        self.pause = self._policy.replay_pause

    def expired(self) -> None:
        """Extend the wait after a request that the publisher has received and not answered."""
        self.late = min(self._policy.replay_patience[1], self.late * 4.0)

    def stalled(self) -> None:
        """Extend the pause after an answer that has stopped in the middle."""
        self.pause = min(max(self._policy.replay_pause, self._policy.replay_timeout * 4.0), self.pause * 2.0)


class Tries:
    """The number of failed tries at one place."""

    __slots__ = ("_at", "count")

    def __init__(self) -> None:
        self._at = -1
        self.count = 0

    def reset(self) -> None:
        self._at = -1

    def failed(self, at: int, limit: int) -> bool:
        """Count a failed try at this place. Returns whether it was the last."""
        if self._at != at:
            self._at, self.count = at, 0
        self.count += 1
        if self.count < limit:
            return False
        self._at = -1
        return True

    def wait(self, policy: StreamPolicy) -> float:
        """Return the time to wait before the next try."""
        first, longest = policy.replay_retry
        return min(longest, first * 4.0 ** min(max(self.count - 1, 0), 20))

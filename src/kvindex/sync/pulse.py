"""How long answers may be believed without a sign of life of the loop that reads the engines' messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["SILENCE", "Pulse"]

#: Seconds without a turn of the loop after which no answer is exact. A lost connection is noticed within 1.75 s at the
#: default heartbeat, so this is no worse; and an interpreter that was held for a second does not end every state.
SILENCE: Final = 2.0
# The loop may look at its sockets before libzmq's thread has read what came during the pause.
_SETTLE: Final = 0.25


class Pulse:
    """Signs of life of one loop, for one index. ``limit`` sets the moment from which the index believes nothing; None
    takes that back. Without ``limit``, the index has no such thing, or somebody else sets it. ``resumed`` is called
    when states count again. :attr:`lapsed` is for any thread, all else for the loop's."""

    def __init__(self, limit: Callable[[float | None], Any] | None, resumed: Callable[[], None]) -> None:
        self._limit = limit
        self._resumed = resumed
        self.due = math.inf if limit is None else 0.0
        """When :meth:`beat` has to be called at the latest."""
        self._last: float | None = None
        self._believed_at: float | None = None  # after a pause

    @property
    def lapsed(self) -> bool:
        """Whether the loop has paused for so long that its states do not count."""
        last = self._last
        return last is not None and (self._believed_at is not None or time.monotonic() >= last + SILENCE)

    def beat(self, now: float) -> None:
        """The loop reads its sockets at this moment of ``time.monotonic``."""
        if self._limit is None:
            return
        if self._last is not None and now >= self._last + SILENCE:
            self._believed_at = now + _SETTLE
        self._last = now
        if self._believed_at is not None:
            if now < self._believed_at:
                self.due = self._believed_at
                return
            self._believed_at = None
            self._limit(now + SILENCE)
            self._resumed()
        else:
            self._limit(now + SILENCE)
        self.due = now + SILENCE / 4  # 2 wake-ups a second of an idle loop

    def end(self) -> None:
        """The loop is over: what it followed was marked stale, and the rest of the index is not its own."""
        self.due, self._last = math.inf, None
        if self._limit is not None:
            self._limit(None)

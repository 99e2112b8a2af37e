"""How long answers may be believed without a sign of life of the loop that reads the engines' messages."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["SILENCE", "Pulse", "is_read"]

log = logging.getLogger("kvindex.sync")

#: Seconds without a turn of the loop after which no answer is exact. A lost connection is noticed within 1.75 s at the
#: default heartbeat, so this is no worse; and an interpreter that was held for a second does not end every state.
SILENCE: Final = 2.0
# The loop may look at its sockets before libzmq's thread has read what came during the pause. Then it reads them dry:
# with 16 pods and 1,500 batches of each, that took 1.5 s.
_SETTLE: Final = 0.25
# Seconds for which the loop leaves nothing in a socket before it is up to date: one may be empty for the moment that
# libzmq's thread needs to fill it again. A pod that floods the loop is not waited for longer than the others deserve.
_CALM: Final = 0.05
_LONGEST: Final = 10.0


def is_read(now: float, late_at: float, behind_at: float) -> bool:
    """Whether a loop that paused until ``late_at`` has read what came meanwhile. It left messages in a socket at
    ``behind_at`` for the last time."""
    return now >= min(behind_at + _CALM, late_at + _LONGEST)


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

    def beat(self, now: float, behind_at: float) -> None:
        """The loop reads its sockets at this moment of ``time.monotonic``, and left messages in one of them at
        ``behind_at`` for the last time."""
        if self._limit is None:
            return
        if self._last is not None and now >= self._last + SILENCE:
            self._believed_at = now + _SETTLE
        self._last = now
        if self._believed_at is not None:
            if now < self._believed_at or not is_read(now, self._believed_at, behind_at):
                self.due = self._believed_at if now < self._believed_at else now + _CALM
                return
            self._believed_at = None
            self._limit(now + SILENCE)
            try:
                self._resumed()
            except Exception:
                log.exception("a callback at the end of a pause has failed")
        else:
            self._limit(now + SILENCE)
        self.due = now + SILENCE / 4  # 2 wake-ups a second of an idle loop

    def end(self) -> None:
        """The loop is over: what it followed was marked stale, and the rest of the index is not its own."""
        self.due, self._last = math.inf, None
        if self._limit is not None:
            self._limit(None)

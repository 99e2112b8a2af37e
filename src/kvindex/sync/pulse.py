"""The time for which states stay valid without a sign of life of the loop that reads the engines' messages."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["SILENCE", "Pulse", "is_read"]

log = logging.getLogger("kvindex.sync")

#: Seconds without a turn of the loop after which no answer is exact. It is close to the 1.75 s within which a lost
#: connection is noticed at the default heartbeat, and an interpreter that was held for a second
#: does not end every state.
SILENCE: Final = 2.0
# The loop may look at its sockets before libzmq's thread has read the messages of the pause. Afterwards it reads them
# until they are empty: with 16 pods and 1,500 batches of each, that took 1.5 s.
_SETTLE: Final = 0.25
# Seconds for which the loop leaves no message in a socket before it is up to date: a socket may be empty for the moment
# that libzmq's thread needs to fill it again. A pod that floods the loop delays the others by ``_LONGEST`` at most.
_CALM: Final = 0.05
_LONGEST: Final = 10.0


def is_read(now: float, late_at: float, behind_at: float) -> bool:
    """Whether a loop that paused until ``late_at`` has read the messages of the pause. ``behind_at`` is the last time
    when it left messages in a socket."""
    return now >= min(behind_at + _CALM, late_at + _LONGEST)


class Pulse:
    """Signs of life of one loop, for one index. ``limit`` sets the time after which the index reports no answer as
    exact; None removes that limit. Without ``limit``, the index has no such limit, or another owner sets it.
    ``resumed`` is called when states count again. :attr:`lapsed` may be read from any thread, everything else belongs
    to the loop's."""

    def __init__(self, limit: Callable[[float | None], Any] | None, resumed: Callable[[], None]) -> None:
        self._limit = limit
        self._resumed = resumed
        self.due = math.inf if limit is None else 0.0
        """The time by which :meth:`beat` has to be called."""
        self._last: float | None = None
        self._believed_at: float | None = None  # after a pause: the earliest time from which states count again

    @property
    def lapsed(self) -> bool:
        """Whether the loop has paused for so long that its states do not count."""
        last = self._last
        return last is not None and (self._believed_at is not None or time.monotonic() >= last + SILENCE)

    def beat(self, now: float, behind_at: float) -> None:
        """Note that the loop reads its sockets at ``now``, a time of ``time.monotonic``. ``behind_at`` is the last time
        when it left messages in a socket."""
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
        self.due = now + SILENCE / 4  # an idle loop wakes up twice a second

    def end(self) -> None:
        """End with the loop: its pods were marked stale, and the rest of the index does not depend on it."""
        self.due, self._last = math.inf, None
        if self._limit is not None:
            self._limit(None)

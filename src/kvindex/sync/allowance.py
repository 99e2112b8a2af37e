"""How much a pod may send: so many events and bytes a second, and what it saves up while it is silent."""

from __future__ import annotations

from typing import Final

__all__ = ["PAUSE", "Allowance"]

# Seconds that a pod over its limit waits at least. If it were let in for single messages it would be looked at, and its
# change of state, as often as they come; so it is at most 20 times a second.
PAUSE: Final = 0.05


class Allowance:
    """What one pod may send, over all its ranks: ``events`` and ``size`` bytes a second (None: any number).

    What a message costs is known when it has been read, so nothing is ever taken in part: a message is taken as long as
    all that was taken before is paid for, and one that costs more than there is leaves a debt to wait for. ``burst`` is
    how many seconds of its limit a silent pod saves up. Every call is O(1); times are seconds of any steady clock.
    """

    __slots__ = ("_burst", "_events", "_events_paid", "_size", "_size_paid")

    def __init__(self, events: float | None, size: float | None, burst: float) -> None:
        self._events = events
        self._size = size
        self._burst = max(burst, 2 * PAUSE)  # or it could not use what comes in while it waits
        # Until when the limit is used up: when a pod would be done that sent all of it at just its rate.
        self._events_paid = self._size_paid = float("-inf")

    def opens(self) -> float:
        """From when on the next message may be taken."""
        return max(self._events_paid, self._size_paid)

    def charge(self, events: int, size: int, now: float) -> None:
        """A message of so many events and bytes was taken."""
        since = now - self._burst
        if self._events is not None:
            self._events_paid = max(self._events_paid, since) + events / self._events
        if self._size is not None:
            self._size_paid = max(self._size_paid, since) + size / self._size

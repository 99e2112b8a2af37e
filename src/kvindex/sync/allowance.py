"""The rate limit of a pod: its events and bytes a second, and the burst that it saves up while it is silent."""

from __future__ import annotations

from typing import Final

__all__ = ["PAUSE", "Allowance"]

# The shortest wait, in seconds, of a pod over its limit. If each message were admitted as soon as it is paid for, the
# pod's socket and its change of state would be handled once per message; so they are handled 20 times a second at most.
PAUSE: Final = 0.05


class Allowance:
    """The rate limit of one pod over all its ranks: ``events`` and ``size`` bytes a second (None: no limit).

    The cost of a message is known only after it has been read, so no message is ever taken in part. A message is taken
    if all messages before it are paid for. One that costs more than the balance leaves a debt, and the pod waits until
    it is paid. ``burst`` is the number of seconds of its limit that a silent pod saves up. Every call is O(1); times
    are seconds of any steady clock.
    """

    __slots__ = ("_burst", "_events", "_events_paid", "_size", "_size_paid")

    def __init__(self, events: float | None, size: float | None, burst: float) -> None:
        self._events = events
        self._size = size
        self._burst = max(burst, 2 * PAUSE)  # less would lose a part of the limit while the pod waits
        # The time until which the limit is used up: when a pod that sends at exactly its rate
        # would have sent everything.
        self._events_paid = self._size_paid = float("-inf")

    def opens(self) -> float:
        """Return the time from which the next message may be taken."""
        return max(self._events_paid, self._size_paid)

    def charge(self, events: int, size: int, now: float) -> None:
        """Count a message of so many events and bytes."""
        since = now - self._burst
        if self._events is not None:
            self._events_paid = max(self._events_paid, since) + events / self._events
        if self._size is not None:
            self._size_paid = max(self._size_paid, since) + size / self._size

"""The times of a stream's own questions: in silence for batches that it has missed, after losses for the whole history,
and for another connection if nothing else helps."""

from __future__ import annotations

from collections.abc import Callable

from .policy import StreamPolicy

__all__ = ["Waits"]


class Waits:
    """Three planned times, with growing waits between them. ``uniform`` returns numbers in [0, 1) for the jitter. Times
    are seconds of any steady clock. Every call is O(1)."""

    __slots__ = (
        "_policy", "_uniform", "heal_at", "heal_wait", "heard_at", "held_up_until", "probe_at", "probe_wait",
        "renew_at", "renew_wait",
    )  # fmt: skip

    def __init__(self, policy: StreamPolicy, uniform: Callable[[], float]) -> None:
        self._policy = policy
        self._uniform = uniform
        self.heard_at = 0.0
        """When the last message came, or may have come."""
        self.held_up_until = float("-inf")
        """The time before which no message is taken, by our own choice."""
        self.probe_at: float | None = None
        self.probe_wait = 0.0
        self.heal_at: float | None = None
        self.heal_wait = policy.heal[0]
        self.renew_at: float | None = None
        self.renew_wait = policy.renew[0]

    def spread(self, wait: float) -> float:
        """Return a wait with jitter, so that the workers of a fleet do not come back at the same time."""
        return wait * (1.0 + self._policy.jitter * self._uniform())

    def heard(self, now: float) -> None:
        """Note a live batch: the silence starts again."""
        self.heard_at = now
        if self.probe_wait > self._policy.idle_probe[0]:
            self.stop_probing()

    @property
    def silent_at(self) -> float:
        """The time from which a publisher without further messages counts as silent."""
        return self.heard_at + self._policy.silence

    def stop_probing(self) -> None:
        self.probe_at, self.probe_wait = None, 0.0

    def plan_probe(self, now: float) -> None:
        """Plan the next probe: soon at first, then ever more rarely."""
        first, longest = self._policy.idle_probe
        self.probe_wait = min(longest, self.probe_wait * 2.0) if self.probe_wait else first
        self.probe_at = now + self.spread(self.probe_wait)

    def probe_at_once(self, now: float) -> None:
        """Plan a probe for now. It is not for a silence, so the wait for the next silence is as before."""
        self.probe_at, self.probe_wait = now, 0.0

    def plan_heal(self, now: float) -> None:
        if self.heal_at is None:
            self.heal_at = now + self.spread(self.heal_wait)
            self.heal_wait = min(self.heal_wait * 2.0, self._policy.heal[1])

    def plan_renewal(self, now: float) -> None:
        if self.renew_at is None:
            self.renew_at = now + self.spread(self.renew_wait)
            self.renew_wait = min(self.renew_wait * 2.0, self._policy.renew[1])

    def well(self) -> None:
        """Note that there is nothing to heal."""
        self.heal_at = None
        self.heal_wait = self._policy.heal[0]

"""The losses of a stream since its last clean start."""

from __future__ import annotations

from .history import fingerprint
from .reasons import Reason

__all__ = ["Losses"]

# Fingerprints of unreadable batches that are kept. Their publisher may have a readable copy of each.
_MOST = 256


class Losses:
    """Holes that were accepted, batches that could not be applied, and batches that were applied
    without proof. Every call is O(1)."""

    __slots__ = ("_bad", "count", "end", "guessed", "hopeless", "unproven")

    def __init__(self) -> None:
        self._bad: dict[int, int] = {}
        self.unproven = False
        """No replay has shown the batches before the first one."""
        self.forget()

    def forget(self) -> None:
        """Start again without losses."""
        self.count = 0
        """Accepted holes, and batches that could not be applied."""
        self.end = 0
        """The number after the last of them."""
        self.guessed = 0
        """The batches that were applied before this number are only assumed to be of the same process."""
        self.hopeless = False
        """The publisher no longer has the whole history."""
        self._bad.clear()

    def accept(self, end: int) -> None:
        """Give up a hole that ends before ``end``."""
        self.end = end
        self.count += 1

    def reject(self, seq: int, payload: bytes) -> None:
        """Record a batch that could not be applied."""
        self.count += 1
        self.end = max(self.end, seq + 1)
        if len(self._bad) < _MOST:
            self._bad[seq] = fingerprint(payload)
        else:
            self.hopeless = True

    def rejected(self, seq: int, mark: int) -> bool:
        """Whether this batch, with this fingerprint, could not be applied."""
        return self._bad.get(seq) == mark

    @property
    def can_heal(self) -> bool:
        """Whether something is missing that a replay of the whole history would bring."""
        return (self.count > 0 or self.unproven) and not self.hopeless

    def complaint(self) -> str:
        """Return why the applied batches may be fewer than the published ones, or an empty text."""
        if self.count:
            return Reason.HOLES.text(count=self.count)
        return Reason.UNPROVEN.text() if self.unproven else ""

"""What a stream has given up since its last clean start."""

from __future__ import annotations

from .history import fingerprint
from .reasons import Reason

__all__ = ["Losses"]

# Fingerprints of unreadable batches that are kept. Their publisher may have a readable copy of each.
_MOST = 256


class Losses:
    """Holes that were accepted, batches that could not be applied, and what is applied without proof. Every call is
    O(1)."""

    __slots__ = ("_bad", "count", "end", "guessed", "hopeless", "unproven")

    def __init__(self) -> None:
        self._bad: dict[int, int] = {}
        self.unproven = False
        """No replay has shown what was before the first batch."""
        self.forget()

    def forget(self) -> None:
        """Nothing that was given up matters any more."""
        self.count = 0
        """Holes."""
        self.end = 0
        """The number behind the last of them."""
        self.guessed = 0
        """What is applied before this batch is of the same process only as far as can be guessed."""
        self.hopeless = False
        """The publisher does not have the whole history any more."""
        self._bad.clear()

    def accept(self, end: int) -> None:
        """A hole that ends before ``end`` is given up."""
        self.end = end
        self.count += 1

    def reject(self, seq: int, payload: bytes) -> None:
        """A batch could not be applied."""
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
        """Why what is applied may be less than what was published, or nothing."""
        if self.count:
            return Reason.HOLES.text(count=self.count)
        return Reason.UNPROVEN.text() if self.unproven else ""

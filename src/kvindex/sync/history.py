"""What is known of the batches that were applied: their numbers, and fingerprints of the last of them."""

from __future__ import annotations

from array import array
from typing import Final

__all__ = ["LOST", "History", "fingerprint"]

LOST: Final = 0
"""In place of a fingerprint: the batch was given up."""

# The lowest bit of what is kept is not of the fingerprint: whether the batch came live. An array of its own would cost
# each worker a kilobyte.
_LIVE: Final = 1
_MASK: Final = 0x7FFF_FFFF_FFFF_FFFE


def fingerprint(payload: bytes) -> int:
    """62 bits of a payload, never :data:`LOST`. Keyed per process, and kept in the bytes object: a second call is
    free."""
    return (hash(payload) & _MASK) or 2


class History:
    """The batches up to ``next``, which is the number of the one that comes next. Every call is O(1) but :meth:`lose`,
    which is O(size)."""

    __slots__ = ("_anchor", "_connected_at", "_memory", "base", "dated", "lived", "next", "ts")

    def __init__(self, size: int) -> None:
        self.next = 0
        self.base = 0
        """The first number whose fingerprint is kept."""
        self.ts: float | None = None
        """The time of the last batch that says one, whose number is ``dated``."""
        self.dated = -1
        self.lived = -1
        """The last batch that was published over the connection that stands, and applied; -1 for none."""
        self._memory = array("q", bytes(8 * size))
        # The last batch that was applied, with its fingerprint, once so many behind it are given up that the memory has
        # no other: without it a stream that lost much could not tell its own process from another.
        self._anchor: tuple[int, int] | None = None
        self._connected_at = 0

    def forget(self) -> None:
        """Nothing is applied."""
        self.next = self.base = self._connected_at = 0
        self.lived = -1
        self._anchor = self.ts = None

    def place(self, seq: int, ts: float | None) -> None:
        """Everything up to ``seq`` was applied before, and nothing of it is remembered."""
        self.next = self.base = seq + 1
        self.ts, self.dated = ts, seq

    def connected(self) -> None:
        """What was applied so far came over another connection."""
        self._connected_at = self.next
        self.lived = -1

    def note(self, seq: int, payload: bytes, ts: float | None, live: bool) -> None:
        """A batch is applied: the next one, or the first. ``ts`` is its time."""
        memory = self._memory
        memory[seq % len(memory)] = (hash(payload) & _MASK or 2) | live
        if seq - self.base >= len(memory):
            self.base = seq - len(memory) + 1
        self.next = seq + 1
        if live:
            self.lived = seq
        if ts is not None:
            self.ts, self.dated = ts, seq

    def is_older_than(self, seq: int, ts: float | None) -> bool:
        """Whether a batch that is behind us says a time that is not: no batch of this process does."""
        # What was given up behind the last batch with a time is newer than that one by rights.
        return ts is not None and self.ts is not None and ts > self.ts and seq <= self.dated

    def restore(self, seq: int, payload: bytes) -> None:
        """The last batch that was applied is known again, and no other."""
        self.base = seq
        self._memory[seq % len(self._memory)] = fingerprint(payload)

    def recall(self, seq: int) -> int | None:
        """The fingerprint of a batch, :data:`LOST` when it was given up, None when it is not remembered."""
        if self.base <= seq < self.next:
            return self._memory[seq % len(self._memory)] & _MASK
        return self._anchor[1] & _MASK if self._anchor is not None and self._anchor[0] == seq else None

    def came_live(self, seq: int) -> bool:
        """Whether this batch was published over the connection that stands."""
        if seq < self._connected_at or not self.base <= seq < self.next:
            return False
        return bool(self._memory[seq % len(self._memory)] & _LIVE)

    @property
    def has_live(self) -> bool:
        """Whether the last batch that was published over this connection can be compared with an answer."""
        return self.came_live(self.lived)

    def is_of_connection(self, seq: int) -> bool:
        """Whether this batch was applied since the connection stands, live or by a replay."""
        return seq >= self._connected_at

    def confirm(self, seq: int) -> None:
        """A remembered batch that a replay brought was published over the connection that stands, too."""
        self._memory[seq % len(self._memory)] |= _LIVE
        self.lived = max(self.lived, seq)

    def came_by_replay(self, seq: int) -> bool:
        """Whether this batch was applied since the connection stands and was not published over it."""
        if seq < self._connected_at or not self.base <= seq < self.next:
            return False
        kept = self._memory[seq % len(self._memory)]
        return kept != LOST and not kept & _LIVE

    def lose(self, upto: int) -> None:
        """Everything from the next batch to ``upto``, which is not included, is given up."""
        at, size = self.next, len(self._memory)
        last = self.recall(at - 1)
        if last is not None and last != LOST:
            self._anchor = (at - 1, last)
        for seq in range(max(at, upto - size), upto):
            self._memory[seq % size] = LOST
        self.base = max(self.base, upto - size)
        self.next = upto

    def spoil(self, seq: int) -> None:
        """A batch could not be applied after all."""
        if self._anchor is not None and self._anchor[0] == seq:
            self._anchor = None
        if self.base <= seq < self.next:
            self._memory[seq % len(self._memory)] = LOST

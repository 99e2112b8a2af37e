"""The batches that were applied: their numbers, and the fingerprints of the latest ones."""

from __future__ import annotations

from array import array
from typing import Final

__all__ = ["LOST", "History", "fingerprint"]

LOST: Final = 0
"""Stored in place of a fingerprint: the batch was given up."""

# The lowest bit of a stored number is not part of the fingerprint: it is set if the batch came live. An array of its
# own would cost each worker a kilobyte.
_LIVE: Final = 1
_MASK: Final = 0x7FFF_FFFF_FFFF_FFFE


def fingerprint(payload: bytes) -> int:
    """Return 62 bits of a payload's hash, never :data:`LOST`. The hash is keyed per process and cached in the bytes
    object, so a second call is free."""
    return (hash(payload) & _MASK) or 2


class History:
    """The batches up to ``next``, which is the number of the batch that comes next. Every call is O(1) except
    :meth:`lose`, which is O(size)."""

    __slots__ = ("_anchor", "_connected_at", "_memory", "base", "dated", "lived", "next", "ts")

    def __init__(self, size: int) -> None:
        self.next = 0
        self.base = 0
        """The first number whose fingerprint is kept."""
        self.ts: float | None = None
        """The time of the last batch that has one. ``dated`` is the number of that batch."""
        self.dated = -1
        self.lived = -1
        """The last batch that was published over the current connection and applied; -1 if there is no such batch."""
        self._memory = array("q", bytes(8 * size))
        # The last applied batch with its fingerprint, kept for the case that all later batches in the memory are given
        # up. Without it, a stream that lost many batches could not distinguish its own process from another.
        self._anchor: tuple[int, int] | None = None
        self._connected_at = 0

    def forget(self) -> None:
        """Start again with no batch applied."""
        self.next = self.base = self._connected_at = 0
        self.lived = -1
        self._anchor = self.ts = None

    def place(self, seq: int, ts: float | None) -> None:
        """Continue after ``seq``: everything up to it was applied before, and no fingerprint of it is kept."""
        self.next = self.base = seq + 1
        self.ts, self.dated = ts, seq

    def connected(self) -> None:
        """Note another connection: all batches so far were applied before it."""
        self._connected_at = self.next
        self.lived = -1

    def note(self, seq: int, payload: bytes, ts: float | None, live: bool) -> None:
        """Record an applied batch: the next one, or the first. ``ts`` is its time."""
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
        """Whether a batch up to the last one with a time has a later time: no batch of this process has."""
        # Batches that were given up after the last batch with a time are rightly newer than that one.
        return ts is not None and self.ts is not None and ts > self.ts and seq <= self.dated

    def restore(self, seq: int, payload: bytes) -> None:
        """Remember the last applied batch again, and no other."""
        self.base = seq
        self._memory[seq % len(self._memory)] = fingerprint(payload)

    def recall(self, seq: int) -> int | None:
        """Return the fingerprint of a batch, :data:`LOST` if it was given up, None if it is not remembered."""
        if self.base <= seq < self.next:
            return self._memory[seq % len(self._memory)] & _MASK
        return self._anchor[1] & _MASK if self._anchor is not None and self._anchor[0] == seq else None

    def came_live(self, seq: int) -> bool:
        """Whether this batch was published over the current connection."""
        if seq < self._connected_at or not self.base <= seq < self.next:
            return False
        return bool(self._memory[seq % len(self._memory)] & _LIVE)

    @property
    def has_live(self) -> bool:
        """Whether the last batch that was published over this connection can be compared with a replay's answer."""
        return self.came_live(self.lived)

    def is_of_connection(self, seq: int) -> bool:
        """Whether this batch was applied since the current connection began, live or by a replay."""
        return seq >= self._connected_at

    def confirm(self, seq: int) -> None:
        """Note that a remembered batch, which a replay brought, was also published over the current connection."""
        self._memory[seq % len(self._memory)] |= _LIVE
        self.lived = max(self.lived, seq)

    def came_by_replay(self, seq: int) -> bool:
        """Whether this batch was applied since the current connection began, and was not published over it."""
        if seq < self._connected_at or not self.base <= seq < self.next:
            return False
        kept = self._memory[seq % len(self._memory)]
        return kept != LOST and not kept & _LIVE

    def lose(self, upto: int) -> None:
        """Give up the batches from the next one to ``upto``, which is not included."""
        at, size = self.next, len(self._memory)
        last = self.recall(at - 1)
        if last is not None and last != LOST:
            self._anchor = (at - 1, last)
        for seq in range(max(at, upto - size), upto):
            self._memory[seq % size] = LOST
        self.base = max(self.base, upto - size)
        self.next = upto

    def spoil(self, seq: int) -> None:
        """Note that a batch could not be applied after all."""
        if self._anchor is not None and self._anchor[0] == seq:
            self._anchor = None
        if self.base <= seq < self.next:
            self._memory[seq % len(self._memory)] = LOST

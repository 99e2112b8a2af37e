"""Live batches that wait until those before them are applied."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Pending", "Waiting"]


class Waiting(NamedTuple):
    """One waiting batch."""

    payload: bytes
    ts: float | None


class Pending:
    """Batches by number, at most ``most`` batches and ``most_bytes``. Every call is O(1) except :meth:`items`,
    :meth:`lowest` and :meth:`outdated`, which are O(batches)."""

    __slots__ = ("_batches", "_most", "_most_bytes", "_outdated", "bytes", "seen")

    def __init__(self, most: int, most_bytes: int) -> None:
        self._batches: dict[int, Waiting] = {}
        self._most = most
        self._most_bytes = most_bytes
        self._outdated = False
        self.bytes = 0
        self.seen = -1
        """The highest number that was published over this connection, whether its batch waits or not."""

    def __len__(self) -> int:
        return len(self._batches)

    def hold(self, seq: int, payload: bytes, ts: float | None, following: int) -> Literal["", "duplicates", "overflow"]:
        """Keep a batch. ``following`` is the number that is applied next, for which there is always room. Returns the
        counter of a batch that was not kept."""
        self.seen = max(self.seen, seq)
        if seq in self._batches:
            return "duplicates"
        full = len(self._batches) >= self._most or self.bytes + len(payload) > self._most_bytes
        if full and seq != following:
            # The newest batch is dropped: the replay that fills this gap brings it again.
            return "overflow"
        self._batches[seq] = Waiting(payload, ts)
        self.bytes += len(payload)
        self._outdated = self._outdated or seq < following
        return ""

    def get(self, seq: int) -> Waiting | None:
        return self._batches.get(seq)

    def pop(self, seq: int) -> Waiting | None:
        item = self._batches.pop(seq, None)
        if item is not None:
            self.bytes -= len(item.payload)
        return item

    def outdated(self, following: int) -> list[tuple[int, Waiting]]:
        """Drop the batches below ``following``: they were held while their process was not known, and are applied."""
        # Done seldom, because it scans all waiting batches, and there may be 10,000.
        if not self._outdated:
            return []
        self._outdated = False
        found = [(seq, item) for seq, item in self._batches.items() if seq < following]
        for seq, _ in found:
            self.pop(seq)
        return found

    def lowest(self, otherwise: int) -> int:
        return min(self._batches, default=otherwise)

    def items(self) -> list[tuple[int, Waiting]]:
        return sorted(self._batches.items())

    def clear(self) -> None:
        self._batches.clear()
        self.bytes = 0
        self.seen = -1
        self._outdated = False

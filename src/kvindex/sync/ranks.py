"""Several data-parallel ranks that publish through one socket: one sequence of batches, several workers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from .frames import carried_rank

__all__ = ["MOST_RANKS", "Ranks"]

MOST_RANKS: Final = 1024
"""Engines have tens of ranks; a number beyond this in a payload is damage and must not create a worker."""


class Ranks:
    """The workers that the batches of one publisher belong to. ``own`` is the rank that the stream was configured as;
    ``elsewhere`` are the ranks of the same pod that have streams of their own.

    A publisher that names only one rank stands for ``own``, even if that rank has another number: one rank of a model
    that is spread over many may be a pod by itself. Different ranks in one stream are different workers. Dynamo's
    standalone indexer and vllm-ascend's collectors do the same.
    """

    __slots__ = ("_last", "_named", "elsewhere", "misplaced", "others", "own", "several")

    def __init__(self, own: int, elsewhere: Collection[int]) -> None:
        self.own = own
        self.elsewhere = elsewhere
        self.others: frozenset[int] = frozenset()
        """The workers other than ``own`` that batches were applied to."""
        self.several = False
        self.misplaced: int | None = None
        """A rank that a batch named here although it has a stream of its own."""
        self._named: int | None = None
        self._last = -1

    def is_own(self, payload: bytes) -> bool:
        """Whether a batch is of ``own`` at first sight: it names no rank, or the same rank as the one before. O(1)."""
        # The rank is the last element of the array. Its last byte is enough if it has the usual value and is not the
        # end of a longer number. Skipping over the events to read the rank costs half as much as decoding them.
        if len(payload) <= 3:
            return payload[:1] == b"\x92"
        if payload[0] != 0x93:
            return payload[0] == 0x92
        last = payload[-1]
        if last != 0xC0 and (last != self._last or self.several):
            return False
        return payload[-2] != 0xCC and payload[-3] != 0xCD

    def of(self, payload: bytes) -> int | None:
        """Return the worker that a batch belongs to. None means that the batches applied to ``own`` so far were another
        worker's: clear it, and apply the stream from scratch. O(1) for a batch of the same rank as
        before; O(bytes) for another."""
        if self.is_own(payload):
            return self.own
        carried = carried_rank(payload)
        if carried is None or carried >= MOST_RANKS:
            return self.own
        if carried != self.own and carried in self.elsewhere:
            self.misplaced = carried
            return self.own
        if self._named is None:
            self._named = carried
            self._last = carried if carried < 128 else -1
        if not self.several:
            if carried == self._named:
                return self.own
            self.several = True
            if self._named != self.own:
                return None
        if carried != self.own:
            self.others |= {carried}
        return carried

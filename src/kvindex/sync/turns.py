"""Turns for replays: a limited number at the same time, and the others in their order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

__all__ = ["Turns"]


class Turns:
    """At most ``most`` turns at once. Belongs to one thread; every call is O(1)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: set[Hashable] = set()
        self._queue: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any turn is taken."""
        return bool(self._taken)

    def take(self, who: Hashable, then: Callable[[], None]) -> bool:
        """Take a turn if one is free. Otherwise return False, and call ``then`` when one may be free;
        it has to ask again."""
        if len(self._taken) >= self.most:
            self._queue[who] = then
            return False
        self._taken.add(who)
        return True

    def leave(self, who: Hashable) -> None:
        """Give a turn back, or leave the queue."""
        self._queue.pop(who, None)
        if who in self._taken:
            self._taken.discard(who)
            if self._queue:
                self._queue.popitem(last=False)[1]()

    def end(self) -> None:
        """Empty the queue: waiting callers no longer get a turn."""
        self._queue.clear()

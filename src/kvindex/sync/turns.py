"""Who may ask for a replay: so many at once, the others in their order."""

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
        """Whether anybody has a turn."""
        return bool(self._taken)

    def take(self, who: Hashable, then: Callable[[], None]) -> bool:
        """Whether it is this one's turn now; if not, ``then`` is called when it may be, and asks again."""
        if len(self._taken) >= self.most:
            self._queue[who] = then
            return False
        self._taken.add(who)
        return True

    def leave(self, who: Hashable) -> None:
        """This one has its turn no more, and waits for none."""
        self._queue.pop(who, None)
        if who in self._taken:
            self._taken.discard(who)
            if self._queue:
                self._queue.popitem(last=False)[1]()

    def end(self) -> None:
        """Nobody who waits gets a turn any more."""
        self._queue.clear()

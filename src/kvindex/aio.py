"""Live streams for asyncio: :class:`AsyncEventManager`.

The streams run in the one thread of :class:`kvindex.EventManager`, and no method blocks the event loop. A match takes
microseconds and needs no ``await``::

    import asyncio
    from kvindex import PodSource, PrefixIndex
    from kvindex.aio import AsyncEventManager

    index = PrefixIndex(block_size=16)

    async def best_pod(tokens):
        async with AsyncEventManager(index) as manager:
            await manager.add_pod(PodSource("a", endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558"))
            await manager.wait_until_current(timeout=1.0)
            return index.match_prefix(tokens, only_exact=True).best()

    print(asyncio.run(best_pod(range(64))))             # ("a", 48), or None if no exact pod holds a block of it
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar

from .sync.manager import EventManager, Index
from .sync.source import PodSource
from .sync.status import PodStatus, StateChange

__all__ = ["AsyncEventManager", "Changes"]

T = TypeVar("T")


class AsyncEventManager:
    """:class:`kvindex.EventManager` for asyncio, with the same behaviour and errors.

    Coroutines are ``close``, ``add_pod``, ``remove_pod``, ``bind``, ``wait_until_current`` and ``wait_until_exact``.
    Plain methods are ``status``, ``faults``, ``is_current``, ``is_exact`` and ``inexact``, which do not wait.
    :meth:`changes` replaces ``on_change``.

    An async context manager. It does not belong to an event loop: each method may be awaited in any loop. A method
    that is cancelled has either taken effect or never will.

    Args:
        index: The :class:`PrefixIndex` to update.
        options: The other arguments of :class:`kvindex.EventManager`.

    Raises:
        InvalidTypeError: As for :class:`kvindex.EventManager`.
        InvalidValueError: As for :class:`kvindex.EventManager`.
    """

    def __init__(self, index: Index, **options: Any) -> None:
        self._manager = EventManager(index, **options)

    @property
    def manager(self) -> EventManager:
        """The underlying manager, for functions that take one, such as discovery."""
        return self._manager

    async def __aenter__(self) -> Self:
        self._manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As :meth:`kvindex.EventManager.close`. It completes even if the call is cancelled."""
        await asyncio.shield(asyncio.to_thread(self._manager.close))

    async def add_pod(self, source: PodSource) -> None:
        """As :meth:`kvindex.EventManager.add_pod`. ``PodSource.from_vllm`` and ``from_sglang`` block during an HTTP
        request: ``await asyncio.to_thread(PodSource.from_vllm, url)``.
        """
        await self._do(partial(self._manager.add_pod, source))

    async def remove_pod(self, name: str) -> None:
        """As :meth:`kvindex.EventManager.remove_pod`."""
        await self._do(partial(self._manager.remove_pod, name))

    async def bind(self, endpoint: str, **options: Any) -> str:
        """As :meth:`kvindex.EventManager.bind`."""
        return await self._do(partial(self._manager.bind, endpoint, **options))

    async def _do(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._manager.post(command))

    def status(self) -> dict[str, PodStatus]:
        """As :meth:`kvindex.EventManager.status`. Does not wait."""
        return self._manager.status()

    def faults(self) -> dict[str, int]:
        """As :meth:`kvindex.EventManager.faults`."""
        return self._manager.faults()

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """As :meth:`kvindex.EventManager.is_current`."""
        return self._manager.is_current(pods)

    async def wait_until_current(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> bool:
        """As :meth:`kvindex.EventManager.wait_until_current`."""
        return await self._wait(self._manager.is_current, timeout, pods)

    async def wait_until_exact(
        self, timeout: float | None = None, *, pods: Iterable[str] | None = None
    ) -> dict[str, str]:
        """As :meth:`kvindex.EventManager.wait_until_exact`."""
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        done = await self._wait(self._manager.is_exact, timeout, names)
        return {} if done else self._manager.inexact(names)

    def is_exact(self, pods: Iterable[str] | None = None) -> bool:
        """As :meth:`kvindex.EventManager.is_exact`."""
        return self._manager.is_exact(pods)

    def inexact(self, pods: Iterable[str] | None = None) -> dict[str, str]:
        """As :meth:`kvindex.EventManager.inexact`."""
        return self._manager.inexact(pods)

    async def _wait(
        self, ready: Callable[[list[str] | None], bool], timeout: float | None, pods: Iterable[str] | None
    ) -> bool:
        names = None if pods is None else [pods] if isinstance(pods, str) else list(pods)
        loop = asyncio.get_running_loop()
        progress = asyncio.Event()
        end = self._manager.on_progress(_Waker(loop, progress))
        try:
            async with asyncio.timeout(timeout):
                while not ready(names):
                    if self._manager.closed:
                        return False
                    await progress.wait()
                    progress.clear()
        except TimeoutError:
            return False
        finally:
            end()
        return True

    def changes(self, *, limit: int = 10_000) -> Changes:
        """Returns an async iterator over every change of a worker's state from now on. It ends when the manager is
        closed.

        It belongs to the running event loop.

        Args:
            limit: Changes that may wait. Beyond it the oldest are dropped and counted in :attr:`Changes.dropped`.
        """
        return Changes(self._manager, limit)


class Changes:
    """The changes of workers' states, from :meth:`AsyncEventManager.changes`.

    It listens until it is closed, garbage-collected, or the manager is closed.
    """

    def __init__(self, manager: EventManager, limit: int) -> None:
        self.dropped = 0
        """Changes that were not taken in time and were dropped."""
        self._manager = manager
        self._waiting: deque[StateChange] = deque(maxlen=max(1, limit))
        self._arrived = asyncio.Event()
        self._over = False
        # The manager refers to the iterator weakly, so that an iterator that is abandoned (a break out of the loop)
        # does not receive changes forever.
        me = weakref.ref(self)

        def put(change: StateChange) -> None:
            if (changes := me()) is not None:
                changes._put(change)

        waker = _Waker(asyncio.get_running_loop(), self._arrived)
        ends = (manager.on_change(put), manager.on_progress(waker))
        self._end = weakref.finalize(self, lambda: [end() for end in ends])
        self._end.atexit = False

    def _put(self, change: StateChange) -> None:
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(change)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StateChange:
        while True:
            self._arrived.clear()
            with suppress(IndexError):
                return self._waiting.popleft()
            if self._over or self._manager.closed:
                raise StopAsyncIteration
            await self._arrived.wait()

    async def aclose(self) -> None:
        """Ends the iteration, also for a task that waits for the next change."""
        self._over = True
        self._end()
        self._arrived.set()


class _Waker:
    """Sets an event of a loop, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._loop = loop
        self._event = event
        self._on_its_way = False

    def __call__(self) -> None:
        # One call at a time waits in the loop, however busy it is. A closed loop has no waiting callers.
        if not self._on_its_way:
            self._on_its_way = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._on_its_way = False
        self._event.set()

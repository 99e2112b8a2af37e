"""The live streams for programs that live in an event loop: :class:`AsyncEventManager`.

The streams are those of :class:`kvindex.EventManager`, in its one thread: nothing here decides anything about them, and
no method holds up the event loop. Asking the index takes microseconds and needs no ``await``::

    import asyncio
    from kvindex import PodSource, PrefixIndex
    from kvindex.aio import AsyncEventManager

    index = PrefixIndex(block_size=16)

    async def best_pod(tokens):
        async with AsyncEventManager(index) as manager:
            await manager.add_pod(PodSource("a", endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558"))
            await manager.wait_until_current(timeout=1.0)
            return index.match_prefix(tokens, only_exact=True).best()

    print(asyncio.run(best_pod(range(64))))             # ("a", 48), or None: nobody is known to have it
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
    """:class:`kvindex.EventManager` for asyncio: the same arguments, behaviour and errors.

    To be awaited: ``close``, ``add_pod``, ``remove_pod``, ``bind``, ``wait_until_current``,
    ``wait_until_exact``; not to be awaited, since they wait for nobody: ``status``, ``faults``, ``is_current``,
    ``is_exact``, ``inexact``. :meth:`changes` takes the place of ``on_change``.

    An async context manager. Belongs to no event loop: each method may be awaited in any. A method that is cancelled
    while it waits has either taken effect or never will.
    """

    def __init__(self, index: Index, **options: Any) -> None:
        self._manager = EventManager(index, **options)

    @property
    def manager(self) -> EventManager:
        """The manager underneath, for what takes one: discovery, or threads beside the event loop."""
        return self._manager

    async def __aenter__(self) -> Self:
        self._manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the thread, close every socket, and mark what was followed ``stale``. Closing twice is fine; cancelled,
        it closes all the same."""
        await asyncio.shield(asyncio.to_thread(self._manager.close))

    async def add_pod(self, source: PodSource) -> None:
        """As :meth:`kvindex.EventManager.add_pod`. ``PodSource.from_vllm`` and ``from_sglang`` ask over HTTP and block:
        ``await asyncio.to_thread(PodSource.from_vllm, url)``."""
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
        """As :meth:`kvindex.EventManager.status`; waits for nobody."""
        return self._manager.status()

    def faults(self) -> dict[str, int]:
        """As :meth:`kvindex.EventManager.faults`."""
        return self._manager.faults()

    def is_current(self, pods: Iterable[str] | None = None) -> bool:
        """As :meth:`kvindex.EventManager.is_current`."""
        return self._manager.is_current(pods)

    async def wait_until_current(self, timeout: float | None = None, *, pods: Iterable[str] | None = None) -> bool:
        """As :meth:`kvindex.EventManager.wait_until_current`: False when ``timeout`` seconds were not enough, or the
        manager was closed."""
        return await self._wait(self._manager.is_current, timeout, pods)

    async def wait_until_exact(
        self, timeout: float | None = None, *, pods: Iterable[str] | None = None
    ) -> dict[str, str]:
        """As :meth:`kvindex.EventManager.wait_until_exact`: the pods that are not exact after ``timeout`` seconds, and
        why."""
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
        """Every change of a worker's state from now on, as an async iterator that ends when the manager is closed.

        Belongs to the running event loop. ``limit`` changes may wait to be taken; beyond that the oldest are dropped,
        and :attr:`Changes.dropped` counts them.
        """
        return Changes(self._manager, limit)


class Changes:
    """``async for change in manager.changes()``: a :class:`~kvindex.sync.status.StateChange` each.

    Listens from the moment it is made until it is closed, forgotten, or the manager is closed.
    """

    def __init__(self, manager: EventManager, limit: int) -> None:
        self.dropped = 0
        """Changes that nobody took in time."""
        self._manager = manager
        self._waiting: deque[StateChange] = deque(maxlen=max(1, limit))
        self._arrived = asyncio.Event()
        self._over = False
        # The manager knows it weakly, so that an iterator which is merely left (a break out of the loop) is not fed for
        # ever.
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
        """Listen no longer; whoever waits for a change gets none."""
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
        # One call at a time waits in the loop, however busy it is. A loop that is closed has nobody left who waits.
        if not self._on_its_way:
            self._on_its_way = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._on_its_way = False
        self._event.set()

"""Replication for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Self

from ..index import PrefixIndex
from ..sync.source import PodSource
from .status import ReplicationStatus
from .view import ReplicatedIndex

__all__ = ["AsyncReplicatedIndex"]


class AsyncReplicatedIndex:
    """:class:`ReplicatedIndex` for asyncio, with the same behaviour and errors. An async context manager.

    Args:
        server: As for :class:`ReplicatedIndex`.
        options: The keyword arguments of :class:`ReplicatedIndex`.
    """

    def __init__(self, server: Any, **options: Any) -> None:
        self._view = ReplicatedIndex(server, **options)

    @property
    def view(self) -> ReplicatedIndex:
        """The underlying view, for its callbacks. They run in its own thread."""
        return self._view

    @property
    def index(self) -> PrefixIndex:
        """As :attr:`ReplicatedIndex.index`; a match needs no ``await``."""
        return self._view.index

    @property
    def role(self) -> str:
        """As :attr:`ReplicatedIndex.role`."""
        return self._view.role

    def status(self) -> ReplicationStatus:
        """As :meth:`ReplicatedIndex.status`."""
        return self._view.status()

    def pods(self) -> dict[str, PodSource]:
        """As :meth:`ReplicatedIndex.pods`."""
        return self._view.pods()

    async def __aenter__(self) -> Self:
        self._view.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As :meth:`ReplicatedIndex.close`. It also closes if it is cancelled."""
        await asyncio.shield(asyncio.to_thread(self._view.close))

    async def add_pod(self, source: PodSource) -> None:
        """As :meth:`ReplicatedIndex.add_pod`."""
        await asyncio.to_thread(self._view.add_pod, source)

    async def remove_pod(self, name: str) -> None:
        """As :meth:`ReplicatedIndex.remove_pod`."""
        await asyncio.to_thread(self._view.remove_pod, name)

    async def wait_until_exact(
        self, timeout: float | None = None, *, pods: Iterable[str] | None = None
    ) -> dict[str, str]:
        """As :meth:`ReplicatedIndex.wait_until_exact`."""
        names = None if pods is None else list(pods)
        loop = asyncio.get_running_loop()
        until = None if timeout is None else loop.time() + timeout
        while missing := self._view.wait_until_exact(0.0, pods=names) or ({} if self.pods() or names else {"": "none"}):
            if until is not None and loop.time() >= until:
                break
            await asyncio.sleep(0.02)
        return missing

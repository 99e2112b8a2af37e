"""A forwarding proxy between the index and one socket of a pod, which delays, damages or cuts what passes.

Only from the pod to the index: that is where the events flow. What the kernel here can not do (netem) is done here,
and damage that TCP's own checksum would have found, as a broken middlebox behind that checksum does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter

__all__ = ["Proxy"]


class Proxy:
    """Listens on the loopback and forwards to ``host:port``; one thread for its own event loop.

    ``delay`` (seconds), ``flip`` (the share of chunks in which bytes are flipped) and ``cut`` (the share of chunks
    after whose first half the connection is closed) may be set at any time. ``counts`` has what was done.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.delay = 0.0
        self.flip = 0.0
        self.cut = 0.0
        self.counts: Counter[str] = Counter()
        self._to = (host, port)
        self._dice = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        away = None
        try:
            back, away = await asyncio.open_connection(*self._to)
            forward = asyncio.ensure_future(self._copy(reader, away))
            try:
                await self._pass(back, writer)
            finally:
                forward.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await forward
        except OSError:
            pass  # a pod that is not there, or an end that is gone: so is the connection
        finally:
            self._tasks.discard(task)
            for end in (writer, away):
                if end is not None:
                    end.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            while True:
                data = await reader.read(16384)
                await queue.put((self._loop.time() + self.delay, data))
                if not data:
                    return

        taking = asyncio.ensure_future(take())
        try:
            while True:
                at, data = await queue.get()
                self.counts["delayed"] += at > self._loop.time() + 0.01
                await asyncio.sleep(at - self._loop.time())
                if not data:
                    return
                if self.cut and self._dice.random() < self.cut:
                    self.counts["cut"] += 1
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    return
                writer.write(self._damaged(data))
                await writer.drain()
        finally:
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await taking

    def _damaged(self, data: bytes) -> bytes:
        if not self.flip or self._dice.random() >= self.flip:
            return data
        self.counts["flipped"] += 1
        # A burst, long enough to hit what gives a batch its form. One flipped bit within a token leaves a batch that
        # reads like any other: no event carries a checksum, so nobody behind TCP's could tell.
        length = min(len(data), self._dice.randrange(64, 257))
        start = self._dice.randrange(len(data) - length + 1)
        burst = bytes(byte ^ 0xFF for byte in data[start : start + length])
        return data[:start] + burst + data[start + length :]

    def close(self) -> None:
        """End every connection and the thread."""

        async def end() -> None:
            self._server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

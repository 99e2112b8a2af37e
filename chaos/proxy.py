"""A forwarding proxy between the index and one socket of a pod, which delays, damages or cuts the data.

It changes only the direction from the pod to the index, which is that of the events. It replaces netem, which the
kernel may lack. Its damage is that of a broken middlebox, which TCP's own checksum does not find.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter

__all__ = ["Proxy"]


class Proxy:
    """A proxy that listens on the loopback and forwards to ``host:port``, in a thread with its own event loop.

    ``delay`` (seconds), ``flip`` (the share of chunks in which bytes are flipped) and ``cut`` (the share of chunks
    after whose first half the connection is closed) may be set at any time. ``counts`` counts these effects.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.delay = self.flip = self.cut = 0.0
        self.counts: Counter[str] = Counter()
        self._to = (host, port)
        # A loop has only weak references to tasks, and no reference to the sockets of a connection that is closing.
        # A garbage collection at that moment destroyed the connection's task.
        self._serving: set[asyncio.Task[None] | None] = set()
        self._dice = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self._serving.add(asyncio.current_task())
        # Without the pod, or when one end has closed, the connection is over.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            back, away = await asyncio.open_connection(*self._to)
            ends.append(away)
            ways = [asyncio.ensure_future(way) for way in (self._copy(reader, away), self._pass(back, writer))]
            try:
                await ways[1]
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        for end in ends:
            end.close()
        self._serving.discard(asyncio.current_task())

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            data = b"first"
            while data:
                data = await reader.read(16384)
                queue.put_nowait((self._loop.time() + self.delay, data))

        taking = asyncio.ensure_future(take())
        try:
            while (due := await queue.get())[1]:
                at, data = due
                self.counts["delayed"] += at > self._loop.time() + 0.01
                await asyncio.sleep(at - self._loop.time())
                cut = self._dice.random() < self.cut
                writer.write(data[: len(data) // 2] if cut else self._damaged(data))
                await writer.drain()
                if cut:
                    self.counts["cut"] += 1
                    return
        finally:
            taking.cancel()

    def _damaged(self, data: bytes) -> bytes:
        if self._dice.random() >= self.flip:
            return data
        self.counts["flipped"] += 1
        # A burst, long enough to hit the structure of a batch. One flipped bit within a token would leave a valid
        # batch: events have no checksum of their own, so no reader could detect it.
        length = min(len(data), self._dice.randrange(64, 257))
        start = self._dice.randrange(len(data) - length + 1)
        burst = bytes(byte ^ 0xFF for byte in data[start : start + length])
        return data[:start] + burst + data[start + length :]

    def close(self) -> None:
        """End every connection and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        # In this thread, so no connection starts between the last task and the end of the loop.
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        # A connection that has just been accepted gets its task only after some turns of the loop.
        for _ in range(8):
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)

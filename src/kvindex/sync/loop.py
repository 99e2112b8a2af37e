"""The thread that owns every socket: its poll loop, its timers, and the commands of other threads."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import zmq

from ..errors import StreamError
from .pulse import Pulse

__all__ = ["StreamLoop"]

log = logging.getLogger("kvindex.sync")

T = TypeVar("T")

# Milliseconds for which messages gather while they flow, because a wake-up of the thread costs more than a batch. At
# 1,000 batches a second from 32 pods, a batch took 66 us of the thread at 2 ms, 47 at 5 and 43 at 8. The first message
# after a pause is taken at once, and an engine publishes once in a step, which takes 10 ms or more.
GATHER: Final = 5

# Nanoseconds by which timers of libzmq's I/O thread may be late. The heartbeats of 1,000 connections cause 2,000
# wake-ups a second at the system's 50 us, and 20 at this value. 256 idle pods take 2.1 % of a core at 50 us, and 0.6 %
# at this value.
_TIMER_SLACK: Final = 50_000_000


_READ: Final = selectors.EVENT_READ  # the same value as EPOLLIN


class _Poller:
    """The part of ``select.epoll`` that the loop uses, for systems without it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.register = self._selector.register
        self.unregister = self._selector.unregister
        self.close = self._selector.close

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        return [(key.fd, events) for key, events in self._selector.select(timeout)]


class StreamLoop:
    """One thread for many sockets and timers. :meth:`call`, :meth:`post`, :meth:`within`, :meth:`start` and
    :meth:`close` may be called from any thread, everything else from the loop's own.

    ``ending`` is called in the thread when it ends for any reason, while its sockets still exist; ``ended`` is called
    when it is over. ``hurries`` returns whether messages are taken as fast as they come. ``pulse`` gets the signs of
    life.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Any] | None,
        hurries: Callable[[], bool],
        ending: Callable[[], None],
        ended: Callable[[], None],
        pulse: Pulse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._own_context = context is None
        self._context = context
        self._hurries = hurries
        self._ending = ending
        self._ended = ended
        self._pulse = pulse
        self._lock = threading.Lock()
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._stopping = self._stopped = False
        self.failure: Exception | None = None
        """The error that has ended the thread, if :meth:`close` has not."""
        self._handlers: dict[int, Any] = {}  # by file descriptor
        self._hot: set[Any] = set()
        self.behind_at = -math.inf
        """The last time when a turn ended with messages left in a socket."""
        self._flows = False  # the last turn has found messages
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._soon: set[Callable[[], None]] = set()

    # ------------------------------------------------------------------------------------------- from any thread

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, the thread has ended by itself, or the thread is not in this process."""
        return self._stopping or self._elsewhere

    @property
    def is_current(self) -> bool:
        """Whether this is called in the loop's own thread."""
        return threading.current_thread() is self._thread

    @property
    def _elsewhere(self) -> bool:
        # A forked child has the thread's locks and sockets, and would wait for the thread forever.
        return self._thread is not None and self._pid != os.getpid()

    def start(self) -> None:
        """Start the thread unless it runs. Raises :class:`StreamError` after a close, or in a forked child."""
        if self._elsewhere:
            raise StreamError(
                f"this EventManager has its thread in process {self._pid}, which forked this one: "
                f"make another EventManager here, and give it the pods again"
            )
        with self._lock:
            if self._stopping:
                raise StreamError("this EventManager is closed")
            if self._thread is not None:
                return
            if self._context is None:
                self._context = zmq.Context()
                # libzmq's default limit is 1,023 sockets, which is 340 workers. Its table takes 12 bytes a socket.
                self._context.max_sockets = self._context.get(zmq.SOCKET_LIMIT)
            self._poller = select.epoll() if hasattr(select, "epoll") else _Poller()
            self._wake, self._woken = socket.socketpair()
            for end in (self._wake, self._woken):
                end.setblocking(False)
            self._called = select.poll()
            self._called.register(self._woken, select.POLLIN)
            self._poller.register(self._woken.fileno(), _READ)
            self._pid = os.getpid()
            self._thread = threading.Thread(target=self._run, name="kvindex-streams", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and wait for its end, unless this is the thread. In a forked child, do
        nothing: the thread is the parent's."""
        if self._elsewhere:
            self._stopping = True
            return
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is None:
            self._ended()
            return
        self._poke()
        if not self.is_current:
            thread.join()

    @property
    def runs(self) -> bool:
        """Whether the thread is in this process and was not asked to end."""
        return self._thread is not None and not self.closed

    @property
    def over(self) -> bool:
        """Whether the thread no longer does anything, or is not in this process."""
        return self._stopped or self._elsewhere

    def stop(self) -> None:
        """Let the thread end, without a wait. Takes no lock, because the garbage collector may call it anywhere."""
        self._stopping = True
        self._poke()

    def call(self, command: Callable[[], T]) -> T:
        """Run a command in the thread and return its result."""
        return command() if self.is_current else self.post(command).result()

    def post(self, command: Callable[[], T]) -> Future[T]:
        """Run a command in the thread without waiting for it. Raises :class:`StreamError` after a close."""
        self.start()
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._stopped:
                raise StreamError("this EventManager is closed")
            self._commands.append(run)
        self._poke()
        return future

    def within(self, command: Callable[[], None]) -> None:
        """Run a command in the loop's thread: at once from there, soon from any other thread, never after a close."""
        if self.is_current:
            command()
        elif not self._stopping and not self._elsewhere:
            self._commands.append(command)
            self._poke()

    def _poke(self) -> None:
        # If the socket is full, the thread is awake already. If it is closed, the thread has ended.
        with suppress(OSError):
            self._wake.send(b"\0")

    # ---------------------------------------------------------------------------------------------- from its own thread

    @property
    def context(self) -> zmq.Context[Any]:
        assert self._context is not None
        return self._context

    def watch(self, fd: int, handler: Any) -> None:
        self._poller.register(fd, _READ)
        self._handlers[fd] = handler
        self._hot.add(handler)  # messages from before the registration cause no event

    def unwatch(self, fd: int) -> None:
        del self._handlers[fd]
        with suppress(OSError):  # it is closed already
            self._poller.unregister(fd)

    def again(self, handler: Any) -> None:
        """Call the handler's ``ready`` before the loop waits again."""
        self._hot.add(handler)

    def call_at(self, due: float, callback: Callable[[float], None]) -> None:
        """Call this with the current time when it is ``due``."""
        heapq.heappush(self._timers, (due, next(self._order), callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call this once before the loop waits again, however often it is requested."""
        self._soon.add(callback)

    # ---------------------------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        try:
            self._start_io()
            self._pulse.beat(self.clock(), -math.inf)
            while not self._stopping:
                self._turn()
        except Exception as error:
            self.failure = error
            log.exception("the thread of kvindex's streams has failed; every pod is stale from here on")
        finally:
            self._end()

    def _start_io(self) -> None:
        """Start libzmq's own threads, which inherit this thread's timer slack if the system has one."""
        if not self._own_context:
            return
        with suppress(OSError, zmq.ZMQError), open(f"/proc/{threading.get_native_id()}/timerslack_ns", "w") as slack:
            print(_TIMER_SLACK, file=slack, flush=True)
            try:
                self.context.socket(zmq.PAIR).close(0)
            finally:
                print(0, file=slack)  # back to the system's default

    def _turn(self) -> None:
        if self._flows and not self._hot and not self._hurries():
            self._called.poll(GATHER)
            wait: float | None = 0.0
        else:
            now = self.clock()
            due = min(self._timers[0][0], self._pulse.due) if self._timers else self._pulse.due
            wait = 0.0 if self._hot else max(0.0, due - now) if due < math.inf else None
        self._flows = False
        hot, handlers = self._hot, self._handlers
        for fd, _ in self._poller.poll(wait):
            if fd in handlers:
                hot.add(handlers[fd])
                self._flows = True
            else:
                with suppress(BlockingIOError):
                    while self._woken.recv(4096):
                        pass
        while self._commands:
            self._do(self._commands.popleft())
        now = self.clock()
        hot, self._hot = self._hot, set()
        for handler in hot:
            if (moment := self.clock()) >= self._pulse.due:  # a turn of many streams may take long
                self._pulse.beat(moment, moment)
            try:
                if not handler.closed and handler.ready(now):
                    self._hot.add(handler)
            except Exception as error:
                # The failure of one stream must not affect the others.
                log.exception("a stream has failed")
                handler.failed(now, error)
        if self._hot:
            self.behind_at = self.clock()
        if now >= self._pulse.due:
            self._pulse.beat(now, self.behind_at)
        while self._timers and self._timers[0][0] <= now:
            self._do(partial(heapq.heappop(self._timers)[2], now))
        if self._soon:
            soon, self._soon = self._soon, set()
            for callback in soon:
                callback()

    def _do(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:
            # Callers get the errors of their own commands. This one is the loop's own and concerns one pod.
            log.exception("something of one stream has failed; its time will bring it again")

    def _end(self) -> None:
        with self._lock:
            self._stopping = True
        self._do(self._ending)
        self._pulse.end()
        with self._lock:
            self._stopped = True
            left, self._commands = self._commands, deque()
        for command in left:
            self._do(command)
        if self._own_context and self._context is not None:
            self._context.destroy(linger=0)
        self._poller.close()
        self._wake.close()
        self._woken.close()
        self._ended()

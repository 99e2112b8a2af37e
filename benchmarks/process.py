"""The process that is measured: its memory, and one that has done nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import psutil

__all__ = ["apart", "resident", "settle"]


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def settle() -> int:
    """The same, once the allocator has given back what it can."""
    psutil.heap_trim()
    return resident()


def apart(call: Callable[..., Any], *given: Any) -> Any:
    """The answer of a process that has done nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(call, *given).result()

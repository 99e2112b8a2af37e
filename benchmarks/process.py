"""The memory of the measured process, and calls in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import psutil

__all__ = ["apart", "resident", "settle"]


def resident() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def settle() -> int:
    """The same, after the allocator has returned free memory to the system."""
    psutil.heap_trim()
    return resident()


def apart(call: Callable[..., Any], *given: Any) -> Any:
    """The result of a call in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(call, *given).result()

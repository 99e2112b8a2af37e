"""One workload in asv's form: other inputs for every sample, made outside the measured time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

from ..workloads import Workload

__all__ = ["Sampled"]


@lru_cache(maxsize=1)
def _made(make: Callable[..., Workload], options: tuple[tuple[str, Any], ...], args: tuple[Any, ...]) -> Workload:
    # asv calls setup for each sample. The index is filled once a process; only the inputs are new.
    return make(*args, **dict(options))


class Sampled:
    """The base of the suite's classes. ``make`` makes the workload; a sample is ``number`` calls on as many inputs."""

    number = 4
    repeat = (5, 30, 3.0)
    warmup_time = 0.0
    make: Callable[..., Workload]
    options: dict[str, Any] = {}  # noqa: RUF012
    _round = count()

    def setup(self, *args: Any) -> None:
        self.workload = _made(type(self).make, tuple(self.options.items()), args)
        self.call = self.workload.call
        self.items = iter(self.workload.items(next(self._round)))

    def teardown(self, *_: Any) -> None:
        self.workload.undo()

    def run(self) -> None:
        self.call(next(self.items))

"""An index between a simulated fleet and its router that counts and times its events and queries."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from .. import PrefixIndex, PrefixMatch
from ..sim.engine import Prompt
from ..sim.fleet import Fleet, Pod

__all__ = ["TimedIndex"]

SHOWN_DIFFERENCES = 10


class TimedIndex:
    """A :class:`PrefixIndex` with a clock: ``publish`` takes a fleet's events, ``match_prefix`` a router's queries.

    Answers about ``pods`` follow the rules of their engines. ``check`` compares the index's answers to one prompt with
    the engines' own. ``wrong`` describes the first differences, ``differences`` counts them all.
    """

    def __init__(self, block_size: int, pods: Iterable[Pod] = ()) -> None:
        self.index = PrefixIndex(block_size=block_size)
        for pod in pods:
            self.index.configure_pod(pod.name, **pod.options)
        self.batches = 0
        self.hashes = 0
        self.ingest_seconds = 0.0
        self.match_seconds: list[float] = []
        self.prompts = 0
        self.answers = 0
        self.differences = 0
        self.wrong: list[str] = []

    def publish(self, pod: str, rank: int, payload: bytes) -> None:
        start = time.perf_counter()
        report = self.index.ingest(pod, payload)
        self.ingest_seconds += time.perf_counter() - start
        self.batches += 1
        self.hashes += report.stored + report.removed + report.parked

    def match_prefix(self, tokens: Any, **asked: Any) -> PrefixMatch:
        start = time.perf_counter()
        match = self.index.match_prefix(tokens, **asked)
        self.match_seconds.append(time.perf_counter() - start)
        return match

    def check(self, fleet: Fleet, prompt: Prompt) -> None:
        # Not timed: the router asks once per prompt, and this is the same prompt again.
        compared = fleet.compare(self.index, prompt)
        self.prompts += 1
        self.answers += compared.answers
        self.differences += len(compared.differences)
        for pod, got, expected in compared.differences[: SHOWN_DIFFERENCES - len(self.wrong)]:
            self.wrong.append(f"prompt {self.prompts}, pod {pod}: expected {expected} tokens, got {got}")

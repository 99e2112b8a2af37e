"""Fixtures of processes, and a last line with the number of compared answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvindex.sim import Prompt

from .fleet import Comparison, IndexProcess, Pods, compare

_TALLY: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the part of the suite that every change has to pass")


@pytest.fixture
def pods() -> Iterator[Pods]:
    with Pods() as made:
        yield made
        _TALLY["pods"] += made.started


@pytest.fixture
def index() -> Iterator[IndexProcess]:
    with IndexProcess() as made:
        yield made


@pytest.fixture
def equal() -> Any:
    """``equal(index, pods, prompts)``: a check of the index against the pods.

    It asserts that every answer is equal to the pods' own, that some of them have a hit (none without ``something``),
    and that the index is consistent. Returns the :class:`Comparison`.
    """

    def check(index: IndexProcess, pods: Any, prompts: Sequence[Prompt], *, something: bool = True) -> Comparison:
        done = compare(index, pods, prompts)
        _TALLY["answers"] += done.answers
        _TALLY["differences"] += len(done.differences)
        assert not done.differences, f"{len(done.differences)} of {done.answers}: {done.differences[:5]}"
        assert done.answers > 0
        assert (done.hit_tokens > 0) == something
        index.ask("check")
        return done

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _TALLY:
        terminalreporter.write_line(
            f"e2e: {_TALLY['answers']:,} answers by rank and tier compared with the pods' own, "
            f"{_TALLY['differences']} differences; {_TALLY['pods']} pods were processes of their own"
        )

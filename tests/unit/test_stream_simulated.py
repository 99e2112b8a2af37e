"""Streams by seed: `make simulate` runs the same histories each time and detects a faulty stream machine."""

from __future__ import annotations

from typing import Any

import pytest
import sync_support
from stream_world import one

from kvindex.sync.stream import WorkerStream


def test_a_seed_is_the_same_histories() -> None:
    first, again, other = one(3, 4), one(3, 4), one(4, 4)
    assert first == again != other
    assert first["exact"] > 20, "answers were judged"
    assert first["inputs"] > first["steps"] > 500
    assert sum(name.startswith("incident ") for name in first) > 8, "and something had happened"


class IgnoresGaps(WorkerStream):
    def _missing(self) -> bool:
        return False


class BelievesReplays(WorkerStream):
    """Accepts replays from any process."""

    def _is_hearsay(self, now: float) -> bool:
        return False


class SkipsProof(WorkerStream):
    """Assumes that a new connection leads to the same process as before."""

    def connected(self, now: float) -> Any:
        known = self._known
        actions = super().connected(now)
        self._verified = self._verified or known
        return actions


class ForgetsLosses(WorkerStream):
    def _accept(self, upto: int, why: str) -> None:
        super()._accept(upto, why)
        self._losses.forget()


class OutlivesItsConnection(WorkerStream):
    def _unknown(self) -> str:
        return super()._unknown() if self.is_connected else ""


class IgnoresSilence(WorkerStream):
    """Never asks whether the last batches are lost."""

    def _plan_probe(self, now: float) -> None:
        pass


@pytest.mark.parametrize(
    ("stream", "kind", "first"),
    [
        (IgnoresGaps, "faulty", 0),
        (BelievesReplays, "lying", 7),
        (SkipsProof, "restarting", 0),
        (ForgetsLosses, "faulty", 0),
        (OutlivesItsConnection, "restarting", 0),
        (IgnoresSilence, "faulty", 0),
    ],
)
def test_the_simulation_finds_a_stream_that_is_wrong(
    stream: type[WorkerStream], kind: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_support, "WorkerStream", stream)
    with pytest.raises(AssertionError):
        for seed in range(first, first + 30):
            one(seed, kinds=[kind])

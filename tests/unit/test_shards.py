"""The assignment of pods to shards."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("redis")
from kvindex.replication.shard import shard_of

PODS = [f"pod-{number}.engines" for number in range(4000)]


def test_places_are_a_part_of_the_log_and_never_change() -> None:
    """The assignment is part of the log's format.

    With another one, two versions of kvindex would disagree about a pod.
    """
    assert [shard_of(pod, 4) for pod in PODS[:12]] == [3, 0, 3, 3, 3, 3, 2, 3, 1, 1, 3, 3]
    assert {shard_of(pod, 1) for pod in PODS} == {0}


def test_they_are_equal_in_another_process() -> None:
    code = "import sys; from kvindex.replication.shard import shard_of; print([shard_of(p, 5) for p in sys.argv[1:]])"
    done = subprocess.run([sys.executable, "-c", code, *PODS[:50]], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[shard_of(pod, 5) for pod in PODS[:50]]}\n"


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_another_shard_takes_its_part_and_moves_no_other_pod(shards: int) -> None:
    before, after = ([shard_of(pod, n) for pod in PODS] for n in (shards, shards + 1))
    assert all(new in (old, shards) for old, new in zip(before, after, strict=True))
    counts = Counter(after)
    fair = len(PODS) / (shards + 1)
    # Within six standard deviations of the binomial distribution.
    assert all(abs(counts[shard] - fair) < 6 * fair**0.5 for shard in range(shards + 1))


@pytest.mark.parametrize("pod", ["", "\u00e9", "\udc80 from a payload", "\ud800"])
def test_every_name_has_a_shard(pod: str) -> None:
    assert 0 <= shard_of(pod, 3) < 3

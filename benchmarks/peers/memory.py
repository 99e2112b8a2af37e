"""Resident bytes per block of one contender in a process of its own: ``python -m benchmarks.peers.memory NAME CASE``.

The size of a table depends on the time since it doubled, so there are sixteen samples over the last doubling. The
program prints their mean and largest as JSON, by the operating system's figures and by the contender's own count.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence

from ..data import Chain, chain, own, payloads
from ..process import resident
from .contenders import CONTENDERS, Contender, DictOfSets, Dynamo, KVIndex

__all__ = ["CASES"]

#: Pods, whether they agree on the engine's hashes, chains of 2,048 blocks.
CASES = {"1 pod": (1, True, 512), "8 pods equal": (8, True, 128), "8 pods own": (8, False, 128)}
DEPTH = 2048
SAMPLES = 16


def settled() -> int:
    gc.collect()
    return resident()


def store(contender: Contender, content: Chain, pods: int, agree: bool) -> None:
    if agree:
        contender.store([content])
    elif isinstance(contender, KVIndex):
        for pod in range(pods):
            for payload in payloads([Chain(content.tokens, own(content.hashes, pod))], 256):
                contender.index.ingest(contender.pods[pod], payload)
    elif isinstance(contender, Dynamo):
        local = contender.hashes(content.tokens)
        for pod in range(pods):
            contender.store_as(own(content.hashes, pod).tolist(), local, [pod])
    else:
        # It does not use the engines' hashes, and could not remove by them either.
        contender.store([content])


def measure(kind: type[Contender], case: str) -> dict[str, float]:
    pods, agree, count = CASES[case]
    if kind is DictOfSets:
        count = min(count, 64)
    # The first store allocates the memory of imports, packers and the encoder's buffers before the count begins.
    store(kind(pods), chain(5, 2**20, DEPTH), pods, agree)
    contender = kind(pods)
    start = settled()
    empty = contender.index.stats()["bytes"] if isinstance(contender, KVIndex) else 0
    seen, counted = [], []
    for number in range(count):
        store(contender, chain(5, number, DEPTH), pods, agree)
        done = number + 1
        if done > count // 2 and done % max(count // 2 // SAMPLES, 1) == 0:
            seen.append((settled() - start) / (done * DEPTH))
            if isinstance(contender, KVIndex):
                counted.append((contender.index.stats()["bytes"] - empty) / (done * DEPTH))
    figures = {"mean": _mean(seen), "largest": max(seen), "blocks": count * DEPTH}
    if counted:
        figures |= {"counted mean": _mean(counted), "counted largest": max(counted)}
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    print(json.dumps(measure(next(kind for kind in CONTENDERS if kind.name == sys.argv[1]), sys.argv[2])))

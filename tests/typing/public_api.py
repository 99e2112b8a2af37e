"""The types of the public API, checked by mypy and never run: an unneeded `ignore` comment is an error as well."""

from array import array
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import kvindex
from kvindex import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    IndexStats,
    IngestReport,
    PodMatch,
    PodSet,
    PrefixIndex,
    PrefixMatch,
    StreamPlace,
    Verdict,
    WorkerStats,
)
from kvindex.capture import CaptureWriter, Forget, Message, Query, read_capture

index = PrefixIndex(block_size=16, hash_seed=1337, presence="count", max_parked=10, max_bytes=1 << 20, ttl=60.0)
assert_type(index, PrefixIndex)
assert_type(index.block_size, int)
assert_type(index.hash_seed, int)

# Tokens: arrays of the integer types, other objects with such a buffer, or sequences of ints.
assert_type(index.match_prefix([1, 2, 3]), PrefixMatch)
assert_type(index.match_prefix((1, 2, 3), ready_pods=["a"]), PrefixMatch)
assert_type(index.match_prefix(range(64), only_exact=True), PrefixMatch)
assert_type(index.match_prefix(np.arange(64, dtype=np.uint32)), PrefixMatch)
assert_type(index.match_prefix(np.arange(64, dtype=np.int64)), PrefixMatch)
assert_type(index.match_prefix(array("I", [1])), PrefixMatch)
assert_type(index.match_prefix(memoryview(array("I", [1]))), PrefixMatch)
keys = [None, [("image", 3)], ["text", b"digest", 7]]
assert_type(index.match_prefix([1], model="m", lora_name="a", cache_salt="s", extra_keys=keys), PrefixMatch)

ready = index.pod_set({"a", "b"})
assert_type(ready, PodSet)
match = index.match_hashes(np.zeros(4, dtype=np.uint64), ready_pods=ready)
assert_type(match, PrefixMatch)
assert_type(index.match_many([np.zeros(4, dtype=np.uint32), [1, 2]]), list[PrefixMatch])
assert_type(match.tokens, dict[str, int])
assert_type(match.percent, dict[str, int])
assert_type(match.blocks, int)
assert_type(match.hashes, npt.NDArray[np.uint64])
assert_type(match.best(), tuple[str, int] | None)
assert_type(match["a"], PodMatch)
assert_type(match["a"].media, dict[str, int])
assert_type(match["a"].ranks, dict[int, int])
assert_type(match["a"].state, Verdict)

report = index.ingest("a", b"payload", model="m", dp_rank=0)
assert_type(report, IngestReport)
assert_type(index.ingest("a", memoryview(b"payload")), IngestReport)
assert_type(report.stored, int)
assert_type(report.reasons, dict[str, int])
assert_type(report.ts, float | None)
assert_type(index.process_block_stored(BlockStored(pod="a", block_hashes=[1])), IngestReport)
assert_type(index.process_block_removed(BlockRemoved(pod="a", block_hashes=[1])), IngestReport)
assert_type(index.process_all_blocks_cleared(AllBlocksCleared(pod="a")), IngestReport)

assert_type(index.stats(), IndexStats)
assert_type(index.stats()["bytes"], int)
assert_type(index.worker_stats("a"), dict[int, WorkerStats])
assert_type(index.pods(), dict[str, Verdict])
assert_type(index.dumps(), bytes)
assert_type(PrefixIndex.loads(bytearray(), max_parked=5), PrefixIndex)
assert_type(index.stream_places("a"), dict[int, StreamPlace])
assert_type(index.stream_places("a")[0].seq, int)
assert_type(PrefixIndex.load("path", max_parked=5), PrefixIndex)
assert_type(PrefixIndex.load(Path("path"), max_bytes=1 << 20, ttl=5.0), PrefixIndex)
index.save("path")
index.save(b"path")  # type: ignore[arg-type]
assert_type(kvindex.local_hashes([1]), npt.NDArray[np.uint64])
assert_type(kvindex.prefix_hashes([1], lora_name="a", cache_salt=None), npt.NDArray[np.uint64])
assert_type(kvindex.decode_batch(b""), EventBatch)
assert_type(kvindex.tokens_from_bytes(b""), npt.NDArray[np.uint32])
assert_type(kvindex.tokens_to_bytes([1], byteorder="little"), bytes)

for item in read_capture("x"):
    if isinstance(item, Message):
        assert_type(item.payload, bytes)
    elif isinstance(item, Forget):
        assert_type(item.pod, str)
    elif isinstance(item, Query):
        assert_type(item.tokens, npt.NDArray[np.uint32])
        assert_type(item.hits, dict[str, int])
    else:
        assert_type(item, dict[str, Any])
with CaptureWriter("x", {"block_size": 16}) as writer:
    assert_type(writer, CaptureWriter)

with kvindex.EventManager(index) as manager:
    manager.add_pod(kvindex.PodSource("a", endpoint="tcp://127.0.0.1:5557", presence="set"))
    assert_type(manager.wait_until_current(1.0), bool)
    assert_type(manager.status()["a"].blocks, int)

# Calls that must fail to type-check. If one passes, mypy reports its comment as unneeded.
index.match_prefix("text")  # type: ignore[arg-type]
index.match_prefix([1.5])  # type: ignore[list-item]
index.match_prefix([1], "model")  # type: ignore[call-arg]
index.ingest("a", "text")  # type: ignore[arg-type]
index.block_size = 32  # type: ignore[misc]
PrefixIndex(16, presence="sometimes")  # type: ignore[arg-type]
kvindex.tokens_from_bytes(b"", byteorder="middle")  # type: ignore[arg-type]
kvindex.PodSource("a", endpoint="tcp://127.0.0.1:5557", presence="sometimes")  # type: ignore[arg-type]

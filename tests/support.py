"""Helpers with which test modules compare the index and the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgpack
from model import Model

import kvindex

STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
REMOVED = ("block_hashes", "medium", "group_idx")
# Fields that only map-style events have.
KEYS_ONLY = {
    "BlockStored": ("lookahead_token_ids",),
    "BlockRemoved": ("remaining_copy_counts",),
    "AllBlocksCleared": ("medium",),
}
COUNTS = ("stored", "removed", "cleared", "parked", "skipped", "errors")


def stored(hashes, tokens, *, parent=None, size=4, **more: Any) -> dict:
    """Build a BlockStored event as a map, the format of newer engines."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": size,
        **more,
    }


def removed(*hashes, **more: Any) -> dict:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), **more}


def cleared(**more: Any) -> dict:
    return {"type": "AllBlocksCleared", **more}


def as_array(event: dict) -> list | dict:
    """Return the event as an array, the format of older engines, if that format has a place for each of its fields."""
    if any(event.get(name) is not None for name in KEYS_ONLY[event["type"]]):
        return event
    if event["type"] == "AllBlocksCleared":
        return ["AllBlocksCleared"]
    fields = REMOVED if event["type"] == "BlockRemoved" else STORED
    values = [event.get(name) for name in fields]
    if event.get("cache_salt") is not None:
        values[6] = {"cache_salt": event["cache_salt"]}
    need = 1 if event["type"] == "BlockRemoved" else 5
    while len(values) > need and values[-1] is None:
        values.pop()
    return [event["type"], *values]


def payload(*events: Any, ts: float = 1.5, rank: int | None = None) -> bytes:
    return msgpack.packb([ts, list(events), rank])


def report_of(report: Any) -> dict:
    """Return a report of the index or of the model as a plain dict."""
    return {
        **{name: getattr(report, name) for name in COUNTS},
        "reasons": {name: n for name, n in dict(report.reasons).items() if n},
        "ts": report.ts,
        "dp_rank": report.dp_rank,
    }


def answer_of(match: Any) -> dict[str, dict]:
    """Return a PrefixMatch in the model's format."""
    return {
        pod: {"tokens": tokens, "ranks": dict(match[pod].ranks), "media": dict(match[pod].media)}
        for pod, tokens in match.tokens.items()
    }


def holdings_of(match: Any, pods: Any) -> dict[str, dict]:
    """Return the holdings in a PrefixMatch, reusable or not, in the model's format, for the pods that have any."""
    every = {pod: match[pod] for pod in pods}
    return {
        pod: {"held": it.held, "tiers": it.tiers, "order": list(it.tiers)}
        for pod, it in every.items()
        if it.held or it.tiers
    }


def together(*jobs: Callable[[], object], main: Callable[[], None]) -> None:
    """Run `main` in this thread while each job runs repeatedly in a thread of its own, until `main` returns."""
    done = threading.Event()
    failures: list[BaseException] = []
    ready = threading.Barrier(len(jobs) + 1)

    def again(job: Callable[[], object]) -> None:
        ready.wait()
        try:
            job()
            while not done.is_set():
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=again, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        main()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class Pair:
    """The index and the model. Every call goes to both, and every answer must be the same."""

    def __init__(self, block_size: int = 4, **options: Any) -> None:
        self.index = kvindex.PrefixIndex(block_size, **options)
        self.model = Model(block_size, **options)

    def ingest(self, pod: str, *events: Any, rank: int | None = None, **where: Any) -> dict:
        """Apply one batch and return its report."""
        data = payload(*events, rank=rank)
        got, want = report_of(self.index.ingest(pod, data, **where)), report_of(self.model.ingest(pod, data, **where))
        assert got == want
        self.index._check()
        assert self.state(pod) == self.model.pod_state(pod)
        return got

    def ask(self, tokens: Any, **query: Any) -> dict[str, dict]:
        """Return the full answer: {pod: {"tokens", "ranks", "media"}}."""
        match = self.index.match_prefix(tokens, **query)
        answer = answer_of(match)
        assert answer == self.model.match(tokens, **query)
        assert holdings_of(match, self.model.pods) == self.model.holdings(tokens, **query)
        return answer

    def tokens(self, tokens: Any, **query: Any) -> dict[str, int]:
        return {pod: answer["tokens"] for pod, answer in self.ask(tokens, **query).items()}

    def state(self, pod: str) -> str:
        return self.index.pod_state(pod)

    def parked(self, pod: str, rank: int = 0) -> int:
        return self.index.worker_stats(pod)[rank]["parked"]

    def do(self, call: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.index, call)(*args, **kwargs)
        getattr(self.model, call)(*args, **kwargs)
        self.index._check()

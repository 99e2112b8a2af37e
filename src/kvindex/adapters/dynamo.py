"""Events of NVIDIA Dynamo's router, as its event plane, its recorder and the indexer's ``/dump`` have them in JSON.

Source: ``RouterEvent`` and ``KvCacheEvent`` in ``lib/kv-router/src/protocols.rs``. Untried on a running deployment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import arguments
from ..events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..index import PrefixIndex
from ._feed import MALFORMED, Feed, from_json, hashes_agree, named, whole

__all__ = ["DynamoEvents"]

_TIERS = {"device": None, "hostpinned": "CPU_PINNED", "disk": "DISK", "external": "EXTERNAL"}


class DynamoEvents:
    """Applies the events of a Dynamo deployment's workers to an index.

    Args:
        index: takes the events; its block size must be the deployment's ``kv_block_size``, and its ``hash_seed`` 1337.
        model: namespace of the blocks.
        pod: makes a pod's name of a ``worker_id``.

    Blocks come with the hash of their tokens (``tokens_hash``) and are placed by it: a prompt of the index's matches
    them as if tokens had been announced. An adapter's name is in that hash as it is in the index's; images
    (``mm_extra_info``) are in it in another way, so those blocks are found by :meth:`PrefixIndex.match_hashes` only.
    ``storage_tier`` is the medium: ``device`` is ``GPU``, ``host_pinned`` ``CPU_PINNED``. ``cleared`` clears the
    event's rank. A gap between the ``event_id`` of a worker's rank makes it ``degraded``; a number that goes back
    clears it. Events of a cache that outlives its worker (``residency_domain`` is not ``worker``) are left out.

    Not thread-safe.

    Example::

        import kvindex
        from kvindex.adapters import DynamoEvents
        index = kvindex.PrefixIndex(block_size=4)
        tokens_hash = int(kvindex.local_hashes([1, 2, 3, 4], block_size=4)[0])
        data = {"stored": {"parent_hash": None, "blocks": [{"block_hash": 7, "tokens_hash": tokens_hash}]}}
        event = {"worker_id": 3, "event": {"event_id": 0, "data": data, "dp_rank": 0}}
        assert DynamoEvents(index).apply(event)["stored"] == 1
        assert index.match_prefix([1, 2, 3, 4]).tokens == {'3': 4}
    """

    def __init__(self, index: PrefixIndex, *, model: str = "", pod: Callable[[int], str] = str) -> None:
        hashes_agree(index, "Dynamo's")
        self._model = model
        self._pod = pod
        self._feed = Feed(index)

    def apply(self, events: str | bytes | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Counter[str]:
        """Apply router events in their order. O(blocks).

        Args:
            events: one event, several, or either as JSON text. The recorder's lines (``{"timestamp", "event"}``) are
                taken as the events in them.

        Returns:
            Counts of hashes (``stored``, ``removed``, ``parked``, ``skipped``), of ``cleared`` ranks, of events by the
            reason for which they were skipped, and of ``lost`` events.

        Raises:
            EventDecodeError: the text is not JSON.
            InvalidTypeError: there are no events in it. An event that cannot be read is counted as ``bad_event``, its
                worker is ``degraded``, and the others are applied.
        """
        for event in from_json(events, "Dynamo"):
            self._take(event, ordered=True)
        return self._feed.tally()

    def load(self, dump: str | bytes | Mapping[str, Any]) -> Counter[str]:
        """Apply the ``/dump`` of a Dynamo indexer: ``{"model:tenant": {"block_size", "events"}}``. O(blocks).

        Its events are numbered by the dump and not by the workers, so their numbers are not compared. Parts of another
        block size are left out and counted as ``block_size_mismatch``. Returns and raises as :meth:`apply`.
        """
        (parts,) = from_json(dump, "Dynamo")
        for part in parts.values():
            size = part.get("block_size") if isinstance(part, Mapping) else None
            if size != self._feed.index.block_size:
                self._feed.skip("block_size_mismatch")
                continue
            for event in from_json(part.get("events", ()), "Dynamo"):
                self._take(event, ordered=False)
        return self._feed.tally()

    def _take(self, event: Any, ordered: bool) -> None:
        feed, pod, rank = self._feed, None, 0
        try:
            if "worker_id" not in event:
                event = event["event"]
            pod, inner = named(self._pod(whole(event["worker_id"]))), event["event"]
            rank = arguments.rank(inner.get("dp_rank"))
            if event.get("residency_domain", "worker") != "worker":
                return feed.skip("not_a_workers")
            number = whole(inner["event_id"])
            medium = _TIERS[str(event.get("storage_tier") or "device").replace("_", "").lower()]
            made = self._made(inner["data"], pod, rank, medium)
            if ordered:
                self._order(pod, rank, number)
            feed.apply(made)
        except MALFORMED:
            feed.skip("bad_event", pod, rank)

    def _order(self, pod: str, rank: int, number: int) -> None:
        feed = self._feed
        if feed.restarted((pod, rank), number):
            feed.index.clear_worker(pod, rank)
            feed.index.mark_worker(pod, rank, "exact")
        if feed.missed((pod, rank), number):
            feed.index.mark_worker(pod, rank, "degraded")

    def _made(self, data: Any, pod: str, rank: int, medium: str | None) -> Event:
        if data == "cleared" or "cleared" in data:
            return AllBlocksCleared(pod, dp_rank=rank)
        if "removed" in data:
            gone = [whole(each) for each in data["removed"]["block_hashes"]]
            return BlockRemoved(pod, self._model, block_hashes=gone, medium=medium, dp_rank=rank)
        stored = data["stored"]
        return BlockStored(
            pod, self._model,
            block_hashes=[whole(block["block_hash"]) for block in stored["blocks"]],
            parent_block_hash=stored["parent_hash"],
            local_hashes=[whole(block["tokens_hash"]) for block in stored["blocks"]],
            block_size=self._feed.index.block_size, medium=medium, dp_rank=rank,
        )  # fmt: skip

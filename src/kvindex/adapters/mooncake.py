"""Events of a KV store that follow Mooncake's RFC 1527: rolling hashes of blocks, and no tokens.

Source: the RFC (github.com/kvcache-ai/Mooncake/issues/1527) and ``docs/source/design/kv-event`` beside Mooncake's
publisher. Untried on a running store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack

from .. import arguments
from ..errors import EventDecodeError, InvalidTypeError
from ..events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..index import PrefixIndex
from ._feed import MALFORMED, Feed, hashes_agree, named, whole

__all__ = ["MooncakeEvents"]

_KINDS = {"BlockStored": "stored", "BlockRemoved": "removed", "AllBlocksCleared": "cleared"}


class MooncakeEvents:
    """Applies one publisher's store events to an index.

    Args:
        index: takes the events; its block size must be that of the blocks in the store, and its ``hash_seed`` 1337.
        model: namespace of the blocks. None: each event's ``model_name``.
        tenant: the tenant whose events count; those of others are left out and counted.
        pod: makes a pod's name of a ``backend_id``.

    ``seq_hashes`` are prefix hashes of the index's own scheme and name their blocks, which are placed below
    ``parent_hash``, or at the beginning of a prompt where ``base_block_idx`` is 0. Without either, the place of a
    block is unknown: it waits for an event with its place, and its pod is ``degraded``. Mooncake's own master publishes
    such events only. A block that is stored twice in one medium is there once. A gap between the publisher's
    ``event_id``, or a first event that is not its first, makes all of its pods ``degraded`` until they are cleared,
    since there is no replay. A number that goes back clears them.

    Not thread-safe: one thread receives and applies.

    Example::

        import kvindex
        from kvindex.adapters import MooncakeEvents
        index = kvindex.PrefixIndex(block_size=4)
        hashes = kvindex.prefix_hashes([1, 2, 3, 4, 5, 6, 7, 8], block_size=4).tolist()
        event = {"event_id": 1, "event_type": "stored", "backend_id": "store-0", "medium": "cpu", "block_size": 4,
                 "seq_hashes": hashes, "base_block_idx": 0, "parent_hash": None}
        assert MooncakeEvents(index).apply([1739145600000, [event], 0])["stored"] == 2
        assert index.match_prefix([1, 2, 3, 4, 5, 6, 7, 8])["store-0"].media == {'CPU': 8}
    """

    def __init__(
        self,
        index: PrefixIndex,
        *,
        model: str | None = None,
        tenant: str = "default",
        pod: Callable[[str], str] = str,
    ) -> None:
        hashes_agree(index, "Mooncake's")
        self._model = model
        self._tenant = tenant
        self._pod = pod
        self._feed = Feed(index)
        self._workers: set[tuple[str, int]] = set()
        self._lost = False

    def apply(self, batch: bytes | Iterable[Any]) -> Counter[str]:
        """Apply a batch in its order. O(blocks).

        Args:
            batch: a message's msgpack payload, or the list that is in it: ``[ts, events, dp_rank]``.

        Returns:
            Counts of hashes (``stored``, ``removed``, ``parked``, ``skipped``), of ``cleared`` pods, of events by the
            reason for which they were skipped, and of ``lost`` events.

        Raises:
            EventDecodeError: the payload is not a batch, and was not applied. An event that cannot be read is counted
                as ``bad_event``, its pod is ``degraded``, and the others are applied.
        """
        for event in _events(batch):
            self._take(event)
        return self._feed.tally()

    def _take(self, event: Any) -> None:
        feed, pod, rank = self._feed, None, 0
        try:
            pod = named(self._pod(event["backend_id"]))
            rank = arguments.rank(event.get("dp_rank"))
            number = whole(event["event_id"])
            made = self._made(event, pod, rank)
            self._order(number)
            self._know(pod, rank)
            if (event.get("tenant_id") or "default") != self._tenant:
                feed.skip("other_tenant")
            elif made is None:
                feed.skip("no_hash", pod, rank)
            else:
                feed.apply(made)
        except MALFORMED:
            if pod is not None:
                self._know(pod, rank)
            feed.skip("bad_event", pod, rank)

    def _know(self, pod: str, rank: int) -> None:
        if (pod, rank) in self._workers:
            return
        self._workers.add((pod, rank))
        # A stored event refreshes a block; it does not announce another copy.
        self._feed.index.configure_pod(pod, presence="set")
        if self._lost:
            self._feed.index.mark_worker(pod, rank, "degraded")

    def _order(self, number: int) -> None:
        feed = self._feed
        if feed.restarted(None, number):
            self._lost = False
            for pod, rank in self._workers:
                feed.index.clear_worker(pod, rank)
                feed.index.mark_worker(pod, rank, "exact")
        # Publishers count from 0 or from 1 (Mooncake's master).
        if feed.missed(None, number, first=1):
            # Of pods that are not known yet, too.
            self._lost = True
            for pod, rank in self._workers:
                feed.index.mark_worker(pod, rank, "degraded")

    def _made(self, event: Mapping[str, Any], pod: str, rank: int) -> Event | None:
        kind = event.get("event_type") or _KINDS[event["type"]]
        if kind == "cleared":
            return AllBlocksCleared(pod, dp_rank=rank)
        model = (event.get("model_name") or "") if self._model is None else self._model
        hashes = [whole(each) % 2**64 for each in (event.get("seq_hashes") or event.get("block_hashes") or ())]
        # An object of which only the key is known.
        if not hashes:
            return None
        medium = event.get("medium") or "EXTERNAL"
        if kind == "removed":
            return BlockRemoved(pod, model, block_hashes=hashes, medium=medium, dp_rank=rank)
        if kind != "stored":
            raise InvalidTypeError(f"event_type is {kind!r}; it is stored, removed or cleared")
        parent, first = event.get("parent_hash"), event.get("base_block_idx")
        placed = parent is not None or first == 0
        return BlockStored(
            pod, model,
            block_hashes=hashes, parent_block_hash=parent, prefix_hashes=hashes if placed else None,
            block_size=event.get("block_size") or self._feed.index.block_size, medium=medium, dp_rank=rank,
        )  # fmt: skip


def _events(batch: Any) -> list[Any]:
    if isinstance(batch, (bytes, bytearray, memoryview)):
        reader = msgpack.Unpacker(strict_map_key=False, max_buffer_size=len(batch) or 1)
        reader.feed(batch)
        try:
            batch = reader.unpack()
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise EventDecodeError(
                f"the payload is not msgpack: {error or type(error).__name__}", reader.tell()
            ) from None
    if not isinstance(batch, (list, tuple)) or len(batch) < 2 or not isinstance(batch[1], (list, tuple)):
        raise EventDecodeError("the payload is not a batch: it must be [timestamp, events, dp_rank]", 0)
    return list(batch[1])

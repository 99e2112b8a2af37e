"""TensorRT-LLM's KV cache events, as ``LLM.get_kv_cache_events()`` and ``GET /kv_cache_events`` give them.

Source: ``KVCacheEventSerializer`` in ``tensorrt_llm/_utils.py`` and the event managers behind it. Untried on a running
server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from .. import arguments
from ..errors import InvalidValueError
from ..events import AllBlocksCleared, BlockRemoved, BlockStored
from ..index import PrefixIndex
from ._feed import MALFORMED, Feed, fold, from_json, whole

__all__ = ["TrtllmEvents"]

_MEDIA = (None, "CPU", "DISK")


class TrtllmEvents:
    """Applies one server's polled events to an index.

    ``event_id`` orders the events of each attention-DP rank. A gap makes the rank ``degraded``: the server's
    ``event_buffer_max_size`` was too small, or another client polled. A number that goes back clears the rank, since
    the server has restarted.

    Cache level 0 is the medium ``GPU``, 1 ``CPU``, 2 ``DISK``. Each window size other than the full one is a
    sliding-window group, and such a pod is ``degraded``. Partial blocks are skipped. If a token of a block has a
    ``token_extra_id``, the block's extra keys are those of all its tokens. The events contain no LoRA adapter, so a
    prompt with and without an adapter is one index entry.

    Not thread-safe: poll and apply in one thread.

    Example::

        import kvindex
        from kvindex.adapters import TrtllmEvents
        index = kvindex.PrefixIndex(block_size=4)
        events = TrtllmEvents(index, "trt-0", block_size=4)
        tokens = [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in (1, 2, 3, 4)]
        block = {"type": "stored_block", "block_hash": 7, "tokens": tokens, "cache_level": 0, "priority": 35}
        stored = {"type": "stored", "parent_hash": None, "blocks": [block]}
        assert events.apply([{"event_id": 0, "data": stored, "window_size": 4096}])["stored"] == 1
        assert index.match_prefix([1, 2, 3, 4]).tokens == {'trt-0': 4}

    Args:
        index: The index. Its block size must divide the server's ``tokens_per_block``.
        pod: Name of the server in the index.
        block_size: The server's ``tokens_per_block``.
        model: Model of the blocks.
        full_window: ``window_size`` of the full-attention layers, in tokens; None for the largest of a ``created``
            event.

    Raises:
        InvalidValueError: ``block_size`` is not a multiple of the index's.
    """

    def __init__(
        self, index: PrefixIndex, pod: str, *, block_size: int, model: str = "", full_window: int | None = None
    ) -> None:
        if block_size < 1 or block_size % index.block_size:
            raise InvalidValueError(
                f"block_size is {block_size}; it must be a multiple of the index's {index.block_size}"
            )
        self.pod = pod
        self._model = model
        self._block_size = block_size
        self._feed = Feed(index)
        self._full = full_window
        self._windows: dict[int, int] = {}
        self._levels: dict[tuple[int, int], dict[int | bytes, int]] = {}
        # Nothing announces a second copy of a block; a stored event may repeat one.
        index.configure_pod(pod, presence="set")

    def apply(self, events: str | bytes | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Counter[str]:
        """Applies polled events in order. O(tokens).

        An event that cannot be read is counted as ``bad_event``, and the pod becomes ``degraded``; the others are
        applied.

        Args:
            events: The polled list, its JSON text, or one event.

        Returns:
            Counts of engine hashes (``stored``, ``removed``, ``parked``, ``skipped``), of skipped events by reason,
            and of ``lost`` events.

        Raises:
            EventDecodeError: The text is not JSON.
            InvalidTypeError: ``events`` contains no events.
        """
        for event in from_json(events, "TensorRT-LLM"):
            rank = 0
            try:
                rank = arguments.rank(event.get("attention_dp_rank"))
                made = self._begin(event, rank)
                for each in made:
                    self._feed.apply(each)
            except MALFORMED:
                self._feed.skip("bad_event", self.pod, rank)
        return self._feed.tally()

    def _begin(self, event: Mapping[str, Any], rank: int) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Converts a whole event before any part of it is applied."""
        number, window, data = whole(event["event_id"]), whole(event.get("window_size") or 0), event["data"]
        feed = self._feed
        if feed.restarted(rank, number):
            feed.index.clear_worker(self.pod, rank)
            feed.index.mark_worker(self.pod, rank, "exact")
            for key in [key for key in self._levels if key[0] == rank]:
                del self._levels[key]
        if feed.missed(rank, number):
            feed.index.mark_worker(self.pod, rank, "degraded")
        match data["type"]:
            case "created":
                self._window(window, True)
                return []
            case "stored":
                return list(self._stored(data, rank, self._window(window)))
            case "removed":
                return list(self._removed(data, rank, self._window(window)))
            case "updated":
                return list(self._updated(data, rank, self._window(window)))
        feed.skip("unknown_event", self.pod, rank)
        return []

    def _window(self, window: int, created: bool = False) -> int:
        """The group of a window size: 0 for full attention, also where an event names none."""
        if window == 0:
            return 0
        if window not in self._windows:
            windows = [*self._windows, window]
            full = max(windows) if self._full is None else self._full
            others = [each for each in windows if each < full]
            if not created and self._full is None and window == full and others:
                # Blocks of a smaller window have been taken for those of full attention.
                raise InvalidValueError(f"window_size {window} was in no created event; set full_window")
            self._windows = {each: 0 if each >= full else 1 + others.index(each) for each in windows}
        return self._windows[window]

    def _sliding(self, group: int) -> dict[str, Any]:
        if group == 0:
            return {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
        window = next(size for size, number in self._windows.items() if number == group)
        return {"group_idx": group, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": window}

    def _stored(self, data: Mapping[str, Any], rank: int, group: int) -> Iterator[BlockStored | BlockRemoved]:
        blocks = []
        for block in data["blocks"]:
            if len(block["tokens"]) < self._block_size:
                self._feed.skip("partial_block")
                break
            blocks.append((fold(block["block_hash"]), whole(block.get("cache_level") or 0), block))
        levels = self._levels.setdefault((rank, group), {})
        parent = None if data["parent_hash"] is None else fold(data["parent_hash"])
        for level, run in groupby(blocks, key=lambda block: block[1]):
            part = list(run)
            tokens = [token for _, _, block in part for token in block["tokens"]]
            yield BlockStored(
                self.pod, self._model,
                block_hashes=[name for name, _, _ in part], parent_block_hash=parent,
                token_ids=[token["token_id"] for token in tokens], block_size=self._block_size,
                extra_keys=[_extra(block) for _, _, block in part], medium=_medium(level), dp_rank=rank,
                lora_id=part[0][2].get("lora_id"), cache_salt=part[0][2].get("cache_salt"), **self._sliding(group),
            )  # fmt: skip
            for name, _, _ in part:
                if (old := levels.get(name, level)) != level:
                    yield self._gone(name, old, rank, group)
                levels[name] = level
            parent = part[-1][0]

    def _removed(self, data: Mapping[str, Any], rank: int, group: int) -> Iterator[BlockRemoved]:
        levels = self._levels.setdefault((rank, group), {})
        for name in [fold(each) for each in data["block_hashes"]]:
            # Partial blocks come here too; they are in no tier.
            if (level := levels.pop(name, None)) is not None:
                yield self._gone(name, level, rank, group)

    def _updated(self, data: Mapping[str, Any], rank: int, group: int) -> Iterator[BlockStored | BlockRemoved]:
        levels, name, diff = self._levels.setdefault((rank, group), {}), fold(data["block_hash"]), data["cache_level"]
        old = levels.get(name)
        # An update without a level is about a priority.
        if diff is None or old is None or (new := whole(diff["new_value"])) == old:
            return
        yield BlockStored(
            self.pod, self._model, block_hashes=[name], medium=_medium(new), dp_rank=rank, **self._sliding(group)
        )
        yield self._gone(name, old, rank, group)
        levels[name] = new

    def _gone(self, name: int | bytes, level: int, rank: int, group: int) -> BlockRemoved:
        return BlockRemoved(
            self.pod, self._model, block_hashes=[name], medium=_medium(level), group_idx=group, dp_rank=rank
        )


def _medium(level: int) -> str | None:
    return _MEDIA[level] if 0 <= level < len(_MEDIA) else f"LEVEL{level}"


def _extra(block: Mapping[str, Any]) -> list[Any] | None:
    """The keys of a block besides its tokens: its tokens' extra ids, and the digests of its images."""
    ids = [whole(token.get("token_extra_id") or 0) for token in block["tokens"]]
    images = [
        (each["hash"], whole(each["start_offset"])) if isinstance(each, Mapping) else (str(each[0]), whole(each[1]))
        for each in block.get("mm_keys") or ()
    ]
    return (ids if any(ids) else []) + images or None

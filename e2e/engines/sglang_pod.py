"""SGLang's own radix cache and event publisher, as a pod without a model or memory pools.

This module makes the scheduler's calls to the tree, in the same order: match and lock when a request starts, insert
after each chunk of the prompt and when it is finished, evict when there is no room.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import deque
from dataclasses import dataclass
from typing import Any

from kvindex.sim import Prompt

from .rank import Rank, endpoints, reachable
from .standin import stand_in_for_torchvision

stand_in_for_torchvision()

from sglang.srt.disaggregation.kv_events import EventPublisherFactory, KVEventBatch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.events import LoRANameTable  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402

from .sglang_tree import UnifiedTree  # noqa: E402


class _Allocator:
    """An allocator without memory, to which the tree returns its evicted tokens."""

    device = "cpu"

    def free_segment(self, indices: Any, *, start_pos: int) -> None:
        pass

    def free(self, indices: Any) -> None:
        pass


@dataclass
class _Running:
    tokens: list[int]
    prompt: Prompt
    done: int
    node: Any
    lock: Any


class SglangRank(Rank):
    def __init__(self, options: dict[str, Any], rank: int, first: int) -> None:
        super().__init__()
        self._names = LoRANameTable()
        dynamo = bool(options.get("dynamo", False))
        self._room = options.get("blocks", 200) * options.get("page_size", 16)
        self._page = options.get("page_size", 16)
        eagle = bool(options.get("eagle", False))
        self.tree: Any
        if "beside" in options:
            names = ("beside", "window", "share", "host", "policy")
            self.tree = UnifiedTree(
                self._page, self._names, eagle=eagle, dynamo=dynamo, room=self._room, figures=self.figures,
                **{name: options[name] for name in names if name in options},
            )  # fmt: skip
        else:
            self.tree = RadixCache.create_simulated(
                mock_allocator=_Allocator(), page_size=self._page, enable_kv_cache_events=True,
                dynamo_kv_event_format=dynamo, kv_event_lora_names=self._names,
            )  # fmt: skip
            self.tree.is_eagle = eagle
        self._chunk = options.get("tokens_per_step", 512)
        self._most = options.get("max_seqs", 4)
        self._waiting: deque[tuple[Prompt, list[int]]] = deque()
        self._running: list[_Running] = []
        config = {"publisher": "zmq", "topic": options.get("topic", ""), **endpoints(first, options.get("ranks", 1))}
        config["format"] = "dynamo" if dynamo else "default"
        self._publisher = EventPublisherFactory.create(json.dumps(config), attn_dp_rank=rank)
        self.endpoint = reachable(self._publisher._pub)
        self.replay_endpoint = reachable(self._publisher._replay)
        self._flush()

    def _flush(self) -> None:
        events = self.tree.kv_events.take()
        if events:
            for event in events:
                self.figures[type(event).__name__] += 1
            self._publisher.publish(KVEventBatch(ts=time.time(), events=events))
            self.seq += 1

    def _key(self, tokens: list[int], prompt: Prompt) -> RadixKey:
        extra = None
        if prompt.lora_name is not None:
            # As in a request, the extra key ends with the adapter's id of 32 characters.
            extra = f"{prompt.lora_id or 1:032x}"
            self._names.register(lora_id=extra, lora_name=prompt.lora_name)
        return RadixKey(array("q", tokens), extra, cache_salt=prompt.cache_salt)

    def _match(self, key: RadixKey) -> Any:
        return self.tree.match_prefix(MatchPrefixParams(key=key))

    def add(self, prompt: Prompt, output: list[int]) -> None:
        self._waiting.append((prompt, output))

    def step(self) -> bool:
        while self._waiting and len(self._running) < self._most:
            prompt, output = self._waiting.popleft()
            key = self._key(prompt.tokens.tolist(), prompt)
            found = self._match(key)
            if found.host_hit_length and self.tree.load(found):
                found = self._match(key)
            lock = self.tree.inc_lock_ref(found.last_device_node)
            tokens = prompt.tokens.tolist() + output
            self._running.append(_Running(tokens, prompt, found.device_prefix_len, found.last_device_node, lock))
        if not self._running:
            return False
        for request in list(self._running):
            prompt_length = len(request.prompt)
            if request.done < prompt_length:
                request.done = min(prompt_length, request.done + self._chunk)
                self.figures["chunks"] += request.done < prompt_length
                self._checkpoint(request, request.tokens[: request.done])
            else:
                # The last token of an answer has no KV, because no later step computes it.
                self._checkpoint(request, request.tokens[:-1])
                self._unlock(request)
                self._running.remove(request)
        if isinstance(self.tree, UnifiedTree):
            self.figures["silently evicted"] += self.tree.shrink(self._room)
            self.tree.settle()
        self._flush()
        return True

    def _checkpoint(self, request: _Running, tokens: list[int]) -> None:
        key = self._key(tokens, request.prompt).page_aligned(self._page)
        missing = self.tree.total_size() + len(key) - self._room
        if missing > 0:
            evicted = self.tree.evict(EvictParams(num_tokens=missing)).num_tokens_evicted
            self.figures["evicted_tokens"] += evicted
        if len(key):
            self.tree.insert(InsertParams(key=key))
            node = self._match(key).last_device_node
            lock = self.tree.inc_lock_ref(node)
            self._unlock(request)
            request.node, request.lock = node, lock

    def _unlock(self, request: _Running) -> None:
        if isinstance(self.tree, UnifiedTree):
            self.tree.dec_lock_ref(request.node, request.lock)
        else:
            self.tree.dec_lock_ref(request.node)

    def hit(self, prompt: Prompt) -> int:
        return max(self.tiers(prompt).values())

    def tiers(self, prompt: Prompt) -> dict[str, int]:
        found = self._match(self._key(prompt.tokens.tolist(), prompt))
        own = int(found.device_prefix_len)
        tiered = isinstance(self.tree, UnifiedTree) and self.tree.tiered
        return {"GPU": own, "CPU_PINNED": own + int(found.host_hit_length)} if tiered else {"GPU": own}

    def reset(self, connector: bool = False) -> bool:
        if self._running or self._waiting:
            return False
        self.tree.reset()
        self._flush()
        self.figures["resets"] += 1
        return True

    def blocks(self) -> int:
        return int(self.tree.total_size()) // self._page

    def close(self) -> None:
        self._publisher.shutdown()


make = SglangRank

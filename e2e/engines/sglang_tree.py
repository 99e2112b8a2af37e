"""SGLang's unified radix cache, whose trees have a window or recurrent states beside full attention.

Tree, matching and events are SGLang's own. Memory is not: freed indices go nowhere, and a request's KV is a plain
number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.mem_cache.rust_tree_core import adapter
from sglang.srt.mem_cache.unified_cache.components import ComponentType, mamba
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from .sglang_host import attach

__all__ = ["UnifiedTree"]

_BESIDE = {"full": (), "window": (ComponentType.SWA,), "mamba": (ComponentType.MAMBA,)}


class _Nothing:
    """An allocator without memory."""

    device = "cpu"

    def free(self, indices: Any) -> None:
        pass

    def free_segment(self, indices: Any, *, start_pos: int) -> None:
        pass


class _Allocator(SWATokenToKVPoolAllocator):
    """An allocator without memory for two pools, in which a token has the same number."""

    device = "cpu"
    full_attn_allocator = swa_attn_allocator = _Nothing()

    def __init__(self, available: Callable[[], int]) -> None:
        self.available_size = available

    def free(self, indices: Any) -> None:
        pass

    def free_segment(self, indices: Any, *, start_pos: int) -> None:
        pass

    free_full_segment = free_swa_segment = free_segment

    def translate_swa_indices_for_transfer(self, indices: Any) -> Any:
        return indices.clone()

    translate_loc_from_full_to_swa = translate_swa_indices_for_transfer

    def clear_full_to_swa_mapping(self, indices: Any) -> None:
        pass

    def set_full_to_swa_mapping(self, full: Any, window: Any) -> None:
        pass


class _Pool(HybridReqToTokenPool):
    mamba_allocator = _Nothing()

    def __init__(self) -> None:
        pass


class UnifiedTree:
    """One tree, with the scheduler's operations on it.

    ``beside``: ``full`` for nothing beside full attention, ``window`` or ``mamba``. ``window``: tokens. ``share``: the
    size of the second pool, as a share of the first (a window's tokens, or states). ``host``: tokens of the host's
    pool (0: none), and its write ``policy``. ``figures`` counts the transfers.
    """

    def __init__(
        self, page: int, names: Any, *, beside: str = "full", eagle: bool = False, dynamo: bool = False,
        window: int = 64, share: float = 0.5, room: int = 0, host: int = 0, policy: str = "write_through",
        figures: Counter[str],
    ) -> None:  # fmt: skip
        # As with a server's arguments that let every state stay, at any place.
        for module in (mamba, adapter):
            module.mamba_cache_chunk_size = lambda: 1
            module.mamba_checkpoint_grid = lambda page: 1
            module.get_exec = lambda: SimpleNamespace(mamba=SimpleNamespace(mamba_max_states_per_path=-1))
        self._beside = beside
        self._share = share
        self._numbers = count(1)
        self._tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=_Pool(), page_size=page,
                token_to_kv_pool_allocator=_Allocator(lambda: room - self.total_size()),
                is_eagle=eagle, enable_kv_cache_events=True, dynamo_kv_event_format=dynamo, kv_event_lora_names=names,
                sliding_window_size=window if beside == "window" else None,
                tree_components=(ComponentType.FULL, *_BESIDE[beside]),
            )
        )  # fmt: skip
        self.tiered = host > 0
        if host:
            attach(self._tree, host, policy, self._numbers, figures)

    @property
    def kv_events(self) -> Any:
        return self._tree.tree_core.kv_events

    def match_prefix(self, params: Any) -> Any:
        return self._tree.match_prefix(params)

    def insert(self, params: InsertParams) -> None:
        params.value = torch.tensor([next(self._numbers) for _ in range(len(params.key))], dtype=torch.int64)
        if self._beside == "mamba":
            params.mamba_value = torch.tensor([next(self._numbers)])
        self._tree.insert(params)

    def shrink(self, room: int) -> int:
        """Evict from the second pool down to its size, without events, and return the number of evicted entries."""
        tree, most = self._tree, int(room * self._share)
        if self._beside == "window":
            over = tree.swa_evictable_size() + tree.swa_protected_size() - most
            return int(tree.evict(EvictParams(swa_num_tokens=over)).swa_num_tokens_evicted) if over > 0 else 0
        if self._beside == "mamba":
            # A state has the size of a hundred tokens.
            over = tree.mamba_evictable_size() + tree.mamba_protected_size() - max(1, most // 100)
            return int(tree.evict(EvictParams(mamba_num=over)).mamba_num_evicted) if over > 0 else 0
        return 0

    def load(self, found: Any) -> bool:
        """Load the host's part behind a match to the device, as the start of a request does."""
        return bool(self._tree.load_back(found.best_match_node))

    def settle(self) -> None:
        """Process finished transfers, as each step of the scheduler does."""
        if self.tiered:
            self._tree.check_hicache_events()

    def evict(self, params: EvictParams) -> Any:
        return self._tree.evict(params)

    def inc_lock_ref(self, node: Any) -> Any:
        return self._tree.inc_lock_ref(node)

    def dec_lock_ref(self, node: Any, held: Any) -> None:
        self._tree.dec_lock_ref(node, held.to_dec_params())

    def total_size(self) -> int:
        return int(self._tree.total_size()[0])

    def reset(self) -> None:
        self._tree.reset()

"""The host's pool behind SGLang's unified tree (HiCache), and a controller that moves no data.

SGLang itself decides which nodes are written, loaded and evicted, and when. Here every transfer is done at once.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.components import ComponentType

__all__ = ["attach"]


class _Pool:
    """Slots of the host, without memory behind them."""

    anchor_entry = SimpleNamespace(host_pool=SimpleNamespace(shared_allocation_domain=None), host_evict_fn=None)

    def __init__(self, size: int, figures: Counter[str]) -> None:
        self._size = size
        self._figures = figures
        self.clear()

    def clear(self) -> None:
        self._free = list(range(self._size))

    def available_size(self) -> int:
        return len(self._free)

    def take(self, count: int) -> torch.Tensor | None:
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return torch.tensor(taken, dtype=torch.int64)

    def free(self, indices: torch.Tensor, pool: Any = None) -> None:
        self._figures["evicted of the host"] += len(indices)
        self._free += indices.tolist()


class _Controller:
    enable_storage = False

    def __init__(self, pool: _Pool, policy: str, numbers: Any, figures: Counter[str]) -> None:
        self.mem_pool_host = pool
        self.write_policy = policy
        self._numbers = numbers
        self._figures = figures
        self.reset()

    def reset(self) -> None:
        self.ack_write_queue: list[Any] = []
        self.ack_load_queue: list[Any] = []

    def write(self, device_indices: torch.Tensor, node_id: int, **_: Any) -> torch.Tensor | None:
        slots = self.mem_pool_host.take(len(device_indices))
        if slots is not None:
            self._figures["stores"] += 1
            self.ack_write_queue.append(_done(node_id))
        return slots

    def start_writing(self) -> None:
        pass

    def load(self, host_indices: torch.Tensor, node_id: int, **_: Any) -> torch.Tensor:
        self._figures["loads"] += 1
        self.ack_load_queue.append(_done(node_id))
        return torch.tensor([next(self._numbers) for _ in host_indices], dtype=torch.int64)


def _done(node_id: int) -> Any:
    event = SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    return SimpleNamespace(finish_event=event, node_ids=[node_id])


def attach(tree: Any, size: int, policy: str, numbers: Any, figures: Counter[str]) -> None:
    """Attach a host pool of ``size`` tokens to a tree, with the policy ``write_through`` or ``write_back``.

    The tree's own ``init_hicache`` does the same with pools that need devices.
    """
    tree.host_pool_group = tree.components[ComponentType.FULL]._full_kv_pool_host = _Pool(size, figures)
    tree.cache_controller = _Controller(tree.host_pool_group, policy, numbers, figures)
    tree.tree_core.set_hicache_enabled()
    tree.write_through_threshold = 1
    tree.is_write_back = policy == "write_back"
    tree.load_back_threshold = 10

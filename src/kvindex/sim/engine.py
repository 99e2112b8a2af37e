"""A simulated engine: the paged KV cache of one worker, as vLLM and SGLang keep it, without the model.

It owns numbered physical blocks with reference counts, keeps freed blocks until their place is needed, finds prefixes
by a chained hash, and reports every change in events, as the real engines do. :meth:`Engine.hit` reads the true answer
to a query from the engine's own block tables and never from an event. The tests and the demo compare an index, which
has only the events, with this answer.

Pure and deterministic: no clock, no thread, no socket, no randomness of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import InvalidValueError
from .wire import Cleared, Event, Removed, Stored

__all__ = ["Engine", "Prompt", "Request"]

Tokens = npt.NDArray[np.uint32]

# A table's entry for a block that the sliding window has passed. It holds no block and keeps the table's length.
_LEFT = -1


class Prompt:
    """The input of a request: its tokens and everything else that goes into the hashes of its blocks.

    ``tokens`` is any sequence of token ids, kept as a ``uint32`` array. ``extra_keys`` has one entry per block,
    ``None`` or a list of keys; missing entries are ``None``. The chain of hashes is computed once per kind of engine,
    so a query to many engines hashes the prompt once. Do not change a prompt after construction.
    """

    __slots__ = ("_chains", "cache_salt", "extra_keys", "lora_id", "lora_name", "plain", "tokens")

    def __init__(
        self,
        tokens: npt.ArrayLike,
        *,
        lora_name: str | None = None,
        lora_id: int | None = None,
        cache_salt: str | None = None,
        extra_keys: Sequence[Sequence[Any] | None] | None = None,
    ) -> None:
        self.tokens: Tokens = np.ascontiguousarray(tokens, dtype=np.uint32)
        self.lora_name = lora_name
        self.lora_id = lora_id
        self.cache_salt = cache_salt
        self.extra_keys = extra_keys
        self.plain = lora_name is None and cache_salt is None and not extra_keys
        self._chains: dict[tuple[bytes, int, int], list[bytes]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def keys(self, block: int) -> list[Any] | None:
        """The keys that block number ``block`` has in its hash, in vLLM's order, or ``None``."""
        if self.plain:
            return None
        keys = self.extra_keys[block] if self.extra_keys is not None and block < len(self.extra_keys) else None
        salt = self.cache_salt if block == 0 else None
        if not keys and salt is None and self.lora_name is None:
            return None
        own = list(keys or ())
        tail = len(own)
        while tail and isinstance(own[tail - 1], bytes):
            tail -= 1
        # The digests of prompt embeddings (bytes) come after the salt, everything else before it.
        return [*([self.lora_name] if self.lora_name else []), *own[:tail], *([salt] if salt else []), *own[tail:]]

    def chain(self, seed: bytes, block_size: int, lookahead: int = 0) -> list[bytes]:
        """The chained digest of every complete block. The list is shared: do not change it."""
        known = self._chains.get((seed, block_size, lookahead))
        if known is None:
            known = self._chains[seed, block_size, lookahead] = []
            self.extend_chain(known, seed, self.tokens, block_size, lookahead)
        return known

    def extend_chain(
        self, chain: list[bytes], seed: bytes, tokens: Tokens, block_size: int, lookahead: int = 0
    ) -> None:
        """Append to ``chain`` the digests of the complete blocks of ``tokens`` that it does not have yet.

        A block's digest also covers the ``lookahead`` tokens behind it, so the block is complete only with these.
        """
        first, sha256, width = len(chain), hashlib.sha256, 4 * block_size
        data = tokens[first * block_size :].tobytes()
        parent = chain[-1] if chain else sha256(seed).digest()
        for block in range((len(data) - 4 * lookahead) // width):
            content = parent + data[block * width : (block + 1) * width + 4 * lookahead]
            if not self.plain and (keys := self.keys(first + block)) is not None:
                content += msgpack.packb(keys)
            parent = sha256(content).digest()
            chain.append(parent)


class Request:
    """A prompt that is being served, and the physical blocks that it holds. :meth:`Engine.start` returns it.

    ``hit`` is the number of reused tokens; decoding appends to ``tokens``.
    """

    __slots__ = ("cached", "chain", "computed", "hit", "prompt", "tables", "tokens")

    def __init__(self, prompt: Prompt, chain: list[bytes], hit: int, groups: int) -> None:
        self.prompt = prompt
        self.tokens = prompt.tokens
        self.chain = chain
        self.hit = hit
        self.computed = hit
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.cached = [0] * groups


@dataclass(frozen=True, slots=True)
class _Group:
    index: int
    kind: str
    block_size: int
    window: int | None
    # A lookup finds a block under the digest of the last of its `stride` hash blocks.
    stride: int
    interval: int | None

    @property
    def need(self) -> int:
        """Number of blocks before a position that the window covers."""
        assert self.window is not None
        return -(-(self.window - 1) // self.block_size)

    def first_needed(self, tokens: int) -> int:
        """The first block that a request still reads after ``tokens`` computed tokens."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.block_size


class Engine:
    """The KV cache of one worker.

    All groups share ``num_blocks`` physical blocks of ``block_size`` tokens. ``window`` adds a second, sliding-window
    group beside full attention, whose blocks may be larger (``window_block_size``, a multiple). With
    ``window_interval`` (tokens) this group keeps only the blocks that a hit at a multiple of the interval or at the
    prompt's end needs, so its stored events leave blocks out. ``offload_blocks`` adds a second tier, which gets a copy
    of every finished request. Its events have no tokens unless ``offload_tokens``.

    ``flavor="vllm"``: equal content may have several copies, and the last token of a prompt is always computed.
    ``flavor="sglang"``: every content has one copy, an answer is stored when it is finished, one event removes many
    blocks, and the first event is a clear.

    ``lookahead`` tokens behind each block are part of its hash, as with speculative decoding in vLLM 0.33 (its events
    have a list per block) and in SGLang (one token, as pairs of tokens). ``eagle`` is the older form of vLLM, which
    drops the last matching block instead. SGLang publishes no evictions of its ``window``: ``window_blocks`` is the
    size of that pool. With ``offload_keyless`` the second tier's events have tokens, but no keys, no salt and no
    adapter, like those of connectors. ``hash_seed`` is the process seed of vLLM before 0.29; engines that share it give
    equal content equal hashes.

    Serving: :meth:`start` (prefill), :meth:`decode`, :meth:`finish`; after each, :meth:`take_events` returns the new
    events. One engine belongs to one thread.

    Source: vLLM's BlockPool and SlidingWindowManager (given the requests of recorded vLLM 0.33 streams, this engine
    evicts the same blocks in the same order), its OffloadingConnector, and SGLang's RadixCache (evicted here by the
    page, not by the node).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        flavor: Literal["vllm", "sglang"] = "vllm",
        hash_seed: bytes = b"",
        window: int | None = None,
        window_block_size: int | None = None,
        window_interval: int | None = None,
        offload_blocks: int = 0,
        offload_medium: str = "CPU",
        offload_tokens: bool = False,
        offload_keyless: bool = False,
        lookahead: int = 0,
        eagle: bool = False,
        window_blocks: int | None = None,
    ) -> None:
        if num_blocks <= 0 or block_size <= 0:
            raise InvalidValueError(f"num_blocks and block_size must be positive, not {num_blocks} and {block_size}")
        if window is not None and window < 2:
            raise InvalidValueError(f"a window needs at least 2 tokens, not {window}")
        if (window_blocks is not None) != (window is not None and flavor == "sglang"):
            raise InvalidValueError("flavor 'sglang' has a window with window_blocks, the size of its pool, or neither")
        if window_blocks is not None and (window_blocks < 1 or window_block_size or window_interval or offload_blocks):
            raise InvalidValueError("SGLang's window has a pool of its own, blocks of the one size, and no second tier")
        if lookahead < 0 or (flavor == "sglang" and lookahead > 1):
            raise InvalidValueError(f"lookahead must be 0 or more tokens, with flavor 'sglang' 0 or 1, not {lookahead}")
        if eagle and (flavor == "sglang" or lookahead or window is not None or offload_blocks):
            raise InvalidValueError("eagle needs flavor 'vllm' with one group, no lookahead and no second tier")
        second = window_block_size or block_size
        if second % block_size:
            raise InvalidValueError(f"window_block_size must be a multiple of {block_size}, not {second}")
        if window_interval is not None and (window_interval <= 0 or window_interval % second):
            raise InvalidValueError(f"window_interval must be a multiple of {second}, not {window_interval}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.flavor = flavor
        self.hash_seed = hash_seed
        self._groups = [_Group(0, "full_attention", block_size, None, 1, None)]
        if window is not None and flavor == "vllm":
            self._groups.append(_Group(1, "sliding_window", second, window, second // block_size, window_interval))
        self._step = math.lcm(*(group.block_size for group in self._groups))
        # Freed blocks in the order of reuse. A linked list, because a hit takes blocks out of the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._refs = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._owner = [0] * num_blocks
        # Per group: the blocks that hold a digest. Several where two requests computed the same content.
        self._cached: list[dict[bytes, list[int]]] = [{} for _ in self._groups]
        self._offload_blocks = offload_blocks
        self._offload_medium = offload_medium
        self._offload_tokens = offload_tokens
        self._offload_keyless = offload_keyless
        self._lookahead = lookahead
        self._eagle = eagle
        # SGLang's window: the digests whose blocks are still in the window's pool, least recently used first.
        self._window = None if flavor == "vllm" or window is None else -(-(window - 1) // block_size)
        self._window_blocks = window_blocks or 0
        self._windowed: OrderedDict[bytes, None] = OrderedDict()
        self._offloaded: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._offload_groups: set[int] = set()
        # SGLang's cache resets itself when it is created, so every stream begins with a clear.
        self._events: list[Event] = [Cleared()] if flavor == "sglang" else []

    # Contents

    @property
    def free_blocks(self) -> int:
        """Physical blocks that no request holds, including those that a lookup can still find."""
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        """Physical blocks that a query could find."""
        return sum(len(blocks) for cached in self._cached for blocks in cached.values())

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block of every group."""
        return tuple(group.block_size for group in self._groups)

    def blocks_for(self, tokens: int) -> int:
        """Physical blocks that a prompt of ``tokens`` tokens needs when none of it is cached."""
        return sum(-(-tokens // group.block_size) for group in self._groups)

    @property
    def options(self) -> dict[str, Any]:
        """The facts about this engine that its events lack: arguments of :meth:`PrefixIndex.configure_pod`."""
        return {"engine": self.flavor, "eagle": self._eagle, "hybrid": self._window_blocks > 0}

    def hit(
        self,
        tokens: npt.ArrayLike,
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys: Sequence[Sequence[Any] | None] | None = None,
    ) -> int:
        """Number of tokens of this prompt that the engine would reuse now, from any tier. O(blocks)."""
        return self.hit_prompt(Prompt(tokens, lora_name=lora_name, cache_salt=cache_salt, extra_keys=extra_keys))

    def hit_prompt(self, prompt: Prompt) -> int:
        """The same as :meth:`hit`, for a :class:`Prompt`."""
        return self.tiers_prompt(prompt)[1]

    def tiers_prompt(self, prompt: Prompt) -> tuple[int, int]:
        """Reusable tokens of the GPU alone, and of the GPU followed by the second tier's blocks."""
        chain, tokens = self._chain(prompt), len(prompt)
        if self.flavor == "vllm" and not self._lookahead:
            # The last token is always computed. With a lookahead no block covers it anyway.
            tokens = max(0, tokens - 1)
        own = self._reach(chain, tokens, "GPU")
        if self._eagle:
            own = max(0, own - self.block_size)
        if self._window is not None:
            own = self._window_reach(chain, own)
        if not self._offloaded:
            return own, own
        # From a tier vLLM loads the last token as well and computes it again. Beside a window it does not, because the
        # window would move.
        tokens = len(prompt) if len(self._groups) == 1 else tokens
        return own, max(own, self._reach(chain, tokens, own=own))

    def held_prompt(self, prompt: Prompt, medium: str | None = None) -> int:
        """Number of leading tokens that any tier holds, or ``medium`` alone, reusable or not."""
        return self._reach(self._chain(prompt), len(prompt), medium)

    def _chain(self, prompt: Prompt) -> list[bytes]:
        return prompt.chain(self.hash_seed, self.block_size, self._lookahead)

    def _held(self, group: _Group, chain: list[bytes], blocks: int, medium: str | None, own: int | None) -> list[bool]:
        cached = self._cached[group.index] if medium in (None, "GPU") else {}
        tier = self._offloaded if medium in (None, self._offload_medium) else {}
        digests = chain[group.stride - 1 : blocks * group.stride : group.stride]
        if own is not None:
            # vLLM asks a connector for all blocks behind the GPU's own prefix, so the GPU's later blocks do not count.
            own //= group.block_size
            return [d in cached if place < own else (group.index, d) in tier for place, d in enumerate(digests)]
        if not tier:
            return [digest in cached for digest in digests]
        return [digest in cached or (group.index, digest) in tier for digest in digests]

    def _window_reach(self, chain: list[bytes], reach: int) -> int:
        """The part of a prefix that SGLang can use with its window: the longest whose last blocks are in the pool."""
        assert self._window is not None
        last, blocks, have = 0, 0, 0
        for place, digest in enumerate(chain[: reach // self.block_size]):
            have = have + 1 if digest in self._windowed else 0
            blocks = place + 1
            if have >= min(self._window, blocks):
                last = blocks
        return last * self.block_size

    def _reach(self, chain: list[bytes], tokens: int, medium: str | None = None, own: int | None = None) -> int:
        groups, step = self._groups, self._step
        if medium not in (None, "GPU"):
            groups = [group for group in groups if group.index in self._offload_groups]
            step = math.lcm(*(group.block_size for group in groups))
        reach = tokens if groups else 0
        for group in groups:
            held = self._held(group, chain, reach // group.block_size, medium, own)
            if group.window is None:
                reach = (held.index(False) if False in held else len(held)) * group.block_size
                continue
            # vLLM searches from the right, for the first aligned position whose whole window is cached.
            behind = [0]
            for there in held:
                behind.append(behind[-1] + 1 if there else 0)
            # A prompt that ends within a lookahead has fewer blocks than its length suggests.
            reach = min(reach, len(held) * group.block_size) // step * step
            while behind[reach // group.block_size] < min(group.need, reach // group.block_size):
                reach -= step
        return reach // step * step

    # Serving

    def start(self, prompt: Prompt, chunk: int | None = None) -> Request | None:
        """Reuse the cached blocks and compute the rest of the prompt, or the first ``chunk`` tokens of the rest.

        Returns ``None``, with nothing changed, when there is no room for it now. Raises :class:`InvalidValueError`
        for an empty prompt, and for extra keys where blocks differ in size or the flavor's events cannot carry them.
        """
        if len(prompt) == 0:
            raise InvalidValueError("a prompt needs at least one token")
        if prompt.extra_keys and (self.flavor == "sglang" or self._step != self.block_size):
            raise InvalidValueError("extra keys need flavor 'vllm' and groups of one block size")
        chain = self._chain(prompt)
        own, hit = self.tiers_prompt(prompt)
        request = Request(prompt, list(chain), hit, len(self._groups))
        target = len(prompt) if chunk is None else min(len(prompt), hit + chunk)
        touched = []
        loads: list[list[int]] = []
        room = len(self._free)
        for group, table in zip(self._groups, request.tables, strict=True):
            cached = self._cached[group.index]
            blocks = hit // group.block_size
            first = group.first_needed(hit)
            table.extend([_LEFT] * blocks)
            missing = []
            for place in range(first, blocks):
                copies = cached.get(chain[(place + 1) * group.stride - 1])
                if copies and place < own // group.block_size:
                    table[place] = copies[0]
                    touched.append(copies[0])
                else:
                    missing.append(place)
            loads.append(missing)
            request.cached[group.index] = blocks
            room -= len(missing) + -(-target // group.block_size) - blocks
        if room < sum(self._refs[block] == 0 for block in touched):
            return None
        # The hits of all groups are held first: an allocation of one group must not evict a hit of another.
        for block in touched:
            self._touch(block)
        for group, table, missing in zip(self._groups, request.tables, loads, strict=True):
            self._load(request, group, table, missing)
        self._advance(request, target)
        return request

    def prefill(self, request: Request, chunk: int | None = None) -> bool:
        """Compute the next ``chunk`` tokens of the prompt, or the rest. ``False`` when there is no room now."""
        end = len(request.prompt) if chunk is None else min(len(request.prompt), request.computed + chunk)
        return self._advance(request, max(end, request.computed))

    def decode(self, request: Request, tokens: npt.ArrayLike) -> bool:
        """Append generated tokens. The last one is computed only when another follows.

        ``False`` when there was not enough room for all; the request then keeps the tokens computed so far.
        """
        request.tokens = np.concatenate([request.tokens, np.asarray(tokens, dtype=np.uint32)])
        request.prompt.extend_chain(request.chain, self.hash_seed, request.tokens, self.block_size, self._lookahead)
        # A real engine decodes token by token, so every block that fills up gets its own event.
        size = self.block_size
        target = len(request.tokens) - 1
        while request.computed < target:
            if not self._advance(request, min(target, request.computed // size * size + size)):
                return False
        return True

    def finish(self, request: Request) -> None:
        """Free the request's blocks. They stay cached until their place is needed; the tail goes first."""
        if self.flavor == "sglang":
            self._cache(request)
        if self._offload_blocks:
            self._offload(request)
        for table in request.tables:
            self._release([block for block in reversed(table) if block != _LEFT])
        request.tables = []

    def reset(self, *, offloaded: bool = True) -> bool:
        """Drop all blocks and publish a clear; ``offloaded=False`` keeps the second tier. ``False`` while serving."""
        if len(self._free) < self.num_blocks:
            return False
        for block in range(self.num_blocks):
            self._digest[block] = None
        for cached in self._cached:
            cached.clear()
        self._windowed.clear()
        if offloaded:
            self._offloaded.clear()
            self._offload_groups.clear()
        self._events.append(Cleared())
        return True

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # Blocks

    def _touch(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def _take(self, count: int) -> list[int]:
        """Take the ``count`` blocks that were freed longest ago and evict their contents."""
        evicted: list[int] = []
        taken = []
        popitem, digests, refs = self._free.popitem, self._digest, self._refs
        for _ in range(count):
            block, _unused = popitem(last=False)
            if digests[block] is not None:
                evicted.append(block)
            refs[block] = 1
            taken.append(block)
        if evicted:
            self._evict(evicted)
        return taken

    def _evict(self, blocks: list[int]) -> None:
        gone = []
        for block in blocks:
            digest, owner = self._digest[block], self._owner[block]
            assert digest is not None
            self._digest[block] = None
            copies = self._cached[owner][digest]
            if len(copies) == 1:
                del self._cached[owner][digest]
            else:
                copies.remove(block)
            gone.append((digest, owner))
        if self.flavor == "sglang":
            self._events.append(Removed([digest for digest, _ in reversed(gone)]))
        else:
            self._events.extend(Removed([digest], "GPU", owner) for digest, owner in gone)

    def _release(self, blocks: Iterable[int]) -> None:
        empty = []
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._digest[block] is None:
                    empty.append(block)
                else:
                    self._free[block] = None
        # Blocks that no lookup can find are used again before those that one can.
        for block in reversed(empty):
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def _advance(self, request: Request, computed: int) -> bool:
        wanted = []
        for group, table in zip(self._groups, request.tables, strict=True):
            if group.window is not None:
                self._leave(table, group.first_needed(request.computed))
            wanted.append(max(0, -(-computed // group.block_size) - len(table)))
        if sum(wanted) > len(self._free):
            return False
        for table, count in zip(request.tables, wanted, strict=True):
            table.extend(self._take(count))
        decoding = computed > len(request.prompt)
        if decoding:
            # Up to a block of single tokens at once: by the last of them the window may have moved again.
            for group, table in zip(self._groups, request.tables, strict=True):
                self._leave(table, group.first_needed(computed - 1))
        request.computed = computed
        # SGLang puts an answer into its tree only when it is finished.
        if self.flavor == "vllm" or not decoding:
            self._cache(request)
        return True

    def _leave(self, table: list[int], first: int) -> None:
        left = []
        for place in range(min(first, len(table)) - 1, -1, -1):
            if table[place] == _LEFT:
                break
            left.append(table[place])
            table[place] = _LEFT
        self._release(left)

    # Caching

    def _cache(self, request: Request) -> None:
        """Make the blocks that are complete by now findable, and publish them."""
        # SGLang's tree gets the computed tokens, of which the last pair is incomplete.
        computed = request.computed - (self._lookahead if self.flavor == "sglang" else 0)
        computed = max(0, computed) // self._step * self._step
        for group, table in zip(self._groups, request.tables, strict=True):
            start = request.cached[group.index]
            # With a lookahead, the last digests need tokens that may not exist yet.
            end = min(computed, len(request.chain) * self.block_size) // self._step * self._step // group.block_size
            self._keep_window(request.chain[:end])
            if start >= end:
                continue
            request.cached[group.index] = end
            if self.flavor == "sglang":
                start = self._share(request, table, start, end)
            places = [place for place in range(start, end) if self._reachable(request, group, place)]
            if start < end:
                self._store(request, group, table, start, end, places)

    def _keep_window(self, chain: Sequence[bytes]) -> None:
        """Put the blocks into the window's pool, which evicts the least recently used ones without an event."""
        if self._window is None:
            return
        for digest in chain:
            self._windowed[digest] = None
            self._windowed.move_to_end(digest)
        while len(self._windowed) > self._window_blocks:
            self._windowed.popitem(last=False)

    def _reachable(self, request: Request, group: _Group, place: int) -> bool:
        """Whether a hit of the window group can ever need this block."""
        if group.window is None or group.interval is None:
            return True
        per_interval = group.interval // group.block_size
        prompt_end = (len(request.prompt) - 1) // self._step * self._step // group.block_size
        return place % per_interval >= per_interval - group.need or prompt_end - group.need <= place < prompt_end

    def _share(self, request: Request, table: list[int], start: int, end: int) -> int:
        """Replace the request's blocks by cached copies, as SGLang does; returns the place of the first new block."""
        cached = self._cached[0]
        own = []
        while start < end and (copies := cached.get(request.chain[start])):
            self._touch(copies[0])
            own.append(table[start])
            table[start] = copies[0]
            start += 1
        self._release(own)
        return start

    def _store(
        self, request: Request, group: _Group, table: list[int], start: int, end: int, places: Sequence[int]
    ) -> None:
        """Make the blocks at ``places`` findable, with one event for the range from ``start`` to ``end``."""
        cached, chain, stride = self._cached[group.index], request.chain, group.stride
        digests = []
        for place in places:
            digest = chain[(place + 1) * stride - 1]
            block = table[place]
            self._digest[block] = digest
            self._owner[block] = group.index
            copies = cached.get(digest)
            if copies is None:
                cached[digest] = [block]
            else:
                copies.append(block)
            digests.append(digest)
        self._say_stored(request, group, start, end, places, digests, "GPU")

    def _say_stored(
        self,
        request: Request,
        group: _Group,
        start: int,
        end: int,
        places: Sequence[int],
        digests: list[bytes],
        medium: str,
    ) -> None:
        prompt, size, ahead = request.prompt, group.block_size, self._lookahead
        keys = [None] * len(places) if prompt.plain else [prompt.keys(place * group.stride) for place in places]
        tokens = request.tokens[start * size : end * size]
        behind = None
        if ahead and self.flavor == "sglang":
            tokens = np.stack([tokens, request.tokens[start * size + 1 : end * size + 1]], axis=1)
        elif ahead:
            behind = [request.tokens[(place + 1) * size :][:ahead].tolist() for place in places]
        said = medium == "GPU" or not self._offload_keyless
        self._events.append(
            Stored(
                digests,
                request.chain[start * group.stride - 1] if start else None,
                tokens,
                size,
                prompt.lora_id if said else None,
                medium,
                prompt.lora_name if said else None,
                (keys or None) if said else None,
                group.index,
                group.kind,
                group.window,
                cache_salt=prompt.cache_salt if said else None,
                lookahead_token_ids=behind,
            )
        )

    # The second tier

    def _load(self, request: Request, group: _Group, table: list[int], places: list[int]) -> None:
        """Load the blocks that only the second tier holds."""
        for place, block in zip(places, self._take(len(places)), strict=True):
            table[place] = block
        for run in _runs(places):
            self._store(request, group, table, run[0], run[-1] + 1, run)
        for place in reversed(places):
            self._offloaded.move_to_end((group.index, request.chain[(place + 1) * group.stride - 1]))

    def _offload(self, request: Request) -> None:
        """Copy the request's cached blocks to the second tier, which evicts the least recently used ones for them."""
        tier = self._offloaded
        news: list[tuple[_Group, list[int]]] = []
        room = self._offload_blocks
        for group, table in zip(self._groups, request.tables, strict=True):
            new = []
            # The head of a prefix is worth more than its tail: it is moved to the end last, so it stays longest.
            for place in range(request.cached[group.index] - 1, -1, -1):
                block = table[place]
                if block == _LEFT or self._digest[block] is None:
                    continue
                key = group.index, request.chain[(place + 1) * group.stride - 1]
                if key in tier:
                    tier.move_to_end(key)
                else:
                    new.append(place)
            new = new[::-1][:room]
            room -= len(new)
            news.append((group, new))
        dropped = [tier.popitem(last=False)[0] for _ in range(max(0, len(tier) - room))]
        for group, new in news:
            gone = [digest for index, digest in dropped if index == group.index]
            if gone:
                self._events.append(Removed(gone, self._offload_medium, group.index))
            digests = [request.chain[(place + 1) * group.stride - 1] for place in new]
            for digest in reversed(digests):
                tier[group.index, digest] = None
            if not new:
                continue
            self._offload_groups.add(group.index)
            if self._offload_tokens:
                for run in _runs(new):
                    hashes = [request.chain[(place + 1) * group.stride - 1] for place in run]
                    self._say_stored(request, group, run[0], run[-1] + 1, run, hashes, self._offload_medium)
            else:
                none = request.tokens[:0]
                self._events.append(Stored(digests, None, none, 0, medium=self._offload_medium, group_idx=group.index))


def _runs(places: Sequence[int]) -> list[Sequence[int]]:
    """Split an increasing sequence into runs of consecutive numbers."""
    cuts = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
    return [places[a:b] for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True) if a < b]

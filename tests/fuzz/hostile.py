"""Hostile payloads of a given size. Each kind costs a careless reader far more than its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgpack

__all__ = ["KINDS", "payload"]

SIZE = 4
#: Multiples of it have equal low bits after a multiplication by the golden ratio's 2^64, which mixes keys if no
#: secret is available.
GOLDEN_INVERSE = pow(0x9E3779B97F4A7C15, -1, 1 << 64)


def stored(hashes: list[int], tokens: list[Any] | None = None, parent: int | None = None, **more: Any) -> dict:
    tokens = [hashes[0] >> shift & 0xFFFF for shift in (0, 16, 32, 48)] * len(hashes) if tokens is None else tokens
    return {
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
        "block_size": SIZE, **more,
    }  # fmt: skip


def many(each: Callable[[int], Any]) -> Callable[[int], bytes]:
    """A batch of events ``each(0)``, ``each(1)``, …"""

    def made(size: int) -> bytes:
        events, room = [], size
        while room > 0 or not events:
            events.append(msgpack.packb(each(len(events))))
            room -= len(events[-1])
        return b"\x92" + msgpack.packb(0.5) + b"\xdd" + len(events).to_bytes(4, "big") + b"".join(events)

    return made


def one(event: Callable[[int], Any], each: int) -> Callable[[int], bytes]:
    """A batch of one event, with as many items of ``each`` bytes as fit."""
    return lambda size: msgpack.packb([0.5, [event(max(size // each, 2))]])


def nested(size: int) -> bytes:
    return b"\x92\x00\x91" + b"\x91" * size + b"\xc0"


def repeated_keys(size: int) -> bytes:
    pair = msgpack.packb("block_hashes") + msgpack.packb([1, 2, 3])
    count = max(size // len(pair), 1)
    head = msgpack.packb("type") + msgpack.packb("BlockRemoved")
    return b"\x92\x00\x91\xdf" + (count + 1).to_bytes(4, "big") + head + pair * count


def promised(size: int) -> bytes:
    """Lengths of more than four billion, with few bytes behind them."""
    return b"\x92\x00\xdd\xff\xff\xff\xff" + b"\xdd\xff\xff\xff\xff" * (size // 5)


def names(count: int) -> list[int]:
    rng = Random(count)
    return [rng.getrandbits(64) for _ in range(count)]


#: The function that makes a payload of each kind from its size.
KINDS: dict[str, Callable[[int], bytes]] = {
    "nils": lambda size: b"\x92\x00\xdd" + size.to_bytes(4, "big") + b"\xc0" * size,
    "empty arrays": lambda size: b"\x92\x00\xdd" + size.to_bytes(4, "big") + b"\x90" * size,
    "nested arrays": nested,
    "promised lengths": promised,
    "repeated keys": repeated_keys,
    "one string": lambda size: msgpack.packb([0.5, ["x" * size]]),
    "unknown keys": one(lambda n: {"type": "AllBlocksCleared"} | {f"key-{i:08}": None for i in range(n)}, 14),
    "clears": many(lambda i: ["AllBlocksCleared"]),
    "removals of nothing": one(lambda n: {"type": "BlockRemoved", "block_hashes": names(n)}, 9),
    "random hashes": one(lambda n: stored(names(n), [7] * SIZE * n), 13),
    "repeated hashes": one(lambda n: stored([7] * n, [7] * SIZE * n), 5),
    "chosen low bits": one(lambda n: stored([i << 40 for i in range(n)], [7] * SIZE * n), 13),
    "chosen high bits": one(lambda n: stored([i + 1 for i in range(n)], [7] * SIZE * n), 8),
    "chosen for the golden ratio": one(
        lambda n: stored([(i << 32) * GOLDEN_INVERSE % (1 << 64) for i in range(n)], [7] * SIZE * n), 13
    ),
    "strings for tokens": one(lambda n: stored(names(n), ["t"] * SIZE * n), 17),
    "names without tokens": one(lambda n: stored(names(n), [], block_size=0), 9),
    "names of one block": many(lambda i: stored([i], [1] * SIZE)),
    "prompts of one block": many(lambda i: stored([i + 1])),
    "orphans": many(lambda i: stored([2 * i + 10], parent=2 * i + 11)),
    "own parents": many(lambda i: stored([i], parent=i)),
    "groups": many(lambda i: stored([1], [1] * SIZE, group_idx=i)),
    "groups without blocks": many(lambda i: stored([], [1] * SIZE, group_idx=i)),
    "windows": many(lambda i: stored([1], [1] * SIZE, group_idx=1, kv_cache_spec_sliding_window=i)),
    "media": many(lambda i: stored([1], [1] * SIZE, medium=f"medium-{i}")),
    "media of removals": many(lambda i: {"type": "BlockRemoved", "block_hashes": [1], "medium": f"medium-{i}"}),
    "adapters": many(lambda i: stored([i], [1] * SIZE, lora_name=f"adapter-{i}")),
    "extra keys": one(lambda n: stored([1], [1] * SIZE, extra_keys=[list(range(n))]), 3),
    "block sizes": many(lambda i: stored([i + 1], [1] * SIZE, block_size=i)),
    "lookahead of many lengths": many(lambda i: stored([i + 1], lookahead_token_ids=[[1] * (i % 1000)])),
    "kinds": many(lambda i: [f"Kind{i}"]),
}


def payload(kind: str, size: int) -> bytes:
    """A payload of this kind, of about ``size`` bytes."""
    return KINDS[kind](size)


def payloads(size: int) -> Iterator[bytes]:
    """One payload of each kind."""
    for kind in KINDS:
        yield payload(kind, size)

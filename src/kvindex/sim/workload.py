"""The requests of users: conversations made up from a seed, and recorded ones from Mooncake's traces.

Every source yields :class:`Arrival` objects in order of time. The same arguments give the same tokens on every machine.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InvalidValueError
from .engine import Prompt

__all__ = ["MOONCAKE_BLOCK", "Arrival", "chat", "endless_hit_rate", "mooncake"]

Tokens = npt.NDArray[np.uint32]

#: Tokens of one block of a Mooncake trace, which has one of the ``hash_ids``.
MOONCAKE_BLOCK = 512


class Arrival(NamedTuple):
    """One request: its time (seconds since the start), its prompt, and the answer that it will get."""

    at: float
    prompt: Prompt
    output: Tokens


def chat(
    *,
    conversations: int = 64,
    turns: int = 6,
    system_prompts: int = 4,
    system_tokens: int = 1024,
    user_tokens: int = 96,
    output_tokens: int = 160,
    rate: float = 4.0,
    think: float = 8.0,
    regenerate: float = 0.05,
    adapters: Sequence[str | None] = (None,),
    salts: Sequence[str | None] = (None,),
    vocabulary: int = 128_000,
    seed: int = 0,
) -> list[Arrival]:
    """Conversations of several turns; every prompt repeats the whole conversation so far.

    Conversations start at ``rate`` a second, and each begins with one of ``system_prompts`` system prompts. The lengths
    of the users' messages and of the answers are spread evenly from half to one and a half times the given tokens.
    Between two requests of a conversation ``think`` seconds pass on average. A share of ``regenerate`` of the prompts
    is sent twice. The adapters (LoRA, numbered from 1) and cache salts are dealt out to the conversations in turn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def text(mean: int) -> Tokens:
        length = int(rng.integers(mean - mean // 2, mean + mean // 2 + 1))
        return rng.integers(0, vocabulary, length, dtype=np.uint32)

    systems = [rng.integers(0, vocabulary, system_tokens, dtype=np.uint32) for _ in range(system_prompts)]
    numbers = {name: place for place, name in enumerate(filter(None, adapters), 1)}
    arrivals = []
    start = 0.0
    for number in range(conversations):
        start += float(rng.exponential(1 / rate))
        at = start
        adapter = adapters[number % len(adapters)]
        salt = salts[number // len(adapters) % len(salts)]
        history = systems[int(rng.integers(system_prompts))]
        for _ in range(turns):
            prompt = Prompt(
                np.concatenate([history, text(user_tokens)]),
                lora_name=adapter,
                lora_id=None if adapter is None else numbers[adapter],
                cache_salt=salt,
            )
            if rng.random() < regenerate:
                arrivals.append(Arrival(at, prompt, text(output_tokens)))
                at += float(rng.exponential(think))
            answer = text(output_tokens)
            arrivals.append(Arrival(at, prompt, answer))
            at += float(rng.exponential(think))
            history = np.concatenate([prompt.tokens, answer])
    return sorted(arrivals, key=lambda arrival: arrival.at)


def mooncake(
    path: str | os.PathLike[str], *, limit: int | None = None, vocabulary: int = 128_000, seed: int = 0
) -> Iterator[Arrival]:
    """Requests of a Mooncake trace (JSON lines, plain or gzip), the first ``limit`` of them.

    A trace has no tokens, only equal ids for equal blocks of 512. Every id becomes 512 tokens made from it, so two
    prompts share exactly the blocks that they shared in the recording. The answers are random, because a trace does not
    show which answers came back in a later prompt.

    Raises ``OSError`` when the file cannot be read, and :class:`InvalidValueError`, naming the line, when a line is not
    a request.
    """
    name = os.fspath(path)
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw, mode="rb") if zipped else raw
        for number, line in enumerate(islice(_whole(lines, name), limit), 1):
            try:
                at, length, generated, ids = _mooncake_line(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InvalidValueError(f"{name}, line {number}: no request of a Mooncake trace: {error!r}") from None
            tokens = _tokens_of(ids, vocabulary, seed)[:length]
            # An id above all of a trace's, so an answer never equals a block of a prompt.
            output = _tokens_of(np.array([2**40 + number], dtype=np.uint64), vocabulary, seed, generated)
            yield Arrival(at, Prompt(tokens), output)


def _whole(lines: Iterable[bytes], name: str) -> Iterator[bytes]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidValueError(f"{name} is damaged after line {number}: {error}") from None


def _mooncake_line(line: bytes) -> tuple[float, int, int, npt.NDArray[np.uint64]]:
    item: dict[str, Any] = json.loads(line)
    length, generated, ids = item["input_length"], item["output_length"], item["hash_ids"]
    if not (type(length) is int and length > 0 and type(generated) is int and generated >= 0):
        raise ValueError(f"input_length {length!r} and output_length {generated!r} must be numbers of tokens")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**40 for i in ids):
        raise ValueError("hash_ids must be a list of ids")
    if len(ids) * MOONCAKE_BLOCK < length:
        raise ValueError(f"input_length {length} is more than its {len(ids)} hash_ids stand for")
    at = float(item["timestamp"]) / 1000
    if not 0 <= at < math.inf:
        raise ValueError(f"timestamp {item['timestamp']!r} must be milliseconds since the start")
    return at, length, generated, np.array(ids, dtype=np.uint64)


def _tokens_of(ids: npt.NDArray[np.uint64], vocabulary: int, seed: int, each: int = MOONCAKE_BLOCK) -> Tokens:
    # SplitMix64 over (id, offset): a generator per id would cost more than all the engine's work on its block.
    x: npt.NDArray[Any] = (ids[:, None] << np.uint64(20)) + np.arange(each, dtype=np.uint64)
    x = (x + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    tokens: Tokens = (x % np.uint64(vocabulary)).astype(np.uint32).ravel()
    return tokens


def endless_hit_rate(arrivals: Iterable[Arrival], block_size: int = 16) -> float:
    """The share of prompt tokens, 0 to 1, that one cache without evictions would reuse: no routing can do better."""
    known: set[bytes] = set()
    hits = total = 0
    for arrival in arrivals:
        chain = arrival.prompt.chain(b"", block_size)
        total += len(arrival.prompt)
        hits += block_size * next((i for i, digest in enumerate(chain) if digest not in known), len(chain))
        whole = list(chain)
        arrival.prompt.extend_chain(whole, b"", np.concatenate([arrival.prompt.tokens, arrival.output]), block_size)
        known.update(whole)
    return hits / total if total else 0.0

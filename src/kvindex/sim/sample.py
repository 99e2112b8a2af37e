"""The repository's own captures: small recordings of simulated engines, one for each feature of the streams.

They have the format of :mod:`kvindex.capture`, and are made on demand, because the same seed gives the same bytes.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..capture import CaptureWriter, Message, Query
from ..errors import InvalidValueError
from .engine import Engine, Prompt
from .fleet import Fleet, Pod, RandomChoice
from .wire import HashForm, wire_form
from .workload import Arrival, chat

__all__ = ["KINDS", "write_sample"]


@dataclass(frozen=True, slots=True)
class _Kind:
    about: str
    form: str
    hashes: HashForm | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    own_seeds: bool = False
    resets: bool = False


_HOST_TIER = {"offload_blocks": 150, "offload_medium": "CPU_PINNED", "offload_tokens": True}
_NAMES = {"adapters": (None, "adapter-a", "adapter-b"), "salts": (None, "tenant-a")}

_KINDS = {
    "full-attention": _Kind("evictions under pressure, answers that come back in prompts", "vllm-0.33.0"),
    "lora-salt-bytes": _Kind(
        "adapters and salts in the extra keys, 32-byte hashes", "vllm-0.24.0", "bytes32", chat=_NAMES
    ),
    "hybrid": _Kind(
        "a sliding window with blocks left out, copies, clears, data-parallel ranks",
        "vllm-0.33.0",
        engine={"num_blocks": 220, "window": 40, "window_interval": 96},
        ranks=2,
        resets=True,
    ),
    "hybrid-sizes": _Kind(
        "a sliding window whose blocks are twice as large, in arrays",
        "vllm-0.22.0",
        "bytes16",
        engine={"num_blocks": 220, "window": 65, "window_block_size": 32},
    ),
    "offload": _Kind(
        "a second tier that names blocks without their tokens",
        "vllm-0.20.0",
        engine={"offload_blocks": 150},
        resets=True,
    ),
    "arrays": _Kind(
        "the first release's arrays: no medium, adapters by number, a seed per process",
        "vllm-0.9.0",
        chat={"adapters": (None, "adapter-a")},
        own_seeds=True,
    ),
    "sglang": _Kind("signed hashes, coalesced pages, salts, clears", "sglang-0.5.22", chat=_NAMES, resets=True),
    "sglang-pages": _Kind("one event a page, and a host tier", "sglang-0.5.9", engine=_HOST_TIER),
}

#: The kinds of samples, each with its special features.
KINDS: dict[str, str] = {name: kind.about for name, kind in _KINDS.items()}


def write_sample(kind: str, path: str | os.PathLike[str], *, seed: int = 0, requests: int = 60) -> int:
    """Record a small fleet of simulated engines; returns the number of answers (queries times pods) in the file.

    ``kind`` is one of :data:`KINDS`. The same arguments write the same bytes. Raises :class:`InvalidValueError` for an
    unknown kind.
    """
    try:
        plan = _KINDS[kind]
    except KeyError:
        raise InvalidValueError(f"no sample is called {kind!r}; there are {', '.join(KINDS)}") from None
    form = wire_form(plan.form, plan.hashes)
    rng = random.Random(seed)
    options: dict[str, Any] = {"num_blocks": 120, "flavor": form.engine, **plan.engine}

    def engine(name: str) -> Engine:
        return Engine(hash_seed=f"{seed}/{name}".encode() if plan.own_seeds else b"", **options)

    pods = [
        Pod(name, form, {rank: engine(f"{name}/{rank}") for rank in range(plan.ranks)})
        for name in ("pod-0", "pod-1", "pod-2")
    ]
    header = {
        "engine": form.engine,
        "version": form.name.partition("-")[2],
        "block_size": 16,
        "pods": [pod.name for pod in pods],
        "model": "m",
        "num_blocks": options["num_blocks"],
        "sliding_window": options.get("window"),
        "sample": kind,
        "seed": seed,
    }
    arrivals = _arrivals(plan, requests, seed)
    answers = 0
    with CaptureWriter(path, header) as writer:
        seqs: Counter[str] = Counter()

        def publish(pod: str, rank: int, payload: bytes) -> None:
            # Every rank has its own publisher, and so its own sequence numbers.
            topic = f"kv@{pod}@dp{rank}" if plan.ranks > 1 else ""
            writer.write(Message(pod, topic, seqs[pod + topic], payload))
            seqs[pod + topic] += 1

        fleet = Fleet(pods, publish, prefill_rate=4000.0, decode_rate=100.0)
        route = RandomChoice(seed)
        for number, arrival in enumerate(arrivals):
            fleet.advance(arrival.at)
            for prompt in (arrival.prompt, _cut(rng.choice(arrivals[: number + 1]).prompt, rng)):
                name = pods[0].lora_name(prompt)
                hits = fleet.truth(prompt)
                writer.write(Query(f"q{answers}", prompt.tokens, hits, name, prompt.lora_id, prompt.cache_salt))
                answers += len(hits)
            fleet.serve(arrival, route)
            if plan.resets and number % 10 == 9:
                pod = rng.choice(pods)
                fleet.reset(pod, rng.randrange(plan.ranks))
        fleet.finish()
    return answers


def _arrivals(plan: _Kind, requests: int, seed: int) -> list[Arrival]:
    options = {"system_prompts": 2, "system_tokens": 160, "user_tokens": 40, "output_tokens": 48, **plan.chat}
    arrivals = chat(conversations=-(-requests // 3), turns=3, rate=2.0, think=3.0, regenerate=0.2, seed=seed, **options)
    return arrivals[:requests]


def _cut(prompt: Prompt, rng: random.Random) -> Prompt:
    """The beginning of an earlier prompt, half of the time with a different last token."""
    tokens = prompt.tokens[: rng.randint(1, len(prompt))].copy()
    if rng.random() < 0.5:
        tokens[-1] ^= 1
    return Prompt(tokens, lora_name=prompt.lora_name, lora_id=prompt.lora_id, cache_salt=prompt.cache_salt)

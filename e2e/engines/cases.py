"""The tested features of each real engine, with the figures that show that a run used the feature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvindex.sim import Arrival, Prompt, chat

__all__ = ["CASES", "Case", "workload"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One feature: the engine's options, the requests of users, and the figures that must not be zero."""

    engine: str
    feature: str
    options: dict[str, Any] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    """Options of :class:`PodSource`."""
    index: dict[str, Any] = field(default_factory=dict)
    shows: tuple[str, ...] = ("BlockStored", "BlockRemoved")
    own: bool = False
    """Whether only the engine's own pool is compared, because the index leaves out the tiers behind it on purpose."""
    together: bool = False
    """Whether every prompt is sent four times at once."""
    resets: str = ""
    """The tiers ("GPU", "all tiers") whose caches are reset now and then."""
    sample: str | None = None
    """The name of the recording that is kept with the tests."""
    images: bool = False
    """Whether conversations start with an image, which is in the keys of the blocks that it covers."""
    degraded: str = ""
    """The reason why the events are not sufficient in this case: the index must call its pods degraded."""


_NAMES = {"adapters": (None, "adapter-a", "adapter-b"), "salts": (None, "tenant-x")}
_FULL = ["full", 16]
_STORED = ("BlockStored", "BlockRemoved")
_LOADED = (*_STORED, "stores", "loads")


def _vllm(feature: str, **options: Any) -> Case:
    return Case(engine="vllm", feature=feature, source={"engine": "vllm", **options.pop("source", {})}, **options)


def _sglang(feature: str, **options: Any) -> Case:
    return Case(engine="sglang", feature=feature, source={"engine": "sglang", **options.pop("source", {})}, **options)


def _tier(chunk: int = 1, described: bool = False, **more: Any) -> dict[str, Any]:
    """Options for a GPU cache that is too small for the work, with a CPU tier behind it."""
    return {"offload": {"chunk": chunk, "chunks": 400 // chunk, "described": described}, "blocks": 130, **more}


def _draft(tokens: int = 1, multi: bool = False, legacy: bool = False) -> dict[str, Any]:
    return {"tokens": tokens, "multi": multi, "legacy": legacy}


CASES: tuple[Case, ...] = (
    _vllm("full attention, int hashes", sample="vllm-0.33.0-full-attention"),
    _vllm("full attention, bytes hashes", options={"hashes": "bytes"}),
    _vllm("full attention, sha256_cbor", options={"hash": "sha256_cbor", "hashes": "bytes"}),
    _vllm("LoRA and salts", options={"hashes": "bytes"}, chat=_NAMES, sample="vllm-0.33.0-lora-salt-bytes-hashes"),
    *(
        _vllm(
            f"sliding window of {window}",
            options={"groups": [_FULL, ["sliding", 16, window]], "blocks": 350},
            sample="vllm-0.33.0-sliding-window" if window == 100 else None,
        )
        for window in (17, 64, 100, 192, 256, 1024)
    ),
    _vllm(
        "several windows",
        options={"groups": [_FULL, ["sliding", 16, 48], ["sliding", 16, 200]], "blocks": 500},
        chat=_NAMES,
    ),
    _vllm("sliding window alone", options={"groups": [["sliding", 16, 100]]}),
    _vllm(
        "windows with blocks left out",
        options={"groups": [_FULL, ["sliding", 16, 40]], "retention": 96, "blocks": 350},
        shows=("BlockStored", "BlockRemoved", "masked"), sample="vllm-0.33.0-masked-blocks",
    ),
    _vllm("blocks of 32 and 64 tokens", options={"groups": [["full", 32], ["sliding", 64, 130]], "blocks": 100}),
    _vllm("chunked local attention", options={"groups": [_FULL, ["chunked", 16, 128]], "blocks": 350},
          source={"chunk_size": 128}),
    _vllm("mamba layers", options={"groups": [_FULL, ["mamba", 16]], "blocks": 400},
          sample="vllm-0.33.0-mamba"),
    _vllm("data-parallel ranks", options={"ranks": 2, "blocks": 150}),
    _vllm("chunked prefill", options={"tokens_per_step": 48}, shows=("BlockStored", "BlockRemoved", "chunks")),
    _vllm("preemption", options={"blocks": 130}, chat={"output_tokens": 260},
          shows=("BlockStored", "BlockRemoved", "preempted"), sample="vllm-0.33.0-preemption"),
    _vllm("duplicate copies", options={"blocks": 300, "tokens_per_step": 4096}, together=True,
          shows=("BlockStored", "BlockRemoved", "copies"), sample="vllm-0.33.0-duplicate-copies"),
    _vllm("images", images=True, chat=_NAMES, sample="vllm-0.33.0-images"),
    _vllm("resets", resets="GPU", shows=("BlockStored", "AllBlocksCleared", "resets")),
    _vllm("EAGLE, lookahead of 1", options={"speculative": _draft()}, chat=_NAMES),
    _vllm("MTP, lookahead of 3", options={"speculative": _draft(3, multi=True), "blocks": 250}),
    _vllm("EAGLE, lookahead of 1, a window",
          options={"speculative": _draft(), "groups": [_FULL, ["sliding", 16, 64]], "blocks": 350}),
    _vllm("EAGLE, lookahead of 1, mamba layers",
          options={"speculative": _draft(), "groups": [_FULL, ["mamba", 16]], "blocks": 400}),
    _vllm("EAGLE, legacy hashes", options={"speculative": _draft(legacy=True)}, chat=_NAMES, source={"eagle": True}),
    *(
        _vllm(f"EAGLE, legacy hashes, {name}, {of} drop",
              options={"speculative": _draft(legacy=True), "eagle_groups": flagged, "blocks": 400,
                       "groups": [_FULL, beside]},
              source={"eagle": flagged or True})
        for name, beside in (("a window", ["sliding", 16, 64]), ("mamba layers", ["mamba", 16]))
        for of, flagged in (("full-attention groups", [0]), ("all groups", []))
    ),
    _vllm("context parallelism, blocks of 32", options={"context_parallel": 2, "blocks": 100}, chat=_NAMES),
    *(
        _vllm(f"CPU tier, {how}{what}", options=_tier(described=how == "described"), shows=_LOADED, **more)
        for how in ("placeholders", "described")
        for what, more in (
            ("", {}), (", salts and adapters", {"chat": _NAMES}), (", images", {"images": True, "chat": _NAMES}),
        )
    ),
    _vllm("CPU tier, EAGLE", options=_tier(speculative=_draft(), eagle_groups=[0]), shows=_LOADED,
          source={"eagle": True}),
    _vllm("CPU tier, described, mamba layers", options=_tier(described=True, groups=[_FULL, ["mamba", 16]], blocks=230),
          shows=_LOADED),
    _vllm("CPU tier, a window", options=_tier(groups=[_FULL, ["sliding", 16, 100]], blocks=230), shows=_LOADED,
          degraded="of a prompt of whole blocks it loads all but the last token, and answers are whole blocks"),
    _vllm("CPU tier, EAGLE, mamba layers",
          options=_tier(speculative=_draft(), eagle_groups=[0], groups=[_FULL, ["mamba", 16]], blocks=230),
          shows=_LOADED, source={"eagle": [0]},
          degraded="the pool's and the connector's look-up of several groups follow no rule together"),
    _vllm("CPU tier, chunks of four blocks, left out", options=_tier(4, True), shows=_LOADED,
          source={"ignore_media": ("CPU",)}, own=True),
    _vllm("CPU tier, resets of the GPU", options=_tier(), resets="GPU", source={"clear_media": ("GPU",)},
          shows=(*_LOADED, "AllBlocksCleared")),
    _vllm("CPU tier, resets of all tiers", options=_tier(), resets="all tiers", shows=(*_LOADED, "AllBlocksCleared"),
          degraded="a clear does not name the tiers that it clears"),
    _vllm(
        "all of it",
        options={"groups": [_FULL, ["sliding", 16, 100]], "blocks": 170, "tokens_per_step": 96, "ranks": 2,
                 "hashes": "bytes"},
        chat={**_NAMES, "output_tokens": 160}, resets="GPU",
        shows=("BlockStored", "BlockRemoved", "AllBlocksCleared", "preempted", "chunks"),
    ),
    # Several requests at a time make copies, which a set cannot distinguish from reports. The reports of a window name
    # blocks that the window has passed. So neither can be exact.
    _vllm("full reports, one request at a time", options={"report": "full", "max_seqs": 1},
          source={"presence": "set"}),
    _sglang("pages of 16", sample="sglang-0.5.23-pages"),
    _sglang("pages of 64", options={"page_size": 64, "blocks": 50}),
    _sglang("pages of 1", options={"page_size": 1, "blocks": 3200}, index={"block_size": 1}),
    _sglang("salts", chat={"salts": (None, "tenant-x", "tenant-y")}),
    _sglang("LoRA and salts", options={"dynamo": True}, chat=_NAMES, sample="sglang-0.5.23-lora-salt"),
    _sglang("LoRA, SGLang's own form", chat={"adapters": (None, "adapter-a", "adapter-b")}),
    _sglang("data-parallel ranks", options={"ranks": 2, "blocks": 150}),
    _sglang("chunked prefill", options={"tokens_per_step": 48}, shows=("BlockStored", "BlockRemoved", "chunks")),
    _sglang("equal prompts at once", together=True),
    _sglang("EAGLE, whose tokens are pairs", options={"eagle": True}, chat=_NAMES | {"adapters": (None,)}),
    _sglang("resets", resets="GPU", shows=("BlockStored", "AllBlocksCleared", "resets")),
    _sglang("unified tree", options={"beside": "full"}, chat=_NAMES | {"adapters": (None,)}),
    _sglang("unified tree, pairs", options={"beside": "full", "eagle": True}),
    *(
        _sglang(f"unified tree, host pool, {policy}{what}", **more, shows=(*_LOADED, "evicted of the host", *shows),
                options={"beside": "full", "host": 4800, "policy": policy, "blocks": 130, **options})
        for policy in ("write_through", "write_back")
        for what, options, shows, more in (
            ("", {}, (), {}),
            (", pairs and salts", {"eagle": True}, (), {"chat": _NAMES | {"adapters": (None,)}}),
            (", resets", {}, ("AllBlocksCleared", "resets"), {"resets": "GPU"}),
        )
    ),
    _sglang("unified tree, a window of 64", options={"beside": "window", "share": 0.4}, source={"hybrid": True},
            shows=(*_STORED, "silently evicted"), degraded="what the window evicts is in no event"),
    _sglang("unified tree, mamba layers", options={"beside": "mamba", "page_size": 1, "blocks": 3200},
            index={"block_size": 1}, source={"hybrid": True}, shows=(*_STORED, "silently evicted"),
            degraded="which states there are is in no event"),
)  # fmt: skip


def workload(case: Case, requests: int, seed: int = 0) -> list[Arrival]:
    """The requests of users: several turns of conversations, in which each prompt repeats the turns before."""
    # Tokens below 128 are one byte on the wire, which keeps the recordings small. The blocks are still distinct.
    options = {"system_prompts": 2, "system_tokens": 200, "user_tokens": 60, "output_tokens": 64, "vocabulary": 128}
    arrivals = chat(
        conversations=-(-requests // 3), turns=3, rate=2.0, think=3.0, regenerate=0.2, seed=seed,
        **{**options, **case.chat},
    )[:requests]  # fmt: skip
    if case.images:
        arrivals = [each._replace(prompt=_with_image(each.prompt)) for each in arrivals]
    return [each for each in arrivals for _ in range(4)] if case.together else arrivals


def _with_image(prompt: Prompt) -> Prompt:
    """The same text with one of three images, or none, in tokens 20 to 119; the user's first text decides which."""
    which = int(prompt.tokens[200]) % 4
    if which == 3:
        return prompt
    keys = [None if block < 1 or block > 7 else [(f"image-{which}", 20 - 16 * block)] for block in range(8)]
    return Prompt(
        prompt.tokens, lora_name=prompt.lora_name, lora_id=prompt.lora_id, cache_salt=prompt.cache_salt,
        extra_keys=keys,
    )  # fmt: skip

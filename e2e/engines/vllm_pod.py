"""vLLM's own scheduler, KV-cache manager and event publisher, as a pod without a model.

The scheduler decides the work of each step: continuous batching, chunked prefill, preemption, eviction. The sampled
tokens come from the trace. Nothing of vLLM is replaced but the description of the model.
"""

from __future__ import annotations

import os
from itertools import count
from math import gcd, lcm
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256, sha256_cbor
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvindex.sim import Prompt

from .rank import Rank, endpoints, reachable

_LONGEST = 20_000
# The least size of a chunk: the offloading manager rounds up to this.
_CHUNK_BYTES = 4096


def _spec(kind: str, size: int, extent: int | None = None) -> Any:
    common = {"block_size": size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float16}
    match kind:
        case "full":
            return FullAttentionSpec(**common)
        case "sliding":
            return SlidingWindowSpec(**common, sliding_window=extent)
        case "chunked":
            return ChunkedLocalAttentionSpec(**common, attention_chunk_size=extent)
        case "mamba":
            return MambaSpec(block_size=size, shapes=((1,),), dtypes=(torch.float16,), mamba_cache_mode="align")
    raise ValueError(f"no kind of group is called {kind!r}")


class _Draft(SimpleNamespace):
    """The description of an EAGLE draft model for the scheduler; a real one needs the model."""

    def __init__(self, tokens: int, multi: bool, legacy: bool) -> None:
        super().__init__(
            method="eagle", num_speculative_tokens=tokens, num_speculative_tokens_per_batch_size=None,
            disable_eagle_block_drop=False, disable_lookahead_block_hashes=legacy, parallel_drafting=False,
            draft_model_config=None, target_model_config=None, max_num_new_slots_for_drafting=0,
        )  # fmt: skip
        self.use_heterogeneous_vocab = False
        self._is = {"eagle", "eagle_block_drop", *(["multi_module_mtp"] if multi else [])}

    def __getattr__(self, name: str) -> Any:
        kind, _, what = name.partition("_")
        if kind not in ("use", "needs"):
            raise AttributeError(name)
        return lambda: what in self._is


def _offloading(chunk: int, chunks: int, described: bool) -> KVTransferConfig:
    """Native offloading to the CPU: ``chunks`` chunks of ``chunk`` blocks."""
    return KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "CPUOffloadingSpec", "blocks_per_chunk": chunk, "cpu_bytes_to_use": chunks * _CHUNK_BYTES,
            "self_describing_kv_events": described,
        },
    )  # fmt: skip


def _images(prompt: Prompt, size: int) -> list[MultiModalFeatureSpec]:
    """The images of a prompt, from the keys of its blocks: (identifier, place relative to the block)."""
    spans: dict[tuple[str, int], int] = {}
    for block, keys in enumerate(prompt.extra_keys or ()):
        for name, place in keys or ():
            spans[name, block * size + place] = min((block + 1) * size, len(prompt))
    return [
        MultiModalFeatureSpec(
            data=None, modality="image", identifier=name, mm_position=PlaceholderRange(offset=start, length=end - start)
        )
        for (name, start), end in sorted(spans.items(), key=lambda each: each[0][1])
        if start < end
    ]


class VllmRank(Rank):
    def __init__(self, options: dict[str, Any], rank: int, first: int) -> None:
        super().__init__()
        os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "1" if options.get("hashes", "int") == "int" else "0"
        ranks = options.get("ranks", 1)
        groups = options.get("groups", [["full", 16]])
        sizes = [group[1] for group in groups]
        cache = CacheConfig(block_size=sizes[0], enable_prefix_caching=True)
        config = VllmConfig(
            cache_config=cache,
            scheduler_config=SchedulerConfig(
                max_num_seqs=options.get("max_seqs", 8),
                max_num_batched_tokens=options.get("tokens_per_step", 512),
                max_model_len=_LONGEST, enable_chunked_prefill=True, is_encoder_decoder=False,
            ),
            kv_events_config=KVEventsConfig(
                enable_kv_cache_events=True, publisher="zmq", topic=options.get("topic", ""), **endpoints(first, ranks)
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=_offloading(**options["offload"]) if "offload" in options else None,
        )  # fmt: skip
        config.parallel_config.decode_context_parallel_size = options.get("context_parallel", 1)
        if "speculative" in options:
            config.speculative_config = _Draft(**options["speculative"])
        # A real description needs a model whose code can be imported. The scheduler reads only these fields of it.
        config.model_config = SimpleNamespace(
            uses_mrope=False, is_encoder_decoder=False, max_model_len=_LONGEST, runner_type="generate",
            is_diffusion=False, multimodal_config=None, supports_multimodal_inputs=False, return_sampling_mask=False,
            skip_tokenizer_init=True, use_mla=False, dtype=torch.float16, model="m",
            get_total_num_kv_heads=lambda: 1,
        )  # fmt: skip
        config.parallel_config.data_parallel_index = rank
        cache.num_gpu_blocks = options.get("blocks", 200)
        layout = KVCacheConfig(
            num_blocks=cache.num_gpu_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer{n}"], _spec(*group), is_eagle_group=n in options.get("eagle_groups", ()))
                for n, group in enumerate(groups)
            ],
            prefix_cache_retention_interval=options.get("retention"),
        )
        # PYTHONHASHSEED is read here, as at the start of a server: pods with and without it have different hashes.
        hash_with = {"sha256": sha256, "sha256_cbor": sha256_cbor}[options.get("hash", "sha256")]
        init_none_hash(hash_with)
        self.scheduler = Scheduler(
            config, layout, structured_output_manager=StructuredOutputManager(config),
            block_size=lcm(*sizes) * options.get("context_parallel", 1),
            hash_block_size=gcd(*sizes) * options.get("context_parallel", 1),
        )  # fmt: skip
        # Set as for a multimodal model, because there is no processor that reports these sizes.
        self.scheduler.max_num_encoder_input_tokens = _LONGEST
        self.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=100 * _LONGEST)
        self._block_size = gcd(*sizes) * options.get("context_parallel", 1)
        self._hasher = get_request_block_hasher(self._block_size, hash_with, self.scheduler.num_hash_lookahead_tokens)
        self._extra = {"kv_cache_report_mode": options.get("report", "incremental")}
        self._numbers = count()
        self._outputs: dict[str, list[int]] = {}
        publisher = self.scheduler.kv_event_publisher
        self.endpoint = reachable(publisher._pub)
        self.replay_endpoint = reachable(publisher._replay)
        self._watch(publisher)

    def _watch(self, publisher: Any) -> None:
        publish = publisher.publish

        def counted(batch: Any) -> None:
            self.seq += 1
            for event in batch.events:
                self.figures[type(event).__name__] += 1
                if getattr(event, "token_ids", None) and len(event.token_ids) != (
                    len(event.block_hashes) * event.block_size
                ):
                    self.figures["masked"] += 1
            publish(batch)

        publisher.publish = counted

    def _request(self, prompt: Prompt, length: int = 1, asking: bool = True) -> Request:
        name = f"r{next(self._numbers)}"
        adapter = None
        if prompt.lora_name is not None:
            adapter = LoRARequest(prompt.lora_name, prompt.lora_id or 1, "/nowhere")
        sampling = SamplingParams(max_tokens=length, ignore_eos=True, extra_args=None if asking else self._extra)
        return Request(
            name, prompt.tokens.tolist(), sampling, None,
            lora_request=adapter, cache_salt=prompt.cache_salt, block_hasher=self._hasher,
            mm_features=_images(prompt, self._block_size),
        )  # fmt: skip

    def add(self, prompt: Prompt, output: list[int]) -> None:
        request = self._request(prompt, max(1, len(output)), False)
        self._outputs[request.request_id] = output or [0]
        self.scheduler.add_request(request)

    def step(self) -> bool:
        scheduler = self.scheduler
        connector = scheduler.connector
        # A connector continues its transfers without requests.
        if not scheduler.has_requests() and not (connector is not None and connector.has_pending_push_work()):
            return False
        plan = scheduler.schedule()
        self.figures["preempted"] += len(plan.preempted_req_ids or ())
        sampled = []
        for name, tokens in plan.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            whole = request.num_computed_tokens >= request.num_tokens
            self.figures["chunks"] += not whole
            self.figures["tokens"] += tokens
            sampled.append([self._outputs[name][request.num_output_tokens]] if whole else [])
        names = list(plan.num_scheduled_tokens)
        places = {name: place for place, name in enumerate(names)}
        output = ModelRunnerOutput(names, places, sampled, kv_connector_output=self._transferred(plan))
        scheduler.update_from_output(plan, output)
        copies = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache.values()
        most = sum(len(each) - 1 for each in copies if isinstance(each, dict))
        self.figures["copies"] = max(self.figures["copies"], most)
        return True

    def _transferred(self, plan: Any) -> KVConnectorOutput | None:
        """The answer of a worker that has done every transfer at once. There is no memory to move."""
        if self.scheduler.connector is None:
            return None
        told = plan.kv_connector_metadata
        done = OffloadingWorkerMetadata()
        for job in (*told.load_jobs, *told.store_jobs):
            done.mark_completed(job)
        self.figures["stores"] += len(told.store_jobs)
        self.figures["loads"] += len(told.load_jobs)
        arrived = {job.req_id for job in told.load_jobs.values() if not job.sync}
        return KVConnectorOutput(finished_recving=arrived, kv_connector_worker_meta=done)

    def hit(self, prompt: Prompt) -> int:
        return max(self.tiers(prompt).values())

    def tiers(self, prompt: Prompt) -> dict[str, int]:
        request = self._request(prompt)
        _blocks, own, _boundary = self.scheduler.kv_cache_manager.get_computed_blocks(request)
        found = {"GPU": int(own)}
        connector = self.scheduler.connector
        if connector is not None:
            # Ask as a new request would, and then remove the request. A look-up does not change the order of eviction.
            connector.on_new_request(request)
            asked = connector.connector_scheduler
            more, _later = connector.get_num_new_matched_tokens(request, int(own))
            asked._current_batch_sync_loads.discard(request.request_id)
            asked._release_step()
            del asked._req_status[request.request_id]
            if more is None:
                raise ValueError("a transfer is under way; ask after it")
            found["CPU"] = int(own) + more
        return found

    def reset(self, connector: bool = False) -> bool:
        done = self.scheduler.reset_prefix_cache(reset_connector=connector)
        # Events are published only in a step; nothing is scheduled in this one.
        plan = self.scheduler.schedule()
        if plan.num_scheduled_tokens:
            raise ValueError("a reset in the middle of requests has to be followed by their next step")
        self.scheduler.update_from_output(
            plan, ModelRunnerOutput([], {}, [], kv_connector_output=self._transferred(plan))
        )
        self.figures["resets"] += done
        return bool(done)

    def blocks(self) -> int:
        cached = self.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache.values()
        return sum(len(each) if isinstance(each, dict) else 1 for each in cached)

    def close(self) -> None:
        self.scheduler.shutdown()


make = VllmRank

"""The routes of Mooncake's conductor and of Dynamo's standalone indexer, for their existing clients.

Both have ``/register``, ``/unregister``, ``/query`` and ``/query_by_hash``. A request is Dynamo's if it names the model
``model_name``, and Mooncake's if it names it ``modelname`` or ``model``. Each gets the answer that its own
documentation describes, with the state of every instance added.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from ..errors import InvalidTypeError, InvalidValueError, StreamError, UnknownPodError
from ..hashing import roll_hashes
from ..sync.source import PodSource
from .call import Limits, Refused, encode
from .fleet import DEFAULT, GROUP, INSTANCE, REGISTERED, SALT, TYPE, Fleet, Group, Member
from .replicated import ReplicatedPods
from .requests import Peer, Query, QueryByHash, Register, Unregister, WorkersQuery

if TYPE_CHECKING:
    from ..index import PrefixIndex
    from .figures import Figures

__all__ = ["Peers", "listener_status"]

_ENGINES: Final = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm", "trtllm": "trtllm"}
_MOST_PEERS: Final = 1024


class _Held(NamedTuple):
    """A prompt's cached tokens on an instance. Host memory and disk include the tiers before them."""

    gpu: int
    cpu: int
    disk: int
    longest: int
    ranks: dict[str, tuple[int, int, int]]
    tiers: dict[str, int]
    state: str


class Peers:
    """The handlers."""

    def __init__(self, index: PrefixIndex, manager: Any, fleet: Fleet, limits: Limits, figures: Figures) -> None:
        self._index, self._manager, self._fleet, self._limits, self._figures = index, manager, fleet, limits, figures
        self._peers: dict[str, None] = {}

    # ---- publishers

    async def register(self, asked: Register) -> tuple[int, bytes]:
        self._decides()
        mooncake = asked.model_name is None
        model = asked.modelname if mooncake else asked.model_name
        if model is None:
            raise Refused(400, "missing", "model_name (or Mooncake's modelname) is missing", field="model_name")
        group = (asked.tenant_id if mooncake else asked.routing_group) or DEFAULT
        instance, rank = str(asked.instance_id), asked.dp_rank or 0
        name = pod_name(instance, group, rank)
        engine = None
        if asked.type is not None:
            engine = _ENGINES.get(asked.type.lower())
            if engine is None:
                raise Refused(
                    400, "invalid_value",
                    f"type is {asked.type[:80]!r}; followed are vLLM, SGLang and TensorRT-LLM. Events of Mooncake's "
                    "store are translated by kvindex.adapters", field="type",
                )  # fmt: skip
        for member in (
            member for found in self._fleet.view().groups.values() for member in found.instances.get(instance, ())
        ):
            if member.source.model != model:
                raise self._refused(
                    mooncake,
                    f"instance {instance} is already registered for model={member.source.model} "
                    f"routing_group={member.source.labels.get(GROUP, DEFAULT)}",
                    "model_name",
                )
        labels = {REGISTERED: "true", INSTANCE: instance, GROUP: group}
        salt = asked.additionalsalt if asked.additional_salt is None else asked.additional_salt
        labels |= {TYPE: asked.type} if asked.type else {}
        labels |= {SALT: salt} if salt else {}
        try:
            source = PodSource(
                name, ranks={rank: (asked.endpoint, asked.replay_endpoint or None)}, model=model, labels=labels,
                block_size=asked.block_size, lora=asked.lora_name or None, engine=engine,  # type: ignore[arg-type]
            )  # fmt: skip
        except (InvalidTypeError, InvalidValueError) as error:
            raise Refused(400, "invalid_registration", str(error), field="endpoint") from None
        try:
            await asyncio.to_thread(self._manager.add_pod, source)
        except InvalidValueError as error:
            raise self._refused(mooncake, str(error), "block_size") from None
        except StreamError as error:
            raise self._refused(mooncake, f"{error} (dp_rank {rank} already registered)", "instance_id") from None
        if mooncake:
            return 200, encode({"status": "registered successfully", "instance_id": asked.instance_id})
        return 201, b'{"status":"ok"}'

    def _decides(self) -> None:
        if isinstance(self._manager, ReplicatedPods):
            raise self._manager.refused()

    def _refused(self, mooncake: bool, error: str, field: str) -> Refused:
        return Refused(400 if mooncake else 409, "invalid_registration", error, field=field)

    async def unregister(self, asked: Unregister) -> bytes:
        self._decides()
        mooncake = asked.model_name is None
        model = asked.modelname if mooncake else asked.model_name
        group = (asked.tenant_id or DEFAULT) if mooncake else asked.routing_group
        instance = str(asked.instance_id)
        gone = []
        for (of, name), found in self._fleet.view().groups.items():
            if model not in (None, of) or group not in (None, name):
                continue
            for member in found.instances.get(instance, ()):
                if REGISTERED in member.source.labels and asked.dp_rank in (None, *member.ranks):
                    try:
                        await asyncio.to_thread(self._manager.remove_pod, member.pod)
                    except UnknownPodError:  # another caller was faster
                        continue
                    gone += [f"{instance}|{name}|{rank}" for rank in member.ranks]
        if not gone:
            raise Refused(404, "unknown", f"instance {instance[:120]} not found", field="instance_id")
        if mooncake:
            return encode({"status": "unregistered successfully", "removed_instances": gone})
        return b'{"status":"ok"}'

    # ---- questions

    def query(self, asked: Query) -> bytes:
        group, pods = self._meant(asked)
        if len(asked.token_ids) > self._limits.max_tokens:
            raise Refused(
                413, "too_large",
                f"token_ids has {len(asked.token_ids):,} items; at most {self._limits.max_tokens:,} are taken",
                field="token_ids",
            )  # fmt: skip
        match = self._index.match_prefix(
            asked.token_ids, model=group.model, lora_name=asked.lora_name or None, cache_salt=asked.cache_salt or None,
            ready_pods=pods,
        )  # fmt: skip
        return self._answer(asked, group, pods, match, len(asked.token_ids))

    def query_by_hash(self, asked: QueryByHash) -> bytes:
        group, pods = self._meant(asked)
        given = [
            (name, hashes)
            for name in ("seq_hashes", "block_hash", "block_hashes")
            if (hashes := getattr(asked, name)) is not None
        ]
        if len(given) != 1:
            raise Refused(
                400, "invalid_value" if given else "missing",
                "give one of seq_hashes (rolling) and block_hashes (local)",
                field=given[-1][0] if given else "seq_hashes",
            )  # fmt: skip
        name, hashes = given[0]
        if asked.model_name is not None and asked.cache_salt:
            raise Refused(
                400, "invalid_value",
                "cache_salt is not accepted by /query_by_hash; block_hashes include it already",
                field="cache_salt",
            )  # fmt: skip
        if len(hashes) > self._limits.max_tokens:
            raise Refused(
                413,
                "too_large",
                f"{name} has {len(hashes):,} items; at most {self._limits.max_tokens:,} are taken",
                field=name,
            )
        try:
            rolled = roll_hashes(hashes, hash_seed=self._index.hash_seed) if name == "block_hashes" else hashes
            match = self._index.match_hashes(rolled, model=group.model, ready_pods=pods)
        except InvalidValueError as error:
            raise Refused(400, "out_of_range", str(error), field=name) from None
        return self._answer(asked, group, pods, match, len(hashes) * self._index.block_size)

    def _meant(self, asked: Any) -> tuple[Group, Any]:
        """Return the group that a question is about, and the pods of the instance that it names."""
        mooncake = asked.model_name is None
        model = asked.model if mooncake else asked.model_name
        if model is None:
            raise Refused(400, "missing", "model_name (or Mooncake's model) is missing", field="model_name")
        if asked.block_size is not None and asked.block_size % self._index.block_size:
            raise Refused(
                400, "invalid_value",
                f"block_size is {asked.block_size}; it must be a multiple of the index's {self._index.block_size}",
                field="block_size",
            )  # fmt: skip
        group = self._fleet.group(model, (asked.tenant_id if mooncake else asked.routing_group) or DEFAULT)
        if asked.instance_id is None or not mooncake:
            return group, group.pods
        instance = str(asked.instance_id)
        if instance not in group.instances:
            raise Refused(404, "unknown", f"instance {instance[:120]} is not registered", field="instance_id")
        return group, self._index.pod_set([member.pod for member in group.instances[instance]])

    def _answer(self, asked: Any, group: Group, pods: Any, match: Any, tokens: int) -> bytes:
        best = match.best()
        self._figures.asked(tokens, best[1] if best else 0)
        every = len(pods.pods) == len(group.members)
        held = {
            instance: self._held(members, match)
            for instance, members in group.instances.items()
            if every or members[0].pod in pods.pods
        }
        lower: dict[str, dict[str, Any]] = {
            instance: {
                "longest_matched": of.longest,
                "gpu": of.gpu,
                "dp": {rank: reach[0] for rank, reach in of.ranks.items()},
                "cpu": of.cpu,
                "disk": of.disk,
                "state": of.state,
            }
            for instance, of in held.items()
        }
        if asked.model_name is not None:
            scores = {instance: of["dp"] for instance, of in lower.items()}
            blocks = [score // self._index.block_size for ranks in scores.values() for score in ranks.values()]
            return encode({"scores": scores, "frequencies": _frequencies(blocks), "instances": lower})
        for instance, of in held.items():
            lower[instance]["rank_matches"] = {
                rank: {"gpu": gpu, "cpu": cpu, "disk": disk} for rank, (gpu, cpu, disk) in of.ranks.items()
            }
        upper = {
            instance: {
                "longest_matched": of.longest,
                "GPU": of.tiers.get("GPU", 0),
                "DP": {rank: max(reach) for rank, reach in of.ranks.items()},
                "CPU": of.tiers.get("CPU", 0),
                "DISK": of.tiers.get("DISK", 0),
                "state": of.state,
            }
            for instance, of in held.items()
        }
        return encode({group.name: upper, "instances": lower})

    def _held(self, members: list[Member], match: Any) -> _Held:
        if len(members) == 1:
            return self._of_pod(members[0], match)
        parts = [self._of_pod(member, match) for member in members]
        return _Held(
            max(part.gpu for part in parts),
            max(part.cpu for part in parts),
            max(part.disk for part in parts),
            max(part.longest for part in parts),
            {rank: reach for part in parts for rank, reach in part.ranks.items()},
            {tier: max(part.tiers.get(tier, 0) for part in parts) for each in parts for tier in each.tiers},
            _worst([part.state for part in parts]),
        )

    def _of_pod(self, member: Member, match: Any) -> _Held:
        if member.pod not in match:
            return _Held(0, 0, 0, 0, {str(rank): (0, 0, 0) for rank in member.ranks}, {}, self._fleet.state(member.pod))
        found = match[member.pod]
        tiers = _by_tier(found)
        gpu = tiers.get("GPU", 0)
        cpu = max(gpu, tiers.get("CPU", 0))
        disk = max(cpu, tiers.get("DISK", 0))
        if len(found.ranks) > 1 or len(member.ranks) > 1:
            # The index reports a rank's tokens over all media, and the tokens by medium only for the best rank.
            ranks = {str(rank): (0, 0, 0) for rank in member.ranks}
            ranks |= {str(rank): (tokens, tokens, tokens) for rank, tokens in found.ranks.items()}
        else:
            ranks = {str(next(iter(found.ranks or member.ranks))): (gpu, cpu, disk)}
        return _Held(gpu, cpu, disk, max(found.held, disk), ranks, tiers, found.state)

    # ---- listings

    def workers(self, asked: WorkersQuery) -> bytes:
        status = self._manager.status()
        rows = []
        for (model, name), group in self._fleet.view().groups.items():
            if asked.model_name not in (None, model) or asked.routing_group not in (None, name):
                continue
            for instance, members in group.instances.items():
                listeners = {
                    str(rank): {
                        "endpoint": worker.endpoint,
                        "status": listener_status(worker),
                        "state": worker.state,
                        **({"last_error": worker.reason} if worker.state != "exact" else {}),
                    }
                    for member in members
                    if member.pod in status
                    for rank, worker in status[member.pod].workers.items()
                }
                found = {each["status"] for each in listeners.values()}
                rows.append(
                    {
                        "instance_id": int(instance) if instance.isdecimal() else instance,
                        "source": "zmq",
                        "status": next(
                            s for s in ("failed", "pending", "active", "paused") if s in found or s == "paused"
                        ),
                        "model_name": model,
                        "routing_group": name,
                        "block_size": members[0].source.block_size or self._index.block_size,
                        "endpoints": {rank: each["endpoint"] for rank, each in listeners.items()},
                        "listeners": listeners,
                        "state": _worst([status[m.pod].state for m in members if m.pod in status]),
                    }
                )
        return encode(rows)

    def dump(self) -> bytes:
        raise Refused(
            501, "not_offered",
            "the index keeps no events to dump; GET /v1/snapshot has its content, for kvindex serve --from",
        )  # fmt: skip

    def global_view(self) -> bytes:
        status = self._manager.status()
        contexts = [
            {
                "model_name": model,
                "lora_name": "",
                "block_size": self._index.block_size,
                "tenant_id": name,
                "prefix_count": sum(status[pod].blocks for pod in group.members if pod in status),
                "hash_profile": {"strategy": "xxh3_64", "hash_seed": str(self._index.hash_seed)},
                "instances": {
                    instance: sorted(rank for member in members for rank in member.ranks)
                    for instance, members in group.instances.items()
                },
                "states": {
                    instance: _worst([self._fleet.state(member.pod) for member in members])
                    for instance, members in group.instances.items()
                },
            }
            for (model, name), group in self._fleet.view().groups.items()
        ]
        return encode({"context_count": len(contexts), "contexts": contexts})

    def services(self) -> bytes:
        rows = [
            {
                "Endpoint": ends.endpoint,
                "ReplayEndpoint": ends.replay_endpoint or "",
                "Type": source.labels.get(TYPE, source.engine or ""),
                "ModelName": source.model,
                "LoraName": source.lora or "",
                "TenantID": source.labels.get(GROUP, DEFAULT),
                "InstanceID": source.labels.get(INSTANCE, name),
                "BlockSize": source.block_size or self._index.block_size,
                "DPRank": rank,
                "CacheGroup": 0,
                "HashProfile": None,
                "State": self._fleet.state(name),
            }
            for name, source in self._fleet.view().sources.items()
            for rank, ends in source.workers().items()
        ]
        return encode({"count": len(rows), "services": rows})

    def register_peer(self, asked: Peer) -> tuple[int, bytes]:
        if asked.url not in self._peers and len(self._peers) >= _MOST_PEERS:
            raise Refused(409, "conflict", f"there are {_MOST_PEERS} peers already", field="url")
        self._peers[asked.url] = None
        return 201, b'{"status":"ok"}'

    def deregister_peer(self, asked: Peer) -> bytes:
        if asked.url not in self._peers:
            raise Refused(404, "unknown", "peer not found", field="url")
        del self._peers[asked.url]
        return b'{"status":"ok"}'

    def peers(self) -> bytes:
        return encode(list(self._peers))

    def ok(self) -> bytes:
        return b'{"status":"ok"}'

    def counts(self) -> tuple[int, int, dict[str, int]]:
        """Models, instances, and listeners by status."""
        view = self._fleet.view()
        listeners = Counter({"pending": 0, "active": 0, "paused": 0, "failed": 0})
        for pod in self._manager.status().values():
            listeners.update(listener_status(worker) for worker in pod.workers.values())
        return len(view.groups), sum(len(group.instances) for group in view.groups.values()), dict(listeners)


def pod_name(instance: str, group: str, rank: int) -> str:
    """Return the pod name of a registered publisher."""
    return instance if group == DEFAULT and not rank else f"{instance}|{group}|{rank}"


def listener_status(worker: Any) -> str:
    """A worker's state in the terms of Dynamo's indexer."""
    if worker.state != "stale":
        return "active"
    return "pending" if worker.connected or not worker.batches else "failed"


def _worst(states: list[str]) -> str:
    return max(states, key=("exact", "degraded", "stale").index, default="stale")


def _tier(medium: str) -> str:
    name = medium.upper()
    return "GPU" if name in ("", "GPU") else "CPU" if name.startswith("CPU") else "DISK"


def _by_tier(found: Any) -> dict[str, int]:
    # Without the engine's name, it is unknown how the engine reads several media, so each medium counts alone.
    tiers: dict[str, int] = {}
    for medium, tokens in (found.tiers or found.media).items():
        tier = _tier(medium)
        tiers[tier] = max(tiers.get(tier, 0), tokens)
    return tiers


def _frequencies(blocks: list[int]) -> msgspec.Raw:
    """Count the ranks that hold each block of a prompt, from the number of blocks that each rank holds, as JSON. The
    array has thousands of numbers that are mostly equal, and creating a number object for each took
    as long as the match."""
    text, upto = [], 0
    for place, each in enumerate(blocks := sorted(blocks)):
        text.append(b"%d," % (len(blocks) - place) * (each - upto))
        upto = each
    return msgspec.Raw(b"[" + b"".join(text)[:-1] + b"]")

"""The requests as structs: they are decoded and checked as these, and the OpenAPI document describes them."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

__all__ = [
    "Empty", "Finished", "History", "Match", "Peer", "Pick", "Prefilled", "Query", "QueryByHash", "Register",
    "Unregister", "WorkersQuery",
]  # fmt: skip

Size = Annotated[int, Meta(ge=1, le=65536)]
Rank = Annotated[int, Meta(ge=0, le=65535)]
# Dynamo's identifiers are u64, Mooncake's are text.
InstanceId = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(min_length=1, max_length=253)]


class Empty(Struct):
    """A body whose content is ignored."""


class _Prompt(Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int] | None = None
    """Token ids. A request has exactly one of tokens, text and messages."""
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    """None means the only model that is served."""
    lora_name: str | None = None
    cache_salt: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    pods: list[str] | None = None
    """The pods to choose from, None for every pod that serves the model."""


class Match(_Prompt, kw_only=True, forbid_unknown_fields=True):
    """How much of a prompt each pod holds."""

    only_exact: bool = False


class Pick(_Prompt, kw_only=True, forbid_unknown_fields=True):
    """Which pod gets a prompt."""

    labels: dict[str, str] | None = None


class Prefilled(Struct, kw_only=True, forbid_unknown_fields=True):
    """A picked request has its first token."""

    id: str


class Finished(Struct, kw_only=True, forbid_unknown_fields=True):
    """A picked request is over."""

    id: str
    cached_tokens: Annotated[int, Meta(ge=0)] | None = None


class History(Struct, kw_only=True, forbid_unknown_fields=True):
    """Figures over time, from a given moment on."""

    since: float = 0.0


# The structs below ignore unknown fields, as the peers' own services do.


class Register(Struct, kw_only=True):
    """A publisher to follow: Mooncake's conductor names the model ``modelname``, Dynamo's indexer ``model_name``."""

    instance_id: InstanceId
    endpoint: str
    block_size: Size
    replay_endpoint: str | None = None
    type: str | None = None
    modelname: str | None = None
    model_name: str | None = None
    lora_name: str | None = None
    tenant_id: str | None = None
    routing_group: str | None = None
    dp_rank: Rank | None = None
    additionalsalt: str | None = None
    additional_salt: str | None = None


class Unregister(Struct, kw_only=True):
    """A publisher to stop following."""

    instance_id: InstanceId
    modelname: str | None = None
    model_name: str | None = None
    tenant_id: str | None = None
    routing_group: str | None = None
    dp_rank: Rank | None = None


class _Asked(Struct, kw_only=True):
    model: str | None = None
    model_name: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    tenant_id: str | None = None
    routing_group: str | None = None
    instance_id: InstanceId | None = None
    block_size: Size | None = None


class Query(_Asked, kw_only=True):
    """A prompt: Mooncake's conductor names the model ``model``, Dynamo's indexer ``model_name``."""

    token_ids: list[int]


class QueryByHash(_Asked, kw_only=True):
    """Hashes of a prompt: rolling ones (Mooncake), or local ones in ``block_hashes`` (Dynamo)."""

    seq_hashes: list[int] | None = None
    block_hash: list[int] | None = None
    block_hashes: list[int] | None = None


class Peer(Struct, kw_only=True):
    """Another service of the fleet."""

    url: Annotated[str, Meta(min_length=1, max_length=2048)]


class WorkersQuery(Struct, kw_only=True):
    """Which workers to list."""

    model_name: str | None = None
    routing_group: str | None = None

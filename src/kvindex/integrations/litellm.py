"""LiteLLM: a filter that keeps the deployments at which a prompt is cached. LiteLLM's own strategy picks among them.

The proxy's configuration has ``litellm_settings: {callbacks: [kvindex.integrations.litellm.handler]}``; in Python, set
``litellm.callbacks = [handler]``. Each deployment's ``model_info`` names its event streams (:class:`KVIndexHandler`).
It needs the extra ``litellm`` (``pip install 'kvindex[litellm]'``).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

try:
    from litellm.integrations.custom_logger import CustomLogger
except ImportError as error:
    raise ImportError(f"kvindex.integrations.litellm needs {error.name}: pip install 'kvindex[litellm]'") from None

from .. import EventManager, InvalidTypeError, KVIndexError, PodSource, PrefixIndex
from ..discovery import Reconciler
from ..text import RemoteEncoder
from ._requests import Encoder, encoder_of, token_ids

__all__ = ["KVIndexHandler", "handler"]

log = logging.getLogger(__name__)

# Requests whose failed attempts are kept. Requests that were never served are dropped at some time.
_MOST_FAILED = 1024


class KVIndexHandler(CustomLogger):
    """Narrows the healthy deployments of a request to those that reuse most of its prompt. Any thread may use it.

    ``model_info`` of a deployment has ``kv_events``: its event streams, as a string of :meth:`PodSource.from_string`
    (``tcp://10.0.0.1:5557,5558,engine=vllm``) or as a map of :class:`PodSource`'s fields. ``tokenizer`` there is a
    directory with ``tokenizer.json`` and ``chat_template.jinja``; without it, ``/tokenize`` of a deployment is called.
    ``lora_name`` is the adapter that the deployment's model is. Deployments of one ``api_base`` are one pod.

    A request is never refused: if its prompt has no token ids, all its deployments stay, and the reason is logged.

    Args:
        block_size: Tokens per block of the index; engines' blocks are multiples of it.
        share: Share of the prompt's tokens, 0 to 1. Deployments that reuse less than the best one by no more than this
            stay too, so that LiteLLM can weigh their load. 0 leaves only the best ones.
        timeout: Seconds that a call of ``/tokenize`` may take.
    """

    def __init__(self, *, block_size: int = 16, share: float = 0.25, timeout: float = 1.0) -> None:
        super().__init__()
        self.index = PrefixIndex(block_size)
        self.manager = EventManager(self.index)
        self._pods = Reconciler(self.manager)
        self._share, self._timeout = share, timeout
        self._told: dict[str, Any] = {}
        self._sources: dict[str, PodSource] = {}
        self._encoders: dict[str, Encoder] = {}
        self._failed: OrderedDict[Any, set[Any]] = OrderedDict()
        self._lock = Lock()
        self._said = ""

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[dict[str, Any]]:
        """LiteLLM's hook, which runs before each attempt of a request. The work is done in a thread, because encoding a
        prompt takes milliseconds."""
        # For a completion, LiteLLM passes the prompt both as such and as messages, which are not a chat.
        body = {"messages": messages, **((request_kwargs or {}).get("extra_body") or {}), **(request_kwargs or {})}
        try:
            return await asyncio.to_thread(self._narrowed, healthy_deployments, body)
        except Exception as error:
            self._say(f"{model}: the deployments stay as they are: {error}")
            return healthy_deployments

    async def async_post_call_failure_deployment_hook(
        self, request_data: Mapping[str, Any], exception: Exception, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        """LiteLLM's hook after each attempt that failed: the request's next attempt goes elsewhere."""
        info = request_data.get("model_info") or (request_data.get("metadata") or {}).get("model_info") or {}
        if not (trace := request_data.get("litellm_trace_id")):
            return
        with self._lock:
            self._failed.setdefault(trace, set()).add(info.get("id"))
            while len(self._failed) > _MOST_FAILED:
                self._failed.popitem(last=False)

    async def async_post_call_success_deployment_hook(
        self, request_data: dict[str, Any], response: Any, call_type: Any
    ) -> None:
        """LiteLLM's hook after an attempt that was served. A session's requests may share a trace."""
        with self._lock:
            self._failed.pop(request_data.get("litellm_trace_id"), None)

    def close(self) -> None:
        """Stops following the deployments."""
        self.manager.close()

    def _narrowed(self, deployments: list[dict[str, Any]], body: Mapping[str, Any]) -> list[dict[str, Any]]:
        self._follow(deployments)
        # A short list would lead a retry to the same server again, in four attempts of four (LiteLLM 1.110, which takes
        # a deployment out only after several failures).
        failed = self._failed.get(body.get("litellm_trace_id"), ())
        deployments = [each for each in deployments if each["model_info"]["id"] not in failed] or deployments
        states = self.index.pods()
        live = [each for each in deployments if states.get(_pod(each), "stale") != "stale"]
        if not live or len(deployments) == 1:
            return deployments
        tokens = token_ids(body, self._encoder(random.choice(live)))
        if tokens is None or not len(tokens):
            return deployments
        match = self.index.match_prefix(
            tokens,
            lora_name=live[0]["model_info"].get("lora_name"),
            cache_salt=body.get("cache_salt"),
            ready_pods=map(_pod, live),
        )
        least = max(match.tokens.values(), default=0) - self._share * len(tokens)
        return [each for each in live if match.tokens.get(_pod(each), 0) >= least] if least > 0 else deployments

    def _follow(self, deployments: Iterable[dict[str, Any]]) -> None:
        with self._lock:
            told = {_pod(each): found for each in deployments if (found := each["model_info"].get("kv_events"))}
            new = {pod: found for pod, found in told.items() if self._told.get(pod) != found}
            self._told |= new
            for pod, found in new.items():
                try:
                    self._sources[pod] = _source(pod, found)
                except KVIndexError as error:
                    log.warning("%s: its kv_events cannot be followed: %s", pod, error)
            if new:
                self._pods.reconcile(self._sources)

    def _encoder(self, deployment: Mapping[str, Any]) -> Encoder:
        directory, params = deployment["model_info"].get("tokenizer"), deployment["litellm_params"]
        where = directory or str(params.get("api_base")).rstrip("/").removesuffix("/v1")
        with self._lock:
            if where not in self._encoders:
                model = str(params["model"]).partition("/")[2]
                key = params.get("api_key")
                headers = {"Authorization": f"Bearer {key}"} if key else None
                remote = (
                    RemoteEncoder(where, model=model, timeout=self._timeout, headers=headers) if not directory else None
                )
                self._encoders[where] = remote or encoder_of(directory)
            return self._encoders[where]

    def _say(self, message: str) -> None:
        if message != self._said:
            log.warning("%s", message)
        self._said = message


def _pod(deployment: Mapping[str, Any]) -> str:
    """Return the pod of a deployment: one server is one pod, even if several deployments use it."""
    return str(deployment["litellm_params"].get("api_base") or deployment["model_info"]["id"])


def _source(pod: str, told: Any) -> PodSource:
    if isinstance(told, str):
        return replace(PodSource.from_string(told), name=pod)
    if isinstance(told, Mapping):
        return PodSource.from_mapping({**told, "name": pod})
    raise InvalidTypeError(f"kv_events is {told!r:.80}; it must be tcp://HOST:PORT[,REPLAY], or a map of its fields")


handler = KVIndexHandler()
"""The handler that LiteLLM's configuration names."""
atexit.register(handler.close)

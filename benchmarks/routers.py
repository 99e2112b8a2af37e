"""Cached tokens of those possible, in the routers of others: kvindex beside their own policies.

Conversations take turns at three simulated pods. "Possible" are the tokens that one endless cache would reuse. The
workloads are in ``WORKLOADS``. "History alone" is :class:`EndpointPicker` without events: it expects each prompt at the
pod that it was sent to before. A router whose package is not installed is left out, with a message.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.routing import EndpointPicker
from kvindex.sim import SimProcess
from kvindex.sim.tokenizer import chat_ids, save, text_ids

from .report import say, table

ROOT = Path(__file__).resolve().parents[1]
# The helpers for gateways and replicas of these routers' tests.
sys.path.insert(0, str(ROOT / "tests" / "integrations"))
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10"}

CONVERSATIONS, TURNS = 40, 6
#: Seconds between requests, and the TTL of speculative entries. The default TTL is two seconds, in which a cache is
#: overwritten here.
PAUSE, SPECULATIVE = 0.03, 0.02
ANSWER = "an answer of some length. " * 4
FITS = (4000, 4000, 4000)
#: Blocks of each pod, the number of routers that share the requests at random, and the turn before which they restart.
WORKLOADS: dict[str, tuple[tuple[int, ...], int, int | None]] = {
    "all fits": (FITS, 1, None),
    "evictions": ((400, 400, 400), 1, None),
    "restart": (FITS, 1, TURNS // 2),
    "two routers": (FITS, 2, None),
}

#: A call with messages, which returns the answer and its cached tokens.
Ask = Callable[[list[dict[str, Any]]], tuple[str, int]]
#: A start of a router before these pods, with a model's directory. A second call starts the router again.
Started = Callable[[dict[str, SimProcess], Path], Any]


def run(started: Started, sizes: tuple[int, ...], routers: int, restart: int | None, model: Path) -> tuple[int, int]:
    """Cached tokens, and those possible. Each round has one request of each conversation, in a seeded order."""
    rng = random.Random(7)
    chats = [[{"role": "user", "content": f"{number}: " + "a beginning. " * 20}] for number in range(CONVERSATIONS)]
    cached = possible = 0
    with ExitStack() as stack:
        pods = {
            name: stack.enter_context(SimProcess(name=name, http=0, blocks=blocks))
            for name, blocks in zip("abc", sizes, strict=True)
        }
        endless = stack.enter_context(SimProcess(name="endless", blocks=40_000))
        running = stack.enter_context(ExitStack())
        asks: list[Ask] = [running.enter_context(started(pods, model)) for _ in range(routers)]
        for turn in range(TURNS):
            if turn == restart:
                running.close()
                asks = [running.enter_context(started(pods, model)) for _ in range(routers)]
            for messages in rng.sample(chats, len(chats)):
                text, hit = rng.choice(asks)(messages)
                # An hour's evictions happen in seconds here, so events are in flight for a larger share of the time.
                time.sleep(PAUSE)
                cached += hit
                possible += endless.serve(chat_ids(messages), text_ids(text))["hit"]
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then? " * 8}]
    return cached, possible


def at(pod: SimProcess, messages: Any) -> tuple[str, int]:
    return ANSWER, int(pod.serve(chat_ids(messages), text_ids(ANSWER))["hit"])


@contextmanager
def history(pods: dict[str, SimProcess], _: Path) -> Iterator[Ask]:
    index = PrefixIndex(block_size=16)
    for name in pods:
        index.mark_worker(name, 0, "exact")
    picker = EndpointPicker(index, speculative_ttl=86400, seed=1)

    def ask(messages: Any) -> tuple[str, int]:
        choice = picker.pick(chat_ids(messages), pods=pods)
        assert choice is not None
        text, hit = at(pods[choice.pod], messages)
        picker.finished(choice)
        whole = chat_ids([*messages, {"role": "assistant", "content": text}], False)
        index.add_prefix(choice.pod, whole, ttl=86400)
        return text, hit

    yield ask


@contextmanager
def events(pods: dict[str, SimProcess], _: Path) -> Iterator[Ask]:
    index = PrefixIndex(block_size=16)
    with EventManager(index) as manager:
        for name, pod in pods.items():
            manager.add_pod(PodSource.from_vllm(pod.url or "", name=name))
        manager.wait_until_exact(20.0)
        picker = EndpointPicker(index, manager, seed=1, speculative_ttl=SPECULATIVE)

        def ask(messages: Any) -> tuple[str, int]:
            choice = picker.pick(chat_ids(messages), model="sim")
            assert choice is not None
            text, hit = at(pods[choice.pod], messages)
            picker.finished(choice, hit)
            return text, hit

        yield ask


@functools.cache
def _loop() -> asyncio.Runner:
    return asyncio.Runner()


def litellm(policy: str) -> Started:
    @contextmanager
    def started(pods: dict[str, SimProcess], model: Path) -> Iterator[Ask]:
        import litellm as package

        from kvindex.integrations.litellm import KVIndexHandler

        package.callbacks = [handler := KVIndexHandler()] if policy == "kvindex" else []
        deployments = [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/sim", "api_base": f"{pod.url}/v1", "api_key": "none"},
                "model_info": {
                    "id": name,
                    "kv_events": ",".join([*pod.ranks[0], "engine=vllm"]),
                    "tokenizer": str(model),
                },  # type: ignore[list-item]
            }
            for name, pod in pods.items()
        ]  # fmt: skip
        options = {} if policy == "kvindex" else {"routing_strategy": policy}
        router = package.Router(model_list=deployments, num_retries=0, **options)
        # One event loop for all routers, because LiteLLM shares its clients between them.
        loop = _loop()
        if policy == "kvindex":
            loop.run(handler.async_filter_deployments("m", deployments, None))
            handler.manager.wait_until_exact(20.0)

        # The list of callbacks belongs to the process, but each router here stands for a process of its own.
        own = list(package.callbacks)

        def ask(messages: Any) -> tuple[str, int]:
            package.callbacks[:] = own
            answer = loop.run(router.acompletion(model="m", messages=messages, max_tokens=len(ANSWER)))
            return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens

        yield ask
        if policy == "kvindex":
            handler.close()
        package.callbacks = []

    return started


def ray_serve(policy: str) -> Started:
    @contextmanager
    def started(pods: dict[str, SimProcess], model: Path) -> Iterator[Ask]:
        from ray.serve._private.common import DeploymentHandleSource
        from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
        from replicas import DEPLOYMENT, asked, replica_set

        from kvindex.integrations.ray import PrefixRequestRouter

        kind, options = PowerOfTwoChoicesRequestRouter, {}
        if policy == "kvindex":
            kind, options = PrefixRequestRouter, {"tokenizer": str(model), "speculative_ttl": SPECULATIVE}
        count = 0
        with asyncio.Runner() as loop:

            async def up() -> Any:
                made = kind(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
                made.initialize_state(**(options))
                made.update_replicas(replica_set(pods))
                return made

            router = loop.run(up())
            if policy == "kvindex":
                router.manager.wait_until_exact(20.0)

            async def one(messages: Any) -> tuple[str, int]:
                nonlocal count
                request = asked({"messages": messages}, count := count + 1)
                replica = await router._choose_replica_for_request(request)
                found = at(pods[replica.replica_id.unique_id], messages)
                router.on_request_completed(replica.replica_id, f"i{count}")
                return found

            yield lambda messages: loop.run(one(messages))
            if policy == "kvindex":
                router.manager.close()

    return started


def envoy(policy: str) -> Started:
    @contextmanager
    def started(pods: dict[str, SimProcess], model: Path) -> Iterator[Ask]:
        from gateway import chat, gateway

        with gateway(pods, model, picker=policy == "kvindex", speculative_ttl=SPECULATIVE) as url:
            yield lambda messages: chat(url, messages, max_tokens=len(ANSWER))

    return started


ROUTERS: dict[tuple[str, str], Started] = {
    ("no router", "EndpointPicker"): events,
    ("no router", "history alone"): history,
    ("LiteLLM", "kvindex"): litellm("kvindex"),
    ("LiteLLM", "simple-shuffle, its default"): litellm("simple-shuffle"),
    ("Ray Serve", "kvindex"): ray_serve("kvindex"),
    ("Ray Serve", "power of two choices, its default"): ray_serve("power of two"),
    ("Envoy", "kvindex"): envoy("kvindex"),
    ("Envoy", "round robin"): envoy("round robin"),
}


def measure(*, only: str = "", out: str = "") -> Iterator[str]:
    """``only``: routers whose name contains this; ``out``: write the table into this page, between its marks."""
    warnings.simplefilter("ignore")  # those of the routers' packages
    model = ROOT / ".build" / "sim-model"
    save(model)
    rows = []
    for (router, policy), started in ROUTERS.items():
        if only not in router:
            continue
        cells = []
        for name, workload in WORKLOADS.items():
            try:
                cached, possible = run(started, *workload, model)
            except ImportError as error:
                say(f"{router}: left out: {error}")
                break
            say(f"{router}, {policy}, {name}: {cached:,} of {possible:,}")
            cells.append(f"{cached:,} ({cached / possible:.0%})")
        else:
            rows.append([router, policy, *cells])
    text = table(["router", "policy", *WORKLOADS], rows)
    yield f"possible: {possible:,}\n\n{text}"
    if out:
        page = Path(out).read_text()
        begin, end = "<!-- table -->\n", "<!-- /table -->"
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        Path(out).write_text(f"{head}{begin}\n{text}\n{end}{tail}")

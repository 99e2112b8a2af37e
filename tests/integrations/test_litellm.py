"""The filter in LiteLLM's own Router, with pods that report the cached tokens of each prompt."""

from __future__ import annotations

import asyncio
import http.server
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed: make test-integrations")

from talks import caught_up

from kvindex.integrations.litellm import KVIndexHandler
from kvindex.sim.tokenizer import chat_ids, save, text_ids

# LiteLLM's own warnings are ignored, but an unclosed manager is still an error.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:unclosed EventManager")]

LONG = [{"role": "user", "content": "a prompt of some length " * 10}]


@pytest.fixture
def handler() -> Iterator[KVIndexHandler]:
    made = KVIndexHandler()
    litellm.callbacks = [made]
    yield made
    litellm.callbacks = []
    made.close()


def deployment(pod: Any, **more: Any) -> dict[str, Any]:
    endpoint, replay = pod.ranks[0]
    params = {"model": "openai/sim", "api_base": f"{pod.url}/v1", "api_key": "none", "max_retries": 0}
    told = {"id": pod.config.name, "kv_events": f"{endpoint},{replay},engine=vllm"}
    return {
        "model_name": "llama",
        "litellm_params": {**params, **more.pop("params", {})},
        "model_info": {**told, **more},
    }


def router(deployments: Any, **options: Any) -> Any:
    return litellm.Router(model_list=list(deployments), **{"num_retries": 0, "retry_after": 0, **options})


def follow(handler: KVIndexHandler, deployments: Any) -> None:
    """Do the same as the first request, and wait for it to finish."""
    asyncio.run(handler.async_filter_deployments("llama", list(deployments), None))
    assert handler.manager.wait_until_exact(20.0) == {}


def applied(handler: KVIndexHandler, pods: Any) -> None:
    caught_up(handler.manager, {f"{pod.url}/v1": pod for pod in pods.values()})


def ids(deployments: Any) -> list[str]:
    return [each["model_info"]["id"] for each in deployments]


@pytest.mark.parametrize("local", [True, False], ids=["its tokenizer", "the engine's /tokenize"])
def test_every_turn_finds_all_that_is_cached(pods, talks, handler, tmp_path, local) -> None:
    save(tmp_path)
    deployments = [deployment(pod, **({"tokenizer": str(tmp_path)} if local else {})) for pod in pods.values()]
    follow(handler, deployments)
    routed, made = router(deployments), talks()
    served: dict[int, set[str]] = {}

    async def talk() -> None:
        for _ in range(3):
            for number, chat in enumerate(made.chats):
                answer = await routed.acompletion(model="llama", messages=chat, max_tokens=16)
                served.setdefault(number, set()).add(answer._hidden_params["model_id"])
                usage = answer.usage.prompt_tokens_details
                made.heard(chat, answer.choices[0].message.content, usage.cached_tokens)
                await asyncio.to_thread(applied, handler, pods)

    asyncio.run(talk())
    assert made.cached == made.possible > 2000
    assert {len(each) for each in served.values()} == {1}


def test_litellm_decides_among_those_that_reuse_about_as_much(pods, handler) -> None:
    deployments = [deployment(pod) for pod in pods.values()]
    follow(handler, deployments)
    tokens = chat_ids(LONG)
    pods["a"].serve(tokens)
    pods["b"].serve(tokens[: 7 * len(tokens) // 8])
    pods["c"].serve(tokens[: len(tokens) // 2])
    applied(handler, pods)
    routed = router(deployments, routing_strategy="simple-shuffle")
    kept = asyncio.run(handler.async_filter_deployments("llama", deployments, LONG, {"messages": LONG}))
    assert ids(kept) == ["a", "b"]

    async def ask() -> Counter[str]:
        answers = [await routed.acompletion(model="llama", messages=LONG, max_tokens=1) for _ in range(24)]
        return Counter(each._hidden_params["model_id"] for each in answers)

    # The chance that all requests go to one of them is 1 in 2^23.
    assert set(asyncio.run(ask())) == {"a", "b"}


def test_a_new_prompt_is_wholly_left_to_litellm(pods, handler) -> None:
    deployments = [deployment(pod) for pod in pods.values()]
    follow(handler, deployments)
    pods["a"].serve(chat_ids(LONG)[:32])  # a system prompt, a seventh of it
    applied(handler, pods)
    assert asyncio.run(handler.async_filter_deployments("llama", deployments, LONG, {"messages": LONG})) == deployments


def test_prompts_salts_and_adapters_are_those_of_the_request(pods, handler) -> None:
    plain = [deployment(pod) for pod in pods.values()]
    tuned = [deployment(pod, lora_name="adapter-1") for pod in pods.values()]
    follow(handler, plain)
    text, tokens = "a completion of some length " * 9, list(range(200))
    pods["a"].serve(text_ids(text))
    pods["b"].serve(tokens, cache_salt="mine")
    pods["c"].serve(tokens, lora_name="adapter-1", lora_id=1)
    applied(handler, pods)

    def kept(deployments: Any, **asked: Any) -> list[str]:
        return ids(asyncio.run(handler.async_filter_deployments("llama", deployments, None, asked)))

    assert kept(plain, prompt=text) == ["a"]
    assert kept(plain, prompt=tokens) == ["a", "b", "c"]
    assert kept(plain, prompt=tokens, cache_salt="mine") == ["b"]
    assert kept(plain, prompt=tokens, extra_body={"cache_salt": "mine"}) == ["b"]
    assert kept(tuned, prompt=tokens) == ["c"]
    assert kept(plain, prompt=["two", "prompts"]) == ["a", "b", "c"]
    assert kept(plain, input="an embedding") == ["a", "b", "c"]


def test_a_server_that_fails_is_not_asked_again(pods, handler, tmp_path) -> None:
    """The server publishes events and holds the prompt, but answers 500.

    Without the handler's count of failures, each retry would go to it.
    """

    class Fails(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_POST(self) -> None:
            Fails.asked += 1
            self.send_error(500)

        def log_message(self, *_: Any) -> None: ...

    failing = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fails)
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    try:
        save(tmp_path)
        wrong = {"api_base": f"http://127.0.0.1:{failing.server_port}/v1"}
        deployments = [
            deployment(pods["a"], tokenizer=str(tmp_path), params=wrong),
            deployment(pods["b"], tokenizer=str(tmp_path)),
        ]
        follow(handler, deployments)
        pods["a"].serve(chat_ids(LONG))
        caught_up(handler.manager, {wrong["api_base"]: pods["a"]})
        routed = router(deployments, num_retries=1)
        metadata: dict[str, Any] = {"user": "LiteLLM writes into this"}

        async def ask() -> str:
            answer = await routed.acompletion(model="llama", messages=LONG, metadata=metadata, max_tokens=1)
            return str(answer._hidden_params["model_id"])

        assert [asyncio.run(ask()) for _ in range(2)] == ["b", "b"]
        assert Fails.asked >= 1
        assert not handler._failed
    finally:
        failing.shutdown()
        failing.server_close()


def test_a_pod_that_dies_costs_no_request(pods, talks, handler) -> None:
    deployments = [deployment(pod) for pod in pods.values()]
    follow(handler, deployments)
    routed, made = router(deployments, num_retries=3), talks(count=3)

    async def turn() -> list[str]:
        answers = [await routed.acompletion(model="llama", messages=chat, max_tokens=4) for chat in made.chats]
        return [each._hidden_params["model_id"] for each in answers]

    victim = asyncio.run(turn())[0]
    applied(handler, pods)
    pods[victim].kill()
    assert victim not in asyncio.run(turn())
    pods[victim].launch()
    assert handler.manager.wait_until_exact(20.0) == {}
    pods[victim].serve(chat_ids(LONG))
    applied(handler, pods)
    kept = asyncio.run(handler.async_filter_deployments("llama", deployments, LONG, {"messages": LONG}))
    assert ids(kept) == [victim]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (7, "kv_events is 7; it must be tcp://HOST:PORT"),
        ("10.0.0.1:5557", r"'10\.0\.0\.1:5557'.*\[NAME=\]ENDPOINT"),
        ({"endpont": "tcp://10.0.0.1:5557"}, "unknown fields endpont"),
    ],
)
def test_what_is_wrong_with_a_deployment_is_said_and_costs_no_request(handler, caplog, told, said) -> None:
    params = {"model": "openai/sim", "api_base": "http://10.0.0.1:8000/v1"}
    deployments = [
        {"model_name": "llama", "litellm_params": params, "model_info": {"id": name, "kv_events": told}}
        for name in "ab"
    ]
    for _ in range(2):
        assert asyncio.run(handler.async_filter_deployments("llama", deployments, LONG)) == deployments
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert re.search(said, record.getMessage())


def test_no_tokenizer_is_said_once(pods, handler, caplog, tmp_path) -> None:
    deployments = [deployment(pod, tokenizer=str(tmp_path / "none")) for pod in pods.values()]
    follow(handler, deployments)
    for _ in range(2):
        kept = asyncio.run(handler.async_filter_deployments("llama", deployments, LONG, {"messages": LONG}))
        assert kept == deployments
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "tokenizer.json is no tokenizer" in record.getMessage()


def test_the_configuration_of_the_proxy_names_the_handler() -> None:
    from litellm.proxy.types_utils.utils import get_instance_fn

    from kvindex.integrations.litellm import handler

    assert get_instance_fn("kvindex.integrations.litellm.handler") is handler

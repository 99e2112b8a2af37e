"""The launcher for production-stack, tested against the interface of its routing_logic.py at commit 008a23b.

No package index has production-stack, so its own router does not run here. Stand-ins replace three of its classes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from talks import caught_up

from kvindex.sim.tokenizer import chat_ids, text_ids

LAUNCHER = Path(__file__).resolve().parents[2] / "examples" / "production_stack.py"


class PrefixAwareRouter:
    def __init__(self) -> None:
        self._initialized = True

    def _qps_routing(self, endpoints: Any, request_stats: Any) -> str:
        return f"by load of {len(endpoints)}"


@pytest.fixture
def logic(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = ModuleType("vllm_router.routers.routing_logic")
    made.PrefixAwareRouter = PrefixAwareRouter  # type: ignore[attr-defined]
    routers = ModuleType("vllm_router.routers")
    routers.routing_logic = made  # type: ignore[attr-defined]
    for module in (ModuleType("vllm_router"), routers, made):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("production_stack", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return made


def test_every_turn_finds_all_that_is_cached(pods, talks, logic) -> None:
    router, talk = logic.PrefixAwareRouter(), talks()
    assert isinstance(router, PrefixAwareRouter)
    endpoints = [SimpleNamespace(url=pod.url, model_names=["sim"]) for pod in pods.values()]
    named = {pod.url: pod for pod in pods.values()}

    def ask(body: Any, among: Any = endpoints) -> Any:
        return asyncio.run(router.route_request(among, {}, {}, None, {"model": "sim", **body}))

    # The first request makes the router follow the pods.
    ask({"messages": talk.chats[0]})
    caught_up(router.manager, named)
    for _ in range(3):
        for chat in talk.chats:
            pod = named[ask({"messages": chat})]
            talk.heard(chat, "an answer", pod.serve(chat_ids(chat), text_ids("an answer"))["hit"])
            caught_up(router.manager, named)
    assert talk.cached == talk.possible > 2000
    ids = list(range(100))
    pods["b"].serve(ids)
    caught_up(router.manager, named)
    assert ask({"prompt": ids}) == pods["b"].url
    assert ask({"messages": [{"role": "nobody", "content": "x"}]}) == "by load of 3"
    assert ask({"prompt": ids}, [SimpleNamespace(url="http://127.0.0.1:9")]) == "by load of 1"
    router.manager.close()

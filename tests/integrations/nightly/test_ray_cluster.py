"""A real Ray Serve application on this machine: three replicas with an engine each, one of which is killed."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    pytest.importorskip("ray.serve", reason="Ray is not installed: make test-integrations-nightly")
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

from kvindex import PodSource
from kvindex.integrations.ray import KVEvents, PrefixRequestRouter
from kvindex.sim import SimProcess
from kvindex.sim.tokenizer import chat_ids, text_ids

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).resolve()
ANSWER = "an answer of some length"


class Engine(KVEvents):
    """A replica with a simulated engine in a process that ends with the replica."""

    def __init__(self) -> None:
        self.pod = SimProcess(name=f"engine-{os.getpid()}", http=0, blocks=2000)
        self.kv_events = PodSource.from_vllm(self.pod.url, name="here")

    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        if "messages" not in body:
            return {}
        found = self.pod.serve(chat_ids(body["messages"]), text_ids(ANSWER))
        return {"text": ANSWER, "cached": found["hit"], "pid": os.getpid()}

    async def die(self) -> None:
        os._exit(1)


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from kvindex.sim.tokenizer import save

    save(tmp_path / "model")
    root = HERE.parents[3]
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a token there
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{HERE.parent}")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=int(1e8), log_to_driver=False)
    try:
        made = serve.deployment(
            num_replicas=3,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=0.5,
            request_router_config=RequestRouterConfig(
                request_router_class=PrefixRequestRouter,
                request_router_kwargs={"tokenizer": str(tmp_path / "model")},
                request_routing_stats_period_s=0.5,
            ),
        )(Engine)
        yield serve.run(made.bind(), route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


def router_of(handle: Any) -> PrefixRequestRouter:
    found = handle._router._asyncio_router._request_router
    assert isinstance(found, PrefixRequestRouter)
    return found


def until(done: Callable[[], bool], router: PrefixRequestRouter) -> None:
    end = time.monotonic() + 90.0
    while not done():
        assert time.monotonic() < end, (router.index.pods(), router.picker.stats())
        time.sleep(0.1)


def until_exact(handle: Any) -> PrefixRequestRouter:
    """Wait until three replicas are followed and current."""
    handle.remote({"input": "a first request, which makes the router"}).result(timeout_s=60)
    router = router_of(handle)
    until(lambda: list(router.index.pods().values()) == ["exact"] * 3, router)
    return router


def test_conversations_stay_and_a_killed_replicas_successor_is_followed(application, talks) -> None:
    handle, talk = application, talks(count=6)
    router = until_exact(handle)
    served: dict[int, set[int]] = {}

    def turn() -> None:
        for number, chat in enumerate(talk.chats):
            answer = handle.remote({"messages": chat}).result(timeout_s=60)
            served.setdefault(number, set()).add(answer["pid"])
            talk.heard(chat, answer["text"], answer["cached"])
            # Ray reports the end of a request after its result. Until then, the request counts as load of its replica.
            until(lambda: router.picker.stats()["in_flight"] == 0, router)
            assert router.manager.wait_until_exact(10.0) == {}

    for _ in range(3):
        turn()
    assert talk.cached == talk.possible > 2000
    assert {len(each) for each in served.values()} == {1}
    assert len({pid for each in served.values() for pid in each}) == 3
    before, pids = frozenset(router.index.pods()), {pid for each in served.values() for pid in each}
    with pytest.raises(ray.exceptions.RayError):
        handle.die.remote().result(timeout_s=60)
    until(lambda: len(frozenset(router.index.pods()) - before) == 1 and len(router.index.pods()) == 3, router)
    until_exact(handle)
    served.clear()
    turn()
    turn()
    # The dead replica's conversations have moved, and every conversation stays with its replica.
    assert {len(each) for each in served.values()} == {1}
    assert len(pids & {pid for each in served.values() for pid in each}) == 2

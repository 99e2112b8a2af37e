"""Ray Serve's own routers without a cluster: stand-ins for replicas, and pods in processes."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    pytest.importorskip("ray.serve", reason="Ray is not installed: make test-integrations")

from ray.serve._private.common import DeploymentHandleSource
from ray.serve.request_router import ReplicaID
from replicas import DEPLOYMENT, Replica, asked, replica_set
from talks import caught_up

from kvindex import InvalidValueError, PodSource
from kvindex.integrations.ray import PrefixRequestRouter, routing_stats, vllm_source
from kvindex.routing import Choice
from kvindex.sim.tokenizer import chat_ids, save, text_ids

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:unclosed EventManager")]

LONG = [{"role": "user", "content": "a prompt of some length " * 10}]

ANSWER = "an answer of some length"


def made(kind: type = PrefixRequestRouter, **options: Any) -> Any:
    router = kind(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state(**options)
    return router


def named(pods: Any) -> dict[str, Any]:
    return {ReplicaID(unique_id=name, deployment_id=DEPLOYMENT).to_full_id_str(): pod for name, pod in pods.items()}


def test_every_turn_finds_all_that_is_cached(pods, talks, tmp_path) -> None:
    save(tmp_path)
    talk, served = talks(), {}

    async def main() -> None:
        router = made(tokenizer=str(tmp_path))
        router.update_replicas(replica_set(pods))
        caught_up(router.manager, named(pods))
        number = 0
        for _ in range(3):
            for each, chat in enumerate(talk.chats):
                request = asked({"messages": chat}, number := number + 1)
                replica = await router._choose_replica_for_request(request)
                pod = pods[replica.replica_id.unique_id]
                router.on_request_routed(request, replica.replica_id, None)
                served.setdefault(each, set()).add(pod.config.name)
                hit = pod.serve(chat_ids(chat), text_ids(ANSWER))["hit"]
                talk.heard(chat, ANSWER, hit)
                router.on_request_completed(replica.replica_id, f"i{number}")
                caught_up(router.manager, named(pods))
        assert router.picker.stats()["in_flight"] == 0
        router.manager.close()

    asyncio.run(main())
    assert talk.cached == talk.possible > 2000
    assert {len(each) for each in served.values()} == {1}
    # Caches alone do not require a spread, but the conversations are spread all the same.
    assert min(Counter(name for each in served.values() for name in each).values()) >= 2


def test_a_full_replica_is_passed_over(pods) -> None:
    tokens = chat_ids(LONG)
    pods["b"].serve(tokens)

    async def main() -> None:
        router = made()
        replicas = replica_set(pods)
        router.update_replicas(replicas)
        caught_up(router.manager, named(pods))
        first = await router._choose_replica_for_request(asked(tokens, 1))
        assert first.replica_id.unique_id == "b"
        assert router.picker.stats()["in_flight"] == 1
        replicas[1].running = Replica.max_ongoing_requests
        request = asked(tokens, 2)
        second = await router._choose_replica_for_request(request)
        assert second.replica_id.unique_id in "ac"
        router.on_request_routed(request, second.replica_id, None)
        assert router.picker.stats()["in_flight"] == 1
        router.on_request_completed(first.replica_id, "i1")
        assert router.picker.stats()["in_flight"] == 0
        router.manager.close()

    asyncio.run(main())


def test_requests_of_which_no_end_is_reported_are_not_kept(pods) -> None:
    pods["b"].serve(chat_ids(LONG))

    async def main() -> None:
        router = made(max_in_flight=2)
        router.update_replicas(replica_set(pods))
        caught_up(router.manager, named(pods))
        for number in range(1, 6):
            await router._choose_replica_for_request(asked(chat_ids(LONG), number))
        gc.collect()
        assert sum(isinstance(each, Choice) for each in gc.get_objects()) == 2
        for number in range(1, 6):
            router.on_request_completed(router.curr_replicas[next(iter(router.curr_replicas))].replica_id, f"i{number}")
        stats = router.picker.stats()
        assert (stats["in_flight"], stats["expired"], stats["late"]) == (0, 3, 0)
        router.manager.close()

    asyncio.run(main())


def test_whatever_has_no_tokens_goes_anywhere_and_nobody_is_followed_for_ever(pods) -> None:
    async def main() -> None:
        router = made()
        replicas = [*replica_set(pods), Replica("silent", {})]
        router.update_replicas(replicas)
        assert set(router.manager.pods()) == set(named(pods))
        for nothing in ("a text without a tokenizer", {"input": "an embedding"}, None, []):
            assert await router.choose_replicas(replicas, asked(nothing)) == [replicas]
        assert await router.choose_replicas(replicas, None) == [replicas]
        caught_up(router.manager, named(pods))
        ranks = await router.choose_replicas(replicas, asked(list(range(64))))
        assert [len(each) for each in ranks] == [1, 3]
        # A replica died, and its successor has the same place.
        pods["a"].serve(chat_ids(LONG))
        successor = [Replica("new", replicas[0].routing_stats), *replicas[1:]]
        router.update_replicas(successor)
        caught_up(router.manager, named({"new": pods["a"]}))
        ranks = await router.choose_replicas(successor, asked(chat_ids(LONG)))
        assert ranks[0] == [successor[0]]
        router.update_replicas([])
        assert router.manager.pods() == {}
        router.manager.close()

    asyncio.run(main())


def test_stale_replicas_are_left_to_ray(pods) -> None:
    async def main() -> None:
        router = made()
        dead = [Replica(name, routing_stats(PodSource(name, endpoint=f"tcp://127.0.0.1:{port}"))) for name, port in
                (("a", 9), ("b", 10))]  # fmt: skip
        router.update_replicas(dead)
        assert await router.choose_replicas(dead, asked(list(range(64)))) == [dead]
        router.manager.close()

    asyncio.run(main())


class Config:
    """The attribute names of vLLM 0.33's VllmConfig, which is not installed here."""

    kv_events_config = SimpleNamespace(
        enable_kv_cache_events=True, publisher="zmq", endpoint="tcp://*:5557", replay_endpoint="tcp://*:6557"
    )
    cache_config = SimpleNamespace(block_size=32)
    parallel_config = SimpleNamespace(data_parallel_rank=2)


def test_an_engine_in_the_replica_is_announced_in_rays_own_shape() -> None:
    source = vllm_source(Config, host="10.0.0.7")
    (told,) = routing_stats(source).values()
    assert told == {
        "endpoint": "tcp://10.0.0.7:5559", "replay_endpoint": "tcp://10.0.0.7:6559", "dp_rank": 2, "block_size": 32,
        "engine": "vllm",
    }  # fmt: skip
    silent = SimpleNamespace(kv_events_config=None, parallel_config=Config.parallel_config)
    with pytest.raises(InvalidValueError, match="publishes no KV events"):
        vllm_source(silent, host="10.0.0.7")
    with pytest.raises(InvalidValueError, match="has 2 ranks; a replica announces one"):
        routing_stats(PodSource("a", endpoint="tcp://10.0.0.7:5557", dp_size=2))


# ---- Ray Serve LLM ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return Ray's own KVTokenTracker without a controller and without ai-dynamo."""
    from ray.llm._internal.serve.routing_policies.kv_aware import kv_token_tracker as module

    monkeypatch.setitem(sys.modules, "dynamo.llm", None)
    monkeypatch.setattr(module.KVTokenTracker, "_start_replica_tracking", lambda self: None)
    monkeypatch.setattr(module, "_KV_TOKEN_TRACKER", None)

    def make() -> Any:
        found = module.KVTokenTracker(serve_deployment_id=DEPLOYMENT, ingress_replica_rank=0)
        module.set_kv_token_tracker(found)
        return found

    return make


def llm_replicas(pods: Any) -> list[Replica]:
    found = replica_set(pods)
    for each in found:
        each.routing_stats["kv_event_metadata"]["max_num_batched_tokens"] = 8192
        each.routing_stats["kv_event_metadata"]["block_size"] = 16
    return found


def test_ray_serve_llm_routes_by_kvindex(pods, talks, tracker) -> None:
    from ray.llm._internal.serve.routing_policies.kv_aware.constants import REQUEST_TOKEN_IDS_KWARG

    from kvindex.integrations.ray import KVIndexKVAwareRouter

    talk = talks()

    async def main() -> None:
        kept, replicas = tracker(), llm_replicas(pods)
        # The controller may notify the tracker of replicas before the router exists.
        kept._on_deployment_targets(SimpleNamespace(running_replicas=replicas))
        router = made(KVIndexKVAwareRouter)
        router.update_replicas(replicas)
        while len(kept._svc.manager.pods()) < 3:
            await asyncio.sleep(0)
        workers = {str(worker): full for worker, full in kept._replica_id_by_worker.items()}
        followed = {worker: named(pods)[full] for worker, full in workers.items()}
        caught_up(kept._svc.manager, followed)
        number = 0
        for _ in range(3):
            for chat in talk.chats:
                ids = chat_ids(chat)
                request = asked({}, number := number + 1, **{REQUEST_TOKEN_IDS_KWARG: ids})
                [[replica]] = await router.choose_replicas(replicas, request)
                pod = pods[replica.replica_id.unique_id]
                await kept.on_prefill_complete(f"r{number}")
                await kept.on_decode_progress(f"r{number}", 40)
                talk.heard(chat, ANSWER, pod.serve(ids, text_ids(ANSWER))["hit"])
                await kept.on_request_completed(f"r{number}")
                caught_up(kept._svc.manager, followed)
        stats = kept._svc.picker.stats()
        assert (stats["in_flight"], stats["picks"]) == (0, 24)
        router.update_replicas(replicas[:1])
        while len(kept._svc.manager.pods()) > 1:
            await asyncio.sleep(0)
        assert made(KVIndexKVAwareRouter)._kv_token_tracker._svc is kept._svc
        kept._svc.shutdown()

    asyncio.run(main())
    assert talk.cached == talk.possible > 2000


def test_where_no_replica_is_current_one_is_chosen_all_the_same(tracker) -> None:
    from kvindex.integrations.ray import KVIndexKVAwareRouter

    async def main() -> None:
        kept = tracker()
        made(KVIndexKVAwareRouter)
        kept._block_size = 16
        found = await kept.select_worker("r", list(range(64)), [7, 8])
        assert found["worker_id"] in (7, 8)
        assert (found["overlap_tokens"], found["effective_prefill_tokens"]) == (0, 64)
        kept._svc.shutdown()

    asyncio.run(main())


def test_another_release_of_ray_is_refused_at_the_import(monkeypatch) -> None:
    from ray.llm._internal.serve.routing_policies.kv_aware.kv_token_tracker import KVTokenTracker

    def __init__(self: Any) -> None:
        self._workers = {}

    monkeypatch.setattr(KVTokenTracker, "__init__", __init__)
    monkeypatch.delitem(sys.modules, "kvindex.integrations._ray_llm", raising=False)
    with pytest.raises(ImportError, match=r"has no _replica_id_by_worker.*it was tested with Ray 2\.60"):
        importlib.import_module("kvindex.integrations._ray_llm")


def test_without_a_tracker_ray_serve_llm_balances_load(monkeypatch) -> None:
    from ray.llm._internal.serve.routing_policies.kv_aware import kv_token_tracker as module

    from kvindex.integrations.ray import KVIndexKVAwareRouter

    monkeypatch.setattr(module, "_KV_TOKEN_TRACKER", None)

    async def main() -> None:
        router, replicas = made(KVIndexKVAwareRouter), [Replica("a", {}), Replica("b", {})]
        router.update_replicas(replicas)
        [[found]] = await router.choose_replicas(replicas, asked({}))
        assert found in replicas

    asyncio.run(main())

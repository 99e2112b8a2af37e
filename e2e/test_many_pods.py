"""A thousand pods and one router: all are followed, and when half of them die at once, the others stay exact."""

from __future__ import annotations

from collections import Counter

from benchmarks.publishers import Publishers, batches

from kvindex import BlockStored, EventManager, PrefixIndex, decode_batch

from .fleet import until

PODS, HISTORY = 1000, 3
LONG = 120.0


def prompts(pod: int) -> list[object]:
    """The tokens of the chains that a pod has published."""
    events = [event for payload in batches(pod, HISTORY) for event in decode_batch(payload).events]
    return [event.token_ids for event in events if isinstance(event, BlockStored)]


def test_a_thousand_pods_are_exact_and_half_of_them_die():
    index = PrefixIndex(block_size=16)
    changes: Counter[tuple[str, str]] = Counter()
    with Publishers(PODS, HISTORY) as fleet, EventManager(index) as manager:
        for source in fleet.sources():
            manager.add_pod(source)
        assert manager.wait_until_current(LONG)
        assert Counter(pod.state for pod in manager.status().values()) == {"exact": PODS}
        for pod in range(PODS):
            for prompt in prompts(pod):
                assert index.match_prefix(prompt, model="m").tokens == {f"p{pod}": len(prompt)}
        manager.on_change(lambda change: changes.update([(change.pod, change.new)]))
        fleet.die(PODS // 2)
        dead = {f"p{pod}" for pod in range(PODS // 2)}
        until(lambda: all(changes[name, "stale"] for name in dead), seconds=LONG)
        assert {name for name, _ in changes} == dead, "the others notice nothing"
        for pod in range(0, PODS, 7):
            for prompt in prompts(pod):
                match = index.match_prefix(prompt, model="m", only_exact=True)
                assert match.tokens == ({} if f"p{pod}" in dead else {f"p{pod}": len(prompt)})
        for name in dead:
            manager.remove_pod(name)
        assert set(manager.status()) == {f"p{pod}" for pod in range(PODS // 2, PODS)}
        assert index.stats()["blocks"] == (PODS - PODS // 2) * HISTORY * 20

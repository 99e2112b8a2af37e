"""An index process that dies and starts again from its snapshot, while the fleet continues without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvindex import StreamError

from .fleet import IndexProcess, Pods, at_rest, own_prompts, until


@pytest.mark.quick
def test_an_index_that_was_killed_goes_on_from_its_snapshot(pods: Pods, equal, tmp_path: Path) -> None:
    """A new process starts from an older snapshot.

    Since the snapshot there were events that only the dead process got, events that no process got, a pod that was
    started again, and one that was removed for good.
    """
    path = tmp_path / "index.snapshot"
    pods.start(
        plain={}, ranks={"ranks": 2, "window": 64}, again={"form": "vllm-0.22.0"}, gone={"form": "sglang-0.5.22"},
        blocks=400,
    )  # fmt: skip
    with IndexProcess(snapshot=path) as index:
        index.follow(*pods)
        pods.run(30)
        at_rest(index, pods)
        prompts = own_prompts(pods["plain"].config, 50)
        equal(index, pods, prompts)
        index.ask("save", path=str(path))
        pods.run(10)
        at_rest(index, pods)
        index.kill()
        pods.run(5)
        pods["again"].kill()
        pods["again"].launch()
        pods["again"].ask("run", requests=4)
        pods.remove("gone")

        index.launch()
        # The saved blocks are there at once, but stale.
        answers = index.match(prompts)["answers"]
        assert {name for answer in answers for name in answer} == {"plain", "ranks", "again", "gone"}
        assert {found["state"] for answer in answers for found in answer.values()} == {"stale"}
        assert not any(index.match(prompts, only_exact=True)["answers"])
        index.follow(*pods)
        at_rest(index, pods)
        equal(index, pods, prompts)
        told = [found["state"] for answer in index.match(prompts)["answers"] for found in answer.values()]
        assert set(told) <= {"exact", "stale"}
        assert not any("gone" in answer for answer in index.match(prompts, only_exact=True)["answers"])
        # Live from here on.
        pods.run(5)
        at_rest(index, pods)
        equal(index, pods, prompts)
        assert {status["lost_batches"] for status in index.status().values()} == {0}


def test_a_snapshot_that_is_not_there_or_damaged_is_a_fresh_start_or_an_error(
    pods: Pods, equal, tmp_path: Path
) -> None:
    path = tmp_path / "index.snapshot"
    (pod,) = pods.start("a")
    pod.ask("run", requests=10)
    with IndexProcess(snapshot=path) as index:
        index.follow(pod)
        at_rest(index, pods)
        equal(index, pods, own_prompts(pod.config, 20))
        index.ask("save", path=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StreamError, match="did not come up"):
        IndexProcess(snapshot=path)
    path.unlink()
    with IndexProcess(snapshot=path) as index:
        assert not any(index.match(own_prompts(pod.config, 20))["answers"])
        index.follow(pod)
        at_rest(index, pods)
        equal(index, pods, own_prompts(pod.config, 20))


@pytest.mark.quick
def test_a_snapshot_is_continued_where_a_whole_history_is_not_there_any_more(pods: Pods, equal, tmp_path: Path) -> None:
    """The pods keep 60 batches for replays and have published more.

    So a replay can continue from the places of the snapshot, but not from the beginning.
    """
    path = tmp_path / "index.snapshot"
    pods.start(a={}, b={"form": "sglang-0.5.22"}, blocks=400, buffer_steps=60)
    with IndexProcess(snapshot=path) as index:
        index.follow(*pods)
        for _ in range(8):
            pods.run(5)
            at_rest(index, pods)
        assert min(min(pod.seqs().values()) for pod in pods) > 60
        index.ask("save", path=str(path))
        saved = {pod.name: pod.seqs()[0] for pod in pods}
        index.kill()
        pods.run(3)
        index.launch()
        index.follow(*pods)
        at_rest(index, pods)
        prompts = own_prompts(pods["a"].config, 60)
        equal(index, pods, prompts)
        for pod in pods:
            status = index.status()[pod.name]
            assert status["lost_batches"] == 0
            assert status["batches"] == pod.seqs()[0] - saved[pod.name]
    # Without the snapshot the beginning is lost, and the status reports it.
    with IndexProcess() as late:
        late.follow(*pods)
        until(lambda: {status["state"] for status in late.status().values()} == {"degraded"}, late.status)
        assert all(status["lost_batches"] > 0 for status in late.status().values())

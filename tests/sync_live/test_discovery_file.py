"""A watched file of pods: the manager follows its content, even after a temporary bad state of the file."""

from __future__ import annotations

import asyncio
import json
import logging
import os

import pytest
import yaml
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import EventManager, InvalidTypeError, InvalidValueError, PodSource, PrefixIndex, StreamError, aio
from kvindex.discovery import PodFile, read_pods

SOON = 0.02


@pytest.fixture
def manager():
    with nothing_left_behind(), EventManager(PrefixIndex(block_size=4), policy=BRISK) as made:
        yield made


def item(name, port=1, **more):
    return {"name": name, "endpoint": f"tcp://127.0.0.1:{port}", **more}


def replace(path, text):
    """Replace a file atomically, so that no reader sees half of it."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


# Reading


def test_the_same_pods_as_yaml_and_as_json(tmp_path):
    items = [
        item("a", 5557, replay_endpoint="tcp://127.0.0.1:5657", model="m", dp_size=2, topic="kv@a@m", lora="adapter"),
        {"name": "b", "ranks": {0: ["tcp://10.0.0.1:1", None], 3: ["tcp://10.0.0.2:1", "tcp://10.0.0.2:2"]}},
        item("c", 7, presence="set", clear_media=["GPU"], block_size=32, chunk_size=8192),
    ]
    expected = [
        PodSource("a", endpoint="tcp://127.0.0.1:5557", replay_endpoint="tcp://127.0.0.1:5657", model="m", dp_size=2,
                  topic="kv@a@m", lora="adapter"),
        PodSource("b", ranks={0: ("tcp://10.0.0.1:1", None), 3: ("tcp://10.0.0.2:1", "tcp://10.0.0.2:2")}),
        PodSource("c", endpoint="tcp://127.0.0.1:7", presence="set", clear_media={"GPU"}, block_size=32,
                  chunk_size=8192),
    ]  # fmt: skip
    for name, write in (("pods.yaml", yaml.safe_dump), ("pods.json", json.dumps), ("pods", json.dumps)):
        (tmp_path / name).write_text(write(items))
        assert read_pods(tmp_path / name) == {source.name: source for source in expected}
    (tmp_path / "none").write_text("[]")
    assert read_pods(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a list of pods"),
        ("pods: []", "is not a list of pods"),
        ("just words", "is not a list of pods"),
        ("- a\n", "pod 1: a pod is described by a map"),
        ("- {name: a, endpoint: 'tcp://h:1'}\n- {name: a}\n", "pod 2: there is a pod 'a' before it"),
        ("- {endpoint: 'tcp://h:1'}\n", "pod 1: a pod without a name"),
        (
            "- {name: a, endpoint: 'tcp://h:1'}\n- {name: b, endpoint: 'tcp://H:1/'}\n",
            "pod 2: rank 0 of pod 'b' publishes at tcp://H:1/, which is of pod 'a' before it",
        ),
        (
            "- {name: a, endpoint: 'tcp://h:1', replay_endpoint: 'tcp://h:2'}\n"
            "- {name: b, endpoint: 'tcp://g:1', replay_endpoint: 'tcp://h:2'}\n",
            "pod 2: rank 0 of pod 'b' answers replays at tcp://h:2, which is of pod 'a' before it",
        ),
        ("- {name: a, endpiont: 'tcp://h:1', 7: 8}\n", "pod 1: unknown fields 7, endpiont;"),
        ("- {name: a, endpoint: 'tcp://*:1'}\n", "name the host that it runs on"),
        ("- {name: a, endpoint: 5557}\n", "endpoint"),
        ("- {name: 7, endpoint: 'tcp://h:1'}\n", "name must be a str"),
        ("- {name: a, ranks: ['tcp://h:1']}\n", "ranks of pod 'a' must be a map"),
        ("- {name: a, ranks: {0: 'tcp://h:1'}}\n", "rank 0"),
        ("- {name: a, dp_size: two}\n", "dp_size"),
        ("- {name: a, endpoint: 'tcp://h:1', clear_media: [[GPU]]}\n", "pod 1"),
        ("- {name: a\n", "is not YAML"),
        ("- !!python/object/apply:os.getpid []\n", "is not YAML"),
        ("- 2001-13-45\n- {[a]: b}\n", "is not YAML"),
        ("[" * 100_000, "is not YAML"),
        ("- \x00\n", "is not YAML"),
    ],
)
def test_what_is_no_list_of_pods_is_named(tmp_path, text, message):
    path = tmp_path / "pods.yaml"
    path.write_text(text)
    with pytest.raises((InvalidValueError, InvalidTypeError)) as caught:
        read_pods(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path, data):
    path = tmp_path / "pods.json"
    path.write_bytes(data)
    with pytest.raises(InvalidValueError, match="is not JSON"):
        read_pods(path)


def test_json_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    for name in ("pods.json", "pods.yaml"):
        (tmp_path / name).write_text("[]")
    assert read_pods(tmp_path / "pods.json") == {}
    with pytest.raises(InvalidValueError, match="pip install pyyaml"):
        read_pods(tmp_path / "pods.yaml")


# Watching


def test_the_manager_follows_what_the_file_says(manager, tmp_path):
    path = tmp_path / "pods.yaml"
    with LivePublisher(name="a") as a, LivePublisher(name="b") as b:

        def written(*pods, **more):
            return yaml.safe_dump(
                [
                    {"name": pod.name, "model": "m", "ranks": {0: list(pod.ranks[0])}, **more.get(pod.name, {})}
                    for pod in pods
                ]
            )

        path.write_text(written(a))
        with PodFile(manager, path, interval=SOON) as watch:
            assert set(manager.status()) == set(watch.pods) == {"a"}
            assert manager.wait_until_current(20.0)
            changed = []
            manager.on_change(changed.append)
            replace(path, written(a, b))
            until(lambda: set(watch.pods) == {"a", "b"})
            assert manager.wait_until_current(20.0)
            assert {change.pod for change in changed} == {"b"}, "what has not changed notices nothing"
            replace(path, written(b, b={"lora": "adapter"}))
            until(lambda: watch.pods.get("b") and watch.pods["b"].lora == "adapter" and set(watch.pods) == {"b"})
            assert set(manager.status()) == {"b"}
            assert manager.wait_until_current(20.0)
            replace(path, "[]")
            until(lambda: not manager.status())
            replace(path, written(a))
            until(lambda: set(watch.pods) == {"a"})
        assert set(manager.status()) == {"a"}, "closing the watch leaves the pods"


def test_a_broken_file_leaves_the_pods_as_they_are_and_is_logged_once(manager, tmp_path, caplog):
    path = tmp_path / "pods.json"
    path.write_text(json.dumps([item("a"), item("b", 2)]))
    reads = []

    class Counted(PodFile):
        def _turn(self):
            super()._turn()
            reads.append(1)

    def turns(count):
        aim = len(reads) + count
        until(lambda: len(reads) >= aim)

    def complaints():
        return [record.getMessage() for record in caplog.records if "stay as they are" in record.getMessage()]

    with caplog.at_level(logging.INFO, "kvindex.discovery"), Counted(manager, path, interval=SOON, settle=SOON):
        for number, change in enumerate(
            (
                lambda: replace(path, '[{"name": "a"'),
                path.unlink,
                lambda: replace(path, ""),
                lambda: replace(path, json.dumps([item("a"), item("a")])),
                path.unlink,
                path.mkdir,
            ),
            1,
        ):
            change()
            turns(4)
            assert set(manager.status()) == {"a", "b"}
            assert len(complaints()) == number, complaints()
        path.rmdir()
        replace(path, json.dumps([item("b", 2)]))
        until(lambda: set(manager.status()) == {"b"})
        assert len(complaints()) in (6, 7), "for a moment it was not there"


@pytest.fixture
def looks(manager, tmp_path):
    """Return a watched file and a function that waits for a number of looks at it."""
    path = tmp_path / "pods.yaml"
    path.write_text("".join(f"- {{name: p{n}, endpoint: 'tcp://127.0.0.1:{n + 1}'}}\n" for n in range(5)))
    count = []

    class Counted(PodFile):
        def _turn(self):
            super()._turn()
            count.append(1)

    def wait(turns=4):
        aim = len(count) + turns
        until(lambda: len(count) >= aim)
        return set(manager.status())

    with Counted(manager, path, interval=SOON, settle=3600.0) as watch:
        yield path, wait, watch


def test_a_file_that_is_half_written_removes_nobody(looks):
    path, wait, watch = looks
    whole = path.read_text()
    everybody = {f"p{n}" for n in range(5)}
    for end in range(0, len(whole), 7):
        path.write_text(whole[:end])
        assert wait(3) == everybody
    path.write_text("\n".join(whole.splitlines()[:2]) + "\n")
    assert wait() == everybody
    path.write_text("\n".join(whole.splitlines()[:2]) + "\n- {name: new, endpoint: 'tcp://127.0.0.1:9'}\n")
    until(lambda: wait() == everybody | {"new"})
    watch._settle = 0.0
    until(lambda: wait() == {"p0", "p1", "new"})


def test_a_file_that_is_renamed_into_place_is_complete(looks):
    path, wait, _ = looks
    replace(path, "- {name: p1, endpoint: 'tcp://127.0.0.1:2'}\n")
    until(lambda: wait() == {"p1"})


def test_a_pipe_in_the_place_of_the_file_holds_up_nobody(looks):
    path, wait, watch = looks
    path.unlink()
    os.mkfifo(path)
    assert len(wait()) == 5
    watch.close()


def test_both_managers_are_followed_and_nothing_else(tmp_path):
    path = tmp_path / "pods.json"
    path.write_text(json.dumps([item("a")]))

    async def follow():
        async with aio.AsyncEventManager(PrefixIndex(), policy=BRISK) as manager:
            with PodFile(manager, path, interval=SOON):
                return set(manager.status())

    assert asyncio.run(follow()) == {"a"}
    for strange in (PrefixIndex(), None, "manager"):
        with pytest.raises(InvalidTypeError, match="needs an EventManager, not"):
            PodFile(strange, path)


def test_an_address_or_a_label_that_changes_leaves_the_stream_alone(manager, tmp_path):
    path = tmp_path / "pods.json"
    with LivePublisher(name="a") as pod:
        pod.publish(3)
        entry = {"name": "a", "model": "m", "ranks": {0: list(pod.ranks[0])}}
        path.write_text(json.dumps([entry]))
        with PodFile(manager, path, interval=SOON):
            assert manager.wait_until_current(20.0)
            replace(path, json.dumps([{**entry, "address": "http://10.0.0.1:8000", "labels": {"role": "decode"}}]))
            until(lambda: manager.pods()["a"].address)
            assert manager.pods()["a"].labels == {"role": "decode"}
            assert manager.status()["a"].batches == 3
            assert manager.status()["a"].state == "exact"


def test_a_pod_that_can_not_be_followed_costs_the_others_nothing_and_is_tried_again(manager, tmp_path, caplog):
    path = tmp_path / "pods.json"
    manager.add_pod(PodSource("mine", endpoint="tcp://127.0.0.1:3"))
    path.write_text(json.dumps([item("mine"), item("odd", 4, block_size=6), item("good", 5)]))
    with PodFile(manager, path, interval=SOON) as watch:
        assert set(watch.pods) == {"good"}
        assert set(watch.refused) == {"mine", "odd"}
        assert "followed already" in watch.refused["mine"]
        assert "blocks of 6 tokens" in watch.refused["odd"]
        manager.remove_pod("mine")
        until(lambda: set(watch.pods) == {"good", "mine"})
        manager.remove_pod("good")  # removed by another call: the file has not changed, so the pod stays removed
        replace(path, json.dumps([item("mine")]))
        until(lambda: set(watch.pods) == {"mine"})
        until(lambda: not watch.refused)
        assert set(manager.status()) == {"mine"}
    assert [record.getMessage().split(":")[0] for record in caplog.records if "cannot be" in record.getMessage()] == [
        "mine",
        "odd",
    ]


def test_a_first_version_that_is_wrong_raises(manager, tmp_path):
    with pytest.raises(FileNotFoundError):
        PodFile(manager, tmp_path / "absent").start()
    (tmp_path / "wrong").write_text("[1]")
    with pytest.raises(InvalidTypeError, match="pod 1"), PodFile(manager, tmp_path / "wrong"):
        pass
    with pytest.raises(InvalidValueError, match="interval"):
        PodFile(manager, tmp_path / "wrong", interval=0)


def test_a_closed_manager_ends_the_watch(tmp_path):
    path = tmp_path / "pods.json"
    path.write_text(json.dumps([item("a")]))
    with nothing_left_behind():
        manager = EventManager(PrefixIndex(), policy=BRISK)
        watch = PodFile(manager, path, interval=SOON)
        watch.start()
        watch.start()
        manager.close()
        replace(path, json.dumps([item("b")]))
        until(lambda: not watch._thread.is_alive())
        watch.close()
        watch.close()
        with pytest.raises(StreamError):
            watch.start()

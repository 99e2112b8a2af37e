"""The manager over real sockets: publishers with every kind of fault, and other pods that must not be affected."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields, replace

import msgpack
import pytest
import zmq
from support import payload as encoded
from support import stored
from sync_support import BRISK, LivePublisher, listener, nothing_left_behind, until

from kvindex import EventDecodeError, InvalidTypeError, InvalidValueError, PrefixIndex, StreamError, UnknownPodError
from kvindex.sync.manager import EventManager
from kvindex.sync.policy import StreamPolicy
from kvindex.sync.source import PodSource
from kvindex.sync.status import (
    Batch,
    Configured,
    Forgotten,
    IndexChange,
    Marked,
    PodsChange,
    PodStatus,
    Removed,
    StateChange,
)


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(block_size=4)


@pytest.fixture
def manager(index: PrefixIndex) -> Iterator[EventManager]:
    with nothing_left_behind(), EventManager(index, policy=BRISK) as made:
        yield made


@pytest.fixture
def pod() -> Iterator[LivePublisher]:
    with LivePublisher() as made:
        yield made


def source(pod: LivePublisher, **options) -> PodSource:
    return PodSource(pod.name, **{"ranks": pod.ranks, "model": "m", **options})


def caught_up(manager: EventManager, pod: LivePublisher) -> bool:
    status = manager.status()[pod.name]
    return manager.is_current([pod.name]) and all(
        status.workers[rank].last_seq == count - 1 for rank, count in enumerate(pod.count) if count
    )


def matched(index: PrefixIndex, pod: LivePublisher, rank: int = 0) -> int:
    match = index.match_prefix(pod.chain(rank), model="m")
    return match[pod.name].ranks.get(rank, 0) if pod.name in match.tokens else 0


def check_equal(index: PrefixIndex, pod: LivePublisher) -> None:
    for rank in range(len(pod.publishers)):
        assert matched(index, pod, rank) == len(pod.chain(rank))
    index._check()


# Well-behaved


def test_what_was_published_before_and_after_is_there(index, manager, pod):
    pod.publish(5)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    check_equal(index, pod)
    pod.publish(5)
    until(lambda: caught_up(manager, pod))
    check_equal(index, pod)
    status = manager.status()["pod"]
    assert (status.state, status.connected, status.last_seq, status.gaps, status.restarts) == ("exact", True, 9, 0, 0)
    assert (status.batches, status.blocks, status.parked, status.errors) == (10, 10, 0, {})
    assert status.workers[0].events["stored"] == 10
    assert 0 <= status.lag < 20
    assert index.pod_state("pod") == "exact"


def test_every_rank_has_its_own_port_and_its_own_numbers(index, manager):
    with LivePublisher(ranks=3) as pod:
        for rank in range(3):
            pod.publish(rank + 2, rank=rank)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        check_equal(index, pod)
        assert {rank: worker.last_seq for rank, worker in manager.status()["pod"].workers.items()} == {0: 1, 1: 2, 2: 3}


def test_ports_that_follow_each_other_need_no_list(index, manager):
    with LivePublisher(ranks=1) as pod:
        pod.publish(2)
        ((endpoint, replay),) = pod.ranks.values()
        manager.add_pod(PodSource("pod", endpoint=endpoint, replay_endpoint=replay, model="m", dp_size=1))
        assert manager.wait_until_current(20.0)
        check_equal(index, pod)


@pytest.mark.parametrize("with_topic", [False, True])
def test_both_framings_of_a_replay(index, with_topic):
    # Generous limits: a publisher that is delayed by a loaded machine has not finished its answer.
    patient = replace(BRISK, replay_timeout=20.0, replay_pause=20.0)
    with LivePublisher(with_topic=with_topic) as pod, EventManager(index, policy=patient) as manager:
        pod.publish(400)  # long enough that its end is asked for again
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        check_equal(index, pod)
        assert manager.status()["pod"].workers[0].counters["long_replays"] == 1


def test_names_are_looked_up(index, manager, pod):
    pod.publish(3)
    ranks = {0: tuple(each.replace("127.0.0.1", "localhost") for each in pod.ranks[0])}
    manager.add_pod(source(pod, ranks=ranks))
    assert manager.wait_until_current(20.0)
    check_equal(index, pod)


def test_a_name_that_takes_longer_to_look_up_than_a_connection_may_take_is_connected_to(index, pod, monkeypatch):
    """A resolver waits 5 s for each silent name server."""
    real, patience = socket.getaddrinfo, []

    def slow(host, *args, **how):
        if host == "slow.test":
            # Longer than the limit for a connection, by the manager's own clock.
            until(lambda: patience and time.monotonic() > patience[0])
            host = "127.0.0.1"
        return real(host, *args, **how)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with EventManager(index, policy=BRISK, connect_timeout=0.1) as manager:
        pod.publish(3)
        ranks = {0: tuple(each.replace("127.0.0.1", "slow.test") for each in pod.ranks[0])}
        manager.add_pod(source(pod, ranks=ranks))
        until(lambda: "looking up the address of tcp://slow.test" in manager.status()["pod"].reason)
        patience.append(time.monotonic() + manager._bound._options.patience)
        assert manager.wait_until_current(20.0)
        assert manager.status()["pod"].workers[0].counters.get("failed_connects", 0) == 0
        check_equal(index, pod)


def test_ipc_endpoints(index, manager, tmp_path, monkeypatch):
    # The path of a socket is limited to 104 bytes on some systems, and pytest's directories are longer there.
    monkeypatch.chdir(tmp_path)
    with LivePublisher(endpoint="ipc://live", replay_endpoint="ipc://replay") as pod:
        pod.publish(3)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        pod.publish(3)
        until(lambda: caught_up(manager, pod))
        check_equal(index, pod)


def test_inproc_endpoints_by_a_shared_context(index):
    with LivePublisher(endpoint="inproc://live", replay_endpoint="inproc://replay") as pod:
        pod.publish(3)
        with EventManager(index, policy=BRISK, context=pod.context) as manager:
            manager.add_pod(source(pod))
            assert manager.wait_until_current(20.0)
            pod.publish(3)
            until(lambda: caught_up(manager, pod))
            check_equal(index, pod)


def test_without_a_replay_endpoint_a_late_start_says_so(index, manager):
    with LivePublisher(replay_endpoint=None) as pod:
        pod.publish(3)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        until(lambda: manager.status()["pod"].connected)
        assert index.pod_state("pod") == "degraded"
        until(lambda: pod.publish(1) or (manager.status()["pod"].last_seq or 0) >= 4)
        status = manager.status()["pod"]
        assert status.state == "degraded"
        assert status.lost_batches >= 3
        assert index.match_prefix(pod.chain(), model="m", only_exact=True).tokens == {}


# Faults


FAULTS = {
    "drop": {"drop": 3},
    "duplicate": {"duplicate": 5},
    "reorder": {"reorder": 2},
    "delay": {"delay": 0.05},
    "bad frames": {"bad_frames": 2},
    "damage": {"damage": 2},
    "mute": {"mute": True},
    "replay without an end": {"drop": 2, "replay_no_end": True},
    "replay cut": {"drop": 2, "replay_cut": 3},
    "replay late": {"drop": 2, "replay_delay": 0.2},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_fault_is_healed_and_another_pod_notices_nothing(index, manager, pod, fault):
    with LivePublisher(name="other") as other:
        changes = []
        other.publish(2)
        pod.publish(2)
        manager.add_pod(source(pod))
        manager.add_pod(source(other))
        assert manager.wait_until_current(20.0)
        # The change to exact may be reported after the wait for it has ended.
        manager.on_change(lambda change: changes.append(change.pod) if change.new != "exact" else None)
        for name, value in fault.items():
            setattr(pod.faults, name, value)
        for _ in range(5):
            pod.publish(2)
            other.publish(2)
        until(lambda: caught_up(manager, other))
        check_equal(index, other)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)
        assert "other" not in changes
        assert manager.status()["other"].errors == {}


def test_a_fault_that_nothing_heals_is_degraded_and_counted(index, manager, pod):
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    pod.faults.unencodable = 1
    pod.publish(3)
    until(lambda: manager.status()["pod"].last_seq == 4 and manager.is_current())
    status = manager.status()["pod"]
    assert (status.state, status.gaps, status.lost_batches) == ("degraded", 1, 1)
    assert status.workers[0].replays_failed == 1
    pod.publish(1, clear=True)
    pod.publish(2)
    until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
    check_equal(index, pod)


def test_a_silent_replay_endpoint_degrades_and_heals_when_it_speaks(index, manager, pod):
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    pod.faults.replay_silent = True
    pod.faults.drop = 1
    pod.publish(3)
    until(lambda: index.pod_state("pod") == "stale")
    until(lambda: index.pod_state("pod") == "degraded")
    assert manager.status()["pod"].lost_batches == 1
    pod.faults.replay_silent = False
    until(lambda: index.pod_state("pod") == "exact")
    check_equal(index, pod)
    assert manager.status()["pod"].workers[0].counters["rebuilds"] == 1


def test_a_replay_that_never_ends_holds_up_nobody(index, manager, pod):
    with LivePublisher(name="other") as other:
        pod.publish(3)
        pod.faults.replay_endless = True
        manager.add_pod(source(pod))
        other.publish(3)
        manager.add_pod(source(other))
        until(lambda: caught_up(manager, other))
        check_equal(index, other)
        until(lambda: manager.status()["pod"].workers[0].counters.get("endless_replays", 0) > 0)
        pod.faults.replay_endless = False
        until(lambda: index.pod_state("pod") == "exact")
        check_equal(index, pod)


def test_a_restart_is_noticed_cleared_and_rebuilt(index, manager, pod):
    pod.publish(5)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    old = pod.chain()
    pod.restart()
    pod.publish(7)
    until(lambda: manager.status()["pod"].restarts == 1 and caught_up(manager, pod))
    check_equal(index, pod)
    assert index.match_prefix(old, model="m").tokens == {}
    assert index.pod_state("pod") == "exact"
    assert manager.status()["pod"].workers[0].reconnects >= 1


def test_a_payload_that_is_no_batch_is_counted_and_the_rest_goes_on(index, manager, pod):
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    pod.publish_raw(b"\x93 this is no batch")
    pod.publish(1, clear=True)
    pod.publish(2)
    until(lambda: caught_up(manager, pod))
    assert manager.status()["pod"].errors == {"undecodable": 1}
    assert index.pod_state("pod") == "exact"  # the clear came after it
    check_equal(index, pod)


def test_blocks_of_another_size_are_explained_once(index, manager, pod, caplog):
    pod.publish(1)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    with caplog.at_level(logging.WARNING, "kvindex.sync"):
        for number in range(20):
            event = ["BlockStored", [1000 + number], None, list(range(6)), 6, None]
            pod.publish_raw(msgpack.packb([time.time(), [event], 0]))
        until(lambda: manager.status()["pod"].errors.get("block_size_mismatch") == 20)
        until(lambda: manager.status()["pod"].state == "degraded")
    told = [record.message for record in caplog.records if "block_size_mismatch" in record.message]
    assert len(told) == 1
    reason = "its blocks have 6 tokens, the index has blocks of 4"
    assert told[0].endswith(reason)
    assert manager.status()["pod"].reason == reason
    pod.publish(1, clear=True)
    until(lambda: manager.status()["pod"].reason != reason)
    assert index.pod_state("pod") == "exact"


def test_an_event_of_unknown_kind_degrades_what_holds_something_and_is_named(index, manager, pod, caplog):
    changes = []
    manager.on_change(changes.append)
    pod.publish_raw(msgpack.packb([time.time(), [["BlockStored", [7], None, [1, 2, 3, 4], 4, None]], 0]))
    with caplog.at_level(logging.INFO, "kvindex.sync"):
        for number in range(2):
            pod.publish_raw(msgpack.packb([time.time(), [["BlockMoved", [number]]], 0]))
        manager.add_pod(source(pod))
        until(lambda: manager.status()["pod"].errors == {"unknown_event": 2})
        until(lambda: changes and changes[-1].new == "degraded")
    status = manager.status()["pod"]
    want = "an event of kind 'BlockMoved', which is not known, may have taken blocks away"
    assert (status.state, status.reason, status.workers[0].reason, changes[-1].reason) == ("degraded", want, want, want)
    told = [record.getMessage() for record in caplog.records if "unknown_event" in record.getMessage()]
    assert len(told) == 1
    assert "'BlockMoved'" in told[0]
    pod.publish_raw(msgpack.packb([time.time(), [["AllBlocksCleared"]], 0]))
    until(lambda: manager.status()["pod"].state == "exact")


@pytest.mark.parametrize("ahead", [[[5]], [[5, 6, 7]], None])
def test_an_option_that_the_stream_contradicts_has_no_effect_and_is_told_once(index, manager, pod, caplog, ahead):
    """Hashes that cover the draft model's tokens need no block dropped. Without them, ``eagle`` counts."""
    tokens = list(range(5))
    event = {"type": "BlockStored", "block_hashes": [7], "parent_block_hash": None, "token_ids": tokens[:4]}
    if ahead is not None:
        tokens += ahead[0][1:]
        event["lookahead_token_ids"] = [[4, *ahead[0][1:]]]
    with caplog.at_level(logging.WARNING, "kvindex.sync"):
        for number in range(3):
            more = {**event, "block_hashes": [7 + number], "block_size": 4, "group_idx": 0}
            pod.publish_raw(msgpack.packb([time.time(), [more], 0]))
        manager.add_pod(source(pod, engine="vllm", eagle=True))
        until(lambda: caught_up(manager, pod))
    status = manager.status()["pod"]
    told = [record.getMessage() for record in caplog.records if "option_contradicted" in record.getMessage()]
    assert status.state == "exact"
    if ahead is None:
        assert (status.reason, told) == ("", [])
        assert index.match_prefix(tokens, model="m").tokens == {}
        assert index.worker_stats("pod")[0]["lookahead"] == [0]
        return
    want = f"eagle has no effect: the hashes of its blocks have a lookahead of {len(ahead[0])}, so no block is dropped"
    assert status.reason == want
    assert len(told) == 1
    assert want in told[0]
    assert index.match_prefix(tokens, model="m").tokens == {"pod": 4}
    assert index.worker_stats("pod")[0]["lookahead"] == [len(ahead[0])]


def test_the_reason_names_the_option_or_the_clear_that_leaves_it_in_doubt(index, manager, pod):
    manager.add_pod(source(pod, engine="sglang", hybrid=True))
    pod.publish(1)
    until(lambda: manager.status()["pod"].blocks == 1)
    until(lambda: manager.status()["pod"].state == "degraded")
    assert manager.status()["pod"].reason.startswith("hybrid=True: ")
    manager.remove_pod("pod")
    stored = {"type": "BlockStored", "block_hashes": [7], "parent_block_hash": None, "token_ids": [1, 2, 3, 4]}
    for event in ({**stored, "block_size": 4, "medium": "CPU"}, {"type": "AllBlocksCleared"}):
        pod.publish_raw(msgpack.packb([time.time(), [event], 0]))
    manager.add_pod(source(pod, engine="vllm"))
    until(lambda: manager.status()["pod"].state == "degraded")
    assert index.worker_stats("pod")[0]["in_doubt"]
    assert "a clear did not say whether it includes the offloading tiers" in manager.status()["pod"].reason


def test_a_clear_of_one_medium_is_not_taken_for_a_clean_start(index, manager, pod):
    clear = {"type": "AllBlocksCleared", "medium": "CPU"}
    stored = ["BlockStored", [7], None, [1, 2, 3, 4], 4, None]
    pod.publish_raw(msgpack.packb([time.time(), [stored, {"type": "BlockMoved"}, clear], 0]))
    manager.add_pod(source(pod))
    until(lambda: manager.status()["pod"].workers[0].events.get("cleared") == 1)
    until(lambda: manager.status()["pod"].state == "degraded")
    assert "'BlockMoved'" in manager.status()["pod"].reason


def test_events_of_unknown_kind_leave_the_state_and_say_so_where_nothing_is_held(index, manager, pod):
    changes = []
    manager.on_change(changes.append)
    for number in range(2):
        pod.publish_raw(msgpack.packb([time.time(), [["BlockMoved", [number]]], 0]))
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    until(lambda: manager.status()["pod"].errors == {"unknown_event": 2})
    status = manager.status()["pod"]
    assert (status.state, status.reason) == ("exact", "2 events of unknown kind were ignored, and no block is held")
    assert status.workers[0].reason == status.reason
    assert [(change.new, change.reason) for change in changes] == [("exact", "")]
    pod.publish_raw(msgpack.packb([time.time(), [["BlockStored", [7], None, [1, 2, 3, 4], 4, None]], 0]))
    until(lambda: manager.status()["pod"].blocks == 1)
    status = manager.status()["pod"]
    assert (status.state, status.reason, status.errors) == ("exact", "", {"unknown_event": 2})
    pod.publish_raw(msgpack.packb([time.time(), [["BlockMoved", [1]], ["AllBlocksCleared"]], 0]))
    until(lambda: manager.status()["pod"].blocks == 0)
    assert manager.status()["pod"].reason == "3 events of unknown kind were ignored, and no block is held"


class BusyIndex(PrefixIndex):
    """An index that blocks every batch while it is busy."""

    _at_work = threading.Lock()

    def ingest(self, *args, **options):
        with self._at_work:
            return super().ingest(*args, **options)

    def busy(self):
        return self._at_work


def flood(pod: LivePublisher, count: int) -> None:
    """Publish batches of 100 kB. 300 of them exceed the system's buffer for a socket."""
    padding = b"x" * 100_000
    for _ in range(count):
        number = pod.count[0]
        tokens = pod.block(0, number)
        event = ["BlockStored", [number + 1], number or None, tokens, pod.block_size, *[None] * 7, padding]
        pod.publish_raw(msgpack.packb([time.time(), [event], 0]))


def test_a_flood_costs_counted_gaps_and_nothing_else():
    index = BusyIndex(block_size=4)
    with LivePublisher(queue=5) as pod, EventManager(index, policy=BRISK, queue=5) as manager:
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        with index.busy():
            flood(pod, 300)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact", 60.0)
        check_equal(index, pod)
        status = manager.status()["pod"]
        assert status.gaps > 0
        assert (status.lost_batches, status.batches) == (0, 300)


def test_a_flood_with_nobody_to_ask_is_degraded_and_every_lost_batch_is_counted():
    index = BusyIndex(block_size=4)
    with (
        LivePublisher(queue=5, replay_endpoint=None) as pod,
        LivePublisher(name="other") as other,
        EventManager(index, policy=BRISK, queue=5) as manager,
    ):
        manager.add_pod(source(pod))
        manager.add_pod(source(other))
        until(lambda: manager.status()["pod"].connected)
        until(lambda: flood(pod, 1) or manager.status()["pod"].batches > 0)
        with index.busy():
            flood(pod, 300)
        other.publish(3)
        # The last batch may be among the lost ones. Later batches, without a flood, are not lost.
        until(lambda: manager.status()["pod"].last_seq >= pod.count[0] - 1 or pod.publish(1) or time.sleep(0.2))
        assert caught_up(manager, pod)
        status = manager.status()["pod"]
        assert status.gaps > 0
        assert status.lost_batches > 0
        assert status.batches + status.lost_batches == pod.count[0]
        assert (status.state, status.workers[0].waiting) == ("degraded", 0)
        until(lambda: caught_up(manager, other))
        assert (manager.status()["other"].state, manager.status()["other"].gaps) == ("exact", 0)
        check_equal(index, other)


# Invalid frames and payloads by the counter that must report them. None stands for the number of the next batch.
MESSAGES = {
    "bad_frame_count": [[b"kv@pod@m"], [b"kv@pod@m", None], [b"kv@pod@m", None, b"", b"noise"], [b"kv@pod@m"] * 9],
    "bad_seq_size": [[b"kv@pod@m", b"\0" * 7, b"noise"], [b"kv@pod@m", b"\0" * 9, b"noise"], [b"kv@pod@m", b"", b""]],
    "bad_seq": [[b"kv@pod@m", b"\xff" * 8, b"noise"], [b"kv@pod@m", b"\x80" + b"\0" * 7, b""]],
    "foreign_topic": [[b"kv@pod@mm", None, b"noise"], [b"kv@pod@m\xff\xfe", None, b"noise"]],
    "undecodable": [[b"kv@pod@m", None, b"\xc1"], [b"kv@pod@m", None, b""], [b"kv@pod@m", None, b"\x93\xcb\0"]],
}


@pytest.mark.parametrize("reason", MESSAGES)
def test_a_message_that_is_none_is_counted_by_name_and_another_pod_notices_nothing(index, manager, pod, reason):
    with LivePublisher(name="other") as other:
        for each in (pod, other):
            each.publish(2)
            manager.add_pod(source(each, topic=f"kv@{each.name}@m"))
        assert manager.wait_until_current(20.0)
        changes = []
        manager.on_change(changes.append)
        for frames in MESSAGES[reason]:
            with pod.lock:
                seq = pod.publishers[0].seq.to_bytes(8, "big")
                pod.publishers[0].send_raw([seq if frame is None else frame for frame in frames])
            pod.publish(1)
            other.publish(1)
        until(lambda: manager.status()["pod"].errors.get(reason, 0) >= len(MESSAGES[reason]))
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)
        assert set(manager.status()["pod"].errors) == {reason}
        until(lambda: caught_up(manager, other))
        check_equal(index, other)
        # The change to exact may be reported after the wait for it.
        assert not [change for change in changes if change.pod == "other" and change.new != "exact"]
        assert manager.status()["other"].errors == {}


def test_replies_that_are_none_are_counted_by_name_and_the_others_are_taken(index, manager, pod, monkeypatch):
    publisher = pod.publishers[0]
    right = publisher._reply
    seq = (0).to_bytes(8, "big")
    wrong = {
        "replay_bad_frame_count": [[b"", b"noise"], [b""], [b"", b"t", seq, b"", b""]],
        "replay_bad_delimiter": [[b"noise", seq, b"noise"]],
        "replay_bad_seq_size": [[b"", b"kv@pod@m", seq[1:], b"noise"], [b"", b"", b"noise"]],
        "replay_bad_seq": [[b"", b"kv@pod@m", b"\xff" * 8, b"noise"]],
        "foreign_topic": [[b"", b"kv@another@m", seq, b"noise"]],
    }

    def reply(client: bytes, number: int, payload: bytes) -> None:
        for frames in (frames for group in wrong.values() for frames in group):
            publisher.router.send_multipart([client, *frames])
        right(client, number, payload)

    monkeypatch.setattr(publisher, "_reply", reply)
    pod.publish(3)
    manager.add_pod(source(pod, topic="kv@pod@m"))
    until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
    check_equal(index, pod)
    errors = manager.status()["pod"].errors
    assert set(errors) == set(wrong)
    assert all(errors[reason] >= 3 * len(group) for reason, group in wrong.items())


def test_a_batch_that_the_index_can_not_take_is_a_hole_and_nothing_worse(pod):
    """For any exception, the worker is not exact until it starts from scratch, and the stream goes on."""
    refuse = []

    class Refusing(PrefixIndex):
        def ingest(self, *args, **options):
            if refuse:
                raise refuse.pop()
            return super().ingest(*args, **options)

    index = Refusing(block_size=4)
    with EventManager(index, policy=BRISK) as manager:
        changes = []
        pod.publish(2)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        manager.on_change(lambda change: changes.append(change.new))
        refuse.append(MemoryError("no more"))
        pod.publish(2)
        until(lambda: caught_up(manager, pod))
        assert manager.status()["pod"].errors["refused"] == 1
        assert (changes, manager.status()["pod"].lost_batches) == (["degraded"], 1)
        pod.publish(1, clear=True)
        pod.publish(2)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)
        assert manager.status()["pod"].workers[0].counters.get("disconnects", 0) == 0


class Failing(PrefixIndex):
    """Raises in one of its methods, only for ``pod``, as often as configured."""

    failing = ""
    times = 0

    def _fail(self, method: str, pod: str) -> None:
        if (method, pod) == (self.failing, "pod") and self.times:
            self.times -= 1
            raise MemoryError("no more")

    def clear_worker(self, pod, *args, **options):
        self._fail("clear_worker", pod)
        super().clear_worker(pod, *args, **options)

    def mark_worker(self, pod, *args, **options):
        self._fail("mark_worker", pod)
        super().mark_worker(pod, *args, **options)


@pytest.mark.parametrize("failing", ["clear_worker", "mark_worker"])
def test_an_index_that_fails_for_one_pod_is_asked_again_and_another_pod_notices_nothing(pod, failing):
    index = Failing(block_size=4)
    with LivePublisher(name="other") as other, EventManager(index, policy=BRISK) as manager:
        changes = []
        for each in (pod, other):
            each.publish(5)
            manager.add_pod(source(each))
        assert manager.wait_until_current(20.0)
        manager.on_change(changes.append)
        index.failing, index.times = failing, 1
        pod.restart()
        pod.publish(3)
        other.publish(3)
        until(lambda: not index.times and all(caught_up(manager, each) for each in (pod, other)))
        until(lambda: index.pod_state("pod") == "exact")
        # No block of the old process is left. Without the clear, its blocks would count for the new process too.
        assert index.worker_stats("pod")[0]["blocks"] == 3
        for each in (pod, other):
            check_equal(index, each)
        # Its first change to exact may be reported after it is current.
        assert not [each for each in changes if each.pod == "other" and each.new != "exact"]


def test_a_pod_that_can_not_be_cleared_claims_nothing_until_it_can(pod):
    index = Failing(block_size=4)
    with EventManager(index, policy=BRISK) as manager:
        pod.publish(5)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        index.failing, index.times = "clear_worker", 1 << 30
        pod.restart()
        pod.publish(3)
        until(lambda: manager.status()["pod"].lost_batches == 3)
        assert (manager.status()["pod"].state, index.pod_state("pod")) == ("stale", "stale")
        assert index.match_prefix(pod.chain(), model="m", only_exact=True).tokens == {}
        index.times = 0
        pod.publish(2)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "degraded")
        pod.publish(1, clear=True)
        pod.publish(2)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)
        assert index.worker_stats("pod")[0]["blocks"] == 2


def test_endpoints_that_are_none(index, pod):
    """The pod of each bad address is stale and counted, and the other pod is exact.

    The addresses refuse, have an unknown name, speak HTTP or are silent.
    """
    http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    with (
        listener(http) as speaks,
        listener(None) as silent,
        EventManager(index, policy=BRISK, connect_timeout=0.3) as manager,
    ):
        free = socket.create_server(("127.0.0.1", 0))
        refuses = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        endpoints = {"refuses": refuses, "unknown": "tcp://no-such-host.invalid:5557", "http": speaks, "silent": silent}
        for name, endpoint in endpoints.items():
            manager.add_pod(PodSource(name, endpoint=endpoint, model="m"))
        pod.publish(3)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0, pods=["pod"])
        for name in endpoints:
            until(lambda name=name: manager.status()[name].workers[0].counters.get("failed_connects", 0) >= 2)
            assert manager.status()[name].state == "stale"
            assert index.pod_state(name) == "stale"
        assert "resolves to nothing" in manager.status()["unknown"].reason
        assert not manager.is_current()
        pod.publish(3)
        until(lambda: caught_up(manager, pod))
        check_equal(index, pod)
        assert manager.status()["pod"].workers[0].counters.get("disconnects", 0) == 0


def test_attempts_to_connect_leave_nothing_in_memory(index):
    """pyzmq's own reader of socket events creates an enum member for each event's random time and keeps it forever."""
    free = socket.create_server(("127.0.0.1", 0))
    endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    free.close()
    with EventManager(index, policy=StreamPolicy(reconnect=(0.01, 0.01))) as manager:
        manager.add_pod(PodSource("pod", endpoint=endpoint))
        until(lambda: manager.status()["pod"].workers[0].counters.get("failed_connects", 0) >= 2)
        known = len(zmq.Event._value2member_map_)
        until(lambda: manager.status()["pod"].workers[0].counters["failed_connects"] >= 20)
        assert "nothing accepts connections" in manager.status()["pod"].reason
    assert len(zmq.Event._value2member_map_) == known


def test_replay_endpoints_that_are_none(index, pod):
    """The stream itself works and its batches are applied, but no endpoint replays the earlier ones."""
    http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    with (
        listener(http) as speaks,
        listener(None) as silent,
        EventManager(index, policy=BRISK, connect_timeout=0.3) as manager,
        ExitStack() as stack,
    ):
        free = socket.create_server(("127.0.0.1", 0))
        refuses = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        endpoints = {"refuses": refuses, "unknown": "tcp://no-such-host.invalid:5558", "http": speaks, "silent": silent}
        pods = [stack.enter_context(LivePublisher(name=name)) for name in endpoints]

        def publish(count: int, **what) -> None:
            for pod in pods:
                pod.publish(count, **what)

        publish(2)
        for pod, (name, endpoint) in zip(pods, endpoints.items(), strict=True):
            manager.add_pod(PodSource(name, endpoint=pod.ranks[0][0], replay_endpoint=endpoint, model="m"))
        until(lambda: all(status.connected for status in manager.status().values()))
        until(lambda: publish(1) or all(status.batches for status in manager.status().values()))
        assert manager.wait_until_current(20.0)
        for name in endpoints:
            status = manager.status()[name]
            assert (status.state, status.workers[0].replays_failed) == ("degraded", 1)
            assert status.batches + status.lost_batches == status.last_seq + 1
        # A clear by the engine is a clean start that needs no replay.
        publish(1, clear=True)
        publish(2)
        until(lambda: all(status.state == "exact" for status in manager.status().values()))
        until(lambda: all(status.last_seq == pod.count[0] - 1 for status in manager.status().values()))
        assert index.match_prefix(pod.chain(), model="m").tokens == dict.fromkeys(endpoints, len(pod.chain()))


def test_a_publisher_that_comes_up_later_is_found(index, manager):
    probe = socket.create_server(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    manager.add_pod(PodSource("pod", endpoint=f"tcp://127.0.0.1:{port}", model="m"))
    until(lambda: manager.status()["pod"].workers[0].counters.get("failed_connects", 0) >= 1)
    with LivePublisher(endpoint=f"tcp://127.0.0.1:{port}", replay_endpoint=None) as pod:
        until(lambda: manager.status()["pod"].connected)
        assert pod.name == "pod"


def test_more_pods_than_replays_at_once_wait_only_for_those_before_them(index):
    """Only a finished replay makes room for the next one here, because no stream asks again for a minute."""
    policy = StreamPolicy(idle_probe=(60.0, 60.0))
    with ExitStack() as stack:
        manager = stack.enter_context(EventManager(index, policy=policy, max_replays=1))
        pods = [stack.enter_context(LivePublisher(name=f"pod-{number}")) for number in range(4)]
        for pod in pods:
            pod.publish(3)
            manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        for pod in pods:
            check_equal(index, pod)
        assert [status.replays for status in manager.status().values()] == [1] * len(pods)


# Topics


def test_a_topic_is_compared_whole(index, manager):
    """``kv@10.0.0.1`` is a prefix of ``kv@10.0.0.10``, and ZMQ delivers both."""
    with LivePublisher(topic="kv@10.0.0.10@m") as pod:
        pod.publish(3)
        manager.add_pod(source(pod, topic="kv@10.0.0.1"))
        until(lambda: pod.publish(1) or manager.status()["pod"].errors.get("foreign_topic", 0) >= 2)
        assert manager.status()["pod"].batches == 0
        assert index.worker_stats("pod")[0]["blocks"] == 0


# Pods that come and go


def test_an_address_that_another_models_engine_has_taken_over_is_not_exact(index, manager, pod):
    """Without a configured topic, the first one counts.

    It contains a model, and the next connection's topic has another.
    """
    pod.publish(3)
    manager.add_pod(PodSource("pod", endpoint=pod.ranks[0][0], replay_endpoint=pod.ranks[0][1], model="m"))
    assert manager.wait_until_exact(20.0) == {}
    assert manager.status()["pod"].reason == ""

    def taken_over(topic):
        with pod.lock:
            pod.publishers[0]._topic = topic
        pod.restart()
        pod.publish(2)
        until(lambda: index.match_prefix(pod.chain(), model="m").tokens)
        until(lambda: manager.is_current())

    taken_over(b"kv@other@another")
    status = manager.status()["pod"]
    assert status.state == "degraded"
    for told in (pod.ranks[0][0], "'kv@other@another'", "'kv@pod@m'"):
        assert told in status.reason
    # A pod of another name with the same model is the next deployment.
    taken_over(b"kv@10.0.0.7@m")
    assert manager.wait_until_exact(20.0) == {}


def test_a_topic_that_names_another_model_is_told_of(manager, pod):
    """The name may be an alias, so it does not change the state."""
    pod.publish(1)
    manager.add_pod(PodSource("pod", endpoint=pod.ranks[0][0], replay_endpoint=pod.ranks[0][1], model="alias"))
    assert manager.wait_until_exact(20.0) == {}
    assert manager.status()["pod"].reason == "its topic names model 'm', not 'alias'"


def test_a_pod_added_twice_is_one_clear_error(manager, pod):
    manager.add_pod(source(pod))
    with pytest.raises(StreamError, match="followed already"):
        manager.add_pod(source(pod))
    with pytest.raises(InvalidTypeError):
        manager.add_pod("tcp://127.0.0.1:5557")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="6 tokens"):
        manager.add_pod(PodSource("sizes", endpoint="tcp://127.0.0.1:1", block_size=6))
    with pytest.raises(InvalidValueError, match="nothing is bound"):
        manager.add_pod(PodSource("nowhere"))
    with pytest.raises(UnknownPodError, match="'other'"):
        manager.remove_pod("other")
    with pytest.raises(UnknownPodError):
        manager.wait_until_current(1.0, pods=["other"])
    assert set(manager.status()) == {"pod"}


def test_a_removed_pod_stays_removed_while_its_events_keep_coming(index, manager, pod):
    stop = threading.Event()

    def blast() -> None:
        while not stop.is_set():
            pod.publish(5)
            time.sleep(0.001)

    thread = threading.Thread(target=blast)
    thread.start()
    try:
        for _ in range(5):
            manager.add_pod(source(pod))
            assert manager.wait_until_current(20.0)
            manager.remove_pod("pod")
            assert "pod" not in manager.status()
            for _ in range(20):
                with pytest.raises(UnknownPodError):
                    index.pod_state("pod")
                time.sleep(0.005)
    finally:
        stop.set()
        thread.join()
    manager.add_pod(source(pod))
    until(lambda: caught_up(manager, pod))
    check_equal(index, pod)


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_share_one_publisher_are_kept_apart(index, manager, pod, first):
    def store(rank: int, number: int) -> None:
        event = ["BlockStored", [number + 1], number or None, [number] * 4, 4, None]
        pod.publish_raw(msgpack.packb([time.time(), [event], rank]))

    manager.add_pod(source(pod))
    until(manager.is_current)
    for number in range(3):
        store(first, number)
    for number in range(2):
        store(1 - first, number)
    prompt = [number for number in range(3) for _ in range(4)]
    held = {first: 12, 1 - first: 8}
    until(lambda: manager.is_current() and index.match_prefix(prompt, model="m")["pod"].ranks == held)
    status = manager.status()["pod"]
    assert (status.state, sorted(status.workers)) == ("exact", [0, 1])
    assert [status.workers[rank].blocks for rank in (first, 1 - first)] == [3, 2]
    pod.publish_raw(msgpack.packb([time.time(), [["AllBlocksCleared"]], first]))
    until(lambda: index.match_prefix(prompt, model="m")["pod"].ranks == {1 - first: 8})
    assert index.stream_places("pod") == {}  # no connection has the complete sequence
    manager.close()
    assert {each["state"] for each in index.worker_stats("pod").values()} == {"stale"}


def test_ranks_whose_endpoints_are_swapped_are_not_exact(index, manager):
    with LivePublisher(ranks=2) as pod:
        pod.publish(3, rank=0)
        pod.publish(2, rank=1)
        (first, first_replay), (second, second_replay) = pod.ranks.values()
        manager.add_pod(PodSource("pod", ranks={0: (first, second_replay), 1: (second, first_replay)}, model="m"))
        until(manager.is_current)
        status = manager.status()["pod"]
        assert status.state == "degraded"
        assert "swapped" in status.reason
        assert {first, second_replay} <= set(status.workers[0].reason.replace(",", " ").split())


def test_who_is_not_exact_and_why(index, manager, pod):
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_exact(20.0) == {}
    assert manager.is_exact()
    manager.add_pod(PodSource("gone", endpoint="tcp://127.0.0.1:1"))
    until(lambda: "accepts" in manager.inexact().get("gone", ""))
    found = manager.wait_until_exact(0.0)
    assert list(found) == ["gone"]
    assert found["gone"].startswith("stale: tcp://127.0.0.1:1: ")
    assert manager.wait_until_exact(20.0, pods="pod") == {}
    assert not manager.is_exact()
    with pytest.raises(UnknownPodError):
        manager.inexact(["nobody"])
    manager.close()
    assert set(manager.wait_until_exact(5.0)) == {"pod", "gone"}


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.REP, zmq.PUSH])
def test_another_socket_at_the_endpoint_is_named_as_what_it_is(manager, kind):
    context = zmq.Context()
    try:
        other = context.socket(kind)
        port = other.bind_to_random_port("tcp://127.0.0.1")
        manager.add_pod(PodSource("pod", endpoint=f"tcp://127.0.0.1:{port}"))
        until(lambda: re.search("is not a (ZMQ )?publisher", manager.status()["pod"].reason))
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("publishes", [True, False])
def test_a_publisher_of_an_old_protocol_is_named_as_what_it_is(index, publishes):
    """libzmq delivers the messages of such a publisher, but never reports a connection to it as established."""
    answer = b"\xff" + bytes(7) + b"\x01\x7f\x01\x01" + b"\0\0"  # ZMTP 2.0, PUB, no identity
    if publishes:
        body = encoded(stored([1], range(4)))
        answer += b"\x01\x00\x01\x08" + bytes(8) + b"\x00" + bytes([len(body)]) + body
    with (
        listener(answer, stays=True) as endpoint,
        EventManager(index, policy=BRISK, connect_timeout=0.2) as manager,
    ):
        manager.add_pod(PodSource("pod", endpoint=endpoint))
        until(lambda: "ZMTP 2" in manager.status()["pod"].reason)
        status = manager.status()["pod"]
        assert (status.state, status.batches, status.connected) == ("stale", 0, False)


def test_pods_are_added_and_removed_from_many_threads(index, manager):
    with ExitStack() as stack:
        pods = [stack.enter_context(LivePublisher(name=f"pod-{number}")) for number in range(4)]
        for pod in pods:
            pod.publish(3)
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(5):
                    manager.add_pod(source(pods[number]))
                    assert manager.wait_until_current(20.0, pods=[f"pod-{number}"])
                    manager.status()
                    manager.remove_pod(f"pod-{number}")
                manager.add_pod(source(pods[number]))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert manager.wait_until_current(20.0)
        chain = pods[0].chain()
        assert index.match_prefix(chain, model="m").tokens == {f"pod-{number}": len(chain) for number in range(4)}
        index._check()


@pytest.mark.parametrize("spelling", ["tcp://[::1]:5557", "tcp://[0:0::1]:5557", "tcp://[::1]:5557/"])
def test_an_engine_has_one_name(index, manager, spelling):
    manager.add_pod(PodSource("a", endpoint="tcp://[::1]:5557"))
    with pytest.raises(StreamError, match=r"rank 1 of pod 'b' publishes at .*, which is followed as pod 'a' already"):
        manager.add_pod(PodSource("b", ranks={0: ("tcp://127.0.0.1:1", None), 1: (spelling, None)}))
    assert list(manager.status()) == ["a"]
    with pytest.raises(UnknownPodError):
        index.pod_state("b")
    manager.remove_pod("a")
    manager.add_pod(PodSource("b", endpoint=spelling))


@pytest.mark.parametrize(
    ("use", "endpoints"),
    [
        ("answers replays", ("tcp://127.0.0.1:2", "tcp://[0::1]:5558")),
        ("publishes", ("tcp://[0::1]:5558", "tcp://127.0.0.1:2")),
    ],
)
def test_a_replay_endpoint_has_one_name(index, manager, use, endpoints):
    manager.add_pod(PodSource("a", endpoint="tcp://127.0.0.1:1", replay_endpoint="tcp://[::1]:5558"))
    copied = PodSource("b", endpoint=endpoints[0], replay_endpoint=endpoints[1])
    with pytest.raises(StreamError, match=rf"rank 0 of pod 'b' {use} at .*:5558, which is followed as pod 'a' already"):
        manager.add_pod(copied)
    assert list(manager.status()) == ["a"]
    with pytest.raises(UnknownPodError):
        index.pod_state("b")
    manager.remove_pod("a")
    manager.add_pod(copied)


def test_a_pod_is_described_anew_and_its_streams_notice_nothing(index, manager, pod):
    pod.publish(2)
    told = []
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    manager.on_pods(told.append)
    described = source(pod, address="http://10.0.0.1:8000", labels={"role": "decode"})
    manager.describe_pod(described)
    manager.describe_pod(described)
    assert told == [PodsChange((described,), ())]
    assert manager.pods()["pod"].labels == {"role": "decode"}
    check_equal(index, pod)
    assert manager.status()["pod"].workers[0].reconnects == 0
    with pytest.raises(InvalidValueError, match="other streams"):
        manager.describe_pod(source(pod, model="another"))
    with pytest.raises(UnknownPodError):
        manager.describe_pod(replace(described, name="nobody"))


def test_a_pod_of_one_worker_says_what_its_worker_says(manager, pod):
    pod.publish(2)
    pod.publish_raw(b"\xc1")
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    status = manager.status()["pod"]
    (worker,) = status.workers.values()
    assert (worker.state, worker.errors) == ("degraded", {"undecodable": 1})
    shared = {each.name for each in fields(PodStatus)} - {"workers"}
    assert {name: getattr(status, name) for name in shared} == {name: getattr(worker, name) for name in shared}


def test_lag_is_of_live_batches(manager, pod):
    """The age of a history is no measure of this router."""
    with pod.lock:
        pod.count[0] += 1
        pod.publishers[0].publish(msgpack.packb([time.time() - 3600, [["AllBlocksCleared"]], 0]))
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    assert manager.status()["pod"].lag is None
    pod.publish(1)
    until(lambda: caught_up(manager, pod))
    assert -1 < manager.status()["pod"].lag < 60


def test_more_workers_than_libzmq_has_sockets_for_by_itself(index):
    """libzmq's own limit is 1,023 sockets, and a worker needs three."""
    with nothing_left_behind(), EventManager(index, policy=BRISK) as manager:
        ranks = {rank: (f"ipc:///nobody/{rank}", None) for rank in range(400)}
        manager.add_pod(PodSource("pod", ranks=ranks))
        until(
            lambda: all(worker.counters.get("failed_connects") for worker in manager.status()["pod"].workers.values())
        )
        assert not [w.reason for w in manager.status()["pod"].workers.values() if "descriptor" in w.reason]


def test_descriptors_that_run_out_are_named_with_what_would_do(tmp_path):
    """In a process of its own, because it has no descriptor left."""
    code = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from kvindex import EventManager, PodSource, PrefixIndex
with EventManager(PrefixIndex()) as manager:
    for number in range(40):
        manager.add_pod(PodSource(f"p{number}", endpoint=f"ipc:///nobody/{number}"))
    while True:
        reasons = [pod.reason for pod in manager.status().values()]
        if any("40 workers" in reason for reason in reasons):
            break
        time.sleep(0.01)
    print(max(reasons, key=lambda reason: "40 workers" in reason))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "no file descriptor is left: `ulimit -n` allows this process 64, and 40 workers need 192" in done.stdout
    assert done.returncode == 0


def test_what_the_index_held_of_a_pod_before_is_not_counted_twice(index, manager, pod):
    pod.publish(3)
    for _, payload in pod.publishers[0]._buffer:
        index.ingest("pod", payload, model="m")
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    assert index.worker_stats("pod")[0]["blocks"] == 3
    pod.publish_raw(msgpack.packb([time.time(), [["BlockRemoved", [1]]], 0]))
    until(lambda: caught_up(manager, pod))
    assert index.match_prefix(pod.block(0, 0), model="m").tokens == {}


def test_after_a_close_everything_is_stale_and_nothing_can_be_asked(index, pod):
    with nothing_left_behind():
        manager = EventManager(index, policy=BRISK)
        pod.publish(3)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        manager.close()
        manager.close()
    assert index.pod_state("pod") == "stale"
    assert manager.status()["pod"].state == "stale"
    assert index.match_prefix(pod.chain(), model="m")["pod"].state == "stale"
    for call in (lambda: manager.add_pod(source(pod)), lambda: manager.remove_pod("pod"), manager.start):
        with pytest.raises(StreamError, match="closed"):
            call()
    assert manager.wait_until_current(0.0) is False


def test_a_manager_that_is_left_without_a_close_is_a_warning_and_ends(index, pod):
    pod.publish(2)
    with nothing_left_behind():
        manager = EventManager(index, policy=BRISK)
        manager.add_pod(source(pod))
        assert manager.wait_until_exact(20.0) == {}
        with pytest.warns(ResourceWarning, match=r"unclosed EventManager\(.*, 1 pod\)"):
            del manager
        until(lambda: index.pod_state("pod") == "stale")


@pytest.mark.parametrize("index", [None, {}, "index", PrefixIndex], ids=["None", "dict", "str", "class"])
def test_a_manager_refuses_what_is_no_index(index):
    with pytest.raises(InvalidTypeError, match=f"not {type(index).__name__}"):
        EventManager(index)


def test_two_managers_of_one_index_do_not_follow_the_same_pod(index, manager, pod):
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_exact(20.0) == {}
    with EventManager(index, policy=BRISK) as other, EventManager(PrefixIndex(block_size=4), policy=BRISK) as apart:
        with pytest.raises(StreamError, match="'pod' of this index is followed by another EventManager"):
            other.add_pod(source(pod))
        check_equal(index, pod)
        assert manager.is_exact()
        apart.add_pod(source(pod))
        endpoint = other.bind("tcp://127.0.0.1:*")
        with LivePublisher(endpoint=endpoint, replay_endpoint=None, connect=True) as same:
            until(lambda: same.publish() or other.faults().get("followed_elsewhere"))
        assert manager.is_exact()
        manager.remove_pod("pod")
        other.add_pod(source(pod))
        assert other.wait_until_exact(20.0) == {}
        other.remove_pod("pod")
        other.close()
    manager.add_pod(source(pod))
    assert manager.wait_until_exact(20.0) == {}
    check_equal(index, pod)


def test_closing_a_manager_that_was_never_used(index):
    with nothing_left_behind():
        EventManager(index).close()


def test_a_manager_that_is_closed_ends_those_who_wait(index):
    manager = EventManager(index, policy=BRISK)
    manager.add_pod(PodSource("pod", endpoint="tcp://127.0.0.1:1"))
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(manager.wait_until_current()))
    thread.start()
    manager.close()
    thread.join(20.0)
    assert answers == [False]


# Callbacks


def test_changes_are_told_in_order_and_a_failing_callback_hurts_nobody(index, manager, pod, caplog):
    changes = []

    def bad(change):
        raise RuntimeError("not me")

    def nosy(change):
        with pytest.raises(StreamError):
            manager.wait_until_current(1.0)
        changes.append((change.pod, change.rank, change.old, change.new))

    manager.on_change(bad)
    end = manager.on_change(nosy)
    pod.publish(2)
    with caplog.at_level(logging.INFO, "kvindex.sync"):
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        pod.restart()
        pod.publish(1)
        until(lambda: manager.status()["pod"].restarts == 1 and caught_up(manager, pod))
        until(lambda: len(changes) >= 3)  # a state is set before its callback runs
    assert changes == [("pod", 0, "stale", "exact"), ("pod", 0, "exact", "stale"), ("pod", 0, "stale", "exact")]
    end()
    end()
    manager.remove_pod("pod")
    assert len(changes) == 3


def test_a_tap_sees_what_the_index_sees(index, manager, caplog):
    """A tap sees replayed, live and damaged batches and a restart in the index's order, despite other taps."""
    with LivePublisher(ranks=2) as pod:
        seen = []

        def fails(item):
            raise RuntimeError("not my day")

        manager.tap(fails)
        end = manager.tap(seen.append)
        pod.publish(3)
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        pod.publish(2, rank=1)
        pod.publish_raw(b"\xc1", rank=1)
        until(lambda: manager.status()["pod"].errors.get("undecodable"))
        pod.restart()
        pod.publish(1)
        until(lambda: caught_up(manager, pod) and manager.status()["pod"].workers[0].restarts == 1)
        end()
        end()
        pod.publish(1)
        until(lambda: caught_up(manager, pod))
    ours = [item for item in seen if isinstance(item, (Batch, Forgotten)) and item.rank == 0]
    assert [item.seq if isinstance(item, Batch) else "forgotten" for item in ours] == [0, 1, 2, "forgotten", 0]
    batches = [item for item in seen if isinstance(item, Batch)]
    assert {(item.pod, item.model, item.topic) for item in batches} == {("pod", "m", b"kv@pod@m")}
    assert [item.payload for item in batches if item.rank == 1].count(b"\xc1") >= 1
    copy = PrefixIndex(block_size=4)
    for item in ours:
        if isinstance(item, Batch):
            copy.ingest(item.pod, item.payload, model=item.model, dp_rank=item.rank)
        else:
            copy.clear_worker(item.pod, item.rank)
    chain = pod.block(0, 0)
    assert copy.match_prefix(chain, model="m").tokens == {"pod": len(chain)}
    assert "a callback for changes of the index has failed" in caplog.text


class Replica:
    """An index that gets only the changes that a tap of another index reports."""

    def __init__(self, manager: EventManager) -> None:
        self.index = PrefixIndex(block_size=4)
        self.kinds: list[str] = []
        manager.tap(self.take)

    def take(self, item: IndexChange) -> None:
        self.kinds.append(type(item).__name__)
        match item:
            case Configured(pod, options):
                self.index.configure_pod(pod, **options)
            case Batch():
                seq = item.seq if item.joined else None
                with suppress(EventDecodeError):
                    self.index.ingest(item.pod, item.payload, model=item.model, dp_rank=item.rank, seq=seq)
            case Forgotten(pod, rank):
                self.index.clear_worker(pod, rank)
            case Marked(pod, rank, state, _):
                self.index.mark_worker(pod, rank, state)
            case Removed(pod):
                self.index.remove_pod(pod)

    def check(self, index: PrefixIndex, *pods: LivePublisher) -> None:
        for pod in pods:
            assert self.index.stream_places(pod.name) == index.stream_places(pod.name)
            assert self.index.worker_stats(pod.name) == index.worker_stats(pod.name)
            for rank in range(len(pod.publishers)):
                assert matched(self.index, pod, rank) == matched(index, pod, rank)
        assert self.index.stats()["blocks"] == index.stats()["blocks"]


def test_the_changes_that_a_tap_is_shown_make_an_equal_index(index, manager):
    """Through a start beside old blocks, a restart, an invalid batch, a removal and a close."""
    index.ingest("pod", msgpack.packb([1.0, [["BlockStored", [7], None, [1, 2, 3, 4], 4]], 0]), model="m")
    replica = Replica(manager)
    replica.index.ingest("pod", msgpack.packb([1.0, [["BlockStored", [7], None, [1, 2, 3, 4], 4]], 0]), model="m")
    with LivePublisher(ranks=2) as pod, LivePublisher(name="other") as other:
        pod.publish(3)
        pod.publish(2, rank=1)
        other.publish(2)
        manager.add_pod(source(pod, presence="set"))
        manager.add_pod(source(other))
        assert manager.wait_until_current(20.0)
        replica.check(index, pod, other)
        assert index.match_prefix([1, 2, 3, 4], model="m").tokens == {}
        pod.restart()
        pod.publish_raw(b"\xc1")
        pod.publish(2)
        until(lambda: caught_up(manager, pod) and manager.status()["pod"].restarts > 0)
        replica.check(index, pod, other)
        assert replica.index.pod_state("pod") == index.pod_state("pod") == "degraded"
        manager.remove_pod("other")
        with pytest.raises(UnknownPodError):
            replica.index.pod_state("other")
        replica.check(index, pod)
        manager.close()
        replica.check(index, pod)
        assert replica.index.pod_state("pod") == "stale"
    assert set(replica.kinds) == {"Configured", "Batch", "Forgotten", "Marked", "Removed"}


def test_a_replica_of_a_stream_that_was_only_guessed_to_go_on_has_no_whole_place(index, manager):
    """Without a replay endpoint, the batches lost in a reconnect are unknown. A replica must not claim to have them."""
    with LivePublisher(replay_endpoint=None) as pod:
        replica = Replica(manager)
        manager.add_pod(source(pod))
        until(lambda: manager.status()["pod"].connected)
        until(lambda: pod.publish(1) or manager.status()["pod"].batches > 2)
        pod.drop_connections()
        until(lambda: manager.status()["pod"].workers[0].reconnects == 1)
        until(lambda: pod.publish(1) or (manager.status()["pod"].last_seq or 0) > 9)
        until(lambda: caught_up(manager, pod))
        replica.check(index, pod)
        assert not index.stream_places("pod")[0].whole


@pytest.mark.parametrize("kind", [Batch, Marked, Forgotten])
def test_nothing_of_a_pod_is_applied_that_a_tap_has_removed(index, pod, kind):
    with nothing_left_behind(), EventManager(index, policy=BRISK) as manager:
        index.ingest("pod", msgpack.packb([1.0, [["BlockStored", [7], None, [1, 2, 3, 4], 4]], 0]), model="m")
        removed = threading.Event()

        def remove(item):
            if isinstance(item, kind) and not removed.is_set() and "pod" in manager.status():
                manager.remove_pod(item.pod)
                removed.set()

        manager.tap(remove)
        pod.publish(9)
        manager.add_pod(source(pod))
        until(removed.is_set)
        pod.publish(9)
        manager.add_pod(source(pod, ranks={0: ("tcp://127.0.0.1:1", None)}))  # now the thread has had its turn
        manager.remove_pod("pod")
        assert manager.status() == {}
        assert index.stats()["blocks"] == 0
        with pytest.raises(UnknownPodError):
            index.pod_state("pod")


def test_a_tap_may_add_the_pod_anew_that_it_is_shown(index, manager, pod):
    begun = []

    def again(item):
        if isinstance(item, Batch) and len(begun) < 3:
            manager.remove_pod(item.pod)
            manager.add_pod(source(pod))
            begun.append(item.seq)  # last, because a thread that waits for it then needs the pod

    manager.tap(again)
    replica = Replica(manager)
    pod.publish(5)
    manager.add_pod(source(pod))
    until(lambda: len(begun) == 3 and caught_up(manager, pod))
    check_equal(index, pod)
    assert begun == [0, 0, 0]
    assert replica.kinds.count("Removed") == 3


def test_pods_that_a_callback_removes_give_their_turn_for_replays_back(index):
    """A pod that is removed while its replay is being decided would otherwise keep its turn forever."""
    with ExitStack() as stack:
        pods = [stack.enter_context(LivePublisher(name=f"p{number}")) for number in range(4)]
        manager = stack.enter_context(EventManager(index, policy=BRISK, max_replays=2))

        def remove(change):
            if change.old == "exact" and change.pod in manager.status():
                manager.remove_pod(change.pod)

        manager.on_change(remove)
        for pod in pods:
            pod.publish(1)
            manager.add_pod(source(pod))
            assert manager.wait_until_current(20.0, pods=pod.name)
            pod.publish(2)
            until(lambda pod=pod: caught_up(manager, pod))
            pod.restart_behind_a_proxy()
            pod.publish(1)
            until(lambda pod=pod: pod.name not in manager.status())
        until(lambda: index.stats()["blocks"] == 0)


def test_pods_that_come_and_go_are_told_and_looked_up(index, manager, pod):
    told = []

    def follow(change):
        told.append(change)
        if len(told) == 1:
            manager.remove_pod("pod")

    end = manager.on_pods(follow)
    manager.add_pod(source(pod))
    assert told == [PodsChange((source(pod),), ()), PodsChange((), ("pod",))]
    assert manager.pods() == {}
    manager.add_pod(source(pod))
    assert manager.pods() == {"pod": source(pod)}
    end()
    manager.remove_pod("pod")
    assert len(told) == 3


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_the_end_of_the_manager_is_a_change_of_every_worker(index, pod, how):
    changes = []
    manager = EventManager(index, policy=BRISK)
    pod.publish(2)
    manager.add_pod(source(pod))
    assert manager.wait_until_current(20.0)
    manager.on_change(changes.append)
    if how == "closed":
        manager.close()
        reason = "the manager is closed"
    else:
        manager.post(lambda: setattr(manager._loop, "_turn", None))
        reason = "its thread failed: TypeError(\"'NoneType' object is not callable\")"
        until(lambda: changes)
        manager.close()
    assert changes == [StateChange("pod", 0, "exact", "stale", reason)]
    assert manager.status()["pod"].reason == reason


def test_a_callback_may_remove_the_pod_it_is_told_of(index, manager, pod):
    removed = threading.Event()

    def remove(change):
        manager.remove_pod(change.pod)
        removed.set()  # its status disappears a moment before its blocks

    manager.on_change(remove)
    pod.publish(3)
    manager.add_pod(source(pod))
    until(removed.is_set)
    assert "pod" not in manager.status()
    with pytest.raises(UnknownPodError):
        index.pod_state("pod")


def test_a_line_in_the_log_is_an_incident_and_never_a_batch(index, manager, pod, caplog):
    with caplog.at_level(logging.DEBUG, "kvindex.sync"):
        manager.add_pod(source(pod))
        assert manager.wait_until_current(20.0)
        quiet = len(caplog.records)
        pod.publish(500)
        until(lambda: caught_up(manager, pod))
        assert len(caplog.records) == quiet
        pod.faults.bad_frames = 300
        pod.publish(301)
        until(lambda: manager.status()["pod"].errors.get("bad_seq_size") == 300)
        until(lambda: caught_up(manager, pod))
        assert len(caplog.records) - quiet < 40


def test_losses_are_warnings_and_recoveries_and_ends_are_not(manager, pod, caplog):
    def levels(text):
        return {record.levelno for record in caplog.records if text in record.getMessage()}

    with caplog.at_level(logging.INFO, "kvindex.sync"), LivePublisher(name="other") as other:
        manager.add_pod(source(pod))
        manager.add_pod(source(other))
        assert manager.wait_until_exact(20.0) == {}
        # The state is set before it is logged.
        until(lambda: levels("[0]: exact, was stale") == {logging.INFO})
        pod.close()
        until(lambda: levels("pod[0]: stale, was exact") == {logging.WARNING})
        manager.close()
        until(lambda: levels("other[0]: stale, was exact") == {logging.INFO})


# Bound endpoints


def connected_publisher(endpoint: str, topic: str, **options) -> LivePublisher:
    return LivePublisher(endpoint=endpoint, topic=topic, connect=True, **options)


def hear(pod: LivePublisher, manager: EventManager, name: str) -> None:
    """Publish until the new subscriber receives a batch: batches before its subscription are lost."""
    until(
        lambda: pod.publish(1) or (name in manager.status() and manager.status()[name].batches > 0) or time.sleep(0.02)
    )


def test_many_pods_connect_to_one_endpoint(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*")
    with (
        connected_publisher(endpoint, "kv@10.0.0.1@m", name="10.0.0.1", replay_endpoint=None) as one,
        connected_publisher(endpoint, "kv@10.0.0.10@m", name="10.0.0.10", replay_endpoint=None) as ten,
    ):
        hear(one, manager, "10.0.0.1")
        hear(ten, manager, "10.0.0.10")
        for pod in (one, ten):
            pod.publish(1, clear=True)
            pod.publish(3)
            until(lambda pod=pod: caught_up(manager, pod))
            check_equal(index, pod)
            assert index.pod_state(pod.name) == "exact"
        assert manager.status()["10.0.0.1"].model == "m"
    until(lambda: manager.status()["10.0.0.1"].state == "stale")


def test_ranks_share_a_topic_and_count_each_for_itself(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*")
    with connected_publisher(endpoint, "kv@pod@m", ranks=2, replay_endpoint=None) as pod:
        hear(pod, manager, "pod")
        until(lambda: pod.publish(1, rank=1) or 1 in manager.status()["pod"].workers)
        for rank in range(2):
            pod.publish(1, rank=rank, clear=True)
            pod.publish(2 + rank, rank=rank)
        until(lambda: caught_up(manager, pod))
        check_equal(index, pod)
        assert manager.status()["pod"].restarts == 0


def test_a_declared_pod_may_have_a_replay_endpoint(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*")
    with connected_publisher(endpoint, "kv@pod@m") as pod:
        pod.publish(3)
        manager.add_pod(PodSource("pod", replay_endpoint=pod.publishers[0].replay_endpoint, model="m"))
        hear(pod, manager, "pod")
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)
        pod.restart()
        until(lambda: pod.publish(1) or manager.status()["pod"].restarts == 1)
        until(lambda: caught_up(manager, pod) and index.pod_state("pod") == "exact")
        check_equal(index, pod)


def test_a_later_connection_takes_a_stream_over_and_is_not_exact_while_the_earlier_one_speaks_too(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*")
    with connected_publisher(endpoint, "kv@pod@m", replay_endpoint=None) as old:
        hear(old, manager, "pod")
        with connected_publisher(endpoint, "kv@pod@m", replay_endpoint=None) as new:
            new.life = 1  # with blocks of its own

            def both_speak() -> bool:
                new.publish(1)
                old.publish(1)
                time.sleep(0.002)
                return manager.status()["pod"].errors.get("late_frames", 0) > 2

            until(both_speak)
            new.publish(1, clear=True)
            new.publish(3)
            until(lambda: caught_up(manager, new))
            status = manager.status()["pod"]
            assert status.state == index.pod_state("pod") == "degraded"
            assert "two publishers send as topic b'kv@pod@m', rank 0" in status.reason
            old.close()
            until(lambda: index.pod_state("pod") == "exact")
            check_equal(index, new)
            assert index.worker_stats("pod")[0]["blocks"] == 3
            assert index.match_prefix(old.chain(), model="m").tokens == {}


def test_a_topic_is_one_pods(manager):
    manager.bind("tcp://127.0.0.1:*")
    manager.add_pod(PodSource("a", topic="kv"))
    with pytest.raises(StreamError, match="'kv' belongs to pod 'a' already"):
        manager.add_pod(PodSource("b", topic="kv"))
    assert set(manager.status()) == {"a"}


def test_what_belongs_to_nobody_is_counted_at_a_bound_endpoint(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*", max_pods=1)
    context = zmq.Context()
    sock = context.socket(zmq.PUB)
    sock.linger = 0
    sock.connect(endpoint)
    payload = msgpack.packb([time.time(), [], 0])
    seq = (0).to_bytes(8, "big")
    try:
        for frames, reason in [
            ([b"\xff\xfegarbage", seq, payload], "bad_topic"),
            ([b"", seq, payload], "bad_topic"),
            ([b"kv@pod@m", seq[1:], payload], "bad_seq_size"),
            ([b"kv@pod@m", seq], "bad_frame_count"),
        ]:
            until(lambda f=frames, r=reason: sock.send_multipart(f) or manager.faults().get(r, 0) or time.sleep(0.01))
        assert manager.status() == {}
        until(lambda: sock.send_multipart([b"kv@pod@m", seq, payload]) or "pod" in manager.status())
        for topic, reason in [(b"kv@two@m", "too_many_pods"), (b"kv@pod@other", "foreign_topic")]:
            until(lambda t=topic, r=reason: sock.send_multipart([t, seq, payload]) or manager.faults().get(r, 0))
        rank = msgpack.packb([time.time(), [], 5000])
        until(lambda: sock.send_multipart([b"kv@pod@m", seq, rank]) or manager.faults().get("bad_rank", 0))
        manager.remove_pod("pod")
        until(lambda: sock.send_multipart([b"kv@pod@m", seq, payload]) or manager.faults().get("removed_pod", 0))
        assert manager.status() == {}
        with pytest.raises(UnknownPodError):
            index.pod_state("pod")
    finally:
        sock.close(0)
        context.term()


def test_an_endpoint_that_can_not_be_bound(manager):
    taken = manager.bind("tcp://127.0.0.1:*")
    with pytest.raises(StreamError, match="cannot be bound"):
        manager.bind(taken)
    with pytest.raises(InvalidValueError):
        manager.bind("http://127.0.0.1:5557")


def test_a_connection_that_brings_nothing_of_what_is_published_is_replaced(index, pod):
    policy = replace(BRISK, renew=(0.3, 5.0))
    with nothing_left_behind(), EventManager(index, policy=policy) as manager:
        pod.publish(3)
        manager.add_pod(source(pod))
        until(lambda: index.pod_state(pod.name) == "exact")
        pod.faults.mute = True

        def replaced():
            pod.publish(1)
            time.sleep(0.05)
            return manager.status()[pod.name].workers[0].reconnects

        until(replaced)
        pod.faults.mute = False

        def exact():
            pod.publish(1)
            time.sleep(0.05)
            return index.pod_state(pod.name) == "exact"

        until(exact)
        assert index.match_prefix(pod.chain(), model="m").tokens == {pod.name: len(pod.chain())}

"""Every recorded exchange with the real publishers of six releases, frame by frame.

``transport.json`` contains a subscriber's live frames, those after a batch that the engine could not encode and after a
restart, and the replays from several starts. Here, the same frames go through the parsers, the stream machine and the
sockets, and the simulated publisher has to produce them byte for byte.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import zmq
from sync_support import World, batch, until

from kvindex import PrefixIndex
from kvindex.sim.publisher import Publisher, topic_in_replay
from kvindex.sync.actions import Clear, Ingest, RequestReplay
from kvindex.sync.frames import END, FrameFault, batch_rank, batch_time, parse_live, parse_replay, parse_topic
from kvindex.sync.manager import EventManager
from kvindex.sync.policy import StreamPolicy
from kvindex.sync.source import PodSource
from kvindex.sync.stream import WorkerStream

NAMES = ["vllm-0.9.0", "vllm-0.23.0", "vllm-0.26.0", "vllm-0.33.0", "sglang-0.5.21", "sglang-0.5.23"]


def raw(frames: list[str]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in frames]


@pytest.fixture(params=NAMES)
def recorded(request: pytest.FixtureRequest, shared: Path) -> dict:
    table = json.loads((shared / "wire" / "transport.json").read_text())
    assert {f"{item['engine']}-{item['version']}" for item in table} == set(NAMES)
    return next(item for item in table if f"{item['engine']}-{item['version']}" == request.param)


def live(recorded: dict, what: str = "live") -> list:
    return [parse_live(raw(frames)) for frames in recorded[what]]


def answer(recorded: dict, start: int) -> list:
    return [
        parse_replay(raw(frames)) for each in recorded["replay"] if each["start"] == start for frames in each["frames"]
    ]


def test_live_messages(recorded):
    messages = live(recorded)
    assert [message.seq for message in messages] == [0, 1, 2, 3, 4, 5]
    assert {parse_topic(message.topic) for message in messages} == {("10.0.0.1", "m")}
    assert [batch_time(message.payload) for message in messages] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert {batch_rank(message.payload) for message in messages} == {recorded["dp_rank"]}
    assert [message.seq for message in live(recorded, "live_after_unencodable_batch")] == [7]


def test_replays_in_both_framings(recorded):
    assert [reply.seq for reply in answer(recorded, 0)] == [3, 4, 5, 7, -1]
    assert [reply.seq for reply in answer(recorded, 6)] == [7, -1]
    assert answer(recorded, 1000) == [END]
    assert [reply.seq for reply in answer(recorded, 5)] == [5, 7, -1]
    with_topic = topic_in_replay(f"{recorded['engine']}-{recorded['version']}")
    assert all((reply.topic is not None) == with_topic for reply in answer(recorded, 0)[:-1])
    payloads = {message.seq: message.payload for message in live(recorded)}
    assert all(reply.payload == payloads[reply.seq] for reply in answer(recorded, 0) if reply.seq in payloads)


def test_what_a_req_socket_gets_is_no_replay(recorded):
    # A REQ socket strips the empty frame and takes a single reply. Without that frame, the engines ignore a request.
    with pytest.raises(FrameFault):
        parse_replay(raw(recorded["req_client_first"][0]))
    assert recorded["req_client_rest"] == []
    assert recorded["no_delimiter_reply"] == []


def drive(stream: WorkerStream, recorded: dict, actions: list, now: float) -> list:
    """Answer every request of the stream with the recorded answer of the real publisher."""
    done = []
    todo = list(actions)
    while todo:
        action = todo.pop(0)
        done.append(action)
        if isinstance(action, RequestReplay):
            stream.replay_sent(now)
            replies = answer(recorded, action.start)
            assert replies, f"nobody recorded a replay from {action.start}"
            for reply in replies:
                todo += stream.replay_ended(now) if reply is END else stream.replayed(reply.seq, reply.payload, now)
                if any(isinstance(each, RequestReplay) for each in todo) or not stream.replaying:
                    break
    return done


def test_a_batch_that_could_not_be_encoded_is_a_hole_that_no_replay_fills(recorded):
    stream = WorkerStream(replay=True, uniform=lambda: 0.0)
    done = stream.connected(0.0)
    for message in live(recorded):
        done += stream.live(message.seq, message.payload, 1.0)
    stream.replay_ended(1.0)
    assert stream.state == "exact"
    (message,) = live(recorded, "live_after_unencodable_batch")
    done = drive(stream, recorded, stream.live(message.seq, message.payload, 2.0), 2.0)
    assert stream.state == "stale"
    done += drive(stream, recorded, stream.tick(3.0), 3.0)
    assert [action.start for action in done if isinstance(action, RequestReplay)] == [5, 5]
    assert [action.seq for action in done if isinstance(action, Ingest)] == [7]
    assert stream.state == "degraded"
    assert stream.counts["lost_batches"] == 1


def test_a_late_subscriber_takes_what_the_buffer_still_has(recorded):
    stream = WorkerStream(replay=True, uniform=lambda: 0.0)
    done = drive(stream, recorded, stream.connected(0.0), 0.0)
    assert [action.start for action in done if isinstance(action, RequestReplay)] == [0]
    # At the second attempt the first batches are given up. The hole at 6 needs two requests as well, from batch 5 on.
    done += drive(stream, recorded, stream.tick(1.0), 1.0)
    done += drive(stream, recorded, stream.tick(2.0), 2.0)
    assert [action.seq for action in done if isinstance(action, Ingest)] == [3, 4, 5, 7]
    assert stream.state == "degraded"
    assert stream.counts["lost_batches"] == 4


def test_after_a_restart_what_was_there_is_cleared(recorded):
    stream = WorkerStream(replay=False)
    stream.connected(0.0)
    for message in live(recorded):
        stream.live(message.seq, message.payload, 1.0)
    assert stream.state == "exact"
    stream.disconnected(2.0)
    stream.connected(3.0)
    done = []
    for message in live(recorded, "after_restart"):
        done += stream.live(message.seq, message.payload, 4.0)
    assert recorded["restart_published"] == 4  # after its socket came back, the subscriber has received 1, 2 and 3
    assert sum(isinstance(action, Clear) for action in done) == 1
    assert [action.seq for action in done if isinstance(action, Ingest)] == [1, 2, 3]
    assert stream.state == "degraded"
    assert (stream.counts["restarts"], stream.counts["lost_batches"]) == (1, 1)


def test_after_a_restart_the_replay_brings_what_was_missed(recorded):
    world = World()
    world.connect()
    for message in live(recorded):
        world.process.publish(message.payload)
        world.do(world.stream.live(message.seq, message.payload, world.now))
    assert world.state == "exact"
    world.restart()
    world.process.publish(batch(51.0, "the one that nobody saw live"))
    for message in live(recorded, "after_restart"):
        world.process.publish(message.payload)
    world.connect()
    for message in live(recorded, "after_restart"):
        world.do(world.stream.live(message.seq, message.payload, world.now))
    world.wait(1.0)
    assert world.state == "exact"
    assert world.held == world.process.published
    assert world.stream.counts["restarts"] == 1


def test_the_simulated_publisher_writes_the_same_frames(recorded):
    """Live, replayed from every start, and after the hole: equal to the recording, byte for byte."""
    with_topic = topic_in_replay(f"{recorded['engine']}-{recorded['version']}")
    context = zmq.Context()
    publisher = Publisher(
        context, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@10.0.0.1@m", buffer_steps=4, with_topic=with_topic
    )
    subscriber = context.socket(zmq.SUB)
    subscriber.linger = 0
    subscriber.subscribe(b"")
    try:
        subscriber.connect(publisher.endpoint)
        # Messages before the subscription are lost, and the publisher gets no sign of its arrival.
        until(lambda: publisher.send_raw([b"heard?"]) or subscriber.poll(5))
        messages = live(recorded)
        for message in messages:
            publisher.publish(message.payload)
        publisher.faults.unencodable = 1
        publisher.publish(b"nothing")
        after = live(recorded, "live_after_unencodable_batch")
        publisher.publish(after[0].payload)
        seen: list[list[bytes]] = []
        while len(seen) < len(messages) + 1:
            assert subscriber.poll(5000)
            seen += [frames for frames in [subscriber.recv_multipart()] if frames != [b"heard?"]]
        assert seen == [raw(frames) for frames in recorded["live"] + recorded["live_after_unencodable_batch"]]
        for each in recorded["replay"]:
            size = 2 if "2-byte" in each["label"] else 8
            asked = replies_to(context, publisher, [b"", each["start"].to_bytes(size, "big")])
            assert asked == [raw(frames) for frames in each["frames"]], each["label"]
        assert replies_to(context, publisher, [(0).to_bytes(8, "big")], patience=200) == []
    finally:
        subscriber.close(0)
        publisher.close()
        context.term()


def replies_to(
    context: zmq.Context, publisher: Publisher, request: list[bytes], patience: int = 5000
) -> list[list[bytes]]:
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    found: list[list[bytes]] = []
    try:
        dealer.connect(publisher.replay_endpoint)
        dealer.send_multipart(request)
        end = time.monotonic() + patience / 1000
        while time.monotonic() < end and not (found and found[-1][-1] == b""):
            publisher.serve()
            if dealer.poll(5):
                found.append(dealer.recv_multipart())
    finally:
        dealer.close(0)
    return found


def test_the_whole_recording_over_sockets(recorded):
    """A publisher repeats the recording, and the index must end with every available batch."""
    context = zmq.Context()
    publisher = Publisher(
        context, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@10.0.0.1@m", buffer_steps=4,
        with_topic=topic_in_replay(f"{recorded['engine']}-{recorded['version']}"),
    )  # fmt: skip
    index = PrefixIndex(block_size=1)
    rank = recorded["dp_rank"]
    try:
        for message in live(recorded):
            publisher.publish(message.payload)
        with EventManager(index, policy=StreamPolicy(reconnect=(0.05, 0.2), idle_probe=(0.2, 1.0))) as manager:
            ranks = {rank: (publisher.endpoint, publisher.replay_endpoint)}
            manager.add_pod(PodSource("pod", ranks=ranks, model="m", topic="kv@10.0.0.1@m"))
            serve_until(publisher, lambda: manager.is_current())
            status = manager.status()["pod"]
            # Two of six batches left the buffer before the connection. No recorded block has a parent, so the rest is
            # placed.
            assert (status.state, status.last_seq, status.lost_batches, status.blocks) == ("degraded", 5, 2, 4)
            publisher.faults.unencodable = 1
            publisher.publish(b"nothing")
            publisher.publish(live(recorded, "live_after_unencodable_batch")[0].payload)
            serve_until(publisher, lambda: manager.status()["pod"].last_seq == 7)
            status = manager.status()["pod"]
            assert (status.state, status.lost_batches, status.blocks, status.errors) == ("degraded", 3, 5, {})
            assert set(index.worker_stats("pod")) == {rank}
            publisher.restart()
            publisher.publish(batch(51.0, "x", clear=True, rank=rank))
            for message in live(recorded, "after_restart"):
                publisher.publish(message.payload)
            serve_until(publisher, lambda: manager.status()["pod"].restarts == 1 and manager.is_current())
            status = manager.status()["pod"]
            assert (status.state, status.last_seq, status.blocks) == ("exact", 3, 3)
            tokens = [
                token for message in live(recorded, "after_restart")[:1] for token in first_tokens(message.payload)
            ]
            assert index.match_prefix(tokens, model="m").tokens == {"pod": 1}
            index._check()
    finally:
        publisher.close()
        context.term()


def serve_until(publisher: Publisher, done) -> None:
    def served() -> bool:
        publisher.serve()
        return done()

    until(served)


def first_tokens(payload: bytes) -> list[int]:
    from kvindex import decode_batch

    return list(decode_batch(payload).events[0].token_ids)

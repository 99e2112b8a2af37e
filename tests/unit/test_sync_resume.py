"""Streams that continue from the saved place of another stream, with a save and a load in between."""

from __future__ import annotations

import pytest
import xxhash
from sync_support import Router, batch

from kvindex.answers import StreamPlace
from kvindex.sync.actions import Ingest
from kvindex.sync.stream import WorkerStream


def well(published: int = 5, **options) -> Router:
    """Return a router that was current at its end."""
    world = Router(**options)
    world.publish(published)
    world.up()
    assert world.state == "exact"
    world.requests.clear()
    return world


def test_only_the_rest_is_replayed():
    world = well(100)
    world.restart_router()
    world.publish(7)
    world.connect()
    assert world.requests == [99]
    assert world.state == "stale"
    world.serve()
    world.receive()
    world.wait(0.5, serve=False)
    assert world.state == "exact"
    assert world.held == world.process.truth(107)
    assert (world.stream.counts["batches"], world.stream.counts["resumed"], world.clears) == (7, 1, 0)


@pytest.mark.parametrize("after", [1, 4])
def test_a_guess_about_the_process_does_not_become_one_stream_in_a_snapshot(after):
    """The engine restarted while no replay was answered, and its next number was mistaken for the old process's."""
    world = well(3)
    world.restart()
    world.connect()
    world.publish(3)
    world.channel.clear()
    world.publish(after)
    world.deliver()
    world.wait(15.0, serve=False)
    assert world.state == "degraded"
    assert world.applied_upto() == 3 + after
    assert not any(place.whole for place in world.index.stream_places("pod").values())
    world.restart_router()
    world.connect()
    for _ in range(60):
        world.wait(0.5)
        world.check()
    assert world.state == "exact"
    assert world.held == world.process.truth(3 + after)


def test_nothing_was_missed():
    world = well()
    world.restart_router()
    world.up()
    assert world.state == "exact"
    assert (world.stream.counts["batches"], world.clears) == (0, 0)
    world.publish(2)
    world.deliver()
    assert world.held == world.process.truth(7)


def test_live_batches_wait_until_it_is_shown_where_they_belong():
    world = well()
    world.restart_router()
    world.publish(2)
    world.connect()
    world.publish(2)
    world.deliver()
    assert world.held == world.process.truth(5)
    world.serve()
    world.receive()
    assert world.held == world.process.truth(9)
    assert (world.state, world.clears) == ("exact", 0)


@pytest.mark.parametrize("published", [0, 3, 4, 5, 6, 50])
def test_another_process_is_built_from_its_beginning(published):
    world = well()
    world.restart_router()
    world.restart()
    world.publish(published)
    world.up()
    assert world.requests[:2] == [4, 0]
    assert world.clears == 1
    assert world.held == world.process.truth(published)
    assert world.state == "exact"


def test_an_answer_that_no_longer_has_the_last_batch_is_no_proof():
    world = well(10, buffer_steps=20)
    world.restart_router()
    world.publish(30)
    world.connect()
    world.wait(1.0)
    assert world.clears == 1
    assert world.held == [payload for _, payload in world.process.buffer]
    assert world.state == "degraded"


def test_what_was_lost_before_is_lost_still_until_the_history_can_be_had():
    world = Router(buffer_steps=4)
    world.publish(10)
    world.up()
    assert world.state == "degraded"
    world.restart_router()
    world.publish(2)
    world.connect()
    world.wait(0.2)
    assert world.state == "degraded"
    assert world.clears == 0
    world.publish(1, clear=True)
    world.deliver()
    assert world.state == "exact"
    world.restart_router()
    world.connect()
    world.wait(0.2)
    assert world.state == "exact"


def test_a_clear_worker_in_between_leaves_nothing_to_go_on_from():
    world = well()
    world.index.clear_worker("pod")
    world.restart_router()
    world.up()
    assert world.requests[0] == 0
    assert world.held == world.process.truth(5)


def test_without_an_answer_nothing_is_taken_on_trust():
    world = well()
    world.restart_router()
    world.publish(1)
    world.connect()
    world.wait(20.0, serve=False)
    assert world.state == "stale"
    world.publish(1)
    world.deliver()
    world.wait(20.0, serve=False)
    assert world.clears == 1
    assert world.state == "degraded"
    world.wait(60.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(7)


def test_a_lost_connection_asks_from_the_same_batch_again():
    world = well(20)
    world.restart_router()
    world.connect()
    world.disconnect()
    world.connect()
    assert world.requests == [19, 19]
    world.serve()
    world.receive()
    assert world.state == "exact"
    world.disconnect()
    world.publish(1)
    world.connect()
    # From here on it is verified like any other stream, by all the batches in its memory.
    assert world.requests[2:] == [0]


def test_equal_bytes_under_another_number_prove_nothing():
    payload = batch(1.0, "x")
    place = StreamPlace(3, 1.0, xxhash.xxh3_64_intdigest(payload), True, "")
    stream = WorkerStream(replay=True, place=place)
    assert stream.last_seq == 3
    stream.connected(0.0)
    stream.replay_sent(0.0)
    done = stream.replayed(5, payload, 0.1)
    assert not any(isinstance(action, Ingest) for action in done)
    assert stream.state == "stale"

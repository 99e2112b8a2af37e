"""Every path of the pure stream machine, one by one, with the time under the control of the test."""

from __future__ import annotations

from itertools import pairwise

import pytest
from sync_support import GARBAGE, Process, World, batch

from kvindex.sync.actions import Incident
from kvindex.sync.policy import StreamPolicy
from kvindex.sync.stream import WorkerStream


def counts(world: World) -> dict[str, int]:
    return {name: count for name, count in world.stream.counts.items() if count}


def kinds(world: World) -> list[str]:
    return [incident.kind for incident in world.incidents]


def well(published: int = 3, **options) -> World:
    """Return a stream at its best: its last batch has arrived both live and by a replay."""
    world = World(**options)
    both_ways = min(1, published) if options.get("replay", True) else 0
    world.publish(published - both_ways)
    world.connect()
    world.publish(both_ways)
    if options.get("replay", True):
        world.serve()
        world.deliver()
        world.receive()
    assert world.stream.last_seq == (published - 1 if published and options.get("replay", True) else None)
    return world


# Start


def test_before_anything_happens_it_is_stale():
    world = World()
    assert (world.state, world.stream.reason) == ("stale", "not connected yet")
    assert world.stream.deadline() is None


def test_the_start_replays_from_0_while_live_batches_wait():
    world = World()
    world.publish(3)
    world.connect()
    assert world.requests == [0]
    world.publish(2)
    world.deliver()
    assert world.held == []
    assert world.state == "stale"
    assert world.stream.waiting == 2
    world.serve()
    world.receive()
    assert world.held == world.process.truth(5)
    assert world.state == "exact"
    assert world.clears == 0


def test_an_engine_that_has_published_nothing_is_exact_once_it_is_silent():
    world = World()
    world.connect()
    assert world.state == "stale"
    world.serve()
    world.receive()
    assert world.state == "stale"
    world.wait(world.stream.policy.silence)
    assert world.state == "exact"
    assert world.stream.last_seq is None


def test_a_stream_seen_from_its_first_batch_needs_no_answer():
    world = World()
    world.connect()
    world.publish(2)
    world.deliver()
    assert world.state == "exact"
    assert world.held == world.process.truth(2)


def test_a_cut_head_is_asked_for_once_more_and_then_accepted():
    world = World(buffer_steps=4)
    world.publish(10)
    world.connect()
    world.wait(1.0)
    assert world.requests[:2] == [0, 0]
    assert world.held == [payload for _, payload in world.process.buffer]
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 6
    assert world.stream.counts["heads_cut"] == 1
    assert world.stream.counts["gaps"] == 0


def test_without_a_replay_the_first_batch_decides():
    world = World(replay=False)
    world.connect()
    assert world.state == "degraded"
    world.publish(1)
    world.deliver()
    assert world.state == "exact"


def test_without_a_replay_a_late_start_is_degraded_for_good():
    world = World(replay=False)
    world.publish(5)
    world.connect()
    world.publish(2)
    world.deliver()
    world.wait(100.0)
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 5
    assert world.requests == []


def test_a_start_that_nobody_answers_is_degraded_until_somebody_does():
    world = World()
    world.publish(3)
    world.connect()
    world.wait(10.0, serve=False)
    assert world.state == "degraded"
    assert world.stream.counts["replays_failed"] == 1
    assert "replay_failed" in kinds(world)
    world.wait(20.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(3)


# Order, duplicates, gaps


def test_a_gap_is_replayed_from_the_last_known_batch_and_nothing_is_applied_twice():
    world = well()
    world.publish(2)
    world.channel.clear()
    world.publish(2)
    world.deliver()
    assert world.state == "stale"
    assert world.requests[-1] == 2
    assert len(world.held) == 3
    world.serve()
    world.receive()
    assert world.state == "exact"
    assert world.held == world.process.truth(7)
    assert (world.stream.counts["gaps"], world.stream.counts["gaps_healed"]) == (1, 1)
    assert world.stream.counts["lost_batches"] == 0
    assert kinds(world) == ["gap", "gap_healed"]


def test_a_gap_that_a_late_batch_fills_needs_no_replay():
    world = well()
    world.publish(2)
    world.channel.rotate(1)
    world.deliver()
    assert world.state == "exact"
    assert world.held == world.process.truth(5)
    assert world.request is None


def test_a_gap_without_a_replay_is_accepted_at_once():
    world = well(0, replay=False)
    world.publish(2)
    world.deliver()
    world.publish(3)
    world.channel.clear()
    world.publish(1)
    world.deliver()
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 3
    assert world.stream.last_seq == 5


def test_a_hole_that_the_publisher_has_itself_is_accepted_at_the_second_answer():
    world = well()
    world.publish(encodable=False)
    world.publish(2)
    world.deliver()
    asked = len(world.requests)
    world.wait(1.0)
    assert world.requests[asked - 1 : asked + 1] == [2, 2]
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 1
    assert world.held == [payload for payload in world.process.published if payload is not None]


def test_a_hole_that_nobody_answers_for_is_accepted_after_three_tries_with_pauses_between():
    world = well()
    world.publish(1)
    world.channel.clear()
    world.publish(1)
    world.deliver()
    before, start = len(world.requests), world.now
    asked = [start]
    while world.state == "stale":
        known = len(world.requests)
        world.wait(0.01, serve=False)
        if len(world.requests) > known:
            asked.append(world.now)
        assert world.now < start + 60
    assert world.requests[before:] == [2, 2]
    assert len(asked) == 3
    pauses = [later - sooner - 2.0 for sooner, later in pairwise(asked)]
    assert 0 < pauses[0] < pauses[1]
    assert world.state == "degraded"
    assert world.stream.counts["gaps_accepted"] == 1
    assert len(world.held) == 4


def test_a_batch_that_comes_after_its_hole_was_accepted_is_too_late():
    world = well(1, replay=False)
    world.publish(3)
    first = world.channel.popleft()
    world.deliver()
    assert world.stream.counts["lost_batches"] == 2  # batch 0 was before the connection
    held = list(world.held)
    world.channel.append(first)
    world.deliver()
    assert world.held == held
    assert world.stream.counts["late"] == 1
    assert world.clears == 0


def test_a_batch_that_is_late_behind_one_that_says_no_time_is_no_restart():
    world = well(1, replay=False)
    world.publish(1)
    world.deliver()
    assert world.state == "degraded"
    world.publish(1, clear=True)
    world.deliver()
    assert world.state == "exact"
    world.publish(1, clear=True)
    world.publish(1, readable=False)
    world.publish(1, clear=True)
    late = world.channel.popleft()
    world.channel.insert(1, late)
    world.deliver(2)
    assert (world.stream.counts["late"], world.stream.counts["restarts"], world.clears) == (1, 0, 0)
    assert world.state == "degraded"
    world.deliver()
    assert world.state == "exact"
    world.check()


def test_duplicates_are_dropped_and_are_no_restart():
    world = well()
    world.publish(2)
    world.channel.extend(list(world.channel))
    world.channel.append((0, world.process.published[0]))
    world.deliver()
    assert world.held == world.process.truth(5)
    assert world.stream.counts["duplicates"] == 3
    assert world.stream.counts["restarts"] == 0


def test_what_waits_is_bounded_in_number_and_comes_again_by_replay():
    world = well(policy=StreamPolicy(max_pending=3))
    world.publish(1)
    world.channel.clear()
    world.publish(10)
    world.deliver()
    assert world.stream.waiting == 3
    assert world.stream.counts["overflow"] == 7
    world.wait(1.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(14)


def test_thousands_of_holes_are_given_up_one_by_one_and_nothing_else_is():
    world = well()
    world.publish(10_000)
    sent = world.channel.copy()
    world.channel.clear()
    world.channel.extend(message for message in sent if message[0] % 2 == 0)
    world.deliver()
    assert world.stream.waiting == 5000
    world.wait(10.0, serve=False)
    assert world.state == "degraded"
    assert world.stream.waiting == 0
    assert world.held == [payload for seq, payload in enumerate(world.process.published) if seq < 3 or seq % 2 == 0]
    assert counts(world)["lost_batches"] == counts(world)["gaps_accepted"] == 5000


def test_what_waits_is_bounded_in_bytes():
    world = well(policy=StreamPolicy(max_pending_bytes=100))
    world.publish(1)
    world.channel.clear()
    world.publish(10)
    world.deliver()
    assert 0 < world.stream.waiting < 10
    world.wait(1.0)
    assert world.held == world.process.truth(14)


def test_a_sequence_number_from_nowhere_is_damage_and_not_a_gap():
    world = well()
    world.do(world.stream.live(1 << 50, batch(world.clock, "x"), world.now))
    assert world.stream.counts["bad_seq_jump"] == 1
    assert world.stream.counts["gaps"] == 0
    world.wait(20.0)
    assert world.state == "exact"


# Replays


def without_an_end_marker(world: World, seconds: float, **cut) -> set[str | None]:
    """Let time pass while no answer has an end marker. Returns the states meanwhile."""
    states = {world.state}
    until = world.now + seconds
    while world.now < until:
        world.serve(end=False, **cut)
        world.receive()
        world.wait(0.1, serve=False)
        states.add(world.state)
    return states


def test_a_missing_end_marker_costs_no_batch_and_is_made_up_for_by_the_next_live_one():
    world = World()
    world.publish(3)
    world.connect()
    assert without_an_end_marker(world, 2.0) == {"stale", "degraded"}
    assert "end marker" in world.stream.reason
    assert world.held == world.process.truth(3)
    assert world.stream.counts["lost_batches"] == 0
    world.publish()
    world.deliver()
    world.wait(0.1)
    assert world.state == "exact"
    assert world.held == world.process.truth(4)


def test_an_answer_that_is_cut_at_the_same_place_again_is_not_taken_for_whole():
    world = World()
    world.publish(3)
    world.connect()
    assert world.owed == 2
    assert without_an_end_marker(world, 20.0, upto=1) == {"stale", "degraded"}
    assert world.applied_upto() == 1
    # It asks ever more rarely, but twice each time, since it has to ask for the rest of a cut answer.
    assert len(world.requests) <= 2 * 7
    world.wait(40.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(3)


def test_an_end_marker_that_comes_in_the_end_is_enough():
    world = World()
    world.publish(3)
    world.connect()
    assert without_an_end_marker(world, 1.7) == {"stale", "degraded"}
    world.wait(2.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(3)
    assert world.clears == 0


def test_a_reconnect_that_is_answered_without_an_end_marker_is_not_taken_for_all_that_was_missed():
    world = well()
    world.disconnect()
    world.publish(3)
    world.connect()
    world.serve(upto=4, end=False)
    world.receive()
    assert without_an_end_marker(world, 5.0, upto=1) == {"stale", "degraded"}
    assert world.applied_upto() == 4
    world.publish()
    world.deliver()  # reveals the loss, which makes the stream ask
    world.wait(5.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(7)


def test_a_live_batch_that_a_replay_has_brought_before_makes_up_for_its_end_marker_too():
    world = World()
    world.publish(2)
    world.connect()
    world.publish(1)
    assert without_an_end_marker(world, 2.0) == {"stale", "degraded"}
    assert world.applied_upto() == 3
    world.deliver()
    assert world.state == "exact"
    assert world.stream.counts["duplicates"] == 1


def test_a_stream_that_is_well_does_not_need_the_end_markers_of_its_idle_probes():
    world = well()
    before = len(world.requests)
    assert without_an_end_marker(world, 130.0) == {"exact"}
    assert len(world.requests) - before <= 2 * 11


def test_a_lost_end_that_comes_without_an_end_marker_may_go_on():
    world = well()
    world.publish(3)
    world.channel.clear()
    assert without_an_end_marker(world, 9.0, upto=2) == {"exact", "degraded"}
    assert world.applied_upto() > 3
    world.wait(30.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(6)


def test_a_replay_that_is_cut_goes_on_where_it_stopped():
    world = World()
    world.publish(10)
    world.connect()
    for expected, pause in ((0, 0.6), (3, 1.1), (6, 2.1)):
        assert world.requests[-1] == expected
        world.serve(upto=4, end=False)
        world.receive()
        world.wait(pause, serve=False)
    world.serve()
    world.receive()
    assert world.state == "exact"
    assert world.held == world.process.truth(10)
    assert world.stream.counts["cut_replays"] >= 2


def test_a_long_answer_is_asked_for_its_end_again():
    world = World(policy=StreamPolicy(replay_confirm=4))
    world.publish(10)
    world.connect()
    world.serve(upto=6)  # the end marker came through a queue that was full a moment before
    world.receive()
    assert world.state == "stale"
    assert world.requests == [0, 5]
    world.serve()
    world.receive()
    world.wait(0.6)
    assert world.state == "exact"
    assert world.held == world.process.truth(10)


def test_long_answers_to_a_new_connection_come_to_an_end():
    """Every answer from the last confirmed batch on would be as long as the one before.

    Many live batches follow the last batch that only an answer has shown, and the connection ends before any batch has
    arrived both ways.
    """
    world = World(policy=StreamPolicy(replay_confirm=4))
    world.publish(3)
    world.connect()
    world.serve()
    world.receive()
    world.publish(10)
    world.deliver()
    assert world.applied_upto() == 13
    world.disconnect()
    world.requests.clear()
    world.connect()
    world.wait(0.0)
    assert world.requests == [0, 12]  # the whole history, and its end once more
    world.wait(5.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(13)


def test_a_history_whose_first_batch_was_lost_on_the_way_is_not_taken_for_cut():
    world = World()
    world.connect()
    world.publish(2)
    world.channel.popleft()
    world.deliver()
    while not (world.request == 0 and world.state == "degraded"):
        world.wait(0.1, serve=False)
    world.serve()
    world.answer.popleft()
    world.wait(10.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(2)


def test_a_history_is_applied_without_another_look_until_something_else_comes():
    """The first batch and the end get the full check, and so does everything except the next batch of the history."""
    world = World()
    world.publish(6)
    world.connect()
    world.serve()
    found = [(seq, payload) for seq, payload in world.process.buffer]
    assert world.stream.continues(*found[0], world.now) is None
    world.receive(2)
    for strange in (found[1], found[3], (2, GARBAGE)):
        assert world.stream.continues(*strange, world.now) is None
    assert world.stream.last_seq == 1
    assert world.stream.continues(*found[2], world.now) is not None
    assert world.stream.last_seq == 2
    world.publish()
    world.deliver()
    assert world.stream.continues(*found[3], world.now) is None
    world.do(world.stream.disconnected(world.now))
    assert world.stream.continues(*found[3], world.now) is None


def test_a_replay_that_repeats_itself_is_given_up():
    world = World(policy=StreamPolicy(replay_surplus=50))
    world.publish(3)
    world.connect()
    first = world.process.buffer[0]
    for _ in range(200):
        world.do(world.stream.replayed(*first, world.now))
    assert world.stream.counts["endless_replays"] == 1
    assert world.held == world.process.truth(1)
    world.wait(5.0)
    assert world.state == "exact"


def test_a_replay_that_never_ends_is_bounded_in_time():
    world = World(policy=StreamPolicy(replay_deadline=5.0, replay_surplus=10**9))
    world.publish(1)
    world.connect()
    first = world.process.buffer[0]
    start = world.now
    while world.stream.counts["endless_replays"] == 0:
        world.do(world.stream.replayed(*first, world.now))
        world.wait(0.2, serve=False)
        assert world.now < start + 6
    assert "replay_endless" in kinds(world)


def test_what_arrives_of_a_replay_that_nobody_waits_for_is_counted():
    world = well()
    held = list(world.held)
    world.do(world.stream.replayed(3, batch(world.clock, "late"), world.now))
    world.do(world.stream.replay_ended(world.now))
    assert world.held == held
    assert world.stream.counts["late_replay"] == 2


def test_time_counts_from_when_a_replay_was_really_asked_for():
    stream = WorkerStream(replay=True)
    stream.connected(0.0)
    assert stream.deadline() is None  # waits in a queue
    stream.replay_sent(100.0)
    assert stream.deadline() == 102.0


def test_a_replay_endpoint_of_another_stream_is_found_out():
    world = World()
    other = Process()
    for number in range(3):
        other.publish(batch(world.clock + 50 + number, f"other {number}"))
    world.publish(3)
    world.process.replay = other.replay
    world.connect()
    for _ in range(60):
        world.wait(1.0)
        world.publish()
        world.deliver()
    assert world.stream.counts["replay_conflicts"] == 1
    assert "replay_conflict" in kinds(world)
    assert world.state == "degraded"
    assert not set(world.held) & {payload for _, payload in other.buffer}
    clears = world.clears
    world.wait(60.0)
    assert world.clears == clears


# The evidence of an answer


def liar(world: World, published: int, *, later: float = -50.0) -> Process:
    """Give the stream the replay endpoint of another process."""
    other = Process()
    for number in range(published):
        other.publish(batch(world.clock + later + number / 100, f"other {number}"))
    world.liar = other
    return other


@pytest.mark.parametrize("others", [1, 3, 5, 20])
@pytest.mark.parametrize("published", [0, 3, 5, 20])
def test_a_replay_of_another_process_is_not_believed_once_something_came_live(published, others):
    world = World(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    other = liar(world, others)
    world.publish(published)
    world.connect()
    world.wait(0.3)
    world.publish(1)
    world.deliver()
    world.wait(2.0)
    assert world.state == "degraded"
    assert "tcp://a:1" in world.stream.reason
    assert "tcp://b:2" in world.stream.reason
    assert {"replay_conflict", "replay_useless"} & set(kinds(world))
    for _ in range(30):
        world.wait(1.0)
        world.publish(1)
        world.deliver()
        assert world.state == "degraded"
    assert world.stream.counts["replay_conflicts"] == 1
    assert not set(world.held) & {payload for _, payload in other.buffer}


@pytest.mark.parametrize("rhythm", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("published", [2, 3, 5])
def test_no_moment_of_another_process_history_is_exact(published, rhythm):
    """The other process has 3 batches, and the engine publishes all the time.

    Each answer takes a moment, as a poll does.
    """
    world = World()
    world.publish(published)
    foreign = {payload for _, payload in liar(world, 3).buffer}
    world.connect()
    for step in range(300):
        world.wait(0.01, serve=False)
        if step % 10 == 0:
            world.serve()
            world.receive()
        if step % round(rhythm * 100) == round(rhythm * 100) - 1:
            world.publish()
            world.deliver()
        assert world.state != "exact" or not foreign & set(world.held)
    assert world.state == "degraded"


def test_an_idle_engine_is_exact_after_the_silence_in_which_a_batch_would_have_spoken():
    world = World(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.publish(3)
    world.connect()
    world.wait(0.49)
    assert world.state == "stale"
    assert world.stream.reason == "waiting for a live batch of tcp://a:1 to check the replay of tcp://b:2"
    world.wait(0.01)
    assert world.state == "exact"
    # The stream asks for the engine's first batch once. The batch supports the answer, so it is no reason for doubt.
    asked = len(world.requests)
    world.publish()
    world.deliver()
    assert world.state == "exact"
    world.wait(0.01)
    assert world.state == "exact"
    assert world.requests[asked:] == [2]
    world.publish(3)
    world.deliver()
    assert world.state == "exact"
    assert world.requests[asked:] == [2]


def test_silence_begins_when_the_limit_lets_messages_in():
    world = World()
    world.publish(3)
    world.connect()
    world.limit(2.0)
    world.limit(0.0)
    world.stream.hold_up(world.now, world.now + 2.0)
    world.wait(2.4)
    assert world.state == "stale"
    world.wait(0.2)
    assert world.state == "exact"


def test_a_limit_outlives_the_connection():
    world = World()
    world.publish(3)
    world.connect()
    world.limit(2.0)
    world.disconnect()
    world.connect()
    world.wait(2.4)
    assert world.state == "stale"
    world.wait(0.2)
    assert world.state == "exact"


def test_an_engine_that_is_seen_from_its_first_batch_on_needs_no_confirmation():
    world = World()
    world.connect()
    world.wait(0.1)
    world.publish()
    world.deliver()
    assert world.state == "exact"
    assert world.requests == [0]


@pytest.mark.parametrize("clear", [False, True])
def test_a_replay_endpoint_that_never_answers_is_said_where_all_is_known_without_it(clear):
    world = World(replay_endpoint="tcp://b:2")
    world.publish(2 if clear else 0)
    world.connect()
    world.publish(3)
    world.publish(clear=clear)
    world.deliver()
    world.wait(20.0, serve=False)
    assert world.state == "exact"
    assert world.stream.reason.startswith("tcp://b:2 has not answered")
    assert world.held == world.process.truth(world.applied_upto())
    world.wait(60.0)
    assert (world.state, world.stream.reason) == ("exact", "")


def test_a_clear_leaves_nothing_to_confirm():
    world = World()
    world.publish(3)
    world.connect()
    world.wait(0.1)
    world.publish(clear=True)
    world.deliver()
    assert world.state == "exact"
    assert world.held == world.process.truth(4)


def test_a_history_that_nobody_confirms_any_more_is_degraded_until_somebody_does():
    world = World()
    world.publish(3)
    world.up()
    for _ in range(200):
        world.publish()
        world.deliver()
        world.wait(0.1, serve=False)
    assert world.state == "degraded"
    for _ in range(120):
        world.publish()
        world.deliver()
        world.wait(0.1)
    assert world.state == "exact"
    assert world.held == world.process.truth(world.applied_upto())


def test_another_process_history_does_not_become_known_by_a_lost_connection():
    """That history was never confirmed, so the same answer over a new connection is no better evidence."""
    world = World()
    world.publish(3)
    liar(world, 3)
    world.up()
    assert world.state == "exact"  # undetectable while the engine publishes nothing
    world.disconnect()
    world.connect()
    world.wait(0.3)
    assert world.state == "stale"
    world.publish()
    world.deliver()
    assert world.state == "stale"
    world.wait(0.3)
    assert world.state == "degraded"


def test_an_endpoint_that_is_the_publishers_by_now_does_not_vouch_for_what_it_gave_before():
    world = World()
    world.publish(3)
    foreign = {payload for _, payload in liar(world, 3).buffer}
    world.connect()
    world.wait(0.1)
    assert foreign == set(world.held)
    world.liar = None
    world.publish(2)
    world.deliver()
    world.wait(1.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(5)


@pytest.mark.parametrize("waiting", [1, 3])
def test_an_answer_that_was_doubted_is_not_confirmed_by_the_same_process(waiting):
    """A doubted answer is still doubtful when the same process repeats it.

    The engine has restarted, and batches arrive live while the request is on its way. The other process has newer
    batches with the same numbers, like a publisher that has restarted once more.
    """
    world = well(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.restart()
    world.connect()
    world.publish(waiting)
    world.deliver()
    other = liar(world, waiting, later=50.0)
    world.wait(0.3)
    for _ in range(10):
        assert world.state == "degraded"
        assert "tcp://a:1" in world.stream.reason
        assert "tcp://b:2" in world.stream.reason
        world.wait(1.0)
    for _ in range(10):
        world.publish()
        world.deliver()
        world.wait(1.0)
        assert world.state == "degraded"
    assert not set(world.held) & {payload for _, payload in other.buffer}
    world.liar = None
    world.wait(30.0)
    assert world.state == "exact"
    world.check()


def test_a_restart_behind_something_between_is_believed_when_the_next_batch_agrees():
    world = well(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.restart()
    world.connect()
    world.publish()
    world.deliver()
    world.process = Process()  # over the same connection
    world.clock += 50.0
    world.publish(4)
    world.channel.clear()
    world.owed = -1
    world.wait(3.0)
    assert world.state == "degraded"
    assert "whether the engine has restarted" in world.stream.reason
    world.publish()
    world.deliver()
    world.wait(3.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(5)


@pytest.mark.parametrize("others", [2, 5])
@pytest.mark.parametrize("idle", [0.0, 0.6, 20.0])
def test_a_live_batch_that_happens_to_continue_an_answer_is_asked_for_at_once(others, idle):
    """The live batch has the other process's next number. Only a replay reveals this, because there is no hole."""
    world = World(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.publish(others)
    other = liar(world, others)
    world.connect()
    world.wait(idle)
    world.publish()
    world.deliver()
    world.wait(0.01)
    assert world.requests[-1] == others - 1  # from the last batch of the other process
    assert world.state == "stale"
    world.wait(0.2)  # once more, because an answer may be cut
    assert world.state == "degraded"
    assert not set(world.held) & {payload for _, payload in other.buffer}


def test_what_came_while_a_request_waited_is_in_its_answer():
    """An answer without those batches is from another process, even if they arrived after the request."""
    world = World(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.publish(5)
    world.connect()
    world.publish()
    world.deliver()
    other = liar(world, 2)
    world.wait(3.0)
    assert world.state == "degraded"
    assert "tcp://b:2 ends before batch 5, which tcp://a:1 had published" in world.stream.reason
    assert not set(world.held) & {payload for _, payload in other.buffer}


def test_a_stream_that_is_never_silent_finds_out_all_the_same():
    """The other process has as many batches, so the live batches continue its history."""
    world = World()
    liar(world, 5)
    world.publish(5)
    world.connect()
    world.wait(0.3)
    for _ in range(20):
        world.publish(1)
        world.deliver()
        world.wait(0.1)
    assert world.state == "degraded"


def test_it_is_believed_again_when_it_agrees():
    world = World()
    liar(world, 20)
    world.publish(3)
    world.connect()
    world.wait(0.3)
    world.publish(1)
    world.deliver()
    world.wait(5.0)
    assert world.state == "degraded"
    world.liar = None
    world.publish(1)
    world.deliver()
    world.wait(20.0)
    assert "replay_agrees" in kinds(world)
    assert world.state == "exact"
    assert world.held == world.process.truth(5)


def test_another_process_stays_one_over_a_new_connection():
    world = World()
    liar(world, 20)
    world.publish(3)
    world.connect()
    world.wait(0.3)
    world.publish(1)
    world.deliver()
    world.wait(1.0)
    world.disconnect()
    world.connect()
    world.wait(5.0)
    assert world.state == "degraded"
    world.liar = None
    world.wait(30.0)
    world.publish(1)
    world.deliver()
    world.wait(30.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(5)


def test_a_connection_that_brings_nothing_of_what_is_published_is_replaced():
    world = well()
    world.deaf = True
    assert world.stream.mark == ("exact", "")
    for _ in range(2):
        world.publish(1)
        world.wait(1.5)
    assert world.state == "degraded"
    assert "publishes no batch that" in world.stream.reason
    world.wait(10.0)
    assert len(world.renewals) == 1
    world.deaf = False
    world.connect()
    world.wait(10.0)
    assert world.state == "degraded"  # the answers are the old ones
    world.publish(1)
    world.deliver()
    assert world.state == "exact"
    assert world.held == world.process.truth(6)


def test_connections_are_replaced_ever_more_rarely_until_the_stream_is_exact():
    world = well()
    world.deaf = True

    def renewals(count):
        start = len(world.renewals)
        while len(world.renewals) < start + count:
            if not world.connection_open:
                world.connect()
            world.publish(1)
            world.wait(1.0)
        return [after - before for before, after in zip(world.renewals[:-1], world.renewals[1:], strict=True)]

    first, longest = world.stream.policy.renew
    waits = renewals(12)
    assert waits == sorted(waits)
    assert waits[0] >= 2 * first
    assert longest <= waits[-1] <= 2 * longest
    world.deaf = False
    world.connect()
    world.publish(1)
    world.deliver()
    world.wait(5.0)
    assert world.state == "exact"
    world.deaf = True
    start = world.now
    renewals(1)
    assert world.now - start < 4 * first


def test_answers_of_changing_processes_are_no_reason_to_be_degraded_for_good():
    world = World()
    world.publish(3)
    world.up()
    assert world.state == "exact"
    while "gives batches of more than one process" not in world.stream.reason:
        assert world.now < 1500.0
        world.liar = Process()
        for number in range(3):
            world.liar.publish(batch(world.clock + world.now + number, f"{world.now} {number}"))
        world.wait(1.0)
    assert world.state == "degraded"
    world.liar = None
    world.wait(10.0)
    assert len(world.renewals) == 1
    world.connect()
    world.wait(1.0)
    assert world.state == "degraded"  # no batch was published that could confirm the answers
    world.publish(1)
    world.deliver()
    world.wait(5.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(4)


def test_a_replay_endpoint_without_a_listener_is_named_before_and_after_it_is_given_up():
    world = World(endpoint="tcp://a:1", replay_endpoint="tcp://b:2")
    world.publish(3)
    world.connect()
    world.publish(1)
    world.deliver()
    assert world.stream.reason == "replaying"
    world.wait(2.5, serve=False)
    assert world.stream.mark == ("stale", "tcp://b:2 accepts no connection, so the history cannot be replayed")
    world.wait(10.0, serve=False)
    assert world.state == "degraded"
    assert world.stream.reason.endswith("lost; tcp://b:2 accepts no connection, so the history cannot be replayed")
    assert any("tcp://b:2: no connection" in incident.detail for incident in world.incidents)
    world.wait(10.0)
    assert world.stream.mark == ("exact", "")


def test_an_answer_of_which_all_was_refused_shows_nothing():
    world = World()
    world.publish(3)
    world.connect()
    for _ in range(20):
        if world.request is not None:
            for _ in range(3):
                world.do(world.stream.replay_refused(world.now, "topic 'x' is not 'y'"))
            world.request = None
            world.do(world.stream.replay_ended(world.now))
        assert world.state != "exact"
        world.wait(0.5, serve=False)
    assert (world.state, world.stream.reason) == ("degraded", "topic 'x' is not 'y'")
    assert kinds(world).count("replay_useless") == 1
    world.wait(20.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(3)


def test_after_a_reconnect_the_reason_says_why_an_answer_shows_nothing():
    """One cause is an address that another engine has taken over: all of its answers have another topic."""
    world = well()
    world.disconnect()
    world.connect()
    for _ in range(world.stream.policy.hole_tries):
        world.do(world.stream.replay_refused(world.now, "tcp://b:2 answers with another topic"))
        world.do(world.stream.replay_ended(world.now))
        world.wait(1.0, serve=False)
    assert world.state == "stale"
    assert world.stream.reason.endswith("this is still the same process: tcp://b:2 answers with another topic")
    world.wait(30.0)
    assert (world.state, world.stream.reason) == ("exact", "")


def test_a_publisher_that_keeps_nothing_is_not_taken_for_one_that_published_nothing():
    world = World(buffer_steps=0)
    world.publish(10)
    world.connect()
    world.wait(0.3)
    world.publish(1)
    world.deliver()
    world.wait(1.0)
    held = list(world.held)
    world.wait(40.0)
    assert world.state == "degraded"
    assert "without a batch" in world.stream.reason
    assert world.held == held == [world.process.published[10]]
    assert world.clears == 0


def test_a_stream_of_which_all_comes_by_replays_is_not_exact():
    """With another topic no batch arrives live, and replays in the old framing have no topic."""
    world = well()
    for _ in range(4):
        if not world.connection_open:
            world.connect()
        world.publish(1)
        world.channel.clear()
        world.wait(4.0)
    if not world.connection_open:
        world.connect()
    world.wait(1.0)
    assert world.state == "degraded"
    assert "topic" in world.stream.reason
    world.publish(1)
    world.deliver()
    world.wait(0.1)
    assert world.state == "exact"


def test_what_the_caller_holds_against_a_connection_counts_until_the_next():
    world = well()
    world.do(world.stream.distrust(world.now, "two publishers"))
    assert (world.state, world.stream.reason) == ("degraded", "two publishers")
    assert kinds(world) == ["distrusted"]
    world.disconnect()
    world.up()
    assert world.state == "exact"


def test_without_a_replay_endpoint_the_reason_says_so_though_it_is_exact():
    world = well(0, replay=False)
    world.publish(2)
    world.deliver()
    assert world.state == "exact"
    assert "without a replay endpoint" in world.stream.reason


# Late answers


def test_a_request_that_the_publisher_has_is_not_repeated_while_others_have_their_turn():
    world = World()
    world.publish(3)
    world.connect()
    world.do_reach()
    world.wait(50.0, serve=False)
    assert world.requests == [0]
    assert world.state == "stale"
    assert "has not begun to answer" in world.stream.reason
    assert world.awaits == 1
    world.wait(0.1)
    assert world.state == "exact"
    assert world.stream.counts["gaps_accepted"] == 0


def test_a_request_that_is_not_answered_at_all_is_repeated_ever_more_rarely():
    world = World()
    world.publish(3)
    world.connect()
    asked = []
    for _ in range(20_000):
        if len(world.requests) > len(asked):
            asked.append(world.now)
            world.do_reach()
        world.wait(0.1, serve=False)
    waits = [later - sooner for sooner, later in pairwise(asked)]
    assert world.state == "degraded"
    assert 60.0 <= waits[0] < waits[1] < waits[2]
    assert len(asked) <= 6
    world.wait(10.0)
    assert world.state == "exact"


def test_a_request_whose_connection_is_lost_is_sent_again():
    world = World()
    world.publish(3)
    world.connect()
    world.do_reach()
    world.do(world.stream.replay_lost(world.now))
    world.wait(0.5)
    assert world.requests == [0, 0]
    assert world.state == "exact"


@pytest.mark.parametrize("pause", [0.7, 3.0])
def test_an_answer_that_pauses_each_time_is_followed(pause):
    """Publishers that rotate between their readers do this. Here, every answer pauses before batch 5."""
    world = World()
    world.publish(10)
    world.connect()
    for _ in range(200):
        if world.request is not None and not world.answering:
            world.serve()
            before = sum(1 for item in world.answer if item is not None and item[0] < 5)
            world.receive(before)
            asked = len(world.requests)
            world.wait(pause, serve=False, step=0.1)
            if len(world.requests) == asked and world.answering:
                world.receive()
        else:
            world.wait(0.1, serve=False)
    assert world.state == "exact"
    assert world.held == world.process.truth(10)


def test_a_hole_is_filled_by_a_question_that_is_open_already():
    world = well()
    world.wait(0.7, serve=False)
    assert world.requests == [0, 2]
    world.do_reach()
    world.publish(2)
    world.channel.popleft()
    world.deliver()
    assert (world.state, world.requests) == ("stale", [0, 2])
    world.serve()
    world.receive()
    assert world.state == "exact"
    assert world.requests == [0, 2]


# Restarts


def test_seq_moving_backwards_clears_and_builds_again():
    world = well(5)
    world.process = Process()
    world.publish(3)
    world.channel.popleft()
    world.channel.popleft()  # 0 and 1 were lost while the socket was made again
    world.deliver()
    assert world.clears == 1
    assert world.held == []
    assert world.requests[-1] == 0
    world.serve()
    world.receive()
    assert world.state == "exact"
    assert world.held == world.process.truth(3)
    assert world.stream.counts["restarts"] == 1


def test_seq_moving_backwards_clears_even_without_a_replay():
    world = well(0, replay=False)
    world.publish(5)
    world.deliver()
    world.process = Process()
    world.publish(2)
    world.channel.popleft()
    world.deliver()
    assert world.clears == 1
    assert world.held == world.process.published[1:]
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 1


def test_without_a_replay_a_clear_does_not_make_up_for_what_came_before_it_in_the_wrong_order():
    """The first batches of a new process are swapped.

    The first to arrive is mistaken for the old process's and dropped.
    """
    world = well(0, replay=False)
    world.publish(1)
    world.deliver()
    world.restart()
    world.connect()
    world.publish(3, clear=True)
    world.channel[0], world.channel[1] = world.channel[1], world.channel[0]
    world.deliver(2)
    assert (world.applied_upto(), world.stream.counts["restarts"]) == (1, 1)
    assert world.state == "degraded"
    world.deliver()
    assert world.state == "exact"
    world.check()


def test_a_reconnect_to_the_same_process_keeps_everything_and_catches_up():
    world = well(5)
    world.disconnect()
    assert world.state == "stale"
    world.publish(2)
    world.connect()
    assert world.requests[-1] == 0
    assert world.state == "stale"
    world.publish(1)
    world.deliver()
    assert len(world.held) == 5  # waits for proof of the process
    world.serve()
    world.receive()
    assert world.clears == 0
    assert world.held == world.process.truth(8)
    assert world.state == "exact"
    assert world.stream.counts["reconnects"] == 1


def test_a_copy_of_an_applied_batch_does_not_wait_for_ever():
    """The copy arrives while the process is unconfirmed. After the confirmation, it must be dropped."""
    world = well(5)
    world.disconnect()
    world.connect()
    world.do(world.stream.live(2, world.process.published[2], world.now))
    world.publish(1)
    world.deliver()
    assert world.stream.waiting == 2
    world.serve()
    world.receive()
    assert world.stream.waiting == 0
    assert world.stream._pending.bytes == 0
    assert world.held == world.process.truth(6)
    assert (world.state, counts(world).get("lost_batches", 0), world.clears) == ("exact", 0, 0)


@pytest.mark.parametrize("published", [0, 1, 4, 5, 6, 20])
@pytest.mark.parametrize("live", [0, 1])
def test_a_restarted_engine_is_recognised_wherever_it_is(published, live):
    world = well(5)
    world.restart()
    world.publish(published)
    world.connect()
    world.publish(live)
    world.deliver()
    world.wait(1.0)
    assert world.clears >= 1
    assert world.stream.counts["restarts"] == 1
    assert world.held == world.process.truth(published + live)
    assert world.state == "exact"


def test_a_restarted_engine_is_recognised_when_the_clock_was_set_back():
    world = well(5)
    world.restart()
    world.clock -= 3600.0
    world.publish(7)
    world.connect()
    world.wait(1.0)
    assert world.held == world.process.truth(7)
    assert world.stream.counts["restarts"] == 1


def test_a_restarted_engine_whose_head_is_gone_does_not_continue_what_was_known():
    world = well(4, buffer_steps=4)
    world.restart()
    world.publish(30)
    world.connect()
    world.wait(1.0)
    assert world.clears == 1
    assert world.state == "degraded"
    assert world.held == [payload for _, payload in world.process.buffer]


def test_an_old_batch_that_is_newer_than_the_last_one_is_of_another_process():
    world = well(10, policy=StreamPolicy(memory=2))
    world.restart()
    world.clock += 10.0
    world.publish(10)
    world.connect()
    world.serve()
    world.receive(1)  # the first reply is enough
    assert world.clears == 1
    assert world.stream.counts["restarts"] == 1


def test_older_timestamps_make_it_ask_whether_it_is_the_same_process():
    world = well(3)
    world.clock -= 100.0
    world.publish(1)
    world.deliver()
    assert world.state == "stale"
    assert world.requests[-1] == 0
    world.serve()
    world.receive()
    assert world.state == "exact"
    assert world.clears == 0  # it was the same: only its clock has moved
    assert world.held == world.process.truth(4)


def test_an_unsteady_clock_does_not_make_it_ask_all_the_time():
    world = well(3)
    for step in (-100.0, -100.0, -100.0):
        world.clock += step
        world.publish(1)
        world.deliver()
        world.serve()
        world.receive()
    assert world.stream.counts["clock_steps"] == 1
    assert world.state == "exact"


# Reconnecting without a replay endpoint


def known_without_replay() -> World:
    world = World(replay=False)
    world.connect()
    world.publish(5)
    world.deliver()
    assert world.state == "exact"
    return world


def test_without_a_replay_a_reconnect_is_stale_until_something_is_heard():
    world = known_without_replay()
    world.disconnect()
    world.connect()
    world.wait(60.0)
    assert world.state == "stale"


def test_without_a_replay_the_next_number_after_a_reconnect_is_no_proof():
    world = known_without_replay()
    world.disconnect()
    world.connect()
    world.publish(1)
    world.deliver()
    assert world.state == "degraded"
    assert world.clears == 0
    world.publish(clear=True)
    world.deliver()
    assert world.state == "exact"


def test_without_a_replay_a_batch_that_comes_again_after_a_reconnect_is_proof_enough():
    world = known_without_replay()
    last = (4, world.process.published[4])
    world.disconnect()
    world.connect()
    world.do(world.stream.live(*last, world.now))
    assert world.state == "exact"


@pytest.mark.parametrize(("away", "cleared"), [(1.0, True), (0.002, False)])
def test_without_a_replay_a_jump_ahead_is_a_restart_if_there_was_time_for_it(away, cleared):
    world = known_without_replay()
    world.disconnect()
    world.now += away
    world.publish(20)
    world.connect()
    world.publish(1)
    world.deliver()
    assert (world.clears == 1) is cleared
    assert world.state == "degraded"


def test_a_restart_that_only_an_answer_claims_waits_for_the_next_live_batch():
    """A restart that only an answer claims is not accepted until a live batch confirms it.

    Batches arrive live, more are lost than the memory holds, and then another process answers. Its batch is too old to
    be compared and newer than all others. The connection still leads to the process that published.
    """
    world = well(3, policy=StreamPolicy(memory=2))
    world.liar = Process()
    world.disconnect()
    world.connect()
    world.publish(2, clear=True)
    world.deliver()
    world.wait(15.0, serve=False, step=1.0)
    world.publish(3)
    world.channel.clear()
    world.publish(1)
    world.deliver()
    world.wait(15.0, serve=False, step=1.0)
    assert world.state == "degraded"
    world.liar.publish(batch(world.clock + 50.0, "other"))
    world.wait(60.0)
    assert world.state != "exact"
    world.liar = None
    world.publish(1)
    world.deliver()
    world.wait(60.0)
    assert world.state == "exact"
    world.check()


def guessed(published: int, memory: int, buffer_steps: int = 10_000) -> World:
    """Return a world in which a batch of a new process was mistaken for the next one of the old process.

    The engine has restarted, no replay is answered, and the first batch that arrives from the new process has the
    number of the old process's next batch.
    """
    world = well(published, policy=StreamPolicy(memory=memory))
    world.buffer_steps = buffer_steps
    world.restart()
    world.connect()
    world.publish(published)
    world.channel.clear()
    world.publish(1)
    world.deliver()
    world.wait(15.0, serve=False)
    assert world.state == "degraded"
    assert world.applied_upto() == published + 1
    return world


@pytest.mark.parametrize("memory", [1, 2, 1024])
@pytest.mark.parametrize("published", [1, 3, 5])
def test_an_answer_about_the_end_does_not_prove_a_guess_about_the_beginning(published, memory):
    world = guessed(published, memory)
    for _ in range(60):
        world.wait(0.5)
        world.check()
    assert world.state == "exact"
    assert world.held == world.process.truth(published + 1)


def test_a_guess_that_can_not_be_proved_any_more_stays_one():
    world = guessed(5, memory=2, buffer_steps=3)
    world.publish(6)
    world.deliver()
    for _ in range(60):
        world.wait(0.5)
        assert world.state == "degraded"
    world.publish(clear=True)
    world.deliver()
    assert world.state == "exact"
    assert world.held == world.process.truth(13)


@pytest.mark.parametrize("memory", [1, 2, 1024])
def test_a_guess_that_was_right_is_found_to_be_so(memory):
    world = well(4, policy=StreamPolicy(memory=memory))
    world.disconnect()
    world.connect()
    world.publish(2)
    world.deliver()
    world.wait(15.0, serve=False)
    assert world.state == "degraded"
    world.wait(30.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(6)
    assert world.clears == (0 if memory > 2 else 1)  # batches outside the memory have to be applied again


def test_without_a_replay_an_older_time_after_a_reconnect_is_a_restart():
    world = known_without_replay()
    world.disconnect()
    world.connect()
    world.clock -= 100.0
    world.publish(1)
    world.deliver()
    assert world.clears == 1
    assert world.stream.counts["restarts"] == 1


def test_without_a_replay_a_lower_number_after_a_reconnect_is_a_restart():
    world = known_without_replay()
    world.restart()
    world.connect()
    world.publish(2)
    world.deliver()
    assert world.clears == 1
    assert world.state == "exact"
    assert world.held == world.process.truth(2)


# Degraded, and back


def damaged(world: World) -> None:
    world.publish(1)
    world.channel[0] = (world.channel[0][0], GARBAGE)
    world.deliver()


def test_a_batch_that_can_not_be_applied_degrades_and_is_healed_by_the_publishers_copy():
    world = well()
    damaged(world)
    assert world.state == "degraded"
    assert world.stream.counts["lost_batches"] == 1
    world.publish(2)
    world.deliver()
    world.wait(10.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(6)
    assert world.stream.counts["rebuilds"] == 1
    assert "rebuild" in kinds(world)


def test_a_batch_that_is_unreadable_at_its_publisher_too_is_not_rebuilt_for_ever():
    world = well()
    world.publish(readable=False)
    world.publish(2)
    world.deliver()
    world.wait(120.0)
    assert world.state == "degraded"
    assert world.stream.counts["rebuilds"] == 0
    assert world.clears == 0


def test_more_that_is_unreadable_than_can_be_remembered_is_not_rebuilt_for_ever_either():
    world = well()
    for _ in range(300):
        world.publish(readable=False)
    world.publish(2)
    world.deliver()
    world.wait(120.0)
    assert world.state == "degraded"
    assert (world.stream.counts["rebuilds"], world.clears) == (0, 0)
    assert world.stream.counts["lost_batches"] == 300
    assert world.stream.last_seq == 304


def test_a_clear_by_the_engine_is_a_clean_start():
    world = well()
    world.publish(encodable=False)
    world.publish(1)
    world.deliver()
    world.wait(1.0)
    assert world.state == "degraded"
    world.publish(clear=True)
    world.deliver()
    assert world.state == "exact"
    assert "clean" in kinds(world)


def test_a_hole_accepted_while_nobody_answered_is_healed_when_somebody_does():
    world = well()
    world.publish(1)
    world.channel.clear()
    world.publish(1)
    world.deliver()
    world.wait(10.0, serve=False)
    assert world.state == "degraded"
    world.wait(10.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(5)


@pytest.mark.parametrize("lost", [1, 5, 20])
@pytest.mark.parametrize("memory", [2, 8, 1024])
def test_what_was_given_up_last_is_newer_than_what_is_applied_and_no_restart(memory, lost):
    """The last batches that were given up are newer than the last applied one, which does not mean a restart.

    Of the batches that did not fit among the waiting ones, the stream keeps only the numbers, and it gives them up when
    no answer comes. In a later answer they are newer than the last applied batch, although no other process published
    them.
    """
    world = well(policy=StreamPolicy(memory=memory, max_pending=2))
    for _ in range(5):
        world.publish(1)
        world.channel.clear()
        world.publish(3 + lost)
        world.deliver()
        world.wait(10.0, serve=False)
        assert world.state == "degraded"
        assert world.applied_upto() == len(world.process.published)
    world.wait(20.0)
    assert (world.stream.counts["restarts"], world.stream.counts["rebuilds"]) == (0, 1)
    assert world.state == "exact"
    assert world.held == world.process.truth(len(world.process.published))


@pytest.mark.parametrize("memory", [1, 2])
def test_a_stream_that_remembers_only_losses_still_knows_its_process(memory):
    """An answer with the last applied batch proves the process, even if the memory holds only losses.

    Again and again, the stream gives up more batches than the memory holds, and an old copy makes it check the process
    each time. The last applied batch is the only one that it can compare.
    """
    world = well(policy=StreamPolicy(memory=memory, max_pending=2))
    for _ in range(6):
        world.publish(1)
        world.channel.clear()
        world.publish(6)
        world.deliver()
        world.wait(32.0, serve=False)
        assert world.state == "stale"  # silent, and no replay is answered
        assert world.applied_upto() == len(world.process.published)
        world.do(world.stream.live(0, world.process.published[0], world.now))
        world.wait(0.05)
        assert world.state == "degraded"
    counted = world.stream.counts
    assert (counted["replay_conflicts"], counted["restarts"], world.clears) == (0, 0, 0)
    world.wait(30.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(len(world.process.published))
    assert (counted["rebuilds"], counted["restarts"]) == (1, 0)


def test_another_process_is_found_out_behind_losses_too():
    world = well(policy=StreamPolicy(memory=2, max_pending=2))
    world.publish(1)
    world.deliver()
    world.wait(1.0)  # the replay endpoint has proved to be the publisher's
    world.publish(1)
    world.channel.clear()
    world.publish(6)
    world.deliver()
    world.wait(32.0, serve=False)
    world.process, old = Process(), world.process
    world.publish(12)
    world.channel.clear()
    world.do(world.stream.live(0, old.published[0], world.now))
    world.wait(1.0)
    assert world.stream.counts["restarts"] == 1
    assert world.held == world.process.truth(12)
    assert world.state == "degraded"  # the copy is not a batch of the process that answers
    world.publish(1)
    world.deliver()
    world.wait(1.0)
    assert world.state == "exact"
    assert world.held == world.process.truth(13)


def test_a_history_that_is_gone_is_asked_for_once():
    world = well(3, buffer_steps=4)
    world.publish(encodable=False)
    world.publish(6)
    world.deliver()
    world.wait(15.0)
    assert world.state == "degraded"
    asked = world.stream.counts["replays_asked"]
    world.disconnect()  # no idle questions in between
    world.wait(100.0)
    assert world.stream.counts["replays_asked"] == asked


def test_a_history_that_is_gone_is_no_reason_not_to_ask_whether_it_is_the_same_process():
    """After a reconnect no replay is answered for a while and no batch is published.

    Then the replay endpoint is back.
    """
    world = World(buffer_steps=4)
    world.publish(10)
    world.connect()
    world.wait(20.0)
    assert (world.state, world.stream._losses.hopeless) == ("degraded", True)
    world.disconnect()
    world.connect()
    world.wait(30.0, serve=False)
    assert world.state == "stale"
    held = list(world.held)
    world.wait(30.0)
    assert (world.state, world.held, world.clears) == ("degraded", held, 0)


def test_a_suspicion_finds_what_was_damaged_and_still_readable():
    world = well()
    world.publish(1)
    world.deliver()
    world.wait(1.0)  # the replay endpoint has proved to be the publisher's
    world.publish(1)
    seq, payload = world.channel[0]
    world.channel[0] = (seq, payload.replace(b"BlockStored", b"BlockStorex"))
    world.deliver()
    assert world.state == "exact"  # there is no sign of the damage
    world.do(world.stream.suspect(world.now))
    world.wait(5.0)
    assert world.held == world.process.truth(5)
    assert world.state == "degraded"  # the live batch and the replayed one differ
    world.publish(1)
    world.deliver()
    world.wait(1.0)
    assert world.held == world.process.truth(6)
    assert world.state == "exact"


# Silence


def test_a_silent_stream_asks_ever_more_rarely_whether_it_missed_the_end():
    world = well()
    start, before = world.now, len(world.requests)
    world.wait(130.0)
    assert world.state == "exact"
    assert set(world.requests[before:]) == {2}
    assert 6 <= len(world.requests) - before <= 11  # 0.5 s, doubled up to 30 s
    assert world.now == start + 130.0


@pytest.mark.parametrize("before", [0.0, 3.0, 20.0, 70.0, 300.0])
def test_a_lost_end_is_found_as_fast_whatever_the_silence_was_before(before):
    world = well()
    world.wait(before)
    world.publish(1)
    world.deliver()
    world.wait(0.05)
    world.publish(1, clear=True)
    world.channel.clear()
    start = world.now
    while world.held != world.process.truth(5):
        world.wait(0.05)
        assert world.now < start + 0.7
    assert world.state == "exact"


@pytest.mark.parametrize("reached", [False, True])
def test_a_publisher_that_is_silent_and_does_not_answer_is_stale_within_10_s(reached):
    world = well()
    world.publish(1)
    world.deliver()
    start = world.now
    while world.state == "exact":
        world.wait(0.1, serve=False)
        if reached and world.request is not None:
            world.do_reach()
        assert world.now < start + 10.0
    assert (world.state, world.clears) == ("stale", 0)
    assert "does not answer" in world.stream.reason
    assert kinds(world) == ["silent"]
    world.publish(1)
    world.deliver()
    assert world.state == "exact"  # a batch proves that the engine is alive


def test_a_publisher_that_answers_after_all_is_exact_again():
    world = well()
    world.wait(20.0, serve=False)
    assert world.state == "stale"
    world.wait(10.0)
    assert world.state == "exact"


def test_a_lost_end_is_found_in_silence():
    world = well()
    world.publish(2)
    world.channel.clear()
    world.wait(1.0)
    assert world.held == world.process.truth(5)
    assert world.stream.counts["tails_recovered"] == 2
    assert world.state == "exact"


def test_a_restart_behind_the_same_connection_is_found_in_silence():
    world = World()
    world.publish(3)
    world.up()
    world.process = Process()
    world.wait(2.0)
    assert world.clears == 1
    assert world.held == []
    assert world.stream.counts["restarts"] == 1


def test_the_first_batch_of_an_answer_is_not_all_of_it():
    """After a time without answers, in any of the resulting states, the first answer is cut short."""
    answered = 0
    for tenths in range(1, 300, 7):
        world = World()
        world.publish(2)
        world.connect()
        world.wait(tenths / 10, serve=False)
        world.serve(upto=1)
        world.receive()
        answered += world.applied_upto() == 1
        assert world.state != "exact"
        world.wait(30.0)
        assert world.state == "exact"
        assert world.held == world.process.truth(2)
    assert answered > 20


def test_a_hole_that_only_a_question_in_silence_has_shown_is_accepted_too():
    world = well()
    world.publish(encodable=False)
    world.publish(1)
    world.channel.clear()
    world.wait(5.0)
    assert world.state == "degraded"
    assert world.stream.last_seq == 4
    assert world.stream.counts["lost_batches"] == 1


# Connections


def test_reconnects_back_off_from_1_to_30_seconds_with_jitter():
    delays = []
    for uniform in (0.0, 0.999):
        stream = WorkerStream(replay=True, uniform=lambda value=uniform: value)
        row = []
        for attempt in range(10):
            actions = stream.disconnected(float(attempt), "refused")
            row += [action.delay for action in actions if hasattr(action, "delay")]
        delays.append(row)
    low, high = delays
    assert low[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert all(1.0 <= delay <= 30.0 for delay in low + high)
    assert all(later > sooner for sooner, later in pairwise(low[:6]))
    assert all(up > down for down, up in zip(low, high, strict=True))


def test_a_connection_that_lasted_starts_the_back_off_again():
    stream = WorkerStream(replay=True, uniform=lambda: 0.0)
    for now in range(5):
        stream.disconnected(float(now))
    stream.connected(10.0)
    brief = stream.disconnected(10.5)
    assert next(action.delay for action in brief if hasattr(action, "delay")) > 10.0
    stream.connected(40.0)
    lasting = stream.disconnected(60.0)
    assert next(action.delay for action in lasting if hasattr(action, "delay")) == 1.0


def test_an_endpoint_that_refuses_is_one_incident_and_many_counts():
    world = World()
    for _ in range(5):
        world.do(world.stream.disconnected(world.now, "refused"))
    assert kinds(world) == ["unreachable"]
    assert world.stream.counts["failed_connects"] == 5
    assert world.state == "stale"


def test_what_was_still_on_its_way_when_the_connection_went_is_applied():
    world = well()
    world.publish(2)
    world.do(world.stream.disconnected(world.now))
    world.deliver()
    assert world.held == world.process.truth(5)
    assert world.state == "stale"


def test_a_gap_on_a_dead_connection_asks_nobody():
    world = well()
    world.publish(3)
    world.channel.popleft()
    world.do(world.stream.disconnected(world.now))
    before = len(world.requests)
    world.deliver()
    assert len(world.requests) == before


def test_incidents_are_few_however_many_batches_there_are():
    world = well(0)
    for _ in range(300):
        world.publish(3)
        world.deliver()
    assert world.incidents == []
    assert all(isinstance(incident, Incident) for incident in world.incidents)


def test_a_busy_stream_that_was_rebuilt_confirms_it_without_waiting_for_silence():
    world = well()
    world.wait(3.0)
    world.publish(1)
    world.deliver()
    world.do(world.stream.start_anew(world.now, "wrongly applied"))
    world.serve()
    world.receive()
    assert world.state == "stale"
    for _ in range(20):
        world.publish(1)
        world.deliver()
        world.wait(0.1)
    assert world.state == "exact"
    assert world.held == world.process.truth(24)

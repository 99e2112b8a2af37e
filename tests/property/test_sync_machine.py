"""The stream machine behind a channel with every kind of fault, compared with the publisher's own truth."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sync_support import GARBAGE, Process, Router, World, batch

from kvindex.sync.policy import StreamPolicy

few = st.integers(1, 4)


class FaultyChannel(RuleBasedStateMachine):
    """Drops, duplicates, reorders, damages, restarts; replays that are cut, late, endless or never come."""

    kind: type[World] = World
    world: World

    @initialize(
        replay=st.booleans(),
        buffer_steps=st.sampled_from([3, 10_000]),
        memory=st.sampled_from([2, 1024]),
        max_pending=st.sampled_from([2, 10_000]),
        confirm=st.sampled_from([2, 256]),
        before=st.integers(0, 6),
        since=st.integers(0, 3),
    )
    def start(
        self, replay: bool, buffer_steps: int, memory: int, max_pending: int, confirm: int, before: int, since: int
    ) -> None:
        # Without a replay endpoint, a copy that is older than the memory cannot be distinguished from a restart.
        memory = memory if replay else 1024
        policy = StreamPolicy(memory=memory, max_pending=max_pending, replay_confirm=confirm)
        self.world = self.kind(replay=replay, policy=policy, buffer_steps=buffer_steps)
        self.replay = replay
        # Most failures need a stream that was healthy before.
        self.world.publish(before)
        self.world.connect()
        self.world.publish(since)
        if since:
            self.world.up()

    @rule(count=few)
    def publish(self, count: int) -> None:
        self.world.publish(count)

    @rule()
    def engine_clears(self) -> None:
        self.world.publish(clear=True)

    @rule(encodable=st.booleans())
    def engine_fails(self, encodable: bool) -> None:
        self.world.publish(encodable=encodable, readable=False)

    @rule(count=st.integers(1, 6))
    def deliver(self, count: int) -> None:
        self.world.deliver(count)

    @precondition(lambda self: self.world.channel)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.world.channel[data.draw(st.integers(0, len(self.world.channel) - 1))]

    @precondition(lambda self: self.world.channel)
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        channel = self.world.channel
        item = channel[data.draw(st.integers(0, len(channel) - 1))]
        channel.insert(data.draw(st.integers(0, len(channel))), item)

    @precondition(lambda self: len(self.world.channel) > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        channel = self.world.channel
        first, second = (data.draw(st.integers(0, len(channel) - 1)) for _ in range(2))
        channel[first], channel[second] = channel[second], channel[first]

    @precondition(lambda self: self.world.channel)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.world.channel) - 1))
        self.world.channel[place] = (self.world.channel[place][0], GARBAGE)

    @precondition(lambda self: not self.world.connection_open)
    @rule()
    def connect(self) -> None:
        self.world.connect()

    @precondition(lambda self: not self.world.connection_open)
    @rule()
    def refuse(self) -> None:
        self.world.do(self.world.stream.disconnected(self.world.now, "refused"))

    @precondition(lambda self: self.world.connection_open)
    @rule(delivered=st.integers(0, 3))
    def disconnect(self, delivered: int) -> None:
        self.world.deliver(delivered)
        self.world.disconnect()

    @rule(published=st.integers(0, 8), away=st.sampled_from([0.0, 0.001, 2.0]), back=st.booleans(), up=st.booleans())
    def restart(self, published: int, away: float, back: bool, up: bool) -> None:
        """The new process often has the old one's address, and sometimes a clock that was set back."""
        self.world.restart()
        self.world.now += away
        self.world.clock += -50.0 if back else away
        self.world.publish(published)
        self.world.connect()
        if up:
            self.world.publish()
            self.world.up()

    @precondition(lambda self: self.world.connection_open)
    @rule(missed=st.integers(0, 3), up=st.booleans())
    def blip(self, missed: int, up: bool) -> None:
        """The connection is lost and made again, with the same process."""
        self.world.disconnect()
        self.world.publish(missed)
        self.world.connect()
        if up:
            self.world.publish()
            self.world.up()

    @precondition(lambda self: self.world.connection_open)
    @rule(count=few, then=st.integers(0, 4), deaf=st.booleans())
    def lose(self, count: int, then: int, deaf: bool) -> None:
        """Some batches are lost, and the publisher answers at once or not at all for a long time."""
        self.world.deliver()
        self.world.publish(count)
        self.world.channel.clear()
        self.world.publish(then)
        self.world.deliver()
        if deaf:
            self.world.wait(15.0, serve=False, step=1.0)
        else:
            self.world.serve()
            self.world.receive()

    @precondition(lambda self: self.replay and self.world.connection_open and self.world.liar is None)
    @rule(count=few)
    def lose_the_last(self, count: int) -> None:
        """The last batches are lost, and no later one shows that. Only a question to the publisher can."""
        world = self.world
        world.limit(0.0)
        world.deliver()
        world.publish(count)
        world.channel.clear()
        world.wait(2 * world.stream.policy.idle_probe[1])
        if world.state == "exact":
            assert world.applied_upto() == len(world.process.published)

    @precondition(lambda self: self.world.connection_open)
    @rule(seconds=st.sampled_from([0.0, 0.05, 3.0]))
    def limit(self, seconds: float) -> None:
        self.world.limit(seconds)

    @precondition(lambda self: self.world.connection_open)
    @rule(count=few)
    def overlook(self, count: int) -> None:
        self.world.overlook(count)

    @rule(upto=st.none() | st.integers(0, 6), end=st.booleans())
    def serve(self, upto: int | None, end: bool) -> None:
        self.world.serve(upto=upto, end=end)

    @rule(count=st.none() | st.integers(1, 4))
    def receive(self, count: int | None) -> None:
        self.world.receive(count)

    @precondition(lambda self: len(self.world.answer) > 1)
    @rule(data=st.data())
    def replay_loses_one(self, data: st.DataObject) -> None:
        del self.world.answer[data.draw(st.integers(0, len(self.world.answer) - 2))]

    @rule(seconds=st.sampled_from([0.01, 0.2, 0.6, 2.1, 9.0]), serve=st.booleans())
    def wait(self, seconds: float, serve: bool) -> None:
        self.world.wait(seconds, serve=serve)

    @rule()
    def suspect(self) -> None:
        self.world.do(self.world.stream.suspect(self.world.now))

    @invariant()
    def exact_means_equal(self) -> None:
        self.world.check()

    def settle(self) -> None:
        self.world.wait(120.0)
        if self.world.answering:
            # The rest of a cut answer never comes. The stream requests it again at the end of its patience.
            self.world.wait(self.world.stream.policy.replay_patience[1])

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.connection_open:
            world.connect()
        world.limit(0.0)
        world.deliver()
        self.settle()
        world.check()
        if world.waits_for_batch:
            world.publish()
            world.deliver()
            world.wait(30.0)
            world.check()
        process = world.process
        if self.replay:
            assert world.state != "stale", world.stream.reason
            assert world.applied_upto() == len(process.published) or process.published[-1] is None
            whole = len(process.buffer) == len(process.published) and all(each != GARBAGE for _, each in process.buffer)
            if whole and process.truth(len(process.published)) is not None:
                # Its whole history is still available and readable, so there is no reason for another state.
                assert world.state == "exact", world.stream.reason
        # Left alone, the stream settles: it does not clear and rebuild forever.
        clears = world.clears
        world.wait(60.0)
        assert world.clears == clears
        world.check()


FaultyChannel.TestCase.settings = settings(max_examples=settings.default.max_examples * 3 // 2)
TestSyncMachine = FaultyChannel.TestCase


class Restarting(FaultyChannel):
    """The router ends as well, and another one continues from its saved state."""

    kind = Router
    world: Router

    @rule(missed=st.integers(0, 6), engine=st.booleans(), back=st.booleans(), up=st.booleans())
    def restart_router(self, missed: int, engine: bool, back: bool, up: bool) -> None:
        """Meanwhile, the engine goes on or restarts as well, perhaps with a clock that was set back."""
        self.world.restart_router()
        if engine:
            self.world.restart()
            self.world.clock += -50.0 if back else 1.0
        self.world.publish(missed)
        self.world.connect()
        if up:
            self.world.publish()
            self.world.up()


class Lying(FaultyChannel):
    """The replay endpoint belongs to another process, for a while or for good.

    If a publisher is silent for half a second, no stream can detect this. The check is weaker there: after a live batch
    and a second of silence, exact means equal. If the publisher is not silent before that, exact means equal at every
    moment, for any answer of the other process.
    """

    liar: Process | None = None
    later: float

    @precondition(lambda self: self.liar is None)
    @rule(published=st.integers(0, 8), later=st.sampled_from([-50.0, 0.0, 50.0]), waiting=st.integers(0, 2))
    def swap(self, published: int, later: float, waiting: int) -> None:
        """The other process has older or newer batches. Some of the engine's arrive while the request is on its way."""
        self.world.publish(waiting)
        self.world.deliver()
        self.liar = Process()
        self.later = later
        self.lie(published)
        self.world.liar = self.liar

    @precondition(lambda self: self.liar is not None)
    @rule(count=few)
    def lie(self, count: int) -> None:
        """The other process publishes as well."""
        for _ in range(count):
            number = len(self.liar.published)
            self.liar.publish(batch(self.world.clock + self.later + number / 1000, f"other {number}"))

    @precondition(lambda self: self.liar is not None)
    @rule(lies=st.booleans())
    def mend(self, lies: bool) -> None:
        self.world.liar = self.liar if lies else None

    @invariant()
    def exact_means_equal(self) -> None:
        world = self.world
        if not world.was_silent:
            self.check()

    def check(self) -> None:
        foreign = {payload for _, payload in self.liar.buffer} if self.liar else set()
        if self.world.state == "exact":
            assert not set(self.world.held) & foreign
            self.world.check()

    @precondition(lambda self: self.world.connection_open and self.liar is not None)
    @rule(count=few)
    def prove(self, count: int) -> None:
        world = self.world
        world.limit(0.0)
        world.deliver()
        world.publish(count)
        world.deliver()
        world.wait(1.5)
        self.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.connection_open:
            world.connect()
        self.prove(2)
        world.liar = None
        world.wait(30.0)
        self.prove(1)
        if self.replay:
            self.settle()
            assert world.state != "stale", world.stream.reason
        clears = world.clears
        world.wait(60.0)
        assert world.clears == clears


Lying.TestCase.settings = settings(max_examples=settings.default.max_examples, report_multiple_bugs=False)
TestSyncLies = Lying.TestCase


Restarting.TestCase.settings = settings(max_examples=settings.default.max_examples // 2)
TestSyncResume = Restarting.TestCase

"""A simulated engine behind a faulty channel, the stream machine and the real index: exact has to mean equal.

The test records the engine's own answers after every batch that it publishes. Whenever the index calls the pod exact,
its answers must equal the engine's after the last applied batch, for any fault of the channel. Every batch of this life
of the engine is either applied or counted as lost.
"""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sync_support import GARBAGE, Process, World

from kvindex import EventDecodeError, PrefixIndex
from kvindex.sim.engine import Engine, Prompt
from kvindex.sim.wire import encode_batch, wire_form
from kvindex.sync.actions import Action, Clear, Incident, Ingest, Mark
from kvindex.sync.policy import StreamPolicy

SIZE = 4
FORMS = ["vllm-0.9.0", "vllm-0.22.0", "vllm-0.33.0", "sglang-0.4.7", "sglang-0.5.22"]


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(7)
    systems = [rng.integers(0, 50, 3 * SIZE) for _ in range(2)]
    return [
        Prompt(np.concatenate([systems[n % 2], rng.integers(0, 50, int(rng.integers(1, 6 * SIZE)))])) for n in range(8)
    ]


class EngineWorld(World):
    """A world in which an engine makes the batches, and the applied ones go into a real index."""

    def __init__(self, form: str, *, window: bool, **options) -> None:
        self.form = wire_form(form)
        self.window = window and form in ("vllm-0.22.0", "vllm-0.33.0")
        self.prompts = prompts()
        self.index = PrefixIndex(block_size=SIZE)
        self.index.configure_pod("pod", engine=self.form.engine)
        # Since the last clear, and in total. They count the machine's reports between its other actions: its own
        # counters are ahead of these, so one call can count a loss before a clear or after it.
        self.applied = self.lost = self.lost_ever = 0
        self.start_engine()
        super().__init__(**options)

    def start_engine(self) -> None:
        options = {"window": 2 * SIZE} if self.window else {}
        self.engine = Engine(24, SIZE, flavor=self.form.engine, **options)
        self.running: list = []
        self.answers = [self.hits()]
        self.failed: list[bool] = []

    def hits(self) -> list[int]:
        return [self.engine.hit_prompt(prompt) for prompt in self.prompts]

    def flush(self, *, encodable: bool = True) -> None:
        events = self.engine.take_events()
        if not events:
            return
        self.clock += 0.01
        payload = encode_batch(events, self.form, ts=self.clock)
        message = self.process.publish(payload if encodable else None)
        self.answers.append(self.hits())
        if message is not None and self.connection_open:
            self.channel.append(message)

    def restart(self) -> None:
        super().restart()
        self.start_engine()
        self.flush()

    def do(self, actions: list[Action]) -> None:
        todo = list(actions)
        for action in todo:
            if isinstance(action, Ingest):
                try:
                    report = self.index.ingest("pod", action.payload, dp_rank=0)
                except EventDecodeError as error:
                    todo += self.stream.rejected(action.seq, action.payload, self.now, str(error))
                    continue
                self.applied += 1
                if report.cleared:
                    todo += self.stream.cleared(action.seq, self.now)
                continue
            if isinstance(action, Clear):
                self.index.clear_worker("pod", 0)
                self.applied = self.lost = 0
            elif isinstance(action, Incident) and action.kind in ("gap_accepted", "rejected"):
                batches = int(action.detail.split()[0]) if action.kind == "gap_accepted" else 1
                self.lost += batches
                self.lost_ever += batches
            elif isinstance(action, Mark):
                self.index.mark_worker("pod", 0, action.state)
            super().do([action])

    def check(self) -> None:
        assert self.state == self.stream.state
        if self.index.pod_state("pod") != "exact":
            return
        assert self.connection_open
        assert self.applied_upto() > self.owed
        told = [self.index.match_prefix(prompt.tokens).tokens.get("pod", 0) for prompt in self.prompts]
        assert told == self.answers[self.applied_upto()]


class FaultyStream(RuleBasedStateMachine):
    world: EngineWorld

    @initialize(
        form=st.sampled_from(FORMS),
        window=st.booleans(),
        replay=st.booleans(),
        buffer_steps=st.sampled_from([4, 10_000]),
        confirm=st.sampled_from([2, 256]),
        before=st.integers(0, 4),
    )
    def start(self, form: str, window: bool, replay: bool, buffer_steps: int, confirm: int, before: int) -> None:
        policy = StreamPolicy(replay_confirm=confirm)
        self.world = EngineWorld(form, window=window, replay=replay, policy=policy, buffer_steps=buffer_steps)
        self.replay = replay
        self.world.flush()
        for number in range(before):
            self.serve(number)
        self.world.connect()

    @rule(number=st.integers(0, 7))
    def serve(self, number: int) -> None:
        world = self.world
        request = world.engine.start(world.prompts[number])
        world.flush()
        if request is not None:
            world.running.append(request)

    @precondition(lambda self: self.world.running)
    @rule(tokens=st.integers(0, 9), encodable=st.sampled_from([True, True, True, False]))
    def finish(self, tokens: int, encodable: bool) -> None:
        world = self.world
        request = world.running.pop(0)
        world.engine.decode(request, list(range(tokens)))
        world.flush(encodable=encodable)
        world.engine.finish(request)
        world.flush()

    @precondition(lambda self: not self.world.running)
    @rule()
    def reset(self) -> None:
        self.world.engine.reset()
        self.world.flush()

    @rule(count=st.integers(1, 6))
    def deliver(self, count: int) -> None:
        self.world.deliver(count)

    @precondition(lambda self: self.world.channel)
    @rule(data=st.data(), what=st.sampled_from(["drop", "repeat", "swap", "damage"]))
    def meddle(self, data: st.DataObject, what: str) -> None:
        channel = self.world.channel
        place = data.draw(st.integers(0, len(channel) - 1))
        if what == "drop":
            del channel[place]
        elif what == "repeat":
            channel.insert(data.draw(st.integers(0, len(channel))), channel[place])
        elif what == "swap":
            other = data.draw(st.integers(0, len(channel) - 1))
            channel[place], channel[other] = channel[other], channel[place]
        else:
            channel[place] = (channel[place][0], GARBAGE)

    @precondition(lambda self: self.world.connection_open)
    @rule(again=st.booleans())
    def lose_connection(self, again: bool) -> None:
        self.world.disconnect()
        if again:
            self.world.connect()

    @rule(away=st.sampled_from([0.0, 0.001, 2.0]), served=st.lists(st.integers(0, 7), max_size=5))
    def restart(self, away: float, served: list[int]) -> None:
        self.world.restart()
        self.world.now += away
        self.world.clock += away
        for number in served:
            self.serve(number)
        self.world.connect()

    @precondition(lambda self: not self.world.connection_open)
    @rule()
    def connect(self) -> None:
        self.world.connect()

    @rule(upto=st.none() | st.integers(0, 6), end=st.booleans(), count=st.none() | st.integers(1, 4))
    def answer(self, upto: int | None, end: bool, count: int | None) -> None:
        self.world.serve(upto=upto, end=end)
        self.world.receive(count)

    @rule(seconds=st.sampled_from([0.2, 0.6, 2.1, 12.0]), serve=st.booleans())
    def wait(self, seconds: float, serve: bool) -> None:
        self.world.wait(seconds, serve=serve)

    @invariant()
    def exact_means_equal(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.connection_open:
            world.connect()
        world.deliver()
        world.wait(120.0)
        world.check()
        if world.waits_for_batch:
            while world.running:
                self.finish(tokens=0, encodable=True)
            self.reset()
            world.deliver()
            world.wait(30.0)
            world.check()
        world.index._check()
        published = world.process.published
        if self.replay:
            assert world.state != "stale", world.stream.reason
            if published and published[-1] is not None:
                # Applied or counted as lost: there is no third case.
                assert world.applied + world.lost == len(published)
        assert world.lost_ever == world.stream.counts["lost_batches"]
        if self.replay and None not in published and len(world.process.buffer) == len(published):
            assert world.index.pod_state("pod") == "exact", world.stream.reason
        assert isinstance(world.process, Process)


FaultyStream.TestCase.settings = settings(max_examples=settings.default.max_examples)
TestSyncEngine = FaultyStream.TestCase

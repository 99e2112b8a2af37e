"""No pod waits long for another's flood: a socket's turn in the poll loop ends after a few milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import zmq

from kvindex.sync.sockets import BUDGET, TURN, SocketOptions, Subscription


class Loop:
    """A loop with a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def watch(self, fd: int, handler: object) -> None:
        pass

    def unwatch(self, fd: int) -> None:
        pass


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as made:
        yield made


def subscribed(context: zmq.Context, loop: Loop, name: str, message: Callable) -> tuple[Subscription, zmq.Socket]:
    """Return a subscription and its publisher, with the connection established."""
    publisher = context.socket(zmq.XPUB)
    publisher.sndhwm = 0
    publisher.linger = 0
    publisher.bind(f"inproc://{name}")
    options = SocketOptions(heartbeat=0.0, connect_timeout=1.0, queue=0, max_message=1 << 20)
    subscription = Subscription(
        loop, context, options, f"inproc://{name}", b"", made=lambda now: None, lost=lambda now, why: None,
        message=message,
    )  # fmt: skip
    assert publisher.poll(20_000)
    assert publisher.recv() == b"\x01"  # it has subscribed: no message from here on is lost
    return subscription, publisher


@pytest.mark.parametrize(("cost", "most"), [(0.0, BUDGET), (TURN / 7.5, 8), (10.0, 1)])
def test_a_flood_has_its_turn_and_then_waits_for_the_others(context, cost, most):
    """For many messages and for slow ones, the quiet pod's message is taken in the next turn, not after the flood."""
    loop, taken = Loop(), []

    def flooded(frames: list[bytes], now: float) -> None:
        assert now == loop.now
        taken.append("flood")
        loop.now += cost

    flood, floods = subscribed(context, loop, "flood", flooded)
    quiet, speaks = subscribed(context, loop, "quiet", lambda frames, now: taken.append("quiet"))
    for _ in range(3 * BUDGET):
        floods.send(b"x")
    speaks.send(b"x")
    assert flood.ready(loop.now) is True
    assert len(taken) == most
    assert quiet.ready(loop.now) is False
    assert taken[most:] == ["quiet"]
    while flood.ready(loop.now):
        pass
    assert taken.count("flood") == 3 * BUDGET  # and no message of it is lost
    for each in (flood, quiet, floods, speaks):
        each.close()

"""CURVE: only a publisher with the secret key is trusted, and its messages are encrypted."""

from __future__ import annotations

import time
from typing import Any

import pytest
import zmq
import zmq.auth
from chaos.proxy import Proxy
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import InvalidTypeError, InvalidValueError, PodSource, PrefixIndex, StreamError
from kvindex.sim.process import SimConfig, SimProcess
from kvindex.sim.publisher import Publisher
from kvindex.sync.manager import EventManager

PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())
OTHER_PUBLIC, OTHER_SECRET = (key.decode() for key in zmq.curve_keypair())


@pytest.fixture
def index():
    return PrefixIndex(block_size=4)


@pytest.fixture
def manager(index):
    with nothing_left_behind(), EventManager(index, policy=BRISK, connect_timeout=0.5) as made:
        yield made


def source(pod: LivePublisher, **options) -> PodSource:
    return PodSource(pod.name, **{"ranks": pod.ranks, "model": "m", **options})


def held(index: PrefixIndex, pod: LivePublisher) -> int:
    return index.match_prefix(pod.chain(0), model="m").tokens.get(pod.name, 0)


@pytest.mark.parametrize("client_keys", [None, (OTHER_PUBLIC, OTHER_SECRET)])
def test_streams_and_replays_are_encrypted(index, manager, client_keys):
    with LivePublisher(secret_key=SECRET.encode()) as pod:
        pod.publish(5)
        manager.add_pod(source(pod, server_key=PUBLIC, client_keys=client_keys))
        assert manager.wait_until_current(30)
        pod.publish(3)
        until(lambda: held(index, pod) == len(pod.chain(0)))
        assert index.pod_state("pod") == "exact"
        assert manager.status()["pod"].replays >= 1


@pytest.mark.parametrize("publisher", [{}, {"secret_key": OTHER_SECRET.encode()}])
def test_a_publisher_without_the_secret_key_is_ignored(index, manager, publisher):
    with LivePublisher(**publisher) as stranger, LivePublisher(name="known", secret_key=SECRET.encode()) as known:
        manager.add_pod(source(stranger, server_key=PUBLIC))
        manager.add_pod(source(known, server_key=PUBLIC))
        stranger.publish(5)
        known.publish(5)
        until(lambda: held(index, known) == len(known.chain(0)))
        until(lambda: "server_key" in manager.status()["pod"].reason)
        stranger.publish(5)
        status = manager.status()["pod"]
        assert (status.state, status.connected, status.batches) == ("stale", False, 0)
        assert held(index, stranger) == 0
        assert index.stats()["blocks"] == 5


class Wire(Proxy):
    """Keeps all passing data, and on request changes one bit of a batch's last token, once."""

    def __init__(self, endpoint: str) -> None:
        self.seen = b""
        self.spoil = False
        super().__init__("127.0.0.1", int(endpoint.rpartition(":")[2]))

    def _damaged(self, data: bytes) -> bytes:
        self.seen += data
        # Longer than a heartbeat. A batch ends with that token, the block size, no adapter and the rank.
        if self.spoil and len(data) > 60:
            self.spoil = False
            return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]
        return data


@pytest.fixture
def wired(manager):
    """Follow a pod over a :class:`Wire`. For a pod with keys, replays bypass it."""
    wires = []

    def follow(pod: LivePublisher, **options: Any) -> Wire:
        endpoint, replay = pod.ranks[0]
        wires.append(Wire(endpoint))
        ranks = {0: (f"tcp://127.0.0.1:{wires[0].port}", replay if "server_key" in options else None)}
        manager.add_pod(source(pod, ranks=ranks, **options))
        assert manager.wait_until_current(30)
        return wires[0]

    yield follow
    for wire in wires:
        wire.close()


@pytest.mark.parametrize("keys", [True, False])
def test_what_passes_can_be_read_only_without_keys(index, manager, wired, keys):
    with LivePublisher(secret_key=SECRET.encode() if keys else None) as pod:
        wire = wired(pod, server_key=PUBLIC) if keys else wired(pod)
        until(lambda: pod.publish(clear=True) or manager.status()["pod"].batches or time.sleep(0.01))
        pod.publish(5)
        until(lambda: held(index, pod) == len(pod.chain(0)))
        assert (b"BlockStored" in wire.seen) != keys


def test_what_is_changed_on_the_way_is_not_believed(index, manager, wired):
    with LivePublisher(secret_key=SECRET.encode()) as pod:
        wire = wired(pod, server_key=PUBLIC)
        pod.publish(5)
        wire.spoil = True
        until(lambda: pod.publish() or not wire.spoil or time.sleep(0.01))
        until(lambda: held(index, pod) == len(pod.chain(0)) and index.pod_state("pod") == "exact")
        assert index.stats()["blocks"] == pod.count[0]
        assert manager.status()["pod"].errors == {}


def test_what_is_changed_on_the_way_is_believed_without_keys(index, manager, wired):
    """Otherwise the test above would prove nothing: events have no checksum."""
    with LivePublisher() as pod:
        wire = wired(pod)
        until(lambda: pod.publish(clear=True) or manager.status()["pod"].batches or time.sleep(0.01))
        pod.publish(5)
        wire.spoil = True
        until(lambda: pod.publish() or not wire.spoil or time.sleep(0.01))
        until(lambda: index.stats()["blocks"] == len(pod.chain(0)) // pod.block_size)
        assert held(index, pod) < len(pod.chain(0))


def test_a_publisher_with_keys_does_not_talk_to_who_has_none(index, manager):
    with LivePublisher(secret_key=SECRET.encode()) as pod:
        manager.add_pod(source(pod))
        pod.publish(3)
        until(lambda: "or needs a key" in manager.status()["pod"].reason)
        assert index.stats()["blocks"] == 0


def test_a_simulated_pod_has_its_keys_from_a_file(manager, tmp_path):
    public, secret = zmq.auth.create_certificates(tmp_path, "pod")
    with SimProcess(SimConfig(name="pod", block_size=4, curve=secret)) as process:
        key = process.ready["server_key"]
        assert key.encode() == zmq.auth.load_certificate(public)[0]
        manager.add_pod(PodSource("pod", ranks=process.ranks, server_key=key))
        assert manager.wait_until_current(30)
    with pytest.raises(InvalidValueError, match="no secret key"):
        SimConfig(curve=public).keys()
    with pytest.raises(InvalidValueError, match="not a CURVE certificate"):
        SimConfig(curve=str(tmp_path / "none")).keys()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"server_key": "short"}, InvalidValueError, "server_key of pod 'p' must be a CURVE key"),
        ({"server_key": "~" * 40}, InvalidValueError, "server_key of pod 'p' must be a CURVE key"),
        ({"server_key": PUBLIC.encode()}, InvalidTypeError, "server_key of pod 'p' must be a str"),
        ({"client_keys": (PUBLIC, SECRET)}, InvalidValueError, "need a server_key"),
        ({"server_key": PUBLIC, "client_keys": (PUBLIC, OTHER_SECRET)}, InvalidValueError, "must be a CURVE key pair"),
        ({"server_key": PUBLIC, "client_keys": PUBLIC}, InvalidTypeError, r"must be \(public, secret\)"),
        ({"server_key": PUBLIC, "client_keys": (1, 2)}, InvalidValueError, "must be a CURVE key pair"),
    ],
)
def test_keys_that_are_none_are_refused_where_they_are_given(options, error, named):
    with pytest.raises(error, match=named) as raised:
        PodSource("p", endpoint="tcp://127.0.0.1:5557", **options)
    assert SECRET not in str(raised.value)
    assert OTHER_SECRET not in str(raised.value)


def test_a_source_does_not_show_its_secret():
    source = PodSource(
        "p", endpoint="tcp://127.0.0.1:5557", server_key=PUBLIC, client_keys=(OTHER_PUBLIC, OTHER_SECRET)
    )
    assert OTHER_SECRET not in repr(source)
    assert source == PodSource.from_mapping(
        {
            "name": "p",
            "endpoint": "tcp://127.0.0.1:5557",
            "server_key": PUBLIC,
            "client_keys": [OTHER_PUBLIC, OTHER_SECRET],
        }
    )


# Pods that connect

SERVER = tuple(key.decode() for key in zmq.curve_keypair())


def connecting(endpoint: str, name: str, secret: str | None, **options) -> LivePublisher:
    keys = {} if secret is None else {"secret_key": secret.encode(), "server_key": SERVER[0].encode()}
    return LivePublisher(name=name, endpoint=endpoint, connect=True, **{"replay_endpoint": None, **keys, **options})


def heard(index: PrefixIndex, manager: EventManager, pod: LivePublisher) -> None:
    """Publish until a batch arrives, then clear, so that earlier losses do not matter, and wait for the rest."""
    until(lambda: pod.publish() or pod.name in manager.status() or time.sleep(0.01))
    pod.publish(clear=True)
    pod.publish(5)
    until(lambda: held(index, pod) == len(pod.chain(0)))


def test_pods_that_connect_are_encrypted_and_who_has_no_keys_is_ignored(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)
    with (
        connecting(endpoint, "stranger", None) as stranger,
        connecting(endpoint, "lost", SECRET, server_key=OTHER_PUBLIC.encode()) as lost,
        connecting(endpoint, "known", SECRET) as known,
    ):
        for _ in range(20):
            stranger.publish()
            lost.publish()
        heard(index, manager, known)
        for _ in range(20):
            stranger.publish()
            lost.publish()
            known.publish()
        until(lambda: held(index, known) == len(known.chain(0)))
        assert set(manager.status()) == {"known"}
        assert index.pod_state("known") == "exact"


def test_only_those_publishers_connect_that_are_admitted(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*", server_keys=SERVER, publisher_keys=[PUBLIC])
    with connecting(endpoint, "other", OTHER_SECRET) as other, connecting(endpoint, "known", SECRET) as known:
        other.publish(20)
        heard(index, manager, known)
        other.publish(20)
        known.publish()
        until(lambda: held(index, known) == len(known.chain(0)))
        assert set(manager.status()) == {"known"}
        # A pod that is declared later is admitted by its own key at its next attempt.
        manager.add_pod(PodSource("other", model="m", server_key=OTHER_PUBLIC))
        until(lambda: other.publish() or manager.status()["other"].batches or time.sleep(0.01))
        other.publish(clear=True)
        other.publish(5)
        until(lambda: held(index, other) == len(other.chain(0)))


@pytest.mark.parametrize("declared", [False, True])
def test_nobody_speaks_for_another_ones_pod(index, manager, declared):
    endpoint = manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)
    if declared:
        manager.add_pod(PodSource("pod", model="m", server_key=PUBLIC))
    with connecting(endpoint, "pod", SECRET) as pod, connecting(endpoint, "pod", OTHER_SECRET) as liar:
        if declared:
            # Even before the pod itself has published a batch.
            until(lambda: liar.publish() or manager.faults().get("foreign_key") or time.sleep(0.01))
            until(lambda: pod.publish() or manager.status()["pod"].batches or time.sleep(0.01))
        heard(index, manager, pod)
        before = manager.faults().get("foreign_key", 0)
        liar.life = 7  # with blocks of its own
        until(lambda: liar.publish() or manager.faults().get("foreign_key", 0) > before + 10 or time.sleep(0.01))
        liar.publish(clear=True)
        pod.publish(3)
        until(lambda: held(index, pod) == len(pod.chain(0)))
        assert index.pod_state("pod") == "exact"
        assert held(index, liar) == 0
        assert manager.status()["pod"].restarts == 0


def test_a_declared_pod_that_connects_answers_replays_with_the_same_key(index, manager):
    endpoint = manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)
    with connecting(endpoint, "pod", SECRET, replay_endpoint="tcp://127.0.0.1:*") as pod:
        pod.publish(7)
        manager.add_pod(PodSource("pod", replay_endpoint=pod.ranks[0][1], model="m", server_key=PUBLIC))
        until(lambda: pod.publish() or index.pod_state("pod") == "exact" or time.sleep(0.01))
        until(lambda: held(index, pod) == len(pod.chain(0)))
        assert manager.status()["pod"].replays >= 1


def test_a_pod_with_a_key_is_not_believed_where_nobody_has_to_show_one(index, manager):
    with pytest.raises(InvalidValueError, match="nothing is bound with keys"):
        manager.bind("tcp://127.0.0.1:*")
        manager.add_pod(PodSource("pod", model="m", server_key=PUBLIC))
    manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)
    open_to_all = manager.bind("tcp://127.0.0.1:*")
    manager.add_pod(PodSource("pod", model="m", server_key=PUBLIC))
    with connecting(open_to_all, "pod", None) as liar:
        until(lambda: liar.publish() or manager.faults().get("foreign_key") or time.sleep(0.01))
        assert manager.status()["pod"].batches == 0


def test_a_simulated_pod_that_connects(index, manager, tmp_path):
    _, secret = zmq.auth.create_certificates(tmp_path, "pod")
    endpoint = manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)
    config = SimConfig(
        name="pod", block_size=4, curve=secret, connect=endpoint, server_key=SERVER[0], rate=50.0, replay_port=None
    )
    with SimProcess(config):
        until(lambda: "pod" in manager.status() and manager.status()["pod"].batches > 0, 30.0)
    for wrong in ({"server_key": SERVER[0].encode()}, {"connect": True, "secret_key": SECRET.encode()}):
        with zmq.Context() as context, pytest.raises(InvalidValueError, match="a publisher that connects"):
            Publisher(context, endpoint, **wrong)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"server_keys": SERVER[0]}, InvalidTypeError, r"server_keys must be \(public, secret\)"),
        ({"server_keys": (SERVER[1], SERVER[0])}, InvalidValueError, "server_keys must be a CURVE key pair"),
        ({"publisher_keys": [PUBLIC]}, InvalidValueError, "publisher_keys need server_keys"),
        ({"server_keys": SERVER, "publisher_keys": ["short"]}, InvalidValueError, "not 'short'"),
        ({"server_keys": SERVER, "publisher_keys": PUBLIC}, InvalidValueError, "publisher_keys must be CURVE keys"),
    ],
)
def test_keys_that_are_none_are_refused_where_pods_connect_to(manager, options, error, named):
    with pytest.raises(error, match=named) as raised:
        manager.bind("tcp://127.0.0.1:*", **options)
    assert SERVER[1] not in str(raised.value)


def test_a_context_has_one_doorkeeper(index):
    with zmq.Context() as context, context.socket(zmq.REP) as other:
        other.bind("inproc://zeromq.zap.01")
        with EventManager(index, context=context) as manager, pytest.raises(StreamError, match="cannot be bound"):
            manager.bind("tcp://127.0.0.1:*", server_keys=SERVER)

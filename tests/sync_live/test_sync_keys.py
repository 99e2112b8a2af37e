"""CURVE: only a publisher that has the secret key is believed, and what it sends is encrypted."""

from __future__ import annotations

import pytest
import zmq
import zmq.auth
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import InvalidTypeError, InvalidValueError, PodSource, PrefixIndex
from kvindex.sim.process import SimConfig, SimProcess
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


def test_a_publisher_with_keys_does_not_talk_to_who_has_none(index, manager):
    with LivePublisher(secret_key=SECRET.encode()) as pod:
        manager.add_pod(source(pod))
        pod.publish(3)
        until(lambda: "one with keys" in manager.status()["pod"].reason)
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
    with pytest.raises(InvalidValueError, match="no CURVE certificate"):
        SimConfig(curve=str(tmp_path / "none")).keys()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"server_key": "short"}, InvalidValueError, "server_key of pod 'p' must be a CURVE key"),
        ({"server_key": "~" * 40}, InvalidValueError, "server_key of pod 'p' must be a CURVE key"),
        ({"server_key": PUBLIC.encode()}, InvalidTypeError, "server_key of pod 'p' must be a str"),
        ({"client_keys": (PUBLIC, SECRET)}, InvalidValueError, "without a server_key"),
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

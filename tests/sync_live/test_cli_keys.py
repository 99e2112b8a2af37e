"""The commands for live streams, with pods whose streams are encrypted."""

from __future__ import annotations

import json
from functools import partial

import pytest
import zmq
import zmq.auth
from sync_support import BRISK, nothing_left_behind

from kvindex import EventManager
from kvindex.cli import doctor, main
from kvindex.sim.process import SimConfig, SimProcess

PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())
OTHER = zmq.curve_keypair()[0].decode()


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    """Run a ``kvindex sim --curve`` that has served for a while, and yield its process."""
    _, secret = zmq.auth.create_certificates(tmp_path_factory.mktemp("keys"), "pod")
    with SimProcess(SimConfig(name="pod", block_size=4, curve=secret, rate=20.0)) as process:
        yield process


@pytest.fixture
def plain():
    with SimProcess(SimConfig(name="pod", block_size=4, rate=20.0)) as process:
        yield process


def word(process):
    endpoint, answers = process.ranks[0]
    return f"pod={endpoint},{answers}"


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(doctor, "PROBE", 1.0)
    monkeypatch.setattr(doctor, "PATIENCE", 20.0)

    def run(*arguments):
        with nothing_left_behind():
            status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().out

    return run


@pytest.fixture(params=["option", "file"])
def pods(request, pod, tmp_path):
    """Return the arguments that name the pod and its key."""
    key = pod.ready["server_key"]
    if request.param == "option":
        return [word(pod), "--server-key", key]
    path = tmp_path / "pods.json"
    listed = [
        {"name": "pod", "ranks": pod.ranks, "server_key": key, "client_keys": [PUBLIC, SECRET], "max_event_rate": 1e6}
    ]
    path.write_text(json.dumps(listed))
    return ["--pods", path]


def test_a_view(command, pods):
    status, out = command("top", *pods, "--once", "--block-size", 4, "--wait", 30, "--interval", 0.01)
    assert status == 0
    assert "1 pod: 1 exact" in out


def test_a_recording(command, pods, tmp_path):
    status, out = command("record", *pods, "-o", tmp_path / "x.gz", "--batches", 5, "--seconds", 30)
    assert status == 0
    assert "pod: 5 batches" in out


def test_a_clean_bill(command, pods):
    status, out = command("doctor", *pods, "--block-size", 4, "--seconds", 0.1)
    assert status == 0, out
    assert "an encrypted socket is at" in out
    assert "its stream is exact" in out


def test_an_encrypted_pod_asked_without_its_key(command, pod):
    status, out = command("doctor", word(pod), "--seconds", 0.1)
    assert status == 1
    assert "is encrypted: give its public key (--server-key" in out
    assert "the replay endpoint" in out


def test_another_pod_than_the_key_is_of(command, pod, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 3.0)
    monkeypatch.setattr(doctor, "EventManager", partial(EventManager, policy=BRISK, connect_timeout=0.3))
    status, out = command("doctor", word(pod), "--server-key", OTHER, "--seconds", 0.1)
    assert status == 1
    assert "does not have the server_key" in out


def test_a_pod_without_keys_where_one_with_a_key_should_be(command, plain):
    status, out = command("doctor", word(plain), "--server-key", OTHER, "--seconds", 0.1)
    assert status == 1
    assert out.count("is not encrypted") == 2  # for its events and for its replays


def test_one_pod_of_a_file(command, pod, plain, tmp_path, capsys):
    path = tmp_path / "pods.json"
    listed = [
        {"name": "a", "ranks": pod.ranks, "server_key": pod.ready["server_key"]},
        {"name": "b", "ranks": plain.ranks},
    ]
    path.write_text(json.dumps(listed))
    for name in "ab":
        status, out = command("doctor", name, "--pods", path, "--block-size", 4, "--seconds", 0.1)
        assert status == 0, out
        assert out.startswith(name)
    for arguments, message in (([], "a, b: name one"), (["c"], "no pod 'c'; its pods are a, b")):
        assert main(["doctor", *arguments, "--pods", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["doctor"]) == 2
    assert "no pods" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["short", "-short", "--once"])
def test_a_key_that_is_none(capsys, key):
    assert main(["top", "a=tcp://127.0.0.1:1", "--server-key", key]) == 2
    assert "server_key of pod 'a' must be a CURVE key" in capsys.readouterr().err


def test_a_key_that_begins_as_an_option_does(command):
    """One key in 85 begins with a dash, like an option."""
    _, out = command("top", "a=tcp://127.0.0.1:1", "--server-key", f"-{PUBLIC[1:]}", "--once", "--wait", 0.01)
    assert "1 pod:" in out

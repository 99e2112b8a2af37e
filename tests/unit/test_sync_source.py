"""Where a pod's events come from: as it is written on a command line, in a file, or told by the engine's own server."""

from __future__ import annotations

import pytest

from kvindex import InvalidTypeError, InvalidValueError, PodSource

# As a text


@pytest.mark.parametrize(
    ("text", "name", "endpoint", "answers"),
    [
        ("tcp://10.0.0.1:5557", "10.0.0.1:5557", "tcp://10.0.0.1:5557", None),
        ("a=tcp://10.0.0.1:5557", "a", "tcp://10.0.0.1:5557", None),
        ("a=tcp://h:5557,tcp://other:5558", "a", "tcp://h:5557", "tcp://other:5558"),
        ("a=tcp://h:5557,5558", "a", "tcp://h:5557", "tcp://h:5558"),
        ("tcp://[::1]:5557,5558", "[::1]:5557", "tcp://[::1]:5557", "tcp://[::1]:5558"),
        ("x=y=ipc:///run/a=b", "x=y", "ipc:///run/a=b", None),
        ("a=ipc:///run/live,ipc:///run/replay", "a", "ipc:///run/live", "ipc:///run/replay"),
    ],
)
def test_a_pod_in_one_word(text, name, endpoint, answers):
    expected = PodSource(name, endpoint=endpoint, replay_endpoint=answers, model="m")
    assert PodSource.from_string(text, model="m") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:5557",
        "a=",
        "a=tcp://",
        "=tcp://h:5557",
        "a=tcp://h:5557,",
        "a=tcp://h:5557,tcp://h:5558,5559",
        "a=tcp://h:5557,h:5558",
        "a=tcp://h:5557,99999",
        "a=tcp://h:5557,5557",
        "a=ipc:///run/live,5558",
        "a=tcp://*:5557",
        "a=http://h:8000",
        "tcp://h",
    ],
)
def test_a_word_that_is_no_pod_is_refused(text):
    with pytest.raises(InvalidValueError):
        PodSource.from_string(text)


def test_a_pod_that_is_no_text_is_refused():
    with pytest.raises(InvalidTypeError):
        PodSource.from_string(b"tcp://h:5557")

"""Every exception is a KVIndexError and the corresponding builtin exception."""

import inspect
import pickle
import subprocess
import sys

import pytest

import kvindex
from kvindex import errors

BUILTIN = {
    "CapacityError": MemoryError,
    "CaptureError": ValueError,
    "EventDecodeError": ValueError,
    "InvalidTypeError": TypeError,
    "InvalidValueError": ValueError,
    "SnapshotError": OSError,
    "StreamError": RuntimeError,
    "UnknownPodError": KeyError,
}


def test_the_table_above_is_complete():
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and not n.startswith("_")}
    assert classes == BUILTIN.keys() | {"KVIndexError"}
    assert classes == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_is_caught_as_the_builtin_and_as_ours(name):
    cls = getattr(kvindex, name)
    assert issubclass(cls, errors.KVIndexError)
    assert issubclass(cls, BUILTIN[name])
    assert cls.__doc__


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_shows_the_bare_sentence_and_survives_pickling(name):
    cls = getattr(errors, name)
    error = cls("block 3 of 'x'", 17) if name in ("CaptureError", "EventDecodeError") else cls("block 3 of 'x'")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error) == "block 3 of 'x'"
    assert getattr(copy, "offset", None) == getattr(error, "offset", None)


def test_an_unknown_pod_without_a_message_is_still_printable():
    assert str(errors.UnknownPodError()) == ""


def test_without_its_core_the_package_says_how_to_build_it():
    code = "import sys; sys.modules['kvindex._core'] = None; import kvindex"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("ImportError: kvindex's compiled core is not built")
    assert "pip install --editable ." in ended.stderr

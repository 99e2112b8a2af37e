"""Threads take turns as often as the interpreter allows, instead of every 5 ms."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _eager_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)

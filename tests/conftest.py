"""Shared fixtures and Hypothesis profiles for all tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent

# With --import-mode=importlib the shared modules cannot be imported unless their folder is on the path.
sys.path.insert(0, str(HERE))
pytest.register_assert_rewrite("support", "world")

# Two cores shared with a build give no reliable time per example. The number of examples is bounded instead.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# Each run draws the same examples, so a failure comes from the change under test. The nightly draws new ones.
settings.register_profile("default", max_examples=60, stateful_step_count=40, derandomize=True, **_COMMON)
# A sanitized core is several times slower. Its suite looks for memory errors, not for rare orders of events.
settings.register_profile("sanitized", max_examples=15, stateful_step_count=40, derandomize=True, **_COMMON)
# Hypothesis keeps every example that it has tried: 5,000 took 3 GB a process. Each night draws others.
_EXAMPLES = int(os.environ.get("EXAMPLES", "2000"))
settings.register_profile("nightly", max_examples=_EXAMPLES, stateful_step_count=80, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# A shell starts background jobs with SIGINT ignored, and their child processes inherit this. A command that a test
# interrupts would run forever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the directory of captures, wire vectors and traces beside the checkout, or skip the test without it."""
    path = HERE.parent.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no recorded streams: {path} is not there")
    return path

"""What every test may ask for."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent

# Tests are imported by path (--import-mode=importlib), which leaves what they share without a way in.
sys.path.insert(0, str(HERE))
pytest.register_assert_rewrite("support", "world")

# Two cores shared with a build cannot promise a time per example, so no deadline: what is bounded is the count.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# The same examples in each run, so that a change fails for what it changed. The nightly draws new ones.
settings.register_profile("default", max_examples=60, stateful_step_count=40, derandomize=True, **_COMMON)
# A sanitized core takes several times as long: its suite looks at memory, and leaves rare orders of events to others.
settings.register_profile("sanitized", max_examples=15, stateful_step_count=40, derandomize=True, **_COMMON)
# Hypothesis remembers every example that it tried: 5,000 of them were 3 GB a process. Each night tries others.
_EXAMPLES = int(os.environ.get("EXAMPLES", "2000"))
settings.register_profile("nightly", max_examples=_EXAMPLES, stateful_step_count=80, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# A shell that starts a job in the background makes it deaf to SIGINT, and whatever that starts: a command that a test
# interrupts would go on for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of captures, wire vectors and traces beside the checkout; visibly skipped where it is not."""
    path = HERE.parent.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no recorded streams: {path} is not there")
    return path

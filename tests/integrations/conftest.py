"""Fixtures for tests with other routers: pods that answer as OpenAI servers, and conversations with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from talks import Talks

from kvindex.sim import SimProcess

# Otherwise LiteLLM fetches prices during its import.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
# Ray skips a replica that does not report its queue length within 0.1 s, which is a matter of chance here.
os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "10"
os.environ["RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "10"


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with ExitStack() as stack, ThreadPoolExecutor(2) as starters:
        sizes = {"a": 2000, "b": 2000, "c": 2000, "endless": 20_000}
        made = starters.map(lambda name: SimProcess(name=name, http=0, blocks=sizes[name]), sizes)
        yield {pod.config.name: stack.enter_context(pod) for pod in made}


@pytest.fixture
def pods(fleet: dict[str, SimProcess]) -> dict[str, SimProcess]:
    """Return three empty pods."""
    for pod in fleet.values():
        pod.ask("reset")
    return {name: pod for name, pod in fleet.items() if name != "endless"}


@pytest.fixture
def endless(fleet: dict[str, SimProcess]) -> SimProcess:
    """Return a pod with one endless cache for all requests. Its hits are the most that any router can reach."""
    return fleet["endless"]


@pytest.fixture
def talks(endless: SimProcess) -> Callable[..., Talks]:
    return lambda **options: Talks(endless, **options)

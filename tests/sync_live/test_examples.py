"""The examples for router authors, run unchanged with pods in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sync_support import until

from kvindex.sim.process import SimProcess
from kvindex.sim.workload import chat

ROUTER = Path(__file__).resolve().parents[2] / "examples" / "router.py"
PROMPTS = [arrival.prompt.tokens for arrival in chat(conversations=32, turns=4, system_tokens=256, rate=8.0, seed=0)]


@pytest.fixture(scope="module")
def fleet():
    pods = []
    try:
        for name, form, requests in (
            ("a", "vllm-0.33.0", 40),
            ("b", "sglang-0.5.22", 90),
            ("c", "vllm-0.22.0", 10),
        ):
            pods.append(SimProcess(name=name, form=form, seed=0))
            pods[-1].ask("run", requests=requests)
        yield pods
    finally:
        for pod in pods:
            pod.stop()


class Router:
    """The example as a process that answers line by line."""

    def __init__(self, pods):
        arguments = [f"{pod.config.name}={','.join(pod.ranks[0])},engine={pod.options['engine']}" for pod in pods]
        self.process = subprocess.Popen(
            [sys.executable, ROUTER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def best(self, tokens):
        self.process.stdin.write(json.dumps([int(token) for token in tokens]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


def reused(pods, tokens):
    """Return the number of tokens that each pod itself would reuse."""
    return {pod.config.name: pod.truth(tokens)[0] for pod in pods}


def test_it_is_short_enough_to_be_pasted():
    assert len(ROUTER.read_text().splitlines()) <= 20


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["router.py", "--help"], 0, "a pod's event streams"),
        (["router.py"], 2, "required: NAME=ENDPOINT,REPLAY_ENDPOINT"),
        (["prompts.py", "--help"], 0, "--seed of a simulated pod"),
        (["prompts.py", "first"], 2, "invalid int value: 'first'"),
    ],
)
def test_help_and_usage(arguments, status, shown):
    script, *rest = arguments
    ended = subprocess.run([sys.executable, ROUTER.with_name(script), *rest], capture_output=True, text=True)
    assert ended.returncode == status
    assert shown in " ".join((ended.stdout + ended.stderr).split())
    assert "Traceback" not in ended.stderr


def test_it_names_the_pod_that_reuses_most(fleet):
    with Router(fleet) as router:
        chosen = set()
        for tokens in PROMPTS[::6]:
            truth = reused(fleet, tokens)
            best = router.best(tokens)
            assert best is None or truth[best[0]] == best[1]
            assert (best[1] if best else 0) == max(truth.values())
            chosen.add(best and best[0])
        assert len(chosen - {None}) > 1
        assert router.best(range(900_000, 900_064)) is None


def test_a_pod_that_is_killed_gets_nothing_until_it_is_back(fleet):
    a, b, c = fleet
    tokens = PROMPTS[40]
    with Router(fleet) as router:
        name, count = router.best(tokens)
        assert name == "b"
        assert count == reused([b], tokens)["b"] == max(reused(fleet, tokens).values())
        b.kill()
        others = reused([a, c], tokens)
        until(lambda: (router.best(tokens) or [None, 0])[1] == max(others.values()))
        b.launch()
        b.ask("run", requests=90)
        until(lambda: router.best(tokens) == ["b", reused([b], tokens)["b"]])

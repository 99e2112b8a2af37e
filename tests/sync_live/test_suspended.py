"""A suspended process, and its answer right after it continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from sync_support import LivePublisher

SILENCE, PAUSE, ROUNDS = 0.6, 1.0, 3

CHILD = """
import sys, time
from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sync import pulse
pulse.SILENCE = float(sys.argv[3])
index = PrefixIndex(block_size=4)
with EventManager(index) as manager:
    manager.add_pod(PodSource("a", endpoint=sys.argv[1], replay_endpoint=sys.argv[2], model="m"))
    for line in sys.stdin:
        prompt = list(map(int, line.split()))
        while index.match_prefix(prompt, model="m", only_exact=True).tokens != {"a": len(prompt)}:
            time.sleep(0.001)
        last = time.monotonic()
        print("ready", flush=True)
        while (now := time.monotonic()) < last + pulse.SILENCE:
            last = now
        match, state = index.match_prefix(prompt, model="m", only_exact=True), index.pod_state("a")
        print(match.tokens, state, manager.is_exact(), manager.status()["a"].reason, sep="|", flush=True)
        while not manager.is_exact() or index.pod_state("a") != "exact":
            time.sleep(0.001)
        print(index.match_prefix(prompt, model="m").tokens, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the system cannot suspend a process")
def test_no_answer_is_exact_that_misses_what_came_meanwhile() -> None:
    with LivePublisher(name="a") as pod:
        ((endpoint, replay),) = pod.ranks.values()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, endpoint, str(replay), str(SILENCE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for _ in range(ROUNDS):
                pod.publish(5)
                child.stdin.write(" ".join(map(str, pod.chain())) + "\n")
                assert child.stdout.readline() == "ready\n"
                os.kill(child.pid, signal.SIGSTOP)
                pod.publish(1, clear=True)
                time.sleep(PAUSE)
                os.kill(child.pid, signal.SIGCONT)
                tokens, state, is_exact, reason = child.stdout.readline().strip().split("|")
                assert (tokens, state, is_exact) == ("{}", "stale", "False")
                assert "suspended" in reason
                assert child.stdout.readline() == "{}\n", "what it says when it is exact again"
        finally:
            child.kill()
            child.communicate()

"""``kvindex serve``, killed and started again under load: no exact answer is wrong, and all become exact again."""

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np
import pytest

from kvindex.sim import SimProcess

BLOCK = 16
PROMPTS = [np.arange(1000 * number, 1000 * number + 40 * BLOCK, dtype=np.uint32) for number in range(1, 13)]


class Asking(threading.Thread):
    """A thread that sends one query after another and keeps every answer with its time; None without an answer."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.answers, self.ending = url, [], threading.Event()
        self.start()

    def run(self):
        number = 0
        while not self.ending.is_set():
            at = number = (number + 1) % len(PROMPTS)
            self.answers.append((time.monotonic(), at, asked(self.url, PROMPTS[at])))
            if self.answers[-1][2] is None:
                self.ending.wait(0.01)


def asked(url, prompt):
    """``{pod: (tokens held, state)}``."""
    try:
        with urlopen(f"{url}/v1/match", json.dumps({"tokens": prompt.tolist(), "model": "sim"}).encode()) as answer:
            return {pod: (hit["held"], hit["state"]) for pod, hit in json.load(answer)["pods"].items()}
    except (OSError, HTTPException):  # refused, or killed in the middle of the answer
        return None


@pytest.mark.quick
def test_a_killed_service_goes_on_from_its_snapshot(tmp_path):
    with ExitStack() as stack:
        pods = {name: stack.enter_context(SimProcess(name=name, blocks=4000)) for name in "abc"}
        follow = [f"{name}={','.join(map(str, pod.ranks[0]))}" for name, pod in pods.items()]

        def service(port):
            command = [sys.executable, "-m", "kvindex", "serve", f"--port={port}", "--model=sim",
                       f"--snapshot={tmp_path / 'snapshot'}", "--snapshot-every=0.5", *follow]  # fmt: skip
            served = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(served.kill)
            return served, re.search(r"http://\S+", served.stdout.readline())[0]

        served, url = service(0)
        # Each pod holds another part of each prompt. The parts only grow, so they are a floor of every later answer.
        truth = {name: [0] * len(PROMPTS) for name in pods}

        def serve(blocks):
            for name, pod in pods.items():
                for at, prompt in enumerate(PROMPTS):
                    upto = blocks + at % 7 + ord(name) % 3
                    pod.serve(prompt[: upto * BLOCK])
                    truth[name][at] = upto * BLOCK

        def wrong():
            found = [asked(url, prompt) for prompt in PROMPTS]
            return [
                (name, at) for name in pods for at in range(len(PROMPTS))
                if not found[at] or found[at].get(name) != (truth[name][at], "exact")
            ]  # fmt: skip

        def settled():
            while wrong():
                assert served.poll() is None
                time.sleep(0.01)

        serve(8)
        settled()
        began = time.time()
        while not (saved := tmp_path / "snapshot").exists() or saved.stat().st_mtime <= began:
            time.sleep(0.05)
        asking = Asking(url)
        serve(16)
        served.kill()
        served.wait()
        killed = time.monotonic()
        serve(24)  # while no service follows the pods
        before = {name: list(each) for name, each in truth.items()}
        served, _ = service(url.rpartition(":")[2])
        settled()
        exact = time.monotonic()
        serve(30)
        settled()
        asking.ending.set()
        asking.join()
        after = [(moment, at, found) for moment, at, found in asking.answers if moment > killed and found is not None]
        states = [hit[1] for _, _, found in after for hit in found.values()]
        # An exact answer of the restarted service has all batches that were published while it was away.
        early = [
            (name, at, hit) for _, at, found in after for name, hit in found.items()
            if hit[1] == "exact" and hit[0] < before[name][at]
        ]  # fmt: skip
        assert not early
        assert any(found is None for _, _, found in asking.answers)
        assert "exact" in states
        print(
            f"{len(asking.answers)} answers, {len(after)} of them after the kill; exact {exact - killed:.2f} s after it"
        )

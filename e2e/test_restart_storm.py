"""Many publishing pods, restarted in any order, and every restart accounted for.

A restart is a pod that closes its sockets and begins again at seq 0 with an empty cache, or a process that is killed
and started again at its ports. All pods serve and publish all the time.

The batches show whether the counters are right. Each has its time, which shows in which life of its pod it was made.
The index notes these times in the order in which it gets the batches. A restart must be counted wherever that order
goes from one life to a later one, and nowhere else. A life that ended before a batch of it was applied is invisible.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import os
import random
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil

from kvindex import PrefixIndex
from kvindex.sim.process import SimProcess

from .fleet import IndexProcess, Pods, at_rest, own_prompts
from .server import Server, main

#: Pods, and restarts of a round.
PODS, RESTARTS = (int(number) for number in os.environ.get("STORM", "12x48").split("x"))
FORMS = ("vllm-0.33.0", "vllm-0.24.0", "vllm-0.22.0", "sglang-0.5.22")
#: The share of restarts that kill the process.
KILLED = 0.25
#: The share that a later round may add to the memory of the first: noise of the allocator, not a leak.
NOISE = 0.02


class NotingIndex(PrefixIndex):
    """An index that notes the time at which each batch was made, by pod."""

    def __new__(cls) -> NotingIndex:
        made = super().__new__(cls)
        made.made_at = defaultdict(list)
        return made

    made_at: dict[str, list[float]]

    def ingest(self, pod: str, payload: Any, **where: Any) -> Any:
        # 93 cb: an array of three that begins with a float64. All forms here write that, or two elements.
        assert payload[1] == 0xCB
        self.made_at[pod].append(struct.unpack_from(">d", payload, 2)[0])
        return super().ingest(pod, payload, **where)


class NotingServer(Server):
    def followed(self) -> NotingIndex:
        self.index: NotingIndex = NotingIndex()
        return self.index

    def _op_made_at(self) -> dict[str, list[float]]:
        """The times of the batches since the last request, and of the last batch before it."""
        found = dict(self.index.made_at)
        self.index.made_at.update({pod: times[-1:] for pod, times in found.items()})
        return found

    def _op_resident(self) -> dict[str, int]:
        """Resident bytes, without the free memory that the allocator can return to the system."""
        gc.collect()
        psutil.heap_trim()
        return {"bytes": psutil.Process().memory_info().rss}


class NotingProcess(IndexProcess):
    module = "e2e.test_restart_storm"


def free_ports() -> Iterator[int]:
    """Free ports below the system's ephemeral ports: an outgoing connection might take the port of a killed pod."""
    for port in range(20000, 32000):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def _storm(pods: list[SimProcess], lives: dict[str, list[float]], dice: random.Random, restarts: int) -> None:
    for pod in pods:
        pod.ask("rate", rate=1.0)
    for _ in range(restarts):
        pod = dice.choice(pods)
        pod.ask("rate", rate=0.0)  # no request may be served between the noted time and the end
        if dice.random() < KILLED:
            pod.kill()
            lives[pod.name].append(time.time())
            pod.launch()
        else:
            lives[pod.name].append(time.time())
            pod.ask("restart")
        pod.ask("run", requests=dice.randrange(1, 4))
        pod.ask("rate", rate=1.0)
    for pod in pods:
        pod.ask("rate", rate=0.0)


def test_every_restart_of_a_storm_is_accounted_for(pods: Pods, equal) -> None:
    dice = random.Random(0)
    lives = {f"pod-{number}": [time.time()] for number in range(PODS)}
    ports = free_ports()
    made = pods.start(
        **{
            name: {"form": FORMS[number % len(FORMS)], "seed": number % 4, "blocks": 400}
            | {port: next(ports) for port in ("port", "replay_port", "control_port")}
            for number, name in enumerate(lives)
        }
    )
    pods.run(4)
    with NotingProcess() as index:
        index.follow(*made)
        at_rest(index, made)
        # A first storm, because the memory that the allocator keeps after it is no leak, but would hide one.
        _storm(made, lives, dice, RESTARTS // 4)
        at_rest(index, made, 90.0)
        resident = []
        for _ in range(2):
            before, were = index.status(), {name: len(each) for name, each in lives.items()}
            index.ask("made_at")
            _storm(made, lives, dice, RESTARTS)
            at_rest(index, made, 90.0)
            after, times = index.status(), index.ask("made_at")
            seen = 0
            for name, born in lives.items():
                applied = [bisect.bisect_right(born, at) - 1 for at in times[name]]
                shown = sum(later != sooner for sooner, later in itertools.pairwise(applied))
                counted = after[name]["restarts"] - before[name]["restarts"]
                assert counted == shown, f"{name}: {counted} restarts are counted, the batches show {shown}"
                unseen = len(born) - were[name] - len({life for life in applied if life >= were[name]})
                seen += counted
                assert counted + unseen == len(born) - were[name], f"{name}: {counted} seen, {unseen} unseen"
            assert seen > 0
            equal(index, made, [each for pod in made[:4] for each in dice.sample(own_prompts(pod.config), 5)])
            resident.append(index.ask("resident")["bytes"])
        assert resident[1] <= resident[0] * (1 + NOISE), f"memory went from {resident[0]:,} to {resident[1]:,} bytes"


if __name__ == "__main__":
    sys.exit(main(make=NotingServer))

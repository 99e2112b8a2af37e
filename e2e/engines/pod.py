"""A pod of a real engine as a process: its ranks, and a control socket like that of simulated pods."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import sys
from collections import Counter
from typing import Any

import numpy as np
import zmq

from kvindex.sim.control import Control, follow_parent
from kvindex.sim.process import prompt_of

from .rank import Rank


class EnginePod:
    """A pod of one engine; ``make(options, rank, first)`` builds a rank for each configuration."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._context: zmq.Context[Any] = zmq.Context()
        self.control = Control(self._context, self)
        self.ranks: list[Rank] = []
        self.stopping = False

    def ready(self) -> dict[str, Any]:
        """The pod's addresses, for the process that started it."""
        return {
            "ranks": {number: [rank.endpoint, rank.replay_endpoint] for number, rank in enumerate(self.ranks)},
            "control": self.control.endpoint,
            "pid": os.getpid(),
        }

    def run(self) -> None:
        while not self.stopping:
            if self.control.socket.poll(500):
                self.control.answer()
        self._op_close()
        self.control.close()
        self._context.term()

    def _op_configure(self, options: dict[str, Any]) -> dict[str, Any]:
        """Replace the engine in this process, and return the addresses of the new ranks."""
        self._op_close()
        first = _free_ports(2 * options.get("ranks", 1))
        for rank in range(options.get("ranks", 1)):
            self.ranks.append(self._make(options, rank, first))
        return self.ready()

    def _op_serve_all(self, requests: list[dict[str, Any]], rank: int = 0, steps: int | None = None) -> dict[str, Any]:
        """Queue requests and work on them, for ``steps`` steps or until all are done."""
        chosen = self.ranks[rank]
        for item in requests:
            chosen.add(prompt_of(item), np.frombuffer(item["output"], dtype="<u4").tolist())
        while (steps is None or steps > 0) and chosen.step():
            steps = None if steps is None else steps - 1
        return self._op_status()

    def _op_truths(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        hits, tiers = [], []
        for item in prompts:
            prompt = prompt_of(item)
            reach = [rank.tiers(prompt) for rank in self.ranks]
            hits.append({number: max(each.values()) for number, each in enumerate(reach)})
            tiers.append(max(reach, key=lambda each: max(each.values())))
        return {"hits": hits, "tiers": tiers, "media": [], "seqs": self._op_status()["seqs"]}

    def _op_status(self) -> dict[str, Any]:
        return {
            "seqs": {number: rank.seq for number, rank in enumerate(self.ranks)},
            "blocks": {number: rank.blocks() for number, rank in enumerate(self.ranks)},
            "figures": dict(sum((rank.figures for rank in self.ranks), Counter())),
        }

    def _op_reset(self, rank: int = 0, connector: bool = False) -> dict[str, Any]:
        done = self.ranks[rank].reset(connector)
        return {"done": done, **self._op_status()}

    def _op_close(self) -> dict[str, Any]:
        for rank in self.ranks:
            rank.close()
        self.ranks = []
        return {}


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that are free now, outside the system's range of ephemeral ports."""
    for first in range(20_000 + os.getpid() % 1000 * 10, 32_000, count):
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.socket())
                held[-1].bind(("0.0.0.0", port))
            return first
        except OSError:
            continue
        finally:
            for each in held:
                each.close()
    raise OSError(f"no {count} ports in a row are free")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.engines.pod")
    parser.add_argument("engine", choices=["vllm", "sglang"])
    args = parser.parse_args()
    # Engines write their logs to stdout, where this process has to print its line of readiness.
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"e2e.engines.{args.engine}_pod")
    pod = EnginePod(module.make)

    def stop() -> None:
        pod.stopping = True

    follow_parent(stop)
    ready.write(json.dumps(pod.ready()) + "\n")
    ready.flush()
    pod.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

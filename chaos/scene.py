"""What faults are done to: pods, each on a host of its own where that is possible, and the index that follows them."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from e2e.fleet import ROOT

from .hosts import Hosts, inside
from .observer import ObserverProcess
from .pod import PodProcess
from .proxy import Proxy

__all__ = ["PODS", "RATE", "Scene"]

#: Requests a second that each pod serves.
RATE = 20.0

#: Small caches, so that blocks come and go all the time, and wire forms of several releases.
PODS: Mapping[str, Mapping[str, Any]] = {
    "pod-0": {"form": "vllm-0.33.0", "hashes": "bytes32"},
    "pod-1": {"form": "vllm-0.22.0", "hash_seed": "one"},
    "pod-2": {"form": "sglang-0.5.22"},
    "pod-3": {"form": "vllm-0.33.0", "hash_seed": "two"},
}


class Scene:
    """A fleet that serves, an index that follows it, and their logs in ``where``. A context manager; nothing is left.

    ``proxied`` puts a proxy before each socket of each pod. ``env`` is added to the pods' environment, with ``{pod}``
    replaced by their names. ``seed`` decides who is hit.
    """

    def __init__(
        self, where: Path, *, proxied: bool = False, env: Mapping[str, str] | None = None,
        index_env: Mapping[str, str] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.where = where
        self.dice = random.Random(seed)
        self.hosts: Hosts | None = None
        self.pods: dict[str, PodProcess] = {}
        self.proxies: dict[str, tuple[Proxy, Proxy]] = {}
        self.disk = where / "disk"
        self.snapshot = self.disk / "index.snapshot"
        self.disk.mkdir(parents=True)
        path = ":".join([str(ROOT), *filter(None, sys.path)])
        try:
            if inside():
                self.hosts = Hosts(list(PODS))
            for number, (name, options) in enumerate(PODS.items()):
                host: dict[str, Any] = {}
                if self.hosts is not None:
                    host = {"host": self.hosts[name].address, "prefix": self.hosts[name].prefix}
                self.pods[name] = PodProcess(
                    name=name, blocks=1200, buffer_steps=100_000, rate=RATE, **host, **options,
                    env={
                        "PYTHONPATH": path,
                        "CHAOS_TRUTH": str(where / f"truth-{name}.bin"),
                        "CHAOS_CONTROL": str(where / f"{name}.control"),
                        **{key: value.format(pod=name) for key, value in (env or {}).items()},
                    },
                )  # fmt: skip
                if proxied:
                    endpoint, answers = self.pods[name].ranks[0]
                    self.proxies[name] = (_proxy(endpoint, number), _proxy(str(answers), number + 100))
            self.index = ObserverProcess(
                policy={}, snapshot=self.snapshot,
                env={"CHAOS_PODS": ",".join(PODS), "CHAOS_DIR": str(where), **(index_env or {})},
            )  # fmt: skip
            self.follow()
        except BaseException:
            self.close()
            raise

    def follow(self, *names: str) -> None:
        """Let the index follow these pods (all, if none are named)."""
        for name in names or self.pods:
            options = {}
            if name in self.proxies:
                events, answers = (f"tcp://127.0.0.1:{proxy.port}" for proxy in self.proxies[name])
                options["ranks"] = {0: (events, answers)}
            self.index.follow(self.pods[name], **options)

    def choose(self, mode: str, value: str = "1") -> list[str]:
        """The pods that a fault hits, as Chaos Mesh's modes choose them."""
        names = list(self.pods)
        count = {
            "one": 1,
            "all": len(names),
            "fixed": int(value),
            "fixed-percent": len(names) * int(value) // 100,
            "random-max-percent": self.dice.randint(0, len(names) * int(value) // 100),
        }[mode]
        return sorted(self.dice.sample(names, count))

    def rates(self, rate: float, pods: Iterable[str] | None = None) -> None:
        for name in self.pods if pods is None else pods:
            self.pods[name].ask("rate", rate=rate)

    def quiet(self, seconds: float) -> None:
        """Let everything go on for a while."""
        time.sleep(seconds)

    def close(self) -> None:
        for each in [*self.pods.values(), *([self.index] if hasattr(self, "index") else [])]:
            each.go_on()
            each.stop()
        for pair in self.proxies.values():
            for proxy in pair:
                proxy.close()
        if self.hosts is not None:
            self.hosts.close()
        if os.path.ismount(self.disk):
            raise OSError(f"{self.disk} is still mounted")

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _proxy(endpoint: str, seed: int) -> Proxy:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return Proxy(host, int(port), seed=seed)

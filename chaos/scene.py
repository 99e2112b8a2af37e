"""The targets of faults: pods, each on a host of its own where possible, and the index that follows them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

from e2e.fleet import PYTHONPATH

from kvindex.sim.control import ToldProcess

from .hosts import Host, inside
from .observer import ObserverProcess
from .pod import PodProcess
from .proxy import Proxy

__all__ = ["PODS", "RATE", "Scene"]

Told = TypeVar("Told", bound=ToldProcess)

#: Requests a second that each pod serves.
RATE = 20.0

#: The pods, with small caches, so blocks come and go all the time, and with wire forms of several releases.
PODS: Mapping[str, Mapping[str, Any]] = {
    "pod-0": {"form": "vllm-0.33.0", "hashes": "bytes32"},
    "pod-1": {"form": "vllm-0.22.0", "hash_seed": "one"},
    "pod-2": {"form": "sglang-0.5.22"},
    "pod-3": {"form": "vllm-0.33.0", "hash_seed": "two"},
}


class Scene:
    """A fleet that serves, an index that follows it, and their logs in ``where``. The context manager ends them all.

    ``proxied`` puts a proxy before each socket of each pod. ``env`` is added to the pods' environment, with ``{pod}``
    replaced by their names. ``seed`` decides which pods are hit.
    """

    def __init__(
        self, where: Path, *, proxied: bool, env: Mapping[str, str], index_env: Mapping[str, str], seed: int
    ) -> None:
        self.where = where
        self.dice = random.Random(seed)
        #: Empty unless the run is in namespaces of its own.
        self.hosts: dict[str, Host] = {}
        self.pods: dict[str, PodProcess] = {}
        self.proxies: dict[str, tuple[Proxy, Proxy]] = {}
        self.disk = where / "disk"
        self.snapshot = self.disk / "index.snapshot"
        self.disk.mkdir(parents=True)
        with ExitStack() as stack:
            for number, (name, options) in enumerate(PODS.items()):
                reached: dict[str, Any] = {}
                if inside():
                    self.hosts[name] = host = Host(number)
                    stack.callback(host.remove)
                    reached = {"host": host.address, "prefix": host.prefix}
                own = {"CHAOS_TRUTH": f"{where}/truth-{name}.bin", "CHAOS_CONTROL": f"{where}/{name}.control"}
                added = {key: value.format(pod=name) for key, value in env.items()}
                pod = PodProcess(
                    name=name, blocks=1200, buffer_steps=100_000, rate=RATE, **reached, **options,
                    env={"PYTHONPATH": PYTHONPATH, **own, **added},
                )  # fmt: skip
                self.pods[name] = self._ends(stack, pod)
                if proxied:
                    made = (_proxy(str(end), number + 100 * place) for place, end in enumerate(pod.ranks[0]))
                    self.proxies[name] = tuple(stack.enter_context(closing(proxy)) for proxy in made)  # type: ignore[assignment]
            index = ObserverProcess(
                policy={}, snapshot=self.snapshot,
                env={"CHAOS_PODS": ",".join(PODS), "CHAOS_DIR": str(where), **index_env},
            )  # fmt: skip
            self.index = self._ends(stack, index)
            self.follow()
            self._ending = stack.pop_all()

    @staticmethod
    def _ends(stack: ExitStack, process: Told) -> Told:
        stack.callback(process.stop)
        stack.callback(process.go_on)
        return process

    def follow(self, *names: str) -> None:
        """Let the index follow these pods (all, if none are named)."""
        for name in names or self.pods:
            options = {}
            if name in self.proxies:
                options["ranks"] = {0: tuple(f"tcp://127.0.0.1:{proxy.port}" for proxy in self.proxies[name])}
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

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()


def _proxy(endpoint: str, seed: int) -> Proxy:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return Proxy(host, int(port), seed=seed)

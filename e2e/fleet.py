"""The common parts of all harnesses with real processes: pods by name, an index or router, waits and comparisons."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from kvindex import PodSource
from kvindex.sim import Arrival, Prompt, wire_form
from kvindex.sim.control import ToldProcess
from kvindex.sim.process import SimConfig, SimProcess, own_workload, prompt_map

ROOT = Path(__file__).resolve().parent.parent
#: For processes that run modules of the harnesses.
PYTHONPATH = ":".join([str(ROOT), *filter(None, sys.path)])

#: A stream's policy for harnesses: the same decisions as the defaults, with shorter waits between them.
BRISK: Mapping[str, Any] = {
    "reconnect": (0.05, 0.5),
    "replay_timeout": 1.0,
    "replay_pause": 0.5,
    "replay_retry": (0.05, 0.5),
    "idle_probe": (0.2, 2.0),
    "heal": (0.2, 1.0),
}


def until(done: Callable[[], object], what: object = "", seconds: float = 30.0, pause: float = 0.01) -> Any:
    """Poll until ``done()`` is true, and return its value. Fails after ``seconds`` with ``what``, a value or a call."""
    end = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > end:
            raise AssertionError(f"not so after {seconds:g} s: {what() if callable(what) else what}")
        time.sleep(pause)
    return found


class Pods:
    """Simulated pods in processes of their own, by name. As a context manager it ends them all.

    ``common`` has fields of :class:`SimConfig` and options of :class:`ToldProcess` for all pods.
    """

    def __init__(self, **common: Any) -> None:
        self._common = common
        self._pods: dict[str, SimProcess] = {}
        #: Number of pods that were ever started.
        self.started = 0

    def start(self, *plain: str, **options: Any) -> list[SimProcess]:
        """Start pods in parallel and wait until all are ready.

        ``plain`` names pods. Every option that is a map adds a pod of that name, with the map as its own fields. All
        other options are fields of all these pods.
        """
        own = {name: value for name, value in options.items() if isinstance(value, Mapping)}
        shared = {name: value for name, value in options.items() if name not in own}
        wanted = {name: {**shared, **fields} for name, fields in {**dict.fromkeys(plain, shared), **own}.items()}
        with ThreadPoolExecutor(4) as starters:
            futures = {
                name: starters.submit(SimProcess, **{"name": name, **self._common, **options})
                for name, options in wanted.items()
            }
        started = {name: future.result() for name, future in futures.items() if future.exception() is None}
        self._pods.update(started)
        self.started += len(started)
        for future in futures.values():
            future.result()
        return list(started.values())

    def __getitem__(self, name: str) -> SimProcess:
        return self._pods[name]

    def __iter__(self) -> Iterator[SimProcess]:
        return iter(list(self._pods.values()))

    def __len__(self) -> int:
        return len(self._pods)

    def remove(self, name: str) -> None:
        """End a pod's process and remove the pod."""
        self._pods.pop(name).stop()

    def run(self, requests: int) -> None:
        """Let each pod serve ``requests`` requests of its own workload, in parallel."""
        with ThreadPoolExecutor(4) as callers:
            list(callers.map(lambda pod: pod.ask("run", requests=requests), self))

    def close(self) -> None:
        for pod in self:
            pod.stop()
        self._pods.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source(pod: SimProcess, **options: Any) -> PodSource:
    """The source with which to follow a pod."""
    return PodSource(pod.config.name, **{"ranks": pod.ranks, "model": pod.config.model, **pod.options, **options})


def own_prompts(config: SimConfig, count: int = 128) -> list[Prompt]:
    """The first prompts that a pod of this workload serves by itself, for queries about prompts that it has seen."""
    return [arrival.prompt for arrival in itertools.islice(own_workload(config), count)]


class IndexProcess(ToldProcess):
    """The parent's handle of :mod:`e2e.server`: a process with an index that follows pods, answers and routes.

    ``policy`` has fields of a stream's policy. The process starts from the file ``snapshot`` if it exists.
    """

    #: The module that runs inside. A harness may put a server of its own here.
    module = "e2e.server"

    def __init__(
        self, name: str = "index", *, block_size: int = 16, policy: Mapping[str, Any] = BRISK, heartbeat: float = 0.7,
        snapshot: Path | str | None = None, host: str = "127.0.0.1", **options: Any,
    ) -> None:  # fmt: skip
        command = [
            sys.executable, "-m", self.module, f"--host={host}", f"--block-size={block_size}",
            f"--heartbeat={heartbeat}", f"--policy={json.dumps(dict(policy))}",
            *([] if snapshot is None else [f"--snapshot={snapshot}"]),
        ]  # fmt: skip
        env = {"PYTHONPATH": PYTHONPATH}
        super().__init__(name, command, **{"timeout": 60.0, **options, "env": {**env, **options.get("env", {})}})

    def follow(self, *pods: SimProcess, **options: Any) -> None:
        """Follow these pods, and add them as targets of routing. ``options`` are fields of :class:`PodSource`."""
        for pod in pods:
            made = {name: value for name, value in asdict(source(pod, **options)).items() if value is not None}
            made.pop("dp_size")
            # Media and groups are sets, which msgpack cannot encode.
            made = {name: sorted(each) if isinstance(each, frozenset) else each for name, each in made.items()}
            self.ask("follow", source=made, form=pod.config.form, control=pod.ready["control"])

    def forget(self, *names: str) -> None:
        """Stop following these pods."""
        for name in names:
            self.ask("forget", name=name)

    def drain(self, name: str) -> None:
        """Stop routing to a pod, but still follow it."""
        self.ask("drain", name=name)

    def status(self) -> dict[str, dict[str, Any]]:
        """The result of :meth:`EventManager.status` as plain dicts."""
        return self.ask("status")

    def state(self, pod: str) -> str:
        found: str = self.status()[pod]["state"]
        return found

    def match(self, prompts: Iterable[Prompt], *, model: str = "sim", **options: Any) -> dict[str, Any]:
        """Match prompts in the index.

        The result has ``answers``, per prompt ``{pod: {"tokens", "ranks", "media", "state"}}``, and ``seconds`` of each
        call. ``before`` and ``after`` are the last applied sequence numbers ``{pod: {rank: seq}}`` (-1: none).
        ``options``: ``ready`` (a list of pods) and ``only_exact``.
        """
        return self.ask("match", prompts=[prompt_map(prompt) for prompt in prompts], model=model, **options)

    def route(self, arrivals: Iterable[Arrival], *, model: str = "sim", **options: Any) -> list[Routed]:
        """Route requests by the index, each served to its end before the next is routed."""
        arrivals = list(arrivals)
        reply = self.ask(
            "route", prompts=[prompt_map(each.prompt) for each in arrivals], model=model,
            outputs=[np.asarray(each.output, dtype="<u4").tobytes() for each in arrivals], **options,
        )  # fmt: skip
        return [Routed(*each) for each in reply["routed"]]


class Routed(NamedTuple):
    """A routed request: its pod, the cached tokens by the index, and the tokens that the pod reused."""

    pod: str
    told: int
    hit: int


def behind(index: IndexProcess, pods: Iterable[SimProcess]) -> dict[str, str]:
    """The pods that are not exact or whose batches are not all applied yet, each with a description."""
    wanted = {pod.config.name: pod.seqs() for pod in pods}
    status = index.status()
    found = {}
    for name, seqs in wanted.items():
        if name not in status:
            found[name] = "is not followed"
            continue
        if status[name]["state"] != "exact":
            found[name] = f"is {status[name]['state']}: {status[name]['reason']}"
            continue
        workers = status[name]["workers"]
        late = {
            rank: (worker["last_seq"], seq - 1)
            for rank, seq in seqs.items()
            if (worker := workers[rank])["last_seq"] != (seq - 1 if seq else None)
        }
        if late:
            found[name] = f"is behind: (applied, published) by rank is {late}"
    return found


def at_rest(index: IndexProcess, pods: Iterable[SimProcess], seconds: float = 30.0) -> None:
    """Wait until every pod is exact and all its batches are applied. The pods must not serve by themselves."""
    pods = list(pods)
    until(lambda: not behind(index, pods), lambda: behind(index, pods), seconds, pause=0.03)


class Difference(NamedTuple):
    """An answer that differs from the pod's own, in tokens; ``place`` is a rank or a tier."""

    prompt: int
    pod: str
    place: int | str
    indexed: int
    actual: int


@dataclass
class Comparison:
    """Answers compared with the pods' own: their number, the cached tokens, and the differences."""

    answers: int = 0
    hit_tokens: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, prompt: int, pod: str, place: int | str, indexed: int, actual: int) -> None:
        self.answers += 1
        self.hit_tokens += actual
        if indexed != actual:
            self.differences.append(Difference(prompt, pod, place, indexed, actual))


def as_asked(pod: SimProcess, prompt: Prompt) -> Prompt:
    """A prompt for a query about this pod: with the name of its adapter that the pod's release publishes."""
    form = wire_form(pod.config.form)
    name = prompt.lora_name if form.says("lora_name") else str(prompt.lora_id) if prompt.lora_id else None
    return Prompt(prompt.tokens, lora_name=name, cache_salt=prompt.cache_salt, extra_keys=prompt.extra_keys)


def compare(index: IndexProcess, pods: Iterable[SimProcess], prompts: Sequence[Prompt]) -> Comparison:
    """Compare the index's answers to all prompts with every pod's own, by rank and by tier.

    All batches must be applied before.
    """
    done = Comparison()
    for pod in pods:
        name = pod.config.name
        truth = pod.truths(prompts)
        asked = [as_asked(pod, prompt) for prompt in prompts]
        answers = index.match(asked, model=pod.config.model)["answers"]
        for number, answer in enumerate(answers):
            told = answer.get(name, {"ranks": {}, "media": {}})
            for rank, hit in truth["hits"][number].items():
                done.add(number, name, rank, told["ranks"].get(rank, 0), hit)
            if pod.config.offload_blocks:
                for medium, hit in truth["media"][number].items():
                    done.add(number, name, medium, told["media"].get(medium, 0), hit)
    return done

"""Many simulated engines behind one router, and the comparison of an index with all of them.

The workload sets the time. A request holds its blocks from its start until its answer is done, and waits when there is
no room for it. Nothing here reads a clock, so the same workload gives the same run.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidValueError
from .engine import Engine, Prompt, Request
from .wire import WireForm, encode_batch
from .workload import Arrival

__all__ = [
    "Comparison",
    "Difference",
    "Fleet",
    "Index",
    "Pod",
    "PrefixAware",
    "Publish",
    "RandomChoice",
    "RoundRobin",
    "Route",
    "Served",
    "Target",
    "adapter_name",
]


class _Match(Protocol):
    @property
    def tokens(self) -> Mapping[str, int]: ...


class Index(Protocol):
    """The part of :class:`kvindex.PrefixIndex` that a router needs."""

    def match_prefix(
        self,
        tokens: Any,
        *,
        model: str = ...,
        lora_name: str | None = ...,
        cache_salt: str | None = ...,
        extra_keys: Any = ...,
    ) -> _Match:
        """The tokens of this prompt that each pod would reuse."""


class Target(Protocol):
    """The part of a pod that a router needs, for pods in this process and elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def load(self) -> int:
        """Tokens that the pod is serving."""

    @property
    def served(self) -> int:
        """Tokens of all prompts that the pod ever got."""

    def lora_name(self, prompt: Prompt) -> str | None:
        """The name of this prompt's adapter in an index."""


T = TypeVar("T", bound=Target)


def adapter_name(form: WireForm, prompt: Prompt) -> str | None:
    """The name of this prompt's adapter in an index: its number where a release publishes no names."""
    if form.says("lora_name"):
        return prompt.lora_name
    return str(prompt.lora_id) if prompt.lora_id else None


class Pod:
    """The target of a router: one engine per data-parallel rank, all with the same wire form.

    ``load`` is the number of tokens that the pod is serving, ``served`` the tokens of all prompts that it ever got.
    """

    def __init__(self, name: str, form: WireForm, ranks: Mapping[int, Engine]) -> None:
        if not ranks or len({engine.flavor for engine in ranks.values()}) > 1:
            raise InvalidValueError(f"pod {name!r} needs engines, all of one flavor")
        if any(engine.flavor != form.engine for engine in ranks.values()):
            raise InvalidValueError(f"pod {name!r} has other engines than those that write {form.name}")
        self.name = name
        self.form = form
        self.ranks = dict(ranks)
        self.flavor = form.engine
        self.served = 0
        self._loads = dict.fromkeys(ranks, 0)

    @property
    def load(self) -> int:
        return sum(self._loads.values())

    @property
    def options(self) -> dict[str, Any]:
        """The facts about the pod that an index needs: arguments of :meth:`PrefixIndex.configure_pod`."""
        return next(iter(self.ranks.values())).options

    @property
    def cached_blocks(self) -> int:
        """Blocks that a query could find, over all ranks."""
        return sum(engine.cached_blocks for engine in self.ranks.values())

    def hit(self, prompt: Prompt) -> int:
        """The true answer: the number of tokens of this prompt that the best rank would reuse now."""
        return max(engine.hit_prompt(prompt) for engine in self.ranks.values())

    def held(self, prompt: Prompt, medium: str | None = None) -> int:
        """Number of leading tokens that the best rank holds, in any tier or in ``medium`` alone, reusable or not."""
        return max(engine.held_prompt(prompt, medium) for engine in self.ranks.values())

    def lora_name(self, prompt: Prompt) -> str | None:
        """The name of this prompt's adapter in an index."""
        return adapter_name(self.form, prompt)

    def _least_loaded(self) -> int:
        return min(self._loads, key=lambda rank: (self._loads[rank], rank))


Route: TypeAlias = Callable[[Prompt, Sequence[Pod]], Pod]
Publish: TypeAlias = Callable[[str, int, bytes], object]


class RoundRobin:
    """A route to one pod after the other."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, prompt: Prompt, pods: Sequence[T]) -> T:
        pod = pods[self._next % len(pods)]
        self._next += 1
        return pod


class RandomChoice:
    """A route to a random pod, from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def __call__(self, prompt: Prompt, pods: Sequence[Pod]) -> Pod:
        return self._random.choice(pods)


class PrefixAware:
    """A route to the pod with the least to compute.

    The cost of a pod is the part of the prompt that it does not reuse, plus ``balance`` times the tokens that it is
    serving already. Among the pods within ``slack`` of the prompt's length of the cheapest, the pod that has served
    least gets the request. Without this rule, one pod would collect every conversation with the same beginning.
    """

    def __init__(self, index: Index, *, model: str = "", balance: float = 0.05, slack: float = 0.1) -> None:
        self._index = index
        self._model = model
        self._balance = balance
        self._slack = slack

    def __call__(self, prompt: Prompt, pods: Sequence[T]) -> T:
        # All pods of one router serve one model on one kind of engine, so the adapter's name is the same for all.
        reused = _ask(self._index, prompt, pods[0], self._model)
        costs = [len(prompt) - reused.get(pod.name, 0) + self._balance * pod.load for pod in pods]
        limit = min(costs) + self._slack * len(prompt)
        return min((pod for pod, cost in zip(pods, costs, strict=True) if cost <= limit), key=lambda pod: pod.served)


def _ask(index: Index, prompt: Prompt, pod: Target, model: str) -> Mapping[str, int]:
    name, keys, salt = pod.lora_name(prompt), prompt.extra_keys, prompt.cache_salt
    return index.match_prefix(prompt.tokens, model=model, lora_name=name, cache_salt=salt, extra_keys=keys).tokens


class Served(NamedTuple):
    """A started request: its time, its pod and rank, and the reused part of its prompt."""

    at: float
    pod: str
    rank: int
    prompt_tokens: int
    hit_tokens: int


class Difference(NamedTuple):
    """A pod for which the answers of index and engine differ, in tokens."""

    pod: str
    indexed: int
    actual: int


class Comparison(NamedTuple):
    """The answers of the index and of every engine to one prompt: their number, and those that differ."""

    answers: int
    differences: list[Difference]


class _Running(NamedTuple):
    until: float
    number: int
    pod: Pod
    rank: int
    request: Request
    output: npt.NDArray[np.uint32]


class Fleet:
    """Pods, their requests, and the simulated time.

    ``publish(pod, rank, payload)`` gets every batch at once and in order: pass an index's ``ingest``, or a function
    that sends to a socket. Prefill takes ``1 / prefill_rate`` seconds per token that is not reused, and an answer
    ``1 / decode_rate`` per token; these rates decide how many requests share a pod at a time. One fleet belongs to one
    thread.
    """

    def __init__(
        self, pods: Iterable[Pod], publish: Publish, *, prefill_rate: float = 20_000.0, decode_rate: float = 50.0
    ) -> None:
        self.pods = list(pods)
        if not self.pods or len({pod.name for pod in self.pods}) < len(self.pods):
            raise InvalidValueError("a fleet needs pods, each with a name of its own")
        self.now = 0.0
        self.served: list[Served] = []
        #: Answers that were cut off because a pod had no room left.
        self.truncated = 0
        self._publish = publish
        self._prefill_rate = prefill_rate
        self._decode_rate = decode_rate
        self._running: list[_Running] = []
        self._waiting: dict[tuple[str, int], deque[Arrival]] = {
            (pod.name, rank): deque() for pod in self.pods for rank in pod.ranks
        }
        self._number = 0

    # Serving

    def run(self, arrivals: Iterable[Arrival], route: Route, each: Callable[[Arrival], object] | None = None) -> None:
        """Serve all requests to their end. ``each`` is called at the time of every request, before it is routed."""
        for arrival in arrivals:
            self.advance(arrival.at)
            if each is not None:
                each(arrival)
            self.serve(arrival, route)
        self.finish()

    def serve(self, arrival: Arrival, route: Route) -> Pod:
        """Route one request and start it, or let it wait for room. Returns the pod that got the request.

        Raises :class:`InvalidValueError` for a prompt that no empty engine of the pod could hold.
        """
        self.advance(arrival.at)
        pod = route(arrival.prompt, self.pods)
        rank = pod._least_loaded()
        needed, there = pod.ranks[rank].blocks_for(len(arrival.prompt)), pod.ranks[rank].num_blocks
        if needed > there:
            tokens = len(arrival.prompt)
            raise InvalidValueError(f"a prompt of {tokens} tokens needs {needed} blocks, {pod.name} has {there}")
        pod.served += len(arrival.prompt)
        pod._loads[rank] += len(arrival.prompt) + len(arrival.output)
        queue = self._waiting[pod.name, rank]
        queue.append(arrival)
        if len(queue) == 1:
            self._start(pod, rank)
        return pod

    def advance(self, until: float) -> None:
        """Finish every answer that is done by ``until``, and start the requests that waited for its room."""
        while self._running and self._running[0].until <= until:
            self._finish_next()
        self.now = max(self.now, until)

    def finish(self) -> None:
        """Finish every request that was sent."""
        while self._running:
            self._finish_next()

    def reset(self, pod: Pod, rank: int = 0) -> bool:
        """Clear one worker's cache, as an operator would; ``False`` while it is serving."""
        done = pod.ranks[rank].reset()
        self._flush(pod, rank)
        return done

    def _start(self, pod: Pod, rank: int) -> None:
        engine, queue = pod.ranks[rank], self._waiting[pod.name, rank]
        while queue:
            arrival = queue[0]
            request = engine.start(arrival.prompt)
            if request is None:
                return
            queue.popleft()
            self.served.append(Served(self.now, pod.name, rank, len(arrival.prompt), request.hit))
            prefill = (len(arrival.prompt) - request.hit) / self._prefill_rate
            until = self.now + prefill + len(arrival.output) / self._decode_rate
            self._number += 1
            heapq.heappush(self._running, _Running(until, self._number, pod, rank, request, arrival.output))
            self._flush(pod, rank)

    def _finish_next(self) -> None:
        done = heapq.heappop(self._running)
        self.now = max(self.now, done.until)
        engine = done.pod.ranks[done.rank]
        if len(done.output) and not engine.decode(done.request, done.output):
            self.truncated += 1
        engine.finish(done.request)
        done.pod._loads[done.rank] -= len(done.request.prompt) + len(done.output)
        self._flush(done.pod, done.rank)
        self._start(done.pod, done.rank)

    def _flush(self, pod: Pod, rank: int) -> None:
        events = pod.ranks[rank].take_events()
        if events:
            self._publish(pod.name, rank, encode_batch(events, pod.form, ts=self.now, dp_rank=rank))

    # Results

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts of all started requests."""
        return sum(served.prompt_tokens for served in self.served)

    @property
    def hit_tokens(self) -> int:
        """Tokens that did not have to be computed, because they were cached."""
        return sum(served.hit_tokens for served in self.served)

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that was reused, 0 to 1."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    def history(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Times (seconds) and the hit rate up to each of them, one per started request."""
        prompts = np.cumsum([served.prompt_tokens for served in self.served], dtype=np.float64)
        hits = np.cumsum([served.hit_tokens for served in self.served], dtype=np.float64)
        return np.array([served.at for served in self.served]), hits / np.maximum(prompts, 1)

    def truth(self, prompt: Prompt) -> dict[str, int]:
        """The tokens of this prompt that each pod would reuse now, by its own block tables."""
        return {pod.name: pod.hit(prompt) for pod in self.pods}

    def compare(self, index: Index, prompt: Prompt, *, model: str = "") -> Comparison:
        """Compare the index's answer to a prompt with the engines' own.

        The index needs the engine of each pod: ``index.configure_pod(pod.name, **pod.options)``.
        """
        asked: dict[str, Mapping[str, int]] = {}
        differences = []
        for pod in self.pods:
            if pod.form.name not in asked:
                asked[pod.form.name] = _ask(index, prompt, pod, model)
            told, true = asked[pod.form.name].get(pod.name, 0), pod.hit(prompt)
            if told != true:
                differences.append(Difference(pod.name, told, true))
        return Comparison(len(self.pods), differences)

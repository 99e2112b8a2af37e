"""Selection of a pod for each request, by its cache, its load and the requests on their way, measured in tokens.

An :class:`EndpointPicker` asks the index for the reuse of a prompt on each pod, adds the load of the pod, and picks
the pod with the lowest cost::

    from kvindex import BlockStored, PrefixIndex
    from kvindex.routing import EndpointPicker

    index = PrefixIndex(block_size=16)
    for pod, blocks in {"a": 4, "b": 1}.items():        # in place of engines
        index.process_block_stored(BlockStored(pod=pod, model="llama", block_hashes=list(range(blocks)),
                                               token_ids=list(range(16 * blocks)), block_size=16))

    picker = EndpointPicker(index)
    choice = picker.pick(list(range(80)), model="llama")
    assert (choice.pod, choice.cached_tokens, choice.prefill_tokens) == ("a", 64, 16)
    picker.prefilled(choice)                            # its first token has arrived
    picker.finished(choice, cached_tokens=64)           # usage.prompt_tokens_details.cached_tokens of the response

It needs no extra. :mod:`kvindex.text` computes token ids from requests.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from . import arguments
from ._core import Loads, PodSet
from .errors import InvalidTypeError, InvalidValueError, UnknownPodError
from .index import PrefixIndex

if TYPE_CHECKING:
    from ._core import _ExtraKeys, _Tokens
    from .sync.source import PodSource
    from .sync.status import PodsChange

__all__ = ["Choice", "EndpointPicker"]

log = logging.getLogger(__name__)

#: The value of a token that a tier holds, in tokens of the engine's own pool.
CREDIT: Final[Mapping[str, float]] = {"GPU": 1.0, "CPU": 0.8, "DISK": 0.5}
#: Upper bounds of the histograms; one more bucket counts larger values.
ERROR_TOKENS: Final = (0, 16, 64, 256, 1024, 4096, 16384)
PICK_SECONDS: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2)

# The latest reports of a pod that are compared, and the number of reports below which no reason is derived from them.
_RECENT, _ENOUGH = 64, 16
# Blocks at the beginning of a prompt that are kept to find a shift by one token.
_HEAD = 4
_FILTERS = 256


class Choice:
    """The pod that was picked for one request, and the reservation of its work there. Read-only."""

    __slots__ = (
        "__weakref__",
        "_context",
        "_expires",
        "_head",
        "_open",
        "_picker",
        "_row",
        "_uid",
        "_waits",
        "address",
        "cached_tokens",
        "candidates",
        "cost",
        "id",
        "pod",
        "prefill_tokens",
        "rank",
    )

    id: int
    """Number of the choice, unique within its picker."""
    pod: str
    """The pod's name in the index."""
    rank: int
    """Its data-parallel rank."""
    address: str | None
    """:attr:`PodSource.address`, where the pod takes requests; None without a manager."""
    cached_tokens: int
    """Tokens of the prompt that the pod is expected to reuse."""
    prefill_tokens: int
    """Tokens of the prompt that the pod is expected to compute."""
    candidates: int
    """Workers (pods times ranks) that were compared."""
    cost: float
    """Cost in tokens: the prompt minus the credit for reused tokens, plus the load before this request."""

    _picker: EndpointPicker
    _row: int
    _uid: int
    _waits: int
    _context: int
    _expires: float
    _open: bool
    _head: tuple[list[int], str, str | None, str | None] | None

    def __repr__(self) -> str:
        shown = ("id", "pod", "rank", "address", "cached_tokens", "prefill_tokens", "candidates", "cost")
        return f"Choice({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


class _Reports:
    """Cached tokens that one pod's engine reported, compared with the expected ones."""

    __slots__ = ("buckets", "expected", "head", "over", "recent", "reported", "requests", "said", "under")

    def __init__(self) -> None:
        self.requests = self.expected = self.reported = self.over = self.under = 0
        self.buckets = [0] * (len(ERROR_TOKENS) + 1)
        self.recent: deque[tuple[int, int, int]] = deque(maxlen=_RECENT)
        self.said = ""
        self.head: tuple[list[int], str, str | None, str | None] | None = None

    def add(self, prompt: int, expected: int, reported: int) -> None:
        self.requests += 1
        self.expected += expected
        self.reported += reported
        self.over += max(expected - reported, 0)
        self.under += max(reported - expected, 0)
        self.buckets[bisect_left(ERROR_TOKENS, abs(expected - reported))] += 1
        self.recent.append((prompt, expected, reported))

    def figures(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "expected_tokens": self.expected,
            "reported_tokens": self.reported,
            "over_tokens": self.over,
            "under_tokens": self.under,
            "error_buckets": list(self.buckets),
            "reason": self.said,
        }


_PICKERS: weakref.WeakSet[EndpointPicker] = weakref.WeakSet()


def _renew_locks() -> None:
    # Another thread may have held a lock at the fork, and no thread would release it in the child.
    for each in list(_PICKERS):
        each._lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class EndpointPicker:
    """Picks the pod with the lowest cost for each request, and accounts for the requests in flight. Thread-safe.

    The cost of a worker (a pod's data-parallel rank) is measured in tokens. It is the length of the prompt, minus a
    credit for each token that the worker would reuse, plus the load of the worker. The load has three parts:

    - the tokens that earlier requests without a first token still have to compute,
    - ``context_weight`` for each prompt token of its running requests,
    - ``request_weight`` for each of its running requests.

    Workers whose costs differ by at most ``tie`` of the prompt are equal, and the one with the least recent work gets
    the request. Without this rule, one block of a common system prompt would attract all requests to the pod that had
    it first.

    A stale pod is never picked. Each pick reserves its work until :meth:`finished`, for at most ``reservation_ttl``
    seconds. It also adds the prompt to the index (:meth:`PrefixIndex.add_prefix`) for ``speculative_ttl`` seconds, so
    that the pod counts as holding it before events confirm it. Until the prefill is done, a copy of the prompt that
    waits there costs as much as one that an idle pod computes, and goes to the idle pod.

    Args:
        index: The index.
        manager: The :class:`EventManager` or :class:`~kvindex.aio.AsyncEventManager` that follows the pods. Its
            sources provide the model, address and labels of each pod, and only its pods are picked. Without a manager,
            the pods of the index are picked.
        credit: Value of a reused token by medium, 0 to 1. Other media count as ``"CPU"`` if their name begins with it,
            else as ``"DISK"``.
        context_weight: Cost of one prompt token of a running request, in tokens of prefill.
        request_weight: Cost of a running request, in tokens of prefill.
        tie: Share of the prompt's tokens within which costs are equal, 0 to 1.
        degraded: Whether degraded pods are picked. They are up, but may hold more or less than the index has.
        reservation_ttl: Seconds after which an unfinished request no longer counts.
        speculative_ttl: Seconds for which a picked prompt counts as held, until events confirm it; 0 disables it.
        max_in_flight: Maximum number of reservations. Beyond it the oldest one expires.
        half_life: Half-life, in seconds, of a worker's recent work when equal workers are compared.
        seed: Starting point of the search among equal workers; None for a random one, so that several routers differ.
        clock: A monotonic clock in seconds; None for the index's.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range.
    """

    def __init__(
        self,
        index: PrefixIndex,
        manager: Any = None,
        *,
        credit: Mapping[str, float] = CREDIT,
        context_weight: float = 0.1,
        request_weight: float = 16.0,
        tie: float = 0.02,
        degraded: bool = True,
        reservation_ttl: float = 600.0,
        speculative_ttl: float = 2.0,
        max_in_flight: int = 65536,
        half_life: float = 60.0,
        seed: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not isinstance(index, PrefixIndex):
            raise InvalidTypeError(f"index is {arguments.shown(index)}; it must be a PrefixIndex")
        credits = [
            (arguments.utf8(medium, "each medium of credit").lower(), _share(value, f"credit of {medium}"))
            for medium, value in {**CREDIT, **_mapping(credit, "credit")}.items()
        ]
        half_life = _lasting(half_life, "half_life")
        start = arguments.whole(int.from_bytes(os.urandom(4), "little") if seed is None else seed, "seed", 0, 2**63 - 1)
        self._index = index
        self._clock: Callable[[], float] = index._clock if clock is None else arguments.called(clock, "clock")
        self._loads = Loads(
            index,
            credits,
            arguments.seconds(context_weight, "context_weight"),
            arguments.seconds(request_weight, "request_weight"),
            _share(tie, "tie"),
            half_life,
            arguments.flag(degraded, "degraded"),
            start,
        )
        self._reservation_ttl = _lasting(reservation_ttl, "reservation_ttl")
        self._speculative_ttl = arguments.seconds(speculative_ttl, "speculative_ttl")
        self._max_in_flight = arguments.whole(max_in_flight, "max_in_flight", 1, 2**31)
        # A pick is one step: of two requests with one new prefix, the second sees the pod of the first.
        self._lock = Lock()
        _PICKERS.add(self)
        self._open: OrderedDict[int, Choice] = OrderedDict()
        self._reports: dict[str, _Reports] = {}
        self._picks = self._unplaced = self._expired = self._late = 0
        self._seconds = [0] * (len(PICK_SECONDS) + 1)
        self._seconds_sum = 0.0
        self._sources: dict[str, PodSource] | None = None
        self._stop: Callable[[], None] | None = None
        self._filters: dict[Any, PodSet] = {}
        # Requests of other routers, which a ReplicatedIndex with share=True delivers.
        self._others: dict[Any, tuple[int, int, int, int]] = {}
        self._line: Any = None
        if manager is not None:
            follow = getattr(manager, "manager", manager)
            if not callable(getattr(follow, "on_pods", None)):
                raise InvalidTypeError(f"manager is {arguments.shown(manager)}; it must be an EventManager")
            self._follow = follow
            self._stop = follow.on_pods(self._changed)
            self._changed()
            sharing = getattr(follow, "_sharing", None)
            if sharing is not None and sharing.index is index:
                self._line = sharing.join(self)

    def pick(
        self,
        tokens: _Tokens,
        *,
        pods: PodSet | Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys: _ExtraKeys | None = None,
    ) -> Choice | None:
        """Picks the worker for one prompt and reserves its work there.

        O(matched blocks + workers), and O(blocks) if the prompt is not completely cached.

        Args:
            tokens: Token ids of the prompt, as for :meth:`PrefixIndex.match_prefix`.
            pods: Names of the pods that are ready, or a :meth:`PrefixIndex.pod_set` if the same names are used often.
                None stands for every pod of the manager that serves the model. Without a manager it stands for every
                pod of the index that has blocks of the model or no blocks at all.
            labels: Labels that a pod's source must have, such as ``{"role": "prefill"}``. They need a manager.
            model: Model of the request.
            lora_name: LoRA adapter of the request, None for the base model.
            cache_salt: Cache salt of the request.
            extra_keys: One entry per block, as for :meth:`PrefixIndex.match_prefix`.

        Returns:
            The choice; None if no current pod serves the model. A model that no pod was added with is logged once.

        Raises:
            InvalidTypeError: An argument has the wrong type. Nothing was reserved.
            InvalidValueError: An argument is out of range. Nothing was reserved.
        """
        began = time.perf_counter()
        if pods is not None or labels is not None or self._sources is not None:
            pods = self._filter(pods, labels, model)
        with self._lock:
            now = self._clock()
            if self._open:
                self._expire(now)
            match = self._index.match_prefix(
                tokens,
                model=model,
                lora_name=lora_name,
                cache_salt=cache_salt,
                extra_keys=extra_keys,
                ready_pods=pods,
            )
            n = len(tokens)  # type: ignore[arg-type]
            found = self._loads.choose(match, n, model, pods, now)
            # A pod that was removed during this call no longer has a name.
            if found is None or (pod := found[2]) is None:
                self._unplaced += 1
                return None
            row, uid, _, rank, cached, whole, candidates, cost = found
            prefill = n - cached
            if self._speculative_ttl and not whole:
                try:
                    self._loads.expect(
                        uid, rank, model, tokens, lora_name, cache_salt, extra_keys, now + self._speculative_ttl
                    )
                except BaseException:
                    self._loads.finished(row, uid, prefill, n)
                    raise
            self._picks += 1
            choice = Choice()
            choice.id = self._picks
            choice.pod = pod
            choice.rank = rank
            choice.address = self._address(pod)
            choice.cached_tokens = cached
            choice.prefill_tokens = choice._waits = prefill
            choice.candidates = candidates
            choice.cost = cost
            choice._picker, choice._row, choice._uid, choice._context = self, row, uid, n
            choice._expires = now + self._reservation_ttl
            choice._open = True
            choice._head = None
            if not cached and n >= self._index.block_size:
                choice._head = (list(tokens[: _HEAD * self._index.block_size]), model, lora_name, cache_salt)  # type: ignore[index]
            self._open[choice.id] = choice
            if self._line is not None:
                self._line.began(choice, self._reservation_ttl)
                if self._speculative_ttl and not whole:
                    keys = (lora_name, cache_salt, extra_keys)
                    self._line.held(pod, rank, model, tokens, keys, self._speculative_ttl)
            if len(self._open) > self._max_in_flight:
                self._forget(self._open.popitem(last=False)[1])
                self._expired += 1
            spent = time.perf_counter() - began
            self._seconds[bisect_left(PICK_SECONDS, spent)] += 1
            self._seconds_sum += spent
            return choice

    def prefilled(self, choice: Choice) -> None:
        """Reports the first token of a request: its prefill is done. O(1). A second call has no effect.

        Args:
            choice: The choice that :meth:`pick` returned.

        Raises:
            InvalidValueError: The choice is finished, or of another picker.
        """
        self._own(choice)
        with self._lock:
            self._unfinished(choice)
            if choice._waits and choice.id in self._open:
                self._loads.prefilled(choice._row, choice._uid, choice._waits)
                choice._waits = 0
                if self._line is not None:
                    self._line.prefilled(choice)

    def finished(self, choice: Choice, cached_tokens: int | None = None) -> None:
        """Reports the end of a request, successful or not, and ends its reservation. O(1).

        Args:
            choice: The choice that :meth:`pick` returned.
            cached_tokens: Prompt tokens that the engine has reused (``usage.prompt_tokens_details.cached_tokens``);
                None if it reports no number. The picker compares them with the expected ones (:meth:`stats`). If a
                pod's numbers differ systematically, it logs a warning with the likely cause.

        Raises:
            InvalidValueError: The choice is finished already or of another picker, or ``cached_tokens`` is negative or
                larger than the prompt.
        """
        self._own(choice)
        if cached_tokens is not None:
            cached_tokens = arguments.whole(cached_tokens, "cached_tokens", 0, choice._context)
        with self._lock:
            self._unfinished(choice)
            choice._open = False
            if self._open.pop(choice.id, None) is None:
                self._late += 1
            else:
                self._forget(choice)
            if cached_tokens is None:
                return
            reports = self._reports.get(choice.pod)
            if reports is None:
                if choice.pod not in {row[0] for row in self._prune()}:
                    return
                reports = self._reports[choice.pod] = _Reports()
            reports.add(choice._context, choice.cached_tokens, cached_tokens)
            if choice._head is not None and cached_tokens:
                reports.head = choice._head
            said = _reason(reports.recent, self._index.block_size, reports.said)
            if said and not self._has_blocks(choice.pod):
                said = "the index has no block of it: EventManager.status() has the reason (block size, model, topic)"
            if said == reports.said:
                return
            reports.said = said
            shift = self._shift(choice.pod, reports.head) if said and reports.head else ""
        if said:
            log.warning("pod %s: cached tokens differ from what was expected: %s%s", choice.pod, said, shift)
        else:
            log.info("pod %s: cached tokens are as expected again", choice.pod)

    def _has_blocks(self, pod: str) -> bool:
        try:
            return any(figures["blocks"] for figures in self._index.worker_stats(pod).values())
        except UnknownPodError:
            return False

    def stats(self) -> dict[str, Any]:
        """Returns counters since the picker was created, and the requests in flight. O(workers).

        Returns:
            A dict with the keys below. The figures of a pod end when the pod is removed from the index.

            - ``picks``: requests for which a pod was picked; ``unplaced``: requests for which no pod was ready.
            - ``expired``: reservations that were not finished in time; ``late``: those of them that were finished
            later.
            - ``in_flight``: running requests; ``others``: those of other routers (``ReplicatedIndex(share=True)``).
            - ``workers``: for each (pod, rank) ``requests``, ``prefill_tokens`` still to compute, and
            ``context_tokens``; those of other routers are included.
            - ``pods``: for each pod that has reported cached tokens ``requests``, ``expected_tokens``,
                ``reported_tokens``, ``over_tokens`` (expected and not reported), ``under_tokens``, ``error_buckets``
                (bounds: ``ERROR_TOKENS``) and ``reason``.
            - ``pick_seconds``: durations of picks, as ``buckets`` (bounds: ``PICK_SECONDS``) and ``sum``.
        """
        with self._lock:
            self._expire(self._clock())
            rows = self._prune()
            return {
                "picks": self._picks,
                "unplaced": self._unplaced,
                "expired": self._expired,
                "late": self._late,
                "in_flight": len(self._open),
                "others": len(self._others),
                "workers": {
                    (pod, rank): {"requests": requests, "prefill_tokens": prefill, "context_tokens": context}
                    for pod, rank, prefill, context, requests in rows
                },
                "pods": {pod: reports.figures() for pod, reports in self._reports.items()},
                "pick_seconds": {"buckets": list(self._seconds), "sum": self._seconds_sum},
            }

    def close(self) -> None:
        """Stops following the manager's pods. Open choices can still be finished. A second call has no effect.

        Until then the manager holds a reference to the picker.
        """
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()
        if self._line is not None:
            self._line.close()

    def __repr__(self) -> str:
        return f"EndpointPicker({self._picks} picks, {len(self._open)} in flight)"

    # ---- pods -------------------------------------------------------------------------------------------------------

    def _changed(self, _: PodsChange | None = None) -> None:
        with self._lock:
            self._sources = self._follow.pods()
            self._filters = {}

    def _address(self, pod: str) -> str | None:
        source = self._sources.get(pod) if self._sources is not None else None
        return source.address if source is not None else None

    def _filter(
        self, pods: PodSet | Iterable[str] | None, labels: Mapping[str, str] | None, model: str
    ) -> PodSet | None:
        if pods is not None and not isinstance(pods, PodSet):
            pods = PodSet(pods)
        if labels is None and (pods is not None or self._sources is None):
            return pods
        if self._sources is None:
            raise InvalidValueError("labels need a manager: EndpointPicker(index, manager)")
        wanted = {} if labels is None else dict(_mapping(labels, "labels"))
        key = (model, tuple(sorted(wanted.items())), pods)
        # The dict of this moment: a change of the pods replaces it by another.
        filters = self._filters
        found = filters.get(key)
        if found is None:
            found = PodSet(
                name
                for name, source in self._sources.items()
                if (name in pods.pods if pods is not None else source.model == model)
                and wanted.items() <= source.labels.items()
            )
            if len(filters) >= _FILTERS:
                filters.clear()
            filters[key] = found
            if pods is None and self._sources and all(each.model != model for each in self._sources.values()):
                served = ", ".join(sorted({repr(each.model) for each in self._sources.values()})[:8])
                log.warning(
                    "no pod serves model %s; the pods were added with %s: PodSource(model=...) is the requests' name",
                    arguments.shown(model), served,
                )  # fmt: skip
        return found

    # ---- reservations, with the lock --------------------------------------------------------------------------------

    def _own(self, choice: Choice) -> None:
        if not isinstance(choice, Choice) or getattr(choice, "_picker", None) is not self:
            raise InvalidValueError(f"choice is {arguments.shown(choice)}, which is not a choice of this picker")

    def _unfinished(self, choice: Choice) -> None:
        if not choice._open:
            raise InvalidValueError(
                f"choice {choice.id} (pod {choice.pod}) was finished before; finish each choice once"
            )

    def _forget(self, choice: Choice) -> None:
        self._loads.finished(choice._row, choice._uid, choice._waits, choice._context)
        if self._line is not None:
            self._line.finished(choice)

    # ---- reservations of other routers, from the thread that reads them ---------------------------------------------

    def _other_began(self, key: Any, pod: str, rank: int, prefill: int, context: int) -> bool:
        """Counts a request of another router as the worker's. Returns False if there is no such worker here."""
        with self._lock:
            found = self._loads.reserve(pod, rank, prefill, context)
            if found is not None:
                self._others[key] = (*found, prefill, context)
            return found is not None

    def _other_prefilled(self, key: Any) -> None:
        with self._lock:
            if (other := self._others.get(key)) is not None:
                row, uid, prefill, context = other
                self._loads.prefilled(row, uid, prefill)
                self._others[key] = (row, uid, 0, context)

    def _other_finished(self, key: Any) -> None:
        with self._lock:
            if (other := self._others.pop(key, None)) is not None:
                self._loads.finished(*other)

    def _open_ids(self) -> list[int]:
        with self._lock:
            return list(self._open)

    def _expire(self, now: float) -> None:
        while self._open:
            oldest = next(iter(self._open.values()))
            if oldest._expires > now:
                return
            del self._open[oldest.id]
            self._forget(oldest)
            self._expired += 1

    def _prune(self) -> list[tuple[str, int, int, int, int]]:
        rows = self._loads.rows()
        there = {row[0] for row in rows}
        for pod in [pod for pod in self._reports if pod not in there]:
            del self._reports[pod]
        return rows

    def _shift(self, pod: str, head: tuple[list[int], str, str | None, str | None]) -> str:
        """Returns a text if the pod holds the prompt without its first token, or with its first token twice."""
        ids, model, lora_name, cache_salt = head
        for shifted, said in ((ids[1:], "one too many"), ([ids[0], *ids], "one too few")):
            match = self._index.match_prefix(shifted, model=model, lora_name=lora_name, cache_salt=cache_salt)
            if match.tokens.get(pod):
                return f"; with the first token {said} (BOS?) they agree"
        return ""


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidTypeError(f"{what} is {arguments.shown(value)}; it must be a mapping")
    return value


def _share(value: Any, what: str) -> float:
    share = arguments.moment(value, what)
    if not 0 <= share <= 1:
        raise InvalidValueError(f"{what} is {arguments.shown(value)}; it must be 0 to 1")
    return share


def _lasting(value: Any, what: str) -> float:
    seconds = arguments.seconds(value, what)
    if not seconds:
        raise InvalidValueError(f"{what} is {arguments.shown(value)}; it must be more than 0 seconds")
    return seconds


def _reason(recent: Iterable[tuple[int, int, int]], block: int, said: str) -> str:
    """The cause of the differences in a pod's latest (prompt, expected, reported) rows; empty if there is nothing to
    explain.
    """
    seen = list(recent)
    wrong = [each for each in seen if each[1] != each[2]]
    aligned = [each for each in wrong if each[0] == each[1] and each[0] % block == 0]
    if len(aligned) >= 4 and aligned == wrong and all(each[1] - each[2] in range(1, 8 * block + 1) for each in wrong):
        return "a prompt that is wholly cached is reused less its last block: set engine='vllm' for the pod"
    # A warning stays until fewer reports are wrong. Otherwise a share of about a half would be logged again and again.
    if len(seen) < _ENOUGH or (4 if said else 2) * len(wrong) < len(seen):
        return ""
    held = [each for each in seen if each[1]]
    if held and not any(each[2] for each in held):
        return "it reports none: its prefix caching is off, or its tokens, adapter or salt are not those of the router"
    if all(expected == 0 for _, expected, reported in seen if reported):
        return (
            "it reuses prompts of which nothing is expected: the router's token ids, adapter or salt differ from the "
            "engine's in the first block (another chat template, a BOS token too many or too few)"
        )
    differences = {expected - reported for _, expected, reported in wrong}
    if len(differences) == 1 and (by := differences.pop()) > 0:
        if by % block == 0 and by <= 8 * block:
            return f"always {by} less, one block of the engine: set eagle=True if it drafts with EAGLE or MTP"
        return f"always {by} less"
    less = all(expected > reported for _, expected, reported in wrong)
    return f"most of its requests reuse {'less' if less else 'more, or less,'} than expected"

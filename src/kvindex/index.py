"""The public index, :class:`PrefixIndex`. Its calls for every prompt and batch are inherited from the compiled core."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from . import answers, arguments, snapshot
from ._core import Index, IngestReport, PodSet
from .answers import IndexStats, StreamPlace, Verdict, WorkerStats
from .errors import CapacityError, SnapshotError, UnknownPodError
from .events import AllBlocksCleared, BlockRemoved, BlockStored

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._core import _ExtraKeys, _Tokens

__all__ = ["PrefixIndex"]

_FOREVER = 0x7FFFFFFFFFFFFFFF  # nanoseconds, as the core has it
_NO_HASHES = np.empty(0, dtype=np.uint64)
_LIMITS = threading.Lock()  # shared by all indexes: limits are set twice a second
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LIMITS.acquire, after_in_parent=_LIMITS.release, after_in_child=_LIMITS.release)


class PrefixIndex(Index):
    """An exact index of the prompt prefixes in the KV caches of a fleet, updated by the engines' events.

    :meth:`match_prefix` returns the number of leading prompt tokens that each pod would reuse now. Events arrive
    through an :class:`EventManager`, or through :meth:`ingest` and the ``process_*`` methods::

        from kvindex import BlockRemoved, BlockStored, PrefixIndex

        index = PrefixIndex(block_size=16)
        index.process_block_stored(
            BlockStored(pod="a", block_hashes=[101, 102], token_ids=list(range(32)), block_size=16)
        )
        match = index.match_prefix(range(40))
        assert match.tokens == {"a": 32} and match.best() == ("a", 32)

    The first call that names a pod creates it. A pod is ``stale`` until its first event or :meth:`mark_worker`.

    All methods are thread-safe. A match sees each event either completely or not at all, and a call that waits for the
    index does not block other Python threads. After a fork, the child process has a consistent copy of the index in
    which every pod is ``stale``, because the event streams stay with the parent.

    If the system has no memory for a change, the call raises :class:`MemoryError`, the index drops all content, and
    every worker becomes ``degraded``.

    Args:
        block_size: Tokens per index block, 1 to 65,536. Every answer is a multiple of it. The block size of each
            engine must be a multiple of it too.
        hash_seed: Seed of the interoperable hashes, 0 to 2**64 - 1. Publishers that send hashes in place of tokens
            must use the same seed.
        presence: ``"count"`` counts the copies of a block, as vLLM announces them. ``"set"`` is for engines that
            announce a block again without a new copy.
        max_parked: Stored hashes per worker that may wait for an unknown parent.
        max_bytes: Memory budget in bytes, at least 32,768; None for no limit. When an event would exceed it, the index
            evicts the least recently used prefixes, from the end of their chains. The affected pods become
            ``degraded``.
        ttl: Seconds after which the index drops a prefix that no stored event and no match has used; None for no
            limit. A prefix may expire up to 1 % early. The affected pods become ``degraded``.
        clock: A monotonic clock in seconds, for ``ttl`` and for the entries of :meth:`add_prefix`.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range.
    """

    # No wrapper around ingest, match_prefix and match_hashes, and no __dict__: a call costs the same as on Index.
    __slots__ = ("_limits", "_owner", "_sharing")
    _limits: dict[object, int]  # moments by owner after which no state is valid; unset before the first
    _owner: str  # the owner that replaces the content as a whole; unset without one
    _sharing: Any  # the sharing with other routers; unset without it

    # For inspect.signature and help(): a compiled class has no signature with types.
    def __new__(
        cls,
        block_size: int = 16,
        *,
        hash_seed: int = 1337,
        presence: Literal["count", "set"] = "count",
        max_parked: int = 65536,
        max_bytes: int | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        return super().__new__(
            cls,
            block_size,
            hash_seed=hash_seed,
            presence=presence,
            max_parked=max_parked,
            max_bytes=max_bytes,
            ttl=ttl,
            clock=clock,
        )

    def __repr__(self) -> str:
        pods, figures = self.pods(), self.stats()
        states = Counter(pods.values())
        told = ", ".join(f"{states[state]:,} {state}" for state in answers.STATES if states[state])
        return (
            f"{type(self).__name__}(block_size={self.block_size}, {len(pods):,} pod{'s' * (len(pods) != 1)}"
            f"{told and ': ' + told}, {figures['blocks']:,} block{'s' * (figures['blocks'] != 1)},"
            f" {figures['bytes'] / 1e6:,.1f} MB)"
        )

    def process_block_stored(self, event: BlockStored) -> IngestReport:
        """Applies a :class:`BlockStored` event. O(blocks).

        Args:
            event: The event, with ``pod`` set.

        Returns:
            The counts of stored, parked and skipped hashes.

        Raises:
            InvalidTypeError: A field has the wrong type. Nothing was applied.
            InvalidValueError: A field is out of range. Nothing was applied.
        """
        rank, model, hashes, group, medium = arguments.hashed_fields(event)
        hashes = arguments.with_content(event, hashes)
        tokens, stored = event.token_ids, arguments.stored_fields(event)
        numbers = () if tokens is None else tokens
        return self._apply("stored", event.pod, rank, model, hashes, group, medium, numbers, stored)

    def process_block_removed(self, event: BlockRemoved) -> IngestReport:
        """Applies a :class:`BlockRemoved` event. O(hashes).

        A hash without a counted copy is skipped, and counted as ``unknown_hash``::

            from kvindex import BlockRemoved

            report = index.process_block_removed(BlockRemoved(pod="a", block_hashes=[102, 999]))
            assert (report.removed, report.reasons) == (1, {"unknown_hash": 1})
            assert index.match_prefix(range(40)).tokens == {"a": 16}

        Args:
            event: The event, with ``pod`` set.

        Returns:
            The counts of removed and skipped hashes.

        Raises:
            InvalidTypeError: A field has the wrong type. Nothing was applied.
            InvalidValueError: A field is out of range. Nothing was applied.
        """
        fields = arguments.hashed_fields(event)
        return self._apply("removed", event.pod, *fields, arguments.remaining(event), None)

    def process_all_blocks_cleared(self, event: AllBlocksCleared) -> IngestReport:
        """Applies an :class:`AllBlocksCleared` event. O(blocks of the worker).

        The index drops every block of (pod, rank). If the event has a ``medium``, or the pod is configured with
        ``clear_media``, it drops the blocks of these media only.

        Args:
            event: The event, with ``pod`` set.

        Returns:
            A report with ``cleared`` set to 1.

        Raises:
            InvalidTypeError: A field has the wrong type. Nothing was applied.
            InvalidValueError: A field is out of range. Nothing was applied.
        """
        rank = arguments.rank(arguments.field(event, "dp_rank"))
        medium = arguments.text(event.medium, "medium")
        return self._apply("cleared", event.pod, rank, b"", _NO_HASHES, -1, medium, (), None)

    def pod_set(self, pods: Iterable[str]) -> PodSet:
        """Compiles pod names into a filter for ``ready_pods``, which adds no cost to a match. O(pods).

        ::

            ready = index.pod_set(["a", "b"])
            assert index.match_prefix(range(40), ready_pods=ready).tokens == {"a": 16}

        Args:
            pods: Pod names. The index need not know them yet.

        Returns:
            The filter. It is immutable and may be shared between threads.

        Raises:
            InvalidTypeError: ``pods`` is not an iterable of strings.
        """
        return PodSet(pods)

    def add_prefix(
        self,
        pod: str,
        tokens: _Tokens,
        *,
        ttl: float,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys: _ExtraKeys | None = None,
        dp_rank: int = 0,
        now: float | None = None,
    ) -> None:
        """Counts a prompt as held by (pod, rank) for ``ttl`` seconds, or until the worker is cleared. O(blocks).

        Use it for a routing decision that no event has confirmed yet. These speculative entries do not change the
        state of the pod: a pod without any events stays ``stale``. They lie in the medium ``GPU``. They use the
        lookahead of the worker's other blocks, so the last blocks of the prompt do not count if too few tokens follow
        them.

        With ``max_bytes``, speculative entries may use 1/32 of the budget. The entry that expires first makes room for
        the next one (``stats()["shed_guesses"]``).

        Args:
            pod: The pod that the request was sent to.
            tokens: The prompt, as for :meth:`match_prefix`.
            ttl: Seconds until the entry expires.
            model: Model of the request.
            lora_name: LoRA adapter of the request, None for the base model.
            cache_salt: Cache salt of the request.
            extra_keys: One entry per block, as for :meth:`match_prefix`.
            dp_rank: Data-parallel rank.
            now: Start of the ``ttl``, as a reading of ``clock``; None for the current reading.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range; for tokens, the message has the position.
        """
        began = arguments.moment(*((self._clock(), "what clock returns") if now is None else (now, "now")))
        until = arguments.seconds(ttl, "ttl") + began
        keys = (lora_name, cache_salt, extra_keys)
        rank, space = arguments.rank(dp_rank), arguments.utf8(model, "model")
        self._expect(pod, rank, space, tokens, keys, until)
        if (sharing := getattr(self, "_sharing", None)) is not None:
            sharing.held(pod, rank, space, tokens, keys, until - self._clock())

    def configure_pod(
        self,
        pod: str,
        *,
        presence: Literal["count", "set"] | None = None,
        clear_media: Iterable[str] | None = None,
        chunk_size: int | None = None,
        max_blocks: int | None = None,
        ignore_media: Iterable[str] | None = None,
        engine: Literal["vllm", "sglang", "trtllm"] | None = None,
        eagle: bool | Iterable[int] | None = None,
        hybrid: bool | None = None,
    ) -> None:
        """Sets properties of a pod that its events do not carry. O(media + workers).

        Each option that is None keeps its current value::

            index.configure_pod("a", engine="vllm", clear_media=["GPU"])

        Args:
            pod: The pod's name.
            presence: ``"count"`` or ``"set"``, as for the class.
            clear_media: Media that an :class:`AllBlocksCleared` without a medium clears. By default it clears all
                media. A worker that held blocks in an offloading tier then becomes ``degraded``, because vLLM
                publishes the same event with and without a reset of the tier. With ``engine="sglang"``, host memory
                (media that begin with ``CPU``) causes no doubt: SGLang clears it together with its tree.
            chunk_size: Tokens per chunk of chunked-local attention.
            max_blocks: Index blocks that the pod may hold, over all ranks, media and groups, parked ones included; 0
                for no limit. A stored event beyond the limit is skipped, counted as ``over_limit``, and the pod
                becomes ``degraded``. The same holds for an event beyond 1,024 combinations of rank and model of one
                pod.
            ignore_media: Media whose events are skipped and counted as ``ignored_medium``, without an effect on the
                state: for a tier that publishes no removals. Blocks that the pod already holds there are dropped. An
                empty iterable ends it.
            engine: The engine whose rules determine the reuse of a held prefix. ``"vllm"``: vLLM always computes the
                last token of a prompt, so of n tokens its GPU pool reuses at most ``(n - 1) // B * B``, where B is the
                engine's block size; each further medium continues from there. ``"sglang"``: SGLang matches all tokens,
                medium by medium. ``"trtllm"``: no rule is known, and every held block counts, as for a pod without an
                engine.
            eagle: True if vLLM drops the last matched block for a draft model (EAGLE or MTP without lookahead hashes:
                releases before 0.33, or with a KV connector). An iterable of ``group_idx`` limits it to these groups;
                False or an empty iterable turns it off. It has an effect with ``engine="vllm"`` only.
            hybrid: True for a model with Mamba or sliding-window layers on SGLang, which publishes the full-attention
                layers only. The pod is ``degraded``.

        Raises:
            InvalidTypeError: An option has the wrong type. Nothing was changed.
            InvalidValueError: An option is out of range. Nothing was changed.
        """
        counted = -1 if presence is None else arguments.choice(presence, "presence", ("count", "set"))
        media = arguments.names(() if clear_media is None else clear_media, "clear_media")
        ignored = arguments.names(() if ignore_media is None else ignore_media, "ignore_media")
        chunk = -1 if chunk_size is None else arguments.whole(chunk_size, "chunk_size", 1, 0x7FFFFFFF)
        most = -1 if max_blocks is None else arguments.whole(max_blocks, "max_blocks", 0, (1 << 63) - 1)
        named = -1 if engine is None else arguments.choice(engine, "engine", answers.ENGINES) + 1
        drops, groups = arguments.eagle(eagle)
        silent = -1 if hybrid is None else arguments.flag(hybrid, "hybrid")
        self._configure(pod, counted, clear_media is not None, media, chunk, most)
        if ignore_media is not None:
            self._ignore(pod, ignored)
        if (named, drops, silent) != (-1, -1, -1):
            self._engine(pod, named, drops, groups, silent)

    def remove_pod(self, pod: str) -> None:
        """Removes a pod and all its blocks. O(blocks of the pod).

        A batch of the pod that is being ingested at the same time is dropped (``pod_removed`` in its report). A later
        call that names the pod creates it again.

        Args:
            pod: The pod's name.

        Raises:
            UnknownPodError: The index has no such pod.
        """
        self._remove(pod)

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None:
        """Drops every block of a worker in all media, as after a restart of its engine. O(blocks of the worker).

        It also ends a degradation that the index itself has found. Call :meth:`mark_worker` to change the state of the
        stream.

        Args:
            pod: The pod's name.
            dp_rank: Data-parallel rank.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: ``dp_rank`` is out of range.
        """
        self._clear(pod, arguments.rank(dp_rank))

    def mark_worker(self, pod: str, dp_rank: int, state: Verdict) -> None:
        """Sets the state of a worker's event stream. O(ranks).

        :class:`EventManager` does this for the pods that it follows. The state of the pod is the worst of its workers'
        stream states and of the state that the index has found itself::

            index.mark_worker("a", 0, "stale")                  # its connection was lost
            assert index.pod_state("a") == "stale"
            index.mark_worker("a", 0, "exact")

        Args:
            pod: The pod's name.
            dp_rank: Data-parallel rank.
            state: ``"exact"``, ``"degraded"`` or ``"stale"``.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: ``dp_rank`` is out of range, or ``state`` is another value.
        """
        told = arguments.choice(state, "state", answers.STATES)
        self._mark(pod, arguments.rank(dp_rank), told)

    def trust(self, until: float | None) -> None:
        """Sets a moment after which every state is ``stale``, without a thread that has to run then. O(1).

        Use it if your process updates the index from a connection that may fall silent: confirm the connection
        periodically with a later moment. A process that was suspended then answers ``stale`` when it continues. A
        later moment, or None, restores the states of :meth:`mark_worker` and the events. An :class:`EventManager` has
        a limit of its own for the index; the earlier one counts::

            import time

            index.trust(time.monotonic() - 1.0)
            assert index.pod_state("a") == "stale"
            index.trust(None)
            assert index.pod_state("a") == "exact"

        Args:
            until: A reading of ``time.monotonic()`` in seconds; None for no limit. With a limit, each match reads that
                clock, which takes about 4 ns on Linux, where the limit may take effect up to 10 ms late. A snapshot
                does not contain it.

        Raises:
            InvalidTypeError: ``until`` is not a number.
            InvalidValueError: ``until`` is out of range.
        """
        # A moment beyond the clock's range is no limit.
        moment = _FOREVER if until is None else round(1e9 * arguments.moment(until, "until"))
        self._set_limit(None, max(-_FOREVER, min(moment, _FOREVER)))

    def _limit(self, owner: object, until: float | None) -> None:
        """As :meth:`trust`, for one of several owners: the earliest moment counts. None removes this owner's limit."""
        self._set_limit(owner, _FOREVER if until is None else round(1e9 * until))

    def _set_limit(self, owner: object, moment: int) -> None:
        with _LIMITS:
            if not hasattr(self, "_limits"):
                self._limits = {}
            if moment == _FOREVER:
                self._limits.pop(owner, None)
            else:
                self._limits[owner] = moment
            self._trust(min(self._limits.values(), default=_FOREVER))

    def pod_state(self, pod: str) -> Verdict:
        """Returns the state of a pod: the worst of its ranks. O(1).

        Args:
            pod: The pod's name.

        Returns:
            ``"exact"``: every batch has been applied. ``"degraded"``: an event was lost for good or could not be
            placed. ``"stale"``: the stream is not being followed, or no event has arrived yet.

        Raises:
            UnknownPodError: The index has no such pod.
        """
        return answers.STATES[self._state(pod)]

    def pods(self) -> dict[str, Verdict]:
        """Returns every pod with its :meth:`pod_state`. O(pods log pods).

        Returns:
            ``{pod: state}``, sorted by name. Each state is of a moment during the call. A pod that is removed during
            the call is left out.
        """
        states: dict[str, Verdict] = {}
        for pod in sorted(self._pods()):
            with suppress(UnknownPodError):
                states[pod] = answers.STATES[self._state(pod)]
        return states

    def worker_stats(self, pod: str) -> dict[int, WorkerStats]:
        """Returns figures of each rank of a pod. O(ranks).

        Args:
            pod: The pod's name.

        Returns:
            ``{rank: WorkerStats}``.

        Raises:
            UnknownPodError: The index has no such pod.
        """
        return {
            worker["rank"]: {
                "blocks": worker["blocks"],
                "parked": worker["parked"],
                "state": answers.STATES[worker["state"]],
                "last_seq": None if worker["last_seq"] < 0 else worker["last_seq"],
                "in_doubt": worker["in_doubt"],
                "lookahead": sorted(worker["lookahead"]),
            }
            for worker in self._workers(pod)
        }

    def stream_places(self, pod: str) -> dict[int, StreamPlace]:
        """Returns the last applied batch of each rank's stream. O(ranks).

        Args:
            pod: The pod's name.

        Returns:
            ``{rank: StreamPlace}``. Ranks whose last batch came without a number are left out: their streams can only
            start from the beginning.

        Raises:
            UnknownPodError: The index has no such pod.
        """
        return {
            place.pop("rank"): StreamPlace(**{**place, "model": place["model"].decode("utf-8", "surrogateescape")})
            for place in self._places(pod)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a snapshot of the whole index, from which :meth:`load` creates an equal one. O(size of the index).

        The snapshot contains the blocks, the options of each pod, and the place of each worker's stream. It does not
        contain the entries of :meth:`add_prefix`.

        The file at ``path`` is complete at any moment: ``save`` writes a temporary file with a checksum beside it,
        syncs it to the disk and renames it. A file that is replaced keeps its mode. Matches continue during a save.
        Events wait while the index is copied in memory, about 20 ms for a million blocks, but not for the disk::

            index.save("kvindex.snapshot")
            assert PrefixIndex.load("kvindex.snapshot").match_prefix(range(40)).tokens == {"a": 16}

        Args:
            path: Path of the file.

        Raises:
            SnapshotError: The file cannot be written, or ``path`` is not a regular file. A previous file is unchanged,
                and no temporary file is left.
            CapacityError: There is no memory for the copy.
        """
        name = arguments.path(path, "path")
        snapshot.write(name, self._snapshot(f" to {name}"))

    def dumps(self) -> bytes:
        """Returns the snapshot that :meth:`save` writes, as bytes. O(size of the index).

        Returns:
            The snapshot, with its checksum.

        Raises:
            CapacityError: There is no memory for the copy.
        """
        return bytes(self._snapshot())

    def _snapshot(self, to: str = "") -> memoryview:
        try:
            return memoryview(self._saved())
        except ValueError as error:
            raise SnapshotError(f"this index cannot be saved{to}: {error}") from None
        except MemoryError:
            raise CapacityError(f"no memory to save an index of {self.stats()['blocks']} blocks{to}") from None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        max_parked: int | None = None,
        max_bytes: int | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Creates an index from a snapshot, with the block size, seed and options of the saved one. O(size of the
        file).

        Every worker is ``stale`` until its stream has continued from the snapshot. :class:`EventManager` requests the
        batches since then; without one, call :meth:`mark_worker`. All content counts as used at the time of the load,
        and content beyond ``max_bytes`` is evicted.

        Args:
            path: Path of the file.
            max_parked: As for the class; None for the value of the saved index.
            max_bytes: As for the class. The snapshot does not contain it.
            ttl: As for the class. The snapshot does not contain it.
            clock: As for the class.

        Returns:
            The new index.

        Raises:
            SnapshotError: The file is missing, damaged, cut off, contradictory, too large, of a newer version, or not
                a snapshot. The message has the path, the fault and its byte.
        """
        name = arguments.path(path, "path")
        return cls._loaded(snapshot.read(name), name, max_parked, max_bytes, ttl, clock)

    @classmethod
    def loads(
        cls,
        data: Buffer,
        *,
        max_parked: int | None = None,
        max_bytes: int | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Creates an index from the bytes of :meth:`dumps`. O(bytes).

        ::

            copy = PrefixIndex.loads(index.dumps())
            assert copy.match_prefix(range(40)).tokens == {"a": 16}

        Args:
            data: A bytes-like object. It is copied unless it is ``bytes``.
            max_parked: As for :meth:`load`.
            max_bytes: As for :meth:`load`.
            ttl: As for :meth:`load`.
            clock: As for :meth:`load`.

        Returns:
            The new index.

        Raises:
            InvalidTypeError: ``data`` is not bytes-like.
            SnapshotError: ``data`` is damaged, or not a snapshot.
        """
        found = arguments.octets(data, "data")
        return cls._loaded(found, f"a snapshot of {len(found):,} bytes", max_parked, max_bytes, ttl, clock)

    @classmethod
    def _loaded(
        cls,
        data: bytes,
        where: str,
        max_parked: int | None,
        max_bytes: int | None,
        ttl: float | None,
        clock: Callable[[], float],
    ) -> Self:
        with snapshot.refused(where):
            head = snapshot.head(data, len(data))
            index = cls(
                head["block_size"],
                hash_seed=head["seed"],
                presence="set" if head["set_presence"] else "count",
                max_parked=head["max_parked"] if max_parked is None else max_parked,
                max_bytes=max_bytes,
                ttl=ttl,
                clock=clock,
            )
        index._restore(data, where)
        return index

    def _restore(self, data: bytes, where: str) -> None:
        """Replaces the content by that of a snapshot, at once. Both need memory meanwhile. O(bytes).

        Matches continue with the previous content until the new one is complete. No manager follows pods meanwhile, and
        ``_owner`` is set, which keeps other managers from it.

        Raises:
            SnapshotError: The snapshot is damaged, or of an index with other settings. Nothing was changed.
        """
        with snapshot.refused(where):
            head = snapshot.head(data, len(data))
            if (head["block_size"], head["seed"]) != (self.block_size, self.hash_seed):
                raise SnapshotError(
                    f"{where} has block size {head['block_size']} and seed {head['seed']}, this index has"
                    f" {self.block_size} and {self.hash_seed}"
                )
            # Loaded content counts as used now, so the index needs the current time.
            self._expire(self._clock())
            self._load(data)

    def stats(self) -> IndexStats:
        """Returns figures of the whole index, all of one moment. O(1).

        Returns:
            The :class:`IndexStats`.
        """
        return self._figures()

    def _check(self) -> None:
        """Verifies every invariant of the native structure. O(size of the index).

        Raises:
            KVIndexError: An invariant is broken; the message has the first one.
        """
        arguments.unbroken(self._broken())

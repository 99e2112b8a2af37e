"""The index as users see it. What is called for every prompt and batch is inherited from the compiled core as it is."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Self

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


class PrefixIndex(Index):
    """Which pod holds which prefix, kept from the engines' events.

    Any thread may call any method; a match sees whole events only, and a call that waits keeps no other Python thread
    waiting. A pod is known from the first call that names it, and is stale until an event or :meth:`mark_worker` tells
    of its content. A process that forks gives its child a copy as it was between two batches, in which every pod is
    stale until :meth:`mark_worker` says otherwise: what engines say from then on they say to the parent. Where
    the system has no memory for a change, MemoryError is raised, all content is forgotten and every worker is degraded.

    block_size: tokens per index block, the granularity of every answer; an engine's own block size must be a multiple
    of it. hash_seed: seed of the interoperable hashes. presence: "count" (copies are counted, as vLLM announces them)
    or "set" (for engines that re-announce blocks without a new copy). max_parked: stored hashes per worker that may
    wait for their parent. max_bytes: a budget (at least 32,768), None for none: before an event would pass it, what was
    matched or stored longest ago goes, from the end of its chain, and whoever held that is degraded. ttl: seconds after
    which a chain that no stored event and no match has touched goes likewise, up to a hundredth early; None: never.
    clock: seconds that never go back, for ttl and the time to live of :meth:`add_prefix`.

    Events: :meth:`ingest`, :meth:`process_block_stored`, :meth:`process_block_removed`,
    :meth:`process_all_blocks_cleared`. Questions: :meth:`match_prefix`, :meth:`match_many`, :meth:`match_hashes`,
    :meth:`pod_set`. Pods: :meth:`pods`, :meth:`pod_state`, :meth:`add_prefix`, :meth:`remove_pod`,
    :meth:`configure_pod`, :meth:`clear_worker`, :meth:`mark_worker`, :meth:`trust`. Figures: :meth:`stats`,
    :meth:`worker_stats`, :meth:`stream_places`. Snapshots: :meth:`save` and :meth:`load`, :meth:`dumps` and
    :meth:`loads`.
    """

    # No wrapper around ingest, match_prefix and match_hashes, and no __dict__: a call costs what it costs on Index.
    __slots__ = ()

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
        told = ", ".join(f"{states[state]:,} {state}" for state in answers.VERDICTS if states[state])
        return (
            f"{type(self).__name__}(block_size={self.block_size}, {len(pods):,} pod{'s' * (len(pods) != 1)}"
            f"{told and ': ' + told}, {figures['blocks']:,} block{'s' * (figures['blocks'] != 1)},"
            f" {figures['bytes'] / 1e6:,.1f} MB)"
        )

    def process_block_stored(self, event: BlockStored) -> IngestReport:
        """Applies a :class:`BlockStored`. O(blocks).

        Raises InvalidTypeError or InvalidValueError naming the field, with nothing applied.
        """
        rank, model, hashes, group, medium = arguments.hashed_fields(event)
        hashes = arguments.with_content(event, hashes)
        tokens, stored = event.token_ids, arguments.stored_fields(event)
        numbers = () if tokens is None else tokens
        return self._apply("stored", event.pod, rank, model, hashes, group, medium, numbers, stored)

    def process_block_removed(self, event: BlockRemoved) -> IngestReport:
        """Applies a :class:`BlockRemoved`. O(hashes). Hashes without a counted copy are skipped and counted.

        Raises InvalidTypeError or InvalidValueError naming the field, with nothing applied.
        """
        fields = arguments.hashed_fields(event)
        return self._apply("removed", event.pod, *fields, arguments.remaining(event), None)

    def process_all_blocks_cleared(self, event: AllBlocksCleared) -> IngestReport:
        """Applies an :class:`AllBlocksCleared`. O(its blocks).

        Everything that (pod, rank) holds goes, or what of it lies in the event's ``medium``, or in the pod's
        ``clear_media``.
        """
        rank = arguments.rank(arguments.field(event, "dp_rank"))
        medium = arguments.text(event.medium, "medium")
        return self._apply("cleared", event.pod, rank, b"", _NO_HASHES, -1, medium, (), None)

    def pod_set(self, pods: Iterable[str]) -> PodSet:
        """Compiles pod names into a filter that costs nothing per match. Names need not be known yet."""
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
        """Counts the prompt's blocks as held by (pod, rank) on the GPU for ttl seconds, or until a clear. O(blocks).

        For a routing decision that no event has confirmed yet: it changes no verdict; a pod of which nothing else is
        known stays stale. Its blocks have the lookahead that the worker's own have; the last ones, behind which the
        prompt has too few tokens, do not count. With max_bytes, such entries have a 32nd of it; the one that ends first
        makes room for the next (``shed_guesses``). Arguments as for :meth:`match_prefix`; now: the clock's reading to
        count from, None for now. Raises InvalidTypeError, InvalidValueError naming the position.
        """
        began = arguments.moment(*((self._clock(), "what clock returns") if now is None else (now, "now")))
        until = arguments.seconds(ttl, "ttl") + began
        keys = (lora_name, cache_salt, extra_keys)
        self._expect(pod, arguments.rank(dp_rank), arguments.utf8(model, "model"), tokens, keys, until)

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
        """What events do not say of a pod; None leaves it as it is.

        presence: "count" or "set". clear_media: the media that its clears clear, where they name none; without it all
        go, and a worker that held something in another medium than its own pool is degraded, since vLLM publishes the
        same event whether an offloading tier was reset or not. With engine="sglang" host memory (media that begin with
        CPU) causes no doubt: SGLang clears it together with its tree. ignore_media: events of these media are skipped,
        counted as ``ignored_medium`` and cost no verdict (a tier that publishes no removals); what they said before is
        forgotten, and an empty iterable ends it. chunk_size: tokens per chunk of chunked-local attention; max_blocks:
        index blocks that it may hold, over all ranks, media and groups (0: any number), those that wait included. A
        stored event beyond that, or of more than 1,024 ranks and models of one pod, is skipped as ``over_limit``, and
        the pod is degraded: it holds more than is known.

        engine: which engine's rules say what is reused of a prefix that is held. "vllm": the prompt's last token is
        always computed, so of a prompt of n tokens its own pool gives at most (n-1)//B*B, B the engine's block size;
        then each further medium gives what it holds from there on. "sglang": the match of all tokens, read medium by
        medium likewise. "trtllm": no rule is known, what is held counts, as for a pod whose engine is not named.
        eagle: vLLM drops the last block that it matches, for its draft model (EAGLE or MTP without lookahead hashes:
        releases before 0.33, or with a KV connector). True, or the groups (``group_idx``) that do; an empty iterable
        or False for none. It has no effect unless the engine is "vllm". hybrid: a model of which SGLang publishes the
        full-attention layers only (Mamba or sliding-window layers beside them); the pod is degraded.

        O(media + workers).

        Raises InvalidTypeError or InvalidValueError naming the option, with nothing changed.
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
        """Forgets the pod and all it holds. O(its blocks).

        A batch that is on its way to it is dropped (``pod_removed`` in its report); whatever names the pod afterwards
        opens it anew. Raises UnknownPodError if there is none.
        """
        self._remove(pod)

    def clear_worker(self, pod: str, dp_rank: int = 0) -> None:
        """An engine restarted: everything of that worker goes, whatever its medium. O(its blocks).

        Its index-level degradation goes with it.
        """
        self._clear(pod, arguments.rank(dp_rank))

    def mark_worker(self, pod: str, dp_rank: int, verdict: Verdict) -> None:
        """The stream's verdict on a worker: "exact", "degraded" or "stale". O(ranks).

        The pod's state is the worst of all it is told and of what it knows itself.
        """
        told = arguments.choice(verdict, "verdict", answers.VERDICTS)
        self._mark(pod, arguments.rank(dp_rank), told)

    def trust(self, until: float | None) -> None:
        """Makes every state stale from a moment on, without a thread that has to run then. O(1).

        For a keeper of the index that has to confirm again and again that it still hears of changes: a process that was
        stopped meanwhile answers stale when it goes on. States are what :meth:`mark_worker` and events have made them
        again after the next call with a later moment.

        until: a reading of ``time.monotonic()`` in seconds, None for no limit. A match then reads that clock, some
        20 ns. A snapshot does not have it. Any thread may call it. Raises InvalidTypeError or InvalidValueError::

            import time
            from kvindex import PrefixIndex

            index = PrefixIndex(block_size=16)
            index.mark_worker("a", 0, "exact")
            index.trust(time.monotonic() - 1.0)
            assert index.pod_state("a") == "stale"
            index.trust(None)
            assert index.pod_state("a") == "exact"
        """
        # What is beyond the clock's range is no limit.
        moment = _FOREVER if until is None else round(1e9 * arguments.moment(until, "until"))
        self._trust(max(-_FOREVER, min(moment, _FOREVER)))

    def pod_state(self, pod: str) -> Verdict:
        """The worst of its ranks: "exact", "degraded" (a hole accepted, or blocks not placed) or "stale". O(1).

        A pod of which no event has told and no :meth:`mark_worker` is stale.

        Raises UnknownPodError if there is no such pod.
        """
        return answers.VERDICTS[self._verdict(pod)]

    def pods(self) -> dict[str, Verdict]:
        """Every pod that is known, sorted by name, with its :meth:`pod_state`. O(pods log pods).

        Each state is of some moment during the call; a pod that is removed meanwhile is left out.
        """
        states: dict[str, Verdict] = {}
        for pod in sorted(self._pods()):
            with suppress(UnknownPodError):
                states[pod] = answers.VERDICTS[self._verdict(pod)]
        return states

    def worker_stats(self, pod: str) -> dict[int, WorkerStats]:
        """The :class:`WorkerStats` of each rank. O(ranks). Raises UnknownPodError."""
        return {
            worker["rank"]: {
                "blocks": worker["blocks"],
                "parked": worker["parked"],
                "state": answers.VERDICTS[worker["state"]],
                "last_seq": None if worker["last_seq"] < 0 else worker["last_seq"],
                "in_doubt": worker["in_doubt"],
                "lookahead": sorted(worker["lookahead"]),
            }
            for worker in self._workers(pod)
        }

    def stream_places(self, pod: str) -> dict[int, StreamPlace]:
        """How far each rank's stream has been applied: ``{rank: StreamPlace}``. O(ranks).

        Ranks whose last batch came without its number are left out: their streams cannot be continued, only begun
        anew. Raises UnknownPodError.
        """
        return {
            place.pop("rank"): StreamPlace(**{**place, "model": place["model"].decode("utf-8", "surrogateescape")})
            for place in self._places(pod)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole index to a file, from which :meth:`load` makes an equal one. O(size of the index).

        What events and options have said goes in, with the place that each worker's stream has reached; what
        :meth:`add_prefix` has said does not. The file is complete at any moment: it is written beside its place, with
        its checksum, brought to the disk and then renamed; a file that was there gives it its mode. Matches go on
        meanwhile; events wait while the index is copied in memory (about 20 ms for a million blocks), and not for the
        disk. Raises :class:`SnapshotError`, with whatever was there before unchanged and nothing left beside it, where
        the disk refuses it or the path leads to no regular file.
        """
        name = arguments.path(path, "path")
        snapshot.write(name, self._snapshot(f" to {name}"))

    def dumps(self) -> bytes:
        """The snapshot that :meth:`save` writes, as bytes. O(size of the index).

        Raises CapacityError where there is no memory for it.
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
        """An index equal to the one that was saved, with its block size, seed and options. O(size of the file).

        Every worker is ``stale`` until its stream has shown what happened since: :class:`EventManager` asks for just
        that, or call :meth:`mark_worker`. max_parked: None for what the saved index had. max_bytes, ttl, clock: as of
        the class; they are not in the file, nor is what was touched when: all content counts as touched now, and what
        does not fit is shed. Raises :class:`SnapshotError`, naming the file, what is wrong with it and at which byte,
        for whatever is damaged, cut, contradictory, of a newer version, too large or no snapshot at all.
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
        """Makes an index of the bytes that :meth:`dumps` returns and :meth:`save` writes. O(bytes).

        data: bytes-like; it is copied unless it is bytes. The other arguments are those of :meth:`load`.
        Raises InvalidTypeError if data is not bytes-like, otherwise what :meth:`load` raises.
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
            # Content that is loaded counts as touched now, so the index has to know what time it is.
            index._expire(clock())
            index._load(data)
            return index

    def stats(self) -> IndexStats:
        """The :class:`IndexStats` of the whole index, all of one moment. O(1)."""
        return self._figures()

    def _check(self) -> None:
        """Verifies every invariant of the native structure. O(size of the index).

        Raises KVIndexError naming the first that is broken.
        """
        arguments.unbroken(self._broken())

"""The values that an index returns: a pod's part of a match, which is made from native rows on request, and figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeAlias, TypedDict

__all__ = ["IndexStats", "PodMatch", "StreamPlace", "Verdict", "WorkerStats"]

Verdict: TypeAlias = Literal["exact", "degraded", "stale"]
"""The state of a pod or a worker, from best to worst."""

VERDICTS: Final[tuple[Verdict, ...]] = ("exact", "degraded", "stale")
ENGINES: Final = ("vllm", "sglang", "trtllm")
REPORT = ("stored", "removed", "cleared", "parked", "skipped", "errors", "reasons")

# What a row says, and how.
REUSED, HELD, MEDIUM, TIER = 1, 2, 4, 8
# Rank, medium (None: all together), what of these it says, blocks, index into VERDICTS.
Row: TypeAlias = "tuple[int, bytes | None, int, int, int]"


class PodMatch(NamedTuple):
    """How much of one prompt a pod reuses and holds, by its best rank.

    ``tokens`` is what the pod reuses: by the rules of its engine where :meth:`PrefixIndex.configure_pod` names one
    that is known (``engine="vllm"`` or ``"sglang"``), otherwise the prefix of which any medium holds every block.
    ``blocks`` is the same in index blocks, ``ranks`` the same of each rank. ``media`` is what each medium alone holds,
    by the best rank for that medium. ``ranks`` and ``media`` leave out zeros. ``state`` is the pod's verdict when the
    question was answered: ``"exact"``, ``"degraded"`` or ``"stale"``. ``held`` counts the tokens of the prefix of
    which any medium holds every block, whatever the engine reuses of it. ``tiers`` says how far each medium of the best
    rank reaches, in the order in which an engine reads them: each begins where the one before ends, so the figures are
    cumulative; a medium that adds nothing is left out. ``tiers`` is empty for a pod with several media whose engine is
    not named.
    """

    tokens: int
    blocks: int
    media: dict[str, int]
    ranks: dict[int, int]
    state: Verdict
    held: int
    tiers: dict[str, int]


class StreamPlace(NamedTuple):
    """How far the stream of one worker has been applied.

    ``seq`` is the number of its last batch, ``ts`` that batch's time in seconds, ``fingerprint`` the XXH3-64 of its
    payload, by which its publisher is known again. ``whole`` says whether every batch since a clean start was applied,
    ``model`` under which model.
    """

    seq: int
    ts: float
    fingerprint: int
    whole: bool
    model: str


class IndexStats(TypedDict):
    """The result of :meth:`PrefixIndex.stats`. Counters count since the index was made."""

    blocks: int
    """Distinct content, in index blocks."""
    chains: int
    sets: int
    """Distinct sets of holders."""
    holders: int
    pods: int
    workers: int
    parked: int
    """Stored hashes that wait for their parent."""
    guesses: int
    """Entries of :meth:`PrefixIndex.add_prefix`."""
    bytes: int
    """Native memory: everything that grows with events, without the names of pods and models and without scratch."""
    shed_blocks: int
    """``shed_*``: taken by ``max_bytes``."""
    shed_chains: int
    shed_parked: int
    shed_guesses: int
    expired_blocks: int
    """``expired_*``: taken by ``ttl``."""
    expired_chains: int
    expired_guesses: int
    batches: int
    bad_payloads: int
    events_stored: int
    events_removed: int
    events_cleared: int
    blocks_stored: int
    blocks_removed: int
    blocks_parked: int
    skipped: int
    errors: int
    skipped_reasons: dict[str, int]
    """``skipped`` and ``errors`` by reason, with the names of :attr:`IngestReport.reasons`."""


class WorkerStats(TypedDict):
    """One rank in the result of :meth:`PrefixIndex.worker_stats`."""

    blocks: int
    """Index blocks held, in every medium and group."""
    parked: int
    """Stored hashes that wait for their parent."""
    state: Verdict
    last_seq: int | None
    """The number of the last batch; None where batches came without numbers."""
    in_doubt: bool
    """Whether a clear left open which media it cleared."""
    lookahead: list[int]
    """How many tokens behind a block its blocks' hashes cover (0: none), sorted; empty before any stored event."""


def pod_match(rows: Iterable[Row], block_size: int) -> PodMatch:
    """The rows of one pod put together."""
    media: dict[str, int] = {}
    ranks: dict[int, int] = {}
    reach: dict[int, dict[str, int]] = {}
    state = held = 0
    for rank, medium, says, blocks, verdict in rows:
        state, tokens = verdict, blocks * block_size
        tiers = reach.setdefault(rank, {})
        if says & REUSED:
            ranks[rank] = max(ranks.get(rank, 0), tokens)
        if says & HELD:
            held = max(held, tokens)
        if medium:  # Empty: nobody has it any more.
            # Names of media come from the wire and may be no UTF-8.
            name = medium.decode("utf-8", "surrogateescape")
            if says & MEDIUM:
                media[name] = max(media.get(name, 0), tokens)
            if says & TIER:
                tiers[name] = max(tiers.get(name, 0), tokens)
    best = max(reach, key=lambda rank: (ranks.get(rank, 0), max(reach[rank].values(), default=0), -rank))
    tokens = ranks.get(best, 0)
    return PodMatch(tokens, tokens // block_size, media, ranks, VERDICTS[state], held, reach[best])

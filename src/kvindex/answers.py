"""The values that an index returns: a pod's part of a match, the place of a stream, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, TypedDict

__all__ = ["IndexStats", "PodMatch", "StreamPlace", "Verdict", "WorkerStats"]

Verdict: TypeAlias = Literal["exact", "degraded", "stale"]
"""The state of a pod or a worker, from best to worst."""

STATES: Final[tuple[Verdict, ...]] = ("exact", "degraded", "stale")
ENGINES: Final = ("vllm", "sglang", "trtllm")
REPORT = ("stored", "removed", "cleared", "parked", "skipped", "errors", "reasons")

# Flags for the meanings of a row.
REUSED, HELD, MEDIUM, TIER = 1, 2, 4, 8
# Rank, medium (None: all together), meanings, blocks, index into STATES.
Row: TypeAlias = "tuple[int, bytes | None, int, int, int]"


class PodMatch(NamedTuple):
    """One pod's part of a :class:`PrefixMatch`. All counts are for the best rank unless noted."""

    tokens: int
    """Leading tokens of the prompt that the pod reuses. With ``configure_pod(engine=...)``, the rules of that engine
    apply; otherwise every block of the prefix that any medium holds counts."""
    blocks: int
    """The same in index blocks."""
    media: dict[str, int]
    """``{medium: tokens}``: the prefix that each medium holds alone, for the best rank of that medium. No zeros."""
    ranks: dict[int, int]
    """``{rank: tokens}``: the reuse of each rank. No zeros."""
    state: Verdict
    """State of the pod at the time of the answer: ``"exact"``, ``"degraded"`` or ``"stale"``."""
    held: int
    """Tokens of the longest prefix whose blocks are each held by some medium, before any rule of the engine."""
    tiers: dict[str, int]
    """``{medium: tokens}``: the end of the prefix after each medium, in the order in which an engine reads them. The
    figures are cumulative, and a medium that adds no tokens is left out. Empty for a pod with several media and no
    ``engine``."""


class StreamPlace(NamedTuple):
    """The last applied batch of one worker's stream."""

    seq: int
    """Sequence number of the batch."""
    ts: float
    """Timestamp of the batch in seconds since 1970."""
    fingerprint: int
    """XXH3-64 of the payload, by which the publisher is recognised after a reconnect."""
    whole: bool
    """Whether every batch since a clean start of the engine has been applied."""
    model: str
    """Model that the batches were applied under."""


class IndexStats(TypedDict):
    """The result of :meth:`PrefixIndex.stats`. Counters start when the index is created."""

    blocks: int
    """Distinct content, in index blocks."""
    chains: int
    """Runs of consecutive blocks that share one entry of the index."""
    sets: int
    """Distinct sets of holders."""
    holders: int
    """Combinations of worker, medium, group and block size that may hold blocks."""
    pods: int
    workers: int
    parked: int
    """Stored hashes that wait for their parent."""
    guesses: int
    """Entries of :meth:`PrefixIndex.add_prefix`."""
    bytes: int
    """Native memory of everything that grows with events. Names of pods and models and scratch memory are not
    included."""
    shed_blocks: int
    """``shed_*``: evicted because of ``max_bytes``."""
    shed_chains: int
    shed_parked: int
    shed_guesses: int
    expired_blocks: int
    """``expired_*``: dropped because of ``ttl``."""
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
    """Sequence number of the last batch; None if batches came without numbers."""
    in_doubt: bool
    """Whether a clear left open which media it cleared."""
    lookahead: list[int]
    """Numbers of tokens behind a block that the hashes of its blocks cover (0: no lookahead), sorted. Empty before the
    first stored event."""


def pod_match(rows: Sequence[Row], block_size: int) -> PodMatch:
    """Combines the rows of one pod."""
    if len(rows) == 1:  # Most pods. It takes half the time of the code below.
        rank, medium, says, blocks, own = rows[0]
        found = blocks * block_size
        only = {medium.decode("utf-8", "surrogateescape"): found} if medium else {}
        reused = found if says & REUSED else 0
        return PodMatch(
            reused, reused // block_size, only if says & MEDIUM else {}, {rank: found} if says & REUSED else {},
            STATES[own], found if says & HELD else 0, dict(only) if says & TIER else {},
        )  # fmt: skip
    media: dict[str, int] = {}
    ranks: dict[int, int] = {}
    reach: dict[int, dict[str, int]] = {}
    state = held = 0
    for rank, medium, says, blocks, own in rows:
        state, tokens = own, blocks * block_size
        tiers = reach.setdefault(rank, {})
        if says & REUSED:
            ranks[rank] = max(ranks.get(rank, 0), tokens)
        if says & HELD:
            held = max(held, tokens)
        if medium:  # An empty name means that the medium has gone.
            # Names of media come from the wire and need not be UTF-8.
            name = medium.decode("utf-8", "surrogateescape")
            if says & MEDIUM:
                media[name] = max(media.get(name, 0), tokens)
            if says & TIER:
                tiers[name] = max(tiers.get(name, 0), tokens)
    best = max(reach, key=lambda rank: (ranks.get(rank, 0), max(reach[rank].values(), default=0), -rank))
    tokens = ranks.get(best, 0)
    return PodMatch(tokens, tokens // block_size, media, ranks, STATES[state], held, reach[best])

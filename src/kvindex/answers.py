"""What a match says about pods, made from its native rows when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias

__all__ = ["PodMatch", "StreamPlace"]

VERDICTS: Final = ("exact", "degraded", "stale")
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
    state: str
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

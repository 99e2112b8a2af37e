"""What a match says about pods, made from its native rows when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeAlias

__all__ = ["PodMatch", "StreamPlace"]

VERDICTS: Final = ("exact", "degraded", "stale")
REPORT = ("stored", "removed", "cleared", "parked", "skipped", "errors", "reasons")

# Rank, medium (None: all together), whether the worker has no other medium, blocks, index into VERDICTS.
Row: TypeAlias = "tuple[int, bytes | None, bool, int, int]"


class PodMatch(NamedTuple):
    """How much of one prompt a pod holds, by its best rank.

    ``tokens`` counts over all media together, ``blocks`` is the same in index blocks. ``media`` is what each medium
    alone holds, by the best rank for that medium; ``ranks`` is what each rank holds; both leave out zeros. ``state`` is
    the pod's verdict when the question was answered: ``"exact"``, ``"degraded"`` or ``"stale"``.
    """

    tokens: int
    blocks: int
    media: dict[str, int]
    ranks: dict[int, int]
    state: str


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
    state = 0
    for rank, medium, alone, blocks, verdict in rows:
        state = verdict
        if alone or medium is None:
            ranks[rank] = max(ranks.get(rank, 0), blocks * block_size)
        if medium:  # Empty: nobody has it any more.
            # Names of media come from the wire and may be no UTF-8.
            name = medium.decode("utf-8", "surrogateescape")
            media[name] = max(media.get(name, 0), blocks * block_size)
    tokens = max(ranks.values(), default=0)
    return PodMatch(tokens, tokens // block_size, media, ranks, VERDICTS[state])

"""What a match says about one pod."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PodMatch"]


class PodMatch(NamedTuple):
    """How much of one prompt a pod holds, by its best rank.

    ``tokens`` counts over all media together, ``blocks`` is the same in index blocks. ``media`` is what each medium alone holds, by the
    best rank for that medium; ``ranks`` is what each rank holds; both leave out zeros. ``state`` is the pod's verdict when the
    question was answered: ``"exact"``, ``"degraded"`` or ``"stale"``.
    """

    tokens: int
    blocks: int
    media: dict[str, int]
    ranks: dict[int, int]
    state: str

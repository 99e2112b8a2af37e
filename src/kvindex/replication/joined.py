"""One index over several that have no pod in common: :attr:`ReplicatedIndex.index` with several shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..errors import SnapshotError, StreamError
from ..index import PrefixIndex

__all__ = ["JoinedIndex"]


class JoinedIndex(PrefixIndex):
    """Answers as one index with the pods of all ``parts``.

    The core asks each part for a match or a choice. Each part has its own locks, states and moment of :meth:`trust`,
    and a snapshot replaces only one part. A call with the name of a pod goes to the part that ``place`` returns. A
    match walks all parts, so its time grows with their number. Blocks that pods of several parts hold are stored in
    each of these parts.
    """

    __slots__ = ("_place",)
    _place: Callable[[str], int]
    parts: tuple[PrefixIndex, ...]

    @classmethod
    def of(cls, parts: Sequence[PrefixIndex], place: Callable[[str], int]) -> JoinedIndex:
        self = cls(parts[0].block_size, hash_seed=parts[0].hash_seed, clock=parts[0]._clock)
        self._place = place
        self._join(*parts)
        return self

    def _home(self, pod: Any) -> PrefixIndex:
        # Each part refuses a value that is not a name.
        return self.parts[self._place(pod) if isinstance(pod, str) else 0]

    def ingest(self, pod: str, payload: Any, **options: Any) -> Any:
        return self._home(pod).ingest(pod, payload, **options)

    def _apply(self, kind: Any, pod: Any, *given: Any) -> Any:
        return self._home(pod)._apply(kind, pod, *given)

    def _ingest_hashed(self, data: Any) -> NoReturn:
        raise StreamError("hashed batches are of one shard: its index takes them")

    def _set_limit(self, owner: object, moment: int) -> None:
        for part in self.parts:
            part._set_limit(owner, moment)

    def _expire(self, now: float) -> None:
        for part in self.parts:
            part._expire(now)

    def _pods(self) -> list[str]:
        return [pod for part in self.parts for pod in part._pods()]

    def _broken(self) -> bytes:
        return next(filter(None, (part._broken() for part in self.parts)), b"")

    def _probes(self) -> float:
        return max(part._probes() for part in self.parts)

    def _figures(self) -> Any:
        total: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for part in self.parts:
            figures: dict[str, Any] = {**part._figures()}
            reasons.update(figures.pop("skipped_reasons"))
            total.update(figures)
        return {**total, "skipped_reasons": dict(reasons)}

    def _saved(self) -> NoReturn:
        raise SnapshotError(f"an index of {len(self.parts)} shards has no snapshot: its log has one of each shard")

    def _load(self, data: Any) -> NoReturn:
        self._saved()


def _at_home(name: str) -> Callable[..., Any]:
    def call(self: JoinedIndex, pod: Any, *given: Any) -> Any:
        return getattr(self._home(pod), name)(pod, *given)

    return call


for _name in (
    "_clear", "_configure", "_engine", "_expect", "_guess", "_hint", "_ignore", "_locals", "_mark", "_places",
    "_remove", "_state", "_workers",
):  # fmt: skip
    setattr(JoinedIndex, _name, _at_home(_name))

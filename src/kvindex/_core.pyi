from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, disjoint_base

from .answers import PodMatch

_Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | Buffer
_Hashes: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | Buffer
_ExtraKeys: TypeAlias = Sequence[Sequence[Any] | None]
_Verdict: TypeAlias = Literal["exact", "degraded", "stale"]

@final
class IngestReport:
    @property
    def stored(self) -> int: ...
    @property
    def removed(self) -> int: ...
    @property
    def cleared(self) -> int: ...
    @property
    def parked(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def errors(self) -> int: ...
    @property
    def reasons(self) -> dict[str, int]: ...
    @property
    def ts(self) -> float | None: ...
    @property
    def dp_rank(self) -> int: ...

@final
class PodSet:
    def __new__(cls, pods: Iterable[str]) -> PodSet: ...
    @property
    def pods(self) -> frozenset[str]: ...

@final
class PrefixMatch:
    @property
    def blocks(self) -> int: ...
    @property
    def tokens(self) -> dict[str, int]: ...
    @property
    def percent(self) -> dict[str, int]: ...
    @property
    def hashes(self) -> npt.NDArray[np.uint64]: ...
    def best(self) -> tuple[str, int] | None: ...
    def __getitem__(self, pod: str) -> PodMatch: ...

@disjoint_base
class Index:
    def __new__(
        cls,
        block_size: int = 16,
        *,
        hash_seed: int = 1337,
        presence: Literal["count", "set"] = "count",
        max_parked: int = 65536,
        max_bytes: int | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = ...,
    ) -> Self: ...
    @property
    def block_size(self) -> int: ...
    @property
    def hash_seed(self) -> int: ...
    @property
    def _clock(self) -> Callable[[], float]: ...
    def ingest(self, pod: str, payload: Buffer, *, model: str = "", dp_rank: int | None = None) -> IngestReport: ...
    def match_prefix(
        self,
        tokens: _Tokens,
        *,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys: _ExtraKeys | None = None,
        ready_pods: PodSet | Iterable[str] | None = None,
        only_exact: bool = False,
    ) -> PrefixMatch: ...
    def match_many(
        self,
        prompts: Iterable[_Tokens],
        *,
        model: str = "",
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extra_keys: _ExtraKeys | None = None,
        ready_pods: Iterable[str] | PodSet | None = None,
        only_exact: bool = False,
    ) -> list[PrefixMatch]: ...
    def match_hashes(
        self,
        hashes: _Hashes,
        *,
        model: str = "",
        ready_pods: PodSet | Iterable[str] | None = None,
        only_exact: bool = False,
    ) -> PrefixMatch: ...
    def _apply(
        self,
        kind: Literal["stored", "removed", "cleared"],
        pod: str,
        rank: int,
        model: bytes,
        hashes: npt.NDArray[np.uint64],
        group: int,
        medium: bytes | None,
        stored: tuple[Any, bool, int, int, int, int, list[bytes | None]] | None,
    ) -> IngestReport: ...
    def _guess(self, pod: str, rank: int, model: bytes, hashes: npt.NDArray[np.uint64], until: float) -> None: ...
    def _expire(self, now: float) -> None: ...
    def _configure(self, pod: str, counted: int, has_media: bool, media: list[bytes], chunk: int) -> None: ...
    def _remove(self, pod: str) -> None: ...
    def _clear(self, pod: str, rank: int) -> None: ...
    def _mark(self, pod: str, rank: int, verdict: int) -> None: ...
    def _verdict(self, pod: str) -> int: ...
    def _workers(self, pod: str) -> list[dict[str, int]]: ...
    def _figures(self) -> dict[str, Any]: ...
    def _broken(self) -> bytes: ...

def hash_tokens(
    tokens: _Tokens,
    block_size: int,
    hash_seed: int,
    lora_name: str | None,
    cache_salt: str | None,
    extra_keys: _ExtraKeys | None,
    rolled: bool,
) -> npt.NDArray[np.uint64]: ...
def scan_batch(payload: Buffer) -> tuple[float, int | None, list[tuple[str, str | None, int, int]]]: ...
def _isas() -> tuple[str, ...]: ...
def _xxh3_64(data: bytes, seed: int, isa: str | None = None) -> int: ...

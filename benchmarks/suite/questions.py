"""Times of hashing and matching."""

from __future__ import annotations

from typing import Any

from ..workloads import KINDS, hashing, match
from ._sampled import Sampled


class Hashing(Sampled):
    """Microseconds for one prompt."""

    params = (["local", "prefix"], [8, 64, 512, 2048])
    param_names = ("what", "blocks")
    make = staticmethod(hashing)

    def time_hashes(self, *_: Any) -> None:
        self.run()


class Match(Sampled):
    """One prompt from tokens, numpy."""

    params = (list(KINDS), [8, 64, 512, 2048], [8, 64, 256])
    param_names = ("finds", "blocks", "pods")
    make = staticmethod(match)
    # A quarter of the default content: 256 pods times 72 combinations have to be filled.
    options = {"content": 16_384}  # noqa: RUF012

    def time_match_prefix(self, *_: Any) -> None:
        self.run()


class MatchList(Sampled):
    """One prompt from a list of tokens."""

    params = (["full"], [8, 64, 512, 2048], [8])
    param_names = ("finds", "blocks", "pods")
    make = staticmethod(match)
    options = {"form": "list"}  # noqa: RUF012

    def time_match_prefix(self, *_: Any) -> None:
        self.run()


class MatchHashes(Sampled):
    """One prompt from its prefix hashes."""

    params = (["full"], [8, 64, 512, 2048], [8, 64, 256])
    param_names = ("finds", "blocks", "pods")
    make = staticmethod(match)
    options = {"form": "hashes", "content": 16_384}  # noqa: RUF012

    def time_match_hashes(self, *_: Any) -> None:
        self.run()

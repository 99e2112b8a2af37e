"""Judges of the simulated engines: the index and the slow model behind one interface."""

from __future__ import annotations

from typing import NamedTuple

from model import Model

from kvindex import PrefixIndex


class Answer(NamedTuple):
    """Reusable tokens of each pod's best rank: in total, and by medium."""

    tokens: dict[str, int]
    media: dict[str, dict[str, int]]


class ModelJudge:
    """The slow model."""

    def __init__(self, block_size: int = 16) -> None:
        self.model = Model(block_size)

    def ingest(self, pod: str, payload: bytes):
        return self.model.ingest(pod, payload)

    def configure(self, pod: str, **options) -> None:
        self.model.configure_pod(pod, **options)

    def state(self, pod: str) -> str:
        return self.model.pod_state(pod)

    def ask(self, tokens, **context) -> Answer:
        found = self.model.match(list(map(int, tokens)), **context)
        return Answer({p: a["tokens"] for p, a in found.items()}, {p: a["media"] for p, a in found.items()})


class IndexJudge:
    """The index. Its structure is verified after every batch."""

    def __init__(self, block_size: int = 16) -> None:
        self.index = PrefixIndex(block_size)

    def ingest(self, pod: str, payload: bytes):
        report = self.index.ingest(pod, payload)
        self.index._check()
        return report

    def configure(self, pod: str, **options) -> None:
        self.index.configure_pod(pod, **options)

    def state(self, pod: str) -> str:
        return self.index.pod_state(pod)

    def ask(self, tokens, **context) -> Answer:
        match = self.index.match_prefix(tokens, **context)
        return Answer(dict(match.tokens), {pod: dict(match[pod].media) for pod in match.tokens})


JUDGES = [ModelJudge, IndexJudge]

"""The compared contenders, each asked in its own best way.

In a contender all pods hold every chain. ``asks`` has the timed calls: for each question and label, the preparation of
the tokens and the call itself. ``answer`` gives the answers of all contenders the same form, so they are checked
against each other before the timing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import xxhash

from kvindex import PrefixIndex, prefix_hashes

from ..data import BLOCK, Chain, Tokens, fill

__all__ = [
    "CONTENDERS",
    "Ask",
    "Contender",
    "DictOfSets",
    "Dynamo",
    "KVIndex",
    "array",
    "available",
    "dynamo_problem",
    "floor",
]

SEED = 1337


class Ask(NamedTuple):
    prepare: Callable[[Tokens], Any]
    call: Callable[[Any], object]


class Contender(Protocol):
    """A contender and its questions.

    ``tokens`` is the whole call from a prompt's tokens to an answer object. ``answer`` also reads the dict of all pods
    or the best pod from it. ``hashes`` starts with the hashes that the contender itself computed.
    """

    name: str
    asks: dict[str, dict[str, Ask]]

    def __init__(self, pods: int) -> None: ...

    def store(self, contents: Sequence[Chain]) -> None: ...

    def answer(self, tokens: Tokens) -> dict[int, int]: ...


def array(tokens: Tokens) -> Tokens:
    """An array just written, as a tokenizer leaves it, like the lists. Only the index is cold in a match."""
    return tokens.copy()


def _listed(tokens: Tokens) -> list[int]:
    return tokens.tolist()


class KVIndex:
    """kvindex by ``match_prefix``; its own hashes are ``prefix_hashes``, an array of u64."""

    name = "kvindex"

    def __init__(self, pods: int) -> None:
        self.index = PrefixIndex(block_size=BLOCK, hash_seed=SEED)
        self.pods = [f"pod-{number}" for number in range(pods)]
        match = self.index.match_prefix
        self.asks = {
            "tokens": {"kvindex": Ask(array, match), "kvindex, list": Ask(_listed, match)},
            "answer": {
                "kvindex, dict": Ask(array, lambda tokens: match(tokens).tokens),
                "kvindex, best": Ask(array, lambda tokens: match(tokens).best()),
            },
            "hashes": {
                "kvindex": Ask(self.hashes, self.index.match_hashes),
                "kvindex, list": Ask(lambda tokens: self.hashes(tokens).tolist(), self.index.match_hashes),
            },
        }

    def store(self, contents: Sequence[Chain]) -> None:
        fill(self.index, contents, self.pods)

    def hashes(self, tokens: Tokens) -> Any:
        return prefix_hashes(tokens, block_size=BLOCK, hash_seed=SEED)

    def answer(self, tokens: Tokens) -> dict[int, int]:
        found = self.index.match_prefix(tokens).tokens
        return {int(pod.removeprefix("pod-")): count // BLOCK for pod, count in found.items()}


class Dynamo:
    """NVIDIA Dynamo's ``RadixTree``, with its ``compute_block_hash_for_seq`` and its JSON events."""

    name = "Dynamo"

    def __init__(self, pods: int) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq

        self.tree = tree = RadixTree()
        self.pods = range(pods)
        self._hash = hashed = compute_block_hash_for_seq
        self._event = 0

        def match(tokens: Any) -> Any:
            return tree.find_matches(hashed(tokens, BLOCK))

        self.asks = {
            "tokens": {"Dynamo, list": Ask(_listed, match), "Dynamo": Ask(array, match)},
            "answer": {
                "Dynamo, dict": Ask(_listed, lambda tokens: match(tokens).scores),
                "Dynamo, best": Ask(_listed, lambda tokens: max(match(tokens).scores.items(), key=_second)),
            },
            "hashes": {"Dynamo, list": Ask(self.hashes, tree.find_matches)},
        }

    def store(self, contents: Sequence[Chain]) -> None:
        for content in contents:
            local = self._hash(content.tokens.tolist(), BLOCK)
            self.store_as(content.hashes.tolist(), local, self.pods)

    def store_as(self, names: Sequence[int], local: Sequence[int], pods: Sequence[int]) -> None:
        for start in range(0, len(names), 256):
            blocks = [
                {"block_hash": name, "tokens_hash": content}
                for name, content in zip(names[start : start + 256], local[start : start + 256], strict=True)
            ]
            data = {"stored": {"parent_hash": names[start - 1] if start else None, "blocks": blocks}}
            self._event += 1
            event = json.dumps({"event_id": self._event, "data": data, "dp_rank": 0}).encode()
            for pod in pods:
                self.tree.apply_event(pod, event)

    def hashes(self, tokens: Tokens) -> Any:
        return self._hash(tokens.tolist(), BLOCK)

    def answer(self, tokens: Tokens) -> dict[int, int]:
        scores = self.tree.find_matches(self._hash(tokens.tolist(), BLOCK)).scores
        return {pod: count for (pod, _), count in scores.items()}


def _second(item: tuple[Any, int]) -> int:
    return item[1]


class DictOfSets:
    """The naive implementation: a dict from the hash of a prefix to the set of pods that hold it."""

    name = "dict of sets"

    def __init__(self, pods: int) -> None:
        self.pods = range(pods)
        self.held: dict[int, set[int]] = {}
        self.asks = {
            "tokens": {"dict of sets": Ask(array, self._match)},
            "answer": {},
            "hashes": {"dict of sets": Ask(self.hashes, self._walk)},
        }

    def store(self, contents: Sequence[Chain]) -> None:
        for content in contents:
            for name in self.hashes(content.tokens):
                self.held.setdefault(name, set()).update(self.pods)

    def hashes(self, tokens: Tokens) -> Any:
        return list(self._hashed(tokens))

    def _hashed(self, tokens: Tokens) -> Iterator[int]:
        digest, hashed, last = xxhash.xxh3_64_intdigest, memoryview(tokens).cast("B"), 0
        for start in range(0, len(hashed) - BLOCK * 4 + 1, BLOCK * 4):
            last = digest(hashed[start : start + BLOCK * 4], last)
            yield last

    def _match(self, tokens: Tokens) -> dict[int, int]:
        return self._walk(self._hashed(tokens))

    def _walk(self, hashes: Iterable[int]) -> dict[int, int]:
        find, answer, alive, depth = self.held.get, {}, None, 0
        for name in hashes:
            here = find(name)
            if here is None:
                break
            if alive is None:
                alive = here
            elif not alive <= here:
                answer.update(dict.fromkeys(alive - here, depth))
                alive = alive & here
                if not alive:
                    break
            depth += 1
        answer.update(dict.fromkeys(alive or (), depth))
        return answer

    def answer(self, tokens: Tokens) -> dict[int, int]:
        return self._match(tokens)


def floor(tokens: Tokens) -> int:
    """One hash of all the bytes at once, by the reference implementation: no call that reads the tokens is faster."""
    return xxhash.xxh3_64_intdigest(tokens, SEED)


def dynamo_problem() -> str | None:
    """The reason why Dynamo cannot be compared here; None if it can."""
    try:
        import dynamo._core  # noqa: F401
    except ImportError as error:
        return f"ai-dynamo-runtime is not installed here: {error}"
    return None


CONTENDERS: tuple[type[Contender], ...] = (KVIndex, Dynamo, DictOfSets)


def available() -> list[type[Contender]]:
    return [kind for kind in CONTENDERS if kind is not Dynamo or dynamo_problem() is None]

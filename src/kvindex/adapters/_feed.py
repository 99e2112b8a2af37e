"""Common to the adapters: events into the index, their order, and a count of the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .. import arguments
from ..errors import EventDecodeError, InvalidTypeError, InvalidValueError, KVIndexError
from ..events import BlockRemoved, BlockStored, Event
from ..index import PrefixIndex

__all__: list[str] = []

SEED = 1337
# The exceptions of an event that does not fit its source's description, while it is read.
MALFORMED = (KVIndexError, AttributeError, KeyError, TypeError, ValueError)


class Feed:
    """An index, and the place in each publisher's order."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.counts: Counter[str] = Counter()
        self._last: dict[Any, int] = {}

    def tally(self) -> Counter[str]:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts

    def apply(self, event: Event) -> None:
        if isinstance(event, BlockStored):
            report = self.index.process_block_stored(event)
        elif isinstance(event, BlockRemoved):
            report = self.index.process_block_removed(event)
        else:
            report = self.index.process_all_blocks_cleared(event)
            # These sources clear a worker's tiers together, which an engine's own event leaves open. Nothing that was
            # lost before matters any more.
            if event.medium is None:
                self.index.clear_worker(event.pod, event.dp_rank or 0)
            self.index.mark_worker(event.pod, event.dp_rank or 0, "exact")
        for name in ("stored", "removed", "cleared", "parked", "skipped"):
            self.counts[name] += getattr(report, name)
        self.counts.update(report.reasons)

    def skip(self, reason: str, pod: str | None = None, rank: int = 0) -> None:
        """Leave an event out; a pod that is named has lost by it."""
        self.counts["skipped"] += 1
        self.counts[reason] += 1
        if pod is not None:
            self.index.mark_worker(pod, rank, "degraded")

    def restarted(self, key: Any, number: int) -> bool:
        """Whether the publisher's numbers start again here."""
        return number <= self._last.get(key, -1)

    def missed(self, key: Any, number: int, first: int = 0) -> int:
        """The number of events that are missing before this one; ``first`` is the highest number of a first event."""
        last = self._last.get(key)
        self._last[key] = number
        lost = max(0, number - first) if last is None or number <= last else number - last - 1
        if lost:
            self.counts["lost"] += lost
        return lost


def hashes_agree(index: PrefixIndex, what: str) -> None:
    """Refuse an index whose hashes are not the ones that these events carry."""
    if index.hash_seed != SEED:
        raise InvalidValueError(
            f"the index's hash_seed is {index.hash_seed}; {what} events carry hashes with seed {SEED}, "
            f"so they need PrefixIndex(hash_seed={SEED})"
        )


def from_json(events: Any, what: str) -> list[Mapping[str, Any]]:
    """Events as a list, from JSON text, one event, or an iterable of them."""
    if isinstance(events, (str, bytes, bytearray)):
        try:
            events = json.loads(events)
        except json.JSONDecodeError as error:
            raise EventDecodeError(f"{what} events are no JSON: {error}", error.pos) from None
        except UnicodeDecodeError as error:
            raise EventDecodeError(f"{what} events are no JSON: {error}", error.start) from None
    if isinstance(events, Mapping):
        return [events]
    if not isinstance(events, Iterable):
        raise InvalidTypeError(f"{what} events are {events!r}; they are JSON, one event, or an iterable of events")
    return list(events)


def fold(value: Any) -> int | bytes:
    """A block hash: an int as it is, a string of hexadecimal digits as bytes."""
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else value


def named(pod: str) -> str:
    """A pod's name, once the index is sure to take it."""
    arguments.utf8(pod, "pod")
    return pod


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{value!r} is not a whole number")
    return value

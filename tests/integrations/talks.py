"""Conversations with a fleet, and the most cached tokens that any router could reach."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvindex import EventManager
from kvindex.sim import SimProcess
from kvindex.sim.tokenizer import chat_ids, text_ids


class Talks:
    """Conversations that take turns. ``ask(messages)`` returns the text of the answer and the cached tokens.

    ``cached`` is the number of reused tokens. ``possible`` is the number that a single endless cache would have reused.
    """

    def __init__(self, endless: SimProcess, count: int = 8) -> None:
        self._endless = endless
        self.chats: list[list[dict[str, Any]]] = [
            [{"role": "user", "content": f"conversation {number} begins. " * 6}] for number in range(count)
        ]
        self.cached = self.possible = 0

    def heard(self, chat: list[dict[str, Any]], text: str, cached: int) -> None:
        """Account for an answer to a chat, and continue the chat."""
        self.cached += cached
        self.possible += self._endless.serve(chat_ids(chat), text_ids(text))["hit"]
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then? " * 5}]


def caught_up(manager: EventManager, pods: Mapping[str, SimProcess]) -> None:
    """Wait until every published batch of the pods is applied. The pods must not be serving."""
    end = time.monotonic() + 20.0
    wanted = {name: max(pod.seqs().values()) - 1 for name, pod in pods.items()}
    while True:
        status = manager.status()
        late = {
            name: status[name]
            for name, seq in wanted.items()
            if status[name].state != "exact" or (seq >= 0 and status[name].workers[0].last_seq != seq)
        }
        if not late:
            return
        assert time.monotonic() < end, late
        time.sleep(0.002)

"""Conversations with a fleet, and what any router could reach of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvindex import EventManager
from kvindex.sim import SimProcess
from kvindex.sim.tokenizer import chat_ids, text_ids


class Talks:
    """Conversations that take turns. ``ask(messages)`` gives the text of the answer and the cached tokens.

    ``cached`` are the tokens that were reused, ``possible`` those that one endless cache would have reused.
    """

    def __init__(self, endless: SimProcess, count: int = 8) -> None:
        self._endless = endless
        self.chats: list[list[dict[str, Any]]] = [
            [{"role": "user", "content": f"conversation {number} begins. " * 6}] for number in range(count)
        ]
        self.cached = self.possible = 0

    def heard(self, chat: list[dict[str, Any]], text: str, cached: int) -> None:
        """Accounts for an answer to a chat, which goes on."""
        self.cached += cached
        self.possible += self._endless.serve(chat_ids(chat), text_ids(text))["hit"]
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then? " * 5}]


def caught_up(manager: EventManager, pods: Mapping[str, SimProcess]) -> None:
    """Waits until everything that the pods have published is applied. The pods must not be serving."""
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

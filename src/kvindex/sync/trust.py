"""The trust in a publisher's replay endpoint: whether it belongs to the publisher at all."""

from __future__ import annotations

from typing import Any

from .reasons import Reason

__all__ = ["Trust"]


class Trust:
    """The worth of answers. ``endpoint`` and ``replay_endpoint`` are the addresses in complaints; ``has`` is whether
    there is a replay endpoint. Every call is O(1)."""

    __slots__ = (
        "agrees", "answers", "asks", "brought", "brought_mark", "conflicts", "contradiction", "doubt", "endpoint",
        "foreign", "has", "presumed", "refusal", "replay_endpoint", "tails", "unconfirmed", "unheard", "unreached",
        "witness",
    )  # fmt: skip

    def __init__(self, has: bool, endpoint: str, replay_endpoint: str) -> None:
        self.has = has
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.agrees = False
        """A batch has come both live over this connection and in an answer, with the same bytes."""
        self.presumed = False
        """The publisher was silent after an answer, so the answer was assumed to be right."""
        self.brought = -1
        """The last applied batch that only an answer has shown; -1 if there is no such batch."""
        self.brought_mark = 0
        """The fingerprint of that batch, which the history may no longer have."""
        self.foreign = ""
        """Why the replay endpoint seems to be another process's, until the two agree."""
        self.refusal = ""
        """Why the last reply was refused."""
        self.contradiction: int | None = None
        """A live batch whose bytes differ from those of an answer."""
        self.tails = 0
        """Number of answers that brought batches since the last live one."""
        self.unreached = False
        """The last request found no connection."""
        self.connected()

    def connected(self) -> None:
        """Start with another connection. A replay endpoint that was found to be another process's
        stays so until it agrees."""
        self.asks = self.has
        """Its answers count as the publisher's."""
        self.conflicts = 0
        self.brought = self.brought if self.is_hearsay else -1
        self.agrees = self.presumed = False
        self.answers = False
        """It has answered since the connection was made."""
        self.unheard = False
        """The publisher is silent, and so is the replay endpoint."""
        self.unconfirmed = True
        """No batch after a live one was requested since the connection was made or the worker was cleared."""
        if self.tails < 2:  # otherwise, a live batch has to arrive before the next connection is trusted
            self.tails = 0
        self.doubt = ""
        """Why its last answer shows nothing."""
        self.witness: tuple[int, int] | None = None
        """A batch that was published over this connection and is no longer applied, with its fingerprint."""

    def forget(self) -> None:
        """Start again: the batches that it has brought are no longer applied."""
        self.agrees = self.presumed = False
        self.unconfirmed = True
        self.brought = -1
        self.contradiction = None
        self.tails = 0

    @property
    def is_hearsay(self) -> bool:
        """Whether an applied batch was shown only by an answer, and no batch has come both ways."""
        return self.brought >= 0 and not self.agrees

    @property
    def is_unconfirmed(self) -> bool:
        """Whether nothing shows yet that the live batches continue those of the answers. The matching number may be
        chance, so the next batch is requested at once."""
        return self.unconfirmed and self.is_hearsay

    @property
    def is_heard(self) -> bool:
        """Whether the publisher is heard, or may be: there is no objection to the next live batch."""
        return not self.unheard and not self.tails and not self.is_unconfirmed

    def answered(self) -> None:
        """Note that the replay endpoint has answered."""
        self.answers, self.unheard = True, False

    def suspect(self, seq: int) -> None:
        """Note that the publisher has published another batch than an answer has. One connection leads to one process:
        either the publisher has restarted behind an intermediary, or the answer is another process's."""
        self.unconfirmed = True  # the next live batch is requested, however busy the stream is
        self.foreign = self.say(Reason.RESTART_OR_OTHER, seq=seq)

    def say(self, reason: Reason, **facts: Any) -> str:
        """A reason with the two addresses."""
        return reason.text(endpoint=self.endpoint, replay=self.replay_endpoint, **facts)

    def complaint(self) -> str:
        """Return why batches and answers seem to be of different processes though none contradicts
        another, or an empty text."""
        return self.say(Reason.ONLY_REPLAYS) if self.tails > 1 else ""

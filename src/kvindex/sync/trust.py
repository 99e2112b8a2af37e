"""What a publisher's replay endpoint has shown of itself: whether it is the publisher's at all."""

from __future__ import annotations

from typing import Any

from .reasons import Reason

__all__ = ["Trust"]


class Trust:
    """What answers are worth. ``endpoint`` and ``replay_endpoint`` are the addresses that complaints name; ``has`` says
    whether there is one. Every call is O(1)."""

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
        """A batch came over this connection and in an answer, with the same bytes."""
        self.presumed = False
        """The publisher was silent when it had answered, so that its answer was taken for right."""
        self.brought = -1
        """The last applied batch that only an answer has shown, -1 for none."""
        self.brought_mark = 0
        """Its fingerprint, which the history may not have any more."""
        self.foreign = ""
        """Why it is another process's, until they agree."""
        self.refusal = ""
        """Why the last reply was refused."""
        self.contradiction: int | None = None
        """A live batch that was another one in an answer."""
        self.tails = 0
        """Answers that brought batches since the last live one."""
        self.unreached = False
        """The last request found no connection."""
        self.connected()

    def connected(self) -> None:
        """A connection stands. Whose the endpoint was found to be stays so until it agrees."""
        self.asks = self.has
        """Its answers are taken for the publisher's."""
        self.conflicts = 0
        self.brought = self.brought if self.is_hearsay else -1
        self.agrees = self.presumed = False
        self.answers = False
        """It has answered since the connection stands."""
        self.unheard = False
        """The publisher is silent, and so is the replay endpoint."""
        self.unconfirmed = True
        """Nothing was asked for behind a live batch since the connection was made or the worker was cleared."""
        if self.tails < 2:  # otherwise a live batch has to come before the next connection is believed
            self.tails = 0
        self.doubt = ""
        """Why its last answer shows nothing."""
        self.witness: tuple[int, int] | None = None
        """A batch that was published over this connection and is not applied any more, with its fingerprint."""

    def forget(self) -> None:
        """Nothing that it has brought is applied any more."""
        self.agrees = self.presumed = False
        self.unconfirmed = True
        self.brought = -1
        self.contradiction = None
        self.tails = 0

    @property
    def is_hearsay(self) -> bool:
        """Whether something is applied that only an answer has shown, and no batch has come both ways."""
        return self.brought >= 0 and not self.agrees

    @property
    def is_unconfirmed(self) -> bool:
        """Whether nothing shows yet that what came live continues what answers have brought: the number alone may be
        chance, and the next batch is asked for at once."""
        return self.unconfirmed and self.is_hearsay

    @property
    def is_heard(self) -> bool:
        """Whether the publisher is, or may be: nothing speaks against the next live batch."""
        return not self.unheard and not self.tails and not self.is_unconfirmed

    def answered(self) -> None:
        """Something has come of it."""
        self.answers, self.unheard = True, False

    def suspect(self, seq: int) -> None:
        """One connection leads to one process, and it has published another batch than an answer has: the publisher has
        restarted behind something between, or the answer is another process's."""
        self.unconfirmed = True  # the next live batch is asked for, however busy the stream is
        self.foreign = self.say(Reason.RESTART_OR_OTHER, seq=seq)

    def say(self, reason: Reason, **facts: Any) -> str:
        """A reason with the two addresses."""
        return reason.text(endpoint=self.endpoint, replay=self.replay_endpoint, **facts)

    def complaint(self) -> str:
        """Why batches and answers seem to be of different processes though none contradicts another, or nothing."""
        return self.say(Reason.ONLY_REPLAYS) if self.tails > 1 else ""

"""The reader of the log: a pure state machine without socket, clock or thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .entries import ZERO, Beat, Begun, ForeignError, Hashed, Id, LogError, Previous, decode, id_text
from .requests import Effect, Get, Load, Read, ReplicationPolicy, Request, Tip, Trust, Wait
from .snapshots import Download, Pointer

__all__ = ["BEGINNING", "Follower"]

_UNSAID: Final = {"shards": 1}
BEGINNING: Final = ("starting", "reading the log")
"""Reasons that need no attention."""


class Follower:
    """Keeps an index equal to the log.

    :meth:`next` returns the next request, one at a time. Each answer is passed to :meth:`answered`, which returns the
    effects on the index, in order.

    Answers are trusted for ``silence`` seconds after a moment at which no entry lay behind this place in the log and
    the collector was about to write a beat. This moment is the sending of the last read but one, if the last read
    brought a beat.
    """

    def __init__(self, policy: ReplicationPolicy, settings: Mapping[str, Any]) -> None:
        self.policy = policy
        self.settings = dict(settings)
        self.place: Id | None = None
        """The last entry that is applied; None before a snapshot is loaded."""
        self.reason = BEGINNING[0]
        """Why answers are not trusted, for people; empty if they are."""
        self.behind: Id | None = None
        """The place at which an epoch was found that has not named the place that it continues yet."""
        self.begun_by = ""
        """The collector whose epoch this is."""
        self.is_foreign = False
        """The log is another fleet's, or of a newer version: nothing may be written into it."""
        self.tip_at: float | None = None
        """The time when the last read was sent that showed no entry behind :attr:`place`."""
        self.heard_at: float | None = None
        """The time when the last beat was read."""
        self.booting_since: float | None = None
        self.snapshots = self.holes = 0
        """Snapshots loaded, and times that a snapshot was needed."""
        self.entries = 0
        self._download: Download | None = None
        self._loading: Pointer | None = None
        self._useless: bytes | None = None  # the pointer whose snapshot did not help
        self._seen: bytes | None = None
        self._looked_at = -1e18
        self._check_at = -1e18  # when to check whether the log still reaches up to this place
        self._short = 0  # consecutive checks in which it did not

    # ------------------------------------------------------------------------------------------------------- requests

    def next(self, now: float) -> Request:
        policy = self.policy
        if self.place is None:
            if self.booting_since is None:
                self.booting_since = now
            if self._download is None:
                if now < self._looked_at + policy.beat:
                    return Wait(self._looked_at + policy.beat)
                self._looked_at = now
                self._download = Download()
            return self._download.next()
        if now >= self._check_at:
            return Tip()
        return Read(self.place, policy.count, policy.beat)

    def answered(self, request: Request, answer: Any, sent: float, now: float) -> list[Effect]:
        """Take the answer to a request of :meth:`next`, which was sent at ``sent``."""
        if type(request) is Read:
            return self._read(answer, sent, request.most)
        if type(request) is Tip:
            self._check_at = now + self.policy.silence
            place = self.place or ZERO
            self._short = self._short + 1 if place != ZERO and (answer or ZERO) < place else 0
            # If the log has just lost its end, the collector fills it again. If it was begun below this place, no later
            # entry will ever be found in it.
            if self._short > 1:
                return self.reboot(f"the log ends at {id_text(answer or ZERO)}, before {id_text(place)}")
            return []
        assert type(request) is Get
        try:
            return self._got(answer, now)
        except LogError as error:
            self.is_foreign = isinstance(error, ForeignError)
            self._useless = self._seen
            self.reason, self._download = str(error), None
            return []

    def lost(self) -> None:
        """Note that the server was lost, or replaced by another one: the content of the log is unknown."""
        self.tip_at = None
        self._download = None
        self._check_at = -1e18

    # ------------------------------------------------------------------------------------------------------ snapshots

    def reboot(self, reason: str) -> list[Effect]:
        """Begin with the next snapshot that can be continued, because the content of the index cannot."""
        self.holes += 1
        self.reason = reason
        self.place = self.behind = self.tip_at = self.booting_since = None
        self._download = None
        return [Trust(0.0)]

    def _got(self, data: bytes | None, now: float) -> list[Effect]:
        assert self._download is not None
        if self._download.pointer is None:
            self._seen = data
            if data is None or data == self._useless:
                self._download = None
                if data is None and self.snapshots == self.holes == 0:
                    # A log that still has its first entry can be read from there.
                    return self.begin(ZERO)
                return []
            self._download.pointer = found = Pointer.decode(data)
            if dict(found.settings) != self.settings:
                raise ForeignError(_foreign(self.settings, found.settings))
            return []
        contents = self._download.got(data)
        if contents is None:
            return []
        pointer, self._download = self._download.pointer, None
        self._loading = pointer
        return [Load(*contents), *self.begin(pointer.id)[1:]]

    def begin(self, place: Id) -> list[Effect]:
        """Continue from ``place`` with the index that is loaded, or with an empty one."""
        self.place = place
        self.behind = self.tip_at = self.booting_since = None
        self._check_at = -1e18
        self._short = 0
        self.is_foreign = False
        return [Load(None, {}, []), Trust(0.0)]

    def loaded(self, error: str | None) -> None:
        """Note whether the snapshot could be loaded."""
        if error is None:
            self.snapshots += self._loading is not None
            self.reason = BEGINNING[1]
        else:
            self.place = None
            self.reason, self._useless = error, self._seen
        self._loading = None

    # -------------------------------------------------------------------------------------------------------- entries

    def _read(self, entries: list[tuple[Id, bytes]], sent: float, count: int) -> list[Effect]:
        effects: list[Effect] = []
        beaten = False
        for id, data in entries:
            assert self.place is not None
            if self._is_new_epoch(id):
                # An epoch that ended before it named the place that it continues leaves that open for the next epoch.
                self.behind = self.place if self.behind is None else self.behind
            elif not self._is_next(id):
                return effects + self.hole(f"entry {id_text(id)} follows {id_text(self.place)} in the log")
            try:
                items = decode(data)
            except LogError as error:
                self.is_foreign = isinstance(error, ForeignError)
                return effects + self.hole(f"{id_text(id)}: {error}")
            self.place = id
            self.entries += 1
            for item in items:
                if type(item) is Hashed:  # nearly all items
                    effects.append(item)
                elif isinstance(item, Beat):
                    beaten = True
                elif isinstance(item, Begun):
                    self.begun_by = item.writer
                    if dict(item.settings) != self.settings:
                        self.is_foreign = True
                        return effects + self.hole(_foreign(self.settings, item.settings))
                elif isinstance(item, Previous):
                    if self.behind is None or tuple(item) != self.behind:
                        before = id_text(self.behind or self.place)
                        return effects + self.hole(
                            f"epoch {id[0]} continues {id_text((item.epoch, item.number))}, this index is at {before}"
                        )
                    self.behind = None
                else:
                    effects.append(item)
        full = len(entries) >= count
        if beaten and not full and self.behind is None and self.tip_at is not None:
            self.heard_at = sent
            self._check_at = sent + self.policy.silence
            self._short = 0
            self.reason = ""
            effects.append(Trust(self.tip_at + self.policy.silence))
        self.tip_at = None if full else sent
        return effects

    def _is_new_epoch(self, id: Id) -> bool:
        assert self.place is not None
        return id[0] > self.place[0] and id[1] == 1

    def _is_next(self, id: Id) -> bool:
        assert self.place is not None
        return id == (self.place[0], self.place[1] + 1)

    def hole(self, reason: str) -> list[Effect]:
        """Note that the entries behind this place cannot be applied: only a later snapshot helps."""
        self._useless = self._seen
        return self.reboot(reason)


def _foreign(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    differ = ", ".join(
        f"{name} {other.get(name, _UNSAID.get(name))!r} where this index has {own.get(name, _UNSAID.get(name))!r}"
        for name in sorted({*own, *other})
        if own.get(name) != other.get(name)
    )
    return f"the log belongs to another fleet: {differ}; give each fleet a name of its own"

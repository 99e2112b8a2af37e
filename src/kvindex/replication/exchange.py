"""Exchange of snapshots alone, without a log: a process that starts late begins with a neighbour's content. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .collector import Cut
from .entries import Id, LogError
from .replica import Known
from .requests import Claim, Collect, Effect, Fail, Get, Load, Release, ReplicationPolicy, Request, Snapshot, Wait
from .snapshots import Download, Pointer, Upload

__all__ = ["Exchange"]


class Exchange:
    """Loads the snapshot in the store once, then writes one every ``snapshot_every`` seconds unless another process
    does. Used like a :class:`Replica`."""

    role = "direct"

    def __init__(self, policy: ReplicationPolicy, settings: Mapping[str, Any], writer: str) -> None:
        self.policy = policy
        self.settings = dict(settings)
        self.writer = writer
        self.known = Known()
        self.reason = "looking for a snapshot"
        self.hindrance = self.place = ""
        self.failures: dict[str, int] = {}
        self.snapshots = 0
        self.closing = False
        self._download: Download | None = Download()
        self._upload: Upload | None = None
        self._kept: Pointer | None = None
        self._has_lease = self._asked = self._looks = False
        self._due = 0.0
        self._wall = 0.0

    def next(self, now: float, wall: float) -> Request:
        self._wall = wall
        if self.closing:
            return Release(self.writer) if self._has_lease else Wait(float("inf"))
        if self._download is not None:
            return self._download.next()
        if self._upload is not None and (request := self._upload.next()) is not None:
            return request
        if self._looks:
            return Get("")
        if now >= self._due and not self._asked:
            return Claim(self.writer, self.policy.snapshot_every)
        return Wait(max(self._due, now + self.policy.beat))

    def answered(self, request: Request, answer: Any, sent: float, now: float) -> list[Effect]:
        if type(request) is Release:
            self._has_lease = False
        elif type(answer) is Fail:
            self.failures[answer.kind] = self.failures.get(answer.kind, 0) + 1
            self.reason = answer.reason
            self._upload, self._asked, self._looks = None, False, False
            return self._begin(now)
        elif self._download is not None:
            return self._got(answer, now)
        elif type(request) is Claim:
            # The process with the claim writes the next snapshot. The claim ends by itself when that is due.
            self.reason = ""
            self._has_lease = self._asked = answer is True
            self._looks = self._asked
            self._due = now + self.policy.snapshot_every
        elif type(request) is Get:
            self._looks, self._kept = False, None
            with suppress(LogError):
                self._kept = None if answer is None else Pointer.decode(answer)
            return [Snapshot()]
        elif self._upload is not None:
            self._upload.done()
            if self._upload.next() is None:
                self._upload = None
                self.snapshots += 1
                self.reason = ""
        return []

    def _got(self, data: bytes | None, now: float) -> list[Effect]:
        assert self._download is not None
        try:
            if self._download.pointer is not None:
                contents = self._download.got(data)
                if contents is None:
                    return []
                self.snapshots += 1
                return [Load(*contents), *self._begin(now)]
            if data is None:
                self.reason = ""
                return self._begin(now)
            self._download.pointer = Pointer.decode(data)
            if dict(self._download.pointer.settings) != self.settings:
                other = self._download.pointer.settings
                raise LogError(f"the snapshot belongs to another fleet: it has {other}, this index {self.settings}")
            return []
        except LogError as error:
            self.reason = str(error)
            return self._begin(now)

    def _begin(self, now: float) -> list[Effect]:
        """Follow the engines, whether or not the snapshot was loaded."""
        began, self._download = self._download is not None, None
        self._due = max(self._due, now + self.policy.patience)
        return [Collect()] if began else []

    def loaded(self, error: str | None) -> None:
        self.reason = error or ""

    def shown(self, item: Any) -> None:
        """Ignore an item, because there is no log."""

    def due(self, now: float) -> list[Effect]:
        return []

    def beat(self, now: float) -> None:
        """Do nothing, because there is no log."""

    def snapshot_made(self, cut: Cut, data: bytes | None, now: float) -> None:
        self._asked = False
        if data is not None:
            id: Id = (round(self._wall * 1e6), 0)
            dropped = () if self._kept is None else self._kept.keys()
            self._upload = Upload(id, data, self.writer, self.settings, self.policy.piece, dropped)

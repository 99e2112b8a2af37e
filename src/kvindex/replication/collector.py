"""The writer of the log: a pure state machine without socket, clock or thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from .entries import Beat, Begun, Hashed, Id, Item, Previous, encode, id_text, next_epoch
from .requests import (
    Append,
    Claim,
    Effect,
    Refused,
    Renew,
    ReplicationPolicy,
    Request,
    Snapshot,
    StepDown,
    Tip,
    Trim,
    Wait,
)
from .snapshots import Pointer, Upload

__all__ = ["Collector", "Cut"]

# Bytes of an item in addition to its payload.
_ITEM_BYTES: Final = 64
# Seconds over which the rate of changes is measured.
_RATE_OVER: Final = 0.1
_BEAT: Final = encode([Beat(0.0)])
_EMPTY: Final = encode([])


class Cut:
    """Marks the place of a snapshot among the items: entries up to ``id`` are in the snapshot, later ones are not."""

    id: Id | None = None


class Collector:
    """Writes the changes of its index into the log, in epochs of its own.

    Items arrive through :meth:`show`, possibly from another thread; everything else belongs to one thread. :meth:`next`
    returns the next request, one at a time. Each answer is passed to :meth:`answered`, which returns the effects to
    carry out.
    """

    def __init__(
        self, policy: ReplicationPolicy, settings: Mapping[str, Any], writer: str, epoch: int, previous: Id,
        first: list[Item], kept: Pointer | None, now: float,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.settings = settings
        self.writer = writer
        self.reason = ""
        """Why nothing can be written, for people."""
        self.id: Id = (epoch, 1)
        """The last entry that was made. The first entry of an epoch is the one that the takeover wrote."""
        self.acked: Id = (epoch, 1)
        """The last entry that the log has acknowledged."""
        self.written = self.refilled = self.snapshots = self.epochs = 0
        self.shown: deque[Item | Cut] = deque()
        """Items that were shown and are in no entry yet. Appending to it needs no lock."""
        self.overflowed = False
        self._open: list[Item] = list(first)  # the entry that gathers items
        self._open_bytes = 0
        self._open_since = now
        self._count, self._count_since = 0, now  # number of changes, for their rate
        self._is_busy = False
        self._ring: deque[tuple[Id, bytes]] = deque()  # the last entries, including those that the log does not have
        self._ring_bytes = 0
        self._unsent: deque[tuple[Id, bytes]] = deque()
        self._unsure = False  # the server was lost, so the content of the log is unknown
        self._make = False  # the next entry may create the log
        self._renew_at = now + policy.lease / 4
        self._is_claiming = False
        self._upload: Upload | None = None
        self._trim: Id | None = None
        self._beat_at: float | None = None  # time of a shown beat that is not written yet
        self._beaten_at = now  # time of the beat that was written last
        self._full = False  # the server is out of memory
        self._kept = [] if kept is None else [kept]  # snapshots in the store, oldest first
        self._snapshot_at = now
        self._snapshot_asked = False
        self._bytes_since = 0
        self._seal(Previous(*previous))

    # ---------------------------------------------------------------------------------------------------------- items

    def show(self, item: Item | Cut) -> None:
        """Take a change of the index before it is made. May be called from any one thread."""
        self.shown.append(item)

    def _gather(self, now: float) -> None:
        while self.shown:
            item = self.shown.popleft()
            if isinstance(item, Cut):
                self._seal()
                item.id = self.id
                continue
            if type(item) is Beat:
                # A beat from before a pause proves nothing, so a beat is written at once or not at all.
                self._beat_at = item.at
                continue
            if not self._open:
                self._open_since = now
            self._count += 1
            if type(item) is Hashed:
                self._open_bytes += len(item.data)
            self._open.append(item)
            self._open_bytes += _ITEM_BYTES
            if self._open_bytes >= self.policy.max_entry:
                self._seal()
        if (passed := now - self._count_since) >= _RATE_OVER:
            self._is_busy = self._count > self.policy.busy * passed
            self._count, self._count_since = 0, now

    @property
    def _ripe_at(self) -> float:
        """The time when the gathering entry is written."""
        return self._open_since + (self.policy.busy_linger if self._is_busy else self.policy.linger)

    def _seal(self, *before: Item) -> None:
        if not self._open and not before:
            return
        data = encode([*before, *self._open])
        self._open, self._open_bytes = [], 0
        self._enter(data)

    def _enter(self, data: bytes, kept: bytes | None = None) -> None:
        """Give an entry its id. ``kept`` is sent in its place if it has to be sent again."""
        self.id = (self.id[0], self.id[1] + 1)
        self._unsent.append((self.id, data))
        self._ring.append((self.id, data if kept is None else kept))
        self._ring_bytes += len(data)
        self._bytes_since += len(data)
        while self._ring_bytes > self.policy.max_backlog and len(self._ring) > 1:
            id, old = self._ring.popleft()
            self._ring_bytes -= len(old)
            if self._unsent and self._unsent[0][0] == id:
                self._unsent.popleft()
                self.overflowed = True

    # ------------------------------------------------------------------------------------------------------- requests

    def next(self, now: float) -> Request:
        policy = self.policy
        self._gather(now)
        if self._unsure:
            return Tip()
        if self.overflowed:
            self._begin_epoch(now)
        if now >= self._renew_at:
            return Claim(self.writer, policy.lease) if self._is_claiming else Renew(self.writer, policy.lease)
        if self._beat_at is not None and now >= self._beat_at + policy.beat:
            self._beat_at = None
        if not self._unsent:
            if self._open and (self._beat_at is not None or now >= self._ripe_at):
                self._seal()
            if self._beat_at is not None:
                self._beaten_at, self._beat_at = self._beat_at, None
                self._enter(_BEAT, _EMPTY)
        if self._full and self._trim is not None:
            return Trim(self._trim, policy.max_length)
        if self._unsent:
            id, data = self._unsent[0]
            # The beat may have waited through a pause for the entry before it.
            if data is _BEAT and now >= self._beaten_at + policy.beat:
                data = _EMPTY
            return Append(id, data, self._make)
        if self._upload is not None and (request := self._upload.next()) is not None:
            return request
        if self._trim is not None:
            return Trim(self._trim, policy.max_length)
        times = [self._renew_at]
        if self._open:
            times.append(self._ripe_at)
        if not self._snapshot_asked:
            times.append(self._snapshot_at)
        return Wait(min(times))

    def answered(self, request: Request, answer: Any, now: float) -> list[Effect]:
        match request:
            case Append(id):
                if type(answer) is Refused:
                    self._unsure = True  # the log has this entry, or another collector's, or is gone
                    return []
                self._accepted(id)
            case Tip():
                return self._compare(answer, now)
            case Renew() | Claim():
                return self._leased(request, answer, now)
            case Trim():
                self._trim, self._full = None, False
            case _:
                assert self._upload is not None
                self._upload.done()
                if self._upload.next() is None:
                    self._uploaded()
        return []

    def _accepted(self, id: Id) -> None:
        self._unsent.popleft()
        self.acked = id
        self.written += 1
        self._make = False
        self.reason = ""

    def lost(self, reason: str, *, full: bool = False) -> None:
        """Note that the server was lost or does not accept writes; ``full`` if it is out of memory."""
        self.reason = reason
        if full and self._kept:
            self._full, self._trim = True, self._kept[-1].id
        self._unsure = True
        if self._upload is not None and not self._upload.is_whole:
            self._upload = None
            self._snapshot_asked = False

    def _leased(self, request: Request, answer: Any, now: float) -> list[Effect]:
        if answer is None or (answer is False and type(request) is Renew):
            if answer is False:
                return [StepDown("another collector has the lease")]
            self._is_claiming = True  # the lease has expired meanwhile
            return []
        if answer is False:
            return [StepDown("another collector has taken the lease")]
        self._is_claiming = False
        self._renew_at = now + self.policy.lease / 4
        return []

    def _compare(self, tip: Id | None, now: float) -> list[Effect]:
        """Compare the log with this epoch, and send the entries that the log lacks."""
        self._unsure = False
        found = tip or (0, 0)
        if found > self.id:
            return [StepDown(f"another collector writes: the log is at {id_text(found)}, behind {id_text(self.id)}")]
        if found[0] == self.id[0] and (not self._ring or self._ring[0][0][1] <= found[1] + 1):
            again = [(id, data) for id, data in self._ring if id > found]
            self.refilled += sum(id <= self.acked for id, _ in again)
            self._unsent = deque(again)
            self.acked = found
        else:
            self._begin_epoch(now)
        return []

    def _begin_epoch(self, now: float) -> None:
        """Begin another epoch with a snapshot, because the log has lost the beginning of this one, or this collector
        has dropped items. An index that has everything up to the last acknowledged entry continues."""
        self.epochs += 1
        epoch = next_epoch(self.id[0], f"{self.writer}:{self.id}")
        # No index is at number 0: if items were dropped, every index needs the snapshot.
        previous, again = (
            ((epoch, 0), []) if self.overflowed else (self.acked, [data for id, data in self._ring if id > self.acked])
        )
        self.overflowed = False
        self._unsent.clear()
        self._ring.clear()
        self._ring_bytes = 0
        self.id = self.acked = (epoch, 0)
        for data in (encode([Begun(self.writer, self.settings)]), encode([Previous(*previous)]), *again):
            self._enter(data)
        self._make = True
        self._snapshot_at = now

    # ------------------------------------------------------------------------------------------------------ snapshots

    def due(self, now: float) -> list[Effect]:
        """Return the effect that makes a snapshot, if it is time for one."""
        early = self._bytes_since >= self.policy.snapshot_bytes
        if self._snapshot_asked or self._unsure or not (early or now >= self._snapshot_at):
            return []
        self._snapshot_asked = True
        self._bytes_since = 0
        return [Snapshot()]

    def snapshot_made(self, cut: Cut, data: bytes | None, now: float) -> None:
        """Take a snapshot that was made at ``cut``; None if it could not be made."""
        self._gather(now)
        if data is None or cut.id is None or cut.id[0] != self.id[0]:
            self._snapshot_asked = False
            self._snapshot_at = now + (self.policy.snapshot_every if data is None else 0.0)
            return
        self._snapshot_at = now + self.policy.snapshot_every
        dropped = self._kept[0].keys() if len(self._kept) > 1 else ()
        self._upload = Upload(cut.id, data, self.writer, self.settings, self.policy.piece, dropped)

    def _uploaded(self) -> None:
        assert self._upload is not None
        pointer, self._upload = self._upload.pointer, None
        self._snapshot_asked = False
        self.snapshots += 1
        self._kept = [*self._kept[-1:], pointer]
        # A reader that has just found the snapshot before this one reads on from there.
        self._trim = self._kept[0].id

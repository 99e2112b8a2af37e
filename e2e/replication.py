"""Replication under faults, with processes of their own: pods that publish, two collectors, followers, a server.

    python -m e2e.replication --followers 8 --pods 32 --rate 1000        # the table of faults, for each server here
    python -m e2e.replication --only snapshot --server valkey            # only faults with a matching name

Each fault starts in a healthy fleet. It ends when its cause returns; then all members must become exact again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgpack

from kvindex import PrefixIndex
from kvindex.replication.entries import VERSION
from kvindex.replication.shard import shard_of
from kvindex.replication.snapshots import Pointer

from .log_server import LogServer, Watched, programs
from .replication_fleet import BLOCK_SIZE, Fleet, Outcome, Settings, batch

__all__ = ["FAILOVERS", "FAULTS", "SHARDED", "Fault", "compare", "measure", "running"]

LOG, SNAP = "{kv:e2e:0}:log", "{kv:e2e:0}:snap"
#: Seconds by which an exact answer may be behind the collector's events.
BOUND = 1.25


@dataclass(frozen=True)
class Fault:
    cause: Callable[[Fleet], None]
    names: str = ""
    """A pattern that the status and the log of some member must contain."""
    is_noticed: bool | None = True
    """Whether followers become stale; None where both may happen."""
    prepare: Callable[[Fleet], None] | None = None
    """A step before the fault, in a healthy fleet."""
    is_brief: bool = False
    """Whether a snapshot may end it before a query of the status, which then has counted it in ``holes``."""


# ------------------------------------------------------------------------------------------------------- processes


def _kill_collector(fleet: Fleet) -> None:
    fleet.collector.end()


def _freeze_collector(fleet: Fleet) -> None:
    pid = fleet.collector.process.pid
    os.kill(pid, signal.SIGSTOP)
    fleet.take(4.0)
    os.kill(pid, signal.SIGCONT)


def _spread(fleet: Fleet) -> None:
    """Let each candidate collect one shard."""
    candidates = [number for number, each in fleet.members.items() if each.candidate]
    while [fleet.members[number].role for number in candidates].count("collector") < fleet.settings.shards:
        # The one that started long before the others has several shards.
        for number in candidates:
            fleet.members[number].end()
        for number in candidates:
            fleet.restart(number)
        fleet.take(2.0)
        fleet.wait(fleet.all_exact)


def _kill_one_collector(fleet: Fleet) -> None:
    """Kill the collector of one shard. The pods of the others stay exact in every process meanwhile."""
    shards, names = fleet.settings.shards, fleet.settings.names
    parts = [sum(shard_of(name, shards) == shard for name in names) for shard in range(shards)]
    fleet.collector.end()
    seen = set()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        fleet.take(0.005)
        seen |= {each.exact for each in fleet.alive}
    # A member counts its pods one after another, so it also reports numbers between the two.
    assert min(seen) in {len(names) - part for part in parts}, f"others were not exact: {seen} of {parts}"


# ------------------------------------------------------------------------------------------------------ the server


def _restart_empty(fleet: Fleet) -> None:
    fleet.server.kill()
    fleet.take(0.5)
    fleet.server.start()


def _freeze_server(fleet: Fleet) -> None:
    fleet.server.freeze()
    fleet.take(3.0)
    fleet.server.thaw()


def _take_server_away(fleet: Fleet) -> None:
    """Take the server away for 8 s. Only the collector stays exact."""
    fleet.server.kill()
    fleet.take(8.0)
    told = [(each.role, each.exact) for each in fleet.alive]
    wanted = [(role, fleet.settings.pods if role == "collector" else 0) for role, _ in told]
    assert told == wanted, "the collector alone is exact"
    fleet.server.start()


def _refuse(fleet: Fleet, *, begin: list[Any], end: list[Any]) -> None:
    """Let the server refuse writes for a while."""
    with fleet.server.client() as client:
        client.execute_command(*begin)
        fleet.take(3.0)
        client.execute_command(*end)


def _fail_over(fleet: Fleet, *, lagging: bool) -> None:
    server: Watched = fleet.server
    if lagging:
        server.cut_off()
        fleet.take(0.5)
        assert server.tip(server.replica, LOG) < server.tip(server.primary, LOG), "the replica lacks entries"
    server.primary.kill()
    fleet.wait(server.is_promoted)


# ------------------------------------------------------------------------------------------ the log, and snapshots


def _pointer(client: Any) -> bytes:
    return client.get(SNAP) or b""


def _wait_for_snapshot(fleet: Fleet, client: Any) -> bytes:
    """Wait until another snapshot is complete, which ends a fault of the one before."""
    before = _pointer(client)
    fleet.wait(lambda: _pointer(client) != before)
    return _pointer(client)


def _trim(fleet: Fleet) -> None:
    """Suspend one follower until the next entries that it would read are trimmed."""
    member = fleet.members[fleet.follower]
    os.kill(member.process.pid, signal.SIGSTOP)
    with fleet.server.client() as client:
        fleet.take(1.0)
        client.execute_command("XTRIM", LOG, "MAXLEN", "1")
        fleet.take(0.5)
        os.kill(member.process.pid, signal.SIGCONT)
        _wait_for_snapshot(fleet, client)


def _slow_down(fleet: Fleet) -> None:
    """Give one follower so little processor time that the log is trimmed before it has read it."""
    member = fleet.members[fleet.follower]
    with fleet.server.client() as client:
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            os.kill(member.process.pid, signal.SIGSTOP)
            fleet.take(0.2)
            client.execute_command("XTRIM", LOG, "MAXLEN", "1")
            os.kill(member.process.pid, signal.SIGCONT)
            fleet.take(0.02)
        _wait_for_snapshot(fleet, client)


def _damage(fleet: Fleet, change: Callable[[Any, Pointer], None], named: str) -> None:
    """Start a follower again, and damage the snapshot that it reads."""
    with fleet.server.client() as client:
        fleet.wait(lambda: _pointer(client))
        member, damaged = fleet.restart(fleet.follower), b""
        end = time.monotonic() + 60.0
        while not member.has_said(named):
            if (found := _pointer(client)) != damaged:
                change(client, Pointer.decode(found))
                damaged = _pointer(client)
            fleet.take(0.002)
            assert time.monotonic() < end, f"it has not named the damage: {member.said}"
        _wait_for_snapshot(fleet, client)


def _flip(client: Any, pointer: Pointer) -> None:
    key = f"{SNAP}:{pointer.keys()[0]}"
    data = bytearray(client.get(key) or b"?")
    data[len(data) // 2] ^= 1
    client.set(key, bytes(data))


def _lose_piece(client: Any, pointer: Pointer) -> None:
    client.delete(f"{SNAP}:{pointer.keys()[0]}")


def _make_newer(client: Any, pointer: Pointer) -> None:
    import zlib

    packed = msgpack.packb([VERSION + 1, *pointer])
    client.set(SNAP, packed + zlib.crc32(packed).to_bytes(4, "big"))


# --------------------------------------------------------------------------------------------------------- engines


def _engines_in_takeover(fleet: Fleet) -> None:
    """Restart engines before, during and after the takeover by another process, and drop messages of others."""
    shared, pods = fleet.shared, fleet.settings.pods
    fleet.collector.end()
    fleet.take(0.3)
    shared.restarts[0] += 1
    fleet.wait(lambda: [each.role for each in fleet.alive].count("collector") == 1)
    for moment in range(1, 4):
        shared.restarts[moment] += 1
        for pod in range(4, pods):
            shared.drops[pod] = 3
        fleet.take(0.2)


# ---------------------------------------------------------------------------------------------------- other fleets


def _invite(fleet: Fleet, **differs: Any) -> None:
    """Add a candidate of the same name with other settings, which would collect if it could."""
    guest = fleet.invite(**differs)
    fleet.wait(lambda: guest.said)
    fleet.take(3.0)
    assert (guest.role, guest.exact) == ("follower", 0)
    fleet.collector.end()
    fleet.wait(lambda: [each.role for each in fleet.alive].count("collector") == 1)
    assert (guest.role, guest.exact) == ("follower", 0)


def _other_list(fleet: Fleet) -> None:
    guest = fleet.invite(prefix="q", policy={**fleet.settings.policy, "lease": 60.0})
    fleet.wait(lambda: guest.has_said("does not follow"))


def _neighbour(fleet: Fleet) -> None:
    """Let another fleet in the same server, under its own name, lose its collector and get another one."""
    settings = replace(fleet.settings, fleet="neighbour", pods=3, followers=3, rate=100.0)
    with Fleet(fleet.server, settings) as other:
        other.wait(lambda: fleet.take() or other.all_exact())
        other.collector.end()
        other.wait(lambda: fleet.take() or other.all_exact())
        differences = compare(other)
        assert not differences, differences


#: Commands that remove the permission to write the log, as routers lack it in `docs/guides/replication.md`, and add it.
DENY, ALLOW = ["ACL", "SETUSER", "default", "-xadd"], ["ACL", "SETUSER", "default", "+xadd"]
FULL, ROOM = ["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]
REPLICA, PRIMARY = ["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]

NEWER = f"version {VERSION + 1}"

FAULTS: dict[str, Fault] = {
    "collector killed": Fault(_kill_collector, "silent"),
    "collector suspended for 4 s": Fault(_freeze_collector, "silent"),
    "server killed, back empty after 0.5 s": Fault(_restart_empty, "cannot be reached", is_noticed=None),
    "server suspended for 3 s": Fault(_freeze_server, "cannot be reached"),
    "server gone for 8 s": Fault(_take_server_away, "cannot be reached"),
    "server read-only for 3 s": Fault(partial(_refuse, begin=REPLICA, end=PRIMARY), "read-only"),
    "server out of memory for 3 s": Fault(partial(_refuse, begin=FULL, end=ROOM), "no memory"),
    "no permission to write for 3 s": Fault(partial(_refuse, begin=DENY, end=ALLOW), "does not allow"),
    "a follower suspended, the log trimmed": Fault(_trim, "follows .* in the log", is_brief=True),
    "a follower slower than the trimming": Fault(_slow_down, "follows .* in the log", is_brief=True),
    "snapshot: a bit flipped": Fault(partial(_damage, change=_flip, named="is damaged"), "is damaged"),
    "snapshot: a piece missing": Fault(partial(_damage, change=_lose_piece, named="is gone"), "is gone"),
    "snapshot: of a newer version": Fault(partial(_damage, change=_make_newer, named=NEWER), NEWER),
    "engines restarted in a takeover": Fault(_engines_in_takeover, "silent"),
    "another fleet under the same name": Fault(partial(_invite, block_size=32), "another fleet"),
    "another list of pods": Fault(_other_list, "does not follow", is_noticed=False),
    "another fleet beside it": Fault(_neighbour, is_noticed=False),
}
#: Faults of fleets with two shards, and a candidate for each.
SHARDED: dict[str, Fault] = {
    "collector of one of two shards killed": Fault(_kill_one_collector, "shard .*silent", prepare=_spread)
}
#: Faults with a server that Sentinel watches. Each fault gets a new server.
FAILOVERS: dict[str, Fault] = {
    "primary killed, the replica current": Fault(partial(_fail_over, lagging=False), "cannot be reached"),
    "primary killed, the replica behind": Fault(partial(_fail_over, lagging=True), "cannot be reached"),
}


def measure(fleet: Fleet, fault: Fault) -> Outcome:
    """Cause one fault in a healthy fleet, and wait until all members are exact again.

    Raises AssertionError when no member names the fault, or when a match raises.
    """
    fleet.wait(fleet.all_exact)
    if fault.prepare is not None:
        fault.prepare(fleet)
    fleet.take(0.5)
    watched = [number for number, each in fleet.members.items() if each.role != "collector"]
    for member in fleet.members.values():
        member.clear()
    began = time.monotonic()
    fault.cause(fleet)
    ended = time.monotonic()
    fleet.take(1.5)
    fleet.wait(fleet.all_exact)
    settled = time.monotonic()
    fleet.take(1.0)
    fleet.wait(fleet.all_exact)
    everybody = [*fleet.members.values(), *fleet.guests.values()]
    if fault.names:
        counted = fault.is_brief and any(status.holes for *_, status in fleet.ask("places"))
        assert any(each.has_named(fault.names, counted) for each in everybody), (
            f"nobody has said {fault.names!r} in status and log: {[(each.said, each.logged) for each in everybody]}"
        )
    for number in watched:
        member = fleet.members[number]
        assert member.said or all(all_exact for _, all_exact, *_ in member.log), (
            f"{number} was stale, and had no reason"
        )
    for guest in fleet.guests.values():
        guest.end()
    fleet.guests.clear()
    for number, each in fleet.members.items():
        if not each.process.is_alive():
            fleet.restart(number)
    fleet.wait(fleet.all_exact)
    assert not fleet.raised, fleet.raised[0]
    found = fleet.outcome(began, ended, watched, settled)
    assert fault.is_noticed in (None, found.stale_after is not None), f"stale after {found.stale_after}"
    return found


def compare(fleet: Fleet) -> list[str]:
    """Stop publishing, and compare all members with an index of each shard that has every batch: the differences."""
    settings, shared = fleet.settings, fleet.shared
    rate, shared.rate.value = shared.rate.value, 0.0
    fleet.take(1.5)
    found: list[str] = []
    own = [PrefixIndex(block_size=BLOCK_SIZE) for _ in range(settings.shards)]
    want = {}
    for pod, name in enumerate(settings.names):
        # Blocks come from the tokens and hashes of a batch, not from its time. The fingerprint is that of the bytes.
        for number in range(max(0, shared.counts[pod] - 400), shared.counts[pod]):
            index = own[shard_of(name, settings.shards)]
            index.ingest(name, batch(pod, number, run=shared.runs[pod]), model="m", dp_rank=0, seq=number)
        want[name] = shared.counts[pod] - 1
    told = fleet.ask("places")
    held = sum(index.stats()["blocks"] for index in own)
    prints: dict[str, Any] = {}
    for number, places, states, blocks, status in told:
        if blocks != held:
            found.append(f"{number} has {blocks} blocks, not {held}")
        for name in settings.names:
            place = places.get(name)
            if place is None or place[0] != want[name] or not place[2] or states.get(name) != "exact":
                found.append(
                    f"{number} is at {place} of {name}, {states.get(name)}, not at {want[name]}: {status.reason}"
                )
            elif prints.setdefault(name, place[1]) != place[1]:
                found.append(f"{number} has another batch {place[0]} of {name}")
    shared.rate.value = rate
    return found


@contextmanager
def running(program: str, kind: Callable[[str], Any] = LogServer, **options: Any) -> Iterator[Fleet]:
    with ExitStack() as stack:
        server = stack.enter_context(kind(program))
        yield stack.enter_context(Fleet(server, Settings(server=server.url, **options)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.replication", description=__doc__)
    parser.add_argument("--followers", type=int, default=8)
    parser.add_argument("--pods", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--server", choices=sorted(programs()))
    parser.add_argument("--only", default="", help="a pattern of the names of faults")
    args = parser.parse_args()
    options = {"pods": args.pods, "followers": args.followers, "rate": args.rate}
    wrong: list[str] = []

    def row(fleet: Fleet, name: str, fault: Fault) -> None:
        try:
            found = measure(fleet, fault)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
            print(f"| {name:<38} | failed: {str(error)[:2000]}", flush=True)
            return
        noticed = found.stale_after is not None
        seconds = [found.stale_after, found.exact_after if noticed else None,
                   found.healed_after if noticed else None, found.worst_age, found.way]  # fmt: skip
        cells = ["-" if each is None else f"{each:.2f} s" for each in seconds]
        print(f"| {name:<38} | {' | '.join(f'{each:>12}' for each in cells)} |", flush=True)
        if found.worst_age > BOUND + found.way:
            wrong.append(
                f"{name}: an answer called exact was {found.worst_age:.2f} s old, a collector's {found.way:.2f}"
            )

    def check(fleet: Fleet) -> None:
        differences = compare(fleet)
        wrong.extend(differences)
        print(f"{len(differences)} differences {differences[:3]}", flush=True)

    for server, program in programs().items():
        if args.server not in (None, server):
            continue
        print(f"{server}: {args.followers} processes, {args.pods} pods, {args.rate:g} batches/s")
        heads = ("stale after", "exact again", "of its end", "oldest exact", "collector's")
        print(f"| {'fault':<38} | {' | '.join(f'{each:>12}' for each in heads)} |\n|---|---|---|---|---|---|")
        if chosen := {name: fault for name, fault in FAULTS.items() if re.search(args.only, name)}:
            with running(program, **options) as fleet:
                for name, fault in chosen.items():
                    row(fleet, name, fault)
                check(fleet)
        for name, fault in SHARDED.items():
            if re.search(args.only, name):
                with running(program, **options, shards=2) as fleet:
                    row(fleet, name, fault)
                    check(fleet)
        for name, fault in FAILOVERS.items():
            if re.search(args.only, name):
                with running(program, Watched, **options) as fleet:
                    row(fleet, name, fault)
                    check(fleet)
    print(*wrong[:20], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Replication with processes: followers, collectors, pods and a server of their own, and their faults."""

from __future__ import annotations

from collections import Counter

import psutil
import pytest

from .log_server import programs
from .replication import FAULTS, Fleet, compare, measure, running

PROGRAMS = programs()
#: By which an answer that calls itself exact may be behind its engine.
BOUND = 1.25


@pytest.mark.parametrize("server", ["redis", "valkey"])
def test_everybody_is_right_after_each_fault_and_nobody_was_wrong_meanwhile(server: str) -> None:
    assert server in PROGRAMS, f"{server} is missing on this machine"
    with running(PROGRAMS[server], pods=8, followers=4, rate=200.0) as fleet:
        for fault in FAULTS:
            found = measure(fleet, fault)
            assert found.worst_age <= BOUND, f"{fault}: an answer called exact was {found.worst_age:.2f} s old"
        assert compare(fleet) == []
        assert subscribers(fleet) == {1}, "the collector's; the others read the log"


def subscribers(fleet: Fleet) -> set[int]:
    """How many connections the publishers have, each at its own port, as their process has them."""
    ports = [int(endpoint.rpartition(":")[2]) for endpoint, _ in fleet.ends]
    found = Counter(
        each.laddr.port
        for each in psutil.Process(fleet.publisher).net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED
    )
    return {found[port] for port in ports}

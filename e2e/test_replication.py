"""Replication with followers, collectors, pods and a server in processes of their own, under faults."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
import yaml

from kvindex.replication import ReplicatedIndex
from kvindex.sim import tokenizer as sim_tokenizer

from .fleet import ROOT, Pods, source, until
from .log_server import LogServer, Watched, programs, too_old
from .replication import BOUND, FAILOVERS, FAULTS, SHARDED, Fault, compare, measure, running
from .replication_fleet import Fleet

PROGRAMS = programs()
SERVERS = pytest.mark.parametrize("server", ["redis", "valkey"])
SMALL: dict[str, Any] = {"pods": 8, "followers": 4, "rate": 200.0}


def check(fleet: Fleet, name: str, fault: Fault) -> None:
    """Assert that all members become exact again and were never wrong. The durations are printed, and not checked."""
    found = measure(fleet, fault)
    assert found.worst_age <= BOUND + found.way, f"{name}: an answer called exact was older than may be: {found}"
    print(f"{name}: {found}")


@SERVERS
def test_everybody_is_right_after_each_fault_and_nobody_was_wrong_meanwhile(server: str) -> None:
    with running(PROGRAMS[server], **SMALL, policy={"snapshot_every": 3.0}) as fleet:
        for name, fault in FAULTS.items():
            check(fleet, name, fault)
        assert compare(fleet) == []
        assert subscribers(fleet) == {1}, "the collector's; the others read the log"


@SERVERS
@pytest.mark.parametrize("name", SHARDED)
def test_a_shard_that_loses_its_collector_leaves_the_others_exact(server: str, name: str) -> None:
    with running(PROGRAMS[server], **SMALL, shards=2) as fleet:
        check(fleet, name, SHARDED[name])
        assert compare(fleet) == []
        assert subscribers(fleet) == {1}, "whichever process has the pod's shard"


@SERVERS
@pytest.mark.parametrize("name", FAILOVERS)
def test_a_failover_that_sentinel_decides_on_loses_nothing(server: str, name: str) -> None:
    with running(PROGRAMS[server], Watched, **SMALL) as fleet:
        check(fleet, name, FAILOVERS[name])
        assert compare(fleet) == []


def test_a_server_that_is_too_old_is_named() -> None:
    program = too_old()
    if program is None:
        pytest.skip("no server of before 6.2 is here: make .build/redis-6.0/redis-server")
    with LogServer(program) as server, ReplicatedIndex(server.url, fleet="e2e") as view:
        until(lambda: "6.0.9; 6.2 or later is needed" in view.status().reason, view.status)
        assert view.index.match_prefix(range(64)).best() is None


def subscribers(fleet: Fleet) -> set[int]:
    """The numbers of connections of the publishers' ports, from the sockets of their process."""
    ports = [int(endpoint.rpartition(":")[2]) for endpoint, _ in fleet.ends]
    found = Counter(
        each.laddr.port
        for each in psutil.Process(fleet.publisher).net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED
    )
    return {found[port] for port in ports}


WORKERS = 8


@contextmanager
def routers(pods: Pods, server: LogServer, directory: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The example router with eight workers on one log, and its URL."""
    listed = [
        {"name": pod.config.name, "model": pod.config.model, "engine": "vllm", "address": pod.url,
         "ranks": {rank: list(ends) for rank, ends in source(pod).ranks.items()}}
        for pod in pods
    ]  # fmt: skip
    (directory / "pods.yaml").write_text(yaml.safe_dump(listed))
    sim_tokenizer.save(directory / "model")
    # The port stays bound, so no other process gets it. uvicorn can listen there all the same.
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = kept.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "http_router.py", f"--pods={directory / 'pods.yaml'}",
               f"--model={directory / 'model'}", f"--port={port}", f"--workers={WORKERS}"]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "KVINDEX_LOG": server.url})
    parent = psutil.Process(process.pid)
    try:
        yield parent, f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        for each in (*(parent.children(recursive=True) if process.poll() is None else ()), process):
            each.kill()
        process.wait()
        kept.close()


def chat(url: str, content: str) -> tuple[int, int, int]:
    """The status of one chat, and the cached tokens that a worker expected and the engine reported.

    Each chat is a new connection, which any of the workers takes.
    """
    body = {"messages": [{"role": "user", "content": content}], "model": "sim", "max_tokens": 4}
    with urllib3.PoolManager(retries=False, timeout=60.0) as http:
        try:
            answer = http.request("POST", f"{url}/v1/chat/completions", json=body)
        except urllib3.exceptions.HTTPError:
            return 0, -1, -1
    if answer.status != 200:
        return answer.status, -1, -1
    usage = json.loads(answer.data)["usage"]["prompt_tokens_details"]
    return 200, int(answer.headers["x-kvindex-expected"]), usage["cached_tokens"]


def connected(pods: Pods) -> list[int]:
    """The processes at the other ends of the engines' event sockets, one for each connection of an engine."""
    ports = set()
    for pod in pods:
        publishes = int(pod.ranks[0][0].rpartition(":")[2])
        ports |= {
            each.raddr.port
            for each in psutil.Process(pod.pid).net_connections("tcp")
            if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == publishes
        }
    found = []
    for child in psutil.Process().children(recursive=True):
        # A worker that was killed may end between the two calls.
        with suppress(psutil.NoSuchProcess):
            connections = child.net_connections("tcp")
            found += [child.pid for each in connections if each.laddr.port in ports and each.raddr]
    return found


def readers(server: LogServer) -> int:
    with server.client() as client:
        return sum(each["name"] == "kvindex" for each in client.client_list())


def test_eight_workers_of_the_example_router_have_one_subscription(tmp_path: Path) -> None:
    """All workers have the engines' blocks, also after the worker with the subscription is killed."""

    def all_know(content: str) -> Any:
        found = [chat(url, content) for _ in range(3 * WORKERS)]
        return {(status, expected == reported, reported > 64) for status, expected, reported in found} == {
            (200, True, True)
        } and found

    def alone() -> int | None:
        """The process with one connection to each engine, if there is exactly one such process."""
        found = connected(pods)
        return found[0] if len(found) == len(pods) and len(set(found)) == 1 else None

    with Pods(http=0, blocks=9000) as pods, LogServer(PROGRAMS.get("redis") or PROGRAMS["valkey"]) as server:
        pods.start("a", "b", "c")
        with routers(pods, server, tmp_path) as (parent, url):
            until(lambda: readers(server) == WORKERS, lambda: readers(server), 120.0)
            content = "what all workers were told " * 8
            until(lambda: chat(url, content)[0] == 200, seconds=120.0)
            until(lambda: all_know(content), seconds=60.0)
            collector = until(alone, lambda: connected(pods))
            assert collector in {each.pid for each in parent.children()}
            psutil.Process(collector).kill()
            # uvicorn starts another worker in its place.
            successor = until(
                lambda: (found := alone()) not in (None, collector) and found, lambda: connected(pods), 60.0
            )
            until(lambda: readers(server) == WORKERS, lambda: readers(server), 60.0)
            content = "what came after the first one's end " * 8
            until(lambda: chat(url, content)[0] == 200, seconds=60.0)
            until(lambda: all_know(content), seconds=60.0)
            assert alone() == successor

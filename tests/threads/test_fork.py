"""Forks of a process whose threads use an index: the child has a working copy, in which every pod is stale.

Each test runs in a process of its own: it forks a process with threads, and the tests' own process has too many.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

FORK = """
    import os, time

    def well(child):
        deadline = time.monotonic() + 30
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise SystemExit("a child hangs")
            time.sleep(0.001)
        assert done[1] == 0, done
"""

BUSY = """
    import sys, threading, traceback
    import msgpack
    from kvindex import PodSet, PrefixIndex

    index, pods, over = PrefixIndex(1), PodSet(["a", "b"]), threading.Event()

    def batch(first):
        return msgpack.packb([0.0, [["BlockStored", [h], None, [h], 1, None] for h in range(first, first + 3000)]])

    batches = [batch(n) for n in range(1, 12000, 3000)]

    def write(pod):
        while not over.is_set():
            for data in batches:
                index.ingest(pod, data)
            index.clear_worker(pod)

    def ask():
        while not over.is_set():
            index.match_many([[n] for n in range(1, 500)], ready_pods=pods)

    def save():
        while not over.is_set():
            index.save(sys.argv[1])

    threads = [threading.Thread(target=write, args=(pod,)) for pod in "ab"]
    threads += [threading.Thread(target=ask), threading.Thread(target=save)]
    index.ingest("a", batches[0])
    index.ingest("b", batches[0])
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            time.sleep(0.002)
            child = os.fork()
            if child == 0:
                try:
                    # Between batches: of each the first block is there or none.
                    index._check()
                    for data, first in zip(batches, range(1, 12000, 3000)):
                        ends = [index.match_prefix([n], ready_pods=pods).tokens for n in (first, first + 2999)]
                        assert ends[0] == ends[1], ends
                    assert index.pod_state("a") == index.pod_state("b") == "stale"
                    index.mark_worker("a", 0, "exact")
                    assert index.pod_state("a") == "exact"
                    index.clear_worker("a")
                    assert index.ingest("a", batches[0]).stored == 3000
                    index._check()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            well(child)
        assert index.pod_state("a") == "exact"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    index._check()
"""

MANAGER = """
    import traceback
    import msgpack, zmq
    from kvindex import EventManager, PodSource, PrefixIndex, StreamError

    index = PrefixIndex()
    with EventManager(index) as manager:
        # A stream that has brought nothing yet, so that its pod has no worker; and one that is followed.
        index.ingest("b", msgpack.packb([0.0, []]), seq=0)
        endpoint = manager.bind("tcp://127.0.0.1:*")
        context = zmq.Context()
        engine = context.socket(zmq.PUB)
        engine.connect(endpoint)
        until = time.monotonic() + 30
        while not (manager.status() and manager.is_current()):
            assert time.monotonic() < until
            engine.send_multipart([b"kv@a@m", bytes(8), msgpack.packb([0.0, []])])
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            try:
                assert manager.closed and not manager.is_current() and not manager.wait_until_current()
                assert index.pod_state("a") == index.pod_state("b") == "stale"
                for call in (manager.start, lambda: manager.add_pod(PodSource("a", endpoint="tcp://127.0.0.1:1"))):
                    try:
                        call()
                    except StreamError as error:
                        assert str(os.getppid()) in str(error), error
                    else:
                        raise AssertionError(call)
                manager.close()
                with EventManager(index) as another:
                    assert another.status() == {}
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        well(child)
        assert not manager.closed and manager.is_current() and index.pod_state("b") == "exact"
        context.destroy(linger=0)
"""


EMPTY = """
    import msgpack, traceback
    from kvindex import PrefixIndex

    def stored(name):
        return msgpack.packb([0.0, [["BlockStored", [name], None, [1], 1, None]]])

    index = PrefixIndex(1)
    index.ingest("told", stored(1))
    index.configure_pod("configured")
    index.ingest("empty", msgpack.packb([0.0, []]))
    index.ingest("numbered", msgpack.packb([0.0, []]), seq=0)
    index.add_prefix("guessed", [1], ttl=1000)
    index.mark_worker("marked", 3, "exact")
    pods = ("told", "configured", "empty", "numbered", "guessed", "marked")
    child = os.fork()
    if child == 0:
        try:
            assert {index.pod_state(pod) for pod in pods} == {"stale"}
            for pod in (*pods, "opened here"):
                # Whoever listens says so; what comes in otherwise may be anything.
                index.ingest(pod, stored(1))
                assert index.pod_state(pod) == index.match_prefix([1])[pod].state == "stale", pod
            assert index.match_prefix([1], only_exact=True).tokens == {}
            index.mark_worker("opened here", 0, "exact")
            index.mark_worker("empty", 0, "exact")
            assert index.match_prefix([1], only_exact=True).tokens == {"opened here": 1, "empty": 1}
            index._check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    well(child)
    assert {pod for pod in pods if index.pod_state(pod) == "exact"} == {"told", "empty", "numbered", "marked"}
"""


def run(script: str, *arguments: str) -> None:
    program = textwrap.dedent(FORK) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_child_has_an_index_that_works(tmp_path) -> None:
    run(BUSY, str(tmp_path / "snapshot"))


def test_every_pod_is_stale_in_a_child_whatever_was_known_of_it() -> None:
    run(EMPTY)


def test_a_child_makes_event_managers_of_its_own() -> None:
    run(MANAGER)


def test_a_child_asks_a_picker_that_the_parent_had_locked():
    """Run in an interpreter of its own, like the other tests."""
    program = """
import os, threading
from kvindex import BlockStored, PrefixIndex
from kvindex.routing import EndpointPicker

index = PrefixIndex(block_size=1)
index.process_block_stored(BlockStored(pod="a", block_hashes=[1], token_ids=[1], block_size=1))
picker = EndpointPicker(index)
held, over = threading.Event(), threading.Event()

def hold():
    with picker._lock:
        held.set()
        over.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    index.mark_worker("a", 0, "exact")
    picker.finished(picker.pick([1]))
    os._exit(0 if picker.stats()["picks"] == 1 else 1)
over.set()
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

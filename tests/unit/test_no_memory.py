"""Memory that runs out before a change: the result is MemoryError, and never the end of the process.

tests/fuzz/fail_memory.cpp covers memory that runs out in the middle of a change, allocation by allocation. Here, Python
calls run in a process with a limited address space.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process to its address space"),
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitizer ends a process that has no memory"
    ),
]

BEGIN = """
    import resource
    import msgpack, numpy
    from kvindex import PrefixIndex, decode_batch, prefix_hashes

    index = PrefixIndex(4)
    stored = msgpack.packb([0.0, [["BlockStored", [1], None, [1, 2, 3, 4], 4, None]]])
    for pod in "ab":
        index.ingest(pod, stored, seq=0)
    count = 20_000_000
    # Packed by hand: no large list is left behind whose memory could serve once more.
    large = (b"\\x92" + msgpack.packb(0.0) + b"\\x91\\x96" + msgpack.packb("BlockStored") + b"\\x91\\x02\\xc0\\xdd"
             + count.to_bytes(4, "big") + b"\\x07" * count + b"\\x04\\xc0")
    prompt = numpy.zeros(4 * 4_000_000, numpy.uint32)

    def without_memory(call):
        with open("/proc/self/statm") as figures:
            taken = int(figures.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 20), resource.RLIM_INFINITY))
        try:
            call()
        except MemoryError:
            return
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        raise AssertionError("there was memory")
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BEGIN) + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_payload_that_cannot_be_read_is_lost_and_its_pod_says_so() -> None:
    run(
        """
        without_memory(lambda: index.ingest("a", large, seq=1))
        assert index.pod_state("a") == "degraded" and index.pod_state("b") == "exact"
        assert index.match_prefix([1, 2, 3, 4]).tokens == {"a": 4, "b": 4}
        assert not index.stream_places("a")[0].whole
        index._check()
        index.clear_worker("a")
        assert index.ingest("a", stored).stored == 1
        assert index.pod_state("a") == "exact"
        """
    )


@pytest.mark.parametrize(
    "call",
    [
        "decode_batch(large)",
        "index.match_prefix(prompt, cache_salt='salt')",
        "index.match_many([prompt], cache_salt='salt')",
        "prefix_hashes(prompt, block_size=4, cache_salt='salt')",
    ],
)
def test_a_question_without_memory_is_refused(call: str) -> None:
    run(
        f"""
        without_memory(lambda: {call})
        assert index.match_prefix([1, 2, 3, 4]).tokens == {{"a": 4, "b": 4}}
        """
    )

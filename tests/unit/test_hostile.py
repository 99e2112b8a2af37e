"""The cost of a hostile payload: bytes of the index and compared slots, in proportion to the bytes of the payload."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support import payload, stored

from kvindex import EventDecodeError, PrefixIndex, UnknownPodError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

import hostile

SIZE = 1 << 18
#: Blocks that wait for a parent take the most: 385 bytes for a name of 9 bytes, up to ``max_parked`` of them.
MOST_BYTES = 48
#: Slots that are compared for each entry: 2.2 in a table that is 0.7 full, for any secret of the process. Names chosen
#: against a known mixing function take thousands.
MOST_PROBES = 4.0
#: Memory that is kept after decoding and after placing the blocks of a payload: 1 MiB each.
SCRATCH = 2 << 20
PROMPT = np.arange(64, dtype=np.uint32)


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_payload_costs_what_its_bytes_allow(kind: str) -> None:
    index = PrefixIndex(4)
    index.ingest("good", payload(stored(list(range(1000, 1016)), PROMPT.tolist())))
    empty = index.stats()
    compared = index._compared(index.match_prefix(PROMPT))
    sent = hostile.payload(kind, SIZE)
    assert SIZE * 0.8 < len(sent) < SIZE * 1.2
    try:
        report = index.ingest("hostile", sent)
        # Every event that was invalid or could not be placed was counted.
        assert report.stored + report.removed + report.cleared + report.parked + report.skipped + report.errors
        index.ingest("hostile", sent)  # again, with its names and groups already known
    except EventDecodeError:
        assert kind == "promised lengths"
    index._check()
    full = index.stats()
    assert full["bytes"] - empty["bytes"] < MOST_BYTES * 2 * len(sent) + SCRATCH
    # With few names, the number of probes is random.
    assert full["blocks"] < 4096 or index._probes() < MOST_PROBES
    # A question about other pods compares as many slots as before.
    match = index.match_prefix(PROMPT)
    assert match.tokens == {"good": 64}
    assert index._compared(match) == compared
    try:
        index.remove_pod("hostile")
    except UnknownPodError:
        assert full["blocks"] == empty["blocks"]
    index._check()
    left = index.stats()
    assert left["blocks"] == empty["blocks"]
    assert left["bytes"] < empty["bytes"] + SCRATCH


def test_no_publisher_chooses_where_its_names_lie() -> None:
    for kind in ("chosen low bits", "chosen high bits", "chosen for the golden ratio"):
        index = PrefixIndex(4)
        assert index.ingest("a", hostile.payload(kind, SIZE)).stored > 10_000
        assert index._probes() < MOST_PROBES, kind

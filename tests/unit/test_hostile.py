"""What a payload may cost that was made to cost: bytes of the index and slots that are looked at, by its own bytes."""

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
#: What waits for a parent takes most: 385 bytes for a name of 9 bytes, up to ``max_parked`` of them.
MOST_BYTES = 48
#: Slots that are looked at for each entry: 2.2 of a table that is 0.7 full, whatever the process's secret. Names that a
#: publisher has chosen against a known mixture take thousands.
MOST_PROBES = 4.0
#: What is kept of the memory in which a payload was decoded, and of that in which its blocks were placed: 1 MiB each.
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
        # What was no event, or could not be placed, was counted.
        assert report.stored + report.removed + report.cleared + report.parked + report.skipped + report.errors
        index.ingest("hostile", sent)  # now that its names and groups are known
    except EventDecodeError:
        assert kind == "promised lengths"
    index._check()
    full = index.stats()
    assert full["bytes"] - empty["bytes"] < MOST_BYTES * 2 * len(sent) + SCRATCH
    # Of a few names chance decides.
    assert full["blocks"] < 4096 or index._probes() < MOST_PROBES
    # Whoever asks about others looks at what it looked at before.
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

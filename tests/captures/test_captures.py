"""Recorded streams of real engines: the index must give the number of tokens that the engine itself would reuse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from model import Model
from support import answer_of, report_of

from kvindex import PrefixIndex
from kvindex.capture import Message, read_capture

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
NAMES = (
    "sglang-0.5.23-salt",
    "vllm-0.33-full-attention",
    "vllm-0.33-hybrid-sliding-window",
    "vllm-0.33-lora-salt-bytes-hashes",
)


#: Recorded by ``python -m e2e.engines --record`` from the engines over real sockets.
OWN = {path.name.removesuffix(".msgpack.gz"): path for path in sorted(SAMPLES.glob("*.msgpack.gz"))}


@pytest.fixture(params=[*OWN, *NAMES])
def records(request):
    """Return the header and the records in order."""
    path = OWN.get(request.param)
    if path is None:
        path = request.getfixturevalue("shared") / "captures" / f"{request.param}.msgpack.gz"
    reader = read_capture(path)
    return next(reader), reader


def index_for(header, make=PrefixIndex, **options):
    """Return an index configured for the recorded engine."""
    index = make(header["block_size"], **options)
    for pod in header["pods"]:
        index.configure_pod(pod, engine=header["engine"])
    return index


def context(query):
    return {"lora_name": query.lora_name, "cache_salt": query.cache_salt, "extra_keys": query.extra_keys}


def test_the_repository_has_samples_of_both_engines():
    assert {name.partition("-")[0] for name in OWN} == {"vllm", "sglang"}
    assert {"vllm-0.33.0-masked-blocks", "vllm-0.33.0-duplicate-copies", "vllm-0.33.0-mamba"} <= set(OWN)
    assert sum(path.stat().st_size for path in OWN.values()) < 1_000_000


def test_every_capture_there_is_is_replayed(shared):
    found = {path.name.removesuffix(".msgpack.gz") for path in (shared / "captures").glob("*.gz")}
    assert found == set(NAMES)


def test_every_answer_is_the_engines_own(records):
    header, reader = records
    index = index_for(header)
    answers = 0
    for record in reader:
        if isinstance(record, Message):
            report = index.ingest(record.pod, record.payload)
            assert (report.skipped, report.parked) == (0, 0)
            continue
        match = index.match_prefix(record.tokens, **context(record))
        assert {pod: match.tokens.get(pod, 0) for pod in record.hits} == record.hits
        assert set(match.tokens) <= set(record.hits)
        assert index.match_hashes(match.hashes, n_tokens=len(record.tokens)).tokens == match.tokens
        answers += len(record.hits)
    index._check()
    if "feature" in header:
        assert answers >= 300
    else:
        assert answers == {"sglang": 80 * 3}.get(header["engine"], 50 * 4 if header.get("sliding_window") else 60 * 4)
    assert {index.pod_state(pod) for pod in header["pods"]} == {"exact"}


def test_the_slow_model_gives_the_engines_answers_too_and_the_index_all_of_its(records):
    header, reader = records
    index, model = index_for(header), index_for(header, Model)
    for record in reader:
        if isinstance(record, Message):
            got, want = index.ingest(record.pod, record.payload), model.ingest(record.pod, record.payload)
            assert report_of(got) == report_of(want)
            continue
        found = model.match(record.tokens.tolist(), **context(record))
        assert {pod: found.get(pod, {"tokens": 0})["tokens"] for pod in record.hits} == record.hits
        assert answer_of(index.match_prefix(record.tokens, **context(record))) == found
    assert {model.pod_state(pod) for pod in header["pods"]} == {"exact"}


def test_the_recorded_blocks_all_go_again(records):
    header, reader = records
    index = PrefixIndex(header["block_size"])
    start = index.stats()["bytes"]
    for record in reader:
        if isinstance(record, Message):
            index.ingest(record.pod, record.payload)
    assert index.stats()["blocks"] > 150
    for pod in header["pods"]:
        index.remove_pod(pod)
    index._check()
    assert index.stats()["blocks"] == 0
    assert index.stats()["bytes"] == start


@pytest.mark.parametrize("name", ["vllm-0.33.0-duplicate-copies", "vllm-0.33.0-mamba"])
def test_a_set_forgets_blocks_that_the_engine_still_has(name):
    """These recordings show the need for counted copies."""
    wrong = {}
    for presence in ("count", "set"):
        reader = read_capture(OWN[name])
        header = next(reader)
        index = index_for(header, presence=presence)
        wrong[presence] = Counter()
        for record in reader:
            if isinstance(record, Message):
                index.ingest(record.pod, record.payload)
                continue
            told = index.match_prefix(record.tokens, **context(record)).tokens
            for pod, hit in record.hits.items():
                wrong[presence]["too much"] += told.get(pod, 0) > hit
                wrong[presence]["too little"] += told.get(pod, 0) < hit
    assert wrong["count"] == Counter()
    assert wrong["set"]["too little"] > 0

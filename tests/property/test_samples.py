"""The repository's own captures: every reader of events must agree with the recorded engines."""

from __future__ import annotations

from collections import Counter

import msgpack
import pytest
from judges import JUDGES

from kvindex.capture import Message, read_capture
from kvindex.errors import InvalidValueError
from kvindex.sim import KINDS, write_sample


def records(path):
    header, *rest = read_capture(path)
    return header, rest


def events(path):
    for record in records(path)[1]:
        if isinstance(record, Message):
            yield from msgpack.unpackb(record.payload, strict_map_key=False)[1]


def kind_of(event):
    return event["type"] if isinstance(event, dict) else event[0]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_replay_without_a_difference(kind, judge, tmp_path):
    answers = write_sample(kind, tmp_path / "sample.gz", seed=7)
    header, rest = records(tmp_path / "sample.gz")
    index = judge(header["block_size"])
    asked = hits = 0
    named = set()
    for record in rest:
        if isinstance(record, Message):
            if record.pod not in named:
                index.configure(record.pod, engine=header["engine"])
                named.add(record.pod)
            assert index.ingest(record.pod, record.payload).skipped == 0
            continue
        told = index.ask(record.tokens, lora_name=record.lora_name, cache_salt=record.cache_salt).tokens
        assert told == {pod: hit for pod, hit in record.hits.items() if hit}, record.id
        asked += len(record.hits)
        hits += len(told)
    assert asked == answers
    assert hits > answers / 4, "a sample in which nothing is reused shows nothing"


def test_samples_are_the_same_bytes_every_time(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_sample("full-attention", tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_under_pressure(kind, tmp_path):
    write_sample(kind, tmp_path / "sample.gz")
    seen = Counter(map(kind_of, events(tmp_path / "sample.gz")))
    assert seen["BlockStored"] > 50
    assert seen["BlockRemoved"] > 20


def test_samples_have_what_they_are_for(tmp_path):
    def sample(kind):
        write_sample(kind, tmp_path / kind)
        return list(events(tmp_path / kind))

    def stored(kind):
        return [event for event in sample(kind) if kind_of(event) == "BlockStored"]

    hybrid = sample("hybrid")
    windows = [e for e in hybrid if e.get("kv_cache_spec_sliding_window")]
    assert any(len(e["token_ids"]) > 16 * len(e["block_hashes"]) > 0 for e in windows), "no blocks were left out"
    assert any(kind_of(e) == "AllBlocksCleared" for e in hybrid)
    copies, most = Counter(), 0
    for record in records(tmp_path / "hybrid")[1]:
        if isinstance(record, Message):
            _, batch, rank = msgpack.unpackb(record.payload)
            for event in batch:
                for h in event.get("block_hashes", ()):
                    copies[record.pod, rank, event["group_idx"], h] += 1 if kind_of(event) == "BlockStored" else -1
            most = max(most, *copies.values())
            if any(kind_of(event) == "AllBlocksCleared" for event in batch):
                copies.clear()
    assert most > 1, "no block had two copies"
    assert {msgpack.unpackb(r.payload)[2] for r in records(tmp_path / "hybrid")[1] if isinstance(r, Message)} == {0, 1}

    assert {e[4] for e in stored("hybrid-sizes")} == {16, 32}
    named = stored("lora-salt-bytes")
    assert {len(h) for e in named for h in e["block_hashes"]} == {32}
    assert {e["lora_name"] for e in named} == {None, "adapter-a", "adapter-b"}
    assert any("tenant-a" in (keys or ()) for e in named for keys in e["extra_keys"])
    assert any(e[6] == "CPU" and not e[3] and e[4] == 0 for e in stored("offload"))
    assert {len(e) for e in stored("arrays")} == {6}
    assert {e[5] for e in stored("arrays")} == {None, 1}
    assert any(h < 0 for e in stored("sglang") for h in e["block_hashes"])
    assert any(e.get("cache_salt") == "tenant-a" for e in stored("sglang"))
    assert all(len(e[1]) == 1 for e in stored("sglang-pages"))


def test_an_unknown_sample_is_named(tmp_path):
    with pytest.raises(InvalidValueError, match=r"'nothing'.*full-attention"):
        write_sample("nothing", tmp_path / "sample.gz")
    assert not (tmp_path / "sample.gz").exists()

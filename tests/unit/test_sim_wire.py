"""The bytes of the simulated engines compared with those of the real encoders and of the msgpack package."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from kvindex.errors import InvalidValueError
from kvindex.sim.wire import FORMS, Cleared, Removed, Stored, encode_batch, wire_form

# The form for a release: the newest one whose first release is not later.
AGE = {name: tuple(map(int, re.findall(r"\d+", name))) for name in FORMS}


def form_of(engine: str, version: str):
    age = tuple(map(int, re.findall(r"\d+", version)))
    if engine == "sglang":
        age = age[:3]
    return FORMS[max((n for n in FORMS if n.startswith(engine) and AGE[n] <= age), key=AGE.__getitem__)]


def digest(value):
    if value is None:
        return None
    return bytes.fromhex(value["$bytes"]) if isinstance(value, dict) else (value % 2**64).to_bytes(8, "big")


def keys(value):
    if isinstance(value, dict):
        return bytes.fromhex(value["$bytes"])
    return [keys(item) for item in value] if isinstance(value, list) else value


def event_of(item, form):
    """Return the neutral event for an untyped decoded item."""
    if isinstance(item, list):
        tag, *values = item
        fields = dict(zip(form.stored if tag == "BlockStored" else form.removed, values, strict=False))
    else:
        tag, fields = item["type"], {k: v for k, v in item.items() if k != "type"}
    if tag == "AllBlocksCleared":
        return Cleared()
    fields = {"medium": None, **fields, "block_hashes": [digest(h) for h in fields["block_hashes"]]}
    if tag == "BlockRemoved":
        return Removed(**fields)
    fields["parent_block_hash"] = digest(fields["parent_block_hash"])
    fields["token_ids"] = np.array(fields["token_ids"], dtype=np.uint32)
    if fields.get("extra_keys") is not None:
        fields["extra_keys"] = keys(fields["extra_keys"])
    return Stored(**fields)


def can_be_said(vector) -> bool:
    # The simulated engine has neither EAGLE's token pairs nor the joined hashes of vLLM 0.12-0.23.
    return vector["origin"] == "engine-encoder" and not re.search("bigram|bytes64", vector["name"])


def test_bytes_are_those_of_the_engines_own_encoders(shared):
    vectors = json.loads((shared / "wire" / "vectors.json").read_text())["vectors"]
    compared = {}
    for vector in filter(can_be_said, vectors):
        # The vectors are single structs. The number of pages in each is not the encoder's decision there.
        form = replace(form_of(vector["engine"], vector["version"]), page_events=False)
        raw = vector["raw"]
        if width := re.search("bytes(16|32)", vector["name"]):
            form = replace(form, hashes=width[0])
        events = [event_of(item, form) for item in raw[1]]
        rank = raw[2] if len(raw) > 2 else None
        assert encode_batch(events, form, ts=raw[0], dp_rank=rank).hex() == vector["hex"], vector["name"]
        compared.setdefault(form.name, set()).add(vector["name"])
    assert set(compared) == set(FORMS), "a form without a recorded payload is a guess"


def test_a_form_leaves_out_what_its_release_could_not_say():
    stored = Stored(
        [b"\1" * 32],
        None,
        np.arange(4, dtype=np.uint32),
        4,
        7,
        "CPU",
        "adapter",
        [["adapter", "salt"]],
        1,
        "sliding_window",
        64,
        cache_salt="salt",
    )
    for form in FORMS.values():
        batch = msgpack.unpackb(encode_batch([stored], form, ts=1.5, dp_rank=3))
        assert batch[0] == 1.5
        assert batch[2:] == ([3] if form.has_rank else [])
        (event,) = batch[1]
        said = set(event) - {"type"} if form.layout == "map" else set(form.stored[: len(event) - 1])
        set_fields = {name for name, value in stored._asdict().items() if value is not None}
        assert said == {f for f in form.stored if f in set_fields or form.layout == "array"} | {"parent_block_hash"}
        assert form.says("lora_name") == ("lora_name" in said)


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        ("u64", 2**64 - 2),
        ("i64", -2),
        ("bytes16", b"\0" * 8 + b"\xff" * 7 + b"\xfe"),
        ("bytes32", b"\0" * 24 + b"\xff" * 7 + b"\xfe"),
    ],
)
def test_hashes_of_every_form_name_the_same_block(hashes, expected):
    digest32 = b"\0" * 24 + b"\xff" * 7 + b"\xfe"
    form = wire_form("vllm-0.24.0", hashes=hashes)
    (event,) = msgpack.unpackb(encode_batch([Removed([digest32])], form))[1]
    assert event["block_hashes"] == [expected]


def test_one_event_a_page_chains_them():
    tokens = np.arange(12, dtype=np.uint32)
    chain = [bytes([i]) * 32 for i in range(4)]
    whole = Stored(chain[1:], chain[0], tokens, 4, group_idx=0)
    pages = [Stored([chain[i + 1]], chain[i], tokens[4 * i : 4 * i + 4], 4, group_idx=0) for i in range(3)]
    coalesced, single = wire_form("sglang-0.5.18"), wire_form("sglang-0.5.9")
    assert encode_batch([whole, Cleared()], single) == encode_batch([*pages, Cleared()], coalesced)
    assert len(msgpack.unpackb(encode_batch([whole], coalesced))[1]) == 1


def test_large_and_empty_batches():
    form = wire_form("vllm-0.33.0")
    assert msgpack.unpackb(encode_batch([], form, ts=2.0, dp_rank=None)) == [2.0, [], None]
    many = [Removed([i.to_bytes(32, "big")], group_idx=0) for i in range(70_000)]
    ts, events, rank = msgpack.unpackb(encode_batch(many, form))
    assert (ts, rank) == (0.0, 0)
    assert [event["block_hashes"] for event in events] == [[i] for i in range(70_000)]


def test_an_unknown_form_is_named():
    with pytest.raises(InvalidValueError, match=r"'vllm-9'.*vllm-0\.24\.0"):
        wire_form("vllm-9")


def test_a_lookahead_is_written_as_vllm_writes_it():
    # Made by vLLM 0.33.0's own encoder.
    with_keys = bytes.fromhex(
        "93cb3ff800000000000091de0010a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573920b0cb17061"
        "72656e745f626c6f636b5f68617368c0a9746f6b656e5f696473980001020304050607aa626c6f636b5f73697a6504a76c6f"
        "72615f696403a66d656469756da3475055a96c6f72615f6e616d65a373716caa65787472615f6b6579739292a373716ca178"
        "91a373716ca967726f75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e"
        "bc6b765f63616368655f737065635f736c6964696e675f77696e646f7707a86c6f63616c697479a54c4f43414ca96f776e65"
        "7273686970a16faa73657373696f6e5f6964a173b36c6f6f6b61686561645f746f6b656e5f69647392930506079309010200"
    )
    plain = bytes.fromhex(
        "93cb3ff800000000000091de000ca474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573920b0cb17061"
        "72656e745f626c6f636b5f68617368c0a9746f6b656e5f696473980001020304050607aa626c6f636b5f73697a6504a76c6f"
        "72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797392c0c0a967726f75705f69"
        "647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6eb36c6f6f6b61686561645f746f"
        "6b656e5f69647392930506079309010200"
    )
    hashes = [n.to_bytes(32, "big") for n in (11, 12)]
    event = Stored(
        hashes, None, np.arange(8, dtype=np.uint32), 4, None, "GPU", None, [None, None], 0, "full_attention",
        lookahead_token_ids=[[5, 6, 7], [9, 1, 2]],
    )  # fmt: skip
    keyed = event._replace(
        lora_id=3, lora_name="sql", extra_keys=[("sql", "x"), ("sql",)], kv_cache_spec_sliding_window=7,
        locality="LOCAL", ownership="o", session_id="s",
    )  # fmt: skip
    form = wire_form("vllm-0.33.0")
    assert encode_batch([event], form, ts=1.5) == plain
    # Sixteen keys, for which a map has another header.
    assert encode_batch([keyed], form, ts=1.5) == with_keys

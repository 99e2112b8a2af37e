"""The simulated users' prompts, and the reading of traces."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from kvindex.errors import InvalidValueError
from kvindex.sim import Prompt, chat, endless_hit_rate, mooncake
from kvindex.sim.workload import Arrival

LINES = [
    {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 1024, "output_length": 0, "hash_ids": [0, 7]},
    {"timestamp": 3000, "input_length": 1536, "output_length": 600, "hash_ids": [0, 1, 9]},
]


def trace(path, lines=LINES, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def same(one: list[Arrival], two: list[Arrival]) -> bool:
    return len(one) == len(two) and all(
        a.at == b.at and np.array_equal(a.prompt.tokens, b.prompt.tokens) and np.array_equal(a.output, b.output)
        for a, b in zip(one, two, strict=True)
    )


def common(one, two) -> int:
    length = min(len(one), len(two))
    return int(np.argmin(np.append(one[:length] == two[:length], False)))


def test_equal_ids_are_equal_tokens(tmp_path):
    arrivals = list(mooncake(trace(tmp_path / "trace.jsonl")))
    assert [a.at for a in arrivals] == [0.0, 1.5, 3.0]
    assert [len(a.prompt) for a in arrivals] == [1100, 1024, 1536]
    assert [len(a.output) for a in arrivals] == [3, 0, 600]
    first, second, third = (a.prompt.tokens for a in arrivals)
    assert first.dtype == np.uint32
    assert (common(first, second), common(first, third), common(second, third)) == (512, 1024, 512)
    assert len(np.unique(third)) > 1500
    assert int(third.max()) < 128_000


def test_a_trace_may_be_compressed_and_cut_short(tmp_path):
    plain = trace(tmp_path / "plain")
    packed = trace(tmp_path / "packed", opener=gzip.open)
    assert same(list(mooncake(plain)), list(mooncake(packed)))
    assert same(list(mooncake(plain, limit=2)), list(mooncake(plain))[:2])
    assert list(mooncake(plain, limit=0)) == []
    other = list(mooncake(plain, seed=1))
    assert common(other[0].prompt.tokens, other[1].prompt.tokens) == 512
    assert not same(list(mooncake(plain)), other)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1, 2]",
        '{"timestamp": 0, "output_length": 3, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 0, "output_length": 3, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": "9", "output_length": 3, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 9, "output_length": -1, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [-1]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [0.5]}',
        '{"timestamp": NaN, "input_length": 9, "output_length": 1, "hash_ids": [0]}',
        '{"timestamp": null, "input_length": 9, "output_length": 1, "hash_ids": [0]}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_request_is_named(line, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    reader = mooncake(path)
    assert next(reader).at == 0.0
    with pytest.raises(InvalidValueError, match=r"trace\.jsonl, line 2: "):
        next(reader)


def test_a_damaged_file_is_named_after_what_was_good(tmp_path):
    path = trace(tmp_path / "trace.gz", LINES * 500, gzip.open)
    path.write_bytes(path.read_bytes()[:-20])
    reader = mooncake(path)
    assert len(next(reader).prompt) == 1100
    with pytest.raises(InvalidValueError, match=r"trace\.gz is damaged after line \d+"):
        list(reader)
    with pytest.raises(FileNotFoundError):
        list(mooncake(tmp_path / "nothing"))


def test_the_real_trace_has_the_reuse_that_is_known_of_it(shared):
    arrivals = list(mooncake(shared / "traces" / "mooncake-conversation.jsonl.gz", limit=2000))
    assert len(arrivals) == 2000
    assert sum(len(a.prompt) for a in arrivals) == 27_441_774
    assert endless_hit_rate(arrivals, 512) == pytest.approx(0.294, abs=0.0005)


def test_conversations_repeat_themselves_and_share_a_system_prompt():
    arrivals = chat(conversations=6, turns=3, system_prompts=1, system_tokens=50, regenerate=0, seed=5)
    assert len(arrivals) == 18
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert len({a.prompt.tokens[:50].tobytes() for a in arrivals}) == 1
    continued = [
        any(
            before.at < a.at
            and np.array_equal(
                np.concatenate([before.prompt.tokens, before.output]),
                a.prompt.tokens[: len(before.prompt) + len(before.output)],
            )
            for before in arrivals
        )
        for a in arrivals
    ]
    assert sum(continued) == 12


def test_chat_is_decided_by_its_seed():
    assert same(chat(seed=1), chat(seed=1))
    assert not same(chat(seed=1), chat(seed=2))


def test_adapters_and_salts_are_dealt_out_to_conversations():
    arrivals = chat(conversations=8, turns=1, adapters=(None, "a", "b"), salts=(None, "s"), regenerate=0)
    seen = [(a.prompt.lora_name, a.prompt.lora_id, a.prompt.cache_salt) for a in arrivals]
    assert sorted(seen, key=str) == sorted(
        [
            *[(None, None, None), ("a", 1, None), ("b", 2, None)],
            *[(None, None, "s"), ("a", 1, "s"), ("b", 2, "s")],
            *[(None, None, None), ("a", 1, None)],
        ],
        key=str,
    )


def test_regenerated_answers_come_from_the_same_prompt():
    arrivals = chat(conversations=3, turns=2, regenerate=1.0)
    assert len(arrivals) == 12
    prompts = [a.prompt for a in arrivals]
    assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_an_endless_cache_remembers_prompts_and_answers():
    def arrival(prompt, output):
        return Arrival(0.0, Prompt(prompt), np.array(output, dtype=np.uint32))

    arrivals = [arrival([1] * 6, [2, 2]), arrival([1] * 6 + [2, 2, 3], []), arrival([9] * 5, [])]
    assert endless_hit_rate(arrivals, 4) == 8 / 20
    assert endless_hit_rate([], 4) == 0.0

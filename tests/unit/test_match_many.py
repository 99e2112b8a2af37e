"""Many prompts in one call. Each answer equals the answer for the prompt alone."""

from __future__ import annotations

import numpy as np
import pytest
from support import answer_of, payload, stored

from kvindex import InvalidTypeError, InvalidValueError, PrefixIndex


@pytest.fixture
def index():
    index = PrefixIndex(block_size=4)
    index.ingest("a", payload(stored([1, 2, 3], list(range(12)), size=4)), model="m")
    index.ingest("b", payload(stored([1], list(range(4)), size=4)), model="m")
    index.ingest("b", payload(stored([7, 8], list(range(40, 48)), size=4, lora_name="x")), model="m")
    return index


PROMPTS = [range(12), np.arange(8, dtype=np.uint32), [], list(range(40, 48)), np.arange(5, dtype=np.int64), [0] * 3]


@pytest.mark.parametrize("options", [{}, {"lora_name": "x"}, {"ready_pods": ["b"]}, {"only_exact": True}])
@pytest.mark.parametrize("repeats", [1, 200])
def test_each_answer_is_that_of_its_prompt(index, options, repeats):
    index.mark_worker("a", 0, "stale")
    prompts = PROMPTS * repeats
    matches = index.match_many(iter(prompts), model="m", **options)
    assert len(matches) == len(prompts)
    for prompt, match in zip(prompts, matches, strict=True):
        alone = index.match_prefix(prompt, model="m", **options)
        assert answer_of(match) == answer_of(alone)
        assert (match.blocks, match.best()) == (alone.blocks, alone.best())
        assert match.hashes.tolist() == alone.hashes.tolist()


def test_nothing_asked_nothing_answered(index):
    assert index.match_many([]) == []


@pytest.mark.parametrize(
    ("prompts", "error", "named"),
    [
        ([range(4), [1, -2]], InvalidValueError, r"prompt 1: tokens\[1\] is -2"),
        ([b"1234"], InvalidTypeError, "prompt 0: tokens is bytes"),
        ([range(4), None], InvalidTypeError, "prompt 1: tokens is NoneType"),
    ],
)
def test_a_bad_prompt_is_named(index, prompts, error, named):
    with pytest.raises(error, match=named):
        index.match_many(prompts)

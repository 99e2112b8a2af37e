"""The simulated engine compared with the real ones: eviction, sharing, events and reuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvindex.errors import InvalidValueError
from kvindex.sim import Cleared, Engine, Prompt, Removed, Stored

B = 4


def tokens(*blocks: int) -> np.ndarray:
    """Return a prompt of whole blocks. Equal numbers are equal blocks."""
    return np.repeat(np.array(blocks, dtype=np.uint32), B)


def serve(engine: Engine, prompt, *output: int) -> int:
    """Serve one prompt to the end. Returns the number of reused tokens."""
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    request = engine.start(prompt)
    assert request is not None
    if output:
        assert engine.decode(request, output)
    engine.finish(request)
    return request.hit


def stored(engine: Engine) -> list[Stored]:
    return [event for event in engine.take_events() if isinstance(event, Stored)]


def names(engine: Engine, prompt) -> list[bytes]:
    return (prompt if isinstance(prompt, Prompt) else Prompt(prompt)).chain(engine.hash_seed, engine.block_size)


# Reuse


def test_only_whole_blocks_before_the_last_token_are_reused():
    engine = Engine(20, B)
    prompt = tokens(1, 2, 3)
    assert engine.hit(prompt) == 0
    assert serve(engine, prompt) == 0
    for length, hit in [(12, 8), (11, 8), (9, 8), (8, 4), (5, 4), (4, 0), (1, 0)]:
        assert engine.hit(prompt[:length]) == hit
    assert engine.hit(tokens(1, 2, 3, 4)) == 12
    assert engine.hit(tokens(1, 9, 3, 4)) == 4
    assert engine.hit(tokens(2, 3)) == 0


def test_sglang_reuses_a_whole_prompt():
    engine = Engine(20, B, flavor="sglang")
    prompt = tokens(1, 2, 3)
    serve(engine, prompt)
    assert [engine.hit(prompt[:length]) for length in (12, 11, 4, 3)] == [12, 8, 4, 0]


def test_names_salts_and_extra_keys_separate_equal_tokens():
    engine = Engine(60, B)
    contexts = [
        {},
        {"lora_name": "a"},
        {"lora_name": "b"},
        {"cache_salt": "s"},
        {"extra_keys": [["m"]]},
        {"extra_keys": [[("m", 1)]]},
        {"extra_keys": [[b"m"]], "cache_salt": "s"},
        {"extra_keys": [None, ["m"]]},
    ]
    for context in contexts:
        # The last context differs from the first only in its second block.
        assert engine.hit(tokens(1, 2, 3), **context) == 4 * (context is contexts[-1])
        serve(engine, Prompt(tokens(1, 2, 3), **context))
    for context in contexts:
        assert engine.hit(tokens(1, 2, 3), **context) == 8


def test_keys_of_a_block_are_in_vllms_order():
    prompt = Prompt(
        tokens(1, 2, 3), lora_name="a", cache_salt="s", extra_keys=[[("m", 0), b"\1", b"\2"], None, [b"\3"]]
    )
    assert prompt.keys(0) == ["a", ("m", 0), "s", b"\1", b"\2"]
    assert [prompt.keys(i) for i in (1, 2, 3)] == [["a"], ["a", b"\3"], ["a"]]
    assert Prompt(tokens(1)).keys(0) is None


def test_seeds_decide_whether_engines_agree_on_hashes():
    first, same, other = Engine(4, B), Engine(4, B), Engine(4, B, hash_seed=b"x")
    for engine in (first, same, other):
        serve(engine, tokens(1, 2))
    hashes = [stored(engine)[0].block_hashes for engine in (first, same, other)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_asking_changes_nothing():
    engine = Engine(4, B)
    serve(engine, tokens(1, 2))
    serve(engine, tokens(3, 4))
    engine.take_events()
    for _ in range(3):
        engine.hit(tokens(1, 2, 9))
    # If a question counted as use, block 1 would now outlive block 3.
    serve(engine, tokens(5, 6))
    assert (engine.hit(tokens(1, 9)), engine.hit(tokens(3, 9))) == (0, 4)


# Eviction


def test_a_prompts_tail_is_evicted_before_its_head():
    engine = Engine(6, B)
    serve(engine, tokens(1, 2, 3, 4))
    old = names(engine, tokens(1, 2, 3, 4))
    engine.take_events()
    serve(engine, tokens(5, 6, 7, 8))
    events = engine.take_events()
    assert events[:2] == [Removed([old[3]], "GPU", 0), Removed([old[2]], "GPU", 0)]
    assert isinstance(events[2], Stored)
    assert engine.hit(tokens(1, 2, 3, 4, 5)) == 8


def test_what_was_used_longest_ago_goes_first():
    engine = Engine(6, B)
    for block in (1, 2, 3):
        serve(engine, tokens(block, 9))
    assert serve(engine, tokens(1, 8)) == 4
    serve(engine, tokens(4, 9))
    assert [engine.hit(tokens(block, 9)) for block in (1, 2, 3, 4)] == [4, 0, 4, 4]


def test_a_hit_takes_its_blocks_out_of_the_queue():
    engine = Engine(3, B)
    serve(engine, tokens(1, 2, 3))
    request = engine.start(Prompt(tokens(1, 2, 4)))
    assert request.hit == 8
    assert engine.free_blocks == 0
    assert engine.start(Prompt(tokens(5))) is None
    engine.finish(request)
    assert engine.free_blocks == 3


def test_blocks_that_nobody_can_find_are_used_again_first():
    engine = Engine(4, B)
    serve(engine, tokens(1, 2))
    serve(engine, tokens(3)[:3])
    engine.take_events()
    # Three blocks for two, one of which was never complete: only one findable block is evicted.
    serve(engine, tokens(4, 5)[:7])
    serve(engine, tokens(6)[:3])
    assert not [event for event in engine.take_events() if isinstance(event, Removed)]
    assert engine.hit(tokens(1, 2, 9)) == 8


def test_without_room_nothing_changes():
    engine = Engine(4, B)
    serve(engine, tokens(1, 2))
    running = engine.start(Prompt(tokens(3, 4)))
    engine.take_events()
    before = engine.free_blocks, engine.cached_blocks
    assert engine.start(Prompt(tokens(1, 5, 6, 7))) is None
    assert (engine.free_blocks, engine.cached_blocks) == before
    assert engine.take_events() == []
    engine.finish(running)
    assert engine.start(Prompt(tokens(1, 5, 6, 7))).hit == 4


def test_an_answer_that_finds_no_room_keeps_what_it_has():
    engine = Engine(2, B)
    request = engine.start(Prompt(tokens(1)))
    assert not engine.decode(request, list(range(9)))
    assert request.computed == 8
    engine.finish(request)
    assert engine.free_blocks == 2


# Copies


def test_computing_a_block_again_makes_a_second_copy():
    engine = Engine(4, B)
    for _ in range(2):
        serve(engine, tokens(1, 2))
    first, second = names(engine, tokens(1, 2))
    assert [event.block_hashes for event in stored(engine)] == [[first, second], [second]]
    assert engine.cached_blocks == 3
    serve(engine, tokens(3))
    serve(engine, tokens(4))
    removed = [event for event in engine.take_events() if isinstance(event, Removed)]
    # A single removal for the evicted copy. The other copy still counts.
    assert removed == [Removed([second], "GPU", 0)]
    assert engine.hit(tokens(1, 2, 9)) == 8
    serve(engine, tokens(5))
    assert engine.hit(tokens(1, 2, 9)) == 4


def test_prompts_in_step_make_copies_of_what_the_other_has_not_finished():
    engine = Engine(20, B)
    one, two = (engine.start(Prompt(tokens(1, 2, 3)), B) for _ in range(2))
    assert two.hit == 4
    assert engine.prefill(one)
    assert engine.prefill(two)
    assert engine.cached_blocks == 5
    engine.finish(one)
    engine.finish(two)
    assert engine.free_blocks == 20


def test_sglang_keeps_one_copy():
    engine = Engine(20, B, flavor="sglang")
    requests = [engine.start(Prompt(tokens(1, 2, 3)[:11])) for _ in range(2)]
    for request in requests:
        assert engine.decode(request, tokens(7, 8))
    for request in requests:
        engine.finish(request)
    chain = names(engine, np.concatenate([tokens(1, 2, 3)[:11], tokens(7, 8)]))
    assert [list(event.block_hashes) for event in stored(engine)] == [chain[:2], chain[2:]]
    assert engine.cached_blocks == len(chain)
    assert engine.free_blocks == 20


# Events


def test_events_name_the_parent_and_carry_what_they_store():
    engine = Engine(20, B)
    prompt = Prompt(tokens(1, 2, 3)[:11], lora_name="a", lora_id=7, cache_salt="s", extra_keys=[None, [("m", 1)]])
    serve(engine, prompt, 5, 6, 7, 8, 9, 10)
    first, second, third = stored(engine)
    chain = prompt.chain(b"", B)
    assert first == Stored(
        chain,
        None,
        first.token_ids,
        B,
        7,
        "GPU",
        "a",
        [["a", "s"], ["a", ("m", 1)]],
        0,
        "full_attention",
        cache_salt="s",
    )
    assert first.token_ids.tolist() == [1] * 4 + [2] * 4
    # Decoding fills one block at a time, and the last token is not computed.
    assert [event.parent_block_hash for event in (second, third)] == [chain[1], second.block_hashes[0]]
    assert second.token_ids.tolist() == [3, 3, 3, 5]
    assert third.token_ids.tolist() == [6, 7, 8, 9]


def test_a_reset_forgets_and_says_so_but_not_while_serving():
    engine = Engine(8, B, flavor="sglang")
    assert engine.take_events() == [Cleared()]
    request = engine.start(Prompt(tokens(1, 2)))
    assert not engine.reset()
    engine.finish(request)
    engine.take_events()
    assert engine.reset()
    assert engine.take_events() == [Cleared()]
    assert (engine.hit(tokens(1, 2)), engine.cached_blocks, engine.free_blocks) == (0, 0, 8)
    serve(engine, tokens(1, 2))
    assert engine.hit(tokens(1, 2)) == 8
    assert Engine(8, B).take_events() == []


def test_sglang_removes_a_run_of_pages_at_once():
    engine = Engine(4, B, flavor="sglang")
    serve(engine, tokens(1, 2, 3, 4))
    serve(engine, tokens(5, 6, 7))
    removed = [event for event in engine.take_events() if isinstance(event, Removed)]
    assert [list(event.block_hashes) for event in removed] == [names(engine, tokens(1, 2, 3, 4))[1:]]


# A sliding window


def test_a_window_needs_its_own_blocks_before_a_hit():
    engine = Engine(100, B, window=9)
    serve(engine, tokens(1, 2, 3, 4, 5))
    groups = {event.group_idx: event for event in stored(engine)}
    assert [(g.kv_cache_spec_kind, g.kv_cache_spec_sliding_window) for g in groups.values()] == [
        ("full_attention", None),
        ("sliding_window", 9),
    ]
    assert groups[0].block_hashes == groups[1].block_hashes
    # Without the window's copy of block 2, no position whose window includes it can be reused.
    gone = groups[1].block_hashes[2]
    engine._evict(engine._cached[1][gone])
    assert [engine.hit(tokens(1, 2, 3, 4, 5)[: 4 * n + 1]) for n in range(1, 5)] == [4, 8, 8, 8]
    assert engine.hit(np.append(tokens(1, 2, 3, 4, 5), 9)) == 20
    # Full attention needs every block.
    engine._evict(engine._cached[0][groups[0].block_hashes[1]])
    assert engine.hit(np.append(tokens(1, 2, 3, 4, 5), 9)) == 4


def test_blocks_behind_the_window_are_given_back_while_serving():
    engine = Engine(40, B, window=5)
    request = engine.start(Prompt(tokens(*range(8))), 16)
    assert engine.free_blocks == 40 - 2 * 4
    assert engine.prefill(request)
    # At 16 tokens the window reaches back to the 13th. Three of its four blocks are free again but still findable.
    assert engine.free_blocks == 40 - 8 - 5
    assert engine.cached_blocks == 16
    engine.finish(request)
    assert engine.free_blocks == 40


def test_an_interval_leaves_blocks_out_of_the_events():
    engine = Engine(100, B, window=5, window_interval=16)
    prompt = tokens(*range(10))
    serve(engine, prompt[:38])
    full, window = stored(engine)
    chain = names(engine, prompt[:38])
    assert list(full.block_hashes) == chain
    # The last block before every 16 tokens, and the last one before the prompt's end.
    assert list(window.block_hashes) == [chain[3], chain[7], chain[8]]
    assert len(window.token_ids) == 36
    assert len(window.extra_keys) == 3
    assert [engine.hit(prompt[:n]) for n in (40, 36, 20, 17, 16)] == [36, 32, 16, 16, 0]


def test_a_window_of_larger_blocks_hits_at_their_boundaries():
    engine = Engine(100, B, window=9, window_block_size=8)
    assert engine.block_sizes == (4, 8)
    prompt = tokens(*range(7))
    serve(engine, prompt)
    full, window = stored(engine)
    chain = names(engine, prompt)
    assert list(full.block_hashes) == chain[:6]
    assert (window.block_size, list(window.block_hashes)) == (8, chain[1:6:2])
    assert [engine.hit(prompt[:n]) for n in (28, 24, 17, 16, 9, 8)] == [24, 16, 16, 8, 8, 0]


# A second tier


def test_what_the_gpu_lost_comes_back_from_the_second_tier():
    engine = Engine(4, B, offload_blocks=10)
    serve(engine, tokens(1, 2, 3))
    chain = names(engine, tokens(1, 2, 3))
    gpu, cpu = stored(engine)
    assert (list(cpu.block_hashes), cpu.medium, cpu.block_size, len(cpu.token_ids)) == (chain, "CPU", 0, 0)
    assert cpu.parent_block_hash is None
    assert list(gpu.block_hashes) == chain
    serve(engine, tokens(5, 6, 7, 8))
    engine.take_events()
    prompt = Prompt(tokens(1, 2, 3, 4))
    assert [engine.held_prompt(prompt, medium) for medium in (None, "GPU", "CPU")] == [12, 0, 12]
    assert engine.tiers_prompt(prompt) == (0, 12)
    assert serve(engine, prompt) == 12
    assert list(stored(engine)[0].block_hashes) == chain
    assert engine.held_prompt(Prompt(tokens(1, 2, 3, 4)[:13]), "GPU") == 12


def test_the_second_tier_drops_what_was_used_longest_ago():
    engine = Engine(20, B, offload_blocks=3, offload_medium="DISK", offload_tokens=True)
    serve(engine, tokens(1, 2))
    serve(engine, tokens(3, 4))
    events = [event for event in engine.take_events() if event.medium == "DISK"]
    one, two = names(engine, tokens(1, 2)), names(engine, tokens(3, 4))
    assert events[1] == Removed([one[1]], "DISK", 0)
    assert [list(event.block_hashes) for event in (events[0], events[2])] == [one, two]
    assert events[2].token_ids.tolist() == tokens(3, 4).tolist()
    assert engine.held_prompt(Prompt(tokens(1, 2, 9)), "DISK") == 4


def test_a_tier_goes_on_where_the_gpu_ends_and_fills_no_hole_for_it():
    engine = Engine(40, B, offload_blocks=40)
    serve(engine, tokens(1, 2, 3, 4))
    prompt = Prompt(tokens(1, 2, 3, 4, 5))
    first, second, third, fourth = names(engine, tokens(1, 2, 3, 4))
    # The GPU loses a block in the middle and the tier the block after it. The GPU's later blocks do not count.
    engine._evict(engine._cached[0][second][:])
    del engine._offloaded[0, third]
    assert (engine.tiers_prompt(prompt), engine.held_prompt(prompt)) == ((4, 8), 16)
    # The GPU loses the first block as well: only the tier's blocks are left, as far as they reach.
    engine._evict(engine._cached[0][first][:])
    assert engine.tiers_prompt(prompt) == (0, 8)
    engine.take_events()
    assert serve(engine, prompt) == 8
    loaded = stored(engine)[0]
    assert list(loaded.block_hashes) == [first, second]
    # The last token is computed in any case, but a tier also delivers its block.
    assert engine.tiers_prompt(prompt) == (16, 20)
    assert fourth in engine._cached[0]


def test_a_tier_may_say_tokens_and_leave_out_whose_they_are():
    engine = Engine(8, B, offload_blocks=8, offload_tokens=True, offload_keyless=True)
    serve(engine, Prompt(tokens(1, 2), lora_name="sql", lora_id=3, cache_salt="tenant"))
    gpu, cpu = stored(engine)
    assert (gpu.lora_name, gpu.lora_id, gpu.cache_salt) == ("sql", 3, "tenant")
    assert gpu.extra_keys == [["sql", "tenant"], ["sql"]]
    assert (cpu.lora_name, cpu.lora_id, cpu.cache_salt, cpu.extra_keys) == (None, None, None, None)
    assert (cpu.block_hashes, cpu.token_ids.tolist()) == (gpu.block_hashes, gpu.token_ids.tolist())


def test_a_reset_can_spare_the_second_tier():
    engine = Engine(8, B, offload_blocks=8)
    serve(engine, tokens(1, 2))
    assert engine.reset(offloaded=False)
    assert engine.hit(tokens(1, 2, 9)) == 8
    assert engine.reset()
    assert engine.hit(tokens(1, 2, 9)) == 0


# Speculative decoding, and unannounced evictions of SGLang's second pool


@pytest.mark.parametrize("lookahead", [1, 3])
def test_with_a_lookahead_a_block_is_told_apart_by_the_tokens_behind_it(lookahead):
    engine = Engine(20, B, lookahead=lookahead)
    serve(engine, tokens(1, 2, 3))
    (event,) = stored(engine)
    # The last block has no tokens after it yet.
    assert event.token_ids.tolist() == tokens(1, 2).tolist()
    assert event.lookahead_token_ids == [tokens(2)[:lookahead].tolist(), tokens(3)[:lookahead].tolist()]
    assert engine.hit(tokens(1, 2, 3, 4)) == 8
    assert engine.hit(tokens(1, 2, 9)) == 4
    assert [engine.hit(tokens(1, 2, 3)[:n]) for n in (8, 8 + lookahead - 1, 8 + lookahead)] == [4, 4, 8]


def test_a_lookahead_block_is_findable_once_the_answer_goes_on():
    engine = Engine(20, B, lookahead=1)
    request = engine.start(Prompt(tokens(1, 2)))
    assert [len(event.block_hashes) for event in stored(engine)] == [1]
    assert engine.decode(request, [7, 7])
    assert [event.lookahead_token_ids for event in stored(engine)] == [[[7]]]
    engine.finish(request)
    assert engine.hit(np.append(tokens(1, 2), [7])) == 8


def test_sglang_writes_a_lookahead_as_pairs():
    engine = Engine(20, B, flavor="sglang", lookahead=1)
    serve(engine, tokens(1, 2, 3))
    (event,) = stored(engine)
    assert event.lookahead_token_ids is None
    assert event.token_ids.tolist() == [list(pair) for pair in itertools.pairwise(tokens(1, 2, 3)[:9].tolist())]
    assert [engine.hit(tokens(1, 2, 3)[:n]) for n in (12, 9, 8)] == [8, 8, 4]


def test_the_older_eagle_drops_the_last_block_that_matches():
    engine = Engine(20, B, eagle=True)
    serve(engine, tokens(1, 2, 3))
    prompt = tokens(1, 2, 3, 4)
    assert [engine.hit(prompt[:n]) for n in (16, 13, 12, 5, 4)] == [8, 8, 4, 0, 0]
    assert engine.held_prompt(Prompt(prompt)) == 12


def test_sglangs_window_evicts_without_a_word():
    engine = Engine(40, B, flavor="sglang", window=5, window_blocks=3)
    serve(engine, tokens(1, 2, 3))
    assert engine.hit(tokens(1, 2, 3, 4)) == 12
    engine.take_events()
    serve(engine, tokens(7, 8))
    assert [type(event) for event in engine.take_events()] == [Stored]
    # The window has only the last block of the first prompt. One block is enough for a window of five tokens.
    assert (engine.hit(tokens(1, 2, 3, 4)), engine.hit(tokens(1, 2, 4))) == (12, 0)
    assert engine.held_prompt(Prompt(tokens(1, 2, 4))) == 8
    serve(engine, tokens(9))
    assert (engine.hit(tokens(1, 2, 3, 4)), engine.hit(tokens(7, 8, 4))) == (0, 8)
    engine.reset()
    assert engine.held_prompt(Prompt(tokens(7, 8))) == 0


# Misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 4, "block_size": 0}, "block_size"),
        ({"num_blocks": 4, "window": 1}, "window"),
        ({"num_blocks": 4, "window": 9, "flavor": "sglang"}, "window_blocks"),
        ({"num_blocks": 4, "window": 9, "window_blocks": 4}, "window_blocks"),
        ({"num_blocks": 4, "window": 9, "window_blocks": 4, "flavor": "sglang", "offload_blocks": 2}, "second tier"),
        ({"num_blocks": 4, "lookahead": -1}, "lookahead"),
        ({"num_blocks": 4, "lookahead": 2, "flavor": "sglang"}, "lookahead"),
        ({"num_blocks": 4, "eagle": True, "lookahead": 1}, "eagle"),
        ({"num_blocks": 4, "eagle": True, "offload_blocks": 1}, "eagle"),
        ({"num_blocks": 4, "window": 9, "window_block_size": 24}, "multiple of 16"),
        ({"num_blocks": 4, "window": 9, "window_interval": 24}, "multiple of 16"),
    ],
)
def test_engines_that_cannot_be(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        Engine(**arguments)


def test_prompts_that_cannot_be_served():
    with pytest.raises(InvalidValueError, match="at least one token"):
        Engine(4, B).start(Prompt([]))
    keyed = Prompt(tokens(1), extra_keys=[["a"]])
    for engine in (Engine(4, B, flavor="sglang"), Engine(4, B, window=9, window_block_size=8)):
        with pytest.raises(InvalidValueError, match="extra keys"):
            engine.start(keyed)
    assert Engine(4, B).hit([]) == 0

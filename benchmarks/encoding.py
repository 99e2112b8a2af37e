"""The cost of the token ids of a growing conversation, and its effect on other threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvindex import BlockStored, PrefixIndex
from kvindex.routing import EndpointPicker
from kvindex.text import PromptEncoder

from .interleave import interleaved
from .reach import Reached
from .report import amount, say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGES = ("tokenizers",)
ROOT = Path(__file__).resolve().parents[1]
TURNS, TOKENS = 41, 32_768
#: The pattern of Llama 3.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OPENING = "<|im_start|>assistant\n"


def trained(texts: list[str]) -> Tokenizer:
    """A byte-level BPE like those of today's models, trained on the texts of this repository."""
    # Imported here: asv imports every module in an environment with only the packages of its suite.
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def conversation(tokenizer: Tokenizer, texts: list[str], seed: int) -> list[str]:
    """The prompt of each turn, without the opening of the answer."""
    rng = random.Random(seed)
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    text, prompts = "", []
    for turn in range(TURNS):
        said: list[str] = []
        count = 0
        while count < TOKENS // TURNS - 12:
            said.append(rng.choice(lines))
            count += len(tokenizer.encode(said[-1], add_special_tokens=False).ids)
        text += f"<|im_start|>{('user', 'assistant')[turn % 2]}\n{''.join(said)}<|im_end|>\n"
        prompts.append(text)
    return prompts


def longest_pause(work: threading.Thread) -> float:
    """The longest time in seconds for which this thread was kept from running while ``work`` ran."""
    longest = 0.0
    # The clock starts first: work that never gives up the interpreter lock is over when start() returns.
    before = time.perf_counter()
    work.start()
    while True:
        now = time.perf_counter()
        longest = max(longest, now - before - 0.0002)
        if not work.is_alive():
            return longest
        before = now
        time.sleep(0.0002)


def measure(*, rounds: int = 7) -> Iterator[Reached | str]:
    """``rounds``: number of interleaved rounds."""
    texts = [path.read_text() for kind in ("*.md", "*.py", "*.hpp") for path in sorted(ROOT.glob(f"[bds]*/**/{kind}"))]
    say("training a tokenizer")
    tokenizer = trained(texts)
    prompts = [conversation(tokenizer, texts, seed) for seed in range(2)]
    encoder = PromptEncoder(tokenizer)

    def whole(turns: list[str]) -> None:
        for text in turns:
            tokenizer.encode(text + OPENING, add_special_tokens=False)

    def incremental(turns: list[str]) -> None:
        for text in turns:
            encoder.encode(text + OPENING)

    def inputs(_: str, number: int) -> list[list[str]]:
        # The encoder starts without this conversation. The tokenizer's own cache of words is warm for both.
        encoder._cache = type(encoder._cache)(1 << 30)
        return [prompts[number % 2]]

    say(f"{TURNS} turns, {rounds} rounds")
    timings = interleaved({"whole": whole, "incremental": incremental}, inputs, rounds)
    assert encoder.stats()["fallbacks"] == 0
    ratio = timings.ratio("whole", "incremental")
    ms = f"{timings.best('whole') / 1000:.0f} → {timings.best('incremental') / 1000:.0f} ms"
    what = "conversation, turn by turn, against whole"
    yield Reached(what, f"{TURNS} turns, {ms}", "conversation", ratio.median, ratio)

    last, before = prompts[0][-1] + OPENING, prompts[0][-2]
    ids = encoder.encode(last)
    index = PrefixIndex(block_size=16)
    held = ids[: len(ids) * 40 // 41 // 16 * 16]
    for pod in range(64):
        index.process_block_stored(
            BlockStored(
                pod=f"pod-{pod}", model="", block_hashes=list(range(len(held) // 16)), token_ids=held, block_size=16
            )
        )
    picker = EndpointPicker(index)
    seconds = []
    for number in range(4 * rounds):
        inputs("", number)
        encoder.encode(before + OPENING)
        began = time.perf_counter()
        choice = picker.pick(encoder.encode(last))
        seconds.append(time.perf_counter() - began)
        assert choice is not None
        assert choice.cached_tokens >= len(held)
        picker.finished(choice)
    yield Reached("last turn, text to pod, ms", f"{len(ids):,} tokens", "last turn ms", min(seconds) * 1000)

    pauses = {}
    for name, call in (
        ("encode", lambda: tokenizer.encode(last, add_special_tokens=False)),
        ("PromptEncoder", lambda: encoder.encode(last)),
    ):
        seconds = []
        for number in range(4 * rounds):
            inputs("", number)
            seconds.append(longest_pause(threading.Thread(target=call)))
        pauses[name] = min(seconds) * 1000
    where = f"{len(ids):,} tokens, {amount(pauses['encode'])} ms by encode"
    yield Reached("longest pause of another thread, ms", where, "encode pause ms", pauses["PromptEncoder"])
    yield "pauses and last turn: best of all rounds, since what else the machine does only adds to them"

"""Token ids of growing texts, for every kind of tokenizer, compared with tokenizing the whole text."""

from __future__ import annotations

import os
import random
import threading
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from kvindex.text import PromptEncoder

# The texts are drawn here, but the profile of Hypothesis decides their number.
TEXTS = 4000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 150

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today? I'm fine, thanks; and you?",
    "def main():\n    for i in range(10):\n        print(i, 'x' * i)\n\nif __name__ == '__main__':\n    main()\n",
    "Größe, naïve café, Ωμέγα, привет мир, 你好世界, こんにちは, 1234567890 3.14159, <html><body>text</body></html>",
    "user assistant system hello hello hello end end start start <|im| |> </s> <s> [INST] [/INST]",
] * 5
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def trained(kind):
    if kind == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
    elif kind == "bytes":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)), trainers.BpeTrainer
    elif kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
    else:
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
    options = {"vocab_size": 500, "show_progress": False}
    if kind == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        options["special_tokens"] = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        options["vocab_size"] = 700
    elif kind == "unigram":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        options["special_tokens"], options["unk_token"] = ["<unk>"], "<unk>"
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        options["special_tokens"] = ["[UNK]"]
    tokenizer.train_from_iterator(CORPUS, trainer(**options))
    return tokenizer.to_str()


def make(kind, *, normalizer=None, pre=None, end=None, more=()):
    tokenizer = Tokenizer.from_str(trained(kind))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.add_special_tokens([AddedToken("<|start|>", normalized=False), AddedToken("<|end|>", **(end or {}))])
    tokenizer.add_tokens(list(more))
    return tokenizer


def meta(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def raw(tokenizer):
    tokenizer.encode_special_tokens = True
    return tokenizer


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
OVERLAPPING = [AddedToken("x<|", normalized=False), AddedToken("<|start|><|end|>", normalized=False)]
# A tokenizer, and the tokens at which its texts may be cut.
BOTH = {"<|start|>", "<|end|>"}
KINDS = {
    "byte-level": (lambda: make("bpe", pre=BYTES), BOTH),
    "byte-level, prefix space": (lambda: make("bpe", pre=pre_tokenizers.ByteLevel(add_prefix_space=True)), BOTH),
    "llama 3": (
        lambda: make(
            "bpe",
            pre=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
        BOTH,
    ),
    "metaspace first": (lambda: make("bytes", pre=meta("first")), BOTH | {"<unk>"}),
    "metaspace always": (lambda: make("bytes", pre=meta("always")), BOTH | {"<unk>"}),
    "metaspace never": (lambda: make("bytes", pre=meta("never")), BOTH | {"<unk>"}),
    "unigram first": (lambda: make("unigram", pre=meta("first")), BOTH | {"<unk>"}),
    "wordpiece, lower case": (
        lambda: make("wordpiece", normalizer=normalizers.BertNormalizer(), pre=pre_tokenizers.BertPreTokenizer()),
        BOTH | {"[UNK]"},
    ),
    "nfkc, stripped": (
        lambda: make("bpe", normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]), pre=BYTES),
        BOTH,
    ),
    "llama 2 legacy": (lambda: make("bytes", normalizer=LEGACY), BOTH | {"<unk>"}),
    "rstrip": (lambda: make("bytes", pre=meta("first"), end={"rstrip": True}), BOTH | {"<unk>"}),
    "lstrip, rstrip": (lambda: make("bpe", pre=BYTES, end={"lstrip": True, "rstrip": True}), BOTH),
    "single word": (lambda: make("bpe", pre=BYTES, end={"single_word": True}), {"<|start|>"}),
    "normalized": (
        lambda: make("bytes", normalizer=LEGACY, end={"normalized": True}),
        {"<|start|>", "<unk>"},
    ),
    "overlapping": (lambda: make("bpe", pre=BYTES, more=OVERLAPPING), {"x<|"}),
    "words": (
        lambda: make(
            "bpe", pre=BYTES, more=[AddedToken("hello", single_word=True), AddedToken(" \n", normalized=False)]
        ),
        BOTH,
    ),
    "special tokens as text": (lambda: raw(make("bpe", pre=BYTES)), set()),
}
PIECES = [
    *("<|start|>", "<|end|>", "<|end|>", "<|start|>user\n", "<|end|>\n<|start|>assistant\n", "<|start|><|end|>"),
    *("<|", "|>", "end", "x<|", "<|end", "<0x41>", "<|end|", "|end|>", "hello", "Hello world", "x", "user", "12345"),
    *(" ", "  ", "\n", "\n\n", "\t", " \n ", "\u2009", "\u0301", "e\u0301", "ﬁ", "Ω", "你好", "🙂", "▁", "I'm", "\r\n"),
    *("<unk>", "[UNK]", "print(i)", "naïve", "'s"),
]  # fmt: skip


def whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind):
    build, marks = KINDS[kind]
    tokenizer, rng = build(), random.Random(kind)
    encoder = PromptEncoder(tokenizer, max_bytes=rng.choice([0, 20_000, 1 << 20]))
    lasting = PromptEncoder(tokenizer)
    done = 0
    while done < TEXTS:
        text = ""
        # A conversation: each text begins with the previous one.
        for _ in range(rng.randint(1, 6)):
            text += "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
            expected = whole(tokenizer, text)
            for each in (encoder, lasting):
                ids = each.encode(text)
                assert ids.tolist() == expected, text
                assert ids.dtype == "uint32"
            done += 1
    assert {mark for mark in lasting._marks if not mark.startswith("<0x")} == marks
    stats = lasting.stats()
    assert (stats["calls"], stats["fallbacks"]) == (done, 0)
    if marks >= BOTH:
        assert stats["tokens_reused"] > stats["tokens"] / 4
    assert encoder.stats()["bytes"] <= encoder._cache.max_bytes


def test_the_kinds_find_what_cutting_behind_a_token_gets_wrong():
    """The texts above include cases in which the obvious method is not exact, so the tests can fail."""
    wrong = {}
    for kind, (build, _) in KINDS.items():
        tokenizer, rng = build(), random.Random(kind)
        for _ in range(300):
            text = "".join(rng.choices(PIECES, k=rng.randint(2, 12)))
            at = text.rfind("<|end|>") + len("<|end|>")
            if at < len("<|end|>"):
                continue
            cut = whole(tokenizer, text[:at]) + whole(tokenizer, text[at:])
            wrong[kind] = wrong.get(kind, 0) + (cut != whole(tokenizer, text))
    for kind in ("metaspace first", "unigram first", "rstrip", "lstrip, rstrip", "normalized"):
        assert wrong[kind] > 0, kind


def test_the_smallest_case():
    tokenizer = KINDS["rstrip"][0]()
    encoder = PromptEncoder(tokenizer)
    for text in ("<|end|>", "<|end|>\nhello"):
        assert encoder.encode(text).tolist() == whole(tokenizer, text)


def conversation(turns, rng):
    words = " ".join(CORPUS).split()
    text = "<|start|>system\n" + " ".join(rng.choices(words, k=300)) + "<|end|>\n"
    for turn in range(turns):
        role = ("user", "assistant")[turn % 2]
        text += f"<|start|>{role}\n{' '.join(rng.choices(words, k=40))}<|end|>\n"
        yield text + "<|start|>assistant\n"


def test_of_a_growing_conversation_only_what_is_new_is_encoded():
    tokenizer = KINDS["byte-level"][0]()
    encoder = PromptEncoder(tokenizer)
    encoded = []
    parts = encoder._encode_parts
    encoder._encode_parts = lambda texts: [
        encoded.append(text) or ids for text, ids in zip(texts, parts(texts), strict=True)
    ]
    longest = 0
    for text in conversation(20, random.Random(1)):
        before = sum(map(len, encoded))
        assert encoder.encode(text).tolist() == whole(tokenizer, text)
        longest = len(text)
        last = text[: -len("<|start|>assistant\n")].rindex("<|start|>")
        if before:
            # The new turn, the start of the answer, and a token before each part.
            assert sum(map(len, encoded)) - before <= len(text) - last + 4 * len("<|start|>")
    assert sum(map(len, encoded)) < 1.2 * longest


def test_conversations_share_what_is_equal_in_them():
    encoder = PromptEncoder(KINDS["byte-level"][0]())
    encoder.encode("<|start|>system\nYou are kind.<|end|>\n<|start|>user\nhello<|end|>\n")
    before = encoder.stats()["tokens_reused"]
    encoder.encode("<|start|>system\nYou are kind.<|end|>\n<|start|>user\nfox<|end|>\n")
    assert encoder.stats()["tokens_reused"] > before


def test_any_thread():
    tokenizer = KINDS["metaspace first"][0]()
    encoder = PromptEncoder(tokenizer, max_bytes=5_000)
    wrong = []

    def ask(seed):
        for text in conversation(10, random.Random(seed % 2)):
            if encoder.encode(text).tolist() != whole(tokenizer, text):
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert encoder.stats()["calls"] == 40
    kept = sum(encoder._cache._size(*item) for item in encoder._cache._entries.items())
    assert kept == encoder.stats()["bytes"] <= 5_000


# ---- mistral-common, whose wheel has real tokenizers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral():
    mistral_common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    data = Path(mistral_common.__file__).parent / "data"
    return MistralTokenizer.from_file(str(data / "tekken_240911.json"))


def test_mistral_common(mistral):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    encoder = PromptEncoder(mistral)
    rng = random.Random(5)
    words = " ".join(CORPUS).split()
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    messages = [{"role": "system", "content": "You are kind. " * 20}]
    for turn in range(12):
        role = "assistant" if turn % 2 else "user"
        messages.append({"role": role, "content": " ".join(rng.choices([*words, *PIECES], k=50))})
        if role == "user":
            for given in (None, tools):
                request = ChatCompletionRequest.from_openai(messages=messages, tools=given)
                expected = mistral.encode_chat_completion(request).tokens
                assert encoder.encode_chat(messages, given).tolist() == expected
    assert encoder.stats()["tokens_reused"] > encoder.stats()["tokens"] / 2
    text = "".join(rng.choices(PIECES, k=200))
    base = mistral.instruct_tokenizer.tokenizer
    assert encoder.encode(text).tolist() == base.encode(text, bos=False, eos=False)
    # The user's own tokenizer is unchanged.
    assert "remembered" not in repr(base.encode)
    assert base.decode(expected)


# ---- transformers, only in the nightly run --------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}
{{ message.content | trim }}<|end|>
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


@pytest.mark.parametrize("kind", ["byte-level", "rstrip", "lstrip, rstrip", "metaspace first"])
def test_transformers_renders_and_encodes_the_same(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is installed for the nightly run")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind][0](), bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    encoder, rng = PromptEncoder(theirs), random.Random(kind)
    ours = PromptEncoder(KINDS[kind][0](), TEMPLATE)
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
    messages = []
    for turn in range(40):
        messages.append({"role": ("user", "assistant")[turn % 2], "content": "".join(rng.choices(PIECES, k=20))})
        for given, prompt in ((None, True), (tools, True), (None, False)):
            options = {"tools": given, "add_generation_prompt": prompt}
            expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            assert encoder.encode_chat(messages, **options).tolist() == expected
            assert ours.encode_chat(messages, bos_token="<|start|>", **options).tolist() == expected
    assert encoder.stats()["fallbacks"] == 0

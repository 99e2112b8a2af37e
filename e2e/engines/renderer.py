"""``python -m e2e.engines.renderer`` in the engines' environment: compare token ids with those of vLLM's own renderer.

The ids of chat requests by :class:`kvindex.text.PromptEncoder` must be equal to the renderer's, with the same tokenizer
and template. The requests go through vLLM's own protocol classes, so they have the defaults that the server fills in.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.hf import HfRenderer

from kvindex.text import PromptEncoder

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>"]
TOOLS = """
{%- if tools %}{{- "# Tools\\n" }}{%- for tool in tools %}{{- tool | tojson }}{{- "\\n" }}{%- endfor %}{%- endif %}"""
TEMPLATES = {
    "ChatML with tools": TOOLS
    + """
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.content %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- "<tool_call>\\n" + call.function.name + " " }}
        {{- call.function.arguments | tojson }}{{- "\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}""",
    "headers and a BOS": """{{- bos_token }}
{%- for message in messages %}
    {{- "<|" + message["role"] + "|>\\n\\n" + (message["content"] | trim) + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\\n\\n" }}{%- endif %}""",
    "parts": """{%- for message in messages %}{{- "[INST] " if message.role == "user" else " [/INST] " }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}{%- for content in message["content"] %}
        {%- if content["type"] == "text" %}{{- content["text"] }}{%- endif %}
    {%- endfor %}{%- endif %}
{%- endfor %}""",
    "strings alone": """{%- for message in messages %}
    {{- message["role"] + ": " + message["content"] + "\\n" }}
{%- endfor %}""",
}


def byte_level(texts: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(SPECIAL)
    return made


def metaspace(texts: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=tokens, show_progress=False))
    made.add_special_tokens(SPECIAL)
    return made


WORDS = [
    "the",
    "cache",
    "holds",
    "a",
    "prefix",
    "of",
    "it\n",
    "and",
    "größe",
    "日本",
    "🙂",
    "\t0123",
    "don't",
    "",
    '{"x":',
    "1}",
    "<|im_end|>",
    "end.",
]
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {"at": {}}}},
}


def conversation(rng: random.Random, template: str) -> list[dict[str, Any]]:
    """The turns of a client: strings, parts, tool calls without content, and their results."""

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(0, 30)))

    def content() -> Any:
        parts = [{"type": "text", "text": text()} for _ in range(rng.randint(1, 3))]
        return parts if rng.random() < 0.3 else text()

    chat = [{"role": "system", "content": content()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 5)):
        chat.append({"role": "user", "content": content()})
        if "tool_calls" in template and rng.random() < 0.5:
            arguments = rng.choice([json.dumps({"at": text(), "n": [1, 2.5, None]}), "", "{", "[]"])
            call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
            chat.append({"role": "assistant", "content": None, "tool_calls": [call]})
            chat.append({"role": "tool", "tool_call_id": "c", "content": content()})
        chat.append({"role": "assistant", "content": text()})
    return chat[: rng.randint(1, len(chat))]


class _Unknown(SimpleNamespace):
    """A description of a model and its server. The renderer reads many fields; all that are not given are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def renderer(tokenizer: Any) -> HfRenderer:
    """vLLM's renderer, for a model with nothing but a tokenizer."""
    model = _Unknown(hf_config=_Unknown(model_type="none"), renderer_num_workers=1, max_model_len=1 << 20, model="none")
    return HfRenderer(_Unknown(model_config=model, parallel_config=_Unknown(_api_process_rank=0)), tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.engines.renderer", description=__doc__)
    parser.add_argument("--chats", type=int, default=1000, help="of each tokenizer and template (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # vLLM would log a warning for each call whose arguments are not JSON.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    compared = tokens = 0
    wrong = []
    for kind in (byte_level, metaspace):
        backend = kind(WORDS * 3)
        for name, template in TEMPLATES.items():
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=template)
            theirs = renderer(tokenizer)
            encoders = {
                "transformers": (PromptEncoder(tokenizer), {}),
                "tokenizers": (PromptEncoder(backend, template), {"bos_token": "<s>"}),
            }
            rng = random.Random(f"{args.seed} {name}")
            for _ in range(args.chats):
                messages = conversation(rng, template)
                options = {"enable_thinking": rng.random() < 0.5} if "enable_thinking" in template else {}
                tools = [TOOL] if "tools" in template and rng.random() < 0.5 else None
                request = ChatCompletionRequest(
                    model="none", messages=json.loads(json.dumps(messages)), tools=tools,
                    chat_template_kwargs=options or None,
                )  # fmt: skip
                params = request.build_chat_params(template, "auto")
                given = None if request.tools is None else [tool.model_dump() for tool in request.tools]
                params = params.with_defaults({"tools": given}) if given else params
                _, (prompt,) = theirs.render_chat(
                    [request.messages], params, request.build_tok_params(theirs.model_config)
                )
                expected = list(prompt["prompt_token_ids"])
                for what, (encoder, more) in encoders.items():
                    found = encoder.encode_chat(messages, tools, **options, **more).tolist()
                    compared += 1
                    tokens += len(found)
                    if found != expected:
                        wrong.append((kind.__name__, name, what, messages))
    for each in wrong[:5]:
        print(*each, sep=", ")
    print(f"vLLM's renderer: {compared:,} answers compared, {tokens:,} tokens, {len(wrong):,} differ")
    return 1 if wrong or not tokens else 0


if __name__ == "__main__":
    sys.exit(main())

"""The simulated engine's tokenizer and chat template, as the files of a model's directory.

``python -m kvindex.sim.tokenizer DIRECTORY`` writes ``tokenizer.json`` and ``chat_template.jinja``. With these files, a
router that encodes prompts itself gets the ids of ``kvindex sim --http``. Ids below 256 are the UTF-8 bytes of a text.
Writing the files needs the extra ``text``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TEMPLATE", "chat_ids", "save", "text_ids", "tokenizer"]

ROLES = ("system", "user", "assistant", "tool")
END = 256 + len(ROLES)
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("no role " ~ message.role) }}
    {%- endif %}
    {{- "<|" ~ message.role ~ "|>" }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}"""


def text_ids(text: str) -> list[int]:
    """The token ids of a text.

    Raises:
        ValueError: The text has a lone surrogate.
    """
    try:
        return list(text.encode())
    except UnicodeEncodeError:
        raise ValueError("a text has a lone surrogate") from None


def chat_ids(messages: Any, add_generation_prompt: bool = True) -> list[int]:
    """The token ids of a conversation, by ``TEMPLATE``.

    Raises:
        ValueError: The conversation has no message, a role that is not in ``ROLES``, or content that is not text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of messages")
    ids: list[int] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"no role {role!r}; there are {', '.join(ROLES)}")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(content, str):
            raise ValueError("content must be a text or a list of parts")
        ids += [256 + ROLES.index(role), *text_ids(content), END]
    return [*ids, 256 + ROLES.index("assistant")] if add_generation_prompt else ids


def tokenizer() -> Tokenizer:
    """A tokenizer whose ids are those of the simulated engine."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # ByteLevel's letter for each byte: a printable byte is its own letter, and the others get the letters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens([*(f"<|{role}|>" for role in ROLES), "<|end|>"])
    return made


def save(directory: str | Path) -> None:
    """Write both files into a directory, and create the directory if needed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    save(sys.argv[1])

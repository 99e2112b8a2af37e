"""The simulated engine's tokenizer and chat template, as the files of a model's directory.

``python -m kvindex.sim.tokenizer DIRECTORY`` writes ``tokenizer.json`` and ``chat_template.jinja``: with them, a router
that encodes prompts itself gets the ids of ``kvindex sim --http``. Ids below 256 are the UTF-8 bytes of a text. The
extra ``text`` has what it needs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END", "ROLES", "TEMPLATE", "save", "tokenizer"]

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


def tokenizer() -> Tokenizer:
    """A tokenizer whose ids are those of the simulated engine."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # ByteLevel's letter for each byte: printable ones stand for themselves, the others for what follows 255, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens([*(f"<|{role}|>" for role in ROLES), "<|end|>"])
    return made


def save(directory: str | Path) -> None:
    """Writes both files into a directory, which is made where it is not there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    save(sys.argv[1])

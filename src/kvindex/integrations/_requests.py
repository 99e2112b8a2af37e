"""Token ids of the requests that routers see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import InvalidTypeError, InvalidValueError
from ..text import PromptEncoder

__all__ = ["Encoder", "encoder_of", "token_ids"]


class Encoder(Protocol):
    """:class:`PromptEncoder` or :class:`RemoteEncoder`."""

    def encode(self, text: str) -> Any: ...

    def encode_chat(self, messages: Any, tools: Any = None, **template_kwargs: Any) -> Any: ...


def encoder_of(directory: str | Path) -> PromptEncoder:
    """Return the encoder of a model's directory, from its ``tokenizer.json`` and, if there is one,
    ``chat_template.jinja``.

    Raises:
        InvalidValueError: The directory has no tokenizer that can be read.
    """
    from tokenizers import Tokenizer

    path = Path(directory)
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:
        raise InvalidValueError(f"{path / 'tokenizer.json'} is no tokenizer: {error}") from None
    template = path / "chat_template.jinja"
    return PromptEncoder(tokenizer, template.read_text() if template.is_file() else None)


def token_ids(body: Mapping[str, Any], encoder: Encoder | None) -> Any:
    """Return the token ids of an OpenAI chat or completion: uint32[n], or the list of ids in ``prompt``.

    None if there is no single prompt (an embedding, an image, a batch of prompts), or if the prompt is a text and there
    is no encoder.

    Raises:
        InvalidTypeError: ``messages`` or ``chat_template_kwargs`` are of another type than OpenAI's.
        EncodeError: The template or the engine refuses the messages.
    """
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, list):
        return prompt if prompt and all(type(each) is int for each in prompt) else None
    if encoder is None:
        return None
    if isinstance(prompt, str):
        return encoder.encode(prompt)
    if messages is None:
        return None
    options = body.get("chat_template_kwargs") or {}
    if not isinstance(messages, list) or not isinstance(options, Mapping):
        raise InvalidTypeError("messages must be a list, and chat_template_kwargs an object")
    return encoder.encode_chat(messages, body.get("tools"), **options)

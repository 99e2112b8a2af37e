"""The tokenizer options of the commands that accept texts and messages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._terminal import CommandError

__all__ = ["add_encoder_arguments", "encoder_of"]


def add_encoder_arguments(parser: Any) -> None:
    """The options of :func:`encoder_of`. ``parser``: a parser, or a group of one."""
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, for prompts that are texts or messages")
    parser.add_argument("--chat-template", metavar="FILE", help="the model's chat template, for messages")
    parser.add_argument("--tokenize-url", metavar="URL", help="URL of an engine that returns the token ids instead")


def encoder_of(args: argparse.Namespace) -> Any:
    """A PromptEncoder or RemoteEncoder; None where no option names one."""
    if args.tokenizer is None:
        if args.tokenize_url is None:
            return None
        from ..text import RemoteEncoder

        return RemoteEncoder(args.tokenize_url)
    if args.tokenize_url is not None:
        raise CommandError("--tokenizer and --tokenize-url are both given; give one of them")
    try:
        from tokenizers import Tokenizer

        from ..text import PromptEncoder
    except ImportError:
        raise CommandError("--tokenizer needs the extra text: pip install 'kvindex[text]'") from None
    try:
        tokenizer = Tokenizer.from_file(args.tokenizer)
    except Exception as error:
        raise CommandError(f"--tokenizer {args.tokenizer}: {error}") from None
    template = None
    if args.chat_template is not None:
        try:
            template = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"--chat-template {args.chat_template}: {error}") from None
    return PromptEncoder(tokenizer, template)

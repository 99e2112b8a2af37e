"""What the site needs beyond its pages."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kvindex.cli import parser

ROOT = Path(__file__).resolve().parents[2]


def on_page_read_source(*, page: Any, **_: Any) -> str | None:
    """CONTRIBUTING.md is a page too, and written for the root of the checkout, where docs/ is a directory below."""
    if page.file.src_uri == "contributing.md":
        return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    return None


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page of the commands shows what ``--help`` prints, each under a heading of its own."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    os.environ["COLUMNS"] = "100"
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"## kvindex {name}\n\n```text\n{each.format_help()}```\n" for name, each in commands.choices.items()]
    return "\n".join([markdown, *parts])

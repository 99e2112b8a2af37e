"""What the site needs beyond its pages."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kvindex.cli import parser

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_read_source(*, page: Any, **_: Any) -> str | None:
    """Two pages stand in the root of the checkout, where docs/ is a directory below."""
    if name := FROM_ROOT.get(page.file.src_uri):
        text = (ROOT / name).read_text().replace("](docs/", "](")
        return text.replace("](CHANGELOG.md)", "](changelog.md)")
    return None


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page of the commands shows what ``--help`` prints, each under a heading of its own."""
    if page.file.src_uri != "reference/commands.md":
        return markdown
    os.environ["COLUMNS"] = "100"
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"## kvindex {name}\n\n```text\n{each.format_help()}```\n" for name, each in commands.choices.items()]
    return "\n".join([markdown, *parts])

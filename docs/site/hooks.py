"""The hooks of mkdocs for the parts of the site that are not pages of ``docs``."""

from __future__ import annotations

import argparse
import inspect
import os
import pydoc
import re
from pathlib import Path
from typing import Any

import kvindex
from kvindex.cli import parser

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: Any, **_: Any) -> Any:
    config.copyright = f"kvindex {kvindex.__version__} · Apache 2.0"
    return config


def on_page_read_source(*, page: Any, **_: Any) -> str | None:
    """Read the two pages that are in the root of the checkout, and change their links, which begin with ``docs/``."""
    if name := FROM_ROOT.get(page.file.src_uri):
        text = (ROOT / name).read_text().replace("](docs/", "](")
        return text.replace("](CHANGELOG.md)", "](changelog.md)")
    return None


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Add the output of ``--help`` to the page of the commands, and a table of names to the pages of classes."""
    if text := description(markdown):
        page.meta.setdefault("description", text)
    if page.file.src_uri == "reference/commands.md":
        return markdown + commands()
    return markdown.replace("<!-- names -->", names(markdown))


def description(markdown: str) -> str:
    """The first paragraph as plain text, for search engines: whole sentences, up to about 160 characters."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    first = next((part for part in paragraphs if re.match(r"[*`\w]", part)), "")
    plain = re.sub(r"[*`]|\[([^]]*)\]\([^)]*\)", r"\1", first)
    sentences = re.split(r"(?<=[.?]) ", plain)
    taken = sentences[0]
    for sentence in sentences[1:]:
        if len(taken) + len(sentence) > 160:
            break
        taken += f" {sentence}"
    return taken


def commands() -> str:
    os.environ["COLUMNS"] = "100"
    (each,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"\n## kvindex {name}\n\n```text\n{one.format_help()}```\n" for name, one in each.choices.items()]
    return "".join(parts)


def names(markdown: str) -> str:
    lines = ["| name | description |", "|---|---|"]
    for path in re.findall(r"^::: ([\w.]+)", markdown, flags=re.MULTILINE):
        thing: Any = pydoc.locate(path)
        if inspect.ismodule(thing):
            parts = {f"{path}.{name}": getattr(thing, name) for name in thing.__all__}
            lines += [
                line(name, part) for name, part in parts.items() if inspect.isroutine(part) or isinstance(part, type)
            ]
        else:
            lines.append(line(path, thing))
    return "\n".join(lines)


def line(path: str, thing: Any) -> str:
    """A row of the table: a name, linked to its documentation, and its first sentence."""
    said, *_ = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(thing) or "", maxsplit=1)
    said = re.sub(r":\w+:`~?(?:kvindex\.)?([\w.]+)`", r"`\1`", " ".join(said.split()))
    name = path.rpartition(".")[2]
    return f"| [`{name if getattr(kvindex, name, None) is thing else path}`](#{path}) | {said} |"

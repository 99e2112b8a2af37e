"""Tables that are readable in a terminal and in Markdown alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["amount", "say", "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    made = Table(box=box.MARKDOWN)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    text = StringIO()
    Console(file=text, width=400, markup=False, emoji=False).print(made, highlight=False)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip()) + "\n"


def amount(value: float) -> str:
    """A number with about three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def say(text: str) -> None:
    """Print progress to stderr, apart from the tables."""
    print(text, file=sys.stderr, flush=True)

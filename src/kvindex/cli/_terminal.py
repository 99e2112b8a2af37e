"""The parts that the commands share: the console, and numbers in readable form.

Only the commands need rich and matplotlib, so they are imported when a command runs: a router that imports kvindex may
not have them.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KVIndexError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "CommandError",
    "Layout",
    "add_command",
    "console",
    "counted",
    "examples",
    "missing",
    "percentiles",
    "positive",
    "seconds",
]


class CommandError(KVIndexError):
    """The command line asks for something that cannot be done."""


class Layout(argparse.HelpFormatter):
    """A help formatter that fills paragraphs, but leaves those with indented lines (examples) as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            part if "\n  " in part else super(Layout, self)._fill_text(part, width, indent) for part in parts
        )


def examples(*lines: str) -> str:
    """A paragraph of example command lines, for the end of a help text."""
    return "\n  ".join(("examples:", *lines))


def add_command(commands: Any, name: str, *, help: str, description: str, status: str, lines: Sequence[str]) -> Any:
    """A subcommand's parser. ``status`` explains the exit statuses 0 and 1; ``lines`` are example command lines."""
    status = f"exit status: {status}; 2 if the command failed"
    return commands.add_parser(
        name, help=help, description=description, epilog=f"{examples(*lines)}\n\n{status}", formatter_class=Layout
    )


def missing(package: str) -> CommandError:
    """The error for an absent package of the ``cli`` extra."""
    return CommandError(f'this needs {package}, which is not installed: pip install "kvindex[cli]"')


def console() -> Console:
    """A console on standard output."""
    try:
        from rich.console import Console
    except ImportError:
        raise missing("rich") from None
    made = Console(highlight=False)
    # A file, a pipe and a log have no width; rich would fold every table at 80 columns.
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 140
    return made


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun: ``1 pod``, ``2,000 pods``. ``several`` is an irregular plural."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def positive(text: str) -> int:
    """An argument that is a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def seconds(text: str) -> float:
    """An argument that is a duration."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def percentiles(seconds: Sequence[float]) -> tuple[str, str, str]:
    """p50, p99 and maximum in microseconds, as text; dashes where nothing was measured."""
    if not seconds:
        return "-", "-", "-"
    p50, p99, top = np.percentile(np.asarray(seconds) * 1e6, (50, 99, 100))
    return f"{p50:.1f}", f"{p99:.1f}", f"{top:.1f}"

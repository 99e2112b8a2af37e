"""The ``kvindex`` command: one file for each subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import kvindex

from . import collect, demo, doctor, epp, record, replay, serve, sim, top, verify
from ._terminal import Layout, examples

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The whole command line, for ``main`` and for the page of the commands."""
    made = argparse.ArgumentParser(
        prog="kvindex",
        description=kvindex.__doc__,
        formatter_class=Layout,
        epilog=examples("kvindex demo", "kvindex top a=tcp://10.0.0.1:5557,5558", "kvindex doctor http://10.0.0.1:8000")
        + "\n\nkvindex COMMAND --help lists the options of a command.",
    )
    made.add_argument("--version", action="version", version=f"kvindex {kvindex.__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in (demo, sim, serve, collect, epp, top, doctor, verify, record, replay):
        command.add_parser(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 when an answer is wrong, 2 when the command failed."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    whole = parser()
    args = whole.parse_args(_attached(argv))
    if args.command is None:
        whole.print_help(sys.stderr)
        return 2
    try:
        status: int = args.run(args)
    except (kvindex.KVIndexError, OSError) as error:
        print(f"kvindex {args.command}: {error}", file=sys.stderr)
        return 2
    return status


def _attached(argv: Sequence[str]) -> list[str]:
    """The arguments, with each ``--server-key`` and its value joined by ``=``.

    argparse takes a value that begins with a dash for an option, and one CURVE key of 85 begins with a dash.
    """
    rest = iter(argv)
    attached = []
    for argument in rest:
        value = next(rest, None) if argument == "--server-key" else None
        attached.append(argument if value is None else f"{argument}={value}")
    return attached

"""The ``kvindex`` command: one file a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import kvindex

from . import demo, doctor, record, replay, sim, top

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status: 0, 1 when an answer is wrong, 2 when it could not be asked."""
    parser = argparse.ArgumentParser(prog="kvindex", description=kvindex.__doc__)
    parser.add_argument("--version", action="version", version=f"kvindex {kvindex.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo.add_parser(commands)
    doctor.add_parser(commands)
    record.add_parser(commands)
    replay.add_parser(commands)
    sim.add_parser(commands)
    top.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (kvindex.KVIndexError, OSError) as error:
        print(f"kvindex {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status

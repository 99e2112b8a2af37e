"""``python -m chaos COMMAND``."""

from __future__ import annotations

import argparse
import sys

from . import run, storm


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run.add_parser(commands)
    storm.add_parser(commands)
    args = parser.parse_args(argv)
    status: int = args.run(args, argv)
    return status


sys.exit(main(sys.argv[1:]))

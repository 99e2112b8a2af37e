"""``kvindex sim``: one simulated pod as a process that publishes over TCP."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import FrameType
from typing import Any

import zmq

from ..errors import KVIndexError, StreamError
from ..sim.control import follow_parent
from ..sim.process import SimConfig, SimPod
from ..sim.wire import FORMS

__all__ = ["add_parser", "main", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sim",
        help="one simulated pod, over TCP",
        description="An engine without a model: it serves a made-up workload, allocates and evicts KV blocks, and "
        "publishes its events as the real ones do (ZMQ PUB, and ROUTER for replays). Prints one line of JSON that says "
        "where everything is, then runs until it is interrupted.",
    )
    arguments(parser)
    parser.set_defaults(run=run)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="pod-0", help="of the pod (%(default)s)")
    parser.add_argument("--model", default="sim", help="that it serves (%(default)s)")
    parser.add_argument("--form", default="vllm-0.33.0", choices=list(FORMS), metavar="FORM",
                        help=f"what its events look like: {', '.join(FORMS)} (%(default)s)")  # fmt: skip
    parser.add_argument("--hashes", choices=["u64", "i64", "bytes16", "bytes32"], help="instead of what the form has")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="data-parallel ranks (%(default)s)")
    parser.add_argument("--blocks", type=int, default=4000, metavar="N", help="KV cache of a rank (%(default)s)")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS", help="(%(default)s)")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="of a second, sliding-window group")
    parser.add_argument("--window-block-size", type=int, metavar="TOKENS", help="of that group (the block size)")
    parser.add_argument("--window-interval", type=int, metavar="TOKENS", help="at which that group keeps its blocks")
    parser.add_argument("--hash-seed", default="", metavar="TEXT", help="pods that share it name equal blocks equally")
    parser.add_argument("--offload-blocks", type=int, default=0, metavar="N", help="of a second tier (%(default)s)")
    parser.add_argument("--offload-medium", default="CPU", metavar="NAME", help="of the second tier (%(default)s)")
    parser.add_argument("--offload-tokens", action="store_true", help="the second tier's events say their tokens")
    parser.add_argument("--host", default="127.0.0.1", help="to bind (%(default)s)")
    parser.add_argument("--port", type=int, default=5557, help="of rank 0; 0 is any (%(default)s)")
    parser.add_argument("--replay-port", type=int, help="of rank 0; 0 is any (port + 100)")
    parser.add_argument("--no-replay", action="store_true", help="answer no replays")
    parser.add_argument("--control-port", type=int, default=0, help="where it can be told things; 0 is any")
    parser.add_argument("--connect", metavar="ENDPOINT", help="publish to an endpoint that somebody else has bound")
    parser.add_argument("--topic", help="of its messages (kv@NAME@MODEL)")
    parser.add_argument(
        "--buffer-steps", type=int, default=10_000, metavar="N", help="batches for replays (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second; 0 waits to be told (%(default)s)")
    parser.add_argument("--concurrent", type=int, default=4, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="that the workload uses (%(default)s)")
    parser.add_argument("--salts", type=int, default=0, metavar="N", help="that the workload uses (%(default)s)")
    parser.add_argument("--curve", metavar="FILE", help="encrypt its streams: a .key_secret file of zmq.auth")
    # For whoever starts this as a part of something larger: it must not outlive it, however that one ends.
    parser.add_argument("--follow-parent", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, make: Callable[[SimConfig], SimPod] = SimPod) -> int:
    values = {each.name: getattr(args, each.name) for each in fields(SimConfig)}
    if args.no_replay:
        values["replay_port"] = None
    elif args.replay_port is None:
        values["replay_port"] = args.port + 100 if args.port else 0
    try:
        pod = make(SimConfig(**values))
    except zmq.ZMQError as error:
        raise StreamError(f"{args.name} can not have the ports that it was given: {error}") from None

    def stop(_number: int, _frame: FrameType | None) -> None:
        pod.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if args.follow_parent:
        follow_parent(lambda: setattr(pod, "stopping", True))
    print(json.dumps(pod.ready()), flush=True)
    pod.run()
    return 0


def main(argv: Sequence[str] | None = None, make: Callable[[SimConfig], SimPod] = SimPod) -> int:
    """The command alone, without the other commands and what they import; ``make`` makes the pod."""
    parser = argparse.ArgumentParser(prog="kvindex sim")
    arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args, make)
    except (KVIndexError, OSError) as error:
        print(f"kvindex sim: {error}", file=sys.stderr)
        return 2

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
from ._terminal import CommandError, add_command

__all__ = ["add_parser", "main", "run"]


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "sim",
        help="run a simulated pod that publishes as an engine does",
        description="Run an engine without a model: it serves a synthetic workload, allocates and evicts KV blocks, "
        "and publishes its events as real engines do (ZMQ PUB, and ROUTER for replays). It prints its endpoints as one "
        "line of JSON and runs until it is interrupted.",
        status="0 if it was interrupted",
        lines=[
            "kvindex sim --name a --port 5557",
            "kvindex sim --name b --port 5560 --ranks 2 --form sglang-0.5.22 --seed 1",
        ],
    )
    arguments(parser)
    parser.set_defaults(run=run)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="pod-0", help="name of the pod (default %(default)s)")
    parser.add_argument("--model", default="sim", help="model that the pod serves (default %(default)s)")

    events = parser.add_argument_group("events")
    events.add_argument("--form", default="vllm-0.33.0", choices=list(FORMS), metavar="FORM",
                        help=f"release of the wire format (default %(default)s): {', '.join(FORMS)}")  # fmt: skip
    events.add_argument("--hashes", choices=["u64", "i64", "bytes16", "bytes32"],
                        help="kind of block hashes (default: that of the release)")  # fmt: skip
    events.add_argument("--hash-seed", default="", metavar="TEXT",
                        help="seed of the block hashes: equal seeds give equal blocks equal hashes")  # fmt: skip
    events.add_argument("--topic", help="topic of the messages (default kv@NAME@MODEL)")
    events.add_argument("--buffer-steps", type=int, default=10_000, metavar="N",
                        help="batches kept for replays (default %(default)s)")  # fmt: skip

    cache = parser.add_argument_group("cache")
    cache.add_argument("--ranks", type=int, default=1, metavar="N", help="data-parallel ranks (default %(default)s)")
    cache.add_argument("--blocks", type=int, default=4000, metavar="N",
                       help="blocks in the KV cache of a rank (default %(default)s)")  # fmt: skip
    cache.add_argument("--block-size", type=int, default=16, metavar="TOKENS",
                       help="tokens in a block (default %(default)s)")  # fmt: skip
    cache.add_argument("--window", type=int, metavar="TOKENS",
                       help="window of a second, sliding-window group (default: none)")  # fmt: skip
    cache.add_argument("--window-blocks", type=int, metavar="N",
                       help="with SGLang: blocks in the window's pool, which evicts silently")  # fmt: skip
    cache.add_argument("--window-block-size", type=int, metavar="TOKENS",
                       help="tokens in a block of that group (default: as --block-size)")  # fmt: skip
    cache.add_argument("--window-interval", type=int, metavar="TOKENS",
                       help="keep only blocks that a hit at a multiple of TOKENS needs (default: all)")  # fmt: skip
    cache.add_argument("--offload-blocks", type=int, default=0, metavar="N",
                       help="blocks in a second tier (default %(default)s)")  # fmt: skip
    cache.add_argument("--offload-medium", default="CPU", metavar="NAME",
                       help="medium of the second tier (default %(default)s)")  # fmt: skip
    cache.add_argument("--offload-tokens", action="store_true", help="events of the second tier have tokens")
    cache.add_argument("--offload-keyless", action="store_true",
                       help="and no adapter, salt or other keys, like connectors' events")  # fmt: skip
    cache.add_argument("--lookahead", type=int, default=0, metavar="TOKENS",
                       help="tokens behind a block in its hash: EAGLE and MTP (default %(default)s)")  # fmt: skip
    cache.add_argument("--eagle", action="store_true",
                       help="EAGLE as in vLLM before 0.33: do not reuse the last matching block")  # fmt: skip

    network = parser.add_argument_group("sockets")
    network.add_argument("--host", default="127.0.0.1", help="address to bind (default %(default)s)")
    network.add_argument("--port", type=int, default=5557, metavar="N",
                         help="port of rank 0, 0 for any free port (default %(default)s)")  # fmt: skip
    network.add_argument("--replay-port", type=int, metavar="N",
                         help="replay port of rank 0, 0 for any free port (default --port + 100)")  # fmt: skip
    network.add_argument("--no-replay", action="store_true", help="answer no replays")
    network.add_argument("--control-port", type=int, default=0, metavar="N",
                         help="port for commands of tests, 0 for any free port (default %(default)s)")  # fmt: skip
    network.add_argument("--http", type=int, metavar="PORT",
                         help="port of an OpenAI-compatible server, 0 for any free port")  # fmt: skip
    network.add_argument("--connect", metavar="ENDPOINT", help="publish to an endpoint that a router has bound")
    network.add_argument("--curve", metavar="FILE", help="encrypt the streams with a .key_secret file of zmq.auth")
    network.add_argument("--server-key", metavar="KEY", help="CURVE public key of the endpoint in --connect")

    work = parser.add_argument_group("workload")
    work.add_argument("--rate", type=float, default=4.0, metavar="N",
                      help="requests a second, 0 to wait for commands (default %(default)g)")  # fmt: skip
    work.add_argument("--concurrent", type=int, default=4, metavar="N",
                      help="concurrent requests (default %(default)s)")  # fmt: skip
    work.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the workload (default %(default)s)")
    work.add_argument("--adapters", type=int, default=0, metavar="N",
                      help="LoRA adapters that requests use (default %(default)s)")  # fmt: skip
    work.add_argument("--salts", type=int, default=0, metavar="N",
                      help="cache salts that requests use (default %(default)s)")  # fmt: skip
    # For a parent process: the pod must not outlive it, however the parent ends.
    parser.add_argument("--follow-parent", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, make: Callable[[SimConfig], SimPod] = SimPod) -> int:
    values = {each.name: getattr(args, each.name) for each in fields(SimConfig)}
    if args.no_replay:
        values["replay_port"] = None
    elif args.replay_port is None:
        values["replay_port"] = args.port + 100 if args.port else 0
    try:
        pod = make(SimConfig(**values))
    except ImportError as error:
        raise CommandError(str(error)) from None
    except (zmq.ZMQError, OSError) as error:
        raise StreamError(f"{args.name} cannot use the ports that it was given: {error}") from None

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
    """Run this command alone, without the imports of the other commands. ``make`` creates the pod."""
    parser = argparse.ArgumentParser(prog="kvindex sim")
    arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args, make)
    except (KVIndexError, OSError) as error:
        print(f"kvindex sim: {error}", file=sys.stderr)
        return 2

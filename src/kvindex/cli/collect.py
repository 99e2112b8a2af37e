"""``kvindex collect``: the collector of a fleet as a process of its own."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from ._pods import add_arguments, add_cluster_arguments, followed_fleet
from ._terminal import CommandError, add_command, positive, seconds

__all__ = ["add_parser"]

URL = "KVINDEX_LOG"


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "collect",
        help="follow pods for many processes, over Redis or Valkey",
        description="Follow the engines of a fleet and write each change of their caches to a log in a Redis or Valkey "
        "server, which ReplicatedIndex reads in the routers. Of several collectors of one fleet, one works and the "
        "others wait to take over; all need the same pods.",
        status="0 if a signal ended it",
        lines=[
            "kvindex collect --log redis://10.0.0.9:6379 --fleet prod --pods pods.yaml",
            "kvindex collect --log rediss://collector:SECRET@10.0.0.9:6380 --fleet prod --kubernetes",
        ],
    )
    add_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--log", metavar="URL", default=os.environ.get(URL),
                        help=f"URL of the server, in redis-py's form (default: {URL})")  # fmt: skip
    parser.add_argument("--fleet", default="default", metavar="NAME", help="name of the fleet (default %(default)s)")
    parser.add_argument("--shards", type=positive, default=1, metavar="N",
                        help="number of logs of the fleet, equal in all processes (default %(default)s)")  # fmt: skip
    parser.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                        help="block size of the index, equal in all processes (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-bytes", type=positive, metavar="N", help="limit of the index's memory (default: none)")
    parser.add_argument(
        "--lease", type=seconds, metavar="SECONDS", help="time after which another collector takes over (default 2)"
    )
    parser.add_argument("--report-every", type=seconds, default=60.0, metavar="SECONDS",
                        help="log the status as JSON at this interval (default %(default)g)")  # fmt: skip
    parser.add_argument("--metrics", type=address, metavar="[HOST:]PORT",
                        help="serve Prometheus metrics at this address (default: none; HOST 127.0.0.1)")  # fmt: skip
    parser.set_defaults(run=run)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a port nor HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def serve_metrics(stack: ExitStack, view: Any, host: str, port: int) -> None:
    try:
        from prometheus_client import CollectorRegistry, start_http_server

        from ..metrics import KVIndexCollector
    except ImportError as error:
        raise CommandError(f"--metrics: {error}: pip install 'kvindex[metrics]'") from None
    registry = CollectorRegistry()
    registry.register(KVIndexCollector(view.index, view))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise CommandError(f"--metrics: cannot listen on {host}:{port}: {error}") from None
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


def run(args: argparse.Namespace) -> int:
    try:
        from ..replication import ReplicatedIndex, ReplicationPolicy
    except ImportError as error:
        raise CommandError(str(error)) from None
    if not args.log:
        raise CommandError(f"no server: name it by --log redis://HOST:PORT or by {URL}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log = logging.getLogger("kvindex.replication")
    policy = ReplicationPolicy() if args.lease is None else ReplicationPolicy(lease=args.lease)
    ended = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
    with ExitStack() as stack:
        view = stack.enter_context(
            ReplicatedIndex(
                args.log,
                fleet=args.fleet,
                block_size=args.block_size,
                shards=args.shards,
                policy=policy,
                max_bytes=args.max_bytes,
            )
        )
        stack.enter_context(followed_fleet(view, args))
        if not view.pods() and args.file is None and args.kubernetes is None:
            raise CommandError("no pods: name them as NAME=tcp://HOST:PORT,REPLAY_PORT, by --pods or by --kubernetes")
        if args.metrics is not None:
            serve_metrics(stack, view, *args.metrics)
        status = view.status()
        print(f"kvindex collect: fleet {status.fleet} at {status.server}", flush=True)
        while not ended.wait(args.report_every):
            log.info("status %s", json.dumps(asdict(view.status())))
    return 0

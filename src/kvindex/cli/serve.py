"""``kvindex serve``: the index as an HTTP service."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from contextlib import ExitStack
from typing import Any

from .. import EventManager, PrefixIndex
from ._encoder import add_encoder_arguments, encoder_of
from ._pods import add_arguments, add_cluster_arguments, followed_fleet
from ._terminal import CommandError, add_command, positive, seconds
from .demo import BLOCK_SIZE, BLOCKS_PER_POD, Fleet, Pod

__all__ = ["add_parser"]

log = logging.getLogger("kvindex.service")

TOKEN = "KVINDEX_TOKEN"
URL = "KVINDEX_LOG"


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        help="the index as an HTTP service, with a live page",
        description="Follow pods and answer questions about them over HTTP. Serves kvindex's routes, the routes of "
        "Mooncake and Dynamo, and /metrics. /openapi.json describes every route.",
        status="0 if a signal ended it",
        lines=[
            "kvindex serve --pods pods.yaml --port 8090",
            "kvindex serve --demo",
            "kvindex serve --snapshot /var/lib/kvindex/index --snapshot-every 300",
            "kvindex serve --log redis://10.0.0.9:6379 --fleet prod",
        ],
    )
    add_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--demo", type=positive, metavar="N", nargs="?", const=5,
                        help="start N simulated pods with traffic, and follow these (default: 5)")  # fmt: skip
    parser.add_argument("--kill-every", type=seconds, default=20.0, metavar="SECONDS",
                        help="with --demo: seconds between kills of a pod (default %(default)g)")  # fmt: skip

    log_of = parser.add_argument_group("the log of a collector, instead of pods")
    log_of.add_argument("--log", metavar="URL", default=os.environ.get(URL),
                        help=f"follow the log in this Redis or Valkey server (default: {URL}, else none)")  # fmt: skip
    log_of.add_argument("--fleet", default="default", metavar="NAME", help="name of the fleet (default %(default)s)")
    log_of.add_argument("--shards", type=positive, default=1, metavar="N",
                        help="number of logs of the fleet, equal in all processes (default %(default)s)")  # fmt: skip
    log_of.add_argument("--share", action="store_true",
                        help="exchange picks with the other routers of the fleet that share theirs")  # fmt: skip

    index = parser.add_argument_group("the index")
    index.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                       help="block size; engines' must be multiples of it (default %(default)s)")  # fmt: skip
    index.add_argument("--max-bytes", type=positive, metavar="N", help="limit of the index's memory (default: none)")
    index.add_argument(
        "--ttl", type=seconds, metavar="SECONDS", help="drop prefixes that are unused for this many seconds"
    )
    index.add_argument("--snapshot", metavar="FILE", help="start from this file, and save there at the end")
    index.add_argument("--snapshot-every", type=seconds, metavar="SECONDS", help="also save there at this interval")
    index.add_argument("--from", dest="source", metavar="URL", help="start with the index of a running service")

    network = parser.add_argument_group("sockets")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    network.add_argument("--port", type=int, default=8090, metavar="N",
                         help="port, 0 for any free one, -1 for no TCP (default %(default)s)")  # fmt: skip
    network.add_argument("--uds", metavar="PATH", help="also listen on this Unix socket")
    network.add_argument("--token-file", metavar="FILE",
                         help=f"file with the bearer token of callers (default: {TOKEN}, else none)")  # fmt: skip
    for name in ("ssl-certfile", "ssl-keyfile", "ssl-keyfile-password", "ssl-ca-certs"):
        network.add_argument(
            f"--{name}", metavar="FILE" if "password" not in name else "TEXT", help="same as uvicorn's option"
        )
    network.add_argument(
        "--ssl-cert-reqs", type=int, metavar="N", help="same as uvicorn's option: 2 requires clients' certificates"
    )

    work = parser.add_argument_group("limits")
    work.add_argument(
        "--max-body", type=positive, default=8 << 20, metavar="BYTES", help="limit of a body (default %(default)s)"
    )
    work.add_argument(
        "--max-tokens", type=positive, default=1 << 20, metavar="N", help="limit of a prompt (default %(default)s)"
    )
    work.add_argument("--max-in-flight", type=positive, default=1024, metavar="N",
                      help="limit of concurrent requests (default %(default)s)")  # fmt: skip
    add_encoder_arguments(work)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from ..service import Limits, Service
        from ..service.server import Server, Snapshots, keep_freed_memory
    except ImportError as error:
        raise CommandError(str(error)) from None
    if args.snapshot_every is not None and args.snapshot is None:
        raise CommandError("--snapshot-every needs --snapshot FILE")
    if args.demo is not None and (others := _beside_demo(args)):
        raise CommandError(f"--demo has pods and an index of its own: leave out {others}")
    if args.log and (others := _beside_log(args)):
        raise CommandError(f"a log (--log or {URL}) has pods and an index of its own: leave out {others}")
    if args.share and not args.log:
        raise CommandError(f"--share needs a log (--log or {URL}), through which routers exchange their picks")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    token = _token(args)
    encoder = encoder_of(args)
    index, registered = (None, []) if args.log else _index(args, token)
    limits = Limits(max_body=args.max_body, max_tokens=args.max_tokens, max_in_flight=args.max_in_flight)
    with ExitStack() as stack:
        fleet = None if args.demo is None else stack.enter_context(_fleet(args.demo))
        manager: Any
        if index is None:
            manager = stack.enter_context(_view(args))
            index = manager.index
        else:
            manager = stack.enter_context(EventManager(index))
            stack.enter_context(followed_fleet(manager, args))
        for source in registered if fleet is None else [pod.source() for pod in fleet.pods]:
            _follow(manager, source)
        service = Service(index, manager, encoder=encoder, limits=limits, token=token)
        server = Server(
            service, host=None if args.port < 0 else args.host, port=max(args.port, 0), uds=args.uds,
            ssl={name: value for name, value in vars(args).items() if name.startswith("ssl_")},
        )  # fmt: skip
        snapshots = None if args.snapshot is None else Snapshots(service, args.snapshot, args.snapshot_every or 0.0)
        if snapshots is not None and args.snapshot_every is not None:
            service.background.append(snapshots.run)
        if fleet is not None:
            from ._traffic import Traffic

            traffic = Traffic(service, fleet, args.kill_every)
            service.background += [traffic.requests, traffic.accidents]
        if threading.current_thread() is threading.main_thread():
            # After its end uvicorn raises the signal that stopped it again. The handlers keep it from the snapshot.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.stop())
        print(f"kvindex serve: {' and '.join(filter(None, (server.url, server.uds)))}", flush=True)
        if not (manager.pods() or args.log or args.file or args.kubernetes is not None):
            print("no pods yet: POST /register adds one", flush=True)
        try:
            server.run()
        finally:
            if snapshots is not None:
                snapshots.save()
    return 0


def _beside_demo(args: argparse.Namespace) -> str:
    given = {
        "POD": args.pods, "--pods": args.file, "--replay": args.replay, "--kubernetes": args.kubernetes is not None,
        "--snapshot": args.snapshot, "--from": args.source, "--block-size": args.block_size != BLOCK_SIZE,
        f"--log or {URL}": args.log,
    }  # fmt: skip
    return ", ".join(name for name, value in given.items() if value)


def _beside_log(args: argparse.Namespace) -> str:
    given = {
        "POD": args.pods, "--pods": args.file, "--replay": args.replay, "--kubernetes": args.kubernetes is not None,
        "--snapshot": args.snapshot, "--from": args.source,
    }  # fmt: skip
    return ", ".join(name for name, value in given.items() if value)


def _view(args: argparse.Namespace) -> Any:
    try:
        from ..replication import ReplicatedIndex
    except ImportError as error:
        raise CommandError(str(error)) from None
    return ReplicatedIndex(
        args.log, fleet=args.fleet, block_size=args.block_size, shards=args.shards, share=args.share,
        collect=False, max_bytes=args.max_bytes, ttl=args.ttl,
    )  # fmt: skip


def _fleet(number: int) -> Fleet:
    return Fleet([Pod(each, BLOCKS_PER_POD) for each in range(number)])


def _follow(manager: EventManager, source: Any) -> None:
    try:
        if source.name not in manager.pods():
            manager.add_pod(source)
    except Exception as error:
        log.error("pod %s is not followed again: %s", source.name, error)


def _index(args: argparse.Namespace, token: str | None) -> tuple[PrefixIndex, list[Any]]:
    from ..service.server import fetched, restored

    options = {"max_bytes": args.max_bytes, "ttl": args.ttl}
    index: PrefixIndex | None = None
    pods: list[Any] = []
    if args.snapshot is not None:
        index, pods = restored(args.snapshot, options, args.block_size)
    if index is None and args.source is not None:
        index, pods = fetched(args.source, token, options, args.block_size)
    return PrefixIndex(args.block_size, **options) if index is None else index, pods


def _token(args: argparse.Namespace) -> str | None:
    if args.token_file is None:
        return os.environ.get(TOKEN) or None
    with open(args.token_file) as file:
        token = file.read().strip()
    if not token:
        raise CommandError(f"{args.token_file} is empty; it must contain the token")
    return token

"""``kvindex epp``: an endpoint picker for gateways."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from contextlib import ExitStack
from typing import Any

from .. import EventManager, PrefixIndex
from ._encoder import add_encoder_arguments, encoder_of
from ._pods import add_arguments, add_cluster_arguments, followed_fleet
from ._terminal import CommandError, add_command, positive, seconds
from .demo import BLOCK_SIZE

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "epp",
        help="an endpoint picker for Envoy and the Gateway API Inference Extension",
        description="Follow pods and pick the endpoint of each request of a gateway, by Envoy's external processing "
        "(ext_proc) over gRPC: the endpoint picker protocol of the Gateway API Inference Extension.",
        status="0 if a signal ended it",
        lines=[
            "kvindex epp --pods pods.yaml --port 9002 --tokenizer model/tokenizer.json "
            "--chat-template model/chat_template.jinja",
            "kvindex epp --kubernetes --namespace default --tokenize-url http://vllm:8000",
        ],
    )
    add_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--block-size", type=positive, default=BLOCK_SIZE, metavar="TOKENS",
                        help="block size; engines' must be multiples of it (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-bytes", type=positive, metavar="N", help="limit of the index's memory (default: none)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=9002, metavar="N",
                        help="port, 0 for any free one (default %(default)s)")  # fmt: skip
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate chain; without it, gRPC is in plain text")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    parser.add_argument("--fallbacks", type=int, default=2, metavar="N",
                        help="fallback endpoints after the picked one (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-in-flight", type=positive, metavar="N",
                        help="limit of requests at a pod; 429 if all pods have reached it (default: none)")  # fmt: skip
    parser.add_argument("--speculative-ttl", type=seconds, default=2.0, metavar="SECONDS",
                        help="the time for which a sent prompt counts as held (default %(default)g)")  # fmt: skip
    parser.add_argument("--max-body", type=positive, default=16 << 20, metavar="BYTES",
                        help="limit of a request's body (default %(default)s)")  # fmt: skip
    parser.add_argument("--wait", type=seconds, default=30.0, metavar="SECONDS",
                        help="longest wait for the pods' histories until ready (default %(default)g)")  # fmt: skip
    add_encoder_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from ..integrations.envoy import EndpointPickerService
    except ImportError as error:
        raise CommandError(str(error)) from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    encoder = encoder_of(args)
    with ExitStack() as stack:
        index = PrefixIndex(args.block_size, max_bytes=args.max_bytes)
        manager = stack.enter_context(EventManager(index))
        stack.enter_context(followed_fleet(manager, args))
        service = EndpointPickerService(
            index, manager, encoder=encoder, fallbacks=args.fallbacks, max_in_flight=args.max_in_flight,
            max_body=args.max_body, speculative_ttl=args.speculative_ttl,
        )  # fmt: skip
        asyncio.run(_serve(service, manager, args))
    return 0


async def _serve(service: Any, manager: EventManager, args: argparse.Namespace) -> None:
    import grpc

    credentials = None
    if args.ssl_certfile is not None:
        with open(args.ssl_certfile, "rb") as chain, open(args.ssl_keyfile or args.ssl_certfile, "rb") as key:
            credentials = grpc.ssl_server_credentials([(key.read(), chain.read())])
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        server, port = await service.serve(f"{args.host}:{args.port}", credentials)
    except RuntimeError as error:
        raise CommandError(f"{args.host}:{args.port}: {error}") from None
    print(f"kvindex epp: {args.host}:{port}", flush=True)

    async def announce() -> None:
        await asyncio.to_thread(manager.wait_until_current, args.wait)
        if not ended.is_set():
            await service.ready()

    announced = asyncio.create_task(announce())
    await ended.wait()
    await service.ready(False)
    await server.stop(5.0)
    # Ends wait_until_current() in its thread.
    manager.close()
    await announced

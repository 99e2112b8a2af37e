"""The pod options of the commands that follow live streams."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from .. import PodSource, StreamError
from ..discovery import PodFile, read_pods
from ._probe import what_answers
from ._terminal import CommandError, positive

__all__ = ["add_arguments", "add_cluster_arguments", "followed", "followed_fleet", "one_source", "sources"]

# Seconds: the timeout of a probe.
PROBE = 2.0

POD = (
    "[NAME=]tcp://HOST:PORT[,REPLAY][,model=NAME][,engine=vllm], where REPLAY is an endpoint or a port of the same "
    "host; or the URL of a vLLM or SGLang server, http://HOST:PORT, which names its own endpoints"
)


def add_arguments(parser: argparse.ArgumentParser, *, several: bool = True) -> None:
    """Add the arguments that name pods, and the options for facts that the pods' events do not contain."""
    if several:
        parser.add_argument("pods", nargs="*", metavar="POD", help=POD)
        parser.add_argument("--pods", dest="file", metavar="FILE", help="YAML or JSON file of pods")
    else:
        parser.add_argument("pods", nargs="?", metavar="POD", help=f"{POD}; or a name from the --pods file")
        parser.add_argument("--pods", dest="file", metavar="FILE", help="YAML or JSON file of pods")
    parser.add_argument(
        "--replay",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="replay endpoint or port of the first POD without one",
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        default=1,
        metavar="N",
        help="data-parallel ranks of each POD, on consecutive ports (default 1, or as its server reports)",
    )
    parser.add_argument(
        "--server-key",
        metavar="KEY",
        help="CURVE public key of each POD's publisher, 40 characters: accept no other",
    )
    parser.add_argument("--model", help="model of each POD without one (default: as its server reports, else none)")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select pods of a Kubernetes cluster, for :func:`followed_fleet`."""
    parser.add_argument("--kubernetes", metavar="SELECTOR", nargs="?", const="",
                        help="follow pods of the cluster, by label (default: kvindex.discovery's)")  # fmt: skip
    parser.add_argument("--namespace", help="with --kubernetes: the namespace (default: every one)")


def sources(args: argparse.Namespace) -> list[PodSource]:
    """The pods that the command line names. Asks servers over HTTP, and raises a KVIndexError with the cause."""
    return _different(_named(args) + (list(read_pods(args.file).values()) if getattr(args, "file", None) else []))


def one_source(args: argparse.Namespace) -> PodSource:
    """The only pod that the command line names, by its endpoints or by its name in the file.

    Raises the same errors as :func:`sources`.
    """
    args.pods = [args.pods] if args.pods else []
    if args.file and len(args.pods) == 1 and "://" not in args.pods[0]:
        listed = read_pods(args.file)
        if args.pods[0] not in listed:
            raise CommandError(f"{args.file} has no pod {args.pods[0]!r}; its pods are {', '.join(listed) or 'none'}")
        return listed[args.pods[0]]
    found = sources(args)
    if len(found) > 1:
        raise CommandError(f"one POD at a time, not {', '.join(source.name for source in found)}: name one")
    return found[0]


@contextmanager
def followed(manager: Any, args: argparse.Namespace) -> Iterator[None]:
    """Follow the pods that the command line names, and those of its file as the file changes."""
    if not args.file:
        for source in sources(args):
            manager.add_pod(source)
        yield
        return
    for source in _named(args):
        manager.add_pod(source)
    with PodFile(manager, args.file):
        yield


@contextmanager
def followed_fleet(manager: Any, args: argparse.Namespace) -> Iterator[None]:
    """Follow the pods that the command line names, if it names any, and those of the cluster."""
    with ExitStack() as stack:
        if args.pods or args.file or args.replay:
            stack.enter_context(followed(manager, args))
        if args.kubernetes is not None:
            from ..discovery import KubernetesPods

            selector = {"selector": args.kubernetes} if args.kubernetes else {}
            stack.enter_context(KubernetesPods(manager, namespace=args.namespace, **selector))
        yield


def _named(args: argparse.Namespace) -> list[PodSource]:
    answers = list(args.replay)
    found = [_source(text, args, answers) for text in args.pods]
    if answers:
        raise CommandError(f"--replay {answers[0]}: no POD without a replay endpoint is left for it")
    return found


def _different(found: list[PodSource]) -> list[PodSource]:
    if not found:
        raise CommandError("no pods: name them as NAME=tcp://HOST:PORT,REPLAY_PORT")
    names = [source.name for source in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CommandError(f"pod {twice[0]!r} is named twice; give each a name of its own, as NAME=ENDPOINT")
    return found


def _source(text: str, args: argparse.Namespace, answers: list[str]) -> PodSource:
    if text.startswith(("http://", "https://")) and "://" not in text.partition("://")[2]:
        key = getattr(args, "api_key", None)
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        return _ask(text, model=args.model, server_key=args.server_key, headers=headers)
    if answers and "," not in text:
        text = f"{text},{answers.pop(0)}"
    return PodSource.from_string(text, model=args.model or "", dp_size=args.ranks, server_key=args.server_key)


def _ask(url: str, **options: Any) -> PodSource:
    try:
        return PodSource.from_vllm(url, **options)
    except StreamError as as_vllm:
        if not isinstance(as_vllm.__cause__, HTTPError) and (cause := _no_server(url)):
            raise CommandError(cause) from None
        try:
            return PodSource.from_sglang(url, **options)
        except StreamError as as_sglang:
            raise CommandError(f"asked as vLLM: {as_vllm}; asked as SGLang: {as_sglang}") from None


def _no_server(url: str) -> str:
    """The reason why there is no HTTP server at a URL; empty where there may be one."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    found = what_answers(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), PROBE)
    known = {
        "refused": f"nothing listens at {url}",
        "no answer": f"{url} does not answer: a wrong address, or a firewall",
        "unknown host": f"the host name {parts.hostname!r} cannot be resolved",
        **dict.fromkeys(("HTTP", "silence", "something else"), ""),
    }
    return known.get(found, f"{url} is a ZMQ {found} socket of events: give the URL of the engine's HTTP server")

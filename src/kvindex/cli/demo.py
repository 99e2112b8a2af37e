"""``kvindex demo``: a simulated fleet serves conversations, and the index that its events flow into routes them."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..sim.engine import Engine
from ..sim.fleet import Fleet, Pod, PrefixAware, RoundRobin
from ..sim.wire import WireForm, wire_form
from ..sim.workload import chat
from ._terminal import CommandError, console, percentiles
from ._timed import TimedIndex

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_parser"]

BLOCK_SIZE = 16

# One of each kind of stream that is in the field, so that the table shows a fleet in the middle of an upgrade.
FORMS: tuple[WireForm, ...] = (
    wire_form("vllm-0.33.0", "bytes32"),
    wire_form("vllm-0.33.0"),
    wire_form("vllm-0.24.0"),
    wire_form("vllm-0.22.0"),
    wire_form("sglang-0.5.22"),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="a simulated fleet, live",
        description="Simulated pods serve conversations of many turns; their events flow into the index, by which the "
        "prompts are routed. Every answer is compared with the engines' own. Exit status 1 on any difference.",
    )
    parser.add_argument("--pods", type=int, default=8, metavar="N", help="pods in the fleet (%(default)s)")
    parser.add_argument("--conversations", type=int, default=300, metavar="N", help="to be served (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="to spread them over, at least (%(default)s)")
    parser.add_argument("--blocks-per-pod", type=int, default=3000, metavar="N", help="KV cache of a pod (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.set_defaults(run=run)


class Demo:
    """Two fleets that serve the same conversations: one is routed by the index, the other in turn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.index = TimedIndex(BLOCK_SIZE)
        self.route = PrefixAware(self.index)
        self.turn = RoundRobin()
        self.routed = Fleet(pods(args.pods, args.blocks_per_pod), self.index.publish)
        self.plain = Fleet(pods(args.pods, args.blocks_per_pod), lambda pod, rank, payload: None)
        # Load grows with the fleet. Two in eight conversations ask for an adapter, and three tenants have a salt.
        self.arrivals = chat(
            conversations=args.conversations,
            turns=8,
            rate=args.pods / 2,
            adapters=(None, None, None, "adapter-a"),
            salts=(None, None, None, "tenant-a", "tenant-b"),
            seed=args.seed,
        )
        self.seconds = args.seconds
        self.number = 0

    def serve(self) -> Iterator[None]:
        """Serve everything by both fleets, spread over the time asked for; stops after each request to be looked at."""
        start = time.monotonic()
        for arrival in self.arrivals:
            self.number += 1
            self.routed.advance(arrival.at)
            self.index.check(self.routed, arrival.prompt)
            self.routed.serve(arrival, self.route)
            self.plain.serve(arrival, self.turn)
            yield
            ahead = start + self.number * self.seconds / len(self.arrivals) - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
        self.routed.finish()
        self.plain.finish()

    @property
    def held(self) -> int:
        return sum(self.index.held(pod.name) for pod in self.routed.pods)


def run(args: argparse.Namespace) -> int:
    if min(args.pods, args.conversations, args.blocks_per_pod) < 1:
        raise CommandError("--pods, --conversations and --blocks-per-pod must be at least 1")
    out = console()
    demo = Demo(args)
    if out.is_terminal:
        show_live(out, demo)
    else:
        show_lines(out, demo)
    return summary(out, demo)


def pods(count: int, blocks: int) -> list[Pod]:
    made = []
    for number in range(count):
        name, form = f"pod-{number}", FORMS[number % len(FORMS)]
        # The older engines here hash with a seed of their own, as every vLLM process did before 0.29.
        seed = name.encode() if form.name in ("vllm-0.22.0", "vllm-0.24.0") else b""
        made.append(Pod(name, form, {0: Engine(blocks, BLOCK_SIZE, flavor=form.engine, hash_seed=seed)}))
    return made


def show_live(out: Console, demo: Demo) -> None:
    from rich.live import Live

    with Live(console=out, auto_refresh=False) as live:
        due = 0.0
        for _ in demo.serve():
            if time.monotonic() >= due:
                live.update(table(demo), refresh=True)
                due = time.monotonic() + 0.2
        live.update(table(demo), refresh=True)


def show_lines(out: Console, demo: Demo) -> None:
    """Where nothing can be drawn over: a line every two seconds, and the table once at the end."""
    due = 0.0
    for _ in demo.serve():
        if time.monotonic() >= due:
            p50, p99, _top = percentiles(demo.index.match_seconds)
            out.print(
                f"{demo.number:>6,} requests, {demo.held:>7,} blocks, hit rate {demo.routed.hit_rate:6.1%} "
                f"(round-robin {demo.plain.hit_rate:6.1%}), match p50 {p50} µs, p99 {p99} µs"
            )
            due = time.monotonic() + 2
    out.print(table(demo))


def rates(fleet: Fleet) -> dict[str, float]:
    """The hit rate of each pod."""
    prompts: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for served in fleet.served:
        prompts[served.pod] += served.prompt_tokens
        hits[served.pod] += served.hit_tokens
    return {pod.name: hits[pod.name] / max(1, prompts[pod.name]) for pod in fleet.pods}


def table(demo: Demo) -> Table:
    from rich.table import Table

    title = f"kvindex demo: {demo.number:,} of {len(demo.arrivals):,} requests"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for column in ("pod", "speaks", "hashes", "state"):
        shown.add_column(column)
    for column in ("requests", "blocks held", "hit rate", "round-robin"):
        shown.add_column(column, justify="right")
    requests = Counter(served.pod for served in demo.routed.served)
    routed, plain = rates(demo.routed), rates(demo.plain)
    for pod in demo.routed.pods:
        state = demo.index.state(pod.name)
        blocks = f"{demo.index.held(pod.name):,}"
        hit, other = f"{routed[pod.name]:.1%}", f"{plain[pod.name]:.1%}"
        shown.add_row(pod.name, pod.form.name, pod.form.hashes, state, f"{requests[pod.name]:,}", blocks, hit, other)
    shown.add_section()
    hit, other = f"{demo.routed.hit_rate:.1%}", f"{demo.plain.hit_rate:.1%}"
    shown.add_row("all", "", "", "", f"{len(demo.routed.served):,}", f"{demo.held:,}", hit, other)
    index = demo.index
    p50, p99, top = percentiles(index.match_seconds)
    rate = index.hashes / index.ingest_seconds if index.ingest_seconds else 0.0
    shown.caption = (
        f"match call: p50 {p50} µs, p99 {p99} µs, max {top} µs\n"
        f"ingest: {index.batches:,} batches, {index.hashes:,} blocks stored or removed, {rate:,.0f}/s\n"
        f"answers equal to the engines': {index.answers - index.differences:,} of {index.answers:,}"
    )
    return shown


def summary(out: Console, demo: Demo) -> int:
    index = demo.index
    out.print()
    for name, fleet in (("round-robin", demo.plain), ("prefix-aware", demo.routed)):
        saved = f"{fleet.hit_tokens:>10,} of {fleet.prompt_tokens:,} prompt tokens not computed again"
        out.print(f"{name + ' routing':<21} hit rate {fleet.hit_rate:6.1%}, {saved}")
    out.print(f"prefill tokens saved  {demo.routed.hit_tokens - demo.plain.hit_tokens:,} more than by round-robin")
    p50, p99, top = percentiles(index.match_seconds)
    out.print(f"match call            p50 {p50} µs, p99 {p99} µs, max {top} µs")
    right = index.answers - index.differences
    style = "bold red" if index.differences else "bold green"
    out.print(f"answers equal to the engines': {right:,} of {index.answers:,}", style=style)
    for wrong in index.wrong:
        out.print(f"  {wrong}", style="red", markup=False)
    return 1 if index.differences else 0

"""``kvindex replay``: compare a recorded stream with the engine's own numbers, or a trace under three routings."""

from __future__ import annotations

import argparse
import gzip
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import CaptureError, EventDecodeError, PrefixIndex
from ..answers import ENGINES
from ..capture import Forget, Message, Query, read_capture
from ..sim.engine import Engine
from ..sim.fleet import Fleet, Pod, PrefixAware, RandomChoice, RoundRobin, Route
from ..sim.wire import wire_form
from ..sim.workload import MOONCAKE_BLOCK, Arrival, endless_hit_rate, mooncake
from ._terminal import CommandError, add_command, console, counted, missing, percentiles, positive
from ._timed import SHOWN_DIFFERENCES, TimedIndex

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "replay",
        help="compare a capture with the engine's own numbers, or a trace under three routings",
        description="Replay captures of event streams and compare every answer with the engine's own number, or serve "
        "traces in Mooncake's format by a simulated fleet under three routings.",
        status="0 if every answer was equal, 1 on any difference",
        lines=[
            "kvindex replay tests/samples/vllm-0.33.0-full-attention.msgpack.gz",
            "kvindex replay trace.jsonl.gz --pods 8 --limit 2000 --plot hit-rates.png",
        ],
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="capture, or trace of JSON lines, plain or gzip")
    trace = parser.add_argument_group("traces only")
    trace.add_argument("--pods", type=positive, default=8, metavar="N", help="pods in the fleet (default %(default)s)")
    trace.add_argument("--limit", type=positive, metavar="N", help="only the first N requests")
    trace.add_argument("--seed", type=int, default=0, metavar="N",
                       help="seed of the random routing and the tokens (default %(default)s)")  # fmt: skip
    trace.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                       help="block size of the engines (default %(default)s)")  # fmt: skip
    # An 8B model with grouped-query attention leaves room for 32,768 blocks of 16 on one 80 GB GPU.
    trace.add_argument(
        "--blocks-per-pod",
        type=positive,
        default=32_768,
        metavar="N",
        help="blocks in the KV cache of each pod (default %(default)s)",
    )
    trace.add_argument("--plot", metavar="FILE.png", help="draw the hit rates over time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = console()
    traces = [path for path in args.files if is_trace(path)]
    if args.plot is not None:
        if len(traces) != 1:
            raise CommandError(f"--plot draws one trace, and {len(traces)} are given")
        figure()  # Fails before minutes of work without matplotlib.
    differences = 0
    shown: list[str] = []
    broken: list[CaptureError] = []
    for path in args.files:
        if path in traces:
            served = serve_trace(path, args, out)
            out.print(trace_table(served))
            if args.plot is not None:
                draw(served, args.plot)
                out.print(f"hit rates over time: {args.plot}", markup=False)
            differences += served.index.differences
            shown += [f"{served.name}: {wrong}" for wrong in served.index.wrong]
        else:
            replayed = replay_capture(path, out)
            out.print(capture_table(replayed))
            if not replayed.error and not any(figures.answers for figures in replayed.pods.values()):
                told = (
                    f"{os.path.basename(path)} has no engine's answers: its batches were applied, nothing was compared"
                )
                out.print(told, markup=False, soft_wrap=True)
            differences += len(replayed.differences)
            shown += replayed.differences
            broken += [replayed.error] if replayed.error is not None else []
    if differences:
        told = counted(differences, "difference")
        out.print(f"{told} from the engines' own numbers, the first:", style="bold red")
        for line in shown[:SHOWN_DIFFERENCES]:
            out.print(f"  {line}", markup=False)
    for error in broken:
        out.print(str(error), style="bold red", markup=False)
    return 1 if differences else 2 if broken else 0


def is_trace(path: str) -> bool:
    """Whether a file is a trace and not a capture, by its content: users choose names and endings freely."""
    with open(path, "rb") as file:
        start = file.read(2)
    opener: Any = gzip.open if start == b"\x1f\x8b" else open
    try:
        with opener(path, "rb") as stream:
            text = stream.read(64).lstrip()
    except (OSError, EOFError, zlib.error):
        # Damaged from the start: the reader of captures has the best error message for it.
        return False
    return bool(text[:1] == b"{")


# A capture


@dataclass
class PodFigures:
    """The figures of one pod in a capture."""

    batches: int = 0
    hashes: int = 0
    ingest_seconds: float = 0.0
    held: int = 0
    state: str = ""
    answers: int = 0
    differences: int = 0
    match_seconds: list[float] = field(default_factory=list)


@dataclass
class Replayed:
    """One capture after its replay."""

    title: str
    pods: dict[str, PodFigures] = field(default_factory=dict)
    prompts: int = 0
    match_seconds: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    error: CaptureError | None = None


def replay_capture(path: str, out: Console) -> Replayed:
    """Apply every batch of a capture to a new index, and ask it every query at its place in the recording."""
    name = os.path.basename(path)
    with open(path, "rb") as file, progress(out, name, os.path.getsize(path), "bytes") as bar:
        records = read_capture(file)
        header = next(records)
        assert isinstance(header, dict)
        index = PrefixIndex(block_size=header["block_size"])
        model = header.get("model") or ""
        # For an engine with unknown rules, the recorded answers are compared with the held tokens.
        engine = header["engine"] if header.get("engine") in ENGINES else None
        title = " ".join(str(header[key]) for key in ("engine", "version") if header.get(key))
        done = Replayed(f"{name} ({title or 'unknown engine'}, block size {header['block_size']})")
        done.pods = {pod: PodFigures() for pod in header.get("pods") or ()}
        try:
            for record in records:
                if isinstance(record, Message):
                    ingest(index, model, record, engine, done)
                elif isinstance(record, Forget):
                    index.clear_worker(record.pod, record.rank)
                elif isinstance(record, Query):
                    ask(index, model, record, name, done)
                bar.update(bar.task_ids[0], completed=file.tell())
        except CaptureError as error:
            done.error = error
    for pod, figures in done.pods.items():
        if figures.batches:
            figures.held = sum(worker["blocks"] for worker in index.worker_stats(pod).values())
            figures.state = index.pod_state(pod)
    return done


def ingest(index: PrefixIndex, model: str, message: Message, engine: Any, done: Replayed) -> None:
    figures = done.pods.setdefault(message.pod, PodFigures())
    if not figures.batches:
        index.configure_pod(message.pod, engine=engine)
    figures.batches += 1
    start = time.perf_counter()
    try:
        report = index.ingest(message.pod, message.payload, model=model, dp_rank=message.rank)
    except EventDecodeError:
        done.reasons["undecodable_batch"] += 1
        return
    figures.ingest_seconds += time.perf_counter() - start
    figures.hashes += report.stored + report.removed + report.parked
    done.reasons.update(report.reasons)


def ask(index: PrefixIndex, model: str, query: Query, name: str, done: Replayed) -> None:
    lora = query.lora_name
    if lora is None and query.lora_id:
        lora = str(query.lora_id)
    asked: dict[str, Any] = {
        "model": model,
        "lora_name": lora,
        "cache_salt": query.cache_salt,
        "extra_keys": query.extra_keys,
    }
    start = time.perf_counter()
    match = index.match_prefix(query.tokens, **asked)
    done.match_seconds.append(time.perf_counter() - start)
    done.prompts += 1
    for pod, expected in query.hits.items():
        figures = done.pods.setdefault(pod, PodFigures())
        ready = index.pod_set([pod])
        start = time.perf_counter()
        alone = index.match_prefix(query.tokens, ready_pods=ready, **asked)
        figures.match_seconds.append(time.perf_counter() - start)
        figures.answers += 1
        # A pod's answer must be the same alone and among all pods. Either may be the difference.
        wrong = [got for got in (match.tokens.get(pod, 0), alone.tokens.get(pod, 0)) if got != expected]
        if wrong:
            figures.differences += 1
            told = f"expected {expected} tokens, got {wrong[0]}"
            done.differences.append(f"{name}: query {query.id}, pod {pod}: {told}")


def capture_table(done: Replayed) -> Table:
    table = titled(done.title)
    table.add_column("pod")
    table.add_column("state")
    columns = ("batches", "blocks held", "answers", "differences", "ingest\nblocks/s", "match µs\np50", "p99", "max")
    for column in columns:
        table.add_column(column, justify="right")
    for pod, figures in done.pods.items():
        add_row(table, pod, figures)
    every = done.pods.values()
    total = PodFigures(
        batches=sum(pod.batches for pod in every),
        hashes=sum(pod.hashes for pod in every),
        ingest_seconds=sum(pod.ingest_seconds for pod in every),
        held=sum(pod.held for pod in every),
        answers=sum(pod.answers for pod in every),
        differences=sum(pod.differences for pod in every),
        match_seconds=done.match_seconds,
    )
    table.add_section()
    add_row(table, "all", total)
    skipped = ", ".join(f"{reason} {count}" for reason, count in sorted(done.reasons.items()))
    table.caption = (
        f"{counted(done.prompts, 'prompt')}. The match times of a pod are of the call with that pod alone in "
        "ready_pods,\n"
        f"those of all are of the call that a router makes. Events not applied: {skipped or 'none'}."
    )
    return table


def add_row(table: Table, name: str, figures: PodFigures) -> None:
    rate = f"{figures.hashes / figures.ingest_seconds:,.0f}" if figures.ingest_seconds else "-"
    table.add_row(
        name,
        figures.state,
        f"{figures.batches:,}",
        f"{figures.held:,}",
        f"{figures.answers:,}",
        f"[red]{figures.differences:,}[/]" if figures.differences else "0",
        rate,
        *percentiles(figures.match_seconds),
    )


# A trace


@dataclass
class ServedTrace:
    """One trace after three fleets have served it."""

    name: str
    fleets: dict[str, Fleet]
    index: TimedIndex
    requests: int = 0
    endless: float = 0.0


def serve_trace(path: str, args: argparse.Namespace, out: Console) -> ServedTrace:
    """Serve a trace with three fleets at once, so each prompt is made and hashed once and then freed."""
    name = os.path.basename(path)
    routed = pods(args)
    index = TimedIndex(args.block_size, routed)
    routes: dict[str, Route] = {
        "round-robin": RoundRobin(),
        "random": RandomChoice(args.seed),
        "prefix-aware": PrefixAware(index),
    }
    fleets = {routing: Fleet(pods(args), lambda pod, rank, payload: None) for routing in ("round-robin", "random")}
    fleets["prefix-aware"] = Fleet(routed, index.publish)
    done = ServedTrace(name, fleets, index)

    def served(bar: Progress) -> Iterator[Arrival]:
        for arrival in mooncake(path, limit=args.limit, seed=args.seed):
            for routing, fleet in fleets.items():
                fleet.advance(arrival.at)
                if routing == "prefix-aware":
                    index.check(fleet, arrival.prompt)
                fleet.serve(arrival, routes[routing])
            done.requests += 1
            bar.update(bar.task_ids[0], advance=1)
            yield arrival

    with progress(out, name, args.limit, "requests") as bar:
        done.endless = endless_hit_rate(served(bar), MOONCAKE_BLOCK)
    if not done.requests:
        raise CommandError(f"{path} has no request in it")
    for fleet in fleets.values():
        fleet.finish()
    return done


def pods(args: argparse.Namespace) -> list[Pod]:
    form = wire_form("vllm-0.33.0")
    names = [f"pod-{number}" for number in range(args.pods)]
    return [Pod(name, form, {0: Engine(args.blocks_per_pod, args.block_size)}) for name in names]


def trace_table(done: ServedTrace) -> Table:
    some = next(iter(done.fleets.values()))
    engine = some.pods[0].ranks[0]
    cache = f"{counted(engine.num_blocks, 'block')} of {engine.block_size} tokens"
    pods = f"{counted(len(some.pods), 'pod')} of {cache} each"
    table = titled(f"{done.name}: {counted(done.requests, 'request')}, {pods}")
    table.add_column("routing")
    for column in ("prompt tokens", "hit rate", "prefill tokens saved", "of what is possible", "busiest pod"):
        table.add_column(column, justify="right")
    for routing, fleet in done.fleets.items():
        shares = Counter[str]()
        for served in fleet.served:
            shares[served.pod] += served.prompt_tokens
        table.add_row(
            routing,
            f"{fleet.prompt_tokens:,}",
            f"{fleet.hit_rate:.1%}",
            f"{fleet.hit_tokens:,}",
            f"{fleet.hit_rate / done.endless:.0%}" if done.endless else "-",
            f"{max(shares.values()) / fleet.prompt_tokens:.1%}",
        )
    index = done.index
    p50, p99, top = percentiles(index.match_seconds)
    rate = index.hashes / index.ingest_seconds if index.ingest_seconds else 0.0
    table.caption = (
        f"possible: {done.endless:.1%} by one endless cache, in whole blocks of {MOONCAKE_BLOCK} tokens\n"
        f"match call: p50 {p50} µs, p99 {p99} µs, max {top} µs; ingest: {rate:,.0f} blocks/s\n"
        f"answers equal to the engines': {index.answers - index.differences:,} of {index.answers:,}"
    )
    return table


def figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib") from None
    return Figure(figsize=(9, 5), layout="constrained")


def draw(done: ServedTrace, path: str) -> None:
    plot = figure()
    axes = plot.subplots()
    for routing, fleet in done.fleets.items():
        seconds, hit_rates = fleet.history()
        axes.plot(seconds / 60, hit_rates * 100, label=f"{routing}: {fleet.hit_rate:.1%}")
    axes.axhline(done.endless * 100, color="grey", linestyle=":", label=f"one endless cache: {done.endless:.1%}")
    axes.set(title=done.name, xlabel="minutes of the trace", ylabel="prompt tokens reused so far, %", ylim=(0, None))
    axes.legend()
    try:
        plot.savefig(path, dpi=120)
    except ValueError as error:
        # matplotlib has no writer for the file's ending.
        raise CommandError(f"{path}: {error}") from None


# The display of both


def titled(title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    return Table(title=escape(title), title_justify="left", title_style="bold", caption_justify="left")


def progress(out: Console, name: str, total: int | None, unit: str) -> Progress:
    """A progress bar over bytes or requests, on a terminal only. It disappears at the end."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn())
    bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
    bar.add_task(name, total=total)
    return bar

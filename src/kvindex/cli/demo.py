"""``kvindex demo``: simulated pods in processes of their own, their live streams, and a router that uses the index."""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .. import EventManager, PodSource, PrefixMatch
from ..sim.engine import Engine, Prompt
from ..sim.fleet import PrefixAware, RoundRobin, adapter_name
from ..sim.process import SimConfig, SimProcess
from ..sim.wire import WireForm, wire_form
from ..sim.workload import Arrival, chat
from ._terminal import CommandError, add_command, console, counted, percentiles
from ._timed import SHOWN_DIFFERENCES, TimedIndex

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_parser"]

BLOCK_SIZE = 16
BLOCKS_PER_POD = 3000
MODEL = "sim"

# One of each kind of stream in production, so the table shows a fleet in the middle of an upgrade.
FORMS: tuple[WireForm, ...] = (
    wire_form("vllm-0.33.0", "bytes32"),
    wire_form("vllm-0.33.0"),
    wire_form("vllm-0.24.0"),
    wire_form("vllm-0.22.0"),
    wire_form("sglang-0.5.22"),
)

# The load of a pod counts its part of so many last requests.
RECENT = 100

# All pods are asked for their own answers once in so many requests. The pod that serves a request always reports it.
ASK_ALL_EVERY = 10
# So many of the last prompts are compared with all pods at the end, when every pod is exact again.
LAST_PROMPTS = 25

# Seconds: the time until the killed pod starts again, and the timeout of every wait.
AWAY = 2.0
PATIENCE = 60.0


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        help="route prompts over a simulated fleet and check every answer",
        description="Start simulated pods that publish their events over TCP, follow them with an EventManager, and "
        "route conversations of many turns by the index. One pod is killed and started again. Every answer is compared "
        "with the pod's own cache.",
        status="0 if every answer was equal, 1 on any difference",
        lines=["kvindex demo", "kvindex demo --pods 16 --seconds 60"],
    )
    parser.add_argument("--pods", type=int, default=8, metavar="N", help="pods in the fleet (default %(default)s)")
    parser.add_argument(
        "--conversations", type=int, default=150, metavar="N", help="conversations to serve (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, metavar="N",
                        help="least seconds to spread them over (default %(default)g)")  # fmt: skip
    parser.add_argument("--blocks-per-pod", type=int, default=BLOCKS_PER_POD, metavar="N",
                        help="blocks in the KV cache of a pod (default %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the workload (default %(default)s)")
    parser.set_defaults(run=run)


class Pod:
    """One pod: the process that serves the index's router, and a twin for the comparison with round-robin.

    The twin needs no publisher, so it is only an engine in this process.
    """

    def __init__(self, number: int, blocks: int) -> None:
        self.name = f"pod-{number}"
        self.form = FORMS[number % len(FORMS)]
        # The older engines here have a hash seed of their own, as every vLLM process had before 0.29.
        seed = self.name if self.form.name in ("vllm-0.22.0", "vllm-0.24.0") else ""
        self.config = SimConfig(
            name=self.name, model=MODEL, form=self.form.name, hashes=self.form.hashes, blocks=blocks,
            block_size=BLOCK_SIZE, hash_seed=seed,
        )  # fmt: skip
        self.twin = self.engine()
        self.process: SimProcess | None = None
        self.up = False
        self.seq = 0  # the sequence number of its next batch
        self.load = 0  # tokens of the last requests: with it the router also sends requests to an empty pod
        self.served = 0

    def engine(self) -> Engine:
        config = self.config
        return Engine(
            config.blocks, config.block_size, flavor=self.form.engine, hash_seed=config.hash_seed.encode()
        )  # fmt: skip

    def lora_name(self, prompt: Prompt) -> str | None:
        return adapter_name(self.form, prompt)

    def start(self) -> SimProcess:
        """Start the process, or start it again at its ports. Runs in other threads too, so it changes nothing else."""
        if self.process is None:
            return SimProcess(self.config)
        self.process.launch()
        return self.process

    def greet(self) -> None:
        """Mark the started process as ready for requests."""
        assert self.process is not None
        self.seq = self.process.seqs()[0]
        self.up = True

    def kill(self) -> None:
        assert self.process is not None
        self.up = False
        self.process.kill()

    def source(self) -> PodSource:
        assert self.process is not None
        return PodSource(
            self.name, ranks=self.process.ranks, model=MODEL, block_size=BLOCK_SIZE, **self.process.options
        )  # fmt: skip

    def serve(self, arrival: Arrival) -> int:
        """Serve one request to its end, and return the number of its tokens that were cached already."""
        prompt = arrival.prompt
        assert self.process is not None
        reply = self.process.serve(
            prompt.tokens, arrival.output, lora_name=prompt.lora_name, lora_id=prompt.lora_id,
            cache_salt=prompt.cache_salt,
        )  # fmt: skip
        self.seq = reply["seqs"][0]
        self.served += len(prompt)
        hit: int = reply["hit"]
        return hit

    def serve_twin(self, arrival: Arrival) -> int:
        request = self.twin.start(arrival.prompt)
        if request is None:
            raise CommandError(
                f"a prompt of {len(arrival.prompt)} tokens does not fit into {self.config.blocks} blocks"
            )
        self.twin.decode(request, arrival.output)
        self.twin.finish(request)
        self.twin.take_events()
        return request.hit


class Fleet:
    """The pods' processes, as a context manager that starts and ends all of them."""

    def __init__(self, pods: Sequence[Pod]) -> None:
        self.pods = pods
        self._launcher = ThreadPoolExecutor(len(pods))
        self._relaunch: Future[SimProcess] | None = None

    def __enter__(self) -> Fleet:
        try:
            self._launch_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._relaunch is not None:
            wait([self._relaunch])
        for pod in self.pods:
            if pod.process is not None:
                pod.process.stop()
        self._launcher.shutdown()

    def _launch_all(self) -> None:
        # A start takes most of a second of one core, so all start together.
        started = [(pod, self._launcher.submit(pod.start)) for pod in self.pods]
        try:
            wait([future for _, future in started])
        finally:
            # Also after a Ctrl-C: every process that did start has to be ended.
            for pod, future in started:
                if not future.cancel() and future.exception() is None:
                    pod.process = future.result()
        for pod, future in started:
            future.result()
            pod.greet()

    def start_again(self, pod: Pod) -> Future[SimProcess]:
        """Start a killed pod again at its ports, in another thread. For one pod at a time."""
        self._relaunch = self._launcher.submit(pod.start)
        return self._relaunch


class Trusted:
    """The index for the router, without the stale pods, which may have lost their blocks."""

    def __init__(self, index: TimedIndex) -> None:
        self._index = index

    def match_prefix(self, tokens: Any, **asked: Any) -> PrefixMatch:
        return self._index.match_prefix(tokens, only_exact=True, **asked)


class Tally:
    """The reused tokens of one routing policy, in total and by pod."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.hit_tokens: Counter[str] = Counter()

    def add(self, pod: str, prompt: int, hit: int) -> None:
        self.requests[pod] += 1
        self.prompt_tokens[pod] += prompt
        self.hit_tokens[pod] += hit

    def rate(self, pod: str | None = None) -> float:
        if pod is None:
            return self.hit_tokens.total() / max(1, self.prompt_tokens.total())
        return self.hit_tokens[pod] / max(1, self.prompt_tokens[pod])


class Demo:
    """The fleet, its streams, its router and the accident, as a context manager that ends every process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.index = TimedIndex(BLOCK_SIZE)
        self.pods = [Pod(number, args.blocks_per_pod) for number in range(args.pods)]
        self.by_index, self.in_turn = PrefixAware(Trusted(self.index), model=MODEL), RoundRobin()
        self.routed, self.plain = Tally(), Tally()
        # One of four conversations uses an adapter, and two of five a salt.
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
        self.not_asked = 0  # comparisons left out, because the pod was not exact
        self.notes: deque[tuple[float, str]] = deque()
        self._recent: deque[tuple[Pod, int]] = deque()
        self.start = time.monotonic()
        # The accident.
        self.victim = self.pods[len(self.pods) // 3]
        self.victim_restarts = -1
        self.killed_at: float | None = None
        self.stale_at: float | None = None
        self.exact_at: float | None = None
        self._relaunch: Future[SimProcess] | None = None
        self._stack = ExitStack()

    # The fleet

    def __enter__(self) -> Demo:
        try:
            self._fleet = self._stack.enter_context(Fleet(self.pods))
            self.manager = self._stack.enter_context(EventManager(self.index.index))
            for pod in self.pods:
                self.manager.add_pod(pod.source())
            if not self.manager.wait_until_current(PATIENCE):
                raise CommandError(f"the pods were not current after {PATIENCE:.0f} s: {self.manager.status()}")
            self.start = time.monotonic()
            self.manager.on_change(lambda change: self.note(f"{change.pod}: {change.old} -> {change.new}"))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, text: str) -> None:
        self.notes.append((time.monotonic() - self.start, text))

    # Serving

    def serve(self) -> Iterator[None]:
        """Serve all requests with both fleets, spread over ``seconds``. Yields often, for a view of the progress."""
        for arrival in self.arrivals:
            yield from self._wait_for(lambda: any(pod.up for pod in self.pods))
            self.number += 1
            if self.number % ASK_ALL_EVERY == 0:
                self._compare_all(arrival.prompt)
            up = [pod for pod in self.pods if pod.up]
            self._serve_routed(arrival, self.by_index(arrival.prompt, up))
            twin = self.in_turn(arrival.prompt, up)
            self.plain.add(twin.name, len(arrival.prompt), twin.serve_twin(arrival))
            yield from self._wait_for(lambda: True)
            ahead = self.start + self.number * self.seconds / len(self.arrivals) - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
        yield from self._wait_for(lambda: self.exact_at is not None)
        for arrival in self.arrivals[-LAST_PROMPTS:]:
            self._compare_all(arrival.prompt)
        yield

    def _serve_routed(self, arrival: Arrival, pod: Pod) -> None:
        told = self._told(pod, arrival.prompt) if self._caught_up(pod) else None
        hit = pod.serve(arrival)
        self._compare(pod, told, hit)
        self.routed.add(pod.name, len(arrival.prompt), hit)
        self._recent.append((pod, len(arrival.prompt)))
        pod.load += len(arrival.prompt)
        if len(self._recent) > RECENT:
            earlier, tokens = self._recent.popleft()
            earlier.load -= tokens

    def _wait_for(self, ready: Any) -> Iterator[None]:
        until = time.monotonic() + PATIENCE
        self._accident()
        yield
        while not ready():
            if time.monotonic() > until:
                raise CommandError(f"{self.victim.name} was not back after {PATIENCE:.0f} s: {self.manager.status()}")
            time.sleep(0.05)
            self._accident()
            yield

    # The accident

    def _accident(self) -> None:
        """Kill one pod after a third of the requests, start it again after a while, and note when it is exact again."""
        now, victim = time.monotonic(), self.victim
        if self.killed_at is None:
            if self.number * 3 >= len(self.arrivals):
                self.victim_restarts = self.manager.status()[victim.name].restarts
                self.note(f"{victim.name} is killed")
                self.killed_at = now
                victim.kill()
                victim.twin = victim.engine()
        elif self.stale_at is None:
            if self.manager.status()[victim.name].state == "stale":
                self.stale_at = now
        elif self._relaunch is None:
            if now >= self.killed_at + AWAY:
                self._relaunch = self._fleet.start_again(victim)
        elif not victim.up:
            if self._relaunch.done():
                self._relaunch.result()
                victim.greet()
                self.note(f"{victim.name} is started again, with an empty cache")
        elif self.exact_at is None:
            status = self.manager.status()[victim.name]
            if status.state == "exact" and status.restarts > self.victim_restarts:
                self.exact_at = now

    # Comparing

    def _caught_up(self, pod: Pod) -> bool:
        """Whether this pod is exact, after a wait until the index has applied the pod's last batch."""
        until = time.monotonic() + 5.0
        while True:
            worker = self.manager.status()[pod.name].workers[0]
            if not pod.up or worker.state != "exact":
                return False
            if (-1 if worker.last_seq is None else worker.last_seq) == pod.seq - 1:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.0005)

    def _told(self, pod: Pod, prompt: Prompt) -> int:
        # Not timed: the router asks once per prompt, and this is the same prompt again.
        name, salt = pod.lora_name(prompt), prompt.cache_salt
        match = self.index.index.match_prefix(prompt.tokens, model=MODEL, lora_name=name, cache_salt=salt)
        return match.tokens.get(pod.name, 0)

    def _compare(self, pod: Pod, told: int | None, true: int) -> None:
        if told is None or self.manager.status()[pod.name].state != "exact":
            self.not_asked += 1
            return
        self.index.answers += 1
        if told != true:
            self.index.differences += 1
            if len(self.index.wrong) < SHOWN_DIFFERENCES:
                self.index.wrong.append(f"prompt {self.number}, pod {pod.name}: expected {true} tokens, got {told}")

    def _compare_all(self, prompt: Prompt) -> None:
        for pod in self.pods:
            if not self._caught_up(pod):
                self.not_asked += 1
                continue
            assert pod.process is not None
            told = self._told(pod, prompt)
            hits = pod.process.truth(prompt.tokens, lora_name=prompt.lora_name, cache_salt=prompt.cache_salt)
            self._compare(pod, told, hits[0])


def run(args: argparse.Namespace) -> int:
    if min(args.pods, args.conversations, args.blocks_per_pod) < 1:
        raise CommandError("--pods, --conversations and --blocks-per-pod must be at least 1")
    out = console()
    # The table shows the changes of the streams; lines of a log would break it.
    logging.getLogger("kvindex").addHandler(logging.NullHandler())
    out.print(f"starting {counted(args.pods, 'pod')}, each a process that publishes over TCP")
    with Demo(args) as demo:
        if out.is_terminal:
            show_live(out, demo)
        else:
            show_lines(out, demo)
        return summary(out, demo)


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
    """Print a line every two seconds and one for every event, and the table at the end, for output to no terminal."""
    due = time.monotonic() + 2
    for _ in demo.serve():
        while demo.notes:
            at, text = demo.notes.popleft()
            out.print(f"{at:5.1f} s  {text}", markup=False)
        if time.monotonic() >= due:
            p50, p99, _top = percentiles(demo.index.match_seconds)
            held = sum(status.blocks for status in demo.manager.status().values())
            out.print(
                f"{time.monotonic() - demo.start:5.1f} s  {counted(demo.number, 'request')}, {counted(held, 'block')}, "
                f"hit rate {demo.routed.rate():.1%} (round-robin {demo.plain.rate():.1%}), "
                f"match p50 {p50} µs, p99 {p99} µs"
            )
            due = time.monotonic() + 2
    out.print(table(demo))


STYLES = {"exact": "green", "degraded": "yellow", "stale": "bold red"}


def table(demo: Demo) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = f"kvindex demo: {demo.number:,} of {len(demo.arrivals):,} requests"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for column in ("pod", "speaks", "hashes", "state"):
        shown.add_column(column)
    for column in ("lag ms", "requests", "blocks held", "hit rate", "round-robin"):
        shown.add_column(column, justify="right")
    statuses = demo.manager.status()
    for pod in demo.pods:
        name, status = pod.name, statuses[pod.name]
        state = Text(status.state, style=STYLES[status.state])
        lag = "" if status.lag is None else f"{status.lag * 1e3:.1f}"
        shown.add_row(
            name, pod.form.name, pod.form.hashes, state, lag, f"{demo.routed.requests[name]:,}", f"{status.blocks:,}",
            f"{demo.routed.rate(name):.1%}", f"{demo.plain.rate(name):.1%}",
        )  # fmt: skip
    shown.add_section()
    requests, blocks = demo.routed.requests.total(), sum(status.blocks for status in statuses.values())
    hit, other = f"{demo.routed.rate():.1%}", f"{demo.plain.rate():.1%}"
    shown.add_row("all", "", "", "", "", f"{requests:,}", f"{blocks:,}", hit, other)
    p50, p99, top = percentiles(demo.index.match_seconds)
    batches = sum(status.batches for status in statuses.values())
    restarts = sum(status.restarts for status in statuses.values())
    lost = sum(status.lost_batches for status in statuses.values())
    shown.caption = "\n".join(
        [
            f"match call: p50 {p50} µs, p99 {p99} µs, max {top} µs",
            f"streams: {counted(batches, 'batch', 'batches')} applied, {lost:,} lost, "
            f"{counted(restarts, 'restart')} seen",
            f"answers equal to the engines': {demo.index.answers - demo.index.differences:,} of {demo.index.answers:,}",
            *(f"{at:5.1f} s  {text}" for at, text in demo.notes),
        ]
    )
    return shown


def summary(out: Console, demo: Demo) -> int:
    index, routed, plain = demo.index, demo.routed, demo.plain
    out.print()
    for name, tally in (("round-robin", plain), ("prefix-aware", routed)):
        saved = f"{tally.hit_tokens.total():>10,} of {tally.prompt_tokens.total():,} prompt tokens reused"
        out.print(f"{name + ' routing':<21} hit rate {tally.rate():6.1%}, {saved}")
    more = routed.hit_tokens.total() - plain.hit_tokens.total()
    out.print(f"prefill tokens saved  {more:,} more than by round-robin")
    p50, p99, top = percentiles(index.match_seconds)
    out.print(f"match call            p50 {p50} µs, p99 {p99} µs, max {top} µs")
    assert demo.killed_at is not None
    assert demo.exact_at is not None
    out.print(f"{demo.victim.name:<21} killed and started again: exact after {demo.exact_at - demo.killed_at:.1f} s")
    right = index.answers - index.differences
    style = "bold red" if index.differences else "bold green"
    left_out = f" ({demo.not_asked:,} not asked: that pod was stale)" if demo.not_asked else ""
    out.print(f"answers equal to the engines': {right:,} of {index.answers:,}{left_out}", style=style)
    for wrong in index.wrong:
        out.print(f"  {wrong}", style="red", markup=False)
    return 1 if index.differences else 0

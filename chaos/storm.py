"""``python -m chaos storm``: many publishing pods, restarted in any order, and every restart accounted for.

A few processes carry many pods each, every pod with sockets, engine and thread of its own. A restart is either one pod
that closes its sockets and begins again at seq 0 with an empty cache, or a whole process that is killed and started
again where it was. Everybody serves and publishes all the time.

The batches themselves say whether the counters are right. Each carries its time, and so the life of its pod that it is
of; the index notes them in the order in which it was given them. A restart has to be counted wherever that order goes
from one life to a later one, and nowhere else; a life that ended before anything of it was applied is no restart that
could have been seen, and is counted as that.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import gc
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import zmq
from benchmarks.machine import resident
from rich.console import Console
from rich.table import Table

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sim import wire_form
from kvindex.sim.control import Control, ToldProcess, follow_parent
from kvindex.sim.process import SimConfig, SimPod, own_workload, prompt_map
from kvindex.sync.status import StateChange

__all__ = ["add_parser"]

MODEL = "sim"
FORMS = ("vllm-0.33.0", "vllm-0.24.0", "vllm-0.22.0", "sglang-0.5.22")

#: Of the restarts, the share that is a killed process.
KILLED = 0.25
#: Seconds until everything that was begun has to be over.
PATIENCE = 90.0
#: Prompts about which every pod and the index are asked at the end of a round.
PROMPTS = 20
#: What the second round may add to the memory of the first: an allocator's noise, not a leak of 200 restarts.
NOISE = 0.02


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("storm", help="restart many publishing pods in any order, and account for each")
    parser.add_argument("--pods", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="that carry them (%(default)s)")
    parser.add_argument("--restarts", type=int, default=200, metavar="N", help="in each round (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="the later ones for memory (%(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second that a pod serves (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (%(default)s)")
    parser.set_defaults(run=run)


# Inside: a process of several pods.


class Host:
    """Pods in threads of their own, and one socket at which all of them can be told things."""

    def __init__(self, configs: Sequence[SimConfig]) -> None:
        self.pods = [SimPod(config) for config in configs]
        self.stopping = False
        self._threads = [threading.Thread(target=pod.run, daemon=True) for pod in self.pods]
        self._context: zmq.Context[Any] = zmq.Context()
        self._control = Control(self._context, self)
        self._lines = []
        for pod in self.pods:
            line = self._context.socket(zmq.REQ)
            line.connect(pod.ready()["control"])
            self._lines.append(line)

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        print(json.dumps({"control": self._control.endpoint, "pods": [pod.ready() for pod in self.pods]}), flush=True)
        while not self.stopping:
            if self._control.socket.poll(200):
                self._control.answer()

    def _op_tell(self, number: int, question: dict[str, Any]) -> dict[str, Any]:
        self._lines[number].send(msgpack.packb(question))
        reply: dict[str, Any] = msgpack.unpackb(self._lines[number].recv(), strict_map_key=False)
        return reply


def serve(configs: str) -> None:
    host = Host([SimConfig(**config) for config in json.loads(configs)])

    def end() -> None:
        host.stopping = True

    follow_parent(end)
    host.run()


# Outside.


class Pod:
    """One pod: where it is, and when each of its lives has begun."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.name = config.name
        self.process: ToldProcess | None = None
        self.place = 0
        self.lives: list[float] = []

    def ask(self, op: str, **what: Any) -> dict[str, Any]:
        assert self.process is not None
        reply = self.process.ask("tell", number=self.place, question={"op": op, **what})
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}")
        return reply

    def source(self) -> PodSource:
        config = self.config
        return PodSource(
            self.name, endpoint=f"tcp://127.0.0.1:{config.port}", model=MODEL,
            replay_endpoint=f"tcp://127.0.0.1:{config.replay_port}", engine=wire_form(config.form).engine,
        )  # fmt: skip


class NotingIndex(PrefixIndex):
    """An index that notes when each batch was made that it is given, pod by pod."""

    def __new__(cls) -> NotingIndex:
        made = super().__new__(cls)
        made.made_at = defaultdict(list)
        return made

    made_at: dict[str, list[float]]

    def ingest(self, pod: str, payload: Any, **where: Any) -> Any:
        # 93 cb: an array of three that begins with a float64. All forms here write that, or two elements.
        assert payload[1] == 0xCB
        self.made_at[pod].append(struct.unpack_from(">d", payload, 2)[0])
        return super().ingest(pod, payload, **where)


def in_use() -> int:
    """Bytes of this process that lie in memory, without what is free already and only not given back."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return resident()


def free_ports(count: int) -> Iterator[int]:
    """Ports below those that the system gives to outgoing connections, which would take the one of a killed pod."""
    found: list[int] = []
    for port in range(20000, 32000):
        if len(found) == count:
            break
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return iter(found)


@dataclass
class Round:
    """What was done in one round, and what was seen of it."""

    in_place: int = 0
    killed: int = 0
    seen: int = 0
    expected: int = 0
    unseen: int = 0
    stale: float = 0.0
    gaps: int = 0
    lost: int = 0
    answers: int = 0
    equal: int = 0
    not_exact: int = 0
    resident: int = 0
    blocks: int = 0
    seconds: float = 0.0


class Storm:
    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self.args = args
        self.dice = random.Random(args.seed)
        ports = free_ports(2 * args.pods)
        self.pods = [
            Pod(
                SimConfig(
                    name=f"pod-{number}", model=MODEL, form=FORMS[number % len(FORMS)], blocks=400,
                    seed=number % 4, port=next(ports), replay_port=next(ports),
                )
            )
            for number in range(args.pods)
        ]  # fmt: skip
        self.hosts: list[list[Pod]] = [self.pods[number :: args.processes] for number in range(args.processes)]
        with ThreadPoolExecutor(args.processes) as starting:
            for pods in self.hosts:
                for pod in pods:
                    pod.lives.append(time.time())
            processes = list(starting.map(self._start, self.hosts))
        for process, pods in zip(processes, self.hosts, strict=True):
            stack.callback(process.stop)
            for place, pod in enumerate(pods):
                pod.process, pod.place = process, place
        self.index = NotingIndex()
        self.manager = stack.enter_context(EventManager(self.index))
        self.stale_since: dict[str, float] = {}
        self.longest = 0.0
        self.manager.on_change(self._note)
        for pod in self.pods:
            self.manager.add_pod(pod.source())
            pod.ask("run", requests=4)
        if not self._at_rest():
            raise RuntimeError(f"not every pod was current in time: {self.manager.status()}")

    def _start(self, pods: Sequence[Pod]) -> ToldProcess:
        configs = json.dumps([asdict(pod.config) for pod in pods])
        return ToldProcess("storm", [sys.executable, "-m", "chaos.storm", configs], timeout=60.0)

    def _note(self, change: StateChange) -> None:
        now = time.monotonic()
        if change.new == "stale":
            self.stale_since.setdefault(change.pod, now)
        elif (since := self.stale_since.pop(change.pod, None)) is not None:
            self.longest = max(self.longest, now - since)

    # One round

    def round(self, restarts: int, seconds: float) -> Round:
        found, start = Round(), time.monotonic()
        before = {pod.name: self.manager.status()[pod.name] for pod in self.pods}
        marks = {pod.name: (len(pod.lives) - 1, len(self.index.made_at[pod.name])) for pod in self.pods}
        self.longest = 0.0
        for pod in self.pods:
            pod.ask("rate", rate=self.args.rate)
        while (made := found.in_place + found.killed) < restarts:
            self._restart(found, restarts - made)
            done = (found.in_place + found.killed) / restarts
            time.sleep(max(0.0, start + done * seconds - time.monotonic()))
        found.seconds = time.monotonic() - start
        for pod in self.pods:
            pod.ask("rate", rate=0.0)
        self._at_rest()  # what is not in time is counted as not exact
        for pod in self.pods:
            status = self.manager.status()[pod.name]
            found.seen += status.restarts - before[pod.name].restarts
            found.gaps += status.gaps - before[pod.name].gaps
            found.lost += status.lost_batches - before[pod.name].lost_batches
            found.not_exact += status.state != "exact"
            found.blocks += status.blocks
            expected, unseen = self._lives(pod, *marks[pod.name])
            found.expected += expected
            found.unseen += unseen
        found.stale = self.longest
        self._compare(found)
        self.index._check()
        for pod in self.pods:
            self.index.made_at[pod.name] = self.index.made_at[pod.name][-1:]
        found.resident = in_use()
        return found

    def _restart(self, found: Round, left: int) -> None:
        pods = self.dice.choice(self.hosts)
        # A killed process is as many restarts as it has pods.
        if len(pods) <= left and self.dice.random() < KILLED / len(pods):
            process = pods[0].process
            assert process is not None
            process.kill()
            for pod in pods:
                pod.lives.append(time.time())
            process.launch()
            for pod in pods:
                pod.ask("run", requests=self.dice.randrange(1, 4))
                pod.ask("rate", rate=self.args.rate)
            found.killed += len(pods)
            return
        pod = self.dice.choice(pods)
        pod.ask("rate", rate=0.0)  # or it could serve a last request between this moment and its end
        pod.lives.append(time.time())
        pod.ask("restart")
        pod.ask("run", requests=self.dice.randrange(1, 4))
        pod.ask("rate", rate=self.args.rate)
        found.in_place += 1

    def _lives(self, pod: Pod, life: int, at: int) -> tuple[int, int]:
        """How many restarts the order of batches shows since then, and how many lives ended unseen."""
        times = self.index.made_at[pod.name][max(0, at - 1) :]
        applied = [max(0, bisect.bisect_right(pod.lives, made) - 1) for made in times]
        seen = sum(later != sooner for sooner, later in itertools.pairwise(applied))
        made = len(pod.lives) - 1 - life
        return seen, made - len({each for each in applied if each > life})

    def _at_rest(self) -> bool:
        until = time.monotonic() + PATIENCE
        for pod in self.pods:
            while True:
                seq = pod.ask("status")["seqs"][0]
                status = self.manager.status()[pod.name]
                if status.state == "exact" and (-1 if status.last_seq is None else status.last_seq) == seq - 1:
                    break
                if time.monotonic() > until:
                    return False
                time.sleep(0.02)
        return True

    def _compare(self, found: Round) -> None:
        for pod in self.pods:
            everything = [arrival.prompt for _, arrival in zip(range(128), own_workload(pod.config), strict=False)]
            prompts = self.dice.sample(everything, PROMPTS)
            truth = pod.ask("truths", prompts=[prompt_map(prompt) for prompt in prompts])
            for prompt, hits in zip(prompts, truth["hits"], strict=True):
                told = self.index.match_prefix(prompt.tokens, model=MODEL).tokens.get(pod.name, 0)
                found.answers += 1
                found.equal += told == max(hits.values())


def run(args: argparse.Namespace, _argv: Sequence[str]) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    with ExitStack() as stack:
        storm = Storm(args, stack)
        console.print(f"{args.pods} pods in {args.processes} processes are exact")
        # What the first restarts leave in an allocator is no leak, and hides one.
        storm.round(max(1, args.restarts // 4), args.seconds / 4)
        console.print(f"{args.restarts // 4} restarts to get warm are over")
        start = in_use()
        rounds = []
        for number in range(args.rounds):
            rounds.append(storm.round(args.restarts, args.seconds))
            console.print(f"round {number + 1} is over")
    show(console, rounds, start)
    problems = list(judge(rounds))
    for problem in problems:
        console.print(problem, style="bold red", markup=False)
    if not problems:
        console.print("all exact and equal, every restart accounted for, memory flat", style="bold green")
    return 1 if problems else 0


def show(console: Console, rounds: Sequence[Round], start: int) -> None:
    table = Table(title="storm", title_justify="left")
    table.add_column("")
    for number in range(len(rounds)):
        table.add_column(f"round {number + 1}", justify="right")
    mib = 1 << 20
    rows: dict[str, list[str]] = {
        "restarts made": [f"{each.in_place + each.killed:,}" for each in rounds],
        "  of one pod, in place": [f"{each.in_place:,}" for each in rounds],
        "  of killed processes' pods": [f"{each.killed:,}" for each in rounds],
        "within seconds": [f"{each.seconds:.1f}" for each in rounds],
        "restarts counted": [f"{each.seen:,}" for each in rounds],
        "  that the batches show": [f"{each.expected:,}" for each in rounds],
        "lives that ended before anything was applied": [f"{each.unseen:,}" for each in rounds],
        "gaps noticed / batches lost": [f"{each.gaps:,} / {each.lost:,}" for each in rounds],
        "longest stale, seconds": [f"{each.stale:.1f}" for each in rounds],
        "pods not exact at the end": [f"{each.not_exact:,}" for each in rounds],
        "answers equal to the pods' own": [f"{each.equal:,} of {each.answers:,}" for each in rounds],
        "blocks at the end": [f"{each.blocks:,}" for each in rounds],
        f"resident MiB ({start / mib:.1f} before)": [f"{each.resident / mib:.1f}" for each in rounds],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def judge(rounds: Sequence[Round]) -> Iterator[str]:
    """What is wrong, in words."""
    for number, each in enumerate(rounds, 1):
        if each.not_exact:
            yield f"round {number}: {each.not_exact} pods are not exact"
        if each.equal != each.answers:
            yield f"round {number}: {each.answers - each.equal} answers differ"
        if each.seen != each.expected:
            yield f"round {number}: {each.seen} restarts are counted, the batches show {each.expected}"
        if each.seen + each.unseen != each.in_place + each.killed:
            yield f"round {number}: {each.seen} seen and {each.unseen} unseen are not all restarts"
    for number, (before, after) in enumerate(itertools.pairwise(rounds), 2):
        if after.resident > before.resident * (1 + NOISE):
            yield f"round {number}: memory went from {before.resident:,} to {after.resident:,} bytes"


if __name__ == "__main__":
    serve(sys.argv[1])

"""``python -m e2e.engines``: run every case of every engine, and count the answers that differ from the engine's."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvindex import EventManager, KVIndexError, PrefixIndex
from kvindex.capture import CaptureWriter, Message, Query
from kvindex.sim import Arrival, Prompt
from kvindex.sim.control import ToldProcess
from kvindex.sim.process import SimConfig, SimProcess, prompt_map
from kvindex.sync.policy import StreamPolicy

from .. import fleet
from ..fleet import BRISK, ROOT, as_asked, at_rest, source, until
from .cases import CASES, Case, workload

MODEL = "m"


class EngineProcess(SimProcess):
    """The parent's handle of a pod with a real engine, with the interface of a simulated pod."""

    #: The wire form of the simulated engine with the same names of adapters.
    FORMS = {"vllm": "vllm-0.33.0", "sglang": "sglang-0.5.22"}  # noqa: RUF012

    def __init__(self, engine: str, name: str, python: Path) -> None:
        self.engine = engine
        self._program = [str(python), "-m", "e2e.engines.pod", engine]
        # The import of such an engine takes 10 to 40 seconds of CPU time.
        super().__init__(
            SimConfig(name=name, model=MODEL, form=self.FORMS[engine]), timeout=300.0,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def launch(self) -> None:
        self._command = self._program
        ToldProcess.launch(self)

    @property
    def options(self) -> dict[str, Any]:
        """Empty, because each case has its own options."""
        return {}

    def configure(self, options: dict[str, Any]) -> None:
        """Replace the engine in the process by one with these options."""
        self.ready = self.ask("configure", options={**options, "topic": f"kv@{self.name}@{MODEL}"})

    def serve_all(self, arrivals: Iterable[Arrival], rank: int = 0, steps: int | None = None) -> None:
        requests = [
            {**prompt_map(each.prompt), "output": np.asarray(each.output, dtype="<u4").tobytes()} for each in arrivals
        ]
        self.ask("serve_all", requests=requests, rank=rank, steps=steps)


class Recorder:
    """An index that records all applied batches in their order."""

    def __init__(self, index: PrefixIndex, writer: CaptureWriter) -> None:
        self._index = index
        self._writer = writer
        self._seqs: Counter[tuple[str, int | None]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def ingest(
        self, pod: str, payload: bytes, *, model: str = "", dp_rank: int | None = None, seq: int | None = None
    ) -> Any:
        at = self._seqs[pod, dp_rank]
        self._seqs[pod, dp_rank] += 1
        topic = f"kv@{pod}@{model}"
        self._writer.write(Message(pod, topic, at, payload))
        return self._index.ingest(pod, payload, model=model, dp_rank=dp_rank, seq=seq)


@dataclass
class Comparison(fleet.Comparison):
    """The comparison of a fleet; ``apart`` counts the differences of pods whose state is degraded."""

    apart: int = 0


class Here:
    """An index in this process, with the methods of one in another process: :class:`e2e.fleet.IndexProcess`."""

    def __init__(self, index: PrefixIndex, manager: EventManager) -> None:
        self.index = index
        self.manager = manager

    def status(self) -> dict[str, Any]:
        return {name: status.as_dict() for name, status in self.manager.status().items()}

    def match(self, prompts: Iterable[Prompt], *, model: str) -> dict[str, Any]:
        answers = []
        for prompt in prompts:
            match = self.index.match_prefix(
                prompt.tokens,
                model=model,
                lora_name=prompt.lora_name,
                cache_salt=prompt.cache_salt,
                extra_keys=prompt.extra_keys,
            )
            answers.append(
                {
                    pod: {"tokens": n, "ranks": match[pod].ranks, "tiers": match[pod].tiers}
                    for pod, n in match.tokens.items()
                }
            )
        return {"answers": answers}


def run(case: Case, pods: Sequence[EngineProcess], requests: int, seed: int, record: Path | None) -> dict[str, Any]:
    """Serve the case's workload in slices. Between them, with requests half done, ask about earlier prompts."""
    start = time.monotonic()
    dice = random.Random(f"{case.feature}{seed or ''}")
    for pod in pods:
        pod.configure(case.options)
    index = PrefixIndex(**case.index)
    total = Comparison()
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        applied: Any = index
        writer = None
        if record is not None and case.sample is not None:
            header = {
                "engine": case.engine, "version": versions(pods[0])[case.engine], "block_size": index.block_size,
                "pods": [pod.name for pod in pods], "model": MODEL, "options": case.options, "feature": case.feature,
            }  # fmt: skip
            writer = stack.enter_context(CaptureWriter(record / f"{case.sample}.msgpack.gz", header))
            applied = Recorder(index, writer)
        manager = stack.enter_context(EventManager(applied, policy=StreamPolicy(**BRISK)))
        here: Any = Here(index, manager)
        for pod in pods:
            manager.add_pod(source(pod, **case.source))
        arrivals = workload(case, requests, seed)
        asked = 0
        for first in range(0, len(arrivals), 6):
            for pod in pods:
                mine = [each for each in arrivals[first : first + 6] if case.together or dice.random() < 0.6]
                for rank in range(case.options.get("ranks", 1)):
                    pod.serve_all(
                        mine[rank :: case.options.get("ranks", 1)], rank, steps=dice.choice([3, 10, 40, None])
                    )
            settle(here, pods, case)
            prompts = questions(arrivals[: first + 6], dice)
            found = ask(here, pods, prompts, case)
            if writer is not None:
                write_queries(writer, pods, prompts, asked)
            asked += len(prompts)
            add(total, found)
            if case.resets and first % 18 == 12:
                pod = dice.choice(list(pods))
                for rank in range(case.options.get("ranks", 1)):
                    pod.serve_all([], rank)
                    assert pod.ask("reset", rank=rank, connector=case.resets == "all tiers")["done"]
        for pod in pods:
            for rank in range(case.options.get("ranks", 1)):
                pod.serve_all([], rank)
        settle(here, pods, case)
        add(total, ask(here, pods, [each.prompt for each in arrivals], case))
        index._check()
        status = manager.status()
        reasons.update(each.reason for each in status.values() if each.reason)
    figures: Counter[str] = Counter()
    for pod in pods:
        figures.update(pod.ask("status")["figures"])
    return {
        "engine": case.engine,
        "feature": case.feature,
        "answers": total.answers,
        "hit_tokens": total.hit_tokens,
        "differences": [list(each) for each in total.differences],
        "verdict": "degraded" if case.degraded else "exact",
        "why": case.degraded,
        "apart": total.apart,
        "said": sorted(reasons),
        "batches": sum(each.batches for each in status.values()),
        "lost": sum(each.lost_batches for each in status.values()),
        "errors": dict(sum((Counter(each.errors) for each in status.values()), Counter())),
        "figures": dict(figures),
        "failed": None,
        "missing": [name for name in case.shows if not figures[name]],
        "seconds": round(time.monotonic() - start, 1),
    }


def failed(case: Case, error: Exception) -> dict[str, Any]:
    """The row of a case that failed with an error; the other cases go on."""
    counts = dict.fromkeys(("answers", "hit_tokens", "batches", "lost", "seconds"), 0)
    named: dict[str, Any] = {
        "engine": case.engine,
        "feature": case.feature,
        "differences": [],
        "verdict": "",
        "why": "",
        "apart": 0,
        "said": [],
        "errors": {},
        "figures": {},
    }
    return {**named, **counts, "missing": [], "failed": f"failed: {type(error).__name__}: {error}"}


def settle(here: Any, pods: Sequence[EngineProcess], case: Case) -> None:
    if not case.degraded:
        at_rest(here, pods, 120.0)
        return
    wanted = {pod.name: {rank: seq - 1 for rank, seq in pod.seqs().items()} for pod in pods}
    until(
        lambda: all(
            here.status()[name]["workers"][rank]["last_seq"] == seq
            for name, ranks in wanted.items()
            for rank, seq in ranks.items()
        ),
        here.status,
        120.0,
    )


def ask(here: Any, pods: Sequence[EngineProcess], prompts: Sequence[Prompt], case: Case) -> Comparison:
    """Compare the index's answers to all prompts with those of every engine, by rank and by tier."""
    found = Comparison()
    wanted = "degraded" if case.degraded else "exact"
    for pod in pods:
        state = here.index.pod_state(pod.name)
        # A pod becomes degraded with the first change that its events do not contain, and may be exact before.
        assert state == wanted or (case.degraded and state == "exact" and case.resets), (pod.name, state)
        truth = pod.truths(prompts)
        answers = here.match([as_asked(pod, prompt) for prompt in prompts], model=MODEL)["answers"]
        for number, answer in enumerate(answers):
            told = answer.get(pod.name, {"ranks": {}, "tiers": {}})
            tiers = truth["tiers"][number]
            for rank, hit in truth["hits"][number].items():
                found.add(number, pod.name, rank, told["ranks"].get(rank, 0), tiers["GPU"] if case.own else hit)
            # With several groups, the reach of a tier without the last token does not follow from its whole reach.
            if len(tiers) > 1 and not case.own and len(case.options.get("groups", "1")) == 1:
                own = told["tiers"].get("GPU", 0)
                if case.engine == "vllm":
                    # The index's tiers count held tokens. vLLM does not reuse the last token of its own pool, and with
                    # EAGLE the last block.
                    own = min(own, (len(prompts[number]) - 1) // 16 * 16)
                    own = max(0, own - (here.index.block_size if case.source.get("eagle") else 0))
                found.add(number, pod.name, "GPU", own, tiers["GPU"])
        if state == "degraded":
            # The answers of a degraded pod may differ.
            found.apart, found.differences = found.apart + len(found.differences), []
    return found


def add(total: Comparison, part: Comparison) -> None:
    total.answers += part.answers
    total.hit_tokens += part.hit_tokens
    total.differences += part.differences
    total.apart += part.apart


def questions(seen: Sequence[Arrival], dice: random.Random) -> list[Prompt]:
    """Some recent prompts, the same ones with their answers, and prompts that end or differ in the middle of them."""
    found = []
    for each in dice.sample(list(seen[-30:]), min(5, len(seen))):
        prompt = each.prompt
        whole = np.concatenate([prompt.tokens, each.output])
        cut = whole[: dice.randrange(1, len(whole) + 1)].copy()
        if dice.random() < 0.3:
            cut[-1] ^= 1
        context = {name: getattr(prompt, name) for name in ("lora_name", "lora_id", "cache_salt", "extra_keys")}
        found += [Prompt(tokens, **context) for tokens in (prompt.tokens, whole, cut)]
    return found


def write_queries(writer: CaptureWriter, pods: Sequence[EngineProcess], prompts: Sequence[Prompt], first: int) -> None:
    truths = {pod.name: pod.truths(prompts)["hits"] for pod in pods}
    for number, prompt in enumerate(prompts):
        hits = {name: max(truth[number].values()) for name, truth in truths.items()}
        keys = None if prompt.extra_keys is None else list(prompt.extra_keys)
        context = (prompt.lora_name, prompt.lora_id, prompt.cache_salt, keys)
        writer.write(Query(f"q{first + number}", prompt.tokens, hits, *context))


def versions(pod: EngineProcess) -> dict[str, str]:
    """The version of the engine in the pods' environment."""
    program = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    found = subprocess.run([pod._program[0], "-c", program, pod.engine], capture_output=True, text=True, check=True)
    return {pod.engine: found.stdout.strip()}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="answers of the index compared with the engines' own", title_justify="left")
    for name in ("engine", "feature"):
        shown.add_column(name)
    for name in ("answers", "differences"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for name in ("tokens held", "batches", "seconds"):
        shown.add_column(name, justify="right")
    shown.add_column("what happened in the engines")
    for row in rows:
        happened = ", ".join(f"{name} {count:,}" for name, count in sorted(row["figures"].items()) if count)
        wrong = len(row["differences"])
        shown.add_row(
            row["engine"], row["feature"], f"{row['answers']:,}", f"[red]{wrong:,}[/]" if wrong else "0",
            f"{row['verdict']}: {row['why']}; {row['apart']:,} answers apart" if row["why"] else row["verdict"],
            f"{row['hit_tokens']:,}", f"{row['batches']:,}", f"{row['seconds']:.1f}", happened,
        )  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.engines", description=__doc__)
    parser.add_argument("--python", type=Path, default=ROOT / ".build/engines/bin/python", help="that has the engines")
    parser.add_argument("--only", metavar="TEXT", help="cases whose engine and feature have this in them")
    parser.add_argument("--requests", type=int, default=150, help="a case (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workloads and of the slices (%(default)s)")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write the samples there")
    parser.add_argument("--out", type=Path, default=ROOT / ".build/e2e-engines.json")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    cases = [case for case in CASES if args.only is None or args.only in f"{case.engine} {case.feature}"]
    for engine in dict.fromkeys(case.engine for case in cases):
        with ExitStack() as stack:
            pods = [stack.enter_context(EngineProcess(engine, f"{engine}-{n}", args.python)) for n in range(2)]
            for case in cases:
                if case.engine != engine:
                    continue
                try:
                    row = run(case, pods, args.requests, args.seed, args.record)
                except (AssertionError, KVIndexError) as error:
                    row = failed(case, error)
                rows.append(row)
                told = f"{engine}, {case.feature}: {row['answers']:,} answers, {len(row['differences'])} differences"
                console.print(
                    told, *[f"missing {name}" for name in row["missing"]], row["errors"] or "", highlight=False
                )
                for each in row["differences"][:3]:
                    console.print("   prompt, pod, place, indexed, actual:", each, highlight=False)
    console.print(table(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1))
    answers = sum(row["answers"] for row in rows)
    wrong = sum(len(row["differences"]) for row in rows)
    empty = [
        f"{row['engine']}, {row['feature']}"
        for row in rows
        if row["failed"] or row["missing"] or row["lost"] or not row["hit_tokens"]
    ]
    console.print(f"e2e-engines: {answers:,} answers compared, {wrong} differences, {len(rows)} cases")
    if empty:
        console.print(
            f"these failed, lost batches, or were not about what they say: {'; '.join(empty)}", style="bold red"
        )
    return 1 if wrong or empty or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

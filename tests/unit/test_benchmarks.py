"""Errors that a benchmark could make unnoticed, in its measurements and in its conclusions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import baseline, data, reach, workloads  # noqa: E402
from benchmarks.interleave import Timings, interleaved  # noqa: E402
from benchmarks.peers.contenders import DictOfSets, KVIndex  # noqa: E402

DEPTH = 128


def answers(kind: str, depth: int = DEPTH, pods: int = 3) -> list[dict[str, int]]:
    """Return the hits of one round's prompts, in blocks."""
    made = workloads.match(kind, depth, pods, content=depth * 32)
    match = made.call
    return [{pod: tokens // data.BLOCK for pod, tokens in match(prompt).tokens.items()} for prompt in made.items(0)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("full", {DEPTH}), ("none", set()), ("half", {DEPTH // 2}), ("hybrid", {DEPTH})],
)
def test_prompts_find_what_their_name_says(kind: str, expected: set[int]) -> None:
    for answer in answers(kind):
        assert set(answer.values()) == expected
        assert len(answer) == (3 if expected else 0)


def test_forked_prompts_find_the_stem_on_every_pod_and_the_branch_on_some() -> None:
    found = answers("forked")
    assert all(set(answer) == {"pod-0", "pod-1", "pod-2"} for answer in found)
    assert {length for answer in found for length in answer.values()} == {DEPTH // 2, DEPTH}


def test_holes_end_the_match_where_they_are() -> None:
    for number, answer in enumerate(answers("holes")[:32]):
        assert [answer.get(f"pod-{place}", 0) for place in range(3)] == [
            (place * 7 + number) % DEPTH for place in range(3)
        ]


def test_rounds_of_events_apply_as_a_whole_and_leave_nothing() -> None:
    for made in (workloads.ingest(1, content=2048), workloads.ingest(64, known=True, content=2048)):
        index = made.call.func.__self__
        before = index.stats()["blocks"]
        for number in range(2):
            items = made.items(number)
            reports = [made.call(item) for item in items]
            hashes = [len(event["block_hashes"]) for item in items for event in msgpack.unpackb(item)[1]]
            assert sum(report.stored for report in reports) == sum(hashes)
            assert not any(report.skipped or report.parked for report in reports)
            made.undo()
            assert index.stats()["blocks"] == before


def test_removals_remove_all_that_was_stored_for_them() -> None:
    made = workloads.remove(1, content=2048)
    reports = [made.call(item) for item in made.items(0)]
    assert sum(report.removed for report in reports) == 1024
    assert not any(report.skipped for report in reports)


def test_data_are_the_same_every_time_and_beginnings_begin() -> None:
    one, other = data.chain(1, 2, 8), data.chain(1, 2, 8)
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.hashes, other.hashes)
    assert np.array_equal(data.beginning(1, 2, 3), one.tokens[: 3 * data.BLOCK])
    assert not np.array_equal(data.chain(1, 3, 8).tokens, one.tokens)


def test_contenders_agree() -> None:
    contents = data.chains(3, 4, 20)
    for pods in (1, 5):
        found = []
        for kind in (KVIndex, DictOfSets):
            contender = kind(pods)
            contender.store(contents[:3])
            found.append([contender.answer(content.tokens) for content in contents])
        assert found[0] == found[1]
        assert found[0] == [dict.fromkeys(range(pods), 20)] * 3 + [{}]


@pytest.mark.parametrize(
    ("goal", "value", "expected"),
    [
        ("match list 8", 4.99, "not"),
        ("match list 8", 5.0, "reached"),
        ("match list 8", 7.0, "stretch"),
        ("tail", 20.1, "not"),
        ("tail", 20.0, "reached"),
        ("tail", 10.0, "stretch"),
        ("match hashes 8", 100.0, "reached"),
    ],
)
def test_a_goal_says_what_a_figure_means(goal: str, value: float, expected: str) -> None:
    assert reach.mark(goal, value) == expected


def test_the_worse_of_median_and_best_rounds_decides() -> None:
    timings = Timings({"slow": [10.0, 100.0, 100.0], "fast": [5.0, 5.0, 5.0]})
    ratio = timings.ratio("slow", "fast")
    assert (ratio.median, ratio.best) == (20.0, 2.0)
    assert reach.Reached("", "", "match list 8", ratio.median, ratio).mark == "not"


def test_every_contender_gets_every_round_once_and_the_order_turns() -> None:
    asked: list[tuple[str, int]] = []
    order: list[str] = []

    def inputs(name: str, number: int) -> list[str]:
        asked.append((name, number))
        return [name]

    timings = interleaved({"a": order.append, "b": order.append}, inputs, 4, warm=False)
    assert sorted(asked) == [(name, number) for name in "ab" for number in range(4)]
    assert {len(times) for times in timings.values()} == {4}
    assert {order[place] for place in range(0, 8, 2)} == {"a", "b"}


BYTES, SETS, PROBES = "Exact.track_bytes_per_block(1 pod)", "Exact.track_sets(1 pod)", "Exact.track_probes(1 pod)"
MATCH = "Instructions.track_instructions(match numpy full 512 blocks 8 pods)"
KEPT = {"commit": "0123456789", "machine": "a machine", "toolchain": "a toolchain"}
FIGURES = {BYTES: 34.0, SETS: 0, PROBES: 1.5, MATCH: 1000}


@pytest.mark.parametrize(
    ("changed", "expected", "said"),
    [
        ({}, 0, "Nothing is worse"),
        ({BYTES: 34.1}, 1, f"{BYTES}: 34 → 34.1, +0.3% since 0123456789"),
        ({BYTES: 30.0}, 0, "better"),
        ({SETS: 3}, 1, f"{SETS}: 0 → 3, from nothing"),
        ({PROBES: 1.55}, 0, "Nothing is worse"),
        ({PROBES: 1.75}, 1, f"{PROBES}: 1.5 → 1.75, +16.7%"),
        ({MATCH: 1090}, 0, "Nothing is worse"),
        ({MATCH: 1150}, 1, f"{MATCH}: 1000 → 1150, +15.0% since 0123456789"),
        ({"toolchain": "another", MATCH: 2000}, 0, "Nothing is worse"),
        ({"toolchain": "another", "both": ["counted anew"]}, 1, "counted anew"),
    ],
)
def test_the_baseline_names_what_is_worse_by_how_much_and_since_when(
    changed: dict[str, object],
    expected: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "baseline.json"
    kept.write_text(json.dumps({**KEPT, "figures": FIGURES}))
    monkeypatch.setattr(baseline, "FILE", kept)
    monkeypatch.setattr(baseline, "measured", lambda only: {name: changed.get(name, FIGURES[name]) for name in FIGURES})
    monkeypatch.setattr(baseline.instructions, "toolchain", lambda: changed.get("toolchain", KEPT["toolchain"]))
    monkeypatch.setattr(baseline, "both", lambda base, threshold: changed.get("both", []))
    assert baseline.check(0.10, "", tmp_path / "reports") == expected
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "reports" / "bench-check.md").read_text()


def test_what_is_kept_is_what_the_suite_tracks() -> None:
    """The names are those of the suite, so no figure is silently left out of a comparison."""
    kept = set(json.loads(baseline.FILE.read_text())["figures"])
    assert kept >= set(baseline.measured("Exact")) | set(baseline.measured("Compared"))
    assert {name for name in kept if name.startswith("Instructions")} == {
        f"Instructions.track_instructions({name})" for name in workloads.CORE
    }


# Imports every module of benchmarks/ while only the given packages and their requirements can be imported.
IMPORTED_WITH = """
import pkgutil, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

there, new = set(), set(sys.argv[1:])
while new:
    name = canonicalize_name(new.pop())
    there.add(name)
    try:
        needed = [Requirement(each) for each in requires(name) or ()]
    except PackageNotFoundError:
        continue
    new |= {canonicalize_name(each.name) for each in needed if not each.marker or each.marker.evaluate({"extra": ""})}
    new -= there

class Elsewhere:
    owners = packages_distributions()
    def find_spec(self, name, path=None, target=None):
        owned = {canonicalize_name(each) for each in self.owners.get(name.partition(".")[0], ())}
        if owned and not owned & there:
            raise ModuleNotFoundError(f"asv's environment has no {name}", name=name)

sys.meta_path.insert(0, Elsewhere())
import benchmarks
for each in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
    __import__(each.name)
"""


def test_asv_can_import_every_module() -> None:
    """asv imports all modules to find the benchmarks.

    Its environment has the package and asv.conf.json's requirements.
    """
    there = json.loads((ROOT / "asv.conf.json").read_text())["matrix"]["req"]
    run = [sys.executable, "-c", IMPORTED_WITH, "kvindex", *there]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert not found.returncode, found.stderr

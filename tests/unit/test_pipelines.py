"""The pipelines from a change to its release: their stages, their summary, and the rules for a release."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import kvindex

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".github" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


summary, release = script("summary"), script("release")
MAKEFILE = (ROOT / "Makefile").read_text()


def steps(workflow: Path) -> list[dict[str, str]]:
    """Return the make steps of a workflow in order."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    found = [step for job in jobs.values() for step in job["steps"]]
    return [step for step in found if step.get("run", "").startswith("make ")]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_stand_in_the_order_of_their_needs(workflow):
    """Here, the jobs run in that order, one after another."""
    before: set[str] = set()
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        needs = job.get("needs", [])
        assert before.issuperset([needs] if isinstance(needs, str) else needs), name
        before.add(name)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_target(workflow):
    lines = re.findall(r"^([a-z0-9 -]+):(?!=)", MAKEFILE, re.MULTILINE)
    targets = {target for line in lines for target in line.split()}
    for step in steps(workflow):
        assert step["run"].split()[1] in targets, step


@pytest.mark.parametrize(("target", "workflow"), [("ci", "complete-testing"), ("nightly", "nightly-performance")])
def test_a_pipeline_here_is_the_workflow(target, workflow):
    """Steps with a condition belong to the hosted runner only: a schedule, or the results of an earlier night."""
    (stages,) = re.findall(rf"^{target}: (.+)$", MAKEFILE, re.MULTILINE)
    path = ROOT / ".github" / "workflows" / f"{workflow}.yml"
    hosted = [step for step in steps(path) if "hosted" in step.get("if", "") or "if" not in step]
    assert stages.split() == [step["run"].removeprefix("make ") for step in hosted]


@pytest.mark.parametrize("target", re.findall(r"^\t@echo 'make ([a-z0-9-]+)", MAKEFILE, re.MULTILINE))
def test_make_knows_what_every_named_target_needs(target):
    """In a target's prerequisites, a variable that is defined further down is empty."""
    # Sanitized tests preload the address sanitizer, which stops GNU make 4.3 for its own read beyond a buffer.
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    planned = subprocess.run(
        ["make", "--dry-run", target, "BASE=HEAD", "TAG=v1"],
        cwd=ROOT, env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr


def test_the_summary_waits_for_every_job():
    jobs = yaml.safe_load((ROOT / ".github/workflows/complete-testing.yml").read_text())["jobs"]
    assert set(jobs["summary"]["needs"]) == set(jobs) - {"summary"}


def test_the_summary_counts_what_the_reports_say(tmp_path, capsys, monkeypatch):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_fine(): pass\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('no engine here')\n"
    )
    job = tmp_path / "reports" / "unit-3.11"
    junit = f"--junit-xml={job / 'junit-test-unit.xml'}"
    subprocess.run([sys.executable, "-m", "pytest", "-q", tests, junit], cwd=tmp_path, capture_output=True, check=False)
    (job / "coverage-python.json").write_text('{"totals": {"percent_covered": 97.25}}')
    (job / "coverage-native.json").write_text('{"line_percent": 98.6}')
    (job / "bench-check.md").write_text("Nothing is worse than the baseline.\n")
    chaos = tmp_path / "reports" / "chaos"
    chaos.mkdir()
    (chaos / "results.json").write_text(
        '[{"experiment": "kill", "verdict": "passed"}, {"experiment": "lag", "verdict": "failed"}]'
    )
    (chaos / "junit-cut.xml").write_text("<testsuites><testsu")

    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path / "reports")])
    assert summary.main() == 0
    said = capsys.readouterr().out
    rows = dict(line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| "))
    assert rows["unit-3.11/test-unit"].startswith("**1 failures**, 2 passed, 1 skipped in ")
    assert rows["unit-3.11/coverage-python"] == "97.2 % of the lines"
    assert rows["unit-3.11/coverage-native"] == "98.6 % of the lines"
    assert rows["chaos/chaos"] == "**lag failed**, 1 passed"
    assert rows["chaos/cut"].startswith("**not readable")
    assert "Nothing is worse than the baseline." in said


CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2030-01-31\n\n- Something.\n"


def test_a_release_whose_names_agree_has_no_problems():
    assert release.problems("v1.2.3", "1.2.3", CHANGES) == []


def test_the_next_release_needs_a_tag_and_a_date_in_the_changelog_and_nothing_else():
    """Follow the steps of CONTRIBUTING.md with the current changelog."""
    version = kvindex.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    entry = f"## [{version}] - 2030-01-31"
    if f"## [{version}] - " not in changes:
        assert release.problems(f"v{version}", version, changes)
        changes = changes.replace("## [Unreleased]\n", f"{entry}\n", 1)
    assert release.problems(f"v{version}", version, changes) == []


@pytest.mark.parametrize(
    ("tag", "version", "changes", "said"),
    [
        ("v1.2.4", "1.2.3", CHANGES, "the tag is v1.2.4"),
        ("1.2.3", "1.2.3", CHANGES, "tag v1.2.3"),
        ("v1.2.4", "1.2.4", CHANGES, "newest entry of CHANGELOG.md is 1.2.3"),
        ("v1.2.3", "1.2.3", CHANGES.replace(" - 2030-01-31", ""), "no date"),
        ("v1.2.3", "1.2.3", "## [Unreleased]\n", "no entry of a version"),
        ("v1.2.3", "1.2.3", CHANGES.replace("d]\n", "d]\n\n- Forgotten.\n"), "under [Unreleased]"),
    ],
)
def test_a_release_whose_names_differ_is_refused(tag, version, changes, said):
    (problem,) = release.problems(tag, version, changes)
    assert said in problem

"""Exported Prometheus metrics compared with their source figures and with the names in the rules and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import kvindex
from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.metrics import KVIndexCollector
from kvindex.routing import EndpointPicker

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAME = re.compile(r"\bkvindex_\w+")


@pytest.fixture
def fleet():
    index = PrefixIndex(block_size=4)
    with EventManager(index) as manager:
        manager.add_pod(PodSource("a", endpoint="tcp://127.0.0.1:1"))
        for pod in ("b", 'odd"name\\\n'):
            index.mark_worker(pod, 0, "exact")
        picker = EndpointPicker(index, seed=0)
        registry = CollectorRegistry()
        registry.register(KVIndexCollector(index, manager, picker))
        yield index, manager, picker, registry


def samples(registry):
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_figure_is_that_of_its_source(fleet):
    index, _, picker, registry = fleet
    choices = [picker.pick(list(range(10 * i, 10 * i + 9)), pods=["b"]) for i in range(3)]
    picker.finished(choices[0], cached_tokens=0)
    picker.finished(choices[1], cached_tokens=5)
    assert picker.pick([1], pods=["nobody"]) is None
    found = samples(registry)
    b, rank = ("pod", "b"), ("rank", "0")
    assert found["kvindex_blocks",] == index.stats()["blocks"]
    assert found["kvindex_pods",] == 3
    assert found["kvindex_picks_total",] == 3
    assert found["kvindex_unplaced_requests_total",] == 1
    assert found["kvindex_worker_requests", b, rank] == 1
    assert found["kvindex_worker_prefill_tokens", b, rank] == 9
    assert found["kvindex_reported_cached_tokens_total", b] == 5
    assert [found["kvindex_prediction_error_tokens_bucket", ("le", le), b] for le in ("0.0", "16.0", "+Inf")] == [
        1,
        2,
        2,
    ]
    assert found["kvindex_prediction_error_tokens_sum", b] == 5
    assert found["kvindex_pick_seconds_count",] == 3
    a = ("pod", "a"), rank
    assert [found["kvindex_worker_state", *a, ("state", state)] for state in ("exact", "degraded", "stale")] == [
        0,
        0,
        1,
    ]
    assert found["kvindex_worker_connected", *a] == 0
    assert ("kvindex_worker_lag_seconds", *a) not in found
    # The label is escaped and reads back unchanged.
    assert ("kvindex_worker_requests", ("pod", 'odd"name\\\n'), rank) in found


def test_a_pod_that_goes_takes_its_series_along(fleet):
    index, manager, picker, registry = fleet
    picker.finished(picker.pick([1, 2, 3], pods=["b"]), cached_tokens=0)
    assert any(("pod", "b") in key for key in samples(registry))
    index.remove_pod("b")
    manager.remove_pod("a")
    assert not any(("pod", pod) in key for key in samples(registry) for pod in ("a", "b"))


@pytest.fixture
def view(tmp_path):
    """Return a follower that was never started, with a status but without a server."""
    pytest.importorskip("redis")
    from kvindex.replication import ReplicatedIndex

    return ReplicatedIndex(f"unix://{tmp_path}/nobody", fleet="prod")


@pytest.mark.parametrize("shards", [1, 2])
def test_the_figures_of_a_log_are_those_of_its_status(view, monkeypatch, shards):
    status = replace(
        view.status(), role="collector", trusted=True, age=0.0, began=1.8e9, lease_age=0.4, snapshot_age=None,
        snapshot_bytes=5, read_bytes=6, written_bytes=7, refused=8, entries=9, written=10, refilled=11, snapshots=12,
        holes=13, takeovers=14, step_downs=15, failures={"full": 16},
    )  # fmt: skip
    both = replace(status, shards=(status, replace(status, entries=90))) if shards > 1 else status
    monkeypatch.setattr(view, "status", lambda: both)
    registry = CollectorRegistry()
    registry.register(KVIndexCollector(view.index, view))
    of = (("fleet", "prod"), ("shard", "0"))
    found = {name: value for name, value in samples(registry).items() if name[0].startswith("kvindex_log_")}
    others = {name: found.pop(name) for name in [*found] if ("shard", "1") in name}
    assert len(others) == (len(found) if shards > 1 else 0)
    assert others.get(("kvindex_log_entries_read_total", ("fleet", "prod"), ("shard", "1")), 90) == 90
    roles = {"collector": 1, "follower": 0, "direct": 0}
    assert found == {
        **{("kvindex_log_role", *sorted([*of, ("role", role)])): value for role, value in roles.items()},
        ("kvindex_log_failures_total", *sorted([*of, ("kind", "full")])): 16,
        **{(f"kvindex_log_{name}", *of): value for name, value in {
            "trusted": 1, "age_seconds": 0, "epoch_timestamp_seconds": 1.8e9, "lease_age_seconds": 0.4,
            "snapshot_bytes": 5, "read_bytes_total": 6, "written_bytes_total": 7, "entries_refused_total": 8,
            "entries_read_total": 9, "entries_written_total": 10, "entries_refilled_total": 11, "snapshots_total": 12,
            "holes_total": 13, "takeovers_total": 14, "step_downs_total": 15,
        }.items()},
    }  # fmt: skip


def test_without_manager_and_picker():
    registry = CollectorRegistry()
    registry.register(KVIndexCollector(PrefixIndex()))
    assert {name for name, *_ in samples(registry)} >= {"kvindex_blocks", "kvindex_bytes"}


def test_rules_and_dashboard_name_what_is_exported(fleet, view):
    *_, registry = fleet
    of_log = CollectorRegistry()
    of_log.register(KVIndexCollector(view.index, view))
    text = (generate_latest(registry) + generate_latest(of_log)).decode()
    exported = set(re.findall(r"^# TYPE (\w+)", text, re.M))
    helped = set(re.findall(r"^# HELP (\w+) \S", text, re.M))
    assert exported == helped
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    asked = [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(rules) >= 5
    for name in {name for expr in asked for name in NAME.findall(expr)}:
        assert {name, re.sub(r"_(bucket|count|sum)$", "", name)} & exported, name
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture
def promtool():
    return shutil.which("promtool") or pytest.skip("promtool is not installed (Debian: prometheus)")


def test_promtool_accepts_the_metrics_of_a_log(view, promtool):
    registry = CollectorRegistry()
    registry.register(KVIndexCollector(view.index, view))
    done = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_promtool_accepts_rules_and_metrics(fleet, promtool):
    _, _, picker, registry = fleet
    picker.finished(picker.pick([1, 2, 3], pods=["b"]), cached_tokens=0)
    subprocess.run([promtool, "check", "rules", DEPLOY / "alerts.yml"], check=True)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_is_not_installed_says_what_to_install():
    code = "import sys; sys.modules['prometheus_client'] = None; import kvindex.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("pip install 'kvindex[metrics]'")


def test_the_guides_name_metrics_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    package = Path(kvindex.__file__).parent
    exported = (package / "metrics.py").read_text() + (package / "service" / "figures.py").read_text()
    named = {
        name for page in (root / "docs").rglob("*.md") for name in re.findall(r"\bkvindex_[a-z_]+", page.read_text())
    }
    assert len(named) > 40
    assert not {name for name in named if f'"{name.removesuffix("_total")}"' not in exported}

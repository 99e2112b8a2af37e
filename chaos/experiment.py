"""Experiments as they are written: Chaos Mesh's kinds, checked against the fields that its resources have.

The same files go to a cluster with ``kubectl apply`` and run here with ``python -m chaos run``. What only a local run
needs to know stands in annotations under ``kvindex.local/``, which Chaos Mesh ignores. Faults that it has no kind for
are of the kind ``LocalChaos``, in a file of their own.

Fields: Chaos Mesh's api/v1alpha1 (networkchaos_types.go, podchaos_types.go, stresschaos_types.go, iochaos_types.go,
timechaos_types.go, selector.go).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Experiment", "ExperimentError", "load", "seconds"]

LOCAL = "kvindex.local/"

_SELECTOR = {"namespaces", "labelSelectors", "annotationSelectors", "fieldSelectors", "pods"}
_TARGETED = {"selector", "mode", "value", "duration"}
_MODES = {"one", "all", "fixed", "fixed-percent", "random-max-percent"}

#: Per kind: the actions, the fields beside those that choose pods, and those that must be there.
_KINDS: Mapping[str, tuple[set[str], set[str], set[str]]] = {
    "NetworkChaos": (
        {"netem", "delay", "loss", "duplicate", "corrupt", "partition", "bandwidth"},
        {
            "action", "direction", "target", "externalTargets", "device", "delay", "loss", "duplicate", "corrupt",
            "bandwidth",
        },
        {"action"},
    ),
    "PodChaos": (
        {"pod-kill", "pod-failure", "container-kill"},
        {"action", "gracePeriod", "containerNames"},
        {"action"},
    ),
    "StressChaos": (set(), {"stressors", "stressngStressors", "containerNames"}, {"stressors"}),
    "IOChaos": (
        {"latency", "fault", "attrOverride", "mistake"},
        {"action", "delay", "errno", "attr", "mistake", "path", "methods", "percent", "volumePath", "containerNames"},
        {"action", "volumePath"},
    ),
    "TimeChaos": (set(), {"timeOffset", "clockIds", "containerNames"}, {"timeOffset"}),
    "LocalChaos": (
        {
            "flood", "herd", "hostile", "lost-tail", "publisher-dead", "replay-gone", "swapped-replay", "wrong-topic",
        },
        {"action", "rate", "drop", "readers"},
        {"action"},
    ),
}  # fmt: skip

#: What an action needs under its own name.
_DETAILS = {
    "delay": ({"latency", "jitter", "correlation", "reorder"}, {"latency"}),
    "loss": ({"loss", "correlation"}, {"loss"}),
    "corrupt": ({"corrupt", "correlation"}, {"corrupt"}),
    "duplicate": ({"duplicate", "correlation"}, {"duplicate"}),
    "bandwidth": ({"rate", "limit", "buffer", "peakrate", "minburst"}, {"rate", "limit", "buffer"}),
}

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class ExperimentError(ValueError):
    """A file is not what Chaos Mesh, or this program, would take: says where and what would be right."""


@dataclass(frozen=True)
class Experiment:
    """One document: a fault, whom it hits, and how long it is held."""

    name: str
    kind: str
    spec: Mapping[str, Any]
    local: Mapping[str, str]
    file: str

    @property
    def action(self) -> str:
        return str(self.spec.get("action", ""))

    @property
    def hold(self) -> float:
        """Seconds between injecting and healing."""
        return seconds(self.spec.get("duration", "4s"))

    @property
    def labels(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.spec["selector"]["labelSelectors"]
        return found

    @property
    def on_index(self) -> bool:
        """Whether it is the index that is hit, and not pods."""
        return self.labels.get("app.kubernetes.io/component") == "index"


def seconds(text: object) -> float:
    """A duration as Go writes it, such as ``1m30s`` or ``-500ms``."""
    found = re.fullmatch(r"([+-]?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)", str(text))
    if not found:
        raise ExperimentError(f"{text!r} is no duration such as 500ms or 1m30s")
    total = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", found[2]))
    return -total if found[1] == "-" else total


def load(path: Path) -> list[Experiment]:
    """Every experiment of a file. Raises :class:`ExperimentError` naming the document and the field."""
    with path.open() as file:
        documents = [document for document in yaml.safe_load_all(file) if document is not None]
    if not documents:
        raise ExperimentError(f"{path} has no experiments")
    found = [_experiment(document, path) for document in documents]
    names = [experiment.name for experiment in found]
    if len(set(names)) < len(names):
        raise ExperimentError(f"{path}: two experiments have one name: {sorted(names)}")
    return found


def _experiment(document: Any, path: Path) -> Experiment:
    if not isinstance(document, dict) or not isinstance(document.get("metadata"), dict):
        raise ExperimentError(f"{path}: a document without metadata")
    metadata, kind, spec = document["metadata"], document.get("kind"), document.get("spec")
    where = f"{path.name}: {metadata.get('name')}"
    problems = list(_problems(document, kind, spec, metadata))
    if problems:
        raise ExperimentError(f"{where}: {'; '.join(problems)}")
    notes = metadata.get("annotations", {})
    local = {key.removeprefix(LOCAL): str(value) for key, value in notes.items() if key.startswith(LOCAL)}
    return Experiment(metadata["name"], kind, spec, local, path.name)


def _problems(document: Mapping[str, Any], kind: Any, spec: Any, metadata: Mapping[str, Any]) -> Iterator[str]:
    if strange := set(document) - {"apiVersion", "kind", "metadata", "spec"}:
        yield f"unknown fields {sorted(strange)}"
    if kind not in _KINDS:
        yield f"kind {kind!r} is none of {sorted(_KINDS)}"
        return
    version = "kvindex.local/v1" if kind == "LocalChaos" else "chaos-mesh.org/v1alpha1"
    if document.get("apiVersion") != version:
        yield f"apiVersion of {kind} is {version}"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", str(metadata.get("name"))):
        yield "metadata.name is no name of a resource"
    if not isinstance(spec, dict):
        yield "no spec"
        return
    actions, fields, needed = _KINDS[kind]
    if strange := set(spec) - fields - _TARGETED:
        yield f"spec has no {sorted(strange)}; {kind} has {sorted(fields | _TARGETED)}"
    if missing := (needed | {"selector", "mode"}) - set(spec):
        yield f"spec needs {sorted(missing)}"
    if actions and spec.get("action") not in actions:
        yield f"action {spec.get('action')!r} is none of {sorted(actions)}"
    yield from _choice(spec, "spec")
    if isinstance(spec.get("target"), dict):
        yield from _choice(spec["target"], "spec.target")
    for name in ("duration", "delay" if kind == "IOChaos" else "", "timeOffset"):
        if name in spec:
            try:
                seconds(spec[name])
            except ExperimentError as error:
                yield f"{name}: {error}"
    if kind == "NetworkChaos" and spec.get("action") in _DETAILS:
        known, wanted = _DETAILS[spec["action"]]
        details = spec.get(spec["action"])
        if not isinstance(details, dict):
            yield f"action {spec['action']} needs spec.{spec['action']}"
        elif set(details) - known or wanted - set(details):
            yield f"spec.{spec['action']} needs {sorted(wanted)} and knows {sorted(known)}"


def _choice(spec: Mapping[str, Any], where: str) -> Iterator[str]:
    mode, selector = spec.get("mode"), spec.get("selector")
    if mode is not None and mode not in _MODES:
        yield f"{where}.mode {mode!r} is none of {sorted(_MODES)}"
    if mode not in (None, "one", "all") and not isinstance(spec.get("value"), str):
        yield f"{where}.mode {mode} needs a value, as a string"
    if not isinstance(selector, dict) or not isinstance(selector.get("labelSelectors"), dict):
        yield f"{where}.selector needs labelSelectors"
    elif strange := set(selector) - _SELECTOR:
        yield f"{where}.selector has no {sorted(strange)}"

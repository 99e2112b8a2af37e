"""Experiments from YAML files: Chaos Mesh's kinds, checked against ``experiment.schema.yaml``.

The same files go to a cluster with ``kubectl apply`` and run here with ``python -m chaos``. Facts for a local run alone
are in annotations under ``kvindex.local/``, which Chaos Mesh ignores. Faults for which it has no kind are of the kind
``LocalChaos``, in a file of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

__all__ = ["Experiment", "ExperimentError", "load", "seconds"]

LOCAL = "kvindex.local/"

_SCHEMA = yaml.safe_load(Path(__file__).with_name("experiment.schema.yaml").read_text())
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class ExperimentError(ValueError):
    """Chaos Mesh, or this program, would not accept a file. The message has the place and the valid form."""


@dataclass(frozen=True)
class Experiment:
    """One document: a fault, its targets, and the time for which it is held."""

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
        """Whether the fault hits the index instead of pods."""
        return self.labels.get("app.kubernetes.io/component") == "index"


def seconds(text: object) -> float:
    """The seconds of a duration in Go's form, such as ``1m30s`` or ``-500ms``."""
    found = re.fullmatch(r"([+-]?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)", str(text))
    if not found:
        raise ExperimentError(f"{text!r} is no duration such as 500ms or 1m30s")
    total = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", found[2]))
    return -total if found[1] == "-" else total


def load(path: Path) -> list[Experiment]:
    """Load every experiment of a file. Raises :class:`ExperimentError`, which names the document and the field."""
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
    metadata, kind = document["metadata"], str(document.get("kind"))
    where = f"{path.name}: {metadata.get('name')}"
    if kind not in _SCHEMA["$defs"] or not kind.endswith("Chaos"):
        raise ExperimentError(f"{where}: kind {kind} is not one of those in experiment.schema.yaml")
    found = Draft202012Validator({**_SCHEMA, "$ref": f"#/$defs/{kind}"}).iter_errors(document)
    if problems := [f"{'.'.join(map(str, each.path)) or 'document'}: {each.message}" for each in found]:
        raise ExperimentError(f"{where}: {'; '.join(problems)}")
    notes = metadata.get("annotations", {})
    local = {key.removeprefix(LOCAL): str(value) for key, value in notes.items() if key.startswith(LOCAL)}
    return Experiment(metadata["name"], kind, document["spec"], local, path.name)

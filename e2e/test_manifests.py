"""The example manifests, against Kubernetes' schemas, the engines' flags, and the needs of an index."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kvindex import PodSource, PrefixIndex
from kvindex.sync.frames import parse_topic

from .engines.flags import FIXTURES, MANIFESTS, arguments

pytestmark = pytest.mark.quick

VERSIONS = ["1.28", "1.32", kubernetes_validate.latest_version()]


@pytest.fixture(params=list(MANIFESTS))
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def documents(engine: str) -> dict[str, Any]:
    """The manifest's documents by kind."""
    documents = list(yaml.safe_load_all((FIXTURES / MANIFESTS[engine]).read_text()))
    assert [each["kind"] for each in documents] == ["Deployment", "Service"]
    return {each["kind"]: each for each in documents}


@pytest.fixture
def container(documents: dict[str, Any]) -> dict[str, Any]:
    (found,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def options(engine: str) -> dict[str, str]:
    found = {}
    for argument in arguments(FIXTURES / MANIFESTS[engine]):
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            found[name] = value
    return found


def test_every_manifest_there_is_is_checked() -> None:
    assert {path.name for path in Path(FIXTURES).glob("*.yaml")} == set(MANIFESTS.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_it(documents: dict[str, Any], version: str) -> None:
    for document in documents.values():
        assert kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_would_say_what_is_wrong(documents: dict[str, Any]) -> None:
    for path, name in (([], "replica"), (["template", "spec", "containers", 0], "liveProbe")):
        wrong = copy.deepcopy(documents["Deployment"])
        place = wrong["spec"]
        for step in path:
            place = place[step]
        place[name] = 1
        with pytest.raises(kubernetes_validate.ValidationError, match=name):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_service_finds_the_pods_and_their_ports(documents: dict[str, Any], container: dict[str, Any]) -> None:
    deployment, service = documents["Deployment"]["spec"], documents["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    assert service["clusterIP"] == "None", "a stream behind a shared address would come from any pod"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    assert set(ports) == {"http", "kv-events", "kv-replay"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_labels_and_environment(engine: str, documents: dict[str, Any], container: dict[str, Any]) -> None:
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["model.aibrix.ai/kv-events-enabled"] == "true"
    assert labels["model.aibrix.ai/name"] == options(engine)["--served-model-name"]
    assert labels["model.aibrix.ai/port"] == options(engine)["--port"]
    environment = {each["name"]: each for each in container["env"]}
    assert environment["PYTHONHASHSEED"]["value"].isdigit()
    assert environment["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_the_release_accepts_every_flag(engine: str, container: dict[str, Any]) -> None:
    """Against the recorded list of the release's own parser; make e2e-engines uses the parser itself."""
    accepted = json.loads((FIXTURES / "flags" / f"{engine}.json").read_text())
    assert re.search(r":v(.+)$", container["image"])[1] == accepted["version"]
    assert set(options(engine)) <= set(accepted["flags"])
    assert set(json.loads(options(engine)["--kv-events-config"])) <= set(accepted["kv_events_config"])


def test_an_index_can_follow_it(engine: str, container: dict[str, Any]) -> None:
    given = options(engine)
    config = json.loads(given["--kv-events-config"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config["publisher"] == "zmq"
    assert (config["endpoint"], config["replay_endpoint"]) == (
        f"tcp://*:{ports['kv-events']}",
        f"tcp://*:{ports['kv-replay']}",
    )
    assert parse_topic(config["topic"].encode()) == ("pod-0", given["--served-model-name"])
    size = int(given[{"vllm": "--block-size", "sglang": "--page-size"}[engine]])
    assert size % PrefixIndex().block_size == 0
    source = PodSource(
        "pod-0", endpoint=config["endpoint"].replace("*", "10.0.0.1"), topic=config["topic"], block_size=size,
        replay_endpoint=config["replay_endpoint"].replace("*", "10.0.0.1"), model=given["--served-model-name"],
    )  # fmt: skip
    assert source.workers()[0].endpoint == "tcp://10.0.0.1:5557"

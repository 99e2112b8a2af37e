"""The files in deploy/ that run the service: what Kubernetes accepts, and what the command line understands."""

from __future__ import annotations

import re
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kvindex import PodSource
from kvindex.cli import parser
from kvindex.discovery import KubernetesPods
from kvindex.discovery.kubernetes import ENABLED, MODEL
from kvindex.sim import SimConfig

pytestmark = pytest.mark.quick

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
DOCUMENTS: dict[str, Any] = {
    each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}


REPLICATION: dict[str, Any] = {
    each["metadata"]["name"]: each for each in yaml.safe_load_all((DEPLOY / "replication.yaml").read_text())
}


@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_kubernetes_accepts_it(kind: str, version: str) -> None:
    assert kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", REPLICATION)
def test_kubernetes_accepts_replication(name: str, version: str) -> None:
    assert kubernetes_validate.validate(REPLICATION[name], version, strict=True)


def test_collectors_may_see_pods_and_routers_have_another_secret() -> None:
    pods = {name: each["spec"]["template"] for name, each in REPLICATION.items()}
    keys = {}
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        assert REPLICATION[name]["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        env = {each["name"]: each["valueFrom"] for each in container["env"]}
        keys[name] = env["KVINDEX_LOG"]["secretKeyRef"]["key"]
    assert keys == {"kvindex-collector": "collector", "router": "router"}
    collector = pods["kvindex-collector"]["spec"]
    assert collector["serviceAccountName"] == DOCUMENTS["ServiceAccount"]["metadata"]["name"]
    args = parser().parse_args(collector["containers"][0]["args"])
    assert (args.command, args.kubernetes, args.fleet) == ("collect", "", "prod")
    services = yaml.safe_load((DEPLOY / "compose-replication.yaml").read_text())["services"]
    args = parser().parse_args(services["collector"]["command"])
    assert PodSource.from_string(args.pods[0], model=args.model).workers()[0][0] == "tcp://engine:5557"


def test_the_deployment_is_reached_and_may_see_pods() -> None:
    pod = DOCUMENTS["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert DOCUMENTS["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["serviceAccountName"] == DOCUMENTS["ServiceAccount"]["metadata"]["name"]
    assert DOCUMENTS["RoleBinding"]["subjects"][0]["name"] == DOCUMENTS["ServiceAccount"]["metadata"]["name"]
    assert set(DOCUMENTS["Role"]["rules"][0]["verbs"]) == {"list", "watch"}
    args = parser().parse_args(container["args"])
    assert (args.port, args.kubernetes, args.source) == (8090, "", "http://kvindex:8090")
    assert [port["containerPort"] for port in container["ports"]] == [args.port]
    assert DOCUMENTS["Service"]["spec"]["ports"][0]["port"] == args.port


def test_systemd_and_compose_start_what_there_is() -> None:
    (line,) = re.findall(r"^ExecStart=\S+/kvindex (.*)$", (DEPLOY / "kvindex.service").read_text(), re.M)
    args = parser().parse_args(shlex.split(line))
    assert (args.command, args.file, args.snapshot_every) == ("serve", "/etc/kvindex/pods.yaml", 300.0)
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    sim = parser().parse_args(services["engine"]["command"])
    serve = parser().parse_args(services["kvindex"]["command"])
    source = PodSource.from_string(serve.pods[0], model=serve.model)
    assert source.workers()[0] == (f"tcp://engine:{sim.port}", f"tcp://engine:{sim.replay_port}")
    assert source.model == SimConfig().model == sim.model
    assert (DEPLOY / services["kvindex"]["build"]["context"] / services["kvindex"]["build"]["dockerfile"]).exists()


GATEWAY: dict[str, Any] = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "gateway.yaml").read_text())}
# Resources of Kubernetes itself; the others are defined by the Gateway API and its Inference Extension.
BUILT_IN = ["ServiceAccount", "Role", "RoleBinding", "Deployment", "Service"]


@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", BUILT_IN)
def test_kubernetes_accepts_the_picker(kind: str, version: str) -> None:
    assert kubernetes_validate.validate(GATEWAY[kind], version, strict=True)


def test_the_pool_finds_the_picker_and_the_picker_its_pods() -> None:
    assert set(GATEWAY) == {*BUILT_IN, "InferencePool", "HTTPRoute"}
    pod = GATEWAY["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    args = parser().parse_args(container["args"])
    assert (args.command, args.port, args.kubernetes) == ("epp", 9002, "")
    service = GATEWAY["Service"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    pool = GATEWAY["InferencePool"]
    picker = pool["spec"]["endpointPickerRef"]
    assert (picker["name"], picker["port"]["number"]) == (service["metadata"]["name"], args.port)
    # The pods that the picker follows by default are those of the pool, and their requests go where discovery thinks.
    assert set(pool["spec"]["selector"]["matchLabels"]) == {MODEL, ENABLED}
    assert pool["spec"]["targetPorts"] == [{"number": signature(KubernetesPods).parameters["request_port"].default}]
    (backend,) = GATEWAY["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == args.port

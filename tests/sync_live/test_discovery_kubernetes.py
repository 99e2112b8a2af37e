"""Pods by label, from a local API server with the list and watch of pods.

The server simulates every way in which a real one is known to end a watch.
"""

from __future__ import annotations

import http.server
import json
import logging
import queue
import subprocess
import sys
import threading
import urllib.parse

import kubernetes
import pytest
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import EventManager, InvalidValueError, PodSource, PrefixIndex, StreamError
from kvindex.discovery import KubernetesPods
from kvindex.discovery import kubernetes as module

ENABLED, MODEL, LORA = "model.aibrix.ai/kv-events-enabled", "model.aibrix.ai/name", "model.aibrix.ai/lora-id"
LONG = 30.0
WATCHED = "true"


class Cluster:
    """Pods, their versions, and the HTTP server that reports them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.version = 100
        self.pods = {}
        self.watches = []  # (selector, namespace, queue of lines)
        self.asked = []
        self.failing = None  # an HTTP status instead of an answer
        self.gone = False  # every watch ends because its version is too old
        self.page = None  # pods in one answer
        self.pages = []
        cluster = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                cluster.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def api(self):
        configuration = kubernetes.client.Configuration(host=f"http://127.0.0.1:{self.server.server_port}")
        configuration.retries = False
        return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))

    def answer(self, request):
        url = urllib.parse.urlsplit(request.path)
        asked = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        namespace = parts[3] if parts[:3] == ["api", "v1", "namespaces"] else None
        assert parts[-1] == "pods"
        key, _, value = asked["labelSelector"].partition("=")
        with self.lock:
            self.asked.append((namespace, asked.get("watch") and asked["watch"].lower(), asked.get("resourceVersion")))
            failing = self.failing
            items = [pod for pod in self.pods.values() if self.chosen(pod, (key, value), namespace)]
            version = self.version
            if not failing and asked.get("watch"):
                lines = queue.Queue()
                self.watches.append(((key, value), namespace, lines))
        if failing:
            status = {"kind": "Status", "code": failing, "reason": "Failing", "message": "told to"}
            self.send(request, failing, status)
        elif not asked.get("watch"):
            meta = {"resourceVersion": str(version)}
            if self.page is not None:
                start = int(asked.get("continue", 0))
                self.pages.append((start, asked["limit"]))
                if start + self.page < len(items):
                    meta["continue"] = str(start + self.page)
                items = items[start : start + self.page]
            self.send(request, 200, {"kind": "PodList", "apiVersion": "v1", "metadata": meta, "items": items})
        else:
            request.send_response(200)
            request.send_header("Content-Type", "application/json")
            request.send_header("Transfer-Encoding", "chunked")
            request.send_header("Connection", "close")
            request.end_headers()
            if self.gone:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                lines.put(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
                lines.put(None)
            self.stream(request, lines)

    @staticmethod
    def send(request, status, content):
        body = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    @staticmethod
    def stream(request, lines):
        try:
            while (line := lines.get(timeout=LONG)) is not None:
                request.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                request.wfile.flush()
            request.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the watching client has gone
        request.close_connection = True

    @staticmethod
    def chosen(pod, selector, namespace):
        meta = pod["metadata"]
        return meta["labels"].get(selector[0]) == selector[1] and namespace in (None, meta["namespace"])

    def tell(self, kind, pod):
        self.line({"type": kind, "object": pod}, lambda selector, namespace: self.chosen(pod, selector, namespace))

    def line(self, content, to=lambda selector, namespace: True):
        data = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
        for selector, namespace, lines in self.watches:
            if to(selector, namespace):
                lines.put(data)

    def put(
        self, name, ip="127.77.0.1", *, namespace="default", phase="Running", labels=None, deleted=False, **annotations
    ):
        with self.lock:
            self.version += 1
            table = {ENABLED: "true", MODEL: "llama"} if labels is None else labels
            meta = {"name": name, "namespace": namespace, "labels": table, "resourceVersion": str(self.version)}
            if annotations:
                meta["annotations"] = annotations["annotations"]
            if deleted:
                meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            status = {"phase": phase, **({"podIP": ip} if ip else {})}
            known = (namespace, name) in self.pods
            pod = {"kind": "Pod", "apiVersion": "v1", "metadata": meta, "spec": {"containers": []}, "status": status}
            self.pods[namespace, name] = pod
            self.tell("MODIFIED" if known else "ADDED", pod)

    def delete(self, name, namespace="default"):
        with self.lock:
            self.version += 1
            pod = self.pods.pop((namespace, name))
            pod["metadata"]["resourceVersion"] = str(self.version)
            self.tell("DELETED", pod)

    def end_watches(self):
        with self.lock:
            for _, _, lines in self.watches:
                lines.put(None)
            self.watches.clear()

    def close(self):
        self.end_watches()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def cluster():
    with Cluster() as made:
        yield made


@pytest.fixture
def manager():
    with EventManager(PrefixIndex(block_size=4), policy=BRISK) as made:
        yield made


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    monkeypatch.setattr(module, "BACK_OFF", (0.02, 0.1))


def source(name, ip="127.77.0.1", **more):
    usual = {
        "endpoint": f"tcp://{ip}:5557",
        "replay_endpoint": f"tcp://{ip}:5558",
        "model": "llama",
        "address": f"http://{ip}:8000",
        "labels": {ENABLED: "true", MODEL: "llama"},
    }
    return PodSource(name, **{**usual, **more})


def watching(cluster, count=1):
    until(lambda: len(cluster.watches) >= count, LONG)


def test_pods_come_and_go_with_the_cluster(cluster, manager):
    cluster.put("a", "127.77.0.1")
    cluster.put("b", "127.77.0.2", namespace="other", labels={ENABLED: "true", MODEL: "mistral", LORA: "7"})
    cluster.put("off", "127.77.0.3", labels={ENABLED: "false", MODEL: "llama"})
    cluster.put("unlabelled", "127.77.0.4", labels={})
    with KubernetesPods(manager, api=cluster.api) as pods:
        expected = {
            "default/a": source("default/a"),
            "other/b": source(
                "other/b",
                "127.77.0.2",
                model="mistral",
                lora="7",
                labels={ENABLED: "true", MODEL: "mistral", LORA: "7"},
            ),
        }
        assert pods.pods == expected
        assert set(manager.status()) == set(expected)
        watching(cluster)
        cluster.put("c", None, phase="Pending")
        cluster.put("c", "127.77.0.5", phase="Pending")
        cluster.put("c", "127.77.0.5")
        until(lambda: pods.pods.get("default/c") == source("default/c", "127.77.0.5"), LONG)
        cluster.put("c", "127.77.0.6")
        until(lambda: pods.pods.get("default/c") == source("default/c", "127.77.0.6"), LONG)
        cluster.put("a", "127.77.0.1", deleted=True)
        until(lambda: set(pods.pods) == {"other/b", "default/c"}, LONG)
        cluster.delete("a")
        cluster.put("c", "127.77.0.6", phase="Failed")
        until(lambda: set(pods.pods) == {"other/b"}, LONG)
        cluster.delete("b", "other")
        until(lambda: not manager.status(), LONG)
        cluster.put("b", "fd00::7", namespace="other")
        expected = source(
            "other/b", endpoint="tcp://[fd00::7]:5557", replay_endpoint="tcp://[fd00::7]:5558",
            address="http://[fd00::7]:8000",
        )  # fmt: skip
        until(lambda: pods.pods == {"other/b": expected}, LONG)
        assert cluster.asked[0] == (None, None, None)
        assert cluster.asked[1][1:] == (WATCHED, "104")
    assert set(manager.status()) == {"other/b"}, "closing the watch leaves the pods"


def test_labels_and_annotations_say_what_events_do_not(cluster, manager):
    enabled = {ENABLED: "true", MODEL: "llama"}
    told = {
        "plain": ({}, {}, {"engine": "sglang"}),
        "aibrix": ({"model.aibrix.ai/engine": "vllm"}, {}, {"engine": "vllm"}),
        "own": ({"model.aibrix.ai/engine": "vllm"}, {"kvindex.io/engine": "trtllm"}, {"engine": "trtllm"}),
        "eagle": ({}, {"kvindex.io/engine": "vllm", "kvindex.io/eagle": "true"}, {"engine": "vllm", "eagle": True}),
        "groups": ({}, {"kvindex.io/engine": "vllm", "kvindex.io/eagle": "0+2"}, {"engine": "vllm", "eagle": {0, 2}}),
        "hybrid": ({"kvindex.io/hybrid": "true"}, {"kvindex.io/hybrid": "false"}, {"engine": "sglang", "hybrid": True}),
        "media": ({}, {"kvindex.io/ignore-media": "CPU, DISK"}, {"engine": "sglang", "ignore_media": {"CPU", "DISK"}}),
    }
    for number, (name, (labels, notes, _)) in enumerate(told.items()):
        cluster.put(name, f"127.77.0.{number + 1}", labels={**enabled, **labels}, annotations=notes)
    wrong = {"kvindex.io/engine": "vlm", "kvindex.io/eagle": "yes", "kvindex.io/hybrid": "maybe"}
    for number, (key, value) in enumerate(wrong.items()):
        cluster.put(f"wrong{number}", f"127.77.1.{number + 1}", annotations={key: value})
    cluster.put("drops", "127.77.1.9", annotations={"kvindex.io/eagle": "true"})
    with KubernetesPods(manager, api=cluster.api, engine="sglang") as pods:
        for number, (name, (labels, _, options)) in enumerate(told.items()):
            expected = source(f"default/{name}", f"127.77.0.{number + 1}", labels={**enabled, **labels}, **options)
            assert pods.pods[f"default/{name}"] == expected
        refused = pods.refused
    assert set(refused) == {f"default/{name}" for name in ("wrong0", "wrong1", "wrong2", "drops")}
    assert "'vlm'" in refused["default/wrong0"]
    assert "'yes'" in refused["default/wrong1"]
    assert "'maybe'" in refused["default/wrong2"]
    assert "engine='vllm'" in refused["default/drops"], "eagle is vLLM's, and the engine of all is SGLang"


def test_one_namespace_other_ports_and_a_label_of_ones_own(cluster, manager):
    cluster.put("a", labels={"serves": "yes", MODEL: "llama"}, namespace="mine")
    cluster.put("b", labels={"serves": "yes", MODEL: "llama"}, namespace="other")
    with KubernetesPods(
        manager, api=cluster.api, namespace="mine", selector="serves=yes", port=7000, replay_port=None, dp_size=2,
        presence="set",
    ) as pods:  # fmt: skip
        assert set(pods.pods) == {"mine/a"}
        workers = manager.status()["mine/a"].workers
        assert [(worker.endpoint, worker.replay_endpoint) for worker in workers.values()] == [
            ("tcp://127.77.0.1:7000", None),
            ("tcp://127.77.0.1:7001", None),
        ]
        assert cluster.asked[0][0] == "mine"


def test_a_pod_says_its_own_model_and_ports(cluster, manager, caplog):
    """The model and ports come from labels or annotations. A label takes precedence."""
    labels = {ENABLED: "true", "kvindex.io/port": "7001", "model.aibrix.ai/port": "9000", "role": "decode"}
    notes = {"team/model": "org/llama", "kvindex.io/port": "1", "kvindex.io/replay-port": "7002"}
    cluster.put("a", labels=labels, annotations=notes)
    cluster.put("b", "127.77.0.2", annotations={"team/model": "m", "kvindex.io/port": "http"})
    with KubernetesPods(manager, api=cluster.api, model_key="team/model", replay_port=None) as pods:
        (one,) = pods.pods.values()
        assert (one.endpoint, one.replay_endpoint) == ("tcp://127.77.0.1:7001", "tcp://127.77.0.1:7002")
        assert (one.model, one.address, one.labels["role"]) == ("org/llama", "http://127.77.0.1:9000", "decode")
        assert manager.pods() == pods.pods
        assert pods.refused == {"default/b": "its kvindex.io/port is 'http', which is not a port"}


def test_two_pods_at_one_endpoint_are_one_pod_and_one_refusal(cluster, manager):
    cluster.put("a")
    cluster.put("b")
    with KubernetesPods(manager, api=cluster.api) as pods:
        assert set(pods.pods) == {"default/a"}
        assert "followed as pod 'default/a' already" in pods.refused["default/b"]
        watching(cluster)
        cluster.delete("a")
        until(lambda: set(pods.pods) == {"default/b"} and not pods.refused, LONG)


def test_a_list_in_pages_is_read_to_its_end(cluster, manager):
    for number in range(5):
        cluster.put(f"p{number}", f"127.77.0.{number + 1}")
    cluster.page = 2
    with KubernetesPods(manager, api=cluster.api) as pods:
        assert set(pods.pods) == {f"default/p{number}" for number in range(5)}
    assert cluster.pages == [(0, "500"), (2, "500"), (4, "500")]


def test_a_server_that_forgets_every_version_is_asked_ever_more_rarely(cluster, manager, monkeypatch):
    """Repeating a list and a watch without a wait made 900 requests a second."""
    monkeypatch.setattr(module, "BACK_OFF", (0.001, 0.016))
    waits = []
    cluster.put("a")
    cluster.gone = True
    pods = KubernetesPods(manager, api=cluster.api)
    wait = pods._closing.wait
    monkeypatch.setattr(pods._closing, "wait", lambda seconds: waits.append(seconds) or wait(0.001))
    with pods:
        until(lambda: len(waits) >= 8, LONG)
        assert waits[:5] == sorted(waits[:5])
        assert all(0.016 <= each <= 0.016 * 1.25 for each in waits[5:8])
        asked = len(cluster.asked)
        assert asked <= 2 * (len(waits) + 2)
        cluster.put("b", "127.77.0.2")
        until(lambda: set(pods.pods) == {"default/a", "default/b"}, LONG)


def test_the_streams_behind_are_followed(cluster, manager):
    with LivePublisher(name="pod") as pod:
        endpoint, answers = pod.ranks[0]
        pod.publish(5)
        cluster.put("a", "127.0.0.1")
        ports = {"port": int(endpoint.rpartition(":")[2]), "replay_port": int(answers.rpartition(":")[2])}
        with KubernetesPods(manager, api=cluster.api, **ports):
            assert manager.wait_until_current(LONG)
            assert manager.status()["default/a"].blocks == 5


def test_a_watch_that_ends_is_taken_up_where_it_was(cluster, manager):
    with KubernetesPods(manager, api=cluster.api) as pods:
        watching(cluster)
        cluster.put("a")
        until(lambda: pods.pods, LONG)
        cluster.line({"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": "555"}}})
        cluster.end_watches()
        watching(cluster)
        assert cluster.asked[-1] == (None, WATCHED, "555")
        cluster.put("b", "127.77.0.2")
        until(lambda: set(pods.pods) == {"default/a", "default/b"}, LONG)
        assert [watch for _, watch, _ in cluster.asked].count(None) == 1, "listed once"


@pytest.mark.parametrize(
    "line",
    [
        {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}},
        {"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "Odd", "message": "?"}},
        {"type": "ADDED", "object": {"kind": "Pod"}},
        {"type": "ADDED"},
        [],
        b"no json\n",
        b"\xff\xfe\n",
    ],
    ids=["expired", "error", "no metadata", "no object", "list", "text", "bytes"],
)
def test_what_is_no_event_leads_to_a_new_list(cluster, manager, line):
    with KubernetesPods(manager, api=cluster.api) as pods:
        watching(cluster)
        with cluster.lock:  # an event that this watch does not report
            watches, cluster.watches = cluster.watches, []
        cluster.put("a")
        with cluster.lock:
            cluster.watches = watches
        cluster.line(line)
        until(lambda: set(pods.pods) == {"default/a"}, LONG)
        assert [watch for _, watch, _ in cluster.asked].count(None) >= 2


@pytest.mark.parametrize("status", [403, 500, 503])
def test_an_api_server_that_fails_for_a_while_is_logged_once(cluster, manager, caplog, status):
    cluster.put("a")
    with caplog.at_level(logging.INFO, "kvindex.discovery"), KubernetesPods(manager, api=cluster.api) as pods:
        watching(cluster)
        cluster.failing = status
        cluster.end_watches()
        asked = len(cluster.asked)
        until(lambda: len(cluster.asked) > asked + 3, LONG)
        assert set(pods.pods) == set(manager.status()) == {"default/a"}
        cluster.put("b", "127.77.0.2")
        cluster.failing = None
        until(lambda: set(pods.pods) == {"default/a", "default/b"}, LONG)
    complaints = [record.getMessage() for record in caplog.records if "cannot be watched" in record.getMessage()]
    assert len(complaints) == 1
    assert f"{status} " in complaints[0]
    assert "can be asked again" in caplog.text


def test_an_api_server_that_is_away_for_a_while(manager, caplog):
    with Cluster() as cluster:
        cluster.put("a")
        api = cluster.api
        pods = KubernetesPods(manager, api=api)
        pods.start()
        watching(cluster)
    try:
        until(lambda: "cannot be watched" in caplog.text, LONG)
        assert set(manager.status()) == {"default/a"}
    finally:
        pods.close()


def test_a_pod_without_a_model_is_refused_and_costs_the_others_nothing(cluster, manager, caplog):
    cluster.put("a", labels={ENABLED: "true"})
    cluster.put("b", "127.77.0.2")
    with KubernetesPods(manager, api=cluster.api) as pods:
        assert set(pods.pods) == {"default/b"}
        assert MODEL in pods.refused["default/a"]
        watching(cluster)
        cluster.put("a", labels={ENABLED: "true", "other": "1"})
        cluster.put("c", "127.77.0.3")
        until(lambda: "default/c" in pods.pods, LONG)
        cluster.put("a", "127.77.0.9")
        until(lambda: set(pods.pods) == {"default/a", "default/b", "default/c"}, LONG)
        assert not pods.refused
    assert caplog.text.count("default/a: cannot be followed") == 1


def test_a_start_that_can_not_be_raises(manager, cluster, monkeypatch):
    cluster.failing = 403
    with pytest.raises(StreamError, match="403"):
        KubernetesPods(manager, api=cluster.api).start()
    away = kubernetes.client.Configuration(host="http://127.0.0.1:1")
    away.retries = False
    with pytest.raises(StreamError, match="cannot be asked"):
        KubernetesPods(manager, api=kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(away))).start()
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nonexistent")
    with pytest.raises(StreamError, match="no account for Kubernetes"):
        KubernetesPods(manager).start()
    with pytest.raises(InvalidValueError):
        KubernetesPods(manager, api=cluster.api, port=0)
    with pytest.raises(InvalidValueError):
        KubernetesPods(manager, api=cluster.api, presence="sometimes")


def test_without_the_client_it_says_what_to_install(manager, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(StreamError, match=r"kvindex\[k8s\]"):
        KubernetesPods(manager).start()


def test_the_client_is_not_imported_before_it_is_used():
    code = "import sys, kvindex.discovery; print('kubernetes' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_close_ends_a_watch_in_which_nothing_happens(cluster):
    cluster.put("a")
    manager = EventManager(PrefixIndex(), policy=BRISK)
    pods = KubernetesPods(manager, api=cluster.api)
    pods.start()
    watching(cluster)
    pods.close()
    pods.close()
    assert not pods._thread.is_alive()
    manager.close()


def test_a_closed_manager_ends_the_watch(cluster):
    manager = EventManager(PrefixIndex(), policy=BRISK)
    pods = KubernetesPods(manager, api=cluster.api)
    pods.start()
    watching(cluster)
    manager.close()
    cluster.put("a")
    until(lambda: not pods._thread.is_alive(), LONG)
    pods.close()


def test_nothing_is_left_behind():
    with nothing_left_behind(), Cluster() as cluster, EventManager(PrefixIndex(), policy=BRISK) as manager:
        api = cluster.api
        with KubernetesPods(manager, api=api):
            watching(cluster)
        api.api_client.rest_client.pool_manager.clear()

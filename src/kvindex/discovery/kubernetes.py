"""Pods of a Kubernetes cluster, by label: :class:`KubernetesPods`. Needs ``pip install "kvindex[k8s]"``.

The labels are AIBrix's, so a cluster that was labelled for it needs nothing new:

======================================  ==================================================
``model.aibrix.ai/kv-events-enabled``   ``"true"``: this pod publishes KV events
``model.aibrix.ai/name``                the model that it serves
``model.aibrix.ai/lora-id``             the adapter that it serves, if it is made for one
``model.aibrix.ai/port``                where it takes requests
======================================  ==========================================="""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
import socket
import threading
import time
from typing import Any, Final

from ..errors import InvalidTypeError, InvalidValueError, KVIndexError, StreamError
from ..sync.addresses import join_tcp
from ..sync.source import PodSource, spelled
from .reconciler import Watcher

__all__ = ["ENABLED", "ENGINE", "LORA", "MODEL", "PORT", "REPLAY_PORT", "REQUEST_PORT", "KubernetesPods"]

ENABLED: Final = "model.aibrix.ai/kv-events-enabled"
MODEL: Final = "model.aibrix.ai/name"
LORA: Final = "model.aibrix.ai/lora-id"
REQUEST_PORT: Final = "model.aibrix.ai/port"

# AIBrix has no names for these.
PORT: Final = "kvindex.io/port"
REPLAY_PORT: Final = "kvindex.io/replay-port"

# The most pods in one answer: in an API server, requests for lists of thousands wait for memory.
PAGE: Final = 500
ENGINE: Final = "model.aibrix.ai/engine"
#: Annotations or labels of a pod, and the fields of its source.
TOLD: Final = {
    "kvindex.io/engine": "engine",
    "kvindex.io/eagle": "eagle",
    "kvindex.io/hybrid": "hybrid",
    "kvindex.io/ignore-media": "ignore_media",
}

# Seconds: the duration of one watch, after which the API server ends it and another continues at the same version, and
# the back-off while the server does not answer.
WATCH: Final = 240
BACK_OFF: Final = (1.0, 30.0)

_GONE: Final = 410

log = logging.getLogger("kvindex.discovery")


class KubernetesPods(Watcher):
    """Keeps a manager's pods equal to the running pods of a Kubernetes cluster. A context manager.

    A pod is added when it runs and has an IP address, and removed when it ends. Labels or annotations may override its
    model and ports; a label takes precedence. The service account needs ``list`` and ``watch`` of pods.

    :meth:`start` lists the pods. It raises :class:`StreamError` if the API server does not answer or the ``kubernetes``
    package is not installed. From then on, the pods stay as they are while the server does not answer, and the problem
    is logged once. A pod that cannot be followed is logged once and listed in ``refused``. When it is closed, the pods
    stay in the manager.

    Args:
        manager: A :class:`kvindex.EventManager` or a :class:`kvindex.aio.AsyncEventManager`.
        namespace: Namespace of the pods; None for all, which needs a ClusterRole.
        selector: Label selector, AIBrix's ``model.aibrix.ai/kv-events-enabled=true`` by default.
        port: Port of the events of rank 0. Each further data-parallel rank uses the next one.
        replay_port: Port of the replays of rank 0; None for engines without replays.
        request_port: Port of requests, for ``PodSource.address``.
        model_key: Label or annotation with the model.
        port_key: Label or annotation with the port of the events.
        replay_port_key: Label or annotation with the port of the replays.
        request_port_key: Label or annotation with the port of requests.
        api: A ``kubernetes.client.CoreV1Api``; None for the service account of the pod that runs this, or else the
            local ``kubeconfig``.
        options: Further fields of :class:`~kvindex.PodSource` for every pod, such as ``dp_size`` or ``presence``.

    Raises:
        InvalidTypeError: ``manager`` is not a manager.
    """

    def __init__(
        self, manager: Any, *, namespace: str | None = None, selector: str = f"{ENABLED}=true",
        port: int = 5557, replay_port: int | None = 5558, request_port: int = 8000, model_key: str = MODEL,
        port_key: str = PORT, replay_port_key: str = REPLAY_PORT, request_port_key: str = REQUEST_PORT,
        api: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(manager, "kvindex-kubernetes")
        self._namespace = namespace
        self._selector = selector
        self._port = port
        self._replay_port = replay_port
        self._request_port = request_port
        self._model_key = model_key
        self._port_keys = port_key, replay_port_key, request_port_key
        self._options = options
        self._api = api
        self._found: dict[str, PodSource] = {}
        self._odd: dict[str, str] = {}
        self._version: str | None = None
        self._guard = threading.Lock()
        self._line: socket.socket | None = None  # the connection of the watch, through a descriptor of our own
        self._trouble = ""
        self._wait = BACK_OFF[0]
        self._source("example", "127.0.0.1", {}, {model_key: "example"})  # raises here if the options contain a mistake

    @property
    def refused(self) -> dict[str, str]:
        return {**super().refused, **self._odd}

    def _begin(self) -> None:
        try:
            self._kubernetes: Any = importlib.import_module("kubernetes")
        except ImportError:
            raise StreamError('the kubernetes package is not installed: pip install "kvindex[k8s]"') from None
        if self._api is None:
            try:
                self._kubernetes.config.load_config()
            except Exception as error:
                raise StreamError(f"no account for Kubernetes: {error}") from error
            self._api = self._kubernetes.client.CoreV1Api()
        try:
            self._list()
        except KVIndexError:
            raise
        except Exception as error:
            raise StreamError(f"Kubernetes cannot be asked for pods: {_told(error)}") from error

    # The client's errors have no common base class: ApiException, urllib3's errors, and ValueErrors of its models.
    def _turn(self) -> None:
        try:
            start = time.monotonic()
            if self._version is None:
                self._list()
            self._watch()
            # A proxy may end every watch at once, so the next one has to wait.
            self._closing.wait(max(0.0, start + BACK_OFF[0] - time.monotonic()))
            self._wait = BACK_OFF[0]
        except StreamError:
            raise
        except Exception as error:
            # After any error, only a list shows which pods there are.
            self._version = None
            if self._closing.is_set():
                return
            if getattr(error, "status", None) == _GONE:
                # The version is too old to be watched from, which is usual now and then. Without the back-off, a server
                # that gives only this answer would get 900 requests a second.
                log.debug("Kubernetes forgot the version that was watched, and is asked for a list")
            elif _told(error) != self._trouble:
                self._trouble = _told(error)
                log.warning("Kubernetes cannot be watched, the pods stay as they are: %s", self._trouble)
            self._closing.wait(self._wait * (1.0 + 0.25 * random.random()))
            self._wait = min(BACK_OFF[1], 2 * self._wait)

    def _ask(self, **how: Any) -> Any:
        if self._namespace is None:
            return self._api.list_pod_for_all_namespaces(label_selector=self._selector, **how)
        return self._api.list_namespaced_pod(self._namespace, label_selector=self._selector, **how)

    def _list(self) -> None:
        answer = self._ask(limit=PAGE, _request_timeout=(5, 30))
        pods = list(answer.items)
        while token := getattr(answer.metadata, "_continue", None):
            answer = self._ask(limit=PAGE, _continue=token, _request_timeout=(5, 30))
            pods += answer.items
        self._found.clear()
        self._odd.clear()
        for pod in pods:
            self._note(pod)
        self._reconciler.reconcile(self._found)
        self._version = answer.metadata.resource_version
        if self._trouble:
            log.info("Kubernetes can be asked again")
        self._trouble = ""

    def _watch(self) -> None:
        @functools.wraps(self._api.list_namespaced_pod)
        def ask(**how: Any) -> Any:
            response = self._ask(**how)
            with self._guard:
                self._line = socket.socket(fileno=os.dup(response.fileno()))
            return response

        watch = self._kubernetes.watch.Watch(return_type="V1Pod")
        try:
            for event in watch.stream(
                ask, resource_version=self._version, timeout_seconds=WATCH, allow_watch_bookmarks=True,
                _request_timeout=(5, WATCH + 15),
            ):  # fmt: skip
                if self._closing.is_set():
                    return
                if event is None:
                    raise ValueError("an event that is not JSON")
                if event["type"] in ("ADDED", "MODIFIED"):
                    self._note(event["object"])
                elif event["type"] == "DELETED":
                    self._forget(_name(event["object"]))
                self._reconciler.reconcile(self._found)
                # The version that the watch keeps is not used: older clients do not advance it on a bookmark.
                self._version = event["raw_object"]["metadata"]["resourceVersion"]
                self._wait = BACK_OFF[0]
        finally:
            with self._guard:
                if self._line is not None:
                    self._line.close()
                    self._line = None

    def _interrupt(self) -> None:
        # The watch waits in a read, which ends only with the connection. The client's own stop() does not end the
        # connection in releases up to 35, nor in 37 if the server has announced that it will close it.
        with self._guard, contextlib.suppress(OSError):
            if self._line is not None:
                self._line.shutdown(socket.SHUT_RDWR)

    def _note(self, pod: Any) -> None:
        name, status = _name(pod), pod.status
        running = status is not None and status.phase == "Running" and status.pod_ip
        if not running or pod.metadata.deletion_timestamp is not None:
            self._forget(name)
            return
        try:
            meta = pod.metadata
            self._found[name] = self._source(name, status.pod_ip, meta.labels or {}, meta.annotations or {})
            self._odd.pop(name, None)
        except (InvalidValueError, InvalidTypeError) as error:
            self._found.pop(name, None)
            if self._odd.get(name) != str(error):
                log.warning("%s: cannot be followed: %s", name, error)
            self._odd[name] = str(error)

    def _forget(self, name: str) -> None:
        self._found.pop(name, None)
        self._odd.pop(name, None)

    def _source(self, name: str, ip: str, labels: dict[str, str], annotations: dict[str, str]) -> PodSource:
        said = {**annotations, **labels}
        if not said.get(self._model_key):
            raise InvalidValueError(f"it has no label {self._model_key}, which names its model")
        usual = self._port, self._replay_port, self._request_port
        live, replay, requests = (
            _port(said[key], key) if said.get(key) else port for key, port in zip(self._port_keys, usual, strict=True)
        )
        assert live is not None
        described = {
            "address": None if requests is None else join_tcp(ip, requests).replace("tcp://", "http://"),
            "labels": labels,
            "lora": labels.get(LORA) or None,
        }
        told = {field: said[key] for key, field in TOLD.items() if said.get(key)}
        if said.get(ENGINE):
            told.setdefault("engine", said[ENGINE])
        # The annotations and labels of a pod for its own engine take precedence over the options for all pods.
        options = {**described, **self._options, **spelled(told)}
        return PodSource(
            name, endpoint=join_tcp(ip, live), replay_endpoint=None if replay is None else join_tcp(ip, replay),
            model=said[self._model_key], **options,
        )  # fmt: skip


def _port(text: str, key: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 65535:
        raise InvalidValueError(f"its {key} is {text!r:.60}, which is not a port")
    return int(text)


def _name(pod: Any) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def _told(error: Exception) -> str:
    status, reason = getattr(error, "status", None), getattr(error, "reason", None)
    return f"{status} {reason}" if status is not None else f"{type(error).__name__}: {' '.join(str(error).split())}"

"""The complete LiteLLM proxy, started like a user starts it, with the handler's name in its configuration."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

pytest.importorskip("granian", reason="litellm[proxy] is not installed: make test-integrations-nightly")

PROXY = Path(sys.executable).with_name("litellm")
HTTP = urllib3.PoolManager(retries=False, timeout=60.0)
LONG = [{"role": "user", "content": "a prompt of some length " * 20}]


@pytest.fixture
def proxy(pods: Any, tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    deployments = [
        {
            "model_name": "llama",
            "litellm_params": {"model": "openai/sim", "api_base": f"{pod.url}/v1", "api_key": "none"},
            "model_info": {"id": name, "kv_events": ",".join([*pod.ranks[0], "engine=vllm"])},
        }
        for name, pod in pods.items()
    ]
    settings = {"callbacks": ["kvindex.integrations.litellm.handler"]}
    configuration = tmp_path / "config.yaml"
    configuration.write_text(yaml.safe_dump({"model_list": deployments, "litellm_settings": settings}))
    # The proxy does not start without a key. It listens on the loopback interface only.
    env = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    command = [str(PROXY), "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240.0
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                if HTTP.request("GET", f"http://127.0.0.1:{port}/health/liveliness").status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                assert time.monotonic() < end, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        HTTP.clear()


def test_the_proxy_sends_turns_where_their_prompt_is(pods, talks, proxy) -> None:
    def chat(messages: Any) -> tuple[str, int, str]:
        body = {"model": "llama", "messages": messages, "max_tokens": 16}
        answer = HTTP.request("POST", f"{proxy}/v1/chat/completions", json=body)
        assert answer.status == 200, answer.data
        found = answer.json()
        usage = found["usage"]["prompt_tokens_details"]
        return found["choices"][0]["message"]["content"], usage["cached_tokens"], answer.headers["x-litellm-model-id"]

    # The first request makes the handler follow the pods. Wait until a prompt is always routed to the same pod.
    held = chat(LONG)[2]
    end = time.monotonic() + 30.0
    while {chat(LONG)[2] for _ in range(6)} != {held}:
        assert time.monotonic() < end
        pods[held].ask("status")
    talk = talks(count=6)
    served: dict[int, set[str]] = {}
    for _ in range(3):
        for number, messages in enumerate(talk.chats):
            text, cached, name = chat(messages)
            served.setdefault(number, set()).add(name)
            talk.heard(messages, text, cached)
    assert talk.cached == talk.possible > 1500
    assert {len(each) for each in served.values()} == {1}

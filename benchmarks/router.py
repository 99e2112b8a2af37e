"""Requests a second through the router of the examples, beside one pod asked directly.

wrk sends one chat of ``--turns`` messages over and over; four simulated pods answer one token. The pods, the router and
wrk share this machine's processors, so the rows show the added cost of the router, not its capacity alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from kvindex.sim import SimProcess
from kvindex.sim import tokenizer as sim_tokenizer

from .served import free_url, started, wrk

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "http_router.py"


def measure(*, seconds: int = 10, connections: int = 16, turns: int = 8) -> Iterator[str]:
    """``seconds``: for each row; ``connections``: of wrk; ``turns``: messages of about 250 tokens in the chat."""
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": f"{turn} what the cache holds " * 10}
        for turn in range(turns)
    ]
    body = json.dumps({"model": "sim", "messages": messages, "max_tokens": 1})
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sim_tokenizer.save(directory)
        script = directory / "post.lua"
        script.write_text(
            f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = [==[{body}]==]\n'
        )
        with ThreadPoolExecutor(4) as starters:
            pods = list(starters.map(lambda name: stack.enter_context(SimProcess(name=name, http=0)), "abcd"))
        listed = [
            {"name": pod.name, "endpoint": pod.ranks[0][0], "replay_endpoint": pod.ranks[0][1], "model": "sim",
             "engine": "vllm", "address": pod.url}
            for pod in pods
        ]  # fmt: skip
        (directory / "pods.json").write_text(json.dumps(listed))
        url = free_url()
        ends = [f"--pods={directory / 'pods.json'}", f"--model={directory}", f"--port={url.rpartition(':')[2]}"]
        router = stack.enter_context(started([str(EXAMPLE), *ends], url))
        where = {"one pod, directly": (pods[0].url, pods[0].pid), "the router, four pods": (url, router.pid)}
        for what, (served, pid) in where.items():
            yield wrk(what, f"{served}/v1/chat/completions", pid, script, seconds, connections).text

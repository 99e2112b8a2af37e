"""``python -m benchmarks.router``: requests a second through the router of the examples, beside one pod asked directly.

wrk sends one chat of ``--turns`` messages over and over; four simulated pods answer one token. The pods, the router and
wrk share this machine's processors, so the rows say what the router adds rather than what it can do alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from kvindex.sim import SimProcess
from kvindex.sim import tokenizer as sim_tokenizer

from .report import amount, say

__all__ = ["main"]

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "http_router.py"


class Served(NamedTuple):
    """What wrk found: requests a second, and seconds of an answer."""

    rate: float
    p50: float
    p99: float


_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def wrk(what: str, url: str, pid: int, script: Path, options: argparse.Namespace) -> Served:
    """Say what wrk found, and the processor time of the process that served it, which other load changes little."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    command = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}", "--latency", f"-s{script}", url]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spent = sum(process.cpu_times()[:2]) - before
    patterns = (r"(\d+) requests in", r"Requests/sec: +(\S+)", r"50% +(\S+)", r"99% +(\S+)")
    found = [re.search(pattern, said) for pattern in patterns]
    served, rate, p50, p99 = (each[1] if each else "0s" for each in found)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    say(
        f"{what}: {rate} requests/s, p50 {p50}, p99 {p99}, {failed[1] if failed else 0} failed; "
        f"{amount(1000 * spent / max(int(served), 1))} ms of processor time a request"
    )
    seconds = [float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(us|ms|s)", f"{p50} {p99}")]
    return Served(float(rate), *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router", description=__doc__)
    parser.add_argument("--seconds", type=int, default=10, help="of each row (%(default)s)")
    parser.add_argument("--connections", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="messages of about 250 tokens in the chat (%(default)s)")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: make bench-router installs it on Debian")
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": f"{turn} what the cache holds " * 10}
        for turn in range(options.turns)
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
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = [f"--pods={directory / 'pods.json'}", f"--model={directory}", f"--port={port}"]
        router = subprocess.Popen([sys.executable, EXAMPLE, *arguments])
        stack.callback(router.wait)
        stack.callback(router.kill)
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                urlopen(f"{url}/health").close()
                break
            except (URLError, OSError):
                time.sleep(0.1)
        for what, where, pid in (
            ("one pod, directly", pods[0].url, pods[0].pid),
            ("the router, four pods", url, router.pid),
        ):
            wrk(what, f"{where}/v1/chat/completions", pid, script, options)


if __name__ == "__main__":
    main()

"""Services in processes of their own, under the load of wrk."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import psutil

from .publishers import until
from .report import amount

__all__ = ["Served", "free_url", "started", "wrk"]


class Served(NamedTuple):
    """The results of wrk: requests a second, seconds of an answer, and all of them as a line of text."""

    rate: float
    p50: float
    p99: float
    text: str


_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"http://127.0.0.1:{found.getsockname()[1]}"


@contextmanager
def started(command: list[str], url: str) -> Iterator[psutil.Popen]:
    """Run Python with these arguments, as a service that answers ``/health``."""

    def answers() -> bool:
        if served.poll() is not None:
            sys.exit(f"{' '.join(command)} ended with status {served.returncode}")
        try:
            urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            return False
        return True

    served = psutil.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(answers)
        yield served
    finally:
        served.kill()
        served.wait()


def wrk(what: str, url: str, pid: int, script: Path, seconds: int, connections: int) -> Served:
    """The results of wrk, and the processor time of the serving process, which depends little on other load."""
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: make bench-router and make bench-service install it on Debian")
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", f"-s{script}", url]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spent = sum(process.cpu_times()[:2]) - before
    patterns = (r"(\d+) requests in", r"Requests/sec: +(\S+)", r"50% +(\S+)", r"99% +(\S+)")
    found = [re.search(pattern, said) for pattern in patterns]
    served, rate, p50, p99 = (each[1] if each else "0s" for each in found)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    text = (
        f"{what}: {rate} requests/s, p50 {p50}, p99 {p99}, {failed[1] if failed else 0} failed; "
        f"{amount(1000 * spent / max(int(served), 1))} ms of processor time a request"
    )
    times = [float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(us|ms|s)", f"{p50} {p99}")]
    return Served(float(rate), *times, text)

"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

__all__ = ["commit", "described", "resident"]


def commit() -> str:
    """The checkout's commit, marked when it has been changed since; empty outside a repository."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def described(*packages: str) -> dict[str, str]:
    """Processor, caches, system and versions, for people."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpu) if line.startswith("model name")]
    facts = {
        "processor": f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}",
        "caches": ", ".join(_caches()) or "unknown",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load average": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "Python": platform.python_version(),
        "kvindex": commit() or "unknown",
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _caches() -> list[str]:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return found

"""The machine and the versions that a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["commit", "described"]


def _said(*command: str) -> str:
    """The output of a command; empty where it fails or is not installed."""
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The checkout's commit, marked when it has been changed since; empty outside a repository."""
    return _said("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*").strip()


def described(*packages: str) -> dict[str, str]:
    """Processor, caches, system and versions, as readable text."""
    model = re.search(r"^Model name: +(.+)", _said("lscpu"), re.MULTILINE)
    caches = re.findall(r"^(L1d|L2|L3) +(\w+)", _said("lscpu", "--caches=NAME,ONE-SIZE"), re.MULTILINE)
    facts = {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "caches": ", ".join(f"{level} {size}" for level, size in caches) or "unknown",
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

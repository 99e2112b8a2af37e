"""Builds of committed code, each in a directory of its own under ``.build/gate``."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "BrokenRun", "Build", "built"]

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".build" / "gate"


class BrokenRun(Exception):
    """Nothing can be said about speed: something did not build, start or answer. Exit code 2, never 1."""


class Build(NamedTuple):
    """One revision: what it is called, its commit, and the directory that its package is imported from."""

    name: str
    commit: str
    library: Path

    def environment(self) -> dict[str, str]:
        """For a Python that imports this build of the package, and this checkout's benchmarks."""
        path = [str(self.library), str(ROOT)]
        return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}


def built(revision: str, *, changes: bool = False) -> Build:
    """The package of ``revision``; ``changes``: with what is changed in this checkout and not committed.

    Raises :class:`BrokenRun` when there is no such revision or it does not build.
    """
    # A commit of the changes, which belongs to no branch; nothing when there are none.
    changed = _git("stash", "create") if changes else ""
    commit = changed or _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not commit:
        raise BrokenRun(f"there is no revision {revision!r} here")
    # Revisions that differ in nothing that is built share a build.
    parts = [_git("rev-parse", f"{commit}:{part}") for part in ("src", "setup.py", "pyproject.toml")]
    place = KEPT / sha256("".join(parts).encode()).hexdigest()[:16]
    library = place / "lib"
    if not (place / "built").exists():
        shutil.rmtree(place, ignore_errors=True)
        source = place / "source"
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(source, filter="data")
        into = ["--build-base", str(place / "objects"), "--build-lib", str(library)]
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build", *into],
            cwd=source, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BrokenRun(f"{revision} does not build:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        (place / "built").touch()
    return Build(revision, commit, library)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""

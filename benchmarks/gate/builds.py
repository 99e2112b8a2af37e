"""Builds of committed code, each in a directory of its own under ``.build/gate``."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "BrokenRun", "Build", "built", "frozen", "importing"]

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".build" / "gate"


class BrokenRun(Exception):
    """Nothing can be said about speed: something did not build, start or answer. Exit code 2, never 1."""


class Build(NamedTuple):
    """One revision: what it is called, its commit, and the directories of its package and of the benchmarks."""

    name: str
    commit: str
    library: Path
    benchmarks: Path = ROOT

    def environment(self) -> dict[str, str]:
        """For a Python that imports this build of the package."""
        path = [str(self.library), str(self.benchmarks)]
        # PYTHONSAFEPATH, or the checkout's own package would come first where it is the current directory.
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
            # Python 3.11.2, which is Debian 12's, has no filters yet; what is unpacked is our own.
            files.extraction_filter = getattr(tarfile, "data_filter", None)
            files.extractall(source)
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


@contextmanager
def frozen(*builds: Build) -> Iterator[list[Build]]:
    """The builds with a copy of this checkout's benchmarks, so that all of a long run is measured by the same ones."""
    with tempfile.TemporaryDirectory(prefix="kvindex-gate-") as place:
        shutil.copytree(ROOT / "benchmarks", Path(place) / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        yield [build._replace(benchmarks=Path(place)) for build in builds]


def importing() -> Build:
    """The package that this process imports, whoever built it."""
    import kvindex

    return Build("this build", "", Path(kvindex.__file__).parents[1])

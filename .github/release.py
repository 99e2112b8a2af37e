"""The check of a tag before a release: ``python .github/release.py vX.Y.Z``.

The tag, ``kvindex.__version__`` and the first dated entry of the changelog must have the same version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def problems(tag: str, version: str, changelog: str) -> list[str]:
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, the package says {version}: tag v{version}, or change src/kvindex/__init__.py")
    entry = re.search(r"^## \[(?P<version>\d[^]]*)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    if entry is None:
        found.append(f"CHANGELOG.md has no entry of a version: turn [Unreleased] into [{version}] - YYYY-MM-DD")
    elif entry["version"] != version:
        found.append(f"the newest entry of CHANGELOG.md is {entry['version']}, the package says {version}")
    elif entry["date"] is None:
        found.append(f"the entry {version} of CHANGELOG.md has no date")
    waiting = re.search(r"^## \[Unreleased\]$(?P<text>.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if entry is not None and waiting is not None and waiting["text"].strip():
        found.append(f"CHANGELOG.md has changes under [Unreleased]: they belong under [{version}]")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    version = re.search(r'^__version__ = "(.+)"$', (HERE / "src/kvindex/__init__.py").read_text(), re.MULTILINE)
    assert version is not None, "src/kvindex/__init__.py has no __version__"
    found = problems(sys.argv[1], version[1], (HERE / "CHANGELOG.md").read_text())
    for problem in found:
        print(problem, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.rows``: every promised figure that the comparison with others leaves open."""

from __future__ import annotations

import subprocess
import sys

__all__ = ["ROWS"]

#: Each is a command of its own as well: ``python -m benchmarks.growth``.
ROWS = ("growth", "threads", "tail", "snapshot", "churn")


def main() -> int:
    failed = []
    for name in ROWS:
        print(f"\n## {name}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"no figures: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

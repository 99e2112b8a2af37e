"""A summary of a run of the pipeline in Markdown: ``python .github/summary.py DIRECTORY...``.

It reads the reports of the make targets in ``.build/reports`` and ``chaos/reports``, here or in artifacts with one
directory for each job. The workflow posts it as a comment on a pull request; `make ci` ends with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


def tests(report: Path) -> str:
    """The results of the tests in a JUnit file."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found: Counter[str] = Counter()
    seconds = 0.0
    for suite in suites:
        found.update({key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")})
        seconds += float(suite.get("time", 0))
    passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    bad = [f"**{found[key]} {key}**" for key in ("failures", "errors") if found[key]]
    skipped = [f"{found['skipped']} skipped"] if found["skipped"] else []
    return ", ".join([*bad, f"{passed:,} passed", *skipped]) + f" in {seconds:.0f} s"


def covered(report: Path) -> str:
    """The percentage of covered lines, from the summary of either tool."""
    found = json.loads(report.read_text())
    percent = found["totals"]["percent_covered"] if "totals" in found else found["line_percent"]
    return f"{percent:.1f} % of the lines"


def faults(report: Path) -> str:
    """The results of the experiments, with the names of those that failed."""
    found = json.loads(report.read_text())
    verdicts = Counter(each["verdict"] for each in found)
    failed = [f"**{each['experiment']} failed**" for each in found if each["verdict"] == "failed"]
    return ", ".join([*failed, *(f"{verdicts[name]} {name}" for name in ("passed", "skipped") if verdicts[name])])


KINDS = {"junit-*.xml": tests, "coverage-*.json": covered, "results.json": faults}


def rows(directory: Path) -> Iterator[tuple[str, str]]:
    """A pair (name, result) for each report below a directory, including reports that are cut off."""
    for pattern, read in KINDS.items():
        for report in sorted(directory.rglob(pattern)):
            where, stem = report.relative_to(directory).parent, report.stem.removeprefix("junit-")
            name = (where / ("chaos" if stem == "results" else stem)).as_posix()
            try:
                yield name, read(report)
            except (ElementTree.ParseError, ValueError, KeyError) as error:
                yield name, f"**not readable: {error}**"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="+")
    directories = parser.parse_args().directory
    print("| what ran | how it ended |\n|---|---|")
    for directory in directories:
        for name, ended in rows(directory):
            print(f"| {name} | {ended} |")
    for directory in directories:
        for report in sorted(directory.rglob("bench-check.md")):
            print(
                f"\n<details><summary>speed and size beside the baseline</summary>\n\n{report.read_text()}\n</details>"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Stand-ins for commands in the documentation that install, build, take long or belong to other projects.

``stand_in.py NAME ARGUMENTS`` checks the arguments as far as this machine can and exits with status 0 if they are
right. The kvindex commands run unchanged, except for the demo.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

# Flags that the engines' own argument parsers accept, recorded for the manifests.
FLAGS = Path(__file__).resolve().parents[1] / "e2e" / "fixtures" / "flags"


def make(arguments: list[str]) -> None:
    targets = set()
    for line in Path("Makefile").read_text().splitlines():
        if found := re.match(r"([\w-]+(?: [\w-]+)*):(?!=)", line):
            targets.update(found[1].split())
    for argument in arguments:
        if "=" not in argument and argument not in targets:
            sys.exit(f"the Makefile has no target {argument!r}")


def pip(arguments: list[str]) -> None:
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for argument in arguments:
        if found := re.fullmatch(r"(?:kvindex|\.)\[([\w,]+)\]", argument):
            for extra in found[1].split(","):
                if extra not in project["optional-dependencies"]:
                    sys.exit(f"there is no extra {extra!r}")


def engine(name: str, arguments: list[str]) -> None:
    known = json.loads((FLAGS / f"{name}.json").read_text())
    for argument in arguments:
        if argument.startswith("--") and argument not in known["flags"]:
            sys.exit(f"{name} {known['version']} has no flag {argument}")
    config = json.loads(arguments[arguments.index("--kv-events-config") + 1])
    if wrong := sorted(set(config) - set(known["kv_events_config"])):
        sys.exit(f"its --kv-events-config has no {', '.join(wrong)}")
    if config.get("publisher") != "zmq":
        sys.exit("it publishes nothing")


def pytest(arguments: list[str]) -> None:
    paths = [Path(argument) for argument in arguments if "/" in argument]
    if missing := [str(path) for path in paths if not path.exists()]:
        sys.exit(f"no tests in {', '.join(missing)}")
    if "-k" in arguments:
        word = arguments[arguments.index("-k") + 1]
        # Tests of pages have the name of the page as their id, so the word may be part of a function or of a page.
        named = any(re.search(rf"def test_\w*{word}", path.read_text()) for path in paths)
        if not named and not (paths == [Path("tests/unit/test_pages.py")] and [*Path("docs").rglob(f"*{word}*.md")]):
            sys.exit(f"no test is called {word}")


def python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "sglang.launch_server"]:
        engine("sglang", arguments[2:])
    elif arguments[:2] == ["-m", "pytest"]:
        pytest(arguments[2:])
    elif arguments[0] == "-m" and arguments[1].startswith("kvindex."):
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__")
    elif arguments[0] == "-m" and importlib.util.find_spec(arguments[1]) is None:
        sys.exit(f"no module {arguments[1]}")


def kvindex(arguments: list[str]) -> None:
    from kvindex import cli

    # The demo takes half a minute and has its own tests.
    cli.demo.run = lambda args: 0
    sys.exit(cli.main(arguments))


def main(name: str, arguments: list[str]) -> None:
    sys.path.insert(0, "")
    if name == "vllm":
        engine("vllm", arguments)
    else:
        {"make": make, "pip": pip, "python": python, "kvindex": kvindex}[name](arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

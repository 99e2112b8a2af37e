"""Every code block of the README, the documentation and the docstrings runs, in order.

Python runs in this process with one namespace per page. Shell runs in bash, in a directory that looks like the
checkout. The kvindex commands are the real ones, with the ports of the page moved to free ones. Commands that install,
build or take long, and engines, are replaced by a stand-in that checks the arguments (``tests/stand_in.py``). YAML and
JSON are parsed. Text blocks contain figures and output.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

import kvindex
from kvindex import EventManager

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# The folder of the tested package, which is not the checkout's if a wheel is installed.
PACKAGE = Path(kvindex.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FENCED = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
PORT = re.compile(r"\b5[56]\d\d\b")
ELSEWHERE = re.compile(r"\b10\.0\.0\.(\d+)\b")
TEXT = ("", "text")
# An example in a docstring: the indented text after a double colon. On the site, docs/site/roles.py makes it a block.
EXAMPLE = re.compile(r"::\n\n(?P<code>(?:(?: {4}.*)?\n)+)")
# Packages that the pages and docstrings about other routers need. They have an environment of their own.
NEEDED = {"litellm": "litellm", "ray": "ray", "envoy": "grpc"}
# The beginnings of a list of pods and of a file's layout. All other examples are Python.
NO_PYTHON = {"- ": "yaml", '{"': "text"}

# With these options, bash stops a page at its first failing command, even inside a line.
BASH = ["bash", "-euo", "pipefail", "-c"]
PATIENCE = 60


def blocks(page):
    for found in FENCED.finditer(page.read_text()):
        indent = len(found["indent"])
        yield found["language"], "".join(line[indent:] for line in found["code"].splitlines(keepends=True))


def examples(module):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(module.read_text())):
        said = ast.get_docstring(node) if isinstance(node, documented) else None
        for found in EXAMPLE.finditer((said or "") + "\n"):
            code = inspect.cleandoc(found["code"])
            yield NO_PYTHON.get(code[:2], "python"), code


def runs(page):
    return any(language not in TEXT for language, _ in blocks(page))


def needed(path):
    if path.parent.name == "integrations" and path.stem in NEEDED:
        pytest.importorskip(NEEDED[path.stem], reason=f"{NEEDED[path.stem]} is not installed: make test-integrations")


def named(path):
    return str(path.relative_to(ROOT))


class Reader:
    """A simulated reader who types a page's blocks one after another into a shell and an interpreter."""

    def __init__(self, directory):
        self.directory = directory / "kvindex"
        self.namespace = {"__name__": "__main__"}
        self.sessions = []
        self.moved = 0
        self._lay_out()

    def _lay_out(self):
        self.directory.mkdir()
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (self.directory / path.name).symlink_to(path)
        installed = self.directory / ".venv" / "bin"
        installed.mkdir(parents=True)
        stand_in = f'exec "{sys.executable}" "{ROOT / "tests" / "stand_in.py"}"'
        real = f'case "$1" in -m) {stand_in} python "$@";; *) exec "{sys.executable}" "$@";; esac'
        commands = {name: f'{stand_in} {name} "$@"' for name in ("kvindex", "make", "pip", "vllm")}
        commands |= dict.fromkeys(("python", "python3"), real)
        commands |= dict.fromkeys(("git", "sudo", "trtllm-serve", "valgrind", "callgrind_annotate", "perf"), ":")
        commands["activate"] = ":"
        for name, does in commands.items():
            (installed / name).write_text(f"#!/bin/sh\n{does}\n")
            (installed / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "COLUMNS": "140",
        }
        # The reader's own input: a trace of requests in Mooncake's format.
        with gzip.open(self.directory / "trace.jsonl.gz", "wt") as trace:
            for number in range(40):
                ids = [0, number % 4 + 1, number % 8 + 10]
                request = {"timestamp": number * 500, "input_length": 1500, "output_length": 20, "hash_ids": ids}
                trace.write(json.dumps(request) + "\n")

    def move_ports(self, codes):
        """Find an offset for which all ports of a page are free, and also the replay ports, which are 100 higher."""
        wanted = {int(port) for _, code in codes for port in PORT.findall(code)}
        for _ in range(100):
            self.moved = random.randrange(10_000, 50_000)
            with suppress(OSError):
                for port in sorted(wanted | {port + 100 for port in wanted}):
                    with socket.socket() as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(("127.0.0.1", port + self.moved))
                return
        raise OSError("no free ports")

    def type(self, language, code, page):
        if ELSEWHERE.search(code):  # there is no engine to wait for
            code = code.replace("wait_until_current(30)", "wait_until_current(0)")
        code = ELSEWHERE.sub(r"127.0.0.\1", PORT.sub(lambda found: str(int(found[0]) + self.moved), code))
        if language == "python":
            exec(compile(code, str(page), "exec"), self.namespace)
        elif language == "sh":
            self._shell(code)
        elif language == "yaml":
            assert yaml.safe_load(code) is not None
        elif language == "json":
            json.loads(code)
        else:
            assert language in TEXT, f"nothing runs blocks of {language!r}"

    def _shell(self, code):
        # Output goes to a file, because a background process of the block would hold a pipe open.
        with open(self.directory / "printed", "w+") as printed:
            session = subprocess.Popen(
                [*BASH, code], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=printed,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.sessions.append(session)
            status = session.wait(PATIENCE)
            printed.seek(0)
            assert status == 0, f"{code}\n{printed.read()}"

    def leave(self):
        for value in self.namespace.values():
            if isinstance(value, EventManager):
                value.close()
        for session in self.sessions:
            # Kill the whole process group, which includes the block's background processes.
            with suppress(ProcessLookupError):
                os.killpg(session.pid, signal.SIGKILL)
            session.wait()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    reader = Reader(tmp_path)
    monkeypatch.chdir(reader.directory)
    monkeypatch.syspath_prepend(ROOT)
    yield reader
    reader.leave()


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=named)
def test_a_page_runs_from_its_first_block_to_its_last(page, reader):
    needed(page)
    reader.move_ports(blocks(page))
    for language, code in blocks(page):
        reader.type(language, code, page)


@pytest.mark.parametrize("module", [path for path in MODULES if [*examples(path)]], ids=lambda path: path.stem)
def test_the_examples_in_docstrings_run(module, reader):
    needed(module)
    reader.move_ports(examples(module))
    for language, code in examples(module):
        reader.type(language, code, module)


def test_no_example_in_a_docstring_is_overlooked():
    """Every double colon starts a block that is found, and there are some blocks, so the tests above are not empty."""
    assert sum(len([*examples(path)]) for path in MODULES) == sum(path.read_text().count("::\n\n") for path in MODULES)
    assert {language for path in MODULES for language, _ in examples(path)} >= {"python", "yaml"}
    assert not [path for path in MODULES if re.search(r"^ *>>> ", path.read_text(), re.M)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_links_to_is_there(page):
    outside = FENCED.sub("", page.read_text())
    for link in re.findall(r"\]\((?!http)([^)#\s]+)", outside):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_code_hides_where_nothing_runs(page):
    """Code in a text block, or between unrecognised fences, would never run."""
    text = page.read_text()
    assert text.count("```") == 2 * len(list(blocks(page)))
    assert not re.search(r"^ *~~~", text, re.M)
    code = re.compile(r"(kvindex|make|pip|python3?|source|import|export|def|class|async|>>>)\b|from [\w.]+ import\b")
    for language, block in blocks(page):
        if language in TEXT:
            assert not [line for line in block.splitlines() if code.match(line)], block


def test_the_installation_and_the_two_commands_come_first():
    commands = [code for language, code in blocks(ROOT / "README.md") if language == "sh"]
    lines = [[line.split("#")[0].strip() for line in code.splitlines()] for code in commands]
    wheel = "make dist && pip install dist/*.whl"
    assert lines[0] == ["pip install '.[cli,serve,sim,examples]'", "pip install .", wheel]
    assert lines[1] == ["make demo", "make test"]


def test_a_block_that_fails_is_noticed(reader, tmp_path):
    """Otherwise the tests above would prove nothing."""
    page = tmp_path / "page.md"
    for language, code in (
        ("python", "assert 1 + 1 == 3"),
        ("sh", "false | true"),
        ("sh", "make nothing-of-the-kind"),
        ("sh", "kvindex demo --no-such-option"),
        ("sh", """vllm serve MODEL --kv-events-config '{"publisher": "zmq", "endpont": "tcp://*:5557"}'"""),
        ("sh", "pip install 'kvindex[everything]'"),
        ("json", "{"),
    ):
        page.write_text(f"```{language}\n{code}\n```\n")
        [(language, code)] = blocks(page)
        with pytest.raises((AssertionError, ValueError)):
            reader.type(language, code, page)


def test_what_stands_for_a_claim_of_security_is_there():
    rows = [line.split("|") for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row[4].strip().startswith("test")]
    assert rows
    for _, _, claim, stands, proof, _ in rows:
        named = re.findall(r"`((?:tests|chaos)/[^`:]+)(?:::(test_\w+))?`", proof)
        assert named or "**nothing**" in stands, claim
        for file, test in named:
            # A Python file has many tests and needs the name of one. Each fuzzer and each fault is a file of its own.
            assert bool(test) == file.endswith(".py"), claim
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
            assert (ROOT / file).is_file(), claim

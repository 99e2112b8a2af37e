"""The README keeps its word: its Python runs, and the targets and files that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_one_after_another():
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert blocks
    namespace = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)


def test_the_two_commands_come_first():
    commands = [code for language, code in BLOCKS if language == "sh"]
    assert [line.split("#")[0].strip() for line in commands[0].splitlines()] == ["make demo", "make test"]


def test_the_make_targets_are_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code for language, code in BLOCKS if language == "sh")))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))) or ["README.md"])
def test_what_is_linked_is_there(link):
    assert (ROOT / link).exists()

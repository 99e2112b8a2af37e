"""The view of a type checker: the stubs match the built module, and the public names have their documented types."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_stubs_fit_the_built_module():
    allowed = HERE / "stubtest_allowlist.txt"
    done = run("mypy.stubtest", "kvindex._core", "--mypy-config-file", "pyproject.toml", "--allowlist", str(allowed))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_itself_is_strictly_typed():
    done = run("mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_public_names_have_these_types():
    done = run("mypy", str(HERE / "public_api.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_type_would_be_noticed(tmp_path):
    lines = (HERE / "public_api.py").read_text()
    wrong = tmp_path / "wrong.py"
    wrong.write_text(lines.replace("assert_type(match.blocks, int)", "assert_type(match.blocks, str)"))
    done = run("mypy", str(wrong))
    assert done.returncode == 1
    assert done.stdout.count("error:") == 1
    assert "assert-type" in done.stdout

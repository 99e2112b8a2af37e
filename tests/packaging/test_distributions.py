"""The contents of the sdist and of the wheel built from it. Both must work on their own."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build an sdist and its wheel from a copy of the tree without generated files. Returns their directory."""
    work = tmp_path_factory.mktemp("packaging")
    generated = (
        ".git",
        ".venv",
        ".build",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "_core.cpp",
        "__pycache__",
        ".*_cache",
    )
    shutil.copytree(ROOT, work / "tree", ignore=shutil.ignore_patterns(*generated, ".hypothesis"))
    # The result does not depend on the core's optimization, and -O0 compiles several times as fast.
    environment = {**os.environ, "CXXFLAGS": "-O0 -g0"}
    run(sys.executable, "-m", "build", "--no-isolation", cwd=work / "tree", env=environment)
    return work / "tree" / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """Return the environment of a process that imports the wheel, unpacked by pip, instead of the checkout."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return {"cwd": target.parent, "env": {**os.environ, "PYTHONPATH": str(target)}}


def test_the_sdist_has_every_source_and_nothing_that_was_generated(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (".github", "benchmarks", "chaos", "docs", "e2e", "examples", "src", "tests")
    generated = re.compile(r"__pycache__|\.egg-info|\.so$|_core\.cpp$|^chaos/reports/")
    files = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()}
    sources = {name for name in files if not generated.search(name)}
    assert {name.partition("/")[0] for name in sources} == set(folders)
    alone = {"LICENSE", "Makefile", "asv.conf.json", "mkdocs.yml", "pyproject.toml", "setup.py"}
    assert sources | alone | {p.name for p in ROOT.glob("*.md")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_core.cpp"))]
    # A wheel is tested beside the contents of the sdist, except the package itself, which has no compiled core there.
    with open(ROOT / "pyproject.toml", "rb") as file:
        beside = tomllib.load(file)["tool"]["cibuildwheel"]["test-sources"]
    assert {name.partition("/")[0] for name in names} - {"", "PKG-INFO", "setup.cfg", "src"} == set(beside)


def test_the_wheel_has_the_module_its_types_and_no_sources(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert {"kvindex/__init__.py", "kvindex/_core.pyi", "kvindex/py.typed"} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".hpp", ".cpp")) or name.startswith("tests")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_a_router_needs_three_packages_and_no_more(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
    needed = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">")[0] for line in needed} == {"numpy", "pyzmq", "msgpack"}
    assert {"cli", "terminal", "k8s", "test"} <= set(fields.get_all("Provides-Extra"))
    assert fields["License-Expression"] == "Apache-2.0"


def test_the_wheel_hashes_as_the_others_do(installed):
    # The check value of the hashing scheme: tokens 0..63 in blocks of 16, seed 1337.
    code = "import kvindex; print(kvindex.local_hashes(range(64), block_size=16)[0]); print(kvindex.__file__)"
    value, place = run(sys.executable, "-c", code, **installed).split()
    assert value == "15310707395893867146"
    assert Path(place).is_relative_to(installed["env"]["PYTHONPATH"])


def test_importing_the_wheel_leaves_the_command_lines_packages_alone(installed):
    code = "import sys, kvindex; print(sorted({'rich', 'matplotlib', 'yaml'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, **installed).strip() == "[]"


def test_the_wheel_runs_as_a_command(installed):
    import kvindex

    assert run(sys.executable, "-m", "kvindex", "--version", **installed).strip() == f"kvindex {kvindex.__version__}"

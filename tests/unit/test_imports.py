"""The package's imports have one direction: no module imports, at any time, a module that imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvindex

ROOT = Path(kvindex.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """Return every module of a package by its name."""
    table = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        table[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return table


def imported(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module, including those inside functions, except those only for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported(other)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from imported(node)


def graph(root: Path) -> dict[str, set[str]]:
    """Return the imports of each module. A parent package is not an import, although it runs before its modules."""
    table = modules(root)
    found: dict[str, set[str]] = {}
    for name, path in table.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        wanted = found[name] = set()
        for node in imported(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted.update(each.name for each in node.names if each.name in table)
                continue
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for each in node.names:
                inner = f"{target}.{each.name}"
                if inner in table or target in table:
                    wanted.add(inner if inner in table else target)
        wanted.discard(name)
    return found


def test_no_module_imports_one_that_imports_it():
    found = graph(ROOT)
    assert "kvindex.sync.stream" in found["kvindex.sync.worker"]
    assert "kvindex.discovery.engines" in found["kvindex.sync.source"]  # an import inside a function
    list(TopologicalSorter(found).static_order())


def test_the_loop_of_streams_knows_no_worker():
    assert graph(ROOT)["kvindex.sync.loop"] == {"kvindex.errors", "kvindex.sync.pulse"}


def test_a_cycle_is_found_within_a_function_too(tmp_path):
    root = tmp_path / "package"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "first.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import second\n")
    (root / "second.py").write_text("from .first import name\n")
    list(TopologicalSorter(graph(root)).static_order())
    (root / "first.py").write_text("def later():\n    from .second import other\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(root)).static_order())

"""The surface of the package: names, signatures, types and text representations."""

from __future__ import annotations

import ast
import graphlib
import inspect
import pydoc
import typing
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support import payload, stored

import kvindex
from kvindex import IndexStats, InvalidTypeError, PodMatch, PrefixIndex, SnapshotError, StreamPlace, WorkerStats

TOKENS = list(range(64))


def filled() -> PrefixIndex:
    index = PrefixIndex(16)
    index.ingest("b", payload(stored([1, 2, 3, 4], TOKENS, size=16)), seq=7)
    index.ingest("a", payload(stored([1, 2], TOKENS[:32], size=16)))
    index.mark_worker("a", 0, "stale")
    return index


def test_a_match_is_a_mapping_of_the_pods_that_hold_something():
    index = filled()
    index.add_prefix("c", range(1000, 1016), ttl=9)
    match = index.match_prefix(TOKENS)
    assert isinstance(match, Mapping)
    assert (set(match), len(match), bool(match)) == ({"a", "b"}, 2, True)
    assert {pod: found.tokens for pod, found in match.items()} == match.tokens == {"a": 32, "b": 64}
    assert all(isinstance(found, PodMatch) for found in match.values())
    assert ("a" in match, "c" in match, 5 in match) == (True, False, False)
    assert match.get("nobody") is None
    assert not index.match_prefix(range(1, 65))
    # A pod without a block of the prompt gives an empty match. An unknown name raises.
    assert match["c"].tokens == 0
    with pytest.raises(kvindex.UnknownPodError, match="nobody"):
        match["nobody"]


def test_pods_are_all_that_are_known_with_their_states():
    index = filled()
    assert index.pods() == {"a": "stale", "b": "exact"}
    assert list(index.pods()) == ["a", "b"]
    index.add_prefix("late\udcff", TOKENS, ttl=9)
    assert index.pods() == {pod: index.pod_state(pod) for pod in ("a", "b", "late\udcff")}
    for pod in list(index.pods()):
        index.remove_pod(pod)
    assert index.pods() == {}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_a_snapshot_as_bytes_is_that_of_a_file(kind, tmp_path):
    index = filled()
    data = index.dumps()
    index.save(tmp_path / "saved")
    assert data == (tmp_path / "saved").read_bytes()
    loaded = PrefixIndex.loads(kind(data), max_bytes=1 << 20)
    assert loaded.pods() == {"a": "stale", "b": "stale"}
    assert loaded.match_prefix(TOKENS).tokens == index.match_prefix(TOKENS).tokens
    assert loaded.stream_places("b") == index.stream_places("b")
    assert loaded.dumps() == PrefixIndex.load(tmp_path / "saved").dumps()
    loaded._check()


@pytest.mark.parametrize("cut", [0, 1, 55, 56, -1])
def test_bytes_that_are_no_whole_snapshot_are_refused(cut):
    data = filled().dumps()[:cut]
    with pytest.raises(SnapshotError, match=rf"^a snapshot of {len(data)} bytes is refused: "):
        PrefixIndex.loads(data)


def test_a_flipped_bit_and_a_foreign_argument_are_told_apart():
    data = bytearray(filled().dumps())
    with pytest.raises(kvindex.InvalidValueError, match="max_bytes"):
        PrefixIndex.loads(data, max_bytes=1)
    data[100] ^= 1
    with pytest.raises(SnapshotError, match="is refused"):
        PrefixIndex.loads(data)


@pytest.mark.parametrize("data", [None, "text", 7, ["a"]])
def test_what_is_not_bytes_like_is_no_snapshot(data):
    with pytest.raises(InvalidTypeError, match="bytes-like"):
        PrefixIndex.loads(data)


def called() -> list[str]:
    """Public names, except exceptions, which have no signature in Python, and types that only checkers use."""
    found = [(name, getattr(kvindex, name)) for name in kvindex.__all__]
    return [name for name, it in found if isinstance(it, type) and not issubclass(it, (Exception, dict))]


@pytest.mark.parametrize("name", called())
def test_every_public_name_has_a_signature(name):
    found = getattr(kvindex, name)
    assert inspect.signature(found) is not None
    assert "--\n" not in inspect.getdoc(found)
    assert pydoc.render_doc(found)


def test_what_is_compiled_has_signatures_with_types():
    for method in ("ingest", "match_prefix", "match_hashes", "match_many"):
        signature = inspect.signature(getattr(PrefixIndex, method))
        parameters = list(signature.parameters.values())[1:]
        assert all(each.annotation is not each.empty for each in parameters), method
        assert signature.return_annotation is not signature.empty
    assert inspect.signature(PrefixIndex).parameters["presence"].default == "count"
    assert "cache_salt: 'str | None' = None" in pydoc.render_doc(PrefixIndex.match_prefix)


def test_signatures_are_those_of_the_stubs():
    """The types must agree as well, which stubtest does not compare."""
    stubs = ast.parse(Path(kvindex.__file__).with_name("_core.pyi").read_text())
    (index,) = (each for each in stubs.body if isinstance(each, ast.ClassDef) and each.name == "Index")
    for function in index.body:
        if isinstance(function, ast.FunctionDef) and function.name in ("ingest", *MATCHES):
            arguments = (*function.args.args[1:], *function.args.kwonlyargs)
            told = {argument.arg: ast.unparse(argument.annotation) for argument in arguments}
            found = inspect.get_annotations(getattr(PrefixIndex, function.name))
            assert ast.unparse(function.returns) == found.pop("return")
            assert {name: ast.unparse(ast.parse(text)) for name, text in found.items()} == told, function.name


MATCHES = ("match_prefix", "match_hashes", "match_many")


def test_figures_have_the_keys_of_their_types():
    index = filled()
    assert set(index.stats()) == set(IndexStats.__annotations__)
    for pod in index.pods():
        for worker in index.worker_stats(pod).values():
            assert set(worker) == set(WorkerStats.__annotations__)
    assert all(isinstance(place, StreamPlace) for place in index.stream_places("b").values())


def test_states_are_those_that_the_type_names():
    assert typing.get_args(kvindex.Verdict) == ("exact", "degraded", "stale")
    for state in typing.get_args(kvindex.Verdict):
        index = filled()
        index.mark_worker("b", 0, state)
        assert index.pod_state("b") == index.match_prefix(TOKENS)["b"].state == state


def test_things_say_what_they_are():
    index = filled()
    size = index.stats()["bytes"]
    assert repr(index) == f"PrefixIndex(block_size=16, 2 pods: 1 exact, 1 stale, 4 blocks, {size / 1e6:.1f} MB)"
    assert repr(PrefixIndex(1)) == "PrefixIndex(block_size=1, 0 pods, 0 blocks, 0.0 MB)"
    assert repr(index.pod_set(["b", "a"])) == "PodSet(['a', 'b'])"
    assert repr(index.match_prefix(TOKENS)) in ("PrefixMatch({'a': 32, 'b': 64})", "PrefixMatch({'b': 64, 'a': 32})")


def test_the_status_is_a_table_in_a_notebook():
    """The names of pods are escaped as text, not interpreted as markup."""
    with kvindex.EventManager(PrefixIndex()) as manager:
        for number, name in enumerate(("a", "<script>alert(1)</script>", "& é")):
            manager.add_pod(kvindex.PodSource(name, endpoint=f"ipc:///nobody/{number}"))
        status = manager.status()
    assert isinstance(status, dict)
    head, *rows = ElementTree.fromstring(status._repr_html_())
    cells = [dict(zip([cell.text for cell in head], [cell.text or "" for cell in row], strict=True)) for row in rows]
    assert [row["pod"] for row in cells] == ["a", "<script>alert(1)</script>", "& é"]
    assert {row["state"] for row in cells} == {"stale"}
    assert [(row["blocks"], row["last_seq"]) for row in cells] == [("0", "")] * 3


@pytest.mark.parametrize("kind", [kvindex.PrefixMatch, kvindex.IngestReport])
def test_what_only_an_index_makes_is_not_made_by_hand(kind):
    with pytest.raises(TypeError, match=kind.__name__):
        kind()


def test_no_module_imports_one_that_imports_it():
    """Imports for type annotations count as well: a cycle of types makes the modules hard to understand."""
    source = Path(kvindex.__file__).parent
    modules = {
        ".".join(["kvindex", *path.relative_to(source).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in source.rglob("*.py")
    }
    imports = {}
    for module, path in modules.items():
        package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                named = [".".join([*base, each.name]) for each in node.names]
                # Importing a module of a package does not depend on the package's other imports.
                found |= {name if name in modules else ".".join(base) for name in named}
        # The package itself imports everything, so a name imported from it counts only if it is a module.
        imports[module] = (found & set(modules)) - {module, "kvindex"}
    assert "kvindex.snapshot" in imports["kvindex.index"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError with the names of the modules

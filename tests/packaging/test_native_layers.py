"""The allowed includes between the headers of the core."""

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "src/kvindex/_native"

# From the bottom up, as drawn in docs/structure.md. A part includes itself and, even indirectly, the parts it names.
BELOW = {
    "base": set(),
    "wire": {"base"},
    "hash": {"base", "wire"},
    "content": {"base"},
    "workers": {"base", "wire", "content"},
    "ingest": {"base", "wire", "hash", "content", "workers"},
    "index": {"base", "wire", "hash", "content", "workers", "ingest"},
    "query": {"base", "wire", "hash", "content", "workers", "ingest", "index"},
    "snapshot": {"base", "wire", "hash", "content", "workers", "ingest", "index"},
    "concurrent_index": {"base", "wire", "hash", "content", "workers", "ingest", "index", "query", "snapshot"},
}
HEADERS = sorted(path.relative_to(NATIVE) for path in NATIVE.rglob("*.hpp"))
SOURCES = [*HEADERS, *sorted(path.relative_to(NATIVE) for path in NATIVE.rglob("*.cpp"))]


def part(path):
    return path.parts[0] if len(path.parts) > 1 else path.stem


def test_there_are_headers_in_every_part():
    assert {part(path) for path in HEADERS} == set(BELOW)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_includes_its_own_part_and_lower_ones(path):
    included = [Path(name) for name in re.findall(r'^\s*#\s*include\s*"(.+)"', (NATIVE / path).read_text(), re.M)]
    assert not [str(to) for to in included if not (NATIVE / to).is_file()], "named from _native on"
    assert not [str(to) for to in included if part(to) not in {part(path), *BELOW[part(path)]}]


def test_no_header_includes_itself():
    includes = {
        str(path): re.findall(r'^\s*#\s*include\s*"(.+)"', (NATIVE / path).read_text(), re.M) for path in HEADERS
    }

    def reach(start):
        seen, todo = set(), list(includes[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += includes[name]
        return seen

    assert not [name for name in includes if name in reach(name)]

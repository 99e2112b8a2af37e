"""The English of pages, docstrings and comments, against the style in ``prose.yaml``.

As a program, ``python tests/packaging/test_prose.py``, it prints every finding and the count of each rule.
"""

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest
import yaml

from kvindex.cli import parser

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
STYLE = yaml.safe_load(HERE.with_name("prose.yaml").read_text())
RULES = {name: re.compile(rule["pattern"]) for name, rule in STYLE["rules"].items()}
PAGES = [
    path
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    if str(path.relative_to(ROOT)) not in STYLE["left_out"]
]
SOURCES = [path for pattern in STYLE["sources"] for path in sorted(ROOT.glob(pattern))]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

CODE = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```|<!--.*?-->|::\n\n(?:(?: {4}.*)?\n)+", re.M | re.S)
# Code, quoted values, addresses of links and roles of docstrings each count as one word of a sentence.
WORD = re.compile(r":\w+:`[^`]*`|``[^`]+``|`[^`]+`|\"[^\"\n]*\"|(?<=\])\([^)]*\)|https?://\S+")
# Cells of a row, items of a list, headings, paragraphs and lines of a docstring's Args are separate texts.
APART = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\.) )|(?<!\\)\||\n {4,8}(?=\w+: )|\n(?=[A-Z]\w+:\n)")
SENTENCE = re.compile(r"(?<=[.?!;])(?<!e\.g\.)(?<!i\.e\.)\s+(?=\S)")


def docstrings(path):
    """Yield each docstring with its line. Those of a compiled file are found by their quotes."""
    text = path.read_text()
    if path.suffix != ".py":
        for found in re.finditer(r'"""(.*?)"""', text, re.S):
            yield inspect.cleandoc(found[1]), f":{text.count(chr(10), 0, found.start()) + 1}"
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, DOCUMENTED):
            continue
        # The first statement of a body, or a string below a field.
        for before, each in zip([None, *node.body], node.body, strict=False):
            documents = before is None or isinstance(before, ast.AnnAssign)
            if documents and isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                yield inspect.cleandoc(str(each.value.value)), f":{each.lineno}"


def comments(path):
    """Each block with its line. Of C++, and of Cython, those that have a line for themselves or stand at its end."""
    text = path.read_text()
    if path.suffix == ".py":
        found = [
            (token.start[0], token.line.strip().startswith("#"), token.string)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        ]
    else:
        sign = "//" if path.suffix in (".hpp", ".cpp", ".c", ".js") else "#"
        lines = re.finditer(rf"^(?P<before>.*?)(?P<comment>{sign}.*)$", text, re.M)
        found = [
            (text.count("\n", 0, line.start()) + 1, not line["before"].strip(), line["comment"])
            for line in lines
            if not line["before"].strip() or re.search(r"\s\s$", line["before"])
        ]
    block, last = [], 0
    for line, alone, comment in [*found, (0, False, "")]:
        if block and not (alone and line == last + 1):
            yield "\n".join(block), f":{last}"
            block = []
        if line:
            block.append(re.sub(r"^(#|//)+:? ?", "", comment))
            last = line if alone else 0
        if block and not alone:
            yield block.pop(), f":{line}"


def texts(path):
    if path.suffix == ".md":
        return [(path.read_text(), "")]
    return [*(docstrings(path) if path.suffix in (".py", ".pyx", ".pxi") else ()), *comments(path)]


def sentences(text):
    text = WORD.sub("X", CODE.sub("\n\n", text))
    for part in APART.split(text):
        yield from (" ".join(sentence.split()) for sentence in SENTENCE.split(part))


def findings(text):
    for sentence in sentences(text):
        if any(part in sentence for part in STYLE["exceptions"]):
            continue
        for name, pattern in RULES.items():
            if (found := pattern.search(sentence)) and not (name == "free relative" and sentence.endswith("?")):
                yield name, found[0], sentence
        if (words := len(sentence.split())) > STYLE["longest"]:
            yield "long sentence", f"{words} words", sentence


def all_findings(path):
    for text, line in texts(path):
        for name, word, sentence in findings(text):
            yield f"{path.relative_to(ROOT)}{line}: {name} ({word}): {sentence}", name


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_english_keeps_the_style(path):
    assert not [finding for finding, _ in all_findings(path)]


def test_the_help_of_commands_keeps_the_style():
    (commands,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        said = [command.description, *(group.title for group in command._action_groups)]
        said += [action.help for action in command._actions]
        assert not [(name, *finding) for text in said for finding in findings(text or "")]


@pytest.mark.parametrize(
    ("sentence", "rule"),
    [
        ("The index forgets it.", "data that speaks"),
        ("It returns what the pod holds.", "free relative"),
        ("An event that is none is skipped.", "predicate none"),
        ("The client who asks gets an answer.", "person for a thing"),
        ("It can not wait.", "written together"),
        ("It isn't there.", "contraction"),
        ("The verdict is stale.", "private word"),
        ("One" + " and one" * 30 + ".", "long sentence"),
    ],
)
def test_a_sentence_that_breaks_a_rule_is_found(sentence, rule):
    assert [name for name, _, _ in findings(f"A sentence before it. {sentence}")] == [rule]
    assert not [*findings(f"`{sentence}`"), *findings(f"```text\n{sentence}\n```\n")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "x = 1  # What it is.\n\n# Nobody has\n# it.\ns = '# what'\n"),
        ("a.hpp", 'int x;  // What it is.\n\n// Nobody has\n// it.\nauto s = "what";\n'),
        ("Makefile", "# What it is.\n\n# Nobody has\n# it.\nall: # what\n\techo what\n"),
    ],
)
def test_comments_are_found_as_blocks(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    found = [finding for comment, line in comments(tmp_path / name) for finding in findings(comment)]
    assert found == [("free relative", "What", "What it is."), ("person for a thing", "Nobody", "Nobody has it.")]


def test_what_keeps_the_style_is_not_found():
    assert not [*findings("What is cached? A reader who asks gets `match.tokens`, a dict. None of it is copied.")]


def test_every_exception_is_needed():
    said = [sentence for path in [*PAGES, *SOURCES] for text, _ in texts(path) for sentence in sentences(text)]
    assert not [part for part in STYLE["exceptions"] if not any(part in sentence for sentence in said)]


if __name__ == "__main__":
    found = [each for path in [*PAGES, *SOURCES] for each in all_findings(path)]
    print(*(finding for finding, _ in found), sep="\n")
    print(*(f"{count:5} {name}" for name, count in Counter(name for _, name in found).most_common()), sep="\n")
    sys.exit(bool(found))

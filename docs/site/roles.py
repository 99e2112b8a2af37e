"""The conversion of docstrings, which have Sphinx's roles for terminals and editors, to the site's Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|mod|exc|data):`~?(?P<name>[\w.]+)`")
_LITERAL = re.compile(r"::\n\n(?P<code>(?:(?: {4}.*)?\n)+)")
_ARGUMENT = re.compile(r"(?P<before>^|[.;] )(?P<name>\w+): ", flags=re.MULTILINE)


def markdown(text: str, arguments: Collection[str] = ()) -> str:
    """Convert one docstring: names become code, and an indented block after a double colon becomes a code block."""

    def fenced(match: re.Match[str]) -> str:
        lines = match["code"].rstrip("\n").split("\n")
        # A list of pods, a file's layout, or code.
        language = {"- ": "yaml", '{"': "text"}.get(lines[0].lstrip()[:2], "python")
        code = "\n".join(line[4:] for line in lines)
        # A sentence keeps one of the colons. A double colon on a line of its own leaves nothing.
        lead = "" if match.start() == 0 or match.string[match.start() - 1] == "\n" else ":\n\n"
        return f"{lead}```{language}\n{code}\n```\n"

    def strong(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{match['before']}`{name}`: " if name in arguments else match[0]

    text = _LITERAL.sub(fenced, text + "\n").rstrip("\n")
    text = _ROLE.sub(lambda match: f"`{match['name'].removeprefix('kvindex.')}`", text)
    return _ARGUMENT.sub(strong, text)


def listed(fields: Collection[griffe.Attribute], *, shown: bool) -> str:
    """The fields of a class, with a row for each documented one. Headings with signatures would take ten screens.

    ``shown``: the signature of the class has the names and types already.
    """

    def kind(field: griffe.Attribute) -> str:
        # The default of a field, if there is one. A property has no default, and a call of `field()` would not help.
        given = "property" not in field.labels and field.value is not None and not str(field.value).startswith("field(")
        return f"`{field.annotation} = {field.value}`" if given else f"`{field.annotation}`"

    said = [field for field in fields if field.docstring]
    rest = [f"`{field.name}`: {kind(field)}" for field in fields if not field.docstring]
    lines = ["| field | type | |", "|---|---|---|"] if said else []
    lines += [f"| `{field.name}` | {kind(field)} | {' '.join(field.docstring.value.split())} |" for field in said]
    if rest and not (shown and not said):
        lines += ["", ("Also " if said else "Fields: ") + ", ".join(rest) + "."]
    return "\n".join(lines)


class Roles(griffe.Extension):
    """The extension that applies :func:`markdown` to every docstring and adds the constructor of the compiled class."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        # Only the stub has the parameters of the compiled base's __new__. Readers look for them at the public class.
        stub = Path(str(pkg.filepath)).with_name("_core.pyi")
        core = griffe.visit("_core", stub, stub.read_text())
        index, made = pkg["index.PrefixIndex"], core["Index.__new__"]
        kept = [parameter for parameter in made.parameters if parameter.name != "cls"]
        index.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*kept), parent=index))
        self._walk(pkg, set())

    def _walk(self, obj: griffe.Object, seen: set[int]) -> None:
        if id(obj) in seen:
            return
        seen.add(id(obj))
        if obj.docstring is not None:
            takes: Any = obj if isinstance(obj, griffe.Function) else obj.members.get("__init__")
            names = [parameter.name for parameter in takes.parameters] if isinstance(takes, griffe.Function) else []
            obj.docstring.value = markdown(obj.docstring.value, names)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member, seen)
        if isinstance(obj, griffe.Class):
            self._fold(obj)

    def _fold(self, cls: griffe.Class) -> None:
        own = [each for each in cls.members.values() if isinstance(each, griffe.Attribute)]
        fields = [each for each in own if each.annotation and not each.name.startswith("_")]
        if not fields:
            return
        said = cls.docstring.value if cls.docstring else ""
        fields_too = f"{said}\n\n{listed(fields, shown='__init__' in cls.members)}"
        cls.docstring = griffe.Docstring(fields_too.rstrip(), parent=cls)
        for each in fields:
            cls.del_member(each.name)

"""Write docs/reference/api.md: the public names of the library, from their docstrings.

Which modules those are is said by two tables in docs/explanation/layers.md. Of the modules of short
paths, all names of ``__all__`` are public; of the others, those that the table has. A name that
several have is described once, at its home. Members whose docstring begins with "Internal:" are
left out, and so is the constructor of what is "made by" somebody else.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

from tests.support.docstrings import (  # noqa: E402  # needs the path above
    described_fields,
    first_section,
    public_members,
    public_names,
    signature,
    summary,
)

PAGE = ROOT / "docs/reference/api.md"
LAYERS = ROOT / "docs/explanation/layers.md"
WIDE = 1000
"""Characters: in a cell of a table, everything is one line."""
SHORT_PATHS = "**Short paths**"
PLACES = "**At their places**"
INTERNAL = "Internal:"
"""What a docstring begins with whose function is the library's own."""
MADE_ELSEWHERE = re.compile(r"\bMade by\b")

INTRODUCTION = """\
# The library

<!-- Made by docs/make_api.py from the docstrings. Do not edit. -->

The public names, in the modules they are to be imported from; what is behind them may move. Here is
how each is called and what it is. Who owns a buffer, what is raised, and whether a call is a
checkpoint, stands in the docstrings: `help(vmbus.open_bus)`. Methods that are not here, though
their names have no underscore, are the library's own: it calls them, and their docstrings begin
with "Internal". Everything is typed, and
[the rooms of the house](../explanation/layers.md) say where it belongs.
"""


def rows(title: str) -> list[tuple[str, list[str]]]:
    """Return the modules, and what is imported from each, of the table below a title."""
    text = LAYERS.read_text().partition(title)[2].partition("\n\n")[2]
    found = re.findall(r"`from ([\w.]+) import ([^`]+)`", text.partition("\n\n")[0])
    assert found, f"no table below {title}"
    return [(module, names.split(", ")) for module, names in found]


def modules() -> list[str]:
    """Return the modules of both tables, in their order."""
    return list(dict.fromkeys(module for module, _ in [*rows(SHORT_PATHS), *rows(PLACES)]))


def names_of(module: str) -> list[tuple[str, object]]:
    """Return the public names of a module."""
    if module in dict(rows(SHORT_PATHS)):
        return public_names(module)
    found = importlib.import_module(module)
    return [(name, getattr(found, name)) for name in dict(rows(PLACES))[module]]


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def construction(name: str, cls: type) -> str:
    """Return how an object of a class is made, or what kind of class that is."""
    if getattr(cls, "_is_protocol", False):
        return f"{name}(Protocol)"
    if issubclass(cls, enum.Enum | BaseException):
        return f"{name}({', '.join(base.__name__ for base in cls.__bases__)})"
    if MADE_ELSEWHERE.search(first_section(cls)):
        return name
    return signature(name, cls)


def describe_class(name: str, cls: type) -> list[str]:
    """Return what there is to say of a class."""
    lines = ["```python", f"class {construction(name, cls)}", "```", "", first_section(cls), ""]
    fields = list(described_fields(cls))
    if fields:
        lines += ["| attribute | type | |", "|---|---|---|"]
        lines += [f"| `{field}` | `{cell(of)}` | {cell(text)} |" for field, of, text in fields]
        lines += [""]
    members = [
        (member, value)
        for member, value in public_members(cls)
        if not summary(value).startswith(INTERNAL)
    ]
    if members:
        lines += ["| member | |", "|---|---|"]
        for member, value in members:
            shown = member if isinstance(value, property) else signature(member, value, WIDE)
            lines.append(f"| `{cell(shown)}` | {cell(summary(value))} |")
        lines += [""]
    return lines


def describe(name: str, thing: object) -> list[str]:
    """Return what there is to say of a public name, under a heading of its own."""
    lines = [f"### {name}", ""]
    if inspect.isclass(thing):
        return lines + describe_class(name, thing)
    if inspect.isfunction(thing):
        return [*lines, "```python", signature(name, thing), "```", "", first_section(thing), ""]
    return [*lines, f"```python\n{name} = {value(thing)}\n```", ""]


def value(thing: object) -> str:
    """Return an alias or a constant as text."""
    if isinstance(thing, enum.Flag):
        return " | ".join(f"{type(thing).__name__}.{each.name}" for each in thing)
    text = repr(thing)
    if " at 0x" in text:
        return f"{type(thing).__name__}()"
    if dataclasses.is_dataclass(thing) or isinstance(thing, Mapping):
        return f"{type(thing).__name__}(...)"  # its parts are said elsewhere
    return text


def make() -> str:
    """Return the whole page."""
    lines = INTRODUCTION.split("\n")
    homes: dict[int, str] = {}
    for module in reversed(modules()):  # so that the first of them is the home
        homes.update({id(thing): module for _, thing in names_of(module)})
    for module in modules():
        names = names_of(module)
        own = [(name, thing) for name, thing in names if homes[id(thing)] == module]
        others = [(name, thing) for name, thing in names if homes[id(thing)] != module]
        lines += [f"## {module}", ""]
        if others:
            also = [f"[`{name}`](#{name.lower()})" for name, _ in others]
            lines += [f"Also here: {', '.join(also)}.", ""]
        for name, thing in own:
            lines += describe(name, thing)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")

"""Write docs/reference/spec-map.md: each control message, the functions that handle it, its tests.

Functions are named, not lines: the page changes only when the code says something else. Every file
is read once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

from vmbus.wire.messages import MESSAGES, Direction, Message  # noqa: E402  # needs the path above

PAGE = ROOT / "docs/reference/spec-map.md"
SHOWN_TESTS = 3
OWN_TESTS = "tests/unit/engine"
"""Where the tests are that are about the messages themselves."""
HEAD = """# Spec map

Each control message of VMBus: which functions of the engine take it or make it, and which tests
name it. Made by `docs/make_spec_map.py` from the table in `vmbus/wire/messages.py` and the sources;
a test compares this page with what the script would write. Layouts and versions are
[in the tables](wire.md), states [in the diagrams](states.md).

*Code*: of the guest's messages, the functions with a parameter of that class; of the host's, those
that make one; if there is none, those that name the class. Private functions are listed only where
there is no public one.

*Tests*: a test names a message if it, or a function of its file that it uses, names the class. The
most specific three are shown: those that name the fewest messages; among equals the engine's own
unit tests first; a second one of a file only when there is no other file. The number behind them
counts all.

| # | message | direction | code | tests |
|---|---|---|---|---|
"""


class Function(NamedTuple):
    """A function, and where it is."""

    path: Path
    name: str
    """With its class."""
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def is_public(self) -> bool:
        """Whether others may call it."""
        return not self.node.name.startswith("_")


class Test(NamedTuple):
    """A test function that names a message; in the order of how specific it is."""

    messages: int
    """How many it names."""
    elsewhere: bool
    """Whether it is not one of the engine's own."""
    path: Path
    name: str


def names_in(node: ast.AST) -> set[str]:
    """Return all names in a piece of code, attributes included."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            found.add(each.id)
        elif isinstance(each, ast.Attribute):
            found.add(each.attr)
    return found


def functions(path: Path, text: str) -> Iterator[Function]:
    """Yield the functions and methods of a file."""
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for each in inside:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(path, prefix + each.name, each)


def sources(folder: str, pattern: str) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, each with its text."""
    for path in sorted((ROOT / folder).rglob(pattern)):
        yield path, path.read_text()


# -- code ------------------------------------------------------------------------------------------


def takes(function: Function, name: str) -> bool:
    """Whether a function has a parameter of class ``name``."""
    arguments = function.node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return any(each.annotation and name in names_in(each.annotation) for each in every)


def makes(function: Function, name: str) -> bool:
    """Whether a function calls class ``name``."""
    return any(
        isinstance(each, ast.Call)
        and name in {getattr(each.func, "id", None), getattr(each.func, "attr", None)}
        for each in ast.walk(function.node)
    )


def mentions(function: Function, name: str) -> bool:
    """Whether a function names the class, in whatever way; a list of handlers does not count."""
    return function.node.name != "__init__" and name in names_in(function.node)


def code_of(name: str, direction: Direction, engine: list[Function]) -> list[Function]:
    """Return the functions that handle or make a message."""
    rule = takes if direction is Direction.GUEST_TO_HOST else makes
    found = [each for each in engine if rule(each, name)]
    found = found or [each for each in engine if mentions(each, name)]
    return [each for each in found if each.is_public] or found


# -- tests -----------------------------------------------------------------------------------------


def named_with_helpers(names: dict[str, set[str]], start: str) -> set[str]:
    """Return what a function names, and what the functions of its file name that it uses."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        function = waiting.pop()
        if function not in seen:
            seen.add(function)
            found |= names[function]
            waiting += names[function] & names.keys()
    return found


def tests_of(messages: set[str]) -> dict[str, list[Test]]:
    """Return the tests that name each message, the most specific first."""
    found: dict[str, list[Test]] = {name: [] for name in messages}
    for path, text in sources("tests", "test_*.py"):
        if not any(name in text for name in messages) or "bench" in path.parts:
            continue
        names = {each.name: names_in(each.node) for each in functions(path, text)}
        for function in names:
            if not function.rpartition(".")[2].startswith("test_"):
                continue
            named = named_with_helpers(names, function) & messages
            elsewhere = not path.is_relative_to(ROOT / OWN_TESTS)
            for name in named:
                found[name].append(Test(len(named), elsewhere, path, function))
    return {name: sorted(tests) for name, tests in found.items()}


def most_specific(tests: list[Test]) -> list[Test]:
    """Choose those to show, of as many files as there are."""
    firsts = list({each.path: each for each in reversed(tests)}.values())
    rest = [each for each in tests if each not in firsts]
    return [*sorted(firsts), *rest][:SHOWN_TESTS]


# -- page ------------------------------------------------------------------------------------------


def link(text: str, path: Path) -> str:
    """Return a link from the page to a file."""
    return f"[{text}](../../{path.relative_to(ROOT)})"


def render() -> str:
    """Return the page."""
    messages: dict[type[Message], Direction] = {row.message: row.direction for row in MESSAGES}
    engine = [each for pair in sources("vmbus/engine", "*.py") for each in functions(*pair)]
    tests = tests_of({message.__name__ for message in messages})
    rows = []
    for message, direction in sorted(messages.items(), key=lambda item: item[0].TYPE):
        name = message.__name__
        code = ", ".join(
            link(f"`{each.name}`", each.path) for each in code_of(name, direction, engine)
        )
        shown = [
            link(each.name.removeprefix("test_").replace("_", " "), each.path)
            for each in most_specific(tests[name])
        ]
        way = "g→h" if direction is Direction.GUEST_TO_HOST else "h→g"
        rows.append(
            f"| {message.TYPE} | {message.NAME} | {way} | {code} "
            f"| {'; '.join(shown)} ({len(tests[name])}) |"
        )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())

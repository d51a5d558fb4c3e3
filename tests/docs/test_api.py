"""docs/reference/api.md has every public name of the library, as it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
from collections.abc import Iterator

import pytest

from tests.support.house import ROOT

MAKER = runpy.run_path(str(ROOT / "docs/make_api.py"))
MODULES: list[str] = MAKER["modules"]()
PAGE: str = MAKER["PAGE"].read_text()
OURS = re.compile(r"(vmbus|storvsp)\b")
SHORT_PATHS: str = MAKER["SHORT_PATHS"]


def test_the_page_is_up_to_date():
    assert MAKER["make"]() == PAGE, "run: python docs/make_api.py"


def test_every_module_of_the_short_paths_is_there():
    assert re.findall(r"^## ([\w.]+)$", PAGE, re.MULTILINE) == MODULES
    assert {"vmbus", "vmbus.host", "vmbus.attach.client", "storvsp"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_of_a_module_is_there(module):
    section = PAGE.partition(f"\n## {module}\n")[2].partition("\n## ")[0]
    described = set(re.findall(r"^### (\w+)$", section, re.MULTILINE))
    elsewhere = set(re.findall(r"\[`(\w+)`\]\(#", section.partition("###")[0]))
    assert described | elsewhere == {name for name, _ in MAKER["names_of"](module)}


@pytest.mark.parametrize("module", sorted({name for name, _ in MAKER["rows"](SHORT_PATHS)}))
def test_all_names_of_a_short_path_are_public(module):
    names = [name for name, _ in MAKER["names_of"](module)]
    assert names == importlib.import_module(module).__all__


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of what a program takes from our packages."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and OURS.match(node.module or ""):
            yield from ((str(node.module), alias.name) for alias in node.names)


def programs() -> Iterator[tuple[str, str]]:
    """Yield the programs that the documents show, each with its place."""
    for path in (ROOT / "docs").rglob("example_*.py"):
        yield path.name, path.read_text()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for program in re.findall(
            r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            if "import" in program:
                yield path.name, program


def test_what_the_documents_import_is_public():
    public = {id(thing) for module in MODULES for _, thing in MAKER["names_of"](module)}
    taken = [(place, each) for place, program in programs() for each in imports(program)]
    assert len(taken) > 20
    for place, (module, name) in taken:
        thing = getattr(importlib.import_module(module), name)
        assert inspect.ismodule(thing) or id(thing) in public, f"{place}: {module}.{name}"


def test_members_that_the_library_calls_itself_are_left_out():
    assert "Internal:" not in PAGE
    bus = PAGE.partition("\n### Bus\n")[2].partition("\n### ")[0]
    assert "class Bus\n" in bus
    assert "`add_device(" in bus
    for method in ("pump", "channel_failed", "gpadl", "aclose"):
        assert f"{method}(" not in bus


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_and_function_says_what_it_is(module):
    for name, thing in MAKER["names_of"](module):
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{module}.{name}"


def test_every_link_leads_to_a_name():
    links = set(re.findall(r"\]\(#([\w-]+)\)", PAGE))
    assert links
    assert links <= {title.lower() for title in re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)}

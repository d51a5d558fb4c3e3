"""docs/reference/api.md has every public name of the library, as it is."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy

import pytest

from tests.support.house import ROOT

MAKER = runpy.run_path(str(ROOT / "docs/make_api.py"))
MODULES: list[str] = MAKER["modules"]()
PAGE: str = MAKER["PAGE"].read_text()


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
    assert described | elsewhere == set(importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_and_function_says_what_it_is(module):
    found = importlib.import_module(module)
    for name in found.__all__:
        thing = getattr(found, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{module}.{name}"


def test_every_link_leads_to_a_name():
    links = set(re.findall(r"\]\(#([\w-]+)\)", PAGE))
    assert links
    assert links <= {title.lower() for title in re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)}

"""docs/reference/endpoints.md has every option that the code takes, and no other."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy

import pytest

from netvsp.endpoints.specs import ENDPOINTS
from netvsp.spec import EndpointSpec
from tests.support.house import ROOT
from vmbus.plugins.options import read_options
from vmbus.plugins.specs import OptionReader

MAKER = runpy.run_path(str(ROOT / "docs/make_endpoints.py"))
MODULES = MAKER["registered"]()
PAGE: str = MAKER["PAGE"].read_text()


class KnownError(Exception):
    """Stops an endpoint once it has asked for its options, before it opens anything."""


async def accepted(scheme: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return which options an endpoint asks for."""

    def finish(reader: OptionReader) -> None:
        raise KnownError(*reader._known)

    monkeypatch.setattr(OptionReader, "finish", finish)
    module = importlib.import_module(MODULES[scheme].__name__)
    with pytest.raises(KnownError) as caught:
        await module.open_spec(EndpointSpec(scheme, {}, "target"))
    return list(caught.value.args)


def test_the_page_is_up_to_date():
    assert MAKER["make"]() == PAGE, "run: python docs/make_endpoints.py"


def test_every_endpoint_of_this_project_is_there():
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == list(MODULES)
    assert set(MODULES) <= set(ENDPOINTS.names())


@pytest.mark.parametrize("scheme", MODULES)
async def test_the_options_described_are_those_accepted(scheme, monkeypatch):
    described = [option.name for option in read_options(MODULES[scheme])]
    assert sorted(described) == sorted(await accepted(scheme, monkeypatch))
    section = PAGE.partition(f"\n## {scheme}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)(?:=.*?)?` \|", section, re.MULTILINE)
    assert rows == described


@pytest.mark.parametrize("scheme", MODULES)
async def test_the_usage_in_the_docstring_of_an_opener_names_them_all(scheme, monkeypatch):
    usage = inspect.getdoc(MODULES[scheme].open_spec) or ""
    found = re.search(r"``\w+:(?:\[(.*?)\])?\w*``", usage)
    assert found, usage
    names = [each.partition("=")[0] for each in (found[1] or "").split(",") if each]
    assert sorted(names) == sorted(await accepted(scheme, monkeypatch))

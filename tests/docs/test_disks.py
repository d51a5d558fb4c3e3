"""docs/reference/disks.md has every option that the code takes, and no other."""

from __future__ import annotations

import inspect
import re
import runpy
from uuid import UUID

import pytest

import storvsp
from storvsp import PLUGIN
from storvsp.disks.specs import DISKS, DiskSpec
from tests.support.house import ROOT
from vmbus.plugins.options import read_options
from vmbus.plugins.specs import OptionReader

MAKER = runpy.run_path(str(ROOT / "docs/make_disks.py"))
MODULES = MAKER["registered"]()
CONTROLLER = "storvsp"
PAGE: str = MAKER["PAGE"].read_text()


class KnownError(Exception):
    """Stops a back-end once it has asked for its options, before it opens anything."""


async def accepted(scheme: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return which options a back-end asks for."""

    def finish(reader: OptionReader) -> None:
        raise KnownError(*reader._known)

    monkeypatch.setattr(OptionReader, "finish", finish)
    with pytest.raises(KnownError) as caught:
        if scheme == CONTROLLER:
            await PLUGIN.from_specs([], instance_id=UUID(int=1), initiator=None, options={})
        else:
            opener = DISKS.load(scheme)
            assert callable(opener)
            await opener(DiskSpec(scheme, {}, "target"))
    return list(caught.value.args)


def test_the_page_is_up_to_date():
    assert MAKER["make"]() == PAGE, "run: python docs/make_disks.py"


def test_every_back_end_of_this_project_is_there():
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == [*MODULES, CONTROLLER]
    assert set(MODULES) <= set(DISKS.names())


@pytest.mark.parametrize("scheme", [*MODULES, CONTROLLER])
async def test_the_options_described_are_those_accepted(scheme, monkeypatch):
    described = [option.name for option in read_options(MODULES.get(scheme, storvsp))]
    assert sorted(described) == sorted(await accepted(scheme, monkeypatch))
    section = PAGE.partition(f"\n## {scheme}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)(?:=.*?)?` \|", section, re.MULTILINE)
    assert rows == described


@pytest.mark.parametrize("scheme", MODULES)
async def test_the_usage_in_the_docstring_of_an_opener_names_them_all(scheme, monkeypatch):
    """``raw:[ro,sector=512|4096,...]PATH`` stands there for readers of the code."""
    usage = inspect.getdoc(DISKS.load(scheme)) or ""
    found = re.search(r"``\w+:(?:\[(.*?)\])?\w+``", usage)
    assert found, usage
    names = [each.partition("=")[0] for each in (found[1] or "").split(",") if each]
    assert sorted(names) == sorted(await accepted(scheme, monkeypatch))


def test_every_option_that_is_the_controllers_is_there():
    for name in DiskSpec.reserved:
        assert f"| `{name}=N` |" in PAGE or f"| `{name}` |" in PAGE


def test_what_becomes_of_an_overlay_is_said():
    assert "Nothing survives closing" in PAGE

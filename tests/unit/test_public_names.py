"""The short names: every one is there, comes from its room, and loads nothing before its time."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import vmbus


@pytest.mark.parametrize("name", vmbus.__all__)
def test_every_public_name_is_that_of_its_room(name):
    assert getattr(vmbus, name) is getattr(importlib.import_module(vmbus._ROOMS[name]), name)


def test_the_lists_agree():
    assert set(vmbus.__all__) == set(vmbus._ROOMS)
    assert set(vmbus.__all__) <= set(dir(vmbus))


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vmbus.nonsense  # noqa: B018


def test_the_bare_package_loads_nothing():
    code = "import sys, vmbus; print(*[name for name in sys.modules if name.startswith('vmbus.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []

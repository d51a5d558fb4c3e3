"""Plug-ins by name: one look-up for devices and back-ends, and its words."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest

from vmbus.errors import ConfigError
from vmbus.plugins import devices
from vmbus.plugins.devices import DEVICES, backend_registries, device_with, load_device
from vmbus.plugins.registry import Registry

TOYS = Registry("vmbus.toys", "toy", "make")


@pytest.fixture
def install(monkeypatch):
    """Install these entry points, and no others, in any group."""

    def install(*points, group="vmbus.toys"):
        found = importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, value, group) for name, value in points
        )
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: found.select(group=group)
        )

    return install


def test_a_plug_in_is_loaded_by_its_name(install):
    install(("b", "json:loads"), ("a", "json:dumps"))
    assert TOYS.names() == ["a", "b"]
    assert TOYS.load("b") is __import__("json").loads


def test_an_unknown_name_says_which_there_are_and_which_was_meant(install):
    install(("train", "json:loads"), ("ball", "json:dumps"))
    with pytest.raises(ConfigError) as caught:
        TOYS.load("tain")
    assert (
        str(caught.value) == "unknown toy make 'tain'; did you mean 'train'? known: ball and train"
    )
    install()
    with pytest.raises(ConfigError, match="unknown toy make 'tain'; there are none"):
        TOYS.load("tain")


def test_two_claims_of_one_name_are_refused_unless_they_are_the_same(install):
    install(("train", "json:loads"), ("train", "json:loads"))
    assert TOYS.load("train") is __import__("json").loads
    install(("train", "json:loads"), ("train", "json:dumps"))
    with pytest.raises(ConfigError) as caught:
        TOYS.load("train")
    assert str(caught.value) == (
        "two plug-ins claim the toy make 'train': json:dumps and json:loads; uninstall all but one"
    )


def test_a_plug_in_that_cannot_be_imported_breaks_itself_only(install):
    install(("bad", "no_such_module_at_all:x"), ("good", "json:loads"))
    assert TOYS.names() == ["bad", "good"]
    TOYS.load("good")
    with pytest.raises(ConfigError, match=r"toy plug-in 'bad' \(no_such_module_at_all:x\) cannot"):
        TOYS.load("bad")


# -- devices ---------------------------------------------------------------------------------------


def a_device(**members):
    return types.SimpleNamespace(
        **{"backends": None, "demo": None, "from_specs": None, "command": None, **members}
    )


@pytest.fixture
def device_module(monkeypatch):
    """A module whose members are devices."""
    module = types.ModuleType("toy_devices")
    monkeypatch.setitem(sys.modules, "toy_devices", module)
    return module


def test_the_device_with_disks_is_found_by_what_its_back_ends_are_called():
    assert device_with("disk") == "storvsp"
    assert [each.noun for each in backend_registries()] == ["endpoint", "disk"]


def test_devices_without_back_ends_and_broken_ones_are_passed_over(install, device_module):
    device_module.clock = a_device()
    device_module.box = a_device(backends=TOYS)
    install(
        ("aaa", "no_such_module_at_all:x"),
        ("box", "toy_devices:box"),
        ("clock", "toy_devices:clock"),
        group=DEVICES.group,
    )
    assert device_with("toy") == "box"
    assert backend_registries() == [TOYS]
    with pytest.raises(ConfigError, match="no installed device has a disk as its back-end; device"):
        device_with("disk")


@pytest.mark.parametrize("missing", devices._MEMBERS)
def test_what_is_no_device_plug_in_says_what_it_lacks(install, device_module, missing):
    device_module.odd = a_device()
    delattr(device_module.odd, missing)
    install(("odd", "toy_devices:odd"), group=DEVICES.group)
    with pytest.raises(ConfigError, match=f"device plug-in 'odd' is broken: it has no '{missing}'"):
        load_device("odd")

"""``vmbus devices``: what plug-ins say about themselves, and what becomes of broken ones."""

import dataclasses
import json

import pytest

from tests.support.cli import install_plugin, run_cli
from vmbus.cli import devices
from vmbus.cli.devices import find_plugins, read_docstring

DISKS = "storvsp.disks"


@pytest.mark.parametrize(
    ("doc", "kind", "name", "help_text", "example"),
    [
        (
            "``ram:SIZE``: a disk in memory.\n\nWrite ``RamDisk`` or ``ram:64M``, ``ram:1G``.",
            "disk",
            "ram",
            "a disk in memory",
            "ram:64M",
        ),
        ("``nbd:URL``: a disk elsewhere.", "disk", "nbd", "a disk elsewhere", "nbd:URL"),
        ("A ``strange`` disk.", "disk", "x", "A strange disk", "x:"),
        ("", "disk", "x", "", "x:"),
        ("A timer.", "device", "timer", "A timer", "--device timer"),
        (
            "A timer.\n\nAs in ``timer hz=100``.",
            "device",
            "timer",
            "A timer",
            "--device 'timer hz=100'",
        ),
    ],
)
def test_help_and_example_come_from_the_docstring(doc, kind, name, help_text, example):
    assert read_docstring(doc, kind, name) == (help_text, example)


def test_the_devices_of_this_project_are_listed():
    result = run_cli("devices")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["kind", "name", "what", "it", "is", "example"]
    assert ["device", "netvsp"] in [line.split()[:2] for line in lines]
    assert ["device", "storvsp"] in [line.split()[:2] for line in lines]
    ram = next(line for line in lines if line.split()[:2] == ["disk", "ram"])
    assert "a disk in memory" in ram
    assert ram.endswith("ram:64M")


def test_options_are_listed_with_what_holds_without_them():
    lines = run_cli("devices").output.splitlines()
    start = lines.index("Options of disks, as in scheme:[option,option=value]target:")
    options = [line.split(maxsplit=3) for line in lines[start + 3 :]]
    assert ["raw", "ro", "-", "refuse writes; any number of readers may share the file"] in options
    assert ["ram", "sector=512|4096", "512", "logical sector in bytes"] in options
    start = lines.index("Options of devices, as in --device 'NAME OPTION=VALUE':")
    assert lines[start + 3].split(maxsplit=3)[:3] == ["storvsp", "max_subchannels=N", "15"]


def test_without_any_option_there_is_no_table_of_them(monkeypatch):
    plain = [dataclasses.replace(each, options=()) for each in find_plugins()]
    monkeypatch.setattr(devices, "find_plugins", lambda: plain)
    assert "Options of" not in run_cli("devices").output


def test_json_has_everything():
    plugins = {(each["kind"], each["name"]): each for each in json.loads(run_json())}
    assert plugins["disk", "ram"] == {
        "kind": "disk",
        "name": "ram",
        "value": "storvsp.disks.ram:open_spec",
        "help": "a disk in memory, sparse, gone when it is closed",
        "example": "ram:64M",
        "options": [
            {
                "name": "sector",
                "meaning": "logical sector in bytes",
                "value": "512|4096",
                "default": "512",
            },
            {
                "name": "physical",
                "meaning": "physical sector in bytes, as guests are told",
                "value": "512|4096",
                "default": "4096",
            },
        ],
        "error": None,
    }
    options = plugins["device", "storvsp"]["options"]
    assert [each["name"] for each in options] == [
        "max_subchannels",
        "max_transfer_bytes",
        "monitor",
    ]
    assert plugins["device", "storvsp"]["value"] == "storvsp:PLUGIN"


def run_json():
    result = run_cli("devices", "--json")
    assert result.exit_code == 0
    return result.output


def test_a_strangers_plugin_is_listed_like_ours(tmp_path, monkeypatch):
    source = '"""``dev_null:``: a disk\\x1b that forgets."""\ndef open_spec(spec): ...\n'
    install_plugin(tmp_path, DISKS, "dev_null", "nulldisk:open_spec", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "a disk? that forgets" in run_cli("devices").output


def test_an_objects_docstring_serves_if_the_module_has_none(tmp_path, monkeypatch):
    source = 'class Timer:\n    "Rings."\n'
    install_plugin(tmp_path, "vmbus.devices", "ringer", "ringer:Timer", source)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = next(plugin for plugin in find_plugins() if plugin.name == "ringer")
    assert (plugin.help, plugin.error) == ("Rings", None)


def test_a_broken_plugin_is_shown_with_its_reason_and_breaks_nothing_else(tmp_path, monkeypatch):
    install_plugin(tmp_path, DISKS, "bad", "baddisk:open_spec", "raise OSError('no library')")
    monkeypatch.syspath_prepend(tmp_path)
    result = run_cli("devices")
    assert result.exit_code == 0
    assert "disk bad (baddisk:open_spec) is broken:\n  OSError: no library\n" in result.output
    assert "a disk in memory" in result.output


def test_one_name_of_two_packages_is_broken(tmp_path, monkeypatch):
    install_plugin(tmp_path, DISKS, "twin", "twin_a:open_spec")
    install_plugin(tmp_path, DISKS, "twin", "twin_b:open_spec")
    monkeypatch.syspath_prepend(tmp_path)
    (twin,) = (plugin for plugin in find_plugins() if plugin.name == "twin")
    assert twin.error == (
        "several packages claim this name: twin_a:open_spec and twin_b:open_spec; "
        "uninstall all but one"
    )


def test_one_object_of_two_packages_is_one(tmp_path, monkeypatch):
    for package in ("old-name", "new-name"):
        install_plugin(
            tmp_path, DISKS, "same", "same:open_spec", "def open_spec(): ...", package=package
        )
    monkeypatch.syspath_prepend(tmp_path)
    (same,) = (plugin for plugin in find_plugins() if plugin.name == "same")
    assert same.error is None


def test_without_plugins_the_way_to_get_them_is_shown(monkeypatch):
    monkeypatch.setattr(devices, "find_plugins", list)
    assert "pip install -e ." in run_cli("devices").output

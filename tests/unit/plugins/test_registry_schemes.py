"""Plug-ins that are broken, missing, or there twice."""

import importlib.metadata

import pytest
import trio

from storvsp.disks import specs
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import open_disk
from vmbus.errors import ConfigError


async def open_good(spec):
    await trio.lowlevel.checkpoint()
    return RamDisk(1 << 20)


async def open_wrong(spec):
    await trio.lowlevel.checkpoint()
    return "not a disk"


async def open_missing(spec):
    await trio.lowlevel.checkpoint()
    raise FileNotFoundError(2, "No such file or directory")


def open_synchronously(spec):
    return RamDisk(1 << 20)


NO_OPENER = 3


@pytest.fixture
def plugins(monkeypatch):
    def install(*points):
        found = importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, value, specs.DISKS.group) for name, value in points
        )
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)

    return install


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("no_such_module_at_all:open_spec", "cannot be imported: ModuleNotFoundError"),
        ("storvsp.disks.specs:no_such_name", "cannot be imported: AttributeError"),
        (f"{__name__}:NO_OPENER", "has to be an async function of one DiskSpec"),
        (f"{__name__}:open_synchronously", "has to be an async function of one DiskSpec"),
        (f"{__name__}:open_wrong", "returned str, no Disk"),
        (f"{__name__}:open_missing", "mine:x: No such file or directory"),
    ],
)
async def test_a_broken_plug_in_is_named_in_one_error(plugins, value, hint, request):
    # pytest imports this module under a name of its own choosing: make it findable again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, __name__, request.module)
        plugins(("mine", value))
        with pytest.raises(ConfigError) as caught:
            await open_disk("mine:x")
    assert hint in str(caught.value)
    assert "'mine'" in str(caught.value) or "mine:x" in str(caught.value)


async def test_a_broken_plug_in_harms_no_other(plugins):
    plugins(("bad", "no_such_module_at_all:f"), ("ram", "storvsp.disks.ram:open_spec"))
    disk = await open_disk("ram:1M")
    await disk.aclose()


async def test_two_plug_ins_for_one_scheme_are_refused_unless_they_are_the_same(plugins):
    plugins(("ram", "storvsp.disks.ram:open_spec"), ("ram", "other:open_spec"))
    with pytest.raises(ConfigError, match="two plug-ins claim the disk scheme 'ram': other"):
        await open_disk("ram:1M")
    plugins(*[("ram", "storvsp.disks.ram:open_spec")] * 2)
    disk = await open_disk("ram:1M")
    await disk.aclose()


async def test_no_plug_ins_at_all_is_said(plugins):
    plugins()
    with pytest.raises(ConfigError, match="there are none"):
        await open_disk("ram:1M")

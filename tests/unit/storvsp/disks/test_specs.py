"""The schemes of disks."""

import pytest

from storvsp.disks import specs
from storvsp.disks.specs import DiskSpec, open_disk
from vmbus.errors import ConfigError


async def test_a_stack_needs_something_to_stand_on():
    with pytest.raises(ConfigError, match="delay:ram:64M"):
        await open_disk("delay:[read=1ms]")


async def test_the_schemes_of_this_project_are_installed_and_open():
    assert {"ram", "raw", "overlay", "delay", "fault", "cd"} <= set(specs.DISKS.names())
    disk = await open_disk(DiskSpec.parse("ram:1M"))
    assert disk.info.size == 1 << 20
    await disk.aclose()


async def test_an_unknown_scheme_says_which_are_known():
    with pytest.raises(ConfigError, match=r"unknown disk scheme 'rams'; did you mean 'ram'\?"):
        await open_disk("rams:1M")

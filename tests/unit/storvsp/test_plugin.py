"""The controller as a plug-in: made from specifications, operated by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from storvsp import ScsiController
from storvsp.plugin import PLUGIN, add, parse_address
from vmbus.errors import ConfigError
from vmbus.plugins.devices import load_device
from vmbus.testing import make_offer

INSTANCE = UUID(int=5)


async def make(*specs: str, **options: Any) -> ScsiController:
    return await PLUGIN.from_specs(specs, instance_id=INSTANCE, initiator="vm", options=options)


async def test_the_entry_point_makes_a_controller():
    plugin = load_device("storvsp")
    device = await plugin.from_specs(
        ["ram:1M"], instance_id=INSTANCE, initiator="vm", options={"monitor": True}
    )
    assert isinstance(device, ScsiController)
    assert device.offer.instance_id == INSTANCE
    assert device.units.initiator == "vm"
    answer = await plugin.command(device, {"action": "add", "spec": "ram:1M"})
    assert answer == {"address": "0:0:1"}
    await device.aclose()


async def test_disks_have_the_places_that_their_specifications_say():
    controller = await make("ram:1M", "ram:[lun=5]1M", "ram:[path=2,target=1]1M", "ram:1M")
    assert sorted(controller.units.by_address) == [(0, 0, 0), (0, 0, 1), (0, 0, 5), (2, 1, 0)]
    await controller.aclose()


async def test_options_are_those_of_the_controller():
    controller = await make(max_subchannels="3", max_transfer_bytes="65536", monitor=True)
    assert (controller.limits.max_subchannels, controller.limits.max_transfer_bytes) == (3, 65536)
    assert controller.offer.monitor_latency is not None
    with pytest.raises(ConfigError, match="no option 'colour'"):
        await make(colour="red")
    with pytest.raises(ConfigError):
        await make(max_subchannels=1000)


@pytest.mark.parametrize(
    "specs",
    [
        ("ram:1M", "nothing:1"),
        ("ram:1M", "ram:[lun=0]1M"),
        ("ram:1M", "ram:[lun=x]1M"),
        ("ram:1M", "ram:[lun=255]1M"),
        ("ram:1M", "ram:[size=9]1M"),
        ("ram:1M", "ram"),
        ("ram:1M", ""),
    ],
    ids=str,
)
async def test_nothing_stays_open_if_one_disk_cannot_be_had(specs, tmp_path: Path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError):
        await make(f"raw:{image}", *specs)
    # A raw disk that is open is locked.
    controller = await make(f"raw:{image}")
    await controller.aclose()


async def test_a_disk_whose_place_is_taken_is_closed_again(tmp_path: Path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    controller = await make("ram:1M")
    with pytest.raises(ConfigError, match="taken"):
        await add(controller, f"raw:[lun=0]{image}")
    assert await add(controller, f"raw:{image}") == (0, 0, 1)
    await controller.aclose()


@pytest.mark.parametrize(
    ("text", "address"),
    [("0", (0, 0, 0)), ("7", (0, 0, 7)), ("1:1:200", (1, 1, 200)), ("-1", (0, 0, -1))],
)
def test_addresses_are_a_lun_or_three_numbers(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "1:2", "1:2:3:4", ":", "1::2", "a:b:c", "1.5"])
def test_anything_else_is_no_address(text):
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)


async def test_commands_add_resize_and_remove():
    controller = await make("ram:1M")
    assert await PLUGIN.command(controller, {"action": "add", "spec": "ram:[lun=9]1M"}) == {
        "address": "0:0:9"
    }
    request = {"action": "resize", "address": "9", "size": "2M"}
    assert await PLUGIN.command(controller, request) == {"size": 2 << 20}
    assert await PLUGIN.command(controller, {"action": "remove", "address": "0:0:9"}) == {}
    with pytest.raises(ConfigError):
        await PLUGIN.command(controller, {"action": "remove", "address": "0:0:9"})
    await controller.aclose()


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"action": "explode"},
        {"action": "add"},
        {"action": "add", "spec": 5},
        {"action": "add", "spec": "nothing:1"},
        {"action": "remove", "address": 5},
        {"action": "remove", "address": "nowhere"},
        {"action": "resize", "address": "0"},
        {"action": "resize", "address": "0", "size": "big"},
        {"action": "resize", "address": "3", "size": "1M"},
    ],
    ids=str,
)
async def test_commands_that_make_no_sense_are_refused(request_):
    controller = await make("ram:1M")
    with pytest.raises(ConfigError):
        await PLUGIN.command(controller, request_)
    assert list(controller.units.by_address) == [(0, 0, 0)]
    await controller.aclose()


async def test_commands_are_for_controllers_of_this_kind():
    class Other:
        offer = make_offer()

    with pytest.raises(AssertionError):
        await PLUGIN.command(Other(), {})  # type: ignore[arg-type]


async def test_a_disk_becomes_smaller_only_if_that_is_asked_for():
    controller = await make("ram:4M")
    smaller = {"action": "resize", "address": "0", "size": "1M"}
    with pytest.raises(
        ConfigError, match=r"0:0:0 has 4194304 bytes; 1048576 would cut off .*shrink"
    ):
        await PLUGIN.command(controller, smaller)
    assert await PLUGIN.command(controller, {**smaller, "shrink": True}) == {"size": 1 << 20}
    for nonsense in ({"shrink": 1}, {"size": 5}, {"size": "1M", "shrink": "yes"}):
        with pytest.raises(ConfigError):
            await PLUGIN.command(controller, {"action": "resize", "address": "0", **nonsense})
    await controller.aclose()


async def test_without_a_size_the_back_end_is_looked_at_again(tmp_path: Path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    controller = await make(f"raw:[ro]{image}", "ram:1M")
    with image.open("r+b") as file:
        file.truncate(2 << 20)
    assert await PLUGIN.command(controller, {"action": "resize", "address": "0"}) == {
        "size": 2 << 20
    }
    with pytest.raises(ConfigError, match="RamDisk, which cannot be resized"):
        await PLUGIN.command(controller, {"action": "resize", "address": "1"})
    await controller.aclose()

"""The controller as a plug-in: made from specifications, operated by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio

from storvsp import ScsiController
from storvsp.disks.raw import RawDisk
from storvsp.plugin import PLUGIN, add, add_shared, parse_address
from storvsp.scsi import CdromUnit, DiskUnit
from storvsp.scsi.cdrom_data import EVENT_EJECT_REQUEST
from storvsp.units import Address, address_text
from vmbus.errors import ConfigError
from vmbus.plugins.devices import load_device
from vmbus.plugins.remarks import remarks
from vmbus.plugins.sharing import make_line
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
    with pytest.raises(ConfigError, match="unknown option 'colour'; known: max_subchannels,"):
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
        {"action": "resize", "address": "1"},
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
    with pytest.raises(ConfigError, match=r"^0 bytes are no size of a disk"):
        await PLUGIN.command(controller, {**smaller, "size": "0"})
    with pytest.raises(ConfigError, match="'' is not a size"):
        await PLUGIN.command(controller, {**smaller, "size": ""})
    for nonsense in ({"shrink": 1}, {"size": 5}, {"size": "1M", "shrink": "yes"}):
        with pytest.raises(ConfigError):
            await PLUGIN.command(controller, {"action": "resize", "address": "0", **nonsense})
    await controller.aclose()


async def test_what_has_no_size_to_change_says_what_it_is():
    controller = await make("cd:")
    with pytest.raises(ConfigError, match="0:0:0 cannot be resized: it is an empty drive"):
        await PLUGIN.command(controller, {"action": "resize", "address": "0", "size": "1M"})
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
    # Memory knows its size.
    same = {"action": "resize", "address": "1"}
    assert await PLUGIN.command(controller, same) == {"size": 1 << 20}
    await controller.aclose()


@pytest.fixture
def isos(tmp_path: Path) -> tuple[str, str]:
    made = []
    for index in range(2):
        path = tmp_path / f"{index}.iso"
        path.write_bytes(bytes([index]) * 4096)
        made.append(f"cd:{path}")
    return made[0], made[1]


def content(controller: ScsiController, address: Address = (0, 0, 0)) -> str:
    (unit,) = [
        unit for unit in controller.units.describe() if unit["address"] == address_text(address)
    ]
    return str(unit["source"])


async def test_media_come_and_go(isos: tuple[str, str]):
    controller = await make("cd:")
    one, other = isos
    (empty,) = controller.units.describe()
    assert (empty["size"], empty["source"]) == (None, "")
    for action in ("insert", "eject", "change", "eject", "change", "change"):
        request = {"action": action, "address": "0", "spec": other if action == "change" else one}
        assert await PLUGIN.command(controller, request) == {"done": True}
        assert content(controller) == {"insert": one, "eject": "", "change": other}[action]
    with pytest.raises(ConfigError, match="there is a medium in the drive at 0:0:0"):
        await PLUGIN.command(controller, {"action": "insert", "address": "0", "spec": one})
    assert content(controller) == other
    # What was taken out is closed: it can be locked again.
    file = one.removeprefix("cd:")
    await (await RawDisk.open(file)).aclose()
    await controller.aclose()
    await (await RawDisk.open(other.removeprefix("cd:"))).aclose()


async def test_a_locked_tray_is_asked_and_forced(isos: tuple[str, str]):
    controller = await make(isos[0])
    drive = controller.units.by_address[0, 0, 0]
    assert isinstance(drive, CdromUnit)
    for action in ("change", "eject"):
        drive.tray.lock("guest", prevent=True)
        request = {"action": action, "address": "0", "spec": isos[1]}
        assert await PLUGIN.command(controller, request) == {"done": False}
        assert drive.event == EVENT_EJECT_REQUEST
        assert content(controller) == (isos[0] if action == "change" else isos[1])
        assert await PLUGIN.command(controller, {**request, "force": True}) == {"done": True}
        assert content(controller) == (isos[1] if action == "change" else "")
        assert not drive.tray.locked
    await controller.aclose()


async def test_a_tray_that_the_guest_has_opened_takes_a_medium(isos: tuple[str, str]):
    controller = await make(isos[0])
    drive = controller.units.by_address[0, 0, 0]
    assert isinstance(drive, CdromUnit)
    drive.move_tray(opened=True)
    insert = {"action": "insert", "address": "0", "spec": isos[1]}
    assert await PLUGIN.command(controller, insert) == {"done": True}
    assert drive.present
    assert content(controller) == isos[1]
    await controller.aclose()


@pytest.mark.parametrize(
    ("request_", "hint"),
    [
        ({"action": "insert", "address": "1", "spec": "ram:1M"}, "sectors of 2048 bytes, not 512"),
        ({"action": "change", "address": "0", "spec": "ram:1M"}, "there is no drive at 0:0:0"),
        ({"action": "eject", "address": "0"}, "there is no drive at 0:0:0"),
        ({"action": "eject", "address": "1"}, "the drive at 0:0:1 is empty"),
        ({"action": "eject", "address": "7"}, "there is no drive at 0:0:7"),
        ({"action": "eject", "address": "1", "force": "yes"}, "force is true or false, not 'yes'"),
        ({"action": "insert", "address": "1", "spec": "cd:/none.iso"}, "No such file"),
        ({"action": "insert", "address": "1"}, "a SCSI controller can: .*insert"),
    ],
    ids=str,
)
async def test_what_is_no_medium_or_no_drive_is_said(request_: dict[str, Any], hint: str):
    controller = await make("ram:1M", "cd:")
    with pytest.raises(ConfigError, match=hint):
        await PLUGIN.command(controller, request_)
    assert [unit["kind"] for unit in controller.units.describe()] == ["RamDisk", "CD-ROM drive"]
    await controller.aclose()


@pytest.mark.parametrize(("spec", "stops"), [
    ("ram:1M", False),
    ("ram:[on-error=report]1M", False),
    ("ram:[on-error=stop]1M", True),
])  # fmt: skip
async def test_what_a_full_disk_does_is_an_option(spec, stops):
    controller = await make(spec)
    unit = controller.units.by_address[0, 0, 0]
    assert isinstance(unit, DiskUnit)
    assert unit.disk.stops is stops
    request = {"action": "continue", "address": "0"}
    assert await PLUGIN.command(controller, request) == {"continued": False}
    unit.disk.stopped = "No space left on device"
    assert controller.snapshot()["units"][0]["stopped"] == "No space left on device"
    assert await PLUGIN.command(controller, request) == {"continued": True}
    assert not unit.disk.stopped
    await controller.aclose()


async def test_only_disks_stop_and_in_known_ways():
    with pytest.raises(ConfigError, match="on-error is report or stop, not 'explode'"):
        await make("ram:[on-error=explode]1M")
    controller = await make("cd:")
    for address in ("0", "7"):
        with pytest.raises(ConfigError, match="there is no disk at"):
            await PLUGIN.command(controller, {"action": "continue", "address": address})
    await controller.aclose()


async def test_a_drive_is_a_drive_whatever_is_in_it(isos: tuple[str, str]):
    controller = await make("cd:")
    drive = controller.units.by_address[0, 0, 0]
    assert isinstance(drive, CdromUnit)

    def listed() -> tuple[object, ...]:
        (unit,) = controller.units.describe()
        return tuple(unit[name] for name in ("kind", "read_only", "tray", "locked"))

    assert listed() == ("CD-ROM drive", True, "closed", False)
    # What is on top of an overlay could be written, but not by a drive.
    request = {"action": "insert", "address": "0", "spec": f"overlay:{isos[0]}"}
    assert await PLUGIN.command(controller, request) == {"done": True}
    drive.tray.lock("guest", prevent=True)
    assert listed() == ("CD-ROM drive", True, "closed", True)
    drive.tray.unlock_all()
    drive.move_tray(opened=True)
    assert listed() == ("CD-ROM drive", True, "open", False)
    await controller.aclose()


async def test_what_is_odd_about_an_image_is_told_to_whoever_added_it(tmp_path: Path):
    image = tmp_path / "odd.iso"
    image.write_bytes(bytes(4096 + 100))
    controller = await make("cd:")
    added = await PLUGIN.command(controller, {"action": "add", "spec": f"overlay:cd:{image}"})
    assert added["address"] == "0:0:1"
    (warning,) = added["warnings"]
    assert warning.startswith(f"{image}: the last 100 of its 4196 bytes are no whole sector")
    insert = {"action": "insert", "address": "0", "spec": f"cd:{image}"}
    assert await PLUGIN.command(controller, insert) == {"done": True, "warnings": [warning]}
    await controller.aclose()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"monitor": "perhaps"}, "option 'monitor' is 'perhaps'; it can be on or off"),
        ({"max_transfer_bytes": "1X"}, "option 'max_transfer_bytes' .*'1X' is not a size"),
        ({"max_subchannels": "1.5"}, "option 'max_subchannels' .*'1.5' is not a whole number"),
        ({"max_subchannels": None}, "option 'max_subchannels' .*'None' is not a whole number"),
    ],
    ids=str,
)
async def test_options_that_make_no_sense_are_refused(options: dict[str, Any], hint: str):
    with pytest.raises(ConfigError, match=hint):
        await make(**options)


async def test_what_is_odd_about_a_shared_image_is_told_to_whoever_asks_for_it(tmp_path, caplog):
    image = tmp_path / "odd\n.img"
    image.write_bytes(b"QFI\xfb" + bytes(4096 + 5))
    spec = f"raw:[shared]{image}"
    keeper = await PLUGIN.open_keeper([spec], identity=bytes(16))
    ours, theirs = make_line(PLUGIN.shared([spec], {})[spec].staging)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.serve, theirs, "me", spec)
        caplog.clear()
        controller = ScsiController(initiator="me")
        with remarks() as warnings:
            await add_shared(controller, spec, ours)
        assert [("no whole sector" in each, "qcow2" in each) for each in warnings] == [
            (True, False),
            (False, True),
        ]
        assert warnings == [each.message for each in caplog.records]
        (unit,) = controller.units
        assert unit.name == f"me: disk 0:0:0 ({spec})"
        assert "warnings" not in controller.units.describe()[0]
        assert controller.continue_disk((0, 0, 0)) is False
        with pytest.raises(ConfigError, match="0:0:0 cannot be resized: it is a disk that"):
            await controller.resize_disk((0, 0, 0), None)
        await controller.aclose()
    await keeper.aclose()

"""Units that come, go and take each other's place while a guest looks."""

from __future__ import annotations

import dataclasses
from uuid import UUID

import pytest

from storvsp import ScsiController
from storvsp.disk import Disk, DiskInfo
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.scsi import CdromUnit
from tests.support.storage_line import TEST_UNIT_READY, Line, clear, line
from vmbus.errors import ConfigError

REPLACED = (6, 0x3F, 0x03)
RESIZED = (6, 0x2A, 0x09)
POWER_ON = (6, 0x29, 0x00)
NEW_MEDIUM = (6, 0x28, 0x00)


class Optical(DiskWrapper):
    """Memory as a CD."""

    def __init__(self) -> None:
        super().__init__(RamDisk(1 << 20))

    @property
    def info(self) -> DiskInfo:
        return dataclasses.replace(super().info, sector_size=2048, optical=True, removable=True)


async def news(wire: Line, lun: int) -> list[tuple[int, int, int]]:
    """Ask a unit whether it is ready until it says so; return what it said before."""
    found = []
    while (reply := await wire.command(TEST_UNIT_READY, lun=lun)).scsi_status:
        found.append((reply.sense[2] & 0xF, reply.sense[12], reply.sense[13]))
    assert reply.srb_status == 1
    return found


async def names(wire: Line, lun: int) -> tuple[bytes, bytes]:
    """Return pages 80 and 83."""
    replies = [
        await wire.command(bytes([0x12, 1, page, 0, 255, 0]), read=255, lun=lun)
        for page in (0x80, 0x83)
    ]
    return replies[0].data, replies[1].data


@pytest.mark.parametrize(
    "second",
    [
        lambda: RamDisk(1 << 20),
        lambda: RamDisk(2 << 20),
        lambda: RamDisk(1 << 20, sector_size=4096),
    ],
    ids=["alike", "larger", "other sectors"],
)
async def test_another_disk_in_the_same_place_is_told_and_has_another_name(second):
    controller = ScsiController()
    place = controller.add_disk(RamDisk(1 << 20))
    async with line(controller) as wire:
        await clear(wire)
        before = await names(wire, 0)
        await controller.remove_disk(place)
        controller.add_disk(second())
        await wire.replies()
        after = await names(wire, 0)
        assert before[0] != after[0]
        assert before[1] != after[1]
        assert await news(wire, 0) == [REPLACED, RESIZED]
        # And each time again.
        await controller.remove_disk(place)
        controller.add_disk(second())
        await wire.replies()
        assert (await names(wire, 0))[1] not in {before[1], after[1]}
        assert await news(wire, 0) == [REPLACED, RESIZED]


async def test_the_same_disk_that_comes_back_keeps_its_name():
    controller = ScsiController()
    disk = RamDisk(1 << 20)
    place = controller.add_disk(disk, owned=False)
    async with line(controller) as wire:
        before = await names(wire, 0)
        await controller.remove_disk(place)
        with pytest.raises(ConfigError):
            controller.add_disk(RamDisk(1 << 20), lun=255)
        controller.add_disk(disk, owned=False)
        with pytest.raises(ConfigError):
            controller.add_disk(RamDisk(1 << 20), lun=0)
        await wire.replies()
        assert await names(wire, 0) == before
        # Its reservations and its mode pages are gone, and the guest might have missed it.
        assert await news(wire, 0) == [REPLACED, RESIZED]


async def test_a_unit_that_comes_to_a_place_of_its_own_reports_power_on():
    controller = ScsiController()
    controller.add_disk(RamDisk(1 << 20))
    async with line(controller) as wire:
        await clear(wire)
        controller.add_disk(RamDisk(1 << 20))
        await wire.replies()
        assert await news(wire, 1) == [POWER_ON]


async def test_a_guest_that_comes_finds_its_disks_in_a_defined_state():
    controller = ScsiController()
    place = controller.add_disk(RamDisk(1 << 20))
    async with line(controller) as wire:
        assert await news(wire, 0) == []
    await controller.remove_disk(place)
    controller.add_disk(RamDisk(1 << 20))
    async with line(controller) as wire:
        assert await news(wire, 0) == []


async def test_another_drive_with_a_medium_is_a_new_medium():
    controller = ScsiController()
    place = controller.add_disk(Optical())
    async with line(controller) as wire:
        await news(wire, 0)
        await controller.remove_disk(place)
        controller.add_disk(Optical())
        await wire.replies()
        status = bytes([0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0])
        event = await wire.command(status, read=8)
        assert event.data[4] == 2  # NewMedia
        assert await news(wire, 0) == [NEW_MEDIUM]


async def test_a_place_where_a_unit_of_another_kind_was_is_told_too():
    controller = ScsiController()
    place = controller.add_disk(RamDisk(1 << 20))
    async with line(controller) as wire:
        await clear(wire)
        await controller.remove_disk(place)
        controller.add_unit(CdromUnit(luns=lambda: [0]), lun=0)
        await wire.replies()
        found = [(await wire.command(TEST_UNIT_READY)).sense[12:14].hex() for _ in range(3)]
        assert found == ["3f03", "2800", "3a01"]


async def page_83(disk: Disk, *, lun: int = 0, instance: int = 5) -> bytes:
    controller = ScsiController(instance_id=UUID(int=instance))
    controller.add_disk(disk, lun=lun)
    async with line(controller) as wire:
        name = (await names(wire, lun))[1]
    await controller.aclose()
    return name


async def test_an_image_is_the_same_disk_wherever_and_whenever_it_is_attached(tmp_path):
    one, other = tmp_path / "one.img", tmp_path / "other.img"
    for path in (one, other):
        path.write_bytes(bytes(1 << 16))
    name = await page_83(await RawDisk.open(one))
    assert name == await page_83(await RawDisk.open(one), lun=3, instance=6)
    assert name == await page_83(await RawDisk.open(one, read_only=True))
    assert name != await page_83(await RawDisk.open(other))
    one.rename(tmp_path / "renamed.img")
    assert name == await page_83(await RawDisk.open(tmp_path / "renamed.img"))
    other.rename(one)
    assert name != await page_83(await RawDisk.open(one))


async def test_a_drive_notices_that_its_image_grows_and_shrinks(tmp_path):
    """By the two commands with which guests poll; nobody else looks."""
    path = tmp_path / "grow.iso"
    path.write_bytes(bytes(16 * 2048))
    controller = ScsiController()
    controller.add_disk(await RawDisk.open(path, read_only=True, sector_size=2048, optical=True))
    status, capacity = bytes([0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0]), bytes([0x25]) + bytes(9)

    async def polled(wire: Line, cdb: bytes) -> bytes:
        """Ask; the answer waits for a worker, and a notification may come with it."""
        identity = wire.start(cdb, read=8)
        while True:
            for packet in await wire.guest.receive():
                if packet.transaction_id == identity:
                    return wire.reply(packet).data

    async with line(controller) as wire:
        assert (await polled(wire, capacity))[:4] == (15).to_bytes(4, "big")
        assert (await polled(wire, status))[4] == 0
        for sectors, first in ((32, status), (8, capacity), (0, capacity), (16, status)):
            with path.open("r+b") as file:
                file.truncate(sectors * 2048)
            await polled(wire, first)
            if not sectors:  # it is being written anew
                assert (await wire.command(TEST_UNIT_READY)).sense[12:14] == b"\x3a\x01"
                continue
            assert await news(wire, 0) == [NEW_MEDIUM]
            assert (await polled(wire, capacity))[:4] == (sectors - 1).to_bytes(4, "big")
    await controller.aclose()


async def test_an_empty_drive_is_told_of_its_medium():
    controller = ScsiController()
    place = controller.add_drive()
    async with line(controller) as wire:
        reply = await wire.command(TEST_UNIT_READY)
        assert (reply.sense[2] & 0xF, reply.sense[12]) == (2, 0x3A)
        before = await names(wire, 0)
        assert await controller.insert_medium(place, Optical())
        await wire.replies()
        assert await news(wire, 0) == [NEW_MEDIUM]
        assert await names(wire, 0) == before
        assert await controller.eject_medium(place)
        reply = await wire.command(TEST_UNIT_READY)
        assert (reply.sense[2] & 0xF, reply.sense[12]) == (2, 0x3A)
    await controller.aclose()

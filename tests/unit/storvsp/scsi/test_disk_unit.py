"""READ and WRITE that turned out not to be at hand: what was decoded counts while it is true."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from storvsp.disks.ram import RamDisk
from storvsp.scsi import Command, DataDirection, DiskUnit
from storvsp.scsi.modes import CONTROL

SECTOR = 512


class Misses(RamDisk):
    """Nothing is ever at hand."""

    def try_readv(self, offset, buffers):
        return False

    def try_writev(self, offset, buffers, *, fua=False):
        return False

    async def readv(self, offset, buffers):
        assert RamDisk.try_readv(self, offset, buffers)

    async def writev(self, offset, buffers, *, fua=False):
        assert RamDisk.try_writev(self, offset, buffers)


@pytest.fixture
async def unit():
    made = DiskUnit(Misses(1 << 20), luns=lambda: [0])
    for _ in range(3):
        ready = Command(bytes(6), [], 0, DataDirection.NONE, "A")
        made.try_execute(ready)
    return made


def make(opcode: int, lba: int = 0, data: bytes = b"x" * SECTOR) -> Command:
    cdb = struct.pack(">BBIBHB", opcode, 0, lba, 0, 1, 0)
    direction = DataDirection.WRITE if opcode == 0x2A else DataDirection.READ
    return Command(cdb, [memoryview(bytearray(data))], SECTOR, direction, "A")


async def held_up(unit: DiskUnit, command: Command, change) -> int:
    """Have a command wait for its turn, change something, and return its status."""
    statuses: list[int] = []

    async def execute():
        statuses.append((await unit.execute(command)).status)

    assert unit.try_execute(command) is None
    assert command.plan is not None
    async with trio.open_nursery() as nursery:
        await unit.gate.acquire(exclusive=True)
        nursery.start_soon(execute)
        await trio.testing.wait_all_tasks_blocked()
        assert statuses == []
        change()
        unit.gate.release(exclusive=True)
    return statuses[0]


async def test_what_missed_goes_on_from_where_it_was(unit):
    write, read = make(0x2A, 3), make(0x28, 3, bytes(SECTOR))
    for command in (write, read):
        assert unit.try_execute(command) is None
        assert command.plan == (3, 1, False)
        assert (await unit.execute(command)).transferred == SECTOR
    assert bytes(read.data[0]) == b"x" * SECTOR


async def test_write_protection_that_came_while_it_waited_counts(unit):
    def protect():
        unit.modes.store(CONTROL, 4, 0x08)
        unit.refresh()

    assert await held_up(unit, make(0x2A), protect) == 0x02
    assert await held_up(unit, make(0x28), lambda: None) == 0


async def test_a_medium_that_left_while_it_waited_is_missed(unit):
    def eject():
        unit.tray.open = True
        unit.refresh()

    assert await held_up(unit, make(0x28), eject) == 0x02


async def test_an_end_that_moved_while_it_waited_is_noticed(unit):
    def shrink():
        unit.blocks = 4

    assert await held_up(unit, make(0x28, 5), shrink) == 0x02


async def test_a_reservation_that_came_first_is_a_conflict(unit):
    command = make(0x2A)
    assert unit.try_execute(command) is None
    unit.reservations.reserve("B")
    unit.refresh()
    assert (await unit.execute(command)).status == 0x18

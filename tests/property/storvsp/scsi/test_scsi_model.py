"""Commands of all kinds from several guests, beside each other, against arrays of bytes.

Meanwhile guests are paused and go on, commands are aborted, units are reset, and the back-end finds
no room and stops. Each guest has sectors of its own, of which it knows what they hold; an aborted
command may have been done in part, but to whole sectors. Two sectors are everybody's: a counter,
which COMPARE AND WRITE counts up, and flags, which ORWRITE sets.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from storvsp.disk import Buffers, Disk, NoSpaceError
from storvsp.disks.overlay import OverlayDisk, open_scratch
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.scsi import DiskUnit, LogicalUnit
from storvsp.scsi.pace import keep_pace
from storvsp.scsi.unit import TASK_ABORTED, Outcome
from tests.support.patience import WHOLE_TEST
from tests.support.scsi import make_command
from tests.support.shared import kept, visitor
from vmbus.host.undertakings import Undertakings

SECTOR = 512
GUESTS = 4
OWN = 150
"""Sectors of each guest; no multiple of what any back-end keeps together."""
COUNTER = GUESTS * OWN
FLAGS = COUNTER + 1
SECTORS = COUNTER + 8
STEPS = 120
BACK_ENDS = ("ram", "raw", "direct", "overlay on ram", "overlay on file")


class Fickle(DiskWrapper):
    """Has data at hand or not, and room or not, as luck will have it."""

    def __init__(self, base: Disk, luck: random.Random, *, tight: bool) -> None:
        super().__init__(base)
        self._luck = luck
        self._tight = tight

    def _room(self) -> None:
        if self._tight and self._luck.random() < 0.05:
            raise NoSpaceError("out of luck")

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return self._luck.random() < 0.5 and self.base.try_readv(offset, buffers)

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        if self._luck.random() < 0.5:
            return False
        self._room()
        return self.base.try_writev(offset, buffers, fua=fua)

    async def _dawdle(self) -> None:
        for _ in range(self._luck.randrange(3)):
            await trio.lowlevel.checkpoint()

    async def readv(self, offset: int, buffers: Buffers) -> None:
        await self._dawdle()
        await self.base.readv(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        await self._dawdle()
        self._room()
        await self.base.writev(offset, buffers, fua=fua)

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        await self._dawdle()
        self._room()
        await self.base.unmap_many(ranges)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        await self._dawdle()
        self._room()
        await self.base.write_zeroes(offset, length, may_unmap=may_unmap)


def ten(opcode: int, flags: int, lba: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", opcode, flags, lba, 0, count, 0)


def sixteen(opcode: int, flags: int, lba: int, count: int) -> bytes:
    return struct.pack(">BBQIBB", opcode, flags, lba, count, 0, 0)


def compare_and_write(lba: int, old: bytes, new: bytes) -> tuple[bytes, bytes]:
    return struct.pack(">BBQ3xBBB", 0x89, 0, lba, len(old) // SECTOR, 0, 0), old + new


class Guest:
    """One guest, with one command at a time, and what it knows of the disk."""

    def __init__(self, number: int, unit: LogicalUnit, luck: random.Random) -> None:
        self.name = f"guest {number}"
        self.undertakings = Undertakings(lambda: None, lambda: None)
        self.counted = self.perhaps_counted = 0
        self.aborted = 0
        self._unit = unit
        self._luck = luck
        self._number = number
        self._first = number * OWN
        self._model = bytearray(OWN * SECTOR)
        self._flags = 0

    async def execute(self, cdb: bytes, out: bytes | None = None, room: int = 0) -> Outcome:
        """Execute a command, as the controller does it; again if the unit had news to tell."""
        while True:
            length = room if out is None else len(out)
            cuts = sorted(self._luck.randrange(length) for _ in range(3)) if length else []
            pieces = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
            command, self.buffer = make_command(
                cdb, out=out, room=room, pieces=pieces, initiator=self.name
            )
            outcome = None
            if self.undertakings._held is None:  # else its channel would not be read
                outcome = self._unit.try_execute(command)
            if outcome is None:
                undertaking = self.undertakings.begin(0, cdb.hex)
                keep_pace(undertaking)
                if self._unit.paced:
                    outcome = await self._unit.execute(command)
                else:
                    await undertaking.enter()
                    outcome = await self._unit.execute(command)
                    undertaking.leave()
                undertaking.end()
            if outcome.status == 2 and outcome.sense[2] & 15 == 6:
                continue
            assert outcome.status == 0 or outcome == TASK_ABORTED or outcome.sense[2] & 15 == 14, (
                cdb.hex(),
                outcome,
            )
            return outcome

    async def read(self, lba: int, count: int) -> bytes:
        while True:
            cdb = (ten if self._luck.random() < 0.5 else sixteen)(
                *self._luck.choice([(0x28, 0), (0x28, 8)]), lba, count
            )
            if len(cdb) == 16:
                cdb = bytes([0x88]) + cdb[1:]
            if not (await self.execute(cdb, room=count * SECTOR)).status:
                return bytes(self.buffer)

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
            if self._luck.random() < 0.2:
                await self._share()
            else:
                await self._act()
        assert await self.read(self._first, OWN) == self._model

    async def _act(self) -> None:
        luck = self._luck
        at = luck.randrange(OWN)
        count = min(luck.choice([1, 2, 7, 40, OWN]), OWN - at)
        lba, here = self._first + at, slice(at * SECTOR, (at + count) * SECTOR)
        old = bytes(self._model[here])
        fresh = luck.randbytes(count * SECTOR)
        new = old
        out: bytes | None
        kind = luck.randrange(13)
        match kind:
            case 0 | 1:
                assert await self.read(lba, count) == old
                return
            case 2 | 3:
                new = fresh
                make = luck.choice([ten, sixteen])
                opcode = 0x2A if make is ten else 0x8A
                cdb, out = make(opcode, luck.choice([0, 8]), lba, count), new
            case 4:
                new = fresh
                cdb, out = ten(0x2E, luck.choice([0, 2]), lba, count), new
            case 5:
                new = bytes(a | b for a, b in zip(old, fresh, strict=True))
                cdb, out = sixteen(0x8B, 0, lba, count), fresh
            case 6:
                size = min(count, 8) * SECTOR
                right = luck.random() < 0.7
                first = old[:size] if right else bytes([old[0] ^ 1]) + old[1:size]
                cdb, out = compare_and_write(lba, first, fresh[:size])
                outcome = await self.execute(cdb, out)
                if outcome.status == 2:
                    assert not right
                    return
                assert right or outcome == TASK_ABORTED
                await self._learn(outcome, here, old, fresh[:size] + old[size:] if right else old)
                return
            case 7:
                block = luck.choice([bytes(SECTOR), fresh[:SECTOR]])
                new = block * count
                thin = 8 if luck.random() < 0.5 else 0
                cdb, out = sixteen(0x93, thin, lba, count), block
            case 8:
                half = max(count // 3, 1)
                ranges = [(lba, half), (lba + count - half, half)]
                luck.shuffle(ranges)
                new = bytes(half * SECTOR) + old[half * SECTOR :]
                new = new[: len(new) - half * SECTOR] + bytes(half * SECTOR)
                body = b"".join(struct.pack(">QI4x", *each) for each in ranges)
                out = struct.pack(">HH4x", len(body) + 6, len(body)) + body
                cdb = struct.pack(">BB4xBHB", 0x42, 0, 0, len(out), 0)
            case 9:
                cdb, out = ten(0x2F, 2, lba, count), old
            case 10:
                cdb, out = ten(0x35, 0, 0, 0), None
            case 11:
                cdb, out = ten(0x2F, 2, lba, count), bytes([old[0] ^ 1]) + old[1:]
                outcome = await self.execute(cdb, out)
                assert outcome.status == 2 or outcome == TASK_ABORTED
                return
            case _:
                await self._look(lba)
                return
        await self._learn(await self.execute(cdb, out), here, old, new)

    async def _learn(self, outcome: Outcome, here: slice, old: bytes, new: bytes) -> None:
        """Take over what a command has done; one that was aborted may have been done in part."""
        if not outcome.status:
            self._model[here] = new
            return
        assert outcome == TASK_ABORTED, "what was read is not what was written"
        self.aborted += 1
        found = await self.read(self._first + here.start // SECTOR, len(old) // SECTOR)
        for at in range(0, len(old), SECTOR):
            part = slice(at, at + SECTOR)
            assert found[part] in (old[part], new[part]), "a torn sector"
        self._model[here] = found

    async def _look(self, lba: int) -> None:
        outcome = await self.execute(struct.pack(">BBQIBB", 0x9E, 0x12, lba, 4096, 0, 0), room=4096)
        if outcome.status:
            return
        (size,) = struct.unpack_from(">I", self.buffer)
        for at in range(8, 4 + size, 16):
            first, blocks, state = struct.unpack_from(">QIB", self.buffer, at)
            if state:
                start, end = (max(0, min(OWN, x - self._first)) for x in (first, first + blocks))
                assert not any(self._model[start * SECTOR : end * SECTOR])

    async def _share(self) -> None:
        if self._luck.random() < 0.5:
            old = await self.read(COUNTER, 1)
            new = (int.from_bytes(old, "little") + 1).to_bytes(SECTOR, "little")
            outcome = await self.execute(*compare_and_write(COUNTER, old, new))
            self.counted += not outcome.status
            self.perhaps_counted += outcome == TASK_ABORTED
        else:
            flag = 1 << self._luck.randrange(64) + 64 * self._number
            both = (flag.to_bytes(SECTOR, "little")) * 2
            if not (await self.execute(sixteen(0x8B, 0, FLAGS, 2), both)).status:
                self._flags |= flag
            for _ in range(2):
                found = await self.read(FLAGS + self._luck.randrange(2), 1)
                assert int.from_bytes(found, "little") & self._flags == self._flags, (
                    "a flag is lost"
                )


async def disturb(guests: Sequence[Guest], units: Sequence[LogicalUnit], luck) -> None:
    """Pause guests, abort commands, and have a disk that has stopped go on; for ever."""
    while True:
        for _ in range(luck.randrange(20)):
            await trio.lowlevel.checkpoint()
        index = luck.randrange(len(guests))
        guest, unit = guests[index], units[index % len(units)]
        chance = luck.random()
        if chance < 0.5:
            guest.undertakings.hold()
            while guest.undertakings.names:
                if isinstance(unit, DiskUnit):
                    unit.disk.go_on()
                await trio.lowlevel.checkpoint()
            for _ in range(luck.randrange(30)):
                await trio.lowlevel.checkpoint()
                assert not guest.undertakings.names, "it acts while its guest is paused"
            guest.undertakings.go_on()
        elif chance < 0.6 and isinstance(unit, DiskUnit):
            unit.abort(guest.name)
        elif chance < 0.65:
            unit.reset()
            await unit.ended()
        if isinstance(unit, DiskUnit) and luck.random() < 0.5:
            unit.disk.go_on()


@contextlib.asynccontextmanager
async def opened(kind: str, directory: Path) -> AsyncIterator[Disk]:
    base = directory / "base.img"
    base.write_bytes(bytes(SECTORS * SECTOR))
    disk: Disk
    if kind == "ram":
        disk = RamDisk(SECTORS * SECTOR)
    elif kind in ("raw", "direct"):
        disk = await RawDisk.open(base, direct=kind == "direct")
    else:
        below = await RawDisk.open(base, read_only=True)
        scratch = await open_scratch(str(directory), below.info) if "file" in kind else None
        disk = OverlayDisk(below, scratch)
    try:
        yield disk
    finally:
        await disk.aclose()


async def play(guests: list[Guest], units: Sequence[LogicalUnit], luck, steps: int) -> None:
    """Have all guests do their steps, then look at what they have in common."""
    with trio.fail_after(WHOLE_TEST):
        async with trio.open_nursery() as disturbed:
            disturbed.start_soon(disturb, guests, units, luck)
            async with trio.open_nursery() as nursery:
                for guest in guests:
                    nursery.start_soon(guest.run, steps)
            disturbed.cancel_scope.cancel()
        for guest in guests:
            guest.undertakings.go_on()
        if isinstance(units[0], DiskUnit):
            units[0].disk.stops = False
            units[0].disk.go_on()
        counter = int.from_bytes(await guests[0].read(COUNTER, 1), "little")
        counted = sum(each.counted for each in guests)
        assert counted <= counter <= counted + sum(each.perhaps_counted for each in guests)


async def alone(kind: str, directory: Path, seed: int, steps: int = STEPS) -> list[Guest]:
    """All guests at one unit of this process."""
    luck = random.Random(seed)
    async with opened(kind, directory) as disk:
        unit = DiskUnit(Fickle(disk, luck, tight=True), luns=lambda: [0])
        unit.limit, unit.chunk = 16 * SECTOR, 8 * SECTOR  # so that all takes several steps
        unit.disk.stops = True
        guests = [Guest(number, unit, random.Random(seed + number)) for number in range(GUESTS)]
        await play(guests, [unit], luck, steps)
        unit.close()
        return guests


async def shared(kind: str, directory: Path, seed: int, steps: int = STEPS) -> list[Guest]:
    """Guests with units at the other ends of lines."""
    luck = random.Random(seed)
    async with opened(kind, directory) as disk, contextlib.AsyncExitStack() as stack:
        keeper = await stack.enter_async_context(kept(Fickle(disk, luck, tight=False)))
        unit = keeper.keeper.unit
        assert isinstance(unit, DiskUnit)
        unit.limit, unit.chunk = 16 * SECTOR, 8 * SECTOR
        units = [
            await stack.enter_async_context(visitor(keeper, f"guest {number}"))
            for number in range(GUESTS)
        ]
        guests = [
            Guest(number, each, random.Random(seed + number)) for number, each in enumerate(units)
        ]
        await play(guests, units, luck, steps)
        return guests


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", BACK_ENDS)
@pytest.mark.parametrize("where", [alone, shared])
async def test_a_unit_behaves_like_an_array_of_sectors(where, kind, seed, tmp_path):
    guests = await where(kind, tmp_path, seed)
    assert all(guest.counted for guest in guests)
    assert sum(guest.aborted for guest in guests)

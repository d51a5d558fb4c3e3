"""The longest turn: how long everybody else waits while the loop does what one guest has asked for.

Each line is something that a hostile guest can do. Whatever its length, the loop must come round
again: figures are milliseconds between two looks at I/O, the worst of the whole.
"""

from __future__ import annotations

import gc
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disk import Disk
from storvsp.disks.delay import DelayDisk
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import open_disk
from storvsp.scsi import DiskUnit
from storvsp.scsi.unit import Command, DataDirection
from storvsp.wire import DATA_IN, DATA_NONE, build_srb
from tests.bench.bench_storvsp import _handshake
from tests.bench.harness import Figure
from tests.support.turns import Turns, watched
from vmbus.testing import GuestEnd, channel_pair
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND, build_packet

CHANNELS = 16
MIB = 1 << 20
TARGET = 20.0


def figures() -> list[Figure]:
    """Measure."""
    found = []
    for name, run in CASES.items():
        turns = Turns()
        trio.run(_measure, run, turns)
        found.append(Figure(name, turns.longest_turn * 1000, "ms", target=TARGET))
    return found


async def _measure(run: Callable[[Turns], Awaitable[None]], turns: Turns) -> None:
    await run(turns)


# -- packets on sixteen channels -------------------------------------------------------------------


async def _flood(turns: Turns, packets: Callable[[GuestEnd], list[bytes]], pages: int) -> None:
    """Fill the rings of many channels with packets, and serve them."""
    async with trio.open_nursery() as nursery:
        ends = []
        for _ in range(CHANNELS):
            controller = ScsiController()
            controller.add_disk(RamDisk(64 * MIB))
            channel, guest = channel_pair(ring_pages=pages, data_pages=1100)
            nursery.start_soon(controller.run, channel)
            await _handshake(guest)
            ends.append((channel, guest, packets(guest)))
        with watched(turns):
            sent = [(guest, guest.send(*packets)) for _, guest, packets in ends]
            for guest, count in sent:
                left = count
                while left:
                    left -= len(guest.receive_nowait())
                    await trio.lowlevel.checkpoint()
        for channel, *_ in ends:
            channel.end()


def _packet(cdb: bytes, pfns: list[int]) -> bytes:
    size = len(pfns) * 4096
    return build_packet(
        GPA_DIRECT if size else IN_BAND,
        build_srb(cdb, data_in=DATA_IN if size else DATA_NONE, transfer_length=size),
        transaction_id=1,
        flags=FLAG_COMPLETION_REQUESTED,
        header=struct.pack("<II", 0, 1) + build_range(size, 0, pfns) if size else b"",
    )


def _scattered(guest: GuestEnd, count: int) -> list[int]:
    return [guest.free_pfn + 2 * (index % 512) for index in range(count)]


async def page_lists(turns: Turns) -> None:
    """65 000 pages for a command that wants none."""
    await _flood(turns, lambda guest: [_packet(bytes(6), _scattered(guest, 65_000))], 270)


async def longest_reads(turns: Turns) -> None:
    """2 MiB, every page by itself."""
    cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 4096, 0)
    await _flood(turns, lambda guest: [_packet(cdb, _scattered(guest, 512))] * 64, 129)


async def short_reads(turns: Turns) -> None:
    """4 KiB each, as many as a batch has."""
    cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0)
    await _flood(turns, lambda guest: [_packet(cdb, [guest.free_pfn])] * 256, 129)


async def _same(turns: Turns, cdb: str) -> None:
    packet = bytes.fromhex(cdb)
    await _flood(turns, lambda guest: [_packet(packet, [guest.free_pfn])] * 256, 129)


async def supported_opcodes(turns: Turns) -> None:
    """REPORT SUPPORTED OPERATION CODES."""
    await _same(turns, "a3 0c 80 00 0000 00001000 00 00")


async def vital_pages(turns: Turns) -> None:
    """INQUIRY, page 83."""
    await _same(turns, "12 01 83 1000 00")


async def verifies(turns: Turns) -> None:
    """Commands that wait."""
    cdb = bytes.fromhex("2f 00 00000000 00 0000 00")
    await _flood(turns, lambda guest: [_packet(cdb, [])] * 256, 129)


# -- single commands -------------------------------------------------------------------------------


async def _command(
    turns: Turns,
    disk: Disk,
    cdb: bytes,
    *,
    out: bytes | None = None,
    room: int = 0,
    pieces: int = 1,
    count: int = 1,
) -> None:
    gc.collect()
    gc.freeze()  # what is measured is not that a shredded disk is looked at for garbage
    unit = DiskUnit(disk, luns=lambda: [0])
    buffer = memoryview(bytearray(room) if out is None else bytearray(out))
    size = len(buffer) // pieces
    data = [buffer[at : at + size] for at in range(0, len(buffer), size)] if buffer else []
    direction = DataDirection.READ if out is None else DataDirection.WRITE
    with watched(turns):
        async with trio.open_nursery() as nursery:
            for index in range(count):
                if index % 8 == 0:  # as they come out of a ring
                    await trio.lowlevel.checkpoint()
                command = Command(cdb, data, len(buffer), direction, "guest")
                outcome = unit.try_execute(command)
                if outcome is None:
                    nursery.start_soon(unit.execute, command)
    await disk.aclose()
    gc.unfreeze()


async def _fill(disk: Disk, size: int) -> None:
    piece = memoryview(bytes(MIB))
    for at in range(0, size, MIB):
        disk.try_writev(at, [piece])


@asynccontextmanager
async def _raw(size: int, data: int) -> AsyncIterator[Disk]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "disk.img")
        with open(path, "wb") as file:
            file.writelines(bytes(MIB) for _ in range(data // MIB))
            file.truncate(size)
        yield await open_disk(f"raw:{path}")


def _shredded_overlay(size: int) -> OverlayDisk:
    disk = OverlayDisk(RamDisk(size))
    sector = [memoryview(bytes(512))]
    for at in range(0, size, 1024):
        disk.try_writev(at, sector)
    return disk


GET_LBA_STATUS = struct.pack(">BBQIBB", 0x9E, 0x12, 0, 4 << 20, 0, 0)
UNMAP_ONE = bytes.fromhex("42 000000000000 0018 00")
READ_8_MIB = struct.pack(">BBQIBB", 0x88, 0, 0, 16384, 0, 0)


async def status_of_overlay(turns: Turns) -> None:
    """GET LBA STATUS of 64 MiB, every second sector written."""
    await _command(turns, _shredded_overlay(64 * MIB), GET_LBA_STATUS, room=3 * MIB, count=16)


async def status_of_raw(turns: Turns) -> None:
    """GET LBA STATUS of 64 MiB, every second page a hole."""
    async with _raw(64 * MIB, 0) as disk:
        for at in range(0, 64 * MIB, 8192):
            disk.try_writev(at, [memoryview(bytes(4096))])
        await _command(turns, disk, GET_LBA_STATUS, room=MIB, count=16)


async def status_of_ram(turns: Turns) -> None:
    """GET LBA STATUS of 64 MiB, every second chunk written."""
    disk = RamDisk(64 * MIB)
    for at in range(0, 64 * MIB, 1 << 17):
        disk.try_writev(at, [memoryview(bytes(512))])
    await _command(turns, disk, GET_LBA_STATUS, room=MIB, count=256)


async def read_of_overlay(turns: Turns) -> None:
    """READ of 8 MiB, every second sector written, into 2048 pieces."""
    disk = _shredded_overlay(64 * MIB)
    await _command(turns, disk, READ_8_MIB, room=8 * MIB, pieces=2048, count=4)


async def masks_of_overlay(turns: Turns) -> None:
    """UNMAP of 16 GiB, a mask for every cluster."""
    disk = OverlayDisk(RamDisk(16384 * MIB))
    for at in range(0, 16384 * MIB, 1 << 16):
        disk._mark(at, 512)
    parameters = struct.pack(">HH4xQI4x", 22, 16, 0, 1 << 25)
    await _command(turns, disk, UNMAP_ONE, out=parameters)


async def writes_among_masks(turns: Turns) -> None:
    """WRITEs of 256 KiB, a million masks elsewhere."""
    disk = OverlayDisk(RamDisk(65536 * MIB))
    for at in range(1 << 30, 65536 * MIB, 1 << 16):
        disk._mark(at, 512)
    cdb = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 512, 0)
    await _command(turns, disk, cdb, out=bytes(1 << 18), count=8)


async def unmaps_of_ram(turns: Turns) -> None:
    """UNMAP of 1 GiB of a RAM disk."""
    disk = RamDisk(1024 * MIB)
    await _fill(disk, 1024 * MIB)
    parameters = struct.pack(">HH4xQI4x", 22, 16, 0, 1 << 21)
    await _command(turns, disk, UNMAP_ONE, out=parameters)


async def format_of_ram(turns: Turns) -> None:
    """FORMAT UNIT of 1 GiB of a RAM disk."""
    disk = RamDisk(1024 * MIB)
    await _fill(disk, 1024 * MIB)
    await _command(turns, disk, bytes.fromhex("04 0000000000"))


async def unmap_lists(turns: Turns) -> None:
    """128 UNMAPs of 256 single sectors each, raw file."""
    async with _raw(64 * MIB, 64 * MIB) as disk:
        ranges = b"".join(struct.pack(">QI4x", 2 * at, 1) for at in range(256))
        parameters = struct.pack(">HH4x", len(ranges) + 6, len(ranges)) + ranges
        cdb = struct.pack(">BBIBHB", 0x42, 0, 0, 0, len(parameters), 0)
        await _command(turns, disk, cdb, out=parameters, count=128)


async def reset(turns: Turns) -> None:
    """A reset while 2000 commands wait."""
    unit = DiskUnit(DelayDisk(RamDisk(MIB), read=1000), luns=lambda: [0])
    cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0)
    async with trio.open_nursery() as nursery:
        for _ in range(2000):
            data = [memoryview(bytearray(512))]
            command = Command(cdb, data, 512, DataDirection.READ, "guest")
            assert unit.try_execute(command) is None
            nursery.start_soon(unit.execute, command)
        await trio.testing.wait_all_tasks_blocked()
        with watched(turns):
            unit.reset()
            await unit.ended()


CASES: dict[str, Callable[[Turns], Awaitable[None]]] = {
    "16 channels: lists of 65 000 pages": page_lists,
    "16 channels: scattered reads of 2 MiB": longest_reads,
    "16 channels: reads of 4 KiB": short_reads,
    "16 channels: REPORT SUPPORTED OPERATION CODES": supported_opcodes,
    "16 channels: INQUIRY": vital_pages,
    "16 channels: commands that wait": verifies,
    "16 x GET LBA STATUS, shredded overlay": status_of_overlay,
    "16 x GET LBA STATUS, shredded raw file": status_of_raw,
    "256 x GET LBA STATUS, shredded RAM disk": status_of_ram,
    "4 x READ of 8 MiB, shredded overlay": read_of_overlay,
    "UNMAP of 16 GiB, shredded overlay": masks_of_overlay,
    "WRITEs of 256 KiB, shredded overlay": writes_among_masks,
    "UNMAP of 1 GiB, RAM disk": unmaps_of_ram,
    "FORMAT UNIT of 1 GiB, RAM disk": format_of_ram,
    "128 UNMAPs of 256 sectors, raw file": unmap_lists,
    "reset of 2000 commands that wait": reset,
}

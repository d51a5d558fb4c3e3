"""An in-memory disk and a driver for the tests of the SCSI layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import trio

from storvsp.disk import Buffers, Disk, DiskInfo, Extent, OutOfRangeError, ReadOnlyError
from storvsp.scsi import DiskUnit
from storvsp.scsi.unit import Command, DataDirection, LogicalUnit, Outcome


class MemoryDisk(Disk):
    """A disk in a bytearray.

    Attributes:
        inline: The fast forms do the work; otherwise they decline and the slow forms wait once.
        prompt: Slow forms do not wait at all, as those of a disk in memory.
        pause: If set, slow forms wait for it before they touch the data.
        fail: If set, every transfer and flush raises it.
        calls: Names of the calls made, with what distinguishes them.
    """

    def __init__(self, blocks: int = 128, **changes: Any) -> None:
        sector = changes.get("sector_size", 512)
        self._info = DiskInfo(size=blocks * sector, **changes)
        self.data = bytearray(blocks * sector)
        self.inline = True
        self.prompt = False
        self.pause: trio.Event | None = None
        self.fail: BaseException | None = None
        self.calls: list[str] = []
        self.holes: list[tuple[int, int]] = []
        self.watchers: list[Callable[[], None]] = []
        self.closed = False

    @property
    def info(self) -> DiskInfo:
        return self._info

    def resize(self, blocks: int) -> None:
        size = blocks * self._info.sector_size
        self._info = dataclasses.replace(self._info, size=size)
        self.data = self.data[:size].ljust(size, b"\0")
        for watcher in list(self.watchers):
            watcher()

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        self.watchers.append(changed)
        return lambda: self.watchers.remove(changed) if changed in self.watchers else None

    def _check(self, offset: int, buffers: Buffers) -> int:
        if self.fail is not None:
            raise self.fail
        size = sum(map(len, buffers))
        assert offset % self._info.sector_size == 0
        assert size % self._info.sector_size == 0
        assert not self._info.max_transfer or size <= self._info.max_transfer
        if offset + size > len(self.data):
            raise OutOfRangeError("outside", offset=offset)
        return size

    def _read(self, offset: int, buffers: Buffers) -> None:
        self._check(offset, buffers)
        self.calls.append("read")
        for view in buffers:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def _write(self, offset: int, buffers: Buffers, fua: bool) -> None:
        if self._info.read_only:
            raise ReadOnlyError("read-only")
        self._check(offset, buffers)
        self.calls.append("write fua" if fua else "write")
        for view in buffers:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    async def _wait(self) -> None:
        if self.pause is not None:
            await self.pause.wait()
        elif not self.prompt:
            await trio.lowlevel.checkpoint()

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        if self.inline:
            self._read(offset, buffers)
        return self.inline

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        if self.inline:
            self._write(offset, buffers, fua)
        return self.inline

    async def readv(self, offset: int, buffers: Buffers) -> None:
        await self._wait()
        self._read(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        await self._wait()
        self._write(offset, buffers, fua)

    async def flush(self) -> None:
        await self._wait()
        if self.fail is not None:
            raise self.fail
        self.calls.append("flush")

    async def unmap(self, offset: int, length: int) -> None:
        await self._wait()
        self.calls.append(f"unmap {offset}+{length}")
        self.data[offset : offset + length] = bytes(length)
        self.holes.append((offset, length))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        self.calls.append("zeroes may_unmap" if may_unmap else "zeroes")
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        await self._wait()
        sector = self._info.sector_size
        found: list[Extent] = []
        for at in range(offset, offset + length, sector):
            hole = any(start <= at < start + size for start, size in self.holes)
            found.append(Extent(at, sector, mapped=not hole))
        return found

    async def aclose(self) -> None:
        self.closed = True


@dataclasses.dataclass
class Reply:
    """An outcome together with what is in the guest's buffer now."""

    status: int
    sense: bytes
    transferred: int
    buffer: bytes

    @property
    def data(self) -> bytes:
        return self.buffer[: self.transferred]

    @property
    def fault(self) -> tuple[int, int]:
        """Sense key and ASC/ASCQ."""
        assert self.status == 2
        return self.sense[2] & 0x0F, self.sense[12] << 8 | self.sense[13]

    @property
    def pointer(self) -> tuple[int, int | None, bool]:
        """Byte and bit of the refused field, and whether it is in the CDB."""
        flags = self.sense[15]
        assert flags & 0x80
        bit = flags & 7 if flags & 8 else None
        return self.sense[16] << 8 | self.sense[17], bit, bool(flags & 0x40)

    @property
    def information(self) -> int | None:
        return int.from_bytes(self.sense[3:7], "big") if self.sense[0] & 0x80 else None


def make_command(
    cdb: str | bytes,
    *,
    out: bytes | None = None,
    room: int = 0,
    pieces: Sequence[int] = (),
    initiator: Any = "guest",
) -> tuple[Command, bytearray]:
    """Build a command with ``out`` to write or ``room`` bytes to read into, cut into pieces."""
    raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
    buffer = bytearray(room) if out is None else bytearray(out)
    direction = DataDirection.READ if out is None else DataDirection.WRITE
    if out is None and not room:
        direction = DataDirection.NONE
    view = memoryview(buffer)
    data: list[memoryview] = []
    for size in pieces:
        data.append(view[:size])
        view = view[size:]
    if len(view):
        data.append(view)
    return Command(raw, data, len(buffer), direction, initiator), buffer


async def finish(unit: LogicalUnit, command: Command) -> Outcome:
    """Run a command as a controller does."""
    outcome = unit.try_execute(command)
    return await unit.execute(command) if outcome is None else outcome


async def run(unit: LogicalUnit, cdb: str | bytes, **keywords: Any) -> Reply:
    """Build and run a command."""
    command, buffer = make_command(cdb, **keywords)
    outcome = await finish(unit, command)
    assert len(outcome.sense) <= 20
    assert bool(outcome.sense) == (outcome.status == 2)
    assert 0 <= outcome.transferred <= command.length
    return Reply(*outcome, bytes(buffer))


IDENTITY = bytes(range(16))


def make_unit(luns: Sequence[int] = (0,), **changes: Any) -> tuple[MemoryDisk, DiskUnit]:
    disk = MemoryDisk(**changes)
    return disk, DiskUnit(disk, luns=lambda: luns, identity=IDENTITY)


def hexes(text: str) -> bytes:
    return bytes.fromhex(text)

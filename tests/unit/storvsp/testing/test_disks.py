"""The conformance suite notices each way of breaking the contract."""

import dataclasses
from typing import Any, ClassVar

import pytest
import trio

from storvsp.disk import Disk, DiskInfo, Extent, ReadOnlyError
from storvsp.disks.ram import RamDisk
from storvsp.testing import check_disk
from vmbus.errors import ConfigError
from vmbus.memory import total_length, window
from vmbus.testing.scatter import GuestPages, shapes

SIZE = 1 << 20


class BadInfo(RamDisk):
    changes: ClassVar[dict[str, Any]] = {}

    @property
    def info(self):
        return dataclasses.replace(super().info, **self.changes)


def bad_info(**changes):
    return type("BadInfo", (BadInfo,), {"changes": changes})


class RestlessInfo(RamDisk):
    @property
    def info(self):
        self._info = dataclasses.replace(self._info, serial=self._info.serial + "x")
        return self._info


class ForgetsTheLastBuffer(RamDisk):
    async def readv(self, offset, buffers):
        self.try_readv(offset, list(buffers)[:-1] if len(buffers) > 1 else buffers)


class WritesBesideItsBuffers(RamDisk):
    async def readv(self, offset, buffers):
        self.try_readv(offset, buffers)
        for buffer in buffers:
            buffer.obj[-1] ^= 1


class FastReadsBesideItsBuffers(RamDisk):
    def try_readv(self, offset, buffers):
        for buffer in buffers:
            buffer.obj[-1] = 0
        return super().try_readv(offset, buffers)

    async def readv(self, offset, buffers):
        super().try_readv(offset, buffers)


class DependsOnTheShape(RamDisk):
    async def readv(self, offset, buffers):
        self.try_readv(offset, sorted(buffers, key=len))


class FastReadLies(RamDisk):
    def try_readv(self, offset, buffers):
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
        return True

    async def readv(self, offset, buffers):
        super().try_readv(offset, buffers)


class FastReadReturnsACount(RamDisk):
    def try_readv(self, offset, buffers):
        super().try_readv(offset, buffers)
        return total_length(buffers)


class FastWriteReturnsNothing(RamDisk):
    def try_writev(self, offset, buffers, *, fua=False):
        super().try_writev(offset, buffers)


class LosesDurableWrites(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        if not fua:
            self.try_writev(offset, buffers)


class FastWriteWritesAndSaysNo(RamDisk):
    def try_writev(self, offset, buffers, *, fua=False):
        super().try_writev(offset, buffers)
        return False

    async def writev(self, offset, buffers, *, fua=False):
        super().try_writev(offset, buffers)


class WritesTheNextSector(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        self.try_writev(offset, buffers)
        end = offset + total_length(buffers)
        if end < self.info.size:
            self.try_writev(end, [memoryview(b"!" * 512)])


class ScribblesOnTheGuest(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        self.try_writev(offset, buffers)
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))


class ShortAtTheEnd(RamDisk):
    async def readv(self, offset, buffers):
        self._available(offset, buffers)
        self.try_readv(offset, window(buffers, 0, max(0, self.info.size - offset)))

    def _available(self, offset, buffers):
        if self._closed:
            self._refuse(offset, 0)


class ShortWriteAtTheEnd(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        if offset < self.info.size < offset + total_length(buffers):
            self.try_writev(offset, window(buffers, 0, self.info.size - offset))
        self.try_writev(offset, buffers)


class FastReadBeyondTheEnd(RamDisk):
    def try_readv(self, offset, buffers):
        return offset + total_length(buffers) > self._size or super().try_readv(offset, buffers)

    async def readv(self, offset, buffers):
        super().try_readv(offset, buffers)


class FastWriteBeyondTheEnd(RamDisk):
    def try_writev(self, offset, buffers, *, fua=False):
        return offset + total_length(buffers) > self._size or super().try_writev(offset, buffers)

    async def writev(self, offset, buffers, *, fua=False):
        super().try_writev(offset, buffers)


class ZeroesBeyondTheEnd(RamDisk):
    async def write_zeroes(self, offset, length, *, may_unmap=False):
        await self.unmap(offset, min(length, max(0, self.info.size - offset)))


class ReadOnly(RamDisk):
    """Breaks nothing: the others derive from it."""

    @property
    def info(self):
        return dataclasses.replace(
            super().info, read_only=True, supports_unmap=False, unmapped_reads_zero=False
        )

    def try_writev(self, offset, buffers, *, fua=False):
        return False

    async def writev(self, offset, buffers, *, fua=False):
        raise ReadOnlyError("read-only")

    async def unmap(self, offset, length):
        return

    async def write_zeroes(self, offset, length, *, may_unmap=False):
        raise ReadOnlyError("read-only")


class ReadOnlyInNameOnly(ReadOnly):
    async def writev(self, offset, buffers, *, fua=False):
        RamDisk.try_writev(self, offset, buffers)


class ReadOnlyButFast(ReadOnly):
    def try_writev(self, offset, buffers, *, fua=False):
        return offset == 0


class ReadOnlyButTrims(ReadOnly):
    def __init__(self, size):
        super().__init__(size)
        RamDisk.try_writev(self, 0, [memoryview(b"x" * 4096)])

    async def unmap(self, offset, length):
        if offset < self.info.size:
            await RamDisk.unmap(self, offset, length)


class ReadOnlyButZeroes(ReadOnly):
    async def write_zeroes(self, offset, length, *, may_unmap=False):
        if offset >= self.info.size:
            raise ReadOnlyError("read-only")


class ZeroesProperly(RamDisk):
    """Breaks nothing: its write_zeroes does not go through an overridden unmap."""

    async def write_zeroes(self, offset, length, *, may_unmap=False):
        await RamDisk.unmap(self, offset, length)


class TrimsTooMuch(ZeroesProperly):
    async def unmap(self, offset, length):
        await super().unmap(offset, min(length + 512, self.info.size - offset))


class TrimsNothing(ZeroesProperly):
    async def unmap(self, offset, length):
        return


class ZeroesNothing(RamDisk):
    async def write_zeroes(self, offset, length, *, may_unmap=False):
        if offset >= self.info.size:
            self._refuse(offset, length)
        if not may_unmap:
            await self.unmap(offset, length)


class StaysTrimmed(ZeroesProperly):
    trimmed = (0, 0)

    def try_readv(self, offset, buffers):
        done = super().try_readv(offset, buffers)
        if self.trimmed == (offset, total_length(buffers)):
            for buffer in buffers:
                buffer[:] = bytes(len(buffer))
        return done

    async def unmap(self, offset, length):
        await super().unmap(offset, length)
        self.trimmed = (offset, length)


class ExtentsWithAGap(RamDisk):
    async def extents(self, offset, length):
        return [Extent(offset + 512, length, mapped=True)]


class ExtentsTooShort(RamDisk):
    async def extents(self, offset, length):
        return [Extent(offset, length - 512, mapped=True)] if length > 512 else []


class ExtentsDenyWrittenData(RamDisk):
    async def extents(self, offset, length):
        return [Extent(offset, length, mapped=False)]


class ExtentsDenyOldData(RamDisk):
    asked = 0

    async def extents(self, offset, length):
        self.asked += 1
        return [Extent(offset, length, mapped=self.asked % 2 == 1)]


class MixesUpConcurrentRequests(RamDisk):
    latest = 0

    async def readv(self, offset, buffers):
        self.latest = offset
        await trio.lowlevel.checkpoint()
        self.try_readv(self.latest if total_length(buffers) == 512 else offset, buffers)


class LosesConcurrentWrites(RamDisk):
    busy = False

    async def writev(self, offset, buffers, *, fua=False):
        if offset + total_length(buffers) > self._size:
            self._refuse(offset, total_length(buffers))
        if self.busy:
            return
        self.busy = True
        try:
            await trio.lowlevel.checkpoint()
            self.try_writev(offset, buffers)
        finally:
            self.busy = False


class TearsSectors(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        if offset + total_length(buffers) > self._size:
            self._refuse(offset, total_length(buffers))
        data = b"".join(buffers)
        self.writers = getattr(self, "writers", 0) + 1
        try:
            if self.writers > 1 and len(data) > 512:
                await trio.lowlevel.checkpoint()
                part = len(data) // 4096 * 2048 + 256
                self.try_writev(offset, [memoryview(data[:part])])
            else:
                await trio.lowlevel.checkpoint()
                self.try_writev(offset, [memoryview(data)])
        finally:
            self.writers -= 1


class KeepsBuffersAfterCancellation(RamDisk):
    kept: Any = ()

    async def readv(self, offset, buffers):
        for buffer in self.kept:
            buffer[:] = bytes(len(buffer))
        self.kept = ()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.kept = buffers
            raise
        self.try_readv(offset, buffers)


class HalfWritesWhenCancelled(RamDisk):
    async def writev(self, offset, buffers, *, fua=False):
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.try_writev(offset, window(buffers, 0, 256))
            raise
        self.try_writev(offset, buffers)


class BreaksWhenCancelled(RamDisk):
    broken = False

    async def writev(self, offset, buffers, *, fua=False):
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.broken = True
            raise
        if not self.broken:
            self.try_writev(offset, buffers)
        elif offset + total_length(buffers) > self._size:
            self._refuse(offset, total_length(buffers))


class NeverCloses(RamDisk):
    async def aclose(self):
        return


class ServesWhenClosed(RamDisk):
    def try_readv(self, offset, buffers):
        return self._closed or super().try_readv(offset, buffers)

    async def readv(self, offset, buffers):
        super().try_readv(offset, buffers)


class AcceptsWhenClosed(RamDisk):
    def try_writev(self, offset, buffers, *, fua=False):
        return self._closed or super().try_writev(offset, buffers)

    async def writev(self, offset, buffers, *, fua=False):
        super().try_writev(offset, buffers)


class FlushesWhenClosed(RamDisk):
    async def flush(self):
        return


class TellsNobody(RamDisk):
    def watch(self, changed):
        return lambda: None


class TellsForEver(RamDisk):
    def watch(self, changed):
        super().watch(changed)
        return lambda: None


class TellsOnlyOfGrowth(RamDisk):
    async def resize(self, size):
        if size < self.info.size:
            self._watchers, kept = type(self._watchers)(), self._watchers
            await super().resize(size)
            self._watchers = kept
        else:
            await super().resize(size)


class ResizesNothing(RamDisk):
    async def resize(self, size):
        self._watchers.notify()


class ShowsOldDataAfterShrinking(RamDisk):
    async def resize(self, size):
        self._size = size
        self._info = dataclasses.replace(self._info, size=size)
        self._watchers.notify()


class GrowsWithoutStorage(RamDisk):
    async def resize(self, size):
        await super().resize(size)
        self.limit = size - 512

    def try_writev(self, offset, buffers, *, fua=False):
        if offset == getattr(self, "limit", -1):
            return True
        return super().try_writev(offset, buffers)


class StillReadsWhatWasCutOff(RamDisk):
    async def resize(self, size):
        grown = size > self._info.size
        await super().resize(size)
        if not grown:
            self._size = 2 * SIZE


@pytest.mark.parametrize(
    ("disk", "text"),
    [
        (bad_info(sector_size=520), "sector_size is 520"),
        (bad_info(size=1000), "not a positive multiple"),
        (bad_info(size=0), "not a positive multiple"),
        (bad_info(physical_sector_size=1536), "power-of-two"),
        (bad_info(physical_sector_size=256), "power-of-two"),
        (bad_info(unmap_granularity=100), "unmap_granularity"),
        (bad_info(supports_unmap=False), "without supports_unmap"),
        (bad_info(optical=True), "optical disk"),
        (bad_info(identity=b"x" * 17), "more than 16"),
        (bad_info(serial="é"), "printable ASCII"),
        (bad_info(serial="a\n"), "printable ASCII"),
        (bad_info(max_transfer=100), "max_transfer"),
        (RestlessInfo, "changes by itself"),
        (ForgetsTheLastBuffer, "left bytes unfilled"),
        (WritesBesideItsBuffers, "readv wrote beside"),
        (FastReadsBesideItsBuffers, "try_readv wrote beside"),
        (DependsOnTheShape, "depends on the shape"),
        (FastReadLies, "said True but delivered"),
        (FastReadReturnsACount, "try_readv returned no bool"),
        (FastWriteReturnsNothing, "try_writev returned no bool"),
        (LosesDurableWrites, r"writev\(fua=True\) of .* cannot be read back"),
        (FastWriteWritesAndSaysNo, "said False but wrote"),
        (WritesTheNextSector, "beside its range"),
        (ScribblesOnTheGuest, "changed the guest's memory"),
        (ShortAtTheEnd, "readv of .* did not raise OutOfRangeError"),
        (ShortWriteAtTheEnd, "changed the last sector"),
        (FastReadBeyondTheEnd, "try_readv of .* said True"),
        (FastWriteBeyondTheEnd, "try_writev of .* said True"),
        (ZeroesBeyondTheEnd, "write_zeroes of .* did not raise OutOfRangeError"),
        (ReadOnlyInNameOnly, "writev on a read-only disk did not raise"),
        (ReadOnlyButFast, "try_writev on a read-only disk said True"),
        (ReadOnlyButTrims, "a read-only disk was changed"),
        (ReadOnlyButZeroes, "write_zeroes on a read-only disk did not raise"),
        (TrimsTooMuch, "unmap of .* changed something beside"),
        (TrimsNothing, "unmap of .* does not read as zeros"),
        (ZeroesNothing, r"may_unmap=True\) of .* does not read as zeros"),
        (StaysTrimmed, "cannot be rewritten"),
        (ExtentsWithAGap, "a gap"),
        (ExtentsTooShort, "extents end at"),
        (ExtentsDenyWrittenData, "calls written sectors at 0 unmapped"),
        (ExtentsDenyOldData, "unmapped that hold data"),
        (MixesUpConcurrentRequests, "neither old nor new data"),
        (LosesConcurrentWrites, "requests in flight, the one at"),
        (TearsSectors, "tore a sector"),
        (KeepsBuffersAfterCancellation, "wrote into its buffers after it had returned"),
        (HalfWritesWhenCancelled, "neither old nor new"),
        (BreaksWhenCancelled, "cannot be used after a cancellation"),
        (NeverCloses, "readv after aclose did not raise"),
        (ServesWhenClosed, "try_readv after aclose said True"),
        (AcceptsWhenClosed, "try_writev after aclose said True"),
        (FlushesWhenClosed, "flush after aclose did not raise"),
        (TellsNobody, "not told to the watchers"),
        (TellsForEver, "called after its watch had ended"),
        (TellsOnlyOfGrowth, "shrinking was not told"),
        (ResizesNothing, "did not change info.size"),
        (ShowsOldDataAfterShrinking, "show old data"),
        (GrowsWithoutStorage, "new sectors do not work"),
        (StillReadsWhatWasCutOff, "cut off did not raise"),
    ],
)
async def test_a_broken_promise_is_named(disk, text):
    async def make() -> Disk:
        made: Disk = disk(SIZE)
        return made

    with pytest.RaisesGroup(
        pytest.RaisesExc(AssertionError, match=text), allow_unwrapped=True, flatten_subgroups=True
    ):
        await check_disk(make)


class Minimal(Disk):
    """Only what a disk must have; every optional method is the default."""

    def __init__(self, size):
        self.ram = RamDisk(size)

    @property
    def info(self):
        return DiskInfo(size=self.ram.info.size, max_transfer=1024, serial="M1")

    async def readv(self, offset, buffers):
        await self.ram.readv(offset, buffers)

    async def writev(self, offset, buffers, *, fua=False):
        await self.ram.writev(offset, buffers)

    async def flush(self):
        await self.ram.flush()

    async def aclose(self):
        await self.ram.aclose()


class FixedSize(RamDisk):
    async def resize(self, size):
        raise ConfigError("fixed")


@pytest.mark.parametrize("disk", [Minimal, ReadOnly, FixedSize])
async def test_a_disk_without_any_extras_keeps_the_contract(disk):
    async def make() -> Disk:
        made: Disk = disk(SIZE)
        return made

    await check_disk(make)


def test_guest_pages_notice_stray_writes():
    pages = GuestPages.holding(b"abcdef", [1, 0, 5])
    assert pages.contents() == b"abcdef"
    assert pages.guards_are_whole()
    buffer = pages.buffers[1]
    memory = buffer.obj
    assert isinstance(memory, bytearray)
    for position in (0, 16, len(memory) - 1):
        if memory[position] == 0xA5:
            memory[position] = 0
            assert not pages.guards_are_whole()
            memory[position] = 0xA5


@pytest.mark.parametrize("length", [512, 1024, 4096, 65536])
def test_shapes_cover_the_length(length):
    for lengths in shapes(length):
        assert sum(lengths) == length

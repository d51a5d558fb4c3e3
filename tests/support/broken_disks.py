"""Disks that break the contract, each in one way."""

import dataclasses
from typing import Any, ClassVar

import trio

from storvsp.disk import Extent, ReadOnlyError
from storvsp.disks.ram import RamDisk
from vmbus.memory import total_length, window

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
                # At once: if it came last, whole, nobody would see that the others were torn.
                self.try_writev(offset, [memoryview(data)])
                await trio.lowlevel.checkpoint()
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

"""The conformance suite notices each way of breaking the contract."""

import pytest

from storvsp.disk import Disk, DiskInfo
from storvsp.disks.ram import RamDisk
from storvsp.testing import check_disk
from tests.support.broken_disks import (
    SIZE,
    AcceptsWhenClosed,
    BreaksWhenCancelled,
    DependsOnTheShape,
    ExtentsDenyOldData,
    ExtentsDenyWrittenData,
    ExtentsTooShort,
    ExtentsWithAGap,
    FastReadBeyondTheEnd,
    FastReadLies,
    FastReadReturnsACount,
    FastReadsBesideItsBuffers,
    FastWriteBeyondTheEnd,
    FastWriteReturnsNothing,
    FastWriteWritesAndSaysNo,
    FlushesWhenClosed,
    ForgetsTheLastBuffer,
    GrowsWithoutStorage,
    HalfWritesWhenCancelled,
    KeepsBuffersAfterCancellation,
    LosesConcurrentWrites,
    LosesDurableWrites,
    MixesUpConcurrentRequests,
    NeverCloses,
    ReadOnly,
    ReadOnlyButFast,
    ReadOnlyButTrims,
    ReadOnlyButZeroes,
    ReadOnlyInNameOnly,
    ResizesNothing,
    RestlessInfo,
    ScribblesOnTheGuest,
    ServesWhenClosed,
    ShortAtTheEnd,
    ShortWriteAtTheEnd,
    ShowsOldDataAfterShrinking,
    StaysTrimmed,
    StillReadsWhatWasCutOff,
    TearsSectors,
    TellsForEver,
    TellsNobody,
    TellsOnlyOfGrowth,
    TrimsNothing,
    TrimsTooMuch,
    WritesBesideItsBuffers,
    WritesTheNextSector,
    ZeroesBeyondTheEnd,
    ZeroesNothing,
    bad_info,
)
from vmbus.errors import ConfigError


@pytest.mark.slow
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

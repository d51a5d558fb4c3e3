"""Copy on write: the base is never written, old data never shines through."""

import dataclasses
import errno
import os

import pytest
import trio

from storvsp.disk import DiskUnavailableError, Extent, MediumError, OutOfRangeError
from storvsp.disks.fault import Fault, FaultDisk, FaultKind, Operation
from storvsp.disks.overlay import CLUSTER, OverlayDisk, open_scratch
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import open_disk
from storvsp.disks.wrapper import DiskWrapper
from tests.support.disks import SECTOR, views
from tests.support.leaks import open_descriptors
from vmbus.errors import ConfigError


def read(disk, offset, length):
    buffers = views(bytes(length))
    assert disk.try_readv(offset, buffers)
    return bytes(buffers[0])


def base_of(size=4 * CLUSTER):
    base = RamDisk(size)
    base.try_writev(0, views(b"b" * size))
    return base


class CountingDisk(DiskWrapper):
    """Notes the reads that reach it."""

    def __init__(self, base):
        super().__init__(base)
        self.reads = []

    def try_readv(self, offset, buffers):
        self.reads.append((offset, sum(map(len, buffers))))
        return super().try_readv(offset, buffers)


async def test_writes_go_to_the_scratch_and_reads_find_the_newest():
    base = base_of()
    disk = OverlayDisk(base)
    disk.try_writev(SECTOR, views(b"n" * SECTOR))
    assert read(disk, 0, 3 * SECTOR) == b"b" * SECTOR + b"n" * SECTOR + b"b" * SECTOR
    assert read(base, 0, 4 * CLUSTER) == b"b" * 4 * CLUSTER


async def test_a_request_whose_sectors_agree_goes_to_one_layer_in_one_piece():
    base, scratch = CountingDisk(base_of()), CountingDisk(RamDisk(4 * CLUSTER))
    disk = OverlayDisk(base, scratch)
    for offset, length in [(0, 8), (128, 256)]:  # part of one cluster, then two whole ones
        disk.try_writev(offset * SECTOR, views(b"n" * length * SECTOR))
    for layer, other, offset, length in [
        (scratch, base, 0, 8 * SECTOR),
        (scratch, base, SECTOR, SECTOR),
        (base, scratch, 8 * SECTOR, CLUSTER - 8 * SECTOR),
        (scratch, base, CLUSTER, 2 * CLUSTER),
        (scratch, base, CLUSTER + SECTOR, CLUSTER),
        (base, scratch, 3 * CLUSTER, CLUSTER),
    ]:
        base.reads.clear()
        scratch.reads.clear()
        read(disk, offset, length)
        assert (layer.reads, other.reads) == ([(offset, length)], [])
    scratch.reads.clear()
    base.reads.clear()
    read(disk, 0, 4 * CLUSTER)
    assert base.reads == [(8 * SECTOR, CLUSTER - 8 * SECTOR), (3 * CLUSTER, CLUSTER)]
    assert scratch.reads == [(0, 8 * SECTOR), (CLUSTER, 2 * CLUSTER)]


async def test_a_cluster_written_sector_by_sector_becomes_whole():
    disk = OverlayDisk(base_of(CLUSTER + 3 * SECTOR))
    for sector in range(CLUSTER // SECTOR + 3):
        assert disk._masks or sector in (0, CLUSTER // SECTOR)
        disk.try_writev(sector * SECTOR, views(b"n" * SECTOR))
    assert not disk._masks
    assert disk.diverged == 2 * CLUSTER
    disk.try_writev(0, views(b"m" * SECTOR))
    assert read(disk, 0, 2 * SECTOR) == b"m" * SECTOR + b"n" * SECTOR


async def test_a_large_write_swallows_mixed_clusters():
    disk = OverlayDisk(base_of())
    for cluster in range(4):
        disk.try_writev(cluster * CLUSTER + SECTOR, views(b"n" * SECTOR))
    assert len(disk._masks) == 4
    disk.try_writev(SECTOR, views(b"m" * (4 * CLUSTER - 2 * SECTOR)))
    assert len(disk._masks) == 2
    expected = b"b" * SECTOR + b"m" * (4 * CLUSTER - 2 * SECTOR) + b"b" * SECTOR
    assert read(disk, 0, 4 * CLUSTER) == expected


async def test_trimmed_and_zeroed_sectors_do_not_show_the_base():
    disk = OverlayDisk(base_of())
    await disk.unmap(SECTOR, SECTOR)
    await disk.write_zeroes(3 * SECTOR, SECTOR)
    await disk.unmap(CLUSTER, 2 * CLUSTER)
    one = b"b" * SECTOR
    assert read(disk, 0, 5 * SECTOR) == one + bytes(SECTOR) + one + bytes(SECTOR) + one
    assert read(disk, CLUSTER, 3 * CLUSTER) == bytes(2 * CLUSTER) + b"b" * CLUSTER
    assert isinstance(disk.scratch, RamDisk)
    assert disk.scratch.allocated == 0


async def test_extents_come_from_the_layer_that_holds_the_data():
    base = RamDisk(4 * CLUSTER)
    base.try_writev(0, views(b"b" * CLUSTER))
    disk = OverlayDisk(base)
    disk.try_writev(2 * CLUSTER, views(b"n" * CLUSTER))
    await disk.unmap(0, CLUSTER)
    assert await disk.extents(0, 4 * CLUSTER) == [
        Extent(0, 2 * CLUSTER, mapped=False),
        Extent(2 * CLUSTER, CLUSTER, mapped=True),
        Extent(3 * CLUSTER, CLUSTER, mapped=False),
    ]


async def test_a_write_that_fails_changes_nothing_that_is_read():
    scratch = FaultDisk(
        RamDisk(4 * CLUSTER),
        Fault(FaultKind.SHORT, on=Operation.WRITE | Operation.UNMAP),
    )
    disk = OverlayDisk(base_of(), scratch)
    for attempt in (
        lambda: disk.writev(0, views(b"n" * CLUSTER)),
        lambda: disk.write_zeroes(0, CLUSTER),
        lambda: disk.unmap(0, CLUSTER),
    ):
        with pytest.raises(MediumError):
            await attempt()
        assert read(disk, 0, CLUSTER) == b"b" * CLUSTER


async def test_a_read_that_needs_one_slow_layer_says_so_and_waits_for_it():
    fault = Fault(FaultKind.HANG, on=Operation.READ, first=2, last=2)
    disk = OverlayDisk(FaultDisk(base_of(), fault))
    disk.try_writev(0, views(b"n" * SECTOR))
    buffers = views(bytes(4 * SECTOR))
    assert not disk.try_readv(0, buffers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.readv, 0, buffers)
        await trio.testing.wait_all_tasks_blocked()
        assert fault.waiting == 1
        fault.release()
    assert bytes(buffers[0]) == b"n" * SECTOR + b"b" * 3 * SECTOR
    assert disk.try_readv(0, views(bytes(2 * SECTOR)))


async def test_a_trim_that_the_scratch_cannot_do_is_ignored():
    class Plain(DiskWrapper):
        @property
        def info(self):
            return type(self.base.info)(size=self.base.info.size)

    disk = OverlayDisk(base_of(), Plain(RamDisk(4 * CLUSTER)))
    assert not disk.info.supports_unmap
    await disk.unmap(0, SECTOR)
    assert read(disk, 0, SECTOR) == b"b" * SECTOR


async def test_the_overlay_of_a_named_disk_does_not_take_its_name():
    class Named(DiskWrapper):
        @property
        def info(self):
            return type(self.base.info)(
                size=self.base.info.size, identity=b"id", serial="S1", read_only=True
            )

    disk = OverlayDisk(Named(base_of()))
    assert (disk.info.identity, disk.info.serial) == (b"", "")
    assert not disk.info.read_only


async def test_a_scratch_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 262144 bytes"):
        OverlayDisk(base_of(), RamDisk(CLUSTER))
    with pytest.raises(ConfigError, match="sectors of 512 bytes or less"):
        OverlayDisk(base_of(), RamDisk(4 * CLUSTER, sector_size=4096))
    (tmp_path / "ro.img").write_bytes(bytes(4 * CLUSTER))
    read_only = await open_disk(f"raw:[ro]{tmp_path}/ro.img")
    with pytest.raises(ConfigError, match="has to be writable"):
        OverlayDisk(base_of(), read_only)
    await read_only.aclose()


@pytest.mark.parametrize("scratch", ["", "[scratch={tmp}]", "[scratch={tmp}/new.img]"])
async def test_nothing_survives_closing_but_the_base(tmp_path, scratch):
    (tmp_path / "base.img").write_bytes(b"b" * CLUSTER)
    text = f"overlay:{scratch.format(tmp=tmp_path)}raw:[ro]{tmp_path}/base.img"
    for _ in range(2):
        disk = await open_disk(text)
        assert os.listdir(tmp_path) == ["base.img"]
        buffers = views(bytes(CLUSTER))
        await disk.readv(0, buffers)
        assert bytes(buffers[0]) == b"b" * CLUSTER
        await disk.writev(SECTOR, views(b"n" * SECTOR))
        await disk.flush()
        await disk.readv(0, buffers)
        assert bytes(buffers[0][:1024]) == b"b" * SECTOR + b"n" * SECTOR
        await disk.aclose()
    assert (tmp_path / "base.img").read_bytes() == b"b" * CLUSTER


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("scratch={tmp}/base.img", "the scratch file {tmp}/base.img exists"),
        ("scratch={tmp}/no/file", "No such file or directory"),
        ("scatch={tmp}", "did you mean 'scratch'?"),
    ],
)
async def test_a_scratch_that_cannot_be_made_leaves_nothing_open(tmp_path, options, hint):
    (tmp_path / "base.img").write_bytes(bytes(CLUSTER))
    before = open_descriptors(collect=True)
    with pytest.raises(ConfigError) as caught:
        await open_disk(f"overlay:[{options.format(tmp=tmp_path)}]raw:{tmp_path}/base.img")
    assert hint.format(tmp=tmp_path) in str(caught.value)
    assert open_descriptors() == before
    assert os.listdir(tmp_path) == ["base.img"]


@pytest.mark.parametrize(
    ("code", "error"), [(errno.EOPNOTSUPP, ConfigError), (errno.EACCES, PermissionError)]
)
async def test_a_directory_without_nameless_files_is_named(tmp_path, monkeypatch, code, error):
    def refuse(*_):
        raise OSError(code, "refused")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error, match=r"nameless|refused"):
        await open_scratch(str(tmp_path), RamDisk(CLUSTER).info)


@pytest.mark.parametrize("name", ["ftruncate", "fdopen"])
async def test_a_scratch_that_cannot_grow_is_closed(tmp_path, monkeypatch, name):
    before = open_descriptors(collect=True)
    if name == "ftruncate":

        def refuse(*_):
            raise OSError(errno.EFBIG, "File too large")

        monkeypatch.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="File too large"):
            await open_scratch(str(tmp_path), RamDisk(CLUSTER).info)
    else:
        monkeypatch.setattr(os, "ftruncate", lambda *_: None)  # stays empty
        with pytest.raises(ConfigError, match="smaller than one sector"):
            await open_scratch(str(tmp_path), RamDisk(CLUSTER).info)
    assert open_descriptors() == before


async def test_ranges_outside_are_refused_and_a_closed_overlay_is_unavailable():
    base = base_of(CLUSTER)
    disk = OverlayDisk(base)

    def attempts(offset):
        return (
            lambda: disk.readv(offset, views(bytes(1024))),
            lambda: disk.writev(offset, views(bytes(1024))),
            lambda: disk.unmap(offset, 1024),
            lambda: disk.write_zeroes(offset, 1024),
            lambda: disk.extents(offset, 1024),
        )

    for attempt in attempts(CLUSTER - SECTOR):
        with pytest.raises(OutOfRangeError):
            await attempt()
    for fast in (disk.try_readv, disk.try_writev):
        with pytest.raises(OutOfRangeError):
            fast(CLUSTER, views(bytes(SECTOR)))
    assert disk.diverged == 0
    assert read(disk, CLUSTER, 0) == b""
    assert read(disk, SECTOR, 0) == b""
    disk.try_writev(0, [])
    assert disk.diverged == 0
    await disk.aclose()
    for attempt in (*attempts(0), disk.flush):
        with pytest.raises(DiskUnavailableError):
            await attempt()
    with pytest.raises(DiskUnavailableError):
        base.try_readv(0, views(bytes(SECTOR)))


class Terse(DiskWrapper):
    """Tells one extent at a time."""

    async def extents(self, offset, length):
        return (await self.base.extents(offset, length))[:1]


async def test_extents_go_as_far_as_both_layers_have_told():
    base = RamDisk(4 * CLUSTER)
    base.try_writev(CLUSTER, views(b"b" * CLUSTER))
    disk = OverlayDisk(Terse(base), Terse(RamDisk(4 * CLUSTER)))
    disk.try_writev(SECTOR, views(b"s" * SECTOR))
    disk.try_writev(2 * CLUSTER, views(b"s" * CLUSTER))
    await disk.unmap(3 * CLUSTER, CLUSTER)
    found, position = [], 0
    while position < 4 * CLUSTER:
        told = await disk.extents(position, 4 * CLUSTER - position)
        assert told[0].offset == position
        found += [(each.offset // SECTOR, each.mapped) for each in told]
        position = told[-1].offset + told[-1].length
    changes = [each for at, each in enumerate(found) if not at or each[1] != found[at - 1][1]]
    sectors = CLUSTER // SECTOR
    # Of a scratch in memory the whole chunk is there, but one sector of it is the overlay's.
    assert changes == [(0, False), (1, True), (2, False), (sectors, True), (3 * sectors, False)]


async def test_a_trim_list_goes_to_the_scratch_as_one():
    class Lists(RamDisk):
        lists: list[object]

        async def unmap_many(self, ranges):
            self.lists.append(ranges)
            await super().unmap_many(ranges)

    scratch = Lists(4 * CLUSTER)
    scratch.lists = []
    disk = OverlayDisk(base_of(), scratch)
    ranges = [(0, SECTOR), (CLUSTER, 2 * CLUSTER)]
    await disk.unmap_many(ranges)
    assert scratch.lists == [ranges]
    assert read(disk, 0, 2 * SECTOR) == bytes(SECTOR) + b"b" * SECTOR
    assert read(disk, CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)
    with pytest.raises(OutOfRangeError):
        await disk.unmap_many([(0, SECTOR), (4 * CLUSTER, SECTOR)])
    assert len(scratch.lists) == 1


async def test_a_trim_list_that_the_scratch_cannot_do_is_ignored():
    scratch = RamDisk(4 * CLUSTER)
    scratch._info = dataclasses.replace(scratch.info, supports_unmap=False)
    disk = OverlayDisk(base_of(), scratch)
    await disk.unmap_many([(0, SECTOR)])
    assert read(disk, 0, SECTOR) == b"b" * SECTOR


@pytest.mark.parametrize("between", ["", "delay:", "overlay:", "fault:"])
async def test_overlays_share_a_base_that_nobody_may_write(tmp_path, between):
    base = tmp_path / "base.img"
    base.write_bytes(b"b" * CLUSTER)
    base.chmod(0o400)
    one = await open_disk(f"overlay:{between}raw:{base}")
    other = await open_disk(f"overlay:raw:{base}")
    assert not one.info.read_only
    await one.writev(0, views(b"1" * SECTOR))
    await other.writev(0, views(b"2" * SECTOR))
    with pytest.raises(ConfigError, match="is in use"):
        await RawDisk.open(base)
    await one.aclose()
    with pytest.raises(ConfigError, match="is in use"):
        await RawDisk.open(base)
    await other.aclose()
    await (await RawDisk.open(base)).aclose()
    assert base.read_bytes() == b"b" * CLUSTER


async def test_a_base_that_is_being_written_is_no_base(tmp_path):
    base = tmp_path / "base.img"
    base.write_bytes(b"b" * CLUSTER)
    writer = await open_disk(f"raw:{base}")
    with pytest.raises(ConfigError, match="has it open for writing"):
        await open_disk(f"overlay:raw:{base}")
    await writer.aclose()

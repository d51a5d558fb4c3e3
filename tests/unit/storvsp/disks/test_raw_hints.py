"""UNMAP of a raw disk is a hint: what is below may not follow it, and only promised zeros count."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os

import pytest
import trio

from storvsp.disk import MediumError, OutOfRangeError
from storvsp.disks import linux
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import UNMAP_STEP, RawDisk

NO = [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EFBIG]


@pytest.fixture
async def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * (1 << 20))
    made = await RawDisk.open(path)
    assert made.info.supports_unmap
    yield made
    await made.aclose()


async def contents(disk: RawDisk, offset: int, length: int) -> bytes:
    data = memoryview(bytearray(length))
    await disk.readv(offset, [data])
    return bytes(data)


@pytest.mark.parametrize("number", NO)
async def test_a_file_system_that_punches_no_holes_any_more_gets_zeros_written(
    disk, monkeypatch, number
):
    """The disk has said that unmapped blocks read as zeros, and that stays true."""

    def fallocate(fd, mode, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(linux, "fallocate", fallocate)
    await disk.unmap(4096, 8192)
    assert await contents(disk, 4096, 8192) == bytes(8192)
    assert await contents(disk, 0, 4096) == b"\xaa" * 4096
    assert await contents(disk, 12288, 4096) == b"\xaa" * 4096


async def test_a_real_error_is_one(disk, monkeypatch):
    def fallocate(fd, mode, offset, length):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(linux, "fallocate", fallocate)
    with pytest.raises(MediumError):
        await disk.unmap(4096, 8192)


@pytest.mark.parametrize("number", NO)
async def test_a_device_that_discards_no_more_has_been_hinted_all_the_same(
    disk, monkeypatch, number
):
    asked = []

    def ioctl(fd, request, argument=0):
        asked.append(request)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    disk._device = object()  # a block device promises nothing about what it reads afterwards
    await disk.unmap(4096, 8192)
    assert asked == [linux.BLKDISCARD]


async def test_an_image_as_large_as_its_file_system_allows_opens_without_holes(
    tmp_path, monkeypatch
):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))

    def fallocate(fd, mode, offset, length):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(linux, "fallocate", fallocate)
    disk = await RawDisk.open(path)
    assert not disk.info.supports_unmap
    await disk.aclose()


@pytest.mark.parametrize("largest", [512, 4096, 5000])
async def test_zeros_are_written_in_pieces_that_the_disk_takes(largest):
    class Small(RamDisk):
        pieces: list[int]

        @property
        def info(self):
            return dataclasses.replace(super().info, max_transfer=largest)

        async def writev(self, offset, buffers, *, fua=False):
            self.pieces.append(sum(map(len, buffers)))

    disk = Small(1 << 20)
    disk.pieces = []
    await super(RamDisk, disk).write_zeroes(0, 16384)
    assert sum(disk.pieces) == 16384
    assert max(disk.pieces) == largest // 512 * 512


@pytest.mark.parametrize("options", ["", "ro"])
async def test_a_file_that_has_grown_outside_is_noticed_when_asked(tmp_path, options):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    disk = await RawDisk.open(path, read_only=bool(options))
    seen: list[int] = []
    disk.watch(lambda: seen.append(disk.info.size))
    await disk.look_again()
    assert seen == []
    with path.open("r+b") as file:
        file.truncate(3 << 20)
    await disk.look_again()
    assert seen == [3 << 20]
    await disk.aclose()


@pytest.fixture
def trips(monkeypatch):
    """What workers were asked to free, trip by trip."""
    made = []

    def each_of(free, fd, ranges):
        made.append(list(ranges))
        return []

    monkeypatch.setattr(linux, "each_of", each_of)
    return made


async def test_a_list_of_short_ranges_is_one_trip_to_a_worker(disk, trips):
    ranges = [(4096 * at, 512) for at in range(256)]
    await disk.unmap_many(ranges)
    assert trips == [ranges]
    await disk.unmap(0, 0)
    await disk.unmap_many([])
    assert len(trips) == 1


async def test_a_long_range_is_freed_in_parts_between_which_it_can_be_given_up(disk, trips):
    disk._size = 1 << 62  # as far as the checks go
    await disk.unmap_many([(512, 1024), (4096, 2 * UNMAP_STEP + 512)])
    assert trips == [
        [(512, 1024)],
        [(4096, UNMAP_STEP)],
        [(4096 + UNMAP_STEP, UNMAP_STEP)],
        [(4096 + 2 * UNMAP_STEP, 512)],
    ]
    trips.clear()
    await disk.unmap(0, 1 << 60)
    assert len(trips) == 256, "size alone costs nothing"
    assert sum(length for (trip,) in trips for _, length in [trip]) == 1 << 60
    trips.clear()
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.unmap(0, 1 << 60)
    assert trips == []


async def test_each_range_of_a_list_is_checked_before_the_first_is_freed(disk, trips):
    with pytest.raises(OutOfRangeError):
        await disk.unmap_many([(0, 512), (1 << 20, 512)])
    assert trips == []


async def test_of_a_list_only_what_cannot_be_freed_is_written(disk, monkeypatch):
    original = linux.punch_hole
    monkeypatch.setattr(
        linux, "punch_hole", lambda fd, at, size: at != 8192 and original(fd, at, size)
    )
    await disk.unmap_many([(0, 4096), (8192, 512), (16384, 4096)])
    assert await contents(disk, 0, 20480) == (
        bytes(4096) + b"\xaa" * 4096 + bytes(512) + b"\xaa" * (8192 - 512) + bytes(4096)
    )

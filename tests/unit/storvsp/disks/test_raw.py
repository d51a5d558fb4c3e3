"""Image files: their bytes, the fast path, sizes that change, holes, and the end."""

import errno
import os
import threading

import pytest
import trio
import trio.testing

from storvsp.disk import (
    DiskUnavailableError,
    Extent,
    MediumError,
    NoSpaceError,
    OutOfRangeError,
    ReadOnlyError,
)
from storvsp.disks import linux
from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import open_disk
from tests.support.disks import MIB, SECTOR, views
from tests.support.leaks import open_descriptors
from tests.support.patience import PATIENCE
from vmbus.errors import ConfigError


async def test_the_file_is_the_disk_byte_for_byte(image):
    content = image.read_bytes()
    disk = await RawDisk.open(image)
    buffers = views(bytes(1024), bytes(3072))
    await disk.readv(4096, buffers)
    assert b"".join(buffers) == content[4096:8192]
    await disk.writev(SECTOR, views(b"a" * 100, b"b" * 412), fua=True)
    await disk.flush()
    await disk.aclose()
    assert image.read_bytes() == content[:512] + b"a" * 100 + b"b" * 412 + content[1024:]


async def test_a_page_cache_hit_is_served_inline(image):
    image.read_bytes()
    disk = await RawDisk.open(image)
    buffers = views(bytes(4096))
    assert disk.try_readv(8192, buffers)
    assert bytes(buffers[0]) == image.read_bytes()[8192:12288]
    assert not disk.try_writev(8192, buffers)
    await disk.aclose()


async def test_a_page_cache_miss_or_partial_hit_is_left_to_the_workers(image, monkeypatch):
    disk = await RawDisk.open(image)
    buffers = views(bytes(4096))

    def miss(*_):
        raise BlockingIOError(errno.EAGAIN, "not cached")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", miss)
        assert not disk.try_readv(0, buffers)
        patch.setattr(os, "preadv", lambda *_: 1024)
        assert not disk.try_readv(0, buffers)
    assert disk.try_readv(0, buffers)  # a miss does not end the fast path
    await disk.aclose()


async def test_without_nowait_the_fast_path_is_given_up(image, monkeypatch):
    disk = await RawDisk.open(image)
    calls = []

    def unsupported(*_):
        calls.append(1)
        raise OSError(errno.EOPNOTSUPP, "not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", unsupported)
        assert not disk.try_readv(0, views(bytes(4096)))
        assert not disk.try_readv(0, views(bytes(4096)))
    assert len(calls) == 1
    await disk.readv(0, views(bytes(4096)))
    await disk.aclose()


async def test_a_memory_file_is_read_and_written_inline():
    fd = os.memfd_create("disk")
    os.ftruncate(fd, MIB)
    disk = RawDisk(fd)
    assert disk.try_writev(4096, views(b"m" * 4096), fua=True)
    buffers = views(bytes(4096))
    assert disk.try_readv(4096, buffers)
    assert bytes(buffers[0]) == b"m" * 4096
    await disk.aclose()


async def test_a_memory_file_that_refuses_reports_through_the_slow_form(monkeypatch):
    fd = os.memfd_create("disk")
    os.ftruncate(fd, MIB)
    disk = RawDisk(fd)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        patch.setattr(os, "pwrite", full)
        assert not disk.try_writev(0, views(bytes(SECTOR)))
        with pytest.raises(NoSpaceError, match="write failed: No space left") as caught:
            await disk.writev(1024, views(bytes(SECTOR)))
        assert caught.value.offset == 1024
    await disk.aclose()


async def test_scatter_lists_longer_than_one_system_call_takes_are_split(image):
    disk = await RawDisk.open(image)
    content = image.read_bytes()
    buffers = views(*[bytes(64) for _ in range(5000)])
    assert not disk.try_readv(0, buffers)
    await disk.readv(0, buffers)
    assert b"".join(buffers) == content[: 64 * 5000]
    for buffer in buffers:
        buffer[:] = bytes(reversed(bytes(buffer)))
    await disk.writev(SECTOR, buffers)
    await disk.aclose()
    assert image.read_bytes()[SECTOR : SECTOR + 64 * 5000] == b"".join(buffers)


def test_short_transfers_are_continued_where_they_stopped(image, monkeypatch):
    real_read, real_write = os.preadv, os.pwritev
    content = image.read_bytes()
    fd = os.open(image, os.O_RDWR)
    monkeypatch.setattr(os, "preadv", lambda f, b, o: real_read(f, [b[0][:100]], o))
    monkeypatch.setattr(os, "pwritev", lambda f, b, o, g: real_write(f, [b[0][:77]], o, g))
    buffers = views(bytes(150), b"", bytes(362))
    assert linux.read_fully(fd, buffers, 1024) == 512
    assert b"".join(buffers) == content[1024:1536]
    linux.write_fully(fd, buffers, 0, False)
    assert linux.read_fully(fd, views(bytes(1024)), MIB - 512) == 512
    assert linux.read_fully(fd, views(b"", b""), 0) == 0
    os.close(fd)
    assert image.read_bytes()[:512] == content[1024:1536]


async def test_a_fragment_behind_the_last_sector_is_not_part_of_the_disk(tmp_path):
    path = tmp_path / "odd.img"
    path.write_bytes(b"o" * 1300)
    disk = await RawDisk.open(path)
    assert disk.info.size == 1024
    with pytest.raises(OutOfRangeError):
        await disk.readv(1024, views(bytes(SECTOR)))
    await disk.aclose()
    medium = await open_disk(f"cd:{image_of(tmp_path, 5000)}")
    assert (medium.info.size, medium.info.sector_size) == (4096, 2048)
    assert medium.info.optical
    assert medium.info.removable
    assert medium.info.read_only
    await medium.aclose()


def image_of(tmp_path, size):
    path = tmp_path / f"{size}.img"
    path.write_bytes(bytes(size))
    return path


async def test_growth_and_shrinking_from_outside_are_noticed(image):
    disk = await RawDisk.open(image)
    sizes = []
    end = disk.watch(lambda: sizes.append(disk.info.size))
    assert not disk.check_resize()
    os.truncate(image, 2 * MIB)
    with pytest.raises(OutOfRangeError):
        await disk.readv(MIB, views(bytes(SECTOR)))
    assert disk.check_resize()
    await disk.readv(MIB, views(bytes(SECTOR)))
    os.truncate(image, MIB + 5)
    assert not disk.try_readv(MIB, views(bytes(1024)))
    with pytest.raises(OutOfRangeError, match="shorter") as caught:
        await disk.readv(MIB - SECTOR, views(bytes(1024)))
    assert caught.value.offset == MIB + 5
    os.truncate(image, MIB // 2)
    await disk.flush()
    assert sizes == [2 * MIB, MIB, MIB // 2]
    end()
    os.truncate(image, MIB)
    assert disk.check_resize()
    assert len(sizes) == 3
    await disk.aclose()


async def test_a_resize_changes_the_file_and_tells_the_watchers(image):
    disk = await RawDisk.open(image)
    sizes = []
    disk.watch(lambda: sizes.append(disk.info.size))
    await disk.resize(2 * MIB)
    await disk.resize(SECTOR)
    assert sizes == [2 * MIB, SECTOR]
    assert image.stat().st_size == SECTOR
    for size in (0, 100):
        with pytest.raises(ConfigError, match="not a positive number of 512-byte sectors"):
            await disk.resize(size)
    await disk.aclose()
    disk = await RawDisk.open(image, read_only=True)
    with pytest.raises(ReadOnlyError):
        await disk.resize(MIB)
    await disk.aclose()


@pytest.fixture
def held_writes(monkeypatch):
    """Writes that have begun go on only when this event is set."""
    go = threading.Event()
    write_fully = linux.write_fully

    def wait(*args):
        assert go.wait(PATIENCE)
        write_fully(*args)

    monkeypatch.setattr(linux, "write_fully", wait)
    yield go
    go.set()


async def test_a_write_under_way_does_not_undo_a_shrinking(image, held_writes):
    """It would make the file grow again, and with it the disk."""
    disk = await RawDisk.open(image)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.writev, MIB - SECTOR, views(b"x" * SECTOR))
        nursery.start_soon(disk.writev, 0, views(b"y" * SECTOR))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(disk.resize, MIB // 2)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OutOfRangeError):
            await disk.writev(MIB // 2, views(bytes(SECTOR)))
        held_writes.set()
    assert disk.info.size == image.stat().st_size == MIB // 2
    await disk.aclose()


async def test_a_shrinking_that_waits_ends_with_the_disk(image, held_writes):
    disk = await RawDisk.open(image)

    async def shrink():
        with pytest.raises(DiskUnavailableError):
            await disk.resize(SECTOR)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.writev, MIB - SECTOR, views(b"x" * SECTOR))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(shrink)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(disk.aclose)
        await trio.testing.wait_all_tasks_blocked()
        held_writes.set()
    assert image.stat().st_size == MIB


async def test_a_resize_that_fails_leaves_the_size_as_it_was(image, monkeypatch):
    disk = await RawDisk.open(image)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(MediumError, match="resize failed"):
            await disk.resize(SECTOR)
    assert disk.info.size == MIB
    await disk.readv(MIB - SECTOR, views(bytes(SECTOR)))
    await disk.aclose()


async def test_trimming_makes_holes_that_read_as_zeros(tmp_path):
    path = tmp_path / "sparse.img"
    disk = await RawDisk.open(path, create=MIB)
    assert disk.info.supports_unmap
    assert disk.info.unmapped_reads_zero
    await disk.writev(0, views(b"x" * MIB))
    await disk.flush()
    full = path.stat().st_blocks
    await disk.unmap(0, MIB // 2)
    assert path.stat().st_blocks <= full // 2 + 8
    assert await disk.extents(0, MIB) == [
        Extent(0, MIB // 2, mapped=False),
        Extent(MIB // 2, MIB // 2, mapped=True),
    ]
    await disk.write_zeroes(MIB // 2, MIB // 4, may_unmap=True)
    await disk.write_zeroes(3 * MIB // 4, MIB // 8)
    assert path.stat().st_blocks <= full // 2 + 8
    assert path.stat().st_size == MIB
    await disk.aclose()
    assert path.read_bytes() == bytes(7 * MIB // 8) + b"x" * (MIB // 8)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
async def test_zeros_are_written_where_the_file_system_has_no_shortcut(image, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, "not supported")

    monkeypatch.setattr(linux, "fallocate", unsupported)
    disk = await RawDisk.open(image)
    assert not disk.info.supports_unmap
    before = image.read_bytes()
    await disk.unmap(0, SECTOR)
    assert image.read_bytes() == before
    await disk.write_zeroes(SECTOR, SECTOR)
    await disk.write_zeroes(4096, SECTOR, may_unmap=True)
    await disk.aclose()
    expected = bytearray(before)
    expected[SECTOR : 2 * SECTOR] = expected[4096 : 4096 + SECTOR] = bytes(SECTOR)
    assert image.read_bytes() == expected


async def test_a_full_file_system_is_no_space_and_not_worked_around(image, monkeypatch):
    disk = await RawDisk.open(image)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(linux, "fallocate", full)
    with pytest.raises(NoSpaceError, match="write zeroes failed"):
        await disk.write_zeroes(0, SECTOR)
    with pytest.raises(NoSpaceError, match="unmap failed"):
        await disk.unmap(0, SECTOR)
    await disk.aclose()


async def test_errors_of_the_device_come_back_as_what_they_mean(image, monkeypatch):
    disk = await RawDisk.open(image)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    for name, attempt in {
        "preadv": lambda: disk.readv(SECTOR, views(bytes(SECTOR))),
        "pwritev": lambda: disk.writev(SECTOR, views(bytes(SECTOR))),
        "fdatasync": disk.flush,
        "lseek": lambda: disk.extents(SECTOR, SECTOR),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(MediumError, match="Input/output error") as caught:
                await attempt()
            assert caught.value.offset == (None if name == "fdatasync" else SECTOR)
    await disk.aclose()


async def test_a_closed_disk_is_unavailable_and_its_descriptor_closed_once(image):
    before = open_descriptors(collect=True)
    disk = await RawDisk.open(image)
    await disk.aclose()
    assert open_descriptors() == before
    spare = os.open("/dev/null", os.O_RDONLY)  # takes the freed number
    await disk.aclose()
    os.fstat(spare)
    os.close(spare)
    for attempt in (
        disk.flush,
        lambda: disk.readv(0, []),
        lambda: disk.writev(0, []),
        lambda: disk.unmap(0, 0),
        lambda: disk.write_zeroes(0, 0),
        lambda: disk.extents(0, 0),
        lambda: disk.resize(MIB),
    ):
        with pytest.raises(DiskUnavailableError):
            await attempt()
    with pytest.raises(DiskUnavailableError):
        disk.try_readv(0, [])
    with pytest.raises(DiskUnavailableError):
        disk.check_resize()


@pytest.mark.parametrize("action", ["fdatasync", "ftruncate"])
async def test_closing_waits_for_what_is_under_way_and_lets_it_succeed(image, monkeypatch, action):
    disk = await RawDisk.open(image)
    begun, go_on = threading.Event(), threading.Event()
    real = getattr(os, action)
    events = []

    def slow(*args):
        begun.set()
        assert go_on.wait(PATIENCE)
        real(*args)  # the descriptor is still ours

    monkeypatch.setattr(os, action, slow)

    async def use():
        await (disk.flush() if action == "fdatasync" else disk.resize(SECTOR))
        events.append("done")

    async def close():
        await disk.aclose()
        events.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await trio.to_thread.run_sync(begun.wait)
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert events == []
        go_on.set()
    assert sorted(events) == ["closed", "done"]
    with pytest.raises(DiskUnavailableError):
        disk.try_readv(0, views(bytes(SECTOR)))

"""The RAM disk allocates what is written and frees what is trimmed."""

import errno

import pytest

from storvsp.disk import DiskUnavailableError, Extent, NoSpaceError, OutOfRangeError
from storvsp.disks.ram import CHUNK, MAX_SIZE, RamDisk
from storvsp.disks.specs import open_disk
from tests.support.disks import views
from vmbus.errors import ConfigError


def read(disk, offset, length):
    buffers = views(bytes(length))
    assert disk.try_readv(offset, buffers)
    return bytes(buffers[0])


async def test_memory_is_taken_by_the_first_write_of_a_chunk_and_not_by_reads():
    disk = RamDisk(1 << 40)
    assert read(disk, (1 << 40) - 4096, 4096) == bytes(4096)
    assert disk.allocated == 0
    disk.try_writev((1 << 39) - 512, views(b"a" * 512, b"b" * 512))
    assert disk.allocated == 2 * CHUNK
    assert read(disk, (1 << 39) - 1024, 2048) == bytes(512) + b"a" * 512 + b"b" * 512 + bytes(512)


async def test_one_buffer_may_span_many_chunks():
    disk = RamDisk(1 << 20)
    data = bytes(range(256)) * 1024
    assert disk.try_writev(CHUNK - 512, views(data))
    assert read(disk, CHUNK - 512, len(data)) == data
    assert disk.allocated == 5 * CHUNK


async def test_trimming_a_whole_chunk_gives_its_memory_back():
    disk = RamDisk(1 << 20)
    disk.try_writev(0, views(b"x" * (4 * CHUNK)))
    await disk.unmap(CHUNK, 2 * CHUNK)
    assert disk.allocated == 2 * CHUNK
    assert read(disk, CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
    assert read(disk, 3 * CHUNK, 512) == b"x" * 512


async def test_trimming_piece_by_piece_gives_the_memory_back_with_the_last_piece():
    disk = RamDisk(1 << 20)
    disk.try_writev(0, views(b"x" * CHUNK))
    await disk.unmap(0, CHUNK // 2)
    assert disk.allocated == CHUNK
    await disk.unmap(CHUNK // 2, CHUNK // 2)
    assert disk.allocated == 0


@pytest.mark.parametrize("start", [0, 512, CHUNK - 512, CHUNK])
@pytest.mark.parametrize("length", [1 << 30, (1 << 30) - CHUNK - 512])
async def test_trimming_far_more_than_is_allocated_clears_exactly_the_range(start, length):
    disk = RamDisk(1 << 31)
    for offset in (0, CHUNK, (1 << 30) - CHUNK, (1 << 30), (1 << 30) + CHUNK):
        disk.try_writev(offset, views(b"x" * CHUNK))
    await disk.unmap(start, length)
    expected = bytearray(b"x" * 2 * CHUNK)
    expected[start:] = bytes(2 * CHUNK - start)
    assert read(disk, 0, 2 * CHUNK) == bytes(expected)
    base, end = (1 << 30) - CHUNK, start + length
    expected = bytearray(b"x" * 3 * CHUNK)
    expected[: max(0, end - base)] = bytes(max(0, end - base))
    assert read(disk, base, 3 * CHUNK) == bytes(expected)


async def test_writing_zeros_frees_as_trimming_does():
    disk = RamDisk(1 << 20)
    disk.try_writev(0, views(b"x" * CHUNK))
    await disk.write_zeroes(0, CHUNK)
    assert disk.allocated == 0


async def test_extents_show_the_chunks_even_of_a_huge_disk():
    disk = RamDisk(1 << 40)
    disk.try_writev(3 * CHUNK, views(b"x" * 512))
    disk.try_writev(1 << 39, views(b"x" * 512))
    assert await disk.extents(0, 1 << 40) == [
        Extent(0, 3 * CHUNK, mapped=False),
        Extent(3 * CHUNK, CHUNK, mapped=True),
        Extent(4 * CHUNK, (1 << 39) - 4 * CHUNK, mapped=False),
        Extent(1 << 39, CHUNK, mapped=True),
        Extent((1 << 39) + CHUNK, (1 << 39) - CHUNK, mapped=False),
    ]
    assert await disk.extents(3 * CHUNK + 512, 1024) == [Extent(3 * CHUNK + 512, 1024, mapped=True)]
    assert await disk.extents(0, 0) == []


async def test_a_range_outside_is_refused_everywhere_and_says_where():
    disk = RamDisk(4096)
    for attempt in (
        lambda: disk.readv(3584, views(bytes(1024))),
        lambda: disk.writev(3584, views(bytes(1024))),
        lambda: disk.unmap(3584, 1024),
        lambda: disk.write_zeroes(3584, 1024),
        lambda: disk.extents(3584, 1024),
    ):
        with pytest.raises(OutOfRangeError) as caught:
            await attempt()
        assert caught.value.offset == 4096
    with pytest.raises(OutOfRangeError) as caught:
        disk.try_readv(8192, views(bytes(512)))
    assert caught.value.offset == 8192


async def test_shrinking_frees_and_growing_again_shows_zeros():
    disk = RamDisk(4 * CHUNK)
    disk.try_writev(0, views(b"x" * (4 * CHUNK)))
    await disk.resize(2 * CHUNK)
    assert disk.allocated == 2 * CHUNK
    await disk.resize(4 * CHUNK)
    assert read(disk, 2 * CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
    for size in (0, 100, -512):
        with pytest.raises(ConfigError, match="not a positive number"):
            await disk.resize(size)
    with pytest.raises(ConfigError, match="is larger than"):
        await disk.resize(MAX_SIZE + 512)
    assert disk.info.size == 4 * CHUNK


async def test_running_out_of_memory_is_no_space(monkeypatch):
    disk = RamDisk(1 << 20)

    def none_left(*_args, **_options):
        raise OSError(errno.ENOMEM, "none left")

    with monkeypatch.context() as patch:
        patch.setattr("mmap.mmap", none_left)
        with pytest.raises(NoSpaceError) as caught:
            disk.try_writev(CHUNK, [memoryview(bytes(512))])
    assert caught.value.offset == CHUNK
    assert disk.try_writev(CHUNK, [memoryview(bytes(512))])


async def test_a_closed_disk_frees_its_memory_and_is_unavailable():
    disk = RamDisk(1 << 20)
    disk.try_writev(0, views(b"x" * 512))
    await disk.aclose()
    assert disk.allocated == 0
    for attempt in (disk.try_readv, disk.try_writev):
        with pytest.raises(DiskUnavailableError):
            attempt(0, views(bytes(512)))
    with pytest.raises(DiskUnavailableError):
        await disk.flush()


@pytest.mark.parametrize(
    ("options", "sectors"),
    [("sector=512", (512, 4096)), ("sector=4096", (4096, 4096)), ("physical=512", (512, 512))],
)
async def test_sectors_are_what_was_asked_for(options, sectors):
    disk = await open_disk(f"ram:[{options}]1M")
    assert (disk.info.sector_size, disk.info.physical_sector_size) == sectors
    await disk.aclose()


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("ram:", "'ram:': needs a size, as in ram:64M"),
        ("ram:x", "ram:x: 'x' is not a size"),
        ("ram:0", "disk of 0 bytes"),
        ("ram:1000", "512-byte sectors"),
        ("ram:[sector=4096]2K", "4096-byte sectors"),
        ("ram:[sector=1024]1M", "it can be 512 or 4096"),
        ("ram:[sector=4096,physical=512]1M", "physical=512 is smaller"),
        ("ram:[ro]1M", "unknown option 'ro'"),
    ],
)
async def test_specifications_that_cannot_be_honoured_are_refused(spec, hint):
    with pytest.raises(ConfigError) as caught:
        await open_disk(spec)
    assert hint in str(caught.value)
    assert spec in str(caught.value)

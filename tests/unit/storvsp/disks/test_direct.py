"""Disks that go around the page cache."""

import errno
import os

import pytest

from storvsp.disk import MediumError, OutOfRangeError
from storvsp.disks.raw import RawDisk
from tests.support.disks import MIB, SECTOR, views
from vmbus.errors import ConfigError


async def test_direct_transfers_of_any_alignment_arrive(image):
    content = image.read_bytes()
    disk = await RawDisk.open(image, direct=True)
    assert not disk.try_readv(0, views(bytes(4096)))
    buffers = views(bytes(1), bytes(510), bytes(1 << 19), bytes(1))
    await disk.readv(SECTOR, buffers)
    assert b"".join(buffers) == content[SECTOR : 2 * SECTOR + (1 << 19)]
    await disk.writev(0, buffers, fua=True)
    big = views(bytes(3), b"e" * (MIB - 3))
    await disk.readv(0, big)
    assert b"".join(big) == b"".join(buffers) + content[SECTOR + (1 << 19) :]
    await disk.aclose()


async def test_direct_transfers_larger_than_the_bounce_buffer_arrive(tmp_path):
    path = tmp_path / "large.img"
    path.write_bytes(content := os.urandom(3 * MIB))
    disk = await RawDisk.open(path, direct=True)
    buffers = views(bytes(5), bytes(3 * MIB - 5))
    await disk.readv(0, buffers)
    assert b"".join(buffers) == content
    for buffer in buffers:
        buffer[:] = bytes(reversed(bytes(buffer)))
    await disk.writev(0, buffers)
    await disk.aclose()
    assert path.read_bytes() == b"".join(buffers)


async def test_direct_transfers_report_errors_and_the_end_of_the_file(image, monkeypatch):
    disk = await RawDisk.open(image, direct=True)
    os.truncate(image, MIB // 2)
    with pytest.raises(OutOfRangeError):
        await disk.readv(MIB // 2 - SECTOR, views(bytes(3), bytes(1021)))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    for attempt in (disk.readv, disk.writev):
        with pytest.raises(MediumError):
            await attempt(0, views(bytes(SECTOR)))
    await disk.aclose()


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.EINVAL, "use sector=4096"), (errno.EIO, "Input/output error")]
)
async def test_direct_io_is_tried_before_it_is_promised(image, monkeypatch, code, hint):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(ConfigError, match=hint):
        await RawDisk.open(image, direct=True)

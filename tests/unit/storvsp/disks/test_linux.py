"""What the kernel says of holes and of block devices, and its refusals."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from storvsp.disk import Extent
from storvsp.disks import linux
from storvsp.disks.raw import RawDisk
from tests.support.disks import MIB, SECTOR, views
from vmbus.errors import ConfigError


def test_holes_of_a_range_cover_it_exactly(tmp_path):
    path = tmp_path / "holes.img"
    with path.open("wb") as file:
        file.truncate(MIB)
        for offset in (0, 256 << 10):
            file.seek(offset)
            file.write(b"d" * (64 << 10))
    fd = os.open(path, os.O_RDONLY)
    k = 1 << 10
    assert linux.holes(fd, 0, MIB, 99) == [
        (0, 64 * k, True),
        (64 * k, 192 * k, False),
        (256 * k, 64 * k, True),
        (320 * k, 704 * k, False),
    ]
    assert linux.holes(fd, 128 * k, 160 * k, 99) == [
        (128 * k, 128 * k, False),
        (256 * k, 32 * k, True),
    ]
    assert linux.holes(fd, 0, 0, 99) == []
    assert linux.holes(fd, 0, MIB, 1) == [(0, 64 * k, True)]
    assert linux.holes(fd, 64 * k, MIB, 1) == [(64 * k, 192 * k, False), (256 * k, 64 * k, True)]
    os.close(fd)


def test_the_kernel_s_refusals_carry_their_error_number():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        linux.fallocate(-1, 0, 0, 1)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.in_memory(-1)


@pytest.fixture
def loop_device(tmp_path):
    image = tmp_path / "loop.img"
    with image.open("wb") as file:
        file.truncate(4 * MIB)
    try:
        device = subprocess.run(
            ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices: {error}")
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
async def test_a_block_device_is_described_by_the_kernel(loop_device, tmp_path):
    disk = await RawDisk.open(loop_device)
    info = disk.info
    assert (info.size, info.sector_size) == (4 * MIB, 512)
    # Discards are a property of the loop device, and stay switched off where they once were.
    discards = Path("/sys/block", Path(loop_device).name, "queue/discard_max_bytes").read_text()
    assert info.supports_unmap == (int(discards) > 0)
    assert not info.unmapped_reads_zero
    assert info.unmap_granularity >= 512 or not info.supports_unmap
    await disk.writev(0, views(b"b" * MIB))
    await disk.unmap(0, SECTOR * 128)
    await disk.write_zeroes(SECTOR * 128, SECTOR)
    buffers = views(bytes(2 * SECTOR))
    await disk.readv(SECTOR * 128, buffers)
    assert bytes(buffers[0]) == bytes(SECTOR) + b"b" * SECTOR
    assert await disk.extents(0, MIB) == [Extent(0, MIB, mapped=True)]
    with pytest.raises(ConfigError, match="block device cannot be resized"):
        await disk.resize(8 * MIB)
    with pytest.raises(ConfigError, match="in use"):
        await RawDisk.open(loop_device)
    os.truncate(tmp_path / "loop.img", 2 * MIB)
    subprocess.run(["losetup", "--set-capacity", loop_device], check=True)
    assert disk.check_resize()
    assert disk.info.size == 2 * MIB
    await disk.aclose()


@pytest.mark.root
async def test_a_block_device_outside_sysfs_has_cautious_properties(loop_device, monkeypatch):
    monkeypatch.setattr(os, "major", lambda _: 999999)
    disk = await RawDisk.open(loop_device)
    assert not disk.info.supports_unmap
    assert not disk.info.rotational
    await disk.aclose()

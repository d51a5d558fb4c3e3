"""Slow disks."""

import pytest
import trio

from storvsp.disk import DiskUnavailableError, Extent
from storvsp.disks.delay import DelayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import open_disk
from tests.support.disks import SECTOR, full, views
from vmbus.errors import ConfigError


async def took(awaitable):
    start = trio.current_time()
    await awaitable
    return round(trio.current_time() - start, 6)


async def test_each_operation_takes_its_own_time_longer(autojump_clock):
    disk = DelayDisk(full(), read=0.001, write=0.002, flush=0.003, unmap=0.004)
    buffers = views(bytes(SECTOR))
    assert not disk.try_readv(0, buffers)
    assert not disk.try_writev(0, buffers)
    assert await took(disk.readv(0, buffers)) == 0.001
    assert bytes(buffers[0]) == b"d" * SECTOR
    assert await took(disk.writev(0, views(b"w" * SECTOR), fua=True)) == 0.002
    assert await took(disk.write_zeroes(SECTOR, SECTOR)) == 0.002
    assert await took(disk.flush()) == 0.003
    assert await took(disk.unmap(2 * SECTOR, SECTOR)) == 0.004
    assert await took(disk.extents(0, SECTOR)) == 0
    await disk.readv(0, buffers)
    assert bytes(buffers[0]) == b"w" * SECTOR


async def test_delayed_requests_wait_together(autojump_clock):
    disk = DelayDisk(full(), read=0.5)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(disk.readv, 0, views(bytes(SECTOR)))
    assert trio.current_time() - start == pytest.approx(0.5)


async def test_operations_without_a_delay_keep_their_fast_form():
    disk = await open_disk("delay:[write=1s]ram:1M")
    assert isinstance(disk, DelayDisk)
    assert disk.write_delay == 1.0
    assert disk.try_readv(0, views(bytes(SECTOR)))
    assert not disk.try_writev(0, views(bytes(SECTOR)))
    assert await disk.extents(0, SECTOR) == [Extent(0, SECTOR, mapped=False)]
    disk.write_delay = 0
    assert disk.try_writev(0, views(bytes(SECTOR)))
    sizes = []
    disk.watch(lambda: sizes.append(disk.info.size))
    assert isinstance(disk.base, RamDisk)
    await disk.base.resize(SECTOR)
    assert sizes == [SECTOR]
    await disk.aclose()
    with pytest.raises(DiskUnavailableError):
        disk.base.try_readv(0, views(bytes(SECTOR)))


@pytest.mark.parametrize("spec", ["delay:[read=1]ram:1M", "delay:[raed=1ms]ram:1M"])
async def test_delays_need_a_unit_and_a_known_name(spec):
    with pytest.raises(ConfigError, match="option 'r"):
        await open_disk(spec)

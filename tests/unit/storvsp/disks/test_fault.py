"""Failing disks."""

import pytest
import trio

from storvsp.disk import DiskUnavailableError, MediumError, NoSpaceError, ReadOnlyError
from storvsp.disks.fault import Fault, FaultDisk, FaultKind, Operation
from storvsp.disks.specs import open_disk
from tests.support.disks import SECTOR, full, views
from vmbus.errors import ConfigError


async def request(disk, operation, offset, length, data=b"n"):
    if operation is Operation.READ:
        await disk.readv(offset, views(bytes(length)))
    elif operation is Operation.WRITE:
        await disk.writev(offset, views(data * length))
    elif operation is Operation.FLUSH:
        await disk.flush()
    else:
        await disk.unmap(offset, length)


@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FaultKind.MEDIUM, MediumError),
        (FaultKind.READONLY, ReadOnlyError),
        (FaultKind.NOSPACE, NoSpaceError),
        (FaultKind.UNAVAILABLE, DiskUnavailableError),
        (FaultKind.SHORT, MediumError),
    ],
)
async def test_each_kind_hits_the_operation_it_is_for_and_no_other(operation, kind, error):
    disk = FaultDisk(full())
    fault = disk.inject(Fault(kind, on=operation))
    with pytest.raises(error, match=kind.value):
        await request(disk, operation, 0, 4 * SECTOR)
    for other in Operation:
        if other is not operation:
            await request(disk, other, 0, 4 * SECTOR)
    assert fault.hits == 1
    disk.remove(fault)
    await request(disk, operation, 0, 4 * SECTOR)


async def test_only_requests_that_touch_the_sectors_fail_and_the_error_names_the_first():
    disk = FaultDisk(full(), Fault(first=10, last=12))
    for offset, length in [(0, 10), (13, 5)]:
        buffers = views(bytes(length * SECTOR))
        assert disk.try_readv(offset * SECTOR, buffers)
        await disk.readv(offset * SECTOR, buffers)
        assert disk.try_writev(offset * SECTOR, buffers)
        await disk.writev(offset * SECTOR, buffers)
    for offset, length, failing in [(0, 11, 10), (12, 1, 12), (11, 9, 11), (5, 20, 10)]:
        buffers = views(b"b" * (length * SECTOR))
        assert not disk.try_readv(offset * SECTOR, buffers)
        assert not disk.try_writev(offset * SECTOR, buffers)
        for attempt in (disk.readv, disk.writev):
            with pytest.raises(MediumError) as caught:
                await attempt(offset * SECTOR, buffers)
            assert caught.value.offset == failing * SECTOR
        assert bytes(buffers[0]) == b"b" * (length * SECTOR)
    with pytest.raises(MediumError):
        await disk.write_zeroes(10 * SECTOR, SECTOR)
    check = views(bytes(3 * SECTOR))
    disk.base.try_readv(10 * SECTOR, check)
    assert bytes(check[0]) == b"d" * (3 * SECTOR)
    await disk.readv(0, [])  # touches no sector


async def test_short_transfers_stop_at_the_sector_and_report_it():
    base = full()
    disk = FaultDisk(base, Fault(FaultKind.SHORT, on=Operation.WRITE, first=4))
    with pytest.raises(MediumError) as caught:
        await disk.writev(2 * SECTOR, views(b"n" * (6 * SECTOR)))
    assert caught.value.offset == 4 * SECTOR
    check = views(bytes(8 * SECTOR))
    base.try_readv(0, check)
    assert bytes(check[0]) == b"d" * 2 * SECTOR + b"n" * 2 * SECTOR + b"d" * 4 * SECTOR


async def test_short_transfers_that_begin_at_the_sector_stop_half_way():
    disk = FaultDisk(full(), Fault(FaultKind.SHORT, on=Operation.READ, first=4))
    buffers = views(bytes(SECTOR), bytes(4 * SECTOR))
    with pytest.raises(MediumError) as caught:
        await disk.readv(4 * SECTOR, buffers)
    assert caught.value.offset == 6 * SECTOR
    assert b"".join(buffers) == b"d" * 2 * SECTOR + bytes(3 * SECTOR)


async def test_short_clears_leave_the_rest():
    base = full()
    fault = Fault(FaultKind.SHORT, on=Operation.WRITE | Operation.UNMAP, first=1, last=1)
    disk = FaultDisk(base, fault)
    for attempt in (disk.write_zeroes, disk.unmap):
        base.try_writev(0, views(b"d" * (3 * SECTOR)))
        with pytest.raises(MediumError):
            await attempt(0, 3 * SECTOR)
        check = views(bytes(3 * SECTOR))
        base.try_readv(0, check)
        assert bytes(check[0]) == bytes(SECTOR) + b"d" * (2 * SECTOR)


async def test_a_count_ends_the_fault_and_gives_the_fast_form_back():
    disk = FaultDisk(full(), Fault(count=2))
    buffers = views(bytes(SECTOR))
    for _ in range(2):
        assert not disk.try_readv(0, buffers)
        with pytest.raises(MediumError):
            await disk.readv(0, buffers)
    assert disk.try_readv(0, buffers)
    await disk.readv(0, buffers)


async def test_chances_repeat_with_the_seed():
    async def outcomes(seed):
        disk = FaultDisk(full(), Fault(probability=0.5), seed=seed)
        failed = []
        for _ in range(64):
            try:
                await disk.readv(0, views(bytes(SECTOR)))
            except MediumError:
                failed.append(True)
            else:
                failed.append(False)
        return failed

    first = await outcomes(1)
    assert first == await outcomes(1)
    assert first != await outcomes(2)
    assert 0 < sum(first) < 64


async def test_hanging_requests_wait_for_release_and_are_then_carried_out():
    disk = FaultDisk(full())
    fault = disk.inject(Fault(FaultKind.HANG, on=Operation.WRITE, first=1, last=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.writev, SECTOR, views(b"1" * SECTOR))
        nursery.start_soon(disk.write_zeroes, 0, 2 * SECTOR)
        await trio.testing.wait_all_tasks_blocked()
        assert (fault.waiting, fault.hits) == (2, 2)
        await disk.writev(2 * SECTOR, views(b"2" * SECTOR))
        fault.release()
    assert fault.waiting == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.writev, SECTOR, views(b"1" * SECTOR))
        await trio.testing.wait_all_tasks_blocked()
        assert fault.waiting == 1
        disk.remove(fault)
    buffers = views(bytes(3 * SECTOR))
    await disk.readv(0, buffers)
    assert bytes(buffers[0]) == bytes(SECTOR) + b"1" * SECTOR + b"2" * SECTOR


async def test_a_hanging_request_can_be_cancelled():
    fault = Fault(FaultKind.HANG)
    disk = FaultDisk(full(), fault)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.readv, 0, views(bytes(SECTOR)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert fault.waiting == 0


async def test_a_fault_can_be_described_on_the_command_line():
    disk = await open_disk(
        "fault:[lba=100-103,on=read+flush,error=unavailable,count=1,probability=0.5,seed=7]ram:1M"
    )
    assert isinstance(disk, FaultDisk)
    (fault,) = disk.faults
    assert (fault.kind, fault.on) == (FaultKind.UNAVAILABLE, Operation.READ | Operation.FLUSH)
    assert (fault.first, fault.last, fault.count, fault.probability) == (100, 103, 1, 0.5)
    await disk.aclose()
    disk = await open_disk("fault:[lba=3]ram:1M")
    assert isinstance(disk, FaultDisk)
    (fault,) = disk.faults
    assert (fault.kind, fault.on) == (FaultKind.MEDIUM, Operation.READ | Operation.WRITE)
    assert (fault.first, fault.last, fault.count, fault.probability) == (3, 3, None, 1.0)
    await disk.aclose()
    disk = await open_disk("fault:ram:1M")
    with pytest.raises(MediumError):
        await disk.readv(0, views(bytes(SECTOR)))
    await disk.aclose()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("lba=x", "neither a sector nor a range"),
        ("lba=1-", "neither a sector nor a range"),
        ("lba=-1", "neither a sector nor a range"),
        ("lba=5-3", "ends before it begins"),
        ("on=reed", "on=reed is not one of read, write, flush, unmap"),
        ("on=read+", "on= is not one of"),
        ("error=mediun", "did you mean 'medium'"),
        ("count=-1", "not a whole number"),
        ("probability=2", "from 0 to 1"),
        ("kind=medium", "unknown option 'kind'"),
    ],
)
async def test_faults_that_make_no_sense_are_refused(options, hint):
    with pytest.raises(ConfigError) as caught:
        await open_disk(f"fault:[{options}]ram:1M")
    assert hint in str(caught.value)

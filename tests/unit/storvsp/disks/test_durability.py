"""A flush that failed is never followed by one that succeeds: the kernel tells of a loss once."""

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from storvsp.disk import MediumError, NoSpaceError
from storvsp.disks import linux
from storvsp.disks.durability import Durability
from storvsp.disks.linux import SyncError
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk

DATA = [memoryview(bytes(4096))]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


class Kernel:
    """How calls of the kernel are to fail: an errno, or 0, for each in turn."""

    def __init__(self) -> None:
        self.syncs: list[int] = []
        self.durable_writes: list[int] = []
        self.plain_writes: list[int] = []

    def fdatasync(self, fd):
        answer(self.syncs)

    def pwritev(self, fd, buffers, offset, flags=0):
        answer(self.durable_writes if flags & os.RWF_DSYNC else self.plain_writes)
        return sum(map(len, buffers))


def answer(left: list[int]) -> None:
    if left and (number := left.pop(0)):
        raise OSError(number, os.strerror(number))


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    monkeypatch.setattr(os, "fdatasync", made.fdatasync)
    monkeypatch.setattr(os, "pwritev", made.pwritev)
    return made


async def test_after_a_failed_flush_neither_flush_nor_fua_succeeds_until_the_disk_is_opened_anew(
    image, kernel
):
    disk = await RawDisk.open(image)
    await disk.flush()
    kernel.syncs = [errno.EIO]
    with pytest.raises(MediumError, match="flush failed: Input/output error"):
        await disk.flush()
    for _ in range(3):
        with pytest.raises(MediumError, match="has to be opened anew"):
            await disk.flush()
        with pytest.raises(MediumError, match="has to be opened anew"):
            await disk.writev(0, DATA, fua=True)
    await disk.writev(0, DATA)  # promises nothing
    await disk.aclose()
    disk = await RawDisk.open(image)
    await disk.flush()
    await disk.writev(0, DATA, fua=True)
    await disk.aclose()


async def test_a_failed_fua_write_is_a_failed_flush(image, kernel):
    disk = await RawDisk.open(image)
    kernel.durable_writes = [errno.EIO]
    with pytest.raises(MediumError, match="write failed: Input/output error"):
        await disk.writev(0, DATA, fua=True)
    with pytest.raises(MediumError, match="has to be opened anew"):
        await disk.flush()
    await disk.aclose()


async def test_a_write_that_found_no_room_has_lost_nothing(image, kernel):
    """The full file system may have room again later; what was written before is not in doubt."""
    disk = await RawDisk.open(image)
    kernel.durable_writes, kernel.plain_writes = [errno.ENOSPC], [errno.ENOSPC]
    with pytest.raises(NoSpaceError):
        await disk.writev(0, DATA, fua=True)
    await disk.flush()
    await disk.writev(0, DATA, fua=True)
    await disk.aclose()


async def test_no_room_that_shows_when_data_is_made_to_last_is_a_loss(image, kernel):
    """File systems that allocate late report it there."""
    disk = await RawDisk.open(image)
    kernel.syncs = [errno.ENOSPC]
    with pytest.raises(NoSpaceError):
        await disk.flush()
    with pytest.raises(MediumError, match="No space left on device"):
        await disk.flush()
    await disk.aclose()


async def test_an_overlay_promises_what_its_scratch_can(image, kernel):
    disk = OverlayDisk(RamDisk(1 << 20), await RawDisk.open(image))
    kernel.syncs = [errno.EIO]
    for _ in range(2):
        with pytest.raises(MediumError):
            await disk.flush()
        with pytest.raises(MediumError):
            await disk.writev(0, DATA, fua=True)
    await disk.aclose()


async def test_the_page_cache_is_no_matter_of_direct_io(kernel):
    durability = Durability(cached=False)

    async def fail() -> None:
        raise SyncError(errno.EIO, "Input/output error")

    async def work() -> str:
        return "done"

    with pytest.raises(SyncError):
        await durability.promise(fail)
    assert await durability.promise(work) == "done"


async def test_a_success_counts_when_those_beside_it_have_ended_well():
    """The kernel tells one of two flushes that run side by side, and it may be the other one."""
    durability = Durability(cached=True)
    go = {name: trio.Event() for name in ("good", "bad")}
    outcomes: dict[str, object] = {}

    async def make(name: str) -> str:
        await go[name].wait()
        if name == "bad":
            raise SyncError(errno.EIO, "Input/output error")
        return name

    async def promise(name: str) -> None:
        try:
            outcomes[name] = await durability.promise(lambda: make(name))
        except (SyncError, MediumError) as error:
            outcomes[name] = type(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(promise, "bad")
        nursery.start_soon(promise, "good")
        await trio.testing.wait_all_tasks_blocked()
        go["good"].set()
        await trio.testing.wait_all_tasks_blocked()
        assert outcomes == {}, "nobody knows yet whom the kernel tells"
        go["bad"].set()
    assert outcomes == {"good": MediumError, "bad": SyncError}


async def test_one_that_begins_later_is_not_waited_for():
    durability = Durability(cached=True)
    never = trio.Event()

    async def first() -> str:
        nursery.start_soon(durability.promise, never.wait)
        return "first"

    async with trio.open_nursery() as nursery:
        assert await durability.promise(first) == "first"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("plain", [[], [errno.EIO], [errno.EROFS]], ids=str)
def test_a_failed_promise_is_one_whatever_a_second_write_says(image, kernel, plain):
    """The first call may have had the kernel's only report: ext4 goes read-only after it."""
    fd = os.open(image, os.O_RDWR)
    kernel.durable_writes, kernel.plain_writes = [errno.EIO], list(plain)
    with pytest.raises(SyncError):
        linux.write_fully(fd, DATA, 0, True)
    os.close(fd)


def test_a_write_that_had_no_room_is_told_from_one_that_does_not_last(image, kernel):
    fd = os.open(image, os.O_RDWR)
    kernel.durable_writes, kernel.plain_writes = [errno.ENOSPC], [errno.ENOSPC]
    with pytest.raises(OSError, match="No space left") as caught:
        linux.write_fully(fd, DATA, 0, True)
    assert not isinstance(caught.value, SyncError)
    kernel.durable_writes, kernel.plain_writes = [errno.ENOSPC], []
    with pytest.raises(SyncError):
        linux.write_fully(fd, DATA, 0, True)
    os.close(fd)


async def test_promises_that_end_out_of_order_are_told_in_time():
    durability = Durability(cached=True)
    gates = [trio.Event() for _ in range(5)]
    told: list[int] = []

    async def promise(index: int) -> None:
        await durability.promise(gates[index].wait)
        told.append(index)

    async with trio.open_nursery() as nursery:
        for index in range(5):
            nursery.start_soon(promise, index)
        await trio.testing.wait_all_tasks_blocked()
        for index, expected in ((4, []), (2, []), (0, []), (1, []), (3, [0, 1, 2, 3, 4])):
            gates[index].set()
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(told) == expected
    assert not durability._waiting
    assert not durability._under_way

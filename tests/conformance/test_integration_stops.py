"""How long a guest's commands may hold up its pause, its reset and its end: not at all, or so long.

Where something does not come back, the bounds are 0 s: what has not ended by then is late.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import uuid
from collections.abc import Iterator
from functools import partial

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disk import Buffers
from storvsp.disks import linux
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk, _close_late
from tests.support.patience import PATIENCE, until
from tests.support.shared import kept, visitor
from tests.support.worlds import World, first_disk, read_10, world
from vmbus.errors import ConfigError, NotBackError
from vmbus.guest import LINUX_6_1
from vmbus.host import BusConfig
from vmbus.partition.events import Once, PartitionPaused, PartitionReset
from vmbus.workers import abandoned, shared_pool

AT_ONCE = BusConfig(pause_grace=0.0, close_grace=0.0, fence_grace=0.0)
VERIFY_1_TIB = struct.pack(">BBQIBB", 0x8F, 0, 0, 0x7FFFFFFF, 0, 0)


class CountingDisk(RamDisk):
    """Counts its reads, and lets others run; each takes ``slow`` seconds."""

    reads = 0
    slow = 0.0

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.reads += 1
        await trio.sleep(self.slow)
        await super().readv(offset, buffers)


class HungDisk(RamDisk):
    """Reads wait in worker threads, which nothing can interrupt."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.go = threading.Event()
        self.pool = shared_pool()
        self.begun = 0
        self.closed = False

    @contextlib.contextmanager
    def let_go_at_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.go.set()

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        def work() -> None:
            self.begun += 1
            assert self.go.wait(PATIENCE)
            for buffer in buffers:
                buffer[:] = b"x" * len(buffer)

        await self.pool.run(work)

    async def aclose(self) -> None:
        await self.pool.aclose()
        await super().aclose()
        self.closed = True


async def turns(count: int = 200) -> None:
    """Give everybody time to do what they must not do."""
    for _ in range(count):
        await trio.sleep(0)


async def ask(there: World, kind: type, answers: list[str]) -> None:
    """Have the partition ask for a pause or a reset, as one that takes a failure for an answer."""
    done = Once(lambda: answers.append("done"))
    with there.transport._lock:
        there.transport._events.append(kind(done, answers.append))
    there.transport._arrived()
    await until(lambda: answers)


def make(*disks: RamDisk) -> ScsiController:
    made = ScsiController(instance_id=uuid.UUID(int=0xC0DE0009))
    for disk in disks:
        made.add_disk(disk)
    return made


async def settled(adapter, lun: int = 0) -> None:
    """Let the guest hear what news there is of a unit."""
    for _ in range(4):
        await adapter.execute(bytes(6), lun=lun)


async def lose(adapter, cdb: bytes) -> None:
    """Have a command under way that the end of its channel ends."""
    with pytest.raises(trio.BrokenResourceError):
        await adapter.execute(cdb, read=512 if cdb[0] == 0x28 else 0)


async def test_a_pause_does_not_wait_for_a_long_command_which_stands_still_and_goes_on():
    disk = CountingDisk(1 << 40)
    async with world(make(disk)) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest, sub_channels=0)
        async with trio.open_nursery() as nursery:
            for _ in range(12):  # more than work in the host's memory at a time
                nursery.start_soon(adapter.execute, VERIFY_1_TIB)
            await until(lambda: disk.reads > 20)
            answers: list[str] = []
            await ask(there, PartitionPaused, answers)
            assert answers == ["done"]
            reads = disk.reads
            await turns()
            assert disk.reads == reads, "the disk is left alone while the guest is paused"
            there.bus._resume()
            await until(lambda: disk.reads > reads + 20)
            answers = []
            await ask(there, PartitionReset, answers)
            assert answers == ["done"], "nobody waits for them any more, so they end"
            reads = disk.reads
            await turns()
            assert disk.reads == reads
            nursery.cancel_scope.cancel()


async def test_a_pause_stops_a_long_command_of_a_shared_disk_where_it_is_kept():
    disk = CountingDisk(1 << 40)
    async with kept(disk) as keeper, visitor(keeper, "a") as unit:
        made = make()
        made.add_unit(unit, lun=0)
        async with world(made) as there, there.boot(LINUX_6_1) as guest:
            adapter, _ = await first_disk(guest, sub_channels=0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adapter.execute, VERIFY_1_TIB)
                await until(lambda: disk.reads > 20)
                answers: list[str] = []
                await ask(there, PartitionPaused, answers)
                assert answers == ["done"]
                reads = disk.reads
                await turns()
                assert disk.reads == reads
                there.bus._resume()
                await until(lambda: disk.reads > reads + 20)
                answers = []
                await ask(there, PartitionReset, answers)
                assert answers == ["done"], "it ends, and is not waited for"
                assert not keeper.keeper.unit.busy
                nursery.cancel_scope.cancel()


async def test_a_pause_fails_in_time_and_names_what_does_not_come_back_and_the_guest_goes_on(
    caplog,
):
    disk = HungDisk(1 << 20)
    with disk.let_go_at_the_end():
        async with (
            world(make(RamDisk(1 << 20), disk), config=AT_ONCE) as there,
            there.boot(LINUX_6_1) as guest,
        ):
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter, 1)
            results = []

            async def read() -> None:
                results.append(await adapter.execute(read_10(0, 1), read=512, lun=1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await until(lambda: disk.begun)
                answers: list[str] = []
                await ask(there, PartitionPaused, answers)
                assert answers == ["disk 0:0:1 (HungDisk): READ(10): not back in 0 s"]
                assert answers[0] in caplog.text
                assert not there.bus.paused
                result = await adapter.execute(read_10(0, 1), read=512, lun=0)
                assert result.good
                assert not results
                disk.go.set()
            assert results[0].data == b"x" * 512
            answers = []
            await ask(there, PartitionPaused, answers)
            assert answers == ["done"]
            there.bus._resume()


async def test_a_pause_waits_for_commands_of_units_that_know_no_pace():
    """Those that are served elsewhere, or by somebody else's code, may write memory at any time."""
    disk = CountingDisk(1 << 40)
    made = make(disk)
    made.units.by_address[0, 0, 0].paced = False
    async with world(made, config=AT_ONCE) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest, sub_channels=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.execute, VERIFY_1_TIB)
            await until(lambda: disk.reads > 20)
            answers: list[str] = []
            await ask(there, PartitionPaused, answers)
            assert answers == ["disk 0:0:0 (CountingDisk): VERIFY(16): not back in 0 s"]
            nursery.cancel_scope.cancel()


async def test_a_reset_fails_in_time_and_succeeds_when_all_has_come_back():
    disk = HungDisk(1 << 20)
    with disk.let_go_at_the_end():
        async with world(make(disk), config=AT_ONCE) as there, there.boot(LINUX_6_1) as guest:
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(adapter.execute, read_10(0, 1), read=512))
                await until(lambda: disk.begun)
                for _ in range(2):
                    answers: list[str] = []
                    await ask(there, PartitionReset, answers)
                    assert answers == ["disk 0:0:0 (HungDisk): READ(10): not back in 0 s"]
                disk.go.set()
                await until(lambda: not there.bus.runners)
                answers = []
                await ask(there, PartitionReset, answers)
                assert answers == ["done"]
                nursery.cancel_scope.cancel()


async def test_a_bus_ends_in_time_and_what_does_not_come_back_keeps_what_it_uses(
    tmp_path, monkeypatch, caplog
):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    go, begun = threading.Event(), threading.Event()
    real = linux.read_fully

    def hang(fd, buffers, offset):
        begun.set()
        assert go.wait(PATIENCE)
        return real(fd, buffers, offset)

    disk = await RawDisk.open(image)
    monkeypatch.setattr(disk, "_read_flags", None)  # nothing is at hand
    monkeypatch.setattr(linux, "read_fully", hang)
    made = ScsiController(instance_id=uuid.UUID(int=0xC0DE0009))
    made.add_disk(disk, source="raw:disk.img")
    keeper = shared_pool()
    try:
        async with world(made, config=AT_ONCE) as there, there.boot(LINUX_6_1) as guest:
            memory = there.machine.memory
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(adapter.execute, read_10(0, 1), read=512))
                await until(begun.is_set)
                await there.bus.aclose()
                nursery.cancel_scope.cancel()
            assert abandoned(memory) == 1
            lines = [each for each in caplog.records if each.levelno >= logging.ERROR]
            assert [each.getMessage().partition(": ")[2] for each in lines] == [
                "closing goes on without what is under way: "
                "disk 0:0:0 (raw:disk.img): READ(10): not back in 0 s"
            ]
            with pytest.raises(ConfigError, match="in use"):
                await RawDisk.open(image)
            go.set()
            await until(lambda: not disk._workers.away)
            assert not abandoned(memory)
            monkeypatch.undo()
            again = await RawDisk.open(image)
            await again.aclose()
    finally:
        go.set()
        await keeper.aclose()


async def test_a_file_that_cannot_be_closed_late_is_a_line_in_the_log(caplog):
    fd = os.open("/dev/null", os.O_RDWR)
    os.close(fd)
    _close_late(fd)
    assert "could not be closed: " in caplog.text


async def test_a_removed_disk_that_hangs_is_named_in_time_and_closed_when_it_is_back(
    autojump_clock, caplog
):
    disk = HungDisk(1 << 20)
    store = make(RamDisk(1 << 20), disk)
    with disk.let_go_at_the_end():
        async with world(store) as there, there.boot(LINUX_6_1) as guest:
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter, 1)
            results = []

            async def read() -> None:
                results.append(await adapter.execute(read_10(0, 1), read=512, lun=1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await until(lambda: disk.begun)
                begun = trio.current_time()
                late = "disk 0:0:1 (HungDisk): READ(10): not back in 10 s"
                with pytest.raises(NotBackError) as caught:
                    await store.remove_disk((0, 0, 1))
                assert str(caught.value).startswith(late + "; it is taken away, and closed when")
                assert late in caplog.text
                assert trio.current_time() - begun == pytest.approx(10, abs=0.5)
                assert not disk.closed
                assert not results, "its thread may write to the guest's memory still"
                assert [each["address"] for each in store.snapshot()["units"]] == ["0:0:0"]
                await settled(adapter)
                assert (await adapter.execute(read_10(0, 1), read=512, lun=0)).good
                disk.go.set()
                await until(lambda: disk.closed)
            assert results[0].data == b"x" * 512, "it has its own outcome"
            assert store.units.disk((0, 0, 1)) is None


async def test_a_controller_whose_disk_hangs_stays_and_serves_on_and_can_be_removed_later(
    autojump_clock, caplog
):
    disk = HungDisk(1 << 20)
    with disk.let_go_at_the_end():
        async with (
            world(make(RamDisk(1 << 40), disk)) as there,
            there.boot(LINUX_6_1) as guest,
        ):
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter, 1)
            results = []

            async def read() -> None:
                results.append(await adapter.execute(read_10(0, 1), read=512, lun=1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await until(lambda: disk.begun)
                for _ in range(2):
                    late = "disk 0:0:1 (HungDisk): READ(10): not back in 10 s"
                    with pytest.raises(NotBackError) as caught:
                        await there.bus.remove_device(1)
                    assert str(caught.value) == late
                    assert late in caplog.text
                    assert list(there.bus.devices) == [1]
                    assert (await adapter.execute(read_10(0, 1), read=512, lun=0)).good
                assert not results
                assert not disk.closed
                disk.go.set()
                await until(lambda: results)
            assert results[0].data == b"x" * 512, "the guest has its answer before the removal"
            await there.bus.remove_device(1)
            assert disk.closed
            assert there.bus.devices == {}
            await guest.connection.wait_gone(adapter.offer.relid)


async def test_a_long_command_does_not_keep_a_controller_on_the_bus(autojump_clock):
    disk = CountingDisk(1 << 40)
    async with world(make(disk)) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest, sub_channels=0)
        disk.slow = 0.1  # with a loop that is never idle, this clock stands still
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose, adapter, VERIFY_1_TIB)
            await until(lambda: disk.reads > 20)
            await there.bus.remove_device(1)
            assert there.bus.devices == {}


async def test_a_guest_that_closes_its_channel_hears_of_the_end_when_it_is_one_and_the_log_before(
    autojump_clock, caplog
):
    disk = HungDisk(1 << 20)
    with disk.let_go_at_the_end():
        async with world(make(disk)) as there, there.boot(LINUX_6_1) as guest:
            adapter, _ = await first_disk(guest, sub_channels=0)
            await settled(adapter)
            gone = trio.Event()

            async def unload() -> None:
                await guest.connection.unload()
                gone.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lose, adapter, read_10(0, 1))
                await until(lambda: disk.begun)
                async with trio.open_nursery() as unloading:
                    unloading.start_soon(unload)
                    late = "disk 0:0:0 (HungDisk): READ(10): not back in 10 s"
                    await until(lambda: f"waits for the end of a channel: {late}" in caplog.text)
                    assert not gone.is_set()
                    disk.go.set()
                    await until(gone.is_set)
                nursery.cancel_scope.cancel()

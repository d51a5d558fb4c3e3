"""A disk that two guests have: one unit, wherever they are."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disk import MediumError, NoSpaceError
from storvsp.scsi.sense import REPORTED_LUNS_DATA_HAS_CHANGED
from storvsp.scsi.unit import TASK_ABORTED
from storvsp.shared.messages import Kind
from tests.support.patience import until, waits
from tests.support.scsi import MemoryDisk, finish, make_command, run
from tests.support.shared import kept, visitor

READ = "28 00 00000000 00 0001 00"
WRITE = "2a 00 00000000 00 0001 00"
READY = "00 00 00 00 00 00"


def reservation(action: int, key: int, new: int = 0, *, kind: int = 0) -> dict[str, Any]:
    """PERSISTENT RESERVE OUT, SPC-4 6.16."""
    parameters = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)
    cdb = bytes.fromhex(f"5f {action:02x} {kind:02x} 00 00 00 00 00 18 00")
    return {"cdb": cdb, "out": parameters}


async def settled(unit) -> None:
    """Take the unit attentions that a guest gets first."""
    while (await run(unit, READY)).status:
        pass


@pytest.mark.parametrize("inline", [True, False])
async def test_data_written_by_one_is_read_by_the_other(inline):
    disk = MemoryDisk()
    disk.inline = inline
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        data = bytes(range(256)) * 2
        written = await run(a, WRITE, out=data, pieces=[100, 300])
        assert (written.status, written.transferred) == (0, 512)
        read = await run(b, READ, room=512, pieces=[1, 255])
        assert (read.status, read.data) == (0, data)
        short = await run(b, READ, room=100)
        assert (short.transferred, short.data) == (100, data[:100])
        failed = await run(b, "28 00 00ffffff 00 0001 00", room=512)
        assert failed.fault == (5, 0x2100)
        assert a.describe() == {
            "size": 65536, "read_only": False, "kind": "MemoryDisk",
            "source": "x", "shared": True, "lost": False, "stopped": "", "no_space": 0,
        }  # fmt: skip


async def test_there_is_one_set_of_reservations():
    async with (
        kept(MemoryDisk()) as keeper,
        visitor(keeper, "a") as a,
        visitor(keeper, "b") as b,
    ):
        for unit in (a, b):
            await settled(unit)
        assert (await run(a, **reservation(0, 0, 1))).status == 0
        assert (await run(a, **reservation(1, 1, kind=3))).status == 0  # exclusive access
        assert (await run(b, READ, room=512)).status == 0x18
        assert (await run(a, READ, room=512)).status == 0
        assert (await run(b, **reservation(0, 0, 2))).status == 0
        assert (await run(b, **reservation(4, 2, 1, kind=3))).status == 0  # PREEMPT
        assert (await run(b, READ, room=512)).status == 0
        assert (await run(a, READY)).fault == (6, 0x2A05)
        assert (await run(a, READ, room=512)).status == 0x18
    # A registration outlives the line of its guest.


async def test_a_preempted_guests_write_has_ended_when_that_is_said():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit, key in ((a, 1), (b, 2)):
            await settled(unit)
            assert (await run(unit, **reservation(0, 0, key))).status == 0
        disk.inline, disk.pause = False, trio.Event()
        outcomes = []

        async def write():
            outcomes.append((await run(a, WRITE, out=bytes(512))).status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert a.busy
            done = await run(b, **reservation(5, 2, 1, kind=3))  # PREEMPT AND ABORT
            assert done.status == 0
            await trio.testing.wait_all_tasks_blocked()
            assert outcomes == [TASK_ABORTED.status]
        assert "write" not in disk.calls


async def test_compare_and_write_is_indivisible_for_all():
    disk = MemoryDisk()
    disk.inline = False
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        wins: list[int] = []

        async def count(unit, number):
            for _ in range(20):
                old = (await run(unit, READ, room=512)).data
                new = (int.from_bytes(old, "little") + 1).to_bytes(512, "little")
                done = await run(unit, "89 00 0000000000000000 000000 01 00 00", out=old + new)
                if not done.status:
                    wins.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count, a, 1)
            nursery.start_soon(count, b, 2)
        assert int.from_bytes(disk.data[:512], "little") == len(wins) >= 20


async def test_attentions_and_lists_of_luns_are_each_guests_own():
    async with (
        kept(MemoryDisk()) as keeper,
        visitor(keeper, "a") as a,
        visitor(keeper, "b") as b,
    ):
        for unit in (a, b):
            await settled(unit)
        a.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
        await trio.testing.wait_all_tasks_blocked()
        assert (await run(b, READY)).status == 0
        assert (await run(a, READY)).fault == (6, 0x3F0E)
        luns = await run(a, "a0 00 00 00 00 00 00000100 00 00", room=256)
        assert luns.data[:4] == (16).to_bytes(4, "big")
        assert luns.data[8:].hex() == "00000000000000000003000000000000"
        assert (await run(a, "a0 00 05 00 00 00 00000100 00 00", room=256)).fault == (5, 0x2400)
        a.introduce("a", replaces=type(a))
        await trio.testing.wait_all_tasks_blocked()
        assert (await run(a, READY)).fault[0] == 6
        a.detach("a")
        a.reset()
        await a.ended()
        assert (await run(b, READY)).fault == (6, 0x2903)


async def test_a_new_size_is_news_for_all():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        disk.resize(256)
        await trio.testing.wait_all_tasks_blocked()
        assert [(unit.news, unit.info["size"]) for unit in (a, b)] == [(1, 131072)] * 2


async def test_a_cancelled_command_has_ended_at_its_keeper():
    disk = MemoryDisk()
    disk.inline, disk.pause = False, trio.Event()
    async with kept(disk) as keeper, visitor(keeper, "a") as unit:
        await settled(unit)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, unit, WRITE)
                nursery.start_soon(lambda: run(unit, WRITE, out=bytes(512)))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert not unit.busy
        assert not keeper.keeper.unit.busy
        assert "write" not in disk.calls


async def test_the_end_of_a_line_aborts_what_it_brought_and_nothing_else():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "b") as b:
        await settled(b)
        statuses = {}
        async with trio.open_nursery() as nursery:
            async with visitor(keeper, "a") as a:
                await settled(a)
                disk.inline, disk.pause = False, trio.Event()

                async def read(unit, name):
                    statuses[name] = (await run(unit, READ, room=512)).status

                nursery.start_soon(read, a, "a")
                nursery.start_soon(read, b, "b")
                await trio.testing.wait_all_tasks_blocked()
            assert statuses == {"a": TASK_ABORTED.status}
            command, _ = make_command(READ, room=512)
            assert await finish(a, command) == TASK_ABORTED
            disk.pause.set()
        assert statuses["b"] == 0


async def test_without_a_keeper_there_is_no_disk(caplog):
    async with visitor(None, "a") as unit:
        outcomes = []

        async def read():
            outcomes.append(await run(unit, READ, room=512))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            unit.other.sock.close()
        assert outcomes[0].fault == (2, 0x0800)
        assert (await run(unit, READ, room=512)).fault == (2, 0x0800)
        assert unit.known.is_set()
        assert unit.describe()["lost"]
        unit.reset()
        await unit.ended()
    assert "the keeper of a shared disk is gone" in caplog.text


async def test_a_keeper_that_does_not_end_a_command_is_not_waited_for(autojump_clock, caplog):
    async with visitor(None, "a") as unit:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: run(unit, READ, room=512))
                nursery.start_soon(lambda: run(unit, READ, room=512))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        assert not unit.busy
        assert (await run(unit, READ, room=512)).fault == (2, 0x0800)
        assert caplog.text.count("its keeper does not answer; the disk is lost") == 1


async def test_commands_wait_for_room_in_the_staging_area():
    disk = MemoryDisk(1024)
    disk.inline = False
    async with kept(disk) as keeper, visitor(keeper, "a", staging=128 << 10) as unit:
        await settled(unit)
        replies = []

        async def read(number):
            reply = await run(unit, f"28 00 {number * 64:08x} 00 0040 00", room=32768)
            replies.append((number, reply.status))

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(read, number)
        assert sorted(replies) == [(number, 0) for number in range(12)]
        too_long = await run(unit, "28 00 00000000 00 0200 00", room=256 << 10)
        assert too_long.status


async def test_a_disk_that_fails_says_so_as_ever():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a") as unit:
        await settled(unit)
        disk.fail = MediumError("a scratch", offset=0)
        assert (await run(unit, READ, room=512)).fault == (3, 0x1100)


async def test_what_the_disk_of_a_keeper_fails_is_counted_and_what_a_guest_does_wrong_is_not():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a") as unit:
        await settled(unit)
        assert (await run(unit, "28 00 00ffffff 00 0001 00", room=512)).fault == (5, 0x2100)
        assert unit.errors == 0
        for error in (MediumError("a scratch"), NoSpaceError("full")):
            disk.fail = error
            assert (await run(unit, "35 00 00000000 00 0000 00")).status == 2
        assert unit.errors == 2
    async with visitor(None, "a") as unit:
        unit.other.sock.close()
        assert (await run(unit, READ, room=512)).fault == (2, 0x0800)
        assert unit.errors == 1


async def test_a_reset_also_ends_what_has_not_been_sent_yet():
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a", staging=128 << 10) as unit:
        await settled(unit)
        disk.inline, disk.pause = False, trio.Event()
        outcomes = []

        async def read() -> None:
            outcomes.append((await run(unit, "28 00 00000000 00 0080 00", room=65536)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            unit.reset()
            await unit.ended()
        assert outcomes == [TASK_ABORTED.status] * 6, "none of them took the news of the reset"
        assert (await run(unit, READY)).fault == (6, 0x2903)


async def test_resets_of_a_unit_whose_keeper_does_not_read_are_not_heaped_up():
    async with visitor(None, "a") as unit:
        with contextlib.suppress(BlockingIOError):
            while True:
                unit._line._sock.send(bytes(1000))
        for _ in range(10):
            for _ in range(1000):
                unit.reset()
            await trio.testing.wait_all_tasks_blocked()
        assert len(unit._posts) == 2
        unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
        unit.reset()
        assert [each[0] for each in unit._posts[-2:]] == [Kind.ATTENTION, Kind.RESET]
        assert await waits(unit.ended), "without keeping the loop busy"


async def test_operators_see_of_it_what_they_see_of_a_disk_that_is_not_shared(caplog):
    disk = MemoryDisk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        disk.fail = NoSpaceError("no room", offset=0)
        for _ in range(2):
            assert (await run(a, WRITE, out=bytes(512))).status == 2
        await until(lambda: a.describe()["no_space"] == b.describe()["no_space"] == 2)
        assert "shared disk (MemoryDisk): no room (request 1 that found no room)" in caplog.text


async def test_the_tray_of_a_drive_that_is_shared_is_seen_by_all():
    disk = MemoryDisk(sector_size=2048, optical=True)
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        assert (b.describe()["kind"], b.describe()["tray"]) == ("CD-ROM drive", "closed")
        assert (await run(a, "1e 00 00 00 01 00")).status == 0
        await until(lambda: b.describe()["locked"])

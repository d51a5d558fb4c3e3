"""Commands of a shared disk that are to stand still, to end, or do not come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disk import Buffers
from storvsp.disks.ram import RamDisk
from storvsp.scsi.pace import keep_pace
from storvsp.scsi.unit import TASK_ABORTED, Command, DataDirection, Outcome
from storvsp.shared.messages import MAX_COMMANDS, CommandRecord, Kind, number_record
from tests.support.shared import kept, visitor
from vmbus.host.undertakings import Undertakings

VERIFY_1_TIB = bytes.fromhex("8f 00 0000000000000000 7fffffff 00 00")
READ = bytes.fromhex("28 00 00000000 00 0001 00")


class Disk(RamDisk):
    """Counts its reads; those of the last sector wait, as in threads that cannot be called back."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.reads = 0
        self.hung = 0
        self.go = trio.Event()

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.reads += 1
        if offset == (1 << 40) - 512:
            self.hung += 1
            with trio.CancelScope(shield=True):
                await self.go.wait()
        await super().readv(offset, buffers)


HANGS = bytes.fromhex("88 00 000000007fffffff 00000001 00 00")


class Paced:
    """A channel's commands, of which each keeps the channel's pace."""

    def __init__(self, unit: Any, nursery: trio.Nursery) -> None:
        self.unit = unit
        self.nursery = nursery
        self.undertakings = Undertakings(lambda: None, lambda: None)
        self.outcomes: list[Outcome] = []

    def start(self, cdb: bytes) -> None:
        self.nursery.start_soon(self._run, cdb)

    async def _run(self, cdb: bytes) -> None:
        keep_pace(self.undertakings.begin(0, lambda: "a command"))
        self.outcomes.append(await self.unit.execute(command(cdb)))

    @property
    def acting(self) -> int:
        return len(self.undertakings.names)


def command(cdb: bytes) -> Command:
    room = 512 if cdb[0] in {0x28, 0x88} else 0
    data = [memoryview(bytearray(room))] if room else []
    return Command(cdb, data, room, DataDirection.READ if room else DataDirection.NONE, "a")


async def settled(unit) -> None:
    while (await unit.execute(command(bytes(6)))).status:
        pass


async def turns(until: Callable[[], object] = lambda: False) -> None:
    """Let the loop go round; a command that goes on takes one step in a few of them."""
    for _ in range(2000):
        if until():
            return
        await trio.sleep(0)


async def test_a_pause_stops_a_long_command_at_its_keeper_and_others_go_on():
    disk = Disk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        async with trio.open_nursery() as nursery:
            paced = Paced(a, nursery)
            for _ in range(3):
                paced.start(VERIFY_1_TIB)
            for _ in range(3):
                reads = disk.reads
                await turns(lambda reads=reads: disk.reads > reads + 20)  # type: ignore[misc]
                assert disk.reads > reads + 20
                assert paced.acting == 3
                paced.undertakings.hold()
                await turns(lambda: not paced.acting)
                assert paced.acting == 0, "the pause is over"
                reads = disk.reads
                await trio.testing.wait_all_tasks_blocked()
                assert disk.reads == reads, "the disk is left alone"
                assert (await b.execute(command(READ))).status == 0, "by this guest"
                paced.undertakings.go_on()
            await turns(lambda: paced.acting == 3)
            paced.undertakings.end()
        assert paced.outcomes == [TASK_ABORTED] * 3
        assert not keeper.keeper.unit.busy


async def test_what_stands_still_ends_with_its_channel_or_with_a_reset_of_somebody_else():
    disk = Disk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a, visitor(keeper, "b") as b:
        for unit in (a, b):
            await settled(unit)
        for ending in ("channel", "reset"):
            async with trio.open_nursery() as nursery:
                paced = Paced(a, nursery)
                paced.start(VERIFY_1_TIB)
                await turns(lambda: paced.acting)  # noqa: B023 - used at once
                paced.undertakings.hold()
                await trio.testing.wait_all_tasks_blocked()
                assert paced.acting == 0
                if ending == "channel":
                    paced.undertakings.end()
                else:
                    b.reset()
                    await b.ended()
                    assert not keeper.keeper.unit.busy
                    assert not paced.outcomes, "it is paused"
                    paced.undertakings.go_on()
            assert paced.outcomes == [TASK_ABORTED]
            assert not keeper.keeper.unit.busy


async def test_a_pause_that_fails_leaves_nothing_standing_still():
    """The keeper's answer to a pause that is over is not taken for one to the next."""
    disk = Disk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a:
        await settled(a)
        async with trio.open_nursery() as nursery:
            paced = Paced(a, nursery)
            paced.start(HANGS)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                paced.undertakings.hold()
                await trio.testing.wait_all_tasks_blocked()
                assert paced.acting == 1, "a thread may be at work still"
                paced.undertakings.go_on()
                paced.undertakings.hold()
                await trio.testing.wait_all_tasks_blocked()
                assert paced.acting == 1
                paced.undertakings.go_on()
                await trio.testing.wait_all_tasks_blocked()
            disk.go.set()
        assert [each.status for each in paced.outcomes] == [0]


async def test_commands_that_come_in_a_pause_begin_after_it():
    disk = Disk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a:
        await settled(a)
        async with trio.open_nursery() as nursery:
            paced = Paced(a, nursery)
            paced.undertakings.hold()
            paced.start(READ)
            reads = disk.reads
            await trio.testing.wait_all_tasks_blocked()
            assert disk.reads == reads
            paced.undertakings.go_on()
        assert [each.status for each in paced.outcomes] == [0]


async def test_a_unit_that_is_taken_away_does_not_wait_for_a_keeper_whose_disk_hangs(
    autojump_clock, caplog
):
    disk = Disk()
    async with kept(disk) as keeper:
        async with visitor(keeper, "a") as a:
            await settled(a)
            async with trio.open_nursery() as nursery:
                paced = Paced(a, nursery)
                paced.start(HANGS)
                await trio.testing.wait_all_tasks_blocked()
                assert a.under_way == ["READ(16)"]
                a.close()
                begun = trio.current_time()
                await a.ended()
                assert trio.current_time() - begun == pytest.approx(8)
            assert paced.outcomes == [TASK_ABORTED]
            assert "its keeper does not answer; the disk is lost" in caplog.text
        disk.go.set()


async def test_who_waits_for_a_disk_that_hangs_and_goes_leaves_no_question_behind():
    disk = Disk()
    async with kept(disk) as keeper, visitor(keeper, "a") as a:
        await settled(a)
        async with trio.open_nursery() as nursery:
            paced = Paced(a, nursery)
            paced.start(HANGS)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2 * MAX_COMMANDS):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await a.ended()
            await trio.testing.wait_all_tasks_blocked()
            assert len(a._pending) == 2, "the command, and one question"
            disk.go.set()
            await a.ended()
        assert not a.describe()["lost"]
        assert [each.status for each in paced.outcomes] == [0]


@pytest.mark.parametrize("what", ["twice", "for ever"])
async def test_a_guest_that_plays_with_pauses_loses_its_line(what, caplog):
    disk = Disk()
    async with kept(disk) as keeper:
        line = keeper.line("hostile")
        line.sock.setblocking(False)
        await trio.testing.wait_all_tasks_blocked()
        line.sock.send(CommandRecord(1, HANGS, DataDirection.READ, 512, 0).encode())
        await trio.testing.wait_all_tasks_blocked()
        text = "still twice" if what == "twice" else "too many commands"
        for _ in range(4 * MAX_COMMANDS):
            try:
                line.sock.send(number_record(Kind.HOLD, 1))
                if what == "for ever":
                    line.sock.send(number_record(Kind.GO_ON, 1))
            except BlockingIOError:
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        disk.go.set()
        await turns(lambda: text in caplog.text)
        assert "hostile: shared disk: " in caplog.text
        assert text in caplog.text
        line.sock.close()

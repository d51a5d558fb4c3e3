"""A disk whose back-end has no room: it is said once, and commands are kept if that is wanted."""

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from storvsp.disk import Buffers, DiskError, NoSpaceError, disk_errors
from storvsp.scsi import DiskUnit
from storvsp.scsi.medium import UNMAP_PIECE, ZERO_PIECE, Medium
from storvsp.scsi.pace import keep_pace
from storvsp.scsi.unit import STATUS_CHECK_CONDITION, TASK_ABORTED
from tests.support.scsi import MemoryDisk, make_command, run
from vmbus.host.undertakings import Undertakings

WRITE = "2a 00 00000000 00 0001 00"
READ = "28 00 00000000 00 0001 00"
FLUSH = "35 00 00000000 00 0000 00"
ZERO = "41 00 00000004 00 0004 00"
COMPARE_AND_WRITE = "89 00 0000000000000000 000000 01 00 00"


class FullDisk(MemoryDisk):
    """Has no room for what is written, for as long as that is so."""

    full = True
    asked = 0

    def _write(self, offset: int, buffers: Buffers, fua: bool) -> None:
        self.asked += 1
        if self.full:
            with disk_errors("write", offset=offset):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._write(offset, buffers, fua)


def make(*, stops: bool, inline: bool = False) -> tuple[FullDisk, DiskUnit]:
    disk = FullDisk()
    disk.inline = inline
    unit = DiskUnit(disk, luns=lambda: [0], identity=b"0123456789abcdef")
    unit.name = "disk 0:0:0 (raw:thin.img)"
    unit.disk.stops = stops
    return disk, unit


@pytest.mark.parametrize("inline", [False, True])
async def test_a_full_file_system_is_one_warning_that_names_the_disk_and_counted_after_that(
    caplog, inline
):
    _, unit = make(stops=False, inline=inline)
    for count in range(1, 121):
        reply = await run(unit, WRITE, out=bytes(512))
        assert reply.status == STATUS_CHECK_CONDITION
        assert unit.describe() == {"stopped": "", "no_space": count}
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert lines == [
        f"disk 0:0:0 (raw:thin.img): write failed: No space left on device (request {count} that "
        "found no room)"
        for count in (1, 10, 100)
    ]


@pytest.mark.parametrize("inline", [False, True])
async def test_a_disk_that_stops_keeps_commands_and_tries_them_again(caplog, inline):
    disk, unit = make(stops=True, inline=inline)
    await run(unit, "00 00 00 00 00 00")
    data = bytes(range(256)) * 2
    outcomes: list[object] = []

    async def execute(cdb: str, **options: object) -> None:
        outcomes.append((await run(unit, cdb, **options)).status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: execute(WRITE, out=data))
        await trio.testing.wait_all_tasks_blocked()
        assert unit.describe() == {"stopped": "No space left on device", "no_space": 1}
        for cdb, options in (
            (READ, {"room": 512}),
            (FLUSH, {}),
            (ZERO, {"out": b"x" * 512}),
            (COMPARE_AND_WRITE, {"out": data * 2}),
        ):
            nursery.start_soon(lambda cdb=cdb, options=options: execute(cdb, **options))  # type: ignore[misc]
        await trio.testing.wait_all_tasks_blocked()
        assert not outcomes
        assert disk.asked == 1, "nothing is tried before the operator says so"
        assert "stopped until 'vmbus disk continue'" in caplog.text
        assert unit.disk.go_on()
        await trio.testing.wait_all_tasks_blocked()
        assert unit.disk.stopped, "there is no room still"
        disk.full = False
        assert unit.disk.go_on()
    assert len(outcomes) == 5
    assert disk.data[:512] == data
    assert not unit.disk.go_on()
    assert unit.describe()["stopped"] == ""
    assert unit.readers, "the fast path is open again"


@pytest.mark.parametrize("ends", ["abort", "close"])
async def test_a_stopped_disk_lets_its_commands_be_ended(ends):
    disk, unit = make(stops=True)
    command, _ = make_command(WRITE, out=bytes(512))
    outcomes: list[object] = []

    async def execute() -> None:
        outcomes.append(await unit.execute(command))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(execute)
        await trio.testing.wait_all_tasks_blocked()
        getattr(unit, ends)()
    assert outcomes == [TASK_ABORTED]
    assert not unit.busy
    assert disk.asked == 1


async def test_a_stopped_disk_does_not_hold_up_a_pause_or_the_end_of_a_channel():
    disk, unit = make(stops=True)
    undertakings = Undertakings(lambda: None, lambda: None)
    outcomes: list[object] = []

    async def execute(cdb: str, data: bytes) -> None:
        undertaking = undertakings.begin(0, str)
        keep_pace(undertaking)
        command, _ = make_command(cdb, out=data)
        outcomes.append(await unit.execute(command))
        undertaking.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(execute, WRITE, bytes(512))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(execute, COMPARE_AND_WRITE, bytes(1024))
        await trio.testing.wait_all_tasks_blocked()
        assert undertakings.resting == 2
        undertakings.hold()
        disk.full = False
        unit.disk.go_on()
        await trio.testing.wait_all_tasks_blocked()
        assert disk.asked == 1, "the guest is paused"
        unit.disk.stopped = "again"
        undertakings.end()
    assert outcomes == [TASK_ABORTED] * 2
    assert not undertakings.resting


async def test_other_failures_are_reported_however_the_disk_is_set():
    disk, unit = make(stops=True)
    disk.full = False
    disk.fail = DiskError("broken")
    assert (await run(unit, WRITE, out=bytes(512))).status == STATUS_CHECK_CONDITION
    assert not unit.disk.stopped


async def test_long_ranges_are_unmapped_and_zeroed_in_pieces():
    """Each piece is one call, which nothing can interrupt."""
    pieces: list[tuple[str, int, int]] = []

    class Recorder(MemoryDisk):
        async def unmap(self, offset: int, length: int) -> None:
            pieces.append(("unmap", offset, length))

        async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
            pieces.append(("zero", offset, length))

    medium = Medium(Recorder())
    await medium.unmap(512, UNMAP_PIECE + 1024)
    await medium.write_zeroes(512, ZERO_PIECE + 1024, may_unmap=True)
    assert pieces == [
        ("unmap", 512, UNMAP_PIECE),
        ("unmap", 512 + UNMAP_PIECE, 1024),
        ("zero", 512, ZERO_PIECE),
        ("zero", 512 + ZERO_PIECE, 1024),
    ]
    assert (await medium.extents(0, 512))[0].length == 512
    await medium.aclose()
    assert not medium.disk.closed  # type: ignore[attr-defined]  # it is its owner's


async def test_a_fast_write_that_finds_no_room_is_kept_like_any_other():
    disk, unit = make(stops=True, inline=True)
    medium = unit.disk
    assert not medium.try_writev(0, [memoryview(bytes(512))])
    assert medium.stopped
    medium.go_on()
    medium.stops = False
    with pytest.raises(NoSpaceError):
        medium.try_writev(0, [memoryview(bytes(512))])
    assert disk.asked == 2


async def test_a_guest_that_repeats_a_failing_command_fills_no_log(caplog):
    caplog.set_level("INFO")
    disk, unit = make(stops=False)
    disk.full = False
    for error, text in ((DiskError("broken"), "broken"), (OSError(5, "out"), "escape")):
        disk.fail = error
        for _ in range(200):
            await run(unit, READ, room=512)
        assert 1 <= sum(text in each.getMessage() for each in caplog.records) <= 25

"""Commands that stand still: they leave guest memory and the disk alone, and others their turn."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from storvsp.scsi import DiskUnit
from storvsp.scsi.pace import FREE, current_pace, keep_pace, step
from storvsp.scsi.unit import GOOD, TASK_ABORTED
from tests.support.scsi import MemoryDisk, make_command, run
from vmbus.host.undertakings import Undertakings

VERIFY = "8f 00 0000000000000000 00000080 00 00"
VERIFY_DATA = "2f 02 00000000 00 0004 00"
COMPARE_AND_WRITE = "89 00 0000000000000000 000000 01 00 00"
ORWRITE = "8b 00 0000000000000000 00000004 00 00"
FORMAT = "04 00 00 00 00 00"
WRITE_SAME = "41 00 00000000 00 0004 00"
SYNCHRONIZE = "35 00 00000000 00 0000 00"
UNMAP = "42 00 0000000000 0018 00"
UNMAP_LIST = bytes.fromhex("0016 0010 00000000 0000000000000000 00000004 00000000".replace(" ", ""))
READ = "28 00 00000000 00 0004 00"
WRITE = "2a 00 00000000 00 0004 00"


def make_unit() -> tuple[MemoryDisk, DiskUnit]:
    disk = MemoryDisk(max_transfer=1024, supports_unmap=True)  # so that all takes several steps
    disk.inline = False
    return disk, DiskUnit(disk, luns=lambda: [0], identity=b"0123456789abcdef")


class Guest:
    """A guest whose commands can be held up."""

    def __init__(self, unit: DiskUnit) -> None:
        self.unit = unit
        self.undertakings = Undertakings(lambda: None, lambda: None)
        self.outcomes: list[object] = []

    async def execute(self, cdb: str, **options: object) -> None:
        undertaking = self.undertakings.begin(0, lambda: cdb)
        keep_pace(undertaking)
        command, _ = make_command(cdb, **options)  # type: ignore[arg-type]
        self.outcomes.append(await self.unit.execute(command))
        undertaking.end()


LONG = pytest.mark.parametrize(("cdb", "options"), [
    (VERIFY, {}),
    (VERIFY_DATA, {"out": bytes(2048)}),
    (ORWRITE, {"out": bytes(2048)}),
    (FORMAT, {}),
    (WRITE_SAME, {"out": b"x" * 512}),
    (SYNCHRONIZE, {}),
    (UNMAP, {"out": UNMAP_LIST}),
    (READ, {"room": 2048}),
    (WRITE, {"out": bytes(2048)}),
], ids=lambda each: each if isinstance(each, str) else "")  # fmt: skip


@LONG
async def test_no_command_touches_the_disk_while_it_is_held_up(cdb, options):
    disk, unit = make_unit()
    guest = Guest(unit)
    guest.undertakings.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: guest.execute(cdb, **options))
        await trio.testing.wait_all_tasks_blocked()
        assert not disk.calls
        assert guest.undertakings.resting == 1
        guest.undertakings.go_on()
    assert guest.outcomes[0].status == GOOD.status  # type: ignore[attr-defined]
    assert disk.calls


@pytest.mark.parametrize("ends", ["abort", "close", "over"])
@LONG
async def test_a_command_that_is_held_up_can_be_ended(cdb, options, ends):
    disk, unit = make_unit()
    guest = Guest(unit)
    guest.undertakings.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: guest.execute(cdb, **options))
        await trio.testing.wait_all_tasks_blocked()
        {"abort": unit.abort, "close": unit.close, "over": guest.undertakings.end}[ends]()
    assert guest.outcomes == [TASK_ABORTED]
    assert not disk.calls
    assert not unit.busy
    assert not unit.gate.closed


@pytest.mark.parametrize(("cdb", "out"), [
    (ORWRITE, bytes(2048)), (COMPARE_AND_WRITE, bytes(1024)),
])  # fmt: skip
async def test_a_pause_does_not_come_between_what_is_read_and_what_is_made_of_it(cdb, out):
    disk, unit = make_unit()
    guest = Guest(unit)
    disk.pause = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: guest.execute(cdb, out=out))
        await trio.testing.wait_all_tasks_blocked()
        guest.undertakings.hold()
        disk.pause.set()
        await trio.testing.wait_all_tasks_blocked()
        assert disk.calls
        assert len(disk.calls) % 2 == 0, "each piece that was read has been written"
        guest.undertakings.go_on()
    assert guest.outcomes[0].status == GOOD.status  # type: ignore[attr-defined]


@pytest.mark.parametrize("cdb", [VERIFY, ORWRITE])
async def test_one_that_is_held_up_half_way_gives_its_turn_to_others(cdb):
    """A shared disk: what a paused guest has begun must not keep another one from it."""
    disk, unit = make_unit()
    guest = Guest(unit)
    disk.pause = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: guest.execute(cdb, out=bytes(2048) if cdb == ORWRITE else None))
        await trio.testing.wait_all_tasks_blocked()
        assert guest.undertakings.names == [cdb]
        guest.undertakings.hold()
        disk.pause.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not guest.undertakings.names
        done = len(disk.calls)
        assert done
        assert not guest.outcomes
        for other in (WRITE, COMPARE_AND_WRITE):
            out = bytes(2048) if other == WRITE else bytes(1024)
            assert (await run(unit, other, out=out)).status == GOOD.status
        disk.calls.clear()
        await trio.testing.wait_all_tasks_blocked()
        assert not disk.calls
        guest.undertakings.go_on()
    assert guest.outcomes[0].status == GOOD.status  # type: ignore[attr-defined]
    assert disk.calls
    assert not unit.gate.closed


async def test_commands_of_a_paused_guest_keep_no_buffers_from_others():
    _, unit = make_unit()
    guest = Guest(unit)
    guest.undertakings.hold()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(guest.execute, VERIFY)
        await trio.testing.wait_all_tasks_blocked()
        command, _ = make_command(VERIFY)
        command.initiator = "somebody else"
        assert (await unit.execute(command)).status == GOOD.status
        guest.undertakings.end()


async def test_compare_and_write_is_one_action():
    """Half of it must not wait for a resume, nor anybody come in between."""
    disk, unit = make_unit()
    guest = Guest(unit)
    disk.pause = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: guest.execute(COMPARE_AND_WRITE, out=bytes(512) + b"x" * 512))
        await trio.testing.wait_all_tasks_blocked()
        guest.undertakings.hold()
        disk.pause.set()
        await trio.testing.wait_all_tasks_blocked()
        assert guest.outcomes
        assert disk.data[:512] == b"x" * 512
        assert guest.undertakings.resting == 0


async def test_who_has_no_pace_is_free():
    assert current_pace() is FREE
    await step()
    await FREE.wait_released()
    await FREE.rest(trio.lowlevel.checkpoint)

"""Commands side by side: what waits, what is aborted, what lets others run."""

import pytest
import trio
import trio.testing

from storvsp.scsi import DiskUnit
from storvsp.scsi.disk_core import BULK
from storvsp.scsi.unit import STATUS_GOOD, TASK_ABORTED
from tests.support.scsi import MemoryDisk, make_command, run
from tests.support.scsi_verify import make_unit


@pytest.mark.parametrize(("cdb", "out"), [
    ("2f 00 00000000 00 0002 00", None),
    ("2e 00 00000000 00 0002 00", bytes(1024)),
    ("41 00 00000000 00 0002 00", b"x" * 512),
])  # fmt: skip
async def test_only_a_few_commands_work_in_the_hosts_memory_at_a_time(cdb, out):
    """A guest may have thousands under way, and each one holds up to a mebibyte."""
    disk, unit = make_unit()
    disk.pause = pause = trio.Event()
    entered = 0

    async def wait() -> None:
        nonlocal entered
        entered += 1
        await pause.wait()

    disk._wait = wait  # type: ignore[method-assign]  # counts who gets there
    async with trio.open_nursery() as nursery:
        for _ in range(BULK + 5):
            command, _ = make_command(cdb, out=out)
            nursery.start_soon(unit.execute, command)
        await trio.testing.wait_all_tasks_blocked()
        assert entered == BULK
        disk.pause.set()
    assert entered >= BULK + 5


async def test_a_reset_aborts_what_waits_for_the_disk():
    """Checklist row 24: every command gets its outcome, also after a reset."""
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.inline = False
    disk.pause = trio.Event()
    outcomes = []

    async def go(initiator: str) -> None:
        command, _ = make_command("28 00 00000003 00 0002 00", room=1024, initiator=initiator)
        outcomes.append((initiator, await unit.execute(command)))

    async with trio.open_nursery() as nursery:
        for initiator in ("guest", "other", "guest"):
            nursery.start_soon(go, initiator)
        await trio.testing.wait_all_tasks_blocked()
        unit.abort("other")
        await trio.testing.wait_all_tasks_blocked()
        assert [name for name, _ in outcomes] == ["other"]
        unit.reset()
    assert {outcome for _, outcome in outcomes} == {(0x40, b"", 0)}
    assert len(outcomes) == 3
    for initiator in ("guest", "other"):
        assert (await run(unit, "00" * 6, initiator=initiator)).fault == (6, 0x2903)


async def test_a_command_that_begins_after_its_unit_was_closed_touches_nothing():
    """Its disk may be somebody else's by now."""
    disk, unit = make_unit()
    disk.inline = False
    command, _ = make_command("2a 00 00000003 00 0001 00", out=bytes(512))
    assert unit.try_execute(command) is None
    unit.close()
    assert await unit.execute(command) == TASK_ABORTED
    assert disk.calls == []


async def test_a_cancelled_caller_sees_its_cancellation():
    disk, unit = make_unit()
    disk.inline = False
    disk.pause = trio.Event()
    command, _ = make_command("28 00 00000003 00 0002 00", room=1024)
    with trio.move_on_after(0) as scope:
        await unit.execute(command)
    assert scope.cancelled_caught
    disk.pause.set()
    assert (await unit.execute(command)).status == 0


@pytest.mark.parametrize(
    ("cdb", "size"),
    [
        ("2f 00 00000000 00 0020 00", 0),
        ("2f 06 00000000 00 0020 00", 512),
        ("2e 00 00000000 00 0020 00", 32 * 512),
        ("8b 00 0000000000000000 00000020 00 00", 32 * 512),
        ("41 00 00000000 00 0020 00", 512),
        ("28 00 00000000 00 0020 00", None),
        ("2a 00 00000000 00 0020 00", 32 * 512),
    ],
)
async def test_long_commands_let_others_run_although_the_disk_never_waits(cdb, size):
    disk = MemoryDisk(max_transfer=1024)
    disk.data[:] = b"q" * len(disk.data)
    disk.prompt = True
    unit = DiskUnit(disk, luns=lambda: [0])
    turns = 0

    async def count():
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        room = 32 * 512 if size is None else 0
        out = None if size is None else b"q" * size
        assert (await run(unit, cdb, room=room, out=out)).status == 0
        assert turns >= 10
        nursery.cancel_scope.cancel()


async def test_a_flush_has_its_turn_beside_loops_of_commands_that_are_alone():
    """First come, first served: each of the others is let in once before it, at most."""
    disk, unit = make_unit()
    await run(unit, "00 00 00 00 00 00")
    disk.inline = False
    disk.data[:512] = bytes(512)
    alone = 0
    over = False

    async def loop() -> None:
        nonlocal alone
        while not over:
            reply = await run(unit, "89 00 0000000000000000 000000 01 00 00", out=bytes(1024))
            assert reply.status == STATUS_GOOD
            alone += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(loop)
        for _ in range(5):
            while not unit.gate.closed:
                await trio.sleep(0)
            before = alone
            assert (await run(unit, "35 00 00000000 00 0000 00")).status == STATUS_GOOD
            assert alone - before <= 3
        over = True

"""The gate in front of a medium: many commands at once, or one alone."""

from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from storvsp.scsi.gate import ENTER_AT_ONCE, EVERYWHERE, Gate, sections
from storvsp.scsi.pace import FREE, keep_pace
from tests.support.patience import PATIENCE
from tests.support.scsi import make_command, run
from tests.support.scsi_verify import CAW, make_unit
from tests.support.turns import Work, watched


@pytest.mark.parametrize("inline", [True, False])
async def test_two_compare_and_writes_never_both_win(inline):
    disk, unit = make_unit()
    disk.inline = inline
    old = bytes(disk.data[1536:2560])
    outcomes = []

    async def attempt(value):
        outcomes.append((await run(unit, CAW, out=old + bytes([value]) * 1024)).status)

    async with trio.open_nursery() as nursery:
        for value in range(1, 9):
            nursery.start_soon(attempt, value)
    assert sorted(outcomes) == [0, *[2] * 7]


async def test_nothing_gets_between_compare_and_write():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    old, new = bytes(disk.data[1536:2560]), b"n" * 1024
    disk.inline = False
    disk.pause = trio.Event()
    order = []

    async def go(name: str, cdb: str, **keywords: Any) -> None:
        command, buffer = make_command(cdb, **keywords)
        outcome = await unit.execute(command)
        assert outcome.status == 0
        order.append((name, bytes(buffer)))

    async with trio.open_nursery() as nursery:
        read = "28 00 00000003 00 0002 00"
        command, _ = make_command(read, room=1024)
        nursery.start_soon(lambda: go("early read", read, room=1024))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: go("caw", CAW, out=old + new))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: go("late read", read, room=1024))
        await trio.testing.wait_all_tasks_blocked()
        assert not unit.gate.closed  # still waiting for the early read
        disk.pause.set()
        while not unit.gate.closed:
            await trio.sleep(0)
        disk.inline = True
        assert unit.try_execute(command) is None  # not even the fast path gets in
        six, _ = make_command("08 000003 02 00", room=1024)
        assert unit.try_execute(six) is None
        ready, _ = make_command("00" * 6)
        assert unit.try_execute(ready).status == 0
    assert [name for name, _ in order] == ["early read", "caw", "late read"]
    assert order[0][1] == old
    assert order[2][1] == new
    assert unit.try_execute(command).status == 0


async def test_a_cancelled_exclusive_command_lets_the_others_in():
    gate = Gate(lambda: None)
    await gate.acquire(exclusive=False)
    entered = []

    async def shared():
        await gate.acquire(exclusive=False)
        entered.append(True)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(lambda: gate.acquire(exclusive=True))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(shared)
                await trio.testing.wait_all_tasks_blocked()
                assert not entered
                scope.cancel()
    assert entered
    assert not gate.closed


async def test_first_come_first_served():
    """A flush gets its turn beside loops of COMPARE AND WRITE, and one release wakes who may go."""
    gate = Gate(lambda: None)
    order: list[str] = []

    async def pass_by(name: str, *, exclusive: bool) -> None:
        await gate.acquire(exclusive=exclusive)
        order.append(name)
        await trio.lowlevel.checkpoint()
        gate.release(exclusive=exclusive)

    await gate.acquire(exclusive=True)
    async with trio.open_nursery() as nursery:
        waiting = [("w1", True), ("r1", False), ("r2", False), ("given up", True), ("w2", True)]
        scope = trio.CancelScope()
        for name, exclusive in waiting:

            async def run(name: str = name, exclusive: bool = exclusive) -> None:
                with scope if name == "given up" else trio.CancelScope():
                    await pass_by(name, exclusive=exclusive)

            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        gate.release(exclusive=True)
    assert order[0] == "w1"
    assert sorted(order[1:3]) == ["r1", "r2"]
    assert order[3:] == ["w2"]
    assert not gate.closed
    await pass_by("late", exclusive=True)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
async def test_who_is_let_in_when_cancelled_already_leaves_again(first, second):
    """One reset ends the commands inside and those that wait; who runs first is up to the loop."""
    gate = Gate(lambda: None)

    async def command(scope: trio.CancelScope, *, exclusive: bool) -> None:
        with scope:
            await gate.acquire(exclusive=exclusive)
            try:
                await trio.sleep_forever()
            finally:
                gate.release(exclusive=exclusive)

    for _ in range(20):  # the loop does not run tasks in order
        scopes = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(command, scopes[0], exclusive=first))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(partial(command, scopes[1], exclusive=second))
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes:
                scope.cancel()
        assert not gate.closed
        with trio.fail_after(PATIENCE):
            await gate.acquire(exclusive=True)
        gate.release(exclusive=True)


async def test_whoever_has_one_command_waits_for_one_of_each_other():
    """Guests and channels take turns: thousands of commands of one are not all before it."""
    gate = Gate(lambda: None)
    order: list[str] = []

    async def pass_by(whose: str, *, exclusive: bool) -> None:
        await gate.acquire(exclusive=exclusive, whose=whose)
        order.append(whose)
        gate.release(exclusive=exclusive)

    await gate.acquire(exclusive=True, whose="busy")
    async with trio.open_nursery() as nursery:
        for whose, count in (("busy", 100), ("also busy", 50), ("victim", 1)):
            for _ in range(count):
                nursery.start_soon(partial(pass_by, whose, exclusive=whose != "victim"))
            await trio.testing.wait_all_tasks_blocked()
        gate.release(exclusive=True)
    assert sorted(order[:3]) == ["also busy", "busy", "victim"]
    assert order[3:103:2] == ["busy"] * 50
    assert len(order) == 151


async def test_the_commands_of_a_channel_take_turns_with_those_of_others():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.inline = False
    order: list[str] = []

    class OfChannel(type(FREE)):  # type: ignore[misc]
        def __init__(self, whose: str) -> None:
            self.whose = whose

    async def read(channel: str) -> None:
        keep_pace(OfChannel(channel))
        command, _ = make_command("28 00 00000003 00 0002 00", room=1024)
        assert (await unit.execute(command)).status == 0
        order.append(channel)

    await unit.gate.acquire(exclusive=True)
    async with trio.open_nursery() as nursery:
        for channel in ["busy"] * 2 * ENTER_AT_ONCE + ["victim"]:
            nursery.start_soon(read, channel)
        await trio.testing.wait_all_tasks_blocked()
        unit.gate.release(exclusive=True)
    assert "victim" in order[:ENTER_AT_ONCE]


async def test_thousands_that_wait_do_not_all_go_on_in_one_turn_of_the_loop():
    gate = Gate(lambda: None)
    work = Work()

    async def pass_by() -> None:
        await gate.acquire(exclusive=False)
        work.done()
        gate.release(exclusive=False)

    await gate.acquire(exclusive=True)
    async with trio.open_nursery() as nursery:
        for _ in range(10 * ENTER_AT_ONCE):
            nursery.start_soon(pass_by)
        await trio.testing.wait_all_tasks_blocked()
        with watched(work):
            gate.release(exclusive=True)
            await trio.testing.wait_all_tasks_blocked()
    assert work.total == 10 * ENTER_AT_ONCE
    assert work.most_in_turn <= ENTER_AT_ONCE


async def test_what_has_waited_at_the_gate_does_not_wait_for_what_is_at_hand():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.pause = trio.Event()  # nothing that waits would come back
    await unit.gate.acquire(exclusive=True)
    async with trio.open_nursery() as nursery:
        for cdb, keywords in (
            ("28 00 00000003 00 0002 00", {"room": 1024}),
            ("2a 00 00000003 00 0002 00", {"out": bytes(1024)}),
        ):
            command, _ = make_command(cdb, **keywords)
            assert unit.try_execute(command) is None
            nursery.start_soon(unit.execute, command)
        await trio.testing.wait_all_tasks_blocked()
        assert unit.busy
        unit.gate.release(exclusive=True)
        await trio.testing.wait_all_tasks_blocked()
        assert not unit.busy
        disk.pause.set()


def test_sections_of_a_range():
    assert sections(5, 0) == 0
    assert sections(0, 1) == sections(2047, 1) == sections(64 * 2048, 2048) == 1
    assert sections(2047, 2) == 0b11
    assert sections(63 * 2048, 2049) == 1 << 63 | 1
    assert sections(1, 64 * 2048 - 1) == sections((1 << 64) - 1, 1 << 32) == EVERYWHERE


async def test_who_acts_elsewhere_does_not_wait():
    changes: list[bool] = []
    gate = Gate(lambda: changes.append(gate.closed))
    here, there = sections(0, 1), sections(2048, 1)
    await gate.acquire(exclusive=True, where=here)
    assert gate.bars(here)
    assert not gate.bars(there)
    with trio.fail_after(PATIENCE):
        await gate.acquire(exclusive=False, where=there)
        gate.release(exclusive=False, where=there)
        await gate.acquire(exclusive=True, where=there)  # two, each alone in its place
    assert gate.bars(there)
    gate.release(exclusive=True, where=here)
    assert gate.closed
    assert not gate.bars(here)
    gate.release(exclusive=True, where=there)
    assert changes == [True, False]


async def test_who_waits_to_be_alone_holds_up_only_its_own_place():
    gate = Gate(lambda: None)
    here, there = sections(0, 1), sections(2048, 1)
    entered: list[str] = []

    async def enter(name: str, where: int, *, exclusive: bool) -> None:
        await gate.acquire(exclusive=exclusive, where=where)
        entered.append(name)
        gate.release(exclusive=exclusive, where=where)

    await gate.acquire(exclusive=False, where=here)
    async with trio.open_nursery() as nursery:
        for name, where, exclusive in (
            ("alone", here, True),
            ("behind it", here, False),
            ("elsewhere", there, False),
            ("everywhere", EVERYWHERE, False),
        ):
            nursery.start_soon(partial(enter, name, where, exclusive=exclusive))
            await trio.testing.wait_all_tasks_blocked()
        assert entered == ["elsewhere"]
        gate.release(exclusive=False, where=here)
    assert entered[1] == "alone"
    assert sorted(entered[2:]) == ["behind it", "everywhere"]


async def test_a_read_elsewhere_is_served_at_once_while_compare_and_write_waits_for_the_disk():
    disk, unit = make_unit(blocks=8192)
    await run(unit, "00" * 6)
    disk.inline = False
    disk.pause = trio.Event()
    old = bytes(disk.data[1536:2560])
    near, _ = make_command("28 00 00000003 00 0001 00", room=512)
    far, _ = make_command("28 00 00001000 00 0001 00", room=512)
    async with trio.open_nursery() as nursery:
        command, _ = make_command(CAW, out=old + bytes(1024))
        nursery.start_soon(unit.execute, command)
        await trio.testing.wait_all_tasks_blocked()
        assert unit.gate.closed
        disk.inline = True
        assert unit.try_execute(near) is None
        outcome = unit.try_execute(far)
        assert outcome is not None
        assert outcome.status == 0
        disk.pause.set()

"""Commands in progress: who waits for which of them, and who is woken when one ends."""

from __future__ import annotations

import trio
import trio.testing

from storvsp.scsi.running import Endings, Running
from storvsp.scsi.unit import Command, DataDirection
from tests.support.turns import Work, watched


async def test_the_end_of_one_wakes_those_only_who_can_go_on_and_in_their_order():
    endings = Endings()
    order: list[int] = []
    work = Work()

    async def wait(number: int) -> None:
        await endings.ended()
        work.done()
        order.append(number)

    numbers = []
    async with trio.open_nursery() as nursery:
        for number in range(200):
            numbers.append(endings.begin())
            nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
        with watched(work):
            for number in reversed(numbers[100:]):
                endings.end(number)
            await trio.testing.wait_all_tasks_blocked()
            assert not order, "each still waits for the first of them"
            for done, number in enumerate(numbers[:99], 1):
                endings.end(number)
                await trio.testing.wait_all_tasks_blocked()
                assert order == [*range(done)]
            endings.end(numbers[99])
    assert sorted(order) == [*range(200)], "trio runs those that are woken together in any order"
    assert work.total == 200
    assert not endings.waiting


async def test_what_begins_later_is_not_waited_for():
    endings = Endings()
    await endings.ended()
    first = endings.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endings.ended)
        await trio.testing.wait_all_tasks_blocked()
        second = endings.begin()
        endings.end(first)
    assert len(endings) == 1
    endings.end(second)


async def test_who_does_not_wait_any_more_is_forgotten():
    endings = Endings()
    number = endings.begin()
    for _ in range(3):
        with trio.move_on_after(0):
            await endings.ended()
    assert not endings.waiting
    endings.end(number)


async def test_the_commands_of_one_initiator_are_waited_for_alone():
    running = Running()
    scopes = {}
    for name in "ab":
        scopes[name] = trio.CancelScope()
        cdb = bytes([0x28 if name == "a" else 0x2A]) + bytes(9)
        running.begin(scopes[name], Command(cdb, [], 0, DataDirection.NONE, name))
    assert running.names == ["READ(10)", "WRITE(10)"]
    await running.ended("nobody")
    seen: list[str | None] = []

    async def wait(name: str | None) -> None:
        await running.ended(name)
        seen.append(name)

    async with trio.open_nursery() as nursery:
        for who in (None, "a", "b"):
            nursery.start_soon(wait, who)
        await trio.testing.wait_all_tasks_blocked()
        running.end(scopes["b"])
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["b"]
        running.end(scopes["a"])
    assert sorted(map(str, seen)) == ["None", "a", "b"]
    assert not running

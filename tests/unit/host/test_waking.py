"""Tasks that wait for the same go on some at a time, in their order."""

from __future__ import annotations

import trio
import trio.testing

from tests.support.turns import Work, watched
from vmbus.host.undertakings import Undertakings
from vmbus.host.waking import PART, WAKES_AT_ONCE, Waiting


class Sleepers:
    """Tasks that wait, and write down when they go on."""

    def __init__(self, nursery: trio.Nursery, *waitings: Waiting) -> None:
        self.nursery = nursery
        self.work = Work()
        self.woken: dict[Waiting, list[int]] = {each: [] for each in waitings}

    async def start(self, waiting: Waiting, count: int) -> None:
        for number in range(count):
            self.nursery.start_soon(self._sleep, waiting, number)
            await trio.testing.wait_all_tasks_blocked()

    async def _sleep(self, waiting: Waiting, number: int) -> None:
        await waiting.wait()
        self.work.done()
        self.woken[waiting].append(number)


async def test_many_are_woken_in_turns_in_their_order_and_whoever_waits_takes_part():
    many, few = Waiting(), Waiting()
    async with trio.open_nursery() as nursery:
        sleepers = Sleepers(nursery, many, few)
        await sleepers.start(many, 4 * WAKES_AT_ONCE)
        await sleepers.start(few, PART)
        with watched(sleepers.work):
            many.wake()
            few.wake()
            while len(sleepers.woken[few]) < PART:
                await trio.sleep(0)
            assert len(sleepers.woken[many]) <= 2 * WAKES_AT_ONCE
            await trio.testing.wait_all_tasks_blocked()
    for place, number in enumerate(sleepers.woken[many]):
        assert abs(place - number) < WAKES_AT_ONCE, "those of one turn run in any order"
    assert sleepers.work.total == 4 * WAKES_AT_ONCE + PART
    assert sleepers.work.most_in_turn <= WAKES_AT_ONCE


async def test_those_who_are_not_woken_yet_can_be_stopped_and_woken_again():
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        sleepers = Sleepers(nursery, waiting)
        await sleepers.start(waiting, 3 * WAKES_AT_ONCE)
        waiting.wake()
        while not sleepers.woken[waiting]:
            await trio.sleep(0)
        waiting.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < len(waiting) < 3 * WAKES_AT_ONCE
        waiting.wake()
    assert len(sleepers.woken[waiting]) == 3 * WAKES_AT_ONCE
    waiting.wake()


async def test_those_who_come_later_are_not_woken():
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        sleepers = Sleepers(nursery, waiting)
        await sleepers.start(waiting, 3)
        waiting.wake()
        await trio.testing.wait_all_tasks_blocked()
        await sleepers.start(waiting, 1)
        assert len(waiting) == 1
        waiting.wake()


async def test_the_end_of_a_channel_is_not_undone_by_a_pause():
    """Else requests that have not been told of the end yet would stand still for ever."""
    all_of_them = Undertakings(lambda: None, lambda: None)
    ended = 0

    async def stand_still() -> None:
        nonlocal ended
        try:
            await all_of_them.begin(0, str).enter()
        except trio.EndOfChannel:
            ended += 1

    async with trio.open_nursery() as nursery:
        all_of_them.hold()
        for _ in range(3 * WAKES_AT_ONCE):
            nursery.start_soon(stand_still)
        await trio.testing.wait_all_tasks_blocked()
        all_of_them.end()
        all_of_them.hold()
    assert ended == 3 * WAKES_AT_ONCE


async def test_the_end_of_a_channel_ends_what_rests_in_turns():
    all_of_them = Undertakings(lambda: None, lambda: None)
    work = Work()

    async def rest() -> None:
        try:
            await all_of_them.begin(0, str).rest(trio.sleep_forever)
        except trio.EndOfChannel:
            work.done()

    async with trio.open_nursery() as nursery:
        for _ in range(3 * WAKES_AT_ONCE):
            nursery.start_soon(rest)
        await trio.testing.wait_all_tasks_blocked()
        with watched(work):
            all_of_them.end()
            await trio.testing.wait_all_tasks_blocked()
    assert work.total == 3 * WAKES_AT_ONCE
    assert work.most_in_turn <= WAKES_AT_ONCE

"""Parts of a staging area: no two overlap, none gets lost, first come, first served."""

from __future__ import annotations

import random

import trio
import trio.testing

from storvsp.shared.staging import PAGE, Staging
from vmbus.plugins.sharing import make_line

PAGES = 16


def staging() -> Staging:
    ours, theirs = make_line(PAGES * PAGE)
    ours.sock.close()
    theirs.close()
    assert ours.staging_fd is not None
    return Staging(ours.staging_fd)


async def test_parts_do_not_overlap_and_come_back():
    area = staging()
    chance = random.Random(1)
    held: list[tuple[int, int]] = []

    async def use() -> None:
        for _ in range(50):
            length = chance.choice([0, 1, PAGE, PAGE + 1, 5 * PAGE])
            offset = await area.take(length)
            size = max(length, 1) + -length % PAGE
            part = (offset, offset + size)
            assert all(part[1] <= low or high <= part[0] for low, high in held)
            held.append(part)
            await trio.lowlevel.checkpoint()
            held.remove(part)
            area.give(offset, length)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(use)
    assert area._free == [(0, area.size)]
    area.close()


async def test_a_long_one_is_not_overtaken_by_short_ones():
    area = staging()
    first = await area.take(15 * PAGE)
    order: list[str] = []

    async def take(name: str, pages: int) -> None:
        await area.take(pages * PAGE)
        order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "long", 12)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(take, "short", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        area.give(first, 15 * PAGE)
    assert order == ["long", "short"]
    area.close()


async def test_whoever_gives_up_holds_nobody_up():
    area = staging()
    await area.take(15 * PAGE)
    order: list[str] = []

    async def short() -> None:
        await area.take(PAGE)
        order.append("short")

    scope = trio.CancelScope()

    async def long() -> None:
        with scope:
            await area.take(12 * PAGE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(long)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(short)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        scope.cancel()
    assert order == ["short"]
    area.close()

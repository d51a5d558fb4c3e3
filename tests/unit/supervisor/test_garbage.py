"""A worker looks for garbage when it has little else to do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import trio
import trio.testing

from vmbus.supervisor import garbage


@contextmanager
def full_collections() -> Iterator[list[float]]:
    """When there are full collections, in seconds of the loop's clock."""
    found: list[float] = []

    def told(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(trio.current_time())

    gc.callbacks.append(told)
    try:
        yield found
    finally:
        gc.callbacks.remove(told)


def make_much() -> list[list[int]]:
    """Objects that would make Python look at all of them, several times."""
    return [[number] for number in range(400_000)]


async def test_an_idle_worker_collects_and_others_go_on_as_before(autojump_clock):
    before = gc.get_threshold()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(garbage.collect_when_idle)
        with full_collections() as found:
            await trio.sleep(2.5 * garbage.INTERVAL)
        assert [each - start for each in found] == [garbage.INTERVAL, 2 * garbage.INTERVAL]
        nursery.cancel_scope.cancel()
    assert gc.get_threshold() == before


async def test_nothing_is_collected_in_full_while_thousands_of_commands_wait(autojump_clock):
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(garbage.collect_when_idle)
        for _ in range(garbage.FEW_TASKS):
            nursery.start_soon(trio.sleep_forever)
        with full_collections() as found:
            await trio.testing.wait_all_tasks_blocked()
            kept = make_much()
            await trio.sleep(garbage.LONGEST - 1)
            assert not found
            await trio.sleep(garbage.INTERVAL)
        assert len(found) == 1  # not for ever, though
        assert garbage.LONGEST <= found[0] - start < garbage.LONGEST + garbage.INTERVAL
        assert len(kept) == 400_000
        nursery.cancel_scope.cancel()

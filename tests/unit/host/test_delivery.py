"""Control messages on their way to the slot: order, holding, dropping."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from vmbus.engine.events import SendMessage
from vmbus.host.delivery import Deliveries


class Slot:
    """A transport with one slot that the test empties."""

    name = "slot"

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.free = trio.Event()
        self.free.set()
        self.gone = False
        self.enabled = True

    async def deliver(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        await self.free.wait()
        if self.gone:
            raise trio.BrokenResourceError
        self.taken.append(payload)
        return self.enabled


class Rig:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.slot = Slot()
        self.told = 0
        transport: Any = self.slot
        self.deliveries = Deliveries(transport, self._delivered)
        nursery.start_soon(self.deliveries.run)

    def _delivered(self) -> None:
        self.told += 1

    def put(self, *payloads: bytes, reserved: bool = False) -> None:
        for payload in payloads:
            self.deliveries.put(SendMessage(vp=0, sint=2, payload=payload, reserved=reserved))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        yield Rig(nursery)
        nursery.cancel_scope.cancel()


async def test_messages_go_in_order(rig):
    rig.put(b"1", b"2", b"3")
    assert len(rig.deliveries) == 3
    await rig.deliveries.wait_delivered()
    assert rig.slot.taken == [b"1", b"2", b"3"]
    assert rig.told == 3
    await rig.deliveries.wait_delivered()


async def test_each_waiter_waits_for_what_was_there_when_it_came(rig):
    rig.deliveries.hold()
    done: list[int] = []

    async def wait(number: int) -> None:
        await rig.deliveries.wait_delivered()
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            rig.put(b"x")
            nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
        assert done == []
        rig.deliveries.hold()
        rig.deliveries.flow()
    assert sorted(done) == [0, 1, 2]


async def test_a_message_that_finds_no_slot_is_over_all_the_same(rig):
    rig.slot.enabled = False
    rig.put(b"1")
    await rig.deliveries.wait_delivered()
    assert rig.told == 1


async def test_what_a_departed_guest_was_to_be_told_is_forgotten(rig):
    rig.slot.free = trio.Event()
    rig.put(b"under way", b"waiting")
    rig.put(b"reserved", reserved=True)
    await trio.testing.wait_all_tasks_blocked()
    rig.deliveries.drop()
    rig.put(b"new")
    rig.slot.free.set()
    await rig.deliveries.wait_delivered()
    assert rig.slot.taken == [b"reserved", b"new"]


async def test_a_reserved_message_under_way_is_delivered_unless_the_machine_is_reset(rig):
    rig.slot.free = trio.Event()
    rig.put(b"reserved", reserved=True)
    await trio.testing.wait_all_tasks_blocked()
    rig.deliveries.drop()
    rig.slot.free.set()
    await rig.deliveries.wait_delivered()
    assert rig.slot.taken == [b"reserved"]
    rig.slot.free = trio.Event()
    rig.put(b"a", b"b", reserved=True)
    await trio.testing.wait_all_tasks_blocked()
    rig.deliveries.drop(reserved=True)
    await rig.deliveries.wait_delivered()
    rig.slot.free.set()
    await trio.testing.wait_all_tasks_blocked()
    assert rig.slot.taken == [b"reserved"]


async def test_dropping_while_held_leaves_nothing_to_deliver(rig):
    rig.deliveries.hold()
    rig.put(b"1")
    await trio.testing.wait_all_tasks_blocked()
    rig.deliveries.drop()
    rig.deliveries.flow()
    await trio.testing.wait_all_tasks_blocked()
    rig.put(b"2")
    await rig.deliveries.wait_delivered()
    assert rig.slot.taken == [b"2"]


async def test_the_end_of_the_partition_is_the_end_of_deliveries():
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery)
        rig.slot.gone = True
        rig.put(b"1")
    assert len(rig.deliveries) == 0

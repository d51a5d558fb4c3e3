"""Doorbells in shared pages: which bits wake whom, and when anybody looks."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE
from vmbus.host.channel import Channel
from vmbus.host.doorbells import (
    HALF_PAGE,
    InterruptPage,
    InterruptPageCall,
    MonitorPage,
    SilentCall,
)
from vmbus.memory import GuestMemory, allocate_memory
from vmbus.testing import channel_pair
from vmbus.wire.monitor import pending_word

PAGE = 0x3000


@pytest.fixture
def memory() -> GuestMemory:
    return allocate_memory(16 * 4096)


def rung(channel: Channel) -> bool:
    try:
        return os.eventfd_read(channel.doorbell_fd) > 0
    except BlockingIOError:
        return False


class Call:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.log: list[object] = []

    def signal(self) -> None:
        self.log.append("signal")

    def retarget(self, vp: int) -> None:
        self.log.append(vp)

    def close(self) -> None:
        self.log.append("close")


async def test_a_bit_wakes_all_channels_of_its_word(memory):
    page = MonitorPage(memory)
    channels = {number: channel_pair()[0] for number in (0, 31, 32, 127)}
    for number, channel in channels.items():
        page.add(number, channel, 100)
    page.use(PAGE)
    assert not page.scan()
    words = memory.page(PAGE >> 12).cast("I")
    words[pending_word(0)] = 1 << 5
    assert page.scan()
    assert words[pending_word(0)] == 0
    assert [number for number, channel in channels.items() if rung(channel)] == [0, 31]
    words[pending_word(3)] = 1 << 31
    page.remove(0)
    assert page.scan()
    assert [number for number, channel in channels.items() if rung(channel)] == [127]
    assert (page.polls, page.hits) == (3, 2)
    for channel in channels.values():
        channel.close_doorbell()


async def test_there_is_nothing_to_look_at_without_a_page(memory):
    page = MonitorPage(memory)
    channel = channel_pair()[0]
    page.add(1, channel, 100)
    assert not page.scan()
    page.use(PAGE)
    page.use(None)
    assert not page.scan()
    page.use(1 << 40)
    assert not page.scan()
    assert page.polls == 0
    channel.close_doorbell()


async def test_a_page_goes_with_its_memory(memory):
    monitor, interrupt = MonitorPage(memory), InterruptPage(memory)
    monitor.use(PAGE)
    interrupt.use(PAGE + 4096)
    monitor.forget(0x8000, 0x1000)
    interrupt.forget(0x8000, 0x1000)
    memory.remove_region(0, 16 * 4096)
    assert not memory.drained()
    monitor.forget(0, 16 * 4096)
    interrupt.forget(0, 16 * 4096)
    monitor.forget(0, 16 * 4096)
    interrupt.forget(0, 16 * 4096)
    assert memory.drained()


async def test_the_page_is_polled_while_there_is_need(memory, autojump_clock):
    page = MonitorPage(memory)
    channel = channel_pair()[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page.run)
        await trio.testing.wait_all_tasks_blocked()
        page.use(PAGE)
        await trio.testing.wait_all_tasks_blocked()
        assert page.polls == 0
        page.add(7, channel, 0)
        memory.page(PAGE >> 12).cast("I")[pending_word(0)] = 1
        with trio.fail_after(PATIENCE):
            while not page.hits:
                await trio.sleep(0.001)
        page.remove(7)
        await trio.sleep(0.01)
        polls = page.polls
        await trio.sleep(0.01)
        assert page.polls == polls
        nursery.cancel_scope.cancel()
    assert rung(channel)
    channel.close_doorbell()


async def test_the_hosts_half_of_the_interrupt_page_has_a_bit_for_each_relid(memory):
    page = InterruptPage(memory)
    page.set_bit(1)
    page.use(PAGE)
    for relid in (1, 2, 9, 2047):
        page.set_bit(relid)
    view = memory.page(PAGE >> 12)
    assert (view[0], view[1], view[255]) == (0b110, 0b10, 0x80)
    page.use(None)
    page.use(1 << 40)
    page.set_bit(3)
    assert view[0] == 0b110


async def test_the_shared_doorbell_clears_the_guests_half_and_wakes_everybody(memory):
    page = InterruptPage(memory)
    channels = [channel_pair()[0] for _ in range(3)]
    page.scan(lambda: channels)
    assert all(rung(channel) for channel in channels)
    page.use(PAGE)
    view = memory.page(PAGE >> 12)
    view[:] = b"\xff" * 4096
    page.scan(lambda: channels[:1])
    assert [rung(channel) for channel in channels] == [True, False, False]
    assert not any(view[HALF_PAGE:])
    assert all(view[:HALF_PAGE])
    for channel in channels:
        channel.close_doorbell()


async def test_an_old_guest_gets_a_bit_and_then_a_signal(memory):
    page = InterruptPage(memory)
    page.use(PAGE)
    inner = Call()
    call = InterruptPageCall(page, 5, inner)
    call.signal()
    assert memory.page(PAGE >> 12)[0] == 1 << 5
    call.retarget(3)
    call.close()
    assert inner.log == ["signal", 3, "close"]


async def test_a_silent_call_does_nothing():
    call = SilentCall()
    call.signal()
    call.retarget(1)
    call.close()

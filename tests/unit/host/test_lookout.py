"""How long a channel looks for packets before it sleeps."""

from __future__ import annotations

import itertools
import time

import pytest
import trio
import trio.testing

from vmbus.host.lookout import (
    DEFAULT_LONGEST,
    FIRST,
    LONGEST_OF_ALL,
    Lookout,
    longest_worth_while,
)
from vmbus.testing import channel_pair
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, IN_BAND, build_packet

LONGEST = 100e-6


def test_nothing_is_looked_for_at_first():
    assert Lookout(LONGEST).window == 0


def test_short_sleeps_widen_the_window_up_to_the_longest_look():
    lookout = Lookout(LONGEST)
    windows = []
    for _ in range(6):
        lookout.slept(50e-6)
        windows.append(lookout.window)
    assert windows == pytest.approx([FIRST, 20e-6, 40e-6, 80e-6, LONGEST, LONGEST])


def test_a_long_sleep_closes_the_window():
    lookout = Lookout(LONGEST)
    lookout.slept(50e-6)
    lookout.slept(LONGEST * 2)
    assert lookout.window == 0


def test_without_a_longest_look_there_is_never_one():
    lookout = Lookout(0)
    lookout.slept(0)
    lookout.slept(1)
    assert lookout.window == 0


async def test_what_is_worth_while_depends_on_the_machine(monkeypatch):
    """Each turn of the loop seems to take so long."""
    for turn, expected in ((1e-6, DEFAULT_LONGEST), (50e-6, 64 * 50e-6), (1.0, LONGEST_OF_ALL)):
        ticks = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda turn=turn, ticks=ticks: next(ticks) * turn)
        assert await longest_worth_while() == pytest.approx(expected)


def packet(identity: int) -> bytes:
    return build_packet(IN_BAND, bytes(8), transaction_id=identity)


async def looking(channel, guest):
    """Bring the channel to where it looks for its next packet for a very long time."""
    guest.send(packet(1))
    await channel.receive_batch()
    channel._lookout.window = 1e9


async def send_into_a_sleep(channel, guest):
    """Have the channel wait for a packet, asleep, and send one."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        guest.send(packet(2))


async def test_a_guest_that_is_looked_for_rings_no_doorbell():
    channel, guest = channel_pair(longest_look=1e9)
    await looking(channel, guest)
    before = guest.doorbells
    received = []

    async def receive() -> None:
        received.extend(await channel.receive_batch())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert not received
        assert guest.send(packet(2)) == 1

    assert [each.transaction_id for each in received] == [2]
    assert guest.doorbells == before
    assert channel.statistics.polled == 1
    channel.end()
    channel.close_doorbell()


async def test_nothing_is_looked_for_while_a_request_waits_for_its_answer():
    channel, guest = channel_pair(longest_look=1e9)
    guest.send(
        build_packet(IN_BAND, bytes(8), transaction_id=1, flags=FLAG_COMPLETION_REQUESTED),
    )
    await channel.receive_batch()
    channel._lookout.window = 1e9
    before = guest.doorbells

    await send_into_a_sleep(channel, guest)

    assert guest.doorbells == before + 1
    assert channel.statistics.polled == 0
    channel.end()
    channel.close_doorbell()


async def test_a_look_that_finds_nothing_ends_in_a_sleep_with_the_doorbell_on():
    channel, guest = channel_pair(longest_look=1e9)
    await looking(channel, guest)
    channel._lookout.window = 1e-6
    before = guest.doorbells
    await send_into_a_sleep(channel, guest)

    assert guest.doorbells == before + 1
    assert channel._lookout.window > 1e-6
    channel.end()
    channel.close_doorbell()


async def test_the_end_ends_a_look():
    channel, guest = channel_pair(longest_look=1e9)
    await looking(channel, guest)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.EndOfChannel):
                await channel.receive_batch()

        await trio.lowlevel.checkpoint()
        channel.end()
    assert channel.ended
    channel.close_doorbell()


async def test_a_pause_ends_a_look():
    channel, guest = channel_pair(longest_look=1e9)
    await looking(channel, guest)
    received = []

    async def receive() -> None:
        received.extend(await channel.receive_batch())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.lowlevel.checkpoint()
        await channel.pause()
        guest.send(packet(2))
        await trio.testing.wait_all_tasks_blocked()
        assert not received
        channel.resume()

    assert [each.transaction_id for each in received] == [2]
    channel.end()
    channel.close_doorbell()

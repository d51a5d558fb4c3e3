"""Guests and hosts that end in the middle of everything."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from tests.support.worlds import EchoDevice, RawGuest, controller, whole_life, world
from vmbus.guest import LINUX_6_1, GuestPanic
from vmbus.wire import messages as m


async def test_a_guest_that_vanishes_takes_nothing_with_it():
    device = EchoDevice(sub_channels=2)
    async with world(device) as there:
        with trio.CancelScope() as life:
            async with there.boot(LINUX_6_1) as guest, trio.open_nursery() as nursery:
                (offer,) = await guest.connection.connect()
                channel = await guest.connection.open_channel(offer, ring_pages=4)

                async def ask() -> None:
                    # A request that begins after the end finds no doorbell any more.
                    with contextlib.suppress(GuestPanic):
                        await channel.request(bytes(64))

                for _ in range(20):
                    nursery.start_soon(ask)
                await trio.sleep(0)
                there.transport.close()
                life.cancel()
        await there.bus.wait_gone()
    assert device.running == 0
    assert device.closed == 1


async def test_a_guest_that_vanishes_with_messages_on_their_way_takes_nothing_with_it():
    device = EchoDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        for _ in range(3):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=5)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        await there.settle()
        there.transport.close()
        await there.bus.wait_gone()
        await there.settle()
    assert device.closed == 1


async def test_a_body_that_fails_ends_the_bus_and_its_error_is_not_wrapped():
    device = EchoDevice()
    with pytest.raises(ZeroDivisionError):
        async with world(device) as there:
            guest = RawGuest(there)
            await guest.connect()
            await guest.open()
            raise ZeroDivisionError
    assert device.closed == 1
    assert device.running == 0


async def test_a_guest_notices_a_host_that_writes_to_memory_it_has_given_back():
    """The check that other tests rely on can fail."""
    device = EchoDevice()
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        (runner,) = there.bus.runners.values()
        pfn = runner.event.gpadl.pages[-1]
        await guest.connection.close_channel(channel)
        guest.check_memory()
        there.machine.memory.write(pfn * 4096, b"late")
        with pytest.raises(GuestPanic, match="after giving them back"):
            guest.check_memory()


async def test_many_lives_under_load_do_not_grow_the_host():
    """Ports, doorbells, runners and views of memory are all given back."""
    async with world(controller()) as there:
        sizes = []
        for turn in range(6):
            async with there.boot(LINUX_6_1, seed=turn) as guest:
                await whole_life(guest)
            await there.settle()
            assert not there.bus.runners
            sizes.append((len(there.transport._event_ports), len(there.bus.monitor._channels)))
        assert sizes == [(0, 0)] * 6

"""A channel's task: openings that fail, ports that cannot be had, devices that misbehave."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE
from tests.support.worlds import (
    EchoDevice,
    FailingTransport,
    RawGuest,
    World,
    number,
    numbers,
    world,
)
from vmbus.errors import STATUS_INVALID_DEVICE_STATE, AttachError, GuestProtocolError
from vmbus.host import open_bus
from vmbus.host.device import Device
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire import messages as m
from vmbus.wire.versions import Version


@contextlib.asynccontextmanager
async def failing(*devices: Device, **fails: Exception) -> AsyncIterator[World]:
    machine = SoftMachine(((0, 8 << 20),), vp_count=2)
    try:
        with trio.fail_after(PATIENCE), FailingTransport(machine.synic, **fails) as transport:
            async with open_bus(transport, devices) as bus:
                yield World(machine, transport, bus)
    finally:
        machine.close()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("event_port", AttachError("id in use")),
        ("event_port", OSError(24, "too many open files")),
        ("event_port", trio.BrokenResourceError("gone")),
        ("open_call", OSError(24, "too many open files")),
    ],
)
async def test_an_opening_that_fails_is_refused_and_can_be_tried_again(what, error):
    device = EchoDevice(1)
    async with failing(device, **{what: error}) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        (raw,) = await guest.post(guest.open_message(1, 7, 4))
        assert guest.parse(raw).status != 0
        assert not there.bus.runners
        assert not device.lives
        assert isinstance(there.transport, FailingTransport)
        there.transport.fails.clear()
        (raw,) = await guest.post(guest.open_message(1, 7, 4))
        assert guest.parse(raw).status == 0
        assert len(device.lives) == 1


async def test_rings_that_are_gone_when_the_channel_opens_are_refused():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        gpa, size = 1 << 32, 1 << 20
        there.machine.memory.add_region(gpa, size, there.machine.fds[0])
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(gpa >> 12, (gpa >> 12) + 8)))
        await there.transport.remove_memory(gpa, size)
        (raw,) = await guest.post(guest.open_message(1, 7, 4))
        assert guest.parse(raw).status != 0
        assert there.bus.snapshot()["faults"] == 1


@pytest.mark.parametrize(("page", "word"), [(0x40, 1), (0x44, 0), (0x44, 1)])
async def test_rings_with_impossible_indices_are_refused(page, word):
    async with world(EchoDevice(1)) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        there.machine.memory.page(page).cast("I")[word] = 3
        (raw,) = await guest.post(guest.open_message(1, 7, 4))
        assert guest.parse(raw).status != 0


@pytest.mark.parametrize("error", [AttachError("what port"), trio.BrokenResourceError("gone")])
async def test_a_port_that_cannot_be_removed_is_no_matter(error):
    device = EchoDevice(1)
    async with failing(device, remove_port=error) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        guest.post_bytes(guest.build(m.CloseChannel(relid=1)))
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == [12]


async def test_a_guest_that_opens_and_closes_for_ever_fills_no_log(caplog):
    caplog.set_level("INFO")
    device = EchoDevice(1)
    async with failing(device, remove_port=AttachError("what port")) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        for _ in range(60):
            await guest.post(guest.open_message(1, 7, 4))
            await guest.post(m.CloseChannel(relid=1))
        assert len(device.lives) == 60
    assert 2 <= len([each for each in caplog.records if "channel 1" in each.getMessage()]) <= 25


async def test_a_channel_without_interrupts_is_silent():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        await guest.post(guest.open_message(1, 7, 4, target_vp=0xFFFFFFFF))
        there.transport.trail.clear()
        device.lives[0].send(bytes(8))
        await device.lives[0].flush()
        assert there.machine.memory.page(0x44).cast("I")[0]
        assert there.transport.trail == []
        (raw,) = await guest.post(m.ModifyChannel(relid=1, target_vp=0))
        assert guest.parse(raw).status != 0


async def test_a_moved_channel_interrupts_its_new_vp():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        await guest.post(m.ModifyChannel(relid=1, target_vp=2))
        device.lives[0].send(bytes(8))
        await device.lives[0].flush()
        assert guest.synic.flags() == set()


async def test_the_opening_data_reaches_the_device():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        data = bytes(range(120))
        await guest.post(guest.open_message(1, 7, 4, user_data=data))
        channel = device.lives[0]
        assert channel.open_user_data == data
        assert channel.version == Version.V5_3
        assert (channel.relid, channel.subchannel_index) == (1, 0)


async def test_a_channel_that_is_closed_while_it_opens_is_closed():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        guest.post_bytes(guest.build(m.Unload()))
        assert numbers(await guest.receive())[-1] == 17
        assert not there.bus.runners
        assert device.running == 0


async def test_a_sub_channel_that_nobody_takes_is_closed_with_its_primary():
    class Deaf(EchoDevice):
        async def _accept(self, primary: Any, nursery: trio.Nursery) -> None:
            await trio.sleep_forever()

    device = Deaf(1, sub_channels=1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        (raw,) = await guest.open()
        relid = guest.parse(raw).relid
        await guest.post(*guest.gpadl(relid, 8, range(0x80, 0x88)))
        assert numbers(await guest.post(guest.open_message(relid, 8, 4))) == [6]
        # The guest hears of the sub-channel's end, and asks for its pages back.
        assert numbers(await guest.post(m.CloseChannel(relid=1))) == [2]
        assert numbers(await guest.post(m.GpadlTeardown(relid=relid, gpadl=8))) == [12]
        assert not there.bus.runners


async def test_a_sub_channel_can_be_closed_and_opened_again():
    device = EchoDevice(1, sub_channels=1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        (raw,) = await guest.open()
        relid = guest.parse(raw).relid
        await guest.post(*guest.gpadl(relid, 8, range(0x80, 0x88)))
        for _ in range(3):
            assert numbers(await guest.post(guest.open_message(relid, 8, 4))) == [6]
            assert len(device.channels) == 2
            await guest.post(m.CloseChannel(relid=relid))
            assert len(device.channels) == 1


async def test_sub_channels_cannot_be_offered_twice():
    device = EchoDevice(1, sub_channels=2)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        assert len(await guest.open()) == 2
        with pytest.raises(GuestProtocolError, match="already") as caught:
            device.lives[0].offer_subchannels(1)
        assert caught.value.status == STATUS_INVALID_DEVICE_STATE


async def test_several_failures_of_a_device_are_told_in_one_line(caplog):
    device = EchoDevice(1)

    async def fail(primary: Any) -> None:
        async def one() -> None:
            raise ValueError("one")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)

    device.on_run = fail
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        assert [number(raw) for raw in await guest.open()] == [2]
    assert "the device failed" in caplog.text


async def test_a_device_that_is_cancelled_by_itself_is_rescinded():
    device = EchoDevice(1)

    async def stop(primary: Any) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.sleep_forever()
        device.offer_subchannels = 0

    async def run(primary: Any) -> None:
        await stop(primary)

    device.run = run  # type: ignore[method-assign]
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        assert [number(raw) for raw in await guest.open()] == [2]


async def test_a_removed_device_whose_channel_opens_late_is_not_served():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.post(*guest.gpadl(1, 7, range(0x40, 0x48)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        await there.bus.remove_device(1)
        seen = numbers(await guest.receive())
        assert seen[-1] == 2
        assert not there.bus.runners
        assert device.closed == 1

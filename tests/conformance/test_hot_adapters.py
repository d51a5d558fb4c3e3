"""Network adapters that come to guests that run, and go under traffic."""

from __future__ import annotations

import pytest
import trio

from netvsp import adapter as adapter_module
from netvsp.endpoints.loopback import LoopbackEndpoint
from netvsp.frames.frame import Frame
from netvsp.guest import HABITS, NetvscAdapter, attach
from netvsp.wire import nvsp
from tests.support.nics import MAC, PEER, Wire, network_adapter, plain_frame
from tests.support.patience import until
from tests.support.worlds import ALL, World, world
from vmbus.guest import LINUX_6_1, PERSONALITIES, Guest, GuestPanic
from vmbus.guest.personality import Rescind
from vmbus.host.device import Device
from vmbus.wire import messages as m

DRIVERS = [PERSONALITIES[key] for key in ALL if key in HABITS]
OTHER = bytes.fromhex("00155d0a0b0d")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Python guests hear of their link at once."""
    monkeypatch.setattr(adapter_module, "STOP_SENDING", 0.0)


@pytest.fixture(params=DRIVERS, ids=str)
def driver(request):
    return request.param


async def started(guest: Guest, device: Device) -> NetvscAdapter:
    """Attach the driver to a device, as soon as it is offered, and bring it up."""
    instance = device.offer.instance_id
    offers = await guest.connection.wait_offers(
        lambda offer: offer.instance_id == instance and not offer.subchannel_index
    )
    adapter = await attach(
        guest, offers[0], contiguous=False, receive_size=1 << 20, send_size=1 << 20
    )
    await adapter.up()
    return adapter


async def remove(there: World, device: Device) -> None:
    (number,) = (number for number, each in there.bus.devices.items() if each is device)
    await there.bus.remove_device(number)


async def check_frames(adapter: NetvscAdapter, source: bytes = MAC) -> None:
    """Send frames into a loopback, and get them back."""
    for size in (60, 1514):
        frame = plain_frame(size, source=source, seed=size)
        assert await adapter.send(frame) == nvsp.SUCCESS
        assert (await adapter.receive()).data == source + PEER + frame[12:]


async def test_an_adapter_that_is_added_later_is_found_and_works(driver):
    first, second = (
        network_adapter(driver, LoopbackEndpoint(), number=number, mac=mac)
        for number, mac in ((1, MAC), (2, OTHER))
    )
    async with world(first) as there, there.boot(driver) as guest:
        await guest.connection.connect()
        one = await started(guest, first)
        there.bus.add_device(second)
        two = await started(guest, second)
        assert (one.address, two.address) == (MAC, OTHER)
        await check_frames(two, OTHER)
        await check_frames(one)
        assert not there.bus.faults
        guest.check_memory()


async def test_an_adapter_is_removed_under_traffic_both_ways_and_the_other_goes_on(driver):
    wire = Wire()
    first = network_adapter(driver, wire, number=1)
    second = network_adapter(driver, LoopbackEndpoint(), number=2, mac=OTHER)
    async with world(first, second) as there, there.boot(driver) as guest:
        await guest.connection.connect()
        doomed, other = await started(guest, first), await started(guest, second)
        ends: list[BaseException] = []
        frame, back = plain_frame(590), plain_frame(590, to=MAC, source=PEER)

        async def send() -> None:
            while doomed.link:  # as every network stack does
                await doomed.send(frame)

        async def receive() -> None:
            try:
                while True:
                    await doomed.receive()
            except trio.BrokenResourceError as error:
                ends.append(error)

        async def bring() -> None:
            while (port := wire.port) is not None:
                port.receive([Frame(back)] * 8)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            await until(lambda: wire.port is not None)
            nursery.start_soon(bring)
            await wire.wait_sent(20)
            await remove(there, first)
            assert wire.closed == 1
            assert wire.port is None
            await check_frames(other, OTHER)
            if driver.rescind is Rescind.RELEASE:
                await until(lambda: len(ends) == 1)
            nursery.cancel_scope.cancel()
        if driver.rescind is Rescind.RELEASE:
            await guest.connection.wait_gone(doomed.offer.relid)
        assert there.transport.messages.count(m.RescindChannelOffer.TYPE) == len(doomed.channels)
        await check_frames(other, OTHER)
        assert not there.bus.faults
        guest.check_memory()


async def test_an_adapter_that_comes_back_at_once_is_offered_when_the_guest_has_let_go():
    device = network_adapter(LINUX_6_1, LoopbackEndpoint())
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        await guest.connection.connect()
        adapter = await started(guest, device)
        for _ in range(5):
            await check_frames(adapter)
            await remove(there, device)
            device = network_adapter(LINUX_6_1, LoopbackEndpoint())
            # At once: the guest still has the old one, of the same instance.
            there.bus.add_device(device)
            await guest.connection.wait_gone(adapter.offer.relid)
            adapter = await started(guest, device)
        await check_frames(adapter)
        assert not there.bus.faults
        guest.check_memory()


async def test_an_endpoint_that_takes_nothing_does_not_keep_its_adapter():
    wire = Wire()
    wire.room = 0
    device = network_adapter(LINUX_6_1, wire)
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        await guest.connection.connect()
        adapter = await started(guest, device)
        async with trio.open_nursery() as nursery:
            # Answered, and dropped: a driver that waits for its answers gets them.
            for _ in range(3):
                nursery.start_soon(adapter.send, plain_frame(590))
            await there.settle()
            await remove(there, device)
        assert device.statistics.transmit.dropped == {"link down": 3}
        assert not there.bus.devices
        await guest.connection.wait_gone(adapter.offer.relid)
        guest.check_memory()


async def test_a_linux_that_sends_on_while_its_adapter_is_taken_away_would_hang():
    """The rule that the others keep is one that can be broken."""
    device = network_adapter(LINUX_6_1, Wire())
    async with world(device) as there:
        with pytest.raises(GuestPanic, match=r"1 packet\(s\) unanswered: the driver waits for"):
            async with there.boot(LINUX_6_1) as guest:
                await guest.connection.connect()
                adapter = await started(guest, device)
                runners = list(there.bus.runners.values())
                for runner in runners:
                    await runner.drain()  # nothing is answered any more
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(adapter.send, plain_frame(590))
                    await there.settle()
                    there.bus.engine.revoke(runners[0].event.primary_key)
                    there.bus.pump()

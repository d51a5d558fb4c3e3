"""Devices that fail, hang or stop under guests that are at work."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from storvsp.disks.ram import RamDisk
from storvsp.guest import attach, scan
from tests.support.patience import SOON
from tests.support.storage_line import INQUIRY
from tests.support.worlds import (
    EchoDevice,
    RawGuest,
    controller,
    exercise,
    first_disk,
    numbers,
    world,
)
from vmbus.errors import GuestProtocolError
from vmbus.guest import LINUX_6_1, UEFI
from vmbus.host import BusConfig
from vmbus.host.roster import MAX_FAULTY_LIVES
from vmbus.wire import messages as m


def raise_an_error(channel: object, packet: object) -> None:
    raise RuntimeError("boom")


def break_a_rule(channel: object, packet: object) -> None:
    raise GuestProtocolError("what is this", field="nonsense")


@pytest.mark.parametrize("misdeed", [raise_an_error, break_a_rule])
async def test_a_device_that_raises_is_offered_again_and_the_others_do_not_notice(misdeed, caplog):
    bad, good = EchoDevice(1, sub_channels=1), EchoDevice(2)
    async with world(bad, good) as there, there.boot(LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        broken = await guest.connection.open_channel(offers[0], ring_pages=4)
        fine = await guest.connection.open_channel(offers[1], ring_pages=4)
        (sub,) = await guest.connection.wait_offers(lambda offer: offer.subchannel_index > 0)
        lent = await guest.connection.open_channel(sub, ring_pages=4)
        assert (await lent.request(b"12345678")).payload == b"12345678"
        bad.on_packet = misdeed
        with pytest.raises(trio.BrokenResourceError):
            await broken.request(b"")
        with pytest.raises(trio.BrokenResourceError):
            await lent.request(b"")
        assert (await fine.request(b"abcdefgh")).payload == b"abcdefgh"
        bad.on_packet = None
        await guest.connection.wait_gone(broken.relid)

        def returned(offer: m.OfferChannel) -> bool:
            return offer.instance_id == bad.offer.instance_id and not offer.subchannel_index

        (again,) = await guest.connection.wait_offers(returned)
        channel = await guest.connection.open_channel(again, ring_pages=4)
        assert (await channel.request(b"01234567")).payload == b"01234567"
        assert there.bus.devices[1] is bad
        guest.check_memory()
    assert bad.closed == good.closed == 1
    if misdeed is raise_an_error:
        assert "the device failed" in caplog.text


async def test_a_device_that_fails_for_ever_is_offered_to_the_next_guest_only():
    bad = EchoDevice()
    bad.on_packet = raise_an_error
    async with world(bad) as there, there.boot(LINUX_6_1) as guest:
        await guest.connection.connect()
        for _ in range(MAX_FAULTY_LIVES):
            (offer,) = await guest.connection.wait_offers(lambda _: True)
            channel = await guest.connection.open_channel(offer, ring_pages=4)
            with pytest.raises(trio.BrokenResourceError):
                await channel.request(b"")
            await guest.connection.wait_gone(offer.relid)
        await there.settle()
        assert guest.connection.offers == {}
        await guest.connection.unload()
        bad.on_packet = None
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        assert (await channel.request(b"01234567")).payload == b"01234567"


async def test_a_device_that_fails_for_ever_can_still_be_removed():
    bad = EchoDevice()
    bad.on_packet = raise_an_error
    async with world(bad) as there, there.boot(UEFI) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        await channel.send(b"")
        await there.settle()
        assert there.bus.snapshot()["devices"][0]["faulty_lives"] == 1
        await there.bus.remove_device(1)
        assert bad.closed == 1


async def test_a_device_that_just_stops_is_rescinded():
    quitter = EchoDevice()

    async def at_once(primary: object) -> None:
        quitter.offer_subchannels = 0
        raise trio.EndOfChannel

    quitter.on_run = at_once
    async with world(quitter) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        with pytest.raises(trio.BrokenResourceError):
            await channel.request(b"")
        await guest.connection.wait_gone(offer.relid)


async def test_a_device_that_hangs_at_the_end_is_cancelled_after_its_grace():
    async def hang(primary: object) -> None:
        await trio.sleep_forever()

    device = EchoDevice()
    device.on_run = hang
    async with world(device, config=BusConfig(close_grace=SOON)) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        assert guest.post_bytes(guest.build(m.CloseChannel(relid=1))) == 0
        assert guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=7))) == 0
        assert await guest.wait_for(m.GpadlTorndown.TYPE) == [m.GpadlTorndown.TYPE]
        assert not there.bus.runners
        assert device.running == 0


async def test_a_device_that_keeps_a_sub_channel_loses_its_life():
    class Miser(EchoDevice):
        async def _sub(self, channel):
            await trio.sleep_forever()

    device = Miser(sub_channels=1)
    async with world(device, config=BusConfig(close_grace=SOON)) as there:
        guest = RawGuest(there)
        await guest.connect()
        (raw,) = await guest.open()
        relid = guest.parse(raw).relid
        pfns = range(0x80, 0x88)
        assert numbers(await guest.post(*guest.gpadl(relid, 8, pfns))) == [m.GpadlCreated.TYPE]
        assert numbers(await guest.post(guest.open_message(relid, 8, 4))) == [
            m.OpenChannelResult.TYPE
        ]
        await guest.post(m.CloseChannel(relid=relid), m.GpadlTeardown(relid=relid, gpadl=8))
        seen = await guest.wait_for(m.GpadlTorndown.TYPE)
        assert m.RescindChannelOffer.TYPE in seen
        assert device.running == 0


async def test_a_corrupt_ring_costs_its_channel_only():
    # fuzz scenarios G12 and G13: fail closed, other channels are not affected
    bad, good = controller(number=1), controller(number=2)
    async with world(bad, good) as there, there.boot(LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        victim = await attach(guest, offers[0], contiguous=False)
        other = await attach(guest, offers[1], contiguous=False)
        (disk,) = await scan(other)
        runner = next(r for r in there.bus.runners.values() if r.event.relid == offers[0].relid)
        assert runner.channel is not None
        words = there.machine.memory.page(runner.event.gpadl.pages[0]).cast("I")
        words[0] = 0xFFFFFFF1
        runner.channel.poke()
        await there.settle()
        with pytest.raises(trio.BrokenResourceError):
            await victim.execute(INQUIRY, read=36)
        await exercise(other, disk, tasks=2)
        (offer,) = await guest.connection.wait_offers(
            lambda offer: offer.instance_id == bad.offer.instance_id
        )
        again = await attach(guest, offer, contiguous=False)
        await exercise(again, (await scan(again))[0], tasks=2)


async def test_a_new_disk_can_be_announced_over_a_corrupt_ring():
    store = controller()
    async with world(store) as there, there.boot(LINUX_6_1) as guest:
        await first_disk(guest, sub_channels=0)
        (runner,) = there.bus.runners.values()
        pfn = runner.event.gpadl.pages[runner.event.downstream_page_offset]
        there.machine.memory.page(pfn).cast("I")[1] = 3
        store.add_disk(RamDisk(1 << 20))
        await there.settle()
        assert there.bus.snapshot()["faults"] == 1
        assert len(store.units) == 2

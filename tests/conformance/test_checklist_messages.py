"""The rows of the acceptance checklist about control messages: contact, replies, relids, offers.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from tests.support.patience import until
from tests.support.worlds import (
    RAW_RING_PFN,
    EchoDevice,
    RawGuest,
    limited,
    number,
    numbers,
    ready,
    world,
)
from vmbus.guest import FREEBSD, HAIKU, LINUX_6_1
from vmbus.wire import messages as m
from vmbus.wire.synic import FLAG_PENDING
from vmbus.wire.versions import Version

EXACT = {1: 196, 2: 12, 4: 8, 6: 20, 10: 20, 12: 12, 15: 16, 17: 8, 24: 16}
"""Sizes of the messages to the guest, before 6.0."""


# --- Contact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 0xC, 0xE, 0x10000, 0x40002, 0x60001, 0x70000, 0xFFFFFFFF])
async def test_row_1_a_version_nobody_knows_is_refused_by_an_answer(version):
    async with world() as there:
        guest = RawGuest(there)
        (reply,) = await guest.contact(version, connection_id=1)
        assert (number(reply), len(reply), reply[8]) == (15, 16, 0)


@pytest.mark.parametrize("limit", list(Version), ids=str)
async def test_row_1_every_contact_of_a_ladder_is_answered(limit):
    async with world(config=limited(limit)) as there:
        guest = RawGuest(there)
        for version in reversed(Version):
            (reply,) = await guest.contact(version)
            assert number(reply) == 15
            assert bool(reply[8]) == (version <= limit)


async def test_row_1_a_contact_with_anything_in_it_is_answered():
    async with world() as there:
        for changes in (
            {"target_vp": 77},
            {"target_vp": 0xFFFFFFFF},
            {"target_info": 2 | 1 << 8},
            {"target_info": 0},
            {"monitor_page_1": 0xFFFF_FFFF_FFFF_FFFF},
            {"monitor_page_1": 1, "monitor_page_2": 2},
        ):
            guest = RawGuest(there)
            (reply,) = await guest.contact(**changes)
            assert number(reply) == 15
        guest = RawGuest(there)
        (reply,) = await guest.contact(Version.V1_1, target_info=0xFFFF_0000_0000_0000)
        assert reply[8] == 0
        # Another SINT: the guest waits for the answer there.
        assert await guest.contact(target_info=5) == []
        message = guest.synic.receive(5)
        assert message is not None
        assert message.payload[8] == 0


async def test_row_2_many_messages_come_in_order_through_one_slot():
    async with world(*(EchoDevice(n) for n in range(200))) as there:
        guest = RawGuest(there)
        await guest.contact()
        assert guest.post_bytes(guest.build(m.RequestOffers())) == 0
        relids: list[int] = []
        while True:
            await there.settle()
            slot = guest.synic.slot()
            if slot.message_type == 0:
                break
            message = guest.synic.receive()
            assert message is not None
            if number(message.payload) == 4:
                break
            relids.append(guest.parse(message.payload).relid)
        assert relids == list(range(1, 201))
        assert await guest.receive() == []


async def test_row_2_a_taken_slot_is_marked_so_that_the_guest_writes_eom():
    async with world(EchoDevice(1)) as there:
        guest = RawGuest(there)
        await guest.contact()
        guest.post_bytes(guest.build(m.RequestOffers()))
        await there.settle()
        page = there.machine.memory.page(guest.synic.simp >> 12)
        assert page[2 * 256 + 5] & FLAG_PENDING
        assert guest.synic.receive() is not None
        await there.settle()
        assert number(guest.synic.slot().payload) == 4


async def test_row_2_a_guest_that_frees_its_slot_without_eom_gets_the_next_message_too():
    async with world(EchoDevice(1)) as there:
        guest = RawGuest(there)
        await guest.contact()
        guest.post_bytes(guest.build(m.RequestOffers()))
        await there.settle()
        guest.synic.free()
        await until(lambda: guest.synic.slot().message_type)
        assert number(guest.synic.slot().payload) == 4


async def test_row_3_the_end_of_the_offers_is_told_when_there_are_none():
    async with world() as there:
        guest = RawGuest(there)
        await guest.contact()
        assert await guest.post(m.RequestOffers()) == [struct.pack("<II", 4, 0)]


async def test_row_3_the_end_of_the_offers_comes_last_and_once():
    async with world(*(EchoDevice(n) for n in range(5))) as there:
        guest = RawGuest(there)
        await guest.contact()
        assert numbers(await guest.post(m.RequestOffers())) == [1] * 5 + [4]
        there.bus.add_device(EchoDevice(9))
        assert numbers(await guest.receive()) == [1]


# --- Replies ------------------------------------------------------------------------------------


async def test_row_4_each_request_gets_exactly_one_reply():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        pfns = range(RAW_RING_PFN, RAW_RING_PFN + 60)
        header, *bodies = guest.gpadl(1, 7, pfns)
        assert await guest.post(header) == []
        assert numbers(await guest.post(*bodies)) == [10]
        assert numbers(await guest.post(guest.open_message(1, 7, 4))) == [6]
        assert numbers(await guest.post(m.ModifyChannel(relid=1, target_vp=1))) == [24]
        assert numbers(await guest.post(m.CloseChannel(relid=1))) == []
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == [12]
        assert numbers(await guest.post(m.Unload())) == [17]
        assert await guest.receive() == []


async def test_row_4_requests_that_fail_get_exactly_one_reply_too():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        bad = guest.gpadl(1, 7, [1 << 40])
        (reply,) = await guest.post(*bad)
        assert guest.parse(reply).status != 0
        for relid in (1, 99):
            (reply,) = await guest.post(guest.open_message(relid, 55, 4))
            result = guest.parse(reply)
            assert (result.relid, result.open_id) == (relid, relid)
            assert result.status != 0
            (reply,) = await guest.post(m.ModifyChannel(relid=relid, target_vp=0))
            assert guest.parse(reply).status != 0
            (reply,) = await guest.post(m.GpadlTeardown(relid=relid, gpadl=55))
            assert guest.parse(reply).gpadl == 55


async def test_row_4_no_reply_to_modify_before_5_3():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there, Version.V5_2)
        await guest.open()
        assert await guest.post(m.ModifyChannel(relid=1, target_vp=1)) == []


async def test_row_5_messages_have_their_exact_sizes():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.open()
        await guest.post(m.ModifyChannel(relid=1, target_vp=1))
        await guest.post(m.CloseChannel(relid=1))
        await guest.post(m.GpadlTeardown(relid=1, gpadl=7))
        there.bus.nursery.start_soon(there.bus.remove_device, 1)
        await guest.receive()
        await guest.post(m.Unload())
        seen = {number(data): len(data) for _, data in there.transport.trail}
        assert seen == EXACT


async def test_row_5_the_answer_to_6_0_has_the_features():
    async with world() as there:
        guest = RawGuest(there)
        (reply,) = await guest.contact(Version.V6_0)
        assert (len(reply), reply[8]) == (20, 1)


# --- Relids -------------------------------------------------------------------------------------


async def test_row_6_relids_are_dense_and_guids_unique():
    devices = [EchoDevice(n) for n in range(40)]
    async with world(*devices) as there:
        guest = RawGuest(there)
        offers = await guest.connect()
        assert [offer.relid for offer in offers] == list(range(1, 41))
        assert len({offer.instance_id for offer in offers}) == 40
        assert len({offer.connection_id for offer in offers}) == 40
        assert all(offer.is_dedicated_interrupt for offer in offers)


async def test_row_6_a_relid_is_not_used_again_before_it_is_released():
    async with world(EchoDevice(1), EchoDevice(2)) as there:
        guest = await ready(there)
        await there.bus.remove_device(1)
        assert numbers(await guest.receive()) == [2]
        there.bus.add_device(EchoDevice(3))
        (raw,) = await guest.receive()
        assert guest.parse(raw).relid == 3
        await guest.post(m.RelidReleased(relid=1))
        there.bus.add_device(EchoDevice(4))
        (raw,) = await guest.receive()
        assert guest.parse(raw).relid == 1


async def test_row_6_an_instance_does_not_come_back_while_the_guest_knows_it():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await there.bus.remove_device(1)
        assert numbers(await guest.receive()) == [2]
        there.bus.add_device(EchoDevice(1))
        assert await guest.receive() == []
        assert numbers(await guest.post(m.RelidReleased(relid=1))) == [1]


async def test_row_6_haiku_finds_all_of_its_31_channels():
    async with world(*(EchoDevice(n) for n in range(31))) as there, there.boot(HAIKU) as guest:
        offers = await guest.connection.connect()
        assert len(offers) == 31
        for offer in offers:
            channel = await guest.connection.open_channel(offer, ring_pages=2)
            assert (await channel.request(b"12345678")).payload == b"12345678"


# --- Sub-channels -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 5])
async def test_row_17_exactly_the_promised_sub_channels_are_offered(count):
    device = EchoDevice(1, sub_channels=5)
    device.offer_subchannels = count
    async with world(device) as there, there.boot(FREEBSD) as guest:
        (offer,) = await guest.connection.connect()
        await guest.connection.open_channel(offer, ring_pages=2)
        await there.settle()
        subs = [each for each in guest.connection.offers.values() if each.subchannel_index]
        assert [each.subchannel_index for each in subs] == list(range(1, count + 1))
        for each in subs:
            assert (each.class_id, each.instance_id) == (offer.class_id, offer.instance_id)
            channel = await guest.connection.open_channel(each, ring_pages=2)
            assert (await channel.request(b"12345678")).payload == b"12345678"


# --- Channels that have just opened -------------------------------------------------------------


async def test_row_4_two_channels_that_open_at_once_are_both_served():
    """Each waits for its own result to be in the slot."""
    devices = [EchoDevice(n) for n in range(12)]
    async with world(*devices) as there, there.boot(LINUX_6_1) as guest:
        offers = await guest.connection.connect()

        async def use(offer: m.OfferChannel) -> None:
            channel = await guest.connection.open_channel(offer, ring_pages=2)
            assert (await channel.request(b"12345678")).payload == b"12345678"

        async with trio.open_nursery() as nursery:
            for offer in offers:
                nursery.start_soon(use, offer)


async def test_row_4_a_channel_that_has_just_opened_can_be_moved():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.post(*guest.gpadl(1, 7, range(RAW_RING_PFN, RAW_RING_PFN + 8)))
        guest.post_bytes(guest.build(guest.open_message(1, 7, 4)))
        while guest.synic.slot().message_type == 0:
            await trio.lowlevel.checkpoint()
        # The result has just come in; the host may not know yet that it has arrived.
        guest.post_bytes(guest.build(m.ModifyChannel(relid=1, target_vp=3)))
        assert numbers(await guest.receive()) == [6, 24]
        assert device.lives[0]._call._vp == 3  # type: ignore[attr-defined]

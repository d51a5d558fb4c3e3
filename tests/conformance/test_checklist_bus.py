"""The rows of the acceptance checklist that are about the bus, each against a whole bus.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

import os
import struct
import sys

import pytest
import trio
import trio.testing

from tests.support.worlds import (
    ALL,
    MONITOR_1,
    MONITOR_2,
    RAW_RING_PFN,
    EchoDevice,
    RawGuest,
    World,
    controller,
    first_disk,
    limited,
    number,
    numbers,
    whole_life,
    world,
)
from vmbus import ring
from vmbus.engine import describe
from vmbus.engine.channels import connection_id_of
from vmbus.errors import RingError
from vmbus.guest import FREEBSD, HAIKU, LINUX_6_1, OPENBSD, PERSONALITIES, UEFI
from vmbus.guest.ring import fence
from vmbus.host.channel import Channel
from vmbus.server import DeviceSetup
from vmbus.server.devices import make_devices
from vmbus.testing import channel_pair
from vmbus.wire import messages as m
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    IN_BAND,
    build_packet,
)
from vmbus.wire.synic import FLAG_PENDING, CpuidLeaf, HvStatus, Msr
from vmbus.wire.versions import Version

EXACT = {1: 196, 2: 12, 4: 8, 6: 20, 10: 20, 12: 12, 15: 16, 17: 8, 24: 16}
"""Sizes of the messages to the guest, before 6.0."""


async def ready(there: World, version: int = Version.V5_3) -> RawGuest:
    guest = RawGuest(there)
    await guest.connect(version)
    return guest


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
        with trio.fail_after(20):
            while guest.synic.slot().message_type == 0:
                await trio.sleep(0.001)
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


# --- The end ------------------------------------------------------------------------------------


def ring_bytes(there: World) -> bytes:
    return there.machine.memory.read(RAW_RING_PFN * 4096, 8 * 4096)


LAST_WORDS = [
    ("close", lambda guest: guest.build(m.CloseChannel(relid=1))),
    ("unload", lambda guest: guest.build(m.Unload())),
]


async def answer_later(there: World, device: EchoDevice, guest: RawGuest) -> Channel:
    """A channel with a request that its device has yet to answer."""
    held: list[int] = []
    device.on_packet = lambda channel, packet: held.append(packet.transaction_id)
    await guest.open()
    packet = build_packet(IN_BAND, bytes(8), transaction_id=5, flags=FLAG_COMPLETION_REQUESTED)
    memory = there.machine.memory
    memory.write((RAW_RING_PFN + 1) * 4096, packet + bytes(8))
    memory.page(RAW_RING_PFN).cast("I")[0] = len(packet) + 8
    assert guest.synic.signal(connection_id_of(1)) == 0
    await there.settle()
    assert held == [5]
    return device.lives[0]


@pytest.mark.parametrize(("name", "word"), LAST_WORDS, ids=[name for name, _ in LAST_WORDS])
async def test_row_7_and_33_nothing_is_written_or_signalled_after_the_end(name, word):
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        channel = await answer_later(there, device, guest)
        assert guest.post_bytes(word(guest)) == 0
        await there.settle()
        there.machine.memory.write(RAW_RING_PFN * 4096, b"\xfe" * 8 * 4096)
        before = len(there.transport.trail)
        channel.complete(5, bytes(8))
        channel.send(bytes(8))
        await channel.flush()
        await there.settle()
        assert ring_bytes(there) == b"\xfe" * 8 * 4096
        assert [kind for kind, _ in there.transport.trail[before:]].count("flag") == 0


async def test_row_7_a_reset_leaves_nothing_of_the_old_life():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        channel = await answer_later(there, device, guest)
        await there.transport.reset()
        there.machine.memory.write(RAW_RING_PFN * 4096, b"\xfe" * 8 * 4096)
        channel.complete(5, bytes(8))
        await channel.flush()
        assert ring_bytes(there) == b"\xfe" * 8 * 4096
        guest = await ready(there)
        await guest.open()


async def test_row_7_a_second_contact_ends_the_first_connection_and_owes_it_nothing():
    """The new kernel must not see replies that the old one was waiting for."""
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.open()
        for _ in range(5):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=99)))
        await there.settle()
        # The old kernel has left one in its slot, which belongs to the new one's page.
        assert guest.synic.receive() is not None
        fresh = RawGuest(there)
        replies = await fresh.contact(Version.V4_0)
        assert numbers(replies)[-1] == 15
        assert len(replies) <= 2
        assert not there.bus.runners
        assert numbers(await fresh.post(m.RequestOffers())) == [1, 4]


async def test_row_7_all_gpadls_and_pages_are_let_go():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.open()
        await guest.post(*guest.gpadl(1, 8, range(0x80, 0x90)))
        assert numbers(await guest.post(m.Unload())) == [17]
        info = describe(there.bus.engine)
        assert (info["gpadls"], info["gpadl_pages"], info["state"]) == (0, 0, "Disconnected")
        assert there.transport._event_ports == {}


# --- Rings --------------------------------------------------------------------------------------


async def test_row_8_the_guest_is_interrupted_when_an_empty_ring_fills_and_only_then():
    channel, guest = channel_pair()
    for number_ in range(5):
        channel.send(bytes(8))
        channel.try_flush()
        assert guest.interrupts == 1, number_
    assert len(guest.receive_nowait()) == 5
    channel.send(bytes(8))
    channel.try_flush()
    assert guest.interrupts == 2
    guest.receive_nowait()
    guest._in.mask()
    channel.send(bytes(8))
    channel.try_flush()
    assert guest.interrupts == 2
    channel.close_doorbell()


async def test_row_8_the_mask_is_read_behind_a_fence_after_the_index_is_stored(monkeypatch):
    channel, guest = channel_pair()
    guest._in.mask()

    def unmask_meanwhile() -> None:
        # The guest goes to sleep right between the host's store and its load.
        assert guest._in.unmask()
        fence()

    monkeypatch.setattr(ring, "full_fence", unmask_meanwhile)
    channel.send(bytes(8))
    channel.try_flush()
    assert guest.interrupts == 1
    channel.close_doorbell()


async def test_row_9_packets_that_arrive_while_the_host_unmasks_are_found(monkeypatch):
    channel, guest = channel_pair()
    guest.send(build_packet(IN_BAND, b"first..."))
    assert len(await channel.receive_batch()) == 1
    os.eventfd_read(channel.doorbell_fd)
    # The mask is still set, so the guest does not signal what it sends now.
    original = channel._reader.unmask
    late = [build_packet(IN_BAND, b"second..")]

    def unmask() -> bool:
        while late:
            guest.send(late.pop())
        return original()

    monkeypatch.setattr(channel, "_reader", _Reader(channel._reader, unmask))
    bells = guest.doorbells
    with trio.fail_after(20):
        (packet,) = await channel.receive_batch()
    assert packet.payload == b"second.."
    assert guest.doorbells == bells
    channel.close_doorbell()


class _Reader:
    """A reader whose unmask is somebody else's."""

    def __init__(self, reader, unmask) -> None:
        self._reader = reader
        self.unmask = unmask

    def __getattr__(self, name):
        return getattr(self._reader, name)


async def test_row_9_the_outgoing_ring_is_drained_until_the_close():
    device = EchoDevice(1)
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=2)
        for turn in range(500):
            await channel.send(turn.to_bytes(8, "little") * 20)
        await there.settle()
        assert channel.all_read
        await guest.connection.close_channel(channel)


async def test_row_10_packets_of_every_size_wrap_at_every_place():
    channel, guest = channel_pair(ring_pages=2)
    sent = 0
    for turn in range(600):
        payload = turn.to_bytes(8, "little") * (1 + turn % 37)
        assert guest.send(build_packet(IN_BAND, payload, transaction_id=turn)) == 1
        (packet,) = await channel.receive_batch()
        assert packet.payload == payload
        assert packet.transaction_id == turn
        channel.complete(turn, payload)
        assert channel.try_flush()
        (answer,) = guest.receive_nowait()
        assert (answer.kind, answer.payload, answer.transaction_id) == (COMPLETION, payload, turn)
        sent += len(answer.data) + 8
        assert guest._in._words[0] == sent % 4096
    channel.close_doorbell()


async def test_row_10_one_byte_of_a_ring_stays_free():
    channel, guest = channel_pair(ring_pages=2)
    for _ in range(4096 // 32):
        channel.send(bytes(8))
    assert not channel.try_flush()
    assert channel.pending == 1
    assert len(guest.receive_nowait()) == 4096 // 32 - 1
    channel.close_doorbell()


@pytest.mark.parametrize(
    "identity", [0, 1, 0xFFFFFFFFFFFFFFFC, 0xFFFFFFFFFFFFFFFD, 0xFFFFFFFFFFFFFFFF, 1 << 63]
)
async def test_row_12_each_request_has_one_completion_with_its_very_id(identity):
    device = EchoDevice(1)
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        await channel.send(b"no reply", transaction_id=identity)
        reply = await channel.request(b"12345678", transaction_id=identity)
        assert reply.transaction_id == identity
        await there.settle()
        assert not channel.has_packets


# --- Signals ------------------------------------------------------------------------------------


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


async def test_row_28_monitored_offers_have_ids_of_their_own_below_128():
    async with world(*(EchoDevice(n, monitor=100) for n in range(130))) as there:
        guest = RawGuest(there)
        offers = await guest.connect()
        monitored = [offer for offer in offers if offer.monitor_allocated]
        assert sorted(offer.monitor_id for offer in monitored) == list(range(128))
        assert len(offers) == 130


async def test_row_28_no_monitor_id_where_there_is_no_page_to_poll():
    async with world(EchoDevice(1, monitor=100), EchoDevice(2)) as there:
        guest = RawGuest(there)
        await guest.contact(monitor_page_1=0, monitor_page_2=0)
        offers = [guest.parse(raw) for raw in (await guest.post(m.RequestOffers()))[:-1]]
        assert [offer.monitor_allocated for offer in offers] == [False, False]
        await guest.contact()
        offers = [guest.parse(raw) for raw in (await guest.post(m.RequestOffers()))[:-1]]
        assert [offer.monitor_allocated for offer in offers] == [True, False]


async def test_row_28_a_bit_in_the_monitor_page_is_a_doorbell():
    device = EchoDevice(1, monitor=100)
    async with world(device) as there:
        guest = await ready(there)
        seen: list[int] = []
        device.on_packet = lambda channel, packet: seen.append(packet.transaction_id)
        await guest.open()
        packet = build_packet(IN_BAND, bytes(8), transaction_id=9)
        there.machine.memory.write((RAW_RING_PFN + 1) * 4096, packet + bytes(8))
        there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = len(packet) + 8
        words = there.machine.memory.page(MONITOR_2 >> 12).cast("I")
        await there.settle()
        assert seen == []
        words[2] |= 1
        with trio.fail_after(20):
            while not seen:
                await trio.sleep(0.001)
        assert words[2] == 0
        assert there.machine.memory.page(MONITOR_1 >> 12)[8] == 0


async def test_row_29_a_guest_that_never_signals_room_is_polled():
    device = EchoDevice(1, monitor=1000)
    async with world(device) as there, there.boot(OPENBSD) as guest:
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=2, max_packet=4096)
        await there.settle()
        host = device.lives[0]
        for _ in range(20):
            host.send(bytes(1000))
        await host.flush()
        received = 0
        while received < 20:
            received += len(await channel.receive_batch())


async def test_row_30_both_forms_of_the_hypercall_and_both_message_ports_work():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.open()
        connection = connection_id_of(1)
        assert guest.synic.signal(connection, fast=True) == 0
        assert guest.synic.signal(connection, fast=False) == 0
        for port in (1, 4):
            raw = guest.build(m.GpadlTeardown(relid=1, gpadl=99))
            assert guest.post_bytes(raw, port) == 0
            assert numbers(await guest.receive()) == [12]
        assert guest.post_bytes(raw, 3) == HvStatus.INVALID_CONNECTION_ID


async def test_row_31_padding_reserved_bytes_numbers_and_lengths_mean_nothing():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        pfns = range(RAW_RING_PFN, RAW_RING_PFN + 64)
        for message in guest.gpadl(1, 7, pfns):
            raw = bytearray(guest.build(message))
            raw[4:8] = b"\xa5\x5a\xa5\x5a"
            if isinstance(message, m.GpadlBody):
                raw[8:12] = bytes(4)
            raw += b"\xee" * (240 - len(raw))
            assert guest.post_bytes(bytes(raw)) == 0
        (reply,) = await guest.receive()
        assert guest.parse(reply).status == 0
        raw = bytearray(guest.build(guest.open_message(1, 7, 32)))
        raw[4:8] = b"\xff" * 4
        assert guest.post_bytes(bytes(raw).ljust(240, b"\xee")) == 0
        (reply,) = await guest.receive()
        assert guest.parse(reply).status == 0


async def test_row_32_a_gpadl_is_torn_down_on_a_closed_channel():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await guest.open()
        assert await guest.post(m.CloseChannel(relid=1)) == []
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == [12]


async def test_row_32_a_ring_that_is_torn_down_before_the_close_is_given_back_at_the_close():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await guest.open()
        assert await guest.post(m.GpadlTeardown(relid=1, gpadl=7)) == []
        assert numbers(await guest.post(m.CloseChannel(relid=1))) == [12]
        assert await guest.receive() == []


async def test_row_32_a_buffer_is_torn_down_at_once_on_an_open_channel():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await guest.open()
        await guest.post(*guest.gpadl(1, 8, range(0x80, 0x90)))
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=8))) == [12]


async def test_row_33_no_flag_before_the_result_of_the_opening():
    """UEFI resets the machine at a flag for a channel that it has not opened."""
    device = EchoDevice(1)

    async def at_once(primary: Channel) -> None:
        for _ in range(3):
            primary.send(bytes(8))
            await primary.flush()

    device.on_run = at_once
    async with world(device) as there:
        guest = await ready(there)
        await guest.post(*guest.gpadl(1, 7, range(RAW_RING_PFN, RAW_RING_PFN + 8)))
        # Replies ahead of the result keep the slot taken for a while.
        for _ in range(4):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=99)))
        there.transport.trail.clear()
        replies = await guest.post(guest.open_message(1, 7, 4))
        assert numbers(replies) == [12] * 4 + [6]
        await there.settle()
        kinds = [kind for kind, _ in there.transport.trail]
        assert "flag" in kinds
        last = max(index for index, kind in enumerate(kinds) if kind == "message")
        assert kinds.index("flag") > last


async def test_row_34_a_rescind_comes_once_and_silences_the_channel():
    device = EchoDevice(1, sub_channels=1)
    async with world(device, EchoDevice(2)) as there:
        guest = await ready(there)
        (sub,) = await guest.open()
        relid = guest.parse(sub).relid
        there.bus.nursery.start_soon(there.bus.remove_device, 1)
        there.bus.nursery.start_soon(there.bus.remove_device, 1)
        rescinded = [struct.unpack_from("<I", raw, 8)[0] for raw in await guest.receive()]
        assert rescinded == [relid, 1]
        # Messages that crossed it: an OPEN is not answered, the others are.
        assert await guest.post(guest.open_message(1, 7, 4)) == []
        assert await guest.post(m.CloseChannel(relid=1)) == []
        assert numbers(await guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == [12]
        assert await guest.post(m.RelidReleased(relid=1)) == []
        assert await guest.post(m.RelidReleased(relid=relid)) == []
        there.bus.add_device(EchoDevice(7))
        (offer,) = await guest.receive()
        assert guest.parse(offer).relid == 1


async def test_row_34_unload_releases_relids_as_well():
    async with world(EchoDevice(1), EchoDevice(2)) as there:
        guest = await ready(there)
        await there.bus.remove_device(1)
        assert numbers(await guest.post(m.Unload()))[-1] == 17
        (offer,) = await guest.connect()
        assert offer.relid == 1


# --- The machine --------------------------------------------------------------------------------


async def test_row_35_the_synic_is_what_firmware_expects_out_of_reset():
    async with world(EchoDevice(1)) as there:
        machine = there.machine
        assert machine.read_msr(0, Msr.SCONTROL) & 1
        for index in range(8):
            machine.write_msr(0, 0x400000B0 + index, 0)
        for sint in range(16):
            machine.write_msr(0, Msr.SINT0 + sint, 1 << 16)
        async with there.boot(UEFI) as guest:
            await guest.connection.connect()
        await there.transport.reset()
        assert machine.read_msr(0, Msr.SCONTROL) & 1
        async with there.boot(UEFI) as guest:
            await guest.connection.connect()


async def test_row_37_cpuid_makes_no_guest_turn_away():
    async with world(EchoDevice(1, monitor=1000)) as there:
        leaf = there.machine.cpuid(CpuidLeaf.FEATURES)
        assert not leaf[1] & 1 << 12
        assert leaf[0] & 0x60 == 0x60
        assert there.machine.cpuid(CpuidLeaf.INTERFACE)[0] == int.from_bytes(b"Hv#1", "little")
        for name in ALL:
            await there.transport.reset()
            async with there.boot(PERSONALITIES[name]) as guest:
                assert len(await guest.connection.connect()) == 1


async def test_row_39_offers_keep_their_order_and_guids_from_life_to_life():
    devices = [EchoDevice(n) for n in (5, 3, 9, 1)]
    async with world(*devices) as there:
        guest = RawGuest(there)
        first = [(offer.relid, offer.instance_id) for offer in await guest.connect()]
        assert [each for _, each in first] == [device.offer.instance_id for device in devices]
        for leave in (m.Unload(), None):
            if leave is not None:
                await guest.post(leave)
            else:
                await there.transport.reset()
                guest = RawGuest(there)
            again = [(offer.relid, offer.instance_id) for offer in await guest.connect()]
            assert again == first


async def test_row_39_a_server_that_starts_again_has_the_same_guids():
    setups = [DeviceSetup("storvsp", ("ram:1M",)), DeviceSetup("storvsp", ("ram:1M",))]
    seen = []
    for _ in range(2):
        made = await make_devices("vm", setups)
        seen.append([each.device.offer.instance_id for each in made])
        for each in made:
            await each.device.aclose()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2


# --- Hostile guests -----------------------------------------------------------------------------


async def test_row_40_any_message_at_any_length_is_survived():
    # fuzz scenarios G01 and G02: truncated and padded messages, and those that only hosts send
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        await guest.open()
        messages = [
            m.CloseChannel(relid=9),
            m.GpadlTeardown(relid=9, gpadl=9),
            m.RelidReleased(relid=9),
            m.ModifyChannel(relid=9, target_vp=9),
            guest.open_message(9, 9, 9),
            *guest.gpadl(9, 9, range(60)),
        ]
        for message in messages:
            raw = guest.build(message)
            for length in range(0, 241, 3):
                while guest.post_bytes(raw[:length].ljust(length, b"\xff")):
                    await guest.receive()
                await guest.receive()
        for kind in [*range(32), 0xFFFF, 0xFFFFFFFF]:
            if kind in {3, 14, 16, 27, 29}:
                continue
            assert guest.post_bytes(struct.pack("<II", kind, 0).ljust(240, b"\xff")) == 0
            await guest.receive()
        assert there.bus.snapshot()["version"] == "5.3"
        assert len(there.bus.runners) == 1


@pytest.mark.parametrize("index", [4096 * 3, 4096 * 3 + 8, 0xFFFFFFF8, 0xFFFFFFFF, 4, 1, 9])
@pytest.mark.parametrize("word", [0, 1])
async def test_row_40_an_impossible_index_is_the_end_of_its_channel(word, index):
    # fuzz scenario G12: rings of 3 data pages; the host reads the index of the one, writes beside
    # that of the other
    device = EchoDevice(1)
    async with world(device, EchoDevice(2)) as there:
        guest = await ready(there)
        await guest.open()
        if word == 0:
            there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = index
            device.lives[0].poke()
        else:
            there.machine.memory.page(RAW_RING_PFN + 4).cast("I")[1] = index
            device.lives[0].send(bytes(8))
            there.bus.nursery.start_soon(_fails, device.lives[0])
            device.lives[0].poke()
            packet = build_packet(IN_BAND, bytes(8), flags=FLAG_COMPLETION_REQUESTED)
            there.machine.memory.write((RAW_RING_PFN + 1) * 4096, packet + bytes(8))
            there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = len(packet) + 8
        assert numbers(await guest.receive()) == [2]
        assert there.bus.snapshot()["faults"] == 1
        assert device.running == 0


async def _fails(channel: Channel) -> None:
    with pytest.raises(RingError):
        await channel.flush()


async def test_row_40_guests_cannot_make_the_host_remember_their_faults():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)

        def size() -> int:
            return sum(sys.getsizeof(value) for value in vars(there.bus).values())

        before = size()
        for relid in range(2000):
            while guest.post_bytes(guest.build(m.CloseChannel(relid=0x10000 + relid))):
                await there.settle()
        await there.settle()
        assert there.bus.snapshot()["faults"] == 2000
        assert size() <= before + 256


async def test_row_40_signals_to_anything_are_harmless():
    # fuzz scenario G16
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        assert guest.synic.signal(connection_id_of(1)) == HvStatus.INVALID_CONNECTION_ID
        await guest.open()
        for connection in (0, 1, 2, 4, connection_id_of(2), 0xFFFFFF, 0xFFFFFFFF):
            assert guest.synic.signal(connection) != 0
        for _ in range(1000):
            assert guest.synic.signal(connection_id_of(1)) == 0
        await there.settle()
        assert device.running


async def test_row_40_a_life_is_whole_again_after_the_worst_of_guests():
    async with world(controller()) as there:
        guest = await ready(there)
        for relid in (0, 1, 2, 0xFFFFFFFF):
            for offset in (0, 1, 3, 7, 8, 0xFFFFFFFF):
                await guest.post(*guest.gpadl(relid, offset, range(0x40, 0x48)))
                await guest.post(guest.open_message(relid, offset, offset))
        await there.transport.reset()
        async with there.boot(LINUX_6_1) as kernel:
            await whole_life(kernel)


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


async def test_row_11_completions_of_the_controller_fit_every_driver():
    async with world(controller()) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest)
        channel = adapter.channels[0]
        reply = await channel.request(bytes(64), transaction_id=3)
        assert (len(reply.payload), len(reply.data)) == (64, 80)

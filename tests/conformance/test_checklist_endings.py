"""The rows of the acceptance checklist about what ends: channels, GPADLs, offers, connections.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

import struct

import pytest

from tests.support.worlds import RAW_RING_PFN, EchoDevice, RawGuest, World, numbers, ready, world
from vmbus.engine import describe
from vmbus.engine.channels import connection_id_of
from vmbus.host.channel import Channel
from vmbus.wire import messages as m
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, IN_BAND, build_packet
from vmbus.wire.versions import Version


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


# --- GPADLs -------------------------------------------------------------------------------------


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


# --- Offers -------------------------------------------------------------------------------------


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

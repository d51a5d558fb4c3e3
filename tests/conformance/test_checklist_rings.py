"""The rows of the acceptance checklist about rings: who drains them, who is signalled, who waits.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from tests.support.patience import PATIENCE
from tests.support.worlds import EchoDevice, controller, first_disk, world
from vmbus import ring
from vmbus.guest import LINUX_6_1, OPENBSD
from vmbus.guest.ring import fence
from vmbus.testing import channel_pair
from vmbus.wire.packets import COMPLETION, IN_BAND, build_packet


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
    with trio.fail_after(PATIENCE):
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


async def test_row_11_completions_of_the_controller_fit_every_driver():
    async with world(controller()) as there, there.boot(LINUX_6_1) as guest:
        adapter, _ = await first_disk(guest)
        channel = adapter.channels[0]
        reply = await channel.request(bytes(64), transaction_id=3)
        assert (len(reply.payload), len(reply.data)) == (64, 80)


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

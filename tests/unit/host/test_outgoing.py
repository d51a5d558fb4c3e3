"""A channel whose guest does not read its ring."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from vmbus.errors import LocalProtocolError
from vmbus.guest.personality import OPENBSD
from vmbus.host.channel import Channel
from vmbus.host.outgoing import MAX_POLL_INTERVAL
from vmbus.ring import RingWriter
from vmbus.testing.channels import GuestEnd, channel_pair

PAYLOAD = bytes(1000)


class Looks:
    """Counts how often a channel asks whether there is room by now."""

    def __init__(self, channel: Channel) -> None:
        self.count = 0
        self.writer: RingWriter = channel._writer
        channel._writer = self  # type: ignore[assignment]

    def wait_for_room(self, size: int) -> bool:
        self.count += 1
        return self.writer.wait_for_room(size)

    def __getattr__(self, name: str) -> object:
        return getattr(self.writer, name)


def full() -> tuple[Channel, GuestEnd, Looks]:
    channel, guest = channel_pair(ring_pages=2, data_pages=0, personality=OPENBSD)
    while channel.try_flush():
        channel.send(PAYLOAD)
    return channel, guest, Looks(channel)


async def test_a_ring_that_is_never_read_costs_little(autojump_clock: trio.testing.MockClock):
    channel, _guest, looks = full()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        await trio.sleep(60)
        assert looks.count < 60 / MAX_POLL_INTERVAL + 10
        nursery.cancel_scope.cancel()


async def test_a_guest_that_reads_now_and_then_but_never_signals_gets_everything(
    autojump_clock: trio.testing.MockClock,
):
    channel, guest, looks = full()
    for _ in range(20):
        channel.send(PAYLOAD)
    read = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        await trio.sleep(60)
        while channel.pending:
            read += len(guest.receive_nowait())
            before, left = looks.count, channel.pending
            # However long it has slept, it comes back, and is wide awake from then on.
            await trio.sleep(MAX_POLL_INTERVAL * 1.01)
            assert channel.pending < left
            if channel.pending:
                await trio.sleep(MAX_POLL_INTERVAL)
                assert looks.count - before >= 4
    read += len(guest.receive_nowait())
    assert read == channel.statistics.packets_out
    assert guest.doorbells == 0


async def test_a_guest_that_plays_with_its_read_index_does_not_hold_the_loop(
    autojump_clock: trio.testing.MockClock,
):
    channel, _guest, looks = full()
    # There is always room when asked for, and none when it comes to writing.
    looks.wait_for_room = lambda size: True  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_packet_that_no_ring_could_take_is_refused_when_it_is_queued():
    channel, guest = channel_pair(ring_pages=2, data_pages=1)
    capacity = 4096 - 16
    with pytest.raises(LocalProtocolError, match="the guest's ring takes 4080"):
        channel.complete(1, bytes(capacity))
    with pytest.raises(LocalProtocolError, match="the guest's ring takes 4080"):
        channel.send(bytes(capacity))
    channel.complete(2, bytes(capacity - 16))
    await channel.flush()
    (packet,) = guest.receive_nowait()
    assert packet.transaction_id == 2
    channel.close_doorbell()

"""An open channel, from the device's side, over a guest's end that is driven by hand."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from vmbus.errors import (
    STATUS_INVALID_DEVICE_STATE,
    GuestProtocolError,
    LocalProtocolError,
    RingError,
)
from vmbus.guest import MACOS
from vmbus.host.channel import Channel
from vmbus.testing import GuestEnd, channel_pair, make_offer
from vmbus.wire.packets import COMPLETION, FLAG_COMPLETION_REQUESTED, IN_BAND, build_packet

Pair = tuple[Channel, GuestEnd]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    channel, guest = channel_pair(ring_pages=2, offer=make_offer(max_subchannels=2))
    yield channel, guest
    channel.end()
    channel.close_doorbell()


def request(identity: int = 1, size: int = 8) -> bytes:
    return build_packet(
        IN_BAND, bytes(size), transaction_id=identity, flags=FLAG_COMPLETION_REQUESTED
    )


async def test_packets_come_in_batches_in_order(pair):
    channel, guest = pair
    guest.send(*(request(identity) for identity in range(10)))
    packets = await channel.receive_batch(max_packets=4)
    assert [packet.transaction_id for packet in packets] == [0, 1, 2, 3]
    packets = await channel.receive_batch()
    assert [packet.transaction_id for packet in packets] == [4, 5, 6, 7, 8, 9]
    assert channel.outstanding == 10


async def test_a_waiting_receiver_is_woken_by_the_doorbell(pair):
    channel, guest = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.send(request()) == 1
    assert guest.doorbells == 1
    assert channel.statistics.signals_in == 1


async def test_one_task_may_receive(pair):
    channel, _ = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await channel.receive_batch()
        nursery.cancel_scope.cancel()


async def test_a_cancelled_receiver_loses_no_packet(pair):
    channel, guest = pair
    guest.send(request(5))
    with trio.CancelScope() as scope:
        scope.cancel()
        await channel.receive_batch()
    (packet,) = await channel.receive_batch()
    assert packet.transaction_id == 5


@pytest.mark.parametrize("packets", [0, 3])
async def test_the_end_wakes_and_stops_a_receiver(pair, packets):
    channel, guest = pair
    guest.send(*(request(identity) for identity in range(packets)))
    if packets:
        assert len(await channel.receive_batch()) == packets
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.EndOfChannel):
                await channel.receive_batch()

        await trio.testing.wait_all_tasks_blocked()
        channel.end()
    assert channel.ended
    channel.end()


async def test_a_corrupt_ring_is_an_error(pair):
    channel, guest = pair
    guest.memory.page(0).cast("I")[0] = 5
    with pytest.raises(RingError):
        await channel.receive_batch()
    guest.memory.page(2).cast("I")[1] = 5
    channel.send(bytes(8))
    with pytest.raises(RingError):
        channel.try_flush()
    assert channel.snapshot()["incoming_used"] == 0


async def test_no_more_is_read_than_may_be_outstanding():
    channel, guest = channel_pair(max_outstanding=3)
    guest.send(*(request(identity) for identity in range(3)))
    assert len(await channel.receive_batch()) == 3
    guest.send(request(3))
    seen: list[int] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            seen.extend(packet.transaction_id for packet in await channel.receive_batch())

        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        channel.complete(0, b"")
    assert seen == [3]
    channel.close_doorbell()


async def test_a_receiver_that_waits_for_answers_hears_of_the_end():
    channel, guest = channel_pair(max_outstanding=1)
    guest.send(request())
    await channel.receive_batch()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.EndOfChannel):
                await channel.receive_batch()

        await trio.testing.wait_all_tasks_blocked()
        channel.end()
    channel.close_doorbell()


async def test_packets_that_want_no_answer_do_not_count():
    channel, guest = channel_pair(max_outstanding=1)
    guest.send(*(build_packet(IN_BAND, bytes(8)) for _ in range(5)))
    assert len(await channel.receive_batch()) == 5
    assert channel.outstanding == 0
    channel.complete(9, b"")  # unasked, and no credit for it
    assert channel.outstanding == 0
    channel.close_doorbell()


async def test_what_is_queued_goes_out_with_one_flush(pair):
    channel, guest = pair
    channel.complete(7, b"answer")
    channel.send(b"note", transaction_id=9, completion_requested=True)
    assert channel.pending == 2
    await channel.flush()
    assert channel.pending == 0
    first, second = guest.receive_nowait()
    assert (first.kind, first.flags, first.transaction_id) == (COMPLETION, 0, 7)
    assert first.payload == b"answer\0\0"
    assert (second.kind, second.flags, second.transaction_id) == (IN_BAND, 1, 9)
    assert guest.interrupts == 1
    assert channel.try_flush()


async def test_a_packet_that_never_fits_is_refused(pair):
    channel, _ = pair
    with pytest.raises(LocalProtocolError, match=r"4096|bytes"):
        channel.send(bytes(4096))


async def test_a_full_ring_is_waited_for_by_any_number_of_tasks(pair):
    channel, guest = pair
    received: list[int] = []

    async def send(number: int) -> None:
        channel.send(bytes(1000), transaction_id=number)
        await channel.flush()

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(send, number)
        while len(received) < 20:
            await trio.testing.wait_all_tasks_blocked()
            received += [packet.transaction_id for packet in guest.receive_nowait()]
    assert sorted(received) == list(range(20))
    assert channel.statistics.ring_full
    assert guest.memory.page(2).cast("I")[3] == 0


async def test_the_host_asks_to_be_told_of_room():
    channel, guest = channel_pair(ring_pages=2)
    for _ in range(5):
        channel.send(bytes(1000))
    assert not channel.try_flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.memory.page(2).cast("I")[3] == 1024
        before = guest.doorbells
        guest.receive_nowait()
        assert guest.doorbells == before + 1
    channel.close_doorbell()


async def test_a_guest_that_says_nothing_is_looked_at():
    channel, guest = channel_pair(ring_pages=2, personality=MACOS)
    for _ in range(5):
        channel.send(bytes(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        guest.receive_nowait()
        assert guest.doorbells == 0
    assert not channel.pending
    channel.close_doorbell()


async def test_the_end_makes_a_flush_forget(pair):
    channel, guest = pair
    for _ in range(9):
        channel.send(bytes(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        nursery.start_soon(channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        written = guest.memory.page(2).cast("I")[0]
        channel.end()
    assert channel.pending == 0
    channel.send(bytes(8))
    assert channel.try_flush()
    assert guest.memory.page(2).cast("I")[0] == written


async def test_receiver_and_flush_share_the_doorbell(pair):
    channel, guest = pair
    for _ in range(9):
        channel.send(bytes(1000))
    seen: list[int] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            seen.extend(packet.transaction_id for packet in await channel.receive_batch())

        nursery.start_soon(channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        guest.send(request(4))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [4]
        while channel.pending:
            guest.receive_nowait()
            await trio.testing.wait_all_tasks_blocked()


async def test_a_pause_waits_for_answers_and_then_nothing_moves(pair):
    channel, guest = pair
    guest.send(request(1), request(2))
    assert len(await channel.receive_batch()) == 2
    paused = [False, False]

    async def pause(index: int) -> None:
        await channel.pause()
        paused[index] = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause, 0)
        nursery.start_soon(pause, 1)
        await trio.testing.wait_all_tasks_blocked()
        channel.complete(1, b"")
        await trio.testing.wait_all_tasks_blocked()
        assert paused == [False, False]
        channel.complete(2, b"")
        await channel.flush()
    assert paused == [True, True]
    assert len(guest.receive_nowait()) == 2
    channel.send(bytes(8))
    assert not channel.try_flush()
    guest.send(request(3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        nursery.start_soon(channel.receive_batch)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.receive_nowait() == []
        assert channel.outstanding == 0
        channel.resume()
    assert len(guest.receive_nowait()) == 1
    assert channel.outstanding == 1


async def test_a_flush_that_is_cancelled_in_a_pause_leaves_the_ring_alone(pair):
    channel, guest = pair
    for _ in range(9):
        channel.send(bytes(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.flush)
        await trio.testing.wait_all_tasks_blocked()
        await channel.pause()
        words = guest.memory.page(2).cast("I")
        before = words.tolist()
        nursery.cancel_scope.cancel()
    assert words.tolist() == before
    channel.resume()
    channel.resume()


async def test_a_pause_that_is_overtaken_by_a_resume_does_not_stick(pair):
    channel, guest = pair
    guest.send(request(1))
    await channel.receive_batch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.pause)
        await trio.testing.wait_all_tasks_blocked()
        channel.resume()
        channel.complete(1, b"")
    await channel.flush()
    assert len(guest.receive_nowait()) == 1


async def test_the_end_ends_a_pause(pair):
    channel, guest = pair
    guest.send(request(1))
    await channel.receive_batch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.pause)
        await trio.testing.wait_all_tasks_blocked()
        channel.end()
    with pytest.raises(trio.EndOfChannel):
        await channel.receive_batch()


async def test_a_drain_waits_for_room_as_well(pair):
    channel, guest = pair
    for _ in range(9):
        channel.send(bytes(1000))
    drained = trio.Event()

    async def drain() -> None:
        await channel.drain()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        while not drained.is_set():
            await trio.testing.wait_all_tasks_blocked()
            guest.receive_nowait()
    assert channel.pending == 0


async def test_a_channel_without_a_bus_has_no_gpadls_and_no_sub_channels(pair):
    channel, _ = pair
    with pytest.raises(GuestProtocolError):
        channel.lease_gpadl(1)
    with pytest.raises(GuestProtocolError) as caught:
        channel.offer_subchannels(1)
    assert caught.value.status == STATUS_INVALID_DEVICE_STATE


async def test_sub_channels_wait_to_be_accepted_and_what_nobody_takes_ends(pair):
    channel, _ = pair
    made = [channel_pair()[0] for _ in range(4)]
    for each in made:
        channel.deliver_subchannel(each)
    assert [each.ended for each in made] == [False, False, True, True]
    assert await channel.accept_subchannel() is made[0]
    assert await channel.accept_subchannel() is made[1]
    channel.end()
    with pytest.raises(trio.EndOfChannel):
        await channel.accept_subchannel()
    late = channel_pair()[0]
    channel.deliver_subchannel(late)
    assert late.ended
    await late.wait_released()
    for each in (*made, late):
        each.end()
        each.close_doorbell()


async def test_a_device_lets_go_of_a_channel(pair):
    channel, _ = pair
    channel.send(bytes(8))
    await channel.aclose()
    await channel.aclose()
    await channel.wait_released()
    assert channel.pending == 0


async def test_a_snapshot_tells_the_fill_of_both_rings(pair):
    channel, guest = pair
    guest.send(request())
    channel.send(bytes(8))
    channel.try_flush()
    found = json.loads(json.dumps(channel.snapshot()))
    assert (found["incoming_used"], found["outgoing_used"]) == (32, 32)
    assert (found["incoming_size"], found["outgoing_size"]) == (4096, 4096)
    channel.end()
    found = channel.snapshot()
    assert (found["incoming_used"], found["outgoing_used"]) == (0, 0)


async def test_a_doorbell_that_is_full_or_gone_is_no_error():
    channel, _ = channel_pair()
    os.eventfd_write(channel.doorbell_fd, (1 << 64) - 2)
    channel.poke()
    channel.close_doorbell()
    channel.close_doorbell()
    channel.release_rings()


async def test_room_that_is_asked_for_is_signalled(pair):
    """The guest waits for room in its outgoing ring and has said so."""
    channel, guest = pair
    while guest.send(request(1, 1000)):
        pass
    guest._out.want_room(2048)
    await channel.receive_batch()
    assert guest.interrupts == 0, "the room is the guest's when the batch has been answered"
    with trio.move_on_after(0):
        await channel.receive_batch()
    assert guest.interrupts == 1

"""To the guest: channels that stand still, and those beside them."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio.testing

from netvsp.frames.frame import Frame
from netvsp.link import AdapterConfig
from netvsp.receive import CONTROL_PARTS
from netvsp.shares import PATIENCE
from netvsp.wire import ndis, oids
from tests.support.net_frames import Shape, packet
from tests.support.net_guest import MAC, incoming, running

TABLE = ndis.build_rss_parameters(
    flags=0, hash_information=0x1701, table=(1, 2), key=bytes(range(1, 41))
)


def flow(port: int) -> Frame:
    frame = bytearray(packet(Shape(4, "tcp", "none"), b""))
    frame[:6] = MAC
    frame[34:36] = port.to_bytes(2, "big")
    return Frame(bytes(frame))


@asynccontextmanager
async def three_channels():
    """A guest with two sub-channels, a frame for each of them, and the sub-channels' other ends."""
    async with running(config=AdapterConfig(max_queues=3)) as (guest, adapter):
        assert adapter._session is not None
        first, second = guest.add_subchannel(1), guest.add_subchannel(2)
        await guest.settle()
        assert not await guest.set(oids.GEN_RECEIVE_SCALE_PARAMETERS, TABLE)
        guest.received.clear()
        scaling = adapter._session.control.scaling
        assert scaling is not None
        frames = {}
        for each in map(flow, range(40)):
            hashed = scaling.hash(each.head)
            frames[scaling.table[hashed % len(scaling.table)]] = each
        yield guest, adapter, frames, {1: first[1], 2: second[1]}


def fill(adapter, frame: Frame, together: int = 8) -> int:
    """Bring a frame until it is not taken; return how often it was."""
    count = 0
    while taken := adapter.receive([frame] * together):
        count += taken
    return count


async def test_a_channel_that_gives_nothing_back_leaves_half_of_the_buffer_to_others():
    async with three_channels() as (guest, adapter, frames, ends):
        guest.gives_back = False
        half = (guest.part_count - CONTROL_PARTS) // 2
        assert fill(adapter, frames[1]) == half
        assert sum(len(each.ranges) for each in guest.collect(ends[1])) == half
        guest.gives_back = True
        for _ in range(3 * guest.part_count):
            assert adapter.receive([frames[2]]) == 1
            await guest.settle()
            assert len(guest.collect(ends[2])) == 1
            await guest.settle()
        assert fill(adapter, frames[2]) == half // 3, "if it gives nothing back, it has its share"


async def test_others_wait_for_a_channel_that_stands_still_no_longer_than_for_a_moment(mock_clock):
    async with three_channels() as (guest, adapter, frames, ends):
        guest.gives_back = False
        taken = fill(adapter, frames[1])
        mixed = [frames[1], frames[2]] * 4
        assert adapter.receive(mixed) == 0
        async with trio.open_nursery() as nursery:
            woken = trio.Event()

            async def wait() -> None:
                await adapter.wait_room()
                woken.set()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not woken.is_set()
            mock_clock.jump(PATIENCE)
            await woken.wait()
        assert adapter.receive(mixed) == len(mixed)
        assert adapter.statistics.receive.dropped == {"no buffer": 4}
        assert len(guest.collect(ends[2])[0].ranges) == 4
        assert adapter.receive([frames[1]]) == 1, "and those that follow are not waited for"
        assert adapter.statistics.receive.dropped == {"no buffer": 5}
        # When it moves, it is waited for again.
        guest.give_back(*[each.transaction_id for each in guest.collect(ends[1])], end=ends[1])
        await guest.settle()
        assert fill(adapter, frames[1]) == taken - 4
        assert adapter.statistics.receive.dropped == {"no buffer": 5}


async def test_others_do_not_wait_for_a_channel_whose_ring_is_full(mock_clock):
    async with three_channels() as (guest, adapter, frames, ends):
        assert fill(adapter, frames[1], together=1) < (guest.part_count - CONTROL_PARTS) // 2
        mock_clock.jump(PATIENCE)
        assert adapter.receive([frames[1], frames[2]]) == 2
        assert len(guest.collect(ends[2])) == 1
        assert adapter.statistics.receive.dropped == {"no buffer": 1}
        guest.gives_back = False
        guest.collect(ends[1])
        await guest.settle()
        assert adapter.receive([frames[1]]) == 1
        assert adapter.statistics.receive.dropped == {"no buffer": 1}


async def test_the_only_channel_is_waited_for_as_long_as_it_takes(mock_clock):
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert fill(adapter, incoming()) == guest.part_count - CONTROL_PARTS
        mock_clock.jump(1000 * PATIENCE)
        assert adapter.receive([incoming()]) == 0
        assert adapter.statistics.receive.dropped == {}


async def test_a_partition_that_stood_still_has_its_moment_when_it_goes_on(mock_clock):
    async with three_channels() as (guest, adapter, frames, _ends):
        fill(adapter, frames[1])
        guest.channel.undertakings.hold()
        mock_clock.jump(10 * PATIENCE)
        assert adapter.receive([frames[1]]) == 0
        guest.channel.undertakings.go_on()
        assert adapter.receive([frames[1]]) == 0
        assert adapter.statistics.receive.dropped == {}

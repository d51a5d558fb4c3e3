"""From the network to the guest: batches, room, completions in any order, and exactly once."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from netvsp.adapter import NetworkAdapter
from netvsp.frames.frame import Frame
from netvsp.link import AdapterConfig
from netvsp.oid_answers import SUPPORTED
from netvsp.placing import LONGEST_CONTROL, ROOM, part_size
from netvsp.receive import (
    CONTROL_PARTS,
    MAX_CONTROL_QUEUE,
    MAX_PENDING,
    MAX_RANGES,
)
from netvsp.wire import nvsp, oids, rndis
from tests.support.net_guest import (
    MAC,
    PEER,
    RING_PAGES,
    NetGuest,
    incoming,
    plain_frame,
    running,
)
from vmbus.errors import RingError
from vmbus.memory import PAGE_SIZE
from vmbus.wire.packets import COMPLETION, build_packet
from vmbus.wire.ring import READ_INDEX


def frames(count: int, first: int = 0, size: int = 64) -> list[Frame]:
    return [incoming(size, number=number) for number in range(first, first + count)]


QUERY_HEADER = 24


def numbers(found: list[bytes]) -> list[int]:
    return [int.from_bytes(each[14:18], "little") for each in found]


def receive_all(adapter: NetworkAdapter, some: list[Frame]) -> int:
    """Hand frames over in as many turns as it takes, while there is room."""
    taken = 0
    while taken < len(some) and (more := adapter.receive(some[taken:])):
        taken += more
    return taken


def fill_ring(guest: NetGuest) -> None:
    """Leave no room in the ring to the guest; nothing in it is about the receive buffer."""
    while guest.channel.try_flush():
        guest.channel.send(bytes(40))


@pytest.mark.parametrize(
    ("mtu", "size"),
    [(68, 1024), (750, 1024), (1500, 2048), (1770, 2048), (1774, 2048), (1775, 4096), (3822, 4096),
     (3823, 8192), (9000, 12288), (9202, 12288)],
)  # fmt: skip
def test_a_part_has_room_for_a_frame_and_is_in_one_page_if_it_can_be(mtu, size):
    assert part_size(mtu + 14) == size
    assert mtu + 14 + 4 + ROOM <= size


async def test_a_part_has_room_for_all_answers_however_short_frames_are():
    config = AdapterConfig(max_mtu=68, friendly_name="n" * 300)
    async with running(config=config) as (guest, _adapter):
        assert guest.part_size == LONGEST_CONTROL
        for oid in SUPPORTED:
            answer = await guest.query(oid)
            assert QUERY_HEADER + len(answer.buffer) <= guest.part_size
        assert len((await guest.query(oids.GEN_FRIENDLY_NAME)).buffer) == 512


@pytest.mark.parametrize("size", [14, 60, 64, 1514])
async def test_a_frame_arrives_as_it_is(size):
    async with running() as (guest, adapter):
        assert adapter.receive([incoming(size)]) == 1
        await guest.settle()
        (packet,) = guest.received
        assert packet.channel_type == nvsp.CHANNEL_DATA
        assert packet.frames() == [incoming(size).tobytes()]
        assert rndis.parse_frame_untrusted(packet.messages[0]).info_length == 0
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0
        assert adapter.statistics.receive.frames == [1, 0, 0]


async def test_a_frame_may_be_in_pieces():
    async with running() as (guest, adapter):
        whole = incoming(1000).tobytes()
        frame = Frame(whole[:300], [memoryview(whole)[300:301], bytearray(whole[301:])])
        assert adapter.receive([frame]) == 1
        await guest.settle()
        assert guest.take_frames() == [whole]


async def test_a_batch_is_in_as_few_packets_as_there_can_be():
    async with running() as (guest, adapter):
        interrupts = guest.end.interrupts
        count = 2 * MAX_RANGES + 5
        assert adapter.receive(frames(count)) == count
        assert guest.end.interrupts == interrupts + 1
        await guest.settle()
        assert [len(each.ranges) for each in guest.received] == [MAX_RANGES, MAX_RANGES, 5]
        for each in guest.received:
            # DPDK takes no other transaction id than the number of a part.
            assert each.transaction_id == each.ranges[0][1] // guest.part_size
        assert numbers(guest.take_frames()) == list(range(count))


async def test_parts_are_given_back_in_any_order_and_are_used_again():
    async with running() as (guest, adapter):
        guest.gives_back = False
        session = adapter._session
        assert session is not None
        buffer = session.receiver.buffer
        assert buffer is not None
        rng = random.Random(5)
        out: list[int] = []
        sent = 0
        for _ in range(60):
            count = rng.randrange(1, 90)
            taken = adapter.receive(frames(count, sent))
            await guest.settle()
            assert numbers(guest.take_frames_of(out)) == list(range(sent, sent + taken))
            sent += taken
            rng.shuffle(out)
            some = [out.pop() for _ in range(rng.randrange(len(out) + 1))]
            guest.give_back(*some)
            await guest.settle()
            assert adapter.snapshot()["receive_outstanding"] == len(out)
        guest.give_back(*out)
        await guest.settle()
        assert sorted(buffer.free) == list(range(buffer.count))
        assert guest.host.complaints == []
        assert sent > 2 * buffer.count


async def test_each_packet_is_given_back_once():
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive(frames(3)) == 3
        await guest.settle()
        (number,) = [each.transaction_id for each in guest.received]
        for wrong in (number + 1, 1 << 40, (1 << 64) - 1):
            guest.give_back(wrong)
        await guest.settle()
        assert len(guest.host.complaints) == 3
        assert adapter.snapshot()["receive_outstanding"] == 1
        guest.give_back(number)
        guest.give_back(number)
        await guest.settle()
        assert len(guest.host.complaints) == 4
        assert adapter.snapshot()["receive_outstanding"] == 0
        assert guest.completions == []


async def test_a_packet_comes_back_on_its_own_channel():
    async with running() as (guest, adapter):
        guest.gives_back = False
        _branch, end = guest.add_subchannel(1)
        assert adapter.receive(frames(1)) == 1
        await guest.settle()
        (number,) = [each.transaction_id for each in guest.received]
        guest.give_back(number, end=end)
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 1
        guest.give_back(number)
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0


async def test_what_a_completion_says_does_not_matter():
    """linux says NVSP_STAT_FAIL of a frame that it does not like; the part is free all the same."""
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive(frames(1)) == 1
        await guest.settle()
        (number,) = [each.transaction_id for each in guest.received]
        guest.end.send(build_packet(COMPLETION, b"", transaction_id=number))
        await guest.settle()
        assert adapter.snapshot()["receive_outstanding"] == 0


# -- room ------------------------------------------------------------------------------------------


async def test_frames_leave_some_parts_to_control_messages():
    async with running() as (guest, adapter):
        guest.gives_back = False
        count = guest.part_count
        assert receive_all(adapter, frames(count)) == count - CONTROL_PARTS
        await guest.settle()
        for _ in range(CONTROL_PARTS):
            assert (await guest.query(oids.GEN_LINK_SPEED)).status == 0
        assert adapter.receive(frames(1)) == 0
        # Now there is no part left: a reply has to wait, and comes with the first that is.
        before = len(guest.received)
        message = rndis.build_request(rndis.QUERY, 0x77, oids.GEN_LINK_SPEED)
        await guest.exchange(guest.pages([(0, message)], kind=nvsp.CHANNEL_CONTROL))
        assert len(guest.completions) == CONTROL_PARTS + 1
        assert len(guest.received) == before
        guest.give_back(guest.received[0].transaction_id)
        await guest.settle()
        (reply,) = guest.received[before:]
        assert rndis.parse_query_reply_untrusted(reply.messages[0]).request_id == 0x77


async def test_who_brings_frames_can_wait_for_room():
    async with running() as (guest, adapter):
        guest.gives_back = False
        count = guest.part_count
        taken = receive_all(adapter, frames(count))
        assert taken < count
        woken = 0

        async def wait() -> None:
            nonlocal woken
            await adapter.wait_room()
            woken += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await guest.settle()
            # Whoever asks meanwhile does not take the other one's event away.
            assert adapter.receive(frames(5)) == 0
            nursery.start_soon(wait)
            await guest.settle()
            assert woken == 0
            guest.give_back(guest.received[0].transaction_id)
        assert woken == 2
        assert adapter.receive(frames(count, taken)) == MAX_RANGES


async def test_a_guest_that_does_not_read_its_ring_gets_no_more():
    async with running() as (guest, adapter):
        fill_ring(guest)
        taken = 0
        while True:
            some = adapter.receive(frames(3, taken))
            taken += some
            if some < 3:
                break
        assert guest.channel.pending == MAX_PENDING + 1
        waited = trio.Event()

        async def wait() -> None:
            await adapter.wait_room()
            waited.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not waited.is_set()
            while not waited.is_set():
                await guest.settle()
        await guest.settle()
        assert numbers(guest.take_frames()) == list(range(taken))


async def test_a_frame_for_a_full_ring_comes_when_there_is_room():
    """The guest has nothing to give back or to ask for: it would never make us look again."""
    async with running() as (guest, adapter):
        fill_ring(guest)
        assert adapter.receive(frames(1)) == 1
        while not guest.received:
            await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]


async def test_a_ring_that_is_full_of_answers_has_room_when_they_are_read():
    async with running() as (guest, adapter):
        fill_ring(guest)
        while guest.channel.pending <= MAX_PENDING:
            guest.channel.send(bytes(40))
        assert adapter.receive(frames(1)) == 0

        async def bring() -> None:
            await adapter.wait_room()
            assert adapter.receive(frames(1)) == 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring)
            while not guest.received:
                await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]


async def test_a_corrupt_ring_is_no_fault_of_who_brings_a_frame():
    """It may be another guest's adapter, on a switch."""
    guest = NetGuest()
    taken = 0
    with pytest.raises(ExceptionGroup) as caught:
        async with running(guest=guest) as (_guest, adapter):
            guest.memory.page(RING_PAGES).cast("I")[READ_INDEX] = 0xFFFFFFFF
            taken = adapter.receive(frames(3))
            await trio.testing.wait_all_tasks_blocked()
    assert taken == 3
    assert caught.group_contains(RingError, depth=None)
    assert len(guest.host.leases) == 0


async def test_a_corrupt_sub_channel_ends_alone():
    config = AdapterConfig(max_queues=2)
    async with running(config=config) as (guest, adapter):
        branch, end = guest.add_subchannel(1)
        await guest.settle()
        session = adapter._session
        assert session is not None
        end.memory.page(4).cast("I")[READ_INDEX] = 0xFFFFFFFF
        session.receiver._send(branch, [[60, 0]], nvsp.build_rndis_packet(nvsp.CHANNEL_DATA))
        await guest.settle()
        assert branch.statistics.complaints == 1
        assert adapter.snapshot()["channels"] == 1
        assert adapter.snapshot()["receive_outstanding"] == 0
        assert adapter.receive(frames(1)) == 1
        await guest.settle()
        assert guest.take_frames() == [incoming().tobytes()]


async def test_replies_that_the_guest_does_not_take_come_to_an_end():
    async with running() as (guest, _adapter):
        guest.host.leases.tear_down(0, 1)
        request = rndis.build_request(rndis.QUERY, 1, oids.GEN_LINK_SPEED)
        for number in range(MAX_CONTROL_QUEUE + 2):
            packet = guest.section(0, request, kind=nvsp.CHANNEL_CONTROL, number=number)
            await guest.exchange(packet)
        assert guest.take_completions() == [
            (number, nvsp.SUCCESS if number < MAX_CONTROL_QUEUE else nvsp.INVALID_RNDIS_PACKET)
            for number in range(MAX_CONTROL_QUEUE + 2)
        ]
        assert "too many RNDIS replies" in guest.host.complaints[-1]


async def test_pages_that_are_no_memory_any_more_get_nothing():
    guest = NetGuest()
    region = guest.memory.regions[0]
    async with running(guest=guest) as (_guest, adapter):
        guest.memory.remove_region(region.gpa, region.size)
        assert adapter.receive(frames(200)) == 200
        # Where replies were, there are views still.
        assert adapter.statistics.receive.dropped == {"no memory": 199}
        assert adapter.snapshot()["receive_outstanding"] == 1
        # A request is answered once all the same.
        adapter.set_link(up=False)
        request = nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL, 0, 24)
        guest.end.send(guest.in_band(request, number=9))
        await trio.testing.wait_all_tasks_blocked()
        answers = [each for each in guest.end.receive_nowait() if each.kind == COMPLETION]
        assert [each.transaction_id for each in answers] == [9]


# -- pauses ----------------------------------------------------------------------------------------


async def test_a_paused_guest_finds_its_memory_as_it_was():
    async with running() as (guest, adapter):
        await guest.channel.pause()
        before = guest.memory.read(0, guest.memory.size)
        assert adapter.receive(frames(2)) == 0
        adapter.set_link(up=False)
        waited = trio.Event()

        async def wait() -> None:
            await adapter.wait_room()
            waited.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert guest.memory.read(0, guest.memory.size) == before
            assert not waited.is_set()
            guest.channel.resume()
        await guest.settle()
        (told,) = guest.received
        status = rndis.parse_indication_untrusted(told.messages[0]).status
        assert status == rndis.STATUS_MEDIA_DISCONNECT
        adapter.set_link(up=True)
        assert adapter.receive(frames(2)) == 2


# -- filters ---------------------------------------------------------------------------------------

DIRECTED = plain_frame(60, source=PEER, target=MAC)
OTHER = plain_frame(60, source=PEER, target=b"\x02\0\0\0\0\1")
MULTICAST = plain_frame(60, source=PEER, target=b"\x01\0\x5e\0\0\1")
BROADCAST = plain_frame(60, source=PEER, target=b"\xff" * 6)
ALL = [DIRECTED, OTHER, MULTICAST, BROADCAST]


@pytest.mark.parametrize(
    ("wants", "gets"),
    [
        (oids.FILTER_DIRECTED, [DIRECTED]),
        (oids.FILTER_MULTICAST, [MULTICAST]),
        (oids.FILTER_ALL_MULTICAST, [MULTICAST]),
        (oids.FILTER_BROADCAST, [BROADCAST]),
        (oids.FILTER_PROMISCUOUS, ALL),
        (0x0D, [DIRECTED, MULTICAST, BROADCAST]),
        (0x10, []),
    ],
)
async def test_a_guest_gets_what_its_filter_lets_through(wants, gets):
    async with running(wants=wants) as (guest, adapter):
        assert adapter.receive([Frame(each) for each in ALL]) == 4
        await guest.settle()
        assert guest.take_frames() == gets
        assert adapter.statistics.receive.dropped["filtered"] == 4 - len(gets)


async def test_a_short_frame_and_one_while_the_link_is_down_are_dropped():
    async with running() as (guest, adapter):
        assert adapter.receive([Frame(DIRECTED[:13]), Frame(b"")]) == 2
        assert adapter.statistics.receive.dropped == {"short": 2}
        adapter.set_link(up=False)
        assert adapter.receive([Frame(DIRECTED)]) == 1
        assert adapter.statistics.receive.dropped["link down"] == 1
        await guest.settle()
        assert guest.take_frames() == []


async def test_a_frame_that_is_too_long_is_dropped():
    """No guest that has not asked for it takes a frame in several parts."""
    async with running() as (guest, adapter):
        room = guest.part_size - ROOM
        assert room * guest.part_count <= 256 * PAGE_SIZE
        assert adapter.receive([incoming(room), incoming(room + 1), incoming(65549)]) == 3
        await guest.settle()
        assert guest.take_frames() == [incoming(room).tobytes()]
        assert adapter.statistics.receive.dropped == {"too long": 2}

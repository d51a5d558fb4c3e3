"""An endpoint that is full: frames are kept, in order, and the guest waits for its answers."""

from __future__ import annotations

import trio.testing

from netvsp.backlog import FRAME_WEIGHT, SEGMENT_COST, TURN, WAITING_WEIGHT
from netvsp.endpoint import Offloads
from netvsp.frames.frame import Frame, Offload
from netvsp.transmit import PIECE_COST
from netvsp.wire import nvsp, ppi
from tests.support.net_frames import Shape, packet, uncut
from tests.support.net_guest import MAC, PEER, NetGuest, Network, message_of, running
from vmbus.host.undertakings import CHANNEL_LOAD

GOOD = nvsp.SUCCESS


def numbered(number: int, size: int = 60) -> bytes:
    return (PEER + MAC + b"\x88\xb5" + number.to_bytes(2, "big")).ljust(size, b"\x33")


def several(guest: NetGuest, index: int, numbers: list[int]) -> bytes:
    messages = b"".join(message_of(numbered(each)) for each in numbers)
    return guest.section(index, messages, number=numbers[-1])


async def test_what_is_not_taken_is_kept_and_answered_later():
    network = Network(room=4)
    async with running(network) as (guest, adapter):
        packets = [several(guest, index, [3 * index + each for each in range(3)])
                   for index in range(4)]  # fmt: skip
        await guest.exchange(*packets)
        assert guest.take_completions() == [(2, GOOD)]
        assert network.bytes() == [numbered(each) for each in range(4)]
        assert guest.channel.outstanding == 3
        network.make_room(1)
        await guest.settle()
        assert guest.take_completions() == []
        network.make_room(4)
        await guest.settle()
        assert guest.take_completions() == [(5, GOOD), (8, GOOD)]
        network.make_room(100)
        await guest.settle()
        assert guest.take_completions() == [(11, GOOD)]
        assert network.bytes() == [numbered(each) for each in range(12)]
        assert adapter.statistics.transmit.total_frames == 12
        assert guest.channel.outstanding == 0
        assert guest.channel.undertakings.load.total == 0


async def test_nothing_overtakes_what_waits():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        await guest.exchange(several(guest, 0, [1]))
        await guest.exchange(several(guest, 1, [2]), guest.section(2, b"junk", number=99))
        assert guest.take_completions() == [(99, nvsp.INVALID_RNDIS_PACKET)]
        await guest.ask(nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0), flags=0)
        network.make_room(100)
        await guest.settle()
        assert guest.take_completions() == [(1, GOOD), (2, GOOD)]
        assert network.bytes() == [numbered(1), numbered(2)]


async def test_what_waits_does_not_change_with_the_guest():
    """Its pages are the guest's, who may write there before it has its answer."""
    network = Network(room=0)
    async with running(network, mtu=9000) as (guest, _adapter):
        message = message_of(numbered(1, 8000))
        await guest.exchange(guest.pages([(0, message[:3000]), (0, message[3000:])], number=1))
        guest.write(guest.data_pfns, 0, bytes(16000))
        network.make_room(1)
        await guest.settle()
        assert network.bytes() == [numbered(1, 8000)]


async def test_what_is_dropped_is_answered_in_its_turn():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        spoofed = guest.section(1, message_of(PEER + PEER + bytes(40)), number=2)
        await guest.exchange(several(guest, 0, [1]), spoofed)
        assert guest.take_completions() == []
        network.make_room(1)
        await guest.settle()
        assert guest.take_completions() == [(1, GOOD), (2, GOOD)]
        # With nothing in front of it, at once.
        await guest.exchange(spoofed)
        assert guest.take_completions() == [(2, GOOD)]


async def test_packets_that_want_no_answer_are_kept_as_well():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        await guest.exchange(*[
            guest.section(index, message_of(numbered(index)), flags=index % 2)
            for index in range(4)
        ])  # fmt: skip
        network.make_room(100)
        await guest.settle()
        assert len(guest.completions) == 2
        assert network.bytes() == [numbered(each) for each in range(4)]


async def test_no_more_is_read_when_enough_waits():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        first = guest.section(0, message_of(numbered(0)), number=0)
        await guest.exchange(first)
        load = guest.channel.undertakings.load
        assert load.total == WAITING_WEIGHT + FRAME_WEIGHT + 60
        load.change(CHANNEL_LOAD)
        await guest.exchange(guest.section(1, message_of(numbered(1)), number=1))
        await guest.exchange(guest.section(2, message_of(numbered(2)), number=2))
        assert guest.channel.outstanding == 1, "the others are in the ring still"
        load.change(-CHANNEL_LOAD)
        await guest.settle()
        assert guest.channel.outstanding == 3
        network.make_room(9)
        await guest.settle()
        assert network.bytes() == [numbered(each) for each in range(3)]


async def test_an_endpoint_that_never_takes_any_more_does_not_keep_the_channel():
    """Only the channel's end is left to wait for: the guest gets its pages back."""
    network = Network(room=0)
    async with running(network) as (guest, adapter):
        await guest.exchange(*[several(guest, index, [index]) for index in range(3)])
        assert guest.channel.outstanding == 3
        guest.channel.end()
        await trio.testing.wait_all_tasks_blocked()
        assert len(guest.host.leases) == 0
        assert adapter.snapshot()["stage"] == "not open"


async def test_a_paused_guest_is_not_answered():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        await guest.exchange(several(guest, 0, [1]))
        await guest.channel.pause()
        network.make_room(1)
        await guest.settle()
        assert guest.take_completions() == []
        guest.channel.resume()
        await guest.settle()
        assert guest.take_completions() == [(1, GOOD)]


async def test_each_channel_waits_for_its_own_queue():
    network = Network(queues=2, room=0)
    async with running(network) as (guest, _adapter):
        _branch, end = guest.add_subchannel(1)
        await guest.exchange(several(guest, 0, [1]))
        await guest.exchange(several(guest, 1, [2]), end=end)
        network.make_room(2)
        await guest.settle()
        guest.collect(end)
        assert sorted(guest.take_completions()) == [(1, GOOD), (2, GOOD)]
        assert sorted(network.queues) == [0, 1]


async def test_a_turn_is_over_after_some_segments_that_we_cut_ourselves():
    """A guest that asks for small pieces has a thousand of them made of one packet."""
    for offloads, cost in ((Offloads(), 1249 * SEGMENT_COST), (Offloads(tcp_segments=True), 0)):
        async with running(Network(offloads)) as (guest, adapter):
            session = adapter._session
            assert session is not None
            sender = session._senders[guest.channel]
            large = Frame(bytes(60000), (), Offload(1, 1, 54, 48, 34, 16))
            assert sender.cost([large, Frame(bytes(60))], 3) == 60060 + 3 * PIECE_COST + cost
            shape = Shape(4, "tcp", "none")
            left, items = uncut(shape, packet(shape, bytes(5800)), 48)
            item = ppi.build_item(ppi.LARGE_SEND, items[ppi.LARGE_SEND])
            guest.end.send(
                *[guest.section(0, message_of(left, item), number=index) for index in range(4)]
            )
            packets = guest.channel._reader.read_batch_untrusted(256)
            async with trio.open_nursery() as nursery:
                done = session.serve_batch(guest.channel, packets, nursery)
            one = 121 * SEGMENT_COST
            assert done == (4 if not cost else -(-TURN // one))
            guest.channel.try_flush()


async def test_what_waits_is_dropped_and_answered_when_the_link_goes_down():
    network = Network(room=1)
    async with running(network) as (guest, adapter):
        await guest.exchange(*[several(guest, index, [index]) for index in range(3)])
        assert guest.take_completions() == [(0, GOOD)]
        adapter.set_link(up=False)
        await guest.settle()
        assert guest.take_completions() == [(1, GOOD), (2, GOOD)]
        assert adapter.statistics.transmit.dropped == {"link down": 2}
        assert guest.channel.undertakings.load.total == 0
        adapter.set_link(up=True)
        await guest.exchange(several(guest, 0, [7]))
        assert guest.take_completions() == []
        network.make_room(1)
        await guest.settle()
        assert guest.take_completions() == [(7, GOOD)]
        assert network.bytes() == [numbered(0), numbered(7)]


async def test_a_link_that_is_down_for_a_moment_has_dropped_what_waited():
    network = Network(room=0)
    async with running(network) as (guest, adapter):
        await guest.exchange(several(guest, 0, [1]))
        adapter.set_link(up=False)
        adapter.set_link(up=True)
        network.make_room(0)
        await guest.settle()
        assert guest.channel.outstanding in {0, 1}
        network.make_room(1)
        await guest.settle()
        assert guest.take_completions() == [(1, GOOD)]

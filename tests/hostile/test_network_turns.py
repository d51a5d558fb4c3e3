"""What one guest's network adapter does in a step is bounded, whatever the guest asks for."""

from __future__ import annotations

import trio.testing

from netvsp.backlog import FRAME_COST, FRAME_WEIGHT, STEP, TURN, WAITING_WEIGHT
from netvsp.buffers import SharedBuffer
from netvsp.frames.offload import MIN_MSS
from netvsp.session import REFUSAL_COST, Session
from netvsp.wire import nvsp, ppi
from tests.support.net_frames import Shape, packet
from tests.support.net_guest import RECEIVE_HANDLE, NetGuest, Network, message_of, running
from tests.support.turns import counting
from vmbus.gpadl import Gpadl
from vmbus.host.undertakings import CHANNEL_LOAD

RECEIVE = nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID)
INIT = nvsp.build_init(nvsp.VERSION_6_1, nvsp.VERSION_6_1)


async def test_one_buffer_is_shared_in_a_turn():
    async with running(started=False) as (guest, adapter):
        with counting(SharedBuffer, "__init__") as made:
            packets = [guest.in_band(each) for _ in range(50) for each in (INIT, RECEIVE)]
            await guest.exchange(*packets)
        assert len(guest.completions) == 100
        assert made.total == 50
        assert made.most_in_step == 1
        assert adapter.snapshot()["stage"] == "RNDIS"


def fine_segment(guest: NetGuest) -> bytes:
    """A packet with a segment that is to be cut into the smallest pieces."""
    whole = packet(Shape(4, "tcp", "none"), bytes(60_000))
    large = ppi.pack_large_send(ppi.LargeSend(MIN_MSS, 34, False))
    return guest.pages([(0, message_of(whole, ppi.build_item(ppi.LARGE_SEND, large)))])


async def test_what_has_waited_is_sent_in_several_turns():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        for _ in range(6):
            assert guest.end.send(fine_segment(guest)) == 1
            await trio.testing.wait_all_tasks_blocked()
        with counting(Network, "transmit", lambda _self, _queue, frames: len(frames)) as sent:
            network.make_room(1 << 20)
            await guest.settle()
        assert sent.total == 6 * (60_000 // MIN_MSS)
        assert sent.most_in_step <= TURN // FRAME_COST + STEP


async def test_segments_that_wait_are_weighed_and_not_cut_before_their_turn():
    network = Network(room=0)
    async with running(network) as (guest, _adapter):
        load = guest.channel.undertakings.load
        while not load.full and guest.end.send(fine_segment(guest)):
            await trio.testing.wait_all_tasks_blocked()
        assert load.full
        waiting = guest.channel.undertakings.resting
        frame = len(packet(Shape(4, "tcp", "none"), bytes(60_000)))
        assert load.total == waiting * (WAITING_WEIGHT + FRAME_WEIGHT + frame) <= 2 * CHANNEL_LOAD
        network.make_room(1 << 20)
        await guest.settle()


async def test_few_packets_are_refused_in_a_turn():
    guest = NetGuest()
    async with running(guest=guest) as (_, adapter):
        with counting(Session, "_refuse") as refused:
            await guest.exchange(*[guest.in_band(bytes(40)) for _ in range(100)])
        assert refused.total == adapter.snapshot()["refused"] == 100
        assert refused.most_in_step <= TURN // REFUSAL_COST


async def test_a_buffer_that_is_refused_for_its_last_page_is_weighed():
    guest = NetGuest()
    async with running(guest=guest, started=False):
        found = guest.host.gpadls[RECEIVE_HANDLE]
        pfns = (*found.ranges[0].pfns[:-1], 1 << 40)
        guest.host.gpadls[RECEIVE_HANDLE] = Gpadl(
            RECEIVE_HANDLE, (found.ranges[0]._replace(pfns=pfns),)
        )
        with counting(Gpadl, "check") as checked:
            await guest.exchange(guest.in_band(INIT), *[guest.in_band(RECEIVE) for _ in range(60)])
        assert checked.total == 60
        assert checked.most_in_step <= TURN // REFUSAL_COST

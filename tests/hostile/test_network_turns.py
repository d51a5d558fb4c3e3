"""What one guest's network adapter does in a step is bounded, whatever the guest asks for."""

from __future__ import annotations

from netvsp.buffers import SharedBuffer
from netvsp.session import REFUSAL_COST, Session
from netvsp.transmit import TURN
from netvsp.wire import nvsp
from tests.support.net_guest import RECEIVE_HANDLE, NetGuest, running
from tests.support.turns import counting
from vmbus.gpadl import Gpadl

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

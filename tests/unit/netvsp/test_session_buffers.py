"""The adapter's session: buffers that come and go, and sub-channels."""

from __future__ import annotations

import struct

import pytest

from netvsp.link import AdapterConfig
from netvsp.wire import nvsp, oids, rndis
from tests.support.net_guest import (
    RECEIVE_HANDLE,
    SEND_HANDLE,
    Network,
    incoming,
    message_of,
    plain_frame,
    running,
)
from vmbus.errors import (
    STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_STATE,
    GuestProtocolError,
)
from vmbus.gpadl import Gpadl
from vmbus.memory import PAGE_SIZE
from vmbus.wire.gpa import GpaRange
from vmbus.wire.packets import IN_BAND, build_packet

INVALID = nvsp.build_rndis_packet_complete(nvsp.INVALID_RNDIS_PACKET)
RECEIVE = nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, RECEIVE_HANDLE, nvsp.RECEIVE_BUFFER_ID)
SEND = nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, SEND_HANDLE, 0xFACE)


# -- buffers ---------------------------------------------------------------------------------------


def gpadl(handle: int, pfns, size: int | None = None) -> Gpadl:
    pfns = tuple(pfns)
    return Gpadl(handle, (GpaRange(size or len(pfns) * PAGE_SIZE, 0, pfns),))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda guest: guest.host.gpadls.clear(), "does not exist"),
        (lambda guest: guest.host.gpadls.update({1: gpadl(1, range(40, 71))}), "bytes"),
        (lambda guest: guest.host.gpadls.update({1: gpadl(1, range(40, 40 + 8193))}), "bytes"),
        (lambda guest: guest.host.gpadls.update({1: gpadl(1, range(300, 600))}), "is not memory"),
    ],
)
async def test_a_receive_buffer_that_is_none_is_refused(change, says):
    async with running(started=False) as (guest, _adapter):
        await guest.agree()
        change(guest)
        assert await guest.ask(RECEIVE) == nvsp.build_receive_buffer_complete(nvsp.FAILURE)
        assert says in guest.host.complaints[-1]
        assert len(guest.host.leases) == 0
        guest.make_gpadls()
        assert await guest.share_receive_buffer() == nvsp.SUCCESS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda guest: guest.host.gpadls.clear(), "does not exist"),
        (lambda guest: guest.host.gpadls.update({2: gpadl(2, (40,), 4095)}), "4095 bytes"),
        (lambda guest: guest.host.gpadls.update({2: gpadl(2, range(8193))}), "bytes"),
        (lambda guest: guest.host.gpadls.update({2: gpadl(2, (40, 1 << 40))}), "is not memory"),
    ],
)
async def test_a_send_buffer_that_is_none_is_refused(change, says):
    async with running(started=False) as (guest, _adapter):
        await guest.agree()
        change(guest)
        assert await guest.ask(SEND) == nvsp.build_send_buffer_complete(nvsp.FAILURE)
        assert says in guest.host.complaints[-1]
        assert len(guest.host.leases) == 0
        guest.make_gpadls()
        assert await guest.share_send_buffer() == nvsp.SUCCESS


async def test_a_second_buffer_is_refused_until_the_first_one_is_back():
    async with running() as (guest, _adapter):
        assert await guest.ask(RECEIVE) == nvsp.build_receive_buffer_complete(nvsp.FAILURE)
        assert await guest.ask(SEND) == nvsp.build_send_buffer_complete(nvsp.FAILURE)
        assert len(guest.host.leases) == 2
        for handle in (RECEIVE_HANDLE, SEND_HANDLE):
            guest.host.leases.tear_down(0, handle)
        assert guest.host.torn_down == [RECEIVE_HANDLE, SEND_HANDLE]
        assert await guest.share_receive_buffer() == nvsp.SUCCESS
        assert await guest.share_send_buffer() == nvsp.SUCCESS


async def test_linux_revokes_and_then_takes_its_pages_back():
    """linux: netvsc_device_remove."""
    async with running() as (guest, adapter):
        guest.gives_back = False
        assert adapter.receive([incoming()]) == 1
        await guest.settle()
        assert await guest.control(rndis.build_id_message(rndis.HALT, 9)) == b""
        for kind, number, handle in (
            (nvsp.REVOKE_RECEIVE_BUFFER, 0xCAFE, RECEIVE_HANDLE),
            (nvsp.REVOKE_SEND_BUFFER, 0, SEND_HANDLE),
        ):
            assert await guest.ask(nvsp.build_revoke(kind, number), flags=0) == b""
            guest.host.leases.tear_down(0, handle)
        assert guest.host.torn_down == [RECEIVE_HANDLE, SEND_HANDLE]
        assert adapter.snapshot()["receive_outstanding"] == 0
        assert adapter.receive([incoming()]) == 1
        assert adapter.statistics.receive.dropped["not ready"] == 1
        # Twice is no harm, and neither is what there never was.
        await guest.ask(nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0), flags=0)
        assert guest.host.complaints == []


async def test_a_revoked_send_buffer_has_no_sections():
    network = Network()
    async with running(network) as (guest, _adapter):
        packet = guest.section(0, message_of(plain_frame()), number=5)
        await guest.ask(nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0), flags=0)
        await guest.exchange(packet)
        assert guest.take_completions() == [(5, nvsp.INVALID_RNDIS_PACKET)]
        guest.host.leases.tear_down(0, RECEIVE_HANDLE)
        await guest.exchange(guest.pages([(0, message_of(plain_frame()))], number=6))
        assert guest.take_completions() == [(6, nvsp.SUCCESS)], "sending needs no receive buffer"
        assert network.bytes() == [plain_frame()]


async def test_replies_of_before_do_not_come_in_another_buffer():
    """linux: "no rndis request found for this response"."""
    async with running() as (guest, _adapter):
        guest.host.leases.tear_down(0, RECEIVE_HANDLE)
        message = rndis.build_request(rndis.QUERY, 0x99, oids.GEN_LINK_SPEED)
        await guest.exchange(guest.pages([(0, message)], kind=nvsp.CHANNEL_CONTROL))
        assert guest.received == []
        await guest.start()
        ids = [rndis.parse_request_id_untrusted(each.messages[0]) for each in guest.received]
        assert 0x99 not in ids


# -- sub-channels ----------------------------------------------------------------------------------


async def test_sub_channels_are_offered_and_told_of_when_all_are_open():
    config = AdapterConfig(max_queues=4)
    async with running(config=config) as (guest, adapter):
        answer = await guest.ask(nvsp.build_subchannel(7))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.SUCCESS, 3)
        assert guest.host.offered == [3]
        for index in (2, 1):
            guest.add_subchannel(index)
            await guest.settle()
            assert guest.messages == []
        guest.add_subchannel(3)
        await guest.settle()
        (table,) = guest.messages
        assert nvsp.parse_send_table_untrusted(table) == (0, 1, 2, 3) * 4
        assert adapter.snapshot()["channels"] == 4
        answer = await guest.ask(nvsp.build_subchannel(1))
        assert nvsp.parse_subchannel_complete_untrusted(answer)[0] == nvsp.FAILURE
        assert guest.host.offered == [3], "once"


async def test_fewer_sub_channels_than_granted_are_enough():
    network = Network(queues=8)
    async with running(network, config=AdapterConfig(max_queues=8)) as (guest, adapter):
        answer = await guest.ask(nvsp.build_subchannel(5))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.SUCCESS, 5)
        guest.completions.clear()
        _branch, end = guest.add_subchannel(2)
        await guest.settle()
        assert guest.messages == []
        await guest.exchange(guest.section(0, message_of(plain_frame()), number=5), end=end)
        assert guest.take_completions() == [(5, nvsp.SUCCESS)]
        assert network.queues == [2]
        assert adapter.snapshot()["channels"] == 2


@pytest.mark.parametrize(
    ("payload", "options"),
    [
        (struct.pack("<III", 133, 0, 1), {}),
        (struct.pack("<III", 133, 2, 1), {}),
        (nvsp.build_subchannel(1), {"version": nvsp.VERSION_4}),
    ],
)
async def test_sub_channels_that_cannot_be_are_refused(payload, options):
    async with running(**options) as (guest, _adapter):
        answer = await guest.ask(payload)
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.FAILURE, 0)
        assert guest.host.offered == []
        assert guest.host.complaints


@pytest.mark.parametrize("most", [1, 4])
async def test_none_is_a_number_of_sub_channels(most):
    async with running(config=AdapterConfig(max_queues=most)) as (guest, _adapter):
        count = 5 if most == 1 else 0
        answer = await guest.ask(nvsp.build_subchannel(count))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.SUCCESS, 0)
        assert guest.host.offered == []


@pytest.mark.parametrize(
    ("status", "answered"),
    [
        (STATUS_INSUFFICIENT_RESOURCES, nvsp.SUCCESS),
        (STATUS_INVALID_DEVICE_STATE, nvsp.FAILURE),
    ],
)
async def test_a_bus_without_room_is_told_as_no_sub_channels(status, answered):
    """linux gives up its channels at a failure, and goes on with one at none."""
    async with running() as (guest, _adapter):
        guest.host.refusal = GuestProtocolError("no", status=status)
        answer = await guest.ask(nvsp.build_subchannel(3))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (answered, 0)
        guest.host.refusal = None
        answer = await guest.ask(nvsp.build_subchannel(3))
        assert nvsp.parse_subchannel_complete_untrusted(answer) == (nvsp.SUCCESS, 3)


async def test_a_sub_channel_carries_data_and_nothing_else():
    async with running() as (guest, _adapter):
        _branch, end = guest.add_subchannel(1)
        await guest.settle()
        request = rndis.build_request(rndis.QUERY, 1, oids.GEN_LINK_SPEED)
        control = guest.section(0, request, kind=nvsp.CHANNEL_CONTROL, number=5)
        init = build_packet(IN_BAND, nvsp.build_init(2, 2), transaction_id=6, flags=1)
        await guest.exchange(control, init, end=end)
        assert guest.completions == [
            (5, INVALID),
            (6, nvsp.build_init_complete(0, nvsp.FAILURE)),
        ]
        assert guest.received == []

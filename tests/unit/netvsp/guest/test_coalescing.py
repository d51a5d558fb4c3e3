"""Coalesced segments: parts of one, which the driver puts together."""

from __future__ import annotations

import pytest
import trio.testing

from netvsp.wire import nvsp, ppi, rndis
from tests.support.fake_nic_host import frame_message, plugged
from vmbus.guest import DPDK, LINUX_6_1, OPENBSD, GuestPanic

FRAME = bytes(range(60))
settle = trio.testing.wait_all_tasks_blocked


def part(number: int, *flags: int) -> bytes:
    """A message with part of a coalesced segment."""
    item = ppi.build_packet_id(sum(flags) | ppi.FRAGMENT_SUB_ALLOCATION, 0)
    return frame_message(bytes([number]) * 100, item)


FIRST, LAST = ppi.FRAGMENT_FIRST, ppi.FRAGMENT_LAST


async def test_parts_of_a_segment_are_put_together():
    async with plugged() as (adapter, nic):
        await adapter.up()
        checksum = ppi.build_item(ppi.CHECKSUM, ppi.RX_TCP_SUCCEEDED)
        word = ppi.FRAGMENT_FIRST | ppi.FRAGMENT_SUB_ALLOCATION
        first = frame_message(bytes(100), checksum + ppi.build_packet_id(word, 0))
        nic.deliver([first, part(1), part(2, LAST), frame_message(FRAME)])
        frame = await adapter.receive()
        assert frame.data == bytes(100) + b"\1" * 100 + b"\2" * 100
        assert frame.fragments == 3
        assert frame.checksum == ppi.RX_TCP_SUCCEEDED
        assert (await adapter.receive()).fragments == 1
        nic.deliver([part(0, FIRST, LAST)])
        assert (await adapter.receive()).data == bytes(100)


async def test_a_segment_may_be_longer_than_the_mtu():
    async with plugged() as (adapter, nic):
        await adapter.up()
        word = ppi.FRAGMENT_SUB_ALLOCATION
        messages = [
            frame_message(bytes(1900), ppi.build_packet_id(word | flags, 0))
            for flags in [FIRST] + [0] * 32 + [LAST]
        ]
        nic.deliver(messages)
        assert len((await adapter.receive()).data) == 1900 * 34


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([part(1)], "without its first part: rndis_filter_receive_data"),
        ([part(1, LAST)], "without its first part"),
        ([part(1, FIRST)], "ends with its packet, without its last part"),
        ([part(1, FIRST), part(2)], "ends with its packet, without its last part"),
        ([part(1, FIRST), part(2, FIRST)], "begins before the last one ends"),
        ([part(1, FIRST), frame_message(FRAME)], "a frame between the parts"),
        (
            [part(1, FIRST), rndis.build_indication(rndis.STATUS_MEDIA_CONNECT)],
            "interrupted by a control message",
        ),
    ],
)
async def test_a_segment_that_is_wrongly_cut(messages, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged() as (adapter, nic):
            await adapter.up()
            await settle()
            nic.deliver(messages)
            await settle()


@pytest.mark.parametrize("personality", [OPENBSD, DPDK, LINUX_6_1], ids=str)
async def test_a_segment_that_nobody_asked_for(personality):
    def prepare(nic):
        nic.versions.discard(nvsp.VERSION_6_1)

    with pytest.raises(GuestPanic, match="the driver has not asked for them"):
        async with plugged(personality, prepare=prepare) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.deliver([part(0, FIRST), part(1, LAST)])
            await adapter.receive()

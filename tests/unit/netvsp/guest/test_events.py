"""What the device tells unasked: the link, a virtual function, the table of channels."""

from __future__ import annotations

import struct

import pytest
import trio.testing

from netvsp.guest.events import Event
from netvsp.wire import nvsp, rndis
from tests.support.fake_nic_host import plugged
from vmbus.guest import (
    DPDK,
    FREEBSD,
    ILLUMOS,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    NETBSD,
    OPENBSD,
    UEFI,
    GuestPanic,
)

settle = trio.testing.wait_all_tasks_blocked
VF = nvsp.build_vf_association(allocated=True, serial=7)
TABLE = tuple(number % 2 for number in range(16))


def table(entries=TABLE, *, count=16, offset=40, gap=28):
    """SEND_INDIRECTION_TABLE, its entries behind a gap."""
    head = struct.pack("<III", nvsp.SEND_INDIRECTION_TABLE, count, offset) + bytes(gap)
    return head + struct.pack(f"<{len(entries)}I", *entries)


async def test_the_link_goes_down_and_up():
    async with plugged() as (adapter, nic):
        heard: list[Event] = []
        adapter.events.on_event = heard.append
        assert adapter.link
        nic.indicate(rndis.STATUS_MEDIA_DISCONNECT)
        nic.indicate(rndis.STATUS_LINK_SPEED_CHANGE, struct.pack("<I", 4_000_000))
        nic.indicate(rndis.STATUS_NETWORK_CHANGE)
        nic.indicate(rndis.STATUS_TASK_OFFLOAD_CURRENT_CONFIG, bytes(40))
        assert await adapter.events.wait_told(4) == [
            Event("link", False),
            Event("speed", 4_000_000),
            Event("network", None),
            Event("offloads", None),
        ]
        assert not adapter.link
        assert adapter.events.speed == 4_000_000
        nic.indicate(rndis.STATUS_MEDIA_CONNECT)
        await adapter.events.wait_told(5)
        assert adapter.link
        assert heard == adapter.events.log


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (rndis.build_indication(0x40010099), "INDICATE_STATUS 0x40010099: hn_rndis_rx_status"),
        (rndis.build_indication(rndis.STATUS_LINK_SPEED_CHANGE, bytes(2)), "with 2 bytes"),
        (struct.pack("<IIII", rndis.INDICATE_STATUS, 16, 0x4001000B, 0), "of 16 bytes"),
    ],
)
async def test_an_indication_that_no_driver_takes(message, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged() as (_adapter, nic):
            nic.deliver([message])
            await settle()


async def test_a_virtual_function_comes_and_goes():
    async with plugged() as (adapter, nic):
        nic.notify(VF)
        await adapter.events.wait_told(1)
        assert adapter.events.virtual_function == (True, 7)
        nic.notify(nvsp.build_vf_association(allocated=False, serial=7))
        assert await adapter.events.wait_told(2) == [
            Event("vf", (True, 7)),
            Event("vf", (False, 7)),
        ]


async def test_linux_sends_where_the_table_says():
    async with plugged(vps=2) as (adapter, nic):
        nic.notify(table((1,) * 16))
        await adapter.events.wait_told(1)
        assert adapter.sender.table == (1,) * 16
        assert [adapter.sender.pick(number)[0] for number in range(5)] == [1] * 5
        nic.notify(nvsp.build_send_table((0,) * 16))
        await adapter.events.wait_told(2)
        assert adapter.sender.table == (0,) * 16


@pytest.mark.parametrize("personality", [FREEBSD, DPDK], ids=str)
async def test_others_take_the_table_and_forget_it(personality):
    async with plugged(personality, vps=2) as (adapter, nic):
        before = adapter.sender.table
        nic.notify(table((1,) * 16))
        assert await adapter.events.wait_told(1) == [Event("table", (1,) * 16)]
        assert adapter.sender.table == before


async def test_the_table_stands_elsewhere_since_version_6_1():
    async with plugged(vps=2) as (adapter, nic):
        nic.notify(table(offset=48, gap=36))
        nic.notify(table(offset=12, gap=0))
        assert await adapter.events.wait_told(2) == [Event("table", TABLE)] * 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (table(count=15), "15 entries"),
        (table(count=17), "17 entries"),
        (table((0,) * 15 + (2,)), "with 2 channels"),
        (table(offset=48), "at 48 of 104 bytes"),
        (table(offset=8), "at 8 of 104 bytes"),
        (table()[:8], "of 8 bytes"),
        (VF[:8], "SEND_VF_ASSOCIATION of 8 bytes"),
        (struct.pack("<III", nvsp.SEND_VF_ASSOCIATION, 2, 1), "allocated is 2"),
        (nvsp.build_init(1, 1), "NVSP INIT in band: it logs an error"),
        (struct.pack("<II", 200, 0), "NVSP 200 in band: it logs an error"),
        (b"", "."),
    ],
)
async def test_a_notice_that_is_wrong(message, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(vps=2) as (_adapter, nic):
            nic.notify(message)
            await settle()


async def test_before_version_6_1_the_table_stands_at_40():
    """netvsc_send_table does as if it were there, for hosts that say something else."""

    def prepare(nic):
        nic.versions.discard(nvsp.VERSION_6_1)

    async with plugged(vps=2, prepare=prepare) as (adapter, nic):
        nic.notify(table())
        nic.notify(nvsp.build_send_table(TABLE))
        assert await adapter.events.wait_told(2) == [Event("table", TABLE)] * 2
    with pytest.raises(GuestPanic, match="at 48; netvsc_send_table takes it from 40 on"):
        async with plugged(vps=2, prepare=prepare) as (_adapter, nic):
            nic.notify(table(offset=48, gap=36))
            await settle()


async def test_a_notice_comes_on_the_first_channel():
    with pytest.raises(GuestPanic, match="SEND_VF_ASSOCIATION on channel 1: hn_chan_callback"):
        async with plugged(vps=2) as (_adapter, nic):
            nic.notify(VF, relid=10)
            await settle()


async def test_a_notice_wants_no_completion():
    with pytest.raises(GuestPanic, match="SEND_VF_ASSOCIATION wants a completion"):
        async with plugged() as (_adapter, nic):
            nic.notify(VF, flags=1)
            await settle()


@pytest.mark.parametrize(
    ("personality", "message", "reason"),
    [
        (UEFI, VF, "NetvscReceiveCallback asserts that there are ranges"),
        (UEFI, table(), "NetvscReceiveCallback asserts that there are ranges"),
        (OPENBSD, VF, "it logs an error"),
        (NETBSD, VF, "it logs an error"),
        (ILLUMOS, VF, "it logs an error"),
        (FREEBSD, VF, "has not said that it knows SR-IOV"),
    ],
    ids=str,
)
async def test_who_does_not_know_a_notice(personality, message, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(personality) as (_adapter, nic):
            nic.notify(message)
            await trio.sleep_forever()


async def test_macos_looks_at_none():
    async with plugged(MACOS) as (adapter, nic):
        await adapter.up()
        nic.notify(VF)
        nic.notify(bytes(40))
        nic.frame(bytes(60))
        await adapter.receive()
        assert adapter.events.log == []


@pytest.mark.parametrize(
    ("versions", "message"),
    [({nvsp.VERSION_2}, VF), ({nvsp.VERSION_4}, table((0,) * 16))],
)
async def test_a_notice_of_a_later_version(versions, message):
    def prepare(nic):
        nic.versions = versions

    with pytest.raises(GuestPanic, match="in version"):
        async with plugged(LINUX_6_1, prepare=prepare) as (_adapter, nic):
            nic.notify(message)
            await settle()


async def test_a_new_life_knows_no_old_events():
    async with plugged(LINUX_NEW) as (adapter, nic):
        nic.notify(VF)
        nic.indicate(rndis.STATUS_MEDIA_DISCONNECT)
        await adapter.events.wait_told(2)
        await adapter.reopen()
        assert adapter.events.log == []
        assert adapter.link

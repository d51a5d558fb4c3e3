"""The receive buffer: which packets a driver takes, what it makes of them, when it is done."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from netvsp.guest import Counters, GuestFrame, receiving
from netvsp.guest.habits import HABITS
from netvsp.guest.receiving import Receiver
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.fake_nic_host import SUB_ALLOCATION, frame_message, plugged
from tests.support.patience import until
from vmbus.guest import (
    DPDK,
    FREEBSD,
    LINUX_5_10,
    LINUX_6_1,
    MACOS,
    OPENBSD,
    UEFI,
    GuestPanic,
    Incoming,
)
from vmbus.wire.packets import TRANSFER_PAGES

FRAME = bytes(range(60))
SECTIONS = 64
settle = trio.testing.wait_all_tasks_blocked


@pytest.mark.parametrize(
    "personality", [LINUX_6_1, LINUX_5_10, FREEBSD, OPENBSD, DPDK, MACOS, UEFI], ids=str
)
async def test_frames_come_and_are_completed(personality):
    async with plugged(personality) as (adapter, nic):
        await adapter.up()
        packets = adapter.counters.packets
        for number in range(150):
            nic.frame(FRAME + bytes([number]))
            frame = await adapter.receive()
            assert frame == GuestFrame(data=FRAME + bytes([number]), channel=0)
            await settle()
        await until(lambda: len(nic.completions) == packets + 150)
        status = struct.pack("<II", nvsp.SEND_RNDIS_PACKET_COMPLETE, nvsp.SUCCESS)
        size = -(-adapter.habits.completion_size // 8) * 8
        assert {each[2] for each in nic.completions} == {status.ljust(size, b"\0")}
        assert len({each[1] for each in nic.completions}) > 32
        assert adapter.receiver.outstanding == 0
        assert adapter.counters.received == 150
        assert adapter.counters.received_bytes == 61 * 150


@pytest.mark.parametrize("personality", [LINUX_6_1, FREEBSD, UEFI], ids=str)
async def test_the_oldest_frames_are_dropped_if_nobody_takes_any(personality, monkeypatch):
    monkeypatch.setattr(receiving, "BACKLOG", 5)
    async with plugged(personality) as (adapter, nic):
        await adapter.up()
        for number in range(12):
            nic.frame(FRAME + bytes([number]))
            await settle()
        for number in range(7, 12):
            assert (await adapter.receive()).data[-1] == number
        await settle()
        assert adapter.counters.dropped == 7
        assert adapter.receiver.outstanding == 0


async def test_what_is_said_of_a_frame_is_kept():
    tag = ppi.Vlan(0x123, 5, canonical=False)
    items = (
        ppi.build_item(ppi.CHECKSUM, ppi.RX_TCP_SUCCEEDED | ppi.RX_IP_SUCCEEDED)
        + ppi.build_item(ppi.VLAN, ppi.pack_vlan(tag))
        + ppi.build_item(ppi.HASH_VALUE, 0xDEADBEEF)
    )
    async with plugged() as (adapter, nic):
        await adapter.up()
        nic.frame(FRAME, items)
        assert await adapter.receive() == GuestFrame(
            data=FRAME,
            channel=0,
            vlan=tag,
            checksum=ppi.RX_TCP_SUCCEEDED | ppi.RX_IP_SUCCEEDED,
            hash_value=0xDEADBEEF,
        )


async def test_one_packet_may_have_many_frames():
    async with plugged() as (adapter, nic):
        await adapter.up()
        before = adapter.counters.packets
        nic.deliver([frame_message(FRAME + bytes([number])) for number in range(40)])
        for number in range(40):
            assert (await adapter.receive()).data == FRAME + bytes([number])
        assert adapter.counters.packets == before + 1


async def test_a_long_frame_may_lie_in_several_sub_allocations_of_those_who_do_not_copy():
    async with plugged(FREEBSD, mtu=9000) as (adapter, nic):
        await adapter.up()
        nic.frame(bytes(9014))
        assert (await adapter.receive()).data == bytes(9014)
    with pytest.raises(GuestPanic, match="9058 bytes, a sub-allocation has 2048: netvsc_receive"):
        async with plugged(mtu=9000) as (adapter, nic):
            await adapter.up()
            nic.frame(bytes(9014))
            await settle()


async def test_the_longest_packet_that_linux_has_room_for():
    """NVSP_RSC_MAX ranges."""

    def prepare(nic):
        nic.sub_allocation = 256

    def ranges(count):
        return {"offsets": [256 * each for each in range(count)]}

    async with plugged(prepare=prepare, receive_size=64 * 4096) as (adapter, nic):
        await adapter.up()
        await settle()
        nic.deliver([frame_message(FRAME)] * 562, **ranges(562))
        await settle()
        assert len(adapter.received) == 562
    with pytest.raises(GuestPanic):
        async with plugged(prepare=prepare, receive_size=64 * 4096) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.deliver([frame_message(FRAME)] * 563, **ranges(563))
            await settle()


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("personality", "options", "reason"),
    [
        (LINUX_6_1, {"payload": bytes(40)}, "NVSP 0 in a transfer-page packet"),
        (
            LINUX_6_1,
            {"payload": nvsp.build_init(1, 1)},
            "NVSP INIT in a transfer-page packet: netvsc_receive",
        ),
        (LINUX_6_1, {"payload": b""}, "type|bytes"),
        (LINUX_6_1, {"payload": struct.pack("<Q", nvsp.SEND_RNDIS_PACKET)}, "."),
        (LINUX_6_1, {"set_id": 1}, "set id 0x1 is not 0xcafe"),
        (FREEBSD, {"set_id": 0x2409}, "set id 0x2409 is not 0xcafe"),
        (LINUX_6_1, {"flags": 0}, "no completion wanted"),
        (DPDK, {"tid": SECTIONS}, "id 0x40 with 64 sub-allocations: hn_nvs_handle_rxbuf"),
        (LINUX_6_1, {"lengths": [0]}, "0 bytes at .* are in no sub-allocation"),
        (FREEBSD, {"offsets": [63 * SUB_ALLOCATION], "lengths": [2049]}, "in no sub-allocation"),
        (LINUX_6_1, {"offsets": [0], "lengths": [2049]}, "2049 bytes, a sub-allocation has 2048"),
        (LINUX_6_1, {"lengths": [11]}, "a range of 11 bytes"),
        (LINUX_6_1, {"lengths": [44]}, "msg_len 104 in a range of 44 bytes"),
    ],
    ids=str,
)
async def test_a_packet_with_a_wrong_header(personality, options, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(personality) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.frame(FRAME, **options)
            await adapter.receive()


async def test_ids_may_be_anything_where_they_are_no_indexes():
    async with plugged() as (adapter, nic):
        await adapter.up()
        nic.frame(FRAME, tid=(1 << 64) - 1)
        await adapter.receive()
        await settle()
        assert nic.completions[-1][:2] == (1, (1 << 64) - 1)
    async with plugged(DPDK) as (adapter, nic):
        await adapter.up()
        nic.frame(FRAME, tid=SECTIONS - 1)
        await adapter.receive()


async def test_the_set_id_is_not_looked_at_by_all():
    async with plugged(OPENBSD) as (adapter, nic):
        await adapter.up()
        nic.frame(FRAME, set_id=77)
        assert (await adapter.receive()).data == FRAME


@pytest.mark.parametrize("ranges", [0, 1])
async def test_the_header_of_uefi_is_as_long_as_its_ranges(ranges):
    """8 bytes more, between ranges and payload."""
    with pytest.raises(GuestPanic, match=f"{ranges} ranges in a header of .* FAIL_FAST"):
        async with plugged(UEFI) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.store(0, frame_message(FRAME))
            header = struct.pack("<HBBI", nic.receive_id, 0, 0, ranges)
            header += struct.pack("<II", 104, 0)[: 8 * ranges] + bytes(8)
            payload = nvsp.build_rndis_packet(0)
            begin = (16 + len(header)) // 8
            whole = begin + len(payload) // 8
            descriptor = struct.pack("<HHHHQ", 7, begin, whole, 1, 3)
            nic.host.channels[1].write(descriptor + header + payload)
            await settle()


async def test_two_ranges_may_not_have_bytes_in_common():
    with pytest.raises(GuestPanic, match="two ranges have bytes from 150 on"):
        async with plugged() as (adapter, nic):
            await adapter.up()
            await settle()
            message = frame_message(FRAME)
            nic.deliver([message, message], offsets=[150, 100], tid=9)
            await settle()


async def test_two_messages_of_one_packet_may_share_a_sub_allocation():
    async with plugged() as (adapter, nic):
        await adapter.up()
        message = frame_message(FRAME)
        nic.deliver([message, message], offsets=[200, 0], tid=9)
        assert await adapter.receive() == await adapter.receive()
        await settle()
        assert adapter.receiver.outstanding == 0


async def test_a_sub_allocation_is_not_used_again_before_it_is_given_back():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await settle()
        nic.frame(FRAME, offsets=[3 * SUB_ALLOCATION])
        await settle()
        nic.frame(FRAME, offsets=[3 * SUB_ALLOCATION])
        await settle()
        assert adapter.counters.received == 2
    with pytest.raises(GuestPanic, match="sub-allocation 3 is used again before packet 0x33 of"):
        async with plugged() as (adapter, nic):
            await adapter.up()
            await settle()
            adapter.receiver.hold()
            nic.frame(FRAME, offsets=[3 * SUB_ALLOCATION], tid=0x33)
            nic.frame(FRAME, offsets=[3 * SUB_ALLOCATION + 1000], tid=0x34)
            await settle()


async def test_an_id_is_not_used_again_before_it_is_completed():
    with pytest.raises(GuestPanic, match="transaction id 0x5 on channel 0 is not completed yet"):
        async with plugged() as (adapter, nic):
            await adapter.up()
            await settle()
            adapter.receiver.hold()
            nic.frame(FRAME, tid=5)
            nic.frame(FRAME, tid=5)
            await settle()


async def test_other_channels_have_ids_of_their_own():
    async with plugged(vps=2) as (adapter, nic):
        await adapter.up()
        await settle()
        adapter.receiver.hold()
        nic.frame(FRAME, tid=5)
        nic.frame(FRAME, tid=5, relid=10)
        assert {(await adapter.receive()).channel for _ in range(2)} == {0, 1}
        assert adapter.receiver.held == [(0, 5), (1, 5)]
        nic.completions.clear()
        adapter.receiver.release()
        await settle()
        assert [each[:2] for each in nic.completions] == [(1, 5), (10, 5)]


async def test_a_packet_without_a_receive_buffer():
    def panic(text):
        raise GuestPanic("Linux", text)

    receiver = Receiver(HABITS["linux-6.1"], panic, Counters(), {}, lambda message, channel: None)
    with pytest.raises(GuestPanic, match="without a receive buffer"):
        receiver.packet(0, Incoming(TRANSFER_PAGES, 0, 0, 16, bytes(16)))


async def test_a_packet_of_an_unknown_kind():
    with pytest.raises(GuestPanic, match="a packet of type 9: netvsc_process_raw_pkt"):
        async with plugged() as (_adapter, nic):
            nic.host.channels[1].send(9, bytes(16))
            await settle()


async def test_no_frame_comes_before_the_filter_is_set():
    with pytest.raises(GuestPanic, match="a frame before the packet filter was set"):
        async with plugged() as (_adapter, nic):
            nic.frame(FRAME)
            await settle()


async def test_frames_that_are_late_are_dropped_and_completed():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await adapter.down()
        await settle()
        nic.completions.clear()
        nic.frame(FRAME, tid=7)
        await settle()
        assert adapter.counters.late == 1
        assert adapter.counters.received == 0
        assert [each[1] for each in nic.completions] == [7]
        await adapter.up()
        nic.frame(FRAME)
        await adapter.receive()


async def test_a_channel_has_frames_if_the_table_names_it():
    async with plugged(vps=3) as (adapter, nic):
        await adapter.up()
        for number, relid in enumerate((1, 10, 11)):
            nic.frame(FRAME, relid=relid)
            assert (await adapter.receive()).channel == number
    with pytest.raises(GuestPanic, match="a frame on channel 2, which receive-side scaling"):
        async with plugged(vps=3, only={1, 2}) as (adapter, nic):
            adapter.receiver.allowed = frozenset({0, 1})
            await adapter.up()
            await settle()
            nic.frame(FRAME, relid=11)
            await settle()


async def test_a_new_table_allows_more_channels():
    async with plugged(vps=2) as (adapter, nic):
        table = (0,) * 128
        adapter.receiver.allowed = frozenset({0})
        await adapter.set_scaling(table)
        assert adapter.receiver.allowed == {0}
        await adapter.set_scaling((0, 1) * 64)
        assert adapter.receiver.allowed == {0, 1}
        off, on = [data for oid, data in nic.sets if oid == oids.GEN_RECEIVE_SCALE_PARAMETERS][-2:]
        assert ndis.parse_rss_parameters_untrusted(off).flags == ndis.RSS_DISABLE
        assert ndis.parse_rss_parameters_untrusted(on).table == (0, 1) * 64


@pytest.mark.parametrize(
    ("personality", "frame", "items", "reason"),
    [
        (LINUX_6_1, bytes(13), b"", "a frame of 13 bytes: hn_rndis_rx_data drops it"),
        (LINUX_6_1, bytes(1519), b"", "a frame of 1519 bytes, the driver has announced 1518"),
        (LINUX_6_1, b"", b"", "an empty frame: processIncoming panics"),
        (MACOS, FRAME, ppi.build_item(ppi.VLAN, 0x10), "a tag beside the frame"),
        (LINUX_6_1, FRAME, bytes(12), "an item of 0 bytes where 12 are left"),
    ],
    ids=str,
)
async def test_a_wrong_frame(personality, frame, items, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(personality) as (adapter, nic):
            await adapter.up()
            await settle()
            nic.frame(frame, items)
            await settle()


async def test_a_tag_may_be_within_the_frame():
    async with plugged() as (adapter, nic):
        await adapter.up()
        nic.frame(bytes(1518))
        assert len((await adapter.receive()).data) == 1518


async def test_a_new_mtu_allows_longer_frames():
    async with plugged(mtu=1900) as (adapter, nic):
        await adapter.up()
        nic.frame(bytes(1918))
        assert len((await adapter.receive()).data) == 1918


# -- completing ------------------------------------------------------------------------------------


async def test_completions_are_held_and_released_in_any_order():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await settle()
        nic.completions.clear()
        adapter.receiver.hold()
        for number in range(5):
            nic.frame(FRAME, tid=100 + number)
        await settle()
        assert len(adapter.received) == 5
        assert nic.completions == []
        assert adapter.receiver.outstanding == 5
        adapter.receiver.release(3, 0)
        await settle()
        assert [each[1] for each in nic.completions] == [103, 100]
        assert [each[1] for each in adapter.receiver.held] == [101, 102, 104]
        nic.frame(FRAME, tid=200)
        await settle()
        adapter.receiver.release()
        await settle()
        assert [each[1] for each in nic.completions] == [103, 100, 101, 102, 104, 200]
        assert adapter.receiver.outstanding == 0
        nic.frame(FRAME, tid=201)
        await settle()
        assert nic.completions[-1][1] == 201


async def test_uefi_completes_a_frame_when_it_takes_it():
    async with plugged(UEFI) as (adapter, nic):
        await adapter.up()
        await settle()
        nic.completions.clear()
        nic.frame(FRAME, tid=1)
        nic.indicate(rndis.STATUS_MEDIA_CONNECT, tid=2)
        await settle()
        assert [each[1] for each in nic.completions] == [2]
        await adapter.receive()
        await settle()
        assert [each[1] for each in nic.completions] == [2, 1]
        assert adapter.counters.completed == adapter.counters.packets


async def test_completions_wait_for_room_in_the_ring():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await settle()
        nic.completions.clear()
        channel = nic.host.channels[1]
        channel.serving = False
        rounds = 0
        while adapter.receiver.outstanding < 20:
            nic.frame(FRAME)
            await settle()
            rounds += 1
        assert adapter.counters.received == rounds
        channel.serving = True
        channel.drain()
        await until(lambda: len(nic.completions) == rounds)
        assert adapter.receiver.outstanding == 0


async def test_who_waits_for_a_frame_is_told_of_the_end():
    async with plugged() as (adapter, nic):
        await adapter.up()
        nic.frame(FRAME)
        await settle()
        await adapter.close()
        assert (await adapter.receive()).data == FRAME
        with pytest.raises(trio.ClosedResourceError):
            await adapter.receive()

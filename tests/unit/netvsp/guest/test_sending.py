"""Sending: where a frame lies, what is said of it, which channel it takes, when it is done."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import trio
import trio.testing

from netvsp.guest.frames import ones_sum
from netvsp.guest.habits import HABITS, Form
from netvsp.wire import ndis, nvsp, ppi, rndis
from tests.support.fake_host import PAGE
from tests.support.fake_nic_host import SECTION, plugged
from tests.support.patience import until, waits
from vmbus.guest import (
    DPDK,
    FREEBSD,
    LINUX_5_10,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    NETBSD,
    OPENBSD,
    UEFI,
    GuestPanic,
)
from vmbus.wire.packets import parse_descriptor_untrusted, parse_gpa_ranges_untrusted

settle = trio.testing.wait_all_tasks_blocked
FRAME = bytes(range(100))


def ipv4(payload: int = 40, *, protocol: int = 6, source: int = 1) -> bytes:
    """A frame with TCP or UDP."""
    transport = struct.pack(">HHIIBBHHH", 1000, 80, 1, 2, 5 << 4, 0x10, 512, 0xAAAA, 0)
    if protocol == 17:
        transport = struct.pack(">HHHH", 53, 53, 8 + payload, 0xAAAA)
    length = 20 + len(transport) + payload
    header = struct.pack(
        ">BBHHHBBHII", 0x45, 0, length, 7, 0, 64, protocol, 0xBBBB, 0x0A000000 + source, 0x0A000002
    )
    return bytes(12) + b"\x08\x00" + header + transport + bytes(payload)


def ipv6(payload: int = 40) -> bytes:
    transport = struct.pack(">HHIIBBHHH", 1000, 80, 1, 2, 5 << 4, 0x10, 512, 0xAAAA, 0)
    addresses = bytes(range(32))
    header = struct.pack(">IHBB", 6 << 28, len(transport) + payload, 6, 64) + addresses
    return bytes(12) + b"\x86\xdd" + header + transport + bytes(payload)


def ranges_of(packet: bytes) -> list[tuple[int, int]]:
    """Offset and bytes of the ranges of a packet, none if it is in band."""
    kind, offset, *_rest = parse_descriptor_untrusted(packet)
    if kind == 6:
        return []
    found = parse_gpa_ranges_untrusted(packet, offset, max_ranges=64, allow_empty=True)
    return [(each.byte_offset, each.byte_count) for each in found]


def items_of(sent) -> dict[int, int]:
    return ppi.parse_items_untrusted(sent.items)


def about(packet: bytes) -> nvsp.RndisPacket:
    _kind, offset, length, *_rest = parse_descriptor_untrusted(packet)
    return nvsp.parse_rndis_packet_untrusted(packet[offset:length])


# -- where a frame lies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("personality", "copied"),
    [
        (LINUX_6_1, {100, 600, 3000}),
        (LINUX_5_10, {100, 600, 3000}),
        (FREEBSD, {100, 600, 3000}),
        (OPENBSD, set()),
        (DPDK, {100}),
        (MACOS, {100, 600, 3000}),
        (UEFI, {100, 600, 3000}),
    ],
    ids=str,
)
async def test_short_frames_are_copied_into_the_send_buffer(personality, copied):
    async with plugged(personality, mtu=9000) as (adapter, nic):
        always = adapter.habits.form is Form.NONE
        # A little less than a section is copied, with the alignment.
        for size in (100, 600, 3000) if always else (100, 600, 3000, 6095, 6200):
            assert await adapter.send(bytes([size % 251]) * size) == nvsp.SUCCESS
            assert nic.sent[-1].frame == bytes([size % 251]) * size
            in_section = about(nic.packets[-1]).section_index != nvsp.NO_SECTION
            assert in_section == (not ranges_of(nic.packets[-1]))
            assert in_section == (size in copied)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("personality", [LINUX_6_1, LINUX_5_10, FREEBSD, DPDK], ids=str)
async def test_a_test_may_say_where_a_frame_lies(personality, copy):
    async with plugged(personality, contiguous=False) as (adapter, nic):
        assert await adapter.send(FRAME, copy=copy) == nvsp.SUCCESS
        assert nic.sent[-1].frame == FRAME
        assert bool(ranges_of(nic.packets[-1])) != copy


@pytest.mark.parametrize(
    ("personality", "size", "expected"),
    [
        # A range of pages, from the head room of a socket buffer on.
        (LINUX_6_1, 1500, [(320, 44), (66, 1500)]),
        (LINUX_6_1, 9014, [(320, 44), (66, 66), (132, 8948)]),
        (LINUX_NEW, 65000, [(320, 44), (66, 66), (132, 32768), (132, 32166)]),
        (LINUX_5_10, 1500, [(320, 44), (66, 1500)]),
        (LINUX_5_10, 9014, [(320, 44), (66, 4030), (0, 4096), (0, 888)]),
        (FREEBSD, 9014, [(320, 44), (66, 4030), (0, 4096), (0, 888)]),
        (OPENBSD, 1500, [(320, 44), (66, 1500)]),
    ],
    ids=str,
)
async def test_the_ranges_of_a_frame(personality, size, expected):
    frame = bytes(index * 7 & 0xFF for index in range(size))
    for contiguous in (True, False):
        async with plugged(personality, contiguous=contiguous) as (adapter, nic):
            copy = None if personality is OPENBSD else False
            assert await adapter.send(frame, copy=copy) == nvsp.SUCCESS
            found = ranges_of(nic.packets[-1])
            items = found[0][1] - 44
            assert [(320, 44 + items), *expected[1:]] == found
            assert nic.sent[-1].frame == frame


async def test_pieces_may_be_empty_and_many():
    async with plugged(LINUX_NEW) as (adapter, nic):
        pieces = [0, 50, 0, 0, 50] + [0] * 26
        assert await adapter.send(FRAME, pieces=pieces) == nvsp.SUCCESS
        assert [size for _offset, size in ranges_of(nic.packets[-1])][1:] == pieces
        assert nic.sent[-1].frame == FRAME
        with pytest.raises(ValueError, match="33 ranges, the driver has 32 at most"):
            await adapter.send(FRAME, pieces=[*pieces, 0])
        with pytest.raises(ValueError, match="pieces of 99 bytes for a frame of 100"):
            await adapter.send(FRAME, pieces=[99])
        with pytest.raises(ValueError, match="pieces of 100"):
            await adapter.send(FRAME, pieces=[100], copy=True)


async def test_a_frame_has_no_more_ranges_than_its_driver():
    async with plugged(LINUX_5_10) as (adapter, _nic):
        with pytest.raises(ValueError, match="32 at most"):
            await adapter.send(bytes(140_000), copy=False)
    async with plugged(OPENBSD) as (adapter, _nic):
        with pytest.raises(ValueError, match="17 ranges, the driver has 16 at most"):
            await adapter.send(bytes(65000))
        free = adapter.guest.ram.free_pages
        for _ in range(5):
            with pytest.raises(ValueError, match="17 ranges"):
                await adapter.send(bytes(65000))
        assert adapter.guest.ram.free_pages == free


async def test_what_does_not_fit_into_a_section():
    async with plugged(MACOS) as (adapter, _nic):
        with pytest.raises(ValueError, match="does not fit into a section of 6144"):
            await adapter.send(bytes(SECTION))
    async with plugged() as (adapter, _nic):
        with pytest.raises(ValueError, match="does not fit into a section of 6144"):
            await adapter.send(bytes(SECTION), copy=True)
    async with plugged(UEFI, prepare=lambda nic: setattr(nic, "section_size", 512)) as (adapter, _):
        with pytest.raises(ValueError, match="a message of 1028 bytes fits into no section"):
            await adapter.set(1, bytes(1000))


async def test_without_a_free_section_linux_does_not_copy():
    async with plugged() as (adapter, nic):
        nic.holding = True
        async with trio.open_nursery() as nursery:
            for _ in range(9):
                nursery.start_soon(adapter.send, FRAME)
            await settle()
            sections = [about(packet).section_index for packet in nic.packets]
            assert sections == [*range(8), nvsp.NO_SECTION]
            nic.release()
        assert await adapter.send(FRAME) == nvsp.SUCCESS
        assert about(nic.packets[-1]).section_index == 0


@pytest.mark.parametrize("personality", [MACOS, UEFI], ids=str)
async def test_who_copies_all_waits_for_a_free_section(personality):
    async with plugged(personality) as (adapter, nic):
        count = 12 * PAGE // SECTION
        nic.holding = True
        async with trio.open_nursery() as nursery:
            for _ in range(count + 1):
                nursery.start_soon(adapter.send, FRAME)
            await settle()
            assert len(nic.packets) == count
            nic.release()
        assert len(nic.packets) == count + 1


@pytest.mark.parametrize("copy", [True, False])
async def test_memory_of_a_frame_is_in_use_until_it_is_completed(copy):
    """Also if nobody waits for the completion any more."""
    async with plugged() as (adapter, nic):
        nic.holding = True
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: adapter.send(FRAME, copy=copy))
                await settle()
                scope.cancel()
        assert await waits(lambda: adapter.send(FRAME, copy=copy))
        first, second = nic.packets
        if copy:
            assert [about(each).section_index for each in (first, second)] == [0, 1]
        else:
            assert first[24:] != second[24:]
        nic.release()
        await settle()
        assert await adapter.send(FRAME, copy=copy) == nvsp.SUCCESS
        if copy:
            assert about(nic.packets[-1]).section_index in (0, 1)


# -- several in one section ------------------------------------------------------------------------


async def test_several_frames_go_into_one_section():
    frames = [bytes([number]) * (60 + number) for number in range(20)]
    async with plugged() as (adapter, nic):
        assert await adapter.send_many(frames) == [nvsp.SUCCESS] * 3
        assert [sent.frame for sent in nic.sent] == frames
        # max_packets 8, alignment 8: each but the last is as long as it takes.
        assert {len(sent.message) % 8 for sent in nic.sent[:7]} == {0}
        assert len(nic.sent[7].message) == 44 + 67
        assert adapter.counters.sent == 20
        assert adapter.counters.sent_bytes == sum(map(len, frames))
        assert await adapter.send_many([bytes(3000)] * 3) == [nvsp.SUCCESS] * 2
        with pytest.raises(ValueError, match="a message of 6188 bytes fits into no section"):
            await adapter.send_many([bytes(SECTION)])


async def test_the_last_frame_may_stay_where_it_is():
    frames = [bytes([number]) * 1000 for number in range(4)]
    async with plugged() as (adapter, nic):
        assert await adapter.send_many(frames, partial=True) == [nvsp.SUCCESS]
        assert [sent.frame for sent in nic.sent] == frames
        assert ranges_of(nic.packets[-1]) == [(66, 1000)]
        assert about(nic.packets[-1]).section_size == 3 * 1048 + 44
        frames = [bytes(4000), bytes(4000), bytes(60)]
        assert await adapter.send_many(frames, partial=True) == [nvsp.SUCCESS] * 2
        assert [sent.frame for sent in nic.sent[4:]] == frames
        for _ in range(9):
            with pytest.raises(ValueError, match="the last header does not fit"):
                await adapter.send_many([bytes(6090), bytes(60)], partial=True)
        assert await adapter.send_many([], partial=True) == []


@pytest.mark.parametrize(
    ("personality", "partial"),
    [(OPENBSD, False), (MACOS, False), (UEFI, False), (FREEBSD, True), (DPDK, True)],
    ids=str,
)
async def test_not_every_driver_does_that(personality, partial):
    async with plugged(personality) as (adapter, _nic):
        with pytest.raises(ValueError, match="this driver does not do that"):
            await adapter.send_many([FRAME, FRAME], partial=partial)


# -- what is said of a frame -----------------------------------------------------------------------


async def test_a_tag_a_hash_a_checksum():
    async with plugged(vps=2) as (adapter, nic):
        frame = ipv4()
        tag = ppi.Vlan(5, 2, canonical=True)
        await adapter.send(frame, vlan=tag, checksum=True, hash_value=0x12345678)
        (sent,) = nic.sent
        items = items_of(sent)
        assert list(items) == [ppi.HASH_VALUE, ppi.VLAN, ppi.CHECKSUM]
        assert items[ppi.HASH_VALUE] == 0x12345678
        assert ppi.unpack_vlan(items[ppi.VLAN]) == tag
        assert items[ppi.CHECKSUM] == ppi.TX_IPV4 | ppi.TX_TCP | 34 << 16
        # Linux leaves the sum of the IPv4 header as it is, and a pseudo-header's sum for TCP.
        assert sent.frame[:50] + sent.frame[52:] == frame[:50] + frame[52:]
        pseudo = frame[26:34] + struct.pack(">HH", 6, 60)
        assert sent.frame[50:52] == struct.pack(">H", ones_sum(pseudo))


@pytest.mark.parametrize(
    ("personality", "frame", "word"),
    [
        (LINUX_6_1, ipv4(protocol=17), ppi.TX_IPV4 | ppi.TX_UDP | 34 << 16),
        (LINUX_6_1, ipv6(), ppi.TX_IPV6 | ppi.TX_TCP | 54 << 16),
        (FREEBSD, ipv4(), ppi.TX_IPV4 | ppi.TX_TCP | ppi.TX_IP_HEADER | 34 << 16),
        (FREEBSD, ipv6(), ppi.TX_IPV6 | ppi.TX_TCP | 54 << 16),
        # hvn_encap: IPv4, whatever it is, and no offset
        (OPENBSD, ipv4(protocol=17), ppi.TX_IPV4 | ppi.TX_UDP | ppi.TX_IP_HEADER),
        (OPENBSD, ipv6(), ppi.TX_IPV4 | ppi.TX_TCP),
    ],
    ids=str,
)
async def test_each_driver_asks_for_checksums_in_its_way(personality, frame, word):
    async with plugged(personality) as (adapter, nic):
        await adapter.send(frame, checksum=True)
        assert items_of(nic.sent[0])[ppi.CHECKSUM] == word
        at_header = nic.sent[0].frame[24:26]
        left_out = word & ppi.TX_IP_HEADER
        assert at_header == (bytes(2) if left_out else frame[24:26])


@pytest.mark.parametrize("frame", [ipv4(60000), ipv6(60000)], ids=["IPv4", "IPv6"])
async def test_a_large_frame_is_left_to_the_device_to_cut(frame):
    async with plugged(LINUX_NEW) as (adapter, nic):
        await adapter.send(frame, segment=1460)
        (sent,) = nic.sent
        large = ppi.unpack_large_send(items_of(sent)[ppi.LARGE_SEND])
        assert large == ppi.LargeSend(1460, len(frame) - 60020, frame[12] == 0x86)
        assert len(sent.frame) == len(frame)
        # No length and no sum, and TCP's is that of the pseudo-header without the length.
        if large.ipv6:
            assert sent.frame[18:20] == bytes(2)
            pseudo = frame[22:54] + struct.pack(">HH", 6, 0)
        else:
            assert sent.frame[16:18] == sent.frame[24:26] == bytes(2)
            pseudo = frame[26:34] + struct.pack(">HH", 6, 0)
        start = len(frame) - 60020 + 16
        assert sent.frame[start : start + 2] == struct.pack(">H", ones_sum(pseudo))


@pytest.mark.parametrize(
    ("options", "frame", "reason"),
    [
        ({"checksum": True}, ipv4(), "not been asked to fill in such sums"),
        ({"checksum": True}, ipv6(), "not been asked to fill in such sums"),
        ({"segment": 1000}, ipv4(3000), "not been asked to cut segments"),
        ({"segment": 1000}, ipv6(3000), "not been asked to cut segments"),
        ({"checksum": True}, FRAME, "neither TCP nor UDP"),
        ({"segment": 1000}, ipv4(protocol=17), "only TCP"),
        ({}, bytes(13), "at least 14 bytes"),
    ],
)
async def test_what_was_not_asked_for_is_not_used(options, frame, reason):
    def prepare(nic):
        nic.capabilities = ndis.OffloadCapabilities()

    async with plugged(prepare=prepare) as (adapter, nic):
        with pytest.raises(ValueError, match=reason):
            await adapter.send(frame, **options)
        assert nic.sent == []


@pytest.mark.parametrize(
    ("personality", "vps", "items"),
    [
        (LINUX_6_1, 1, []),
        (LINUX_6_1, 2, [ppi.HASH_VALUE]),
        (FREEBSD, 2, [ppi.HASH_VALUE]),
        (DPDK, 2, [ppi.HASH_VALUE]),
        (OPENBSD, 1, []),
        (UEFI, 1, []),
    ],
    ids=str,
)
async def test_some_drivers_say_what_the_hash_is(personality, vps, items):
    async with plugged(personality, vps=vps) as (adapter, nic):
        for source in range(8):
            await adapter.send(ipv4(source=source))
        said = [items_of(sent) for sent in nic.sent if sent.items]
        assert {tuple(each) for each in said} == ({tuple(items)} if items else set())
        if personality is FREEBSD:
            # It says what it has picked.
            assert {each[ppi.HASH_VALUE] for each in said} <= {0, 1}


async def test_uefi_has_a_type_and_a_gap_of_its_own():
    async with plugged(UEFI) as (adapter, nic):
        await adapter.send(FRAME)
        assert about(nic.packets[0]).channel_type == 2
        _type, length, data, size, *_rest = rndis.PACKET_HEADER.unpack_from(nic.sent[0].message)
        assert (length, data, size) == (152, 44, 100)
        assert nic.sent[0].frame == FRAME


@pytest.mark.parametrize(
    ("personality", "ids"),
    [
        (OPENBSD, [0, 1 << 32, 2 << 32]),
        (NETBSD, [0x1984 << 32, 0x1985 << 32, 0x1986 << 32]),
        (MACOS, [0xFA << 56, (0xFA << 56) + 1, (0xFA << 56) + 2]),
    ],
    ids=str,
)
async def test_frames_have_the_number_of_their_slot(personality, ids):
    async with plugged(personality) as (adapter, nic):
        nic.holding = True
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(adapter.send, FRAME)
            await until(lambda: len(nic.packets) == 3)
            assert [number for name, number in nic.ids if name == "frame"] == ids
            nic.release()
        nic.ids.clear()
        await adapter.send(FRAME)
        assert nic.ids[0][1] in ids


# -- channels --------------------------------------------------------------------------------------


async def test_a_flow_stays_on_its_channel():
    async with plugged(vps=4) as (adapter, nic):
        for _ in range(2):
            for source in range(32):
                await adapter.send(ipv4(source=source))
        relids = [sent.relid for sent in nic.sent]
        assert set(relids) == {1, 10, 11, 12}
        assert relids[:32] == relids[32:]


async def test_a_hash_or_a_channel_can_be_given():
    async with plugged(vps=4) as (adapter, nic):
        for number in range(4):
            await adapter.send(FRAME, channel=number)
            await adapter.send(FRAME, hash_value=16 + number)
        assert [sent.relid for sent in nic.sent] == [1, 1, 10, 10, 11, 11, 12, 12]
        await adapter.send_many([FRAME], channel=3)
        assert nic.sent[-1].relid == 12
        with pytest.raises(KeyError):
            await adapter.send(FRAME, channel=4)


# -- completed -------------------------------------------------------------------------------------


async def test_a_frame_that_the_device_did_not_send():
    async with plugged() as (adapter, nic):
        nic.data_status = nvsp.FAILURE
        assert await adapter.send(FRAME) == nvsp.FAILURE
        assert await adapter.send_many([FRAME, FRAME]) == [nvsp.FAILURE]
        assert (adapter.counters.failed, adapter.counters.sent) == (3, 0)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "a completion of 0 bytes where this answer was due"),
        (struct.pack("<II", nvsp.INIT_COMPLETE, 1), "NVSP: INIT_COMPLETE where SEND_RNDIS"),
    ],
)
async def test_a_completion_that_is_none(payload, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged() as (adapter, nic):
            nic.holding = True

            async def complete():
                await settle()
                ((channel, tid),) = nic.held
                channel.send(11, payload, tid)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(complete)
                await adapter.send(FRAME)


async def test_a_completion_that_nobody_waits_for():
    with pytest.raises(GuestPanic):
        async with plugged() as (adapter, nic):
            nic.holding = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adapter.send, FRAME)
                await settle()
                nic.held *= 2
                nic.release()
            await settle()


async def test_a_driver_without_a_send_buffer_needs_none():
    habits = dataclasses.replace(HABITS["linux-6.1"], send_size=0)
    async with plugged(habits=habits) as (adapter, nic):
        assert nic.send == []
        await adapter.send(FRAME)
        assert ranges_of(nic.packets[0])
        with pytest.raises(ValueError, match="does not fit into a section of 0"):
            await adapter.send(FRAME, copy=True)

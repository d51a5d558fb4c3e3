"""The rows of the acceptance checklist about vstor packets, over a channel without habits.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``.
"""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disks.ram import RamDisk
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    COMPLETE_IO,
    CREATE_SUB_CHANNELS,
    END_INITIALIZATION,
    ENUMERATE_BUS,
    EXECUTE_SRB,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    RESET_BUS,
    SUPPORTED_VERSIONS,
    build_packet,
    build_protocol_version,
    build_srb,
    build_sub_channels,
    parse_packet_untrusted,
    parse_properties_untrusted,
    parse_srb_reply_untrusted,
)
from tests.support.patience import PATIENCE
from tests.support.storage_line import INQUIRY, SUCCESS, TEST_UNIT_READY, Line, clear, line
from tests.support.worlds import controller, exercise, first_disk, read_10, world, write_10
from vmbus.errors import ConfigError
from vmbus.guest import LINUX_6_1, MACOS
from vmbus.testing import channel_pair, make_offer
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet as build_ring_packet

# --- Rows 11, 12, 26: sizes and ids -------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40, 48, 56, 64])
@pytest.mark.parametrize("ready", [False, True])
async def test_row_26_an_answer_has_as_many_bytes_as_its_request(ready, size):
    async with line(controller(), ready=ready) as wire:
        for operation in (BEGIN_INITIALIZATION, QUERY_PROPERTIES, EXECUTE_SRB, RESET_BUS, 99, 0):
            wire.send(build_packet(operation, size=64)[:size])
            (packet,) = await wire.replies()
            assert len(packet.payload) == size
            assert parse_packet_untrusted(packet.payload).operation == COMPLETE_IO


@pytest.mark.parametrize(("size", "answered"), [(0, 16), (8, 16), (12, 16), (52, 56), (200, 64)])
async def test_row_26_odd_sizes_are_those_of_the_ring(size, answered):
    """A ring packet has a multiple of 8 bytes, and an answer at least a header."""
    async with line(controller()) as wire:
        wire.send(bytes(size))
        (packet,) = await wire.replies()
        assert len(packet.payload) == answered
        assert parse_packet_untrusted(packet.payload).status != 0


@pytest.mark.parametrize("size", [48, 64])
async def test_row_26_commands_are_answered_in_their_own_size_however_they_end(size):
    commands = ((TEST_UNIT_READY, 0), (read_10(0, 1), 512), (read_10(1 << 30, 1), 512))
    async with line(controller()) as wire:
        for cdb, read in commands:
            for lun in (0, 1):  # where a disk is, and where nothing is
                reply = await wire.command(cdb, read=read, lun=lun, size=size)
                assert len(reply.raw) == size


@pytest.mark.parametrize(("version", "size"), [(0x200, 48), (0x402, 48), (0x501, 64), (0x602, 64)])
async def test_row_26_what_nobody_asked_for_has_the_size_of_the_version(version, size):
    store = controller()
    async with line(store, ready=False) as wire:
        await wire.handshake(version)
        store.add_disk(RamDisk(1 << 20))
        packets = await wire.replies()
        # Protocol 2.0 has no such operation.
        assert [len(packet.payload) for packet in packets] == [size] * (version >= 0x402)


async def test_row_11_whatever_is_answered_fits_the_smallest_buffer():
    async with line(controller()) as wire:
        sizes = set()
        for operation in range(16):
            wire.send(build_packet(operation, bytes(52)))
            sizes |= {len(packet.data) for packet in await wire.replies()}
        assert sizes == {80}


@pytest.mark.parametrize("identity", [0, 1, 0xFFFFFFFFFFFFFFFC, 0xFFFFFFFFFFFFFFFD, 2**64 - 1])
async def test_row_12_ids_are_echoed_bit_for_bit(identity):
    async with line(controller()) as wire:
        for payload in (
            build_packet(BEGIN_INITIALIZATION),
            build_srb(INQUIRY, data_in=2, transfer_length=0),
            bytes(8),
        ):
            wire.send(payload, identity=identity)
            assert [packet.transaction_id for packet in await wire.replies()] == [identity]
            wire.send(payload, identity=identity, wants=False)
            assert await wire.replies() == []


async def test_row_12_two_requests_of_one_id_have_two_answers():
    # fuzz scenario G33
    async with line(controller()) as wire:
        payload = build_srb(TEST_UNIT_READY, data_in=2, transfer_length=0)
        for _ in range(2):
            wire.send(payload, identity=7)
        assert [packet.transaction_id for packet in await wire.replies()] == [7, 7]


# --- Row 17 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7])
async def test_row_17_the_controller_offers_what_was_asked_for(count):
    async with world(controller(max_subchannels=7)) as there, there.boot(LINUX_6_1) as guest:
        adapter, disk = await first_disk(guest, sub_channels=count)
        await there.settle()
        subs = [o for o in guest.connection.offers.values() if o.subchannel_index]
        assert [each.subchannel_index for each in subs] == list(range(1, count + 1))
        assert len(adapter.channels) == 1 + count
        await exercise(adapter, disk, tasks=2)


@pytest.mark.parametrize("count", [8, 64, 0xFFFF])
async def test_row_17_more_than_were_promised_are_refused(count):
    async with line(controller(max_subchannels=7)) as wire:
        answer = await wire.control(CREATE_SUB_CHANNELS, build_sub_channels(count))
        assert answer.status != 0


# --- Row 25: versions ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 0x100, 0x201, 0x502, 0x601, 0x603, 0x700, 0xFFFF])
async def test_row_25_a_refused_version_has_the_status_that_uefi_knows(version):
    async with line(controller(), ready=False) as wire:
        await wire.control(BEGIN_INITIALIZATION)
        answer = await wire.control(QUERY_PROTOCOL_VERSION, build_protocol_version(version))
        assert answer.status == 0xC0000059
        answer = await wire.control(QUERY_PROTOCOL_VERSION, build_protocol_version(0x600))
        assert answer.status == 0


@pytest.mark.parametrize("version", sorted(SUPPORTED_VERSIONS))
async def test_row_25_an_accepted_version_is_echoed(version):
    async with line(controller(), ready=False) as wire:
        await wire.control(BEGIN_INITIALIZATION)
        answer = await wire.control(QUERY_PROTOCOL_VERSION, build_protocol_version(version))
        assert answer.status == 0
        assert struct.unpack_from("<H", answer.body)[0] == version


# --- Row 27: transfers --------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [64 << 10, 256 << 10, 2 << 20, 8 << 20])
async def test_row_27_the_largest_transfer_is_sane_and_is_taken(largest):
    store = controller(size=16 << 20, max_transfer_bytes=largest)
    async with line(store) as wire:
        answer = await wire.control(BEGIN_INITIALIZATION)
        answer = await wire.control(QUERY_PROTOCOL_VERSION, build_protocol_version(0x602))
        answer = await wire.control(QUERY_PROPERTIES)
        assert not any(answer.body[:4])
        properties = parse_properties_untrusted(answer.body)
        assert properties.max_transfer_bytes == largest
        await wire.control(END_INITIALIZATION)
        await clear(wire)
        data = bytes(range(256)) * (largest // 256)
        # One page more than the pages of the data, because it begins in the middle of one.
        reply = await wire.command(write_10(0, largest // 512), write=data, offset=512)
        assert (reply.srb_status, reply.transferred) == (SUCCESS, largest)
        reply = await wire.command(read_10(0, largest // 512), read=largest, offset=1536)
        assert reply.data == data


@pytest.mark.parametrize("largest", [0, 4096, 65535, (64 << 10) + 512, 256 << 20])
def test_row_27_a_largest_transfer_that_no_guest_likes_cannot_be_set(largest):
    with pytest.raises(ConfigError):
        ScsiController(max_transfer_bytes=largest)


# --- Row 40 -------------------------------------------------------------------------------------


async def test_row_40_commands_before_the_handshake_are_refused_and_harm_nothing():
    # fuzz scenario G29
    async with line(controller(), ready=False) as wire:
        wire.start(read_10(0, 1), read=512)
        (packet,) = await wire.replies()
        answer = parse_packet_untrusted(packet.payload)
        assert answer.status != 0
        for operation in (QUERY_PROPERTIES, END_INITIALIZATION, QUERY_PROTOCOL_VERSION):
            assert (await wire.control(operation)).status != 0
        for operation in (0, COMPLETE_IO, ENUMERATE_BUS, 13, 14, 15, 0xFFFFFFFF):
            assert (await wire.control(operation)).status != 0
        await wire.handshake()
        await wire.handshake(0x501)
        assert (await wire.command(INQUIRY, read=36)).srb_status == SUCCESS


@pytest.mark.parametrize(
    "lie",
    [
        {"cdb_length": 0},
        {"cdb_length": 17},
        {"cdb_length": 255},
        {"data_in": 3},
        {"data_in": 255},
        {"transfer_length": 4096},
        {"transfer_length": 0xFFFFFFFF},
    ],
    ids=str,
)
async def test_row_40_srbs_that_lie_are_refused(lie):
    # fuzz scenario G30
    async with line(controller()) as wire:
        await clear(wire)
        raw = bytearray(build_srb(read_10(0, 1), data_in=1, transfer_length=512))
        offsets = {"cdb_length": (20, "B"), "data_in": (22, "B"), "transfer_length": (24, "<I")}
        for name, value in lie.items():
            struct.pack_into(offsets[name][1], raw, offsets[name][0], value)
        header = RANGES_HEADER.pack(0, 1) + build_range(512, 0, [wire.guest.free_pfn])
        identity = wire.send(bytes(raw), kind=GPA_DIRECT, header=header)
        (packet,) = await wire.replies()
        assert packet.transaction_id == identity
        srb = parse_srb_reply_untrusted(packet.payload)
        assert srb.srb_status == 0x06
        assert srb.transfer_length == 0


@pytest.mark.parametrize(
    ("count", "ranges"),
    [
        (0, b""),
        (2, build_range(512, 0, [1])),
        (0xFFFFFFFF, build_range(512, 0, [1])),
        (1, struct.pack("<IIQ", 512, 4096, 1)),
        (1, struct.pack("<IIQ", 0xFFFFFFFF, 0, 1)),
        (1, struct.pack("<IIQ", 512, 0, 1 << 52)),
        (1, struct.pack("<IIQ", 512, 0, 0xFFFFFFFF)),
        (1, struct.pack("<IIQ", 0, 0, 1)),
        (1, struct.pack("<II", 512, 0)),
    ],
    ids=str,
)
async def test_row_40_ranges_that_lie_are_refused(count, ranges):
    # fuzz scenario G14
    async with line(controller()) as wire:
        await clear(wire)
        payload = build_srb(read_10(0, 1), data_in=1, transfer_length=512)
        wire.send(payload, kind=GPA_DIRECT, header=RANGES_HEADER.pack(0, count) + ranges)
        (packet,) = await wire.replies()
        assert parse_srb_reply_untrusted(packet.payload).srb_status == 0x06


async def test_row_40_the_first_disk_is_read_and_written_where_the_guest_says():
    """Scattered pages, an odd offset and several ranges; nothing beside them changes."""
    async with line(controller()) as wire:
        await clear(wire)
        first = wire.guest.free_pfn
        pfns = [first + 9, first + 2, first + 7]
        memory = wire.guest.memory
        memory.write(first * 4096, b"\xee" * 16 * 4096)
        await wire.command(write_10(0, 16), write=bytes(range(256)) * 32, offset=0)
        memory.write(first * 4096, b"\xee" * 16 * 4096)
        payload = build_srb(read_10(0, 16), data_in=1, transfer_length=8192)
        header = RANGES_HEADER.pack(0, 1) + build_range(8192, 100, pfns)
        wire.send(payload, kind=GPA_DIRECT, header=header)
        (packet,) = await wire.replies()
        assert parse_srb_reply_untrusted(packet.payload).srb_status == SUCCESS
        expected = bytearray(b"\xee" * 16 * 4096)
        stream = b"\xee" * 100 + bytes(range(256)) * 32 + b"\xee" * (4096 - 100)
        for index, pfn in enumerate(pfns):
            at = (pfn - first) * 4096
            expected[at : at + 4096] = stream[index * 4096 : index * 4096 + 4096]
        assert memory.read(first * 4096, 16 * 4096) == bytes(expected)


async def test_row_29_answers_wait_until_the_guest_reads_and_none_is_lost():
    """The outgoing ring holds 46 answers; the guest sends four times as many before it reads."""
    store = controller()
    channel, guest = channel_pair(ring_pages=2, personality=MACOS)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run, channel)
            wire = Line(guest)
            await wire.handshake()
            sent: list[int] = []
            payload = build_srb(TEST_UNIT_READY, data_in=2, transfer_length=0)
            while len(sent) < 184:
                identity = 1000 + len(sent)
                packet = build_ring_packet(IN_BAND, payload, transaction_id=identity, flags=1)
                if guest.send(packet):
                    sent.append(identity)
                else:
                    break
                if len(sent) % 40 == 0:
                    await trio.testing.wait_all_tasks_blocked()
            seen: list[int] = []
            assert channel.statistics.ring_full
            while len(seen) < len(sent):
                await trio.testing.wait_all_tasks_blocked()
                seen += [answer.transaction_id for answer in guest.receive_nowait()]
                guest.ring_doorbell()
            assert seen == sent
            channel.end()
    channel.close_doorbell()


async def test_a_sub_channel_takes_commands_and_nothing_else():
    store = controller(max_subchannels=2)
    primary, guest = channel_pair(offer=make_offer(max_subchannels=2))
    branch, branch_guest = channel_pair()
    branch.subchannel_index = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run, primary)
        await Line(guest).handshake()
        primary.deliver_subchannel(branch)
        wire = Line(branch_guest)
        assert (await wire.control(BEGIN_INITIALIZATION)).status == 0xC0000010
        assert (await wire.control(RESET_BUS)).status == 0xC0000010
        assert (await wire.command(INQUIRY, read=36)).srb_status == SUCCESS
        primary.end()
    for channel in (primary, branch):
        channel.close_doorbell()

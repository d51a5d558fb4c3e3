"""The rows of the acceptance checklist that are about storage, over a channel without habits.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, FaultKind
from storvsp.disks.ram import RamDisk
from storvsp.guest import attach, scan
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    COMPLETE_IO,
    CREATE_SUB_CHANNELS,
    END_INITIALIZATION,
    ENUMERATE_BUS,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    SUPPORTED_VERSIONS,
    build_packet,
    build_protocol_version,
    build_srb,
    build_sub_channels,
    parse_packet_untrusted,
    parse_properties_untrusted,
    parse_srb_reply_untrusted,
)
from tests.support.worlds import (
    ALL,
    SAFETY,
    controller,
    exercise,
    first_disk,
    read_10,
    world,
    write_10,
)
from vmbus.errors import ConfigError
from vmbus.guest import LINUX_6_1, MACOS, PERSONALITIES
from vmbus.testing import GuestEnd, channel_pair, make_offer
from vmbus.wire.gpa import build_range, page_count
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    GPA_DIRECT,
    IN_BAND,
    RANGES_HEADER,
    build_packet as build_ring_packet,
)

ABSENT = 0x20
SUCCESS = 0x01
CHECK = 0x84
INQUIRY = bytes([0x12, 0, 0, 0, 36, 0])
TEST_UNIT_READY = bytes(6)
REPORT_LUNS = struct.pack(">BBBBBBIBB", 0xA0, 0, 0, 0, 0, 0, 4096, 0, 0)
READ_CAPACITY = bytes([0x25]) + bytes(9)


class Reply(NamedTuple):
    srb_status: int
    scsi_status: int
    transferred: int
    sense: bytes
    data: bytes
    raw: bytes


class Line:
    """A driver reduced to sending and receiving."""

    def __init__(self, guest: GuestEnd) -> None:
        self.guest = guest
        self.next_id = 0

    def send(
        self,
        payload: bytes,
        *,
        identity: int | None = None,
        wants: bool = True,
        kind: int = IN_BAND,
        header: bytes = b"",
    ) -> int:
        if identity is None:
            self.next_id += 1
            identity = self.next_id
        flags = FLAG_COMPLETION_REQUESTED if wants else 0
        packet = build_ring_packet(
            kind, payload, transaction_id=identity, flags=flags, header=header
        )
        assert self.guest.send(packet) == 1
        return identity

    async def replies(self) -> list[Any]:
        await trio.testing.wait_all_tasks_blocked()
        return self.guest.receive_nowait()

    async def control(self, operation: int, body: bytes = b"", *, size: int = 64) -> Any:
        identity = self.send(build_packet(operation, body, size=size))
        (packet,) = await self.replies()
        assert (packet.kind, packet.transaction_id) == (COMPLETION, identity)
        assert len(packet.payload) == 64
        answer = parse_packet_untrusted(packet.payload)
        assert answer.operation == COMPLETE_IO
        return answer

    async def handshake(self, version: int = 0x602) -> None:
        assert (await self.control(BEGIN_INITIALIZATION)).status == 0
        body = build_protocol_version(version)
        assert (await self.control(QUERY_PROTOCOL_VERSION, body)).status == 0
        assert (await self.control(QUERY_PROPERTIES)).status == 0
        assert (await self.control(END_INITIALIZATION)).status == 0

    def start(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: bytes = b"",
        offset: int = 0,
        size: int = 64,
        **srb: Any,
    ) -> int:
        """Send a command; its data lies from the first free page on."""
        length = read or len(write)
        data_in = 1 if read else 0 if write else 2
        srb.setdefault("sense_length", 20)
        payload = build_srb(cdb, data_in=data_in, transfer_length=length, size=size, **srb)
        if not length:
            return self.send(payload)
        pages = page_count(offset, length)
        pfns = range(self.guest.free_pfn, self.guest.free_pfn + pages)
        self.guest.memory.write(pfns[0] * 4096 + offset, write or bytes(length))
        header = RANGES_HEADER.pack(0, 1) + build_range(length, offset, pfns)
        return self.send(payload, kind=GPA_DIRECT, header=header)

    async def command(self, cdb: bytes, **options: Any) -> Reply:
        identity = self.start(cdb, **options)
        (packet,) = await self.replies()
        assert (packet.kind, packet.transaction_id) == (COMPLETION, identity)
        return self.reply(packet, options.get("offset", 0))

    def reply(self, packet: Any, offset: int = 0) -> Reply:
        assert len(packet.payload) == 64
        srb = parse_srb_reply_untrusted(packet.payload)
        assert (srb.operation, srb.status) == (COMPLETE_IO, 0)
        at = self.guest.free_pfn * 4096 + offset
        data = self.guest.memory.read(at, srb.transfer_length)
        sense = srb.sense[: srb.sense_length] if srb.srb_status & 0x80 else b""
        return Reply(
            srb.srb_status, srb.scsi_status, srb.transfer_length, sense, data, packet.payload
        )


@asynccontextmanager
async def line(store: ScsiController, *, ready: bool = True) -> AsyncIterator[Line]:
    channel, guest = channel_pair(offer=store.offer)
    with trio.fail_after(SAFETY):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.run, channel)
            made = Line(guest)
            if ready:
                await made.handshake()
            yield made
            channel.end()
    channel.close_doorbell()


async def clear(wire: Line, **where: int) -> None:
    """Take the unit attentions that a new unit has for everybody."""
    for _ in range(6):
        if (await wire.command(TEST_UNIT_READY, **where)).srb_status == SUCCESS:
            return


# --- Rows 11, 12, 26: sizes and ids -------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 52, 56, 64])
async def test_row_26_requests_of_48_to_64_bytes_are_answered_with_64(size):
    async with line(controller(), ready=False) as wire:
        for operation in (BEGIN_INITIALIZATION, QUERY_PROPERTIES, 99, 0):
            await wire.control(operation, size=size)


@pytest.mark.parametrize("size", [0, 8, 40, 47])
async def test_row_26_shorter_ones_are_refused_with_64_bytes_too(size):
    async with line(controller()) as wire:
        wire.send(bytes(size))
        (packet,) = await wire.replies()
        assert len(packet.payload) == 64
        answer = parse_packet_untrusted(packet.payload)
        if size <= 40:  # the ring pads to 8 bytes
            assert answer.status != 0


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


# --- Row 21: absent units -----------------------------------------------------------------------

PLACES = [(0, 0, 1), (0, 0, 63), (0, 1, 0), (3, 0, 0), (7, 1, 254), (0, 2, 0), (255, 255, 255)]


@pytest.mark.parametrize("place", PLACES, ids=str)
async def test_row_21_inquiry_tells_that_nothing_is_there(place):
    where = dict(zip(("path", "target", "lun"), place, strict=True))
    async with line(controller()) as wire:
        reply = await wire.command(INQUIRY, read=36, **where)
        assert (reply.srb_status, reply.scsi_status) == (SUCCESS, 0)
        assert reply.data[0] == 0x7F
        assert len(reply.data) == 36


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    ("cdb", "read"), [(TEST_UNIT_READY, 0), (READ_CAPACITY, 8), (read_10(0, 1), 512)]
)
async def test_row_21_anything_else_gets_invalid_lun_and_nothing_beside(place, cdb, read):
    where = dict(zip(("path", "target", "lun"), place, strict=True))
    async with line(controller()) as wire:
        reply = await wire.command(cdb, read=read, **where)
        assert (reply.srb_status, reply.scsi_status, reply.transferred) == (ABSENT, 0, 0)


@pytest.mark.parametrize("place", PLACES, ids=str)
async def test_row_21_report_luns_succeeds_on_every_target(place):
    where = dict(zip(("path", "target", "lun"), place, strict=True))
    async with line(controller(disks=3)) as wire:
        reply = await wire.command(REPORT_LUNS, read=4096, **where)
        assert (reply.srb_status, reply.scsi_status) == (SUCCESS, 0)
        wanted = [0, 1, 2] if place[:2] == (0, 0) else []
        size = int.from_bytes(reply.data[:4], "big")
        assert [reply.data[8 + at + 1] for at in range(0, size, 8)] == wanted


@pytest.mark.parametrize("name", ALL)
async def test_row_21_no_guest_sees_a_ghost(name):
    personality = PERSONALITIES[name]
    store = controller(personality, disks=0)
    for lun in (0, 3):
        store.add_disk(RamDisk(1 << 20), lun=lun)
    async with world(store) as there, there.boot(personality) as guest:
        (offer,) = await guest.connection.connect()
        adapter = await attach(guest, offer, sub_channels=0)
        assert [each.lun for each in await scan(adapter)] == [0, 3]


@pytest.mark.parametrize("name", ALL)
async def test_row_21_a_controller_without_disks_is_an_empty_one(name):
    personality = PERSONALITIES[name]
    async with world(controller(personality, disks=0)) as there, there.boot(personality) as guest:
        (offer,) = await guest.connection.connect()
        assert await scan(await attach(guest, offer, sub_channels=0)) == []


# --- Rows 22, 23: statuses ----------------------------------------------------------------------


async def test_row_22_success_is_one_and_nothing_beside():
    async with line(controller()) as wire:
        await clear(wire)
        commands: list[tuple[bytes, dict[str, Any]]] = [
            (TEST_UNIT_READY, {}),
            (INQUIRY, {"read": 36}),
            (READ_CAPACITY, {"read": 8}),
            (read_10(0, 8), {"read": 4096}),
            (write_10(0, 8), {"write": bytes(4096)}),
        ]
        for cdb, options in commands:
            reply = await wire.command(cdb, **options)
            assert (reply.srb_status, reply.scsi_status) == (SUCCESS, 0)
            assert reply.transferred == options.get("read", len(options.get("write", b"")))


@pytest.mark.parametrize("asked", [0, 1, 8, 18, 20, 21, 255])
@pytest.mark.parametrize("version", sorted(SUPPORTED_VERSIONS))
async def test_row_22_check_conditions_have_no_more_sense_than_asked_for(asked, version):
    most = 18 if version <= 0x402 else 20
    async with line(controller(), ready=False) as wire:
        await wire.handshake(version)
        await clear(wire)
        reply = await wire.command(read_10(0xFFFFFFF0, 1), read=512, sense_length=asked)
        srb = parse_srb_reply_untrusted(reply.raw)
        assert reply.scsi_status == 2
        assert reply.transferred == 0
        assert reply.srb_status == (CHECK if asked else 0x04)
        assert srb.sense_length <= min(asked, most)
        if asked >= 3:
            assert reply.sense[0] & 0x7F == 0x70
            assert reply.sense[2] & 0xF == 5


async def test_row_22_a_short_answer_says_how_short_it_is():
    async with line(controller()) as wire:
        reply = await wire.command(bytes([0x12, 0, 0, 0, 255, 0]), read=4096)
        assert reply.srb_status == SUCCESS
        assert 36 <= reply.transferred < 255


async def test_row_23_no_answer_has_a_status_that_freebsd_panics_on():
    async with line(controller()) as wire:
        for opcode in range(256):
            for data in ({}, {"read": 512}, {"write": bytes(512)}):
                reply = await wire.command(bytes([opcode]).ljust(16, b"\0"), **data)
                assert reply.srb_status & 0x3F not in {0, 3}
                assert reply.transferred <= 512


async def test_row_23_and_24_a_notification_is_no_completion():
    store = controller()
    async with line(store) as wire:
        store.add_disk(RamDisk(1 << 20))
        (packet,) = await wire.replies()
        assert (packet.kind, packet.flags, packet.transaction_id) == (IN_BAND, 0, 0)
        assert len(packet.payload) == 64
        assert parse_packet_untrusted(packet.payload).operation == ENUMERATE_BUS


@pytest.mark.parametrize("stage", range(4))
async def test_row_23_nobody_is_notified_before_the_handshake_is_over(stage):
    store = controller()
    async with line(store, ready=False) as wire:
        steps = [
            (BEGIN_INITIALIZATION, b""),
            (QUERY_PROTOCOL_VERSION, build_protocol_version(0x600)),
            (QUERY_PROPERTIES, b""),
        ]
        for operation, body in steps[:stage]:
            await wire.control(operation, body)
        store.add_disk(RamDisk(1 << 20))
        assert await wire.replies() == []


# --- Row 24: everything is answered -------------------------------------------------------------


@pytest.mark.parametrize("operation", [RESET_BUS, RESET_ADAPTER, RESET_LUN])
async def test_row_24_a_reset_answers_all_that_waited_and_then_itself(operation):
    # fuzz scenario G32
    store = controller(disks=0)
    store.add_disk(DelayDisk(RamDisk(1 << 20), read=3600.0))
    async with line(store) as wire:
        await clear(wire)
        waiting = {wire.start(read_10(block, 1), read=512) for block in range(100)}
        assert await wire.replies() == []
        identity = wire.send(build_packet(operation))
        packets = await wire.replies()
        assert packets[-1].transaction_id == identity
        assert {packet.transaction_id for packet in packets[:-1]} == waiting
        assert len(packets) == 101


@pytest.mark.parametrize("kind", [each for each in FaultKind if each is not FaultKind.HANG])
async def test_row_24_errors_of_the_host_are_answers(kind):
    store = controller(disks=0)
    store.add_disk(FaultDisk(RamDisk(1 << 20), Fault(kind)))
    async with line(store) as wire:
        await clear(wire)
        for cdb, options in (
            (read_10(0, 1), {"read": 512}),
            (write_10(0, 1), {"write": bytes(512)}),
        ):
            reply = await wire.command(cdb, **options)
            assert reply.srb_status & 0x3F not in {0, 3}


async def test_row_24_commands_in_flight_at_the_close_end_without_an_answer():
    store = controller(disks=0)
    disk = FaultDisk(RamDisk(1 << 20), hang := Fault(FaultKind.HANG))
    store.add_disk(disk)
    async with line(store) as wire:
        await clear(wire)
        for block in range(10):
            wire.start(read_10(block, 1), read=512)
        assert await wire.replies() == []
        assert hang.waiting == 10
        store._session.primary.end()  # type: ignore[union-attr]
        await trio.testing.wait_all_tasks_blocked()
        assert store._session is not None
        hang.release()
        await trio.testing.wait_all_tasks_blocked()
        assert store._session is None
        assert wire.guest.receive_nowait() == []


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
    with trio.fail_after(SAFETY):
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

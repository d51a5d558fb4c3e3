"""The rows of the acceptance checklist about units and their commands, without habits.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, FaultKind
from storvsp.disks.ram import RamDisk
from storvsp.guest import attach, scan
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    ENUMERATE_BUS,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    SUPPORTED_VERSIONS,
    build_packet,
    build_protocol_version,
    parse_packet_untrusted,
    parse_srb_reply_untrusted,
)
from tests.support.storage_line import (
    ABSENT,
    CHECK,
    INQUIRY,
    READ_CAPACITY,
    REPORT_LUNS,
    SUCCESS,
    TEST_UNIT_READY,
    clear,
    line,
)
from tests.support.worlds import ALL, controller, read_10, world, write_10
from vmbus.guest import PERSONALITIES
from vmbus.wire.packets import IN_BAND

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


@pytest.mark.parametrize("room", [0, 12, 18, 20])
async def test_row_22_a_new_capacity_is_told_beside_the_srb_status_that_old_linux_looks_for(room):
    store = controller()
    async with line(store) as wire:
        await clear(wire)
        await store.resize_disk((0, 0, 0), 2 << 20, shrink=True)
        await wire.replies()
        reply = await wire.command(TEST_UNIT_READY, sense_length=room)
        assert reply.scsi_status == 2
        if room < 14:  # it cannot be told, whatever the status
            assert reply.srb_status == (CHECK if room else CHECK & 0x7F)
        else:
            assert reply.srb_status == 0x82
            assert (reply.sense[2] & 0xF, *reply.sense[12:14]) == (6, 0x2A, 0x09)
        assert (await wire.command(TEST_UNIT_READY)).srb_status == SUCCESS


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

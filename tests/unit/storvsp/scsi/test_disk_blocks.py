"""READ and WRITE."""

import logging
import os
import struct

import pytest

from storvsp.disk import (
    DiskError,
    DiskUnavailableError,
    MediumError,
    NoSpaceError,
    OutOfRangeError,
    ReadOnlyError,
)
from storvsp.scsi import Outcome
from storvsp.scsi.unit import STATUS_GOOD, STEP
from tests.support.scsi import make_command, run
from tests.support.scsi_blocks import LAST, READS, WRITES, filled_unit


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("cdb", READS.values(), ids=READS)
async def test_reads_deliver_the_blocks_named(cdb, inline):
    disk, unit = filled_unit()
    disk.inline = inline
    for _ in range(2):  # the second time through the fast path
        reply = await run(unit, cdb, room=1024, pieces=(100, 500))
        assert reply == type(reply)(0, b"", 1024, bytes(disk.data[1536:2560]))


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("cdb", WRITES.values(), ids=WRITES)
async def test_writes_put_the_blocks_where_they_belong(cdb, inline):
    disk, unit = filled_unit()
    disk.inline = inline
    for _ in range(2):
        before = bytes(disk.data)
        payload = os.urandom(1024)
        reply = await run(unit, cdb, out=payload, pieces=(1, 1000))
        assert (reply.status, reply.transferred) == (0, 1024)
        assert disk.data == before[:1536] + payload + before[2560:]


async def test_a_six_byte_command_of_length_0_moves_256_blocks():
    disk, unit = filled_unit(blocks=300)
    reply = await run(unit, "08 00000a 00 00", room=256 * 512)
    assert reply.data == disk.data[5120 : 5120 + 256 * 512]
    payload = bytes(256 * 512)
    assert (await run(unit, "0a 00000a 00 00", out=payload)).transferred == len(payload)


async def test_a_short_command_may_come_in_a_long_cdb():
    """The operation code alone says how long a command is (SPC-4 4.2.5.1)."""
    disk, unit = filled_unit()
    tail = "00" * 10
    assert (await run(unit, "08 e00003 01 00" + tail, room=512)).data == disk.data[1536:2048]
    reply = await run(unit, "08 1fffff 01 00" + tail, room=512)
    assert (reply.fault, reply.pointer) == ((5, 0x2100), (1, None, True))
    assert (await run(unit, "28 20 00000003 00 0001 00" + tail, room=512)).pointer == (1, 7, True)


async def test_six_byte_commands_have_21_bit_addresses_and_ignore_the_old_lun_bits():
    disk, unit = filled_unit()
    assert (await run(unit, "08 e00003 01 00", room=512)).data == disk.data[1536:2048]


@pytest.mark.parametrize(
    "cdb",
    [
        "28 00 00000003 00 0000 00",
        "2a 00 00000003 00 0000 00",
        "a8 00 00000003 00000000 00 00",
        "88 00 0000000000000003 00000000 00 00",
        "8a 00 0000000000000003 00000000 00 00",
        "89 00 0000000000000003 000000 00 00 00",
        "2f 02 00000003 00 0000 00",
        "2e 00 00000003 00 0000 00",
        "8b 00 0000000000000003 00000000 00 00",
        "34 00 00000003 00 0000 00",
    ],
)
async def test_length_0_is_good_and_moves_nothing(cdb):
    disk, unit = filled_unit()
    reply = await run(unit, cdb)
    assert (reply.status, reply.transferred) == (0, 0)
    assert disk.calls == []


@pytest.mark.parametrize(
    "cdb",
    [
        f"28 00 {LAST + 1:08x} 00 0000 00",  # empty, but begins outside
        f"28 00 {LAST:08x} 00 0002 00",
        "28 00 ffffffff 00 0001 00",
        "28 00 ffffffff 00 ffff 00",  # wraps at 2^32
        "a8 00 ffffffff ffffffff 00 00",
        "88 00 ffffffffffffffff 00000001 00 00",  # wraps at 2^64
        "88 00 ffffffffffffffff ffffffff 00 00",
        "88 00 7fffffffffffffff 00000001 00 00",
        "08 1fffff 01 00",
        f"34 00 {LAST:08x} 00 0002 00",
        "90 00 ffffffffffffffff 00000002 00 00",
        f"35 00 {LAST:08x} 00 0002 00",
        f"35 00 {LAST + 1:08x} 00 0000 00",
        "91 00 ffffffffffffffff 00000001 00 00",
        f"2f 00 {LAST:08x} 00 0002 00",
    ],
)
async def test_addresses_outside_the_medium_are_refused(cdb):
    _, unit = filled_unit()
    reply = await run(unit, cdb, room=1 << 16)
    assert reply.fault == (5, 0x2100)
    assert reply.transferred == 0
    lba = bytes.fromhex(cdb)
    first = int.from_bytes(lba[1:4] if lba[0] < 0x20 else lba[2:10] if len(lba) == 16 else lba[2:6])
    assert reply.information == (first if first < 1 << 32 else None)
    assert reply.pointer == (1 if lba[0] < 0x20 else 2, None, True)


async def test_the_last_block_can_be_read_and_written():
    disk, unit = filled_unit()
    assert (await run(unit, f"28 00 {LAST:08x} 00 0001 00", room=512)).data == disk.data[-512:]
    assert (await run(unit, f"2a 00 {LAST:08x} 00 0001 00", out=b"x" * 512)).status == 0
    assert disk.data[-512:] == b"x" * 512


@pytest.mark.parametrize("room", [1, 511, 512, 513, 1023])
async def test_a_read_into_a_smaller_buffer_fills_it_and_says_so(room):
    disk, unit = filled_unit()
    reply = await run(unit, READS["READ(10)"], room=room)
    assert (reply.status, reply.transferred) == (0, room)
    assert reply.buffer == disk.data[1536 : 1536 + room]


async def test_a_read_into_a_bigger_buffer_leaves_the_rest_alone():
    disk, unit = filled_unit()
    reply = await run(unit, READS["READ(10)"], room=4096, pieces=(700,))
    assert reply.transferred == 1024
    assert reply.buffer == bytes(disk.data[1536:2560]) + bytes(3072)


async def test_a_write_with_a_bigger_buffer_takes_only_what_the_cdb_says():
    disk, unit = filled_unit()
    reply = await run(unit, WRITES["WRITE(10)"], out=b"y" * 4096)
    assert reply.transferred == 1024
    assert disk.data[1536:2560] == b"y" * 1024
    assert disk.data[2560:3072] != b"y" * 512


async def test_a_write_with_less_data_than_its_cdb_says_writes_nothing():
    disk, unit = filled_unit()
    before = bytes(disk.data)
    reply = await run(unit, WRITES["WRITE(10)"], out=b"y" * 1023)
    assert reply.fault == (5, 0x2400)
    assert reply.pointer == (7, None, True)
    assert disk.data == before


async def test_a_buffer_that_points_the_wrong_way_is_refused():
    disk, unit = filled_unit()
    before = bytes(disk.data)
    for cdb in READS.values():
        assert (await run(unit, cdb, out=bytes(1024))).fault == (5, 0x2400)
        assert (await run(unit, cdb)).fault == (5, 0x2400)
    for cdb in WRITES.values():
        assert (await run(unit, cdb, room=1024)).fault == (5, 0x2400)
        assert (await run(unit, cdb)).fault == (5, 0x2400)
    assert disk.data == before


@pytest.mark.parametrize(
    ("cdb", "pointer"),
    [
        ("28 20 00000003 00 0002 00", (1, 7, True)),  # RDPROTECT
        ("2a 80 00000003 00 0002 00", (1, 7, True)),  # WRPROTECT
        ("88 20 0000000000000003 00000002 00 00", (1, 7, True)),
        ("28 01 00000003 00 0002 00", (1, 0, True)),  # RELADR
        ("28 00 00000003 00 0002 04", (9, 2, True)),  # NACA
        ("88 00 0000000000000003 00000002 00 04", (15, 2, True)),
        ("28 00 000000", (5, None, True)),  # cut off
        ("28", (1, None, True)),
        ("88 00 0000000000000003 00000002", (14, None, True)),
        ("", (0, None, True)),
    ],
)
async def test_a_refused_field_is_named_in_the_sense_data(cdb, pointer):
    _, unit = filled_unit()
    for _ in range(2):
        reply = await run(unit, cdb, room=1024)
        assert reply.fault == (5, 0x2400)
        assert reply.pointer == pointer


async def test_dpo_and_group_numbers_are_accepted():
    disk, unit = filled_unit()
    assert (await run(unit, "28 10 00000003 1f 0002 00", room=1024)).data == disk.data[1536:2560]


@pytest.mark.parametrize("inline", [True, False])
async def test_fua_reaches_the_disk(inline):
    disk, unit = filled_unit()
    disk.inline = inline
    for cdb in (
        "2a 08 00000003 00 0001 00",
        "8a 08 0000000000000003 00000001 00 00",
        "aa 08 00000003 00000001 00 00",
    ):
        disk.calls.clear()
        await run(unit, cdb, out=bytes(512))
        assert disk.calls == ["write fua"]


async def test_a_read_with_fua_writes_the_cache_first():
    disk, unit = filled_unit()
    for _ in range(2):
        disk.calls.clear()
        await run(unit, "28 08 00000003 00 0001 00", room=512)
        assert disk.calls == ["flush", "read"]
    disk, unit = filled_unit(write_cache=False)
    await run(unit, "28 08 00000003 00 0001 00", room=512)
    assert disk.calls == ["read"]


async def test_transfers_bigger_than_the_back_end_takes_are_cut():
    disk, unit = filled_unit(blocks=64, max_transfer=1024 + 100)
    for _ in range(2):
        disk.calls.clear()
        reply = await run(unit, "28 00 00000001 00 0005 00", room=2560, pieces=(600,))
        assert reply.data == disk.data[512:3072]
        assert disk.calls == ["read"] * 3
    disk.calls.clear()
    payload = os.urandom(2560)
    for cdb in ("2a 00 00000001 00 0005 00", "aa 00 00000001 00000005 00 00"):
        assert (await run(unit, cdb, out=payload)).transferred == 2560
    assert disk.data[512:3072] == payload
    assert disk.calls == ["write"] * 6


async def test_a_huge_transfer_is_cut_even_if_the_back_end_would_take_it():
    """One packet can name more pages than the loop may stand still for."""
    disk, unit = filled_unit(blocks=3 * STEP // 1024)
    command, buffer = make_command(
        struct.pack(">BBIBHB", 0x28, 0, 0, 0, 3 * STEP // 1024, 0), room=3 * STEP // 2
    )
    assert unit.try_execute(command) is None
    assert disk.calls == []
    assert (await unit.execute(command)).transferred == 3 * STEP // 2
    assert disk.calls == ["read"] * 2
    assert buffer == disk.data


def test_the_fast_path_answers_without_waiting():
    disk, unit = filled_unit()
    command, buffer = make_command("28 00 00000000 00 0001 00", room=512)
    for _ in range(2):
        assert unit.try_execute(command) == Outcome(STATUS_GOOD, b"", 512)
    assert buffer == disk.data[:512]
    disk.inline = False
    assert unit.try_execute(command) is None
    write, _ = make_command("2a 00 00000000 00 0001 00", out=bytes(512))
    assert unit.try_execute(write) is None


async def test_long_transfers_are_counted_right():
    _, unit = filled_unit(blocks=3000)
    for _ in range(2):
        reply = await run(unit, "28 00 00000000 00 0b00 00", room=0xB00 * 512)
        assert reply.transferred == 0xB00 * 512


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("error", "reading", "writing"),
    [
        (OutOfRangeError("gone"), (5, 0x2100), (5, 0x2100)),
        (ReadOnlyError("no"), (7, 0x2700), (7, 0x2700)),
        (MediumError("bad", offset=2048), (3, 0x1100), (3, 0x0C00)),
        (NoSpaceError("full"), (7, 0x2707), (7, 0x2707)),
        (DiskUnavailableError("gone"), (4, 0x4400), (4, 0x4400)),
        (DiskError("odd"), (4, 0x4400), (4, 0x4400)),
        (OSError(5, "escaped"), (3, 0x1100), (3, 0x0C00)),
        (ZeroDivisionError("bug"), (4, 0x4400), (4, 0x4400)),
    ],
)
async def test_failures_of_the_back_end_become_sense_data(error, reading, writing, inline, caplog):
    caplog.set_level(logging.CRITICAL)
    disk, unit = filled_unit()
    await run(unit, "00 00 00 00 00 00")  # the initiator is known: fast path
    disk.inline = inline
    disk.fail = error
    for cdb in READS.values():
        reply = await run(unit, cdb, room=1024)
        assert reply.fault == reading
        if isinstance(error, MediumError):
            assert reply.information == 4
    for cdb in WRITES.values():
        assert (await run(unit, cdb, out=bytes(1024))).fault == writing


async def test_an_escaped_oserror_is_logged_as_a_bug(caplog):
    disk, unit = filled_unit()
    disk.fail = OSError(5, "escaped")
    await run(unit, READS["READ(10)"], room=1024)
    assert "let an OSError escape" in caplog.text


async def test_a_read_only_disk_refuses_every_change():
    disk, unit = filled_unit(read_only=True, supports_unmap=True)
    before = bytes(disk.data)
    for cdb in (
        *WRITES.values(),
        "2e 00 00000003 00 0001 00",
        "41 00 00000003 00 0001 00",
        "89 00 0000000000000003 000000 01 00 00",
        "8b 00 0000000000000003 00000001 00 00",
        "42 00 0000000000 0018 00",
        "04 00 00 00 00 00",
    ):
        for _ in range(2):
            assert (await run(unit, cdb, out=bytes(1024))).fault == (7, 0x2700)
    assert disk.data == before
    assert (await run(unit, READS["READ(10)"], room=1024)).status == 0

"""Commands about the whole medium: capacity, the cache, the tray, FORMAT, defects."""

import pytest

from storvsp.disk import MediumError
from tests.support.scsi import finish, make_command, run
from tests.support.scsi_blocks import LAST, READS, filled_unit


@pytest.mark.parametrize(
    ("changes", "ten", "sixteen"),
    [
        ({}, "0000007f 00000200", "000000000000007f 00000200 00 03 0000" + "00" * 16),
        (
            {"sector_size": 4096},
            "0000007f 00001000",
            "000000000000007f 00001000 00 00 0000" + "00" * 16,
        ),
        (
            {"physical_sector_size": 512, "supports_unmap": True},
            "0000007f 00000200",
            "000000000000007f 00000200 00 00 8000" + "00" * 16,
        ),
        (
            {"supports_unmap": True, "unmapped_reads_zero": True},
            "0000007f 00000200",
            "000000000000007f 00000200 00 03 c000" + "00" * 16,
        ),
    ],
)
async def test_capacity_is_reported_in_both_sizes(changes, ten, sixteen):
    _, unit = filled_unit(**changes)
    reply = await run(unit, "25 00 00000000 00 00 00 00", room=64)
    assert reply.data.hex() == ten.replace(" ", "")
    reply = await run(unit, "9e 10 0000000000000000 00000020 00 00", room=64)
    assert reply.data.hex() == sixteen.replace(" ", "")
    reply = await run(unit, "9e 10 0000000000000000 0000000c 00 00", room=64)
    assert reply.data == bytes.fromhex(sixteen)[:12]


async def test_a_capacity_beyond_32_bits_is_only_in_the_long_form():
    _, unit = filled_unit()
    unit.blocks = 1 << 33
    assert (await run(unit, "25" + "00" * 9, room=8)).data.hex() == "ffffffff00000200"
    reply = await run(unit, "9e 10 0000000000000000 00000020 00 00", room=32)
    assert reply.data[:8].hex() == "00000001ffffffff"


async def test_partial_medium_indicators_are_checked():
    _, unit = filled_unit()
    assert (await run(unit, "25 00 00000001 00 00 00 00", room=8)).pointer == (2, None, True)
    assert (await run(unit, "25 00 00000001 00 00 01 00", room=8)).status == 0
    assert (await run(unit, "25 00 00000080 00 00 01 00", room=8)).fault == (5, 0x2100)
    reply = await run(unit, "9e 10 0000000000000001 00000020 00 00", room=32)
    assert reply.fault == (5, 0x2400)


async def test_a_disk_without_blocks_has_no_medium():
    _, unit = filled_unit(blocks=0)
    for cdb in ("00" * 6, "25" + "00" * 9, READS["READ(10)"], "35" + "00" * 9):
        assert (await run(unit, cdb, room=1024)).fault == (2, 0x3A00)
    assert (await run(unit, "03 00 00 00 12 00", room=18)).data[12] == 0x3A


async def test_a_resize_is_announced_once_and_in_force_at_once():
    disk, unit = filled_unit()
    read = f"28 00 {LAST:08x} 00 0002 00"
    assert (await run(unit, read, room=1024)).fault == (5, 0x2100)
    disk.resize(256)
    assert (await run(unit, "12 00 00 0024 00", room=36)).status == 0
    reply = await run(unit, read, room=1024)
    assert reply.fault == (6, 0x2A09)
    assert (await run(unit, read, room=1024)).status == 0
    disk.resize(256)  # nothing has changed
    assert (await run(unit, read, room=1024)).status == 0
    disk.resize(64)
    assert (await run(unit, read, room=1024)).fault == (6, 0x2A09)
    assert (await run(unit, read, room=1024)).fault == (5, 0x2100)
    unit.close()
    unit.close()
    assert disk.watchers == []


@pytest.mark.parametrize(
    "cdb",
    [
        "35 00 00000000 00 0000 00",
        "35 02 00000001 00 0005 00",
        "91 00 0000000000000000 00000000 00 00",
    ],
)
async def test_synchronize_cache_flushes(cdb):
    disk, unit = filled_unit()
    command, _ = make_command(cdb)
    assert unit.try_execute(command) is None
    assert (await finish(unit, command)).status == 0
    assert disk.calls == ["flush"]
    disk.fail = MediumError("bad")
    assert (await run(unit, cdb)).fault == (3, 0x0C00)


async def test_stopping_flushes_and_the_disk_stays_ready():
    disk, unit = filled_unit()
    assert (await run(unit, "1b 00 00 00 00 00")).status == 0
    assert disk.calls == ["flush"]
    for cdb in ("1b 01 00 00 01 00", "1b 00 00 00 04 00", "1b 00 00 00 30 00", "00" * 6):
        assert (await run(unit, cdb)).status == 0
    assert disk.calls == ["flush"]
    assert (await run(unit, "1b 00 00 00 50 00")).pointer == (4, 7, True)
    assert (await run(unit, "1b 00 00 00 02 00")).pointer == (4, 1, True)


async def test_a_removable_disk_can_be_ejected_loaded_and_locked():
    disk, unit = filled_unit(removable=True)
    prevent, allow = "1e 00 00 00 01 00", "1e 00 00 00 00 00"
    assert (await run(unit, prevent)).status == 0
    await run(unit, "00" * 6, initiator="other")
    assert (await run(unit, "1b 00 00 00 02 00", initiator="other")).fault == (5, 0x5302)
    assert (await run(unit, allow, initiator="other")).status == 0
    assert (await run(unit, "1b 00 00 00 02 00", initiator="other")).fault == (5, 0x5302)
    unit.detach("guest")
    assert (await run(unit, "1b 00 00 00 02 00")).status == 0
    assert disk.calls == ["flush"]
    assert (await run(unit, READS["READ(10)"], room=1024)).fault == (2, 0x3A02)
    assert (await run(unit, "1b 00 00 00 02 00")).status == 0
    assert (await run(unit, "1b 00 00 00 03 00", initiator="other")).status == 0
    assert (await run(unit, READS["READ(10)"], room=1024)).fault == (6, 0x2800)
    assert (await run(unit, READS["READ(10)"], room=1024)).status == 0
    assert (await run(unit, "1e 00 00 00 02 00")).pointer == (4, 1, True)


async def test_formatting_frees_a_thin_disk_and_leaves_others_alone():
    disk, unit = filled_unit()
    before = bytes(disk.data)
    assert (await run(unit, "04 00 00 00 00 00")).status == 0
    assert disk.data == before
    disk, unit = filled_unit(supports_unmap=True)
    reply = await run(unit, "04 10 00 00 00 00", out=bytes(4))
    assert (reply.status, reply.transferred) == (0, 4)
    assert disk.data == bytes(len(before))
    assert (await run(unit, "04 30 00 00 00 00", out=bytes(8))).transferred == 8


@pytest.mark.parametrize(
    ("cdb", "out", "fault", "pointer"),
    [
        ("04 40 00 00 00 00", "", (5, 0x2400), (1, 7, True)),
        ("04 08 00 00 00 00", "", (5, 0x2400), (1, 3, True)),
        ("04 10 00 00 00 00", "00080000", (5, 0x2600), (1, 3, False)),
        ("04 10 00 00 00 00", "00000008", (5, 0x2600), (3, None, False)),
        ("04 30 00 00 00 00", "0000000000010000", (5, 0x2600), (5, None, False)),
        ("04 30 00 00 00 00", "00000000", (5, 0x1A00), None),
    ],
)
async def test_defect_lists_and_patterns_are_refused(cdb, out, fault, pointer):
    disk, unit = filled_unit(supports_unmap=True)
    reply = await run(unit, cdb, out=bytes.fromhex(out))
    assert reply.fault == fault
    if pointer:
        assert reply.pointer == pointer
    assert disk.calls == []


async def test_defect_lists_are_empty():
    _, unit = filled_unit()
    reply = await run(unit, "37 00 1d 00000000 0010 00", room=16)
    assert reply.data.hex() == "001d0000"
    reply = await run(unit, "b7 0d 00000000 00000010 00 00", room=16)
    assert reply.data.hex() == "000d000000000000"

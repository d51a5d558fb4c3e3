"""The CD/DVD-ROM drive."""

import os
from typing import Any

import pytest
import trio
import trio.testing

from storvsp.disk import MediumError
from storvsp.scsi import CdromUnit
from storvsp.scsi.cdrom_data import MAX_CD_SECTORS, msf
from tests.support.scsi import MemoryDisk, make_command, run


def medium(blocks: int = 100, **changes: Any) -> MemoryDisk:
    disk = MemoryDisk(blocks=blocks, sector_size=2048, optical=True, read_only=True, **changes)
    disk.data[:] = os.urandom(len(disk.data))
    return disk


def make_drive(**changes: Any) -> tuple[MemoryDisk, CdromUnit]:
    disk = medium(**changes)
    return disk, CdromUnit(disk, luns=lambda: [0], identity=b"drive")


def big_drive(blocks: int) -> CdromUnit:
    _, drive = make_drive()
    drive.blocks = blocks
    return drive


def hexes(text: str) -> bytes:
    return bytes.fromhex(text)


READY = "00" * 6
EJECT, LOAD = "1b 00 00 00 02 00", "1b 00 00 00 03 00"
GESN = "4a 01 0000 10 0000 0008 00"


async def test_the_drive_says_what_it_is():
    _, drive = make_drive()
    reply = await run(drive, "12 00 00 0060 00", room=96)
    assert reply.data[:36] == hexes("05 80 05 12 5b 00 00 02") + b"Msft    Virtual DVD-ROM 1.0 "
    assert reply.data[58:64] == hexes("0060 0300 03a0")
    assert (await run(drive, "12 01 00 00ff 00", room=96)).data == hexes("05000003008083")
    reply = await run(drive, "12 01 80 00ff 00", room=96)
    assert reply.data == hexes("0580000a") + b"drive".hex().encode()
    assert (await run(drive, "12 01 b0 00ff 00", room=96)).fault == (5, 0x2400)
    assert (await run(drive, "a0" + "00" * 11, room=96)).transferred == 16


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("limit", [0, 2048, 3000])
@pytest.mark.parametrize("cdb", [
    "28 00 00000005 00 0003 00",
    "a8 00 00000005 00000003 00 00",
    "88 00 0000000000000005 00000003 00 00",
    "be 00 00000005 000003 10 00 00",
    "be 08 00000005 000003 10 00 00",
])  # fmt: skip
async def test_reads_deliver_the_sectors_named(cdb, limit, inline):
    disk, drive = make_drive(max_transfer=limit)
    disk.inline = inline
    reply = await run(drive, cdb, room=6144, pieces=(1000,))
    assert (reply.status, reply.data) == (0, bytes(disk.data[10240:16384]))
    reply = await run(drive, cdb, room=3000)
    assert (reply.status, reply.data) == (0, bytes(disk.data[10240:13240]))


@pytest.mark.parametrize(("cdb", "fault"), [
    ("28 00 00000063 00 0002 00", (5, 0x2100)),
    ("28 00 00000064 00 0000 00", (5, 0x2100)),
    ("a8 00 ffffffff ffffffff 00 00", (5, 0x2100)),
    ("be 00 00000063 000002 10 00 00", (5, 0x2100)),
    ("be 04 00000005 000001 10 00 00", (5, 0x6400)),
    ("be 00 00000005 000001 f8 00 00", (5, 0x6400)),
    ("be 00 00000005 000001 10 01 00", (5, 0x2400)),
])  # fmt: skip
async def test_reads_of_what_is_not_there_are_refused(cdb, fault):
    _, drive = make_drive()
    assert (await run(drive, cdb, room=65536)).fault == fault


async def test_empty_reads_are_good_and_write_commands_do_not_exist():
    disk, drive = make_drive()
    disk.inline = False
    for cdb in ("28 00 00000005 00 0000 00", "be 00 00000005 000003 00 00 00"):
        assert (await run(drive, cdb)).status == 0
        command, _ = make_command(cdb)
        assert (await drive.execute(command)).status == 0
    assert disk.calls == []
    for opcode in (0x2A, 0xAA, 0x8A, 0x0A, 0x41, 0x42, 0x5F):
        assert (await run(drive, bytes([opcode]) + bytes(15))).fault == (5, 0x2000)


async def test_a_scratched_disc_is_a_medium_error():
    disk, drive = make_drive()
    disk.fail = MediumError("scratch", offset=4096)
    reply = await run(drive, "28 00 00000001 00 0003 00", room=6144)
    assert (reply.fault, reply.information) == ((3, 0x1100), 2)


async def test_capacity_is_that_of_the_medium():
    _, drive = make_drive()
    assert (await run(drive, "25" + "00" * 9, room=8)).data == hexes("00000063 00000800")


def test_addresses_in_minutes_seconds_and_frames():
    assert msf(0) == bytes((0, 2, 0))
    assert msf(MAX_CD_SECTORS - 1) == bytes((80, 1, 74))
    assert msf(1 << 31) == bytes((255, msf(1 << 31)[1], msf(1 << 31)[2]))


TOC = [
    ("43 00 00 000000 00 ffff 00", "0012 01 01 00140100 00000000 0014aa00 00000064"),
    ("43 02 00 000000 01 ffff 00", "0012 01 01 00140100 00000200 0014aa00 00000319"),
    ("43 00 00 000000 aa ffff 00", "000a 01 01 0014aa00 00000064"),
    ("43 00 00 000000 00 0005 00", "0012 01 01 00"),
    ("43 00 01 000000 00 ffff 00", "000a 01 01 00140100 00000000"),
    ("43 02 00 000000 00 ffff 40", "000a 01 01 00140100 00000200"),  # format in byte 9
    ("43 02 02 000000 00 ffff 00",
     "002e 01 01 011400a000000000010000 011400a100000000010000"
     " 011400a200000000000319 0114000100000000000200"),
]  # fmt: skip


@pytest.mark.parametrize(("cdb", "expected"), TOC)
async def test_the_table_of_contents_has_one_data_track(cdb, expected):
    _, drive = make_drive()
    assert (await run(drive, cdb, room=4096)).data == hexes(expected)


@pytest.mark.parametrize(("cdb", "pointer"), [
    ("43 00 00 000000 02 ffff 00", (6, None, True)),
    ("43 00 02 000000 02 ffff 00", (6, None, True)),
    ("43 00 03 000000 00 ffff 00", (2, 3, True)),
    ("46 03 0000 000000 ffff 00", (1, 1, True)),
    ("4a 00 0000 10 0000 0008 00", (1, 0, True)),
    ("51 01 0000000000 ffff 00", (1, 2, True)),
    ("52 03 00000001 00 ffff 00", (1, 1, True)),
    ("52 01 00000002 00 ffff 00", (2, None, True)),
    ("52 02 00000000 00 ffff 00", (2, None, True)),
    ("52 00 00000064 00 ffff 00", (2, None, True)),
    ("ad 01 00000000 00 00 ffff 00 00", (1, 3, True)),
    ("ac 10 00000000 0000 0001 01 00", (10, None, True)),
])  # fmt: skip
async def test_fields_that_name_nothing_are_refused(cdb, pointer):
    _, drive = make_drive()
    assert (await run(drive, cdb, room=4096)).pointer == pointer


HEAD = "00000003 00000008"
FEATURES = {
    0x0000: ("0000 03 08", "00100000 00080100"),
    0x0001: ("0001 0b 08", "00000001 01000000"),
    0x0002: ("0002 07 04", "02000000"),
    0x0003: ("0003 03 04", "29000000"),
    0x0010: ("0010 01 08", "00000800 0001 00 00"),
    0x001E: ("001e 09 04", "00000000"),
    0x001F: ("001f 04 04", "00000000"),
    0x0100: ("0100 03 00", ""),
    0x0105: ("0105 07 04", "00000000"),
}


async def configuration(drive: CdromUnit, kind: int, start: int = 0) -> bytes:
    cdb = bytes((0x46, kind, start >> 8, start & 255, 0, 0, 0, 16, 0, 0))
    reply = await run(drive, cdb, room=4096)
    assert int.from_bytes(reply.data[:4], "big") == len(reply.data) - 4
    return reply.data[4:]


async def test_features_are_those_of_a_cd_in_a_dvd_drive():
    _, drive = make_drive()
    descriptors = {code: hexes(a + b) for code, (a, b) in FEATURES.items()}
    head = hexes("0000 0008")
    assert await configuration(drive, 0) == head + b"".join(descriptors.values())
    assert await configuration(drive, 0, 0x1F) == head + b"".join(
        data for code, data in descriptors.items() if code >= 0x1F
    )
    assert await configuration(drive, 1) == head + b"".join(
        data for code, data in descriptors.items() if code != 0x1F
    )
    for code, data in descriptors.items():
        assert await configuration(drive, 2, code) == head + data
    assert await configuration(drive, 2, 0x20) == head
    assert (await configuration(big_drive(MAX_CD_SECTORS), 2, 0))[:4] == head
    dvd = big_drive(MAX_CD_SECTORS + 1)
    assert await configuration(dvd, 2, 0) == hexes("0000 0010 0000 03 08 00100100 00080000")
    assert await configuration(dvd, 2, 0x10) == hexes("0000 0010 0010 01 08 00000800 0010 0000")
    assert await configuration(dvd, 2, 0x1F) == hexes("0000 0010 001f 05 04 00000000")
    empty = CdromUnit(luns=list)
    assert await configuration(empty, 2, 0) == hexes("0000 0000 0000 03 08 00100000 00080000")


async def test_disc_and_track_information():
    _, drive = make_drive()
    reply = await run(drive, "51 00 0000000000 ffff 00", room=4096)
    assert reply.data == hexes("0020 0e 01 01 01 01 20") + bytes(26)
    for cdb in (
        "52 00 00000063 00 ffff 00",
        "52 01 00000001 00 ffff 00",
        "52 02 00000001 00 ffff 00",
    ):
        reply = await run(drive, cdb, room=4096)
        assert reply.data == hexes("0022 01 01 00 04 01 02") + bytes(16) + hexes(
            "00000064 00000063 00000000"
        )


async def test_dvd_structures_belong_to_dvds():
    _, drive = make_drive()
    cdb = "ad 00 00000000 00 00 ffff 00 00"
    assert (await run(drive, cdb, room=4096)).fault == (5, 0x3002)
    drive = big_drive(400_000)
    reply = await run(drive, cdb, room=4096)
    assert reply.data == (hexes("0802 0000 01 0f 01 00 00030000 00091a7f 00000000") + bytes(2032))
    assert (await run(drive, "ad 00 00000000 00 01 ffff 00 00", room=4096)).data == hexes(
        "0006 0000 00000000"
    )
    reply = await run(drive, "ad 00 00000000 00 04 ffff 00 00", room=4096)
    assert reply.data == hexes("08020000") + bytes(2048)
    reply = await run(drive, "ad 00 00000000 00 ff ffff 00 00", room=4096)
    assert reply.data == hexes("000e 0000 00400804 01400008 04400804")
    reply = await run(drive, "ad 00 00000000 01 00 ffff 00 00", room=4096)
    assert reply.pointer == (6, None, True)
    reply = await run(drive, "ad 00 00000000 00 02 ffff 00 00", room=4096)
    assert reply.pointer == (7, None, True)


async def test_speed_and_mechanism():
    _, drive = make_drive()
    reply = await run(drive, "ac 10 00000000 0000 0005 00 00", room=4096)
    assert reply.data == hexes("00000014 00000000 00000000 00001b90 00000063 00001b90")
    reply = await run(drive, "ac 10 00000000 0000 0000 00 00", room=4096)
    assert reply.data == hexes("00000014 00000000")
    reply = await run(drive, "ac 14 00000000 0000 0005 00 00", room=4096)
    assert reply.data == hexes("00000004 02000000")
    reply = await run(drive, "ac 00 00000000 0000 0005 03 00", room=4096)
    assert reply.data == hexes("00000004 00000000")
    assert (await run(drive, "bb" + "00" * 11)).status == 0
    assert (await run(drive, "bd 00 000000000000 0008 00 00", room=64)).data == bytes(8)
    await run(drive, EJECT)
    reply = await run(drive, "bd 00 000000000000 0008 00 00", room=64)
    assert reply.data == hexes("0010000000000000")


CAPABILITIES = "2a14 3b 00 70 00 29 00 1b90 0000 0200 1b90" + "00" * 6


async def test_mode_pages_show_the_lock():
    _, drive = make_drive()
    reply = await run(drive, "5a 00 2a 00 000000 00ff 00", room=255)
    assert reply.data == hexes("001c 00 00 00 00 0000") + hexes(CAPABILITIES)
    reply = await run(drive, "1a 00 3f 00 ff 00", room=255)
    assert reply.data == hexes("31 00 00 00 010a") + bytes(10) + hexes(CAPABILITIES) + hexes(
        "1c0a 08 000000000000000000"
    )
    await run(drive, "1e 00 00 00 01 00")
    reply = await run(drive, "5a 00 2a 00 000000 00ff 00", room=255)
    assert reply.data[14] == 0x2B
    unchanged = reply.data
    select = bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, len(unchanged), 0))
    assert (await run(drive, select, out=unchanged)).status == 0


async def test_the_guest_opens_and_closes_the_tray():
    _, drive = make_drive()
    await run(drive, READY, initiator="other")
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 00 02 00 00")
    for _ in range(2):
        assert (await run(drive, EJECT)).status == 0
    assert (await run(drive, READY)).fault == (2, 0x3A02)
    assert (await run(drive, "28 00 00000000 00 0001 00", room=2048)).fault == (2, 0x3A02)
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 03 01 00 00")
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 00 01 00 00")
    assert (await run(drive, LOAD)).status == 0
    assert (await run(drive, "4a 01 0000 10 0000 0004 00", room=8)).data == hexes("00060410")
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 02 02 00 00")
    for initiator in ("guest", "other"):
        assert (await run(drive, READY, initiator=initiator)).fault == (6, 0x2800)
        assert (await run(drive, READY, initiator=initiator)).status == 0
    for cdb in ("1b 00 00 00 00 00", "1b 00 00 00 01 00", "1b 00 00 00 32 00"):
        assert (await run(drive, cdb)).status == 0
    assert (await run(drive, READY)).status == 0


async def test_event_classes_other_than_media_are_not_available():
    _, drive = make_drive()
    assert (await run(drive, "4a 01 0000 02 0000 0008 00", room=8)).data == hexes("00028010")


async def test_a_locked_tray_stays_closed():
    disk, drive = make_drive()
    await run(drive, "1e 00 00 00 01 00")
    assert (await run(drive, EJECT)).fault == (5, 0x5302)
    assert drive.eject(force=False) is None
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 01 02 00 00")
    assert (await run(drive, READY)).status == 0
    assert drive.eject() is disk
    assert (await run(drive, READY)).fault == (2, 0x3A01)
    assert (await run(drive, "03 00 00 00 12 00", room=18)).data[2] == 2
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 03 00 00 00")
    assert drive.eject() is None
    for cdb in (EJECT, LOAD):  # an empty tray moves, too
        assert (await run(drive, cdb)).status == 0
    assert (await run(drive, GESN, room=8)).data == hexes("0006 04 10 00 00 00 00")


async def test_the_host_changes_the_disc():
    first, drive = make_drive()
    await run(drive, READY)
    second = medium(blocks=MAX_CD_SECTORS // 1000)
    await run(drive, EJECT)
    assert drive.insert(second) is first
    for cdb in (GESN, "46 00 0000 000000 0008 00", "12 00 00 0024 00"):
        assert (await run(drive, cdb, room=64)).status == 0
    assert (await run(drive, "25" + "00" * 9, room=8)).fault == (6, 0x2800)
    assert (await run(drive, "25" + "00" * 9, room=8)).data[:4] == hexes("00000167")
    with pytest.raises(ValueError, match="2048"):
        drive.insert(MemoryDisk())


async def test_a_drive_starts_empty_without_a_disc():
    drive = CdromUnit(luns=list)
    for cdb in (
        READY,
        "25" + "00" * 9,
        "43" + "00" * 9,
        "51" + "00" * 9,
        "52" + "00" * 9,
        "ad" + "00" * 11,
    ):
        assert (await run(drive, cdb, room=64)).fault == (2, 0x3A01)
    reply = await run(drive, "ac 10 00000000 0000 0005 00 00", room=64)
    assert reply.data[8:] == hexes("00000000 00001b90 00000000 00001b90")
    disk = medium()
    assert drive.insert(disk) is None
    assert (await run(drive, READY)).fault == (6, 0x2800)


async def test_reset_and_detach_unlock_the_tray():
    _, drive = make_drive()
    await run(drive, "1e 00 00 00 01 00")
    drive.reset()
    assert (await run(drive, EJECT)).fault == (6, 0x2903)
    assert (await run(drive, EJECT)).status == 0
    await run(drive, LOAD)
    await run(drive, "1e 00 00 00 01 00", initiator="other")
    await run(drive, "1e 00 00 00 01 00", initiator="other")
    drive.detach("other")
    await run(drive, READY)
    assert (await run(drive, EJECT)).status == 0
    drive.close()
    drive.close()


async def test_taking_the_disc_ends_reads_in_progress():
    """Checklist row 24: every command gets its outcome, also after media removal."""
    disk, drive = make_drive()
    disk.inline = False
    disk.pause = trio.Event()
    ends = []

    async def read():
        command, _ = make_command("28 00 00000000 00 0001 00", room=2048)
        ends.append((await drive.execute(command)).status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert drive.eject() is disk
    assert ends == [0x40]

"""INQUIRY, REPORT LUNS, mode pages, logs and the answers for absent units."""

from collections.abc import Sequence
from typing import Any

import pytest

from storvsp.scsi import CdromUnit, DiskUnit, Outcome, absent_unit
from storvsp.scsi.attention import MAX_INITIATORS, MAX_PENDING, Attentions
from storvsp.scsi.sense import REPORTED_LUNS_DATA_HAS_CHANGED, Sense, field_pointer
from storvsp.scsi.target import encode_lun
from storvsp.scsi.unit import fill
from tests.support.scsi import MemoryDisk, Reply, make_command, run
from vmbus.memory import window

IDENTITY = bytes(range(16))


def make_unit(luns: Sequence[int] = (0,), **changes: Any) -> tuple[MemoryDisk, DiskUnit]:
    disk = MemoryDisk(**changes)
    return disk, DiskUnit(disk, luns=lambda: luns, identity=IDENTITY)


def hexes(text: str) -> bytes:
    return bytes.fromhex(text)


async def test_standard_inquiry_data_is_that_of_a_hyper_v_disk():
    _, unit = make_unit()
    reply = await run(unit, "12 00 00 00ff 00", room=255)
    assert reply.data == (
        hexes("00 00 05 12 5b 00 00 02")
        + b"Msft    Virtual Disk    1.0 "
        + bytes(22)
        + hexes("0060 0300 04c0")
        + bytes(32)
    )
    assert (await run(unit, "12 00 00 0024 00", room=36)).data == reply.data[:36]
    assert (await run(unit, "12 00 00 0024 00", room=255)).transferred == 36
    assert (await run(unit, "12 00 00 00ff 00", room=5)).data == reply.data[:5]
    assert (await run(unit, "12 00 00 0000 00", room=255)).transferred == 0
    assert (await run(unit, "12 00 00 00ff 00")).transferred == 0
    _, unit = make_unit(removable=True)
    assert (await run(unit, "12 00 00 00ff 00", room=255)).data[1] == 0x80


async def test_vital_product_data_pages_of_a_plain_disk():
    _, unit = make_unit(serial="S/N 1", identity=b"disk")
    pages = {
        0x00: hexes("00 00 0006 00 80 83 b0 b1 b2"),
        0x80: hexes("00 80 0005") + b"S/N 1",
        0x83: hexes("00 83 0028 02 01 00 10") + b"Msft    6469736B" + hexes("01 03 00 10"),
        0xB0: hexes("00 b0 003c 01 80 0008 00000000 00000000 00000000 00000000")
        + hexes("00000000 00000000 00000000 0000000000200000")
        + bytes(20),
        0xB1: hexes("00 b1 003c 0001") + bytes(58),
        0xB2: hexes("00 b2 0004 00 00 00 00"),
    }
    for code, expected in pages.items():
        reply = await run(unit, bytes((0x12, 1, code, 0, 255, 0)), room=255)
        if code == 0x83:
            assert reply.data[:28] == expected
            assert reply.data[28:].hex().startswith("6002248")
            assert len(reply.data) == 44
        else:
            assert reply.data == expected
        short = await run(unit, bytes((0x12, 1, code, 0, 4, 0)), room=4)
        assert short.data == reply.data[:4]


async def test_vital_product_data_pages_of_a_thin_rotating_disk():
    _, unit = make_unit(
        supports_unmap=True, unmapped_reads_zero=True, unmap_granularity=65536,
        rotational=True, max_transfer=1 << 20, sector_size=4096,
    )  # fmt: skip
    b0 = await run(unit, "12 01 b0 00ff 00", room=255)
    assert b0.data == (
        hexes("00 b0 003c 01 80 0001 00000100 00000000 00000000 ffffffff")
        + hexes("00000100 00000010 80000000 0000000000040000")
        + bytes(20)
    )
    assert (await run(unit, "12 01 b1 00ff 00", room=255)).data[4:6] == hexes("1c20")
    assert (await run(unit, "12 01 b2 00ff 00", room=255)).data == hexes("00b2000400e40200")
    assert (await run(unit, "12 01 80 00ff 00", room=255)).data[4:] == IDENTITY.hex().encode()
    _, unit = make_unit(supports_unmap=True)
    assert (await run(unit, "12 01 b2 00ff 00", room=255)).data == hexes("00b2000400e00200")
    assert (await run(unit, "12 01 b0 00ff 00", room=255)).data[32:36] == bytes(4)


async def test_all_other_pages_are_refused():
    _, unit = make_unit()
    for code in set(range(256)) - {0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2}:
        reply = await run(unit, bytes((0x12, 1, code, 0, 255, 0)), room=255)
        assert (reply.fault, reply.pointer) == ((5, 0x2400), (2, None, True))
    assert (await run(unit, "12 00 80 00ff 00", room=255)).pointer == (2, None, True)
    assert (await run(unit, "12 02 00 00ff 00", room=255)).pointer == (1, 1, True)


async def test_different_identities_have_different_names_and_the_same_one_keeps_its_name():
    names = set()
    for identity in (b"", b"", b"a", b"b", bytes(16), IDENTITY):
        unit = DiskUnit(MemoryDisk(identity=identity), luns=list)
        names.add((await run(unit, "12 01 83 00ff 00", room=255)).data[28:])
    assert len(names) == 6
    again = DiskUnit(MemoryDisk(identity=IDENTITY), luns=list)
    assert (await run(again, "12 01 83 00ff 00", room=255)).data[28:] in names


async def test_report_luns_lists_all_units():
    """Checklist row 21: also with allocation length 0, as UEFI firmware sends it."""
    _, unit = make_unit(luns=[300, 0, 2, 2])
    listed = hexes("00000018 00000000 0000000000000000 0002000000000000 412c000000000000")
    for cdb in (
        "a0 00 00 000000 00001000 00 00",
        "a0 00 02 000000 00001000 00 00",
        "a0 00 00 000000 00000000 00 00",
    ):
        assert (await run(unit, cdb, room=4096)).data == listed
    assert (await run(unit, "a0 00 00 000000 00000010 00 00", room=4096)).data == listed[:16]
    assert (await run(unit, "a0 00 00 000000 00000007 00 00", room=4096)).data == listed[:7]
    for select in (0x01, 0x10, 0x11, 0x12):
        short = bytes((0xA0, 0, select, 0, 0, 0, 0, 0, 0, 255, 0, 0))
        assert (await run(unit, short, room=4096)).data == bytes(8)
    assert (await run(unit, "a0 00 03 000000 00001000 00 00", room=16)).pointer == (2, None, True)
    assert (await run(unit, "a0 00 00 000000 00000000 00 00")).transferred == 0


def test_luns_are_encoded_by_size():
    assert encode_lun(255) == hexes("00ff000000000000")
    assert encode_lun(0x3FFF) == hexes("7fff000000000000")
    for bad in (-1, 0x4000):
        with pytest.raises(ValueError, match="LUN"):
            encode_lun(bad)


def answer_absent(
    cdb: str | bytes, luns: Sequence[int] = (), **keywords: Any
) -> tuple[Outcome, bytes]:
    command, buffer = make_command(cdb, **keywords)
    outcome = absent_unit(command, luns)
    assert outcome is not None
    return outcome, bytes(buffer)


def test_an_absent_unit_answers_inquiry_with_7f():
    """Checklist row 21."""
    outcome, buffer = answer_absent("12 00 00 0024 00", room=255)
    assert outcome == (0, b"", 36)
    assert buffer[:36] == hexes("7f 00 05 02 1f") + bytes(31)
    outcome, buffer = answer_absent("12 01 83 00ff 00", room=255)
    assert outcome == (0, b"", 4)
    assert buffer[:4] == hexes("7f830000")
    assert answer_absent("12 00 00 0000 00", room=255)[0] == (0, b"", 0)
    assert answer_absent("12 00 00 00ff 00", room=5)[0] == (0, b"", 5)
    assert answer_absent("12 00 00")[0].status == 2
    assert answer_absent("12 00 00 00ff 00", out=bytes(255))[0].status == 2


def test_report_luns_is_good_for_an_absent_unit():
    """Checklist row 21: every target answers, an empty one with an empty list."""
    outcome, buffer = answer_absent("a0" + "00" * 11, room=64)
    assert (outcome, buffer[:8]) == ((0, b"", 8), bytes(8))
    outcome, buffer = answer_absent("a0" + "00" * 11, luns=[1], room=64)
    assert (outcome, buffer[:16]) == ((0, b"", 16), hexes("0000000800000000 0001000000000000"))
    assert answer_absent("a0 00 00")[0].status == 2


def test_everything_else_at_an_absent_unit_is_left_to_the_controller():
    """Checklist row 21: the controller answers INVALID_LUN."""
    for opcode in set(range(256)) - {0x12, 0xA0}:
        command, _ = make_command(bytes([opcode]) + bytes(15), room=64)
        assert absent_unit(command, [0]) is None
    command, _ = make_command("")
    assert absent_unit(command, [0]) is None


PAGES = {
    0x01: "010a c0 00 00 00 00 00 00 00 00 00",
    0x08: "0812 04 00" + "00" * 16,
    0x0A: "0a0a 02 10 00 40 00 00 ff ff 00 00",
    0x1C: "1c0a 08" + "00" * 9,
}
MASKS = {
    0x01: "010a" + "00" * 10,
    0x08: "0812 04" + "00" * 17,
    0x0A: "0a0a 00 00 08" + "00" * 7,
    0x1C: "1c0a" + "00" * 10,
}


@pytest.mark.parametrize("code", PAGES)
async def test_mode_pages_have_current_changeable_and_default_values(code):
    _, unit = make_unit()
    for control, values in ((0, PAGES), (1, MASKS), (2, PAGES)):
        page = hexes(values[code])
        cdb = bytes((0x1A, 8, control << 6 | code, 0, 255, 0))
        reply = await run(unit, cdb, room=255)
        assert reply.data == bytes((3 + len(page), 0, 0x10, 0)) + page
        cdb = bytes((0x5A, 8, control << 6 | code, 0, 0, 0, 0, 0, 255, 0))
        reply = await run(unit, cdb, room=255)
        assert reply.data == bytes((0, 6 + len(page), 0, 0x10, 0, 0, 0, 0)) + page
    saved = bytes((0x1A, 8, 0xC0 | code, 0, 255, 0))
    assert (await run(unit, saved, room=255)).fault == (5, 0x3900)


async def test_all_mode_pages_come_at_once_with_a_block_descriptor():
    _, unit = make_unit()
    pages = b"".join(hexes(page) for page in PAGES.values())
    for cdb in ("1a 00 3f 00 ff 00", "1a 00 3f ff ff 00"):
        reply = await run(unit, cdb, room=255)
        assert reply.data == hexes("43 00 10 08 00000080 00000200") + pages
    reply = await run(unit, "5a 10 3f 00 000000 00ff 00", room=255)
    assert reply.data == hexes("004e 00 10 01 00 0010 0000000000000080 0000000000000200") + pages
    assert (await run(unit, "1a 00 3f 00 04 00", room=4)).data == hexes("43001008")
    _, unit = make_unit(read_only=True)
    assert (await run(unit, "1a 00 3f 00 04 00", room=4)).data == hexes("43009008")
    unit.blocks = 1 << 40
    assert (await run(unit, "1a 00 3f 00 ff 00", room=255)).data[4:8] == b"\xff" * 4


@pytest.mark.parametrize(("cdb", "pointer"), [
    ("1a 00 02 00 ff 00", (2, 5, True)),
    ("1a 00 3f 01 ff 00", (3, None, True)),
    ("1a 00 08 01 ff 00", (3, None, True)),
    ("15 01 00 00 0c 00", (1, 0, True)),
    ("15 00 00 00 0c 00", (1, 4, True)),
])  # fmt: skip
async def test_mode_commands_name_the_field_they_refuse(cdb, pointer):
    _, unit = make_unit()
    assert (await run(unit, cdb, out=bytes(12) if cdb[:2] == "15" else None)).pointer == pointer


def select(parameters: bytes, long: bool = False) -> bytes:
    size = len(parameters)
    if long:
        return bytes((0x55, 0x10, 0, 0, 0, 0, 0)) + size.to_bytes(2, "big") + b"\0"
    return bytes((0x15, 0x10, 0, 0, size, 0))


async def change(unit: DiskUnit, text: str, long: bool = False, **keywords: Any) -> Reply:
    parameters = hexes(text)
    return await run(unit, select(parameters, long), out=parameters, **keywords)


WCE_OFF = PAGES[0x08].replace("12 04", "12 00")
PROTECT = PAGES[0x0A].replace("10 00 40", "10 08 40")


async def test_the_write_cache_can_be_turned_off_and_on():
    disk, unit = make_unit()
    await run(unit, "00" * 6, initiator="other")
    reply = await change(unit, "00000000" + WCE_OFF)
    assert (reply.status, reply.transferred) == (0, 24)
    assert (await run(unit, "00" * 6, initiator="other")).fault == (6, 0x2A01)
    assert (await run(unit, "1a 08 08 00 ff 00", room=255)).data[4:] == hexes(WCE_OFF)
    assert (await run(unit, "1a 08 88 00 ff 00", room=255)).data[4:] == hexes(PAGES[0x08])
    for _ in range(2):
        await run(unit, "2a 00 00000000 00 0001 00", out=bytes(512))
    await run(unit, "aa 00 00000000 00000001 00 00", out=bytes(512))
    disk.inline = False
    await run(unit, "2a 00 00000000 00 0001 00", out=bytes(512))
    assert disk.calls == ["write fua"] * 4
    disk.calls.clear()
    await run(unit, "93 01 0000000000000000 00000001 00 00")
    assert disk.calls == ["zeroes", "write", "flush"]
    assert (await change(unit, "0000000000000000" + PAGES[0x08], long=True)).status == 0
    disk.calls.clear()
    await run(unit, "2a 00 00000000 00 0001 00", out=bytes(512))
    assert disk.calls == ["write"]


async def test_a_disk_without_a_cache_keeps_it_off():
    _, unit = make_unit(write_cache=False)
    assert (await run(unit, "1a 08 08 00 ff 00", room=255)).data[6] == 0
    assert (await run(unit, "1a 08 48 00 ff 00", room=255)).data[6] == 0
    reply = await change(unit, "00000000" + PAGES[0x08])
    assert (reply.fault, reply.pointer) == ((5, 0x2600), (6, 2, False))


async def test_software_write_protection_stops_writes_until_a_reset():
    disk, unit = make_unit()
    write = "2a 00 00000000 00 0001 00"
    assert (await run(unit, write, out=bytes(512))).status == 0
    assert (await change(unit, "00000008" + "0000008000000200" + PROTECT)).status == 0
    for _ in range(2):
        assert (await run(unit, write, out=bytes(512))).fault == (7, 0x2702)
    assert (await run(unit, "1a 00 3f 00 04 00", room=4)).data[2] == 0x90
    assert (await run(unit, "28 00 00000000 00 0001 00", room=512)).status == 0
    unit.reset()
    assert (await run(unit, write, out=bytes(512))).fault == (6, 0x2903)
    assert (await run(unit, write, out=bytes(512))).status == 0
    assert disk.calls.count("write") == 2


@pytest.mark.parametrize(("text", "long", "fault", "pointer"), [
    ("000000", False, 0x1A00, None),
    ("00000000000000", True, 0x1A00, None),
    ("00000008 00000000", False, 0x1A00, None),
    ("00000004 00000000", False, 0x2600, (3, None, False)),
    ("0000000000000007 00000000000000", True, 0x2600, (6, None, False)),
    ("00000008 0000000000001000", False, 0x2600, (9, None, False)),
    ("0000000001000010 00000000000000000000000000001000", True, 0x2600, (20, None, False)),
    ("00000000 08", False, 0x1A00, None),
    ("00000000 4801 000000", False, 0x2600, (4, 6, False)),
    ("00000000 0200", False, 0x2600, (4, 5, False)),
    ("00000000 0811" + "00" * 18, False, 0x2600, (5, None, False)),
    ("00000000 081204" + "00" * 16, False, 0x1A00, None),
    ("00000000 0812 04 10" + "00" * 16, False, 0x2600, (7, 4, False)),
    ("00000000" + WCE_OFF + "0a0a" + "00" * 10, False, 0x2600, (26, 1, False)),
])  # fmt: skip
async def test_mode_select_changes_all_or_nothing(text, long, fault, pointer):
    _, unit = make_unit()
    reply = await change(unit, text, long)
    assert reply.fault == (5, fault)
    if pointer:
        assert reply.pointer == pointer
    reply = await run(unit, "1a 08 3f 00 ff 00", room=255)
    assert reply.data[4:] == b"".join(map(hexes, PAGES.values()))


async def test_mode_select_accepts_what_is_already_so_and_an_empty_list():
    _, unit = make_unit()
    await run(unit, "00" * 6, initiator="other")
    everything = "".join(PAGES.values())
    for head in ("00000000", "00000008 00000080 00000200", "00000008 00000000 00000000"):
        assert (await change(unit, head + everything)).status == 0
    wide = "0000000001000010 0000000000000080 0000000000000200"
    assert (await change(unit, wide + everything, long=True)).status == 0
    assert (await run(unit, "15 10 00 00 00 00")).status == 0
    assert (await run(unit, "55 10" + "00" * 8)).status == 0
    assert (await run(unit, "00" * 6, initiator="other")).status == 0
    assert (await run(unit, "15 10 00 00 ff 00", out=bytes(12))).fault == (5, 0x1A00)
    assert (await run(unit, "15 10 00 00 0c 00", room=12)).fault == (5, 0x2400)


async def test_the_log_lists_itself():
    _, unit = make_unit()
    for cdb in ("4d 00 40 00 00 0000 00ff 00", "4d 00 00 00 00 0000 00ff 00"):
        assert (await run(unit, cdb, room=255)).data == bytes((0, 0, 0, 1, 0))
    for cdb, pointer in (
        ("4d 01", (1, 0, True)),
        ("4d 00 42", (2, 5, True)),
        ("4d 00 40 01", (3, None, True)),
    ):
        full = bytes.fromhex(cdb).ljust(10, b"\0")
        assert (await run(unit, full, room=255)).pointer == pointer


async def test_the_self_test_passes_and_nothing_else_is_diagnosed():
    _, unit = make_unit()
    assert (await run(unit, "1d 04 00 0000 00")).status == 0
    assert (await run(unit, "1d 20 00 0000 00")).pointer == (1, 7, True)
    assert (await run(unit, "1d 10 00 0008 00", out=bytes(8))).pointer == (3, None, True)


async def test_request_sense_tells_and_settles_a_unit_attention():
    disk, unit = make_unit()
    nothing = hexes("70 00 00 00000000 0a 00000000 00 00 00 000000")
    assert (await run(unit, "03 00 00 00 ff 00", room=255)).data == nothing
    assert (await run(unit, "03 01 00 00 ff 00", room=255)).data == hexes("7200000000000000")
    disk.resize(200)
    reply = await run(unit, "03 00 00 00 ff 00", room=255)
    assert reply.data == hexes("70 00 06 00000000 0a 00000000 2a 09 00 000000")
    assert (await run(unit, "00" * 6)).status == 0
    disk.resize(100)
    reply = await run(unit, "03 01 00 00 ff 00", room=255)
    assert reply.data == hexes("72062a0900000000")
    assert (await run(unit, "03 00 00 00 04 00", room=255)).data == nothing[:4]


async def test_report_luns_settles_the_attention_that_it_has_changed():
    _, unit = make_unit()
    await run(unit, "00" * 6)
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    assert (await run(unit, "12 00 00 0024 00", room=36)).status == 0
    assert (await run(unit, "a0" + "00" * 11, room=64)).status == 0
    assert (await run(unit, "00" * 6)).status == 0
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    assert (await run(unit, "00" * 6)).fault == (6, 0x3F0E)
    assert (await run(unit, "00" * 6)).status == 0


async def test_attentions_come_before_everything_wrong_with_the_command():
    _, unit = make_unit()
    for cdb in ("ff" + "00" * 9, "9e 1f" + "00" * 14, "28 20" + "00" * 8):
        await run(unit, "00" * 6)
        unit.raise_attention(0x3F0E)
        assert (await run(unit, cdb)).fault == (6, 0x3F0E)
        assert (await run(unit, cdb)).fault[0] == 5


def test_attentions_are_bounded_and_a_reset_supersedes_them():
    attentions = Attentions()
    for number in range(MAX_INITIATORS + 5):
        assert attentions.know(number)
    assert not attentions.know(MAX_INITIATORS)
    assert list(attentions) == list(range(5, MAX_INITIATORS + 5))
    attentions.add(0, 0x2A09)  # forgotten
    assert attentions.pop(0) is None
    for code in range(MAX_PENDING + 10):
        attentions.add(7, code)
    attentions.clear(7, 3)
    attentions.clear(7, 0xFFFF)
    attentions.clear(8, 3)
    assert [attentions.pop(7) for _ in range(MAX_PENDING - 1)] == [
        code for code in range(MAX_PENDING) if code != 3
    ]
    assert not attentions.pending(7)
    attentions.add(7, 0x2A09)
    attentions.add_all(0x2903, but=8)
    assert attentions.pop(7) == 0x2903
    assert attentions.pop(7) is None
    assert not attentions.pending(8)
    attentions.forget(7)
    attentions.forget(7)
    assert 7 not in list(attentions)


async def test_a_detached_initiator_is_not_told():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.resize(10)
    unit.detach("guest")
    assert (await run(unit, "00" * 6)).status == 0


def codes(data: bytes) -> set[tuple[int, int | None]]:
    return {
        (data[at], int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 5] & 1 else None)
        for at in range(4, len(data), 8)
    }


async def test_supported_operation_codes_are_those_that_work():
    for thin in (False, True):
        _, unit = make_unit(supports_unmap=thin)
        reply = await run(unit, "a3 0c 00 00 0000 00002000 00 00", room=8192)
        assert int.from_bytes(reply.data[:4], "big") == len(reply.data) - 4
        supported = codes(reply.data)
        assert ((0x42, None) in supported) == thin
        assert {(0x9E, 0x10), (0xA3, 0x0C), (0x28, None), (0x5F, 6)} <= supported
        plain = {code for code, action in supported if action is None}
        for opcode in range(256):
            if opcode in {code for code, action in supported if action is not None}:
                continue
            reply = await run(unit, bytes([opcode]) + bytes(15), room=64)
            refused = reply.status == 2 and reply.fault == (5, 0x2000)
            assert refused == (opcode not in plain), hex(opcode)
        reply = await run(unit, "ff" + "00" * 15)
        assert reply.pointer == (0, None, True)


async def test_unknown_service_actions_are_refused_by_name():
    _, unit = make_unit()
    for opcode, known in (
        (0x9E, {0x10, 0x12}),
        (0xA3, {0x0C, 0x0D}),
        (0x5E, range(4)),
        (0x5F, range(7)),
    ):
        for action in set(range(32)) - set(known):
            reply = await run(unit, bytes((opcode, action)) + bytes(14))
            assert (reply.fault, reply.pointer) == ((5, 0x2400), (1, 4, True))
    assert (await run(unit, "9e")).pointer == (1, None, True)


async def test_one_operation_code_is_described_with_its_bits():
    _, unit = make_unit()

    async def ask(options: int, opcode: int, action: int = 0) -> Reply:
        cdb = bytes((0xA3, 0x0C, options, opcode, 0, action, 0, 0, 1, 0, 0, 0))
        return await run(unit, cdb, room=256)

    read = hexes("28f9ffffffff00ffff04")
    assert (await ask(1, 0x28)).data == hexes("0003000a") + read
    assert (await ask(3, 0x28)).data == hexes("0003000a") + read
    timeouts = hexes("000a 00 00 00000000 00000000")
    assert (await ask(0x81, 0x28)).data == hexes("0083000a") + read + timeouts
    long = hexes("9e1fffffffffffffffffffffffff0104")
    assert (await ask(2, 0x9E, 0x10)).data == hexes("00030010") + long
    assert (await ask(3, 0x9E, 0x10)).data == hexes("00030010") + long
    for options, opcode, action in (
        (1, 0xFF, 0),
        (2, 0xFF, 0),
        (3, 0x28, 1),
        (2, 0x9E, 0),
        (3, 0x9E, 0x1F),
    ):
        assert (await ask(options, opcode, action)).data == hexes("00010000")
    for options, opcode in ((1, 0x9E), (2, 0x28), (4, 0), (7, 0)):
        assert (await ask(options, opcode)).pointer == (2, 2, True)
    reply = await run(unit, "a3 0c 80 00 0000 00002000 00 00", room=8192)
    assert (len(reply.data) - 4) % 20 == 0
    assert reply.data[4:24] == hexes("00 00 0000 00 02 0006") + timeouts


async def test_task_management_functions_are_reported():
    _, unit = make_unit()
    assert (await run(unit, "a3 0d 00 00 0000 00000004 00 00", room=64)).data == hexes("08000000")
    reply = await run(unit, "a3 0d 80 00 0000 00000010 00 00", room=64)
    assert reply.data == hexes("0800000c") + bytes(12)


def test_sense_data_has_its_fixed_and_descriptor_form():
    sense = Sense(0x5, 0x2400, 0x11223344, field_pointer(7, 3, in_cdb=True))
    assert sense.fixed() == hexes("f0 00 05 11223344 0a 00000000 24 00 00 cb0007")
    assert sense.descriptors() == hexes(
        "72 05 24 00 000000 14 000a8000 0000000011223344 02060000 cb0007 00"
    )
    big = Sense(0x3, 0x1100, 1 << 40)
    assert big.fixed() == hexes("70 00 03 00000000 0a 00000000 11 00 00 000000")
    assert big.descriptors() == hexes("72 03 11 00 000000 0c 000a8000 0000010000000000")
    assert field_pointer(0x1234, in_cdb=False) == hexes("801234")


def test_windows_cut_scatter_lists_anywhere():
    buffer = memoryview(bytearray(range(30)))
    data = [buffer[:10], buffer[10:10], buffer[10:11], buffer[11:]]
    for start in range(32):
        for length in range(32):
            pieces = window(data, start, length)
            assert b"".join(pieces) == bytes(range(30))[start : start + length]


def test_parameter_data_needs_a_buffer_that_points_to_the_guest():
    command, buffer = make_command(bytes(6), room=10, pieces=(3,))
    assert fill(command, b"abcdefghijkl", 8) == (0, b"", 8)
    assert buffer == b"abcdefgh\0\0"
    command, _ = make_command(bytes(6))
    assert fill(command, b"abc", 8) == (0, b"", 0)


async def test_parameter_data_into_an_outgoing_buffer_is_refused():
    disk, unit = make_unit()
    reply = await run(unit, "12 00 00 0024 00", out=b"x" * 36)
    assert (reply.fault, reply.buffer) == ((5, 0x2400), b"x" * 36)
    drive = CdromUnit(luns=list)
    assert (await run(drive, "12 00 00 0024 00", out=b"x" * 36)).fault == (5, 0x2400)
    assert disk.calls == []

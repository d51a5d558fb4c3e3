"""Mode pages: what they say, and what of it a guest can change."""

from typing import Any

import pytest

from storvsp.scsi import DiskUnit
from tests.support.scsi import Reply, hexes, make_unit, run

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

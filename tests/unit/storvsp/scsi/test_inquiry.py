"""INQUIRY and its pages."""

from storvsp.scsi import DiskUnit
from tests.support.scsi import IDENTITY, MemoryDisk, hexes, make_unit, run


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

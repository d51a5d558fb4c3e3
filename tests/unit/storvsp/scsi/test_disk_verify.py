"""VERIFY, WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE, and what happens beside them."""

import os
from functools import partial

import pytest
import trio

from storvsp.disk import MediumError
from storvsp.scsi import DiskUnit
from storvsp.scsi.disk_verify import first_difference
from tests.support.patience import waits
from tests.support.scsi import MemoryDisk, run
from tests.support.scsi_verify import CAW, make_unit, verify


@pytest.mark.parametrize("size", [10, 12, 16])
async def test_verify_without_data_reads_the_medium(size):
    disk, unit = make_unit()
    assert (await run(unit, verify(0)[size])).status == 0
    assert disk.calls == ["read"]
    disk.fail = MediumError("bad", offset=1536)
    reply = await run(unit, verify(0)[size])
    assert (reply.fault, reply.information) == ((3, 0x1100), 3)


@pytest.mark.parametrize("size", [10, 12, 16])
async def test_verify_compares_with_the_guests_data(size):
    disk, unit = make_unit()
    good = bytes(disk.data[1536:2560])
    reply = await run(unit, verify(1)[size], out=good, pieces=(5, 700))
    assert (reply.status, reply.transferred) == (0, 1024)
    bad = bytearray(good)
    bad[700] ^= 1
    reply = await run(unit, verify(1)[size], out=bytes(bad))
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 4)


async def test_verify_compares_every_block_with_one():
    disk, unit = make_unit()
    disk.data[1536:3072] = b"abcd" * 384
    reply = await run(unit, verify(3, 3)[16], out=b"abcd" * 128)
    assert (reply.status, reply.transferred) == (0, 512)
    disk.data[3071] = 0
    reply = await run(unit, verify(3, 3)[16], out=b"abcd" * 128)
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 5)


async def test_verify_works_in_pieces_the_back_end_takes():
    disk, unit = make_unit(max_transfer=1024)
    disk.data[:] = b"q" * len(disk.data)
    for check, size in ((0, 0), (1, 5 * 512), (3, 512)):
        disk.calls.clear()
        assert (await run(unit, verify(check, 5)[10], out=b"q" * size)).status == 0
        assert disk.calls == ["read"] * 3
    disk.data[7 * 512] = 0
    reply = await run(unit, verify(1, 5)[10], out=b"q" * 2560)
    assert reply.information == 7


async def test_verify_refuses_what_it_cannot_do():
    _, unit = make_unit()
    assert (await run(unit, verify(2)[10])).pointer == (1, 2, True)
    reply = await run(unit, verify(1)[10], out=bytes(1023))
    assert reply.pointer == (7, None, True)
    assert (await run(unit, verify(3)[10], room=512)).fault == (5, 0x2400)
    assert (await run(unit, "2f 20 00000000 00 0001 00")).pointer == (1, 7, True)


@pytest.mark.parametrize("check", [0, 2])
@pytest.mark.parametrize(
    "cdb",
    [
        "2e {:02x} 00000003 00 0005 00",
        "ae {:02x} 00000003 00000005 00 00",
        "8e {:02x} 0000000000000003 00000005 00 00",
    ],
)
async def test_write_and_verify_writes_durably_and_reads_back(cdb, check):
    disk, unit = make_unit(max_transfer=1024)
    payload = os.urandom(2560)
    reply = await run(unit, cdb.format(check), out=payload, pieces=(3, 1400))
    assert (reply.status, reply.transferred) == (0, 2560)
    assert disk.data[1536:4096] == payload
    assert disk.calls == ["write fua", "read"] * 3


async def test_write_and_verify_notices_a_lying_medium():
    class Liar(MemoryDisk):
        def _write(self, offset, buffers, fua):
            super()._write(offset, buffers, fua)
            self.data[offset] ^= 0xFF

    disk = Liar()
    unit = DiskUnit(disk, luns=lambda: [0])
    assert (await run(unit, "2e 00 00000003 00 0001 00", out=bytes(512))).status == 0
    reply = await run(unit, "2e 02 00000003 00 0001 00", out=bytes(512))
    assert (reply.fault, reply.information) == ((0xE, 0x1D00), 3)
    assert (await run(unit, "2e 04 00000003 00 0001 00", out=bytes(512))).pointer == (1, 2, True)
    assert (await run(unit, "2e 00 00000003 00 0001 00", out=bytes(1))).fault == (5, 0x2400)


async def test_compare_and_write_writes_only_if_equal():
    disk, unit = make_unit()
    old, new = bytes(disk.data[1536:2560]), os.urandom(1024)
    reply = await run(unit, CAW, out=old + new, pieces=(1, 1023))
    assert (reply.status, reply.transferred) == (0, 2048)
    assert disk.data[1536:2560] == new
    expected = bytearray(new)
    expected[777] ^= 0x80
    reply = await run(unit, CAW, out=bytes(expected) + old)
    assert (reply.fault, reply.information, reply.transferred) == ((0xE, 0x1D00), 777, 0)
    assert disk.data[1536:2560] == new
    disk.calls.clear()
    await run(unit, CAW.replace("89 00", "89 08"), out=new + old)
    assert disk.calls == ["read", "write fua"]


async def test_compare_and_write_refuses_data_that_does_not_fit_and_too_many_blocks():
    """``iscsi-test-cu``: CompareAndWrite.InvalidDataOutSize."""
    disk, unit = make_unit(blocks=1024)
    for size in (2047, 4096):
        assert (await run(unit, CAW, out=bytes(size))).pointer == (13, None, True)
    reply = await run(unit, "89 00 0000000000000003 000000 81 00 00", out=bytes(0x81 * 1024))
    assert reply.pointer == (13, None, True)
    assert (await run(unit, "89 00 00000000000003ff 000000 02 00 00")).fault == (5, 0x2100)
    assert disk.calls == []


async def test_compare_and_write_of_no_blocks_is_one_without_data():
    """``iscsi-test-cu``: CompareAndWrite.Simple sends 256 blocks, which its CDB makes 0 of."""
    disk, unit = make_unit()
    none = CAW.replace("000000 02", "000000 00")
    assert (await run(unit, none)).status == 0
    assert (await run(unit, none, out=bytes(512 * 512))).pointer == (13, None, True)
    assert disk.calls == []


async def test_orwrite_sets_bits():
    disk, unit = make_unit(max_transfer=1024)
    before = bytes(disk.data[1536:4096])
    bits = os.urandom(2560)
    reply = await run(unit, "8b 08 0000000000000003 00000005 00 00", out=bits)
    assert (reply.status, reply.transferred) == (0, 2560)
    assert disk.data[1536:4096] == bytes(a | b for a, b in zip(before, bits, strict=True))
    assert set(disk.calls) == {"read", "write fua"}


def test_the_first_difference_is_found():
    assert first_difference(b"", b"") is None
    for size in (1, 2, 3, 512, 1000):
        for at in {0, 1, size // 2, size - 1} & set(range(size)):
            left, right = bytearray(size), bytearray(size)
            right[at] = 1
            right[-1] |= 2
            assert first_difference(left, right) == at


async def test_what_is_alone_on_the_medium_does_not_wait_for_what_is_at_hand():
    """Everybody else waits for it meanwhile."""
    disk, unit = make_unit()
    disk.pause = trio.Event()  # nothing that waits would come back
    old = bytes(disk.data[1536:2560])
    for cdb, data in ((CAW, old * 2), (f"8b 00 {3:016x} {2:08x} 00 00", old)):
        assert not await waits(partial(run, unit, cdb, out=data))
    assert disk.data[1536:2560] == old

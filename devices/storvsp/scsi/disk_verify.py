"""Commands that compare: VERIFY, WRITE AND VERIFY, COMPARE AND WRITE; and ORWRITE.

The guest's data is copied before it is looked at, because a comparison against pages that the
guest may change meanwhile would mean nothing. Long ranges are worked on in pieces with a checkpoint
between them: a back-end in memory never waits, and one guest must not stop the others.
"""

from __future__ import annotations

from typing import Final

from storvsp.scsi import cdb as op, sense
from storvsp.scsi.disk_core import CHUNK, DiskCore
from storvsp.scsi.inquiry import MAX_COMPARE_AND_WRITE
from storvsp.scsi.pace import step
from storvsp.scsi.sense import CheckCondition, Sense, invalid_cdb_field
from storvsp.scsi.table import Access, Spec, usage
from storvsp.scsi.unit import STATUS_GOOD, Command, Outcome, take
from vmbus.memory import Cutter


def first_difference(left: bytes | bytearray, right: bytes | bytearray) -> int | None:
    """Return the index of the first byte in which two equally long strings differ, or None."""
    if left == right:
        return None
    low, high = 0, len(left)  # the prefix of `low` bytes is equal, that of `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _miscompare(information: int) -> CheckCondition:
    return CheckCondition(
        Sense(sense.MISCOMPARE, sense.MISCOMPARE_DURING_VERIFY, information=information)
    )


async def _compare(unit: DiskCore, offset: int, expected: bytes, scratch: bytearray) -> None:
    """Read the medium at byte ``offset`` and compare; MISCOMPARE names the first wrong block."""
    with memoryview(scratch)[: len(expected)] as part:
        await unit.read(offset, [part])
        at = first_difference(part.tobytes(), expected)
    if at is not None:
        raise _miscompare((offset + at) // unit.sector_size)


async def verify(unit: DiskCore, command: Command) -> Outcome:
    """VERIFY(10), (12) and (16), SBC-3 5.24 to 5.27.

    BYTCHK 0 reads the medium, 1 compares it with the guest's data, 3 compares every block with
    the one block the guest sends.
    """
    transfer = unit.range_untrusted(command, writing=False)
    check = transfer.flags >> 1 & 3
    sector = unit.sector_size
    size = transfer.blocks * sector
    moved = 0
    if check == 2:
        raise invalid_cdb_field(1, 2)
    if check and size:
        moved = size if check == 1 else sector
        unit.data_out_untrusted(command, moved, transfer.count_byte)
    chunk = min(unit.chunk, size)
    async with unit.bulk(command):
        pattern = b""
        if check == 3 and size:
            pattern = take(command, sector) * (chunk // sector)
        scratch = bytearray(chunk)
        data = Cutter(command.data)
        for at in range(0, size, max(chunk, 1)):
            await step()
            length = min(chunk, size - at)
            offset = transfer.lba * sector + at
            if not check:
                with memoryview(scratch)[:length] as part:
                    await unit.read(offset, [part])
            else:
                expected = b"".join(data.take(length)) if check == 1 else pattern[:length]
                await _compare(unit, offset, expected, scratch)
    return Outcome(STATUS_GOOD, b"", moved)


async def write_and_verify(unit: DiskCore, command: Command) -> Outcome:
    """WRITE AND VERIFY(10), (12) and (16), SBC-3 5.37 to 5.40.

    What is compared with BYTCHK 1 is what was written: a private copy of the guest's data. The
    data is durable before it is verified, as if the medium itself were read.
    """
    transfer = unit.range_untrusted(command, writing=True)
    check = transfer.flags >> 1 & 3
    if check > 1:
        raise invalid_cdb_field(1, 2)
    sector = unit.sector_size
    size = transfer.blocks * sector
    unit.data_out_untrusted(command, size, transfer.count_byte)
    chunk = min(unit.chunk, size)
    async with unit.bulk(command):
        scratch = bytearray(chunk)
        data = Cutter(command.data)
        for at in range(0, size, max(chunk, 1)):
            await step()
            offset = transfer.lba * sector + at
            copy = b"".join(data.take(min(chunk, size - at)))
            await unit.write(offset, [memoryview(copy)], fua=True)
            if check:
                await _compare(unit, offset, copy, scratch)
            else:
                await unit.read(offset, [memoryview(scratch)[: len(copy)]])
    return Outcome(STATUS_GOOD, b"", size)


async def compare_and_write(unit: DiskCore, command: Command) -> Outcome:
    """COMPARE AND WRITE, SBC-3 5.2; alone on its part of the medium while it runs.

    INFORMATION of a miscompare is the offset of the first differing byte in the data-out buffer.
    """
    transfer = unit.range_untrusted(command, writing=True)
    if transfer.blocks > MAX_COMPARE_AND_WRITE:
        raise invalid_cdb_field(13)
    size = transfer.blocks * unit.sector_size
    # With more data the halves are not where the guest believes. That is so with 0 blocks, too:
    # 256 of them do not fit the field, and doing nothing is not what such a guest asked for.
    if command.length != 2 * size:
        raise invalid_cdb_field(13)
    if not size:
        return Outcome(STATUS_GOOD, b"", 0)
    data = take(command, 2 * size)
    offset = transfer.lba * unit.sector_size
    found = bytearray(size)
    async with unit.disk.together():
        # Everybody waits for it, so if it need not wait itself, it does not.
        await unit.read(offset, [memoryview(found)], tried=False)
        at = first_difference(found, data[:size])
        if at is not None:
            raise _miscompare(at)
        await unit.write(offset, [memoryview(data)[size:]], fua=transfer.fua, tried=False)
    return Outcome(STATUS_GOOD, b"", 2 * size)


async def orwrite(unit: DiskCore, command: Command) -> Outcome:
    """ORWRITE(16), SBC-3 5.4: sets bits on the medium; alone on its part while it runs."""
    transfer = unit.range_untrusted(command, writing=True)
    sector = unit.sector_size
    size = transfer.blocks * sector
    unit.data_out_untrusted(command, size, transfer.count_byte)
    chunk = min(unit.chunk, CHUNK)
    data = Cutter(command.data)
    for at in range(0, size, chunk):
        await step()
        length = min(chunk, size - at)
        offset = transfer.lba * sector + at
        bits = int.from_bytes(b"".join(data.take(length)), "little")
        found = bytearray(length)
        async with unit.disk.together():  # a pause in between would let others write
            await unit.read(offset, [memoryview(found)], tried=False)
            result = (int.from_bytes(found, "little") | bits).to_bytes(length, "little")
            await unit.write(offset, [memoryview(result)], fua=transfer.fua, tried=False)
    return Outcome(STATUS_GOOD, b"", size)


_LONG = "ffffffffffffffff ffffffff 00 04"

COMMANDS: Final = (
    Spec(
        op.WRITE_AND_VERIFY_10,
        usage("2e f7 ffffffff 00 ffff 04"),
        Access.WRITE,
        slow=write_and_verify,
        ranged=True,
    ),
    Spec(op.VERIFY_10, usage("2f f7 ffffffff 00 ffff 04"), Access.READ, slow=verify, ranged=True),
    Spec(
        op.COMPARE_AND_WRITE,
        usage("89 f8 ffffffffffffffff 000000 ff 00 04"),
        Access.WRITE,
        slow=compare_and_write,
        exclusive=True,
        ranged=True,
    ),
    Spec(
        op.ORWRITE_16,
        usage("8b f8" + _LONG),
        Access.WRITE,
        slow=orwrite,
        exclusive=True,
        ranged=True,
    ),
    Spec(
        op.WRITE_AND_VERIFY_16,
        usage("8e f6" + _LONG),
        Access.WRITE,
        slow=write_and_verify,
        ranged=True,
    ),
    Spec(op.VERIFY_16, usage("8f f6" + _LONG), Access.READ, slow=verify, ranged=True),
    Spec(
        op.WRITE_AND_VERIFY_12,
        usage("ae f7 ffffffff ffffffff 00 04"),
        Access.WRITE,
        slow=write_and_verify,
        ranged=True,
    ),
    Spec(
        op.VERIFY_12, usage("af f7 ffffffff ffffffff 00 04"), Access.READ, slow=verify, ranged=True
    ),
)
"""Rows of the dispatch table."""

"""Space: UNMAP, WRITE SAME and GET LBA STATUS (SBC-3 4.7, 5.5, 5.30, 5.42, 5.43)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from storvsp.disk import Extent
from storvsp.scsi import cdb as op
from storvsp.scsi.disk_core import DiskCore
from storvsp.scsi.inquiry import MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES
from storvsp.scsi.pace import step
from storvsp.scsi.sense import (
    invalid_cdb_field,
    invalid_parameter,
    out_of_range,
    parameter_list_length_error,
)
from storvsp.scsi.table import Access, Spec, usage
from storvsp.scsi.unit import GOOD, STATUS_GOOD, Command, Outcome, fill, take

_UNMAP_HEADER = struct.Struct(">HH4x")
_UNMAP_DESCRIPTOR = struct.Struct(">QI4x")
_STATUS_DESCRIPTOR = struct.Struct(">QIB3x")

STATUS_WINDOW: Final = 1 << 26
"""Bytes one GET LBA STATUS looks at; it need not describe all of the disk (SBC-3 5.5.2)."""

STATUS_LOOKS: Final = 8
"""How often one GET LBA STATUS asks the back-end, which tells some hundred extents each time. A
guest can make every second sector a hole, so this bounds the time that one command takes."""


def parse_unmap_untrusted(parameters: bytes) -> list[tuple[int, int]]:
    """Parse UNMAP's parameter list.

    Args:
        parameters: A private copy of the parameter list, at least one byte.

    Returns:
        Ranges as (first block, blocks), in the guest's order. An incomplete last descriptor is
        ignored, as SBC-3 5.30.2 has it.

    Raises:
        CheckCondition: The lengths in the header lie, or there are too many descriptors.
    """
    if len(parameters) < _UNMAP_HEADER.size:
        raise parameter_list_length_error()
    data_length, descriptors_length = _UNMAP_HEADER.unpack_from(parameters)
    room = len(parameters) - _UNMAP_HEADER.size
    if descriptors_length > room:
        raise invalid_parameter(2)
    if data_length < descriptors_length + 6:
        raise invalid_parameter(0)
    count = descriptors_length // _UNMAP_DESCRIPTOR.size
    if count > MAX_UNMAP_DESCRIPTORS:
        raise invalid_parameter(2)
    body = parameters[8 : 8 + count * _UNMAP_DESCRIPTOR.size]
    return list(_UNMAP_DESCRIPTOR.iter_unpack(body))


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Put ranges (first, count) in order; join those that overlap or touch, drop empty ones."""
    merged: list[tuple[int, int]] = []
    for first, count in sorted(ranges):
        if merged and first <= (end := sum(merged[-1])):
            merged[-1] = (merged[-1][0], max(end, first + count) - merged[-1][0])
        elif count:
            merged.append((first, count))
    return merged


async def unmap(unit: DiskCore, command: Command) -> Outcome:
    """UNMAP, SBC-3 5.30: every range is checked before the first is freed."""
    cdb = command.cdb
    if cdb[1] & 0x01:  # ANCHOR
        raise invalid_cdb_field(1, 0)
    unit.check_ready()
    unit.check_writable()
    size = int.from_bytes(cdb[7:9], "big")
    if not size:
        return GOOD
    await unit.turn()
    ranges = parse_unmap_untrusted(take(command, size))
    for index, (lba, blocks) in enumerate(ranges):
        # Unlike other ranges, an empty one may begin right behind the last block: SBC-3 5.30
        # asks for the sum only.
        if lba + blocks > unit.blocks:
            raise out_of_range(lba, 8 + 16 * index, in_cdb=False)
    sector = unit.sector_size
    await step()
    await unit.disk.unmap_many(
        [(lba * sector, blocks * sector) for lba, blocks in merge_ranges(ranges)]
    )
    await unit.settle()
    return Outcome(STATUS_GOOD, b"", size)


async def write_same(unit: DiskCore, command: Command) -> Outcome:
    """WRITE SAME(10) and (16), SBC-3 5.42 and 5.43.

    With UNMAP a block of zeros may be freed where it reads back as zeros; any other block is
    written. Setting 0 blocks is refused (WSNZ), and so is more than the limit in VPD page B0.
    """
    cdb = command.cdb
    transfer = unit.range_untrusted(command, writing=True)
    flags = transfer.flags
    for bit in (4, 2, 1):  # ANCHOR, PBDATA, LBDATA
        if flags & 1 << bit:
            raise invalid_cdb_field(1, bit)
    thin = bool(flags & 0x08)
    if thin and not unit.disk.info.supports_unmap:
        raise invalid_cdb_field(1, 3)
    sector = unit.sector_size
    size = transfer.blocks * sector
    if not size or size > MAX_WRITE_SAME_BYTES:
        raise invalid_cdb_field(transfer.count_byte)
    moved = 0
    block = b""
    if not (cdb[0] == op.WRITE_SAME_16 and flags & 0x01):  # NDOB
        if command.length != sector:  # the guest means something else than its CDB says
            raise invalid_cdb_field(transfer.count_byte)
        block = take(command, sector)
        moved = sector
    offset = transfer.lba * sector
    if any(block):
        async with unit.bulk(command):
            pattern = memoryview(block * (min(unit.chunk, size) // sector))
            for at in range(0, size, len(pattern)):
                await step()
                await unit.write(offset + at, [pattern[: size - at]])
    else:
        await unit.disk.write_zeroes(offset, size, may_unmap=thin)
        await unit.settle()
    return Outcome(STATUS_GOOD, b"", moved)


async def get_lba_status(unit: DiskCore, command: Command) -> Outcome:
    """GET LBA STATUS, SBC-3 5.5: runs of mapped and deallocated blocks."""
    cdb = command.cdb
    unit.check_ready()
    lba = int.from_bytes(cdb[2:10], "big")
    if lba >= unit.blocks:
        raise out_of_range(lba, 2)
    allocation = int.from_bytes(cdb[10:14], "big")
    sector = unit.sector_size
    start = lba * sector
    runs = BlockRuns(start, min(unit.blocks * sector - start, STATUS_WINDOW), sector)
    for _ in range(STATUS_LOOKS):
        await unit.turn()
        runs.add(await unit.disk.extents(runs.next * sector, runs.left * sector))
        if not runs.left:
            break
    body = b"".join(
        _STATUS_DESCRIPTOR.pack(first, blocks, 0 if mapped else 1)
        for first, blocks, mapped in runs.found
    )
    return fill(command, (4 + len(body)).to_bytes(4, "big") + bytes(4) + body, allocation)


class BlockRuns:
    """Turns a back-end's extents into runs of whole blocks.

    A block is deallocated only if no byte of it is mapped.

    Args:
        start: First byte of the range, a multiple of ``sector``.
        length: Bytes of the range, a positive multiple of ``sector``.
        sector: Bytes per block.

    Attributes:
        found: (first block, blocks, mapped), from the first block of the range on; neighbours
            differ.
        next: The first block that nothing is known of yet.
    """

    def __init__(self, start: int, length: int, sector: int) -> None:
        self.found: list[tuple[int, int, bool]] = []
        self.next = start // sector
        self._end = (start + length) // sector
        self._sector = sector

    @property
    def left(self) -> int:
        """Blocks that nothing is known of yet."""
        return self._end - self.next

    def add(self, extents: Iterable[Extent]) -> None:
        """Take what a back-end says of the range from :attr:`next` on; it may end early.

        A back-end that says nothing of use leaves all of it to the mapped ones.
        """
        before = self.next
        for extent in extents:
            last = extent.offset + extent.length
            # Mapped extents swallow the blocks they share with others.
            until = -(-last // self._sector) if extent.mapped else last // self._sector
            self._extend(until, mapped=extent.mapped)
        if self.next == before:
            self._extend(self._end, mapped=True)

    def _extend(self, until: int, *, mapped: bool) -> None:
        until = min(until, self._end)
        if until <= self.next:
            return
        if self.found and self.found[-1][2] == mapped:
            begin, _, _ = self.found[-1]
            self.found[-1] = (begin, until - begin, mapped)
        else:
            self.found.append((self.next, until - self.next, mapped))
        self.next = until


_WRITE_SAME_10 = usage("41 f8 ffffffff 00 ffff 04")
_WRITE_SAME_16 = usage("93 f9 ffffffffffffffff ffffffff 00 04")

COMMANDS: Final = (
    Spec(op.WRITE_SAME_10, _WRITE_SAME_10, Access.WRITE, slow=write_same),
    Spec(op.WRITE_SAME_16, _WRITE_SAME_16, Access.WRITE, slow=write_same),
    Spec(
        op.SERVICE_ACTION_IN_16,
        usage("9e 1f ffffffffffffffff ffffffff 00 04"),
        Access.READ,
        slow=get_lba_status,
        service_action=op.SA_GET_LBA_STATUS,
    ),
)
"""Rows of the dispatch table of every disk."""

THIN_COMMANDS: Final = (
    Spec(op.UNMAP, usage("42 01 0000000000 ffff 04"), Access.WRITE, slow=unmap),
)
"""Rows only for disks that can free space."""

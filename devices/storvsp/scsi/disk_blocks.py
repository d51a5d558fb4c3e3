"""READ, WRITE and the commands about the medium as a whole (SBC-3 5)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from storvsp.scsi import cdb as op, sense
from storvsp.scsi.cdb import decode_transfer_untrusted
from storvsp.scsi.disk_core import DiskCore
from storvsp.scsi.sense import (
    invalid_cdb_field,
    invalid_parameter,
    out_of_range,
)
from storvsp.scsi.table import Access, Spec, usage
from storvsp.scsi.unit import GOOD, STATUS_GOOD, Command, Outcome, data_in_untrusted, fill, take

_CAPACITY_10 = struct.Struct(">II")
_CAPACITY_16 = struct.Struct(">QIBBH16x")


def _read_plan_untrusted(
    unit: DiskCore, command: Command
) -> tuple[int, Sequence[memoryview], int, bool]:
    """Return byte offset, buffers, bytes the guest gets, and whether FUA is set."""
    transfer = unit.range_untrusted(command, writing=False)
    size = transfer.blocks * unit.sector_size
    buffers = data_in_untrusted(command, size, unit.sector_size, transfer.count_byte)
    return transfer.lba * unit.sector_size, buffers, min(size, command.length), transfer.fua


def read_now(unit: DiskCore, command: Command) -> Outcome | None:
    """READ(6), (10), (12) and (16), SBC-3 5.8 to 5.11, if the data is at hand."""
    offset, buffers, size, fua = _read_plan_untrusted(unit, command)
    if buffers:
        if (fua and unit.cached) or size > unit.limit:
            return None
        if not unit.disk.try_readv(offset, buffers):
            return None
    return Outcome(STATUS_GOOD, b"", size)


async def read(unit: DiskCore, command: Command) -> Outcome:
    """READ from the back-end. With FUA the cache is written first (SBC-3 4.15)."""
    offset, buffers, size, fua = _read_plan_untrusted(unit, command)
    if buffers:
        if fua and unit.cached:
            await unit.disk.flush()
        # It comes here because of its shape, or because the gate was closed.
        await unit.read(offset, buffers, tried=False)
    return Outcome(STATUS_GOOD, b"", size)


def write_now(unit: DiskCore, command: Command) -> Outcome | None:
    """WRITE(6), (10), (12) and (16), SBC-3 5.33 to 5.36, if that needs no waiting."""
    transfer = unit.range_untrusted(command, writing=True)
    size = transfer.blocks * unit.sector_size
    buffers = unit.data_out_untrusted(command, size, transfer.count_byte)
    if buffers:
        if size > unit.limit:
            return None
        fua = transfer.fua or unit.write_through
        if not unit.disk.try_writev(transfer.lba * unit.sector_size, buffers, fua=fua):
            return None
    return Outcome(STATUS_GOOD, b"", size)


async def write(unit: DiskCore, command: Command) -> Outcome:
    """WRITE to the back-end."""
    transfer = unit.range_untrusted(command, writing=True)
    size = transfer.blocks * unit.sector_size
    buffers = unit.data_out_untrusted(command, size, transfer.count_byte)
    if buffers:
        await unit.write(transfer.lba * unit.sector_size, buffers, fua=transfer.fua, tried=False)
    return Outcome(STATUS_GOOD, b"", size)


def read_capacity_10(unit: DiskCore, command: Command) -> Outcome:
    """READ CAPACITY(10), SBC-3 5.12: FFFFFFFFh means "ask with READ CAPACITY(16)"."""
    cdb = command.cdb
    unit.check_ready()
    _check_pmi_untrusted(unit, int.from_bytes(cdb[2:6], "big"), pmi=bool(cdb[8] & 0x01))
    last = min(unit.blocks - 1, 0xFFFFFFFF)
    return fill(command, _CAPACITY_10.pack(last, unit.sector_size), 8)


def read_capacity_16(unit: DiskCore, command: Command) -> Outcome:
    """READ CAPACITY(16), SBC-3 5.13."""
    cdb = command.cdb
    unit.check_ready()
    _check_pmi_untrusted(unit, int.from_bytes(cdb[2:10], "big"), pmi=bool(cdb[14] & 0x01))
    info = unit.disk.info
    exponent = max(info.physical_sector_size // unit.sector_size, 1).bit_length() - 1
    provisioning = 0
    if info.supports_unmap:  # LBPME, LBPRZ; lowest aligned LBA 0
        provisioning = 0xC000 if info.unmapped_reads_zero else 0x8000
    payload = _CAPACITY_16.pack(unit.blocks - 1, unit.sector_size, 0, exponent, provisioning)
    return fill(command, payload, int.from_bytes(cdb[10:14], "big"))


def _check_pmi_untrusted(unit: DiskCore, lba: int, *, pmi: bool) -> None:
    """Check the two obsolete fields of READ CAPACITY as SBC-2 5.10 defines them."""
    if lba and not pmi:
        raise invalid_cdb_field(2)
    if lba >= unit.blocks:
        raise out_of_range(lba, 2)


async def synchronize_cache(unit: DiskCore, command: Command) -> Outcome:
    """SYNCHRONIZE CACHE(10) and (16), SBC-3 5.21: always everything, always before the status."""
    unit.check_ready()
    transfer = decode_transfer_untrusted(command.cdb)
    if transfer.lba >= unit.blocks or transfer.lba + transfer.blocks > unit.blocks:
        raise out_of_range(transfer.lba, 2)
    await unit.disk.flush()
    return GOOD


def pre_fetch(unit: DiskCore, command: Command) -> Outcome:
    """PRE-FETCH(10) and (16), SBC-3 5.6: the range is checked; the host caches by itself."""
    unit.range_untrusted(command, writing=False)
    return GOOD


async def start_stop(unit: DiskCore, command: Command) -> Outcome:
    """START STOP UNIT, SBC-3 5.19.

    Stopping writes the cache and nothing else: firmware that runs after a guest's shutdown does
    not start disks. Power conditions are accepted, there are none to enter. With LOEJ a removable
    medium is taken out or put in.
    """
    cdb = command.cdb
    condition = cdb[4] >> 4
    if condition not in {0x0, 0x1, 0x2, 0x3, 0x7, 0xA, 0xB}:
        raise invalid_cdb_field(4, 7)
    if condition:
        return GOOD
    start, load = bool(cdb[4] & 0x01), bool(cdb[4] & 0x02)
    if load and not unit.identity().removable:
        raise invalid_cdb_field(4, 1)
    if load and not start:
        unit.tray.check_unlocked()
    if not start and not cdb[4] & 0x04:  # NO_FLUSH
        await unit.disk.flush()
        if load:
            unit.tray.check_unlocked()  # it may have been locked meanwhile
    if load and unit.tray.open == start:
        unit.tray.open = not start
        if start:
            unit.raise_attention(sense.MEDIUM_MAY_HAVE_CHANGED, but=command.initiator)
        unit.refresh()
    return GOOD


async def format_unit(unit: DiskCore, command: Command) -> Outcome:
    """FORMAT UNIT, SBC-3 5.3.

    A thin disk is unmapped from end to end, any other keeps what it holds: formatting without an
    initialization pattern leaves the contents to the device. Defect lists and patterns are
    refused.
    """
    cdb = command.cdb
    unit.check_ready()
    unit.check_writable()
    if cdb[1] & 0xC0:  # FMTPINFO: no protection information
        raise invalid_cdb_field(1, 7)
    moved = 0
    if cdb[1] & 0x10:  # FMTDATA
        moved = 8 if cdb[1] & 0x20 else 4
        header = take(command, moved)
        if header[1] & 0x08:  # IP
            raise invalid_parameter(1, 3)
        if any(header[2:]):  # a defect list or protection information
            raise invalid_parameter(next(at for at in range(2, moved) if header[at]))
    elif cdb[1] & 0x08:  # CMPLST belongs to a parameter list
        raise invalid_cdb_field(1, 3)
    if unit.disk.info.supports_unmap:
        await unit.disk.unmap(0, unit.blocks * unit.sector_size)
        await unit.settle()
    return Outcome(STATUS_GOOD, b"", moved)


def read_defect_data_10(_unit: DiskCore, command: Command) -> Outcome:
    """READ DEFECT DATA(10), SBC-3 5.7: both lists are empty."""
    header = bytes((0, command.cdb[2] & 0x1F, 0, 0))
    return fill(command, header, int.from_bytes(command.cdb[7:9], "big"))


def read_defect_data_12(_unit: DiskCore, command: Command) -> Outcome:
    """READ DEFECT DATA(12)."""
    header = bytes((0, command.cdb[1] & 0x1F, 0, 0, 0, 0, 0, 0))
    return fill(command, header, int.from_bytes(command.cdb[6:10], "big"))


READ, WRITE, FREE = Access.READ, Access.WRITE, Access.FREE

COMMANDS: Final = (
    Spec(op.FORMAT_UNIT, usage("04 f8 00 00 00 04"), WRITE, slow=format_unit, exclusive=True),
    Spec(op.READ_6, usage("08 1f ffff ff 04"), READ, read_now, read, ranged=True),
    Spec(op.WRITE_6, usage("0a 1f ffff ff 04"), WRITE, write_now, write, ranged=True),
    Spec(op.START_STOP_UNIT, usage("1b 00 00 00 f7 04"), Access.START_STOP, slow=start_stop),
    Spec(op.READ_CAPACITY_10, usage("25 00 ffffffff 00 00 01 04"), FREE, read_capacity_10),
    Spec(op.READ_10, usage("28 f9 ffffffff 00 ffff 04"), READ, read_now, read, ranged=True),
    Spec(op.WRITE_10, usage("2a f9 ffffffff 00 ffff 04"), WRITE, write_now, write, ranged=True),
    Spec(op.PRE_FETCH_10, usage("34 01 ffffffff 00 ffff 04"), READ, pre_fetch),
    Spec(
        op.SYNCHRONIZE_CACHE_10, usage("35 00 ffffffff 00 ffff 04"), WRITE, slow=synchronize_cache
    ),
    Spec(op.READ_DEFECT_DATA_10, usage("37 00 1f 00000000 ffff 04"), READ, read_defect_data_10),
    Spec(
        op.READ_16,
        usage("88 f8 ffffffffffffffff ffffffff 00 04"),
        READ,
        read_now,
        read,
        ranged=True,
    ),
    Spec(
        op.WRITE_16,
        usage("8a f8 ffffffffffffffff ffffffff 00 04"),
        WRITE,
        write_now,
        write,
        ranged=True,
    ),
    Spec(op.PRE_FETCH_16, usage("90 00 ffffffffffffffff ffffffff 00 04"), READ, pre_fetch),
    Spec(
        op.SYNCHRONIZE_CACHE_16,
        usage("91 00 ffffffffffffffff ffffffff 00 04"),
        WRITE,
        slow=synchronize_cache,
    ),
    Spec(
        op.SERVICE_ACTION_IN_16,
        usage("9e 1f ffffffffffffffff ffffffff 01 04"),
        FREE,
        read_capacity_16,
        service_action=op.SA_READ_CAPACITY_16,
    ),
    Spec(op.READ_12, usage("a8 f9 ffffffff ffffffff 00 04"), READ, read_now, read, ranged=True),
    Spec(op.WRITE_12, usage("aa f9 ffffffff ffffffff 00 04"), WRITE, write_now, write, ranged=True),
    Spec(op.READ_DEFECT_DATA_12, usage("b7 1f 00000000 ffffffff 00 04"), READ, read_defect_data_12),
)
"""Rows of the dispatch table."""

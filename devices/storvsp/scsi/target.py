"""What a target answers where there is no logical unit, and the list of those there are.

Guests probe addresses at which nothing is. An answer that is only nearly right makes them attach
ghost disks or retry for ever, so it is built here, once, for all controllers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from storvsp.scsi import cdb as op
from storvsp.scsi.sense import CheckCondition, invalid_cdb_field
from storvsp.scsi.unit import Command, DataDirection, Outcome, check_condition, fill

ABSENT_PERIPHERAL: Final = 0x7F
"""Peripheral qualifier 011b, device type 1Fh: no logical unit can be here (SPC-4 6.4.2)."""

ABSENT_INQUIRY: Final = bytes((ABSENT_PERIPHERAL, 0, 0x05, 0x02, 31)) + bytes(31)
"""Standard INQUIRY data for such an address: 36 bytes, no vendor, no product."""

_WELL_KNOWN: Final = 0x01
_ADMINISTRATIVE: Final = frozenset((0x10, 0x11, 0x12))


def encode_lun(lun: int) -> bytes:
    """Encode a LUN in eight bytes (SAM-5 4.7): peripheral method up to 255, flat space above.

    Raises:
        ValueError: The number has more than 14 bits.
    """
    if not 0 <= lun < 0x4000:
        raise ValueError(f"LUN {lun} does not fit the flat space addressing method")
    return struct.pack(">H6x", lun if lun < 256 else 0x4000 | lun)


def allocation(command: Command, length: int) -> int:
    """Return the ALLOCATION LENGTH to honour for REPORT LUNS.

    UEFI firmware sends 0 together with a buffer and takes an empty answer for a failure; a
    request that really wants nothing brings no buffer, so 0 stands for the buffer's length.
    """
    return length or command.length


def report_luns_untrusted(luns: Iterable[int], command: Command) -> Outcome:
    """Answer REPORT LUNS (SPC-4 6.33).

    Args:
        luns: Logical unit numbers of the target, in any order.
        command: With a CDB of 12 bytes, or of 10: all but RESERVED and CONTROL, which have to be 0.

    Raises:
        CheckCondition: SELECT REPORT has a reserved value or the CDB is short.
    """
    cdb = command.cdb
    if len(cdb) < 10:
        raise invalid_cdb_field(len(cdb))
    select = cdb[2]
    if select in {0x00, 0x02}:
        entries = b"".join(encode_lun(lun) for lun in sorted(set(luns)))
    elif select == _WELL_KNOWN or select in _ADMINISTRATIVE:
        entries = b""  # there are no well-known and no subsidiary logical units
    else:
        raise invalid_cdb_field(2)
    payload = struct.pack(">I4x", len(entries)) + entries
    return fill(command, payload, allocation(command, int.from_bytes(cdb[6:10], "big")))


def absent_unit(command: Command, luns: Iterable[int]) -> Outcome | None:
    """Answer a command to an address without a logical unit.

    Args:
        command: As it came from the guest.
        luns: The LUNs that exist at the same target; empty for an absent target.

    Returns:
        The outcome of INQUIRY (data that says "nothing here") and REPORT LUNS (GOOD, also when
        the list is empty). None for all others: the controller answers them with SRB status
        INVALID_LUN (20h) and no SCSI status.
    """
    opcode = command.cdb[0] if command.cdb else None
    try:
        if opcode == op.REPORT_LUNS:
            return report_luns_untrusted(luns, command)
        if opcode == op.INQUIRY:
            if len(command.cdb) < 6:
                raise invalid_cdb_field(len(command.cdb))
            if command.direction == DataDirection.WRITE:
                raise invalid_cdb_field(0)
            size = int.from_bytes(command.cdb[3:5], "big")
            if command.cdb[1] & 0x01:  # a VPD page: all that is known is that there is none
                return fill(command, bytes((ABSENT_PERIPHERAL, command.cdb[2], 0, 0)), size)
            return fill(command, ABSENT_INQUIRY, size)
    except CheckCondition as error:
        return check_condition(error.sense)
    return None

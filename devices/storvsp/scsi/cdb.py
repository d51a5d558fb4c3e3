"""Command descriptor blocks: operation codes, service actions and the fields of transfers.

Sources: SPC-4 6, SBC-3 5, MMC-6 6. Decoders take the guest's CDB (a private copy of at most 16
bytes) and raise nothing but :class:`~storvsp.scsi.sense.CheckCondition`.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from storvsp.scsi.sense import invalid_cdb_field

TEST_UNIT_READY: Final = 0x00
REQUEST_SENSE: Final = 0x03
FORMAT_UNIT: Final = 0x04
READ_6: Final = 0x08
WRITE_6: Final = 0x0A
INQUIRY: Final = 0x12
MODE_SELECT_6: Final = 0x15
RESERVE_6: Final = 0x16
RELEASE_6: Final = 0x17
MODE_SENSE_6: Final = 0x1A
START_STOP_UNIT: Final = 0x1B
SEND_DIAGNOSTIC: Final = 0x1D
PREVENT_ALLOW_MEDIUM_REMOVAL: Final = 0x1E
READ_CAPACITY_10: Final = 0x25
READ_10: Final = 0x28
WRITE_10: Final = 0x2A
WRITE_AND_VERIFY_10: Final = 0x2E
VERIFY_10: Final = 0x2F
PRE_FETCH_10: Final = 0x34
SYNCHRONIZE_CACHE_10: Final = 0x35
READ_DEFECT_DATA_10: Final = 0x37
WRITE_SAME_10: Final = 0x41
UNMAP: Final = 0x42
READ_TOC: Final = 0x43
GET_CONFIGURATION: Final = 0x46
GET_EVENT_STATUS_NOTIFICATION: Final = 0x4A
LOG_SENSE: Final = 0x4D
READ_DISC_INFORMATION: Final = 0x51
READ_TRACK_INFORMATION: Final = 0x52
MODE_SELECT_10: Final = 0x55
RESERVE_10: Final = 0x56
RELEASE_10: Final = 0x57
MODE_SENSE_10: Final = 0x5A
PERSISTENT_RESERVE_IN: Final = 0x5E
PERSISTENT_RESERVE_OUT: Final = 0x5F
READ_16: Final = 0x88
COMPARE_AND_WRITE: Final = 0x89
WRITE_16: Final = 0x8A
ORWRITE_16: Final = 0x8B
WRITE_AND_VERIFY_16: Final = 0x8E
VERIFY_16: Final = 0x8F
PRE_FETCH_16: Final = 0x90
SYNCHRONIZE_CACHE_16: Final = 0x91
WRITE_SAME_16: Final = 0x93
SERVICE_ACTION_IN_16: Final = 0x9E
REPORT_LUNS: Final = 0xA0
MAINTENANCE_IN: Final = 0xA3
READ_12: Final = 0xA8
WRITE_12: Final = 0xAA
GET_PERFORMANCE: Final = 0xAC
READ_DVD_STRUCTURE: Final = 0xAD
WRITE_AND_VERIFY_12: Final = 0xAE
VERIFY_12: Final = 0xAF
READ_DEFECT_DATA_12: Final = 0xB7
SET_CD_SPEED: Final = 0xBB
MECHANISM_STATUS: Final = 0xBD
READ_CD: Final = 0xBE

_NAMES = {value: name for name, value in tuple(globals().items()) if isinstance(value, int)}


def command_name(cdb: bytes) -> str:
    """Return what a command is called, for people: ``WRITE(10)``; its first byte if nobody knows.

    Args:
        cdb: The guest's; may be empty.
    """
    name = _NAMES.get(cdb[0]) if cdb else None
    if name is None:
        return f"command {cdb[:1].hex()}h"
    words = name.split("_")
    size = f"({words.pop()})" if words[-1].isdecimal() else ""
    return " ".join(words) + size


# SERVICE ACTION IN(16), MAINTENANCE IN.
SA_READ_CAPACITY_16: Final = 0x10
SA_GET_LBA_STATUS: Final = 0x12
SA_REPORT_SUPPORTED_OPERATION_CODES: Final = 0x0C
SA_REPORT_SUPPORTED_TASK_MANAGEMENT: Final = 0x0D

# PERSISTENT RESERVE IN and OUT.
PR_READ_KEYS: Final = 0
PR_READ_RESERVATION: Final = 1
PR_REPORT_CAPABILITIES: Final = 2
PR_READ_FULL_STATUS: Final = 3
PR_REGISTER: Final = 0
PR_RESERVE: Final = 1
PR_RELEASE: Final = 2
PR_CLEAR: Final = 3
PR_PREEMPT: Final = 4
PR_PREEMPT_AND_ABORT: Final = 5
PR_REGISTER_AND_IGNORE: Final = 6

FIELDS_10: Final = struct.Struct(">BBIBHB")
"""Opcode, flags, LBA, group, length in blocks, control of a 10-byte transfer CDB."""
FIELDS_16: Final = struct.Struct(">BBQIBB")
"""Opcode, flags, LBA, length in blocks, group, control of a 16-byte transfer CDB."""
_FIELDS_12 = struct.Struct(">BBII")


class Transfer(NamedTuple):
    """A range of blocks as a CDB names it."""

    lba: int
    """First logical block."""
    blocks: int
    """Logical blocks."""
    flags: int
    """Byte 1 of the CDB; 0 for the 6-byte commands."""
    count_byte: int
    """Index of the field that holds ``blocks``, for field pointers."""

    @property
    def fua(self) -> bool:
        """Whether force unit access was asked for."""
        return bool(self.flags & 0x08)


def decode_transfer_untrusted(cdb: bytes) -> Transfer:
    """Decode the range of any READ, WRITE, VERIFY, SYNCHRONIZE CACHE, WRITE SAME and the like.

    Args:
        cdb: Not shorter than its operation code demands (the dispatcher checks that).

    Returns:
        The range. A 6-byte command's length 0 means 256 blocks (SBC-3 5.8); in all others 0 is 0.
        COMPARE AND WRITE keeps its length in one byte, at 13.
    """
    group = cdb[0] >> 5
    if group == 0:
        lba = int.from_bytes(cdb[1:4], "big") & 0x1FFFFF
        return Transfer(lba, cdb[4] or 256, 0, 4)
    if group == 5:
        _, flags, lba, count = _FIELDS_12.unpack_from(cdb)
        return Transfer(lba, count, flags, 6)
    if group == 4:
        _, flags, lba, count, _, _ = FIELDS_16.unpack_from(cdb)
        if cdb[0] == COMPARE_AND_WRITE:
            return Transfer(lba, cdb[13], flags, 13)
        return Transfer(lba, count, flags, 10)
    _, flags, lba, _, count, _ = FIELDS_10.unpack_from(cdb)
    return Transfer(lba, count, flags, 7)


def check_transfer_flags_untrusted(cdb: bytes) -> None:
    """Refuse the flag bits of a transfer CDB that this target does not have.

    The medium holds no protection information, so RDPROTECT, WRPROTECT and VRPROTECT must be 0
    (SBC-3 table 66); relative addressing ended with SCSI-2.

    Raises:
        CheckCondition: A bit is set that must not be.
    """
    group = cdb[0] >> 5  # not the CDB's length: drivers may send 16 bytes whatever the command is
    if group:
        if cdb[1] & 0xE0:
            raise invalid_cdb_field(1, 7)
        if cdb[1] & 0x01 and group != 4:
            raise invalid_cdb_field(1, 0)

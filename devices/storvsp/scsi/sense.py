"""Sense data: what went wrong, in the form guests read it.

Commands fail by raising :class:`CheckCondition`; the dispatcher turns it into CHECK CONDITION
status with fixed-format sense data (SPC-4 4.5.3). The VMBus storage protocol carries at most 20
bytes of sense, so the fixed format (18 bytes) is the only one used as autosense; the descriptor
format (SPC-4 4.5.2) is built solely for REQUEST SENSE with DESC set.

An ILLEGAL REQUEST names its culprit: the sense-key-specific field pointer (SPC-4 4.5.2.4.2) holds
the byte, and where it is a single field the bit, of the CDB or parameter list that was refused.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Final

from storvsp.disk import (
    DiskError,
    DiskUnavailableError,
    MediumError,
    NoSpaceError,
    OutOfRangeError,
    ReadOnlyError,
)
from vmbus.errors import GuestProtocolError

# Sense keys, SPC-4 table 48.
NO_SENSE: Final = 0x0
NOT_READY: Final = 0x2
MEDIUM_ERROR: Final = 0x3
HARDWARE_ERROR: Final = 0x4
ILLEGAL_REQUEST: Final = 0x5
UNIT_ATTENTION: Final = 0x6
DATA_PROTECT: Final = 0x7
MISCOMPARE: Final = 0xE

# Additional sense codes as (ASC << 8 | ASCQ), SPC-4 annex E.
NO_ADDITIONAL_SENSE: Final = 0x0000
LOGICAL_UNIT_COMMUNICATION_FAILURE: Final = 0x0800
WRITE_ERROR: Final = 0x0C00
UNRECOVERED_READ_ERROR: Final = 0x1100
PARAMETER_LIST_LENGTH_ERROR: Final = 0x1A00
MISCOMPARE_DURING_VERIFY: Final = 0x1D00
INVALID_COMMAND_OPERATION_CODE: Final = 0x2000
LBA_OUT_OF_RANGE: Final = 0x2100
INVALID_FIELD_IN_CDB: Final = 0x2400
INVALID_FIELD_IN_PARAMETER_LIST: Final = 0x2600
INVALID_RELEASE_OF_PERSISTENT_RESERVATION: Final = 0x2604
WRITE_PROTECTED: Final = 0x2700
SOFTWARE_WRITE_PROTECTED: Final = 0x2702
SPACE_ALLOCATION_FAILED: Final = 0x2707
MEDIUM_MAY_HAVE_CHANGED: Final = 0x2800
POWER_ON_OR_RESET: Final = 0x2900
BUS_RESET: Final = 0x2902
DEVICE_RESET: Final = 0x2903
MODE_PARAMETERS_CHANGED: Final = 0x2A01
RESERVATIONS_PREEMPTED: Final = 0x2A03
RESERVATIONS_RELEASED: Final = 0x2A04
REGISTRATIONS_PREEMPTED: Final = 0x2A05
CAPACITY_DATA_HAS_CHANGED: Final = 0x2A09
CANNOT_READ_INCOMPATIBLE_FORMAT: Final = 0x3002
SAVING_PARAMETERS_NOT_SUPPORTED: Final = 0x3900
MEDIUM_NOT_PRESENT: Final = 0x3A00
MEDIUM_NOT_PRESENT_TRAY_CLOSED: Final = 0x3A01
MEDIUM_NOT_PRESENT_TRAY_OPEN: Final = 0x3A02
INQUIRY_DATA_HAS_CHANGED: Final = 0x3F03
REPORTED_LUNS_DATA_HAS_CHANGED: Final = 0x3F0E
INTERNAL_TARGET_FAILURE: Final = 0x4400
MEDIUM_REMOVAL_PREVENTED: Final = 0x5302
INSUFFICIENT_REGISTRATION_RESOURCES: Final = 0x5504
ILLEGAL_MODE_FOR_THIS_TRACK: Final = 0x6400

FIXED_LENGTH: Final = 18
"""Bytes of every fixed-format sense data built here."""

_FIXED = struct.Struct(">BBBIB4xBBB3s")
_DESCRIPTOR_HEADER = struct.Struct(">BBBB3xB")
_INFORMATION_DESCRIPTOR = struct.Struct(">BBBxQ")
_SKS_DESCRIPTOR = struct.Struct(">BBxx3sx")


@dataclasses.dataclass(frozen=True, slots=True)
class Sense:
    """One error or condition.

    Attributes:
        key: Sense key.
        code: ASC in the high byte, ASCQ in the low byte.
        information: For block devices the logical block concerned, or the byte offset of the
            first difference for COMPARE AND WRITE; None if there is nothing to say.
        specific: The three sense-key-specific bytes, or zeros.
    """

    key: int
    code: int
    information: int | None = None
    specific: bytes = bytes(3)

    def fixed(self) -> bytes:
        """Build fixed-format sense data (response code 70h), 18 bytes.

        The INFORMATION field has 32 bits; a larger value is left out (VALID = 0), as SPC-4 4.5.3
        wants it.
        """
        information = self.information
        valid = information is not None and information <= 0xFFFFFFFF
        return _FIXED.pack(
            0xF0 if valid else 0x70,
            0,
            self.key,
            information if valid and information is not None else 0,
            FIXED_LENGTH - 8,
            self.code >> 8,
            self.code & 0xFF,
            0,
            self.specific,
        )

    def descriptors(self) -> bytes:
        """Build descriptor-format sense data (response code 72h), for REQUEST SENSE only."""
        body = b""
        if self.information is not None:
            body += _INFORMATION_DESCRIPTOR.pack(0x00, 0x0A, 0x80, self.information)
        if self.specific[0] & 0x80:
            body += _SKS_DESCRIPTOR.pack(0x02, 0x06, self.specific)
        head = _DESCRIPTOR_HEADER.pack(0x72, self.key, self.code >> 8, self.code & 0xFF, len(body))
        return head + body


def field_pointer(byte: int, bit: int | None = None, *, in_cdb: bool) -> bytes:
    """Build the three sense-key-specific bytes that point at a refused field.

    Args:
        byte: Index of the field's first byte.
        bit: Most significant bit of the field within that byte; None for whole-byte fields.
        in_cdb: True for the CDB, False for the parameter list.
    """
    flags = 0x80 | (0x40 if in_cdb else 0)
    if bit is not None:
        flags |= 0x08 | bit
    return bytes((flags, byte >> 8 & 0xFF, byte & 0xFF))


class CheckCondition(GuestProtocolError):  # noqa: N818 - the name SCSI gives it
    """A command ends with CHECK CONDITION status.

    Args:
        sense: What to tell the guest.
        message: One sentence for the log.
    """

    def __init__(self, sense: Sense, message: str = "") -> None:
        super().__init__(message or f"sense {sense.key:x}/{sense.code:04x}")
        self.sense = sense


class ReservationConflict(GuestProtocolError):  # noqa: N818 - the name SCSI gives it
    """A command ends with RESERVATION CONFLICT status (SAM-5 5.3.1)."""


def invalid_opcode() -> CheckCondition:
    """Refuse an operation code: ILLEGAL REQUEST 20/00, pointing at byte 0."""
    return CheckCondition(
        Sense(
            ILLEGAL_REQUEST,
            INVALID_COMMAND_OPERATION_CODE,
            specific=field_pointer(0, in_cdb=True),
        )
    )


def invalid_cdb_field(byte: int, bit: int | None = None) -> CheckCondition:
    """Refuse a field of the CDB: ILLEGAL REQUEST 24/00."""
    return CheckCondition(
        Sense(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, specific=field_pointer(byte, bit, in_cdb=True))
    )


def invalid_parameter(byte: int, bit: int | None = None) -> CheckCondition:
    """Refuse a field of the parameter list: ILLEGAL REQUEST 26/00."""
    return CheckCondition(
        Sense(
            ILLEGAL_REQUEST,
            INVALID_FIELD_IN_PARAMETER_LIST,
            specific=field_pointer(byte, bit, in_cdb=False),
        )
    )


def parameter_list_length_error() -> CheckCondition:
    """Refuse a parameter list that is too short or too long: ILLEGAL REQUEST 1A/00."""
    return CheckCondition(Sense(ILLEGAL_REQUEST, PARAMETER_LIST_LENGTH_ERROR))


def out_of_range(lba: int, byte: int, *, in_cdb: bool = True) -> CheckCondition:
    """Refuse a block address: ILLEGAL REQUEST 21/00.

    Args:
        lba: First logical block asked for.
        byte: Index of the LOGICAL BLOCK ADDRESS field.
        in_cdb: True if that is in the CDB, False if it is in the parameter list.
    """
    return CheckCondition(
        Sense(
            ILLEGAL_REQUEST,
            LBA_OUT_OF_RANGE,
            information=lba,
            specific=field_pointer(byte, in_cdb=in_cdb),
        )
    )


def from_disk_error(error: DiskError, *, sector_size: int, writing: bool) -> Sense:
    """Translate a back-end's failure, as the disk contract prescribes.

    Args:
        error: What the back-end raised.
        sector_size: Bytes per logical sector, to turn the error's offset into a block address.
        writing: True if the command was changing the medium.
    """
    information = None if error.offset is None else max(error.offset, 0) // sector_size
    match error:
        case OutOfRangeError():
            key, code = ILLEGAL_REQUEST, LBA_OUT_OF_RANGE
        case ReadOnlyError():
            key, code = DATA_PROTECT, WRITE_PROTECTED
        case NoSpaceError():
            key, code = DATA_PROTECT, SPACE_ALLOCATION_FAILED
        case MediumError():
            key, code = MEDIUM_ERROR, WRITE_ERROR if writing else UNRECOVERED_READ_ERROR
        case DiskUnavailableError() | _:
            key, code = HARDWARE_ERROR, INTERNAL_TARGET_FAILURE
    return Sense(key, code, information)

"""What a CD-ROM drive says about itself and its medium: pure functions that build bytes (MMC-6 6).

The medium is always one finished session with one data track; an image of more sectors than fit
on an 80-minute disc counts as a DVD.
"""

from __future__ import annotations

import struct
from typing import Final

from storvsp.scsi.modes import TRAY_CAPABILITIES
from storvsp.scsi.sense import (
    CANNOT_READ_INCOMPATIBLE_FORMAT,
    ILLEGAL_REQUEST,
    CheckCondition,
    Sense,
    invalid_cdb_field,
    out_of_range,
)

SECTOR: Final = 2048
MAX_CD_SECTORS: Final = 80 * 60 * 75

PROFILE_NONE: Final = 0x0000
PROFILE_CD_ROM: Final = 0x0008
PROFILE_DVD_ROM: Final = 0x0010

EVENT_NONE: Final = 0
EVENT_EJECT_REQUEST: Final = 1
EVENT_NEW_MEDIA: Final = 2
EVENT_MEDIA_REMOVAL: Final = 3

_DATA_TRACK = 0x14  # ADR 1, data track, copying not permitted
_LEAD_OUT = 0xAA
_SPEED = 7056  # kB/s


def profile(blocks: int) -> int:
    """Return the profile of a medium of this many sectors; 0 sectors: no medium."""
    if not blocks:
        return PROFILE_NONE
    return PROFILE_DVD_ROM if blocks > MAX_CD_SECTORS else PROFILE_CD_ROM


def msf(lba: int) -> bytes:
    """Return minute, second and frame of a sector (MMC-6 table 596); minutes stop at 255."""
    frames = lba + 150
    return bytes((min(frames // 4500, 255), frames // 75 % 60, frames % 75))


def _address(lba: int, *, as_msf: bool) -> bytes:
    return b"\0" + msf(lba) if as_msf else lba.to_bytes(4, "big")


def _with_length(body: bytes) -> bytes:
    return len(body).to_bytes(2, "big") + body


def toc_untrusted(cdb: bytes, blocks: int) -> bytes:
    """Build the answer to READ TOC/PMA/ATIP, formats 0 to 2 (MMC-6 6.25).

    Args:
        cdb: The 10-byte CDB.
        blocks: Sectors of the medium.

    Raises:
        CheckCondition: A track, session or format that does not exist.
    """
    as_msf = bool(cdb[1] & 0x02)
    kind = cdb[2] & 0x0F or cdb[9] >> 6  # byte 9: where SFF-8020 had the format
    number = cdb[6]
    if kind == 0:
        if number > 1 and number != _LEAD_OUT:
            raise invalid_cdb_field(6)
        body = b""
        if number <= 1:
            body = bytes((0, _DATA_TRACK, 1, 0)) + _address(0, as_msf=as_msf)
        body += bytes((0, _DATA_TRACK, _LEAD_OUT, 0)) + _address(blocks, as_msf=as_msf)
        return _with_length(b"\x01\x01" + body)
    if kind == 1:
        track = bytes((0, _DATA_TRACK, 1, 0)) + _address(0, as_msf=as_msf)
        return _with_length(b"\x01\x01" + track)
    if kind == 2:
        if number > 1:
            raise invalid_cdb_field(6)
        body = b"".join(
            bytes((1, _DATA_TRACK, 0, point, 0, 0, 0, 0)) + position
            for point, position in (
                (0xA0, b"\x01\0\0"),  # first track; a disc of mode 1 data
                (0xA1, b"\x01\0\0"),  # last track
                (0xA2, msf(blocks)),  # lead-out
                (0x01, msf(0)),
            )
        )
        return _with_length(b"\x01\x01" + body)
    raise invalid_cdb_field(2, 3)


def _feature(code: int, version: int, data: bytes, *, persistent: bool, current: bool) -> bytes:
    flags = version << 2 | persistent << 1 | current
    return struct.pack(">HBB", code, flags, len(data)) + data


def features(blocks: int) -> dict[int, tuple[bool, bytes]]:
    """Return the features of the drive: code -> (current, descriptor), in ascending order."""
    now = profile(blocks)
    cd, dvd = now == PROFILE_CD_ROM, now == PROFILE_DVD_ROM
    profiles = struct.pack(">HBxHBx", PROFILE_DVD_ROM, dvd, PROFILE_CD_ROM, cd)
    readable = struct.pack(">IHBx", SECTOR, 16 if dvd else 1, 0)
    rows = (
        (0x0000, 0, profiles, True, True),  # profile list
        (0x0001, 2, b"\0\0\0\x01\x01\0\0\0", True, True),  # core: SCSI, device busy event
        (0x0002, 1, b"\x02\0\0\0", True, True),  # morphing: operational change events
        (0x0003, 0, bytes((TRAY_CAPABILITIES, 0, 0, 0)), True, True),  # removable medium
        (0x0010, 0, readable, False, bool(now)),  # random readable
        (0x001E, 2, bytes(4), False, cd),  # CD read
        (0x001F, 1, bytes(4), False, dvd),  # DVD read
        (0x0100, 0, b"", True, True),  # power management
        (0x0105, 1, bytes(4), True, True),  # timeout
    )
    return {
        code: (current, _feature(code, version, data, persistent=persistent, current=current))
        for code, version, data, persistent, current in rows
    }


def configuration_untrusted(cdb: bytes, blocks: int) -> bytes:
    """Build the answer to GET CONFIGURATION (MMC-6 6.6).

    Raises:
        CheckCondition: The request type is reserved.
    """
    kind = cdb[1] & 0x03
    start = int.from_bytes(cdb[2:4], "big")
    if kind == 3:
        raise invalid_cdb_field(1, 1)
    body = b"".join(
        descriptor
        for code, (current, descriptor) in features(blocks).items()
        if (code == start if kind == 2 else code >= start and (current or kind == 0))
    )
    return struct.pack(">IHH", 4 + len(body), 0, profile(blocks)) + body


def event_status_untrusted(cdb: bytes, *, event: int, tray_open: bool, present: bool) -> bytes:
    """Build the answer to GET EVENT STATUS NOTIFICATION (MMC-6 6.7); media events only.

    Raises:
        CheckCondition: Asynchronous operation is asked for.
    """
    if not cdb[1] & 0x01:
        raise invalid_cdb_field(1, 0)
    if not cdb[4] & 0x10:
        return b"\0\x02\x80\x10"  # none of the classes asked for is available
    return bytes((0, 6, 0x04, 0x10, event, present << 1 | tray_open, 0, 0))


def disc_information_untrusted(cdb: bytes) -> bytes:
    """Build the answer to READ DISC INFORMATION (MMC-6 6.21): a finished read-only disc.

    Raises:
        CheckCondition: Information about resources is asked for, of which there are none.
    """
    if cdb[1] & 0x07:
        raise invalid_cdb_field(1, 2)
    return (bytes((0, 32, 0x0E, 1, 1, 1, 1, 0x20))).ljust(34, b"\0")


def track_information_untrusted(cdb: bytes, blocks: int) -> bytes:
    """Build the answer to READ TRACK INFORMATION (MMC-6 6.26) for the one track.

    Raises:
        CheckCondition: Another track, session or a sector outside the medium is asked about.
    """
    kind = cdb[1] & 0x03
    address = int.from_bytes(cdb[2:6], "big")
    if kind == 3:
        raise invalid_cdb_field(1, 1)
    if kind == 0 and address >= blocks:
        raise out_of_range(address, 2)
    if kind and address != 1:
        raise invalid_cdb_field(2)
    # Track 1 of session 1, data, mode 1, last recorded address valid.
    head = bytes((0, 34, 1, 1, 0, 0x04, 0x01, 0x02))
    return head + struct.pack(">IIIIII", 0, 0, 0, 0, blocks, blocks - 1) + bytes(4)


def dvd_structure_untrusted(cdb: bytes, blocks: int) -> bytes:
    """Build the answer to READ DVD STRUCTURE (MMC-6 6.22), formats 0, 1, 4 and FF.

    Raises:
        CheckCondition: The medium is a CD, or a structure that does not exist is asked for.
    """
    if cdb[1] & 0x0F:  # Blu-ray
        raise invalid_cdb_field(1, 3)
    if profile(blocks) != PROFILE_DVD_ROM:
        raise CheckCondition(Sense(ILLEGAL_REQUEST, CANNOT_READ_INCOMPATIBLE_FORMAT))
    if cdb[6]:  # layer
        raise invalid_cdb_field(6)
    kind = cdb[7]
    if kind == 0x00:
        # DVD-ROM, 120 mm, one embossed layer; data area from physical sector 30000h.
        last = min(0x30000 + blocks - 1, 0xFFFFFF)
        body = struct.pack(">BBBBIII", 0x01, 0x0F, 0x01, 0, 0x30000, last, 0).ljust(2048, b"\0")
    elif kind == 0x01:
        body = bytes(4)  # no copy protection, all regions
    elif kind == 0x04:
        body = bytes(2048)
    elif kind == 0xFF:
        body = b"".join(
            struct.pack(">BBH", code, 0x40, size)
            for code, size in ((0x00, 2052), (0x01, 8), (0x04, 2052))
        )
    else:
        raise invalid_cdb_field(7)
    return _with_length(b"\0\0" + body)


def performance_untrusted(cdb: bytes, blocks: int) -> bytes:
    """Build the answer to GET PERFORMANCE (MMC-6 6.8): one read speed all over the medium.

    Raises:
        CheckCondition: Neither performance (0) nor write speeds (3) are asked for.
    """
    kind, data = cdb[10], cdb[1]
    if kind not in {0x00, 0x03}:
        raise invalid_cdb_field(10)
    body = b""
    if kind == 0x00 and not data & 0x07:  # nominal read performance
        body = struct.pack(">IIII", 0, _SPEED, max(blocks - 1, 0), _SPEED)
    limit = 8 + 16 * int.from_bytes(cdb[8:10], "big")
    flags = data >> 1 & 0x02 if kind == 0x00 else 0
    return (struct.pack(">IB3x", 4 + len(body), flags) + body)[:limit]


def mechanism_status(*, tray_open: bool) -> bytes:
    """Build the answer to MECHANISM STATUS (MMC-6 6.11): no changer."""
    return bytes((0, 0x10 if tray_open else 0, 0, 0, 0, 0, 0, 0))

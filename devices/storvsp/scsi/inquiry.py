"""INQUIRY: standard data and vital product data pages (SPC-4 6.4 and 7.8, SBC-3 6.5).

The identity a guest sees is the one Windows guests know from Hyper-V: vendor ``Msft``, product
``Virtual Disk``. Guest drivers key their workarounds on it (Linux tries VPD pages and WRITE SAME
because of it), so it is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from typing import Final

from storvsp.disk import DiskInfo

VENDOR: Final = b"Msft    "
REVISION: Final = b"1.0 "
SPC_3: Final = 0x05

PAGE_SUPPORTED: Final = 0x00
PAGE_SERIAL: Final = 0x80
PAGE_IDENTIFICATION: Final = 0x83
PAGE_BLOCK_LIMITS: Final = 0xB0
PAGE_CHARACTERISTICS: Final = 0xB1
PAGE_PROVISIONING: Final = 0xB2

MAX_COMPARE_AND_WRITE: Final = 128
"""Blocks of one COMPARE AND WRITE."""
MAX_UNMAP_DESCRIPTORS: Final = 256
MAX_WRITE_SAME_BYTES: Final = 1 << 30
"""Bytes one WRITE SAME may set."""

_STANDARD = struct.Struct(">BBBBBBBB8s16s4s")
_VERSIONS = struct.Struct(">HHH")
_NAA_6 = 0x6002248 << 100  # NAA 6, then Microsoft's OUI 00-22-48


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Who a logical unit is.

    Attributes:
        device_type: Peripheral device type: 0 disk, 5 CD-ROM.
        product: 16 bytes, padded with blanks.
        removable: The RMB bit.
        unique: At least one byte, the same as long as the unit exists.
        serial: Unit serial number, printable ASCII.
        standard: Version descriptor of the device type's command set.
    """

    device_type: int
    product: bytes
    removable: bool
    unique: bytes
    serial: bytes
    standard: int


def standard_data(identity: Identity) -> bytes:
    """Build standard INQUIRY data, 96 bytes: SPC-3, tagged queueing, hierarchical LUNs."""
    head = _STANDARD.pack(
        identity.device_type,
        0x80 if identity.removable else 0,
        SPC_3,
        0x12,  # HISUP, response data format 2
        91,
        0,
        0,
        0x02,  # CMDQUE
        VENDOR,
        identity.product,
        REVISION,
    )
    # Version descriptors (SPC-4 table 144): SAM-3, SPC-3 and the command set.
    return (head + bytes(22) + _VERSIONS.pack(0x0060, 0x0300, identity.standard)).ljust(96, b"\0")


def vital_page(device_type: int, page: int, body: bytes) -> bytes:
    """Put the 4-byte header in front of a VPD page."""
    return struct.pack(">BBH", device_type, page, len(body)) + body


def identification(identity: Identity) -> bytes:
    """Build the body of page 83: a T10 vendor designator and an NAA-6 one (SPC-4 7.8.6).

    The NAA number carries 100 bits of a digest of the unit's identity, so that identities which
    differ in any byte differ here.
    """
    name = VENDOR + identity.unique.hex().upper().encode()
    digest = hashlib.blake2b(identity.unique, digest_size=13).digest()
    naa = (_NAA_6 | int.from_bytes(digest, "big") >> 4).to_bytes(16, "big")
    return (
        struct.pack(">BBxB", 0x02, 0x01, len(name))  # ASCII, T10 vendor ID, logical unit
        + name
        + struct.pack(">BBxB", 0x01, 0x03, len(naa))  # binary, NAA, logical unit
        + naa
    )


def block_limits(info: DiskInfo) -> bytes:
    """Build the body of page B0 (SBC-3 6.5.3). Lengths are in logical blocks."""
    sector = info.sector_size
    unmap = info.supports_unmap
    granularity = info.unmap_granularity // sector
    return struct.pack(
        ">BBHIIIIIIIQ",
        0x01,  # WSNZ: WRITE SAME of 0 blocks is refused
        MAX_COMPARE_AND_WRITE,
        max(info.physical_sector_size // sector, 1),
        min(info.max_transfer // sector, 0xFFFFFFFF),
        0,
        0,
        0xFFFFFFFF if unmap else 0,
        MAX_UNMAP_DESCRIPTORS if unmap else 0,
        granularity if unmap else 0,
        0x80000000 if unmap and granularity else 0,  # UGAVALID, alignment 0
        MAX_WRITE_SAME_BYTES // sector,
    ).ljust(0x3C, b"\0")


def characteristics(info: DiskInfo) -> bytes:
    """Build the body of page B1 (SBC-3 6.5.2)."""
    rate = 7200 if info.rotational else 1  # 1: not a rotating medium
    return struct.pack(">H", rate).ljust(0x3C, b"\0")


def provisioning(info: DiskInfo) -> bytes:
    """Build the body of page B2 (SBC-3 6.5.4)."""
    if not info.supports_unmap:
        return bytes(4)
    zero = 0x04 if info.unmapped_reads_zero else 0
    return bytes((0, 0xE0 | zero, 0x02, 0))  # LBPU, LBPWS, LBPWS10; thin


def identity_pages(identity: Identity) -> dict[int, bytes]:
    """Build the bodies of the pages every logical unit has, except page 00."""
    return {PAGE_SERIAL: identity.serial, PAGE_IDENTIFICATION: identification(identity)}


def block_pages(identity: Identity, info: DiskInfo) -> dict[int, bytes]:
    """Build the bodies of a disk's pages, except page 00."""
    return identity_pages(identity) | {
        PAGE_BLOCK_LIMITS: block_limits(info),
        PAGE_CHARACTERISTICS: characteristics(info),
        PAGE_PROVISIONING: provisioning(info),
    }


def supported_pages(pages: Mapping[int, bytes]) -> bytes:
    """Build the body of page 00: the codes of all pages, this one included, in order."""
    return bytes(sorted({PAGE_SUPPORTED, *pages}))

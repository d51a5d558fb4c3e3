"""How the storage drivers of guest operating systems differ, as one table row each.

The rows go with those of :mod:`vmbus.guest.personality`, by their keys. The facts come from
reading the open drivers: linux/drivers/scsi/storvsc_drv.c, freebsd/sys/dev/hyperv/storvsc,
illumos uts/intel/io/hyperv, openbsd/sys/dev/pv/hvs.c, netbsd/sys/dev/hyperv, MacHyperVSupport,
mu_msvm/MsvmPkg/StorvscDxe, haiku/src/add-ons/kernel. Where the source of one says nothing the row
says what its relatives do.
"""

from __future__ import annotations

import dataclasses
from enum import Enum, auto


class Scan(Enum):
    """How a storage driver looks for disks."""

    LINUX = auto()
    """INQUIRY of LUN 0 on 8 paths of 2 targets, REPORT LUNS, INQUIRY of each LUN listed."""
    CAM = auto()
    """The same on targets 0 to 2 of path 0."""
    INQUIRY_ALL = auto()
    """INQUIRY on 2 targets of 64 LUNs each."""
    TEST_UNIT_READY = auto()
    """TEST UNIT READY on 64 LUNs of target 0; srb_status 0x20 alone means absent."""
    REPORT_LUNS = auto()
    """REPORT LUNS with an allocation length of 0 on targets 0, 1, 2; all have to succeed."""
    ONE_TARGET = auto()
    """INQUIRY on the 64 LUNs of target 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageHabits:
    """The storage driver of one family. Defaults are what most of them do."""

    # Handshake.
    versions: tuple[int, ...] = (0x602, 0x600, 0x501, 0x402, 0x200)
    """Versions of vstor, major << 8 | minor, offered in this order."""
    init_size: int = 64
    """Bytes of vstor packets before a version is agreed on."""
    init_id: int | None = None
    """Transaction id of the handshake's requests, if it is a fixed one."""
    exact_refusal: bool = False
    """Crashes on a version refusal other than 0xC0000059, and checks the version's echo."""
    exact_reply: bool = True
    """A reply has to have 64 bytes exactly, else at least 48."""
    address_from_properties: bool = False
    """The first word of the properties is taken as path and target."""

    # Channels.
    ring_pages: int = 32
    """Pages of each ring of a channel, control page included."""
    vps_per_sub_channel: int | None = 1
    """It wants (VPs - 1) // this many sub-channels; None: it never asks for any."""
    queue_depth: int = 128
    """Requests in flight per channel."""

    # Commands.
    max_transfer: int = 128 << 20
    """Bytes per request; the driver sends no larger ones whatever the host allows."""
    reset_id: int | None = None
    """Transaction id of RESET_BUS, if it is a fixed one."""

    # Finding disks.
    scan: Scan = Scan.LINUX
    rescans_on_enumerate: bool = True
    rescans_on_remove: bool = False


LINUX = StorageHabits(
    versions=(0x602, 0x600, 0x501),
    init_id=0xFFFF_FFFF_FFFF_FFFD,  # VMBUS_RQST_INIT
    ring_pages=32,
    vps_per_sub_channel=4,  # storvsc_vcpus_per_sub_channel
    queue_depth=352,
    reset_id=0xFFFF_FFFF_FFFF_FFFC,  # VMBUS_RQST_RESET
    scan=Scan.LINUX,
)

FREEBSD = StorageHabits(
    init_size=48,
    ring_pages=64,
    max_transfer=128 << 10,
    scan=Scan.CAM,
)

OPENBSD = StorageHabits(
    init_id=0,  # hvs_init_cmd, and it wants the answer
    address_from_properties=True,
    ring_pages=21,
    vps_per_sub_channel=None,
    scan=Scan.INQUIRY_ALL,
    rescans_on_enumerate=False,
)

MACOS = StorageHabits(
    init_size=48,
    ring_pages=513,
    vps_per_sub_channel=None,
    queue_depth=1,
    scan=Scan.TEST_UNIT_READY,
    rescans_on_remove=True,
)

UEFI = StorageHabits(
    versions=(0x600,),
    exact_refusal=True,
    exact_reply=False,
    ring_pages=11,
    vps_per_sub_channel=None,
    scan=Scan.REPORT_LUNS,
    rescans_on_enumerate=False,
)

HAIKU = StorageHabits(
    versions=(0x601, 0x600, 0x501, 0x402, 0x200),
    init_size=48,
    exact_reply=False,
    ring_pages=513,
    vps_per_sub_channel=None,
    queue_depth=2,
    max_transfer=256 << 10,
    scan=Scan.ONE_TARGET,
    rescans_on_remove=True,
)

HABITS: dict[str, StorageHabits] = {
    "linux-6.1": LINUX,
    "linux-new": LINUX,
    "freebsd": FREEBSD,
    "illumos": dataclasses.replace(
        FREEBSD, max_transfer=512 << 10, scan=Scan.INQUIRY_ALL, rescans_on_enumerate=False
    ),
    "openbsd": OPENBSD,
    "netbsd": dataclasses.replace(OPENBSD, vps_per_sub_channel=1),
    "dpdk": dataclasses.replace(LINUX, ring_pages=512),
    "macos": MACOS,
    "uefi": UEFI,
    "haiku": HAIKU,
}
"""All rows, by :attr:`vmbus.guest.personality.Personality.key`."""

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


class Room(Enum):
    """How long a vstor packet from the host may be, descriptor not counted."""

    ANY = auto()
    """It is read where it lies in the ring, or into a buffer that grows."""
    FIXED = auto()
    """As long as :attr:`StorageHabits.buffer`, always."""
    REQUEST = auto()
    """As long as the packets that the driver itself sends at that time."""
    HANDSHAKE = auto()
    """The same for the answers of the handshake; others may have any length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageHabits:
    """The storage driver of one family. Defaults are what most of them do."""

    # Handshake.
    versions: tuple[int, ...] = (0x602, 0x600, 0x501, 0x402, 0x200)
    """Versions of vstor, major << 8 | minor, offered in this order."""
    init_size: int = 48
    """Bytes of vstor packets before a version is agreed on."""
    sized_by_version: bool = True
    """Later packets have 48 bytes up to protocol 4.2 and 64 from 5.1 on, else 64 always."""
    size_outlives: bool = False
    """The size agreed on is kept in one place for all controllers: the next one begins with it."""
    init_id: int | None = None
    """Transaction id of the handshake's requests, if it is a fixed one."""
    exact_refusal: bool = False
    """Crashes on a version refusal other than 0xC0000059, and checks the version's echo."""
    address_from_properties: bool = False
    """The first word of the properties is taken as path and target."""

    # Channels.
    ring_pages: int = 32
    """Pages of each ring of a channel, control page included."""
    vps_per_sub_channel: int | None = 1
    """It wants (VPs - 1) // this many sub-channels; None: it never asks for any."""
    queue_depth: int = 128
    """Requests in flight per channel."""

    # What the host sends.
    room: Room = Room.ANY
    buffer: int = 64
    """Bytes of packet that fit with :attr:`Room.FIXED`."""
    too_long: str = ""
    """What becomes of a packet for which there is no room."""
    min_answer: int = 48
    """Fewest bytes of an answer. With less than 48 every driver would take what is left in its
    buffer for sense data, also one that does not look at the length."""
    min_notice: int = 4
    """Fewest bytes of a packet that nobody has asked for; most drivers read the operation only."""
    too_short: str = "what stood in the buffer before is taken for the rest"
    """What becomes of a shorter packet."""
    resize_srb: tuple[int, ...] = ()
    """SRB statuses beside which the sense data 6/2A/09 (capacity data has changed) makes the driver
    ask for the new size; beside others it goes on with the old one. None: it never looks there."""

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
    init_size=64,  # storvsc_execute_vstor_op; 48 until vmscsi_size_delta went in 6.0
    init_id=0xFFFF_FFFF_FFFF_FFFD,  # VMBUS_RQST_INIT
    ring_pages=32,
    vps_per_sub_channel=1,  # handle_multichannel_storage; the module parameter scales queues only
    queue_depth=352,
    reset_id=0xFFFF_FFFF_FFFF_FFFC,  # VMBUS_RQST_RESET
    room=Room.FIXED,  # STORVSC_MAX_PKT_SIZE
    too_long="hv_pkt_iter_first cuts it off and takes the rest for the next packet",
    min_answer=64,  # storvsc_on_channel_callback: minlen
    too_short='"Invalid pkt", and the request is waited for until it times out or for ever',
    resize_srb=(0x84, 0x82, 0x86),  # storvsc_handle_error
    scan=Scan.LINUX,
)

# linux-5.4 and 5.10.198, drivers/scsi/storvsc_drv.c: the packet is read in the ring, by the size
# that was agreed on, whatever its length (storvsc_on_channel_callback).
LINUX_OLD = StorageHabits(
    versions=(0x602, 0x600, 0x501, 0x402, 0x200),  # vmstor_protocols
    init_size=48,  # vmscsi_size_delta, static, and storvsc_probe leaves it alone
    size_outlives=True,
    ring_pages=32,
    vps_per_sub_channel=1,
    queue_depth=352,
    too_short="storvsc_on_channel_callback reads on into the next packet",
    resize_srb=(0x82,),  # storvsc_handle_error of 5.4; 5.10.198 has the fix of 2022
    scan=Scan.LINUX,
)

FREEBSD = StorageHabits(
    init_size=48,  # vmscsi_size_delta, static
    size_outlives=True,
    ring_pages=64,
    max_transfer=128 << 10,  # STORVSC_DATA_SIZE_MAX
    room=Room.REQUEST,  # hv_storvsc_on_channel_callback: roundup2(VSTOR_PKT_SIZE, 8)
    too_long="ENOBUFS: a KASSERT, or without one it stays in the ring for ever",
    scan=Scan.CAM,
)

ILLUMOS = dataclasses.replace(
    FREEBSD,
    max_transfer=512 << 10,
    scan=Scan.INQUIRY_ALL,
    rescans_on_enumerate=False,
    too_long="ENOBUFS: an ASSERT, or without one it stays in the ring for ever",
)

OPENBSD = StorageHabits(
    init_size=64,  # HVS_CMD_SIZE
    sized_by_version=False,  # hvs_scsi_cmd: sizeof(cmd)
    init_id=0,  # hvs_cmd, and it wants the answer
    address_from_properties=True,
    ring_pages=21,
    vps_per_sub_channel=None,
    room=Room.FIXED,  # hvs_intr
    too_long="hv_channel_recv: EINVAL, and it stays in the ring for ever",
    min_answer=64,  # hvs_intr: rlen != sizeof(cmd)
    min_notice=64,
    too_short="hvs_intr: a short read, and what lies behind it in the ring is not looked at",
    scan=Scan.INQUIRY_ALL,
    rescans_on_enumerate=False,  # transaction id 0: it goes where answers of the handshake go
)

NETBSD = dataclasses.replace(
    OPENBSD,
    init_id=None,  # hvs_get_ccb: a slot as for any other command
    rescans_on_enumerate=True,  # hvs_intr
)

# HyperVVMBusDevice::handleInterrupt doubles its buffer, writeInbandPacket copies what fits.
MACOS = StorageHabits(
    init_size=48,  # HyperVStorage::InitializeController: _packetSizeDelta
    ring_pages=513,
    vps_per_sub_channel=None,
    queue_depth=1,
    scan=Scan.TEST_UNIT_READY,
    rescans_on_remove=True,
)

UEFI = StorageHabits(
    versions=(0x600,),
    init_size=48,  # StorChannelOpen: VMSTORAGE_SIZEOF_VSTOR_PACKET_REVISION_1
    exact_refusal=True,
    ring_pages=11,
    vps_per_sub_channel=None,
    room=Room.HANDSHAKE,  # EmclLib: EmclSynchronousPacketCompletion
    too_long="EFI_BUFFER_TOO_SMALL: the controller is given up, and there is no boot disk",
    too_short="StorChannelCompletionRoutine fails fast",
    scan=Scan.REPORT_LUNS,
    rescans_on_enumerate=False,
)

HAIKU = StorageHabits(
    versions=(0x601, 0x600, 0x501, 0x402, 0x200),
    init_size=48,  # HyperVSCSI::_GetMessageLengthDelta: fVersion is 0
    ring_pages=513,
    vps_per_sub_channel=None,
    queue_depth=2,
    max_transfer=256 << 10,
    room=Room.FIXED,
    buffer=512 - 16,  # HV_SCSI_RX_PKT_BUFFER_SIZE, for descriptor and all
    too_long="VMBusDevice::ReadPacket: B_NO_MEMORY, and it stays in the ring for ever",
    scan=Scan.ONE_TARGET,
    rescans_on_remove=True,
)

HABITS: dict[str, StorageHabits] = {
    "linux-6.1": LINUX,
    "linux-new": LINUX,
    "linux-5.10": LINUX_OLD,
    "freebsd": FREEBSD,
    "illumos": ILLUMOS,
    "openbsd": OPENBSD,
    "netbsd": NETBSD,
    "dpdk": dataclasses.replace(LINUX, ring_pages=512),
    "macos": MACOS,
    "uefi": UEFI,
    "haiku": HAIKU,
}
"""All rows, by :attr:`vmbus.guest.personality.Personality.key`."""

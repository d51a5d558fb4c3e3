"""How guest operating systems differ, as one table row each.

A :class:`Personality` holds what one family of drivers does where others do something else. The
facts come from reading the open drivers: linux/drivers/hv, freebsd/sys/dev/hyperv/vmbus, illumos
uts/intel/io/hyperv, openbsd/sys/dev/pv/hyperv.c, netbsd/sys/dev/hyperv, dpdk/drivers/bus,
MacHyperVSupport, mu_msvm/MsvmPkg, haiku/src/add-ons/kernel. Where the source of one says nothing
the row says what its relatives do. What the drivers of one kind of device do is told apart by the
device: its guest half has a table of its own, with the same keys.

Time limits are left out: a guest here waits as long as it takes, and a test never depends on a
clock. What a driver would do when a limit passes is a hung or failed device all the same.
"""

from __future__ import annotations

import dataclasses
from enum import Enum, auto

from vmbus.wire.synic import Privilege
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_V = Version


class AutoEoi(Enum):
    """Whether the SINT ends its own interrupts."""

    ALWAYS = auto()
    NEVER = auto()
    UNLESS_DEPRECATED = auto()
    """According to bit 9 of CPUID 0x40000004."""


class GpadlPadding(Enum):
    """What a driver posts behind the last page number."""

    NONE = auto()
    FULL_HEADER = auto()
    """The header always has room for 26 page numbers, the unused ones are junk."""
    FULL_MESSAGE = auto()
    """Header and bodies are posted with 240 bytes each."""
    SURPLUS_BODIES = auto()
    """All bodies but the last have 240 bytes, zeros behind the page numbers, and there are far more
    of them than the page numbers need: most come when the GPADL is complete."""


class Matching(Enum):
    """How a driver finds the request that a reply belongs to."""

    IDS = auto()
    TYPE = auto()
    """By the type alone: one request at a time, and one reply too many answers the next."""


class Masking(Enum):
    """What a driver does with the interrupt mask of its incoming ring."""

    WHILE_READING = auto()
    """Set, read until empty, clear, look once more."""
    NEVER = auto()
    ALWAYS = auto()
    """Set for good; the ring is polled."""


class FeatureBits(Enum):
    """In which ring headers a driver sets the pending-send-size bit."""

    NONE = auto()
    OUTGOING = auto()
    BOTH = auto()


class FullRing(Enum):
    """What a driver does when its outgoing ring is full."""

    RETRY = auto()
    """Tries again after completions, or a little later."""
    PENDING_SIZE = auto()
    """Writes the bytes wanted into the ring header and waits to be interrupted."""
    SIGNAL_AGAIN = auto()
    """Rings the doorbell again and retries."""


class Rescind(Enum):
    """What a driver does with RESCIND_CHANNELOFFER."""

    RELEASE = auto()
    """Removes the device, then sends RELID_RELEASED."""
    IGNORE = auto()
    """Nothing, and never frees the relid."""


class Unload(Enum):
    """How a driver leaves the bus."""

    WAITS = auto()
    SENDS = auto()
    """Posts UNLOAD and goes on."""
    NEVER = auto()


class TransactionIds(Enum):
    """Where a driver takes the transaction ids of its packets from."""

    COUNTER = auto()
    """1, 2, 3 ... and never the same again."""
    TAG = auto()
    """Slot number + 1, reused."""
    POINTER = auto()
    """Address of a kernel structure, reused."""
    HIGH_INDEX = auto()
    """Slot number << 32."""
    INDEX = auto()
    """Slot number, the first of which is 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Personality:
    """One family of drivers. Defaults are what most of them do.

    It says nothing of devices: what a family's driver of one kind of device does stands in that
    device's own table, where :attr:`key` finds it.
    """

    key: str
    """What it is called on command lines, and in the tables of the devices' drivers."""
    name: str
    """What it is called in texts."""

    # Processor: CPUID, MSRs, hypercalls.
    guest_os_id: int
    """Value for MSR GUEST_OS_ID; never 0."""
    privileges: Privilege = Privilege.HYPERCALL
    """Bits of CPUID 0x40000003 EAX without which the driver does not start."""
    checks_interface: bool = False
    """Wants "Hv#1" in CPUID 0x40000001."""
    checks_root: bool = False
    """Takes itself for the root partition if CPUID says CPU_MANAGEMENT."""
    checks_hypercall_page: bool = False
    """Wants code on the hypercall page, not zeros."""
    every_vp: bool = True
    """Programs the SynIC of all VPs, not of the boot processor only."""
    vector: int = 0xF3
    auto_eoi: AutoEoi = AutoEoi.ALWAYS
    extra_sints: tuple[int, ...] = ()
    """Other SINTs programmed beside SINT 2."""
    reads_msrs_first: bool = False
    vp_assist_page: bool = False
    writes_scontrol: bool = True
    """False: the SynIC has to come out of reset enabled."""
    clears_timers: bool = False
    """Writes 0 to all timer MSRs and masks all 16 SINTs with vector 0 when it leaves."""
    page_aligned_input: bool = False
    """Hypercall input is at the start of a page, else somewhere in it, 8-byte aligned."""
    register_signals: bool = False
    """HvSignalEvent in its register form, else in its memory form."""
    uses_monitor: bool = True
    """Sets a bit of the monitor page, without a hypercall, where the offer has a monitor id."""
    marks_interrupt_page: bool = False
    """Sets the relid's bit in the interrupt page for dedicated channels, too."""
    needs_monitor: bool = False
    """Skips offers without a monitor id."""

    # Control messages.
    versions: tuple[Version, ...]
    """Offered in this order."""
    features: Feature = NO_FEATURES
    """Asked for with 6.0."""
    contact_on_4: bool = False
    """INITIATE_CONTACT goes to connection 4 from version 5.0 on, else always to 1."""
    connection_from_reply: Version | None = Version.V5_0
    """From this version on, later messages go where VERSION_RESPONSE says."""
    garbage_padding: bool = False
    """The header's padding word is not zeroed."""
    exact_sizes: bool = False
    """Crashes on an offer or a reply that is longer than it should be, too; not on a longer
    VERSION_RESPONSE or RESCIND_CHANNELOFFER."""
    matching: Matching = Matching.IDS
    max_relid: int = 2047
    """Offers with a higher relid are not served."""
    drops_confidential: bool = False
    """Ignores offers with channel flags 0x2 or 0x4."""
    long_open: bool = False
    """OPENCHANNEL has 156 bytes also where the connection knows 148, the rest zeros."""
    open_id_zero: bool = False
    """OPENCHANNEL carries open id 0, else the relid."""
    spreads_vps: bool = False
    """Channels are given to the VPs in turn, else all to VP 0."""
    first_gpadl: int = 0xE1E10
    gpadl_reuse: int = 0
    """Handles count from 1 to this and start again with the lowest free one; 0: count up."""
    gpadl_padding: GpadlPadding = GpadlPadding.NONE
    numbers_bodies: bool = True
    """message_number of GPADL_BODY counts, else it is 0 in all."""
    frees_before_teardown: bool = False
    """Ring memory is freed after CLOSE, before GPADL_TEARDOWN is even sent."""
    rescind: Rescind = Rescind.RELEASE
    unload: Unload = Unload.WAITS
    unload_since: Version = Version.V0_13
    strict_flags: bool = False
    """Crashes on an event flag of a channel that it has not opened."""

    # Rings.
    masking: Masking = Masking.WHILE_READING
    feature_bits: FeatureBits = FeatureBits.NONE
    counts_signals: bool = False
    """Counts the signals it sends at the end of the ring header."""
    signals_free_space: bool = True
    """Signals a host that waits for room in the incoming ring."""
    full_ring: FullRing = FullRing.RETRY
    max_packet: int | None = None
    """Largest incoming ring packet in bytes, of a channel without a limit of its own; None: it is
    read in the ring, or into a buffer that grows."""
    too_large: str = ""
    """What becomes of a larger one."""
    transaction_ids: TransactionIds = TransactionIds.POINTER

    def __str__(self) -> str:
        return self.name


_LADDER_5 = (_V.V5_3, _V.V5_2, _V.V5_1, _V.V5_0, _V.V4_1, _V.V4_0, _V.V3_0, _V.V2_4)
_LADDER_4 = (_V.V4_0, _V.V3_0, _V.V2_4, _V.V1_1, _V.V0_13)
_LADDER_3 = _LADDER_4[1:]

LINUX_6_1 = Personality(
    key="linux-6.1",
    name="Linux 6.1",
    guest_os_id=0x8100 << 48 | 0x060100 << 16,
    privileges=Privilege.HYPERCALL | Privilege.VP_INDEX,
    checks_root=True,  # ms_hyperv_init_platform: no VMBus in a root partition
    auto_eoi=AutoEoi.UNLESS_DEPRECATED,
    reads_msrs_first=True,  # hv_synic_enable_regs
    vp_assist_page=True,  # hv_cpu_init, unconditionally
    page_aligned_input=True,  # hyperv_pcpu_input_arg
    register_signals=True,  # vmbus_set_event
    versions=_LADDER_5,
    contact_on_4=True,  # vmbus_negotiate_version
    spreads_vps=True,
    unload_since=_V.V3_0,  # vmbus_initiate_unload
    feature_bits=FeatureBits.BOTH,
    max_packet=4096,  # VMBUS_DEFAULT_MAX_PKT_SIZE, since 5.13
    too_large="hv_pkt_iter_first cuts it off and takes the rest for the next packet",
    transaction_ids=TransactionIds.TAG,
)

# linux-5.4 and 5.10.198, drivers/hv: packets are read in the ring, ids are pointers.
LINUX_5_10 = dataclasses.replace(
    LINUX_6_1,
    key="linux-5.10",
    name="Linux 5.10",
    guest_os_id=0x8100 << 48 | 0x050A00 << 16,
    versions=(*_LADDER_5[1:], _V.V1_1, _V.V0_13),  # vmbus_versions
    max_packet=None,
    transaction_ids=TransactionIds.POINTER,
)

LINUX_NEW = dataclasses.replace(
    LINUX_6_1,
    key="linux-new",
    name="Linux with VMBus 6.0",
    versions=(_V.V6_0, *_LADDER_5),
    drops_confidential=True,
)

FREEBSD = Personality(
    key="freebsd",
    name="FreeBSD",
    guest_os_id=0x8200 << 48 | 0x0E0000 << 16,
    privileges=Privilege.HYPERCALL | Privilege.SYNIC,
    checks_interface=True,
    vector=0x60,
    extra_sints=(4,),  # vmbus_synic_setup: the timer's
    marks_interrupt_page=True,  # vmbus_chan_signal
    versions=_LADDER_4,
    matching=Matching.TYPE,  # vmbus_msghc_wait_result
    spreads_vps=True,
    numbers_bodies=False,  # vmbus_chan_gpadl_connect
    unload=Unload.SENDS,  # vmbus_disconnect
)

ILLUMOS = dataclasses.replace(
    FREEBSD,
    key="illumos",
    name="illumos",
    guest_os_id=0x8400 << 48 | 0x050B << 16,
    versions=_LADDER_3,
)

OPENBSD = Personality(
    key="openbsd",
    name="OpenBSD",
    guest_os_id=0x8300 << 48 | 0x0706 << 16,
    every_vp=False,  # hv_boot_cpu only
    vector=0x70,
    marks_interrupt_page=True,  # hv_channel_setevent
    needs_monitor=True,  # hv_process_offer skips the others
    versions=_LADDER_4,
    matching=Matching.TYPE,  # hv_cmd
    gpadl_padding=GpadlPadding.SURPLUS_BODIES,  # hv_handle_alloc: left / n + left % n bodies
    numbers_bodies=False,  # hv_handle_alloc
    frees_before_teardown=True,  # hv_channel_close
    rescind=Rescind.IGNORE,  # prints a line
    unload=Unload.NEVER,
    signals_free_space=False,
    max_packet=4096,  # hv_attach_internal: ch_buf
    too_large="hv_channel_recv: EINVAL, and it stays in the ring for ever",
    transaction_ids=TransactionIds.HIGH_INDEX,
)

NETBSD = dataclasses.replace(
    OPENBSD,
    key="netbsd",
    name="NetBSD",
    guest_os_id=0x8300 << 48 | 0x0A00 << 16,
    every_vp=True,
    needs_monitor=False,
    versions=_LADDER_3,
    spreads_vps=True,
    frees_before_teardown=False,
    rescind=Rescind.RELEASE,
    transaction_ids=TransactionIds.INDEX,  # hvs_alloc_ccbs
)

DPDK = dataclasses.replace(
    LINUX_6_1,
    key="dpdk",
    name="DPDK on Linux",
    needs_monitor=True,  # uio_hv_generic refuses the device
    masking=Masking.ALWAYS,
    max_packet=None,  # rte_vmbus_chan_recv_raw tells how much is needed
)

MACOS = Personality(
    key="macos",
    name="macOS",
    guest_os_id=0x8500 << 48 | 0x0A0F << 16,
    checks_interface=True,
    vector=0x45,  # from the ACPI IRQ
    auto_eoi=AutoEoi.NEVER,
    extra_sints=(4,),
    register_signals=True,
    uses_monitor=False,
    versions=_LADDER_4,
    garbage_padding=True,
    matching=Matching.TYPE,
    max_relid=255,
    gpadl_padding=GpadlPadding.FULL_HEADER,
    numbers_bodies=False,
    unload=Unload.SENDS,
    masking=Masking.NEVER,
    counts_signals=True,
    signals_free_space=False,
    full_ring=FullRing.SIGNAL_AGAIN,
    transaction_ids=TransactionIds.COUNTER,  # 0 is forbidden
)

UEFI = Personality(
    key="uefi",
    name="UEFI",
    guest_os_id=0x0001_0000_0000_0001,
    privileges=Privilege.TIME_REF_COUNT
    | Privilege.SYNIC
    | Privilege.SYNTHETIC_TIMERS
    | Privilege.HYPERCALL,
    checks_hypercall_page=True,
    every_vp=False,
    vector=0x50,
    auto_eoi=AutoEoi.UNLESS_DEPRECATED,
    writes_scontrol=False,
    clears_timers=True,  # at ExitBootServices
    register_signals=True,
    uses_monitor=False,
    versions=(_V.V6_0, _V.V3_0),
    features=Feature.CLIENT_ID,  # VmbusRoot.c: VMBUS_SUPPORTED_FEATURE_FLAGS
    connection_from_reply=None,
    exact_sizes=True,
    long_open=True,  # VmbusChannelOpenChannel: sizeof(sendMessage.OpenChannel)
    open_id_zero=True,
    first_gpadl=1,
    gpadl_reuse=255,
    gpadl_padding=GpadlPadding.FULL_MESSAGE,
    numbers_bodies=False,  # VmbusRootInitializeMessage
    rescind=Rescind.IGNORE,
    strict_flags=True,
    feature_bits=FeatureBits.OUTGOING,
    full_ring=FullRing.PENDING_SIZE,
    transaction_ids=TransactionIds.COUNTER,
)

HAIKU = Personality(
    key="haiku",
    name="Haiku",
    guest_os_id=0x8600 << 48 | 0x0005 << 16,
    vector=0x45,  # ACPI IRQ + base
    auto_eoi=AutoEoi.NEVER,
    register_signals=True,
    uses_monitor=False,
    versions=(*_LADDER_5, _V.V1_1, _V.V0_13),
    connection_from_reply=None,  # VMBusRequest: VMBUS_CONNID_MESSAGE, whatever the reply says
    max_relid=31,  # its word pointer lags by one from 32 on
    first_gpadl=1,
    numbers_bodies=False,  # VMBus::AllocateGPADL
    counts_signals=True,
)

PERSONALITIES: dict[str, Personality] = {
    each.key: each
    for each in (
        LINUX_6_1,
        LINUX_NEW,
        LINUX_5_10,
        FREEBSD,
        ILLUMOS,
        OPENBSD,
        NETBSD,
        DPDK,
        MACOS,
        UEFI,
        HAIKU,
    )
}
"""All rows, by their keys."""

"""How the network drivers of guest operating systems differ, as one table row each.

The rows go with those of :mod:`vmbus.guest.personality`, by their keys. The facts come from reading
the open drivers: linux/drivers/net/hyperv, freebsd/sys/dev/hyperv/netvsc, illumos uts/intel/io/
hyperv/netvsc, openbsd/sys/dev/pv/if_hvn.c, netbsd/sys/dev/hyperv/if_hvn.c, dpdk/drivers/net/netvsc
with linux/drivers/uio/uio_hv_generic.c below it, MacHyperVSupport/Network, mu_msvm/MsvmPkg/
NetvscDxe. Haiku has no such driver.
"""

from __future__ import annotations

import dataclasses
from enum import Enum, auto

from netvsp.wire import nvsp, oids, rndis

_MB = 1 << 20


class Step(Enum):
    """What a driver does once its buffers are with the device."""

    INITIALIZE = auto()
    FRAME_SIZE = auto()
    PERMANENT_ADDRESS = auto()
    CURRENT_ADDRESS = auto()
    FRIENDLY_NAME = auto()
    QUERY_OFFLOADS = auto()
    SET_OFFLOADS = auto()
    CONNECT_STATUS = auto()
    LINK_SPEED = auto()
    QUERY_SCALING = auto()
    NO_FILTER = auto()
    """Sets the packet filter to 0, which it should be by itself."""
    SUB_CHANNELS = auto()
    """Asks for sub-channels, opens them, sets the parameters of receive-side scaling."""


class End(Enum):
    """What a driver says before it closes its channel."""

    HALT = auto()
    REVOKE = auto()
    """REVOKE_RECEIVE_BUFFER, and REVOKE_SEND_BUFFER if there is one."""


class Teardown(Enum):
    """When a driver takes its buffers back."""

    BY_VERSION = auto()
    """After CLOSE from VMBus 4.0 on, else each one after its REVOKE."""
    BEFORE_CLOSE = auto()
    AFTER_CLOSE = auto()
    NEVER = auto()


class Buffers(Enum):
    """When a driver describes its buffers to the host."""

    IN_TURN = auto()
    """Each before it is sent."""
    TOGETHER = auto()
    """Both before the first is sent."""
    BEFORE_OPEN = auto()
    """The kernel has done it when the device was found."""


class Form(Enum):
    """How a driver passes frames that it does not copy into its send buffer."""

    RANGES = auto()
    """A range for the header, one for each piece of the frame, however many pages it has."""
    PAGES = auto()
    """A range for the header, one for each page."""
    NONE = auto()
    """It copies them all."""


class HashItem(Enum):
    """When a driver says what a flow's hash is."""

    NEVER = auto()
    WITH_SUB_CHANNELS = auto()
    ALWAYS = auto()
    """From version 5 on."""


class Offloads(Enum):
    """What a driver switches on."""

    LINUX = auto()
    """TCP and UDP both ways and large sends, if all of TCP is there; no sum of the IPv4 header."""
    EACH = auto()
    """Each that is there, in the direction in which it is."""
    EVERYTHING = auto()
    """All sums, without having asked what is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkHabits:
    """The network driver of one family. Defaults are what most of them do."""

    # NVSP.
    versions: tuple[int, ...] = (
        nvsp.VERSION_6_1,
        nvsp.VERSION_6,
        nvsp.VERSION_5,
        nvsp.VERSION_4,
        nvsp.VERSION_2,
        nvsp.VERSION_1,
    )
    """Offered in this order."""
    keeps_version: bool = False
    """When it opens the device again it offers the version that was in force, no other."""
    message_size: int = 40
    """Bytes of an NVSP message that it sends."""
    capabilities: tuple[tuple[int, int], ...] = ((nvsp.VERSION_2, nvsp.CAPABILITY_8021Q),)
    """``(version, bits)``: what it says it can do, from this version on."""
    config_mtu: int | None = None
    """What SEND_NDIS_CONFIG has as the MTU, if it is always the same."""
    config_header: int = 14
    """Else this is added to the MTU."""
    ndis_version: tuple[int, int] | None = None
    """Else 6.1 up to version 4 and 6.30 from 5 on."""
    asks_completions: bool = False
    """SEND_NDIS_CONFIG and SEND_NDIS_VERSION want to be completed."""
    empty_completions: bool = False
    """With something in it such a completion is taken for an answer of that type."""
    min_answer: int = 0
    """Fewest bytes of INIT_COMPLETE and SEND_RECEIVE_BUFFER_COMPLETE; at least what they have."""
    min_sub_channels: int = 12
    """Fewest bytes of the answer to SUBCHANNEL."""
    answer_room: int | None = None
    """Most bytes of any answer; None: what is too much is not looked at."""
    nvsp_ids: int | None = None
    """First transaction id of its own for NVSP, which counts; None: in the personality's style."""
    nvsp_id_zero: bool = False
    """NVSP and RNDIS requests all have transaction id 0."""
    control_ids: bool = False
    """The transaction id of an RNDIS request is that request's id."""
    data_ids: tuple[int, int] | None = None
    """``(base, shift)``: the transaction id of a frame is its slot << shift, + base."""

    # Buffers.
    receive_size: int = 16 * _MB
    receive_size_old: int = 15 * _MB
    """Up to version 2."""
    receive_id: int = nvsp.RECEIVE_BUFFER_ID
    send_size: int = 15 * _MB
    """0: it has no send buffer."""
    send_id: int = 0xFACE
    buffers: Buffers = Buffers.IN_TURN
    min_section: int = 1
    """Fewest bytes of a sub-allocation and of a section of the send buffer."""
    section_multiple: int = 1
    """Bytes of a section are a multiple of this."""

    # RNDIS requests.
    max_transfer: int = 0x4000
    request_ids: tuple[int, int] = (1, 1)
    """First id and step."""
    fixed_ids: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """By message type: ids that it has for its requests, one after the other, and again."""
    control_in_section: bool = False
    """Requests are in the send buffer, else on a page of their own."""
    reply_room: int | None = None
    """Most bytes of a reply; None: any."""
    info_behind: bool = False
    """It takes the data of a query from right behind the header, wherever it is said to be."""
    steps: tuple[Step, ...]
    up_steps: tuple[Step, ...] = ()
    """What it asks when it goes up."""
    up_filter: int = oids.FILTER_DIRECTED | oids.FILTER_ALL_MULTICAST | oids.FILTER_BROADCAST
    offloads: Offloads = Offloads.EACH
    offloads_required: bool = True
    """Without an answer to what the offloads are there is no device."""

    # Channels.
    ring_pages: int = 128
    """Pages of each ring of a channel, control page included."""
    max_packet: int | None = None
    """Bytes of the longest packet that it has room for; None: the personality's."""
    max_channels: int = 8
    """1: it never asks for more."""
    scaling_disabled_first: bool = False
    """It switches receive-side scaling off before it sets its parameters."""
    scaling_required: bool = True
    table_as_wanted: bool = False
    """Its table has the channels that it has asked for, also if it was granted fewer."""
    key_first: bool = False
    """See :func:`netvsp.wire.ndis.build_rss_parameters`."""

    # What the host sends.
    checks_set_id: bool = True
    exact_header: bool = False
    """The header of a transfer-page packet is as long as its ranges, of which there is one."""
    ids_are_indexes: bool = False
    """It takes the transaction id for the number of a sub-allocation."""
    one_sub_allocation: bool = False
    """It copies a range to a buffer as large as a sub-allocation."""
    completion_size: int = 8
    completes_when_taken: bool = False
    """A packet is completed when its first frame is taken from the queue, else when it is read."""
    reads_items: bool = True
    """It looks at per-packet information."""
    notices: frozenset[int] | None = frozenset(
        {nvsp.SEND_VF_ASSOCIATION, nvsp.SEND_INDIRECTION_TABLE}
    )
    """In-band messages that it takes; None: it takes any, and does nothing."""
    notices_in_handshake: bool = True
    """Else one of them, other than SEND_INDIRECTION_TABLE, is taken for the answer."""
    uses_send_table: bool = False
    wrong_notice: str = "it logs an error"

    # Sending.
    form: Form = Form.PAGES
    max_ranges: int = 32
    section_limit: int | None = None
    """Bytes of the longest message that it copies into its send buffer; None: what fits."""
    batches: bool = True
    """It puts several messages into one section."""
    partial: bool = False
    """It may leave the frame of the last one where it is."""
    hash_item: HashItem = HashItem.ALWAYS
    header_offsets: bool = True
    """CHECKSUM says where the TCP or UDP header is."""
    data_channel: int = nvsp.CHANNEL_DATA
    """The channel type of frames."""
    header_gap: int = 0
    """Bytes between the RNDIS header and the frame that are neither."""

    # Changes and the end.
    changes_mtu: bool = True
    """By closing the device and opening it again."""
    keeps_sections: bool = False
    """It comes back with a receive buffer of as many bytes as its sub-allocations had."""
    changes_address: bool = False
    ending: tuple[End, ...] = (End.HALT, End.REVOKE)
    teardown: Teardown = Teardown.BY_VERSION
    waits_when_removed: bool = False
    """When the host has taken it away it waits for all answers, of which none comes any more."""

    def capabilities_of(self, version: int) -> int:
        """Return what SEND_NDIS_CONFIG says in a version. Cannot block."""
        bits = 0
        for since, more in self.capabilities:
            if version >= since:
                bits |= more
        return bits


_LINUX_CAPABILITIES = (
    (nvsp.VERSION_2, nvsp.CAPABILITY_8021Q),
    (nvsp.VERSION_5, nvsp.CAPABILITY_SRIOV | nvsp.CAPABILITY_TEAMING),
    (nvsp.VERSION_6_1, nvsp.CAPABILITY_RSC),
)

LINUX = NetworkHabits(
    capabilities=_LINUX_CAPABILITIES,  # negotiate_nvsp_ver
    min_answer=28,  # netvsc_send_completion: its cases fall through
    receive_size=16 * _MB,  # NETVSC_DEFAULT_RX sections of 1728, in whole pages
    send_size=170 * 6144,  # NETVSC_DEFAULT_TX
    send_id=0,  # NETVSC_SEND_BUFFER_ID
    min_section=68,  # netvsc_init_buf: NETVSC_MTU_MIN, of both
    reply_room=52 + 4096,  # rndis_filter_receive_response
    steps=(  # rndis_filter_device_add
        Step.INITIALIZE,
        Step.FRAME_SIZE,
        Step.PERMANENT_ADDRESS,
        Step.FRIENDLY_NAME,
        Step.QUERY_OFFLOADS,
        Step.SET_OFFLOADS,
        Step.CONNECT_STATUS,
        Step.LINK_SPEED,
        Step.QUERY_SCALING,
        Step.SUB_CHANNELS,
    ),
    offloads=Offloads.LINUX,  # rndis_netdev_set_hwcaps
    ring_pages=128,  # netvsc_drv_init: VMBUS_RING_SIZE
    max_packet=24 + 562 * 8 + 40 + 64,  # NETVSC_MAX_PKT_SIZE
    max_channels=8,  # VRSS_CHANNEL_DEFAULT
    scaling_disabled_first=True,  # rndis_filter_set_rss_param
    scaling_required=False,  # rndis_set_subchannel
    table_as_wanted=True,  # rndis_filter_device_add: before it is granted any
    one_sub_allocation=True,  # netvsc_receive: nvchan->recv_buf
    completion_size=8,  # send_recv_completions
    uses_send_table=True,  # netvsc_send_table
    form=Form.RANGES,  # netvsc_build_mpb_array
    max_ranges=19,  # MAX_DATA_RANGES, with MAX_SKB_FRAGS 17
    partial=True,  # netvsc_send: cp_partial
    hash_item=HashItem.WITH_SUB_CHANNELS,  # netvsc_xmit
    keeps_sections=True,  # netvsc_devinfo_get
    changes_address=True,  # rndis_filter_set_device_mac
    teardown=Teardown.BY_VERSION,  # netvsc_device_remove
    waits_when_removed=True,  # rndis_filter_halt_device; vmbus_reset_channel_cb
)

LINUX_NEW = dataclasses.replace(LINUX, max_ranges=32)  # CONFIG_MAX_SKB_FRAGS may be more

# linux-5.10: packets are read in the ring, frames are lists of pages, and nothing is copied out of
# the receive buffer before it is looked at.
LINUX_OLD = dataclasses.replace(
    LINUX,
    min_section=1,
    max_packet=None,
    one_sub_allocation=False,
    form=Form.PAGES,  # vmbus_sendpacket_pagebuffer
    max_ranges=32,  # MAX_PAGE_BUFFER_COUNT
)

FREEBSD = NetworkHabits(
    keeps_version=True,  # hn_nvs_init
    message_size=32,  # HN_NVS_REQSIZE_MIN
    capabilities=(  # hn_nvs_conf_ndis
        (nvsp.VERSION_2, nvsp.CAPABILITY_8021Q),
        (nvsp.VERSION_6_1, nvsp.CAPABILITY_RSC),
    ),
    config_header=0,  # hn_nvs_conf_ndis: the bare MTU
    receive_size=31 * _MB,  # HN_RXBUF_SIZE
    request_ids=(1 << 16, 1 << 16),  # hn_rndis_rid
    max_transfer=2048,  # HN_RNDIS_XFER_SIZE
    reply_room=8192,  # HN_XACT_RESP_SIZE
    steps=(  # hn_attach, hn_synth_attach
        Step.INITIALIZE,
        Step.QUERY_OFFLOADS,
        Step.SET_OFFLOADS,
        Step.QUERY_SCALING,
        Step.SUB_CHANNELS,
        Step.NO_FILTER,
        Step.PERMANENT_ADDRESS,
        Step.FRAME_SIZE,
        Step.CONNECT_STATUS,
    ),
    offloads_required=False,  # hn_rndis_attach
    key_first=True,  # struct ndis_rssprm_toeplitz
    completion_size=32,  # struct hn_nvs_rndis_ack
)

ILLUMOS = dataclasses.replace(
    FREEBSD,
    versions=(nvsp.VERSION_5, nvsp.VERSION_4, nvsp.VERSION_2, nvsp.VERSION_1),
    receive_size=16 * _MB,
    notices=frozenset({nvsp.SEND_INDIRECTION_TABLE}),
    teardown=Teardown.BEFORE_CLOSE,  # hn_nvs_disconn_rxbuf, hn_nvs_disconn_chim
)

OPENBSD = NetworkHabits(
    versions=(nvsp.VERSION_5, nvsp.VERSION_4, nvsp.VERSION_2, nvsp.VERSION_1),
    message_size=32,
    config_mtu=9216,  # HVN_MAXMTU
    asks_completions=True,  # hvn_nvs_attach: a time limit, so a completion
    empty_completions=True,  # hvn_nvs_intr: what stood in the buffer is taken for the answer
    nvsp_ids=1,  # sc_nvstid
    control_ids=True,  # hvn_rndis_cmd
    data_ids=(0, 32),  # hvn_rndis_output
    receive_id=0x2409,  # HVN_NVS_RXBUF_SIG
    send_size=0,
    max_transfer=2048,
    reply_room=24 + 512,  # rc_cmp, rc_cmpbuf
    info_behind=True,  # hvn_rndis_query: rc_cmpbuf
    steps=(Step.INITIALIZE, Step.SET_OFFLOADS, Step.PERMANENT_ADDRESS),  # hvn_attach
    up_steps=(Step.CONNECT_STATUS,),  # hvn_media_status
    offloads=Offloads.EVERYTHING,  # hvn_set_capabilities
    ring_pages=11,
    max_channels=1,
    checks_set_id=False,  # hvn_rndis_input
    completion_size=32,
    notices=frozenset(),  # hvn_nvs_intr
    max_ranges=16,  # HVN_TX_FRAGS + 1
    section_limit=0,
    batches=False,
    hash_item=HashItem.NEVER,
    header_offsets=False,  # hvn_encap
    changes_mtu=False,
    teardown=Teardown.BEFORE_CLOSE,  # hvn_rx_ring_destroy
)

NETBSD = dataclasses.replace(
    OPENBSD,
    data_ids=(0x1984 << 32, 32),  # HVN_NVS_CHIM_SIG
    ring_pages=20,
    notices=frozenset({nvsp.SEND_INDIRECTION_TABLE}),
)

DPDK = NetworkHabits(
    capabilities=(
        (nvsp.VERSION_2, nvsp.CAPABILITY_8021Q),
        (nvsp.VERSION_5, nvsp.CAPABILITY_SRIOV),
    ),
    min_sub_channels=40,  # hn_nvs_execute: sizeof(struct hn_nvs_subch_resp)
    answer_room=256,  # NVS_RESPSIZE_MAX
    nvsp_id_zero=True,  # hn_nvs_execute, hn_nvs_send_rndis_ctrl
    receive_size=31 * _MB,  # uio_hv_generic.c
    receive_size_old=31 * _MB,
    send_size=16 * _MB,
    buffers=Buffers.BEFORE_OPEN,  # hv_uio_probe
    section_multiple=4,  # hn_nvs_conn_chim
    reply_room=256,  # hv->rndis_resp
    steps=(  # eth_hn_dev_init, hn_dev_configure
        Step.INITIALIZE,
        Step.NO_FILTER,
        Step.FRAME_SIZE,
        Step.PERMANENT_ADDRESS,
        Step.QUERY_SCALING,
        Step.QUERY_OFFLOADS,
        Step.SET_OFFLOADS,
        Step.SUB_CHANNELS,
    ),
    up_steps=(Step.CONNECT_STATUS, Step.LINK_SPEED),  # hn_dev_link_update
    ring_pages=512,
    ids_are_indexes=True,  # hn_rx_buf_init
    completion_size=40,
    notices_in_handshake=False,  # hn_nvs_execute
    section_limit=512,  # HN_TXCOPY_THRESHOLD
    ending=(End.REVOKE, End.HALT),  # hn_detach
    teardown=Teardown.AFTER_CLOSE,  # hv_uio_cleanup
)

MACOS = NetworkHabits(
    versions=(nvsp.VERSION_1,),  # connectNetwork
    message_size=28,
    data_ids=(0xFA << 56, 0),  # kHyperVNetworkSendTransIdBits
    send_id=0,
    buffers=Buffers.TOGETHER,  # initSendReceiveBuffers
    request_ids=(0, 1),  # _rndisTransId
    reply_room=52 + 4096,  # HyperVNetworkRNDISRequest
    steps=(  # connectNetwork
        Step.INITIALIZE,
        Step.NO_FILTER,
        Step.PERMANENT_ADDRESS,
        Step.CONNECT_STATUS,
    ),
    up_filter=oids.FILTER_DIRECTED | oids.FILTER_BROADCAST,
    ring_pages=129,
    max_channels=1,
    completion_size=28,
    reads_items=False,  # processIncoming
    notices=None,  # handlePacket
    form=Form.NONE,  # outputPacket
    batches=False,
    hash_item=HashItem.NEVER,
    changes_mtu=False,
    ending=(),  # stop
    teardown=Teardown.NEVER,
)

UEFI = NetworkHabits(
    versions=(nvsp.VERSION_5,),
    message_size=32,
    capabilities=(),
    config_mtu=1514,  # MAXIMUM_ETHERNET_PACKET_SIZE
    ndis_version=(6, 0),
    asks_completions=True,  # EmclSendPacketSync
    answer_room=32,  # EmclSynchronousPacketCompletion: EFI_BUFFER_TOO_SMALL
    receive_size=48 * 4096,  # NVSC_DEFAULT_RECEIVE_BUFFER_SIZE
    receive_id=0x1981,  # RECEIVE_BUFFER_ID
    send_size=48 * 4096,
    send_id=0xBEEF,
    max_transfer=1514,
    fixed_ids=(
        (rndis.INITIALIZE, (0xBEEF,)),
        (rndis.QUERY, (0xFAAD, 0xFCAD)),
        (rndis.SET, (0x5CF1,)),
    ),
    control_in_section=True,  # NetvscInit
    steps=(Step.INITIALIZE, Step.CURRENT_ADDRESS, Step.CURRENT_ADDRESS),
    up_filter=oids.FILTER_DIRECTED | oids.FILTER_MULTICAST | oids.FILTER_BROADCAST,
    ring_pages=49,
    max_channels=1,
    checks_set_id=False,  # NetvscReceiveCallback: not applicable
    exact_header=True,  # EmclpProcessPacket, NetvscReceiveCallback: RangeCount > 0
    completion_size=32,
    completes_when_taken=True,  # NetvscReceive: CompletionNeeded
    reads_items=False,
    notices=frozenset(),  # NetvscReceiveCallback: RangeCount > 0
    wrong_notice="NetvscReceiveCallback asserts that there are ranges",
    form=Form.NONE,
    batches=False,
    hash_item=HashItem.NEVER,
    data_channel=2,  # NetvscTransmit
    header_gap=8,  # sizeof(RNDIS_MESSAGE_CONTAINER) - sizeof(RNDIS_PACKET)
    changes_mtu=False,
    ending=(),  # NetvscShutdown
    teardown=Teardown.AFTER_CLOSE,
)

HABITS: dict[str, NetworkHabits] = {
    "linux-6.1": LINUX,
    "linux-new": LINUX_NEW,
    "linux-5.10": LINUX_OLD,
    "freebsd": FREEBSD,
    "illumos": ILLUMOS,
    "openbsd": OPENBSD,
    "netbsd": NETBSD,
    "dpdk": DPDK,
    "macos": MACOS,
    "uefi": UEFI,
}
"""All rows, by :attr:`vmbus.guest.personality.Personality.key`."""

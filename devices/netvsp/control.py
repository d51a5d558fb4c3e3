"""RNDIS control requests of one life of the adapter: what the guest asks and sets.

No request is ever left without its reply but HALT, which has none; an OID that is not known is
answered with NOT_SUPPORTED, for Linux waits for ever (rndis_filter_query_device). The answers are
of exactly the size that the drivers take: see :mod:`netvsp.oid_answers`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from netvsp.link import AdapterConfig, Link
from netvsp.oid_answers import ANSWERS, Facts
from netvsp.rss import Scaling
from netvsp.statistics import AdapterStatistics
from netvsp.wire import ndis, oids, rndis
from netvsp.wire.nvsp import VERSION_6_1
from vmbus.errors import ConfigError, GuestProtocolError

MAX_PACKETS = 8
"""Frames that a guest may put into one message of the send buffer; it is told."""
ALIGNMENT = 3
"""Each of them begins at a multiple of 8 bytes."""
MAX_CONTROL = 4096
"""Bytes of one control request; the longest known, RSS parameters, has 620."""

_RSS_KEY = bytes(40)


class State(enum.Enum):
    """How far RNDIS has come."""

    DOWN = "INITIALIZE"
    """Nothing has been agreed on, or HALT."""
    READY = "requests"


class Control:
    """The state that the guest sets by RNDIS.

    Args:
        config: What the adapter agrees to.
        link: Its link.
        statistics: Its counters.
        changed: Called when the guest has set something that data depends on; cannot block.

    Attributes:
        state: How far RNDIS has come.
        filter: ``FILTER_*``: which frames the guest wants. No frame goes to it while this is 0.
        coalesces: Whether its driver can take segments that are longer than the MTU:
            CAPABILITY_RSC, which Linux sets from version 6.1 on (netvsc.c: negotiate_nvsp_ver).
        scaling: Receive-side scaling; None: all frames go on the primary channel.
        mtu: Bytes of payload, as agreed on by NVSP.
        version: NVSP version.
        queues: Channels there can be.
    """

    def __init__(
        self,
        config: AdapterConfig,
        link: Link,
        statistics: AdapterStatistics,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.link = link
        self.statistics = statistics
        self.changed = changed
        self.state = State.DOWN
        self.filter = 0
        self.mtu = link.mtu
        self.version = 0
        self.queues = config.max_queues
        self.scaling: Scaling | None = None
        self.coalesces = False
        self._rsc_wanted = {"rsc_ipv4": ndis.OFFLOAD_DISABLED, "rsc_ipv6": ndis.OFFLOAD_DISABLED}
        self._key = _RSS_KEY
        self._kinds = 0
        self._table: tuple[int, ...] = (0,)

    def request_untrusted(self, message: bytes) -> bytes:
        """Carry out a control request and return its reply; empty for HALT. Cannot block.

        Args:
            message: A private copy, from its type on.

        Raises:
            GuestProtocolError: It is none, or too short to be answered.
        """
        kind, length = rndis.parse_header_untrusted(message)
        message = message[:length]
        if kind == rndis.INITIALIZE:
            return self._initialize_untrusted(message)
        if kind == rndis.HALT:
            self.reset()
            return b""
        if kind == rndis.RESET:
            self.filter = 0
            self.changed()
            return rndis.build_reset_reply(rndis.STATUS_SUCCESS, addressing_reset=True)
        if kind == rndis.KEEPALIVE:
            number = rndis.parse_request_id_untrusted(message)
            return rndis.build_status_reply(kind, number, rndis.STATUS_SUCCESS)
        if kind == rndis.QUERY:
            return self._query_untrusted(message)
        if kind == rndis.SET:
            return self._set_untrusted(message)
        name = rndis.MESSAGE_NAMES.get(kind, hex(kind))
        raise GuestProtocolError(f"RNDIS {name} is not a request", field="ndis_msg_type")

    def reset(self) -> None:
        """Forget what the guest has set. Cannot block."""
        self.state = State.DOWN
        self.filter = 0
        self.scaling = None
        self._rsc_wanted = dict.fromkeys(self._rsc_wanted, ndis.OFFLOAD_DISABLED)
        self._key, self._kinds, self._table = _RSS_KEY, 0, (0,)
        self.changed()

    def _initialize_untrusted(self, message: bytes) -> bytes:
        request = rndis.parse_initialize_untrusted(message)
        status = rndis.STATUS_SUCCESS
        if request.major != rndis.MAJOR_VERSION:
            status = rndis.STATUS_BAD_VERSION
        else:
            self.reset()
            self.state = State.READY
        return rndis.build_initialize_reply(
            request.request_id,
            status,
            max_packets=MAX_PACKETS,
            max_transfer=0x4000,
            alignment=ALIGNMENT,
        )

    # -- queries ---------------------------------------------------------------------------------

    def _query_untrusted(self, message: bytes) -> bytes:
        number = rndis.parse_request_id_untrusted(message)
        try:
            request = rndis.parse_request_untrusted(message)
        except GuestProtocolError:
            return rndis.build_query_reply(number, rndis.STATUS_INVALID_DATA)
        if self.state is State.DOWN:
            return rndis.build_query_reply(number, rndis.STATUS_FAILURE)
        if request.oid == oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES:
            answer = self._capabilities_untrusted(request.buffer)
        elif request.oid == oids.TCP_OFFLOAD_CURRENT_CONFIG:
            answer = ndis.build_offload_capabilities(self.capabilities(), self._revision())
        elif request.oid == oids.GEN_CURRENT_PACKET_FILTER:
            answer = self.filter.to_bytes(4, "little")
        elif request.oid in ANSWERS:
            answer = ANSWERS[request.oid](self._facts())
        else:
            return rndis.build_query_reply(number, rndis.STATUS_NOT_SUPPORTED)
        return rndis.build_query_reply(number, rndis.STATUS_SUCCESS, answer)

    def _facts(self) -> Facts:
        return Facts(
            link=self.link,
            statistics=self.statistics,
            mtu=self.mtu,
            queues=self.queues,
            friendly_name=self.config.friendly_name,
        )

    def _revision(self) -> int:
        """The revision of NDIS objects that goes with the NVSP version (rndis_filter.c)."""
        return 3 if self.version >= 0x50000 else 2 if self.version >= 0x40000 else 1

    def _capabilities_untrusted(self, buffer: bytes) -> bytes:
        """The capabilities, of the revision that the guest asks for: it has room for no other."""
        revision = self._revision()
        if len(buffer) >= ndis.OBJECT_HEADER.size:
            _kind, asked, _size = ndis.parse_object_untrusted(buffer)
            if asked in ndis.OFFLOAD_SIZES:
                revision = asked
        return ndis.build_offload_capabilities(self.capabilities(), revision)

    def capabilities(self) -> ndis.OffloadCapabilities:
        """Return what is offered to the guest. Cannot block."""
        if not self.config.offloads:
            return ndis.OffloadCapabilities()
        tcp = ndis.CSUM_TCP | ndis.CSUM_TCP_OPTIONS
        ipv4 = ndis.CSUM_IP | ndis.CSUM_IP_OPTIONS | tcp | ndis.CSUM_UDP
        ipv6 = ndis.CSUM_IP_OPTIONS | tcp | ndis.CSUM_UDP
        return ndis.OffloadCapabilities(
            tx_ipv4=ipv4,
            rx_ipv4=ipv4,
            tx_ipv6=ipv6,
            rx_ipv6=ipv6,
            # What Hyper-V's switch says; a frame that long fits into 16 pages.
            lso_max_size=0xF53C,
            lso_min_segments=2,
            lso_ipv6=True,
            rsc_ipv4=self.may_coalesce,
            rsc_ipv6=self.may_coalesce,
        )

    @property
    def may_coalesce(self) -> bool:
        """Whether the guest can take segments that are longer than the MTU."""
        return self.coalesces and self.version >= VERSION_6_1 and self.config.offloads

    @property
    def rsc(self) -> bool:
        """Whether the guest takes segments that are longer than the MTU: it can, and wants to."""
        return self.may_coalesce and set(self._rsc_wanted.values()) == {ndis.OFFLOAD_ENABLED}

    # -- settings --------------------------------------------------------------------------------

    def _set_untrusted(self, message: bytes) -> bytes:
        number = rndis.parse_request_id_untrusted(message)
        try:
            request = rndis.parse_request_untrusted(message)
            if self.state is State.DOWN:
                status = rndis.STATUS_FAILURE
            else:
                status = self._apply_untrusted(request.oid, request.buffer)
        except GuestProtocolError:
            status = rndis.STATUS_INVALID_DATA
        return rndis.build_status_reply(rndis.SET, number, status)

    def _apply_untrusted(self, oid: int, buffer: bytes) -> int:
        match oid:
            case oids.GEN_CURRENT_PACKET_FILTER:
                if len(buffer) < 4:
                    return rndis.STATUS_INVALID_LENGTH
                self.filter = int.from_bytes(buffer[:4], "little")
                self.changed()
            case oids.TCP_OFFLOAD_PARAMETERS:
                self._set_offloads(ndis.parse_offload_parameters_untrusted(buffer))
            case oids.GEN_RECEIVE_SCALE_PARAMETERS:
                return self._scale(ndis.parse_rss_parameters_untrusted(buffer))
            case oids.GEN_RNDIS_CONFIG_PARAMETER:
                return self._parameter_untrusted(buffer)
            case (
                oids.E802_3_MULTICAST_LIST
                | oids.GEN_NETWORK_LAYER_ADDRESSES
                | oids.OFFLOAD_ENCAPSULATION
                | oids.GEN_CURRENT_LOOKAHEAD
                | oids.GEN_PROTOCOL_OPTIONS
            ):
                pass  # a guest may tell us; every multicast frame goes to one that wants any
            case _:
                return rndis.STATUS_NOT_SUPPORTED
        return rndis.STATUS_SUCCESS

    def _set_offloads(self, wanted: ndis.OffloadParameters) -> None:
        # What it wants of sums does not matter: it says in each frame what it has left to us, and
        # need not look at what it is told of those it gets.
        for name in self._rsc_wanted:
            value = getattr(wanted, name)
            if value != ndis.NO_CHANGE:
                self._rsc_wanted[name] = value
        self.changed()

    def _scale(self, wanted: ndis.RssParameters) -> int:
        if wanted.flags & ndis.RSS_DISABLE:
            self.scaling = None
            self.changed()
            return rndis.STATUS_SUCCESS
        key, kinds, table = wanted.key or self._key, self._kinds, self._table
        if not wanted.flags & ndis.RSS_HASH_INFO_UNCHANGED:
            kinds = wanted.hash_information
        if not wanted.flags & ndis.RSS_TABLE_UNCHANGED:
            table = wanted.table
        if not table or max(table) >= self.queues or kinds & 0xFF not in {0, ndis.HASH_TOEPLITZ}:
            return rndis.STATUS_INVALID_DATA
        self._key, self._kinds, self._table = key, kinds, table
        self.scaling = Scaling(key, kinds, table) if kinds else None
        self.changed()
        return rndis.STATUS_SUCCESS

    def _parameter_untrusted(self, buffer: bytes) -> int:
        name, value = rndis.parse_parameter_untrusted(buffer)
        if name.lower() != "networkaddress":
            return rndis.STATUS_SUCCESS  # switches of Windows' drivers, set without need
        if not self.config.allow_mac_change:
            return rndis.STATUS_NOT_SUPPORTED
        try:
            self.link.set_mac(bytes.fromhex(value.replace("-", "").replace(":", "")))
        except (ValueError, ConfigError):
            return rndis.STATUS_INVALID_DATA
        return rndis.STATUS_SUCCESS

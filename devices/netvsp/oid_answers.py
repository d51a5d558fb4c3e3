"""What the adapter answers when RNDIS asks for an OID: exactly as many bytes as drivers take.

UEFI wants six bytes of address and no more, FreeBSD and DPDK eighteen of receive-side scaling;
Linux takes an answer that is longer than it asked for as a failure of its probe. Sources: see
:mod:`netvsp.wire.oids`; if_hn.c, hn_rndis.c, rndis_filter.c, NetvscDxe.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from netvsp.frames.frame import ETHERNET_HEADER
from netvsp.link import Link
from netvsp.statistics import (
    BROADCAST_KIND,
    DIRECTED,
    MULTICAST,
    NO_BUFFER,
    AdapterStatistics,
)
from netvsp.wire import ndis, oids

_CONNECTED, _DISCONNECTED = 0, 1
_FULL_DUPLEX = 2
_LINK_STATE = struct.Struct("<BBHII4xQQII")
"""NDIS_LINK_STATE: object header, connect state, duplex, speeds out and in, pause, negotiation."""
_LARGEST_LIST = 4096
"""Multicast addresses; none is looked at."""
_VENDOR = b"vmbus\0"
_LONGEST_NAME = 510
"""Bytes; Linux has room for 256 characters, the end mark included."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What answers are made of."""

    link: Link
    statistics: AdapterStatistics
    mtu: int
    """Bytes of payload."""
    queues: int
    friendly_name: str


def _u32(value: int) -> bytes:
    return min(value, 0xFFFFFFFF).to_bytes(4, "little")


def _counter(value: int) -> bytes:
    """A counter: 64 bits, of which a driver with room for 32 takes the lower ones."""
    return (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")


def _constant(value: int) -> Callable[[Facts], bytes]:
    return lambda _facts: _u32(value)


def _link_state(facts: Facts) -> bytes:
    speed = facts.link.speed
    return _LINK_STATE.pack(
        ndis.OBJECT_DEFAULT, 1, _LINK_STATE.size, 1 if facts.link.up else 2, _FULL_DUPLEX,
        speed, speed, 0, 0,
    )  # fmt: skip


def _rss_capabilities(facts: Facts) -> bytes:
    return ndis.build_rss_capabilities(
        ndis.RssCapabilities(
            ndis.RSS_SIGNALLED_INTERRUPTS
            | ndis.RSS_CLASSIFICATION_ISR
            | ndis.RSS_CLASSIFICATION_DPC
            | ndis.RSS_TCP_IPV4
            | ndis.RSS_TCP_IPV6
            | ndis.RSS_TCP_IPV6_EX
            | ndis.RSS_TOEPLITZ,
            facts.queues,
            facts.queues,
            ndis.RSS_TABLE_ENTRIES,
        )
    )


def _friendly_name(facts: Facts) -> bytes:
    """Its end is marked: Linux goes on into what its stack held before (ucs2_as_utf8)."""
    if not facts.friendly_name:
        return b""
    whole = facts.friendly_name.encode("utf-16-le")[:_LONGEST_NAME]
    # Half of a pair is no character.
    return whole.decode("utf-16-le", "ignore").encode("utf-16-le") + b"\0\0"


ANSWERS: dict[int, Callable[[Facts], bytes]] = {
    oids.GEN_HARDWARE_STATUS: _constant(0),
    oids.GEN_MEDIA_SUPPORTED: _constant(0),
    oids.GEN_MEDIA_IN_USE: _constant(0),
    oids.GEN_MAXIMUM_LOOKAHEAD: lambda f: _u32(f.mtu),
    oids.GEN_CURRENT_LOOKAHEAD: lambda f: _u32(f.mtu),
    oids.GEN_MAXIMUM_FRAME_SIZE: lambda f: _u32(f.mtu),
    oids.GEN_MAXIMUM_TOTAL_SIZE: lambda f: _u32(f.mtu + ETHERNET_HEADER),
    oids.GEN_TRANSMIT_BLOCK_SIZE: lambda f: _u32(f.mtu + ETHERNET_HEADER),
    oids.GEN_RECEIVE_BLOCK_SIZE: lambda f: _u32(f.mtu + ETHERNET_HEADER),
    oids.GEN_LINK_SPEED: lambda f: _u32(f.link.speed // 100),
    oids.GEN_TRANSMIT_BUFFER_SPACE: _constant(256 << 10),
    oids.GEN_RECEIVE_BUFFER_SPACE: _constant(256 << 10),
    oids.GEN_VENDOR_ID: _constant(0x00155D),  # the prefix of Hyper-V's addresses
    oids.GEN_VENDOR_DESCRIPTION: lambda _f: _VENDOR,
    oids.GEN_VENDOR_DRIVER_VERSION: _constant(0x00010000),
    oids.GEN_DRIVER_VERSION: lambda _f: (0x0600).to_bytes(2, "little"),
    oids.GEN_MAC_OPTIONS: _constant(0x00000001 | 0x00000004 | 0x00000008),
    oids.GEN_MEDIA_CONNECT_STATUS: lambda f: _u32(_CONNECTED if f.link.up else _DISCONNECTED),
    oids.GEN_MAXIMUM_SEND_PACKETS: _constant(8),
    oids.GEN_FRIENDLY_NAME: _friendly_name,
    oids.GEN_LINK_STATE: _link_state,
    oids.GEN_MAX_LINK_SPEED: lambda f: struct.pack("<QQ", f.link.speed, f.link.speed),
    oids.GEN_RECEIVE_SCALE_CAPABILITIES: _rss_capabilities,
    oids.E802_3_PERMANENT_ADDRESS: lambda f: f.link.permanent_mac,
    oids.E802_3_CURRENT_ADDRESS: lambda f: f.link.mac,
    oids.E802_3_MAXIMUM_LIST_SIZE: _constant(_LARGEST_LIST),
    oids.E802_3_MULTICAST_LIST: lambda _f: b"",
    oids.E802_3_MAC_OPTIONS: _constant(0),
    oids.E802_3_RCV_ERROR_ALIGNMENT: _constant(0),
    oids.E802_3_XMIT_ONE_COLLISION: _constant(0),
    oids.E802_3_XMIT_MORE_COLLISIONS: _constant(0),
    oids.GEN_RCV_CRC_ERROR: _constant(0),
    oids.GEN_TRANSMIT_QUEUE_LENGTH: _constant(0),
    oids.OFFLOAD_ENCAPSULATION: _constant(ndis.ENCAPSULATION_8023),
    # Counters. "Transmitted" is what the guest has sent.
    oids.GEN_XMIT_OK: lambda f: _counter(f.statistics.transmit.total_frames),
    oids.GEN_RCV_OK: lambda f: _counter(f.statistics.receive.total_frames),
    oids.GEN_XMIT_ERROR: lambda f: _counter(f.statistics.transmit.errors),
    oids.GEN_RCV_ERROR: lambda f: _counter(f.statistics.receive.errors),
    oids.GEN_RCV_NO_BUFFER: lambda f: _counter(f.statistics.receive.dropped[NO_BUFFER]),
    oids.GEN_BYTES_XMIT: lambda f: _counter(f.statistics.transmit.total_bytes),
    oids.GEN_BYTES_RCV: lambda f: _counter(f.statistics.receive.total_bytes),
    oids.GEN_DIRECTED_BYTES_XMIT: lambda f: _counter(f.statistics.transmit.bytes[DIRECTED]),
    oids.GEN_DIRECTED_FRAMES_XMIT: lambda f: _counter(f.statistics.transmit.frames[DIRECTED]),
    oids.GEN_MULTICAST_BYTES_XMIT: lambda f: _counter(f.statistics.transmit.bytes[MULTICAST]),
    oids.GEN_MULTICAST_FRAMES_XMIT: lambda f: _counter(f.statistics.transmit.frames[MULTICAST]),
    oids.GEN_BROADCAST_BYTES_XMIT: lambda f: _counter(f.statistics.transmit.bytes[BROADCAST_KIND]),
    oids.GEN_BROADCAST_FRAMES_XMIT: lambda f: _counter(
        f.statistics.transmit.frames[BROADCAST_KIND]
    ),
    oids.GEN_DIRECTED_BYTES_RCV: lambda f: _counter(f.statistics.receive.bytes[DIRECTED]),
    oids.GEN_DIRECTED_FRAMES_RCV: lambda f: _counter(f.statistics.receive.frames[DIRECTED]),
    oids.GEN_MULTICAST_BYTES_RCV: lambda f: _counter(f.statistics.receive.bytes[MULTICAST]),
    oids.GEN_MULTICAST_FRAMES_RCV: lambda f: _counter(f.statistics.receive.frames[MULTICAST]),
    oids.GEN_BROADCAST_BYTES_RCV: lambda f: _counter(f.statistics.receive.bytes[BROADCAST_KIND]),
    oids.GEN_BROADCAST_FRAMES_RCV: lambda f: _counter(f.statistics.receive.frames[BROADCAST_KIND]),
}
"""By OID; a test sees to it that the list of what is supported is this one."""

ANSWERS[oids.GEN_SUPPORTED_LIST] = lambda _f: struct.pack(f"<{len(SUPPORTED)}I", *SUPPORTED)
SUPPORTED: tuple[int, ...] = tuple(
    sorted(
        {
            *ANSWERS,
            oids.GEN_CURRENT_PACKET_FILTER,
            oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES,
            oids.TCP_OFFLOAD_CURRENT_CONFIG,
            oids.TCP_OFFLOAD_PARAMETERS,
            oids.GEN_RECEIVE_SCALE_PARAMETERS,
            oids.GEN_RNDIS_CONFIG_PARAMETER,
            oids.GEN_NETWORK_LAYER_ADDRESSES,
            oids.GEN_PROTOCOL_OPTIONS,
        }
    )
)
"""What GEN_SUPPORTED_LIST says."""

"""Per-packet information: what an RNDIS PACKET says of its frame beside its bytes.

A list of items, each of them: size u32, type u32 with the top bit for internal ones, offset of its
data from the item's start u32, data. Guests walk such a list without much care: the ``while`` of
Linux's rndis_get_ppi goes round for ever at an item that is longer than the list. So what is built
here is always whole.

Source: linux/drivers/net/hyperv/hyperv_net.h (``struct rndis_per_packet_info`` and what follows
it, ``struct ndis_tcp_ip_checksum_info``, ``struct ndis_pkt_8021q_info``).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

# Types.
CHECKSUM = 0
LARGE_SEND = 2
VLAN = 6
HASH_VALUE = 8
INTERNAL = 1 << 31
PACKET_ID = INTERNAL | 1
"""Which part of a coalesced segment this is."""

MAX_ITEMS = 16
"""Items of one list that are looked at."""

# CHECKSUM from a guest: what the device is to fill in.
TX_IPV4 = 1 << 0
TX_IPV6 = 1 << 1
TX_TCP = 1 << 2
TX_UDP = 1 << 3
TX_IP_HEADER = 1 << 4
TX_HEADER_OFFSET_SHIFT = 16
TX_HEADER_OFFSET_MASK = 0x3FF

# CHECKSUM to a guest: what is known of the checksums in the frame.
RX_TCP_FAILED = 1 << 0
RX_UDP_FAILED = 1 << 1
RX_IP_FAILED = 1 << 2
RX_TCP_SUCCEEDED = 1 << 3
RX_UDP_SUCCEEDED = 1 << 4
RX_IP_SUCCEEDED = 1 << 5
RX_LOOPBACK = 1 << 6
RX_TCP_VALUE_INVALID = 1 << 7
"""The field in the frame is not the sum, although the payload is good."""
RX_IP_VALUE_INVALID = 1 << 8

# LARGE_SEND, version 2.
LSO_MSS_MASK = 0xFFFFF
LSO_HEADER_OFFSET_SHIFT = 20
LSO_HEADER_OFFSET_MASK = 0x3FF
LSO_VERSION_2 = 1 << 30
LSO_IPV6 = 1 << 31

# PACKET_ID.
FRAGMENT_SUB_ALLOCATION = 1 << 0
FRAGMENT_FIRST = 1 << 1
FRAGMENT_LAST = 1 << 2

_ITEM = struct.Struct("<III")
_VALUE_ITEM = struct.Struct("<IIII")
_PACKET_ID_ITEM = struct.Struct("<IIIBBH")
ITEM_SIZE = 16
"""Bytes of an item that is built here; all have 4 bytes of data."""
_DATA_OFFSET = 12
assert _ITEM.size == _DATA_OFFSET
assert _VALUE_ITEM.size == _PACKET_ID_ITEM.size == ITEM_SIZE

_value_item = _VALUE_ITEM.pack


class LargeSend(NamedTuple):
    """LARGE_SEND, version 2: the device is to cut a TCP segment."""

    mss: int
    """Bytes of payload in each piece."""
    header_offset: int
    """Of the TCP header, from the start of the frame."""
    ipv6: bool


class Vlan(NamedTuple):
    """VLAN: a tag that is not in the frame."""

    vlan_id: int
    priority: int
    canonical: bool
    """The CFI bit."""

    @property
    def tci(self) -> int:
        """The 16 bits of the tag behind its type."""
        return self.priority << 13 | self.canonical << 12 | self.vlan_id


def parse_items_untrusted(information: bytes) -> dict[int, int]:
    """Return the first word of each item's data, by type. Cannot block.

    The first item of a type counts.

    Raises:
        GuestProtocolError: An item does not fit into the list or into itself, there are more than
            16, or bytes are left that are no item.
    """
    found: dict[int, int] = {}
    position = count = 0
    end = len(information)
    while position < end:
        if count == MAX_ITEMS:
            raise GuestProtocolError(
                f"per-packet information: more than {MAX_ITEMS} items", field="per_pkt_info_len"
            )
        if end - position < _DATA_OFFSET:
            raise GuestProtocolError(
                f"per-packet information: {end - position} stray bytes", field="per_pkt_info_len"
            )
        size, kind, offset = _ITEM.unpack_from(information, position)
        if size < _DATA_OFFSET or size > end - position or size & 3:
            raise GuestProtocolError(
                f"per-packet information: an item of {size} bytes, {end - position} are left",
                field="ppi.size",
            )
        if size - 4 >= offset >= _DATA_OFFSET:
            if kind not in found:
                found[kind] = int.from_bytes(
                    information[position + offset : position + offset + 4], "little"
                )
        elif offset < _DATA_OFFSET or offset > size:
            raise GuestProtocolError(
                f"per-packet information: data at byte {offset} of an item of {size}",
                field="ppi_offset",
            )
        # Otherwise the item has fewer than 4 bytes of data: none that we know.
        position += size
        count += 1
    return found


def unpack_large_send(value: int) -> LargeSend:
    """Unpack the word of LARGE_SEND; nothing is judged. Cannot block."""
    return LargeSend(
        value & LSO_MSS_MASK,
        value >> LSO_HEADER_OFFSET_SHIFT & LSO_HEADER_OFFSET_MASK,
        bool(value & LSO_IPV6),
    )


def unpack_vlan(value: int) -> Vlan:
    """Unpack the word of VLAN. Cannot block."""
    return Vlan(value >> 4 & 0xFFF, value & 7, bool(value & 8))


def pack_vlan(vlan: Vlan) -> int:
    """Return the word of VLAN. Cannot block."""
    return vlan.vlan_id << 4 | vlan.canonical << 3 | vlan.priority


def vlan_of_tci(tci: int) -> Vlan:
    """Return the tag that the 16 bits behind its type mean. Cannot block."""
    return Vlan(tci & 0xFFF, tci >> 13, bool(tci & 0x1000))


def pack_large_send(large: LargeSend) -> int:
    """Return the word of LARGE_SEND, version 2. Cannot block."""
    return (
        large.mss
        | large.header_offset << LSO_HEADER_OFFSET_SHIFT
        | LSO_VERSION_2
        | (LSO_IPV6 if large.ipv6 else 0)
    )


def build_item(kind: int, value: int) -> bytes:
    """Return an item with one word of data, 16 bytes. Cannot block."""
    return _value_item(ITEM_SIZE, kind, _DATA_OFFSET, value)


def build_packet_id(flags: int, number: int) -> bytes:
    """Return the item that says which part of a coalesced segment this is. Cannot block.

    Args:
        flags: ``FRAGMENT_*``.
        number: Of the segment, 16 bits.
    """
    return _PACKET_ID_ITEM.pack(ITEM_SIZE, PACKET_ID, _DATA_OFFSET, 1, flags, number)

"""What network drivers demand of the RNDIS messages in their receive buffer.

The checks are those of the drivers taken together: frames that pass them reach the network stack in
each. Sources: linux/drivers/net/hyperv/rndis_filter.c (``rndis_filter_receive_data``,
``rndis_get_ppi``) and netvsc_drv.c (``netvsc_linkstatus_callback``), freebsd/sys/dev/hyperv/netvsc/
if_hn.c (``hn_rndis_rx_data``, ``hn_rndis_rxinfo``, ``hn_rndis_rx_status``), openbsd/sys/dev/pv/
if_hvn.c (``hvn_rxeof``), dpdk/drivers/net/netvsc/hn_rxtx.c, MacHyperVSupport/Network
(``processIncoming``).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from netvsp.guest.frames import ETHERNET_HEADER
from netvsp.wire import ppi, rndis
from vmbus.guest.machine import Panic

_ITEM = struct.Struct("<III")
_INDICATE = struct.Struct("<IIIII")
_KNOWN_STATUS = frozenset(
    {
        rndis.STATUS_MEDIA_CONNECT,
        rndis.STATUS_MEDIA_DISCONNECT,
        rndis.STATUS_LINK_SPEED_CHANGE,
        rndis.STATUS_NETWORK_CHANGE,
        rndis.STATUS_TASK_OFFLOAD_CURRENT_CONFIG,
    }
)
_CONTRADICTIONS = (
    ppi.RX_TCP_FAILED | ppi.RX_TCP_SUCCEEDED,
    ppi.RX_UDP_FAILED | ppi.RX_UDP_SUCCEEDED,
    ppi.RX_IP_FAILED | ppi.RX_IP_SUCCEEDED,
)


class Packet(NamedTuple):
    """A frame, or a part of one, as an RNDIS message has it."""

    data: bytes
    items: dict[int, int]
    """First word of each item of per-packet information, by type."""


def check_header(message: bytes, panic: Panic) -> tuple[int, int]:
    """Check type and length of a message.

    Args:
        message: The whole range that it is in.
        panic: Called if a driver would drop it.

    Returns:
        Its type and its length in bytes.
    """
    if len(message) < rndis.HEADER_SIZE + 4:
        # hvn_rndis_input asserts that a request id or a status is there.
        panic(f"RNDIS: a range of {len(message)} bytes")
    kind, length = rndis.HEADER.unpack_from(message)
    if not rndis.HEADER_SIZE + 4 <= length <= len(message):
        panic(f"RNDIS: msg_len {length} in a range of {len(message)} bytes")
    return kind, length


def check_packet(message: bytes, panic: Panic) -> Packet:
    """Check a PACKET message, and return its frame with what is said of it.

    Args:
        message: From its type on, as long as it says.
        panic: Called if a driver would drop it, or worse.
    """
    if len(message) < rndis.PACKET_HEADER_SIZE:
        panic(f"RNDIS PACKET of {len(message)} bytes")
    (
        _kind, length, data, size, oob, oob_size, oob_count, info, info_size, _vc, _reserved,
    ) = rndis.PACKET_HEADER.unpack_from(message)  # fmt: skip
    least = rndis.PACKET_HEADER_SIZE - rndis.HEADER_SIZE
    if length < size + oob_size + info_size:
        panic(f"RNDIS PACKET of {length} bytes: {size}, {oob_size} and {info_size} are in it")
    if oob or oob_size or oob_count:
        panic(f"RNDIS PACKET: {oob_count} out-of-band items, {oob_size} bytes at {oob}")
    if data < least or data + size > length - rndis.HEADER_SIZE:
        panic(f"RNDIS PACKET of {length} bytes: a frame of {size} bytes at offset {data}")
    if not size:
        panic("RNDIS PACKET: an empty frame: processIncoming panics")
    if (info or info_size) and (info < least or info & 3 or not info_size):
        # Linux logs an error at an offset without a list (rndis_get_ppi).
        panic(f"RNDIS PACKET: {info_size} bytes of per-packet information at offset {info}")
    if info + info_size > length - rndis.HEADER_SIZE:
        panic(f"RNDIS PACKET of {length} bytes: {info_size} bytes of information at {info}")
    if info_size and info < data + size and data < info + info_size:
        panic("RNDIS PACKET: frame and per-packet information overlap")
    start = rndis.HEADER_SIZE + info
    items = check_items(message[start : start + info_size], panic) if info_size else {}
    start = rndis.HEADER_SIZE + data
    return Packet(message[start : start + size], items)


def check_items(information: bytes, panic: Panic) -> dict[int, int]:
    """Check a list of per-packet information; return the first word of each item, by type.

    Args:
        information: The list.
        panic: Called at an item at which Linux would go round for ever, or FreeBSD drop the frame.
    """
    found: dict[int, int] = {}
    position = 0
    while position < len(information):
        left = len(information) - position
        if left < _ITEM.size:
            panic(f"per-packet information: {left} bytes left for an item")
        size, kind, offset = _ITEM.unpack_from(information, position)
        if not _ITEM.size <= size <= left or size & 3:
            panic(f"per-packet information: an item of {size} bytes where {left} are left")
        # All but Linux take the data from right behind these three words.
        if offset != _ITEM.size or size < offset + 4:
            panic(f"per-packet information: data at {offset} of an item of {size} bytes")
        if kind in found:
            panic(f"per-packet information: two items of type {kind:#x}")
        (found[kind],) = struct.unpack_from("<I", information, position + offset)
        position += size
    _check_words(found, panic)
    return found


def _check_words(found: dict[int, int], panic: Panic) -> None:
    sums = found.get(ppi.CHECKSUM, 0)
    for both in _CONTRADICTIONS:
        if sums & both == both:
            panic(f"per-packet information: checksum {sums:#x} says that it is right and wrong")
    if found.get(ppi.VLAN, 0) >> 16:
        panic(f"per-packet information: VLAN {found[ppi.VLAN]:#x}")


def check_frame(frame: bytes, most: int, panic: Panic) -> None:
    """Check the length of a whole frame.

    Args:
        frame: From its Ethernet header on.
        most: Bytes of the longest that the driver expects.
        panic: Called if it is longer, or no frame at all.
    """
    if len(frame) < ETHERNET_HEADER:
        panic(f"a frame of {len(frame)} bytes: hn_rndis_rx_data drops it")
    if len(frame) > most:
        panic(f"a frame of {len(frame)} bytes, the driver has announced {most} at most")


def check_indication(message: bytes, panic: Panic) -> rndis.Indication:
    """Check INDICATE_STATUS.

    Args:
        message: From its type on, as long as it says.
        panic: Called if a driver would not take it, or does not know the status.
    """
    if len(message) < _INDICATE.size:
        panic(f"INDICATE_STATUS of {len(message)} bytes: netvsc_linkstatus_callback drops it")
    _kind, _length, status, size, offset = _INDICATE.unpack_from(message)
    if status not in _KNOWN_STATUS:
        panic(f"INDICATE_STATUS {status:#010x}: hn_rndis_rx_status does not know it")
    if size and (offset < 12 or offset + size > len(message) - rndis.HEADER_SIZE):
        panic(f"INDICATE_STATUS: {size} bytes at offset {offset} of {len(message) - 8}")
    if status == rndis.STATUS_LINK_SPEED_CHANGE and size < 4:
        panic(f"INDICATE_STATUS: a change of speed with {size} bytes")
    start = rndis.HEADER_SIZE + offset
    return rndis.Indication(status, message[start : start + size] if size else b"")

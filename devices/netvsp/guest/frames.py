"""Ethernet frames as a guest's network stack has them: headers, sums left to the device, flows.

What is read here are the guest's own frames, about to be sent; those from the host are looked at in
:mod:`netvsp.guest.messages`.

Sources: linux/drivers/net/hyperv/netvsc_drv.c (``netvsc_xmit``), net/ipv6/tcp_ipv6.c
(``tcp_v6_gso_csum_prep``), freebsd/sys/dev/hyperv/netvsc/if_hn.c (``hn_tso_fixup``,
``hn_set_hlen``).
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from typing import NamedTuple

from netvsp.wire.ppi import Vlan

ETHERNET_HEADER = 14
VLAN_TAG = 4
TYPE_IPV4 = 0x0800
TYPE_IPV6 = 0x86DD
TYPE_VLAN = 0x8100
TCP = 6
UDP = 17
_IPV6_HEADER = 40
_CHECKSUM_AT = {TCP: 16, UDP: 6}
_WORD = struct.Struct(">H")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestFrame:
    """A frame that the device has delivered."""

    data: bytes
    """From its Ethernet header on, without a frame check sequence."""
    channel: int
    """Number of the channel it came on."""
    vlan: Vlan | None = None
    """A tag that is not in the frame."""
    checksum: int | None = None
    """``RX_*`` of :mod:`netvsp.wire.ppi`."""
    hash_value: int | None = None
    fragments: int = 1
    """Sub-allocations that it came in: more than 1 if the device has coalesced it."""


class Headers(NamedTuple):
    """Where the headers of an IP packet are in a frame."""

    network: int
    """Of the IP header, from the start of the frame."""
    transport: int
    """Of what follows it."""
    protocol: int
    """:data:`TCP`, :data:`UDP` or another."""
    ipv6: bool


def parse_headers(frame: bytes) -> Headers | None:
    """Return where the headers of a frame of the guest's own are, or None if it is not IP.

    Extension headers of IPv6 are not followed. Cannot block.

    Raises:
        ValueError: The frame is shorter than its headers.
    """
    network = ETHERNET_HEADER
    if len(frame) < network:
        raise ValueError(f"a frame has at least 14 bytes, not {len(frame)}")
    (kind,) = _WORD.unpack_from(frame, network - 2)
    if kind == TYPE_VLAN and len(frame) >= network + VLAN_TAG:
        network += VLAN_TAG
        (kind,) = _WORD.unpack_from(frame, network - 2)
    if kind == TYPE_IPV4:
        if len(frame) < network + 20:
            raise ValueError("the frame ends within its IPv4 header")
        transport = network + 4 * (frame[network] & 0xF)
        return Headers(network, transport, frame[network + 9], ipv6=False)
    if kind == TYPE_IPV6:
        if len(frame) < network + _IPV6_HEADER:
            raise ValueError("the frame ends within its IPv6 header")
        return Headers(network, network + _IPV6_HEADER, frame[network + 6], ipv6=True)
    return None


def _addresses(frame: bytes, headers: Headers) -> bytes:
    start, size = (headers.network + 8, 32) if headers.ipv6 else (headers.network + 12, 8)
    return frame[start : start + size]


def ones_sum(data: bytes) -> int:
    """Return the ones' complement sum of 16-bit words, folded and not inverted. Cannot block."""
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(frame: bytes, headers: Headers, length: int) -> int:
    """Return the sum of a pseudo-header, not inverted. Cannot block.

    Args:
        frame: With its addresses.
        headers: Of it.
        length: Bytes of the TCP or UDP segment; 0: the length is left out of the sum.
    """
    tail = struct.pack(">II", length, headers.protocol)
    return ones_sum(_addresses(frame, headers) + tail)


def leave_checksum(frame: bytes) -> tuple[bytes, Headers]:
    """Prepare a TCP or UDP packet whose sum the device is to fill in. Cannot block.

    Returns:
        The frame with the pseudo-header's sum where the sum belongs, and its headers.

    Raises:
        ValueError: It is neither, or too short.
    """
    headers = _transport(frame)
    place = headers.transport + _CHECKSUM_AT[headers.protocol]
    total = pseudo_sum(frame, headers, len(frame) - headers.transport)
    return frame[:place] + _WORD.pack(total) + frame[place + 2 :], headers


def leave_segments(frame: bytes) -> tuple[bytes, Headers]:
    """Prepare a TCP packet which the device is to cut into segments. Cannot block.

    Its IP length and the sum of an IPv4 header are 0, and the pseudo-header's sum leaves the length
    out.

    Returns:
        The frame, and its headers.

    Raises:
        ValueError: It is not TCP, or too short.
    """
    headers = _transport(frame)
    if headers.protocol != TCP:
        raise ValueError("only TCP is cut into segments")
    changed = bytearray(frame)
    if headers.ipv6:
        changed[headers.network + 4 : headers.network + 6] = bytes(2)
    else:
        changed[headers.network + 2 : headers.network + 4] = bytes(2)
        changed[headers.network + 10 : headers.network + 12] = bytes(2)
    place = headers.transport + _CHECKSUM_AT[TCP]
    changed[place : place + 2] = _WORD.pack(pseudo_sum(frame, headers, 0))
    return bytes(changed), headers


def _transport(frame: bytes) -> Headers:
    headers = parse_headers(frame)
    if headers is None or headers.protocol not in _CHECKSUM_AT:
        raise ValueError("the frame is neither TCP nor UDP")
    if len(frame) < headers.transport + _CHECKSUM_AT[headers.protocol] + 2:
        raise ValueError("the frame ends within its transport header")
    return headers


def flow_hash(frame: bytes) -> int:
    """Return a number that is the same for all frames of a flow, 0 if it is not IP.

    Which one is the driver's own matter: Linux hashes addresses and ports with a key that it makes
    up when it starts (netvsc_get_hash). Cannot block.
    """
    headers = parse_headers(frame)
    if headers is None:
        return 0
    ports = b""
    if headers.protocol in _CHECKSUM_AT:
        ports = frame[headers.transport : headers.transport + 4]
    return zlib.crc32(_addresses(frame, headers) + ports) or 1

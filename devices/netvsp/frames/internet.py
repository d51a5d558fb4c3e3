"""ARP, IPv4, ICMP and UDP, as far as somebody needs them who answers for a whole network.

Sources: RFC 826, RFC 791, RFC 792, RFC 768.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from netvsp.frames.checksum import checksum, ones_sum, pseudo_header_sum
from netvsp.frames.frame import ETHERNET_HEADER, ETHERTYPE_IPV4, PROTOCOL_UDP
from vmbus.errors import GuestProtocolError

ETHERTYPE_ARP = b"\x08\x06"
ARP_REQUEST, ARP_REPLY = 1, 2
PROTOCOL_ICMP = 1
ICMP_ECHO_REPLY, ICMP_UNREACHABLE, ICMP_ECHO = 0, 3, 8
ICMP_PROHIBITED = 13
"""Code of ICMP_UNREACHABLE: a rule forbids it."""
MIN_FRAME = 60
"""Bytes of the shortest frame on a wire, without frame check sequence."""

IPV6_HEADER = 40

_ARP = struct.Struct(">HHBBH6s4s6s4s")
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_UDP = struct.Struct(">HHHH")
_TTL = 64


class Arp(NamedTuple):
    """An ARP message for Ethernet and IPv4."""

    operation: int
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes


class Ipv4(NamedTuple):
    """An IPv4 packet that is no fragment."""

    source: bytes
    target: bytes
    protocol: int
    header: bytes
    """With its options."""
    payload: bytes


class Udp(NamedTuple):
    """A UDP packet."""

    source_port: int
    target_port: int
    payload: bytes


def parse_arp_untrusted(frame: bytes) -> Arp:
    """Parse a frame of type ARP. Raises GuestProtocolError."""
    body = frame[ETHERNET_HEADER : ETHERNET_HEADER + _ARP.size]
    if len(body) < _ARP.size:
        raise GuestProtocolError(f"ARP of {len(body)} bytes", field="arp")
    hardware, protocol, hardware_size, size, operation, *addresses = _ARP.unpack(body)
    if (hardware, protocol, hardware_size, size) != (1, 0x0800, 6, 4):
        raise GuestProtocolError("ARP for something else than Ethernet and IPv4", field="arp")
    return Arp(operation, *addresses)


def build_arp(
    operation: int,
    sender_mac: bytes,
    sender: bytes,
    asked_mac: bytes,
    asked: bytes,
    *,
    target_mac: bytes,
) -> bytes:
    """Build a frame with an ARP message. Cannot block.

    Args:
        operation: ARP_REQUEST or ARP_REPLY.
        sender_mac: Six bytes.
        sender: Four bytes.
        asked_mac: Six bytes; zeros in a request.
        asked: Four bytes.
        target_mac: Who is to get the frame.
    """
    body = _ARP.pack(1, 0x0800, 6, 4, operation, sender_mac, sender, asked_mac, asked)
    return (target_mac + sender_mac + ETHERTYPE_ARP + body).ljust(MIN_FRAME, b"\0")


def parse_ipv4_untrusted(frame: bytes) -> Ipv4:
    """Parse a frame of type IPv4. Raises GuestProtocolError, for a fragment too."""
    data = frame[ETHERNET_HEADER:]
    if len(data) < _IPV4.size:
        raise GuestProtocolError(f"an IPv4 header of {len(data)} bytes", field="ip")
    first, _tos, total, _id, fragment, _ttl, protocol, _sum, source, target = _IPV4.unpack_from(
        data
    )
    header = 4 * (first & 0xF)
    if first >> 4 != 4 or not _IPV4.size <= header <= total <= len(data):
        raise GuestProtocolError(f"an IPv4 packet of {total} bytes", field="ip.total_length")
    if fragment & 0x3FFF:
        raise GuestProtocolError("a fragment", field="ip.fragment_offset")
    if checksum(ones_sum(data[:header])):
        raise GuestProtocolError("an IPv4 header with a wrong sum", field="ip.checksum")
    return Ipv4(source, target, protocol, data[:header], data[header:total])


def build_ipv4(
    source_mac: bytes,
    target_mac: bytes,
    source: bytes,
    target: bytes,
    *,
    protocol: int,
    payload: bytes,
) -> bytes:
    """Build a frame with an IPv4 packet. Cannot block.

    Args:
        source_mac: Six bytes.
        target_mac: Six bytes.
        source: Four bytes.
        target: Four bytes.
        protocol: Of what it carries.
        payload: Up to 65515 bytes.
    """
    total = _IPV4.size + len(payload)
    fields = (0x45, 0, total, 0, 0x4000, _TTL, protocol)
    sum_ = checksum(ones_sum(_IPV4.pack(*fields, 0, source, target)))
    packet = _IPV4.pack(*fields, sum_, source, target) + payload
    return (target_mac + source_mac + ETHERTYPE_IPV4 + packet).ljust(MIN_FRAME, b"\0")


def parse_udp_untrusted(packet: Ipv4) -> Udp:
    """Parse what a packet of protocol UDP carries. Raises GuestProtocolError."""
    data = packet.payload
    if len(data) < _UDP.size:
        raise GuestProtocolError(f"a UDP header of {len(data)} bytes", field="udp")
    source, target, length, sum_ = _UDP.unpack_from(data)
    if not _UDP.size <= length <= len(data):
        raise GuestProtocolError(f"a UDP packet of {length} bytes", field="udp.length")
    data = data[:length]
    pseudo = pseudo_header_sum(packet.source + packet.target, PROTOCOL_UDP, length)
    if sum_ and checksum(ones_sum(data) + pseudo):
        raise GuestProtocolError("a UDP packet with a wrong sum", field="udp.checksum")
    return Udp(source, target, data[_UDP.size :])


def build_udp(source: bytes, target: bytes, udp: Udp) -> bytes:
    """Build what an IPv4 packet of protocol UDP carries. Cannot block.

    Args:
        source: Address, four bytes.
        target: The same.
        udp: Ports and payload.
    """
    length = _UDP.size + len(udp.payload)
    head = _UDP.pack(udp.source_port, udp.target_port, length, 0)
    total = pseudo_header_sum(source + target, PROTOCOL_UDP, length) + ones_sum(head + udp.payload)
    sum_ = checksum(total) or 0xFFFF
    return _UDP.pack(udp.source_port, udp.target_port, length, sum_) + udp.payload


def build_icmp(kind: int, code: int, rest: bytes, payload: bytes) -> bytes:
    """Build an ICMP message. Cannot block.

    Args:
        kind: Its type.
        code: Its code.
        rest: Bytes 4 to 8.
        payload: What follows.
    """
    data = struct.pack(">BBH", kind, code, 0) + rest + payload
    return data[:2] + checksum(ones_sum(data)).to_bytes(2, "big") + data[4:]

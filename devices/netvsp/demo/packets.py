"""As much of the Internet as two stations on one switch need: ARP, IPv4, echo, UDP.

Sources: RFC 826 (ARP), RFC 791 (IPv4), RFC 792 (ICMP), RFC 768 (UDP).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from netvsp.guest.frames import TYPE_IPV4, UDP, ones_sum

BROADCAST = b"\xff" * 6
REQUEST, REPLY = 1, 2
"""Operations of ARP."""
ECHO_REPLY, ECHO_REQUEST = 0, 8
"""Types of ICMP."""
ICMP = 1
MIN_FRAME = 60
"""Bytes of the shortest frame; what is shorter is filled up."""
HEADERS = 14 + 20 + 8
"""Bytes before the payload of a UDP datagram."""

_TYPE_ARP = 0x0806
_ETHERNET = struct.Struct(">6s6sH")
_ARP = struct.Struct(">HHBBH6s4s6s4s")
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_ICMP = struct.Struct(">BBHHH")
_UDP = struct.Struct(">HHHH")
_PSEUDO = struct.Struct(">4s4sBBH")


class Station(NamedTuple):
    """Who somebody is."""

    mac: bytes
    address: bytes
    """Of IPv4, four bytes."""


class Arp(NamedTuple):
    """A question or an answer about an address."""

    operation: int
    sender: Station
    target: Station


class Echo(NamedTuple):
    """A ping, or its answer."""

    kind: int
    sender: Station
    number: int
    """Identifier and sequence number in one."""
    data: bytes


class Datagram(NamedTuple):
    """What came by UDP."""

    sender: Station
    port: int
    """The destination's."""
    data: bytes
    sum_right: bool
    """Whether the checksum that is in the packet is the right one."""


def build_arp(operation: int, sender: Station, target: Station) -> bytes:
    """Return a frame with ARP; a question goes to everybody. Cannot block."""
    to = BROADCAST if operation == REQUEST else target.mac
    body = _ARP.pack(1, TYPE_IPV4, 6, 4, operation, *sender, *target)
    return (_ETHERNET.pack(to, sender.mac, _TYPE_ARP) + body).ljust(MIN_FRAME, b"\0")


def _build_ipv4(sender: Station, target: Station, protocol: int, payload: bytes) -> bytes:
    fields = [
        0x45,
        0,
        20 + len(payload),
        0,
        0x4000,
        64,
        protocol,
        0,
        sender.address,
        target.address,
    ]
    fields[7] = ones_sum(_IPV4.pack(*fields)) ^ 0xFFFF
    frame = _ETHERNET.pack(target.mac, sender.mac, TYPE_IPV4) + _IPV4.pack(*fields) + payload
    return frame.ljust(MIN_FRAME, b"\0")


def build_echo(kind: int, sender: Station, target: Station, number: int, data: bytes) -> bytes:
    """Return a frame with a ping or its answer. Cannot block."""
    high, low = number >> 16, number & 0xFFFF
    total = ones_sum(_ICMP.pack(kind, 0, 0, high, low) + data) ^ 0xFFFF
    return _build_ipv4(sender, target, ICMP, _ICMP.pack(kind, 0, total, high, low) + data)


def build_udp(
    sender: Station, target: Station, ports: tuple[int, int], data: bytes, *, sums: bool = True
) -> bytes:
    """Return a frame with a UDP datagram. Cannot block.

    Args:
        sender: Who sends.
        target: To whom.
        ports: Source and destination.
        data: The payload.
        sums: Fill in the checksum; else the adapter is to do it.
    """
    size = 8 + len(data)
    total = 0
    if sums:
        pseudo = _PSEUDO.pack(sender.address, target.address, 0, UDP, size)
        total = ones_sum(pseudo + _UDP.pack(*ports, size, 0) + data) ^ 0xFFFF or 0xFFFF
    return _build_ipv4(sender, target, UDP, _UDP.pack(*ports, size, total) + data)


def parse(frame: bytes) -> Arp | Echo | Datagram | None:
    """Return what is in a frame; None if it is none of these, or makes no sense. Cannot block."""
    try:
        _, source, kind = _ETHERNET.unpack_from(frame)
        if kind == _TYPE_ARP:
            *_, operation, mac, address, target_mac, target = _ARP.unpack_from(frame, 14)
            return Arp(operation, Station(mac, address), Station(target_mac, target))
        if kind != TYPE_IPV4 or frame[14:15] != b"\x45":
            return None
        _, _, size, _, _, _, protocol, _, address, target = _IPV4.unpack_from(frame, 14)
        body = frame[34 : 14 + size]
        sender = Station(source, address)
        if protocol == ICMP:
            kind, code, _, high, low = _ICMP.unpack_from(body)
            if code or ones_sum(body) != 0xFFFF:
                return None
            return Echo(kind, sender, high << 16 | low, body[8:])
        if protocol == UDP:
            _, port, length, total = _UDP.unpack_from(body)
            pseudo = _PSEUDO.pack(address, target, 0, UDP, length)
            right = not total or ones_sum(pseudo + body[:length]) == 0xFFFF
            return Datagram(sender, port, body[8:length], right)
    except struct.error:  # too short for what it says it is
        return None
    return None

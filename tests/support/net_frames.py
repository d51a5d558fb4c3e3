"""Frames as scapy makes them, and the same ones as a driver leaves them to the device."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from netvsp.frames.frame import Frame
from netvsp.frames.offload import from_guest_untrusted
from netvsp.wire import ppi
from tests.support.net_guest import MAC, PEER

IPV4 = ("10.1.2.3", "10.9.8.7")
IPV6 = ("fe80::1:2", "2001:db8::9:8:7")
TCI = 5 << 13 | 0x123
PSEUDO_SUM_OFFSETS = {"tcp": 16, "udp": 6}


class Shape(NamedTuple):
    """What a frame is made of."""

    version: int
    protocol: str
    vlan: str
    """``none``, ``inside`` the frame, or ``beside`` it."""
    options: bool = False
    """The TCP header has some."""

    def __str__(self) -> str:
        return f"ipv{self.version}-{self.protocol}-{self.vlan}" + "-options" * self.options

    @property
    def network(self) -> int:
        return 18 if self.vlan == "inside" else 14

    @property
    def transport(self) -> int:
        return self.network + (20 if self.version == 4 else 40)

    @property
    def headers(self) -> int:
        return self.transport + (8 if self.protocol == "udp" else 32 if self.options else 20)

    @property
    def tci(self) -> int | None:
        return TCI if self.vlan == "beside" else None

    def items(self) -> dict[int, int]:
        if self.vlan != "beside":
            return {}
        return {ppi.VLAN: ppi.pack_vlan(ppi.vlan_of_tci(TCI))}


SHAPES = [
    Shape(*each, options)
    for each in itertools.product((4, 6), ("tcp", "udp"), ("none", "inside", "beside"))
    for options in ((False, True) if each[1] == "tcp" else (False,))
]


def packet(
    shape: Shape,
    payload: bytes,
    *,
    seq: int = 0xFFFFFF00,
    flags: str = "PA",
    identity: int = 0xFFFE,
    udp_port: int = 53,
) -> bytes:
    """Return a frame that is right in all its sums and lengths, by scapy.

    A tag that is beside the frame is not in it.
    """
    frame: Any = Ether(dst=PEER.hex(":"), src=MAC.hex(":"))
    if shape.vlan == "inside":
        frame /= Dot1Q(vlan=TCI & 0xFFF, prio=TCI >> 13)
    if shape.version == 4:
        frame /= IP(src=IPV4[0], dst=IPV4[1], id=identity, flags="DF", ttl=63)
    else:
        frame /= IPv6(src=IPV6[0], dst=IPV6[1], hlim=63)
    if shape.protocol == "tcp":
        more = [("NOP", None), ("NOP", None), ("Timestamp", (11, 12))] if shape.options else []
        frame /= TCP(sport=80, dport=4000, seq=seq, ack=7, flags=flags, options=more, window=512)
    else:
        frame /= UDP(sport=udp_port, dport=5000)
    return bytes(frame / payload)


def pseudo_sum(shape: Shape, frame: bytes, length: int) -> int:
    """Return the sum of the pseudo header, word by word."""
    network = shape.network
    addresses = frame[network + 12 : network + 20]
    if shape.version == 6:
        addresses = frame[network + 8 : network + 40]
    total: int = length + (6 if shape.protocol == "tcp" else 17)
    total += sum(struct.unpack(f">{len(addresses) // 2}H", addresses))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def without_sum(shape: Shape, frame: bytes) -> tuple[bytes, dict[int, int]]:
    """Return what linux leaves when it asks for a checksum, and the items (netvsc_xmit)."""
    left = bytearray(frame)
    field = shape.transport + PSEUDO_SUM_OFFSETS[shape.protocol]
    total = pseudo_sum(shape, frame, len(frame) - shape.transport)
    left[field : field + 2] = total.to_bytes(2, "big")
    value = ppi.TX_IPV4 if shape.version == 4 else ppi.TX_IPV6
    value |= ppi.TX_TCP if shape.protocol == "tcp" else ppi.TX_UDP
    value |= shape.transport << ppi.TX_HEADER_OFFSET_SHIFT
    return bytes(left), {**shape.items(), ppi.CHECKSUM: value}


def uncut(shape: Shape, frame: bytes, mss: int) -> tuple[bytes, dict[int, int]]:
    """Return what linux leaves when it has a segment cut, and the items (netvsc_xmit)."""
    left = bytearray(frame)
    network = shape.network
    if shape.version == 4:
        left[network + 2 : network + 4] = left[network + 10 : network + 12] = bytes(2)
    else:
        left[network + 4 : network + 6] = bytes(2)
    field = shape.transport + 16
    left[field : field + 2] = pseudo_sum(shape, frame, 0).to_bytes(2, "big")
    value = ppi.pack_large_send(ppi.LargeSend(mss, shape.transport, shape.version == 6))
    return bytes(left), {**shape.items(), ppi.LARGE_SEND: value}


def pieces_of(shape: Shape, payload: bytes, mss: int, *, flags: str = "PA") -> Iterator[bytes]:
    """Yield the frames that a segment has to become, each by scapy."""
    seq, identity = 0xFFFFFF00, 0xFFFE
    for start in range(0, len(payload), mss):
        last = start + mss >= len(payload)
        some = flags if last else flags.replace("P", "").replace("F", "")
        if start:
            some = some.replace("C", "")
        yield packet(
            shape,
            payload[start : start + mss],
            seq=seq + start & 0xFFFFFFFF,
            flags=some,
            identity=identity + start // mss & 0xFFFF,
        )


def from_guest(frame: bytes, items: dict[int, int], *, cut: int | None = None) -> Frame:
    """What the device makes of it; ``cut``: where the guest's memory begins."""
    head, rest = (frame, ()) if cut is None else (frame[:cut], (memoryview(frame)[cut:],))
    return from_guest_untrusted(head, rest, len(frame), items)

"""Frames between the device and an endpoint, and what is known of them beside their bytes.

What can be left to somebody else (a checksum, the cutting of a large segment) is said as the
``virtio_net_hdr`` says it, since that is what TAP, vhost and packet sockets speak; RNDIS's way of
saying it is translated at the device (:mod:`netvsp.frames.offload`). Source:
linux/include/uapi/linux/virtio_net.h; virtio 1.2, 5.1.6.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

ETHERNET_HEADER = 14
VLAN_TAG = 4
MIN_MTU = 68
MAX_MTU = 9216 - ETHERNET_HEADER
MAX_FRAME = 65535 + ETHERNET_HEADER
"""Bytes of the longest segment, with its Ethernet header."""
HEADERS = 256
"""Bytes of a frame that are always in :attr:`Frame.head`, if it has as many: all headers are."""

ETHERTYPE_IPV4 = b"\x08\x00"
ETHERTYPE_IPV6 = b"\x86\xdd"
ETHERTYPE_VLAN = b"\x81\x00"
TAGS = frozenset((ETHERTYPE_VLAN, b"\x88\xa8"))
"""Types of VLAN tags: of 802.1Q, and of 802.1ad."""
BROADCAST = b"\xff" * 6
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17

# Offload.flags
NEEDS_CHECKSUM = 1
"""The field at csum_start + csum_offset holds the sum of the pseudo header; the rest is to do."""
DATA_VALID = 2
"""Somebody has checked the sums of TCP or UDP."""

# Offload.gso_type
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP = 5
"""UDP segmentation: VIRTIO_NET_HDR_GSO_UDP_L4."""
GSO_ECN = 0x80

VIRTIO_HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers: 12 bytes."""


class Offload(NamedTuple):
    """What is left to do for a frame, or has been found out about it; fields of virtio_net_hdr."""

    flags: int = 0
    gso_type: int = GSO_NONE
    header_length: int = 0
    """Bytes of all headers of a segment that is to be cut."""
    gso_size: int = 0
    """Bytes of payload in each piece."""
    csum_start: int = 0
    """Where the sum begins, from the start of the frame."""
    csum_offset: int = 0
    """Where it goes, from there."""


class Frame:
    """One Ethernet frame, without preamble and frame check sequence.

    Attributes:
        head: Its first bytes, private: all of it, or :data:`HEADERS` at least.
        rest: The bytes behind them, in pieces. They may be a guest's memory, which may change at
            any moment and is somebody else's when the call that has brought the frame returns.
        offload: None: nothing is left to do, and nothing known.
        tci: Tag control information of a VLAN tag that is not in the frame; None: there is none.
        flow: A number that is the same for all frames of a flow, if somebody knows one; else 0.
    """

    __slots__ = ("flow", "head", "offload", "rest", "tci")

    def __init__(
        self,
        head: bytes,
        rest: Sequence[Buffer] = (),
        offload: Offload | None = None,
        tci: int | None = None,
        flow: int = 0,
    ) -> None:
        self.head = head
        self.rest = rest
        self.offload = offload
        self.tci = tci
        self.flow = flow

    def __len__(self) -> int:
        return len(self.head) + sum(map(len, self.rest)) if self.rest else len(self.head)

    def __repr__(self) -> str:
        return f"<Frame of {len(self)} bytes, {self.head[:14].hex()}, {self.offload}>"

    def pieces(self) -> list[Buffer]:
        """Return its bytes in order, uncopied. Cannot block."""
        return [self.head, *self.rest]

    def tobytes(self) -> bytes:
        """Return its bytes in one piece, copied once if they are in several. Cannot block."""
        return b"".join(self.pieces()) if self.rest else self.head

    def own(self) -> Frame:
        """Return the frame, with bytes that stay. Cannot block."""
        if not self.rest:
            return self
        return Frame(self.tobytes(), (), self.offload, self.tci, self.flow)

    def tagged(self) -> Frame:
        """Return the frame with its VLAN tag among its bytes. Cannot block."""
        if self.tci is None:
            return self
        head = b"%b%b%b%b" % (
            self.head[:12],
            ETHERTYPE_VLAN,
            self.tci.to_bytes(2, "big"),
            self.head[12:],
        )
        return Frame(head, self.rest, _shifted(self.offload, VLAN_TAG), None, self.flow)

    def untagged(self) -> Frame:
        """Return the frame with its outermost VLAN tag beside its bytes. Cannot block."""
        head = self.head
        if self.tci is not None or head[12:14] != ETHERTYPE_VLAN or len(head) < 18:
            return self
        tci = int.from_bytes(head[14:16], "big")
        return Frame(
            head[:12] + head[16:], self.rest, _shifted(self.offload, -VLAN_TAG), tci, self.flow
        )


def hides_tag(frame: Frame) -> bool:
    """Whether a tag of VLAN 0 stands before another one. Cannot block.

    Who looks at the first only takes such a frame for one of no VLAN. Its receiver may not: Linux
    takes tags of VLAN 0 off until it finds one that means something (net/core/dev.c:
    __netif_receive_skb_core). So it would be in a VLAN of its sender's choice: CVE-2021-27853.

    Args:
        frame: Its outermost tag is beside it, if it is one of 802.1Q: see :meth:`Frame.untagged`.
    """
    head = frame.head
    if head[12:14] not in TAGS:
        return False
    if frame.tci is not None:
        return not frame.tci & 0xFFF
    return not int.from_bytes(head[14:16], "big") & 0xFFF and head[16:18] in TAGS


def _shifted(offload: Offload | None, count: int) -> Offload | None:
    if offload is None or not (offload.flags & NEEDS_CHECKSUM or offload.gso_type):
        return offload
    start, length = offload.csum_start + count, offload.header_length
    return offload._replace(
        csum_start=min(max(start, 0), 0xFFFF),
        header_length=min(max(length + count, 0), 0xFFFF) if length else 0,
    )


def format_mac(address: bytes) -> str:
    """Return six bytes as people write them."""
    return address.hex(":")

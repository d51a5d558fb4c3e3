"""Frames for tests: built from their fields, in private bytes or in a stand-in for guest memory."""

from __future__ import annotations

import dataclasses
import ipaddress
import struct
from collections.abc import Sequence

from netvsp.frames.checksum import checksum, ones_sum, pseudo_header_sum, sum_pieces
from netvsp.frames.frame import (
    ETHERNET_HEADER,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    HEADERS,
    NEEDS_CHECKSUM,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    Frame,
    Offload,
)
from netvsp.frames.offload import TCP_CHECKSUM, UDP_CHECKSUM
from netvsp.testing.port import MAC
from vmbus.testing.scatter import GuestPages

PEER = bytes.fromhex("00155d0a0b0c")
"""Some other station."""
PAGE = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """What a frame with a TCP or UDP packet is made from."""

    source_mac: bytes = MAC
    target_mac: bytes = PEER
    source: str = "192.0.2.15"
    target: str = "192.0.2.2"
    """Both IPv4, or both IPv6."""
    source_port: int = 1024
    target_port: int = 9
    protocol: int = PROTOCOL_UDP
    payload: bytes = b""
    sequence: int = 1
    """Of TCP."""
    flags: int = 0x18
    """Of TCP."""

    def build(self) -> bytes:
        """Return the frame, with all its sums."""
        head, start, field = self._head()
        total = sum_pieces([head[start:], self.payload])
        _put(head, start + field, checksum(total) or 0xFFFF)
        return bytes(head) + self.payload

    def build_partial(self, gso_size: int = 0) -> tuple[bytes, Offload]:
        """Return the frame with a sum that is left to do, and what says so.

        Args:
            gso_size: Bytes of payload in each piece of a segment; 0: it is none.
        """
        head, start, field = self._head()
        kind = 0
        if gso_size:
            tcp = GSO_TCPV6 if ":" in self.source else GSO_TCPV4
            kind = tcp if self.protocol == PROTOCOL_TCP else GSO_UDP
        end = len(head) if gso_size else 0
        offload = Offload(NEEDS_CHECKSUM, kind, end, gso_size, start, field)
        return bytes(head) + self.payload, offload

    def _head(self) -> tuple[bytearray, int, int]:
        """Return the headers, where the last one begins, and where in it the sum is."""
        source = ipaddress.ip_address(self.source)
        addresses = source.packed + ipaddress.ip_address(self.target).packed
        tcp = self.protocol == PROTOCOL_TCP
        length = (20 if tcp else 8) + len(self.payload)
        pseudo = pseudo_header_sum(addresses, self.protocol, length)
        ports = self.source_port, self.target_port
        if tcp:
            header = struct.pack(
                ">HHIIBBHHH", *ports, self.sequence, 1, 5 << 4, self.flags, 0xFFFF, pseudo, 0
            )
        else:
            header = struct.pack(">HHHH", *ports, length, pseudo)
        if source.version == 6:
            network = struct.pack(">IHBB", 6 << 28, length, self.protocol, 64) + addresses
            ethertype = ETHERTYPE_IPV6
        else:
            network = struct.pack(
                ">BBHHHBBH", 0x45, 0, 20 + length, 1, 0x4000, 64, self.protocol, 0
            )
            network += addresses
            network = network[:10] + checksum(ones_sum(network)).to_bytes(2, "big") + network[12:]
            ethertype = ETHERTYPE_IPV4
        head = bytearray(self.target_mac + self.source_mac + ethertype + network + header)
        return head, ETHERNET_HEADER + len(network), TCP_CHECKSUM if tcp else UDP_CHECKSUM


class GuestFrame:
    """A frame as the adapter has it: the headers private, the rest in the guest's memory.

    Args:
        data: Its bytes.
        offload: What is left to do.
        lengths: How the memory is cut; None: into pages.
    """

    def __init__(
        self, data: bytes, offload: Offload | None = None, lengths: Sequence[int] | None = None
    ) -> None:
        rest = data[HEADERS:]
        if lengths is None:
            lengths = [min(PAGE, len(rest) - at) for at in range(0, len(rest), PAGE)]
        self._memory = GuestPages.holding(rest, lengths)
        self.data = data
        self.frame = Frame(data[:HEADERS], self._memory.buffers, offload)

    @property
    def untouched(self) -> bool:
        """Whether frame and memory are as they were, and nothing beside it has been written."""
        return self._memory.guards_are_whole() and self.frame.tobytes() == self.data

    def spoil(self) -> None:
        """Do with the memory what a guest does whose frame has been taken: use it for others.

        Who has kept a view of it gets an error from it.
        """
        for buffer in self._memory.buffers:
            buffer[:] = bytes((SPOILT,)) * len(buffer)
            buffer.release()


SPOILT = 0xDB
"""What is in a guest's memory when it is used for something else."""


def sum_is_right(data: bytes) -> bool:
    """Whether the sums of a frame with TCP or UDP over IPv4 (no options) or IPv6 are right."""
    if data[12:14] == ETHERTYPE_IPV6:
        start, addresses, protocol = ETHERNET_HEADER + 40, data[22:54], data[20]
        end = start + int.from_bytes(data[18:20], "big")
    else:
        start, addresses, protocol = ETHERNET_HEADER + 20, data[26:34], data[23]
        end = ETHERNET_HEADER + int.from_bytes(data[16:18], "big")
        if checksum(ones_sum(data[ETHERNET_HEADER:start])):
            return False
    total = ones_sum(data[start:end]) + pseudo_header_sum(addresses, protocol, end - start)
    return not checksum(total)


def _put(data: bytearray, at: int, value: int) -> None:
    data[at : at + 2] = value.to_bytes(2, "big")

"""Offloads: what the guest leaves to us, said as endpoints understand it; and doing it ourselves.

A driver says by per-packet information what it has left undone, and by different customs what it
has left in the frame (linux/drivers/net/hyperv/netvsc_drv.c: netvsc_xmit; [MS-RNDIS] refers to
NDIS):

* a checksum: the field holds the sum of the pseudo header, as ``virtio_net_hdr`` wants it;
* a large segment: total length and header checksum of IPv4 are zero, and so is the payload length
  of IPv6; the pseudo header's sum was made with a length of zero. All three must be put right
  before the segment goes out, or what it is cut into has no valid sum.

Everything here reads :attr:`Frame.head`, a private copy, and trusts none of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from netvsp.frames.checksum import checksum, fold, ones_sum, sum_pieces
from netvsp.frames.frame import (
    DATA_VALID,
    ETHERNET_HEADER,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    ETHERTYPE_VLAN,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    VIRTIO_HEADER,
    VLAN_TAG,
    Buffer,
    Frame,
    Offload,
)
from netvsp.wire import ppi
from vmbus.errors import GuestProtocolError

MIN_MSS = 48
"""Bytes of payload in a piece, at least: linux/include/net/tcp.h, TCP_MIN_MSS."""
TCP_CHECKSUM = 16
UDP_CHECKSUM = 6
"""Offsets of the sums in their headers."""
_IPV4_HEADER = 20
_IPV6_HEADER = 40
_TCP_HEADER = 20
_UDP_HEADER = 8
_GSO_OF = {ETHERTYPE_IPV4: GSO_TCPV4, ETHERTYPE_IPV6: GSO_TCPV6}
_CWR = 0x80


def from_guest_untrusted(
    head: bytes, rest: Sequence[Buffer], length: int, items: Mapping[int, int]
) -> Frame:
    """Return a frame that the guest sends, with what it has left undone. Cannot block.

    Args:
        head: Private copy of its first bytes: all headers, if it has any.
        rest: What is behind them.
        length: Bytes of both.
        items: Per-packet information, by type.

    Raises:
        GuestProtocolError: What it asks for cannot be done to such a frame.
    """
    value = items.get(ppi.VLAN)
    tci = None if value is None else ppi.unpack_vlan(value).tci
    flow = items.get(ppi.HASH_VALUE, 0)
    value = items.get(ppi.LARGE_SEND)
    if value is not None:
        head, offload = _large_send_untrusted(head, length, value)
        return Frame(head, rest, offload, tci, flow)
    value = items.get(ppi.CHECKSUM)
    if value:
        head, found = _checksum_untrusted(head, length, value)
        return Frame(head, rest, found, tci, flow)
    return Frame(head, rest, None, tci, flow)


def _network_header(head: bytes) -> tuple[bytes, int]:
    """Return the type of the network header and where it is."""
    ethertype, start = head[12:14], ETHERNET_HEADER
    if ethertype == ETHERTYPE_VLAN:
        ethertype, start = head[16:18], ETHERNET_HEADER + VLAN_TAG
    return ethertype, start


def _large_send_untrusted(head: bytes, length: int, value: int) -> tuple[bytes, Offload]:
    if not value & ppi.LSO_VERSION_2:
        raise GuestProtocolError("LARGE_SEND of version 1, which was not offered", field="lso.type")
    large = ppi.unpack_large_send(value)
    ethertype, network = _network_header(head)
    start = large.header_offset
    least = network + (_IPV6_HEADER if large.ipv6 else _IPV4_HEADER)
    if ethertype != (ETHERTYPE_IPV6 if large.ipv6 else ETHERTYPE_IPV4):
        raise GuestProtocolError(
            f"LARGE_SEND of a frame of type {ethertype.hex()}", field="lso.ip_version"
        )
    if start < least or start + _TCP_HEADER > len(head):
        raise GuestProtocolError(
            f"LARGE_SEND: a TCP header at byte {start} of {len(head)}",
            field="lso.tcp_header_offset",
        )
    header_length = start + (head[start + 12] >> 4) * 4
    if not start + _TCP_HEADER <= header_length <= min(len(head), length):
        raise GuestProtocolError(
            f"LARGE_SEND: headers end at byte {header_length} of {length}", field="tcp.doff"
        )
    if large.mss < MIN_MSS:
        raise GuestProtocolError(f"LARGE_SEND in pieces of {large.mss} bytes", field="lso.mss")
    tcp_length = length - start
    data = bytearray(head)
    if large.ipv6:
        if length - network - _IPV6_HEADER > 0xFFFF:
            raise GuestProtocolError(f"LARGE_SEND of {length} bytes", field="data_len")
        data[network + 4 : network + 6] = (length - network - _IPV6_HEADER).to_bytes(2, "big")
    else:
        if length - network > 0xFFFF:
            raise GuestProtocolError(f"LARGE_SEND of {length} bytes", field="data_len")
        data[network + 2 : network + 4] = (length - network).to_bytes(2, "big")
        _fill_ip_checksum(data, network, start)
    field = start + TCP_CHECKSUM
    total = int.from_bytes(data[field : field + 2], "big") + tcp_length
    data[field : field + 2] = fold(total).to_bytes(2, "big")
    kind = GSO_TCPV6 if large.ipv6 else GSO_TCPV4
    if head[start + 13] & _CWR:
        kind |= GSO_ECN
    if length - header_length <= large.mss:
        # One piece is no segment to cut.
        return bytes(data), Offload(NEEDS_CHECKSUM, 0, 0, 0, start, TCP_CHECKSUM)
    return bytes(data), Offload(NEEDS_CHECKSUM, kind, header_length, large.mss, start, TCP_CHECKSUM)


def _checksum_untrusted(head: bytes, length: int, value: int) -> tuple[bytes, Offload | None]:
    ethertype, network = _network_header(head)
    if value & ppi.TX_IP_HEADER and ethertype == ETHERTYPE_IPV4:
        end = network + 4 * (head[network] & 0xF) if len(head) > network else 0
        if not network + _IPV4_HEADER <= end <= len(head):
            raise GuestProtocolError(
                f"CHECKSUM: an IP header that ends at byte {end} of {len(head)}", field="ip.ihl"
            )
        data = bytearray(head)
        _fill_ip_checksum(data, network, end)
        head = bytes(data)
    if not value & (ppi.TX_TCP | ppi.TX_UDP):
        return head, None
    start = value >> ppi.TX_HEADER_OFFSET_SHIFT & ppi.TX_HEADER_OFFSET_MASK
    field = TCP_CHECKSUM if value & ppi.TX_TCP else UDP_CHECKSUM
    if not start:
        start = _transport_header(head, ethertype, network)
    if start < network or start + field + 2 > min(len(head), length):
        raise GuestProtocolError(
            f"CHECKSUM: a header at byte {start} of {len(head)}", field="csum.tcp_header_offset"
        )
    return head, Offload(NEEDS_CHECKSUM, 0, 0, 0, start, field)


def _transport_header(head: bytes, ethertype: bytes, network: int) -> int:
    if ethertype == ETHERTYPE_IPV6:
        return network + _IPV6_HEADER
    if ethertype == ETHERTYPE_IPV4 and len(head) > network:
        return network + 4 * (head[network] & 0xF)
    return 0


def _fill_ip_checksum(data: bytearray, start: int, end: int) -> None:
    end = min(end, start + 4 * (data[start] & 0xF))
    data[start + 10 : start + 12] = b"\0\0"
    data[start + 10 : start + 12] = checksum(ones_sum(data[start:end])).to_bytes(2, "big")


# -- what nobody behind us does ------------------------------------------------------------------


def fill_checksum(frame: Frame) -> Frame:
    """Return the frame with the sum that it needs, if it needs one. Cannot block.

    Its bytes may have changed meanwhile if they are a guest's: then its sum is wrong.
    """
    offload = frame.offload
    if offload is None or not offload.flags & NEEDS_CHECKSUM or offload.gso_type:
        return frame
    head = frame.head
    start = offload.csum_start
    field = start + offload.csum_offset
    if start > len(head) or field + 2 > len(head):
        return frame  # an endpoint's own mistake; who gets it will see that the sum is wrong
    total = sum_pieces([head[start:], *frame.rest])
    value = checksum(total)
    if not value and offload.csum_offset == UDP_CHECKSUM:
        value = 0xFFFF  # 0 means that there is none
    data = bytearray(head)
    data[field : field + 2] = value.to_bytes(2, "big")
    return Frame(bytes(data), frame.rest, offload._replace(flags=DATA_VALID), frame.tci, frame.flow)


def cut(frame: Frame, *, filled: bool = False) -> Iterator[Frame]:
    """Cut a large segment into frames, each with the headers it needs, as they are asked for.

    Cannot block.

    Args:
        frame: Its bytes are copied when the first piece is asked for.
        filled: Fill in their sums; else those are left to do: NEEDS_CHECKSUM, with the pseudo
            header's in place.

    Returns:
        The frame itself, if it is not to be cut, or cannot be.
    """
    offload = frame.offload
    how = None
    if offload is not None and offload.gso_type and offload.gso_size:
        data = frame.tobytes()
        how = _how_to_cut(data, offload)
    if offload is None or how is None:
        yield fill_checksum(frame) if filled else frame
        return
    # Elsewhere than the protocol has it: whoever says so gets that.
    usual = how.sum_at == offload.csum_start + offload.csum_offset
    flags = DATA_VALID if filled and usual else NEEDS_CHECKSUM
    left = Offload(flags, 0, 0, 0, how.start, offload.csum_offset)
    size, end = how.size, len(data)
    for number, position in enumerate(range(offload.header_length, end, size)):
        payload = data[position : position + size]
        last = position + size >= end
        head = _piece_headers(how, number, payload, last=last, filled=filled and usual)
        piece = Frame(b"".join((head, payload)), (), left, frame.tci, frame.flow)
        yield fill_checksum(piece) if filled else piece


def _how_to_cut(data: bytes, offload: Offload) -> _Cut | None:
    """Return how a segment is cut; None: it cannot be."""
    start, end = offload.csum_start, offload.header_length
    ethertype, network = _network_header(data)
    kind = offload.gso_type & ~GSO_ECN
    # The version in the header itself is not to be trusted: it would be cut with wrong offsets.
    ipv6 = ethertype == ETHERTYPE_IPV6
    if ethertype not in _GSO_OF or kind not in {GSO_UDP, _GSO_OF[ethertype]}:
        return None
    fixed = network + (_IPV6_HEADER if ipv6 else _IPV4_HEADER)
    least = _UDP_HEADER if kind == GSO_UDP else _TCP_HEADER
    longest = end + min(offload.gso_size, len(data) - end) - (fixed if ipv6 else network)
    if start < fixed or end < start + least or end >= len(data) or longest > 0xFFFF:
        return None
    return _Cut(data[:end], kind, ipv6=ipv6, network=network, start=start, size=offload.gso_size)


class _Cut:
    """How a segment is cut: its headers without what differs from piece to piece, and their sums.

    Args:
        head: The segment's headers.
        kind: GSO_UDP or one of the others.
        ipv6: Which IP it is.
        network: Where the IP header is.
        start: Where the TCP or UDP header is.
        size: Bytes of payload in each piece.
    """

    __slots__ = (
        "addresses", "flags", "identity", "ipv6", "length", "network", "network_sum", "sequence",
        "size", "start", "sum_at", "template", "transport_sum", "udp",
    )  # fmt: skip

    def __init__(
        self, head: bytes, kind: int, *, ipv6: bool, network: int, start: int, size: int
    ) -> None:
        self.ipv6, self.network, self.start, self.size = ipv6, network, start, size
        self.udp = kind == GSO_UDP
        self.length = len(head)
        template = bytearray(head)
        self.identity = self.sequence = self.flags = self.network_sum = 0
        if ipv6:
            template[network + 4 : network + 6] = bytes(2)
            addresses = head[network + 8 : network + 40]
        else:
            self.identity = int.from_bytes(head[network + 4 : network + 6], "big")
            template[network + 2 : network + 6] = bytes(4)
            template[network + 10 : network + 12] = bytes(2)
            self.network_sum = ones_sum(template[network:start])
            addresses = head[network + 12 : network + 20]
        if self.udp:
            template[start + 4 : start + 8] = bytes(4)
            self.sum_at, protocol = start + UDP_CHECKSUM, PROTOCOL_UDP
        else:
            self.sequence = int.from_bytes(head[start + 4 : start + 8], "big")
            self.flags = int.from_bytes(head[start + 12 : start + 14], "big")
            template[start + 4 : start + 8] = bytes(4)
            template[start + 12 : start + 14] = bytes(2)
            self.sum_at, protocol = start + TCP_CHECKSUM, PROTOCOL_TCP
            template[self.sum_at : self.sum_at + 2] = bytes(2)
        self.template = bytes(template)
        self.addresses = ones_sum(addresses) + protocol
        self.transport_sum = self.addresses + ones_sum(template[start:])


_pack_16 = struct.Struct(">H").pack_into
_pack_16_16 = struct.Struct(">HH").pack_into
_pack_32 = struct.Struct(">I").pack_into


def _piece_headers(
    how: _Cut, number: int, payload: bytes, *, last: bool, filled: bool
) -> bytearray:
    """Return the headers of a piece, made out of those of the segment."""
    head = bytearray(how.template)
    network, start, size = how.network, how.start, len(payload)
    whole = how.length - network + size
    length = how.length - start + size
    if how.ipv6:
        _pack_16(head, network + 4, whole - _IPV6_HEADER)
    else:
        identity = (how.identity + number) & 0xFFFF
        _pack_16_16(head, network + 2, whole, identity)
        _pack_16(head, network + 10, checksum(how.network_sum + whole + identity))
    if how.udp:
        _pack_16(head, start + 4, length)
        differs = length
    else:
        sequence = (how.sequence + number * how.size) & 0xFFFFFFFF
        flags = how.flags
        if number:
            flags &= ~_CWR
        if not last:
            flags &= ~0x09  # FIN and PSH belong to the last one
        _pack_32(head, start + 4, sequence)
        _pack_16(head, start + 12, flags)
        differs = (sequence >> 16) + (sequence & 0xFFFF) + flags
    if not filled:
        value = fold(how.addresses + length)
    else:
        part = ones_sum(payload)
        if how.length - start & 1:  # a header of an odd length
            part = (part & 0xFF) << 8 | part >> 8
        value = checksum(how.transport_sum + length + differs + part)
        if not value and how.udp:
            value = 0xFFFF  # 0 means that there is none
    _pack_16(head, how.sum_at, value)
    return head


def complete(frame: Frame) -> list[Frame]:
    """Do all that is left to do for a frame: cut it, fill in its sums. Cannot block."""
    return list(cut(frame, filled=True))


# -- towards the guest ---------------------------------------------------------------------------


def receive_value(frame: Frame) -> int:
    """Return the word of CHECKSUM that tells a guest what is known of a frame; 0: nothing.

    Cannot block.
    """
    offload = frame.offload
    if offload is None or not offload.flags & (NEEDS_CHECKSUM | DATA_VALID):
        return 0
    head = frame.head
    ethertype, network = _network_header(head)
    if ethertype == ETHERTYPE_IPV4 and len(head) > network + 9:
        protocol, value = head[network + 9], ppi.RX_IP_SUCCEEDED
    elif ethertype == ETHERTYPE_IPV6 and len(head) > network + 6:
        protocol, value = head[network + 6], 0
        if protocol not in {PROTOCOL_TCP, PROTOCOL_UDP} and offload.csum_offset:
            # Behind extension headers; where the sum is says which it is.
            protocol = PROTOCOL_UDP if offload.csum_offset == UDP_CHECKSUM else PROTOCOL_TCP
    else:
        return 0
    if protocol == PROTOCOL_TCP:
        return value | ppi.RX_TCP_SUCCEEDED
    if protocol == PROTOCOL_UDP:
        return value | ppi.RX_UDP_SUCCEEDED
    return 0


# -- virtio_net_hdr ------------------------------------------------------------------------------

PLAIN = VIRTIO_HEADER.pack(0, 0, 0, 0, 0, 0, 0)
"""The header of a frame without offloads."""


def pack_virtio(offload: Offload | None) -> bytes:
    """Return the 12 bytes of ``virtio_net_hdr_v1`` for a frame that is sent. Cannot block."""
    if offload is None:
        return PLAIN
    # Who has checked a sum may not say so to a TAP: tun_get_user refuses unknown flags.
    return VIRTIO_HEADER.pack(offload.flags & NEEDS_CHECKSUM, *offload[1:], 0)


def unpack_virtio(header: Buffer) -> Offload | None:
    """Return what a ``virtio_net_hdr`` says of a frame that was received. Cannot block."""
    fields = VIRTIO_HEADER.unpack_from(header)
    if not (fields[0] or fields[1]):
        return None
    return Offload._make(fields[:6])

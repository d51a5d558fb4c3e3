"""Ring packets: the 16-byte descriptor and the headers of transfer-page and GPA-direct packets.

The data path is made of these, so they are plain ``struct`` layouts; their construct twins in
``tests/reference`` prove them. Source: linux/include/linux/hyperv.h (``struct
vmpacket_descriptor`` and the structures after it).

A packet in the ring is: descriptor, type-specific header, payload from ``data_offset8 * 8`` to
``length8 * 8``, then an 8-byte trailer with the writer's index at the start of the packet, which
readers skip unseen. Lengths count from the start of the descriptor, in units of 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmbus.errors import GuestProtocolError
from vmbus.wire.gpa import RANGE, GpaRange, parse_range_untrusted

DESCRIPTOR = struct.Struct("<HHHHQ")
"""type, data_offset8, length8, flags, transaction_id."""
assert DESCRIPTOR.size == 16
DESCRIPTOR_SIZE = 16
TRAILER = struct.Struct("<Q")
TRAILER_SIZE = 8
RANGES_HEADER = struct.Struct("<II")
"""At byte 16 of a GPA-direct packet: reserved u32, range_count u32."""
TRANSFER_PAGES_HEADER = struct.Struct("<HBBI")
"""At byte 16 of a transfer-page packet: set id u16, sender_owns u8, reserved u8, count u32."""
assert RANGES_HEADER.size == TRANSFER_PAGES_HEADER.size == 8
RANGES_OFFSET = 24
"""Where the ranges of both begin, in bytes from the descriptor."""

IN_BAND = 6
TRANSFER_PAGES = 7
GPADL = 8
GPA_DIRECT = 9
COMPLETION = 11
PACKET_TYPES = frozenset({IN_BAND, TRANSFER_PAGES, GPADL, GPA_DIRECT, COMPLETION})
PACKET_NAMES = {
    IN_BAND: "in-band",
    TRANSFER_PAGES: "transfer-pages",
    GPADL: "gpadl",
    GPA_DIRECT: "gpa-direct",
    COMPLETION: "completion",
}

FLAG_COMPLETION_REQUESTED = 1
MAX_PACKET = 0xFFFF * 8
"""Longest packet that ``length8`` can express, in bytes."""


def parse_descriptor_untrusted(data: bytes, start: int = 0) -> tuple[int, int, int, int, int]:
    """Parse one descriptor. Cannot block.

    Args:
        data: A private copy of ring bytes.
        start: Byte offset of the descriptor.

    Returns:
        ``(type, data_offset, length, flags, transaction_id)``, lengths in bytes.

    Raises:
        GuestProtocolError: Fewer than 16 bytes, or lengths that contradict each other.
    """
    if len(data) - start < DESCRIPTOR_SIZE:
        raise GuestProtocolError("ring packet: shorter than a descriptor", field="length8")
    kind, offset8, length8, flags, transaction_id = DESCRIPTOR.unpack_from(data, start)
    if not 2 <= offset8 <= length8:
        raise GuestProtocolError(
            f"ring packet: data_offset8 {offset8} is not between 2 and length8 {length8}",
            field="data_offset8",
        )
    return kind, offset8 * 8, length8 * 8, flags, transaction_id


def parse_gpa_ranges_untrusted(
    data: bytes,
    header_end: int,
    *,
    max_ranges: int,
    allow_empty: bool = False,
    at_most: int | None = None,
) -> list[GpaRange]:
    """Parse the ranges of a GPA-direct packet. Cannot block.

    Args:
        data: A private copy of the packet, descriptor included.
        header_end: ``data_offset8 * 8``: where the payload begins and the ranges must have ended.
        max_ranges: More ranges than this are refused before any is parsed.
        allow_empty: Accept ranges of length 0.
        at_most: Bytes that are of use, of all ranges together. What is beyond is checked, but its
            pages, of which a packet has room for 65 000, are left out. None: all are of use.

    Raises:
        GuestProtocolError: No range, too many, or one that does not fit before ``header_end``.
    """
    header_end = min(header_end, len(data))
    if header_end < RANGES_OFFSET:
        raise GuestProtocolError(
            f"GPA-direct packet: header of {header_end} bytes, needs 24", field="data_offset8"
        )
    (count,) = _COUNT.unpack_from(data, 20)
    if not 0 < count <= max_ranges:
        raise GuestProtocolError(
            f"GPA-direct packet: range_count {count} is not between 1 and {max_ranges}",
            field="range_count",
        )
    position = RANGES_OFFSET
    ranges = []
    for _ in range(count):
        found, position = parse_range_untrusted(
            data, position, header_end, allow_empty=allow_empty, at_most=at_most
        )
        if at_most is not None:
            at_most -= found.byte_count
        ranges.append(found)
    return ranges


def parse_transfer_pages_untrusted(
    data: bytes, header_end: int, *, max_ranges: int
) -> tuple[int, list[tuple[int, int]]]:
    """Parse the header of a transfer-page packet. Cannot block.

    Returns:
        The set id and the ranges as ``(byte_count, byte_offset)`` into the page set, unchecked
        against its size.

    Raises:
        GuestProtocolError: Too many ranges, or more than fit before ``header_end``.
    """
    header_end = min(header_end, len(data))
    if header_end < RANGES_OFFSET:
        raise GuestProtocolError(
            f"transfer-page packet: header of {header_end} bytes, needs 24", field="data_offset8"
        )
    set_id, _owns, _reserved, count = TRANSFER_PAGES_HEADER.unpack_from(data, DESCRIPTOR_SIZE)
    if count > max_ranges or RANGES_OFFSET + count * RANGE.size > header_end:
        raise GuestProtocolError(
            f"transfer-page packet: range_count {count} does not fit", field="range_count"
        )
    ranges = [RANGE.unpack_from(data, RANGES_OFFSET + 8 * index) for index in range(count)]
    return set_id, ranges


_COUNT = struct.Struct("<I")


def build_packet(
    kind: int,
    payload: bytes,
    *,
    transaction_id: int = 0,
    flags: int = 0,
    header: bytes = b"",
) -> bytes:
    """Return a packet without its trailer, padded to a multiple of 8 bytes. Cannot block.

    Args:
        kind: Packet type.
        payload: What the receiver gets; it cannot see how much of the padding is padding.
        transaction_id: 64 bits, echoed by a completion.
        flags: :data:`FLAG_COMPLETION_REQUESTED` or 0.
        header: What stands between descriptor and payload, a multiple of 8 bytes.

    Raises:
        ValueError: Too long, or ``header`` not a multiple of 8 bytes.
    """
    if len(header) % 8:
        raise ValueError("a packet header is a multiple of 8 bytes")
    offset = DESCRIPTOR_SIZE + len(header)
    length = (offset + len(payload) + 7) & ~7
    if length > MAX_PACKET:
        raise ValueError(f"a packet of {length} bytes is too long; {MAX_PACKET} are possible")
    descriptor = DESCRIPTOR.pack(kind, offset >> 3, length >> 3, flags, transaction_id)
    return b"".join((descriptor, header, payload, bytes(length - offset - len(payload))))


def build_transfer_pages(
    payload: bytes,
    ranges: Sequence[tuple[int, int]],
    *,
    set_id: int,
    transaction_id: int,
    flags: int = FLAG_COMPLETION_REQUESTED,
) -> bytes:
    """Return a transfer-page packet: data that lies in a buffer shared before. Cannot block.

    Args:
        payload: What stands behind the ranges.
        ranges: ``(byte_count, byte_offset)`` of each piece of the buffer, in order.
        set_id: Which buffer; netvsc's receive buffer is 0xCAFE (NETVSC_RECEIVE_BUFFER_ID).
        transaction_id: The completion, by which the buffer's pieces come back, repeats it.
        flags: :data:`FLAG_COMPLETION_REQUESTED` or 0.

    Raises:
        ValueError: Too long for a packet.
    """
    header = TRANSFER_PAGES_HEADER.pack(set_id, 0, 0, len(ranges))
    return build_packet(
        TRANSFER_PAGES,
        payload,
        transaction_id=transaction_id,
        flags=flags,
        header=header + b"".join(RANGE.pack(*each) for each in ranges),
    )

"""Frames in the receive buffer: an RNDIS message in each part, and packets that name the parts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from netvsp.buffers import ReceiveBuffer
from netvsp.frames.frame import VLAN_TAG, Frame
from netvsp.frames.offload import receive_value
from netvsp.wire import ppi, rndis
from vmbus.errors import GuestProtocolError
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, RANGES_OFFSET, TRANSFER_PAGES

ROOM = 256
"""Bytes of a sub-allocation beside the frame: RNDIS header and per-packet information."""
LONGEST_CONTROL = 1024
"""Bytes that a sub-allocation has for control messages at least; a name takes 536."""

COALESCED_PART = 16 << 10
"""Bytes of a sub-allocation for drivers that take coalesced segments, of which each part is one."""
COALESCED_PARTS = 512
"""They are that long if there are so many of them at least."""

_HEADERS = 2048
"""Lengths of frames whose header is remembered; then all are forgotten."""


def part_size(max_frame: int, coalesced: int = 0) -> int:
    """Return how long a sub-allocation has to be for such frames, in bytes. Cannot block.

    However short they are, what the guest asks for goes there as well.

    A power of two up to a page: then none of them is in two pages, whatever the guest's are.

    Args:
        max_frame: Bytes of the longest frame.
        coalesced: Bytes of the whole buffer, if its driver takes coalesced segments. No message may
            be longer than a sub-allocation (linux/drivers/net/hyperv/netvsc.c: netvsc_receive), and
            each costs as much as a frame: so they are long.
    """
    if coalesced >= COALESCED_PARTS * COALESCED_PART:
        max_frame = max(max_frame, COALESCED_PART - VLAN_TAG - ROOM)
    need = max(max_frame + VLAN_TAG + ROOM, LONGEST_CONTROL)
    if need <= 4096:
        return 1 << (need - 1).bit_length()
    return (need + 4095) & ~4095


class Headers:
    """What stands before frames about which there is nothing to say, but their hash perhaps."""

    def __init__(self) -> None:
        self._plain: dict[int, bytes] = {}
        self._hashed: dict[int, bytes] = {}

    def plain(self, length: int) -> bytes:
        """Return the header of a frame of so many bytes. Cannot block."""
        found = self._plain.get(length)
        if found is None:
            if len(self._plain) >= _HEADERS:
                self._plain.clear()
            found = self._plain[length] = rndis.build_packet_header(length)
        return found

    def hashed(self, length: int, number: int) -> bytes:
        """Return that of a frame with a hash. Cannot block."""
        found = self._hashed.get(length)
        if found is None:
            if len(self._hashed) >= _HEADERS:
                self._hashed.clear()
            whole = rndis.build_packet_header(length, ppi.build_item(ppi.HASH_VALUE, 0))
            found = self._hashed[length] = whole[:-4]  # the number is at its end
        return found + number.to_bytes(4, "little")


def store(buffer: ReceiveBuffer, frame: Frame, hashed: int | None, segment: int) -> list[int]:
    """Write one frame into free parts of the buffer. Cannot block.

    Args:
        buffer: There are as many free parts as it takes.
        frame: With all that is to be said of it.
        hashed: Its hash, if it has one.
        segment: 16 bits, different from those of its neighbours: the number of a coalesced one.

    Returns:
        Length and offset of each part.

    Raises:
        GuestProtocolError: A part is no memory any more; none is used.
    """
    information = b""
    value = receive_value(frame) if frame.offload is not None else 0
    if value:
        information = ppi.build_item(ppi.CHECKSUM, value)
    if frame.tci is not None:
        tag = ppi.pack_vlan(ppi.vlan_of_tci(frame.tci))
        information += ppi.build_item(ppi.VLAN, tag)
    if hashed is not None:
        information += ppi.build_item(ppi.HASH_VALUE, hashed)
    room = buffer.part_size - ROOM
    whole = frame.tobytes()
    length = len(whole)
    if length <= room:
        return [*put(buffer, rndis.build_packet_header(length, information) + whole)]
    ranges: list[int] = []
    last = (length - 1) // room * room
    header = _part_header(room, information, ppi.FRAGMENT_FIRST, segment)
    try:
        for start in range(0, last, room):
            ranges += put(buffer, header + whole[start : start + room])
            if start == 0:
                header = _part_header(room, information, 0, segment)
        header = _part_header(length - last, information, ppi.FRAGMENT_LAST, segment)
        ranges += put(buffer, header + whole[last:])
    except GuestProtocolError:
        buffer.free += [offset // buffer.part_size for offset in ranges[1::2]]
        raise
    return ranges


def _part_header(length: int, information: bytes, flags: int, segment: int) -> bytes:
    marked = information + ppi.build_packet_id(ppi.FRAGMENT_SUB_ALLOCATION | flags, segment)
    return rndis.build_packet_header(length, marked)


def put(buffer: ReceiveBuffer, data: bytes) -> tuple[int, int]:
    """Write a message into a free part; return its length and where it is. Cannot block.

    Raises:
        GuestProtocolError: The part is no memory any more; it stays free.
    """
    index = buffer.free[-1]
    view = (buffer.parts.get(index) or buffer.part(index))[0]
    if len(data) <= len(view):
        view[: len(data)] = data
    else:
        buffer.write(index, data)
    buffer.free.pop()
    return len(data), index * buffer.part_size


@lru_cache(maxsize=1024)
def _layout(count: int) -> struct.Struct:
    """A transfer-page packet up to its payload: descriptor, header, lengths and offsets."""
    return struct.Struct(f"<HHHHQHHI{count}I")


def build_packet(
    buffer_id: int, ranges: Sequence[int], transaction_id: int, message: bytes
) -> bytes:
    """Build a transfer-page packet that is to be completed. Cannot block.

    Args:
        buffer_id: What the driver calls the buffer.
        ranges: Length and offset of each part.
        transaction_id: 64 bits.
        message: NVSP's, a multiple of 8 bytes.
    """
    count = len(ranges)
    offset = RANGES_OFFSET + 4 * count
    head = _layout(count).pack(
        TRANSFER_PAGES,
        offset >> 3,
        offset + len(message) >> 3,
        FLAG_COMPLETION_REQUESTED,
        transaction_id,
        buffer_id,
        0,
        count >> 1,
        *ranges,
    )
    return head + message

"""What a packet from the guest holds: bytes that lie in several places, and frames out of them.

A packet names a section of the send buffer, or lists guest pages, or both: Linux copies an RNDIS
header into a section and leaves the frame in its pages (netvsc_send, ``cp_partial``). What is there
is one message, or several behind each other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from netvsp.buffers import SendBuffer
from netvsp.control import MAX_PACKETS
from netvsp.frames.frame import HEADERS, MAX_FRAME, Buffer, Frame
from netvsp.frames.offload import from_guest_untrusted
from netvsp.wire import ppi, rndis
from netvsp.wire.nvsp import NO_SECTION
from vmbus.errors import GuestProtocolError
from vmbus.host.channel import MAX_RANGES
from vmbus.memory import PAGE_SIZE, Cutter, GuestMemory, total_length
from vmbus.ring import Packet
from vmbus.wire.packets import GPA_DIRECT, RANGES_OFFSET, parse_gpa_ranges_untrusted

MAX_MESSAGE = MAX_FRAME + 4096
"""Bytes of one packet's messages, whatever it says."""
COPIED = 4096
"""Messages up to here are copied as a whole: that is faster than dealing with their pages."""
_HEAD = 512
"""Bytes of a longer message that are copied: its header, information, and the frame's headers."""
_MEMO = 1024
"""Lists of per-packet information whose meaning is remembered."""
_LONGEST_KNOWN = 128
"""Bytes of such a list; a guest can make longer ones, but no driver does."""
FIRST_OFFSET = rndis.PACKET_HEADER_SIZE - rndis.HEADER_SIZE
"""The least offset of anything in a PACKET message."""

whereabouts = struct.Struct("<4I12xII").unpack_from
"""Type, length, data offset and length, information offset and length of a PACKET message: see
:data:`netvsp.wire.rndis.PACKET_HEADER`."""


@lru_cache(maxsize=MAX_RANGES)
def _singles(count: int) -> struct.Struct:
    """How many ranges there are, and length, offset and page number of each."""
    return struct.Struct("<I" + "IIQ" * count)


_NOTHING: dict[int, int] = {}


class Messages:
    """Reads the packets of one channel.

    Args:
        memory: The guest's.

    Attributes:
        send_buffer: None, as long as there is none.
        memo: What lists of per-packet information mean, as far as they were seen.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.send_buffer: SendBuffer | None = None
        self.memo: dict[bytes, dict[int, int]] = {}
        self._memory = memory

    def pieces_untrusted(self, packet: Packet, section: int, length: int) -> list[Buffer]:
        """Return the bytes of a packet's messages: private ones, then guest pages. Cannot block.

        Args:
            packet: SEND_RNDIS_PACKET.
            section: Of the send buffer, or NO_SECTION.
            length: Bytes in it.

        Returns:
            One private piece, if there are no more than :data:`COPIED` bytes.

        Raises:
            GuestProtocolError: Section, length or pages are not there.
        """
        pieces: list[Buffer] = []
        if section != NO_SECTION:
            buffer = self.send_buffer
            if buffer is None or buffer.gone:
                raise GuestProtocolError(
                    f"section {section} of a send buffer that there is not",
                    field="send_buf_section_index",
                )
            if section >= buffer.count or length > buffer.part_size:
                raise GuestProtocolError(
                    f"{length} bytes in section {section}; there are {buffer.count} of "
                    f"{buffer.part_size} bytes",
                    field="send_buf_section_size",
                )
            pieces.append(buffer.read_untrusted(section, length))
            if packet.kind != GPA_DIRECT:
                return pieces
        elif packet.kind != GPA_DIRECT:
            raise GuestProtocolError("neither a section nor pages", field="type")
        views = self._pages_untrusted(packet)
        if total_length(views) <= COPIED:
            return [b"".join((*pieces, *views))]
        return pieces + views

    def _pages_untrusted(self, packet: Packet) -> list[memoryview]:
        found = self._single_pages_untrusted(packet.data, packet.payload_offset)
        if found is not None:
            return found
        ranges = parse_gpa_ranges_untrusted(
            packet.data,
            packet.payload_offset,
            max_ranges=MAX_RANGES,
            allow_empty=True,
            at_most=MAX_MESSAGE + 1,
        )
        total = sum(each.byte_count for each in ranges)
        if total > MAX_MESSAGE:
            raise GuestProtocolError(
                f"a message of more than {MAX_MESSAGE} bytes", field="byte_count"
            )
        gather = self._memory.gather
        views: list[memoryview] = []
        for each in ranges:
            if each.byte_count:
                views += gather(each.byte_offset, each.byte_count, each.pfns)
        return views

    def _single_pages_untrusted(self, data: bytes, end: int) -> list[memoryview] | None:
        """Return what ranges of one page each hold: Linux sends such (netvsc_drv.c: fill_pg_buf).

        None, if there are others among them, or they hold too much.
        """
        count = end - RANGES_OFFSET >> 4
        if not 0 < count <= MAX_RANGES or end - RANGES_OFFSET != count << 4 or end > len(data):
            return None
        fields = _singles(count).unpack_from(data, RANGES_OFFSET - 4)
        if fields[0] != count:
            return None
        gather = self._memory.gather
        views: list[memoryview] = []
        pfns: list[int] = []
        first = length = total = 0
        for size, offset, pfn in zip(fields[1::3], fields[2::3], fields[3::3], strict=True):
            if not size or offset + size > PAGE_SIZE:
                return None
            if pfns and (offset or (first + length) % PAGE_SIZE):
                views += gather(first, length, pfns)
                pfns = []
            if not pfns:
                first, length = offset, 0
            pfns.append(pfn)
            length += size
            total += size
        if total > MAX_MESSAGE:
            return None
        return views + gather(first, length, pfns)

    def frames_untrusted(self, pieces: Sequence[Buffer]) -> list[Frame]:
        """Return the frames of a packet's messages. Cannot block.

        Raises:
            GuestProtocolError: A message is none, or there are too many. None of them is sent then.
        """
        if len(pieces) == 1:
            return self._frames_of_one_untrusted(bytes(pieces[0]))
        return self._frames_of_pieces_untrusted(pieces)

    def _frames_of_one_untrusted(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        position, end = 0, len(data)
        while True:
            if end - position < rndis.PACKET_HEADER_SIZE:
                raise GuestProtocolError(f"RNDIS PACKET of {end - position} bytes", field="msg_len")
            message = data[position:] if position else data
            kind, length = rndis.HEADER.unpack_from(message)
            if kind != rndis.PACKET or length > end - position:
                raise GuestProtocolError(
                    f"RNDIS message of type {kind:#x}, {length} bytes, where {end - position} are "
                    "left",
                    field="msg_len",
                )
            where = rndis.parse_frame_untrusted(message)
            start = where.data_offset
            items = self._items_untrusted(message, where) if where.info_length else _NOTHING
            frame = from_guest_untrusted(
                message[start : start + where.data_length], (), where.data_length, items
            )
            frames.append(frame)
            position += length
            if position + rndis.HEADER_SIZE > end or len(frames) == MAX_PACKETS:
                break
        if end - position >= rndis.HEADER_SIZE:
            raise GuestProtocolError(
                f"more than {MAX_PACKETS} frames in one packet", field="send_buf_section_size"
            )
        return frames

    def _frames_of_pieces_untrusted(self, pieces: Sequence[Buffer]) -> list[Frame]:
        """Messages of which the last one has its frame in guest pages; those before are whole."""
        cutter = Cutter([memoryview(piece) for piece in pieces])
        left = sum(map(len, pieces))
        frames: list[Frame] = []
        ahead = b""
        while True:
            size = min(left, _HEAD)
            head = ahead + b"".join(cutter.take(size - len(ahead)))
            if size < rndis.PACKET_HEADER_SIZE:
                raise GuestProtocolError(f"RNDIS PACKET of {size} bytes", field="msg_len")
            kind, length = rndis.HEADER.unpack_from(head)
            if kind != rndis.PACKET or not rndis.PACKET_HEADER_SIZE <= length <= left:
                raise GuestProtocolError(
                    f"RNDIS message of type {kind:#x}, {length} bytes, where {left} are left",
                    field="msg_len",
                )
            left -= length
            where = rndis.parse_frame_untrusted(head)
            message, ahead = head[:length], head[length:]
            rest = cutter.take(length - size) if length > size else []
            frames.append(self._frame_untrusted(message, where, rest))
            if left < rndis.HEADER_SIZE:
                return frames
            if len(frames) == MAX_PACKETS:
                raise GuestProtocolError(
                    f"more than {MAX_PACKETS} frames in one packet", field="send_buf_section_size"
                )

    def _frame_untrusted(
        self, message: bytes, where: rndis.Frame, rest: Sequence[memoryview]
    ) -> Frame:
        start, length = where.data_offset, where.data_length
        if start + min(length, HEADERS) > len(message):
            raise GuestProtocolError(f"RNDIS PACKET: a frame at byte {start}", field="data_offset")
        items = _NOTHING
        if where.info_length:
            if where.info_offset + where.info_length > len(message):
                raise GuestProtocolError(
                    f"RNDIS PACKET: information at byte {where.info_offset}",
                    field="per_pkt_info_offset",
                )
            items = self._items_untrusted(message, where)
        first = message[start : start + length]
        behind = Cutter(rest).take(length - len(first))
        return from_guest_untrusted(first, behind, length, items)

    def _items_untrusted(self, message: bytes, where: rndis.Frame) -> dict[int, int]:
        information = message[where.info_offset : where.info_offset + where.info_length]
        items = self.memo.get(information)
        if items is None:
            items = ppi.parse_items_untrusted(information)
            if len(information) <= _LONGEST_KNOWN:
                if len(self.memo) >= _MEMO:
                    self.memo.clear()
                self.memo[information] = items
        return items

    def large_frame_untrusted(self, pieces: Sequence[Buffer]) -> Frame | None:
        """Return the frame of a message in pieces, more than :data:`_HEAD` bytes together.

        None, if it is not one message from the first byte to the last, with all headers in front.

        Raises:
            GuestProtocolError: What it asks for cannot be done to such a frame.
        """
        need = _HEAD
        rest: list[Buffer] = []
        first: list[Buffer] = []
        for number, piece in enumerate(pieces, 1):
            if len(piece) > need:
                first.append(piece[:need])
                rest = [piece[need:], *pieces[number:]]
                break
            first.append(piece)
            need -= len(piece)
        head = b"".join(first)
        kind, size, at, length, info, info_length = whereabouts(head)
        if (
            kind != rndis.PACKET
            or size != len(head) + sum(map(len, rest))
            or not FIRST_OFFSET <= at <= _HEAD - HEADERS - 8
            or at + length + 8 != size
        ):
            return None
        items = _NOTHING
        if info_length:
            if info < FIRST_OFFSET or info + info_length + 8 > len(head):
                return None
            found = self.memo.get(head[info + 8 : info + 8 + info_length])
            if found is None:
                return None
            items = found
        return from_guest_untrusted(head[at + 8 :], rest, length, items)

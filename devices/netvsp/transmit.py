"""From the guest to the network: RNDIS messages out of packets, and frames out of messages.

A packet names a section of the send buffer, or lists guest pages, or both: Linux copies an RNDIS
header into a section and leaves the frame in its pages (netvsc_send, ``cp_partial``). What is there
is one message, or several behind each other. All frames of a batch go to the endpoint in one call.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import trio

from netvsp.buffers import SendBuffer
from netvsp.control import MAX_PACKETS
from netvsp.endpoint import Endpoint, Offloads
from netvsp.frames.frame import (
    ETHERNET_HEADER,
    ETHERTYPE_VLAN,
    GSO_ECN,
    GSO_UDP,
    HEADERS,
    MAX_FRAME,
    Buffer,
    Frame,
    hides_tag,
)
from netvsp.frames.offload import fill_checksum, from_guest_untrusted, segments
from netvsp.link import AdapterConfig, Link
from netvsp.statistics import Direction
from netvsp.wire import ppi, rndis
from netvsp.wire.nvsp import (
    NO_SECTION,
    RNDIS_PACKET_COMPLETE,
    SEND_RNDIS_PACKET_COMPLETE,
    SUCCESS,
)
from vmbus.errors import GuestProtocolError
from vmbus.host.channel import MAX_RANGES, Channel
from vmbus.host.undertakings import Undertaking
from vmbus.memory import Cutter, total_length
from vmbus.ring import Packet, completion
from vmbus.wire.packets import GPA_DIRECT, parse_gpa_ranges_untrusted

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

TURN = 2 << 20
"""What a channel may do before others have their turn, in bytes that are copied; as in storvsp."""
COST = 16 << 10
"""Of a packet, beside its bytes."""
PIECE_COST = 512
"""Of each piece of guest memory."""
SEGMENT_COST = 16 << 10
"""Of each frame that a segment is cut into."""
WAITING_WEIGHT = 2048
"""Bytes of host memory of a packet that waits, beside its frames."""
FRAME_WEIGHT = 1024
"""The same of each frame, beside its bytes, and what it costs to look at it again and again."""
TURN_FRAMES = 256
"""Frames that a task sends before others have their turn, and the rest of a packet."""

_SUCCESS = RNDIS_PACKET_COMPLETE.pack(SEND_RNDIS_PACKET_COMPLETE, SUCCESS)

_NOTHING: dict[int, int] = {}


class Sender:
    """Sends what one channel's guest sends.

    Args:
        channel: Where packets come from and completions go.
        queue: The endpoint's queue for it.
        endpoint: Where frames go.
        config: What the adapter agrees to.
        link: Whose address frames have to bear.
        statistics: Counters.
    """

    def __init__(
        self,
        channel: Channel,
        queue: int,
        endpoint: Endpoint,
        *,
        config: AdapterConfig,
        link: Link,
        statistics: Direction,
    ) -> None:
        self.channel = channel
        self.send_buffer: SendBuffer | None = None
        self.max_frame = link.max_frame
        self._queue = queue
        self._endpoint = endpoint
        self._config = config
        self._link = link
        self._statistics = statistics
        self._offloads = endpoint.info.offloads
        self._memo: dict[bytes, dict[int, int]] = {}
        self._waiting: collections.deque[tuple[Packet, list[Frame], Undertaking]] = (
            collections.deque()
        )
        self._sending = False

    # -- messages --------------------------------------------------------------------------------

    def message_untrusted(self, packet: Packet, section: int, length: int) -> list[Buffer]:
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
        gather = self.channel.memory.gather
        views: list[memoryview] = []
        for each in ranges:
            if each.byte_count:
                views += gather(each.byte_offset, each.byte_count, each.pfns)
        return views

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
        items = self._memo.get(information)
        if items is None:
            items = ppi.parse_items_untrusted(information)
            if len(information) <= _LONGEST_KNOWN:
                if len(self._memo) >= _MEMO:
                    self._memo.clear()
                self._memo[information] = items
        return items

    def cost(self, frames: Sequence[Frame], pieces: int) -> int:
        """Return what it takes to send frames; see :data:`TURN`. Cannot block."""
        total = PIECE_COST * pieces
        for frame in frames:
            total += len(frame)
            offload = frame.offload
            if offload is not None and offload.gso_type and not self._offloads.tcp_segments:
                total += SEGMENT_COST * -(-len(frame) // offload.gso_size)
        return total

    # -- sending ---------------------------------------------------------------------------------

    def send(self, batch: list[tuple[Packet, list[Frame]]], nursery: trio.Nursery) -> None:
        """Send the frames of packets and answer these. Cannot block.

        What the endpoint does not take now is kept, and answered when it has been taken: the
        guest's ring fills up meanwhile.
        """
        statistics = self._statistics
        complete = self.channel.complete_packet
        if self._sending:
            for packet, frames in batch:
                self._keep(packet, self._prepared(frames))
            return
        prepared: list[Frame] = []
        ends: list[int] = []
        for _packet, frames in batch:
            prepared += self._prepared(frames)
            ends.append(len(prepared))
        taken = self._endpoint.transmit(self._queue, prepared) if prepared else 0
        for frame in prepared[:taken]:
            statistics.count(frame.head, len(frame))
        start = 0
        for (packet, _frames), end in zip(batch, ends, strict=True):
            if end <= taken:
                if packet.flags & 1:
                    complete(completion(packet.transaction_id, _SUCCESS))
            else:
                self._keep(packet, prepared[max(start, taken) : end])
            start = end
        if self._waiting and not self._sending:
            self._sending = True
            nursery.start_soon(self._send_later)

    def _prepared(self, frames: list[Frame]) -> list[Frame]:
        """Drop what may not go out, and do what the endpoint cannot."""
        config, statistics, offloads = self._config, self._statistics, self._offloads
        mac = self._link.mac
        longest = self.max_frame
        found: list[Frame] = []
        for given in frames:
            frame = given
            head = frame.head
            if head[6:12] != mac and not config.allow_spoofing:
                statistics.dropped["short" if len(head) < ETHERNET_HEADER else "spoofed"] += 1
                continue
            if len(head) < ETHERNET_HEADER:
                statistics.dropped["short"] += 1
                continue
            offload = frame.offload
            segment = offload is not None and offload.gso_type
            length = len(frame)
            if offload is not None and segment:
                length = offload.header_length + offload.gso_size
            if length > longest and length > longest + 4 * (head[12:14] == ETHERTYPE_VLAN):
                statistics.dropped["too long"] += 1
                continue
            if not self._link.up:
                statistics.dropped["link down"] += 1
                continue
            if config.vlan is not None or config.trunk is not None:
                tagged = self._by_vlan(frame)
                if tagged is None:
                    statistics.dropped["vlan"] += 1
                    continue
                frame = tagged
            inside = frame.tci is not None and not offloads.vlan
            if offload is None:
                found.append(frame.tagged() if inside else frame)
                continue
            if segment:
                statistics.segments += 1
            else:
                statistics.checksums += 1
            # Cut first: with its tag inside, a segment with another one is no IP for who cuts it.
            pieces = _done(frame, offloads)
            found += [piece.tagged() for piece in pieces] if inside else pieces
        return found

    def _by_vlan(self, frame: Frame) -> Frame | None:
        """Return a frame in its VLAN; None if the guest may not send there."""
        frame = frame.untagged()
        config = self._config
        if hides_tag(frame):
            return None
        if config.vlan is not None:
            if (frame.tci or 0) & 0xFFF or frame.head[12:14] == ETHERTYPE_VLAN:
                return None
            priority = (frame.tci or 0) & 0xF000
            return Frame(frame.head, frame.rest, frame.offload, priority | config.vlan, frame.flow)
        if config.trunk is not None and (frame.tci or 0) & 0xFFF not in config.trunk:
            return None
        return frame

    # -- waiting ---------------------------------------------------------------------------------

    def _keep(self, packet: Packet, frames: list[Frame]) -> None:
        own = [frame.own() for frame in frames]
        weight = WAITING_WEIGHT + sum([FRAME_WEIGHT + len(frame) for frame in own])
        undertaking = self.channel.undertakings.begin(weight, lambda: "frames to be sent")
        self._waiting.append((packet, own, undertaking))

    async def _wait_writable(self) -> None:
        """Wait until the endpoint may take more, or the link is down. Is a checkpoint."""
        with trio.CancelScope() as scope, self._link.ends(scope):
            await self._endpoint.wait_writable(self._queue)

    def _give_up(self) -> None:
        """Drop what the endpoint has not taken, for the link is down. Cannot block."""
        for packet, frames, undertaking in self._waiting:
            self._statistics.dropped["link down"] += len(frames)
            undertaking.end()
            if packet.flags & 1:
                self.channel.complete(packet.transaction_id, _SUCCESS)
        self._waiting.clear()

    async def _send_later(self) -> None:
        channel = self.channel
        try:
            while self._waiting and not channel.ended:
                # An endpoint that never takes any more must not keep the channel from its end.
                await self._waiting[0][2].rest(self._wait_writable)
                if not self._link.up:
                    self._give_up()
                budget = TURN_FRAMES
                while budget > 0 and self._waiting and not channel.ended:
                    packet, frames, undertaking = self._waiting[0]
                    taken = self._endpoint.transmit(self._queue, frames)
                    budget -= max(taken, 1)
                    for frame in frames[:taken]:
                        self._statistics.count(frame.head, len(frame))
                    if taken < len(frames):
                        del frames[:taken]
                        break
                    self._waiting.popleft()
                    undertaking.end()
                    if packet.flags & 1:
                        channel.complete(packet.transaction_id, _SUCCESS)
                await channel.flush()
        except trio.EndOfChannel:
            pass
        finally:
            self._sending = False
            for _packet, _frames, undertaking in self._waiting:
                undertaking.end()
            self._waiting.clear()


def _done(frame: Frame, offloads: Offloads) -> list[Frame]:
    """Do for a frame what the endpoint cannot."""
    offload = frame.offload
    assert offload is not None
    if offload.gso_type:
        udp = offload.gso_type & ~GSO_ECN == GSO_UDP
        if offloads.udp_segments if udp else offloads.tcp_segments:
            return [frame]
        pieces = segments(frame)
    else:
        pieces = [frame]
    if offloads.checksum or offloads.tcp_segments:
        return pieces
    return [fill_checksum(piece) for piece in pieces]

"""From the guest to the network: RNDIS messages out of packets, and frames out of messages.

All frames of a batch of packets go to the endpoint in one call.

Two ways lead from a packet to the endpoint, with the same result; a test proves that. What nearly
every packet of every driver is, one message that begins in a section or lies in pages, goes the
short way, :meth:`Sender.serve_batch_untrusted`. Anything else, and everything that turns out to be
wrong, goes the long way, by :class:`netvsp.messages.Messages` and :meth:`Sender.add`.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Mapping, Sequence

import trio

from netvsp.backlog import ANSWER, MAX_PIECES, SEGMENT_COST, TURN, Backlog, count_pieces, finished
from netvsp.endpoint import Endpoint
from netvsp.frames.frame import ETHERNET_HEADER, ETHERTYPE_VLAN, Buffer, Frame, hides_tag
from netvsp.frames.offload import from_guest_untrusted
from netvsp.link import AdapterConfig, Link
from netvsp.messages import FIRST_OFFSET, Messages, whereabouts
from netvsp.statistics import Direction
from netvsp.wire import rndis
from netvsp.wire.nvsp import CHANNEL_DATA, RNDIS_PACKET, SEND_RNDIS_PACKET
from vmbus.errors import GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.host.observer import MemoryUse
from vmbus.ring import Packet
from vmbus.wire.packets import COMPLETION, DESCRIPTOR_SIZE, GPA_DIRECT, IN_BAND

COST = 16 << 10
"""Of a packet, beside its bytes; in the unit of :data:`netvsp.backlog.TURN`."""
PIECE_COST = 512
"""Of each piece of guest memory."""

_ANSWER = struct.Struct("<QQ8s")
_ANSWER_DATA = ANSWER
_ANSWER_HEAD = COMPLETION | DESCRIPTOR_SIZE // 8 << 16 | (DESCRIPTOR_SIZE + len(ANSWER)) // 8 << 32
"""Type, offset and length, the latter two in units of 8 bytes; no flags."""
_answer = _ANSWER.pack
_NVSP_SIZE = RNDIS_PACKET.size
_nvsp_packet = RNDIS_PACKET.unpack_from

Otherwise = Callable[["Sender", Packet, trio.Nursery], int]
"""Acts on a packet that is not the common case, and returns what that costs. Cannot block."""


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
        self.messages = Messages(channel.memory)
        self.max_frame = link.max_frame
        self.ready = False
        """Whether the guest has come so far that its frames go out."""
        self._queue = queue
        self._endpoint = endpoint
        self._config = config
        self._link = link
        self._statistics = statistics
        self._offloads = endpoint.info.offloads
        self._backlog = Backlog(channel, queue, endpoint, link, statistics)
        # The batch under way: each packet ends at a number of frames.
        self._packets: list[Packet] = []
        self._frames: list[Frame] = []
        self._ends: list[int] = []

    # -- the short way ---------------------------------------------------------------------------

    def serve_batch_untrusted(
        self,
        packets: Sequence[Packet],
        nursery: trio.Nursery,
        otherwise: Otherwise,
        *,
        parts: int = 1,
    ) -> int:
        """Act on packets that came in together, as many as one turn is for. Cannot block.

        Args:
            packets: Private copies.
            nursery: For a task that sends what has to wait.
            otherwise: Gets each packet that is not the common case.
            parts: Into how many parts the work of a turn is divided, because other channels of the
                guest have as much to do.

        Returns:
            How many; the rest is to come again.
        """
        self._backlog.parts = parts
        budget = TURN // parts
        done = 0
        packets_done, frames, ends = self._packets, self._frames, self._ends
        memo, statistics = self.messages.memo, self._statistics
        segments = self._offloads.tcp_segments
        sums = simple = segments or self._offloads.checksum
        quick, sections, mac = self._state()
        longest = self.max_frame
        tells = self.channel.tells_memory
        for done, packet in enumerate(packets, 1):  # noqa: B007 - wanted behind the loop
            budget -= COST
            data = packet.data
            start = packet.payload_offset
            frame = message = found = None
            pieces = 1
            if quick and len(data) - start >= _NVSP_SIZE:
                kind, channel_type, section, length = _nvsp_packet(data, start)
                try:
                    if kind != SEND_RNDIS_PACKET or channel_type != CHANNEL_DATA:
                        pass
                    elif packet.kind == IN_BAND:
                        views = sections.get(section)
                        if views is not None and length <= len(views[0]):
                            message = bytes(views[0][:length])
                    elif packet.kind == GPA_DIRECT:
                        found = self.messages.pieces_untrusted(packet, section, length)
                        pieces = len(found)
                        if pieces == 1:
                            message = bytes(found[0])
                        else:
                            frame = self.messages.large_frame_untrusted(found)
                    if message is not None and len(message) >= rndis.PACKET_HEADER_SIZE:
                        kind, size, at, length, info, info_length = whereabouts(message)
                        if (
                            kind == rndis.PACKET
                            and size <= len(message) < size + rndis.HEADER_SIZE
                            and at >= FIRST_OFFSET
                            and at + length + 8 <= size
                        ):
                            # Offsets count from byte 8.
                            head = message[at + 8 : at + 8 + length]
                            if not info_length:
                                frame = Frame(head)
                            elif info >= FIRST_OFFSET and info + info_length + 8 <= size:
                                items = memo.get(message[info + 8 : info + 8 + info_length])
                                if items is not None:
                                    frame = from_guest_untrusted(head, (), length, items)
                except GuestProtocolError:
                    frame = None  # it will be found out again, and said
            if frame is None:
                budget -= otherwise(self, packet, nursery)
                if budget <= 0:
                    break
                quick, sections, mac = self._state()
                longest = self.max_frame
                continue
            if tells:
                self.channel.tell_memory(
                    packet.transaction_id, found or [message or b""], MemoryUse.READ
                )
            head, offload = frame.head, frame.offload
            size = needed = len(frame) if frame.rest else len(head)
            if offload is not None:
                if not offload.gso_type:
                    simple = sums
                else:
                    simple = segments
                    needed = offload.header_length + offload.gso_size
            if (
                (offload is None or simple)
                and frame.tci is None
                and ETHERNET_HEADER <= needed <= longest
                and head[6:12] == mac
            ):
                if offload is not None:
                    if offload.gso_type:
                        statistics.segments += 1
                    else:
                        statistics.checksums += 1
                budget -= PIECE_COST * pieces + size
                packets_done.append(packet)
                frames.append(frame)
                ends.append(len(frames))
            else:
                budget -= self.cost((frame,), pieces)
                self.add(packet, (frame,), nursery)
                quick = quick and not self._backlog.busy
            if budget <= 0:
                break
        self._flush(nursery)
        return done

    def _state(self) -> tuple[bool, Mapping[int, list[memoryview]], bytes]:
        """Return what the short way goes by; packets that do not take it may change that.

        Returns:
            Whether frames go out at once, the parts of the send buffer that have been used, and the
            address of frames that need no other look than at their length.
        """
        config, link, buffer = self._config, self._link, self.messages.send_buffer
        plain = link.up and config.vlan is None and config.trunk is None
        return (
            self.ready and not self._backlog.busy,
            {} if buffer is None else buffer.parts,
            link.mac if plain else b"",
        )

    def pieces_untrusted(self, packet: Packet, section: int, length: int) -> list[Buffer]:
        """As :meth:`netvsp.messages.Messages.pieces_untrusted`; who listens is told of them."""
        pieces = self.messages.pieces_untrusted(packet, section, length)
        if self.channel.tells_memory:
            self.channel.tell_memory(packet.transaction_id, pieces, MemoryUse.READ)
        return pieces

    def cost(self, frames: Sequence[Frame], pieces: int) -> int:
        """Return what it takes to send frames; see :data:`TURN`. Cannot block."""
        total = PIECE_COST * pieces
        for frame in frames:
            total += len(frame)
            if frame.offload is not None:
                made = count_pieces(frame.offload, len(frame), self._offloads)
                if made > 1:
                    total += SEGMENT_COST * made
        return total

    # -- sending ---------------------------------------------------------------------------------

    def add(self, packet: Packet, frames: Sequence[Frame], nursery: trio.Nursery) -> None:
        """Have the frames of a packet sent with the batch that is under way. Cannot block.

        Too many pieces for one turn wait, and everything behind them.
        """
        allowed = self._allowed(frames)
        backlog = self._backlog
        made = 0
        for frame in allowed:
            made += count_pieces(frame.offload, len(frame), self._offloads)
        if made > MAX_PIECES and not backlog.busy:
            self._flush(nursery)
            backlog.keep(packet, allowed, nursery)
        elif backlog.busy:
            backlog.keep(packet, allowed, nursery)
        else:
            self._packets.append(packet)
            self._frames += finished(allowed, self._offloads)
            self._ends.append(len(self._frames))

    def _flush(self, nursery: trio.Nursery) -> None:
        """Send the frames of the batch, and answer its packets.

        What the endpoint does not take now is kept, and answered when it has been taken: the
        guest's ring fills up meanwhile.
        """
        packets, frames, ends = self._packets, self._frames, self._ends
        if not packets:
            return
        taken = self._endpoint.transmit(self._queue, frames) if frames else 0
        self._statistics.count_all(frames if taken == len(frames) else frames[:taken])
        answered = len(packets) if taken == len(frames) else bisect.bisect_right(ends, taken)
        self.channel.complete_packets(
            [
                _answer(_ANSWER_HEAD, packet.transaction_id, _ANSWER_DATA)
                for packet in packets[:answered]
                if packet.flags & 1
            ]
        )
        start = taken
        for packet, end in zip(packets[answered:], ends[answered:], strict=True):
            self._backlog.keep(packet, frames[start:end], nursery)
            start = end
        packets.clear()
        frames.clear()
        ends.clear()

    def _allowed(self, frames: Sequence[Frame]) -> list[Frame]:
        """Drop what may not go out; the others get the tag that they need, beside the frame."""
        config, statistics = self._config, self._statistics
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
            if segment:
                statistics.segments += 1
            elif offload is not None:
                statistics.checksums += 1
            found.append(frame)
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

"""From the network to the guest: frames into the receive buffer, and packets that name them.

A frame is written behind an RNDIS header into a sub-allocation; a transfer-page packet lists up to
:data:`MAX_RANGES` of them, one frame each. They are the guest's until it completes the packet. Its
transaction id is the first sub-allocation's number: DPDK takes no other (hn_rxtx.c: it indexes an
array with it), and it is free again exactly when the packet has been completed.

A segment that is longer than a sub-allocation goes to a guest that has asked for receive segment
coalescing in several of them, marked first to last; to others it goes cut.

The channels of a guest have one buffer. Half of it is anybody's; of the other half each has a
share, so that one that gives nothing back leaves something to the others. Frames wait for a channel
that has no room, and those behind them as well, whosever they are; so if it does not move for
:data:`PATIENCE`, and there are others, its frames are dropped until it does.

Frames come in tasks of an endpoint's, perhaps in that of another guest's adapter. So nothing that
this guest does to its rings is found out there: what cannot be written at once, for want of room or
because the partition stands still, is left to a task of its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import trio

from netvsp.buffers import ReceiveBuffer
from netvsp.control import Control
from netvsp.frames.frame import (
    ETHERNET_HEADER,
    ETHERTYPE_VLAN,
    GSO_ECN,
    GSO_UDP,
    NEEDS_CHECKSUM,
    VLAN_TAG,
    Frame,
    Offload,
    hides_tag,
)
from netvsp.frames.offload import complete, fill_checksum, receive_value
from netvsp.link import AdapterConfig, Link
from netvsp.statistics import Direction
from netvsp.wire import nvsp, oids, ppi, rndis
from vmbus.errors import GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.wire.packets import (
    DESCRIPTOR,
    FLAG_COMPLETION_REQUESTED,
    RANGES_OFFSET,
    TRANSFER_PAGES,
    TRANSFER_PAGES_HEADER,
)

MAX_RANGES = 64
"""Frames of one packet. Linux takes 562, OpenVMM sends 375; a packet is 16 + 8 bytes a frame."""
CONTROL_PARTS = 16
"""Sub-allocations that frames leave to control messages."""
ROOM = 256
"""Bytes of a sub-allocation beside the frame: RNDIS header and per-packet information."""
LONGEST_CONTROL = 1024
"""Bytes that a sub-allocation has for control messages at least; a name takes 536."""
MAX_PENDING = 64
"""Packets in front of a full ring before frames wait."""
PATIENCE = 0.05
"""Seconds for which frames for other channels wait for one that stands still."""
MAX_CONTROL_QUEUE = 256
"""Control messages that wait for a sub-allocation; each answers a request of the guest's."""

_DATA = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA)
_CONTROL = nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL)
_RANGE = struct.Struct("<II")

Ranges = list[tuple[int, int]]
"""Length and offset in the receive buffer of each part of a frame, in bytes."""


def part_size(max_frame: int) -> int:
    """Return how long a sub-allocation has to be for such frames, in bytes. Cannot block.

    However short they are, what the guest asks for goes there as well.

    A power of two up to a page: then none of them is in two pages, whatever the guest's are.
    """
    need = max(max_frame + VLAN_TAG + ROOM, LONGEST_CONTROL)
    if need <= 4096:
        return 1 << (need - 1).bit_length()
    return (need + 4095) & ~4095


class Receiver:
    """Hands frames to a guest, for one life of the adapter.

    Args:
        control: What the guest has set.
        config: What the adapter agrees to.
        link: Its link.
        statistics: Counters.
        flush_later: Has :meth:`go_on` called by a task when a channel has room; cannot block.
    """

    def __init__(
        self,
        control: Control,
        config: AdapterConfig,
        link: Link,
        statistics: Direction,
        flush_later: Callable[[Channel], None],
    ) -> None:
        self.buffer: ReceiveBuffer | None = None
        self.buffer_id = nvsp.RECEIVE_BUFFER_ID
        """What the driver calls it; OpenBSD and UEFI have numbers of their own."""
        self.channels: dict[int, Channel] = {}
        """Open ones by number; 0 is the primary."""
        self.tags_beside = False
        """Whether the guest takes VLAN tags as per-packet information."""
        self._control = control
        self._config = config
        self._link = link
        self._statistics = statistics
        self._flush_later = flush_later
        self._outstanding: dict[int, tuple[Channel, list[int]]] = {}
        self._held: dict[Channel, int] = {}
        """Sub-allocations that are out, by channel."""
        self._still: dict[Channel, float] = {}
        """Channels that have had no room, and since when."""
        self._control_queue: list[bytes] = []
        self._segment = 0
        self._room = trio.Event()

    # -- frames ----------------------------------------------------------------------------------

    def receive(self, frames: Sequence[Frame]) -> int:
        """Hand frames to the guest; see :meth:`netvsp.endpoint.Port.receive`. Cannot block."""
        buffer = self.buffer
        statistics = self._statistics
        if buffer is None or buffer.gone or not self._control.filter or 0 not in self.channels:
            statistics.dropped["not ready"] += len(frames)
            return len(frames)
        groups: dict[Channel, list[Ranges]] = {}
        done = 0
        free = buffer.free
        room = buffer.part_size - ROOM
        primary = self.channels[0]
        if primary.undertakings.held:
            self._still.clear()
            self._wait_for(primary)
            return 0
        reserve = (buffer.count - CONTROL_PARTS) // 2 if len(self.channels) > 1 else 0
        try:
            for frame in frames:
                wanted = self._wanted(frame)
                if wanted is None:
                    done += 1
                    continue
                number, hashed = self._channel_of(wanted)
                channel = self.channels.get(number, primary)
                if channel.pending > MAX_PENDING:
                    if self._gives_up(channel):
                        done += 1
                        continue
                    self._wait_for(channel)
                    break
                if wanted.offload is None and len(wanted) <= room:
                    pieces, need = [wanted], 1
                else:
                    pieces = self._fitting(wanted, room)
                    need = sum(-(-len(piece) // room) for piece in pieces)
                if not pieces or need > buffer.count - CONTROL_PARTS:
                    statistics.dropped["too long"] += 1
                    done += 1
                    continue
                left = len(free) - CONTROL_PARTS - need
                if left < reserve and not self._may_have(channel, need, left, reserve):
                    if self._gives_up(channel):
                        done += 1
                        continue
                    self._wait_for(None)
                    break
                if wanted.offload is not None:
                    self._count_offload(wanted.offload)
                stored = groups.setdefault(channel, [])
                for piece in pieces:
                    stored.append(self._store(buffer, piece, hashed))
                    self._held[channel] = self._held.get(channel, 0) + len(stored[-1])
                    statistics.count(piece.head, len(piece))
                done += 1
        except GuestProtocolError:
            # Its pages are no memory any more: there is no way to reach this guest.
            statistics.dropped["no memory"] += len(frames) - done
            done = len(frames)
        for channel, stored in groups.items():
            self._send(channel, stored, _DATA)
        return done

    def _may_have(self, channel: Channel, need: int, left: int, reserve: int) -> bool:
        """Whether a channel may have sub-allocations of those that are kept for others, too."""
        if left < 0:
            return False
        held = self._held.get(channel, 0)
        return not held or held + need <= reserve // len(self.channels)

    def _gives_up(self, channel: Channel) -> bool:
        """Whether a frame is dropped since its channel stands still, and others are to go on."""
        if len(self.channels) < 2:
            return False
        now = trio.current_time()
        if now - self._still.setdefault(channel, now) < PATIENCE:
            return False
        self._statistics.dropped["no buffer"] += 1
        return True

    def _wait_for(self, channel: Channel | None) -> None:
        """Have who waits wait for room in the ring of a channel; None: in the buffer."""
        if self._room.is_set():
            self._room = trio.Event()
        if channel is not None:
            self._flush_later(channel)

    async def wait_room(self) -> None:
        """See :meth:`netvsp.endpoint.Port.wait_room`. Is a checkpoint."""
        with trio.move_on_after(PATIENCE if self._still else math.inf):
            await self._room.wait()

    def _wanted(self, frame: Frame) -> Frame | None:
        """Return the frame as the guest sees it, or None if it does not want it."""
        statistics, config = self._statistics, self._config
        head = frame.head
        if len(head) < ETHERNET_HEADER:
            statistics.dropped["short"] += 1
            return None
        wants = self._control.filter
        if not wants & oids.FILTER_PROMISCUOUS:
            if head[0] & 1:
                kind = (
                    oids.FILTER_BROADCAST
                    if head[:6] == b"\xff" * 6
                    else oids.FILTER_MULTICAST | oids.FILTER_ALL_MULTICAST
                )
                if not wants & kind:
                    statistics.dropped["filtered"] += 1
                    return None
            elif head[:6] != self._link.mac or not wants & oids.FILTER_DIRECTED:
                statistics.dropped["filtered"] += 1
                return None
        if not self._link.up:
            statistics.dropped["link down"] += 1
            return None
        if config.vlan is not None or config.trunk is not None:
            frame = frame.untagged()
            number = (frame.tci or 0) & 0xFFF
            if config.vlan is not None:
                # In its one VLAN it sees no tags, so there is none behind that.
                if number != config.vlan or frame.head[12:14] == ETHERTYPE_VLAN:
                    statistics.dropped["vlan"] += 1
                    return None
                return Frame(frame.head, frame.rest, frame.offload, None, frame.flow)
            if config.trunk is not None and (number not in config.trunk or hides_tag(frame)):
                statistics.dropped["vlan"] += 1
                return None
        return frame.untagged() if self.tags_beside else frame.tagged()

    def _channel_of(self, frame: Frame) -> tuple[int, int | None]:
        """Return the number of a frame's channel, and its hash if there is one."""
        scaling = self._control.scaling
        if scaling is None:
            return 0, None
        hashed = scaling.hash(frame.head)
        return (0, None) if hashed is None else (scaling.channel(hashed), hashed)

    def _fitting(self, frame: Frame, room: int) -> list[Frame]:
        """Return a frame as the guest can take it: as it is, with its sum, or cut.

        Nothing, if it is too long for a sub-allocation and no segment that may be in several.
        """
        offload = frame.offload
        if offload is not None and offload.gso_type:
            if self._control.rsc and offload.gso_type & ~GSO_ECN != GSO_UDP:
                return [_summed(frame)]
            pieces = complete(frame)
        else:
            pieces = [fill_checksum(frame)]
        return pieces if all(len(piece) <= room for piece in pieces) else []

    def _count_offload(self, offload: Offload) -> None:
        if offload.gso_type:
            self._statistics.segments += 1
        elif offload.flags & NEEDS_CHECKSUM:
            self._statistics.checksums += 1

    def _store(self, buffer: ReceiveBuffer, frame: Frame, hashed: int | None) -> Ranges:
        """Write one frame into the buffer; return where it is, in one range or several."""
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
            return [_put(buffer, rndis.build_packet_header(length, information) + whole)]
        self._segment = (self._segment + 1) & 0xFFFF
        ranges = []
        for start in range(0, length, room):
            flags = ppi.FRAGMENT_SUB_ALLOCATION
            if not start:
                flags |= ppi.FRAGMENT_FIRST
            if start + room >= length:
                flags |= ppi.FRAGMENT_LAST
            part = whole[start : start + room]
            marked = information + ppi.build_packet_id(flags, self._segment)
            try:
                ranges.append(_put(buffer, rndis.build_packet_header(len(part), marked) + part))
            except GuestProtocolError:
                buffer.free += [offset // buffer.part_size for _length, offset in ranges]
                raise
        return ranges

    def _send(self, channel: Channel, stored: list[Ranges], message: bytes) -> None:
        """Queue packets that name what has been stored, and write them if there is room."""
        assert self.buffer is not None
        size = self.buffer.part_size
        some: Ranges = []
        for number, ranges in enumerate(stored, 1):
            # All parts of a segment are in one packet: Linux drops it otherwise.
            some += ranges
            if number < len(stored) and len(some) + len(stored[number]) <= MAX_RANGES:
                continue
            indexes = [offset // size for _length, offset in some]
            channel.send_packet(_packet(self.buffer_id, some, indexes[0], message))
            self._outstanding[indexes[0]] = channel, indexes
            some = []
        try:
            written = channel.try_flush()
        except GuestProtocolError:
            written = False  # the ring is corrupt; whose frame this is has nothing to do with it
        if not written:
            self._flush_later(channel)

    def go_on(self, channel: Channel) -> None:
        """There may be room again, in the ring of a channel or in the buffer. Cannot block."""
        self._still.pop(channel, None)
        self._send_controls()
        self._room.set()

    def lose(self, channel: Channel) -> None:
        """A channel takes no frames any more. Cannot block."""
        index = channel.subchannel_index
        if self.channels.get(index) is channel:
            del self.channels[index]
        self.forget(channel)

    # -- control messages ------------------------------------------------------------------------

    def check_control(self) -> None:
        """Raise GuestProtocolError if there is no place for another control message."""
        if len(self._control_queue) >= MAX_CONTROL_QUEUE:
            raise GuestProtocolError("too many RNDIS replies that the guest does not take")

    def send_control(self, message: bytes) -> None:
        """Send an RNDIS message to the guest on the primary channel. Cannot block.

        Args:
            message: :meth:`check_control` has said that there is a place for it.
        """
        self._control_queue.append(message)
        self._send_controls()

    def _send_controls(self) -> None:
        buffer = self.buffer
        primary = self.channels.get(0)
        if primary is not None and self._control_queue and primary.undertakings.held:
            self._flush_later(primary)
            return
        while self._control_queue and primary is not None and buffer and buffer.free:
            if buffer.gone:
                break
            try:
                stored = [[_put(buffer, self._control_queue[0])]]
            except GuestProtocolError:
                break  # its pages are no memory any more
            del self._control_queue[0]
            self._held[primary] = self._held.get(primary, 0) + 1
            self._send(primary, stored, _CONTROL)

    # -- completions -----------------------------------------------------------------------------

    def completed_untrusted(self, channel: Channel, transaction_id: int) -> None:
        """The guest gives back what a packet named. Cannot block.

        Raises:
            GuestProtocolError: There is no such packet on this channel.
        """
        found = self._outstanding.get(transaction_id)
        if found is None or found[0] is not channel:
            raise GuestProtocolError(
                f"completion of {transaction_id:#x}, which is not outstanding here",
                field="transaction_id",
            )
        del self._outstanding[transaction_id]
        self._held[channel] -= len(found[1])
        if self.buffer is not None:
            self.buffer.free += found[1]
        self.go_on(channel)

    def forget(self, channel: Channel | None = None) -> None:
        """Take back what is out on a channel that is over; None: everything. Cannot block."""
        if channel is None:
            self._control_queue.clear()
            self._held.clear()
            self._still.clear()
        else:
            self._held.pop(channel, None)
            self._still.pop(channel, None)
        for number, (where, indexes) in tuple(self._outstanding.items()):
            if channel is None or where is channel:
                del self._outstanding[number]
                if self.buffer is not None:
                    self.buffer.free += indexes
        self._room.set()

    @property
    def outstanding(self) -> int:
        """Packets that the guest has not completed."""
        return len(self._outstanding)


def _put(buffer: ReceiveBuffer, data: bytes) -> tuple[int, int]:
    """Write a message into a free sub-allocation; return its length and where it is."""
    index = buffer.free[-1]
    buffer.write(index, data)
    buffer.free.pop()
    return len(data), index * buffer.part_size


def _summed(frame: Frame) -> Frame:
    """Return a whole segment with its sum: who takes it as one may look at it."""
    offload = frame.offload
    assert offload is not None
    if not offload.flags & NEEDS_CHECKSUM:
        return frame
    plain = Frame(frame.head, frame.rest, offload._replace(gso_type=0), frame.tci, frame.flow)
    return fill_checksum(plain)


def _packet(buffer_id: int, ranges: Ranges, transaction_id: int, message: bytes) -> bytes:
    """Build a transfer-page packet."""
    count = len(ranges)
    offset = RANGES_OFFSET + 8 * count
    return b"".join(
        (
            DESCRIPTOR.pack(
                TRANSFER_PAGES,
                offset >> 3,
                offset + len(message) >> 3,
                FLAG_COMPLETION_REQUESTED,
                transaction_id,
            ),
            TRANSFER_PAGES_HEADER.pack(buffer_id, 0, 0, count),
            *[_RANGE.pack(*each) for each in ranges],
            message,
        )
    )

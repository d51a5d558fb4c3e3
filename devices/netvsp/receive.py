"""From the network to the guest: frames into the receive buffer, and packets that name them.

A frame is written behind an RNDIS header into a sub-allocation; a transfer-page packet lists up to
:data:`MAX_RANGES` of them, one frame each. They are the guest's until it completes the packet. Its
transaction id is the first sub-allocation's number: DPDK takes no other (hn_rxtx.c: it indexes an
array with it), and it is free again exactly when the packet has been completed.

A segment that is longer than a sub-allocation goes to a guest that has asked for receive segment
coalescing in several of them, marked first to last; to others it goes cut.

Frames come in tasks of an endpoint's, perhaps in another guest's adapter. So nothing that a guest
does to its rings is found out there: what cannot be written at once is left to a task of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import trio

from netvsp.backlog import MAX_PIECES, SEGMENT_COST, TURN
from netvsp.buffers import ReceiveBuffer
from netvsp.control import Control
from netvsp.frames.frame import (
    ETHERNET_HEADER,
    ETHERTYPE_VLAN,
    GSO_ECN,
    GSO_UDP,
    NEEDS_CHECKSUM,
    Frame,
    Offload,
)
from netvsp.frames.offload import complete, cut
from netvsp.link import AdapterConfig, Link
from netvsp.placing import ROOM, Headers, build_packet, put, store
from netvsp.shares import Shares
from netvsp.statistics import DIRECTED, Direction
from netvsp.view import guests_view
from netvsp.wire import nvsp, oids
from vmbus.errors import GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.host.observer import MemoryUse

MAX_RANGES = 64
"""Frames of one packet. Linux takes 562, OpenVMM sends 375; a packet is 16 + 8 bytes a frame."""
CONTROL_PARTS = 16
"""Sub-allocations that frames leave to control messages."""
MAX_PENDING = 64
"""Packets in front of a full ring before frames wait."""
MAX_CONTROL_QUEUE = 256
"""Control messages that wait for a sub-allocation; each answers a request of the guest's."""
COST = 8 << 10
"""Of a frame, beside its bytes; in the unit of :data:`netvsp.backlog.TURN`."""

_DATA = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA)
_CONTROL = nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL)

Groups = dict[Channel, list[list[int]]]
"""By channel: length and offset of all parts that each packet is to name."""


@dataclasses.dataclass(slots=True, eq=False)
class _Cutting:
    """A segment that is too much for one turn."""

    pieces: Iterator[Frame]
    hashed: int | None


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
        self._control_queue: list[bytes] = []
        self._segment = 0
        self._room = trio.Event()
        self._headers = Headers()
        self._targets: list[Channel] = []
        """The channel of each entry of the indirection table; empty: all is for the primary."""
        self._cutting: _Cutting | None = None
        self._shares = Shares(statistics)

    # -- channels --------------------------------------------------------------------------------

    def sort(self) -> None:
        """Find out again where frames go: channels or settings have changed. Cannot block.

        A table may name channels that the guest has not been granted, or has not opened: Linux
        makes it for as many as it asks for (rndis_filter_device_add). Their flows are shared out
        among those that are open.
        """
        scaling, channels = self._control.scaling, self.channels
        parts = 0 if self.buffer is None else self.buffer.count - CONTROL_PARTS
        self._shares.resize(len(channels), parts)
        self._targets = []
        if scaling is None or not channels:
            return
        opened = [channels[number] for number in sorted(channels)]
        missing = 0
        for number in scaling.table:
            found = channels.get(number)
            if found is None:
                found = opened[missing % len(opened)]
                missing += 1
            self._targets.append(found)

    def open(self, channel: Channel) -> None:
        """A channel takes frames from now on. Cannot block."""
        self.channels[channel.subchannel_index] = channel
        self.sort()

    def lose(self, channel: Channel) -> None:
        """A channel takes no frames any more. Cannot block."""
        index = channel.subchannel_index
        if self.channels.get(index) is channel:
            del self.channels[index]
        self.sort()
        self.forget(channel)

    # -- frames ----------------------------------------------------------------------------------

    def receive(self, frames: Sequence[Frame]) -> int:
        """Hand frames to the guest; see :meth:`netvsp.endpoint.Port.receive`. Cannot block.

        Two ways lead from a frame to the buffer, with the same result; a test proves that. A frame
        to the guest's own address about which there is nothing to say goes the short way.
        """
        buffer = self.buffer
        statistics = self._statistics
        if buffer is None or buffer.gone or not self._control.filter or 0 not in self.channels:
            statistics.dropped["not ready"] += len(frames)
            return len(frames)
        primary = self.channels[0]
        if primary.undertakings.held:
            self._shares.stop()
            self._wait_for(primary)
            return 0
        if self._cutting is not None and not self._gives_cutting_up(buffer):
            self._wait_for(None)
            return 0
        groups: Groups = {}
        done = directed = size = 0
        budget = TURN
        free = buffer.free
        shares = self._shares
        low = CONTROL_PARTS + shares.reserve
        room = buffer.part_size - ROOM
        mac = self._plain_address()
        targets, scaling = self._targets, self._control.scaling
        headers = self._headers
        try:
            for frame in frames:
                if budget <= 0:
                    self._room.set()  # others have their turn, and then there is more
                    break
                head = frame.head
                length = len(head) if not frame.rest else len(frame)
                if (
                    head[:6] != mac
                    or frame.offload is not None
                    or frame.tci is not None
                    or not ETHERNET_HEADER <= length <= room
                    or head[12:14] == ETHERTYPE_VLAN
                ):
                    cost = self._receive_one(buffer, frame, groups)
                    if not cost:
                        break
                    budget -= cost
                    done += 1
                    if self._cutting is not None:
                        break
                    continue
                hashed = scaling.hash(head) if scaling is not None else None
                channel = primary if hashed is None else targets[hashed % len(targets)]
                group = groups.get(channel) or self._group(groups, channel)
                if group is None or (
                    len(free) <= low
                    and not shares.may_have(channel, 1, len(free) - CONTROL_PARTS - 1, group)
                ):
                    if not shares.gives_up(channel):
                        self._wait_for(channel if group is None else None)
                        break
                    done += 1
                    budget -= COST
                    continue
                header = headers.plain(length) if hashed is None else headers.hashed(length, hashed)
                data = header + (frame.tobytes() if frame.rest else head)
                where = put(buffer, data)
                ranges = group[-1]
                if len(ranges) >= 2 * MAX_RANGES:
                    ranges = []
                    group.append(ranges)
                ranges += where
                directed += 1
                size += length
                done += 1
                budget -= COST + length
        except GuestProtocolError:
            # Its pages are no memory any more: there is no way to reach this guest.
            statistics.dropped["no memory"] += len(frames) - done
            done = len(frames)
        statistics.frames[DIRECTED] += directed
        statistics.bytes[DIRECTED] += size
        for channel, group in groups.items():
            self._send(channel, group, _DATA)
        if self._cutting is not None:
            self._wait_for(primary)
        return done

    def _plain_address(self) -> bytes:
        """Return the address of frames that need no other look; b"none" if all of them do."""
        config, link, wants = self._config, self._link, self._control.filter
        directed = wants & (oids.FILTER_DIRECTED | oids.FILTER_PROMISCUOUS)
        plain = link.up and config.vlan is None and config.trunk is None
        return link.mac if directed and plain else b"none"

    def _group(self, groups: Groups, channel: Channel) -> list[list[int]] | None:
        """Return what is to go on a channel; None if it has too much to do."""
        found = groups.get(channel)
        if found is None:
            if channel.pending > MAX_PENDING:
                return None
            found = groups[channel] = [[]]
        return found

    def _target(self, hashed: int | None) -> Channel:
        if hashed is None or not (targets := self._targets):
            return self.channels[0]
        return targets[hashed % len(targets)]

    def _receive_one(self, buffer: ReceiveBuffer, frame: Frame, groups: Groups) -> int:
        """Store any frame, or drop it. Returns what that costs; 0: there is no room for it now.

        Raises:
            GuestProtocolError: The buffer is no memory any more.
        """
        statistics, scaling = self._statistics, self._control.scaling
        wanted = guests_view(
            frame, self._control.filter, self._link, self._config, statistics,
            tags_beside=self.tags_beside,
        )  # fmt: skip
        if wanted is None:
            return COST
        hashed = scaling.hash(wanted.head) if scaling is not None else None
        channel = self._target(hashed)
        group = self._group(groups, channel)
        if group is None:
            if self._shares.gives_up(channel):
                return COST
            self._wait_for(channel)
            return 0
        room = buffer.part_size - ROOM
        offload = wanted.offload
        length = longest = len(wanted)
        need, whole = 1, True
        if offload is not None and offload.gso_type:
            whole = self._control.rsc and offload.gso_type & ~GSO_ECN != GSO_UDP
            if whole:
                need, longest = -(-length // room), 0
            else:
                payload = max(length - offload.header_length, 1)
                each = min(offload.gso_size or payload, payload)
                need, longest = -(-payload // each), offload.header_length + each
        most = buffer.count - CONTROL_PARTS
        if longest > room or (whole and need > most):
            statistics.dropped["too long"] += 1
            return COST
        if not whole and need > min(MAX_PIECES, most):
            self._count_offload(offload)
            pieces = cut(wanted.own(), filled=True)
            self._cutting = _Cutting(pieces, hashed)
            return COST + length
        if not self._shares.may_have(channel, need, len(buffer.free) - CONTROL_PARTS - need, group):
            if self._shares.gives_up(channel):
                return COST
            self._wait_for(None)
            return 0
        self._count_offload(offload)
        # A driver that sends what it gets on elsewhere does not want segments coalesced. So the sum
        # of one is not made, which is most of the work: the guest is told that it is good.
        coalesced = whole and not longest
        made = [wanted] if coalesced else complete(wanted)
        self._store_all(buffer, made, hashed, group, whole=whole)
        return COST + 2 * length + (0 if whole else SEGMENT_COST * len(made))

    def _store_all(
        self,
        buffer: ReceiveBuffer,
        frames: Sequence[Frame],
        hashed: int | None,
        group: list[list[int]],
        *,
        whole: bool,
    ) -> None:
        """Store frames; all parts of one are in one packet: Linux drops it otherwise."""
        room = buffer.part_size - ROOM
        for frame in frames:
            if len(frame) > room:
                if not whole:  # nobody can cut it
                    self._statistics.dropped["too long"] += 1
                    continue
                self._segment = (self._segment + 1) & 0xFFFF
            found = store(buffer, frame, hashed, self._segment)
            if group[-1] and len(group[-1]) + len(found) > 2 * MAX_RANGES:
                group.append([])
            group[-1] += found
            self._statistics.count(frame)

    def _gives_cutting_up(self, buffer: ReceiveBuffer) -> bool:
        """Whether the rest of a segment is dropped since its channel stands still."""
        assert self._cutting is not None
        channel = self._target(self._cutting.hashed)
        stuck = channel.pending > MAX_PENDING or len(buffer.free) <= CONTROL_PARTS
        if not stuck or not self._shares.gives_up(channel):
            return False
        self._cutting = None
        return True

    def _cut_on(self) -> None:
        """Hand over more pieces of a segment, as many as one turn is for, and as there is room."""
        cutting, buffer, primary = self._cutting, self.buffer, self.channels.get(0)
        if cutting is None:
            return
        if buffer is None or buffer.gone or primary is None or not self._control.filter:
            self._cutting = None
            return
        channel = self._target(cutting.hashed)
        if primary.undertakings.held or channel.pending > MAX_PENDING:
            self._flush_later(primary if primary.undertakings.held else channel)
            return
        group: list[list[int]] = [[]]
        budget = TURN
        try:
            while budget > 0 and len(buffer.free) > CONTROL_PARTS:
                piece = next(cutting.pieces, None)
                if piece is None:
                    self._cutting = None
                    break
                budget -= SEGMENT_COST + len(piece)
                self._store_all(buffer, [piece], cutting.hashed, group, whole=False)
        except GuestProtocolError:
            self._statistics.dropped["no memory"] += 1
            self._cutting = None
        self._send(channel, group, _DATA)
        if self._cutting is not None and len(buffer.free) > CONTROL_PARTS:
            self._flush_later(channel)

    def _wait_for(self, channel: Channel | None) -> None:
        """Have who waits wait for room in the ring of a channel; None: in the buffer."""
        if self._room.is_set():
            self._room = trio.Event()
        if channel is not None:
            self._flush_later(channel)

    async def wait_room(self) -> None:
        """See :meth:`netvsp.endpoint.Port.wait_room`. Is a checkpoint."""
        with trio.move_on_after(self._shares.patience):
            await self._room.wait()

    def _count_offload(self, offload: Offload | None) -> None:
        if offload is not None and offload.gso_type:
            self._statistics.segments += 1
        elif offload is not None and offload.flags & NEEDS_CHECKSUM:
            self._statistics.checksums += 1

    def _send(self, channel: Channel, group: list[list[int]], message: bytes) -> None:
        """Queue packets that name what has been stored, and write them if there is room."""
        assert self.buffer is not None
        size = self.buffer.part_size
        for ranges in group:
            if ranges:
                indexes = [offset // size for offset in ranges[1::2]]
                if channel.tells_memory:
                    stored = self.buffer.stored(ranges)
                    channel.tell_memory(indexes[0], stored, MemoryUse.SENT)
                channel.send_packet(build_packet(self.buffer_id, ranges, indexes[0], message))
                self._outstanding[indexes[0]] = channel, indexes
                self._shares.took(channel, len(indexes))
        try:
            written = channel.try_flush()
        except GuestProtocolError:
            written = False  # the ring is corrupt; whose frame this is has nothing to do with it
        if not written:
            self._flush_later(channel)

    def go_on(self, channel: Channel) -> None:
        """There may be room again in the buffer: a channel gives some back. Cannot block."""
        self._shares.moves(channel)
        self._send_controls()
        if self._cutting is None:
            self._room.set()
        elif 0 in self.channels:
            self._flush_later(self._target(self._cutting.hashed))

    def flushed(self, channel: Channel) -> None:
        """There may be room again in a ring: go on, with no more than one turn is for."""
        self._shares.moves(channel)
        self._send_controls()
        self._cut_on()
        if self._cutting is None:
            self._room.set()

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
                stored = [[*put(buffer, self._control_queue[0])]]
            except GuestProtocolError:
                break  # its pages are no memory any more
            del self._control_queue[0]
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
        if self.buffer is not None:
            self.buffer.free += found[1]
        self._shares.gave(channel, len(found[1]))
        self.go_on(channel)

    def forget(self, channel: Channel | None = None) -> None:
        """Take back what is out on a channel that is over; None: everything. Cannot block."""
        if channel is None:
            self._control_queue.clear()
            self._cutting = None
        self._shares.forget(channel)
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

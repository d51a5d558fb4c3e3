"""Frames of a channel that wait: the endpoint has no room, or there is too much to do at once.

Sums and segments that the endpoint does not take are done here in software, as frames go out. A
guest may ask for a thousand pieces of one segment: they are made some in each turn of the loop.
What waits is in order, holds bytes of its own, and is answered when all of it has been taken.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence

import trio

from netvsp.endpoint import Endpoint, Offloads
from netvsp.frames.frame import GSO_ECN, GSO_UDP, Frame, Offload
from netvsp.frames.offload import cut, fill_checksum
from netvsp.link import Link
from netvsp.statistics import Direction
from netvsp.wire.nvsp import RNDIS_PACKET_COMPLETE, SEND_RNDIS_PACKET_COMPLETE, SUCCESS
from vmbus.host.channel import Channel
from vmbus.host.undertakings import Undertaking
from vmbus.ring import Packet

TURN = 2 << 20
"""What a channel may do before others have their turn, in bytes that are copied; as in storvsp."""
FRAME_COST = 4 << 10
"""Of a frame that goes out from here, beside its bytes."""
SEGMENT_COST = 16 << 10
"""Of each frame that a segment is cut into, in the same unit."""
STEP = 32
"""Frames that are made, and handed over, at a time."""
MAX_PIECES = 64
"""Frames that one packet may become on the spot; with more of them it waits."""
WAITING_WEIGHT = 2048
"""Bytes of host memory of a packet that waits, beside its frames."""
FRAME_WEIGHT = 1024
"""The same of each frame, beside its bytes, and what it costs to look at it again and again."""

ANSWER = RNDIS_PACKET_COMPLETE.pack(SEND_RNDIS_PACKET_COMPLETE, SUCCESS)
"""What a packet of frames is answered with."""


class _Waiting:
    """A packet that is not answered yet."""

    __slots__ = ("frames", "left", "packet", "ready", "undertaking")

    def __init__(
        self, packet: Packet, frames: Iterator[Frame], left: int, undertaking: Undertaking
    ) -> None:
        self.packet = packet
        self.left = left
        """How many frames the guest has sent in it."""
        self.frames = frames
        """Those that have not been made yet."""
        self.ready: list[Frame] = []
        """Those that have."""
        self.undertaking = undertaking


class Backlog:
    """What waits on one channel.

    Args:
        channel: Where completions go.
        queue: The endpoint's queue for it.
        endpoint: Where frames go.
        link: What waits is dropped when it goes down.
        statistics: Counters.

    Attributes:
        parts: Into how many parts the work of a turn is divided.
        busy: Whether anything waits: what comes is to wait behind it.
    """

    def __init__(
        self,
        channel: Channel,
        queue: int,
        endpoint: Endpoint,
        link: Link,
        statistics: Direction,
    ) -> None:
        self.parts = 1
        self.busy = False
        self._channel = channel
        self._queue = queue
        self._endpoint = endpoint
        self._link = link
        self._statistics = statistics
        self._waiting: collections.deque[_Waiting] = collections.deque()

    def keep(self, packet: Packet, frames: Sequence[Frame], nursery: trio.Nursery) -> None:
        """Have the frames of a packet wait behind all others. Cannot block.

        Args:
            packet: Answered when they have been taken.
            frames: As the guest sends them, or done with; copied if they are the guest's.
            nursery: For the task that sends them.
        """
        own = [frame.own() for frame in frames]
        weight = WAITING_WEIGHT + sum([FRAME_WEIGHT + len(frame) for frame in own])
        undertaking = self._channel.undertakings.begin(weight, lambda: "frames to be sent")
        made = finished(own, self._endpoint.info.offloads)
        self._waiting.append(_Waiting(packet, made, len(own), undertaking))
        if not self.busy:
            self.busy = True
            nursery.start_soon(self._send)

    async def _send(self) -> None:
        channel = self._channel
        try:
            while self._waiting and not channel.ended:
                # An endpoint that never takes any more must not keep the channel from its end.
                await self._waiting[0].undertaking.rest(self._wait_writable)
                if not self._link.up:
                    self._give_up()
                self._send_some()
                await channel.flush()
        except trio.EndOfChannel:
            pass
        finally:
            self.busy = False
            for each in self._waiting:
                each.undertaking.end()
            self._waiting.clear()

    async def _wait_writable(self) -> None:
        """Wait until the endpoint may take more, or the link is down. Is a checkpoint."""
        with trio.CancelScope() as scope, self._link.ends(scope):
            await self._endpoint.wait_writable(self._queue)

    def _give_up(self) -> None:
        """Drop what the endpoint has not taken, for the link is down. Cannot block."""
        for each in self._waiting:
            # Segments count as what has been made of them, or as one: they are not cut for that.
            self._statistics.dropped["link down"] += len(each.ready) or each.left
            each.undertaking.end()
            if each.packet.flags & 1:
                self._channel.complete(each.packet.transaction_id, ANSWER)
        self._waiting.clear()

    def _send_some(self) -> None:
        """Send as much as one turn is for, and as the endpoint takes."""
        channel = self._channel
        budget = TURN // self.parts
        while self._waiting and budget > 0 and not channel.ended:
            first = self._waiting[0]
            if not first.ready:
                first.ready = list(itertools.islice(first.frames, STEP))
            if first.ready:
                taken = self._endpoint.transmit(self._queue, first.ready)
                self._statistics.count_all(first.ready[:taken])
                for frame in first.ready:
                    budget -= FRAME_COST + len(frame)
                del first.ready[:taken]
                if first.ready:
                    return
                continue
            budget -= FRAME_COST
            self._waiting.popleft()
            first.undertaking.end()
            if first.packet.flags & 1:
                channel.complete(first.packet.transaction_id, ANSWER)


def count_pieces(offload: Offload | None, length: int, offloads: Offloads) -> int:
    """Return how many frames will be made of one that an endpoint is to get. Cannot block.

    Args:
        offload: What is left to do for it.
        length: Its bytes.
        offloads: What the endpoint does.
    """
    if offload is None or not offload.gso_type or _whole(offload, offloads):
        return 1
    return max(1, -(-(length - offload.header_length) // offload.gso_size))


def finished(frames: Sequence[Frame], offloads: Offloads) -> Iterator[Frame]:
    """Do for frames what an endpoint cannot, one after the other. Cannot block."""
    sums = not (offloads.checksum or offloads.tcp_segments)
    for frame in frames:
        offload = frame.offload
        inside = frame.tci is not None and not offloads.vlan
        if offload is None or (offload.gso_type and _whole(offload, offloads)):
            yield frame.tagged() if inside else frame
            continue
        # Cut first: with its tag inside, a segment with another one is no IP for who cuts it.
        for piece in cut(frame, filled=sums) if offload.gso_type else (frame,):
            done = fill_checksum(piece) if sums else piece
            yield done.tagged() if inside else done


def _whole(offload: Offload, offloads: Offloads) -> bool:
    """Whether an endpoint takes a segment as it is."""
    if offload.gso_type & ~GSO_ECN == GSO_UDP:
        return offloads.udp_segments
    return offloads.tcp_segments

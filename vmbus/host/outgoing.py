"""The outgoing half of a channel: a queue in front of its ring, and waiting for room there."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Sequence

import trio

from vmbus.engine.offers import Offer
from vmbus.errors import LocalProtocolError
from vmbus.host.bell import Bell
from vmbus.host.observer import MemoryUse, Observers, Piece
from vmbus.host.statistics import Statistics
from vmbus.partition.transport import Call
from vmbus.ring import RingWriter
from vmbus.wire.messages import Direction
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, IN_BAND, TRAILER_SIZE, build_packet
from vmbus.wire.versions import Version

POLL_INTERVAL = 0.002
"""Seconds between looks at a full outgoing ring: OpenBSD, macOS and NetBSD never signal."""
MAX_POLL_INTERVAL = 0.064
"""What the interval grows to while nothing is read: a guest that keeps all its rings full must not
take the time of the others."""


class OutgoingHalf(abc.ABC):
    """What :class:`vmbus.host.Channel` has to do with the ring it writes.

    Args:
        writer: The ring.
        bell: The channel's doorbell, which the guest rings for room in the ring, too.
        call: Interrupts the guest.
    """

    relid: int
    subchannel_index: int
    offer: Offer
    version: Version

    def __init__(self, writer: RingWriter, bell: Bell, call: Call) -> None:
        self.statistics = Statistics()
        self.observer: Observers | None = None
        self.tells_memory = False
        self._writer = writer
        self._capacity = writer.capacity
        self._bell = bell
        self._call = call
        self._queue: deque[bytes] = deque()
        self._flushed: trio.Event | None = None
        self._gate: trio.Event | None = None
        """There while the channel is held; set when it goes on."""
        self._frozen = False
        """Whether nothing may be written."""
        self._ended = False

    def send(
        self, payload: bytes, *, transaction_id: int = 0, completion_requested: bool = False
    ) -> None:
        """Queue an in-band packet. Cannot block; goes out with the next flush.

        Raises:
            LocalProtocolError: Too long for the ring.
        """
        self.send_packet(
            build_packet(
                IN_BAND,
                payload,
                transaction_id=transaction_id,
                flags=FLAG_COMPLETION_REQUESTED if completion_requested else 0,
            )
        )

    def send_packet(self, packet: bytes) -> None:
        """Queue a packet built with :func:`vmbus.wire.packets.build_packet`. Cannot block.

        Raises:
            LocalProtocolError: Too long for the ring.
        """
        if len(packet) > self._capacity:
            raise LocalProtocolError(self._too_long(packet))
        self._queue.append(packet)

    def _too_long(self, packet: bytes) -> str:
        return f"a packet of {len(packet)} bytes; the guest's ring takes {self._capacity}"

    def try_flush(self) -> bool:
        """Write what fits now, with one commit and at most one signal. Cannot block.

        Returns:
            True if nothing is left in the queue.

        Raises:
            RingError: The guest's read index is corrupt.
        """
        queue = self._queue
        if not queue:
            return True
        if self._ended:
            # The ring belongs to the guest again; nobody waits for these packets.
            queue.clear()
            return True
        if self._frozen:
            return False
        packets = tuple(queue)
        count, signal = self._writer.write_batch_untrusted(packets)
        if self.observer is not None:
            self.observer.packets_out(self, packets[:count])
        if signal:
            self._signal()
        if count == len(queue):
            size = sum(map(len, queue))
            queue.clear()
        else:
            size = sum(len(queue.popleft()) for _ in range(count))
        self.statistics.packets_out += count
        self.statistics.bytes_out += size
        return not queue

    async def flush(self) -> None:
        """Write the whole queue, waiting for room if need be. A checkpoint only if it waits.

        Raises:
            RingError: The guest's read index is corrupt.
        """
        while not self.try_flush():
            if self._flushed is None:
                await self._flush_slowly()
            else:
                await self._flushed.wait()

    async def _flush_slowly(self) -> None:
        self._flushed = trio.Event()
        self._settle()
        self.statistics.ring_full += 1
        # A signal per freed packet would be too many: a quarter of the ring is asked for, and what
        # is free before that is used anyway, because the poll looks too.
        writer = self._writer
        interval = POLL_INTERVAL
        written = self.statistics.packets_out
        try:
            while not self.try_flush():
                if self._frozen and self._gate is not None:
                    await self._gate.wait()
                    continue
                if written != self.statistics.packets_out:
                    written = self.statistics.packets_out
                    interval = POLL_INTERVAL
                size = max(len(self._queue[0]) + TRAILER_SIZE, writer.ring.size // 4)
                if writer.wait_for_room(size):
                    # See receive_batch.
                    await trio.lowlevel.checkpoint()
                    continue
                with trio.move_on_after(interval):
                    await self._wait_doorbell()
                interval = min(interval * 2, MAX_POLL_INTERVAL)
        finally:
            if not self._ended and not self._frozen:
                writer.stop_waiting()
            flushed, self._flushed = self._flushed, None
            flushed.set()

    def observe(self, observers: Observers) -> None:
        """Internal: these listen from now on. Cannot block."""
        self.observer = observers.ring
        self.tells_memory = observers.to_memory

    def tell_memory(self, transaction_id: int, pieces: Sequence[Piece], use: MemoryUse) -> None:
        """Tell who listens what a packet points to. Cannot block, never raises.

        A device calls this if :attr:`tells_memory`, when it has found the bytes that it is going to
        read, or has written those that it is going to tell the guest of.

        Args:
            transaction_id: Of the packet.
            pieces: The bytes, one behind the other; only borrowed.
            use: What they are to the device.
        """
        if self.observer is not None:
            self.observer.memory(self, transaction_id, pieces, use)

    @property
    def doorbell_fd(self) -> int:
        """The eventfd that wakes this channel; for whoever rings it."""
        return self._bell.fd

    @property
    def pending(self) -> int:
        """Packets queued and not yet in the ring."""
        return len(self._queue)

    def _signal(self) -> None:
        self._call.signal()
        self.statistics.signals_out += 1
        if self.observer is not None:
            self.observer.signal(self, Direction.HOST_TO_GUEST)

    async def _wait_doorbell(self) -> None:
        if await self._bell.wait():
            self.statistics.signals_in += 1
            if self.observer is not None:
                self.observer.signal(self, Direction.GUEST_TO_HOST)

    @abc.abstractmethod
    def _settle(self) -> None:
        """Give the guest the room of what has been read. Cannot block.

        A guest that waits for it, to write, may not read before it has written.
        """

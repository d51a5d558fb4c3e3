"""Layer 3: an open channel, as a device uses it.

The device's task reads batches and writes answers::

    while True:
        for packet in await channel.receive_batch():
            ...
            channel.complete(packet.transaction_id, answer)
        await channel.flush()

Everything that ``complete`` and ``send`` queue goes out with the next flush: one copy into the
ring, one index store, at most one signal. No queue here grows without bound: a device that has
more than :attr:`Channel.max_outstanding` requests open gets no more packets until it has answered
some, and ``flush`` waits while the guest does not read its ring.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import trio

from vmbus.bell import Bell
from vmbus.engine.offers import Offer
from vmbus.errors import LocalProtocolError
from vmbus.gpadl import Gpadl
from vmbus.lookout import Lookout
from vmbus.memory import GuestMemory
from vmbus.ring import Packet, RingReader, RingWriter, completion
from vmbus.statistics import Statistics
from vmbus.transport import Call
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, IN_BAND, TRAILER_SIZE, build_packet
from vmbus.wire.versions import Version

POLL_INTERVAL = 0.002
"""Seconds between looks at a full outgoing ring: OpenBSD, macOS and NetBSD never signal."""
MAX_POLL_INTERVAL = 0.064
"""What the interval grows to while nothing is read: a guest that keeps all its rings full must not
take the time of the others."""


class Channel:
    """One open channel. Made by the bus; not for construction elsewhere but in tests.

    Attributes:
        relid: Number of the channel on this bus.
        offer: The offer it was opened from.
        subchannel_index: 0 for a primary channel.
        version: VMBus version in force.
        memory: The guest's memory, for GPA-direct transfers.
        open_user_data: 120 bytes that came with OPENCHANNEL.
        statistics: Counters.
        max_outstanding: Requests that may be unanswered before reading stops; a budget, since
            each one makes the device hold state.

    Args:
        longest_look: Seconds to look for packets before sleeping, at most; see
            :mod:`vmbus.lookout`.
    """

    def __init__(
        self,
        *,
        relid: int,
        offer: Offer,
        subchannel_index: int,
        version: Version,
        memory: GuestMemory,
        open_user_data: bytes,
        reader: RingReader,
        writer: RingWriter,
        doorbell_fd: int | None,
        call: Call,
        max_outstanding: int = 4096,
        longest_look: float = 0.0,
    ) -> None:
        self.relid = relid
        self.offer = offer
        self.subchannel_index = subchannel_index
        self.version = version
        self.memory = memory
        self.open_user_data = open_user_data
        self.max_outstanding = max_outstanding
        self.statistics = Statistics()
        self._reader = reader
        self._writer = writer
        self._capacity = writer.capacity
        self._lookout = Lookout(longest_look)
        self._bell = Bell(doorbell_fd)
        self._call = call
        self._queue: deque[bytes] = deque()
        self._outstanding = 0
        self._unsettled: Sequence[Packet] = ()
        self._ended = self._frozen = self._receiving = False
        self._released = trio.Event()
        self._flushed: trio.Event | None = None
        self._gate: trio.Event | None = None
        self._drained: trio.Event | None = None
        self._room = trio.Event()
        self._subchannels_out, self._subchannels_in = trio.open_memory_channel["Channel"](
            max(offer.max_subchannels, 1)
        )
        self._make_subchannels: Callable[[int], None] | None = None
        self._find_gpadl: Callable[[int], Gpadl] | None = None

    # -- reading -------------------------------------------------------------------------------

    async def receive_batch(self, max_packets: int = 256) -> list[Packet]:
        """Wait until there are packets and return them, in order. Is a checkpoint.

        While the device works on a batch the guest is asked not to signal; it is asked to signal
        again only when the ring has been found empty. The room that a batch takes up in the ring
        is the guest's again with the next call.

        Raises:
            trio.EndOfChannel: The channel is closed, rescinded, unloaded or reset.
            trio.BusyResourceError: Another task is waiting here.
            RingError: The ring is corrupt; the channel cannot go on.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task receives from this channel")
        self._receiving = True
        try:
            self._settle()
            # One checkpoint per batch, before anything is taken out of the ring: a cancelled
            # call loses no packet.
            await trio.lowlevel.checkpoint()
            while True:
                if self._ended:
                    raise trio.EndOfChannel
                if self._gate is not None:
                    await self._gate.wait()
                    continue
                if self._outstanding >= self.max_outstanding:
                    self._room = trio.Event()
                    await self._room.wait()
                    continue
                packets = self._reader.read_batch_untrusted(max_packets)
                if packets:
                    self._reader.mask()
                    self._unsettled = packets
                    for packet in packets:
                        self._outstanding += packet.flags & FLAG_COMPLETION_REQUESTED
                    return packets
                await self._wait_packets()
        finally:
            self._receiving = False

    async def _wait_packets(self) -> None:
        """Return when there may be packets, or something else to see to. Is a checkpoint."""
        lookout = self._lookout
        start = time.perf_counter()
        # Not while requests wait for something else, a worker's thread perhaps: it needs the
        # interpreter, which looking on would keep from it.
        if (
            lookout.window
            and not self._outstanding
            and await lookout.look(self._reader, lambda: self._ended or self._gate is not None)
        ):
            self.statistics.polled += 1
            return
        if self._reader.unmask():
            # Packets came in at the last moment, unless the guest plays with its index.
            await trio.lowlevel.checkpoint()
        else:
            await self._wait_doorbell()
            lookout.slept(time.perf_counter() - start)

    def _settle(self) -> None:
        """Give the guest the room of the last batch; the answers went first, being waited for."""
        packets = self._unsettled
        if packets:
            self._unsettled = ()
            self.statistics.count_in(packets)
            if not self._ended and self._reader.commit():
                self._signal()

    async def _wait_doorbell(self) -> None:
        if await self._bell.wait():
            self.statistics.signals_in += 1

    # -- writing -------------------------------------------------------------------------------

    def complete(self, transaction_id: int, payload: bytes) -> None:
        """Queue the completion of a request. Cannot block; goes out with the next flush.

        Args:
            transaction_id: That of the request, bit for bit, 0 included.
            payload: As the device's protocol defines it; may be empty.

        Raises:
            LocalProtocolError: Too long for the ring.
        """
        self.complete_packet(completion(transaction_id, payload))

    def complete_packet(self, packet: bytes) -> None:
        """Queue a completion made as :func:`vmbus.ring.completion` makes them. Cannot block.

        Raises:
            LocalProtocolError: Too long for the ring.
        """
        if len(packet) > self._capacity:
            raise LocalProtocolError(self._too_long(packet))
        self._queue.append(packet)
        if self._outstanding:
            self._outstanding -= 1
            if not self._outstanding and self._drained is not None:
                self._drained.set()
                self._drained = None
            self._room.set()

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
        count, signal = self._writer.write_batch_untrusted(tuple(queue))
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

    @property
    def doorbell_fd(self) -> int:
        """The eventfd that wakes this channel; for whoever rings it."""
        return self._bell.fd

    @property
    def pending(self) -> int:
        """Packets queued and not yet in the ring."""
        return len(self._queue)

    @property
    def outstanding(self) -> int:
        """Requests read whose completion has not been queued yet."""
        return self._outstanding

    def _signal(self) -> None:
        self._call.signal()
        self.statistics.signals_out += 1

    # -- sub-channels and GPADLs -----------------------------------------------------------------

    def offer_subchannels(self, count: int) -> None:
        """Offer sub-channels 1 to ``count`` of this primary. Cannot block.

        Raises:
            LocalProtocolError: Not a primary channel, not open, or more than the offer allows.
        """
        if self._make_subchannels is None or self._ended:
            raise LocalProtocolError("sub-channels are offered on an open primary channel")
        self._make_subchannels(count)

    async def accept_subchannel(self) -> Channel:
        """Wait for the guest to open a sub-channel of this primary. Is a checkpoint.

        The device owns the sub-channel and has to :meth:`aclose` it when it ends.

        Raises:
            trio.EndOfChannel: The primary has ended.
        """
        return await self._subchannels_in.receive()

    def gpadl(self, handle: int) -> Gpadl:
        """Return a GPADL that the guest made on this channel. Cannot block.

        Raises:
            GuestProtocolError: There is none, or it is being torn down.
        """
        if self._find_gpadl is None:
            raise LocalProtocolError("this channel was made without a bus")
        return self._find_gpadl(handle)

    # -- ending ----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the guest has closed the channel, or lost it."""
        return self._ended

    async def aclose(self) -> None:
        """Tell the bus that the device is done with this channel. Idempotent, no checkpoint.

        From here on the guest's pages are not touched through this channel.
        """
        self._queue.clear()
        self._released.set()

    # What follows is for the bus.

    def end(self) -> None:
        """The channel is over: wake the device. Idempotent. Cannot block."""
        if self._ended:
            return
        self._ended = True
        self._call.close()
        self._room.set()
        self._subchannels_out.close()
        if self._gate is not None:
            self._gate.set()
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        self.poke()

    def poke(self) -> None:
        """Make the device look at its ring. Cannot block."""
        self._bell.ring()

    def deliver_subchannel(self, channel: Channel) -> None:
        """Hand an opened sub-channel to the device. Cannot block."""
        try:
            self._subchannels_out.send_nowait(channel)
        except (trio.WouldBlock, trio.ClosedResourceError):
            channel.end()
            channel._released.set()

    async def wait_released(self) -> None:
        """Wait until the device is done with the channel. Is a checkpoint."""
        await self._released.wait()

    def retarget(self, vp: int) -> None:
        """Interrupt another VP from now on. Cannot block."""
        self._call.retarget(vp)

    def hold(self) -> None:
        """Hand out no more packets. Cannot block."""
        if self._gate is None:
            self._gate = trio.Event()

    async def pause(self) -> None:
        """Hand out no more packets, wait for those handed out, then write no more. A checkpoint.

        What is queued for a ring that has no room stays queued.
        """
        gate = await self._quiesce()
        if gate is self._gate:
            self._frozen = True

    async def drain(self) -> None:
        """Hand out no more packets, wait for those handed out and their answers. A checkpoint.

        Raises:
            RingError: The guest's read index is corrupt.
        """
        await self._quiesce()
        await self.flush()

    async def _quiesce(self) -> trio.Event | None:
        self.hold()
        gate = self._gate
        while self._outstanding and not self._ended:
            self._drained = self._drained if self._drained is not None else trio.Event()
            await self._drained.wait()
        self._settle()
        return gate

    def resume(self) -> None:
        """Undo :meth:`pause`. Cannot block."""
        self._frozen = False
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate.set()
        self.poke()

    def bind(
        self, make_subchannels: Callable[[int], None], find_gpadl: Callable[[int], Gpadl]
    ) -> None:
        """Connect the channel to its bus. Cannot block."""
        self._make_subchannels = make_subchannels
        self._find_gpadl = find_gpadl

    def release_rings(self) -> None:
        """Give up the views of both rings. Cannot block."""
        self._reader.ring.release()
        self._writer.ring.release()

    def close_doorbell(self) -> None:
        """Close the doorbell if it is the channel's own. Idempotent. Cannot block."""
        self._bell.close()

    def snapshot(self) -> dict[str, Any]:
        """Describe the channel for people, as JSON types. Cannot block, never raises."""
        alive = not self._ended
        return {
            "relid": self.relid,
            "subchannel_index": self.subchannel_index,
            "outstanding": self._outstanding,
            "pending": len(self._queue),
            "incoming_size": self._reader.ring.size,
            "incoming_used": self._reader.available() if alive else 0,
            "outgoing_size": self._writer.ring.size,
            "outgoing_used": self._writer.occupied() if alive else 0,
            **self.statistics.as_dict(),
        }

"""An open channel, as a device uses it.

The device's task reads batches and writes answers::

    while True:
        for packet in await channel.receive_batch():
            ...
            channel.complete(packet.transaction_id, answer)
        await channel.flush()

Everything that ``complete`` and ``send`` queue goes out with the next flush: one copy into the
ring, one index store, at most one signal. No queue here grows without bound: a device that has
more than :attr:`Channel.max_outstanding` requests open gets no more packets until it has answered
some, and ``flush`` waits while the guest does not read its ring. :mod:`vmbus.host.serving` has this
loop, for devices that answer requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import trio

from vmbus.engine.offers import Offer
from vmbus.errors import (
    STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_STATE,
    BudgetError,
    GuestProtocolError,
    LocalProtocolError,
)
from vmbus.host.bell import Bell
from vmbus.host.buffer import GpadlLease
from vmbus.host.channel_host import ChannelHost
from vmbus.host.lookout import Lookout
from vmbus.host.outgoing import OutgoingHalf
from vmbus.host.undertakings import Undertakings
from vmbus.memory import GuestMemory
from vmbus.partition.transport import Call, Doorbell
from vmbus.ring import Packet, RingReader, RingWriter, completion
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, GPA_DIRECT, parse_gpa_ranges_untrusted
from vmbus.wire.versions import Version

MAX_RANGES = 64
"""GPA ranges of one packet; every driver seen sends one, netvsc up to 32."""


class Channel(OutgoingHalf):
    """One open channel. Made by the bus; not for construction elsewhere but in tests.

    Attributes:
        relid: Number of the channel on this bus.
        offer: The offer it was opened from.
        subchannel_index: 0 for a primary channel.
        version: VMBus version in force.
        memory: The guest's memory, for GPA-direct transfers.
        open_user_data: 120 bytes that came with OPENCHANNEL.
        target_vp: VP that is interrupted for it; None: none is.
        statistics: Counters.
        observer: Hears of packets and signals; None, which costs nothing, if nobody listens.
        tells_memory: Whether somebody wants to hear of the memory that packets point to.
        max_outstanding: Requests that may be unanswered before reading stops; a budget, since
            each one makes the device hold state.
        undertakings: Those of them that take their time, weighed by what they hold.

    Args:
        host: The bus.
        doorbell: Borrowed; None if the bus rings for the guest, with :meth:`poke`.
        longest_look: Seconds to look for packets before sleeping, at most; see
            :mod:`vmbus.host.lookout`.
    """

    def __init__(
        self,
        host: ChannelHost,
        *,
        relid: int,
        offer: Offer,
        subchannel_index: int,
        version: Version,
        memory: GuestMemory,
        open_user_data: bytes,
        target_vp: int | None = None,
        reader: RingReader,
        writer: RingWriter,
        doorbell: Doorbell | None,
        call: Call,
        max_outstanding: int = 4096,
        longest_look: float = 0.0,
    ) -> None:
        super().__init__(writer, Bell(doorbell), call)
        self._host = host
        self.relid = relid
        self.offer = offer
        self.subchannel_index = subchannel_index
        self.version = version
        self.memory = memory
        self.open_user_data = open_user_data
        self.target_vp = target_vp
        self.max_outstanding = max_outstanding
        self._reader = reader
        self._lookout = Lookout(longest_look)
        self._outstanding = 0
        self._unsettled: Sequence[Packet] = ()
        self._left: list[Packet] = []
        self._still = False
        self._draining = False
        self._receiving = False
        self._released = trio.Event()
        self._drained: trio.Event | None = None
        self._room = trio.Event()
        self.undertakings = Undertakings(self._look_drained, self._look_room)
        self._load = self.undertakings.load
        self._subchannels_out, self._subchannels_in = trio.open_memory_channel["Channel"](
            max(offer.max_subchannels, 1)
        )

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
                left = self._left
                if self._gate is not None and not (left and self._draining and not self._still):
                    if self._draining:
                        self._look_drained()
                    await self._gate.wait()
                    continue
                if self._outstanding >= self.max_outstanding or self._load.full:
                    self._room = trio.Event()
                    await self._room.wait()
                    continue
                if left:
                    self._left = []
                    self._outstanding += _requests(left)
                    return left
                packets = self._reader.read_batch_untrusted(max_packets)
                if packets:
                    self._reader.mask()
                    self._unsettled = packets
                    self._outstanding += _requests(packets)
                    if self.observer is not None:
                        self.observer.packets_in(self, packets)
                    return packets
                await self._wait_packets()
        finally:
            self._receiving = False

    def put_back(self, packets: list[Packet]) -> None:
        """Give back the end of a batch that is too much for one turn. Cannot block.

        They are the next batch, under the same conditions as any other: not while the channel is
        held, nor while too much is under way, and not any more when it has ended.

        Args:
            packets: The last of the last batch, none of them acted on.
        """
        self._left = packets
        self._outstanding -= _requests(packets)
        self._look_drained()

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

    # -- answering -----------------------------------------------------------------------------

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
            if self._drained is not None:
                self._look_drained()
            self._room.set()

    def complete_packets(self, packets: Sequence[bytes]) -> None:
        """Queue completions that are short enough for any ring. Cannot block."""
        self._queue += packets
        self._outstanding = max(self._outstanding - len(packets), 0)
        self._look_drained()
        self._room.set()

    def _look_drained(self) -> None:
        """Wake who waits for requests to end, if those that are left are at rest."""
        if self._drained is not None and self._outstanding <= self.undertakings.resting:
            self._drained.set()
            self._drained = None

    def _look_room(self) -> None:
        self._room.set()

    @property
    def outstanding(self) -> int:
        """Requests read whose completion has not been queued yet."""
        return self._outstanding

    # -- sub-channels and GPADLs -----------------------------------------------------------------

    def offer_subchannels(self, count: int) -> None:
        """Offer sub-channels 1 to ``count`` of this primary, as the guest has asked. Cannot block.

        Raises:
            GuestProtocolError: It cannot have them now; the status says why: it has some already
                or has closed the channel (INVALID_DEVICE_STATE), or the bus has no room for them
                (INSUFFICIENT_RESOURCES).
            ConfigError: More than the offer allows, which is the device's business.
        """
        try:
            if self._ended:
                raise LocalProtocolError("sub-channels are offered on an open primary channel")
            self._host.offer_subchannels(count)
        except LocalProtocolError as error:
            raise GuestProtocolError(str(error), status=STATUS_INVALID_DEVICE_STATE) from error
        except BudgetError as error:
            raise GuestProtocolError(str(error), status=STATUS_INSUFFICIENT_RESOURCES) from error

    async def accept_subchannel(self) -> Channel:
        """Wait for the guest to open a sub-channel of this primary. Is a checkpoint.

        The device owns the sub-channel and has to :meth:`aclose` it when it ends.

        Raises:
            trio.EndOfChannel: The primary has ended.
        """
        return await self._subchannels_in.receive()

    def lease_gpadl(self, handle: int) -> GpadlLease:
        """Use a GPADL that the guest made on this channel, until told not to. Cannot block.

        The guest gets GPADL_TORNDOWN when the lease is released, not before.

        Raises:
            GuestProtocolError: There is none, or it is being torn down.
        """
        return self._host.lease_gpadl(handle)

    def external_data_untrusted(
        self, packet: Packet, length: int, *, write: bool
    ) -> list[memoryview]:
        """Return the guest memory that a GPA-direct packet points to. Cannot block.

        A packet can list 65 000 pages. The time that this takes is that of those asked for, so a
        device looks at ``length`` first: it is the guest's word, too.

        Args:
            packet: One of this channel's.
            length: Bytes wanted; there may be more, which are left out.
            write: The device is going to store there.

        Returns:
            Views of guest memory, ``length`` bytes in total, the device's until the packet is
            completed.

        Raises:
            GuestProtocolError: The packet has no ranges, more than :data:`MAX_RANGES`, or too
                short ones, or they are not memory.
        """
        if packet.kind != GPA_DIRECT:
            raise GuestProtocolError(f"{length} bytes of data, but no pages", field="type")
        ranges = parse_gpa_ranges_untrusted(
            packet.data, packet.payload_offset, max_ranges=MAX_RANGES, at_most=length
        )
        available = sum(each.byte_count for each in ranges)
        if available < length:
            raise GuestProtocolError(
                f"{length} bytes of data, but the pages hold {available}", field="byte_count"
            )
        views: list[memoryview] = []
        for each in ranges:
            if each.byte_count:
                views += self.memory.gather(
                    each.byte_offset, each.byte_count, each.pfns, write=write
                )
        return views

    def complain(self, text: str, transaction_id: int | None = None) -> None:
        """Say that the guest broke a rule here. Cannot block.

        The bus counts it, and logs it within a budget. A fault that is no more than one bad
        packet is for the device to complain of; one that it cannot live with, it raises.

        Args:
            text: What, in a few words.
            transaction_id: Of the packet it was in.
        """
        self.statistics.complaints += 1
        where = "" if transaction_id is None else f"transaction {transaction_id:#x}: "
        self._host.complain(where + text)

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
        """Internal: the channel is over: wake the device. Idempotent. Cannot block."""
        if self._ended:
            return
        self._ended = True
        self._call.close()
        self._room.set()
        self.undertakings.end()
        self._subchannels_out.close()
        if self._gate is not None:
            self._gate.set()
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        self.poke()

    def poke(self) -> None:
        """Internal: make the device look at its ring. Cannot block."""
        self._bell.ring()

    def deliver_subchannel(self, channel: Channel) -> None:
        """Internal: hand an opened sub-channel to the device. Cannot block."""
        try:
            self._subchannels_out.send_nowait(channel)
        except (trio.WouldBlock, trio.ClosedResourceError):
            channel.end()
            channel._released.set()

    async def wait_released(self) -> None:
        """Internal: wait until the device is done with the channel. Is a checkpoint."""
        await self._released.wait()

    def retarget(self, vp: int) -> None:
        """Internal: interrupt another VP from now on. Cannot block."""
        self.target_vp = vp
        self._call.retarget(vp)

    def hold(self) -> None:
        """Internal: hand out no more packets. Cannot block."""
        if self._gate is None:
            self._gate = trio.Event()
            self._room.set()

    def stand_still(self) -> None:
        """Internal: hand out no more packets, and let no undertaking begin to act. Cannot block."""
        self.hold()
        self._still = True
        self.undertakings.hold()

    async def pause(self) -> None:
        """Internal: stand still, wait for what is under way, then write no more. A checkpoint.

        Undertakings at rest are not waited for. What is queued for a ring that has no room stays
        queued.
        """
        self.stand_still()
        gate = await self._quiesce(resting=True)
        if gate is self._gate:
            self._frozen = True

    async def drain(self) -> None:
        """Internal: hand out nothing more, wait for what was and its answers. A checkpoint.

        Packets of a batch that were put back count as handed out.

        Raises:
            RingError: The guest's read index is corrupt.
        """
        self._draining = True
        try:
            await self._quiesce(resting=False)
        finally:
            self._draining = False
        await self.flush()

    async def _quiesce(self, *, resting: bool) -> trio.Event | None:
        """Hold, and wait until nothing is under way, or (``resting``) nothing but what rests."""
        self.hold()
        gate = self._gate
        while not self._ended and (
            self._outstanding > (self.undertakings.resting if resting else 0)
            or (self._left and not resting)
        ):
            self._drained = self._drained if self._drained is not None else trio.Event()
            await self._drained.wait()
        self._settle()
        return gate

    def resume(self) -> None:
        """Internal: undo :meth:`pause`. Cannot block."""
        self._frozen = self._still = False
        self.undertakings.go_on()
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate.set()
        self.poke()

    def release_rings(self) -> None:
        """Internal: give up the views of both rings. Cannot block."""
        self._reader.ring.release()
        self._writer.ring.release()

    def close_doorbell(self) -> None:
        """Internal: close the doorbell if it is the channel's own. Idempotent. Cannot block."""
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


def _requests(packets: Sequence[Packet]) -> int:
    """How many of the packets have to be answered."""
    return sum([packet.flags & FLAG_COMPLETION_REQUESTED for packet in packets])

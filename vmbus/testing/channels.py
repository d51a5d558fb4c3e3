"""A channel without a bus: for tests, benchmarks and fuzzing of one device.

The host's end is a real :class:`vmbus.host.Channel` over real shared memory; the guest's end
is the guest's own ring code, driven by hand.
"""

from __future__ import annotations

import os
from typing import NoReturn
from uuid import UUID

import trio

from vmbus.engine.offers import Offer
from vmbus.errors import GuestProtocolError, LocalProtocolError
from vmbus.gpadl import Gpadl
from vmbus.guest.machine import GuestPanic
from vmbus.guest.personality import LINUX_6_1, Personality
from vmbus.guest.ring import Incoming, InRing, OutRing, Span
from vmbus.host.buffer import GpadlLease, Leases
from vmbus.host.channel import Channel
from vmbus.host.channel_host import ChannelHost
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory
from vmbus.ring import RingMemory, RingReader, RingWriter
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.versions import Version

_INSTANCE = UUID(int=1)


def make_offer(
    class_id: UUID = CLASS_SCSI,
    instance_id: UUID = _INSTANCE,
    *,
    max_subchannels: int = 0,
) -> Offer:
    """Return an offer to make a channel from."""
    return Offer(class_id=class_id, instance_id=instance_id, max_subchannels=max_subchannels)


class _GuestCall:
    """Raises the guest's interrupt: an event, and a count."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = False
        self.arrived = trio.Event()

    def signal(self) -> None:
        if not self.closed:
            self.count += 1
            self.arrived.set()

    def retarget(self, vp: int) -> None:
        """There is one VP."""

    def close(self) -> None:
        self.closed = True


class LoneHost:
    """The bus of a channel that has none; a :class:`vmbus.host.channel_host.ChannelHost`.

    Args:
        memory: The guest's.

    Attributes:
        gpadls: What the guest has made, by handle; put them there by hand.
        leases: What of it the device uses. :meth:`Leases.tear_down` with key 0 is the guest's
            GPADL_TEARDOWN.
        torn_down: Handles of those that the guest has got back.
        complaints: What the device has said against its guest.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.gpadls: dict[int, Gpadl] = {}
        self.torn_down: list[int] = []
        self.leases = Leases(memory, lambda _key, handle: self.torn_down.append(handle))
        self.complaints: list[str] = []

    def offer_subchannels(self, count: int) -> None:
        """Refuse: there is nobody to offer them to."""
        raise LocalProtocolError(f"{count} sub-channels of a channel that was made without a bus")

    def lease_gpadl(self, handle: int) -> GpadlLease:
        """See :meth:`vmbus.host.channel_host.ChannelHost.lease_gpadl`."""
        if handle not in self.gpadls:
            raise GuestProtocolError(f"GPADL {handle:#x} does not exist", field="gpadl")
        return self.leases.take(0, self.gpadls[handle])

    def complain(self, text: str) -> None:
        """Keep it."""
        self.complaints.append(text)


class GuestEnd:
    """The guest's end of a channel, driven by hand.

    Attributes:
        memory: Guest memory; pages from :attr:`free_pfn` on are free for data.
        free_pfn: First page frame number that the rings do not use.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        outgoing: list[int],
        incoming: list[int],
        personality: Personality,
        doorbell: int,
        call: _GuestCall,
    ) -> None:
        self.memory = memory
        self.free_pfn = max(*outgoing, *incoming) + 1
        self._doorbell = doorbell
        self._call = call
        self._out = OutRing(*_span(memory, outgoing), personality, self._panic)
        self._in = InRing(*_span(memory, incoming), personality, self._panic, max_packet=1 << 20)
        self.doorbells = 0
        """Times the host was signalled."""

    @property
    def interrupts(self) -> int:
        """Times the guest was interrupted."""
        return self._call.count

    def send(self, *packets: bytes) -> int:
        """Put whole packets into the ring with one commit; signal as a guest would.

        Returns:
            How many fitted. Cannot block.
        """
        count = 0
        for packet in packets:
            if not self._out.append(packet):
                break
            count += 1
        if self._out.commit():
            self.ring_doorbell()
        return count

    def ring_doorbell(self) -> None:
        """Signal the host. Cannot block."""
        self.doorbells += 1
        os.eventfd_write(self._doorbell, 1)

    def receive_nowait(self) -> list[Incoming]:
        """Take what the host has written. Cannot block. Raises GuestPanic on a broken ring."""
        packets, signal = self._in.read_batch()
        if signal:
            self.ring_doorbell()
        return packets

    async def receive(self) -> list[Incoming]:
        """Wait for packets; masks, reads and unmasks as a guest would. Is a checkpoint."""
        await trio.lowlevel.checkpoint()
        while True:
            self._in.mask()
            packets = self.receive_nowait()
            if packets:
                return packets
            if not self._in.unmask():
                await self._call.arrived.wait()
                self._call.arrived = trio.Event()

    @staticmethod
    def _panic(reason: str) -> NoReturn:
        raise GuestPanic("guest end", reason)


def _span(memory: GuestMemory, pfns: list[int]) -> tuple[memoryview, Span]:
    size = (len(pfns) - 1) * PAGE_SIZE
    return memory.page(pfns[0]), Span(memory.gather(0, size, pfns[1:]))


def channel_pair(
    *,
    ring_pages: int = 32,
    data_pages: int = 4096,
    memory: GuestMemory | None = None,
    first_pfn: int = 0,
    offer: Offer | None = None,
    version: Version = Version.V5_3,
    personality: Personality = LINUX_6_1,
    max_outstanding: int = 4096,
    longest_look: float = 0.0,
    host: ChannelHost | None = None,
) -> tuple[Channel, GuestEnd]:
    """Make a channel and its guest's end. To be called inside ``trio.run``.

    Args:
        ring_pages: Pages per direction, control page included.
        data_pages: Pages of guest memory beside the rings.
        memory: Use this guest memory, some of whose pages become the rings, instead of a new one.
        first_pfn: The first of those pages, of twice ``ring_pages``; channels of one guest have one
            memory and different pages.
        offer: What the channel was opened from; by default :func:`make_offer`.
        version: VMBus version in force.
        personality: Whose ring habits the guest's end has.
        max_outstanding: As in :class:`~vmbus.host.channel.Channel`.
        longest_look: As in :class:`~vmbus.host.channel.Channel`.
        host: The bus; by default a :class:`LoneHost`.

    Returns:
        The host's end, and the guest's.
    """
    if memory is None:
        memory = allocate_memory((first_pfn + 2 * ring_pages + data_pages) * PAGE_SIZE)
    outgoing = list(range(first_pfn, first_pfn + ring_pages))
    incoming = list(range(first_pfn + ring_pages, first_pfn + 2 * ring_pages))
    call = _GuestCall()
    channel = Channel(
        host or LoneHost(memory),
        relid=1,
        offer=offer or make_offer(),
        subchannel_index=0,
        version=version,
        memory=memory,
        open_user_data=bytes(120),
        reader=RingReader(RingMemory(memory, outgoing)),
        writer=RingWriter(RingMemory(memory, incoming)),
        doorbell=None,
        call=call,
        max_outstanding=max_outstanding,
        longest_look=longest_look,
    )
    guest = GuestEnd(
        memory,
        outgoing=outgoing,
        incoming=incoming,
        personality=personality,
        doorbell=channel.doorbell_fd,
        call=call,
    )
    return channel, guest

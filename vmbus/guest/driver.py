"""What the drivers of all devices have to do alike: a device's channels, and who may use them when.

::

    class EchoDriver(Driver):
        async def start(self, sub_channels):
            primary = await self.open()
            ...  # the device's own handshake, in which it grants sub-channels
            await self.open_sub_channels(sub_channels)

        async def echo(self, payload):
            channel = await self.next_channel()
            reply = await channel.request(payload, release=self.finished)
            self.finished()
            return reply.payload

Sources: linux/Documentation/virt/hyperv/vmbus.rst (synthetic devices and their sub-channels),
freebsd/sys/dev/hyperv/vmbus/vmbus_chan.c (``vmbus_subchan_get``).
"""

from __future__ import annotations

from collections.abc import Callable, Container

import trio

from vmbus.guest.channel import GuestChannel
from vmbus.guest.kernel import Guest
from vmbus.guest.ring import Incoming
from vmbus.wire.messages import OfferChannel


class Driver:
    """A device as its driver has it: a primary channel, and sub-channels if it asks for some.

    A driver derives from it, opens the channels as its handshake goes, and tells of each request
    that is over.

    Args:
        guest: Whose driver this is.
        offer: The device's primary channel.
        ring_pages: Pages of each ring of each channel, control page included.
        queue_depth: Requests in flight per channel.
        contiguous: False scatters the pages of the rings over the RAM.
        max_packet: Largest incoming packet in bytes; None: the personality's.
        on_packet: For every channel; see :attr:`vmbus.guest.channel.GuestChannel.on_packet`.
    """

    def __init__(
        self,
        guest: Guest,
        offer: OfferChannel,
        *,
        ring_pages: int,
        queue_depth: int,
        contiguous: bool = True,
        max_packet: int | None = None,
        on_packet: Callable[[Incoming], None] | None = None,
    ) -> None:
        self.guest = guest
        self.offer = offer
        self.ring_pages = ring_pages
        self.channels: list[GuestChannel] = []
        """The primary channel, then its sub-channels."""
        self.on_removed: Callable[[], None] | None = None
        """Called for each open channel that the host takes away, all of them if it is the device.

        In a task of the guest's; it must not block.
        """
        self._depth = queue_depth
        self._contiguous = contiguous
        self._max_packet = max_packet
        self._on_packet = on_packet
        self._granted = 0
        """Sub-channels that the device has granted."""
        self._next = 0
        self._room = trio.lowlevel.ParkingLot()
        self._promised = 0
        """Requests that woken callers, who have not run yet, will send."""
        self._broken = False
        """A channel is closed or taken away: it has room, and who uses that gives none back."""
        self._idle = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"<{name} {self.offer.instance_id}, {len(self.channels)} channels>"

    # ------------------------------------------------------------------------------- channels

    async def open(self) -> GuestChannel:
        """Open the primary channel. A checkpoint.

        Raises:
            HostRefusedError: The host refuses the GPADL or the opening.
            trio.BrokenResourceError: It takes the device away instead.
            GuestPanic: It answers wrongly.
        """
        return await self._open(self.offer)

    async def _open(self, offer: OfferChannel) -> GuestChannel:
        channel = await self.guest.connection.open_channel(
            offer,
            ring_pages=self.ring_pages,
            contiguous=self._contiguous,
            max_packet=self._max_packet,
            on_packet=self.packet_handler(offer),
        )
        channel.on_removed = self.removed
        self.channels.append(channel)
        return channel

    def packet_handler(self, offer: OfferChannel) -> Callable[[Incoming], None] | None:
        """Return what handles the packets of one channel that are no completions.

        It is asked before the channel is opened. A driver that has to know which channel a packet
        came from overrides it; here it is the same for all of them. Cannot block.
        """
        return self._on_packet

    async def open_sub_channels(self, count: int, *, only: Container[int] | None = None) -> None:
        """Open the sub-channels that the host offers, now that the device has granted them.

        A checkpoint. It waits for the offers as long as it takes.

        Args:
            count: How many the device has granted.
            only: Numbers of those to open, as in a guest where opening the others fails; None:
                all of them.

        Raises:
            HostRefusedError: The host refuses a GPADL or an opening.
            trio.BrokenResourceError: It takes the device away instead.
            GuestPanic: It offers more than that, or other ones than the next in order.
        """
        offers = await self.guest.connection.wait_offers(
            self._is_sub_channel, count, primary=self.offer
        )
        self._granted = count
        self.check_sub_channels()
        for index, offer in enumerate(offers, 1):
            if offer.class_id != self.offer.class_id or offer.subchannel_index != index:
                self.guest.panic(f"sub-channel {offer.subchannel_index} where {index} was due")
            if only is None or index in only:
                await self._open(offer)
        self.check_sub_channels()

    def check_sub_channels(self) -> None:
        """See that the host has offered no more sub-channels than the device has granted.

        Cannot block.

        Raises:
            GuestPanic: It has.
        """
        offers = [o for o in self.guest.connection.offers.values() if self._is_sub_channel(o)]
        if len(offers) > self._granted:
            self.guest.panic(f"{len(offers)} sub-channels offered, {self._granted} wanted")

    def _is_sub_channel(self, offer: OfferChannel) -> bool:
        return offer.instance_id == self.offer.instance_id and offer.subchannel_index > 0

    async def close(self) -> None:
        """Close all channels, sub-channels first. A checkpoint.

        The host rescinds sub-channels when their primary channel closes; a driver that goes on
        to :meth:`vmbus.guest.connection.Connection.unload` waits for that first.

        Raises:
            GuestPanic: The host has offered sub-channels that nobody has asked for.
        """
        self.check_sub_channels()
        for channel in reversed(self.channels):
            await self.guest.connection.close_channel(channel)
        self._wake_all()

    async def reset(self) -> None:
        """Be as before :meth:`open`, for a driver that closes its device and opens it again.

        Waits until the host has taken the offers of the sub-channels back, which it does when the
        primary channel closes. A checkpoint.
        """
        await trio.lowlevel.checkpoint()
        offers = self.guest.connection.offers
        for relid in [each.relid for each in offers.values() if self._is_sub_channel(each)]:
            await self.guest.connection.wait_gone(relid)
        self.channels.clear()
        self._granted = 0
        self._broken = False

    def removed(self) -> None:
        """Take note that the host has taken an open channel away. Cannot block.

        A driver that has more to do overrides it, and calls it.
        """
        self._wake_all()
        if self.on_removed is not None:
            self.on_removed()

    # ------------------------------------------------------------------------------- requests

    async def next_channel(self) -> GuestChannel:
        """Return the next channel in turn whose queue has room. A checkpoint if all are full.

        What the caller sends at once, without a checkpoint in between, is within the queue depth.
        Who waits goes first: a caller that has just had its completion does not overtake them.
        After the end of the channels one of them is returned, and raises on its use.
        """
        channels = self.channels
        ahead = len(self._room)
        while True:
            free = sum(max(self._depth - channel.outstanding, 0) for channel in channels)
            if free > (0 if self._broken else ahead + self._promised):
                break
            await self._room.park()
            self._promised -= 1
            ahead = 0
        while True:
            self._next = (self._next + 1) % len(channels)
            channel = channels[self._next]
            if channel.outstanding < self._depth:
                return channel

    def finished(self) -> None:
        """Let those go on who wait for a request to be over. Cannot block.

        The driver calls it for each request that is no longer in flight: when it has the
        completion, and as ``release`` of :meth:`vmbus.guest.channel.GuestChannel.request`, for
        requests whose callers were cancelled.
        """
        self._promised += len(self._room.unpark())
        if self._idle:
            self._idle.unpark_all()

    async def wait_idle(self) -> None:
        """Wait until no request is in flight on any channel. A checkpoint if one is."""
        while any(channel.outstanding for channel in self.channels):
            await self._idle.park()

    def _wake_all(self) -> None:
        self._broken = True
        self._promised += len(self._room.unpark_all())
        self._idle.unpark_all()

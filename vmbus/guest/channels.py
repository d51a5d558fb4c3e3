"""GPADLs and channels as a driver sees them: create, open, move, close, be interrupted.

Sources: linux/drivers/hv/channel.c, freebsd/sys/dev/hyperv/vmbus/vmbus_chan.c,
openbsd/sys/dev/pv/hyperv.c, mu_msvm/MsvmPkg/VmbusDxe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from vmbus.errors import LocalProtocolError
from vmbus.guest.channel import GuestChannel
from vmbus.guest.doorbells import Doorbells
from vmbus.guest.gpadl import Gpadl, Handles, gpadl_messages
from vmbus.guest.machine import Panic
from vmbus.guest.mailbox import HostRefusedError, Mailbox
from vmbus.guest.personality import Personality
from vmbus.guest.processor import Processors
from vmbus.guest.ram import Ram
from vmbus.guest.ring import Incoming, InRing, OutRing, Span
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.messages import (
    USER_DEFINED_SIZE,
    CloseChannel,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
)
from vmbus.wire.versions import Feature, Version

_SIGNALS = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION


class Channels:
    """GPADLs and channels of one guest; the part of a connection below its offers.

    Args:
        personality: Whose habits to follow.
        ram: Gives pages.
        processors: Post messages, ring doorbells.
        panic: Called when the host breaks a rule.
    """

    def __init__(
        self, personality: Personality, ram: Ram, processors: Processors, panic: Panic
    ) -> None:
        self.personality = personality
        self.channels: dict[int, GuestChannel] = {}
        """Open channels, by relid."""
        self.spurious_flags = 0
        """Event flags of channels that are not open; many drivers do not even notice."""
        self._ram = ram
        self._processors = processors
        self._panic = panic
        self._handles = Handles(personality)
        self._doorbells = Doorbells(personality, ram, processors)
        self._mailbox = Mailbox(personality, processors, panic)
        self._opening: dict[int, GuestChannel] = {}
        """Channels for which OPENCHANNEL may be under way."""
        self._rings: dict[int, Gpadl] = {}
        self._once_open: set[int] = set()
        self._rescinded: set[int] = set()
        self._changed = trio.lowlevel.ParkingLot()
        """Unparked whenever offers or channels have come or gone."""
        self._next_vp = 0

    @property
    def version(self) -> Version | None:
        """The version in force, or None without a connection."""
        return self._mailbox.version

    @property
    def features(self) -> Feature:
        """The 6.0 features in force."""
        return self._mailbox.features

    async def post(self, message: Message) -> None:
        """Post a control message beside the ordinary course, for tests. May be a checkpoint."""
        await self._mailbox.post(message)

    async def post_raw(self, raw: bytes) -> None:
        """Post ready-made bytes, at most 240. May be a checkpoint."""
        await self._mailbox.post_raw(raw)

    def forget_channels(self) -> None:
        """Forget all channels and GPADLs, as a newly booted kernel. Cannot block.

        Their pages are not given back, because the host may still use them.
        """
        error = trio.BrokenResourceError("the connection to the bus is gone")
        for channel in (*self.channels.values(), *self._opening.values()):
            channel.end(error)
        self._mailbox.forget()
        for table in (self.channels, self._opening, self._rings):
            table.clear()
        self._once_open.clear()
        self._rescinded.clear()
        self._handles = Handles(self.personality)

    def _released(self, gpadl: Gpadl) -> None:
        self._handles.release(gpadl.handle)
        self._ram.free(gpadl.pfns, poison=True)

    async def create_gpadl(
        self, relid: int, pfns: list[int], byte_count: int | None = None
    ) -> Gpadl:
        """Describe pages to the host. A checkpoint.

        Args:
            relid: An offered channel, open or not.
            pfns: Up to 8190 pages; the caller's again after :meth:`teardown_gpadl`.
            byte_count: Bytes, if not all of the pages.

        Raises:
            HostRefusedError: The host does not want them.
            GuestPanic: It answers wrongly.
        """
        handle = self._handles.take()
        size = len(pfns) * PAGE_SIZE if byte_count is None else byte_count
        messages = gpadl_messages(self.personality, relid, handle, pfns, size)
        reply = await self._mailbox.request(messages, GpadlCreated, relid, handle)
        assert isinstance(reply, GpadlCreated)
        if (reply.relid, reply.gpadl) != (relid, handle):
            self._panic(f"{reply}: the answer to relid {relid}, gpadl {handle:#x} was due")
        if reply.status:
            self._handles.release(handle)
            raise HostRefusedError(f"GPADL_HEADER of {len(pfns)} pages", reply.status)
        return Gpadl(relid, handle, pfns)

    async def teardown_gpadl(self, gpadl: Gpadl) -> None:
        """Take pages back from the host; the channel may be closed already. A checkpoint."""
        message = GpadlTeardown(relid=gpadl.relid, gpadl=gpadl.handle)
        reply = await self._mailbox.request([message], GpadlTorndown, gpadl.handle)
        assert isinstance(reply, GpadlTorndown)
        if reply.gpadl != gpadl.handle:
            self._panic(f"{reply}: the answer to gpadl {gpadl.handle:#x} was due")
        self._handles.release(gpadl.handle)

    async def open_channel(
        self,
        offer: OfferChannel,
        *,
        ring_pages: int,
        incoming_pages: int | None = None,
        user_data: bytes = bytes(USER_DEFINED_SIZE),
        target_vp: int | None = None,
        contiguous: bool = True,
        max_packet: int | None = None,
        on_packet: Callable[[Incoming], None] | None = None,
    ) -> GuestChannel:
        """Open an offered channel over new rings. A checkpoint.

        Args:
            offer: One of :attr:`vmbus.guest.connection.Connection.offers`.
            ring_pages: Pages of the outgoing ring, its control page included.
            incoming_pages: Pages of the incoming ring; None: as many.
            user_data: 120 bytes for the device.
            target_vp: VP to interrupt; None: the personality chooses.
            contiguous: False: the rings' pages lie scattered in RAM.
            max_packet: Largest incoming packet in bytes; None: the personality's.
            on_packet: See :attr:`GuestChannel.on_packet`.

        Raises:
            LocalProtocolError: It is open.
            HostRefusedError: The host refuses the GPADL or the opening.
            GuestPanic: It answers wrongly.
        """
        relid = offer.relid
        if relid in self.channels or relid in self._opening:
            raise LocalProtocolError(f"channel {relid} is open")
        personality = self.personality
        if target_vp is None:
            target_vp = self._choose_vp()
        incoming_pages = ring_pages if incoming_pages is None else incoming_pages
        pfns = self._ram.allocate(ring_pages + incoming_pages, contiguous=contiguous)
        outgoing = OutRing(
            self._ram.page(pfns[0]),
            Span(self._ram.views(pfns[1:ring_pages])),
            personality,
            self._panic,
        )
        incoming = InRing(
            self._ram.page(pfns[ring_pages]),
            Span(self._ram.views(pfns[ring_pages + 1 :])),
            personality,
            self._panic,
            max_packet=personality.max_packet if max_packet is None else max_packet,
        )
        channel = GuestChannel(
            offer=offer,
            personality=personality,
            panic=self._panic,
            outgoing=outgoing,
            incoming=incoming,
            signal=partial(self._doorbells.ring, offer, target_vp, self.version),
            target_vp=target_vp,
        )
        channel.on_packet = on_packet
        self._opening[relid] = channel
        try:
            try:
                gpadl = self._rings[relid] = await self.create_gpadl(relid, pfns)
            except HostRefusedError:
                self._ram.free(pfns)
                raise
            status = await self._open(channel, gpadl, ring_pages, user_data)
        finally:
            self._opening.pop(relid, None)
            self._changed.unpark_all()
        if status:
            await self.teardown_gpadl(self._rings.pop(relid))
            self._ram.free(pfns, poison=True)
            raise HostRefusedError(f"OPENCHANNEL {relid}", status)
        return channel

    async def _open(
        self, channel: GuestChannel, gpadl: Gpadl, ring_pages: int, user_data: bytes
    ) -> int:
        """Post OPENCHANNEL; return the status in its answer."""
        relid = channel.relid
        if relid in self._rescinded:
            raise gone()
        open_id = 0 if self.personality.open_id_zero else relid
        signals = bool(self.features & _SIGNALS)
        message = OpenChannel(
            relid=relid,
            open_id=open_id,
            ring_gpadl=gpadl.handle,
            target_vp=channel.target_vp,
            downstream_page_offset=ring_pages,
            user_data=user_data,
            connection_id=channel.offer.connection_id if signals else None,
            event_flag=relid if signals else None,
            open_flags=0 if signals else None,
        )
        reply = await self._mailbox.request([message], OpenChannelResult, relid, open_id)
        assert isinstance(reply, OpenChannelResult)
        if (reply.relid, reply.open_id) != (relid, open_id):
            self._panic(f"{reply}: the answer to relid {relid}, open id {open_id} was due")
        return reply.status

    def _choose_vp(self) -> int:
        # freebsd/sys/dev/hyperv/vmbus/vmbus_chan.c, vmbus_chan_cpu_set: before 2.4 only CPU 0 is
        # supported, because OPENCHANNEL cannot name another.
        if not self.personality.spreads_vps or (self.version or Version.V2_4) < Version.V2_4:
            return 0
        vps = self._processors.vps
        self._next_vp += 1
        return vps[(self._next_vp - 1) % len(vps)]

    async def close_channel(self, channel: GuestChannel) -> None:
        """Close a channel and take its rings back; does nothing if it is not open. A checkpoint.

        The ring pages are poisoned: see :meth:`vmbus.guest.ram.Ram.dirty_poison`.
        """
        await trio.lowlevel.checkpoint()
        relid = channel.relid
        if self.channels.get(relid) is not channel:
            return
        del self.channels[relid]
        gpadl = self._rings.pop(relid)
        channel.end(trio.ClosedResourceError("the channel is closed"))
        await self._mailbox.post(CloseChannel(relid=relid))
        if self.personality.frees_before_teardown:
            self._ram.free(gpadl.pfns)
        await self.teardown_gpadl(gpadl)
        if not self.personality.frees_before_teardown:
            self._ram.free(gpadl.pfns, poison=True)

    async def modify_channel(self, channel: GuestChannel, vp: int) -> None:
        """Have another VP interrupted; waits for the answer from 5.3 on. A checkpoint.

        Raises:
            LocalProtocolError: The version in force is below 4.1.
            HostRefusedError: The host does not want to.
        """
        message = ModifyChannel(relid=channel.relid, target_vp=vp)
        channel.vps.add(vp)
        if self.version is not None and self.version >= Version.V5_3:
            reply = await self._mailbox.request([message], ModifyChannelResponse, channel.relid)
            assert isinstance(reply, ModifyChannelResponse)
            if reply.status:
                raise HostRefusedError("MODIFYCHANNEL", reply.status)
        else:
            await self._mailbox.post(message)
        channel.target_vp = vp

    def announced(self, vp: int, flags: Sequence[int]) -> list[GuestChannel]:
        """Return the channels that event flags of a VP stand for. Cannot block.

        Raises:
            GuestPanic: A flag on the wrong VP, or, if the personality is strict, one of a channel
                that was never open.
        """
        relids = flags
        if self.version is not None and self.version < Version.V2_4 and 0 in flags:
            relids = [*flags[1:], *self._doorbells.take_interrupt_page()]
        found = []
        strict = self.personality.strict_flags
        for relid in relids:
            channel = self.channels.get(relid)
            if channel is None and not strict:
                channel = self._opening.get(relid)
            if channel is None:
                if strict and relid not in self._once_open:
                    self._panic(f"event flag {relid}: the channel is not open")
                self.spurious_flags += 1
                continue
            if vp not in channel.vps:
                self._panic(f"event flag {relid} on VP {vp} instead of {channel.target_vp}")
            found.append(channel)
        return found


def gone() -> trio.BrokenResourceError:
    """Return the error of a rescinded channel."""
    return trio.BrokenResourceError("the host has rescinded the channel")

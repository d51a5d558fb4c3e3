"""One open channel's task: make the rings, run the device, clean up.

The order of events matters to guests, and this is where it is kept:

1. The doorbell exists before OPENCHANNEL_RESULT goes out, so that no early signal is lost.
2. OPENCHANNEL_RESULT is in the guest's message slot before the first event flag is set: UEFI does
   not tolerate a flag for a channel it does not consider open.
3. After CLOSECHANNEL no ring is written and no flag is set.
4. The engine hears that the channel is closed only when the device has let go of guest memory;
   GPADL_TORNDOWN and UNLOAD_RESPONSE wait for that.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import trio

from vmbus.engine import events
from vmbus.errors import AttachError, GuestProtocolError, leaves
from vmbus.host.buffer import GpadlLease
from vmbus.host.channel import Channel
from vmbus.host.device import Device, Retargetable
from vmbus.host.doorbells import InterruptPageCall, SilentCall
from vmbus.host.services import Services
from vmbus.partition.transport import Call, Doorbell
from vmbus.ring import RingMemory, RingReader, RingWriter

_log = logging.getLogger("vmbus.channel")


class ChannelRunner:
    """Serves one channel from OPENCHANNEL to the end.

    Args:
        bus: Whose channel it is.
        event: What the guest asked for.
        device: What the channel was offered for; None if that has left the bus.
        primary: Who serves the primary channel, if this is a sub-channel.
        done: Told when nothing of the channel touches guest memory any more; cannot block.

    Attributes:
        channel: The channel while it is served, else None.
        served: Set when the device has returned; a primary channel's only.
        finished: Set when nothing of the channel is left.
        ring_lease: Keeps the guest from getting the ring's pages back.
        refused: The engine waits to hear that the channel could not be opened.
        closed_by_guest: The engine waits to hear that the channel is closed.
    """

    def __init__(
        self,
        bus: Services,
        event: events.ChannelOpen,
        device: Device | None,
        *,
        primary: ChannelRunner | None,
        done: Callable[[ChannelRunner], None],
    ) -> None:
        self.bus = bus
        self._primary = primary
        self._done = done
        self.event = event
        self.device = device
        # The ring's pages are in use until all of this is over, whatever the guest asks for.
        self.ring_lease = bus.leases.take(event.key, event.gpadl)
        self.channel: Channel | None = None
        self.finished = trio.Event()
        self.refused = False
        self.closed_by_guest = False
        self.served = trio.Event()
        self._closing = trio.Event()
        self._opening = trio.CancelScope()
        self._starting = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._cut_off = ""
        self._unpaused = trio.Event()
        if not bus.paused:
            self._unpaused.set()

    # -- for the bus -----------------------------------------------------------------------------

    def close(self) -> None:
        """The guest has closed the channel or lost it. Cannot block."""
        self.closed_by_guest = True
        self.stop()

    def stop(self) -> None:
        """End the channel, without the engine being told. Idempotent. Cannot block."""
        if not self._closing.is_set():
            self._scope.deadline = trio.current_time() + self.bus.config.close_grace
        self._closing.set()
        self._unpaused.set()
        self._starting.cancel()
        if self.channel is not None:
            self.channel.end()
        self._opening.cancel()

    def retarget(self, vp: int) -> None:
        """Interrupt another VP. Cannot block."""
        if self.channel is not None:
            self.channel.retarget(vp)
            if isinstance(self.device, Retargetable):
                self.device.retarget(self.channel)

    def hold(self) -> None:
        """Begin nothing any more; :meth:`pause` waits for what has begun. Cannot block."""
        if self._unpaused.is_set() and not self._closing.is_set():
            self._unpaused = trio.Event()
        if self.channel is not None:
            self.channel.stand_still()

    async def pause(self) -> None:
        """Wait until nothing is in flight and guest memory is not touched. Is a checkpoint."""
        self.hold()
        if self.channel is not None:
            await self.channel.pause()
        if self._closing.is_set():
            # The rings are left alone, but the device may have transfers in flight.
            await self.finished.wait()

    async def drain(self) -> None:
        """Take no more requests, and wait until all answers are in the ring. Is a checkpoint."""
        if self.channel is not None:
            with contextlib.suppress(GuestProtocolError):
                await self.channel.drain()

    def cut_off(self, reason: str) -> None:
        """Do without the device, which does not do its part. Cannot block."""
        self._cut_off = reason
        self._scope.cancel()

    def resume(self) -> None:
        """Serve again. Cannot block."""
        self._unpaused.set()
        if self.channel is not None:
            self.channel.resume()

    # -- the task --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the channel. Never raises but Cancelled."""
        try:
            await self._run()
        finally:
            self.finished.set()
            self._done(self)

    async def _run(self) -> None:
        event = self.event
        transport = self.bus.transport
        port: Doorbell | None = None
        channel: Channel | None = None
        try:
            try:
                if event.incoming_by_page:
                    await self.bus.need_shared_doorbell()
                else:
                    with self._opening:
                        port = await transport.add_event_port(event.connection_id, 0)
                await self._wait_for_turn()
                if not self._closing.is_set():
                    channel = self._make_channel(port)
            except (GuestProtocolError, AttachError, OSError) as error:
                self.bus.report_fault(f"cannot be opened: {error}", event.relid)
            except trio.BrokenResourceError:
                _log.debug("%s: gone while channel %d opened", transport.name, event.relid)
            if channel is None:
                # The guest hears of it when the port is gone too, since it may then try again.
                self.refused = True
            else:
                await self._serve(channel)
        finally:
            self.channel = None
            if channel is not None:
                channel.end()
                self._end_leases()
                channel.close_doorbell()
                channel.release_rings()
                self.bus.observers.channel_ended(channel)
            if port is not None:
                await self._remove_port()

    async def _wait_for_turn(self) -> None:
        """Wait until this channel may map its rings, which may have thousands of pages."""
        while True:
            async with self.bus.leases.turn:
                if self._unpaused.is_set():
                    return
            await self._unpaused.wait()

    def _end_leases(self) -> None:
        left = self.bus.leases.end_channel(self.event.key, but=self.ring_lease)
        if left and self.bus.failure_log.spend():
            _log.error(
                "%s: channel %d: its device has returned without releasing %d GPADL(s)",
                self.bus.transport.name,
                self.event.relid,
                left,
            )

    async def _remove_port(self) -> None:
        transport = self.bus.transport
        try:
            # A VMM that does not answer holds up nobody else's end.
            with trio.move_on_after(self.bus.config.close_grace, shield=True):
                await transport.remove_event_port(self.event.connection_id, 0)
        except (AttachError, trio.BrokenResourceError) as error:
            # Whatever the VMM makes of it, we do not listen any more.
            if self.bus.life_log.spend():
                _log.info(
                    "%s: event port of channel %d: %s", transport.name, self.event.relid, error
                )

    def _make_channel(self, port: Doorbell | None) -> Channel:
        event = self.event
        memory = self.bus.transport.memory
        incoming_pfns, outgoing_pfns = event.gpadl.ring_pages(event.downstream_page_offset)
        channel = Channel(
            self,
            relid=event.relid,
            offer=event.offer,
            subchannel_index=event.subchannel_index,
            version=event.version,
            memory=memory,
            open_user_data=event.user_data,
            target_vp=event.target_vp,
            reader=RingReader(RingMemory(memory, incoming_pfns)),
            writer=RingWriter(RingMemory(memory, outgoing_pfns)),
            doorbell=port,
            call=self._make_call(),
            max_outstanding=self.bus.config.max_outstanding,
            longest_look=self.bus.config.longest_look,
        )
        channel.observe(self.bus.observers)
        return channel

    def _make_call(self) -> Call:
        event = self.event
        if event.target_vp is None:
            return SilentCall()
        transport = self.bus.transport
        sint = self.bus.sint
        if event.outgoing_by_page:
            return InterruptPageCall(
                self.bus.interrupt_page,
                event.relid,
                transport.open_call(event.target_vp, sint, 0),
            )
        return transport.open_call(event.target_vp, sint, event.event_flag)

    async def _serve(self, channel: Channel) -> None:
        event = self.event
        bus = self.bus
        # Before the guest hears that the channel is open: it may ask for another VP at once.
        self.channel = channel
        bus.observers.channel_opened(channel)
        bus.engine.open_done(event.key, ok=True)
        bus.pump()
        with self._starting:
            await bus.deliveries.wait_delivered()
        if self._closing.is_set():
            channel.end()
        if event.monitor_id is not None:
            bus.monitor.add(event.monitor_id, channel, event.offer.monitor_latency or 0)
        if bus.life_log.spend():
            _log.info(
                "%s: channel %d.%d open, version %s",
                bus.transport.name,
                event.relid,
                event.subchannel_index,
                event.version,
            )
        try:
            if event.primary_key == event.key:
                await self._run_device(channel)
            else:
                await self._lend(channel)
        finally:
            if event.monitor_id is not None:
                bus.monitor.remove(event.monitor_id)

    async def _run_device(self, channel: Channel) -> None:
        """A primary channel: the device's life is this task."""
        reason = "the device stopped serving"
        try:
            with self._scope:
                if self.device is not None:
                    await self.device.run(channel)
        except Exception as error:
            reason = self._explain(error)
        finally:
            self.served.set()
        if not self._closing.is_set():
            await self._give_up(self._cut_off or reason)

    def _explain(self, error: Exception) -> str:
        """Say in a line why the device gave up; log what is our fault and not the guest's."""
        causes = leaves(error)
        guilty = [cause for cause in causes if isinstance(cause, GuestProtocolError)]
        if guilty:
            return str(guilty[0])
        stopped = all(isinstance(cause, trio.EndOfChannel) for cause in causes)
        if not stopped and self.bus.failure_log.spend():
            _log.error(
                "%s: channel %d: the device failed",
                self.bus.transport.name,
                self.event.relid,
                exc_info=error,
            )
        return "the device failed"

    async def _lend(self, channel: Channel) -> None:
        """A sub-channel: it belongs to the device task of its primary."""
        primary = self._primary
        if primary is not None and primary.channel is not None:
            primary.channel.deliver_subchannel(channel)
            async with trio.open_nursery() as nursery:

                async def device_over() -> None:
                    await primary.served.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(device_over)
                with self._scope:
                    await channel.wait_released()
                    nursery.cancel_scope.cancel()
                if self._scope.cancelled_caught:
                    # Only a device that has been stopped has let go of guest memory for sure.
                    primary.cut_off(f"the device does not let go of channel {self.event.relid}")
        channel.end()
        await self._closing.wait()

    async def _give_up(self, reason: str) -> None:
        """Nobody serves the channel any more: tell the guest, and wait for it to close."""
        if self.channel is not None:
            self.channel.end()
        self.bus.channel_failed(self.event, reason)
        await self._closing.wait()

    # -- vmbus.host.channel_host.ChannelHost -----------------------------------------------------

    def offer_subchannels(self, count: int) -> None:
        """See :meth:`vmbus.host.channel_host.ChannelHost.offer_subchannels`."""
        try:
            self.bus.engine.offer_subchannels(self.event.key, count)
        finally:
            self.bus.pump()

    def lease_gpadl(self, handle: int) -> GpadlLease:
        """See :meth:`vmbus.host.channel_host.ChannelHost.lease_gpadl`."""
        return self.bus.leases.take(self.event.key, self.bus.gpadl(self.event.key, handle))

    def complain(self, text: str) -> None:
        """See :meth:`vmbus.host.channel_host.ChannelHost.complain`."""
        self.bus.report_fault(text, self.event.relid)

"""One life of a device that answers requests: all its channels, served in batches.

The loop that every such device has, written once: one long-lived task per channel, which drains
its ring, has the device act on the batch, and writes all answers with one commit. A device says
only what to do with a batch::

    async def run(self, primary):
        await Life(primary, self.serve_batch).run()

A request that has to wait gets a task in the nursery that comes with its batch; the life of a
channel ends when those tasks have. It is one of the channel's undertakings meanwhile
(:mod:`vmbus.host.undertakings`).

Channels of one guest take turns in one loop, and one that has a single request waits for what the
others do in theirs. So the more of them have their rings full, the less each does in a turn.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from vmbus.errors import GuestProtocolError, leaves
from vmbus.host.channel import Channel
from vmbus.host.undertakings import DEVICE_LOAD, Load
from vmbus.ring import Packet
from vmbus.workers import work_for

ServeBatch = Callable[[Channel, list[Packet], trio.Nursery], int | None]
"""Acts on packets that came in together: answers them with :meth:`Channel.complete`, or starts
tasks in the nursery that will, and flush. Cannot block. Returns how many it has acted on, at least
one, if it has done enough for one turn of the loop; the rest comes again when others have had
theirs. None: all."""

BATCH = 256
"""Packets that a channel is given in a turn, if no other one of the device has more than it gets.
"""
MOST_PARTS = 4
"""Into how many parts a turn is divided at most: what a batch costs beside its packets is shared by
the fewer, the smaller it is."""


class Life:
    """Serves the primary channel of a device, and every sub-channel that the guest opens.

    Args:
        primary: The primary channel; the bus's.
        serve_batch: What to do with packets.
        opened: Called with each channel before its first batch; cannot block.
        closed: Called with each when it has ended, before its rings are given up; cannot block.

    Attributes:
        parts: By how much each channel is to do less in a turn than if it was the only one that
            has more to do than a turn is for.
    """

    def __init__(
        self,
        primary: Channel,
        serve_batch: ServeBatch,
        *,
        opened: Callable[[Channel], None] = lambda channel: None,
        closed: Callable[[Channel], None] = lambda channel: None,
    ) -> None:
        self.primary = primary
        self._serve_batch = serve_batch
        self._opened = opened
        self._closed = closed
        self._nursery: trio.Nursery | None = None
        self._load = Load(DEVICE_LOAD)
        self._busy: set[Channel] = set()
        """Channels that had more to do, when they were last served, than a turn was for."""
        self.parts = 1

    async def run(self) -> None:
        """Serve until the primary ends. Is a checkpoint.

        When it returns, all tasks of all channels have ended: no transfer touches guest memory any
        more.

        Raises:
            RingError: A ring of the primary is corrupt; that of a sub-channel costs only itself.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._accept, nursery)
            try:
                await self._serve(self.primary)
            finally:
                self._nursery = None  # it takes no more tasks when the last one has ended
            nursery.cancel_scope.cancel()

    def flush_soon(self) -> None:
        """Have what is queued on the primary written in a task of this life. Cannot block.

        For packets that no request has asked for: whoever causes them must not suffer from a full
        or corrupt ring.
        """
        if self._nursery is not None:
            self._nursery.start_soon(self.primary.flush)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                channel = await self.primary.accept_subchannel()
            except trio.EndOfChannel:
                return
            nursery.start_soon(self._serve_subchannel, channel)

    async def _serve_subchannel(self, channel: Channel) -> None:
        try:
            await self._serve(channel)
        except* GuestProtocolError as errors:
            # Its ring is corrupt. The life goes on with the other channels.
            channel.complain(str(leaves(errors)[0]))
        finally:
            await channel.aclose()

    async def _serve(self, channel: Channel) -> None:
        """Serve one channel until it ends, then wait for the tasks it has under way."""
        # One guest has one memory, whatever controllers it has.
        work_for(channel.memory, channel)
        channel.undertakings.load.part_of(self._load)
        self._opened(channel)
        try:
            await self._serve_batches(channel)
        finally:  # a guest can open and close a sub-channel for ever
            self._closed(channel)
            channel.undertakings.load.part_of(None)
            self._is_busy(channel, busy=False)

    def _is_busy(self, channel: Channel, *, busy: bool) -> None:
        if busy is not (channel in self._busy):
            (self._busy.add if busy else self._busy.discard)(channel)
            self.parts = min(max(len(self._busy), 1), MOST_PARTS)

    async def _serve_batches(self, channel: Channel) -> None:
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    most = BATCH // self.parts
                    packets = await channel.receive_batch(most)
                    done = self._serve_batch(channel, packets, nursery)
                    busy = len(packets) >= most
                    if done is not None and done < len(packets):
                        # A batch is bounded in packets, and a packet may mean a lot of work.
                        channel.put_back(packets[done:])
                        busy = True
                    self._is_busy(channel, busy=busy)
                    if not channel.try_flush():
                        await channel.flush()
            except trio.EndOfChannel:
                # Tasks of this nursery still own guest pages; leaving the block waits for them.
                return

"""Doorbells in shared pages: the monitor page, and the interrupt page of old guests.

Both are bit arrays that the guest sets with locked instructions and the host has to clear. CPython
has no locked instructions, so a plain read and clear could lose a bit that is set in between. The
bits are therefore taken as a hint for a whole group: whenever any bit of a word is found set, the
word is cleared, a fence follows, and *every* open channel of that word looks at its ring. A bit
lost between the read and the clear belongs to a channel whose packets were in its ring before, so
the look finds them; a bit set after the clear is found by the next poll.

Setting bits for the guest is easier: the guest only clears them, and we are the only ones who set
them. A plain read-modify-write can at worst set a bit again that the guest has just cleared, which
is a spurious event and harmless.

Sources: linux/drivers/hv/channel.c (vmbus_setevent), linux/drivers/hv/connection.c
(vmbus_set_event, vmbus_connect), linux/include/linux/hyperv.h (struct hv_monitor_page).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import trio

from vmbus.errors import GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.memory import PAGE_SHIFT, GuestMemory, full_fence
from vmbus.partition.transport import Call, Doorbell, Transport
from vmbus.wire.messages import CONNECTION_EVENTS
from vmbus.wire.monitor import GROUP_BITS, GROUP_COUNT, pending_word

TICKS_PER_SECOND = 10_000_000
"""Monitor latencies count ticks of 100 ns."""
MIN_INTERVAL = 50e-6
"""Seconds; trio cannot wake much more often, and a guest must not make it try."""
HALF_PAGE = 2048
"""The interrupt page: host-to-guest bits first, then the guest-to-host ones."""


class MonitorPage:
    """The guest's trigger page, polled while a monitored channel is open."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._words: memoryview | None = None
        self._gpa = 0
        self._channels: dict[int, tuple[Channel, int]] = {}
        self._changed = trio.Event()
        self._held = False
        self.polls = 0
        """Looks at the page so far."""
        self.hits = 0
        """Looks that found a bit."""

    def use(self, gpa: int | None) -> None:
        """Poll the page at ``gpa`` (bytes) from now on, or none. Cannot block."""
        if self._words is not None:
            self._words.release()
            self._words = None
        if gpa is not None:
            self._gpa = gpa
            try:
                self._words = self._memory.page(gpa >> PAGE_SHIFT).cast("I")
            except GuestProtocolError:
                # The engine checks the page; it may have been unplugged since. Without it the
                # channels fall back on hypercalls, which monitored guests also understand.
                self._words = None
        self._changed.set()

    def forget(self, gpa: int, size: int) -> None:
        """Let go of the page if it lies in ``size`` bytes from ``gpa`` on. Cannot block."""
        if self._words is not None and gpa <= self._gpa < gpa + size:
            self.use(None)

    def add(self, monitor_id: int, channel: Channel, latency: int) -> None:
        """Serve ``channel`` from bit ``monitor_id``; ``latency`` in 100 ns ticks."""
        self._channels[monitor_id] = (channel, latency)
        self._changed.set()

    def remove(self, monitor_id: int) -> None:
        """The channel is closed. Cannot block."""
        del self._channels[monitor_id]

    def hold(self) -> None:
        """The partition is paused: do not poll until :meth:`flow`. Cannot block."""
        self._held = True

    def flow(self) -> None:
        """Undo :meth:`hold`. Cannot block."""
        self._held = False
        self._changed.set()

    def scan(self) -> bool:
        """Look once; wake the channels of every group with a bit set. Cannot block."""
        words = self._words
        if words is None:
            return False
        self.polls += 1
        found = False
        for group in range(GROUP_COUNT):
            word = pending_word(group)
            if words[word]:
                words[word] = 0
                full_fence()
                found = True
                for monitor_id, (channel, _) in self._channels.items():
                    if monitor_id // GROUP_BITS == group:
                        channel.poke()
        self.hits += found
        return found

    async def run(self) -> None:
        """Poll for ever, at the shortest latency asked for; sleep while there is no need."""
        while True:
            if self._held or self._words is None or not self._channels:
                self._changed = trio.Event()
                await self._changed.wait()
                continue
            self.scan()
            ticks = min(latency for _, latency in self._channels.values())
            await trio.sleep(max(ticks / TICKS_PER_SECOND, MIN_INTERVAL))


class InterruptPage:
    """The interrupt page of guests before 2.4: one bit for each relid and direction."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._bytes: memoryview | None = None
        self._gpa = 0

    def use(self, gpa: int | None) -> None:
        """Take the page at ``gpa`` (bytes) from now on, or none. Cannot block."""
        if self._bytes is not None:
            self._bytes.release()
            self._bytes = None
        if gpa is not None:
            self._gpa = gpa
            try:
                self._bytes = self._memory.page(gpa >> PAGE_SHIFT)
            except GuestProtocolError:
                self._bytes = None

    def forget(self, gpa: int, size: int) -> None:
        """Let go of the page if it lies in ``size`` bytes from ``gpa`` on. Cannot block."""
        if self._bytes is not None and gpa <= self._gpa < gpa + size:
            self.use(None)

    def set_bit(self, relid: int) -> None:
        """Set the host-to-guest bit of ``relid``. Cannot block."""
        if self._bytes is not None:
            self._bytes[relid >> 3] |= 1 << (relid & 7)

    def scan(self, channels: Callable[[], list[Channel]]) -> None:
        """The shared doorbell rang: clear the guest-to-host half and wake who may be meant."""
        if self._bytes is not None:
            half = self._bytes[HALF_PAGE:]
            for index, value in enumerate(bytes(half)):
                if value:
                    half[index] = 0
            full_fence()
        for channel in channels():
            channel.poke()


class InterruptPageCall:
    """A call for guests before 2.4: a bit in the interrupt page, then event flag 0."""

    def __init__(self, page: InterruptPage, relid: int, call: Call) -> None:
        self._page = page
        self._relid = relid
        self._call = call

    def signal(self) -> None:
        """See :meth:`vmbus.partition.transport.Call.signal`."""
        self._page.set_bit(self._relid)
        self._call.signal()

    def retarget(self, vp: int) -> None:
        """See :meth:`vmbus.partition.transport.Call.retarget`."""
        self._call.retarget(vp)

    def close(self) -> None:
        """See :meth:`vmbus.partition.transport.Call.close`."""
        self._call.close()


class SilentCall:
    """A call for channels opened with interrupts off."""

    def signal(self) -> None:
        """The guest polls."""

    def retarget(self, vp: int) -> None:
        """There is nothing to move."""

    def close(self) -> None:
        """There is nothing to close."""


class SharedDoorbell:
    """Connection id 2, the doorbell of all channels of a 0.13 guest.

    Args:
        transport: Has the port.
        page: Says which channels are meant.
        channels: Returns those that are open.
        running: Waits while the partition is paused.
    """

    def __init__(
        self,
        transport: Transport,
        page: InterruptPage,
        channels: Callable[[], list[Channel]],
        running: Callable[[], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._page = page
        self._channels = channels
        self._running = running
        self._lock = trio.Lock()
        self._port: Doorbell | None = None

    async def open(self, nursery: trio.Nursery) -> None:
        """Serve it from now on, in a task of ``nursery``. Idempotent. Is a checkpoint.

        Raises:
            AttachError: The VMM refused.
            trio.BrokenResourceError: The partition is gone.
        """
        async with self._lock:
            if self._port is None:
                self._port = await self._transport.add_event_port(CONNECTION_EVENTS, 0)
                nursery.start_soon(self._serve, self._port.fd)

    async def _serve(self, fd: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            await self._running()
            self._page.scan(self._channels)

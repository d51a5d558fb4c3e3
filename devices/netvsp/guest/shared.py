"""What the parts of the network driver share: its buffers, numbers of slots, counters."""

from __future__ import annotations

import dataclasses
from heapq import heappop, heappush

from vmbus.guest import Gpadl, Guest
from vmbus.guest.ring import Span
from vmbus.wire.gpa import PAGE_SIZE


@dataclasses.dataclass(slots=True)
class Counters:
    """What an adapter has done so far."""

    sent: int = 0
    """Frames that the device has completed."""
    sent_bytes: int = 0
    failed: int = 0
    """Frames that it has completed with another status than success."""
    received: int = 0
    """Frames, coalesced ones counting once."""
    received_bytes: int = 0
    dropped: int = 0
    """Frames that nobody has taken in time."""
    late: int = 0
    """Frames that came after the packet filter was cleared, and were dropped."""
    packets: int = 0
    """Packets with frames or other RNDIS messages in the receive buffer."""
    completed: int = 0
    """Of these, how many were completed."""


class SharedBuffer:
    """The receive or the send buffer: pages that the device may use for as long as it has them.

    Args:
        guest: Whose memory it is.
        relid: The primary channel.
        size: Bytes, rounded up to whole pages.
        contiguous: False scatters the pages over the RAM.

    Raises:
        MemoryError: The guest has no pages left.
    """

    def __init__(self, guest: Guest, relid: int, size: int, *, contiguous: bool) -> None:
        pages = -(-size // PAGE_SIZE)
        self.size = pages * PAGE_SIZE
        self.gpadl: Gpadl | None = None
        self._guest = guest
        self._relid = relid
        self._pfns = guest.ram.allocate(pages, contiguous=contiguous)
        self._bytes = Span(guest.ram.views(self._pfns))

    async def describe(self) -> None:
        """Describe the pages to the host, if that is still to be done. A checkpoint.

        Raises:
            HostRefusedError: The host does not want them.
        """
        if self.gpadl is None:
            self.gpadl = await self._guest.connection.create_gpadl(self._relid, self._pfns)

    async def take_back(self) -> None:
        """Take the pages back from the host, and poison them. A checkpoint."""
        if self.gpadl is None:
            return
        gpadl, self.gpadl = self.gpadl, None
        await self._guest.connection.teardown_gpadl(gpadl)
        self._guest.ram.free(self._pfns, poison=True)

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out, once. Cannot block."""
        return self._bytes.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in. Cannot block."""
        self._bytes.write(offset, data)


class Slots:
    """Numbers from 0 on, of which the lowest free one is given first.

    Args:
        count: How many there are; None: as many as are asked for.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int | None:
        """Return a number that is not in use, or None. Cannot block."""
        if self._free:
            return heappop(self._free)
        if self._next == self.count:
            return None
        self._next += 1
        return self._next - 1

    def give(self, number: int) -> None:
        """Take a number back. Cannot block."""
        heappush(self._free, number)

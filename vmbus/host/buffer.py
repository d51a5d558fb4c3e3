"""GPADLs that a device uses: the ring of its channel, and buffers that it shares with the guest.

A guest that wants its pages back sends GPADL_TEARDOWN and may reuse them as soon as it has
GPADL_TORNDOWN (Linux frees the receive buffer of a NIC right then: netvsc_teardown_recv_gpadl). So
whoever holds views of a GPADL holds a :class:`GpadlLease`, and the answer waits until the last
lease is released, whichever came first, the teardown or the end of the channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from vmbus.gpadl import Gpadl
from vmbus.memory import GuestMemory, total_length, window

TEARDOWNS_AT_ONCE = 128
"""GPADLs that are taken back in one turn of the loop."""

Key = tuple[int, int]
"""The engine's key of the channel, and the guest's handle."""


class GpadlLease:
    """Leave to use a GPADL's pages; made by :meth:`vmbus.host.Channel.lease_gpadl`.

    ::

        lease = channel.lease_gpadl(handle)
        lease.on_teardown = stop_using_it      # calls lease.release(), now or later

    Attributes:
        gpadl: The page list.
        torn_down: Set when the guest wants the pages back.
        on_teardown: Called then, once; cannot block.
    """

    def __init__(
        self, gpadl: Gpadl, memory: GuestMemory, released: Callable[[GpadlLease], None]
    ) -> None:
        self.gpadl = gpadl
        self.torn_down = trio.Event()
        self.on_teardown: Callable[[], None] | None = None
        self._memory = memory
        self._released: Callable[[GpadlLease], None] | None = released
        self._views: list[memoryview] | None = None

    @property
    def held(self) -> bool:
        """Whether the pages may be used still."""
        return self._released is not None

    def views(self) -> list[memoryview]:
        """Return the GPADL's bytes, in order, neighbouring pages joined. Cannot block.

        The views belong to the lease: nobody uses them after :meth:`release`.

        Raises:
            GuestProtocolError: A page is not memory, or not writable.
        """
        if self._views is None:
            self._views = self.gpadl.views(self._memory)
        return self._views

    def window(self, offset: int, length: int) -> list[memoryview]:
        """Return ``length`` bytes of the GPADL from byte ``offset`` on, uncopied. Cannot block.

        Returns:
            Views of guest memory; shorter in total if the GPADL ends before.

        Raises:
            GuestProtocolError: A page is not memory, or not writable.
        """
        return window(self.views(), offset, length)

    @property
    def size(self) -> int:
        """Bytes of the GPADL, as far as they are memory."""
        return total_length(self.views())

    def release(self) -> None:
        """Give the pages up: nothing touches them from here on. Idempotent. Cannot block."""
        released, self._released = self._released, None
        views, self._views = self._views, None
        for view in views or ():
            view.release()
        if released is not None:
            released(self)

    def tear_down(self) -> None:
        """The guest wants the pages back. Idempotent; for the bus. Cannot block."""
        if self.held and not self.torn_down.is_set():
            self.torn_down.set()
            if self.on_teardown is not None:
                self.on_teardown()


class Leases:
    """The leases of one bus, and the teardowns that wait for them.

    Args:
        memory: The guest's.
        released: Called with key and handle when a torn down GPADL is free; cannot block.
        nursery: Where teardowns are done that are too many for one turn of the loop. Without one
            all are done at once.

    Attributes:
        turn: Held by whoever is about to make views of a whole GPADL, which may have thousands of
            pages: one in a turn of the loop.
    """

    def __init__(
        self,
        memory: GuestMemory,
        released: Callable[[int, int], None],
        nursery: trio.Nursery | None = None,
    ) -> None:
        self.turn = trio.Lock()
        self._nursery = nursery
        self._lately = 0
        self._later: deque[Key] = deque()
        self._memory = memory
        self._released = released
        self._held: dict[Key, list[GpadlLease]] = {}
        self._waiting: set[Key] = set()

    def __len__(self) -> int:
        """Leases that are held."""
        return sum(map(len, self._held.values()))

    def take(self, key: int, gpadl: Gpadl) -> GpadlLease:
        """Make a lease. Cannot block."""
        place = (key, gpadl.handle)

        def released(lease: GpadlLease) -> None:
            held = self._held[place]
            held.remove(lease)
            if not held:
                del self._held[place]
                if place in self._waiting:
                    self._waiting.discard(place)
                    self._released(*place)

        lease = GpadlLease(gpadl, self._memory, released)
        self._held.setdefault(place, []).append(lease)
        return lease

    def tear_down(self, key: int, handle: int) -> None:
        """The guest wants a GPADL back; ``released`` follows, perhaps at once. Cannot block.

        A guest that leaves may have thousands. After some of them the rest is left to a task.
        """
        if self._nursery is None or (not self._later and self._lately < TEARDOWNS_AT_ONCE):
            self._lately += 1
            self._tear_down(key, handle)
            return
        if not self._later:
            self._nursery.start_soon(self._tear_down_later)
        self._later.append((key, handle))

    async def _tear_down_later(self) -> None:
        self._lately = 0
        while self._later:
            await trio.lowlevel.checkpoint()
            for _ in range(min(TEARDOWNS_AT_ONCE, len(self._later))):
                self._tear_down(*self._later.popleft())

    def _tear_down(self, key: int, handle: int) -> None:
        place = (key, handle)
        held = self._held.get(place)
        if held is None:
            self._released(key, handle)
            return
        self._waiting.add(place)
        for lease in tuple(held):
            lease.tear_down()

    def end_channel(self, key: int, *, but: GpadlLease | None = None) -> int:
        """The device has returned: end the leases it has left. Cannot block.

        Args:
            key: The channel.
            but: One that goes on.

        Returns:
            How many there were; a device that is right leaves none.
        """
        left = [
            lease
            for place, held in self._held.items()
            if place[0] == key
            for lease in held
            if lease is not but
        ]
        for lease in left:
            lease.release()
        return len(left)

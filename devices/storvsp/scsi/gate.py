"""The gate in front of a medium: many commands at once, or one alone.

COMPARE AND WRITE reads, compares and writes as one indivisible operation as far as other commands
can tell (SBC-3 4.27), and its steps wait for the disk in between. Commands that wait for the disk
pass the gate in shared mode, the indivisible ones in exclusive mode. Commands served without
waiting cannot interleave with anything, so they need not pass; they only check :attr:`Gate.closed`.
"""

from __future__ import annotations

from collections.abc import Callable

import trio


class Gate:
    """A shared/exclusive lock on the trio thread.

    A waiting exclusive user holds up new shared ones.

    Args:
        changed: Called whenever :attr:`closed` has changed.
    """

    __slots__ = ("_changed", "_lot", "_shared", "_waiting", "closed")

    def __init__(self, changed: Callable[[], None]) -> None:
        self.closed = False
        """True while a command is alone inside."""
        self._changed = changed
        self._lot = trio.lowlevel.ParkingLot()
        self._shared = 0
        self._waiting = 0

    async def acquire(self, *, exclusive: bool) -> None:
        """Pass the gate. A checkpoint only if it has to wait."""
        if not exclusive:
            while self.closed or self._waiting:
                await self._lot.park()
            self._shared += 1
            return
        self._waiting += 1
        try:
            while self.closed or self._shared:
                await self._lot.park()
            self.closed = True
        finally:
            self._waiting -= 1
            if not self.closed:  # cancelled: let those in that were held up by us
                self._lot.unpark_all()
        self._changed()

    def release(self, *, exclusive: bool) -> None:
        """Leave; the same mode as :meth:`acquire`. Cannot block."""
        if exclusive:
            self.closed = False
            self._changed()
        else:
            self._shared -= 1
        self._lot.unpark_all()

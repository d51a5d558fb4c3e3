"""The gate in front of a medium: many commands at once, or one alone.

COMPARE AND WRITE reads, compares and writes as one indivisible operation as far as other commands
can tell (SBC-3 4.27), and its steps wait for the disk in between. Commands that wait for the disk
pass the gate in shared mode, the indivisible ones in exclusive mode. Commands served without
waiting cannot interleave with anything, so they need not pass; they only check :attr:`Gate.closed`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import trio


class Gate:
    """A shared/exclusive lock on the trio thread. First come, first served.

    Args:
        changed: Called whenever :attr:`closed` has changed.
    """

    __slots__ = ("_changed", "_queue", "_shared", "closed")

    def __init__(self, changed: Callable[[], None]) -> None:
        self.closed = False
        """True while a command is alone inside."""
        self._changed = changed
        self._shared = 0
        self._queue: collections.OrderedDict[trio.Event, bool] = collections.OrderedDict()

    async def acquire(self, *, exclusive: bool) -> None:
        """Pass the gate. A checkpoint only if it has to wait."""
        if not self._queue and self._free(exclusive=exclusive):
            self._enter(exclusive=exclusive)
            return
        turn = trio.Event()
        self._queue[turn] = exclusive
        try:
            await turn.wait()  # whoever wakes us has let us in
        except trio.Cancelled:
            if turn in self._queue:
                del self._queue[turn]
                self._admit()  # those that were held up by us
            else:  # whoever left has let us in, after we had been cancelled
                self.release(exclusive=exclusive)
            raise

    def release(self, *, exclusive: bool) -> None:
        """Leave; the same mode as :meth:`acquire`. Cannot block."""
        if exclusive:
            self.closed = False
            self._changed()
        else:
            self._shared -= 1
        self._admit()

    def _free(self, *, exclusive: bool) -> bool:
        return not self.closed and not (exclusive and self._shared)

    def _enter(self, *, exclusive: bool) -> None:
        if exclusive:
            self.closed = True
            self._changed()
        else:
            self._shared += 1

    def _admit(self) -> None:
        """Let in whoever is first, and all shared ones that are behind without one in between."""
        while self._queue:
            turn, exclusive = next(iter(self._queue.items()))
            if not self._free(exclusive=exclusive):
                return
            del self._queue[turn]
            self._enter(exclusive=exclusive)
            turn.set()

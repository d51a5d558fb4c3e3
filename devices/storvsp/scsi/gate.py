"""The gate in front of a medium: many commands at once, or one alone.

COMPARE AND WRITE reads, compares and writes as one indivisible operation as far as other commands
can tell (SBC-3 4.27), and its steps wait for the disk in between. Commands that wait for the disk
pass the gate in shared mode, the indivisible ones in exclusive mode. Commands served without
waiting cannot interleave with anything, so they need not pass; they only check :attr:`Gate.closed`.

A guest can have thousands of commands wait here, and each COMPARE AND WRITE takes its time. So
guests take turns, and the channels of one: whoever sends one command waits for one of each other.
And commands are let in some at a time, so that not all of them go on in the same turn of the loop.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Final

import trio

ENTER_AT_ONCE: Final = 16
"""Commands that have been let in and have not gone on yet."""


class Gate:
    """A shared/exclusive lock on the trio thread. First come, first served, of each in turn.

    Args:
        changed: Called whenever :attr:`closed` has changed.
    """

    __slots__ = ("_changed", "_entering", "_queues", "_shared", "closed")

    def __init__(self, changed: Callable[[], None]) -> None:
        self.closed = False
        """True while a command is alone inside."""
        self._changed = changed
        self._shared = 0
        self._entering = 0
        self._queues: collections.OrderedDict[
            Hashable, collections.OrderedDict[trio.Event, bool]
        ] = collections.OrderedDict()
        """Who waits, by whose they are; whose turn is next first. None is empty."""

    async def acquire(self, *, exclusive: bool, whose: Hashable = None) -> None:
        """Pass the gate. A checkpoint only if it has to wait.

        Args:
            exclusive: Alone, or beside others.
            whose: Who takes turns with others.
        """
        if not self._queues and self._free(exclusive=exclusive):
            self._enter(exclusive=exclusive)
            return
        turn = trio.Event()
        self._queues.setdefault(whose, collections.OrderedDict())[turn] = exclusive
        try:
            await turn.wait()  # whoever wakes us has let us in
        except trio.Cancelled:
            queue = self._queues.get(whose, ())
            if turn in queue:
                self._take(whose, turn)
                self._admit()  # those that were held up by us
            else:  # whoever left has let us in, after we had been cancelled
                self._entering -= 1
                self.release(exclusive=exclusive)
            raise
        self._entering -= 1
        self._admit()

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

    def _take(self, whose: Hashable, turn: trio.Event) -> None:
        queue = self._queues[whose]
        del queue[turn]
        if not queue:
            del self._queues[whose]

    def _admit(self) -> None:
        """Let in whoever is first, and the shared ones that are behind without one in between."""
        while self._queues and self._entering < ENTER_AT_ONCE:
            whose, queue = next(iter(self._queues.items()))
            turn, exclusive = next(iter(queue.items()))
            if not self._free(exclusive=exclusive):
                return
            self._queues.move_to_end(whose)
            self._take(whose, turn)
            self._enter(exclusive=exclusive)
            self._entering += 1
            turn.set()

"""The gate in front of a medium: many commands at once, or one alone.

COMPARE AND WRITE reads, compares and writes as one indivisible operation as far as other commands
can tell (SBC-3 4.27), and its steps wait for the disk in between. Commands that wait for the disk
pass the gate in shared mode, the indivisible ones in exclusive mode. Commands served without
waiting cannot interleave with anything, so they need not pass; they only ask :meth:`Gate.bars`.

It is about what commands have in common only: who reads here need not wait for who compares and
writes there. Where a command acts is said in sections of the medium, of which there are
:data:`SECTIONS`, each with every 64th run of 2 048 blocks; a set of them is the bits of an
integer (:func:`sections`), so that thousands of commands are compared with few operations.

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
SECTION_SHIFT: Final = 11
"""A section has runs of 2 048 blocks: 1 MiB, mostly."""
SECTIONS: Final = 64
EVERYWHERE: Final = (1 << SECTIONS) - 1
"""All sections."""


def sections(lba: int, blocks: int) -> int:
    """Return the sections that a range of the medium is in, as the bits of an integer.

    Args:
        lba: First block.
        blocks: How many; none are in no section.
    """
    if not blocks:
        return 0
    first = lba >> SECTION_SHIFT
    count = ((lba + blocks - 1) >> SECTION_SHIFT) - first + 1
    if count >= SECTIONS:
        return EVERYWHERE
    bits = ((1 << count) - 1) << (first % SECTIONS)
    return (bits & EVERYWHERE) | bits >> SECTIONS


class Gate:
    """A shared/exclusive lock on the trio thread. First come, first served, of each in turn.

    Args:
        changed: Called whenever :attr:`closed` has changed.
    """

    __slots__ = ("_alone", "_changed", "_entering", "_queues", "_shared", "_wanted", "closed")

    def __init__(self, changed: Callable[[], None]) -> None:
        self.closed = False
        """True while a command is alone inside, or several are in sections of their own."""
        self._changed = changed
        self._alone = 0
        """The sections of those."""
        self._shared: collections.Counter[int] = collections.Counter()
        """Sections: how many are inside that act there, beside others."""
        self._wanted: collections.Counter[int] = collections.Counter()
        """Sections: how many wait that want to be alone there."""
        self._entering = 0
        self._queues: collections.OrderedDict[
            Hashable, collections.OrderedDict[trio.Event, tuple[bool, int]]
        ] = collections.OrderedDict()
        """Who waits, by whose they are; whose turn is next first. None is empty."""

    def bars(self, where: int) -> bool:
        """Whether somebody is alone in one of the sections ``where``. Cannot block."""
        return bool(self._alone & where)

    async def acquire(
        self, *, exclusive: bool, whose: Hashable = None, where: int = EVERYWHERE
    ) -> None:
        """Pass the gate. A checkpoint only if it has to wait.

        Args:
            exclusive: Alone, or beside others.
            whose: Who takes turns with others.
            where: The sections it is about.
        """
        behind = self._queues if exclusive else any(each & where for each in self._wanted)
        if not behind and self._free(exclusive, where):
            self._enter(exclusive, where)
            return
        turn = trio.Event()
        self._queues.setdefault(whose, collections.OrderedDict())[turn] = exclusive, where
        if exclusive:
            self._wanted[where] += 1
        try:
            await turn.wait()  # whoever wakes us has let us in
        except trio.Cancelled:
            queue = self._queues.get(whose, ())
            if turn in queue:
                self._take(whose, turn)
                self._admit()  # those that were held up by us
            else:  # whoever left has let us in, after we had been cancelled
                self._entering -= 1
                self.release(exclusive=exclusive, where=where)
            raise
        self._entering -= 1
        self._admit()

    def release(self, *, exclusive: bool, where: int = EVERYWHERE) -> None:
        """Leave; the same as for :meth:`acquire`. Cannot block."""
        if exclusive:
            self._alone &= ~where
            self._close()
        else:
            _count_down(self._shared, where)
        self._admit()

    def _free(self, exclusive: bool, where: int) -> bool:
        return not self._alone & where and not (
            exclusive and any(each & where for each in self._shared)
        )

    def _enter(self, exclusive: bool, where: int) -> None:
        if exclusive:
            self._alone |= where  # nobody else's: it was free
            self._close()
        else:
            self._shared[where] += 1

    def _close(self) -> None:
        closed = bool(self._alone)
        if closed != self.closed:
            self.closed = closed
            self._changed()

    def _take(self, whose: Hashable, turn: trio.Event) -> None:
        queue = self._queues[whose]
        exclusive, where = queue.pop(turn)
        if exclusive:
            _count_down(self._wanted, where)
        if not queue:
            del self._queues[whose]

    def _admit(self) -> None:
        """Let in whoever is first, and the shared ones that are behind without one in between."""
        while self._queues and self._entering < ENTER_AT_ONCE:
            whose, queue = next(iter(self._queues.items()))
            turn, (exclusive, where) = next(iter(queue.items()))
            if not self._free(exclusive, where):
                return
            self._queues.move_to_end(whose)
            self._take(whose, turn)
            self._enter(exclusive, where)
            self._entering += 1
            turn.set()


def _count_down(counter: collections.Counter[int], where: int) -> None:
    counter[where] -= 1
    if not counter[where]:
        del counter[where]

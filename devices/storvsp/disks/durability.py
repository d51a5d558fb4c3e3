"""What becomes of a promise to make data last when the kernel could not keep one.

A failed ``fdatasync`` is reported once per open file, and by then the kernel may have marked the
pages clean that it could not write: the next one has nothing to do and succeeds, over data that is
on no medium (linux/Documentation/core-api/errseq.rst; lib/errseq.c). So after the first failure
nothing that is written through the page cache can be promised again, for as long as the file is
open. The way back is to open it anew, knowing that what was written before may be lost.

``O_DIRECT`` goes by the page cache: what fails there fails where it was asked for, and says nothing
about other data.

A promise that is abandoned, because the call that was to keep it does not come back, counts as one
that failed: nobody would hear of it.

Flushes are shared: each is about everything that was written before, so all that are asked for
while one is under way are answered by the next one. They may be thousands, all of one guest, so
they are not all woken at once.
"""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from storvsp.disk import MediumError
from storvsp.disks.linux import SyncError
from vmbus.workers import AbandonedError

T = TypeVar("T")

WAKE_AT_ONCE: Final = 32
"""Of those who share a flush; each of them wakes another one."""


class _Flush:
    """One flush, of all those who had asked for it when it began."""

    def __init__(self) -> None:
        self.ended = False
        self.error: Exception | None = None
        self.waiting = trio.lowlevel.ParkingLot()
        """Who is woken before the end is to make it."""


class Durability:
    """Whether data can still be made to last, of one open file.

    Args:
        cached: The file is written through the page cache.
    """

    def __init__(self, *, cached: bool) -> None:
        self._cached = cached
        self._numbers = itertools.count()
        self._under_way: dict[int, None] = {}  # in the order of their beginnings
        self._waiting: collections.deque[tuple[int, trio.Event]] = collections.deque()
        self._next = _Flush()
        self._flushing = False
        """Whether somebody makes a flush, or has been woken to do so."""
        self.lost = ""
        """Why it cannot, in the kernel's words; empty as long as it can."""

    def check(self) -> None:
        """Raise MediumError if nothing can be promised any more. Cannot block."""
        if self.lost:
            raise MediumError(
                f"an earlier flush failed ({self.lost}), and the kernel may have dropped what it "
                "could not write; the disk has to be opened anew"
            )

    async def promise(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await ``make()``, which makes data last. A checkpoint if that is one.

        The kernel tells only one of several callers that run side by side. So a success counts
        when those that were under way then have ended well, too.

        Raises:
            MediumError: This promise, or one before it, could not be kept.
            SyncError: As ``make`` raises it.
        """
        if not self._cached:
            return await make()
        self.check()
        number = next(self._numbers)
        self._under_way[number] = None
        try:
            made = await make()
        except (SyncError, AbandonedError) as error:
            self.lost = error.strerror or str(error)
            raise
        finally:
            del self._under_way[number]
            self._wake()
        last = next(self._numbers)  # all that began before have a lower one
        if self._oldest(last) < last:
            ended = trio.Event()
            self._waiting.append((last, ended))
            await ended.wait()
        self.check()
        return made

    async def flush(self, make: Callable[[], Awaitable[None]]) -> None:
        """Make everything last that was written before, together with others. A checkpoint.

        One of those who wait awaits ``make()``; if it is cancelled before that has done anything,
        another one does.

        Raises:
            MediumError: As :meth:`promise`.
            SyncError: As ``make`` raises it, to each of those who shared the flush.
        """
        mine = self._next
        if self._flushing:
            await mine.waiting.park()
        if mine.ended:
            mine.waiting.unpark()
            if mine.error is not None:
                raise copy.copy(mine.error) from mine.error
            return
        self._flushing = True
        if self._next is mine:  # who comes from now on may have written since
            self._next = _Flush()
        try:
            await self.promise(make)
            mine.ended = True
        except Exception as error:
            mine.ended, mine.error = True, error
            raise
        finally:
            self._hand_over(mine)

    def _hand_over(self, made: _Flush) -> None:
        """Wake those whose flush was made, if it was, and one that makes the next one."""
        if made.ended:
            made.waiting.unpark(count=WAKE_AT_ONCE)
        for flush in (made, self._next):
            # Whoever is woken makes it, even if cancelled meanwhile: then it comes back here.
            if not flush.ended and flush.waiting.unpark():
                return
        self._flushing = False

    def _oldest(self, default: int) -> int:
        return next(iter(self._under_way), default)

    def _wake(self) -> None:
        """Wake those whose predecessors have all ended: the first of the queue, no others."""
        waiting = self._waiting
        while waiting and self._oldest(waiting[0][0]) >= waiting[0][0]:
            waiting.popleft()[1].set()

"""What becomes of a promise to make data last when the kernel could not keep one.

A failed ``fdatasync`` is reported once per open file, and by then the kernel may have marked the
pages clean that it could not write: the next one has nothing to do and succeeds, over data that is
on no medium (linux/Documentation/core-api/errseq.rst; lib/errseq.c). So after the first failure
nothing that is written through the page cache can be promised again, for as long as the file is
open. The way back is to open it anew, knowing that what was written before may be lost.

``O_DIRECT`` goes by the page cache: what fails there fails where it was asked for, and says nothing
about other data.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from storvsp.disk import MediumError
from storvsp.disks.linux import SyncError

T = TypeVar("T")


class Durability:
    """Whether data can still be made to last, of one open file.

    Args:
        cached: The file is written through the page cache.
    """

    def __init__(self, *, cached: bool) -> None:
        self._cached = cached
        self._under_way: dict[object, None] = {}
        self._ended = trio.lowlevel.ParkingLot()
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
        key = object()
        self._under_way[key] = None
        try:
            made = await make()
        except SyncError as error:
            self.lost = error.strerror or str(error)
            raise
        finally:
            del self._under_way[key]
            self._ended.unpark_all()
        others = list(self._under_way)
        while any(other in self._under_way for other in others):
            await self._ended.park()
        self.check()
        return made

"""The disk as the commands of a unit see it: one that keeps their pace, and may be stopped.

Every call that may wait is one action of a command: it does not begin while the guest is paused or
when its channel is over, and a pause waits for it. Long ones are made in pieces.

A back-end that has no room left fails the command, or, if the operator wants that (``on-error=
stop``), stops the disk: commands are kept until the operator has made room and says "go on"; then
they are tried again. A guest with a thin image does not see a broken disk then, only a slow one.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from storvsp.disk import Buffers, Disk, DiskInfo, Extent, NoSpaceError, divide_ranges
from storvsp.scsi.pace import current_pace, may_act, step
from vmbus.host.waking import Waiting

T = TypeVar("T")

logger = logging.getLogger("storvsp")

ZERO_PIECE: Final = 16 << 20
"""Bytes zeroed by one call: a back-end without better means writes them."""
UNMAP_PIECE: Final = 1 << 30
"""Bytes unmapped by one call."""


class Medium(Disk):
    """A disk behind a unit.

    Args:
        disk: What is behind it; stays the caller's.
        changed: Called when it has been stopped, or goes on; cannot block.

    Attributes:
        disk: As given.
        name: What operators call it.
        stops: Stop when there is no room left, instead of failing commands.
        stopped: Why it has been stopped; empty while it runs.
        full: Calls that found no room.
    """

    def __init__(self, disk: Disk, changed: Callable[[], None] = lambda: None) -> None:
        self.disk = disk
        self.name = ""
        self.stops = False
        self.stopped = ""
        self.full = 0
        self._changed = changed
        self._waiting = Waiting()

    def go_on(self) -> bool:
        """Try again what has been kept, some of it in each turn of the loop. Cannot block.

        Returns:
            Whether it was stopped.
        """
        if not self.stopped:
            return False
        self.stopped = ""
        self._waiting.wake()
        logger.warning("%s: goes on", self.name)
        self._changed()
        return True

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Make several calls one action, which a pause does not come in between."""
        pace = current_pace()
        await may_act()
        await pace.enter()
        try:
            yield
        finally:
            pace.leave()

    async def _act(self, make: Callable[[], Awaitable[T]]) -> T:
        pace = current_pace()
        while True:
            while self.stopped:
                await pace.rest(self._waiting.wait)
            await may_act()
            if self.stopped:
                continue
            await pace.enter()
            try:
                return await make()
            except NoSpaceError as error:
                if not self.no_space(error):
                    raise
            finally:
                pace.leave()

    def no_space(self, error: NoSpaceError) -> bool:
        """Take note that there was no room. Cannot block.

        Returns:
            Whether the call is to be made again, when the disk goes on.
        """
        self.full += 1
        if self.stops:
            if not self.stopped:
                cause = error.__cause__
                self.stopped = (isinstance(cause, OSError) and cause.strerror) or str(error)
                self._waiting.stop()
                logger.warning(
                    "%s: %s; stopped until 'vmbus disk continue'", self.name, self.stopped
                )
                self._changed()
            return True
        count = self.full
        while not count % 10:
            count //= 10
        if count == 1:  # of a guest that goes on writing, the 1st, 10th, 100th...
            logger.warning("%s: %s (request %d that found no room)", self.name, error, self.full)
        return False

    @property
    def info(self) -> DiskInfo:
        return self.disk.info

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return not self.stopped and self.disk.try_readv(offset, buffers)

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        if self.stopped:
            return False
        try:
            return self.disk.try_writev(offset, buffers, fua=fua)
        except NoSpaceError as error:
            if self.no_space(error):
                return False
            raise

    async def readv(self, offset: int, buffers: Buffers) -> None:
        await self._act(partial(self.disk.readv, offset, buffers))

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        await self._act(partial(self.disk.writev, offset, buffers, fua=fua))

    async def flush(self) -> None:
        await self._act(self.disk.flush)

    async def unmap(self, offset: int, length: int) -> None:
        await self.unmap_many([(offset, length)])

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        for piece in divide_ranges(ranges, UNMAP_PIECE):
            await step()
            if len(piece) == 1:
                await self._act(partial(self.disk.unmap, *piece[0]))
            else:
                await self._act(partial(self.disk.unmap_many, piece))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        for start in range(offset, offset + length, ZERO_PIECE):
            if start > offset:
                await step()
            size = min(ZERO_PIECE, offset + length - start)
            await self._act(partial(self.disk.write_zeroes, start, size, may_unmap=may_unmap))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self._act(partial(self.disk.extents, offset, length))

    async def look_again(self) -> None:
        await self._act(self.disk.look_again)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return self.disk.watch(changed)

    async def aclose(self) -> None:
        """Leave the disk to its owner."""

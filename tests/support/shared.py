"""A shared disk with its keeper, and units of guests at the other ends of its lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import trio

from storvsp.disk import Disk
from storvsp.shared import Keeper, SharedUnit
from vmbus.plugins.sharing import Line, make_line

STAGING = 1 << 20
NAME = bytes(range(16))


class Kept:
    """A keeper at work."""

    def __init__(self, keeper: Keeper, nursery: trio.Nursery) -> None:
        self.keeper = keeper
        self.nursery = nursery

    def line(self, guest: str, staging: int = STAGING) -> Line:
        """A guest's end of a new line, whose staging descriptor is closed with the block."""
        ours, theirs = make_line(staging)
        self.nursery.start_soon(self.keeper.serve, ours, guest, "x")
        assert theirs.staging_fd is not None
        self._descriptors.append(theirs.staging_fd)
        return theirs

    _descriptors: list[int]


@contextlib.asynccontextmanager
async def kept(disk: Disk) -> AsyncIterator[Kept]:
    """Keep a disk for the length of the block; lines have to end before."""
    keeper = Keeper(disk, NAME)
    async with trio.open_nursery() as nursery:
        made = Kept(keeper, nursery)
        made._descriptors = []
        yield made
        nursery.cancel_scope.cancel()
    await keeper.aclose()
    for fd in made._descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


class Visitor(SharedUnit):
    """A shared unit; ``other`` is the keeper's end if there is no keeper."""

    other: Line
    news = 0


@contextlib.asynccontextmanager
async def visitor(
    keeper: Kept | None, guest: str, *, staging: int = STAGING
) -> AsyncIterator[Visitor]:
    """A guest's unit, known to its keeper, for the length of the block."""
    ours, theirs = make_line(staging)
    if keeper is not None:
        keeper.nursery.start_soon(keeper.keeper.serve, theirs, guest, "x")

    assert ours.staging_fd is not None
    assert theirs.staging_fd is not None

    def changed() -> None:
        unit.news += 1

    unit = Visitor(ours.sock, ours.staging_fd, luns=lambda: (0, 3), changed=changed, source="x")
    unit.other = theirs
    if keeper is not None:
        await unit.known.wait()
    try:
        yield unit
    finally:
        unit.close()
        if keeper is None:
            theirs.sock.close()
            os.close(theirs.staging_fd)
        with trio.CancelScope(shield=True):
            await unit.ended()
            await trio.lowlevel.checkpoint()

"""A disk on top of another disk."""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

from collections.abc import Callable, Sequence

from storvsp.disk import Buffers, Disk, DiskInfo, Extent


class DiskWrapper(Disk):
    """Passes every call on to another disk; derive and override what should differ.

    Who overrides :meth:`unmap` overrides :meth:`unmap_many` as well: each is passed on as it is.

    Closing the wrapper closes the disk below.

    Args:
        base: The disk below, owned from now on.
    """

    def __init__(self, base: Disk) -> None:
        self.base = base

    @property
    def info(self) -> DiskInfo:
        return self.base.info

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return self.base.try_readv(offset, buffers)

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        return self.base.try_writev(offset, buffers, fua=fua)

    async def readv(self, offset: int, buffers: Buffers) -> None:
        # The fast form first: whoever calls the slow form may have been told "no" by an override
        # of ours, and the disk below may well be ready.
        if not self.base.try_readv(offset, buffers):
            await self.base.readv(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        if not self.base.try_writev(offset, buffers, fua=fua):
            await self.base.writev(offset, buffers, fua=fua)

    async def flush(self) -> None:
        await self.base.flush()

    async def unmap(self, offset: int, length: int) -> None:
        await self.base.unmap(offset, length)

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        await self.base.unmap_many(ranges)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        await self.base.write_zeroes(offset, length, may_unmap=may_unmap)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.base.extents(offset, length)

    async def look_again(self) -> None:
        await self.base.look_again()

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return self.base.watch(changed)

    async def aclose(self) -> None:
        await self.base.aclose()

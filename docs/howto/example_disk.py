"""``concat:SPEC+SPEC+...``: several disks, one behind the other, as one.

The worked example of ``write-a-disk.md``: what a split image (``disk.001``, ``disk.002``, ...)
needs. The parts are separated by ``+``, so their own specifications must not contain one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from storvsp.disk import (
    Buffers,
    Disk,
    DiskInfo,
    DiskUnavailableError,
    Extent,
    ReadOnlyError,
)
from storvsp.disks.buffers import check_range, merge_extents
from storvsp.disks.specs import DiskSpec, open_disk
from vmbus.errors import ConfigError
from vmbus.memory import total_length, window


class ConcatDisk(Disk):
    """Several disks, one behind the other.

    Args:
        parts: The disks, owned from now on; all with the same sector size.
    """

    def __init__(self, parts: Sequence[Disk]) -> None:
        infos = [part.info for part in parts]
        if len({info.sector_size for info in infos}) != 1:
            raise ConfigError("concat needs disks, all with the same sector size")
        self._parts = parts
        self._closed = False
        read_only = any(info.read_only for info in infos)
        unmap = all(info.supports_unmap for info in infos) and not read_only
        self._info = DiskInfo(
            size=sum(info.size for info in infos),
            sector_size=infos[0].sector_size,
            physical_sector_size=max(info.physical_sector_size for info in infos),
            read_only=read_only,
            supports_unmap=unmap,
            unmap_granularity=max(info.unmap_granularity for info in infos),
            unmapped_reads_zero=unmap and all(info.unmapped_reads_zero for info in infos),
            write_cache=any(info.write_cache for info in infos),
        )

    @property
    def info(self) -> DiskInfo:
        """What all parts have in common."""
        return self._info

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Disk, int, int, int]]:
        """Cut a range at the borders: (part, offset in it, offset in the request, bytes)."""
        if self._closed:
            raise DiskUnavailableError("the disk is closed")
        check_range(offset, length, self._info.size)
        start = 0
        for part in self._parts:
            size = max(0, min(length - start, part.info.size - offset))
            if size:
                yield part, offset, start, size
                start += size
            offset = max(0, offset - part.info.size)

    def _check_writable(self) -> None:
        if self._info.read_only:
            raise ReadOnlyError("one of the parts is read-only")

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        """Read inline if every part concerned can."""
        return all(
            part.try_readv(at, window(buffers, start, size))
            for part, at, start, size in self._pieces(offset, total_length(buffers))
        )

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        """Write inline if one part is concerned and can: half a write would be worse than none."""
        self._check_writable()
        pieces = list(self._pieces(offset, total_length(buffers)))
        if len(pieces) != 1:
            return False
        part, at, _, _ = pieces[0]
        return part.try_writev(at, buffers, fua=fua)

    async def readv(self, offset: int, buffers: Buffers) -> None:
        """Read from one part after the other."""
        for part, at, start, size in self._pieces(offset, total_length(buffers)):
            piece = window(buffers, start, size)
            if not part.try_readv(at, piece):
                await part.readv(at, piece)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        """Write to one part after the other."""
        self._check_writable()
        for part, at, start, size in self._pieces(offset, total_length(buffers)):
            piece = window(buffers, start, size)
            if not part.try_writev(at, piece, fua=fua):
                await part.writev(at, piece, fua=fua)

    async def flush(self) -> None:
        """Flush all parts."""
        if self._closed:
            raise DiskUnavailableError("the disk is closed")
        for part in self._parts:
            await part.flush()

    async def unmap(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._check_writable()
        for part, at, _, size in self._pieces(offset, length):
            await part.unmap(at, size)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Pass the request on: a part may have a shortcut."""
        self._check_writable()
        for part, at, _, size in self._pieces(offset, length):
            await part.write_zeroes(at, size, may_unmap=may_unmap)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Ask the parts, and move their answers to where they are in the whole.

        A part may tell less than it was asked about, and then that is all that we tell.
        """
        found: list[Extent] = []
        for part, at, start, size in self._pieces(offset, length):
            shift = offset + start - at
            told = await part.extents(at, size)
            found += [
                Extent(extent.offset + shift, extent.length, extent.mapped) for extent in told
            ]
            if told[-1].offset + told[-1].length < at + size:
                break
        return merge_extents(found)

    async def aclose(self) -> None:
        """Close all parts."""
        self._closed = True
        async with contextlib.AsyncExitStack() as stack:
            for part in self._parts:
                stack.push_async_callback(part.aclose)


async def open_spec(spec: DiskSpec) -> ConcatDisk:
    """Open ``concat:SPEC+SPEC+...``."""
    spec.reader().finish()
    async with contextlib.AsyncExitStack() as stack:
        parts = []
        for text in spec.target.split("+"):
            part = await open_disk(text)
            stack.push_async_callback(part.aclose)
            parts.append(part)
        disk = ConcatDisk(parts)
        stack.pop_all()
    return disk

"""``ram:SIZE``: a disk in memory, sparse, gone when it is closed.

``ram:64M``, ``ram:[sector=4096]1T``. Logical and physical sectors have 512 and 4096 bytes, as those
of most disks; ``ram:[physical=512]64M`` is like an old one. Memory is taken in chunks of 64 KiB
when they are first written, and given back when a chunk is unmapped or holds nothing but zeros
after a trim; a terabyte disk costs what was written to it. Every transfer is served inline: there
is nothing to wait for. What a guest can ask for by the gigabyte, to free it, is done in steps.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Callable, Iterator

import trio

from storvsp.disk import (
    EXTENTS_AT_ONCE,
    Buffers,
    Disk,
    DiskInfo,
    DiskUnavailableError,
    Extent,
    NoSpaceError,
)
from storvsp.disks.buffers import check_range, merge_extents
from storvsp.disks.specs import DiskSpec
from vmbus.errors import ConfigError
from vmbus.memory import total_length
from vmbus.plugins.options import Option
from vmbus.watchers import Watchers

CHUNK = 1 << 16
"""Bytes that are allocated, and freed, together."""

MAX_SIZE = 1 << 62
"""Bytes; as far as the offsets of other disks go."""

_SHIFT = 16
_GROUP_SHIFT = 6
GROUP = 1 << _GROUP_SHIFT
"""Chunks of one mapping, and what is freed in one step: 4 MiB, in less than a millisecond. From the
C library's heap all that was freed would go back to the kernel at once, whenever that happens."""

_MASK = CHUNK - 1
_ZERO_BYTES = bytes(CHUNK)
_ZEROS = memoryview(_ZERO_BYTES)

OPTIONS = (
    Option("sector", "logical sector in bytes", "512|4096", "512"),
    Option("physical", "physical sector in bytes, as guests are told", "512|4096", "4096"),
)


class _Group:
    """Memory for neighbouring chunks. It goes back to the kernel with the last view of it."""

    __slots__ = ("_mapping", "_view", "count")

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, GROUP << _SHIFT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._mapping)
        self.count = 0
        """Chunks in use."""
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._mapping.madvise(mmap.MADV_NOHUGEPAGE)  # which are larger than a chunk

    def chunk(self, index: int) -> memoryview:
        """Take a chunk that is not in use. It is all zeros, and takes no memory yet."""
        self.count += 1
        start = index % GROUP << _SHIFT
        return self._view[start : start + CHUNK]

    def free(self, index: int) -> None:
        """Give a chunk's memory back."""
        self.count -= 1
        start = index % GROUP << _SHIFT
        try:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, CHUNK)
        except OSError:  # this process keeps its memory locked
            self._view[start : start + CHUNK] = _ZEROS


class RamDisk(Disk):
    """A sparse disk in memory.

    Args:
        size: Capacity in bytes, a positive multiple of ``sector_size``.
        sector_size: Logical sector in bytes.
        physical_sector_size: In bytes, not smaller than the logical one.
    """

    def __init__(
        self, size: int, *, sector_size: int = 512, physical_sector_size: int = 4096
    ) -> None:
        self._info = DiskInfo(
            size=_checked(size, sector_size),
            sector_size=sector_size,
            physical_sector_size=physical_sector_size,
            supports_unmap=True,
            unmap_granularity=CHUNK,
            unmapped_reads_zero=True,
            write_cache=False,
        )
        self._size = size
        self._chunks: dict[int, memoryview] = {}
        self._groups: dict[int, _Group] = {}
        self._turn = trio.Lock()
        self._watchers = Watchers()
        self._closed = False

    @property
    def info(self) -> DiskInfo:
        return self._info

    @property
    def allocated(self) -> int:
        """Bytes of memory held by chunks."""
        return len(self._chunks) * CHUNK

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        if offset + total_length(buffers) > self._size:
            self._refuse(offset, total_length(buffers))
        chunks = self._chunks
        for buffer in buffers:
            length = len(buffer)
            start = offset & _MASK
            if start + length <= CHUNK:
                chunk = chunks.get(offset >> _SHIFT)
                if chunk is None:
                    buffer[:] = _ZEROS[:length]
                else:
                    buffer[:] = chunk[start : start + length]
            else:
                done = 0
                for index, begin, end in _pieces(offset, length):
                    chunk = chunks.get(index, _ZEROS)
                    buffer[done : done + end - begin] = chunk[begin:end]
                    done += end - begin
            offset += length
        return True

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        if offset + total_length(buffers) > self._size:
            self._refuse(offset, total_length(buffers))
        chunks = self._chunks
        for buffer in buffers:
            length = len(buffer)
            start = offset & _MASK
            if start + length <= CHUNK:
                chunk = chunks.get(offset >> _SHIFT)
                if chunk is None:
                    chunk = self._allocate(offset >> _SHIFT)
                chunk[start : start + length] = buffer
            else:
                done = 0
                for index, begin, end in _pieces(offset, length):
                    chunk = chunks.get(index)
                    if chunk is None:
                        chunk = self._allocate(index)
                    chunk[begin:end] = buffer[done : done + end - begin]
                    done += end - begin
            offset += length
        return True

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.try_readv(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        self.try_writev(offset, buffers, fua=fua)

    async def flush(self) -> None:
        if self._closed:
            self._refuse(0, 0)

    async def unmap(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            self._refuse(offset, length)
        for group in self._groups_of(offset, length):
            # One step of all that is under way in a turn of the loop, whoever asked for it.
            async with self._turn:
                for index, begin, end in self._allocated_in(group, offset, length):
                    self._clear(index, begin, end)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        # Memory that is not there reads as zeros, whether or not the guest wants it kept.
        await self.unmap(offset, length)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if offset + length > self._size:
            self._refuse(offset, length)
        extents: list[Extent] = []
        cursor = offset
        for group in self._groups_of(offset, length):
            for index, begin, end in self._allocated_in(group, offset, length):
                start = (index << _SHIFT) + begin
                extents.append(Extent(cursor, start - cursor, mapped=False))
                extents.append(Extent(start, end - begin, mapped=True))
                cursor = start + end - begin
            if len(extents) >= EXTENTS_AT_ONCE:
                return merge_extents(extents)
        extents.append(Extent(cursor, offset + length - cursor, mapped=False))
        return merge_extents(extents)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return self._watchers.add(changed)

    async def resize(self, size: int) -> None:
        """Change the capacity; what is cut off is gone, what is added reads as zeros.

        A checkpoint if anything is cut off that holds data.

        Args:
            size: Bytes, a positive multiple of the sector size.

        Raises:
            ConfigError: It is not.
        """
        _checked(size, self._info.sector_size)
        if self._closed:
            self._refuse(0, 0)
        old = self._size
        self._size = min(old, size)  # refuse what is about to go
        for group in self._groups_of(size, old - size):
            async with self._turn:
                for index, begin, end in self._allocated_in(group, size, old - size):
                    self._clear(index, begin, end)
        if self._closed:
            self._refuse(0, 0)
        self._size = size
        self._info = dataclasses.replace(self._info, size=size)
        self._watchers.notify()

    async def aclose(self) -> None:
        self._closed = True
        self._size = -1  # every range is outside now, at no cost to an open disk
        chunks, self._chunks = self._chunks, {}
        groups, self._groups = self._groups, {}
        while chunks:
            for _ in range(min(1024, len(chunks))):
                chunks.popitem()
            await trio.lowlevel.checkpoint()
        while groups:
            groups.popitem()
            await trio.lowlevel.checkpoint()

    def _allocate(self, index: int) -> memoryview:
        group = self._groups.get(index >> _GROUP_SHIFT)
        if group is None:
            try:
                group = _Group()
            except (OSError, MemoryError):
                raise NoSpaceError("no memory for the RAM disk", offset=index << _SHIFT) from None
            self._groups[index >> _GROUP_SHIFT] = group
        chunk = self._chunks[index] = group.chunk(index)
        return chunk

    def _clear(self, index: int, begin: int, end: int) -> None:
        """Make bytes of a chunk that is there zeros, and free it if nothing is left in it."""
        if end - begin < CHUNK:
            chunk = self._chunks[index]
            chunk[begin:end] = _ZEROS[: end - begin]
            if bytes(chunk) != _ZERO_BYTES:
                return
            del chunk
        del self._chunks[index]
        group = self._groups[index >> _GROUP_SHIFT]
        if group.count == 1:
            del self._groups[index >> _GROUP_SHIFT]
        else:
            group.free(index)

    def _groups_of(self, offset: int, length: int) -> list[int]:
        """The groups of a range that have chunks, in order."""
        if length <= 0:
            return []
        first = offset >> _SHIFT >> _GROUP_SHIFT
        last = (offset + length - 1) >> _SHIFT >> _GROUP_SHIFT
        if last - first < len(self._groups):
            return [group for group in range(first, last + 1) if group in self._groups]
        # Guests trim and query whole terabytes: look at what is there instead.
        return sorted(group for group in self._groups if first <= group <= last)

    def _allocated_in(self, group: int, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """As :func:`_pieces`, but only of chunks of one group that exist; in order."""
        start = max(offset, group << _GROUP_SHIFT << _SHIFT)
        end = min(offset + length, (group + 1) << _GROUP_SHIFT << _SHIFT)
        return (piece for piece in _pieces(start, end - start) if piece[0] in self._chunks)

    def _refuse(self, offset: int, length: int) -> None:
        if self._closed:
            raise DiskUnavailableError("the RAM disk is closed")
        check_range(offset, length, self._size)


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range at chunk borders: (chunk number, first byte in it, end in it)."""
    end = offset + length
    while offset < end:
        index = offset >> _SHIFT
        stop = min(end, (index + 1) << _SHIFT)
        yield index, offset & _MASK, stop - (index << _SHIFT)
        offset = stop


def _checked(size: int, sector_size: int) -> int:
    if size <= 0 or size % sector_size:
        raise ConfigError(
            f"a disk of {size} bytes is not a positive number of {sector_size}-byte sectors"
        )
    if size > MAX_SIZE:
        raise ConfigError(f"a disk of {size} bytes is larger than {MAX_SIZE}")
    return size


async def open_spec(spec: DiskSpec) -> RamDisk:
    """Open ``ram:[sector=512|4096,physical=512|4096]SIZE``."""
    options = spec.reader()
    sector_size = options.integer("sector", choices=(512, 4096)) or 512
    physical = options.integer("physical", choices=(512, 4096)) or 4096
    options.finish()
    if physical < sector_size:
        raise spec.error(f"physical={physical} is smaller than the logical sector")
    size = spec.size()
    try:
        return RamDisk(size, sector_size=sector_size, physical_sector_size=physical)
    except ConfigError as error:
        raise spec.error(str(error)) from None

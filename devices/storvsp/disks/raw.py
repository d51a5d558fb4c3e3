"""``raw:PATH``: an image file or a block device, byte for byte.

``raw:disk.img``, ``raw:[ro]base.img``, ``raw:[create=10G]new.img``, ``raw:[direct]/dev/sdb``.

Fast path
---------
Reads are tried on the caller's thread with ``RWF_NOWAIT``: a page-cache hit costs one system
call, a miss comes back at once and goes to a worker. In a memory file system (tmpfs, which does
not know the flag) a plain read or write never waits for a device, so both are always served
inline; memory that the host itself has swapped out is the exception we accept. Where the flag is
not supported otherwise, and with ``direct``, reads go to the workers. Writes into the page cache of
a file are made inline as long as they turn out to be quick, see :mod:`storvsp.disks.inline`; those
to block devices, with ``direct``, or with FUA go to the workers.

Size
----
A fragment behind the last whole sector is not part of the disk. Growth or shrinking from outside
is noticed by :meth:`RawDisk.check_resize`, by a flush, and by a read that meets the end.

Locking
-------
The file gets an open-file-description lock on all its bytes, exclusive unless ``ro``. QEMU's
image locks are shared ones of the same kind, so a running QEMU is noticed unless ``ro`` is given.
A block device is opened with ``O_EXCL`` besides, which the kernel refuses while it is mounted.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, TypeVarTuple

import trio

from storvsp.disk import (
    EXTENTS_AT_ONCE,
    Buffers,
    Disk,
    DiskInfo,
    DiskUnavailableError,
    Extent,
    OutOfRangeError,
    ReadOnlyError,
    disk_errors,
    divide_ranges,
)
from storvsp.disks import direct as direct_io, linux
from storvsp.disks.buffers import check_range, merge_extents
from storvsp.disks.durability import Durability
from storvsp.disks.inline import InlineWrites
from storvsp.disks.opening import identify, measure, oddities, open_file
from storvsp.disks.specs import DiskSpec
from vmbus.errors import ConfigError
from vmbus.memory import total_length
from vmbus.plugins.options import Option
from vmbus.plugins.remarks import remark
from vmbus.watchers import Watchers
from vmbus.workers import shared_pool

_log = logging.getLogger("storvsp")

UNMAP_STEP: Final = 1 << 30
"""Bytes that a worker frees in one go. It is waited for, whatever else the guest wants."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

OPTIONS = (
    Option("ro", "refuse writes; any number of readers may share the file"),
    Option("sector", "logical sector in bytes", "512|4096", "512, or the device's own"),
    Option(
        "create",
        "make a sparse file unless it exists; one that does keeps its size",
        "SIZE",
        "it has to exist",
    ),
    Option("direct", "bypass the host's page cache (O_DIRECT)"),
    Option("share", "take no lock, and mind nobody else's; not the same as `shared`"),
)


class RawDisk(Disk):
    """An open file or block device as a disk. Most callers want :meth:`open`.

    Must be made inside the trio run that uses it.

    Args:
        fd: Open descriptor, read-write unless ``read_only``; owned by the disk from the moment
            the constructor returns.
        read_only: Refuse writes.
        sector_size: Logical sector in bytes; None for 512, or a block device's own.
        direct: The descriptor has O_DIRECT.
        optical: A CD-ROM medium, removable.

    Raises:
        ConfigError: The file holds not one sector, or ``direct`` cannot work with this sector.
        OSError: The kernel refused to describe the file.
    """

    def __init__(
        self,
        fd: int,
        *,
        read_only: bool = False,
        sector_size: int | None = None,
        direct: bool = False,
        optical: bool = False,
    ) -> None:
        mode = os.fstat(fd).st_mode
        self._device = linux.block_device(fd) if stat.S_ISBLK(mode) else None
        if sector_size is None:
            sector_size = self._device.logical_sector_size if self._device else 512
        size = measure(fd, sector_size)
        if not size:
            hint = "" if read_only else "; create=SIZE makes a new one"
            raise ConfigError(f"the file is smaller than one sector{hint}")
        if direct:
            direct_io.probe(fd, size, sector_size)
        self._info = self._describe(fd, size, sector_size, read_only, optical)
        self._size = size
        self._direct = direct
        self._memory = not direct and self._device is None and linux.in_memory(fd)
        self._read_flags: int | None = None if direct else 0 if self._memory else os.RWF_NOWAIT
        # A block device's cache gives no such promise as a file's: its writes are often waited for.
        self._write_flags: int | None = None if direct or self._device else os.RWF_NOWAIT
        if self._memory:
            self._write_flags = 0
        self._durability = Durability(cached=not direct)
        self._inline = InlineWrites()
        self._watchers = Watchers()
        self._closed = False
        self._ends: dict[object, int] = {}  # of the writes that workers have under way
        self._written = trio.lowlevel.ParkingLot()
        self._workers = shared_pool()
        self._fd = fd

    def _describe(
        self, fd: int, size: int, sector_size: int, read_only: bool, optical: bool
    ) -> DiskInfo:
        device = self._device
        info = DiskInfo(
            size=size,
            sector_size=sector_size,
            physical_sector_size=max(sector_size, 2048 if optical else 4096),
            read_only=read_only,
            removable=optical,
            optical=optical,
            write_cache=not read_only,
            identity=identify(fd),
        )
        if device is not None:
            return dataclasses.replace(
                info,
                physical_sector_size=max(sector_size, device.physical_sector_size),
                rotational=device.rotational,
                supports_unmap=device.discards and not read_only,
                unmap_granularity=device.discard_granularity,
                # What a block device reads after a discard is up to the device.
            )
        # A hole behind the end of the file changes nothing, but shows whether holes can be made.
        if read_only or not linux.punch_hole(fd, os.fstat(fd).st_size, 4096):
            return info
        return dataclasses.replace(
            info,
            supports_unmap=True,
            unmap_granularity=os.fstat(fd).st_blksize,
            unmapped_reads_zero=True,
        )

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        sector_size: int | None = None,
        direct: bool = False,
        create: int | None = None,
        share: bool = False,
        optical: bool = False,
    ) -> RawDisk:
        """Open an image file or block device. A checkpoint.

        Args:
            path: The file.
            read_only: Refuse writes; open the file for reading only.
            sector_size: Logical sector in bytes; None for 512, or a block device's own.
            direct: Bypass the page cache.
            create: Make a sparse file of that many bytes if there is none.
            share: Take no lock.
            optical: A CD-ROM medium, removable.

        Raises:
            ConfigError: The file cannot be used like that; the message says why and what to do.
        """
        name = os.fspath(path)
        pool = shared_pool()
        try:
            # A started call is not abandoned, so the descriptor always arrives here.
            fd = await pool.run(
                functools.partial(
                    open_file,
                    name,
                    read_only=read_only,
                    sector_size=sector_size or 512,
                    direct=direct,
                    create=create,
                    share=share,
                )
            )
            try:
                if not direct:  # which would have to read whole sectors to know
                    for oddity in await pool.run(oddities, fd, sector_size or 512):
                        remark(_log, f"{name}: {oddity}")
                return cls(
                    fd,
                    read_only=read_only,
                    sector_size=sector_size,
                    direct=direct,
                    optical=optical,
                )
            except ConfigError as error:
                os.close(fd)
                raise ConfigError(f"{name}: {error}") from None
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise ConfigError(f"{name}: {error.strerror or error}") from error
        finally:
            await pool.aclose()

    @property
    def info(self) -> DiskInfo:
        return self._info

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset + length > self._size:
            self._refuse(offset, length)
        flags = self._read_flags
        if flags is None:
            return False
        try:
            return os.preadv(self._fd, buffers, offset, flags) == length
        except OSError as error:
            # A miss (EAGAIN), too many buffers (EINVAL), or an error for the slow form to report.
            if error.errno == errno.EOPNOTSUPP:
                self._read_flags = None
            return False

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset + length > self._size or self._info.read_only:
            self._check_write(offset, length)
        flags = self._write_flags
        if flags is None or not (self._memory or (not fua and self._inline.allowed())):
            return False
        start = time.perf_counter()
        try:
            if len(buffers) == 1 and not flags:  # for large writes, less work than a vector
                done = os.pwrite(self._fd, buffers[0], offset)
            else:
                done = os.pwritev(self._fd, buffers, offset, flags)
        except OSError as error:
            # It would wait (EAGAIN), or the slow form has an error to report.
            if error.errno == errno.EOPNOTSUPP and flags:
                self._write_flags = 0
            return False
        self._inline.took(time.perf_counter() - start, length)
        return done == length

    async def readv(self, offset: int, buffers: Buffers) -> None:
        length = total_length(buffers)
        if offset + length > self._size:
            self._refuse(offset, length)
        read = direct_io.read_fully if self._direct else linux.read_fully
        done = await self._call("read", offset, read, self._fd, buffers, offset)
        if done < length:
            self.check_resize()
            raise OutOfRangeError("the file has become shorter", offset=offset + done)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        length = total_length(buffers)
        self._check_write(offset, length)
        write = direct_io.write_fully if self._direct else linux.write_fully
        key = object()
        self._ends[key] = offset + length
        put = functools.partial(self._workers.run, write, self._fd, buffers, offset, fua)
        try:
            with disk_errors("write", offset=offset):
                await (self._durability.promise(put) if fua else put())
        finally:
            del self._ends[key]
            self._written.unpark_all()

    async def flush(self) -> None:
        self._check_open()
        if not self._info.read_only:
            with disk_errors("flush"):
                await self._durability.flush(
                    functools.partial(self._workers.run, linux.sync, self._fd)
                )
        if not self._closed:
            self.check_resize()

    async def unmap(self, offset: int, length: int) -> None:
        await self.unmap_many([(offset, length)])

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self._check_write(offset, length)
        if not self._info.supports_unmap:
            return
        free = linux.punch_hole if self._device is None else linux.discard
        # Between two trips a command can be aborted; one that has begun is waited for.
        for trip in divide_ranges(ranges, UNMAP_STEP):
            first = trip[0][0] if len(trip) == 1 else None
            left = await self._call("unmap", first, linux.each_of, free, self._fd, trip)
            if self._device is not None:
                continue  # a hint: what such a device reads afterwards was never promised
            for offset, length in left:
                await self.write_zeroes(offset, length)  # as unmapped_reads_zero has promised

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        self._check_write(offset, length)
        if not length or await self._call(
            "write zeroes", offset, _zero, self._fd, offset, length, may_unmap
        ):
            return
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if offset + length > self._size:
            self._refuse(offset, length)
        if self._device is not None:  # no file system that could tell
            return merge_extents([Extent(offset, length, mapped=True)])
        found = await self._call(
            "extents", offset, linux.holes, self._fd, offset, length, EXTENTS_AT_ONCE
        )
        return merge_extents(Extent(*run) for run in found)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        return self._watchers.add(changed)

    def check_resize(self) -> bool:
        """Ask the kernel for the size and tell the watchers if it is another. Cannot block.

        Returns:
            True if it has changed.

        Raises:
            DiskUnavailableError: The disk is closed.
        """
        self._check_open()
        with disk_errors("size check"):
            size = measure(self._fd, self._info.sector_size)
        if size == self._info.size:
            return False
        self._size = size
        self._info = dataclasses.replace(self._info, size=size)
        self._watchers.notify()
        return True

    async def look_again(self) -> None:
        self._check_open()
        # A file system that has to ask its server keeps a worker waiting, not everybody; it is the
        # second look that counts, because nothing can come in between.
        await self._call("size check", None, measure, self._fd, self._info.sector_size)
        if not self._closed:
            self.check_resize()

    async def resize(self, size: int) -> None:
        """Grow or cut off the image file. A checkpoint.

        Args:
            size: Bytes, a positive multiple of the sector size.

        Raises:
            ConfigError: ``size`` is not, or this is a block device.
            DiskError: The file system refused.
        """
        self._check_write(0, 0)
        if size <= 0 or size % self._info.sector_size:
            raise ConfigError(
                f"{size} bytes are not a positive number of {self._info.sector_size}-byte sectors"
            )
        if self._device is not None:
            raise ConfigError("a block device cannot be resized from here")
        self._size = min(self._size, size)  # refuse what is about to go
        try:
            while any(end > size for end in self._ends.values()):
                await self._written.park()  # such a write would make the file grow again
            self._check_open()
            await self._call("resize", None, os.ftruncate, self._fd, size)
        finally:
            if not self._closed:
                self._size = self._info.size
                self.check_resize()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._size = -1  # every range is outside now, at no cost to an open disk
            fd, self._fd = self._fd, -1
            await self._workers.aclose()
            if self._workers.away:  # they know it by its number, and its lock keeps others out
                self._workers.when_back(functools.partial(_close_late, fd))
                return
            with disk_errors("close"):
                os.close(fd)

    async def _call(
        self, action: str, offset: int | None, function: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        with disk_errors(action, offset=offset):
            return await self._workers.run(function, *args)

    def _check_open(self) -> None:
        if self._closed:
            raise DiskUnavailableError("the disk is closed")

    def _check_write(self, offset: int, length: int) -> None:
        if self._info.read_only:
            raise ReadOnlyError("the disk was opened read-only", offset=offset)
        if offset + length > self._size:
            self._refuse(offset, length)

    def _refuse(self, offset: int, length: int) -> None:
        self._check_open()
        check_range(offset, length, self._size)


def _close_late(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:  # nobody else would hear of it
        _log.warning("a file whose last call came back late could not be closed: %s", error)


def _zero(fd: int, offset: int, length: int, may_unmap: bool) -> bool:
    if may_unmap and linux.punch_hole(fd, offset, length):
        return True
    return linux.zero_range(fd, offset, length)


async def open_spec(spec: DiskSpec) -> RawDisk:
    """Open ``raw:[ro,sector=512|4096,create=SIZE,direct,share]PATH``."""
    options = spec.reader()
    read_only = options.flag("ro") or spec.base
    sector_size = options.integer("sector", choices=(512, 4096))
    create = options.size("create")
    direct = options.flag("direct")
    share = options.flag("share")
    options.finish()
    if not spec.target:
        raise spec.error("needs the path of an image, as in raw:disk.img")
    return await RawDisk.open(
        spec.target,
        read_only=read_only,
        sector_size=sector_size,
        direct=direct,
        create=create,
        share=share,
    )

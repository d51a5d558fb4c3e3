"""The contract between the SCSI controller and a disk back-end.

Architecture
------------
A :class:`Disk` is an array of bytes addressed in whole logical sectors. The SCSI layer
(:mod:`storvsp.scsi`) decodes commands, checks ranges and formats sense data; a disk only moves
bytes. The guest's own pages are handed down as writable memoryviews: a back-end reads straight
into them and writes straight out of them, without a copy.

I/O model
---------
Every transfer has two forms.

* ``try_readv`` / ``try_writev`` run on the channel's task and must not block: they either do the
  whole transfer now and return ``True``, or return ``False`` having changed nothing that matters
  (a partly filled read buffer is fine: the slow form fills it again). A page-cache hit belongs
  here; a device access does not.
* ``readv`` / ``writev`` / ``flush`` / ``unmap`` / ``write_zeroes`` are coroutines. They are called
  when the fast form said no; many may be in flight at once, in any order. Ordering between
  overlapping requests in flight at the same time is the guest's business, as on real disks.

Buffers are only borrowed: they belong to guest memory, stay valid until the call returns, and
must not be kept afterwards. The guest may scribble on them at any time, so a back-end that checks
what it writes (a checksum, a header) copies first.

Who validates what
------------------
The caller guarantees that ``offset`` and the total length are multiples of ``sector_size``, and
that neither is negative. It does **not** guarantee that they lie inside the disk, because the disk
may have shrunk in between: a back-end answers that with :class:`OutOfRangeError`, never with an
IndexError or a short transfer.

Error model
-----------
Only :class:`DiskError` and its subclasses (and trio's ``Cancelled``) may leave a method. The SCSI
layer maps them to sense data; an ``OSError`` that escapes is treated as a medium error and logged
as a bug in the back-end. :func:`disk_errors` translates ``OSError`` for you.

Durability
----------
``flush`` returns only when everything whose write completed before the call is durable;
``writev(..., fua=True)`` returns only when its own data is. A write that has completed without
either may be lost in a crash of the host, but never torn inside a logical sector and never
reordered before an earlier completed flush.

Lifecycle
---------
A disk is opened by its maker (for the command line: the entry point in the group
``storvsp.disks``), used by any number of logical units on one trio loop, and closed by
:meth:`Disk.aclose`, which is idempotent and waits for nothing but its own workers. Afterwards
``info`` can still be read; transfers raise :class:`DiskUnavailableError`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence

from vmbus.errors import DeviceError

Buffers = Sequence[memoryview]
"""A scatter/gather list: byte-format memoryviews, in order; lengths in bytes."""


EXTENTS_AT_ONCE = 256
"""Extents that one call of :meth:`Disk.extents` finds out about."""


class DiskError(DeviceError):
    """A back-end could not do what was asked.

    Args:
        message: What failed, for the log.
        offset: Byte offset of the first byte concerned, if the back-end knows it; it ends up in
            the INFORMATION field of the sense data as a sector number.
    """

    def __init__(self, message: str, *, offset: int | None = None) -> None:
        super().__init__(message)
        self.offset = offset


class OutOfRangeError(DiskError):
    """The range is not (or no longer) inside the disk. SCSI: ILLEGAL REQUEST 21/00."""


class ReadOnlyError(DiskError):
    """A write to a disk that is read-only. SCSI: DATA PROTECT 27/00."""


class MediumError(DiskError):
    """The data cannot be read or written. SCSI: MEDIUM ERROR 11/00 (read) or 0C/00 (write)."""


class NoSpaceError(DiskError):
    """No room left behind a sparse disk. SCSI: DATA PROTECT 27/07, thin provisioning full."""


class DiskUnavailableError(DiskError):
    """The back-end is gone (network lost, file removed). SCSI: HARDWARE ERROR 44/00."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """What does not change while a disk is open, except ``size`` (see :meth:`Disk.watch`)."""

    size: int
    """Capacity in bytes, a multiple of ``sector_size``."""
    sector_size: int = 512
    """Logical sector in bytes: 512 or 4096 (2048 for optical media)."""
    physical_sector_size: int = 4096
    """Physical sector in bytes, a power-of-two multiple of ``sector_size``."""
    read_only: bool = False
    """Writes are refused."""
    supports_unmap: bool = False
    """``unmap`` really frees space; turns on logical block provisioning."""
    unmap_granularity: int = 0
    """Bytes of the smallest block that ``unmap`` can free; 0 if unknown."""
    unmapped_reads_zero: bool = False
    """Sectors read as zeros after ``unmap`` (LBPRZ)."""
    rotational: bool = False
    """Seeks cost; reported in VPD page B1."""
    removable: bool = False
    """Medium can be taken out (RMB bit)."""
    optical: bool = False
    """A CD-ROM medium: the unit answers MMC commands, sectors have 2048 bytes."""
    write_cache: bool = True
    """Completed writes may be volatile until ``flush`` (WCE bit)."""
    identity: bytes = b""
    """Up to 16 bytes naming the disk for ever, wherever it is attached (VPD 83); empty: the
    controller makes a name up, from the place and how many disks were there before."""
    serial: str = ""
    """Unit serial number (VPD 80), printable ASCII."""
    max_transfer: int = 0
    """Largest single transfer in bytes, or 0 for no limit of its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes with one provisioning state, as GET LBA STATUS reports it."""

    offset: int
    """Byte offset."""
    length: int
    """Bytes."""
    mapped: bool
    """True if the bytes occupy space."""


class Disk(abc.ABC):
    """One disk. See the module text for the whole contract."""

    @property
    @abc.abstractmethod
    def info(self) -> DiskInfo:
        """Current properties. Cannot block; cheap enough to call for each command."""

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        """Fill ``buffers`` from byte ``offset`` if that needs no waiting. Cannot block.

        Returns:
            True if all bytes were delivered; False if :meth:`readv` has to be awaited.

        Raises:
            DiskError: The transfer was tried and failed.
        """
        return False

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        """Write ``buffers`` at byte ``offset`` if that needs no waiting. Cannot block.

        Same returns and errors as :meth:`try_readv`.
        """
        return False

    @abc.abstractmethod
    async def readv(self, offset: int, buffers: Buffers) -> None:
        """Fill ``buffers`` from byte ``offset``. May be a checkpoint; raises DiskError."""

    @abc.abstractmethod
    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        """Write ``buffers`` at byte ``offset``. May be a checkpoint; raises DiskError.

        Args:
            offset: Bytes.
            buffers: Borrowed until the call returns.
            fua: Return only when the data is durable.
        """

    @abc.abstractmethod
    async def flush(self) -> None:
        """Make every completed write durable. May be a checkpoint; raises DiskError."""

    async def unmap(self, offset: int, length: int) -> None:
        """Hint that ``length`` bytes at ``offset`` are not needed. May be a checkpoint.

        A back-end may free any part of the range or nothing; with ``unmapped_reads_zero`` the
        whole range must read as zeros afterwards.

        A guest trims whole disks: what takes long is done in steps, each a checkpoint.
        """
        return

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Hint that several ranges, (offset, length) in bytes, are not needed.

        The default calls :meth:`unmap` for one after the other. A back-end whose calls wait for a
        worker does better with one call for all of them. May be a checkpoint; raises DiskError.

        Args:
            ranges: In ascending order; they neither overlap nor touch each other.
        """
        for offset, length in ranges:
            await self.unmap(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make ``length`` bytes at ``offset`` read as zeros. May be a checkpoint; raises DiskError.

        The default writes zeros in pieces of at most 1 MiB, or ``info.max_transfer`` if that is
        less.

        Args:
            offset: Bytes.
            length: Bytes.
            may_unmap: Space may be freed where zeros are read back all the same.
        """
        info = self.info
        largest = info.max_transfer // info.sector_size * info.sector_size or 1 << 20
        zeros = memoryview(bytes(min(length, largest, 1 << 20)))
        while length:
            piece = zeros[: min(length, len(zeros))]
            await self.writev(offset, [piece])
            offset += len(piece)
            length -= len(piece)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe a range as consecutive extents, beginning with its first byte.

        They may end before the range does, and whoever wants to know more asks again from there: a
        guest can make every second sector a hole, and a back-end does not look at more than
        :data:`EXTENTS_AT_ONCE` or so. There is at least one unless the range is empty.

        The default says that all of it is mapped. May be a checkpoint; raises DiskError.
        """
        return [Extent(offset, length, mapped=True)]

    async def look_again(self) -> None:
        """Find out whether the size has changed outside, and tell the watchers if so.

        The default knows that it has not. May be a checkpoint; raises DiskError.
        """
        return

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` on the trio thread whenever ``info`` has changed (a resize).

        Returns:
            A function that ends the watch. Cannot block.
        """
        return lambda: None

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Flush nothing, release everything. Idempotent. May be a checkpoint."""


@contextlib.contextmanager
def disk_errors(action: str, *, offset: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into the :class:`DiskError` it means.

    Args:
        action: What was being done, for the message ("read", "write", "flush").
        offset: Byte offset concerned.
    """
    try:
        yield
    except OSError as error:
        text = f"{action} failed: {error.strerror or error}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpaceError(text, offset=offset) from error
        if error.errno in {errno.EROFS, errno.EPERM, errno.EBADF}:
            raise ReadOnlyError(text, offset=offset) from error
        if error.errno in {errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.ECONNRESET}:
            raise DiskUnavailableError(text, offset=offset) from error
        raise MediumError(text, offset=offset) from error


def divide_ranges(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[list[tuple[int, int]]]:
    """Divide ranges into what is freed in one go: a list of short ones, or part of a long one.

    A long one is made of 256 parts at most: where there is nothing to free, as in most of a disk
    of many terabytes, size costs nothing.

    Args:
        ranges: (offset, length) in bytes.
        step: Bytes in one go, as far as that does.
    """
    trip: list[tuple[int, int]] = []
    size = 0
    for offset, length in ranges:
        largest = max(1, -(-length // (256 * step))) * step
        for at in range(0, length, largest):
            part = min(largest, length - at)
            if trip and size + part > step:
                yield trip
                trip, size = [], 0
            trip.append((offset + at, part))
            size += part
    if trip:
        yield trip

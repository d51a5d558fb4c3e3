"""What Linux offers disks beyond Python's ``os`` module.

All functions block and raise ``OSError``; they belong into worker threads, except where a
docstring says that they do not touch the medium.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from storvsp.disk import Buffers

IOV_MAX = 1024
"""Most buffers one preadv takes (linux/include/uapi/linux/uio.h, UIO_MAXIOV)."""

# linux/include/uapi/linux/falloc.h
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

# linux/include/uapi/linux/fs.h, for x86-64
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKPBSZGET = 0x127B
BLKGETSIZE64 = 0x80081272
FS_IOC_GETVERSION = 0x80087601

# linux/include/uapi/linux/magic.h
_MEMORY_FILE_SYSTEMS = {0x01021994, 0x858458F6}  # tmpfs, ramfs

_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock: type, whence, start, length, pid

_NOT_SUPPORTED = {
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENODEV,
    errno.ENOTTY,
    errno.EINVAL,  # among others: not aligned to the sectors of the device
    errno.EFBIG,  # beyond the largest file that the file system has
}

# With these a write ends before it has written anything, and so before it could be made to last.
_BEFORE_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.EOPNOTSUPP,
                   errno.EBADF, errno.EPERM, errno.EFAULT}  # fmt: skip


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fallocate.restype = ctypes.c_int
    libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fstatfs.restype = ctypes.c_int
    return libc


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call the C library's fallocate; the GIL is dropped while it runs."""
    _check(_libc().fallocate(fd, mode, offset, length))


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Free a range so that it reads as zeros.

    Returns:
        False if the file system or device cannot.
    """
    return _try_fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Zero a range but keep its space, without writing it.

    Returns:
        False if the file system or device cannot.
    """
    return _try_fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, offset, length)


def _try_fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    try:
        fallocate(fd, mode, offset, length)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    return True


def discard(fd: int, offset: int, length: int) -> bool:
    """BLKDISCARD: tell a block device that a range is not needed. What it reads is undefined.

    Returns:
        False if the device cannot, or cannot any more, or not with this range.
    """
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", offset, length))
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    return True


def in_memory(fd: int) -> bool:
    """Whether the file lives in a memory file system (tmpfs, ramfs, memfd). Does not block."""
    answer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes; f_type is the first
    _check(_libc().fstatfs(fd, answer))
    return int.from_bytes(answer.raw[:8], "little") in _MEMORY_FILE_SYSTEMS


def generation(fd: int) -> int:
    """Return how the file differs from earlier ones with its inode number; 0 if nobody counts."""
    try:
        answer = fcntl.ioctl(fd, FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return 0
    return int.from_bytes(answer[:4], "little")  # an int, whatever the number of the request says


# Below /sys/dev/block/MAJOR:MINOR, the most specific first. Loop devices and partitions have none.
_NAMES = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "device/serial", "serial")


def block_device_name(number: int) -> str:
    """Return a name of a block device that outlives restarts, or an empty text."""
    directory = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for each in _NAMES:
        with contextlib.suppress(OSError):
            if text := (directory / each).read_text().strip():
                return f"{each} {text}"
    return ""


def lock(fd: int, *, exclusive: bool) -> None:
    """Take an advisory lock on the whole file, bound to this open file (OFD). Does not block.

    The kernel drops it when the descriptor is closed, also on a crash. Unlike classical record
    locks it also conflicts between two opens in one process.

    Raises:
        OSError: EAGAIN or EACCES if somebody else has it; ENOLCK or EOPNOTSUPP if the file
            system cannot lock.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class BlockDevice:
    """What the kernel says of a block device. Sizes in bytes."""

    size: int
    logical_sector_size: int
    physical_sector_size: int
    rotational: bool
    discards: bool
    discard_granularity: int


def block_device(fd: int) -> BlockDevice:
    """Ask the kernel about an open block device. Does not touch the medium."""
    number = os.fstat(fd).st_rdev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()

    def queue(name: str) -> int:
        for directory in (device, device.parent):  # a partition's queue is its disk's
            try:
                return int((directory / "queue" / name).read_text())
            except OSError:
                continue  # no sysfs, or not at this level
        return 0

    return BlockDevice(
        size=block_device_size(fd),
        logical_sector_size=_ioctl_number(fd, BLKSSZGET, 4),
        physical_sector_size=_ioctl_number(fd, BLKPBSZGET, 4),
        rotational=queue("rotational") != 0,
        discards=queue("discard_max_bytes") != 0,
        discard_granularity=queue("discard_granularity"),
    )


def block_device_size(fd: int) -> int:
    """Capacity in bytes. Does not touch the medium."""
    return _ioctl_number(fd, BLKGETSIZE64, 8)


def _ioctl_number(fd: int, request: int, size: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(size)), "little")


def read_fully(fd: int, buffers: Buffers, offset: int) -> int:
    """Fill a scatter list of any length.

    Returns:
        Bytes read; less than asked for only at the end of the file.
    """
    done = 0
    for batch in _batches(buffers):
        while batch:
            got = os.preadv(fd, batch, offset + done)
            if not got:
                return done
            done += got
            batch = _rest(batch, got)  # noqa: PLW2901
    return done


class SyncError(OSError):
    """Data was written, but could not be made to last."""


def sync(fd: int) -> None:
    """Make everything that was written last. Raises SyncError."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise SyncError(error.errno, error.strerror) from error


def write_fully(fd: int, buffers: Buffers, offset: int, durable: bool) -> None:
    """Write a scatter list of any length.

    Args:
        fd: File.
        buffers: What to write.
        offset: Bytes.
        durable: Return only when the data is on the medium (RWF_DSYNC).

    Raises:
        OSError: It could not be written.
        SyncError: It could, but not be made to last. One system call does both and does not say
            which of them failed. Where it had no room, or did not want to, writing once more
            without the second tells; anything else may have been the kernel's only report.
    """
    if not durable:
        _write(fd, buffers, offset, 0)
        return
    try:
        _write(fd, buffers, offset, os.RWF_DSYNC)
    except OSError as error:
        if error.errno in _BEFORE_WRITING:
            _write(fd, buffers, offset, 0)
        raise SyncError(error.errno, error.strerror) from error


def _write(fd: int, buffers: Buffers, offset: int, flags: int) -> None:
    for batch in _batches(buffers):
        while batch:
            put = os.pwritev(fd, batch, offset, flags)
            offset += put
            batch = _rest(batch, put)  # noqa: PLW2901


def _batches(buffers: Buffers) -> list[Buffers]:
    filled = [buffer for buffer in buffers if buffer]  # an empty batch would look like the end
    return [filled[start : start + IOV_MAX] for start in range(0, len(filled), IOV_MAX)]


def _rest(buffers: Buffers, done: int) -> Buffers:
    """What is left of a scatter list after its first ``done`` bytes; empty if nothing is."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


def holes(fd: int, offset: int, length: int, most: int) -> list[tuple[int, int, bool]]:
    """The data and holes of a range: (offset, length, is data), in order, from its first byte on.

    Args:
        fd: File.
        offset: Bytes.
        length: Bytes.
        most: How many are enough; the list may have one more. Some file systems need 100 us for
            each.
    """
    found: list[tuple[int, int, bool]] = []
    end = offset + length
    while offset < end and len(found) < most:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # no data from here to the end of the file
        if data > offset:
            found.append((offset, data - offset, False))
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            found.append((data, hole - data, True))
            data = hole
        offset = data
    return found


def each_of(
    free: Callable[[int, int, int], bool], fd: int, ranges: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Free several ranges with :func:`punch_hole` or :func:`discard`.

    Returns:
        Those with which it could not be done.
    """
    return [(offset, length) for offset, length in ranges if not free(fd, offset, length)]

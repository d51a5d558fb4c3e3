"""O_DIRECT: transfers around the page cache, and through pages of our own where it objects.

Guests nearly always give whole, aligned sectors, which the kernel takes as they lie. Where it
answers EINVAL because a buffer does not suit the device, the data is copied once more. All
functions block.
"""

from __future__ import annotations

import errno
import mmap
import os

from storvsp.disk import Buffers
from storvsp.disks import linux
from vmbus.errors import ConfigError
from vmbus.memory import total_length, window

_BOUNCE = 1 << 20
"""Bytes copied at a time where direct I/O cannot use the guest's buffers as they lie."""


def probe(fd: int, size: int, sector_size: int) -> None:
    """Find out whether single sectors can be read with O_DIRECT. Blocks for one sector."""
    try:
        os.preadv(fd, [_pages(sector_size)], size - sector_size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ConfigError(
            f"direct I/O in {sector_size}-byte sectors is not possible here; use sector=4096"
        ) from error


def _pages(size: int) -> memoryview:
    """Page-aligned memory. Freed with its last view: an error's traceback may still hold one."""
    return memoryview(mmap.mmap(-1, size))


def read_fully(fd: int, buffers: Buffers, offset: int) -> int:
    """Fill a scatter list, aligned or not.

    Returns:
        Bytes read; less than asked for only at the end of the file.
    """
    try:
        return linux.read_fully(fd, buffers, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    length = total_length(buffers)
    pages = _pages(min(length, _BOUNCE))
    done = 0
    while done < length:
        got = os.preadv(fd, [pages[: length - done]], offset + done)
        if not got:
            break
        start = 0
        for piece in window(buffers, done, got):
            piece[:] = pages[start : start + len(piece)]
            start += len(piece)
        done += got
    return done


def write_fully(fd: int, buffers: Buffers, offset: int, durable: bool) -> None:
    """Write a scatter list, aligned or not; arguments as for :func:`linux.write_fully`."""
    try:
        linux.write_fully(fd, buffers, offset, durable)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        return
    length = total_length(buffers)
    pages = _pages(min(length, _BOUNCE))
    done = 0
    while done < length:
        size = 0
        for piece in window(buffers, done, _BOUNCE):
            pages[size : size + len(piece)] = piece
            size += len(piece)
        linux.write_fully(fd, [pages[:size]], offset + done, durable)
        done += size

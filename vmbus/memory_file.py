"""Guest memory that this process makes itself: sealed memfds.

A memfd can be handed to another process, and once it is sealed nobody can shrink it, so nobody
can make an access to its mapping fail (see :mod:`vmbus.memory`).
"""

from __future__ import annotations

import fcntl
import os

from vmbus.errors import ConfigError
from vmbus.memory import PAGE_SIZE, GuestMemory


def create_memfd(name: str, size: int) -> int:
    """Return a new memfd of ``size`` zero bytes that can neither shrink nor grow any more.

    Args:
        name: Shown in ``/proc/PID/maps``.
        size: Bytes, a multiple of the page size, not 0.

    Returns:
        A file descriptor that the caller owns. It is closed on ``exec``.

    Raises:
        ConfigError: ``size`` is not a number of pages.
        OSError: The system would not make it.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise ConfigError(f"memory of {size} bytes: must be whole pages")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


def allocate_memory(*sizes: int) -> GuestMemory:
    """Return guest memory that begins at address 0, one region (and memfd) per size, gapless.

    Args:
        *sizes: Bytes of each region, multiples of the page size.

    Raises:
        ConfigError: A size is not a number of pages.
        OSError: The system would not make it.
    """
    memory = GuestMemory()
    gpa = 0
    try:
        for size in sizes:
            fd = create_memfd("vmbus-guest-memory", size)
            try:
                memory.add_region(gpa, size, fd)
            finally:
                os.close(fd)
            gpa += size
    except BaseException:
        memory.close()
        raise
    return memory

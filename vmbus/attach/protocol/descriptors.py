"""What a received descriptor really is; a peer's word is not enough.

All functions borrow the descriptor and raise :class:`PeerProtocolError` (not fatal) with the errno
that the specification gives for the case.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.to_server import MemoryRegion
from vmbus.errors import ConfigError, PeerProtocolError
from vmbus.memory import GuestMemory, is_sealed

_EVENTFD = "anon_inode:[eventfd]"


def check_eventfd_untrusted(fd: int, owner: str) -> None:
    """Insist on an eventfd and make it non-blocking, so that a full counter cannot stop us.

    O_NONBLOCK belongs to the open file, which the peer shares: a hostile peer can clear it again.
    The specification's security section draws the conclusion.

    Args:
        fd: Borrowed.
        owner: Message name for the error's text.
    """
    try:
        is_eventfd = os.readlink(f"/proc/self/fd/{fd}") == _EVENTFD
        if is_eventfd:
            os.set_blocking(fd, False)
    except OSError as error:
        raise PeerProtocolError(
            f"{owner}: descriptor cannot be examined: {error.strerror}", errno=errno.EINVAL
        ) from error
    require(is_eventfd, f"{owner}: the descriptor must be an eventfd")


def check_memory_untrusted(fd: int, region: MemoryRegion, *, trusted: bool) -> tuple[int, int]:
    """Insist on a file that ``region`` can be mapped from and that cannot shrink under us.

    Args:
        fd: Borrowed.
        region: The claim.
        trusted: Accept files without F_SEAL_SHRINK.

    Returns:
        (device, inode): the file's identity.
    """
    try:
        status = os.fstat(fd)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as error:
        raise PeerProtocolError(
            f"memory region: descriptor cannot be examined: {error.strerror}", errno=errno.EINVAL
        ) from error
    require(stat.S_ISREG(status.st_mode), "memory region: the descriptor must be a memfd")
    require(
        trusted or is_sealed(fd),
        "memory region: the descriptor must be a memfd sealed with F_SEAL_SHRINK",
        errno.EPERM,
    )
    wanted = {os.O_RDWR, os.O_RDONLY} if region.read_only else {os.O_RDWR}
    require(
        access in wanted,
        "memory region: the descriptor is not open for reading and writing",
        errno.EACCES,
    )
    require(
        status.st_size >= region.fd_offset + region.size,
        f"memory region: the file has {status.st_size} bytes, "
        f"fd_offset + size is {region.fd_offset + region.size}",
    )
    return status.st_dev, status.st_ino


def map_region_untrusted(
    memory: GuestMemory, region: MemoryRegion, fd: int, *, trusted: bool
) -> None:
    """Add a checked region to ``memory``; what the kernel says against it becomes the errno."""
    try:
        memory.add_region(
            region.gpa,
            region.size,
            fd,
            region.fd_offset,
            read_only=region.read_only,
            trusted=trusted,
        )
    except ConfigError as error:
        cause = error.__cause__
        code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EINVAL
        raise PeerProtocolError(str(error), errno=code) from error

"""What a received descriptor really is; a peer's word is not enough.

All functions borrow the descriptor and raise :class:`PeerProtocolError` (not fatal) with the errno
that the specification gives for the case.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vmbus.attach.protocol.closing import is_eventfd, kind_of
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.to_server import MemoryRegion
from vmbus.errors import ConfigError, PeerProtocolError
from vmbus.memory import GuestMemory


def check_eventfd_untrusted(fd: int, owner: str) -> None:
    """Insist on an eventfd and make it non-blocking, so that a full counter cannot stop us.

    O_NONBLOCK belongs to the open file, which the peer shares: a hostile peer can clear it again.
    The specification's security section draws the conclusion.

    Args:
        fd: Borrowed.
        owner: Message name for the error's text.
    """
    try:
        good = is_eventfd(fd)
        if good:
            os.set_blocking(fd, False)
    except OSError as error:
        raise PeerProtocolError(
            f"{owner}: descriptor cannot be examined: {error.strerror}", errno=errno.EINVAL
        ) from error
    require(good, f"{owner}: the descriptor must be an eventfd")


def _check_sealed_untrusted(fd: int) -> None:
    """Insist on a memfd, or its like, that cannot shrink. Asks no file system: see below."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        # With a path it is some file or other, else a pipe, a socket, an eventfd.
        has_path = kind_of(fd).startswith("/")
        require(has_path, "memory region: the descriptor must be a memfd")
        seals = 0
    require(
        seals & fcntl.F_SEAL_SHRINK,
        "memory region: the descriptor must be a memfd sealed with F_SEAL_SHRINK",
        errno.EPERM,
    )


def check_memory_untrusted(fd: int, region: MemoryRegion, *, trusted: bool) -> tuple[int, int]:
    """Insist on a file that ``region`` can be mapped from and that cannot shrink under us.

    The order matters. ``fstat`` asks the file system, and one in user space (FUSE) may be the
    peer's own and never answer. ``F_GETFL`` and ``F_GET_SEALS`` do not ask, and the latter
    succeeds for nothing but memfds, tmpfs and hugetlbfs (mm/memfd.c, memfd_file_seals_ptr).

    Args:
        fd: Borrowed.
        region: The claim.
        trusted: Accept files without F_SEAL_SHRINK, of any file system; with one that does not
            answer this call does not return.

    Returns:
        (device, inode): the file's identity.
    """
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL)
        require(not access & os.O_PATH, "memory region: the descriptor is O_PATH, no open file")
        if not trusted:
            _check_sealed_untrusted(fd)
        status = os.fstat(fd)
    except OSError as error:
        raise PeerProtocolError(
            f"memory region: descriptor cannot be examined: {error.strerror}", errno=errno.EINVAL
        ) from error
    require(stat.S_ISREG(status.st_mode), "memory region: the descriptor must be a memfd")
    wanted = {os.O_RDWR, os.O_RDONLY} if region.read_only else {os.O_RDWR}
    require(
        access & os.O_ACCMODE in wanted,
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

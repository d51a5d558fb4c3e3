"""Opening files that somebody has named: a pipe, or a terminal, could keep everybody waiting."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import BinaryIO


def open_to_read(path: str) -> BinaryIO:
    """Open a regular file that nobody captures to. Cannot block for long; raises OSError."""
    fd = _open(path, os.O_RDONLY)
    try:
        _lock(fd, fcntl.LOCK_SH)
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def open_to_write(path: str) -> BinaryIO:
    """Make a file new, or empty it, for us alone. Cannot block for long; raises OSError.

    It may be a device, such as ``/dev/null``, but no terminal. A file that somebody has from one of
    these functions stays as it is.
    """
    fd = _open(path, os.O_WRONLY | os.O_CREAT, device=True)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _lock(fd, fcntl.LOCK_EX)
            os.ftruncate(fd, 0)
        return os.fdopen(fd, "wb", buffering=0)
    except BaseException:
        os.close(fd)
        raise


def _open(path: str, flags: int, *, device: bool = False) -> int:
    # Without O_NONBLOCK, opening a pipe waits for who opens its other end.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISREG(kind) or (device and stat.S_ISCHR(kind) and not os.isatty(fd))):
        os.close(fd)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "it is no file")
    return fd


def _lock(fd: int, how: int) -> None:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(error.errno, "a capture has it") from error
    except OSError:
        pass  # its file system has no locks

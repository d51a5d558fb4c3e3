"""Closing descriptors that a peer has passed, without being held up by what is behind them.

The last ``close`` of a file runs that file's own code, in the thread that closes it: a TCP socket
with SO_LINGER waits for its peer (net/ipv4/af_inet.c, inet_release), a file of a FUSE mount asks
its server first (fs/fuse/file.c, fuse_flush), which may be the very peer. So whatever is not
known to be harmless is closed by a thread of its own.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable

MAX_THREADS = 16
"""At once; each may be held up for ever, and what comes then waits for it."""
_EVENTFD = "anon_inode:[eventfd]"
_NO_LINGER = struct.pack("ii", 0, 0)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors of files that this process made; errors of close mean nothing here."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            # Linux has released the number even if close reports a late error (close(2)).
            continue


def kind_of(fd: int) -> str:
    """Return what the kernel calls the file behind ``fd``; asks no file system. Raises OSError.

    ``anon_inode:[eventfd]``, ``socket:[7]``, ``pipe:[7]``, or a path, which begins with a slash
    and may be any (fs/proc/base.c, do_proc_readlink: a name from the directory cache).
    """
    return os.readlink(f"/proc/self/fd/{fd}")


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd; closing one never waits. Raises OSError."""
    return kind_of(fd) == _EVENTFD


class _Closer:
    """Threads that come when there is something to close and go when there is not."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[int] = deque()
        self._threads = 0
        self._under_way = 0

    def close(self, fds: Iterable[int]) -> None:
        """Have them closed. Never waits."""
        with self._condition:
            self._waiting.extend(fds)
            if not self._waiting or self._threads >= MAX_THREADS:
                return
            self._threads += 1
        # A daemon: whoever is held up for ever must not hold up the end of the process.
        threading.Thread(target=self._run, name="vmbus-close", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd = self._waiting.popleft()
                self._under_way += 1
            _close_foreign_now(fd)
            with self._condition:
                self._under_way -= 1
                self._condition.notify_all()

    @property
    def backlog(self) -> int:
        """Descriptors that are not closed yet."""
        return len(self._waiting) + self._under_way

    def wait_idle(self, seconds: float) -> bool:
        """Wait until all are closed. Returns whether they are."""
        with self._condition:
            return self._condition.wait_for(lambda: not self.backlog, seconds)


def _close_foreign_now(fd: int) -> None:
    """Close a file that may be anything. May wait for ever."""
    try:
        if kind_of(fd).startswith("socket:"):
            # Whoever holds it too can set it again, but then this close is not the last.
            sock = socket.socket(fileno=fd)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            finally:
                sock.detach()
    except OSError:
        # A kind of socket without it: then it may take its time.
        pass
    close_all((fd,))


_closer = _Closer()


def close_foreign(fds: Iterable[int]) -> None:
    """Close descriptors that a peer has passed, whatever they are. Never waits.

    Args:
        fds: Taken over. Eventfds are closed when this returns, others some time later.
    """
    others = []
    for fd in fds:
        try:
            harmless = is_eventfd(fd)
        except OSError:
            harmless = False
        if harmless:
            close_all((fd,))
        else:
            others.append(fd)
    if others:
        _closer.close(others)


def closing_backlog() -> int:
    """Return how many descriptors of peers are not closed yet. Cannot block."""
    return _closer.backlog


def wait_closed(seconds: float) -> bool:
    """Wait until nothing is left of what :func:`close_foreign` was given; for tests and exits."""
    return _closer.wait_idle(seconds)

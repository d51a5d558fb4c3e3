"""The eventfd behind a doorbell."""

from __future__ import annotations

import os
import weakref

import trio


class EventfdDoorbell:
    """An eventfd that somebody rings and tasks wait for.

    A :class:`vmbus.partition.transport.Doorbell`. It is closed with :meth:`close`, or when the
    object is gone: a bus that ends without removing its ports must not leak their descriptors.
    """

    __slots__ = ("__weakref__", "_fd", "_finalizer")

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self._fd)

    @property
    def fd(self) -> int:
        """The eventfd, non-blocking and owned here; -1 once closed."""
        return self._fd

    def ring(self) -> None:
        """Make it readable. Cannot block; late rings are lost."""
        if self._fd >= 0:
            try:
                os.eventfd_write(self._fd, 1)
            except BlockingIOError:
                # The counter is full: it has been ringing for a while.
                return

    def close(self) -> None:
        """Wake tasks that wait, with ``trio.ClosedResourceError``, and close. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            self._finalizer()

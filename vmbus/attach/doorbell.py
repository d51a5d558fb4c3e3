"""The server's end of an event port."""

from __future__ import annotations

import os

import trio

from vmbus.attach.framing import close_all


class EventPort:
    """A doorbell, see :class:`vmbus.transport.Doorbell`."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def fd(self) -> int:
        """The eventfd; -1 once closed."""
        return self._fd

    def ring(self) -> None:
        """Signal on the guest's behalf. Cannot block."""
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:
            # The counter is full: the doorbell rings already.
            return

    def close(self) -> None:
        """Wake waiting tasks with ClosedResourceError, and close. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            close_all((fd,))

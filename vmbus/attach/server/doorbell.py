"""The server's end of an event port, and of a message on its way into a slot."""

from __future__ import annotations

import os

import trio

from vmbus.attach.protocol.framing import close_all
from vmbus.attach.server.link import Answer


class EventPort:
    """A doorbell, see :class:`vmbus.partition.transport.Doorbell`."""

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


class Delivery:
    """One DELIVER_MESSAGE that the VMM has not answered yet."""

    __slots__ = ("abandoned", "answer", "answered")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Answer = b""
        self.abandoned = False
        """The task that waited was cancelled; the slot is still spoken for."""

"""The doorbell of one channel, and the tasks that wait for it."""

from __future__ import annotations

import contextlib
import os

import trio

from vmbus.partition.doorbell import EventfdDoorbell
from vmbus.partition.transport import Doorbell


class Bell:
    """A doorbell that a guest rings.

    Args:
        doorbell: Borrowed; None: one of its own. Guests of 0.13 have one doorbell for all
            channels, and the bus rings theirs.
    """

    __slots__ = ("_doorbell", "_own", "_rung")

    def __init__(self, doorbell: Doorbell | None) -> None:
        self._own: EventfdDoorbell | None = None
        if doorbell is None:
            doorbell = self._own = EventfdDoorbell()
        self._doorbell = doorbell
        self._rung: trio.Event | None = None

    @property
    def fd(self) -> int:
        """The eventfd; -1 once closed. Its number may be somebody else's then."""
        return self._doorbell.fd

    async def wait(self) -> bool:
        """Wait until it rings. Is a checkpoint.

        Only one task may wait for a descriptor; a second one waits for the first. Both have to look
        at their ring before they sleep again, so it does not matter who is woken for whom.

        Returns:
            Whether this task is the one that has heard it.
        """
        if self._rung is not None:
            await self._rung.wait()
            return False
        self._rung = trio.Event()
        try:
            fd = self._doorbell.fd
            await trio.lowlevel.wait_readable(fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
                return True
            return False
        finally:
            rung, self._rung = self._rung, None
            rung.set()

    def ring(self) -> None:
        """Wake whoever waits. Cannot block."""
        try:
            os.eventfd_write(self.fd, 1)
        except OSError:
            # Full (it is readable anyway), or closed with its port already.
            return

    def close(self) -> None:
        """Close the descriptor if it is not borrowed. Idempotent. Cannot block."""
        if self._own is not None:
            self._own.close()

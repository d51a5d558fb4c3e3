"""The doorbell of one channel, and the tasks that wait for it."""

from __future__ import annotations

import contextlib
import os

import trio


class Bell:
    """An eventfd that a guest rings.

    Args:
        fd: Non-blocking and borrowed; None: one of its own. Guests of 0.13 have one doorbell
            for all channels, and the bus rings theirs.
    """

    __slots__ = ("_owned", "_rung", "fd")

    def __init__(self, fd: int | None) -> None:
        self._owned = fd is None
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if fd is None else fd
        self._rung: trio.Event | None = None

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
            await trio.lowlevel.wait_readable(self.fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
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
        if self._owned:
            self._owned = False
            os.close(self.fd)

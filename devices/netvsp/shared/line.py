"""One end of a line: messages through a socket that never makes the loop wait."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence

import trio

from netvsp.frames.frame import Buffer, Frame
from netvsp.shared.messages import MAX_MESSAGE, pack_frames

_NO_MEMORY = {errno.EFAULT, errno.ENOBUFS, errno.ENOMEM}


def make_buffer() -> memoryview:
    """Return room for one message, and a byte more: what fills it was too long. Cannot block."""
    return memoryview(bytearray(MAX_MESSAGE + 1))


class FrameLine:
    """One end of a line. Owns the socket.

    Args:
        sock: AF_UNIX, SOCK_SEQPACKET.
        buffer: Of :func:`make_buffer`; may be that of other lines of the same loop, too.

    Attributes:
        lost: Frames that could not be sent for want of memory, the kernel's or a guest's.
    """

    def __init__(self, sock: socket.socket, buffer: memoryview) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = buffer
        self._turn = trio.Lock()
        self.lost = 0

    def send_frames(self, frames: Sequence[Frame]) -> int:
        """Send as many frames as go into one message. Cannot block.

        Args:
            frames: One at least; the caller's again at once.

        Returns:
            How many are done with, in order; 0: the other end has to read first.

        Raises:
            OSError: It is gone.
        """
        pieces, done = pack_frames(frames)
        if pieces and not self._send(pieces):
            return 0
        return done

    def send(self, message: bytes) -> bool:
        """Send a message. Cannot block.

        Returns:
            Whether there was room for it.

        Raises:
            OSError: The other end is gone.
        """
        return self._send([message])

    def _send(self, pieces: list[Buffer]) -> bool:
        try:
            self._sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_MEMORY:
                raise
            # A guest's pages that are no memory any more; or the kernel has none, and waiting for
            # the socket would not wait.
            self.lost += 1
        return True

    async def wait_writable(self) -> None:
        """Wait until there may be room. Is a checkpoint. Several tasks may wait.

        All channels of an adapter share its line, and trio lets one task wait for a socket.
        """
        async with self._turn:
            if self._sock.fileno() < 0:
                return
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(self._sock)

    def receive_nowait(self) -> memoryview | None:
        """Return the next message, as :meth:`receive`; None: there is none yet. Cannot block.

        No control buffer: the kernel keeps descriptors from us, as closing one could take as long
        as its maker likes.
        """
        try:
            length = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return None
        except OSError:
            length = 0
        return self._buffer[:length]

    async def receive(self) -> memoryview:
        """Return the next message. A checkpoint if there is none yet.

        Returns:
            It, until the next checkpoint; empty at the end.
        """
        while True:
            data = self.receive_nowait()
            if data is not None:
                return data
            try:
                await trio.lowlevel.wait_readable(self._sock)
            except trio.ClosedResourceError:
                return self._buffer[:0]

    def finish(self) -> None:
        """Send nothing any more; the other end sees the end. Idempotent. Cannot block."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket. Idempotent. Cannot block."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

"""The client's socket: frames out from any thread without blocking, frames in for one thread."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Hashable, Sequence

from vmbus.attach.protocol.closing import close_all
from vmbus.attach.protocol.framing import (
    Frame,
    FrameReader,
    close_connection,
    receive,
    send,
)
from vmbus.errors import AttachError, PeerProtocolError

MAX_OUTGOING = 1 << 20
"""Bytes that may wait for a server that does not read."""
_READS_PER_CALL = 64


class ClientSocket:
    """A non-blocking socket with an outgoing queue and an epoll descriptor.

    The epoll descriptor is readable when there is something to read, something queued that can be
    written, or an eventfd added with :meth:`watch` has been signalled. Sending is thread safe;
    :meth:`poll` and :meth:`read_frames` belong to one thread at a time.

    Args:
        sock: Connected; owned.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._reader = FrameReader(stream=sock.type == socket.SOCK_STREAM)
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._queue: deque[tuple[bytes | memoryview, list[int], Hashable]] = deque()
        self._queued_bytes = 0
        self._keys: set[Hashable] = set()
        self._open = True

    def fileno(self) -> int:
        """The epoll descriptor; -1 once closed."""
        return self._epoll.fileno() if self._open else -1

    def send(self, data: bytes, fds: Sequence[int] = (), key: Hashable = None) -> None:
        """Send now or queue. Never blocks.

        Args:
            data: One frame.
            fds: Borrowed; duplicated if they have to wait.
            key: While a frame with this key is queued, another is not added.

        Nothing happens if the server has hung up: there may be replies of it to read yet, and
        behind them the reader finds the end.

        Raises:
            AttachError: The socket was closed here, or the server does not read.
        """
        with self._lock:
            if key is not None and key in self._keys:
                return
            try:
                if self._try_send(data, fds):
                    return
            except OSError:
                return
            if not self._enqueue(data, fds, key):
                raise AttachError("the server does not read")

    def try_send(self, data: bytes) -> bool:
        """Send one frame now, or return False. Never blocks. Raises AttachError if it is gone."""
        with self._lock:
            try:
                return self._try_send(data, ())
            except OSError as error:
                raise AttachError(f"connection lost: {error.strerror}") from error

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        if not self._open:
            raise AttachError("the connection is closed")
        if self._queue:
            return False
        try:
            sent = send(self._sock, data, fds)
        except BlockingIOError:
            return False
        if sent < len(data):
            # Only SOCK_STREAM sends parts; the rest must follow before anything else.
            self._enqueue(memoryview(data)[sent:], (), None)
        return True

    def _enqueue(self, data: bytes | memoryview, fds: Sequence[int], key: Hashable) -> bool:
        if self._queued_bytes + len(data) > MAX_OUTGOING:
            return False
        if not self._queue:
            self._epoll.modify(self._fd, select.EPOLLIN | select.EPOLLOUT)
        self._queue.append((data, [os.dup(fd) for fd in fds], key))
        self._queued_bytes += len(data)
        if key is not None:
            self._keys.add(key)
        return True

    def flush(self) -> None:
        """Send what is queued as far as there is room."""
        with self._lock:
            while self._open and self._queue:
                data, fds, key = self._queue[0]
                try:
                    sent = send(self._sock, data, fds)
                except BlockingIOError:
                    return
                except OSError:
                    # Gone; the reader finds out.
                    sent = len(data)
                self._queued_bytes -= sent
                close_all(fds)
                if sent < len(data):
                    self._queue[0] = (memoryview(data)[sent:], [], key)
                    continue
                self._queue.popleft()
                self._keys.discard(key)
            if self._open:
                self._epoll.modify(self._fd, select.EPOLLIN)

    def watch(self, fd: int) -> None:
        """Have :meth:`poll` report eventfd ``fd`` when it is signalled. Raises OSError."""
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Undo :meth:`watch`."""
        self._epoll.unregister(fd)

    def poll(self, timeout: float | None) -> list[int]:
        """Wait for work, at most ``timeout`` seconds (None: for ever); flush; return what is ready.

        Returns:
            Descriptors: watched ones as they are, 0 for the socket.
        """
        ready = []
        for fd, events in self._epoll.poll(timeout):
            if fd != self._fd:
                ready.append(fd)
                continue
            if events & select.EPOLLOUT:
                self.flush()
            if events & ~select.EPOLLOUT:
                ready.append(0)
        return ready

    def read_frames(self) -> tuple[list[Frame], AttachError | PeerProtocolError | None]:
        """Read what is there, not for ever. Never blocks.

        Returns:
            Frames (the caller closes them), and what ends the connection after them, if anything.
        """
        frames: list[Frame] = []
        for _ in range(_READS_PER_CALL):
            try:
                alive = receive(self._sock, self._reader)
            except BlockingIOError:
                break
            except OSError as error:
                return frames, AttachError(f"connection lost: {error.strerror}")
            if not alive:
                return frames, AttachError("the server closed the connection")
            try:
                while (frame := self._reader.next_frame()) is not None:
                    frames.append(frame)
            except PeerProtocolError as error:
                return frames, error
        return frames, None

    def shutdown(self) -> None:
        """End the connection but keep the descriptors: wakes whoever polls."""
        with self._lock:
            if self._open:
                self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything. Idempotent."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._reader.close()
            for _, fds, _ in self._queue:
                close_all(fds)
            self._queue.clear()
            self._epoll.close()
            close_connection(self._sock)

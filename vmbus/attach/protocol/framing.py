"""Frames: the 16-byte header, the payload, and the descriptors that travel with it.

Two carriers. With SOCK_SEQPACKET a record is a frame. With SOCK_STREAM frames follow each other,
and a frame's descriptors arrive with its first byte: Linux hands out descriptors with the first
byte of the ``sendmsg`` that carried them and never reads on past such a ``sendmsg``
(linux/net/unix/af_unix.c, unix_stream_read_generic).

Who owns a received descriptor: :func:`receive` hands it to the :class:`FrameReader`, which hands
it to the :class:`Frame`, which closes it in :meth:`Frame.close` unless somebody took it. On every
way out each descriptor is closed exactly once.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence

from vmbus.attach.protocol.limits import MAX_FDS, MAX_PAYLOAD
from vmbus.errors import PeerProtocolError

HEADER = struct.Struct("<HHIIHH")
HEADER_SIZE = HEADER.size
"""type, flags, seq, length, nfds, reserved."""
MAX_FRAME = HEADER_SIZE + MAX_PAYLOAD

REPLY = 1
ERROR = 2
ASYNC = 4
_LEGAL_FLAGS = frozenset({0, REPLY, REPLY | ERROR, ASYNC})

_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
_INT = struct.calcsize("i")
_BROKEN_FLAGS = socket.MSG_CTRUNC | socket.MSG_TRUNC


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that this process owns; errors of close mean nothing here."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            # Linux has released the number even if close reports a late error (close(2)).
            continue


def pack_frame(kind: int, flags: int, seq: int, payload: bytes, nfds: int = 0) -> bytes:
    """Return header and payload.

    Args:
        kind: Message number.
        flags: Of REPLY, ERROR, ASYNC.
        seq: Request id, 32 bits.
        payload: At most 32 KiB.
        nfds: Descriptors that will go along, at most 64.
    """
    return HEADER.pack(kind, flags, seq, len(payload), nfds, 0) + payload


class Frame:
    """One received frame."""

    __slots__ = ("fds", "flags", "kind", "payload", "seq")

    def __init__(self, kind: int, flags: int, seq: int, payload: bytes, fds: list[int]) -> None:
        self.kind = kind
        self.flags = flags
        self.seq = seq
        self.payload = payload
        self.fds = fds
        """Owned by the frame until taken."""

    def take_fd(self) -> int:
        """Take the first descriptor; it is the caller's from now on."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors that nobody took. Idempotent."""
        if self.fds:
            fds, self.fds = self.fds, []
            close_all(fds)


def _fatal(text: str, code: int) -> PeerProtocolError:
    return PeerProtocolError(text, errno=code, fatal=True)


class FrameReader:
    """Turns what ``recvmsg`` returned into frames. Does no I/O but closing descriptors.

    After an error the framing is lost and the reader only repeats the error.
    """

    __slots__ = ("_buffer", "_error", "_fds", "_frames", "_stream", "last_header")

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._frames: deque[Frame] = deque()
        self._error: PeerProtocolError | None = None
        self.last_header: tuple[int, int, int] | None = None
        """(type, flags, seq) of the header that broke the rules, if it could be read."""

    def feed_untrusted(self, data: bytes, fds: Sequence[int] = (), message_flags: int = 0) -> None:
        """Take in one received chunk; for SEQPACKET, one record.

        Args:
            data: Never empty; an empty read is the end of the connection.
            fds: Descriptors that came with it; owned by the reader from now on.
            message_flags: ``msg_flags`` of recvmsg: truncation breaks the framing.
        """
        if self._error is not None:
            close_all(fds)
            return
        self._fds.extend(fds)
        self.last_header = None
        try:
            if message_flags & socket.MSG_CTRUNC:
                raise _fatal(f"frame: more than {MAX_FDS} descriptors", errno.EMSGSIZE)
            if message_flags & socket.MSG_TRUNC:
                raise _fatal(f"frame: record longer than {MAX_FRAME} bytes", errno.EMSGSIZE)
            if self._stream:
                self._feed_stream(data)
            else:
                self._feed_record(data)
        except PeerProtocolError as error:
            self._error = error
            close_all(self._fds)
            self._fds = []

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None until more is fed. The caller closes it.

        Raises:
            PeerProtocolError: Fatal; framing is lost after the frames returned so far.
        """
        if self._frames:
            return self._frames.popleft()
        if self._error is not None:
            raise self._error
        return None

    def at_boundary(self) -> bool:
        """Whether the end of the connection would be a clean one here."""
        return not self._buffer

    def close(self) -> None:
        """Close every descriptor still held. Idempotent."""
        for frame in self._frames:
            frame.close()
        self._frames.clear()
        fds, self._fds = self._fds, []
        close_all(fds)

    def _check_header(self, data: bytes | bytearray) -> tuple[int, int, int, int, int]:
        kind, flags, seq, length, nfds, reserved = HEADER.unpack_from(data)
        self.last_header = (kind, flags, seq)
        if flags not in _LEGAL_FLAGS:
            raise _fatal(f"header: flags {flags:#x} are not a legal combination", errno.EBADMSG)
        if reserved:
            raise _fatal("header: reserved must be 0", errno.EBADMSG)
        if length > MAX_PAYLOAD:
            raise _fatal(f"header: length {length} is above {MAX_PAYLOAD}", errno.EMSGSIZE)
        if nfds > MAX_FDS:
            raise _fatal(f"header: nfds {nfds} is above {MAX_FDS}", errno.EMSGSIZE)
        return kind, flags, seq, length, nfds

    def _feed_record(self, data: bytes) -> None:
        if len(data) < HEADER_SIZE:
            raise _fatal(f"frame: record of {len(data)} bytes has no header", errno.EBADMSG)
        kind, flags, seq, length, nfds = self._check_header(data)
        if len(data) - HEADER_SIZE != length:
            raise _fatal(
                f"header: length is {length} but {len(data) - HEADER_SIZE} bytes follow",
                errno.EBADMSG,
            )
        if nfds != len(self._fds):
            raise _fatal(
                f"header: nfds is {nfds} but {len(self._fds)} descriptors came", errno.EBADMSG
            )
        fds, self._fds = self._fds, []
        self._frames.append(Frame(kind, flags, seq, data[HEADER_SIZE:], fds))

    def _feed_stream(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= HEADER_SIZE:
            kind, flags, seq, length, nfds = self._check_header(buffer)
            if nfds > len(self._fds):
                raise _fatal(
                    f"header: nfds is {nfds} but {len(self._fds)} descriptors came", errno.EBADMSG
                )
            if len(buffer) < HEADER_SIZE + length:
                # Descriptors come with the first byte, so the unfinished frame owns them all.
                if len(self._fds) != nfds:
                    raise _fatal("frame: descriptors that no header claims", errno.EBADMSG)
                return
            payload = bytes(buffer[HEADER_SIZE : HEADER_SIZE + length])
            del buffer[: HEADER_SIZE + length]
            fds, self._fds = self._fds[:nfds], self._fds[nfds:]
            self._frames.append(Frame(kind, flags, seq, payload, fds))
        if self._fds and not buffer:
            raise _fatal("frame: descriptors that no header claims", errno.EBADMSG)
        if len(self._fds) > MAX_FDS:
            raise _fatal(f"frame: more than {MAX_FDS} descriptors", errno.EMSGSIZE)


def receive(sock: socket.socket, reader: FrameReader) -> bool:
    """Do one ``recvmsg`` on a non-blocking socket and feed the reader.

    Returns:
        False at the end of the connection.

    Raises:
        BlockingIOError: Nothing there.
        OSError: The connection is broken.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_FRAME, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % _INT])
            fds.extend(numbers)
    if not data:
        close_all(fds)
        return False
    reader.feed_untrusted(data, fds, flags & _BROKEN_FLAGS)
    return True


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """Do one ``sendmsg``, never blocking, and return the bytes sent.

    The descriptors go with the first byte, so they are gone as soon as anything was sent.

    Raises:
        BlockingIOError: No room.
        OSError: The connection is broken.
    """
    if not fds:
        return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

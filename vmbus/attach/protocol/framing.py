"""Frames: the 16-byte header, the payload, and the descriptors that travel with it.

Two carriers. With SOCK_SEQPACKET a record is a frame. With SOCK_STREAM frames follow each other,
and a frame's descriptors arrive with its first byte: Linux hands out descriptors with the first
byte of the ``sendmsg`` that carried them and never reads on past such a ``sendmsg``
(linux/net/unix/af_unix.c, unix_stream_read_generic).

Who owns a received descriptor: :func:`receive` hands it to the :class:`FrameReader`, which hands
it to the :class:`Frame`, which closes it in :meth:`Frame.close` unless somebody took it. On every
way out each descriptor is closed exactly once. By :func:`close_foreign`, since it may be anything.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections.abc import Sequence

from vmbus.attach.protocol.closing import close_all, close_foreign, closing_backlog
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

_SCM_MAX_FD = 253
"""The most descriptors that Linux takes with one message (include/net/scm.h)."""
_ANCILLARY = socket.CMSG_SPACE(_SCM_MAX_FD * 4)
"""Room for all, so that MSG_CTRUNC has one meaning: this process cannot open any more files. It
also keeps Linux from closing, on our time, what we have no room for."""
_CREDENTIALS = struct.calcsize("iii")
_INT = struct.calcsize("i")
_MAX_RECORDS = 4096
"""Read at most at the end of a connection; a sender's buffer holds fewer."""
MAX_CLOSING = 512
"""Descriptors of peers that wait to be closed before those who send more are hung up on."""
_BROKEN_FLAGS = socket.MSG_CTRUNC | socket.MSG_TRUNC


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

    __slots__ = ("fds", "flags", "kind", "payload", "seq", "short")

    def __init__(
        self,
        kind: int,
        flags: int,
        seq: int,
        payload: bytes,
        fds: list[int],
        *,
        short: bool = False,
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.seq = seq
        self.payload = payload
        self.fds = fds
        """Owned by the frame until taken."""
        self.short = short
        """Whether it had descriptors that this process had no room for; :attr:`fds` is empty."""

    def check_whole(self) -> None:
        """Raise PeerProtocolError, EMFILE, if descriptors are missing; that is no one's mistake."""
        if self.short:
            raise PeerProtocolError(
                "frame: no room for its descriptors: too many files are open on this side",
                errno=errno.EMFILE,
            )

    def take_fd(self) -> int:
        """Take the first descriptor; it is the caller's from now on."""
        return self.fds.pop(0)

    def close_mapped(self) -> None:
        """Close descriptors of which a mapping is kept, so that no close is the file's last."""
        fds, self.fds = self.fds, []
        close_all(fds)

    def close(self) -> None:
        """Close the descriptors that nobody took. Idempotent."""
        if self.fds:
            fds, self.fds = self.fds, []
            close_foreign(fds)


def _fatal(text: str, code: int) -> PeerProtocolError:
    return PeerProtocolError(text, errno=code, fatal=True)


class FrameReader:
    """Turns what ``recvmsg`` returned into frames. Does no I/O but closing descriptors.

    Feed it, then take frames until there is none: a stream is taken apart frame by frame, so that
    many small ones are the taker's time and not the feeder's. After an error the framing is lost
    and the reader only repeats the error.
    """

    __slots__ = ("_buffer", "_error", "_fds", "_record", "_short", "_stream", "last_header")

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._short = False
        """Whether descriptors were lost that no frame has claimed so far."""
        self._record: Frame | None = None
        self._error: PeerProtocolError | None = None
        self.last_header: tuple[int, int, int] | None = None
        """(type, flags, seq) of the header that broke the rules, if it could be read."""

    def feed_untrusted(self, data: bytes, fds: Sequence[int] = (), message_flags: int = 0) -> None:
        """Take in one received chunk; for SEQPACKET, one record.

        Args:
            data: Never empty; an empty read is the end of the connection.
            fds: Descriptors that came with it; owned by the reader from now on.
            message_flags: ``msg_flags`` of recvmsg: MSG_TRUNC breaks the framing, MSG_CTRUNC says
                that this process could not take all descriptors.
        """
        if self._error is not None:
            close_foreign(fds)
            return
        self._fds.extend(fds)
        self._short |= bool(message_flags & socket.MSG_CTRUNC)
        if self._stream:
            self._buffer += data
            return
        try:
            self._record = self._parse_record(data, cut=bool(message_flags & socket.MSG_TRUNC))
        except PeerProtocolError as error:
            self._lose(error)

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None until more is fed. The caller closes it.

        Raises:
            PeerProtocolError: Fatal; framing is lost after the frames returned so far.
        """
        if self._error is not None:
            raise self._error
        if not self._stream:
            frame, self._record = self._record, None
            return frame
        try:
            return self._parse_stream()
        except PeerProtocolError as error:
            self._lose(error)
            raise

    def at_boundary(self) -> bool:
        """Whether the end of the connection would be a clean one here."""
        return not self._buffer

    def close(self) -> None:
        """Close every descriptor still held. Idempotent."""
        if self._record is not None:
            self._record.close()
            self._record = None
        self._buffer.clear()
        fds, self._fds = self._fds, []
        close_foreign(fds)

    def _lose(self, error: PeerProtocolError) -> None:
        self._error = error
        self.close()

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

    def _claim(self, nfds: int, *, last: bool) -> list[int] | None:
        """Take a frame's descriptors from the front; None if some of them were lost.

        Args:
            nfds: How many its header announces.
            last: Whether no other frame is there that could claim the rest.
        """
        count = len(self._fds)
        if self._short and nfds > count:
            self._short = False
            fds, self._fds = self._fds, []
            close_foreign(fds)
            return None
        if nfds > count or (last and (nfds < count or self._short)):
            came = "more" if self._short else f"{count}"
            raise _fatal(f"header: nfds is {nfds} but {came} descriptors came", errno.EBADMSG)
        fds, self._fds = self._fds[:nfds], self._fds[nfds:]
        return fds

    def _make(self, header: tuple[int, int, int], payload: bytes, fds: list[int] | None) -> Frame:
        self.last_header = None
        return Frame(*header, payload, fds or [], short=fds is None)

    def _parse_record(self, data: bytes, *, cut: bool) -> Frame:
        if len(data) < HEADER_SIZE:
            raise _fatal(f"frame: record of {len(data)} bytes has no header", errno.EBADMSG)
        kind, flags, seq, length, nfds = self._check_header(data)
        if cut:
            raise _fatal(f"frame: record longer than {MAX_FRAME} bytes", errno.EMSGSIZE)
        if len(data) - HEADER_SIZE != length:
            raise _fatal(
                f"header: length is {length} but {len(data) - HEADER_SIZE} bytes follow",
                errno.EBADMSG,
            )
        fds = self._claim(nfds, last=True)
        return self._make((kind, flags, seq), data[HEADER_SIZE:], fds)

    def _parse_stream(self) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < HEADER_SIZE:
            if (self._fds or self._short) and not buffer:
                raise _fatal("frame: descriptors that no header claims", errno.EBADMSG)
            if len(self._fds) > MAX_FDS:
                raise _fatal(f"frame: more than {MAX_FDS} descriptors", errno.EMSGSIZE)
            return None
        kind, flags, seq, length, nfds = self._check_header(buffer)
        end = HEADER_SIZE + length
        if len(buffer) < end:
            # Descriptors come with the first byte, so the unfinished frame owns them all.
            if nfds != len(self._fds) and not (self._short and nfds > len(self._fds)):
                raise _fatal(
                    f"header: nfds is {nfds} but {len(self._fds)} descriptors came", errno.EBADMSG
                )
            return None
        fds = self._claim(nfds, last=len(buffer) == end)
        payload = bytes(memoryview(buffer)[HEADER_SIZE:end])
        del buffer[:end]
        return self._make((kind, flags, seq), payload, fds)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % _INT])
            fds.extend(numbers)
    return fds


def receive(sock: socket.socket, reader: FrameReader) -> bool:
    """Do one ``recvmsg`` on a non-blocking socket and feed the reader.

    Returns:
        False at the end of the connection.

    Raises:
        BlockingIOError: Nothing there.
        OSError: The connection is broken.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_FRAME, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary) if ancillary else []
    if not data:
        close_foreign(fds)
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


def close_connection(sock: socket.socket) -> None:
    """Close a connected, non-blocking socket with whatever nobody has received from it.

    Descriptors in frames that were never received are closed by Linux with the socket, on this
    thread's time. So they are received, and closed like all others of a peer. Never waits.
    """
    try:
        # From here on nothing new comes in, so there is an end to what is there.
        sock.shutdown(socket.SHUT_RDWR)
        # An empty record looks like the end, but for the sender's name.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    except OSError:
        # Not connected any more; what was received before is still there.
        pass
    space = _ANCILLARY + socket.CMSG_SPACE(_CREDENTIALS)
    stream = sock.type == socket.SOCK_STREAM
    for _ in range(_MAX_RECORDS):
        if closing_backlog() > MAX_CLOSING:
            break
        try:
            data, ancillary, _, _ = sock.recvmsg(MAX_FRAME, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # Told once; the data comes behind it.
            continue
        except OSError:
            sock.close()
            return
        close_foreign(_descriptors(ancillary))
        if not data and (stream or not ancillary):
            sock.close()
            return
    close_foreign((sock.detach(),))

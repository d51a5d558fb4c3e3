"""Messages between the supervisor and its workers: JSON objects, bounded on both sides.

A worker is the first thing that a hostile VMM would take over, so the supervisor takes nothing
from it but bytes: what comes *up* comes through a pipe, which carries no descriptors. (A
descriptor that arrives has to be closed, and closing one can take as long as its maker likes:
SO_LINGER, FUSE.) What goes *down* goes through a socket, because a worker is given its
connection, and that socket is shut in the other direction.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vmbus.errors import PeerProtocolError

MAX_UP = 8 << 20
"""Bytes of a message from a worker; the description of a guest with 2 000 channels has 1 MiB."""
MAX_UNASKED = 256 << 10
"""Bytes of a message from a worker that was asked nothing: what JSON says in 8 MiB needs 200."""
MAX_DOWN = 128 << 10
"""Bytes of a message to a worker; a COMMAND has 32 KiB."""
MAX_DESCRIPTORS = 64
"""With a message to a worker: a connection, and one or two for each thing that guests share."""
READ_SIZE = 64 << 10
"""Bytes that are taken from a worker's pipe in one turn."""

_LENGTH = struct.Struct("<I")

Parcel = dict[str, Any]


def pack(parcel: Parcel) -> bytes:
    """Return a message for a pipe: length, then JSON."""
    data = json.dumps(parcel, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


class Unpacker:
    """Puts the messages of a pipe together again."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed_untrusted(
        self, data: bytes, asked: Callable[[], bool] = lambda: True
    ) -> Iterator[Parcel]:
        """Yield the messages that are complete with ``data``.

        Args:
            data: What has come.
            asked: Whether an answer is expected, which may be long.

        Raises:
            PeerProtocolError: Fatal; one is too long or no JSON object.
        """
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > (MAX_UP if asked() else MAX_UNASKED):
                    raise _nonsense(f"a message of {length} bytes")
                end = at + _LENGTH.size + length
                if len(buffer) < end:
                    break
                data = bytes(buffer[at + _LENGTH.size : end])
                at = end
                yield parse_untrusted(data)
        finally:
            del buffer[:at]


def _nonsense(text: str) -> PeerProtocolError:
    return PeerProtocolError(text, errno=errno.EPROTO, fatal=True)


def parse_untrusted(data: bytes) -> Parcel:
    """Return a JSON object. Raises PeerProtocolError for anything else."""
    try:
        parcel = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _nonsense("a message that is no JSON") from error
    if not isinstance(parcel, dict):
        raise _nonsense("a message that is no object")
    return parcel


def send_down(sock: socket.socket, parcel: Parcel, fds: Sequence[int] = ()) -> None:
    """Send a message to a worker. Cannot block if the socket does not.

    Args:
        sock: SOCK_SEQPACKET.
        parcel: The message.
        fds: Borrowed.

    Raises:
        BlockingIOError: The worker does not read.
        OSError: The worker is gone.
    """
    data = json.dumps(parcel, separators=(",", ":")).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive_down(sock: socket.socket) -> tuple[Parcel, list[int]] | None:
    """Take a message of the supervisor's; None at the end. The descriptors are the caller's."""
    try:
        data, ancillary, _, _ = sock.recvmsg(
            MAX_DOWN, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:  # it has left without reading all that we said
        return None
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return (json.loads(data), list(fds)) if data else None


def write_all(fd: int, data: bytes) -> None:
    """Write to a pipe until all is written. Blocks while it is full; raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]

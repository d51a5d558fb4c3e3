"""Talking to a running server: ``query`` and ``command``. Blocking, stdlib only."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from typing import Any

from vmbus.attach.client.connect import Target, connect_socket
from vmbus.attach.protocol.framing import (
    ERROR,
    REPLY,
    Frame,
    FrameReader,
    pack_frame,
    receive,
    send,
)
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import VERSION_MAX, VERSION_MIN, Role
from vmbus.attach.protocol.messages import Number, RefusedError
from vmbus.attach.protocol.sockets import control_path
from vmbus.attach.protocol.to_server import Goodbye, Hello, HelloReply, JsonObject, Query
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.errors import AttachError, PeerProtocolError

MAX_REPLY = 64 << 20
"""Bytes of JSON that a reply in a memfd may have."""


def query(path: Target, kind: str, *, timeout: float = 10.0) -> dict[str, Any]:
    """Ask the server behind ``path`` about ``kind``.

    Args:
        path: Path of its socket for operators, or of the one for VMMs beside it; or a connected
            descriptor or socket.
        kind: What to ask about; the server program defines the kinds.
        timeout: Seconds for everything.

    Raises:
        RefusedError: The server refused; has an ``errno``.
        AttachError: No server, no answer in time, or nonsense.
    """
    return _transact(path, Number.QUERY, Query(kind).encode(), timeout)


def command(path: Target, value: dict[str, Any], *, timeout: float = 30.0) -> dict[str, Any]:
    """Have the server behind ``path`` do something; arguments and exceptions as for query."""
    return _transact(path, Number.COMMAND, JsonObject(value).encode(), timeout)


def read_json_reply_untrusted(frame: Frame) -> dict[str, Any]:
    """Return the object of a QUERY or COMMAND reply, from the payload or from the memfd.

    The frame keeps its descriptor. Raises PeerProtocolError.
    """
    data = frame.payload
    if frame.fds:
        if data or len(frame.fds) != 1:
            raise PeerProtocolError(
                "JSON reply: either a payload or one descriptor", errno=errno.EPROTO
            )
        fd = frame.fds[0]
        try:
            # Only memfds and their like know seals, and none of those asks anybody else.
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
            require(
                size <= MAX_REPLY,
                f"JSON reply: the memfd has {size} bytes, must be at most {MAX_REPLY}",
                errno.EPROTO,
            )
            data = os.pread(fd, size, 0)
        except OSError as error:
            raise PeerProtocolError(f"JSON reply: {error.strerror}", errno=errno.EPROTO) from error
    return JsonObject.decode_untrusted(data).value


class _Conversation:
    """One request after the other on a non-blocking socket, with one deadline."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(stream=sock.type == socket.SOCK_STREAM)
        self._deadline = time.monotonic() + timeout
        self._seq = 0

    def close(self) -> None:
        self._reader.close()
        self._sock.close()

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        if not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            raise AttachError("the server does not answer")

    def ask(self, kind: Number, payload: bytes) -> Frame:
        """Return the reply; the caller closes it."""
        self._seq += 1
        data = memoryview(pack_frame(kind, 0, self._seq, payload))
        while data:
            try:
                data = data[send(self._sock, data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
        while (frame := self._reader.next_frame()) is None:
            try:
                if not receive(self._sock, self._reader):
                    raise AttachError("the server closed the connection")
            except BlockingIOError:
                self._wait(select.POLLIN)
        try:
            frame.check_whole()
            if not frame.flags & REPLY or (frame.kind, frame.seq) != (kind, self._seq):
                raise AttachError(f"unexpected frame of type {frame.kind:#x}")
            if frame.flags & ERROR:
                refusal = ErrorReply.decode_untrusted(frame.payload)
                raise RefusedError(kind.name, refusal.errno, refusal.text)
        except Exception:
            frame.close()
            raise
        return frame


def _transact(target: Target, kind: Number, payload: bytes, timeout: float) -> dict[str, Any]:
    if isinstance(target, str | os.PathLike):
        target = control_path(os.fspath(target))
    conversation = _Conversation(connect_socket(target), timeout)
    try:
        hello = Hello(VERSION_MIN, VERSION_MAX, 0, 0, Role.OPERATOR, "operator")
        greeting = conversation.ask(Number.HELLO, hello.encode())
        HelloReply.decode_untrusted(greeting.payload).check_answers(hello)
        greeting.close()
        frame = conversation.ask(kind, payload)
        try:
            result = read_json_reply_untrusted(frame)
        finally:
            frame.close()
        conversation.ask(Number.GOODBYE, Goodbye(0).encode()).close()
    except PeerProtocolError as error:
        raise AttachError(f"the server broke the protocol: {error}") from error
    except OSError as error:
        raise AttachError(f"connection lost: {error.strerror}") from error
    finally:
        conversation.close()
    return result

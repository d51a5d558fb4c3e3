"""Requests and replies over a :class:`ClientSocket`, for any number of threads.

One thread at a time *leads*: it polls the socket and handles what arrives. That may be a thread
in :meth:`RequestLoop.run`, an event loop in :meth:`RequestLoop.process`, or, while there is
neither, a thread that waits for a reply of its own. The others wait on a condition.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from vmbus.attach.client.channel_io import ClientSocket
from vmbus.attach.protocol.framing import ASYNC, ERROR, REPLY, Frame, pack_frame
from vmbus.attach.protocol.messages import (
    MESSAGES,
    Direction,
    MessageSpec,
    Number,
    RefusedError,
    State,
    check_kind,
    check_request,
)
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.errors import AttachError, LocalProtocolError, PeerProtocolError

logger = logging.getLogger(__name__)

_MAX_COMPLAINTS = 100
"""Lines that one connection may write into the log."""


class Receiver(Protocol):
    """Who gives incoming requests their meaning."""

    @property
    def state(self) -> State:
        """Where the connection stands."""

    def handle(self, spec: MessageSpec, frame: Frame) -> bool:
        """Act on a request; returns False if it will be answered later."""

    def called(self, fd: int) -> None:
        """A watched eventfd is readable."""

    def over(self, reason: str) -> None:
        """The connection is over; called once, before descriptors are closed."""


class _Waiting:
    __slots__ = ("abandoned", "answer", "kind")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.answer: Frame | AttachError | None = None
        self.abandoned = False


class RequestLoop:
    """See the module.

    Args:
        io: Owned.
        receiver: Called by the leading thread, one call at a time.
    """

    def __init__(self, io: ClientSocket, receiver: Receiver) -> None:
        self._io = io
        self._receiver = receiver
        self._condition = threading.Condition()
        self._leader: int | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._next_seq = 1
        self.closing = ""
        """Why the connection ends; set once."""
        self.closed = False
        self._complaints = 0

    def process(self) -> bool:
        """Handle what has arrived. Never blocks. Returns False once the connection is over."""
        if self._lead(wait=False):
            try:
                self._pump(0.0)
            finally:
                self._follow()
        return not self.closed

    def run(self) -> None:
        """Handle what arrives until the connection is over."""
        while not self.closed and self._lead(wait=True):
            try:
                while not self.closed:
                    self._pump(None)
            finally:
                self._follow()

    def close(self, reason: str) -> None:
        """End the connection at once, or as soon as the leading thread notices. Idempotent."""
        self.end(reason)
        self._io.shutdown()
        if self._lead(wait=False):
            try:
                self._tear_down()
            finally:
                self._follow()

    def end(self, reason: str) -> None:
        """End the connection after the round that the leading thread is in."""
        self.closing = self.closing or reason

    def request(self, kind: int, payload: bytes, fds: Sequence[int], timeout: float) -> Frame:
        """Send a request and wait for the reply, which the caller closes.

        Raises:
            RefusedError: The peer refused.
            AttachError: No answer in ``timeout`` seconds, or the connection is gone.
            LocalProtocolError: Called by the receiver.
        """
        me = threading.get_ident()
        deadline = time.monotonic() + timeout
        waiting = _Waiting(kind)
        with self._condition:
            if self._leader == me:
                raise LocalProtocolError("a delegate must not make blocking calls")
            if self.closed:
                raise AttachError(self.closing)
            seq = self._next_seq
            self._next_seq = seq % 0xFFFFFFFF + 1
            self._waiting[seq] = waiting
        try:
            self._io.send(pack_frame(kind, 0, seq, payload, len(fds)), fds)
        except BaseException:
            with self._condition:
                self._waiting.pop(seq, None)
            raise
        while True:
            with self._condition:
                while waiting.answer is None and self._leader is not None:
                    if not self._condition.wait(max(0.0, deadline - time.monotonic())):
                        break
                if isinstance(waiting.answer, AttachError):
                    raise waiting.answer
                if waiting.answer is not None:
                    return waiting.answer
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    waiting.abandoned = True
                    raise AttachError(f"{MESSAGES[kind].name}: no answer within {timeout:g} s")
                if self._leader is not None:
                    continue
                self._leader = me
            try:
                self._pump(remaining)
            finally:
                self._follow()

    def reply(self, kind: int, seq: int) -> None:
        """Answer a request of the peer. Never blocks. Raises AttachError."""
        self._io.send(pack_frame(kind, REPLY, seq, b""))

    def reply_error(self, kind: int, seq: int, code: int, text: str) -> None:
        """Refuse a request of the peer. Never blocks. Raises AttachError."""
        self._io.send(pack_frame(kind, REPLY | ERROR, seq, ErrorReply(code, text).encode()))

    # -- leading -------------------------------------------------------------------------------

    def _lead(self, *, wait: bool) -> bool:
        """Become the thread that reads; False if there is one, or the end has come."""
        with self._condition:
            while self._leader is not None:
                if not wait or self._leader == threading.get_ident():
                    return False
                self._condition.wait()
            if self.closed:
                return False
            self._leader = threading.get_ident()
            return True

    def _follow(self) -> None:
        with self._condition:
            self._leader = None
            self._condition.notify_all()

    def _pump(self, timeout: float | None) -> None:
        """Wait for work and do it; any failure ends the connection, none gets out."""
        try:
            for fd in self._io.poll(timeout):
                if fd:
                    self._call(fd)
                    continue
                frames, failure = self._io.read_frames()
                self._dispatch_all(frames)
                if failure is not None:
                    raise failure
        except (AttachError, PeerProtocolError) as error:
            self.end(str(error))
        if self.closing:
            self._tear_down()

    def _call(self, fd: int) -> None:
        try:
            self._receiver.called(fd)
        except Exception:
            # A broken delegate must not stop the others' frames.
            if self._may_complain():
                logger.exception("the delegate failed")

    def _tear_down(self) -> None:
        with self._condition:
            self.closed = True
            for waiting in self._waiting.values():
                waiting.answer = AttachError(self.closing)
            self._waiting.clear()
            self._condition.notify_all()
        self._receiver.over(self.closing)
        self._io.close()

    def _dispatch_all(self, frames: list[Frame]) -> None:
        while frames:
            frame = frames.pop(0)
            handler = self._answered if frame.flags & REPLY else self._asked
            try:
                handler(frame)
            except BaseException:
                for rest in frames:
                    rest.close()
                raise

    def _answered(self, frame: Frame) -> None:
        """Hand a reply to the thread that waits for it."""
        try:
            with self._condition:
                waiting = self._waiting.get(frame.seq)
                if waiting is None or waiting.kind != frame.kind:
                    raise PeerProtocolError(
                        f"reply: nothing was asked as type {frame.kind:#x} seq {frame.seq}",
                        errno=errno.EPROTO,
                    )
                spec = MESSAGES[waiting.kind]
                frame.check_whole()
                if len(frame.fds) > spec.reply_fds:
                    raise PeerProtocolError(
                        f"{spec.name} reply: {len(frame.fds)} descriptors came along",
                        errno=errno.EPROTO,
                    )
                if frame.flags & ERROR:
                    refusal = ErrorReply.decode_untrusted(frame.payload)
                    waiting.answer = RefusedError(spec.name, refusal.errno, refusal.text)
                    frame.close()
                else:
                    waiting.answer = frame
                    if waiting.kind == Number.GOODBYE:
                        self.end("goodbye")  # whoever closes first now, that is why
                del self._waiting[frame.seq]
                self._condition.notify_all()
                if waiting.abandoned:
                    frame.close()
        except PeerProtocolError:
            frame.close()
            raise

    def _asked(self, frame: Frame) -> None:
        """Have a request handled, and answer it unless that comes later."""
        asynchronous = bool(frame.flags & ASYNC)
        try:
            frame.check_whole()
            spec = check_kind(frame.kind, Direction.TO_VMM, asynchronous=asynchronous)
            check_request(spec, self._receiver.state, len(frame.fds))
            if self._receiver.handle(spec, frame) and not asynchronous:
                self.reply(frame.kind, frame.seq)
        except PeerProtocolError as error:
            if error.fatal:
                raise
            self._refuse(frame, error.errno, str(error))
        except AttachError:
            raise
        except Exception as error:
            if self._may_complain():
                logger.exception("the delegate failed")
            code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            self._refuse(frame, code, str(error))
        finally:
            frame.close()

    def _refuse(self, frame: Frame, code: int, text: str) -> None:
        if not frame.flags & ASYNC:
            self.reply_error(frame.kind, frame.seq, code, text)
        elif self._may_complain():
            logger.warning("dropped a message of the server: %s", text)

    def _may_complain(self) -> bool:
        """Whether one line more may be logged that a server can cause as often as it likes."""
        self._complaints += 1
        return self._complaints <= _MAX_COMPLAINTS

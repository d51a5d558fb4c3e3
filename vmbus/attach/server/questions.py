"""Requests to the VMM: who waits for which answer, and until when."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from vmbus.attach.protocol.framing import ERROR, Frame
from vmbus.attach.protocol.messages import MESSAGES, Number, RefusedError
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.errors import PeerProtocolError

_IN_TIME = frozenset({Number.DEL_PORT, Number.SET_CALL_FD})
"""Requests that must be answered within ``reply_timeout``, even if nobody waits for it."""

Answer = bytes | Exception
"""Payload of a reply, or RefusedError, or trio.BrokenResourceError."""
_Pending = tuple[int, Callable[[Answer], None]]
"""Message number of an unanswered request, and who gets the answer."""


class Asker(Protocol):
    """What :class:`Questions` needs of the connection."""

    def fail(self, reason: str) -> None:
        """Close the connection now."""

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run ``function`` beside the connection."""


class Questions:
    """The unanswered requests of one connection. Nothing here blocks.

    Args:
        asker: The connection.
        limit: Requests that may be unanswered.
        reply_timeout: Seconds for answers that the peer can give at once.
    """

    def __init__(self, asker: Asker, limit: int, reply_timeout: float) -> None:
        self._asker = asker
        self._limit = limit
        self._timeout = reply_timeout
        self._pending: dict[int, _Pending] = {}
        self._deadlines: deque[tuple[float, int, _Pending]] = deque()
        self._next_seq = 1

    def __len__(self) -> int:
        return len(self._pending)

    def ask(self, kind: int, callback: Callable[[Answer], None]) -> int | None:
        """Note that ``kind`` is being asked; return its request id, or None beyond the limit."""
        if len(self._pending) >= self._limit:
            self._asker.fail(f"the peer left {len(self._pending)} requests without an answer")
            return None
        seq = self._next_seq
        self._next_seq = seq % 0xFFFFFFFF + 1
        entry = self._pending[seq] = (kind, callback)
        if kind in _IN_TIME:
            self._deadlines.append((trio.current_time() + self._timeout, seq, entry))
            if len(self._deadlines) == 1:
                self._asker.spawn(self._watch_deadlines)
        return seq

    async def _watch_deadlines(self) -> None:
        # The limit is the same for all, so the oldest is the first to end.
        while self._deadlines:
            when, seq, entry = self._deadlines[0]
            if self._pending.get(seq) is entry:
                await trio.sleep_until(when)
                if self._pending.get(seq) is entry:
                    self.fail_late(entry[0])
            self._deadlines.popleft()

    def fail_late(self, kind: int) -> None:
        """Close the connection: ``kind`` was not answered in time."""
        self._asker.fail(f"no answer to {MESSAGES[kind].name} in {self._timeout:g} s")

    def abandon(self, reason: str) -> None:
        """End all requests in BrokenResourceError; nobody waits for the answers."""
        pending = self._pending
        # They may be on their way, and that is no mistake of the peer's.
        self._pending = {seq: (kind, _ignore) for seq, (kind, _) in pending.items()}
        for _, callback in pending.values():
            callback(trio.BrokenResourceError(reason))

    def answer_untrusted(self, frame: Frame) -> None:
        """Pass a reply on. Raises PeerProtocolError, fatal, for a bad one or to nothing."""
        kind, callback = self._pending.pop(frame.seq, (0, None))
        if callback is None or kind != frame.kind:
            if callback is not None:
                self._pending[frame.seq] = (kind, callback)
            raise PeerProtocolError(
                f"reply: nothing was asked as type {frame.kind:#x} seq {frame.seq}",
                errno=errno.EPROTO,
                fatal=True,
            )
        spec = MESSAGES[kind]
        try:
            if frame.fds or frame.short:
                raise PeerProtocolError(
                    f"{spec.name} reply: must not carry descriptors", errno=errno.EPROTO
                )
            if frame.flags & ERROR:
                refusal = ErrorReply.decode_untrusted(frame.payload)
                callback(RefusedError(spec.name, refusal.errno, refusal.text))
                return
            if frame.payload:
                raise PeerProtocolError(f"{spec.name} reply: must be empty", errno=errno.EMSGSIZE)
        except PeerProtocolError as error:
            callback(trio.BrokenResourceError(str(error)))
            raise PeerProtocolError(str(error), errno=error.errno, fatal=True) from error
        callback(frame.payload)


def _ignore(_answer: Answer) -> None:
    """An answer that nobody waits for any more."""

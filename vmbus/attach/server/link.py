"""The server's end of one connection: a reader and a writer task over a non-blocking socket.

The reader never waits for anything but the socket, so replies always get through, whatever the
requests before them are waiting for. What goes out is sent at once if the socket has room and
queued otherwise; the queue is bounded, and a peer that lets it overflow, or does not read for
:attr:`ServerLimits.write_timeout` seconds, is disconnected.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol

import trio

from vmbus.attach.protocol.closing import close_all, closing_backlog
from vmbus.attach.protocol.framing import (
    ASYNC,
    ERROR,
    MAX_CLOSING,
    REPLY,
    Frame,
    FrameReader,
    close_connection,
    pack_frame,
    receive,
    send,
)
from vmbus.attach.protocol.messages import (
    Direction,
    MessageSpec,
    State,
    check_fds,
    check_kind,
    check_state,
)
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server.questions import Answer, Questions
from vmbus.errors import PeerProtocolError

_TURN = 32
"""Frames before other tasks get a turn. Long ones, and those with descriptors, count for more."""
_PAYLOAD_PER_FRAME = 512
"""Bytes of payload that count like one more frame."""
_LINGER = 1.0
"""Seconds after the last frame for answers that the peer owes, see :meth:`Link.finish`."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one connection may cost. Times in seconds, sizes in bytes."""

    max_connections: int = 64
    """That have said HELLO; see :mod:`vmbus.attach.server.places`."""
    max_silent: int = 32
    """That have not, beside those; of more the oldest is closed."""
    max_vps: int = 2048
    max_regions: int = 512
    """Of guest memory, with those that are out of the map but still in use."""
    max_memory_bytes: int = 1 << 40
    """The sum of them: address space, which is not ours alone; a sparse file costs its owner
    nothing."""
    max_descriptors: int = 4096
    """Kept for one VMM: a region, port, channel and SINT eventfd have one each. Fewer if the
    process may not open so many for everybody, see
    :class:`~vmbus.attach.server.places.DescriptorShares`."""
    post_credits: int = 64
    """POST_MESSAGEs not yet taken by the bus; the real hypervisor has 16 buffers per port."""
    outgoing_bytes: int = 1 << 20
    outstanding_requests: int = 4096
    """Requests to the VMM without an answer."""
    hello_timeout: float = 10.0
    """From connecting to HELLO."""
    idle_timeout: float = 60.0
    """From one request to the next: of operators, and of VMMs that have not attached a guest."""
    write_timeout: float = 10.0
    reply_timeout: float = 10.0
    """For requests to the VMM that it can answer at once; DELIVER_MESSAGE has no limit."""
    drain_timeout: float = 10.0
    """Until memory that was taken away must be free of users."""
    handler_grace: float = 5.0
    """For a handler to end by itself once its guest is gone."""


class Session(Protocol):
    """Who gives a link's requests their meaning; may change during the connection."""

    @property
    def state(self) -> State:
        """Where the connection stands."""

    def check(self, spec: MessageSpec, frame: Frame) -> None:
        """Raise PeerProtocolError unless the message may come now, with these descriptors."""

    def handle(self, spec: MessageSpec, frame: Frame) -> None:
        """Act on a request that is legal in this state; raises PeerProtocolError to refuse.

        The frame is closed when this returns: take what is needed.
        """

    def dropped(self, kind: int, error: PeerProtocolError) -> None:
        """Asynchronous message ``kind`` broke a rule and was dropped."""


def check_frame(spec: MessageSpec, state: State, frame: Frame) -> None:
    """Raise PeerProtocolError unless ``frame`` may come in ``state``, with its descriptors."""
    check_state(spec, state)
    frame.check_whole()
    check_fds(spec, len(frame.fds))


class _Outgoing:
    __slots__ = ("data", "fds", "key")

    def __init__(self, data: bytes | memoryview, fds: list[int], key: Hashable) -> None:
        self.data = data
        self.fds = fds
        self.key = key


class Link:
    """One connection. :meth:`run` serves it; everything else only calls in.

    Args:
        sock: Connected, AF_UNIX; closed when :meth:`run` ends.
        session: Takes the requests.
        limits: Budgets.
    """

    def __init__(self, sock: socket.socket, session: Session, limits: ServerLimits) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(stream=sock.type == socket.SOCK_STREAM)
        self._queue: deque[_Outgoing] = deque()
        self._queued_bytes = 0
        self._queued_keys: set[Hashable] = set()
        self._work = trio.Event()
        self._questions = Questions(self, limits.outstanding_requests, limits.reply_timeout)
        self._nursery: trio.Nursery | None = None
        self._finishing = False
        self._lingering = False
        self.session = session
        self.limits = limits
        self.name = "a peer without a name"
        """For logs; better once HELLO was said."""
        self.heard = trio.current_time()
        """When the last request came."""
        self.working = False
        """Whether a QUERY or COMMAND is being answered."""
        self.closed = trio.Event()
        """Set once nothing can be sent or received any more."""
        self.reason = ""
        """Why the link is closed."""
        self.broken = False
        """Whether that is because the peer broke a rule."""

    async def run(self) -> None:
        """Serve the connection until it is closed by either side; raises nothing but Cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.closed.is_set():
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._write_loop)
                await self._read_loop()
        finally:
            self.fail("the server let go")
            self._nursery = None
            self._reader.close()
            for item in self._queue:
                close_all(item.fds)
            self._queue.clear()
            close_connection(self._sock)

    def fail(self, reason: str) -> None:
        """Close the connection now; requests to the peer end in BrokenResourceError. Idempotent."""
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        self.abandon()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def finish(self, reason: str, *, linger: bool = False) -> None:
        """Close the connection as soon as everything queued is sent.

        Args:
            reason: Why.
            linger: Give the answers that the peer owes a moment to arrive. If a SOCK_SEQPACKET
                socket is closed with frames in it that nobody has read, Linux gives the peer
                ECONNRESET before what was sent to it last (net/unix/af_unix.c,
                unix_release_sock; net/core/datagram.c looks at the error first).
        """
        if self.closed.is_set() or self._finishing:
            return
        self._finishing = True
        self._lingering = linger and bool(self._questions)
        self.reason = reason
        if self._lingering:
            self.spawn(self._stop_lingering)
        self._close_if_done()

    async def _stop_lingering(self) -> None:
        await trio.sleep(_LINGER)
        self._lingering = False
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._finishing and not self._queue and not (self._lingering and self._questions):
            self.fail(self.reason)

    def abandon(self) -> None:
        """End all requests to the peer in BrokenResourceError; nobody waits for the answers."""
        self._questions.abandon(self.reason or "the peer said goodbye")

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run ``function`` beside the connection; it is cancelled when the connection ends."""
        if self._nursery is not None and not self.closed.is_set():
            self._nursery.start_soon(function)

    # -- sending -------------------------------------------------------------------------------

    def reply(
        self, kind: int, seq: int, payload: bytes = b"", fds: list[int] | None = None
    ) -> None:
        """Answer a request. ``fds`` are closed once sent. Cannot block."""
        fds = fds or []
        self._submit(pack_frame(kind, REPLY, seq, payload, len(fds)), fds)

    def reply_error(self, kind: int, seq: int, code: int, text: str) -> None:
        """Refuse a request. Cannot block."""
        self._submit(pack_frame(kind, REPLY | ERROR, seq, ErrorReply(code, text).encode()), [])

    def post(self, kind: int, payload: bytes, *, key: Hashable = None, drop: bool = False) -> None:
        """Send an asynchronous message. Cannot block.

        Args:
            kind: Message number.
            payload: Bytes.
            key: While a message with this key is queued, another is not added.
            drop: Drop it, rather than the connection, when the queue is half full.
        """
        if key is not None and key in self._queued_keys:
            return
        if drop and self._queued_bytes > self.limits.outgoing_bytes // 2:
            return
        self._submit(pack_frame(kind, ASYNC, 0, payload), [], key)

    def request_soon(
        self, kind: int, payload: bytes, fds: list[int], callback: Callable[[Answer], None]
    ) -> None:
        """Send a request; ``callback`` gets the answer, exactly once. Cannot block.

        Args:
            kind: Message number.
            payload: Bytes.
            fds: Closed once sent.
            callback: Must not raise.
        """
        if self.closed.is_set():
            close_all(fds)
            callback(trio.BrokenResourceError(self.reason))
            return
        seq = self._questions.ask(kind, callback)
        if seq is None:
            close_all(fds)
            callback(trio.BrokenResourceError(self.reason))
            return
        self._submit(pack_frame(kind, 0, seq, payload, len(fds)), fds)

    async def request(self, kind: int, payload: bytes, fds: list[int] | None = None) -> bytes:
        """Send a request and wait for the answer, at most ``reply_timeout`` seconds.

        Raises:
            RefusedError: The peer refused.
            trio.BrokenResourceError: The connection is gone; also if the answer took too long.
        """
        answered = trio.Event()
        answers: list[Answer] = []

        def callback(answer: Answer) -> None:
            answers.append(answer)
            answered.set()

        self.request_soon(kind, payload, fds or [], callback)
        with trio.move_on_after(self.limits.reply_timeout):
            await answered.wait()
        if not answers:
            self._questions.fail_late(kind)
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def _submit(self, data: bytes | memoryview, fds: list[int], key: Hashable = None) -> None:
        if self.closed.is_set() or self._finishing:
            close_all(fds)
            return
        if not self._queue:
            try:
                sent = send(self._sock, data, fds)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                close_all(fds)
                self.fail(f"connection lost: {error.strerror}")
                return
            if sent:
                close_all(fds)
                if sent == len(data):
                    return
                # Only SOCK_STREAM sends parts; the descriptors went with the first byte.
                data, fds = memoryview(data)[sent:], []
        if self._queued_bytes + len(data) > self.limits.outgoing_bytes:
            close_all(fds)
            self.fail(f"the peer does not read: {self._queued_bytes} bytes are waiting")
            return
        self._queue.append(_Outgoing(data, fds, key))
        self._queued_bytes += len(data)
        if key is not None:
            self._queued_keys.add(key)
        self._work.set()

    async def _write_loop(self) -> None:
        queue = self._queue
        while True:
            await self._work.wait()
            while queue:
                item = queue[0]
                try:
                    sent = send(self._sock, item.data, item.fds)
                except BlockingIOError:
                    with trio.move_on_after(self.limits.write_timeout) as scope:
                        await trio.lowlevel.wait_writable(self._sock)
                    if scope.cancelled_caught:
                        timeout = self.limits.write_timeout
                        self.fail(f"the peer does not read: nothing taken for {timeout:g} s")
                    continue
                except OSError as error:
                    self.fail(f"connection lost: {error.strerror}")
                    return
                self._queued_bytes -= sent
                close_all(item.fds)
                item.fds = []
                if sent < len(item.data):
                    item.data = memoryview(item.data)[sent:]
                    continue
                queue.popleft()
                self._queued_keys.discard(item.key)
            self._close_if_done()
            self._work = trio.Event()

    # -- receiving -----------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        sock, reader = self._sock, self._reader
        left = _TURN
        while not self.closed.is_set():
            try:
                frame = reader.next_frame()
            except PeerProtocolError as error:
                header = reader.last_header
                if header is not None and header[1] == 0:
                    self.reply_error(header[0], header[2], error.errno, str(error))
                self._lose(error)
                return
            if frame is not None:
                left -= 1 + len(frame.payload) // _PAYLOAD_PER_FRAME + len(frame.fds)
                if not self._take(frame):
                    return
            else:
                try:
                    alive = receive(sock, reader)
                except BlockingIOError:
                    left = _TURN
                    await trio.lowlevel.wait_readable(sock)
                    continue
                except OSError as error:
                    self.fail(f"connection lost: {error.strerror}")
                    return
                if not alive:
                    where = "" if reader.at_boundary() else " in the middle of a frame"
                    self.fail(f"the peer closed the connection{where}")
                    return
                left -= 1
            if left <= 0:
                left = _TURN
                await trio.lowlevel.checkpoint()

    def _take(self, frame: Frame) -> bool:
        """Act on one frame; False once a rule without an answer is broken."""
        try:
            self._dispatch(frame)
        except PeerProtocolError as error:
            self._lose(error)
            return False
        finally:
            refused = bool(frame.fds)
            frame.close()
        if refused and closing_backlog() > MAX_CLOSING:
            self.fail("its descriptors take too long to close")
        return True

    def _lose(self, error: PeerProtocolError) -> None:
        """Close the connection, but let what is queued get out, the refusal above all."""
        self.broken = True
        self.finish(str(error))
        self.abandon()

    def _dispatch(self, frame: Frame) -> None:
        if self.closed.is_set():
            return
        if frame.flags & REPLY:
            self._questions.answer_untrusted(frame)
            self._close_if_done()
            return
        if self._finishing:
            return
        asynchronous = bool(frame.flags & ASYNC)
        session = self.session
        try:
            spec = check_kind(frame.kind, Direction.TO_SERVER, asynchronous=asynchronous)
            session.check(spec, frame)
            if not asynchronous:
                self.heard = trio.current_time()
            session.handle(spec, frame)
        except PeerProtocolError as error:
            if error.fatal:
                raise
            if asynchronous:
                session.dropped(frame.kind, error)
            else:
                self.reply_error(frame.kind, frame.seq, error.errno, str(error))
